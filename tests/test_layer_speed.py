"""The layer benchmark measures what it says: the right selection, the right bytes, and nothing when the result is wrong."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rtpurbo import ops
from rtpurbo.evals import layer_speed
from rtpurbo.evals.layer_speed import (
    LayerShape,
    bench_layer,
    decode_row,
    error,
    layer_shape,
    median_seconds,
    mode_shapes,
    pays_from,
    prefill_error,
    prefill_row,
    prefill_shapes,
    prefill_step,
    sparse_step,
)
from rtpurbo.evals.layer_work import (
    ROLES,
    causal_pairs,
    decode_bytes,
    near_pairs,
    observe,
    prefill_flops,
    seconds_by_name,
    shares,
)
from rtpurbo.ops.reference import near_slots, sink_slots
from rtpurbo.ops.select import leaves_out

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
SHAPE = LayerShape(query_heads=8, kv_heads=4, head_dim=16, retrieval=(1, 2, 6), window_tokens=40, far_ratio=0.1)
GROUPS = dataclasses.replace(SHAPE, retrieval=(2, 3), unit_size=2)
SMALL = dataclasses.replace(SHAPE, index_dtype="float8")
LADDER = dataclasses.replace(GROUPS, windows=(5, 40, 20, 30))


@pytest.mark.parametrize("shape", [SHAPE, SMALL, GROUPS, LADDER, dataclasses.replace(SHAPE, retrieval=())])
def test_the_replayed_selection_is_what_the_op_selects(shape):
    step, dense, keep, _ = sparse_step(shape, 2, 300, **CPU)
    got, allowed = error(step, dense, keep)
    assert got <= allowed
    wrong = keep.clone()
    wrong[:, 2 if shape is GROUPS else 1, 100] ^= True
    assert error(step, dense, wrong)[0] > 100 * allowed


def test_cache_bytes_are_those_of_full_rows_windows_sinks_and_index():
    *_, held = sparse_step(SHAPE, 2, 300, **CPU)
    full, local = 3 * 300 * 16, 1 * (40 + 4) * 16  # heads 1 | 2 | 6 touch three of four KV heads
    assert held == 4 * 2 * (2 * (full + local) + 3 * 300 * 16)
    *_, smaller = sparse_step(SMALL, 2, 300, **CPU)
    assert smaller == held - 3 * 2 * 3 * 300 * 16  # one byte a dimension in place of four


@pytest.mark.parametrize("far_ratio", [0.0001, 0.03, 0.3])
def test_float8_keeps_selected_and_other_tokens_well_apart(far_ratio, monkeypatch):
    shape, seen = dataclasses.replace(SMALL, far_ratio=far_ratio), []
    monkeypatch.setattr(ops, "decode_attention", lambda *args, **kw: seen.extend(args[7:9]))
    step, *_ = sparse_step(shape, 1, 20000, device=torch.device("cpu"), dtype=torch.bfloat16)
    step()
    index_q, index_k = seen
    assert index_k.dtype == torch.float8_e4m3fn
    scores = ops.index_scores(index_q[:, :, None], index_k)[:, :, 0]
    others = scores[scores < 0]
    assert (others.min() > -20) & (others.max() < -10)
    assert (scores >= 0).sum() == pytest.approx(3 * 20000 * far_ratio, rel=0.2, abs=15)


def test_float8_index_keys_are_read_as_bytes():
    normal, small = (decode_bytes(shape, 2, 300, 0.1, element_bytes=2)[1] for shape in (SHAPE, SMALL))
    assert normal - small == 2 * 3 * 300 * 16
    with pytest.raises(ValueError, match="index_dtype must be 'auto' or 'float8', got 'fp8'"):
        layer_shape("9/3/64", retrieval=None, window_tokens=8, far_ratio=0.1, index_dtype="fp8")
    assert mode_shapes(SMALL)["groups"][0][1].index_dtype == "float8"


def test_a_layer_may_have_a_window_ladder():
    shape = layer_shape("8/4/16", retrieval=(2,), window_tokens=40, far_ratio=0.1, windows=(5, 3, 20, 30))
    assert shape.kv_windows == (5, 40, 20, 30)  # the second KV head is kept whole
    assert shape.held_tokens == 30
    assert dataclasses.replace(shape, windows=None).kv_windows == (40,) * 4
    *_, held = sparse_step(shape, 1, 300, **CPU)
    assert held == 4 * (2 * (300 + 3 * (30 + 4)) * 16 + 300 * 16)
    pairs = sum(2 * int(seen(300, window, 4)[1].sum()) for window in shape.kv_windows)
    assert prefill_flops(shape, 300, 0.0)[1] == 4 * 16 * pairs
    rows = sum(window + 4 for window in shape.kv_windows)
    assert decode_bytes(shape, 1, 300, 0.0, element_bytes=4)[1] == 4 * (2 * rows * 16 + 300 * 16)
    for windows, got in (((5, 3), "5, 3"), ((5, 3, 20, 41), "5, 3, 20, 41"), ((), "none")):
        with pytest.raises(ValueError, match=rf"one for each of 4 KV heads, from 1 to window_tokens \(40\), got {got}"):
            layer_shape("8/4/16", retrieval=(2,), window_tokens=40, far_ratio=0.1, windows=windows)


def test_far_share_is_measured_and_near_the_one_asked_for():
    row = decode_row(SHAPE, 2, 2000, **CPU, repeats=2)
    assert row["far_ratio"] == pytest.approx(0.1, abs=0.02)
    assert row["sparse_seconds"] > 0
    assert row["speedup"] == min(row["dense_seconds"].values()) / row["sparse_seconds"]


def test_a_wrong_result_is_not_timed(monkeypatch):
    true = ops.decode_attention
    monkeypatch.setattr(ops, "decode_attention", lambda *args, **kw: 1.01 * true(*args, **kw))
    with pytest.raises(ValueError, match="is wrong by"):
        decode_row(SHAPE, 1, 200, **CPU)


@pytest.mark.parametrize("shape", [SHAPE, GROUPS, LADDER, dataclasses.replace(SHAPE, retrieval=())])
def test_prefill_is_checked_against_the_replayed_selection(shape, monkeypatch):
    step, dense, chosen = prefill_step(shape, 300, **CPU)
    got, allowed = prefill_error(shape, step, dense, chosen)
    assert got <= allowed
    if shape.units:
        assert prefill_error(shape, step, dense, ~chosen)[0] > 100 * allowed
    row = prefill_row(shape, 300, **CPU, repeats=1)
    assert row["speedup"] == min(row["dense_seconds"].values()) / row["sparse_seconds"]
    true = ops.prefill_attention
    monkeypatch.setattr(ops, "prefill_attention", lambda *args, **kw: 1.01 * true(*args, **kw))
    with pytest.raises(ValueError, match="is wrong by"):
        prefill_row(shape, 300, **CPU)


def test_an_average_layer_has_the_asked_share_of_groups():
    for ratio, kv_heads in ((0.15, 4), (0.15, 8), (0.5, 2)):
        shape = LayerShape(query_heads=16, kv_heads=kv_heads, head_dim=16, retrieval=(1,))
        groups = mode_shapes(shape, ratio)["groups"]
        assert sum(weight for weight, _ in groups) == pytest.approx(1.0)
        assert sum(weight * layer.full_rows for weight, layer in groups) == pytest.approx(ratio * kv_heads)


def test_retrieval_heads_that_are_not_named_fit_the_shape():
    def heads(text: str) -> tuple[int, ...]:
        return layer_shape(text, retrieval=None, window_tokens=8, far_ratio=0.1).retrieval

    assert heads("32/4/128") == layer_speed.RETRIEVAL
    assert heads("9/3/64") == (4,)
    assert heads("40/8/128") == (3, 10, 16, 23, 30, 36)
    assert layer_shape("9/3/64", retrieval=(), window_tokens=8, far_ratio=0.1).retrieval == ()


def seen(slots: int, window: int, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, N] bool: causal, and of these the pairs in the window or with a sink."""
    at = torch.arange(slots)
    causal = at <= at[:, None]
    return causal, causal & near_slots(at, at, sink_slots(None, sinks), window)[0, 0]


