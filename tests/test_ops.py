"""Every attention op against the reference: outputs, gradients, odd lengths, ragged batches, many pieces of work."""

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.utils import checkpoint as torch_checkpoint

from decoding import LAYERS, ladder, run_decode, split_roles
from rtpurbo import ops
from rtpurbo.ops import prefill
from rtpurbo.ops.reference import gather_slots, keep_mask, near_slots, read_by_tile, sink_slots, visible_slots

DIM, INDEX_DIM, SCALING = 8, 4, 0.5
TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}
LENGTHS = [(1, 1), (2, 1), (7, 7), (33, 33), (33, 5), (64, 64), (129, 129), (130, 65)]  # (slots, queries)
PADDINGS = ["none", "left", "holes"]


def make_real(kind: str, batch: int, slots: int) -> torch.Tensor | None:
    """Padding mask: rows behind different amounts of padding (the last one nothing else but), or with holes as well."""
    if kind == "none":
        return None
    slot = torch.arange(slots)
    real = torch.stack([slot >= row * slots // max(batch - 1, 1) for row in range(batch)])
    return real & (slot % 5 != 3) if kind == "holes" else real


def make_inputs(batch, heads, kv_heads, slots, queries, units=0, dtype=torch.float32):
    """(q, k, v, index_q, index_k), with scores spread over several nats."""
    q = 2 * torch.randn(batch, heads, queries, DIM)
    k, v = torch.randn(2, batch, kv_heads, slots, DIM)
    index_q, index_k = 1.5 * torch.randn(batch, units, queries, INDEX_DIM), torch.randn(batch, units, slots, INDEX_DIM)
    return [x.to(dtype) for x in (q, k, v, index_q, index_k)]


def run_window(q, k, v, *, window, sink_tokens, real, first_slot=0):
    """`window_attention`, given no slot before `first_slot`."""
    sinks = sink_slots(real, sink_tokens, device=q.device)
    sink_k, sink_v = gather_slots(k, sinks), gather_slots(v, sinks)
    return ops.window_attention(
        q, k[:, :, first_slot:], v[:, :, first_slot:], sink_k, sink_v, first_slot=first_slot, sinks=sinks,
        window_tokens=window, scaling=SCALING, real=real,
    )  # fmt: skip


def run_retrieval(q, k, v, index_q, index_k, *, unit_size, window, sink_tokens, top_p, real):
    return ops.retrieval_attention(
        q, k, v, index_q, index_k, heads_per_unit=unit_size, sinks=sink_slots(real, sink_tokens), window_tokens=window,
        top_p=top_p, scaling=SCALING, real=real,
    )  # fmt: skip


def reference(q, k, v, index_q=None, index_k=None, *, retrieval=(), unit_size=1, window, sink_tokens, top_p=1.0, real):
    return ops.sparse_attention(
        q, k, v, index_q, index_k, retrieval_heads=retrieval, heads_per_unit=unit_size, window_tokens=window,
        sink_tokens=sink_tokens, top_p=top_p, scaling=SCALING, real=real,
    )  # fmt: skip


@pytest.fixture(params=["one_piece", "many_pieces"])
def pieces(request, monkeypatch):
    """Run with the usual workspace, and with one so small that every piece is as small as it can be."""
    if request.param == "many_pieces":
        monkeypatch.setattr(prefill, "workspace_elements", lambda device: 64)
    return request.param


def windows(slots: int) -> list[int]:
    return sorted({1, 2, 5, max(1, slots - 1), slots, slots + 1, 2 * slots})


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("slots", "queries"), LENGTHS)
def test_window_attention(slots, queries, padding, pieces):
    q, k, v, *_ = make_inputs(3, 2, 2, slots, queries)
    real = make_real(padding, 3, slots)
    for window in windows(slots):
        for sink_tokens in (0, 1, 4):
            if sink_tokens > slots:
                continue
            want = reference(q, k, v, window=window, sink_tokens=sink_tokens, real=real)
            for first_slot in {0, max(0, slots - queries - window + 1)}:
                got = run_window(q, k, v, window=window, sink_tokens=sink_tokens, real=real, first_slot=first_slot)
                torch.testing.assert_close(got, want, **TOLERANCE)


def test_window_attention_over_many_bands():
    # bands hold at least 64 queries, so that only a long sequence has more than two
    q, k, v, *_ = make_inputs(2, 1, 1, 500, 437)
    real = make_real("left", 2, 500)
    for window in (1, 30, 200):
        want = reference(q, k, v, window=window, sink_tokens=3, real=real)
        torch.testing.assert_close(run_window(q, k, v, window=window, sink_tokens=3, real=real), want, **TOLERANCE)


@pytest.mark.parametrize("unit_size", [1, 2, 3])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("slots", "queries"), LENGTHS)
def test_retrieval_attention(slots, queries, padding, unit_size, pieces):
    units = 2
    q, k, v, index_q, index_k = make_inputs(3, units * unit_size, units * unit_size, slots, queries, units)
    real = make_real(padding, 3, slots)
    heads = tuple(range(units * unit_size))
    for window, sink_tokens, top_p in [(1, 0, 0.5), (5, 4, 0.8), (slots, 2, 0.3), (3, 1, 1.0)]:
        settings = {"window": window, "sink_tokens": sink_tokens, "top_p": top_p, "real": real, "unit_size": unit_size}
        got = run_retrieval(q, k, v, index_q, index_k, **settings)
        torch.testing.assert_close(got, reference(q, k, v, index_q, index_k, retrieval=heads, **settings), **TOLERANCE)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("slots", "queries"), [(129, 129), (300, 217)])
