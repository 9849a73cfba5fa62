"""The sparse cache: what it holds, what it forgets, and what it refuses."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rtpurbo.attach import attached
from rtpurbo.cache import CACHE, SparseLayer, TokenBuffer, cache_bytes
from rtpurbo.heads import HeadMap
from rtpurbo.indexer import LayerIndexer, stored_keys
from tiny import (
    CONFIG,
    FAMILY_NAMES,
    HEAD_DIM,
    INDEX_DIM,
    KV_HEADS,
    QUERY_HEADS,
    assert_same,
    head_map,
    left_padded,
    logits,
    random_indexer,
    shared_model,
    tokens,
    with_windows,
)

WINDOW, SINKS = CONFIG.window_tokens, CONFIG.sink_tokens
LOCAL = WINDOW - 1
"""Tokens a local KV head keeps between two forwards: the next query's window but for the query itself."""


def filled_cache(model, ids, mask=None, chunks=None):
    """(cache, logits) after these tokens."""
    cache = DynamicCache(config=model.config)
    out = logits(model, ids, mask, chunks or [ids.shape[1]], cache)
    return cache, out


@pytest.fixture
def heads():
    return head_map(shared_model("llama"))


@pytest.fixture
def llama(heads):
    """A float64 model that is sparse during the test."""
    model = shared_model("llama", dtype=torch.float64)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        yield model


@pytest.mark.parametrize("chunks", [[60], [20, 1], [5, 1, 30, 7]])
def test_lengths_by_role(llama, heads, chunks):
    cache, _ = filled_cache(llama, tokens(60, 2), chunks=chunks)
    for layer, held in enumerate(cache.layers):
        assert isinstance(held, SparseLayer)
        assert held.get_seq_length() == 60
        full = heads.full_kv_heads(layer)
        view = held.view(None)
        assert view.full_k.shape == view.full_v.shape == (2, len(full), 60, HEAD_DIM)
        if len(full) < KV_HEADS:
            assert view.local_k.shape == view.local_v.shape == (2, KV_HEADS - len(full), LOCAL, HEAD_DIM)
            assert view.first_slot == 60 - LOCAL
            assert view.sink_k.shape == (2, KV_HEADS - len(full), SINKS, HEAD_DIM)
        units = heads.units(layer)
        assert (view.index_k is None) == (not units)
        if units:
            assert view.index_k.shape == (2, len(units), 60, INDEX_DIM)


@pytest.mark.parametrize("chunks", [[60], [20, 1], [5, 1, 30, 7]])
def test_a_window_ladder_keeps_the_longest_local_window_of_each_layer(heads, chunks):
    model = shared_model("llama", dtype=torch.float64)
    with attached(
        model, with_windows(heads, [3, 7, 5, 2], WINDOW), CONFIG
    ):  # local KV heads: 1 of layer 0, all 3 of layer 1
        cache, _ = filled_cache(model, tokens(60), chunks=chunks)
    assert [layer.view(None).local_k.shape[2] for layer in cache.layers[:2]] == [3 - 1, 7 - 1]
    assert cache.layers[0].view(None).full_k.shape[2] == 60


def test_everything_is_kept_until_the_window_and_sinks_are_full(llama, heads):
    cache = DynamicCache()
    ids = tokens(WINDOW + SINKS + 1)
    logits(llama, ids[:, :-1], cache=cache, chunks=[4])
    assert all(layer.all_heads()[0].shape[1:3] == (KV_HEADS, WINDOW + SINKS) for layer in cache.layers)
    logits(llama, ids[:, -1:], cache=cache, chunks=[1])
    assert [layer.is_split for layer in cache.layers] == [True, True, False]  # the last layer has no local KV head