@pytest.mark.parametrize(("slots", "window", "sinks"), [(30, 7, 4), (30, 7, 0), (5, 9, 4), (9, 9, 4), (11, 9, 4), (6, 1, 4)])
def test_pairs_are_counted_right(slots, window, sinks):
    causal, near = seen(slots, window, sinks)
    assert causal_pairs(slots) == int(causal.sum())
    assert near_pairs(slots, window, sinks) == int(near.sum())


@pytest.mark.parametrize("far_ratio", [0.0, 0.25, 1.0])
def test_prefill_flops_are_those_of_the_pairs(far_ratio):
    shape = dataclasses.replace(SHAPE, window_tokens=7)
    causal, near = seen(30, 7, 4)
    pairs = 0.0
    for unit in shape.head_units:
        pairs += float(near.sum()) + (far_ratio * float((causal & ~near).sum()) if unit >= 0 else 0)
    assert prefill_flops(shape, 30, far_ratio) == (4 * 16 * 8 * int(causal.sum()), pytest.approx(4 * 16 * pairs))


@pytest.mark.parametrize(
    ("retrieval", "unit_size", "far_ratio"),
    [((1, 2, 6), 1, 0.0), ((1, 2, 6), 1, 1.0), ((0, 1, 6), 1, 0.3), ((2, 3), 2, 0.3), ((), 1, 0.3)],
)
@pytest.mark.parametrize("slots", [30, 20000])
def test_decode_bytes_are_those_of_what_is_attended_to(retrieval, unit_size, far_ratio, slots):
    shape = dataclasses.replace(SHAPE, retrieval=retrieval, unit_size=unit_size, far_ratio=far_ratio)
    _, (_, k, v), keep, _ = sparse_step(shape, 2, slots, **CPU)
    rows = int(keep.unflatten(1, (4, 2)).any(2).sum())  # a row that several heads read counts once
    index = 2 * shape.units * slots * 16 * 4
    dense, sparse = decode_bytes(shape, 2, slots, far_ratio, element_bytes=4)
    assert dense == 4 * (k.numel() + v.numel())
    exact = far_ratio in (0.0, 1.0) or slots == 30
    assert sparse == pytest.approx(2 * rows * 16 * 4 + index, rel=1e-9 if exact else 0.02)