def test_retrieval_by_tile(slots, queries, padding, pieces):
    """Tiles of 64 positions (two heads to a unit) read together, however the work is cut."""
    q, k, v, index_q, index_k = make_inputs(2, 4, 4, slots, queries, 2)
    real = make_real(padding, 2, slots)
    settings = {"window_tokens": 9, "top_p": 1.0, "min_probability": 0.3, "real": real, "scaling": SCALING}
    sinks = sink_slots(real, 2)
    for least in (0.0, 0.05, 0.3):
        got = ops.retrieval_attention(
            q, k, v, index_q, index_k, heads_per_unit=2, sinks=sinks, tile_probability=least, **settings
        )
        want = ops.sparse_attention(
            q, k, v, index_q, index_k, retrieval_heads=(0, 1, 2, 3), heads_per_unit=2, sink_tokens=2, tile_probability=least,
            **settings,
        )  # fmt: skip
        torch.testing.assert_close(got, want, **TOLERANCE)


def test_what_a_tile_reads_by_hand():
    chosen = torch.zeros(1, 1, 20, 100, dtype=torch.bool)
    chosen[0, 0, 0, 3] = chosen[0, 0, 9, 5] = True  # queries at slots 80 and 89, of the tiles from 64 and from 80 on
    read = read_by_tile(chosen, torch.arange(80, 100), torch.arange(100), 10, 16)
    far = [row.nonzero()[:, 0].tolist() for row in read[0, 0, :, :64]]
    assert far == [[3, 5]] * 16 + [[]] * 4
    assert read[0, 0, :, 64:].all()  # the windows begin in the key tile from 64 on


@pytest.mark.parametrize("padding", PADDINGS)
def test_retrieval_attention_without_index_is_dense(padding, pieces):
    q, k, v, *_ = make_inputs(2, 2, 2, 41, 17)
    real = make_real(padding, 2, 41)
    got = run_retrieval(q, k, v, None, None, unit_size=1, window=4, sink_tokens=1, top_p=0.1, real=real)
    visible = visible_slots(torch.arange(24, 41), torch.arange(41), real)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=SCALING)
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize("without_mask", [False, True])  # as on a GPU, where nothing is padded
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("slots", "queries"), LENGTHS)
def test_dense_attention_of_the_last_queries(slots, queries, padding, without_mask, monkeypatch):
    q, k, v, *_ = make_inputs(2, 4, 2, slots, queries)
    real = make_real(padding, 2, slots)
    used = []
    monkeypatch.setattr(prefill, "can_use_flash_attention", lambda _: without_mask)
    monkeypatch.setattr(prefill, "causal_lower_right", lambda *size: used.append(size) or causal_lower_right(*size))
    monkeypatch.setattr(prefill, "MASK_ELEMENTS", 5 * 4 * slots)
    got = ops.dense_attention(q, k, v, scaling=SCALING, real=real)
    visible = visible_slots(torch.arange(slots - queries, slots), torch.arange(slots), real)
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    want = torch.nn.functional.scaled_dot_product_attention(q, keys, values, visible, scale=SCALING)
    asked = visible.any(-1).expand(got.shape[:-1])  # padding's own rows mean nothing
    torch.testing.assert_close(got[asked], want[asked], **TOLERANCE)
    assert used == ([(queries, slots)] if without_mask and real is None else [])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("slots", "queries"), LENGTHS)
