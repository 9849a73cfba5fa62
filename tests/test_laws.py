"""The exact laws of sparse attention, for every family and RoPE scaling, cached or not, chunked or not, ragged or not.

Window >= length equals dense; p = 1 (no least probability either) with every head a retrieval head equals dense;
p = 1 with a head map equals dense retrieval heads + window; and token by token equals all at once. Models run in
float64, so that a token whose score lies at the edge of the selection is on the same side of it in both computations.

"dynamic" and "longrope" RoPE change all frequencies once a sequence outgrows ORIGINAL_TOKENS, but not those of keys
that are cached already: there even the dense model gives other results with a cache than without. For all kinds the
laws with a cache stay below that length; a test of its own goes beyond it in one forward pass.
"""

import dataclasses
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from oracle import oracle
from rtpurbo.attach import attached, borrowed, checkpoint_activations, paused, reading
from rtpurbo.cache import CACHE, SparseLayer
from rtpurbo.config import SparseConfig
from rtpurbo.heads import HeadMap
from tiny import (
    CONFIG,
    FAMILY_NAMES,
    KV_HEADS,
    ORIGINAL_TOKENS,
    QUERY_HEADS,
    ROPE_TYPES,
    assert_same,
    converted_layers,
    head_map,
    left_padded,
    logits,
    positions,
    random_indexer,
    shared_model,
    tiny_model,
    tokens,
    with_windows,
)

LENGTH = 61
BATCHES = {"even": [LENGTH] * 2, "ragged": [LENGTH, LENGTH - 7, 25]}
MODES = {
    "no_cache": None,
    "one_prefill": [LENGTH],
    "pieces": [5, 1, 17, 1, 8, 1, 11, 2],  # the dense path, then the split, then single tokens and pieces in turn
    "decode": [33, 1],
    "decode_from_start": [1],
}
GRANULARITIES = ("head", "group")


def batch(kind: str):
    ids, mask = left_padded(BATCHES[kind])
    return ids, None if kind == "even" else mask


def every_head_retrieves(model) -> HeadMap:
    return HeadMap.uniform(
        layers=converted_layers(model), num_layers=model.config.num_hidden_layers, query_heads=QUERY_HEADS,
        kv_heads=KV_HEADS, dense=True,
    )  # fmt: skip