def test_rates_are_work_by_time():
    row = decode_row(SHAPE, 2, 300, **CPU, repeats=1)
    work = decode_bytes(SHAPE, 2, 300, row["far_ratio"], element_bytes=4)
    assert (row["dense_bytes"], row["sparse_bytes"]) == work
    assert row["sparse_tb_per_second"] == pytest.approx(work[1] / row["sparse_seconds"] / 1e12)
    assert row["dense_tb_per_second"] == pytest.approx(work[0] / min(row["dense_seconds"].values()) / 1e12)
    row = prefill_row(SHAPE, 300, **CPU, repeats=1)
    work = prefill_flops(SHAPE, 300, row["far_ratio"])
    assert (row["dense_flops"], row["sparse_flops"]) == work
    assert row["sparse_tflops"] == pytest.approx(work[1] / row["sparse_seconds"] / 1e12)
    assert row["dense_tflops"] == pytest.approx(work[0] / min(row["dense_seconds"].values()) / 1e12)


def test_kernel_times_are_summed_by_name():
    from torch.autograd import DeviceType
    from torch.autograd.profiler_util import FunctionEvent

    def event(name: str, device: DeviceType, start: float, stop: float) -> FunctionEvent:
        return FunctionEvent(1, name, 0, start, stop, device_type=device, use_device="cuda")

    events = [
        event("cudaLaunchKernel", DeviceType.CPU, 0, 50), event("_gather", DeviceType.CUDA, 10, 40),
        event("_gather", DeviceType.CUDA, 50, 55), event("Memset (Device)", DeviceType.CUDA, 0, 2),
        event("Context Sync", DeviceType.CUDA, 0, 99),
    ]  # fmt: skip
    assert seconds_by_name(events) == pytest.approx({"_gather": 35e-6, "Memset (Device)": 2e-6})


