"""Speed of one attention layer on this machine: sparse decode against the best dense kernel present.

1. Correctness gate: the timed op on the timed inputs against plain PyTorch in float32.
2. Dense: scaled dot-product attention by every backend that takes the shape, a group's query heads packed as rows.
3. Sparse: index scores, selection and attention, all launches counted.

Selections are replayed, not random: index keys are made so that each unit selects a given share of far tokens, as measured
on real text. Times are medians over replays of a CUDA graph (on a CPU: over calls) that goes round several copies of
the inputs, so that no cache holds them from one call to the next.

Shapes: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N slots, D head dimension, U index units, d index dimension.
"""

from __future__ import annotations

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
SPREAD_NATS = 40.0
"""How far below the selected tokens all others score: nothing of their mass counts."""


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
    index_k = index_q[:, :, None] * torch.where(chosen, 0.0, -SPREAD_NATS)[..., None].to(dtype)
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
    """Measure one decode shape: {"sparse_seconds", "dense_seconds" by backend, "error", "speedup", bytes ...}.

    Raises:
        ValueError: the sparse step is wrong on these inputs; nothing is timed then.
    """
    step, dense, keep, cache_bytes = sparse_step(shape, batch, slots, device=device, dtype=dtype)
    got, allowed = error(step, dense, keep)
    if not got <= allowed:
        raise ValueError(f"Sparse decode at {slots} tokens is wrong by {got:.3g}, allowed are {allowed:.3g}; not timed.")
    far = keep[..., shape.sink_tokens : max(shape.sink_tokens, slots - shape.window_tokens)]
    retrieval = list(shape.retrieval)
    row: dict[str, Any] = {
        "batch": batch,
        "slots": slots,
        "far_ratio": float(far[:, retrieval].float().mean()) if retrieval and far.shape[-1] else None,
        "error": got,
        "error_allowed": allowed,
        "sparse_cache_bytes": cache_bytes,
        "dense_cache_bytes": 2 * dense[1].numel() * dense[1].element_size(),
        "dense_seconds": {},
    }
    del keep, far

    def copies(nbytes: int) -> int:
        return max(1, min(8, -(-COLD_BYTES // max(1, nbytes))))

    count = copies(row["dense_cache_bytes"])
    inputs = [dense] + [tuple(x.clone() for x in dense) for _ in range(count - 1)]
    for name, backend in BACKENDS.items():

        def attend(q: Tensor, k: Tensor, v: Tensor, backend=backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        try:
            functions = [partial(attend, *its) for its in inputs]
            row["dense_seconds"][name] = median_seconds(functions, device=device, repeats=repeats)
        except RuntimeError as problem:  # this backend does not take the shape
            row.setdefault("refused", {})[name] = str(problem).splitlines()[0]
    del inputs, dense
    steps = [step] + [
        sparse_step(shape, batch, slots, device=device, dtype=dtype, seed=i)[0] for i in range(1, copies(cache_bytes))
    ]
    row["sparse_seconds"] = median_seconds(steps, device=device, repeats=repeats)
    if row["dense_seconds"]:
        row["speedup"] = min(row["dense_seconds"].values()) / row["sparse_seconds"]
    return row
