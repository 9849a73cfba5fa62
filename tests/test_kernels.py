"""The Triton kernels against the reference, through Triton's interpreter where there is no GPU."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl

from decoding import LAYERS, attended, ladder, run_decode, split_roles
from rtpurbo import ops
from rtpurbo.ops import decode_kernels, gather_kernels, kernels, prefill, reference
from rtpurbo.ops.reference import gather_slots, read_by_tile, sink_slots, tile_positions, visible_scores, visible_slots
from rtpurbo.ops.select import GRID_STEPS, STEP_NATS, top_p_threshold

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
DIM, INDEX_DIM, SCALING = 16, 4, 0.25
LENGTHS = [(1, 1), (2, 1), (33, 33), (65, 5), (150, 70)]  # (slots, queries)
PADDINGS = ["none", "holes"]


def make_real(kind: str, batch: int, slots: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    slot = torch.arange(slots, device=DEVICE)
    real = torch.stack([slot >= row * slots // max(batch - 1, 1) for row in range(batch)])
    return real & (slot % 5 != 3) if kind == "holes" else real


def make_inputs(batch, heads, slots, queries, units=0, dim=DIM, dtype=DTYPE):
    """(q, k, v, index_q, index_k), with index scores spread over several nats."""
    q = 2 * torch.randn(batch, heads, queries, dim)
    k, v = torch.randn(2, batch, heads, slots, dim)
    index_q, index_k = 1.5 * torch.randn(batch, units, queries, INDEX_DIM), torch.randn(batch, units, slots, INDEX_DIM)
    return [x.to(DEVICE, dtype) for x in (q, k, v, index_q, index_k)]


def close(got, inputs, compute):
    """The error against float32 is at most twice that of plain torch in the same dtype, plus rounding."""
    truth = compute(*(x.float() for x in inputs))
    plain = compute(*inputs)
    allowed = 2 * (plain.float() - truth).abs().max() + 1e-5 * truth.abs().max() + 1e-6
    if got.dtype != torch.float32:
        allowed = allowed + torch.finfo(got.dtype).eps * truth.abs().max()
    assert not got.isnan().any()
    assert (got.float() - truth).abs().max() <= allowed


def plain(q, k, v, allowed, scaling):
    """Attention under an explicit mask, in the dtype of its inputs."""
    logits = (q @ k.mT).float() * scaling
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1).to(v.dtype) @ v


def gradients(attend, inputs, weight):
    """Of the sum of what `attend` gives, times `weight`, for every input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad((attend(*inputs).float() * weight).sum(), inputs)


def window_mask(slots, queries, window, sinks, real):
    k_slots = torch.arange(slots, device=DEVICE)
    q_slots = k_slots[slots - queries :]
    return visible_slots(q_slots, k_slots, real) & ops.reference.near_slots(q_slots, k_slots, sinks, window)


def run_window(q, k, v, *, window, sink_tokens, real, first_slot=0):
    sinks = sink_slots(real, sink_tokens, device=q.device)
    return kernels.window_attention(
        q, k[:, :, first_slot:], v[:, :, first_slot:], gather_slots(k, sinks), gather_slots(v, sinks),
        first_slot=first_slot, sinks=sinks, window_tokens=window, scaling=SCALING, real=real,
    )  # fmt: skip


@pytest.fixture(params=["by pointers", "by TMA"])
def whole_tiles(request, monkeypatch):
    """How whole tiles are fetched; the interpreter knows tensor descriptors too."""
    if request.param == "by pointers" or DEVICE == "cpu":
        monkeypatch.setattr(kernels, "has_tma", lambda device: request.param == "by TMA")


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("slots", "queries"), LENGTHS)
def test_window(slots, queries, padding, whole_tiles):
    q, k, v, *_ = make_inputs(2, 2, slots, queries)
    real = make_real(padding, 2, slots)
    for window, sink_tokens in [(1, 0), (5, 4), (slots - 1, 1), (slots, 2), (slots + 1, 4)]:
        if window < 1 or sink_tokens > slots:
            continue
        sinks = sink_slots(real, sink_tokens, device=DEVICE)
        allowed = window_mask(slots, queries, window, sinks, real)
        for first_slot in {0, max(0, slots - queries - window + 1)}:
            got = run_window(q, k, v, window=window, sink_tokens=sink_tokens, real=real, first_slot=first_slot)
            close(got, (q, k, v), lambda q, k, v, allowed=allowed: plain(q, k, v, allowed, SCALING))


def own_thresholds(index_q, index_k, real, top_p, *least):
    return kernels.top_p_thresholds(*(kernels._padded_index(x) for x in (index_q, index_k)), real, top_p, *least)