def test_kernel_times_become_shares():
    times = {"_score": 1.0, "_far_bits": 0.5, "_attend": 2.0, "pytorch_flash::flash_fwd_kernel<128>": 3.0, "Memset": 1.5}
    assert shares(times) == pytest.approx({"index": 1.5 / 8, "attention": 5 / 8, "other": 1.5 / 8})
    assert shares(None) is None
    assert observe(lambda: pytest.fail("it ran"), CPU["device"]) == (None, None)


def test_every_kernel_with_a_role_exists():
    code = "".join(file.read_text() for file in Path(ops.__file__).parent.glob("*.py"))
    assert [name for name in ROLES if f"def {name}(" not in code] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the profiler is asked for kernels of a GPU")
def test_a_gpu_row_says_where_time_and_memory_went():
    shape = dataclasses.replace(SHAPE, head_dim=64)
    gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    for row in (decode_row(shape, 1, 3000, **gpu, repeats=2), prefill_row(shape, 3000, **gpu, repeats=1)):
        assert row["peak_bytes"] > 0
        assert sum(row["shares"].values()) == pytest.approx(1.0)
        assert min(row["shares"]["index"], row["shares"]["attention"]) > 0, row["kernel_seconds"]
        assert 0 < sum(row["kernel_seconds"].values()) < 1


def test_a_long_call_is_timed_once(monkeypatch):
    calls = []
    assert median_seconds([lambda: calls.append(0)], device=CPU["device"], repeats=5)[1] == 5
    assert len(calls) == 7  # one to warm up, one to see how long it takes
    calls.clear()
    monkeypatch.setattr(layer_speed, "LONG_SECONDS", -1.0)
    assert median_seconds([lambda: calls.append(0)], device=CPU["device"], repeats=5)[1] == 1
    assert len(calls) == 2
    assert prefill_row(SHAPE, 300, **CPU, repeats=3)["repeats"] == {"cpu": 1, "sparse": 1}


def test_a_dense_kernel_without_memory_is_noted(monkeypatch):
    def too_big(*args, **kw):
        raise torch.OutOfMemoryError("needs 99 GiB\nand more")

    kernels = layer_speed.dense_prefills
    monkeypatch.setattr(layer_speed, "dense_prefills", lambda *its: {"big": lambda: [too_big]} | kernels(*its))
    row = prefill_row(SHAPE, 300, **CPU, repeats=1)
    assert row["refused"] == {"big": "OutOfMemoryError: needs 99 GiB"}
    assert row["speedup"] == row["dense_seconds"]["cpu"] / row["sparse_seconds"]
    monkeypatch.setattr(layer_speed, "_dense", too_big)
    row = decode_row(SHAPE, 1, 300, **CPU, repeats=1)
    assert row["refused"].keys() == layer_speed.BACKENDS.keys()
    assert row["sparse_seconds"] > 0
    assert "speedup" not in row


def test_a_dense_kernel_that_cannot_be_imported_is_noted(monkeypatch):
    def prepare():
        raise ImportError("no such library")

    monkeypatch.setattr(layer_speed, "dense_prefills", lambda *its: {"new": prepare})
    row = prefill_row(SHAPE, 300, **CPU, repeats=1)
    assert row["refused"] == {"new": "ImportError: no such library"}