def test_the_gradient_of_dense_attention(slots, queries, padding, monkeypatch):
    """In pieces and whole, as SDPA gives it on a CPU."""
    inputs, real = make_inputs(2, 4, 2, slots, queries)[:3], make_real(padding, 2, slots)
    visible = visible_slots(torch.arange(slots - queries, slots), torch.arange(slots), real)
    weights = torch.randn(2, 4, queries, DIM) * visible.any(-1)[..., None]
    found = []
    for size in (5 * 4 * slots, 1 << 26, None):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        if size:
            monkeypatch.setattr(prefill, "MASK_ELEMENTS", size)
            out = ops.dense_attention(q, k, v, scaling=SCALING, real=real)
        else:
            keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, visible, scale=SCALING)
        (out * weights).sum().backward()
        found.append((q.grad, k.grad, v.grad))
    for got, want in zip(found[0] + found[1], found[2] * 2, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_single_unit_for_several_heads():
    q, k, v, index_q, index_k = make_inputs(2, 3, 3, 50, 50, units=1)
    settings = {"window": 4, "sink_tokens": 2, "top_p": 0.6, "real": None, "unit_size": 3}
    want = reference(q, k, v, index_q, index_k, retrieval=(0, 1, 2), **settings)
    torch.testing.assert_close(run_retrieval(q, k, v, index_q, index_k, **settings), want, **TOLERANCE)


@pytest.mark.parametrize(("query_heads", "kv_heads", "heads", "unit_size"), LAYERS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("slots", [1, 2, 7, 33, 64])
def test_decode_attention(slots, padding, query_heads, kv_heads, heads, unit_size):
    q, k, v, index_q, index_k = make_inputs(3, query_heads, kv_heads, slots, 1, len(heads) // unit_size)
    real = make_real(padding, 3, slots)
    for window, sink_tokens, top_p in [(1, 0, 0.5), (5, 4, 0.8), (slots, 2, 0.3), (3, 1, 1.0), (slots + 2, 1, 0.9)]:
        settings = {"window": window, "sink_tokens": min(sink_tokens, slots), "top_p": top_p, "real": real}
        got = run_decode(
            ops.decode_attention, q, k, v, index_q, index_k, retrieval=heads, unit_size=unit_size, scaling=SCALING,
            spare=3, **settings,
        )  # fmt: skip
        want = reference(q, k, v, index_q, index_k, retrieval=heads, unit_size=unit_size, **settings)
        torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize(("query_heads", "kv_heads", "heads", "unit_size"), LAYERS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("slots", "queries"), [(64, 1), (130, 65), (33, 33)])
def test_a_window_for_every_kv_head(slots, queries, padding, query_heads, kv_heads, heads, unit_size):
    """Decode and prefill of a layer against the reference; equal windows give the same bits as one number."""
    q, k, v, index_q, index_k = make_inputs(3, query_heads, kv_heads, slots, queries, len(heads) // unit_size)
    real = make_real(padding, 3, slots)
    rows, full, head_units = split_roles(query_heads, kv_heads, heads, unit_size)
    sinks = sink_slots(real, 3)
    (full_k, local_k), (full_v, local_v) = ((x[:, rows[:full]], x[:, rows[full:]]) for x in (k, v))

    def run(window):
        if queries == 1:
            return run_decode(
                ops.decode_attention, q, k, v, index_q, index_k, retrieval=heads, unit_size=unit_size, window=window,
                sink_tokens=3, top_p=0.8, real=real, scaling=SCALING, spare=3,
            )  # fmt: skip
        first = slots - min(slots, queries + 23)
        return ops.prefill_attention(
            q, full_k, full_v, local_k[:, :, first:], local_v[:, :, first:], gather_slots(local_k, sinks),
            gather_slots(local_v, sinks), index_q if heads else None, index_k if heads else None, kv_rows=rows,
            head_units=head_units, first_slot=first, sinks=sinks, window_tokens=window, top_p=0.8, scaling=SCALING,
            real=real,
        )  # fmt: skip

    for longest in (1, 6, 23):
        windows = ladder(kv_heads, heads, query_heads // kv_heads, longest)
        want = reference(
            q, k, v, index_q, index_k, retrieval=heads, unit_size=unit_size, window=windows, sink_tokens=3, top_p=0.8,
            real=real,
        )  # fmt: skip
        torch.testing.assert_close(run(windows), want, **TOLERANCE)
        assert torch.equal(run((longest,) * kv_heads), run(longest))


def test_random_shapes():
    for seed in range(60):
        torch.manual_seed(seed)
        draw = lambda low, high: int(torch.randint(low, high + 1, ()))  # noqa: E731
        slots, unit_size, units = draw(1, 90), draw(1, 3), draw(1, 2)
        queries, window, sink_tokens = draw(1, slots), draw(1, slots + 3), draw(0, min(5, slots))
        heads, top_p = unit_size * units, float(torch.rand(()) * 0.9 + 0.05)
        q, k, v, index_q, index_k = make_inputs(2, heads, heads, slots, queries, units)
        real = make_real(PADDINGS[draw(0, 2)], 2, slots)
        near = {"window": window, "sink_tokens": sink_tokens, "real": real}
        torch.testing.assert_close(run_window(q, k, v, **near), reference(q, k, v, **near), **TOLERANCE)
        settings = {**near, "top_p": top_p, "unit_size": unit_size}
        want = reference(q, k, v, index_q, index_k, retrieval=tuple(range(heads)), **settings)
        torch.testing.assert_close(run_retrieval(q, k, v, index_q, index_k, **settings), want, **TOLERANCE)


def assert_same_gradients(inputs, run, want):
    """Outputs and the gradients of a random projection of them, with respect to all `inputs`."""
    inputs = [x.requires_grad_() for x in inputs]
    got, want = run(*inputs), want(*inputs)
    torch.testing.assert_close(got, want, **TOLERANCE)
    direction = torch.randn_like(got)
    got_grads = torch.autograd.grad((got * direction).sum(), inputs)
    want_grads = torch.autograd.grad((want * direction).sum(), inputs)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert want_grad.abs().max() > 1e-3
        torch.testing.assert_close(got_grad, want_grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_window_gradients(padding, dtype, pieces):
    q, k, v, *_ = make_inputs(2, 2, 2, 150, 140, dtype=dtype)
    near = {"window": 9, "sink_tokens": 3, "real": make_real(padding, 2, 150)}
    assert_same_gradients((q, k, v), lambda *x: run_window(*x, **near), lambda *x: reference(*x, **near))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_retrieval_gradients(padding, dtype, pieces):
    q, k, v, *index = make_inputs(2, 4, 4, 60, 50, units=2, dtype=dtype)
    settings = {"window": 5, "sink_tokens": 2, "top_p": 0.7, "unit_size": 2, "real": make_real(padding, 2, 60)}
    assert_same_gradients(
        (q, k, v),
        lambda *x: run_retrieval(*x, *index, **settings),
        lambda *x: reference(*x, *index, retrieval=(0, 1, 2, 3), **settings),
    )


def test_pieces_keep_their_inputs_only(monkeypatch):
    """Under autograd every piece is computed again in the backward pass; without it nothing is."""
    monkeypatch.setattr(prefill, "workspace_elements", lambda device: 64)
    calls = []

    def counted(function, *args, **kwargs):
        calls.append(function)
        return torch_checkpoint.checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(prefill, "checkpoint", counted)
    q, k, v, *index = make_inputs(1, 2, 2, 100, 100, units=2)
    settings = {"window": 5, "sink_tokens": 2, "real": None}
    run_window(q, k, v, **settings)
    run_retrieval(q, k, v, *index, top_p=0.5, unit_size=1, **settings)
    assert not calls
    q.requires_grad_()
    run_window(q, k, v, **settings)
    assert len(calls) == 2
    run_retrieval(q, k, v, *index, top_p=0.5, unit_size=1, **settings)
    assert len(calls) == 2 + 100


def test_workspace_bounds_the_masks(monkeypatch):
    """No piece's mask or scores exceed the workspace, however long the sequence."""
    limit, largest = 20_000, []
    monkeypatch.setattr(prefill, "workspace_elements", lambda device: limit)
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask, scale):
        largest.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return attention(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(prefill.F, "scaled_dot_product_attention", watched)
    q, k, v, *index = make_inputs(1, 2, 2, 900, 900, units=2)
    run_window(q, k, v, window=20, sink_tokens=4, real=None)
    run_retrieval(q, k, v, *index, unit_size=1, window=20, sink_tokens=4, top_p=0.5, real=None)
    assert len(largest) > 50
    assert max(largest) <= limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype):
    """At most twice the error of plain attention in the same dtype, both against float32, plus rounding."""
    q, k, v, index_q, index_k = make_inputs(2, 2, 2, 90, 90, units=2)
    half = [x.to(dtype) for x in (q, k, v)]
    exact = [x.float() for x in half]
    settings = {"window": 12, "sink_tokens": 4, "real": None}
    want = reference(*exact, **settings)
    causal = torch.nn.functional.scaled_dot_product_attention
    plain = causal(*half, is_causal=True, scale=SCALING).float() - causal(*exact, is_causal=True, scale=SCALING)
    allowed = 2 * plain.abs().max() + torch.finfo(dtype).eps * want.abs().max()
    assert (run_window(*half, **settings).float() - want).abs().max() <= allowed
    settings |= {"top_p": 0.7, "unit_size": 1}
    want = reference(*exact, index_q, index_k, retrieval=(0, 1), **settings)
    got = run_retrieval(*half, index_q, index_k, **settings)
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() <= allowed


def test_sink_slots():
    assert sink_slots(None, 3).tolist() == [[0, 1, 2]]
    assert sink_slots(None, 0).shape == (1, 0)
    real = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    assert sink_slots(real, 2).tolist() == [[0, 1], [1, 3], [-1, -1]]
    assert sink_slots(real, 6).tolist() == [[0, 1, 2, 3, -1, -1], [1, 3, -1, -1, -1, -1], [-1] * 6]


def test_reference_by_hand():
    """The reference itself, on a case small enough to name every visible token."""
    q = torch.zeros(1, 2, 6, 1)  # uniform weights: the output is the mean of the visible values
    k, v = torch.zeros(1, 1, 6, 1), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).view(1, 1, 6, 1)
    index_q = torch.ones(1, 1, 6, 1)
    index_k = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0, 0.0]).view(1, 1, 6, 1)
    out = ops.sparse_attention(
        q, k, v, index_q, index_k, retrieval_heads=(1,), heads_per_unit=1, window_tokens=2, sink_tokens=1, top_p=0.5,
        scaling=1.0,
    )  # fmt: skip
    local = [[1], [1, 2], [1, 2, 4], [1, 4, 8], [1, 8, 16], [1, 16, 32]]
    # before the third token all scores are equal and all are selected; from it on it has all the mass
    retrieval = [[1], [1, 2], [1, 2, 4], [1, 4, 8], [1, 4, 8, 16], [1, 4, 16, 32]]
    for head, rows in enumerate((local, retrieval)):
        torch.testing.assert_close(out[0, head, :, 0], torch.tensor([sum(r) / len(r) for r in rows]))


def test_keep_mask_is_what_attention_uses():
    real = make_real("left", 2, 30)
    q_slots = k_slots = torch.arange(30)
    index_q, index_k = torch.randn(2, 3, 30, INDEX_DIM), torch.randn(2, 3, 30, INDEX_DIM)
    visible = visible_slots(q_slots, k_slots, real)
    near = near_slots(q_slots, k_slots, sink_slots(real, 2), 4)
    keep = keep_mask(index_q, index_k, visible=visible, near=near, top_p=0.5)
    assert keep.shape == (2, 3, 30, 30)
    assert not (keep & ~visible).any()
    assert (keep | ~(near & visible)).all()
    assert (visible & ~keep).any()
    assert keep_mask(index_q, index_k, visible=visible, near=near, top_p=1.0) is visible
