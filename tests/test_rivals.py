"""The baselines of benchmarks/rivals.py do what their papers say, count what they read, and give the model back."""

import copy
import dataclasses

import pytest
import rivals
import torch
import torch.nn.functional as F
from rivals import METHODS, budget_for, our_read_ratio, quest_bounds, quest_keep, quest_scores, rival, snapkv_kept
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rtpurbo.attention import LayerState
from rtpurbo.cache import CACHE
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
)

PROMPT, STEPS = 90, 6
ONCE = torch.randperm(PROMPT + STEPS, generator=torch.Generator().manual_seed(3))[None] + 1
"""Every token once: in the first layer equal tokens have equal index scores, and rounding would choose among them."""
NEAR = CONFIG.window_tokens + CONFIG.sink_tokens
CHUNKS = [PROMPT, 1]


def run(model, method: str, budget: int, granularity: str = "group", ids: Tensor | None = None):
    """(logits [B, T, vocabulary] of a prompt and STEPS decoded tokens, bytes_ratio)."""
    heads = head_map(model, granularity)
    with rival(model, method, budget_tokens=budget, heads=heads, indexer=random_indexer(heads), config=CONFIG) as reads:
        got = logits(model, tokens(PROMPT + STEPS) if ids is None else ids, chunks=CHUNKS)
    return got, reads.bytes_ratio


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_with_a_budget_for_everything_it_is_dense(family, method):
    model, long = shared_model(family), PROMPT + STEPS
    heads, config = head_map(model, "head"), dataclasses.replace(CONFIG, window_tokens=long if method == "razor" else 12)
    if method == "top_k":  # local heads are local whatever its budget
        heads = head_map(model, "group", [tuple(range(QUERY_HEADS))] * 3)
    with rival(model, method, budget_tokens=long + 4, heads=heads, indexer=random_indexer(heads), config=config) as reads:
        got = logits(model, tokens(long), chunks=CHUNKS)
    assert_same(got, logits(model, tokens(long), chunks=CHUNKS))
    assert reads.bytes_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("method", METHODS)
def test_with_a_small_budget_it_is_not(method):
    model = shared_model("qwen3")
    got, ratio = run(model, method, 40)
    change = (got - logits(model, tokens(PROMPT + STEPS), chunks=CHUNKS)).abs().amax((0, 2))
    assert change[PROMPT:].min() > 1e-3
    assert (change[:PROMPT].max() < 1e-4) == (method in ("quest", "snapkv"))  # dense in prefill
    assert 0.1 < ratio < 0.9


@pytest.mark.parametrize("method", ["razor", "window", "top_k"])
def test_the_end_of_a_prompt_may_be_read_densely(method):
    """All of it: prefill is dense then. A part: its rows change. Decode reads no more."""
    model = shared_model("qwen3")
    heads, want = head_map(model, "group"), logits(model, tokens(PROMPT + STEPS), chunks=CHUNKS)
    found = {}
    for end in (0, 10, PROMPT):
        config = dataclasses.replace(CONFIG, dense_end_tokens=end)
        chosen = {"budget_tokens": 9 if method == "top_k" else NEAR, "indexer": random_indexer(heads)}
        with rival(model, method, heads=heads, config=config, **chosen) as reads:
            found[end] = logits(model, tokens(PROMPT + STEPS), chunks=CHUNKS), reads.bytes_ratio
    assert_same(found[PROMPT][0][:, :PROMPT], want[:, :PROMPT])
    assert_same(found[10][0][:, : PROMPT - 10], found[0][0][:, : PROMPT - 10])
    for end, rows in ((10, slice(PROMPT - 10, PROMPT)), (PROMPT, slice(NEAR, PROMPT))):
        assert (found[end][0] - found[0][0])[:, rows].abs().amax((0, 2)).min() > 1e-4
    assert (found[PROMPT][0] - want)[:, PROMPT:].abs().amax((0, 2)).min() > 1e-4
    assert len({ratio for _, ratio in found.values()}) == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_given_back(method):
    model = shared_model("gemma3_text")
    before = {name: dict(m.__dict__, modules=[*m._modules]) for name, m in model.named_modules()}
    implementation, want = model.config._attn_implementation, logits(model, tokens(PROMPT))
    run(model, method, 40)
    heads = head_map(model, "group")
    with (
        pytest.raises(KeyError),
        rival(model, method, budget_tokens=40, heads=heads, indexer=random_indexer(heads), config=CONFIG),
    ):
        raise KeyError
    after = {name: dict(m.__dict__, modules=[*m._modules]) for name, m in model.named_modules()}
    assert [name for name in before if before[name].keys() != after[name].keys()] == []
    assert [name for name in before if before[name]["modules"] != after[name]["modules"]] == []
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model, tokens(PROMPT)), want)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "razr"}, "method must be one of razor, window, top_k, quest, snapkv, got 'razr'"),
        ({"method": "razor", "heads": None}, "razor needs heads and config"),
        ({"method": "top_k", "indexer": None}, "top_k needs an indexer"),
        ({"method": "snapkv", "budget_tokens": 32}, "snapkv needs a budget of more than 32 tokens, got 32"),
    ],
)
def test_what_it_lacks_is_named(given, message):
    model = shared_model()
    heads = head_map(model, "group")
    whole = {"budget_tokens": 40, "heads": heads, "indexer": random_indexer(heads), "config": CONFIG}
    with pytest.raises(ValueError, match=message), rival(model, **(whole | given)):
        pass