@pytest.mark.parametrize("chunks", [[90], [17, 1, 40, 3]])
def test_kept_tensors_are_the_models_keys_and_values(heads, chunks):
    """Layer 0, whose keys do not depend on attention, against the cache of the unmodified model."""
    model = shared_model("llama", dtype=torch.float64)
    ids, mask = left_padded([90, 80, 30])
    dense, _ = filled_cache(model, ids, mask)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        sparse, _ = filled_cache(model, ids, mask, chunks)
    view = sparse.layers[0].view(mask)
    full, local = list(heads.full_kv_heads(0)), [2]
    for name, want in (("k", dense.layers[0].keys), ("v", dense.layers[0].values)):
        assert_same(getattr(view, f"full_{name}"), want[:, full], atol=1e-6)
        assert_same(getattr(view, f"local_{name}"), want[:, local, -LOCAL:], atol=1e-6)
        first_real = torch.stack([row[:, real][:, :SINKS] for row, real in zip(want[:, local], mask, strict=True)])
        assert_same(getattr(view, f"sink_{name}"), first_real, atol=1e-6)


def test_bytes_of_local_heads_do_not_grow():
    model = shared_model("llama")
    nobody = HeadMap(query_heads=QUERY_HEADS, kv_heads=KV_HEADS, granularity="head", retrieval=((), (), ()))
    cache, sizes = DynamicCache(), {}
    ids = tokens(190, 2)
    per_token = 2 * KV_HEADS * HEAD_DIM * 4 * 2 * 3  # batch, KV heads, dimension, float32, keys + values, layers
    with attached(model, nobody, CONFIG):
        for stop in range(1, 191):
            logits(model, ids[:, stop - 1 : stop], cache=cache, chunks=[1])
            sizes[stop] = cache_bytes(cache)
    # a window, the sinks, and at most a quarter + 64 tokens of room to grow
    assert max(sizes.values()) <= (1.25 * LOCAL + 64 + SINKS) * per_token
    assert max(sizes[n] for n in range(95, 191)) <= max(sizes[n] for n in range(1, 96))
    assert sizes[10] >= 10 * per_token
    dense = DynamicCache()
    logits(model, ids, cache=dense, chunks=[190])
    assert cache_bytes(dense) == 190 * per_token
    assert sizes[190] < cache_bytes(dense) / 2


def test_a_long_prompt_gives_its_memory_back():
    model = shared_model("llama")
    nobody = HeadMap(query_heads=QUERY_HEADS, kv_heads=KV_HEADS, granularity="head", retrieval=((), (), ()))
    with attached(model, nobody, CONFIG):
        cache, _ = filled_cache(model, tokens(199))
    live = sum(t.numel() * 4 for la in cache.layers for t in (la.view(None).local_k, la.view(None).local_v))
    live += sum(t.numel() * 4 for la in cache.layers for t in (la.view(None).sink_k, la.view(None).sink_v))
    assert live == 3 * 2 * KV_HEADS * (LOCAL + SINKS) * HEAD_DIM * 4
    assert live <= cache_bytes(cache) <= 1.25 * live + 3 * 2 * KV_HEADS * 64 * HEAD_DIM * 4


def test_bytes_count_index_keys_and_full_heads(llama, heads):
    cache, _ = filled_cache(llama, tokens(150))
    live = 0
    for layer in cache.layers:
        view = layer.view(None)
        parts = [view.full_k, view.full_v, view.sink_k, view.sink_v, view.index_k]
        if layer.local_heads:
            parts += [view.local_k, view.local_v]
        else:
            parts = [*layer.all_heads(), view.index_k]
        live += sum(t.numel() * t.element_size() for t in parts if t is not None)
    room = sum(64 * HEAD_DIM * 8 * 2 * len(layer.local_heads) for layer in cache.layers)
    assert live <= cache_bytes(cache) <= 1.25 * live + room


def test_index_keys_are_computed_once(llama, heads, monkeypatch):
    seen = []
    project = LayerIndexer.project_keys

    def counted(self, k_pre):
        seen.append(k_pre.shape[2])
        return project(self, k_pre)

    monkeypatch.setattr(LayerIndexer, "project_keys", counted)
    cache, _ = filled_cache(llama, tokens(50), chunks=[30, 1])
    assert sum(seen) == 50 * 2  # two of three layers have retrieval heads
    once, _ = filled_cache(llama, tokens(50))
    for pieces, whole in zip(cache.layers, once.layers, strict=True):
        if whole.view(None).index_k is not None:
            assert_same(pieces.view(None).index_k, whole.view(None).index_k, atol=1e-5)