def check_modes(model, heads, config, indexer, want, ids, mask, modes=MODES):
    """All ways to run the sparse model give `want`."""
    with attached(model, heads, config, indexer):
        for mode in modes:
            try:
                assert_same(logits(model, ids, mask, MODES[mode]), want, mask)
            except AssertionError as error:
                raise AssertionError(f"{mode}: {error}") from error


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("rope", ROPE_TYPES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_window_of_the_whole_length_equals_dense(family, rope, kind):
    model = shared_model(family, rope=rope, dtype=torch.float64)
    ids, mask = batch(kind)
    want = logits(model, ids, mask)
    heads = head_map(model)
    config = dataclasses.replace(CONFIG, window_tokens=LENGTH)
    check_modes(model, heads, config, random_indexer(heads), want, ids, mask, ["no_cache", "one_prefill", "pieces"])


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("rope", ROPE_TYPES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_head_retrieving_everything_equals_dense(family, rope, kind):
    model = shared_model(family, rope=rope, dtype=torch.float64)
    ids, mask = batch(kind)
    want = logits(model, ids, mask)
    heads = every_head_retrieves(model)
    config = dataclasses.replace(CONFIG, top_p=1.0)
    check_modes(model, heads, config, random_indexer(heads), want, ids, mask, ["no_cache", "pieces"])


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("rope", ROPE_TYPES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_selecting_everything_equals_dense_retrieval_heads_and_window(family, rope, kind):
    model = shared_model(family, rope=rope, dtype=torch.float64)
    ids, mask = batch(kind)
    heads = head_map(model)
    config = dataclasses.replace(CONFIG, top_p=1.0)
    with oracle(model, heads, config):
        want = logits(model, ids, mask)
    assert (want - logits(model, ids, mask)).abs().max() > 0.1  # the window matters
    check_modes(model, heads, config, random_indexer(heads), want, ids, mask, ["no_cache", "one_prefill", "pieces"])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rope", ROPE_TYPES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_selection_equals_the_oracle_however_it_is_fed(family, rope, granularity):
    model = shared_model(family, rope=rope, dtype=torch.float64)
    ids, mask = batch("ragged")
    heads = head_map(model, granularity)
    indexer = random_indexer(heads)
    with oracle(model, heads, CONFIG):
        everything = logits(model, ids, mask)
    with oracle(model, heads, CONFIG, indexer):
        want = logits(model, ids, mask)
    assert (want - everything)[mask].abs().max() > 0.1  # the selection matters
    check_modes(model, heads, CONFIG, indexer, want, ids, mask, ["no_cache", "pieces"])


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_token_by_token_equals_one_forward(family, granularity, kind):
    model = shared_model(family, dtype=torch.float64)
    ids, mask = batch(kind)
    heads = head_map(model, granularity)
    indexer = random_indexer(heads)
    with attached(model, heads, CONFIG, indexer):
        want = logits(model, ids, mask)
    check_modes(model, heads, CONFIG, indexer, want, ids, mask, ["one_prefill", "decode", "decode_from_start"])


@pytest.mark.parametrize("rope", ROPE_TYPES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_beyond_the_original_length_in_one_forward(family, rope):
    model = tiny_model(family, rope=rope, dtype=torch.float64)  # "dynamic" remembers the longest length it has seen
    ids = tokens(ORIGINAL_TOKENS + 33)
    try:
        dense = logits(model, ids)
        assert torch.equal(logits(model, ids), dense)
    except UnboundLocalError:
        assert (family, rope) == ("gemma3_text", "longrope")
        pytest.skip("this version of Transformers cannot run the dense model")
    heads = head_map(model)
    indexer = random_indexer(heads)
    with attached(model, heads, dataclasses.replace(CONFIG, window_tokens=ids.shape[1])):
        assert_same(logits(model, ids), dense)
    with oracle(model, heads, CONFIG, indexer):
        want = logits(model, ids)
    with attached(model, heads, CONFIG, indexer):
        assert_same(logits(model, ids), want)


@pytest.mark.parametrize("config", [dict(sink_tokens=0), dict(window_tokens=1), dict(window_tokens=1, sink_tokens=0),
                                    dict(sink_tokens=30), dict(window_tokens=40), dict(top_p=0.05), dict(top_p=0.999),
                                    dict(index_dim=1)])  # fmt: skip
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_setting(granularity, config):
    model = shared_model("qwen3", dtype=torch.float64)
    ids, mask = batch("ragged")
    heads = head_map(model, granularity)
    config = dataclasses.replace(CONFIG, **config)
    indexer = random_indexer(heads, index_dim=config.index_dim)
    with oracle(model, heads, config, indexer):
        want = logits(model, ids, mask)
    check_modes(model, heads, config, indexer, want, ids, mask)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_float8_index_keys_select_the_same_however_they_are_fed(family, granularity):
    model = shared_model(family, dtype=torch.float64)
    ids, mask = batch("ragged")
    heads = head_map(model, granularity)
    indexer = random_indexer(heads)
    config = dataclasses.replace(CONFIG, index_dtype="float8")
    with oracle(model, heads, CONFIG, indexer):
        unrounded = logits(model, ids, mask)
    with oracle(model, heads, config, indexer):
        want = logits(model, ids, mask)
    assert (want - unrounded)[mask].abs().max() > 0.01  # rounding matters
    check_modes(model, heads, config, indexer, want, ids, mask)


@pytest.mark.parametrize("kind", list(BATCHES))
def test_dense_prefill(kind):
    """A prompt is read as the dense model reads it, in pieces too; decode is sparse."""
    model = shared_model(FAMILY_NAMES[0], dtype=torch.float64)
    ids, mask = batch(kind)
    heads = head_map(model)
    indexer = random_indexer(heads)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()

    def run(chunks=None, **settings):
        with attached(model, heads, dataclasses.replace(CONFIG, **settings), indexer):
            return logits(model, ids, mask, chunks)

    dense = logits(model, ids, mask)
    for chunks in ([LENGTH], [20, 30, 11]):
        assert_same(run(chunks, dense_end_tokens=LENGTH)[real], dense[real])
    assert (run([LENGTH]) - dense)[real].abs().max() > 0.01  # it would not be so
    decode = [45, 1]  # as where the prompt is just short enough to stay dense
    assert_same(run(decode, dense_end_tokens=LENGTH)[real], run(decode, dense_below_tokens=46)[real])


@pytest.mark.parametrize("kind", list(BATCHES))
@pytest.mark.parametrize("granularity", GRANULARITIES)
@torch.no_grad()
def test_dense_end(kind, granularity, monkeypatch):
    """The last tokens of a prompt attend to all of it in every layer, those before them sparsely; decode is sparse."""
    end = 7
    monkeypatch.setattr("rtpurbo.ops.prefill.MASK_ELEMENTS", 2 * LENGTH * 6)  # pieces of 1 or 2 queries
    model = shared_model(FAMILY_NAMES[0], dtype=torch.float64)
    ids, mask = batch(kind)
    heads = head_map(model, granularity)
    indexer = random_indexer(heads)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()

    def run(chunks=None, **settings):
        with attached(model, heads, dataclasses.replace(CONFIG, **settings), indexer):
            return logits(model, ids, mask, chunks)

    sparse, got = run(), run([LENGTH], dense_end_tokens=end)
    assert_same(got[:, :-end][real[:, :-end]], sparse[:, :-end][real[:, :-end]])
    assert (got - sparse)[:, -end:][real[:, -end:]].abs().max() > 0.01
    assert_same(run(dense_end_tokens=end)[real], sparse[real])  # without a cache it is no prompt

    # what a dense end is: everything before it sparse without forgetting, then the end dense
    at, first = positions(real), slice(0, LENGTH - end)
    with attached(model, heads, CONFIG, indexer), monkeypatch.context() as patch:
        patch.setattr(SparseLayer, "drop", lambda *_: None)
        before = {"attention_mask": None if mask is None else mask[:, first], "position_ids": at[:, first]}
        cache = DynamicCache(config=model.config)
        model(ids[:, first], use_cache=True, **{CACHE: cache}, **before)
    with attached(model, heads, CONFIG.with_options(dense_end_tokens=LENGTH), indexer):
        want = model(ids[:, -end:], attention_mask=mask, position_ids=at[:, -end:], **{CACHE: cache}).logits
    assert_same(got[:, -end:][real[:, -end:]], want[real[:, -end:]])

    for some, dropped in ((end, False), (0, True)):  # read in pieces
        cache, cut = DynamicCache(config=model.config), LENGTH - 20
        with attached(model, heads, CONFIG.with_options(dense_end_tokens=some), indexer):
            for part in (slice(0, cut), slice(cut, None)):
                seen = None if mask is None else mask[:, : part.stop]
                with reading(model) if part.stop else nullcontext():
                    more = model(ids[:, part], attention_mask=seen, position_ids=at[:, part], **{CACHE: cache}).logits
                assert {layer.in_prompt for layer in cache.layers} == {bool(part.stop) and not dropped}
        assert_same(more[real[:, cut:]], (got if some else sparse)[:, cut:][real[:, cut:]])

    assert_same(run([1], dense_end_tokens=end)[real], run([1])[real])  # a single token is no prompt


def test_dense_below_a_length():
    """One forward is dense below it and sparse from it on; in decode retrieval heads are dense until it is reached."""
    model = shared_model(FAMILY_NAMES[0], dtype=torch.float64)
    ids, _ = batch("even")
    heads = head_map(model)
    indexer = random_indexer(heads)
    dense = logits(model, ids)

    def run(length, rule=CONFIG, chunks=None):
        with attached(model, heads, dataclasses.replace(rule, dense_below_tokens=length), indexer):
            return logits(model, ids, None, chunks)

    for chunks in (None, [LENGTH], [20, 30, 11]):
        assert_same(run(LENGTH + 1, chunks=chunks), dense)
    for chunks in (None, [LENGTH]):
        assert_same(run(LENGTH, chunks=chunks), run(0))
    everything = dataclasses.replace(CONFIG, top_p=1.0)
    decode = [33, 1]
    assert_same(run(LENGTH + 1, chunks=decode), run(34, everything, decode))
    assert_same(run(40, chunks=decode)[:, :39], run(34, everything, decode)[:, :39])
    sparse, selected = run(34, chunks=decode), run(40, chunks=decode)
    assert_same(selected[:, :33], dense[:, :33])
    assert (sparse - selected)[:, 33:39].abs().max() > 0.01  # the selection matters
    assert_same(run(40, chunks=[45, 16])[:, :45], run(0, chunks=[45, 16])[:, :45])


@pytest.mark.parametrize(
    "retrieval",
    [
        [(), (), ()],
        [(0, 1, 2, 3, 4, 5)] * 3,
        [(0,), (5,), (2, 3)],
        [(0, 2, 4), (1, 3, 5), (0, 1, 2, 3, 4)],
    ],
)
def test_every_mix_of_roles(retrieval):
    model = shared_model("llama", dtype=torch.float64)
    ids, mask = batch("ragged")
    heads = head_map(model, "head", retrieval)
    indexer = random_indexer(heads)
    with oracle(model, heads, CONFIG, indexer):
        want = logits(model, ids, mask)
    check_modes(model, heads, CONFIG, indexer, want, ids, mask)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_ladder_of_equal_windows_is_no_ladder(granularity):
    """Bit for bit, however it is fed."""
    model = shared_model("llama")
    ids, mask = batch("ragged")
    heads = head_map(model, granularity)
    indexer = random_indexer(heads)
    for chunks in MODES.values():
        results = []
        for its in (heads, with_windows(heads, [CONFIG.window_tokens], CONFIG.window_tokens)):
            with attached(model, its, CONFIG, indexer):
                results.append(logits(model, ids, mask, chunks))
        assert torch.equal(*results)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("windows", [[3, 12, 7], [1, 2], [5]])
def test_a_ladder_equals_the_oracle_however_it_is_fed(windows, granularity, kind):
    model = shared_model("qwen3", dtype=torch.float64)
    ids, mask = batch(kind)
    plain = head_map(model, granularity)
    heads = with_windows(plain, windows, CONFIG.window_tokens)
    indexer = random_indexer(heads)
    with oracle(model, plain, CONFIG, indexer):
        without = logits(model, ids, mask)
    with oracle(model, heads, CONFIG, indexer):
        want = logits(model, ids, mask)
    assert (want - without).abs().max() > 0.1  # the ladder matters
    check_modes(model, heads, CONFIG, indexer, want, ids, mask)


def check_random_batch(draw, seed, model, heads, config, indexer):
    """Rows of any lengths and padding (in the middle of one too), whole and in pieces, against the oracle."""
    longest = draw.randint(12, 58)
    ids, mask = left_padded([longest, *(draw.randint(1, longest) for _ in range(draw.randint(0, 3)))], seed)
    if draw.random() < 0.4:
        row, start = draw.randrange(len(ids)), draw.randint(3, longest - 2)
        mask[row, start : min(longest - 1, start + draw.randint(1, 6))] = False
    with oracle(model, heads, config, indexer):
        want = logits(model, ids, mask)
    with attached(model, heads, config, indexer):
        assert_same(logits(model, ids, mask), want, mask)
        assert_same(logits(model, ids, mask, [draw.choice([1, 1, 2, 3, 5, 9, 17, 30]) for _ in range(12)]), want, mask)


@pytest.mark.parametrize("seed", range(12))
def test_random_ladders(seed):
    draw = random.Random(seed)
    model = shared_model("llama", dtype=torch.float64)
    rows = [tuple(h for h in range(QUERY_HEADS) if draw.random() < draw.choice([0.0, 0.2, 0.5])) for _ in range(3)]
    config = dataclasses.replace(
        CONFIG, window_tokens=draw.choice([2, 9, 30, 70]), sink_tokens=draw.choice([0, 1, 4, 9]),
        min_probability=draw.choice([0.0, 0.03]),
    )  # fmt: skip
    windows = [draw.randint(1, config.window_tokens) for _ in range(5)]
    heads = with_windows(head_map(model, "head", rows), windows, config.window_tokens)
    indexer = random_indexer(heads, seed)
    check_random_batch(draw, seed, model, heads, config, indexer)


@pytest.mark.parametrize("heads_and_kv", [(4, 4), (4, 1), (8, 2)])
def test_every_group_size(heads_and_kv):
    query_heads, kv_heads = heads_and_kv
    model = tiny_model("llama", dtype=torch.float64, num_attention_heads=query_heads, num_key_value_heads=kv_heads)
    ids, mask = batch("ragged")
    for granularity in GRANULARITIES:
        size = query_heads // kv_heads if granularity == "group" else 1
        rows = (tuple(range(size)), (), tuple(range(query_heads - size, query_heads)))
        heads = HeadMap(query_heads=query_heads, kv_heads=kv_heads, granularity=granularity, retrieval=rows)
        indexer = random_indexer(heads)
        with oracle(model, heads, CONFIG, indexer):
            want = logits(model, ids, mask)
        check_modes(model, heads, CONFIG, indexer, want, ids, mask)


@pytest.mark.parametrize("seed", range(60))
def test_random_settings(seed):
    """Any family, roles, settings, padding (in the middle of a row too) and pieces, against the oracle."""
    draw = random.Random(seed)
    model = shared_model(draw.choice(FAMILY_NAMES), dtype=torch.float64)
    granularity = draw.choice(GRANULARITIES)
    size = 2 if granularity == "group" else 1
    rows = []
    for _ in range(3):
        share = draw.choice([0.0, 0.2, 0.5, 1.0])
        units = [u for u in range(QUERY_HEADS // size) if draw.random() < share]
        rows.append(tuple(h for u in units for h in range(u * size, (u + 1) * size)))
    heads = head_map(model, granularity, rows)
    config = SparseConfig(
        window_tokens=draw.choice([1, 2, 3, 7, 12, 20, 40]), sink_tokens=draw.choice([0, 1, 4, 9]),
        index_dim=draw.choice([1, 4, 8]), top_p=draw.choice([0.2, 0.5, 0.8, 0.95, 1.0]),
        min_probability=draw.choice([0.0, 0.0, 0.03]),
    )  # fmt: skip
    indexer = random_indexer(heads, seed, config.index_dim)
    check_random_batch(draw, seed, model, heads, config, indexer)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_ragged_batch_equals_each_row_alone(family, granularity):
    model = shared_model(family, dtype=torch.float64)
    ids, mask = batch("ragged")
    heads = head_map(model, granularity)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        for chunks in (None, [9, 1, 20, 1]):
            together = logits(model, ids, mask, chunks)
            for row, real in enumerate(mask):
                assert_same(together[row, real], logits(model, ids[row, real][None])[0])


def test_padding_longer_than_the_window_fed_token_by_token():
    """A row that is nothing but padding when local heads begin to drop, one token at a time."""
    model = shared_model("llama", dtype=torch.float64)
    ids, mask = left_padded([50, 3, 20])
    heads = head_map(model)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        together = logits(model, ids, mask, [1])
        assert together.isfinite().all()
        for row, real in enumerate(mask):
            assert_same(together[row, real], logits(model, ids[row, real][None])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_short_sequences_are_bit_equal_to_the_unmodified_model(family, dtype):
    model = shared_model(family, dtype=dtype)
    heads = head_map(model)
    longest = CONFIG.window_tokens + CONFIG.sink_tokens
    for lengths in ([longest], [1], [longest, longest - 5, 3]):
        ids, mask = left_padded(lengths)
        mask = mask if len(lengths) > 1 else None
        for chunks in (None, [longest], [7, 1, 3, 1]):
            want = logits(model, ids, mask, chunks)
            with attached(model, heads, CONFIG, random_indexer(heads)):
                got = logits(model, ids, mask, chunks)
            if mask is not None:
                got, want = got[mask], want[mask]
            # an expert's batch holds padding as well, whose other values give it another shape and other rounding
            slack = 0.0 if family != "qwen3_moe" or mask is None else 64 * torch.finfo(dtype).eps
            torch.testing.assert_close(got, want, atol=slack, rtol=0)
    ids = tokens(longest + 1)  # one more token, and it is sparse
    with attached(model, heads, CONFIG, random_indexer(heads)):
        got = logits(model, ids)
    want = logits(model, ids)
    assert not torch.equal(got[:, -1], want[:, -1])


def test_no_indexer_leaves_retrieval_heads_dense():
    model = shared_model("llama", dtype=torch.float64)
    ids, mask = batch("ragged")
    heads = head_map(model)
    with oracle(model, heads, dataclasses.replace(CONFIG, top_p=1.0)):
        want = logits(model, ids, mask)
    check_modes(model, heads, CONFIG, None, want, ids, mask)


@pytest.mark.parametrize("ladder", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_equal_the_oracles(granularity, ladder):
    model = tiny_model("qwen3", dtype=torch.float64)
    ids, mask = batch("ragged")
    heads = head_map(model, granularity)
    if ladder:
        heads = with_windows(heads, [3, 12, 7], CONFIG.window_tokens)
    indexer = random_indexer(heads)

    def gradients():
        model.zero_grad()
        out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        out.log_softmax(-1)[mask].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    with oracle(model, heads, CONFIG, indexer):
        want = gradients()
    with attached(model, heads, CONFIG, indexer), borrowed(model):
        for checkpointing in (False, True):
            if checkpointing:
                checkpoint_activations(model)
            got = gradients()
            assert got.keys() == want.keys()
            for name in want:
                torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


TRAINING_STEP = """
import resource, sys
import torch
from rtpurbo.attach import attached, borrowed
from tiny import SparseConfig, head_map, random_indexer, tiny_model, tokens

torch.set_num_threads(1)
length = int(sys.argv[1])
model = tiny_model(num_hidden_layers=1, max_position_embeddings=length)
heads = head_map(model, "group", [(0, 1)])
ids = tokens(length)

def peak_after_a_step(length):
    model(ids[:, :length], use_cache=False, logits_to_keep=1).logits.sum().backward()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

config = SparseConfig(window_tokens=256, sink_tokens=4, index_dim=8, top_p=0.7, min_probability=0.0)
with attached(model, heads, config, random_indexer(heads)), borrowed(model):
    before = peak_after_a_step(512)
    print(peak_after_a_step(length) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how memory is counted and given back is Linux's way")
def test_training_needs_no_matrix_of_length_by_length():
    """A step at 8K of a layer of 6 heads needs less memory than the attention of one head would fill, dense."""
    length = 8192
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 18),  # bytes; larger blocks go back at once, so that only live ones count
    }
    command = [sys.executable, "-c", TRAINING_STEP, str(length)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < length * length * torch.float32.itemsize / 2


def test_single_token_with_gradients_enabled():
    model = shared_model("llama", dtype=torch.float64)
    ids = tokens(40)
    heads = head_map(model)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        want = logits(model, ids)
        cache = DynamicCache()
        model(ids[:, :-1], **{CACHE: cache})
        out = model(ids[:, -1:], **{CACHE: cache}).logits
    assert out.requires_grad
    assert_same(out[:, 0].detach(), want[:, -1])


def test_paused_is_dense_and_resumes():
    model = shared_model("llama", dtype=torch.float64)
    ids = tokens(50)
    dense = logits(model, ids)
    heads = head_map(model)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        sparse = logits(model, ids)
        with paused(model):
            assert torch.equal(logits(model, ids), dense)
        assert torch.equal(logits(model, ids), sparse)
    assert not torch.equal(sparse, dense)


def test_custom_masks_are_refused():
    model = shared_model("llama")
    ids = tokens(40)
    heads = head_map(model)
    with attached(model, heads, CONFIG):
        with pytest.raises(ValueError, match=r"2D attention mask.*custom 4D masks are not supported"):
            model(ids, attention_mask=torch.ones(1, 1, 40, 40, dtype=torch.bool).tril())
        packed = torch.cat([torch.arange(20), torch.arange(20)])[None]
        with pytest.raises(ValueError, match=r"Packed sequences and custom masks are not supported.*one document a row"):
            model(ids, position_ids=packed, use_cache=False)