def test_a_prompt_in_pieces_is_refused():
    model = shared_model()
    with rival(model, "snapkv", budget_tokens=40), pytest.raises(ValueError, match="a prompt whole and without padding"):
        logits(model, tokens(PROMPT), chunks=[50, 40])


def masked_logits(model, ids: Tensor, see: Tensor) -> Tensor:
    """Logits of the dense model under an explicit mask [T, T]."""
    return model(ids, attention_mask=see[None, None], use_cache=False).logits


@torch.no_grad()
def test_window_is_sinks_and_a_window():
    model, ids = shared_model("qwen3"), tokens(PROMPT + STEPS)
    place = torch.arange(PROMPT + STEPS)
    age = place[:, None] - place
    want = masked_logits(model, ids, (age >= 0) & ((age < 36) | (place < 4)))
    assert_same(run(model, "window", 40)[0], want)


# top_k


def seen_by_top_k(granularity: str, budget: int, layer: int = 2):
    """(LayerState, mask [Hq, T, N], far [T, N]) of random index queries and keys."""
    heads = head_map(shared_model(), granularity)
    state = LayerState(layer, heads, CONFIG, qk_norm=False)
    units = len(heads.units(layer))
    index_q, index_k = torch.randn(2, 1, units, PROMPT, INDEX_DIM)
    place = torch.arange(PROMPT)
    keep = rivals.top_k_keep(budget, state, place, PROMPT, index_q, index_k, None)
    far = (place[:, None] - place >= CONFIG.window_tokens) & (place >= CONFIG.sink_tokens)
    return state, keep[0], far, (index_q[0] @ index_k[0].mT).masked_fill(~far, -torch.inf)


@pytest.mark.parametrize("granularity", ["head", "group"])
def test_top_k_selects_the_best_k_of_every_unit(granularity):
    state, keep, far, scores = seen_by_top_k(granularity, 7)
    place = torch.arange(PROMPT)
    near = (place <= place[:, None]) & ~far
    for head in range(QUERY_HEADS):
        unit = state.head_units[head]
        assert torch.equal(keep[head] & ~far, near)
        count = (keep[head] & far).sum(-1)
        assert torch.equal(count, far.sum(-1).clamp(max=7 if unit >= 0 else 0))
        if unit >= 0:
            worst = scores[unit].masked_fill(~(keep[head] & far), torch.inf).amin(-1)
            best_left = scores[unit].masked_fill(keep[head], -torch.inf).amax(-1)
            assert (worst >= best_left).all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("granularity", ["head", "group"])
def test_top_k_with_enough_is_razor(family, granularity):
    model = shared_model(family)
    want, ratio = run(model, "razor", 0, granularity)
    got, same = run(model, "top_k", PROMPT, granularity)
    assert_same(got, want)
    assert same == pytest.approx(ratio)
    assert (run(model, "top_k", 9, granularity)[0] - want).abs().max() > 1e-2