def kept(index_q, index_k, near, visible, real, top_p):
    """What the kernel has to keep by its own thresholds, which `test_thresholds` holds to the reference."""
    if top_p >= 1.0:
        return visible.expand(-1, index_q.shape[1], -1, -1)
    scores = visible_scores(index_q, index_k, visible)
    return ((scores >= own_thresholds(index_q, index_k, real, top_p)[..., None]) | near) & visible


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("slots", "queries"), LENGTHS)
def test_thresholds(slots, queries, padding):
    *_, index_q, index_k = make_inputs(2, 1, slots, queries, units=2)
    real = make_real(padding, 2, slots)
    k_slots = torch.arange(slots, device=DEVICE)
    scores = visible_scores(index_q, index_k, visible_slots(k_slots[slots - queries :], k_slots, real))
    for top_p in (0.3, 0.9, 0.999):
        got = own_thresholds(index_q, index_k, real, top_p)
        low, high = (top_p_threshold(scores, p)[..., 0] for p in (top_p + 1e-5, top_p - 1e-5))
        slack = 1e-4  # a sum that reaches p by a hair may round to either side
        assert ((got >= low - slack) & (got <= high + slack)).all()
    for top_p, least in ((0.9, 0.05), (1.0, 0.01)):
        got = own_thresholds(index_q, index_k, real, top_p, least)
        low, high = (top_p_threshold(scores, top_p, x)[..., 0] for x in (least * (1 - 1e-5), least * (1 + 1e-5)))
        assert ((got >= low - 1e-4) & (got <= high + 1e-4)).all()


def test_mass_beyond_the_grid_does_not_count():
    index_q = torch.ones(1, 1, 1, 4, device=DEVICE)
    index_k = torch.zeros(1, 1, 3000, 4, device=DEVICE)
    for below, steps in ((GRID_STEPS, 1), (GRID_STEPS - 1, GRID_STEPS - 1)):  # one token stands above all others
        index_k[:, :, -1] = below * STEP_NATS / 4
        got = own_thresholds(index_q, index_k, None, 1 - 1e-6)
        assert got.item() == (below - steps) * STEP_NATS


@pytest.fixture(params=["small tiles", "tiles as they are"])
def far_tiles(request, monkeypatch):
    """Tiles so small that there are far tokens beyond several of them, fewer programs than tiles, or as they are."""
    if request.param == "small tiles":
        for name, value in {
            "KEY_TILE": 16,
            "PROGRAMS": 3,
            "FAR_TOKENS": 64,
            "BIT_TOKENS": 32,
            "BIT_POSITIONS": 16,
        }.items():
            monkeypatch.setattr(gather_kernels, name, value)
        monkeypatch.setattr(reference, "KEY_TILE", 16)
        monkeypatch.setattr(reference, "ROWS", 16)
        monkeypatch.setattr(gather_kernels, "WORKSPACE_WORDS", 1)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("slots", "queries", "unit_size", "window", "sink_tokens", "top_p"),
    [(1, 1, 1, 1, 0, 0.5), (2, 1, 3, 5, 1, 0.8), (33, 33, 2, 33, 1, 0.3), (65, 5, 1, 3, 4, 1.0), (150, 70, 3, 5, 1, 0.8)],
)
def test_retrieval(slots, queries, unit_size, window, sink_tokens, top_p, padding, far_tiles):
    q, _, _, index_q, index_k = make_inputs(2, 2 * unit_size, slots, queries, units=2)
    k, v = (x.repeat_interleave(unit_size, 1) for x in make_inputs(2, 2, slots, queries)[1:3])
    real = make_real(padding, 2, slots)
    k_slots = torch.arange(slots, device=DEVICE)
    sinks = sink_slots(real, sink_tokens, device=DEVICE)
    visible = visible_slots(k_slots[slots - queries :], k_slots, real)
    near = ops.reference.near_slots(k_slots[slots - queries :], k_slots, sinks, window)
    keep = kept(index_q, index_k, near, visible, real, top_p).repeat_interleave(unit_size, 1)
    got = kernels.retrieval_attention(
        q, k, v, index_q, index_k, heads_per_unit=unit_size, sinks=sinks, window_tokens=window, top_p=top_p,
        scaling=SCALING, real=real,
    )  # fmt: skip
    close(got, (q, k, v), lambda q, k, v: plain(q, k, v, keep, SCALING))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("slots", "queries", "unit_size", "window"), [(33, 33, 2, 3), (150, 70, 3, 5), (200, 200, 1, 30)])
