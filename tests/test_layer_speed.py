"""The layer benchmark measures what it says: the right selection, the right bytes, and nothing when the result is wrong."""

import dataclasses

import pytest
import torch

from rtpurbo import ops
from rtpurbo.evals.layer_speed import (
    LayerShape,
    decode_row,
    error,
    mode_shapes,
    prefill_error,
    prefill_row,
    prefill_step,
    sparse_step,
)

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
SHAPE = LayerShape(query_heads=8, kv_heads=4, head_dim=16, retrieval=(1, 2, 6), window_tokens=40, far_ratio=0.1)
GROUPS = dataclasses.replace(SHAPE, retrieval=(2, 3), unit_size=2)


@pytest.mark.parametrize("shape", [SHAPE, GROUPS, dataclasses.replace(SHAPE, retrieval=())])
def test_the_replayed_selection_is_what_the_op_selects(shape):
    step, dense, keep, _ = sparse_step(shape, 2, 300, **CPU)
    got, allowed = error(step, dense, keep)
    assert got <= allowed
    wrong = keep.clone()
    wrong[:, 1 if shape is SHAPE else 2, 100] ^= True
    assert error(step, dense, wrong)[0] > 100 * allowed


def test_cache_bytes_are_those_of_full_rows_windows_sinks_and_index():
    *_, held = sparse_step(SHAPE, 2, 300, **CPU)
    full, local = 3 * 300 * 16, 1 * (40 + 4) * 16  # heads 1 | 2 | 6 touch three of four KV heads
    assert held == 4 * 2 * (2 * (full + local) + 3 * 300 * 16)


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


@pytest.mark.parametrize("shape", [SHAPE, GROUPS, dataclasses.replace(SHAPE, retrieval=())])
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