def test_top_k_in_decode_is_top_k_in_prefill(monkeypatch):
    model = shared_model("qwen2")
    heads = head_map(model, "head")
    got = run(model, "top_k", 9, "head", ONCE)[0]
    monkeypatch.setattr(rivals, "PIECE_ELEMENTS", 2 * 96 * 7)  # pieces of 7 queries where two heads retrieve
    with rival(
        model, "top_k", budget_tokens=9, heads=heads, indexer=random_indexer(heads).state_dict(), config=CONFIG
    ) as reads:
        assert_same(logits(model, ONCE), got)
    assert reads.bytes_ratio != reads.bytes_ratio  # nothing was decoded


# Quest


def test_quest_bounds_never_underestimate():
    q, k = torch.randn(2, KV_HEADS, 2, HEAD_DIM), torch.randn(2, KV_HEADS, 50, HEAD_DIM)
    lengths = torch.tensor([50, 21])
    scores = quest_scores(q, *quest_bounds(k, lengths))
    exact = (q @ k.mT).amax(2)  # [B, Hkv, N]
    for row, length in enumerate(lengths):
        for page in range(-(-int(length) // 16)):
            best = exact[row, :, page * 16 : min(page * 16 + 16, int(length))].amax(-1)
            assert (scores[row, :, page] >= best - 1e-5).all()
    low, high = (x[:, :, 3] for x in quest_bounds(k, lengths))
    assert torch.equal(low[0], k[0, :, 48:50].amin(1))  # the partial page, and its bounds are no looser than they need be
    assert torch.equal(high[0], k[0, :, 48:50].amax(1))


def test_quest_scores_equal_keys_exactly_and_takes_the_best_head():
    q, k = torch.randn(1, KV_HEADS, 3, HEAD_DIM), torch.randn(1, KV_HEADS, 4, HEAD_DIM)
    scores = quest_scores(q, *quest_bounds(k.repeat_interleave(16, 2), torch.tensor([64])))
    torch.testing.assert_close(scores, (q @ k.mT).amax(2))


@pytest.mark.parametrize("planted", [5, 37, 58])
def test_quest_reads_the_page_of_a_planted_key(planted):
    q, k = torch.randn(1, 1, 2, HEAD_DIM), 0.1 * torch.randn(1, 1, 70, HEAD_DIM)
    k[0, 0, planted] = 3 * q[0, 0, 1]
    keep, bounds = quest_keep(q, k, torch.tensor([70]), 5 + 2 * 16 + 15)  # 5 pages' bounds, two pages, not quite a third
    place = torch.arange(70)
    assert torch.equal(keep[0, 0, 0], (place // 16 == planted // 16) | (place >= 64))
    assert bounds.item() == 5


def test_quest_leaves_two_layers_dense():
    model = shared_model()
    _, ratio = run(model, "quest", 40)
    lengths = range(PROMPT + 1, PROMPT + STEPS + 1)  # all of 6 pages: (40 - 6) // 16 = 2 pages, one of them the last
    third = sum((6 + 16 + length - 80) / length for length in lengths) / STEPS
    assert ratio == pytest.approx((1 + 1 + third) / 3)


# SnapKV


def test_snapkv_keeps_what_the_last_queries_attend_to():
    q, k = torch.zeros(1, 2, PROMPT, HEAD_DIM), torch.zeros(1, 1, PROMPT, HEAD_DIM)
    q[0, 1, -32, 0] = k[0, 0, 20, 0] = 4  # the oldest of the last 32 queries, in one head
    q[0, 0, -33, 1] = k[0, 0, 40, 1] = 9  # a query before them
    kept = snapkv_kept(q, k, 32 + 7, 1.0)[0, 0]
    place = torch.arange(PROMPT)
    assert torch.equal(kept, (place >= PROMPT - 32) | ((place >= 17) & (place <= 23)))  # pooling keeps its neighbours too
    assert snapkv_kept(q, k, PROMPT, 1.0).all()


def test_snapkv_chooses_by_each_heads_whole_attention():
    q, k = torch.randn(1, 4, PROMPT, HEAD_DIM), torch.randn(1, 2, PROMPT, HEAD_DIM)
    kept = snapkv_kept(q, k, 50, 0.25)
    logits = (q @ k.repeat_interleave(2, 1).mT) * 0.25
    logits = logits.masked_fill(torch.ones(PROMPT, PROMPT).triu(1).bool(), -torch.inf)
    mass = logits.softmax(-1)[:, :, -32:, :-32].sum(2).unflatten(1, (2, 2)).sum(2)
    padded = F.pad(mass, (3, 3))
    pooled = torch.stack([padded[..., i : i + 7].mean(-1) for i in range(PROMPT - 32)], -1)
    for head in range(2):
        assert set(kept[0, head, :-32].nonzero()[:, 0].tolist()) == set(pooled[0, head].topk(18).indices.tolist())


def test_snapkv_reads_every_generated_token():
    model, cache = shared_model("qwen3"), DynamicCache(config=shared_model("qwen3").config)
    with rival(model, "snapkv", budget_tokens=40) as reads:
        logits(model, tokens(PROMPT + STEPS), chunks=CHUNKS, cache=cache)
    for layer in cache.layers:
        assert layer.notes[..., PROMPT:, :].all()
        assert (layer.notes[:, :, :PROMPT].sum((2, 3)) == 40).all()
    steps = range(1, STEPS + 1)
    assert reads.bytes_ratio == pytest.approx(sum((40 + i) / (PROMPT + i) for i in steps) / STEPS)


# Batches


def joined(caches: list[DynamicCache], pads: list[int], config) -> DynamicCache:
    """One cache of several, each behind so many slots of padding."""
    made = DynamicCache(config=config)
    for i, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        if hasattr(layers[0], "joined"):
            made.layers[i] = layers[0].joined(list(layers[1:]), pads)
            continue
        assert type(layers[0]) is DynamicLayer
        sides = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
        made.layers[i].update(
            *(torch.cat([F.pad(x, (0, 0, n, 0)) for x, n in zip(side, pads, strict=True)]) for side in sides)
        )
    return made


@pytest.mark.parametrize("method", ["top_k", "quest", "snapkv"])
@torch.no_grad()
def test_a_left_padded_batch_decodes_as_each_sequence_alone(method):
    model, lengths = shared_model("qwen3"), [PROMPT, 71]
    heads = head_map(model, "head")
    arguments = {"budget_tokens": 40, "heads": heads, "indexer": random_indexer(heads), "config": CONFIG}
    rows = [ONCE, ONCE.flip(1)[:, : lengths[1] + STEPS]]
    caches, alone, ratios = [], [], []
    for ids, length in zip(rows, lengths, strict=True):
        with rival(model, method, **arguments) as reads:
            cache = DynamicCache(config=model.config)
            logits(model, ids[:, :length], chunks=[length], cache=cache)
            caches.append(copy.deepcopy(cache))
            alone.append(logits(model, ids, chunks=[length, 1])[:, length:])
        ratios.append(reads.bytes_ratio)
    pads = [0, lengths[0] - lengths[1]]
    with rival(model, method, **arguments) as reads:
        cache, got = joined(caches, pads, model.config), []
        for step in range(STEPS):
            slots = torch.arange(lengths[0] + step + 1)
            ids = torch.cat([row[:, length + step : length + step + 1] for row, length in zip(rows, lengths, strict=True)])
            out = model(
                ids,
                attention_mask=torch.stack([slots >= pad for pad in pads]).long(),
                position_ids=torch.tensor(lengths)[:, None] + step,
                **{CACHE: cache},
                use_cache=True,
            )
            got.append(out.logits)
    assert_same(torch.cat(got, 1), torch.cat(alone))
    assert reads.bytes_ratio == pytest.approx(sum(ratios) / 2)


# Bytes


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


LENGTHS = range(PROMPT + 1, PROMPT + STEPS + 1)
INDEX_SHARE = INDEX_DIM / (2 * HEAD_DIM)


@pytest.mark.parametrize(
    ("method", "budget", "ratio"),
    [
        ("window", 40, mean(40 / n for n in LENGTHS)),
        # 9 KV heads, of which 3 are full with a unit each (layers 0 and 2)
        ("razor", 0, (6 * mean(NEAR / n for n in LENGTHS) + 3) / 9),
        ("top_k", 9, mean(NEAR / n + (9 / n + INDEX_SHARE) * 3 / 9 for n in LENGTHS)),
        ("top_k", 200, (6 * mean(NEAR / n for n in LENGTHS) + 3) / 9),  # leaves nothing out: no index is read
    ],
)
def test_bytes_ratio_by_hand(method, budget, ratio):
    """Quest's and SnapKV's are above."""
    assert run(shared_model("qwen3"), method, budget)[1] == pytest.approx(ratio)


@pytest.mark.parametrize("method", ["razor", "window"])
def test_padding_is_not_counted(method):
    model, heads = shared_model(), head_map(shared_model(), "group")
    ids, mask = left_padded([60, 20])
    with rival(model, method, budget_tokens=NEAR, heads=heads, config=CONFIG) as reads:
        logits(model, ids, mask, chunks=[59, 1])
    local = (NEAR / 60 + NEAR / 20) / 2
    assert reads.bytes_ratio == pytest.approx(local if method == "window" else (6 * local + 3) / 9)


def test_a_kv_heads_token_counts_once():
    model = shared_model()
    heads = head_map(model, "head")  # both query heads of KV head 0 in layer 0 retrieve, each with an index
    state = LayerState(0, heads, CONFIG, qk_norm=False)
    spec = rivals.Rival("top_k", 9, rivals.Reads())
    q, k = torch.randn(1, QUERY_HEADS, 1, HEAD_DIM), torch.randn(1, KV_HEADS, PROMPT, HEAD_DIM)
    index_q, index_k = torch.randn(1, 3, 1, INDEX_DIM), torch.randn(1, 3, PROMPT, INDEX_DIM)
    index_q[:, 1], index_k[:, 1] = index_q[:, 0], index_k[:, 0]  # the two select the same
    rivals._decode(spec, state, q, k, k, index_q, index_k, None, None, 1.0)
    by_head = (NEAR + 9 + 2 * INDEX_SHARE * PROMPT, NEAR + 9 + INDEX_SHARE * PROMPT, NEAR)
    assert spec.reads.bytes_ratio == pytest.approx(sum(by_head) / 3 / PROMPT)


def test_our_read_ratio_by_hand():
    heads = head_map(shared_model(), "group")
    got = our_read_ratio(heads, CONFIG, 100, 0.25, HEAD_DIM)
    assert got == pytest.approx((6 * 16 + 3 * (16 + 0.25 * 84 + INDEX_SHARE * 100)) / 900)
    float8 = dataclasses.replace(CONFIG, index_dtype="float8")
    assert got - our_read_ratio(heads, float8, 100, 0.25, HEAD_DIM) == pytest.approx(3 * INDEX_SHARE / 2 / 9)
    single = head_map(shared_model(), "head")  # 3 and 3 units, two of them on one KV head
    want = 4 * 16 + (16 + 0.5 * 84 + 2 * INDEX_SHARE * 100) + 4 * (16 + 0.25 * 84 + INDEX_SHARE * 100)
    assert our_read_ratio(single, CONFIG, 100, 0.25, HEAD_DIM) == pytest.approx(want / 900)
    assert our_read_ratio(heads, CONFIG, 16, 0.25, HEAD_DIM) == 1


@pytest.mark.parametrize("method", ["window", "top_k", "quest", "snapkv"])
@pytest.mark.parametrize("length", [200, 233])
def test_budget_for_reads_as_much_as_ours(method, length):
    """In the first decode step, where SnapKV reads the new token too. Quest reads whole pages, and the last one in part: up
    to two pages less, in one layer of three."""
    model = shared_model()
    heads = head_map(model, "group", [(0, 1, 2, 3, 4, 5), (0, 1, 2, 3), (0, 1, 2, 3)])
    config = dataclasses.replace(CONFIG, window_tokens=40)
    budget = budget_for(method, heads, config, length, 0.7, HEAD_DIM)
    with rival(model, method, budget_tokens=budget, heads=heads, indexer=random_indexer(heads), config=config) as reads:
        logits(model, tokens(length), chunks=[length - 1, 1])
    off = (our_read_ratio(heads, config, length, 0.7, HEAD_DIM) - reads.bytes_ratio) * length + (method == "snapkv")
    assert (0 <= off < 32 / 3) if method == "quest" else abs(off) <= 1