def test_float8_index_keys_are_the_same_however_they_are_fed(heads):
    model = shared_model("llama", dtype=torch.float64)
    ids, mask = left_padded([90, 60])
    with attached(model, heads, dataclasses.replace(CONFIG, index_dtype="float8"), random_indexer(heads)):
        whole, _ = filled_cache(model, ids, mask)
        pieces, _ = filled_cache(model, ids, mask, [50, 1, 30, 1])
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        want, got = one.view(mask).index_k, other.view(mask).index_k
        if want is not None:
            assert want.dtype == got.dtype == torch.float8_e4m3fn
            assert (got.float() == want.float()).float().mean() > 0.999  # a last bit may tip a key over


def test_a_cache_keeps_its_index_dtype(heads):
    model, ids = shared_model("llama"), tokens(40)
    cache = DynamicCache(config=model.config)
    for dtype in ("auto", "float8"):
        with attached(model, heads, dataclasses.replace(CONFIG, index_dtype=dtype), random_indexer(heads)):
            if dtype == "auto":
                logits(model, ids, cache=cache, chunks=[40])
            else:
                with pytest.raises(ValueError, match="Start a new cache after changing index_dtype"):
                    logits(model, ids, cache=cache, chunks=[40])


def test_float8_index_keys_take_one_byte_a_dimension(heads):
    model = shared_model("llama", dtype=torch.bfloat16)
    held = {}
    for dtype in ("auto", "float8"):
        with attached(model, heads, dataclasses.replace(CONFIG, index_dtype=dtype), random_indexer(heads)):
            held[dtype], _ = filled_cache(model, tokens(120, 2))
    index = 2 * 120 * INDEX_DIM * sum(len(heads.units(layer)) for layer in heads.layers)
    assert cache_bytes(held["auto"]) - cache_bytes(held["float8"]) == index


@pytest.mark.parametrize("value", [500.0, 1e9, torch.inf])
def test_float8_index_keys_beyond_the_range_are_the_largest(value):
    keys = stored_keys(torch.tensor([value, -value, 448.0, 0.0]), "float8", torch.bfloat16)
    assert keys.float().tolist() == [448.0, -448.0, 448.0, 0.0]


def test_index_keys_are_not_kept_when_nothing_is_selected(heads):
    model = shared_model("llama")
    for config, indexer in (
        (CONFIG, None),
        (dataclasses.replace(CONFIG, window_tokens=WINDOW, top_p=1.0), random_indexer(heads)),
    ):
        with attached(model, heads, config, indexer):
            cache, _ = filled_cache(model, tokens(40))
        assert all(layer.view(None).index_k is None for layer in cache.layers)


def test_sinks_are_the_first_real_tokens(llama):
    ids, mask = left_padded([60, 45, 20])
    cache, _ = filled_cache(llama, ids, mask, [33, 1])
    want = [[0, 1, 2, 3], [15, 16, 17, 18], [40, 41, 42, 43]]
    assert cache.layers[0].view(mask).sinks.tolist() == want
    assert cache.layers[2].view(mask).sinks.tolist() == want  # never split: found anew from the mask


@pytest.mark.parametrize("late", [0, 1, 3, 4])
def test_rows_with_fewer_real_tokens_than_sinks_at_the_split(llama, late):
    """The second row has `late` real tokens when the cache splits; its other sinks come from later tokens."""
    split = 30
    lengths = [60, 60 - split + late]
    ids, mask = left_padded(lengths)
    for chunks in ([split, 1], [split, 2, 1, 27], [split, 30], [split - 5, 5, 30]):
        cache = DynamicCache()
        got = logits(llama, ids, mask, chunks, cache)
        start = 60 - lengths[1]
        assert cache.layers[0].view(mask).sinks.tolist() == [[0, 1, 2, 3], [start, start + 1, start + 2, start + 3]]
        for row, real in enumerate(mask):
            assert_same(got[row, real], logits(llama, ids[row, real][None])[0])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_several_turns_on_one_cache(family):
    """Ragged turns: a later turn's padding stands between real tokens."""
    model = shared_model(family, dtype=torch.float64)
    heads = head_map(model)
    turns = [left_padded(lengths, seed) for seed, lengths in enumerate([[20, 9], [3, 14], [1, 1], [12, 12]])]
    ids, mask = (torch.cat(parts, 1) for parts in zip(*turns, strict=True))
    with attached(model, heads, CONFIG, random_indexer(heads)):
        want = logits(model, ids, mask)
        got = logits(model, ids, mask, [part.shape[1] for part, _ in turns])
    assert_same(got, want, mask)