def test_retrieval_by_tile(slots, queries, unit_size, window, padding, far_tiles):
    """All positions of a tile attend to what one of them selects, and to all from their first one's window on."""
    q, _, _, index_q, index_k = make_inputs(2, 2 * unit_size, slots, queries, units=2)
    k, v = (x.repeat_interleave(unit_size, 1) for x in make_inputs(2, 2, slots, queries)[1:3])
    real = make_real(padding, 2, slots)
    k_slots = torch.arange(slots, device=DEVICE)
    q_slots, sinks = k_slots[slots - queries :], sink_slots(real, 2, device=DEVICE)
    visible = visible_slots(q_slots, k_slots, real)
    least = own_thresholds(index_q, index_k, real, 1.0, 0.05)
    chosen = visible_scores(index_q, index_k, visible) >= least[..., None]
    read = read_by_tile(chosen, q_slots, k_slots, window, tile_positions(unit_size, DIM))
    keep = ((read | ops.reference.near_slots(q_slots, k_slots, sinks, window)) & visible).repeat_interleave(unit_size, 1)
    got = kernels.retrieval_attention(
        q, k, v, index_q, index_k, heads_per_unit=unit_size, sinks=sinks, window_tokens=window, top_p=1.0,
        min_probability=0.2, tile_probability=0.05, scaling=SCALING, real=real,
    )  # fmt: skip
    close(got, (q, k, v), lambda q, k, v: plain(q, k, v, keep, SCALING))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "retrieval", "unit_size"),
    [(6, 2, (1, 3, 4), 1), (6, 3, (2, 3), 2), (4, 2, (), 1), (4, 4, (3, 1), 1)],
)
@pytest.mark.parametrize("same", [True, False])
def test_a_layers_heads_are_read_and_written_in_place(
    query_heads, kv_heads, retrieval, unit_size, padding, same, monkeypatch
):
    """The kernels find every head by its number, in one tensor; plain PyTorch picks and copies them. All KV heads have the
    same window, or each its own."""
    slots, queries, group = 150, 70, query_heads // kv_heads
    window = 30 if same else ladder(kv_heads, retrieval, group, 30)
    units = max(1, len(retrieval) // unit_size)
    q, _, _, index_q, index_k = make_inputs(2, query_heads, slots, queries, units=units)
    k, v = make_inputs(2, kv_heads, slots, queries)[1:3]
    real = make_real(padding, 2, slots)
    sinks = sink_slots(real, 3, device=DEVICE)
    full = sorted({head // group for head in retrieval})
    rows = (*full, *(g for g in range(kv_heads) if g not in full))
    places = {head: i // unit_size for i, head in enumerate(retrieval)}
    first = 40
    full_k, full_v, every_k, every_v = (x[:, part] for part in (rows[: len(full)], rows[len(full) :]) for x in (k, v))

    def run():
        return ops.prefill_attention(
            q, full_k, full_v, every_k[:, :, first:], every_v[:, :, first:], gather_slots(every_k, sinks),
            gather_slots(every_v, sinks), index_q if retrieval else None, index_k if retrieval else None, kv_rows=rows,
            head_units=tuple(places.get(head, -1) for head in range(query_heads)), first_slot=first, sinks=sinks,
            window_tokens=window, top_p=1.0, min_probability=0.02, scaling=SCALING, real=real,
        )  # fmt: skip

    monkeypatch.setattr(ops.prefill, "_kernels", lambda q: None)
    want = run()
    monkeypatch.setattr(ops.prefill, "_kernels", lambda q: kernels)
    got = run()
    torch.testing.assert_close(got.float(), want.float(), atol=1e-5 if DEVICE == "cpu" else 2e-2, rtol=2e-2)


@pytest.mark.parametrize("trained", ["q", "full_v", "local_v"])
def test_what_is_trained_is_not_written_in_place(trained, monkeypatch):
    """An adapter may change values alone: then queries of the first layer need no gradient, and values do."""
    monkeypatch.setattr(ops.prefill, "_kernels", lambda q: kernels)
    q, k, v, index_q, index_k = make_inputs(1, 4, 60, 60, units=1)
    tensors = {"q": q, "full_k": k[:, :1], "full_v": v[:, :1], "local_k": k[:, 1:2], "local_v": v[:, 1:2]}
    tensors[trained] = tensors[trained].detach().requires_grad_()
    sinks = sink_slots(None, 2, device=DEVICE)
    old = (gather_slots(tensors[name], sinks) for name in ("local_k", "local_v"))
    out = ops.prefill_attention(
        *tensors.values(), *old, index_q, index_k, kv_rows=(0, 1), head_units=(0, -1, -1, -1), first_slot=0, sinks=sinks,
        window_tokens=20, top_p=1.0, min_probability=0.01, scaling=SCALING,
    )  # fmt: skip
    out.float().square().sum().backward()
    assert tensors[trained].grad.abs().sum() > 0


def test_chunks_give_the_same_bits():
    q, _, _, index_q, index_k = make_inputs(1, 2, 150, 150, units=1)
    k, v = (x.repeat_interleave(2, 1) for x in make_inputs(1, 1, 150, 150)[1:3])
    sinks = sink_slots(None, 2, device=DEVICE)
    settings = {"sinks": sinks, "window_tokens": 20, "scaling": SCALING}

    def run(start, stop):
        there, so_far = slice(start, stop), slice(0, stop)
        first = max(0, start - 19)
        one = kernels.retrieval_attention(
            q[:, :, there], k[:, :, so_far], v[:, :, so_far], index_q[:, :, there], index_k[:, :, so_far],
            heads_per_unit=2, top_p=0.7, **settings,
        )  # fmt: skip
        two = kernels.window_attention(
            q[:, :, there], k[:, :, first:stop], v[:, :, first:stop], k[:, :, :2], v[:, :, :2], first_slot=first, **settings
        )
        return torch.stack([one, two])

    whole = run(0, 150)
    for cuts in ([0, 64, 150], [0, 47, 100, 150]):
        parts = torch.cat([run(a, b) for a, b in pairwise(cuts)], 3)
        assert torch.equal(parts[1], whole[1])
        if all(cut % tile_positions(2) == 0 for cut in cuts[:-1]):
            assert torch.equal(parts[0], whole[0])
        else:  # a tile of positions that is cut gathers two unions
            torch.testing.assert_close(parts[0], whole[0])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("select", [False, True])
def test_gradients(select, padding):
    slots, queries, size = 90, 71, 2
    q, k, v, index_q, index_k = make_inputs(2, 2 * size, slots, queries, units=2)
    real = make_real(padding, 2, slots)
    sinks = sink_slots(real, 2, device=DEVICE)
    k_slots = torch.arange(slots, device=DEVICE)
    q_slots = k_slots[slots - queries :]
    visible, near = visible_slots(q_slots, k_slots, real), ops.reference.near_slots(q_slots, k_slots, sinks, 20)
    keep = visible & near
    if select:
        keep = kept(index_q, index_k, near, visible, real, 0.6).repeat_interleave(size, 1)
    weight = torch.randn(*q.shape, device=DEVICE)

    def ours(q, k, v):
        if not select:
            return run_window(q, k, v, window=20, sink_tokens=2, real=real)
        return kernels.retrieval_attention(
            q, k, v, index_q, index_k, heads_per_unit=size, sinks=sinks, window_tokens=20, top_p=0.6, scaling=SCALING,
            real=real,
        )  # fmt: skip

    def want(q, k, v):
        return plain(q, k, v, keep, SCALING)

    got = gradients(ours, (q, k, v), weight)
    for i, name in enumerate("qkv"):
        try:
            close(got[i], (q, k, v), lambda *x, i=i: gradients(want, x, weight)[i])
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}") from error


@pytest.mark.parametrize("flash", [True, False])  # where a GPU has it
@pytest.mark.parametrize(("slots", "queries"), [(33, 33), (131, 20), (1031, 128)])
def test_gradients_of_a_dense_end(slots, queries, flash, monkeypatch):
    q, k, v = make_inputs(1, 6, slots, queries, dim=64)[:3]
    k, v, weight = k[:, :2].contiguous(), v[:, :2].contiguous(), torch.randn(*q.shape, device=DEVICE)
    place = torch.arange(slots, device=DEVICE)
    mask = visible_slots(place[slots - queries :], place, None)
    if not flash:
        monkeypatch.setattr(prefill, "can_use_flash_attention", lambda _: False)

    def repeated(q, k, v):
        return plain(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), mask, SCALING)

    got = gradients(lambda *x: ops.dense_attention(*x, scaling=SCALING), (q, k, v), weight)
    for i in range(3):
        close(got[i], (q, k, v), lambda *x, i=i: gradients(repeated, x, weight)[i])


# Decode


@pytest.fixture(params=["many splits", "one split"])
def splits(request, monkeypatch):
    """Tiles so small that short keys make many splits, or tiles as they are."""
    if request.param == "many splits":
        for name, value in {
            "SCORE_TILE": 16,
            "FAR_TILE": 16,
            "HELD_VALUES": 64,
            "NEAR_TOKENS": 16,
            "KEY_TILE": 16,
            "PARTS": 4,
            "PROGRAMS": 30,
        }.items():
            monkeypatch.setattr(decode_kernels, name, value)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("slots", [1, 40, 150])
def test_decode_thresholds(slots, padding, splits):
    *_, index_q, index_k = make_inputs(2, 1, slots, 1, units=3)
    real = make_real(padding, 2, slots)
    k_slots = torch.arange(slots, device=DEVICE)
    scores = visible_scores(index_q, index_k, visible_slots(k_slots[-1:], k_slots, real))[:, :, 0]
    for top_p in (0.3, 0.9, 0.999):
        bins, least = decode_kernels.thresholds(index_q[:, :, 0], index_k, top_p=top_p, real=real)
        seen = scores.isfinite()
        assert torch.equal(bins > decode_kernels.UNSEEN, seen)
        assert ((bins.float() * STEP_NATS)[seen] <= scores[seen] + 1e-4).all()
        assert ((bins.float() + 1) * STEP_NATS >= scores - 1e-4)[seen].all()
        low, high = (
            top_p_threshold(bins.float().where(seen, -torch.inf) * STEP_NATS, p)[..., 0]
            for p in (top_p + 1e-5, top_p - 1e-5)
        )
        got = least * STEP_NATS
        assert ((got >= low) & (got <= high)).all()
    for top_p, floor in ((0.9, 0.05), (1.0, 0.01)):
        bins, least = decode_kernels.thresholds(index_q[:, :, 0], index_k, top_p=top_p, min_probability=floor, real=real)
        low, high = (top_p_threshold(scores, top_p, x)[..., 0] for x in (floor * (1 - 1e-4), floor * (1 + 1e-4)))
        slack = 1e-4 + STEP_NATS * (top_p < 1.0)  # a sum that reaches p by a hair
        assert ((least * STEP_NATS >= low - slack) & (least * STEP_NATS <= high + slack)).all()


def test_decode_with_an_index_of_any_dimension():
    index_q, index_k = torch.randn(1, 2, 11, device=DEVICE), torch.randn(1, 2, 70, 11, device=DEVICE)
    bins, _ = decode_kernels.thresholds(index_q.to(DTYPE), index_k.to(DTYPE), top_p=0.9)
    scores = (index_k.to(DTYPE).float() @ index_q.to(DTYPE).float()[..., None])[..., 0]
    torch.testing.assert_close(bins.float(), torch.floor(scores / STEP_NATS), atol=1, rtol=0)


@triton.jit
def read_codes(p_codes, p_values):
    places = tl.arange(0, 256)
    tl.store(p_values + places, decode_kernels._index_values(tl.load(p_codes + places)))


def test_every_float8_code_is_read_exactly():
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    want = codes.view(torch.float8_e4m3fn).float()
    got = torch.empty_like(want)
    read_codes[(1,)](codes, got)
    assert torch.equal(got.isnan(), want.isnan())
    assert int(want.isnan().sum()) == 2
    assert torch.equal(got.nan_to_num().view(torch.int32), want.nan_to_num().view(torch.int32))  # the sign of 0 too


@pytest.mark.parametrize("how", ["as this GPU does", "as bytes", "as float8"])
def test_decode_from_float8_index_keys(how, splits, monkeypatch):
    """The same bits as from keys of these values in the dtype of the queries."""
    if how != "as this GPU does":
        if how == "as float8" and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("this GPU cannot convert float8")
        monkeypatch.setattr(decode_kernels, "_reads_float8", lambda device: how == "as float8")
    slots = 150
    q, *_, index_q, index_k = make_inputs(2, 6, slots, 1, units=1)
    _, k, v, *_ = make_inputs(2, 3, slots, 1)
    small = index_k.to(torch.float8_e4m3fn)
    assert not torch.equal(small.to(DTYPE), index_k)

    def run(op, index_k):
        return run_decode(
            op, q, k, v, index_q, index_k, retrieval=(2, 3), unit_size=2, window=20, sink_tokens=3, top_p=0.6, real=None,
            scaling=SCALING,
        )  # fmt: skip

    for top_p, least in ((0.8, 0.0), (1.0, 0.01), (0.9, 0.02)):
        rule = {"top_p": top_p, "min_probability": least}
        want = decode_kernels.thresholds(index_q[:, :, 0], small.to(DTYPE), **rule)
        got = decode_kernels.thresholds(index_q[:, :, 0], small, **rule)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    part = torch.cat([small, small], 2)[:, :, :slots]  # of a longer buffer, as the cache has it
    got = run(decode_kernels.decode_attention, part)
    assert torch.equal(got, run(decode_kernels.decode_attention, small.to(DTYPE)))
    if DEVICE == "cpu":  # plain PyTorch selects the same from the same bytes
        torch.testing.assert_close(got, run(ops.decode.decode_attention, part), atol=1e-5, rtol=1e-5)


def decode_keep(index_q, index_k, retrieval, unit_size, near, visible, real, top_p, query_heads):
    """[B, Hq, 1, N] what the kernel has to keep by its own thresholds."""
    keep = (near & visible).expand(index_k.shape[0], query_heads, -1, -1).clone()
    if retrieval and top_p < 1.0:
        bins, least = decode_kernels.thresholds(index_q[:, :, 0], index_k, top_p=top_p, real=real)
        chosen = ((bins >= least[..., None]) & (bins > decode_kernels.UNSEEN)).repeat_interleave(unit_size, 1)
        keep[:, list(retrieval), 0] |= chosen
    elif retrieval:
        keep[:, list(retrieval)] = visible
    return keep


@pytest.mark.parametrize(("query_heads", "kv_heads", "retrieval", "unit_size"), LAYERS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_decode(padding, query_heads, kv_heads, retrieval, unit_size, splits):
    for slots, window, sink_tokens, top_p in [
        (1, 1, 0, 0.5),
        (70, 20, 3, 0.8),
        (150, 33, 4, 0.5),
        (90, 5, 1, 1.0),
        (40, 41, 4, 0.9),
    ]:
        q, *_, index_q, index_k = make_inputs(2, query_heads, slots, 1, units=len(retrieval) // unit_size)
        _, k, v, *_ = make_inputs(2, kv_heads, slots, 1)
        real = make_real(padding, 2, slots)
        k_slots = torch.arange(slots, device=DEVICE)
        sinks = sink_slots(real, sink_tokens, device=DEVICE)
        visible = visible_slots(k_slots[-1:], k_slots, real)
        near = ops.reference.near_slots(k_slots[-1:], k_slots, sinks, window)
        keep = decode_keep(index_q, index_k, retrieval, unit_size, near, visible, real, top_p, query_heads)
        for _ in range(2):  # counters are left as they were found
            got = run_decode(
                decode_kernels.decode_attention, q, k, v, index_q, index_k, retrieval=retrieval, unit_size=unit_size,
                window=window, sink_tokens=sink_tokens, top_p=top_p, real=real, scaling=SCALING, spare=7,
            )  # fmt: skip
            close(got, (q, k, v), lambda q, k, v, keep=keep: attended(q, k, v, keep, SCALING))


@pytest.mark.parametrize(("query_heads", "kv_heads", "retrieval", "unit_size"), LAYERS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_decode_with_a_window_for_every_row(padding, query_heads, kv_heads, retrieval, unit_size, splits):
    for slots, longest, sink_tokens, top_p in [(150, 60, 4, 0.5), (40, 41, 4, 0.9)]:
        windows = ladder(kv_heads, retrieval, query_heads // kv_heads, longest)
        q, *_, index_q, index_k = make_inputs(2, query_heads, slots, 1, units=len(retrieval) // unit_size)
        _, k, v, *_ = make_inputs(2, kv_heads, slots, 1)
        real = make_real(padding, 2, slots)
        k_slots = torch.arange(slots, device=DEVICE)
        sinks = sink_slots(real, sink_tokens, device=DEVICE)
        visible = visible_slots(k_slots[-1:], k_slots, real)
        near = torch.cat([ops.reference.near_slots(k_slots[-1:], k_slots, sinks, window) for window in windows], 1)
        near = near.repeat_interleave(query_heads // kv_heads, 1)
        keep = decode_keep(index_q, index_k, retrieval, unit_size, near, visible, real, top_p, query_heads)
        settings = {"retrieval": retrieval, "unit_size": unit_size, "sink_tokens": sink_tokens, "top_p": top_p, "real": real}
        op, inputs = decode_kernels.decode_attention, (q, k, v, index_q, index_k)
        got = run_decode(op, *inputs, window=windows, scaling=SCALING, spare=7, **settings)
        close(got, (q, k, v), lambda q, k, v, keep=keep: attended(q, k, v, keep, SCALING))
    one, each = (run_decode(op, *inputs, window=w, scaling=SCALING, **settings) for w in (longest, (longest,) * kv_heads))
    assert torch.equal(one, each)


def paged(x, lengths, page, kept):
    """[B, H, N, D] -> pages [P, page, H, D] in random order and block tables [B, pages]; what `kept` is False for is NaN."""
    batch, heads, slots, dim = x.shape
    each = -(-slots // page)
    table = torch.randperm(batch * each, device=DEVICE).view(batch, each)
    x = x.masked_fill(~kept[:, None, :, None], torch.nan)
    padded = torch.nn.functional.pad(x, (0, 0, 0, each * page - slots), value=torch.nan)
    pages = torch.full((batch * each, page, heads, dim), torch.nan, dtype=x.dtype, device=DEVICE)
    pages[table.flatten()] = padded.unflatten(2, (each, page)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    return pages, table.int()


@pytest.mark.parametrize(("query_heads", "kv_heads", "retrieval", "unit_size"), LAYERS)
@pytest.mark.parametrize(("page", "same"), [(16, True), (24, True), (16, False)])
def test_decode_from_pages_at_different_lengths(page, same, query_heads, kv_heads, retrieval, unit_size, splits):
    """Every sequence as if it were alone; what a local head has forgotten is never read."""
    slots, window, sink_tokens, top_p = 130, 30, 3, 0.6
    windows = window if same else ladder(kv_heads, retrieval, query_heads // kv_heads, window)
    lengths = torch.tensor([130, 57, 31, 9, 1], device=DEVICE)
    batch = len(lengths)
    q, *_, index_q, index_k = make_inputs(batch, query_heads, slots, 1, units=len(retrieval) // unit_size)
    _, k, v, *_ = make_inputs(batch, kv_heads, slots, 1)
    slot = torch.arange(slots, device=DEVICE)
    used = slot < lengths[:, None]
    near = used & ((slot >= lengths[:, None] - window) | (slot < sink_tokens))
    rows, full, head_units = split_roles(query_heads, kv_heads, retrieval, unit_size)
    seed = torch.initial_seed()

    def pages_of(x, heads, kept):
        torch.manual_seed(seed + len(heads))  # one table for keys and values
        return paged(x[:, list(heads)], lengths, page, kept)

    (full_k, table), (full_v, _) = (pages_of(x, rows[:full], used) for x in (k, v))
    (local_k, local_table), (local_v, _) = (pages_of(x, rows[full:], near) for x in (k, v))
    none = k[:, :0]
    got = decode_kernels.decode_attention(
        q[:, :, 0].unflatten(1, (kv_heads, -1)), full_k, full_v, local_k, local_v, none, none,
        index_q[:, :, 0], index_k, kv_rows=rows, head_units=head_units, slots=slots,
        sinks=torch.arange(sink_tokens, device=DEVICE)[None], window_tokens=windows, top_p=top_p, scaling=SCALING,
        lengths=lengths.int(), block_tables=(table, local_table),
    ).flatten(1, 2)  # fmt: skip
    for i, length in enumerate(lengths.tolist()):
        alone = run_decode(
            decode_kernels.decode_attention, q[i : i + 1], k[i : i + 1, :, :length], v[i : i + 1, :, :length],
            index_q[i : i + 1], index_k[i : i + 1, :, :length], retrieval=retrieval, unit_size=unit_size, window=windows,
            sink_tokens=min(sink_tokens, length), top_p=top_p, real=None, scaling=SCALING,
        )  # fmt: skip
        torch.testing.assert_close(got[i], alone[0, :, 0])


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rtpurbo.ops import decode_kernels, flash4, gather_kernels, kernels, reference

POINTERS = {"p_lse": "*fp32", "p_delta": "*fp32", "p_least": "*fp32", "p_gsk": "*fp32", "p_gsv": "*fp32",
            "p_sinks": "*i32", "p_real": "*u8", "p_sink": "*u8", "p_list": "*i32",
            "p_bits": "*i32", "p_heads": "*i32", "p_rows": "*i32"}
DECODE = {"p_bins": "*i16", "p_sinks": "*i64", "p_real": "*u8", "p_acc": "*fp32", "p_ml": "*fp32", "p_mass": "*fp32"}
DECODE |= {"p_" + name: "*i32" for name in ("lengths", "counts", "tops", "arrived", "least", "list", "heads", "row_units",
                                            "head_units", "windows", "table", "local_table")}

def compiled(name, capability, module=kernels, types_of=POINTERS, warps=4, stages=3, fits=None, **constants):
    kernel = getattr(module, name)
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    types = {}
    for argument in kernel.arg_names:
        scalar = "fp32" if argument in ("top_p", "min_probability", "scale") else "i32"
        pointer = types_of.get(argument, "*bf16") if argument.startswith("p_") else scalar
        if argument.startswith("t_"):
            rows = constants["M" if argument == "t_q" else "N"]
            pointer = f"tensordesc<bf16[{rows},{constants['D']}]>" if constants["TMA"] else "*bf16"
        types[argument] = "constexpr" if argument in constants else pointer
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if types[a].startswith("*")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert fits is None or binary.metadata.shared <= fits, (name, capability, constants, binary.metadata.shared)
    return len(binary.asm["cubin"])

tile = {"M": 64, "N": 64, "D": 64, "d": 16, "S": 16, "ONE_ROW": False, "STEP": 1 / 16, "STEPS": 256,
        "SEARCH": True, "LOWEST": kernels.LOWEST, "TMA": False}
sizes = []
asked = int(sys.argv[1])
for capability, shared in {asked: {80: 166912, 89: 101376, 90: 232448}[asked]}.items():  # what the largest of the kind have
    for heads, dim in ((8, 128), (1, 128), (2, 256)):
        P = reference.tile_positions(heads, dim)
        stages = gather_kernels.stages(dim, heads * P, (capability // 10, capability % 10), shared)
        how = {"module": gather_kernels, "warps": 8, "stages": stages, "fits": shared, "PADDED": False, "ONE_ROW": True}
        how |= {"TILE": heads == 8}
        how |= {"T": gather_kernels.KEY_TILE, "FAR": gather_kernels.FAR_TOKENS}
        sizes.append(compiled("_gather", capability, S=heads, SP=heads, P=P, D=dim, d=16, **how))
    for dim in (64, 128, 256):
        tiles = kernels._forward_tiles(dim, capability == 90)
        how = {"warps": tiles.pop("num_warps"), "stages": tiles.pop("num_stages"), "PADDED": False}
        how |= {"TMA": capability == 90, "fits": kernels.TMA_SHARED_BYTES if capability == 90 else shared}
        how |= {"LOCAL": True, "SELECT": False, "ONE_ROW": True}
        sizes.append(compiled("_forward", capability, D=dim, d=16, S=16, **tiles, **how))
        merge = flash4._merge_tile(dim)
        how = {"module": flash4, "warps": merge.pop("num_warps"), "fits": shared, "ONE_ROW": True}
        sizes.append(compiled("_merge_sinks", capability, D=dim, S=16, **merge, **how))
for capability, modes in ((80, [(False, True)]), (90, [(True, False), (False, True)])):
    if capability != asked:
        continue
    for local, select in modes:
        for name in ("_forward", "_backward_queries", "_backward_keys"):
            sizes.append(compiled(name, capability, LOCAL=local, SELECT=select, PADDED=True, **tile))
        wide = tile | {"M": 128, "D": 128}
        sizes.append(compiled("_forward", capability, LOCAL=local, SELECT=False, PADDED=False, **wide))
    for search in (True, False):
        sizes.append(compiled("_thresholds", capability, PADDED=True, **tile | {"SEARCH": search}))
    gather = {"module": gather_kernels, "T": gather_kernels.KEY_TILE, "d": 16, "PADDED": True, "ONE_ROW": False}
    gather["TILE"] = False
    for heads, rows, dim in ((8, 8, 128), (3, 4, 64), (1, 1, 128)):
        gather |= {"P": reference.tile_positions(heads), "FAR": gather_kernels.FAR_TOKENS}
        sizes.append(compiled("_gather", capability, S=heads, SP=rows, D=dim, **gather))
        bits = {"Q": gather_kernels.BIT_POSITIONS, "N": gather_kernels.BIT_TOKENS}
        sizes.append(compiled("_far_bits", capability, **gather | bits))
    decode = {"module": decode_kernels, "types_of": DECODE, "STEP": 1 / 16, "STEPS": 256, "LOWEST": decode_kernels.UNSEEN,
              "PADDED": True, "RAGGED": True}
    decode |= {"PARTS": decode_kernels.PARTS, "NEAR": decode_kernels.NEAR_TOKENS, "FAR": decode_kernels.FAR_TILE}
    decode |= {"HEADS": 8, "AT_ONCE": 16, "T": decode_kernels.KEY_TILE, "SELECT": True, "ONE_ROW": True}
    decode["OVERLAP"] = capability >= 90
    for search in (True, False):
        score = decode | {"TILE": decode_kernels.SCORE_TILE, "SEARCH": search, "PAGE": 0}
        sizes.append(compiled("_score", capability, d=16, D=16, **score))
        sizes.append(compiled("_score", capability, d=16, D=16, **score | {"PAGE": 16}))
        small = DECODE | {"p_ik": "*fp8e4nv" if capability >= 89 else "*u8"}
        sizes.append(compiled("_score", capability, d=16, D=16, **score | {"types_of": small}))
    for page, units in ((0, 1), (0, 3), (16, 2)):
        sizes.append(compiled("_attend", capability, D=128, G=8, GROUP=16, S=16, R=units, PAGE=page, **decode))
print(json.dumps(sizes))
"""


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_compile_for_gpus_that_are_not_here(capability):
    """Triton's interpreter lets pass what its compiler refuses; the compiler needs no GPU."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(size > 1000 for size in json.loads(done.stdout.splitlines()[-1]))
