"""Speed of one attention layer on this machine: sparse decode against the best dense kernel present.

1. Correctness gate: the timed op on the timed inputs against plain PyTorch in float32.
2. Dense: scaled dot-product attention by every backend that takes the shape, a group's query heads packed as rows.
3. Sparse: index scores, selection and attention, all launches counted.

Selections are replayed, not random: index keys are made so that each unit selects a given share of far tokens, as measured
on real text, and all others score several nats lower, inside the grid that is counted. Times are medians over replays of a
CUDA graph (on a CPU: over calls) that goes round several copies of the inputs, so that no cache holds them from one call to
the next.

Shapes: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N slots, D head dimension, U index units, d index dimension.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import ops
from ..ops.reference import gather_slots, sink_slots

COLD_BYTES = 200 * 2**20
"""Inputs of one round of calls, four times an H100's cache."""
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SPREAD_NATS = 5.0
"""Range of the scores of tokens that are not selected."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Geometry of one attention layer and the roles of its heads."""

    query_heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    index_dim: int = 16
    retrieval: tuple[int, ...] = ()
    """Retrieval query heads, ascending."""
    unit_size: int = 1
    """Query heads that share one selection: 1, or query_heads / kv_heads for whole groups."""
    window_tokens: int = 8192
    sink_tokens: int = 4
    top_p: float = 0.95
    far_ratio: float = 0.03
    """Share of far tokens that each unit selects."""

    @property
    def units(self) -> int:
        """Index units."""
        return len(self.retrieval) // self.unit_size

    @property
    def kv_rows(self) -> tuple[int, ...]:
        """KV heads that are kept whole, then the others."""
        group = self.query_heads // self.kv_heads
        full = sorted({h // group for h in self.retrieval})
        return (*full, *(g for g in range(self.kv_heads) if g not in full))

    @property
    def full_rows(self) -> int:
        """KV heads that are kept whole."""
        return len({h // (self.query_heads // self.kv_heads) for h in self.retrieval})

    @property
    def head_units(self) -> tuple[int, ...]:
        """Index unit of every query head, -1 for local ones."""
        units = {h: i // self.unit_size for i, h in enumerate(self.retrieval)}
        return tuple(units.get(h, -1) for h in range(self.query_heads))


def layer_shape(
    text: str, *, retrieval: tuple[int, ...], window_tokens: int, far_ratio: float, sink_tokens: int = 4
) -> LayerShape:
    """The layer that "query heads/KV heads/head dimension" describes.

    Raises:
        ValueError: not three numbers that fit, retrieval heads it does not have, or settings out of range.
    """
    try:
        query_heads, kv_heads, head_dim = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"shape must be query heads/KV heads/head dimension, such as 32/4/128, got {text!r}.") from None
    if min(query_heads, kv_heads, head_dim) < 1 or query_heads % kv_heads:
        raise ValueError(f"shape must have a number of query heads that is a multiple of the KV heads, got {text!r}.")
    heads = tuple(sorted(set(retrieval)))
    if any(not 0 <= head < query_heads for head in heads):
        raise ValueError(f"retrieval must be heads below {query_heads}, got {', '.join(map(str, retrieval))}.")
    if window_tokens < 1:
        raise ValueError(f"window_tokens must be at least 1, got {window_tokens}.")
    if not 0.0 <= far_ratio <= 1.0:
        raise ValueError(f"far_ratio must be in [0, 1], got {far_ratio}.")
    return LayerShape(
        query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, retrieval=heads, window_tokens=window_tokens,
        sink_tokens=sink_tokens, far_ratio=far_ratio,
    )  # fmt: skip


def sparse_step(shape: LayerShape, batch: int, slots: int, *, device: torch.device, dtype: torch.dtype, seed: int = 0):
    """(decode step as a function without arguments, dense q, k, v, who attends to what [B, Hq, N], cache bytes)."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    heads, dim = shape.kv_heads, shape.head_dim
    q = draw(batch, heads, shape.query_heads // heads, dim)
    k, v = draw(batch, heads, slots, dim), draw(batch, heads, slots, dim)
    rows = list(shape.kv_rows)
    first = max(0, slots - shape.window_tokens)
    sinks = sink_slots(None, shape.sink_tokens, device=device)
    chosen = torch.rand(batch, shape.units, slots, generator=generator, device=device) < shape.far_ratio
    index_q = draw(batch, shape.units, shape.index_dim)
    index_q = (index_q / index_q.float().norm(dim=-1, keepdim=True)).to(dtype)
    ratio = min(max(shape.far_ratio, 1e-6), 1 - 1e-6)
    gap = math.log((1 - ratio) / (ratio * (1 - shape.top_p))) + 2.0  # below it all others together are a seventh of 1 - p
    below = gap + SPREAD_NATS * torch.rand(chosen.shape, generator=generator, device=device)
    index_k = index_q[:, :, None] * torch.where(chosen, 0.0, -below)[..., None].to(dtype)
    full = [x[:, rows[: shape.full_rows]].contiguous() for x in (k, v)]
    local = [x[:, rows[shape.full_rows :], first:].contiguous() for x in (k, v)]
    sink = [gather_slots(x[:, rows[shape.full_rows :]], sinks) for x in (k, v)]
    slot = torch.arange(slots, device=device)
    near = (slot >= first) | (slot < shape.sink_tokens)
    group_units = torch.tensor(shape.head_units, device=device)
    keep = near.expand(batch, shape.query_heads, slots)
    if shape.units:
        keep = keep | (chosen[:, group_units.clamp(min=0)] & (group_units >= 0)[:, None])

    def step() -> Tensor:
        return ops.decode_attention(
            q, full[0], full[1], local[0], local[1], sink[0], sink[1], index_q, index_k, kv_rows=shape.kv_rows,
            head_units=shape.head_units, slots=slots, sinks=sinks, window_tokens=shape.window_tokens, top_p=shape.top_p,
            scaling=dim**-0.5,
        )  # fmt: skip

    held = sum(x.numel() * x.element_size() for x in (*full, *local, *sink, index_k))
    return step, (q, k, v), keep, held


def error(step: Callable[[], Tensor], dense: tuple[Tensor, Tensor, Tensor], keep: Tensor) -> tuple[float, float]:
    """Largest error of a sparse step against float32, and what is allowed: twice that of plain PyTorch, plus rounding."""
    q, k, v = dense
    scaling = q.shape[-1] ** -0.5
    mask = keep.unflatten(1, (q.shape[1], -1))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = ((q @ k.mT).float() * scaling).masked_fill(~mask, -torch.inf).softmax(-1)
        return weights.to(v.dtype) @ v

    truth = plain(q.float(), k.float(), v.float())
    rounding = max(torch.finfo(q.dtype).eps, 1e-5) * truth.abs().max() + 1e-6
    allowed = 2 * (plain(q, k, v).float() - truth).abs().max() + rounding
    return float((step().float() - truth).abs().max()), float(allowed)


def median_seconds(functions: Sequence[Callable[[], Any]], *, device: torch.device, repeats: int = 20) -> float:
    """Median seconds of one call, over rounds through `functions`: the same work on different copies of its inputs."""
    times: list[float] = []
    if device.type != "cuda":
        functions[0]()
        for i in range(repeats):
            begin = time.perf_counter()
            functions[i % len(functions)]()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    graph.replay()
    for _ in range(repeats):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        graph.replay()
        marks[1].record()
        torch.cuda.synchronize()
        times.append(marks[0].elapsed_time(marks[1]) / 1000 / len(functions))
    return statistics.median(times)


@torch.no_grad()
def decode_row(
    shape: LayerShape, batch: int, slots: int, *, device: torch.device, dtype: torch.dtype, repeats: int = 20
) -> dict[str, Any]:
    """Measure one decode step of a layer.

    Returns:
        "batch", "slots", "far_ratio" really selected (None without retrieval heads), "error" and "error_allowed",
        "dense_seconds" by backend, "refused" backends with their reasons, "sparse_seconds", "speedup" over the best
        dense one, "dense_cache_bytes" and "sparse_cache_bytes".

    Raises:
        ValueError: the sparse step is wrong on these inputs; nothing is timed then.
    """
    step, dense, keep, cache_bytes = sparse_step(shape, batch, slots, device=device, dtype=dtype)
    got, allowed = error(step, dense, keep)
    if not got <= allowed:
        raise ValueError(f"Sparse decode at {slots} tokens is wrong by {got:.3g}, allowed are {allowed:.3g}; not timed.")
    far = keep[:, list(shape.retrieval), shape.sink_tokens : max(shape.sink_tokens, slots - shape.window_tokens)]
    row: dict[str, Any] = {
        "batch": batch,
        "slots": slots,
        "far_ratio": float(far.float().mean()) if far.numel() else None,
        "error": got,
        "error_allowed": allowed,
        "dense_cache_bytes": 2 * dense[1].numel() * dense[1].element_size(),
        "sparse_cache_bytes": cache_bytes,
        "dense_seconds": {},
        "refused": {},
    }
    del keep, far

    def copies(nbytes: int) -> int:
        return max(1, min(8, -(-COLD_BYTES // max(1, nbytes)))) if device.type == "cuda" else 1

    inputs = [dense] + [tuple(x.clone() for x in dense) for _ in range(copies(row["dense_cache_bytes"]) - 1)]
    for name, backend in BACKENDS.items():
        calls = [partial(_dense, backend, *its) for its in inputs]
        try:
            row["dense_seconds"][name] = median_seconds(calls, device=device, repeats=repeats)
        except RuntimeError as problem:  # this backend does not take the shape
            row["refused"][name] = str(problem).splitlines()[0]
    del inputs, dense
    steps = [step]
    for seed in range(1, copies(cache_bytes)):
        steps.append(sparse_step(shape, batch, slots, device=device, dtype=dtype, seed=seed)[0])
    row["sparse_seconds"] = median_seconds(steps, device=device, repeats=repeats)
    if row["dense_seconds"]:
        row["speedup"] = min(row["dense_seconds"].values()) / row["sparse_seconds"]
    return row


def _dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def mode_shapes(shape: LayerShape, ratio: float = 0.15) -> dict[str, list[tuple[float, LayerShape]]]:
    """Per mode the layers that an average layer is made of, with their weights.

    "heads": the shape's own retrieval heads, each selecting for itself (the paper). "groups": `ratio` of all KV groups,
    whole, on average; a group selects three times as many tokens as a head.
    """
    group = shape.query_heads // shape.kv_heads

    def whole(groups: int) -> LayerShape:
        far = min(1.0, 3 * shape.far_ratio)
        return dataclasses.replace(shape, retrieval=tuple(range(group * groups)), unit_size=group, far_ratio=far)

    least, rest = divmod(ratio * shape.kv_heads, 1)
    mixture = [(1 - rest, whole(int(least))), (rest, whole(int(least) + 1))]
    return {"heads": [(1.0, shape)], "groups": [(weight, layer) for weight, layer in mixture if weight > 1e-9]}


def bench_layer(
    shape: LayerShape,
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 20,
) -> dict[str, Any]:
    """Decode steps of an average layer, a row for every batch, length and mode.

    Returns:
        "device", "dtype", "torch", "attention" (which implementation decodes, and why), "shape", and "rows": dense and
        sparse seconds, speedup, cache bytes, and the layers they are made of; "refused" where memory does not suffice.

    Raises:
        ValueError: a length or batch below 1, or a sparse step that is wrong.
    """
    for name, values in (("lengths", lengths), ("batches", batches)):
        if min(values, default=0) < 1:
            raise ValueError(f"{name} must be 1 or more, got {', '.join(map(str, values)) or 'none'}.")
    rows: list[dict[str, Any]] = []
    for batch in batches:
        for slots in lengths:
            for mode, layers in mode_shapes(shape).items():
                row: dict[str, Any] = {"mode": mode, "batch": batch, "slots": slots}
                try:
                    parts = [
                        (w, decode_row(s, batch, slots, device=device, dtype=dtype, repeats=repeats)) for w, s in layers
                    ]
                except torch.OutOfMemoryError as problem:
                    rows.append({**row, "refused": str(problem).splitlines()[0]})
                    continue
                for key in ("sparse_seconds", "sparse_cache_bytes", "dense_cache_bytes"):
                    row[key] = sum(w * part[key] for w, part in parts)
                dense = [(seconds, name) for _, part in parts for name, seconds in part["dense_seconds"].items()]
                if dense:
                    row["dense_seconds"], row["dense_backend"] = min(dense)
                    row["speedup"] = row["dense_seconds"] / row["sparse_seconds"]
                rows.append({**row, "parts": [part for _, part in parts]})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    which, why = ops.backend(device.type, dtype, shape.head_dim)
    return {
        "device": name,
        "dtype": str(dtype),
        "torch": torch.__version__,
        "attention": f"{which} ({why})",
        "shape": dataclasses.asdict(shape),
        "rows": rows,
    }