@pytest.mark.parametrize("length", [10, 40])  # before and after the split
@pytest.mark.parametrize("index_dtype", ["auto", "float8"])
def test_repeated_and_selected_rows(heads, length, index_dtype):
    llama = shared_model("llama", dtype=torch.float64)
    ids, mask = left_padded([length, length - 6, length - 4])
    more = tokens(12, 6, seed=9)
    real = torch.ones_like(more, dtype=torch.bool)

    def run(rows, change):
        cache = DynamicCache()
        logits(llama, ids, mask, [length], cache)
        change(cache)
        all_ids, all_mask = torch.cat([ids[rows], more[: len(rows)]], 1), torch.cat([mask[rows], real[: len(rows)]], 1)
        want = logits(llama, all_ids, all_mask)
        out = []
        for stop in range(length + 1, length + 13):
            step = llama(
                all_ids[:, stop - 1 : stop], attention_mask=all_mask[:, :stop], **{CACHE: cache},
                position_ids=all_mask[:, :stop].sum(-1, keepdim=True) - 1,
            )  # fmt: skip
            out.append(step.logits)
        assert_same(torch.cat(out, 1), want[:, length:])

    config = dataclasses.replace(CONFIG, index_dtype=index_dtype)
    with torch.no_grad(), attached(llama, heads, config, random_indexer(heads)):
        run([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2))
        run([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0])))
        run([1], lambda cache: cache.batch_select_indices(torch.tensor([1])))
        run([1, 1], lambda cache: (cache.batch_select_indices(torch.tensor([1])), cache.batch_repeat_interleave(2)))


def test_reset_then_reuse(llama):
    cache, _ = filled_cache(llama, *left_padded([50, 30]), [40, 1])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache_bytes(cache) == 0
    ids, mask = left_padded([35, 25, 30], seed=4)  # another batch size
    got = logits(llama, ids, mask, [20, 1], cache)
    assert_same(got, logits(llama, ids, mask), mask)


def test_a_plain_dynamic_cache_will_do(llama):
    for cache in (DynamicCache(), DynamicCache(config=llama.config)):
        out = llama(tokens(30), **{CACHE: cache})
        assert out[CACHE] is cache
        assert len(cache.layers) == 3
        assert cache.get_seq_length() == 30
    made = llama(tokens(30), use_cache=True)[CACHE]
    assert isinstance(made, DynamicCache)
    assert all(isinstance(layer, SparseLayer) for layer in made.layers)


def refused(message: str):
    return pytest.raises(ValueError, match=message)


def test_rollback_is_refused(llama):
    cache, _ = filled_cache(llama, tokens(30))
    with refused(r"cannot be rolled back, which assisted and speculative decoding need; generate without it\."):
        cache.crop(-1)
    assert not cache.is_croppable


def test_beam_search_is_refused(llama):
    cache, _ = filled_cache(llama, tokens(30, 2))
    with refused(r"Beam search is not supported by the sparse cache; use num_beams=1"):
        cache.reorder_cache(torch.tensor([1, 0]))


def test_offloading_is_refused(llama):
    cache = DynamicCache(offloading=True)
    with refused(r"without offloading, got DynamicCache with offloading\. Leave cache_implementation unset"):
        llama(tokens(30), **{CACHE: cache})
    cache, _ = filled_cache(llama, tokens(30))
    for method in ("offload", "prefetch"):
        with refused(r"offloaded cache is not supported by a sparse model; use the default cache"):
            getattr(cache.layers[0], method)()