def test_the_papers_prefill_has_dense_retrieval_heads():
    ((weight, shape),) = prefill_shapes(SHAPE, 0.2)["paper"]
    assert weight == 1.0
    assert not leaves_out(shape.top_p, shape.min_probability)  # so that no index is scored
    step, (q, k, v), chosen = prefill_step(shape, 300, **CPU)
    causal, near = seen(300, SHAPE.window_tokens, SHAPE.sink_tokens)
    out = step()
    for head in range(8):
        mask = causal if head in SHAPE.retrieval else near
        truth = F.scaled_dot_product_attention(q[:, head], k[:, head // 2], v[:, head // 2], attn_mask=mask)
        assert torch.allclose(out[:, head], truth, atol=1e-5), head
    got, allowed = prefill_error(shape, step, (q, k, v), chosen)
    assert got <= allowed
    assert prefill_error(shape, step, (q, k, v), ~chosen)[0] > 100 * allowed
    row = prefill_row(shape, 300, **CPU, repeats=1)
    pairs = 3 * int(causal.sum()) + 5 * int(near.sum())
    assert row["sparse_flops"] == 4 * 16 * pairs


def test_other_prefill_modes_read_the_asked_share():
    modes = prefill_shapes(SHAPE, 0.2)
    assert modes.keys() == {*mode_shapes(SHAPE), "paper"}
    assert {layer.far_ratio for mode in mode_shapes(SHAPE) for _, layer in modes[mode]} == {0.2}


def test_a_mode_is_the_mean_of_its_layers():
    result = bench_layer(SHAPE, (300,), (1,), prefill_lengths=(300,), **CPU, repeats=1)
    assert [row["mode"] for row in result["rows"]] == ["heads", "groups"]
    assert [row["mode"] for row in result["prefill_rows"]] == ["heads", "groups", "paper"]
    for row, rate, work in (
        (result["rows"][1], "tb_per_second", "bytes"),
        (result["prefill_rows"][1], "tflops", "flops"),
    ):
        weights = [weight for weight, _ in mode_shapes(SHAPE)["groups"]]
        for key in ("sparse_seconds", f"sparse_{work}", f"dense_{work}"):
            assert row[key] == pytest.approx(sum(w * p[key] for w, p in zip(weights, row["parts"], strict=True)))
        for which in ("sparse", "dense"):
            assert row[f"{which}_{rate}"] == pytest.approx(row[f"{which}_{work}"] / row[f"{which}_seconds"] / 1e12)
        assert row["repeats"] == {"sparse": 1, "dense": 1}
        assert row["peak_bytes"] is row["kernel_seconds"] is row["shares"] is None


def test_kernel_times_of_a_mode_are_the_mean_of_its_layers():
    def part(repeats: int, **kernels: float) -> dict:
        seconds = {"sparse_seconds": 1.0, "sparse_flops": 1.0, "dense_flops": 1.0, "dense_seconds": {}}
        return seconds | {"repeats": {"sparse": repeats}, "peak_bytes": int(kernels["_score"]), "kernel_seconds": kernels}

    row = layer_speed.mixed([(0.25, part(3, _score=4.0)), (0.75, part(1, _score=8.0, _attend=4.0))])
    assert row["kernel_seconds"] == {"_score": 7.0, "_attend": 3.0}
    assert row["shares"] == pytest.approx({"index": 0.7, "attention": 0.3, "other": 0.0})
    assert row["peak_bytes"] == 8
    assert row["repeats"] == {"sparse": 1}


def test_where_sparse_attention_begins_to_pay():
    def row(slots, speedup, mode="heads", batch=1):
        return {"slots": slots, "mode": mode, "batch": batch} | ({} if speedup is None else {"speedup": speedup})

    rows = [row(8, 1.2), row(32, 2.0), row(16, 0.9), row(64, None), row(8, 0.5, "groups"), row(16, 1.0, batch=8)]
    assert pays_from(rows) == {"heads": 32, "groups": None, "heads, batch 8": 16}