def test_static_cache_is_refused(llama):
    with refused(rf"got StaticCache\. Leave cache_implementation unset or pass {CACHE}=DynamicCache\(\)"):
        llama(tokens(30), **{CACHE: StaticCache(config=llama.config, max_cache_len=64)})


def test_cache_of_a_dense_model_is_refused(heads):
    model = shared_model("llama")
    dense, _ = filled_cache(model, tokens(9))
    with attached(model, heads, CONFIG):
        with refused(r"filled by a dense model: its layer 0 holds 9 tokens already\. Start a new cache\."):
            model(tokens(2), **{CACHE: dense})
        sparse, _ = filled_cache(model, tokens(9))
    with refused(r"filled by a sparse model and cannot be used by a dense one; start a new cache"):
        model(tokens(2), **{CACHE: sparse})


def test_cache_of_other_settings_is_refused():
    model = shared_model("llama")
    mine, other = head_map(model), head_map(model, "group")
    wider = dataclasses.replace(CONFIG, window_tokens=WINDOW + 1, index_dim=INDEX_DIM)
    for heads, config in ((other, CONFIG), (mine, wider)):
        with attached(model, mine, CONFIG):
            cache, _ = filled_cache(model, tokens(30))
        with attached(model, heads, config):
            with refused(r"filled by another head map, window or number of sinks: its layer 0 holds 30 tokens"):
                model(tokens(2), **{CACHE: cache})
            cache.reset()  # an emptied cache serves any model
            assert_same(logits(model, tokens(40), chunks=[20, 1], cache=cache), logits(model, tokens(40)))


def test_tokens_without_index_keys_are_refused():
    model = shared_model("llama")
    heads = head_map(model)
    everything = dataclasses.replace(CONFIG, window_tokens=WINDOW, index_dim=INDEX_DIM, top_p=1.0)
    for length in (10, 30):
        with attached(model, heads, everything, random_indexer(heads)):
            cache, _ = filled_cache(model, tokens(length))
        with (
            attached(model, heads, CONFIG, random_indexer(heads)),
            refused(r"no index keys: they were written while everything was selected, or without an indexer\. Start a new"),
        ):
            model(tokens(2), **{CACHE: cache})


def test_layer_of_another_kind_is_refused(llama):
    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=8))
    with refused(r"Layer 0 of this cache is a DynamicSlidingWindowLayer; a sparse model needs a DynamicLayer there"):
        llama(tokens(5), **{CACHE: cache})


def test_sliding_layers_keep_their_own_cache():
    model = shared_model("gemma3_text")
    heads = head_map(model)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        cache, _ = filled_cache(model, tokens(40))
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, *[SparseLayer] * 3]
    sliding = cache.layers[0]
    assert isinstance(sliding, DynamicLayer)
    own = sum(t.untyped_storage().nbytes() for t in (sliding.keys, sliding.values))
    assert cache_bytes(cache) == own + sum(layer.nbytes() for layer in cache.layers[1:])


def test_token_buffer():
    data = torch.randn(2, 3, 200, 4)
    buffer = TokenBuffer(data[:, :, :10])
    end, kept = 10, 10
    for step in (1, 1, 5, 30, 1, 1, 100, 1, 50):
        before = buffer.tokens
        copy = before.clone()
        buffer.append(data[:, :, end : end + step])
        assert torch.equal(before, copy)  # tensors handed out stay as they were
        end, kept = end + step, kept + step
        assert torch.equal(buffer.tokens, data[:, :, end - kept : end])
        buffer.keep_last(12)
        kept = min(kept, 12)
        assert len(buffer) == kept
        assert torch.equal(buffer.tokens, data[:, :, end - kept : end])
    assert buffer.nbytes <= (12 * 1.25 + 64) * 2 * 3 * 4 * 4
    moves, storage = 0, buffer.tokens.untyped_storage().data_ptr()
    for step in range(100):  # appending one by one copies rarely
        buffer.append(data[:, :, step : step + 1])
        moves += buffer.tokens.untyped_storage().data_ptr() != storage
        storage = buffer.tokens.untyped_storage().data_ptr()
    assert 1 <= moves <= 6
