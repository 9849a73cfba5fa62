"""Speed of one attention layer on this machine: sparse decode and prefill against the best dense kernel present.

1. Correctness gate: the timed op on the timed inputs against plain PyTorch in float32.
2. Dense: scaled dot-product attention by every backend that takes the shape (in decode with a group's query heads packed as
   rows), and flash-attn-4 where it is installed.
3. Sparse: index scores, selection and attention, all launches and copies counted. On a GPU one more call says what each
   kernel took and how much memory the step needs.

Selections are replayed, not random: index keys are made so that each unit selects a given share of far tokens, as measured
on real text, and all others score several nats lower. Times are medians over replays of a
CUDA graph (on a CPU: over calls) that goes round several copies of the inputs, so that no cache holds them from one call to
the next; a call of more than a second is timed once, after one that is not.

Shapes: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N slots, D head dimension, U index units, d index dimension.
"""

from __future__ import annotations

import dataclasses
import importlib.util
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
from ..config import IndexDtype
from ..indexer import stored_keys
from ..ops.reference import gather_slots, sink_slots, tile_positions, tile_window
from .layer_work import decode_bytes, observe, prefill_flops, shares

COLD_BYTES = 200 * 2**20
"""Inputs of one round of calls, four times an H100's cache."""
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
LONG_SECONDS = 1.0
"""Calls that take longer are timed once."""
RETRIEVAL = (2, 5, 8, 11, 29)
"""Retrieval heads of a layer of 32 query heads, unless others are named."""
BELOW_NATS, SPREAD_NATS = 12.0, 5.0
"""How far the scores of tokens that are not selected lie below the others, at least, and their range: no token among them
has a ten thousandth of the mass. Keys in float8 move them by a sixteenth at most, the others, which are 0, not at all."""


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
    windows: tuple[int, ...] | None = None
    """Window of every KV head, of which those that are kept whole take no notice; None: window_tokens."""
    sink_tokens: int = 4
    top_p: float = 1.0
    min_probability: float = 1e-4
    far_ratio: float = 0.03
    """Share of far tokens that each unit selects."""
    tile_probability: float = 0.0
    index_dtype: IndexDtype = "auto"
    """What decode's index keys are kept in: the dtype of keys and values, or float8."""

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
    def kv_windows(self) -> tuple[int, ...]:
        """Window of every KV head in tokens."""
        whole = self.kv_rows[: self.full_rows]
        its = self.windows or (self.window_tokens,) * self.kv_heads
        return tuple(self.window_tokens if head in whole else window for head, window in enumerate(its))

    @property
    def held_tokens(self) -> int:
        """Window that the cache of the other KV heads holds: the longest of theirs."""
        return max((self.kv_windows[head] for head in self.kv_rows[self.full_rows :]), default=self.window_tokens)

    @property
    def head_units(self) -> tuple[int, ...]:
        """Index unit of every query head, -1 for local ones."""
        units = {h: i // self.unit_size for i, h in enumerate(self.retrieval)}
        return tuple(units.get(h, -1) for h in range(self.query_heads))


def layer_shape(
    text: str,
    *,
    retrieval: tuple[int, ...] | None,
    window_tokens: int,
    far_ratio: float,
    sink_tokens: int = 4,
    index_dtype: IndexDtype = "auto",
    tile_probability: float = 0.0,
    windows: tuple[int, ...] | None = None,
) -> LayerShape:
    """The layer that "query heads/KV heads/head dimension" describes.

    Args:
        retrieval: retrieval query heads; None: `RETRIEVAL` of 32 heads, else 15 % of the heads, evenly spread.
        windows: window of every KV head in tokens, none longer than `window_tokens`; None: `window_tokens` for all.

    Raises:
        ValueError: not three numbers that fit, retrieval heads it does not have, or settings out of range.
    """
    try:
        query_heads, kv_heads, head_dim = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"shape must be query heads/KV heads/head dimension, such as 32/4/128, got {text!r}.") from None
    if min(query_heads, kv_heads, head_dim) < 1 or query_heads % kv_heads:
        raise ValueError(f"shape must have a number of query heads that is a multiple of the KV heads, got {text!r}.")
    if retrieval is None:
        count = max(1, round(0.15 * query_heads))
        spread = tuple((2 * i + 1) * query_heads // (2 * count) for i in range(count))
        retrieval = RETRIEVAL if query_heads == 32 else spread
    heads = tuple(sorted(set(retrieval)))
    if any(not 0 <= head < query_heads for head in heads):
        raise ValueError(f"retrieval must be heads below {query_heads}, got {', '.join(map(str, retrieval))}.")
    if window_tokens < 1:
        raise ValueError(f"window_tokens must be at least 1, got {window_tokens}.")
    if windows is not None and (len(windows) != kv_heads or not all(1 <= n <= window_tokens for n in windows)):
        raise ValueError(
            f"windows must be one for each of {kv_heads} KV heads, from 1 to window_tokens ({window_tokens}), got "
            f"{', '.join(map(str, windows)) or 'none'}."
        )
    if not 0.0 <= far_ratio <= 1.0:
        raise ValueError(f"far_ratio must be in [0, 1], got {far_ratio}.")
    if index_dtype not in ("auto", "float8"):
        raise ValueError(f"index_dtype must be 'auto' or 'float8', got {index_dtype!r}.")
    if not 0.0 <= tile_probability < 1.0:
        raise ValueError(f"tile_probability must be in [0, 1), got {tile_probability}.")
    return LayerShape(
        query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, retrieval=heads, window_tokens=window_tokens,
        sink_tokens=sink_tokens, far_ratio=far_ratio, index_dtype=index_dtype, tile_probability=tile_probability,
        windows=windows,
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
    first = max(0, slots - shape.held_tokens)
    sinks = sink_slots(None, shape.sink_tokens, device=device)
    chosen = torch.rand(batch, shape.units, slots, generator=generator, device=device) < shape.far_ratio
    index_q = draw(batch, shape.units, shape.index_dim)
    index_q = (index_q / index_q.float().norm(dim=-1, keepdim=True)).to(dtype)
    below = BELOW_NATS + SPREAD_NATS * torch.rand(chosen.shape, generator=generator, device=device)
    index_k = index_q[:, :, None] * torch.where(chosen, 0.0, -below)[..., None].to(dtype)
    index_k = stored_keys(index_k, shape.index_dtype, dtype)
    full = [x[:, rows[: shape.full_rows]].contiguous() for x in (k, v)]
    local = [x[:, rows[shape.full_rows :], first:].contiguous() for x in (k, v)]
    sink = [gather_slots(x[:, rows[shape.full_rows :]], sinks) for x in (k, v)]
    slot = torch.arange(slots, device=device)
    windows = torch.tensor(shape.kv_windows, device=device).repeat_interleave(shape.query_heads // heads)
    near = (slot >= slots - windows[:, None]) | (slot < shape.sink_tokens)
    group_units = torch.tensor(shape.head_units, device=device)
    keep = near.expand(batch, shape.query_heads, slots)
    if shape.units:
        keep = keep | (chosen[:, group_units.clamp(min=0)] & (group_units >= 0)[:, None])

    def step() -> Tensor:
        return ops.decode_attention(
            q, full[0], full[1], local[0], local[1], sink[0], sink[1], index_q, index_k, kv_rows=shape.kv_rows,
            head_units=shape.head_units, slots=slots, sinks=sinks, window_tokens=shape.kv_windows, top_p=shape.top_p,
            min_probability=shape.min_probability, scaling=dim**-0.5,
        )  # fmt: skip

    held = sum(x.numel() * x.element_size() for x in (*full, *local, *sink, index_k))
    return step, (q, k, v), keep, held


def prefill_step(shape: LayerShape, slots: int, *, device: torch.device, dtype: torch.dtype, seed: int = 0):
    """(prefill of a whole prompt as a function without arguments, dense q, k, v, far tokens that each unit selects [U, N]).

    All positions select the same tokens: a tile of positions reads what any of them selects, and `far_ratio` is the share of
    that. Batch 1.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    q = draw(1, shape.query_heads, slots, shape.head_dim)
    k, v = (draw(1, shape.kv_heads, slots, shape.head_dim) for _ in range(2))
    rows, full = list(shape.kv_rows), shape.full_rows
    sinks = sink_slots(None, shape.sink_tokens, device=device)
    chosen = torch.rand(shape.units, slots, generator=generator, device=device) < shape.far_ratio
    index_q = draw(1, shape.units, 1, shape.index_dim)
    index_q = (index_q / index_q.float().norm(dim=-1, keepdim=True)).to(dtype)
    below = BELOW_NATS + SPREAD_NATS * torch.rand(chosen.shape, generator=generator, device=device)
    index_k = index_q * torch.where(chosen, 0.0, -below)[None, ..., None].to(dtype)
    index_q = index_q.expand(-1, -1, slots, -1).contiguous()
    full_k, full_v, local_k, local_v = (x[:, part].contiguous() for part in (rows[:full], rows[full:]) for x in (k, v))
    sink_k, sink_v = (gather_slots(x, sinks) for x in (local_k, local_v))

    def step() -> Tensor:
        return ops.prefill_attention(
            q, full_k, full_v, local_k, local_v, sink_k, sink_v, index_q, index_k, kv_rows=shape.kv_rows,
            head_units=shape.head_units, first_slot=0, sinks=sinks, window_tokens=shape.kv_windows, top_p=shape.top_p,
            min_probability=shape.min_probability, tile_probability=shape.tile_probability, scaling=shape.head_dim**-0.5,
        )  # fmt: skip

    return step, (q, k, v), chosen


def prefill_error(shape: LayerShape, step: Callable[[], Tensor], dense: tuple[Tensor, Tensor, Tensor], chosen: Tensor):
    """(largest error of sparse prefill at some positions, what is allowed), as `error`."""
    q, k, v = dense
    slots, group = q.shape[2], shape.query_heads // shape.kv_heads
    generator = torch.Generator().manual_seed(0)
    at = torch.cat([torch.randint(slots, (14,), generator=generator), torch.tensor([0, slots - 1])]).to(q.device)
    age = at[:, None] - torch.arange(slots, device=q.device)
    is_sink = torch.arange(slots, device=q.device) < shape.sink_tokens
    units = torch.tensor(shape.head_units, device=q.device)
    whole = torch.zeros_like(age, dtype=torch.bool)  # what a tile reads before the window of its later positions
    if shape.tile_probability:
        first = tile_window(at, shape.window_tokens, tile_positions(shape.unit_size, shape.head_dim))
        whole = torch.arange(slots, device=q.device) >= first[:, None]

    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = (q.flatten(0, 1) @ k.mT).float() * shape.head_dim**-0.5
        weights = weights.masked_fill_(~mask.flatten(0, 1), -torch.inf).softmax(-1).to(v.dtype)
        return (weights @ v).float().unflatten(0, mask.shape[:2])

    few = q[0][:, at]
    true, rounded = [], []
    for row in range(shape.kv_heads):  # one at a time: a million keys of all heads in float32 are gigabytes
        heads = slice(row * group, (row + 1) * group)
        mask = ((age < shape.kv_windows[row]) | is_sink).expand(group, -1, -1)
        if shape.units:
            read = chosen[units[heads].clamp(min=0)][:, None] | whole
            mask = mask | (read & (units[heads] >= 0)[:, None, None])
        mask = mask & (age >= 0)  # [G, positions, N]
        true.append(plain(few[heads].float(), k[0, row].float(), v[0, row].float(), mask))
        rounded.append(plain(few[heads], k[0, row], v[0, row], mask))
    truth = torch.cat(true)
    rounding = max(torch.finfo(q.dtype).eps, 1e-5) * truth.abs().max() + 1e-6
    allowed = 2 * (torch.cat(rounded) - truth).abs().max() + rounding
    got = step()[0][:, at].float()
    return float((got - truth).abs().max()), float(allowed)


@torch.no_grad()
def prefill_row(
    shape: LayerShape,
    slots: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 3,
    dense: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure the prefill of a layer: a prompt of `slots` tokens at once, batch 1.

    Args:
        dense: a row of the same geometry and length, whose dense times are taken instead of measured again.

    Returns:
        "slots", "far_ratio" (of a tile of positions; None without retrieval heads), "error" and "error_allowed",
        "dense_seconds" by kernel, "refused" kernels with their reasons, "sparse_seconds", "repeats" (timed runs by kernel),
        "dense_flops" and "sparse_flops" (`layer_work.prefill_flops`), "speedup" over the best dense one, "dense_tflops"
        and "sparse_tflops" per second; of the sparse prefill "peak_bytes" beyond its inputs, "kernel_seconds" by name and
        their "shares" (None on a CPU).

    Raises:
        ValueError: the sparse result is wrong on these inputs; nothing is timed then.
    """
    step, inputs, chosen = prefill_step(shape, slots, device=device, dtype=dtype)
    got, allowed = prefill_error(shape, step, inputs, chosen)
    if not got <= allowed:
        raise ValueError(f"Sparse prefill of {slots} tokens is wrong by {got:.3g}, allowed are {allowed:.3g}; not timed.")
    far_ratio = float(chosen.float().mean()) if shape.units else None
    dense_flops, sparse_flops = prefill_flops(shape, slots, far_ratio or 0.0)
    row: dict[str, Any] = {
        "slots": slots,
        "far_ratio": far_ratio,
        "error": got,
        "error_allowed": allowed,
        "dense_flops": dense_flops,
        "sparse_flops": sparse_flops,
        "dense_seconds": {},
        "refused": {},
        "repeats": {},
    }
    if dense is None:
        _time_dense(row, dense_prefills(*inputs), device=device, repeats=repeats)
    else:
        row |= {key: dict(dense[key]) for key in ("dense_seconds", "refused", "repeats")}
    _time_sparse(row, [step], device=device, repeats=repeats)
    return row | _compared(row, min(row["dense_seconds"].values(), default=None))


def _time_dense(
    row: dict[str, Any], kernels: dict[str, Callable[[], Sequence[Callable[[], Any]]]], *, device: torch.device, repeats: int
) -> None:
    """Add "dense_seconds" and "repeats" of every kernel that takes the shape and has the memory, "refused" of the others.

    Args:
        kernels: by name a function that prepares the calls, so that only one kernel's copies of the inputs are held.
    """
    for name, prepare in kernels.items():
        try:
            row["dense_seconds"][name], row["repeats"][name] = median_seconds(prepare(), device=device, repeats=repeats)
        except (RuntimeError, ValueError, TypeError, AssertionError, ImportError) as problem:  # not this shape or GPU
            row["refused"][name] = f"{type(problem).__name__}: {problem}".splitlines()[0]


def _time_sparse(row: dict[str, Any], steps: Sequence[Callable[[], Any]], *, device: torch.device, repeats: int) -> None:
    """Add what the sparse step took: "peak_bytes", "kernel_seconds", "shares", "sparse_seconds" and its "repeats"."""
    row["sparse_seconds"], row["repeats"]["sparse"] = median_seconds(steps, device=device, repeats=repeats)
    row["peak_bytes"], row["kernel_seconds"] = observe(steps[0], device)
    row["shares"] = shares(row["kernel_seconds"])


def _compared(row: dict[str, Any], best: float | None) -> dict[str, float]:
    """The "speedup" over the `best` dense seconds, and what both achieve: TFLOP/s of a prefill, TB/s of a decode step."""
    work, rate = ("flops", "tflops") if "dense_flops" in row else ("bytes", "tb_per_second")
    found = {f"sparse_{rate}": row[f"sparse_{work}"] / row["sparse_seconds"] / 1e12}
    if best is not None:
        found |= {"speedup": best / row["sparse_seconds"], f"dense_{rate}": row[f"dense_{work}"] / best / 1e12}
    return found


def dense_prefills(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Sequence[Callable[[], Any]]]]:
    """Causal attention [B, Hq, T, D] x [B, Hkv, T, D] by every dense kernel that may be there, for `_time_dense`."""

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def flash_attn_4() -> Sequence[Callable[[], Any]]:
        from flash_attn.cute.interface import flash_attn_func

        rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        return [partial(flash_attn_func, *rows, causal=True)]

    if q.device.type != "cuda":
        return {"cpu": lambda: [partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)]}
    calls: dict[str, Callable[[], Sequence[Callable[[], Any]]]] = {
        name: lambda backend=backend: [partial(sdpa, backend)]  # type: ignore[misc]
        for name, backend in BACKENDS.items()
    }
    if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        calls["flash-attn-4"] = flash_attn_4
    return calls


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


def median_seconds(functions: Sequence[Callable[[], Any]], *, device: torch.device, repeats: int = 20) -> tuple[float, int]:
    """(median seconds of one call, timed runs), over rounds through `functions`: the same work on copies of its inputs.

    A call of more than LONG_SECONDS is timed once.
    """
    functions[0]()
    once = call_seconds(functions[0], device)
    if once > LONG_SECONDS:
        return once, 1
    if device.type != "cuda":
        return statistics.median(call_seconds(functions[i % len(functions)], device) for i in range(repeats)), repeats
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
    return statistics.median(call_seconds(graph.replay, device) for _ in range(repeats)) / len(functions), repeats


def call_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, on a GPU those between two events on its stream."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    marks[0].record()
    call()
    marks[1].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / 1000


@torch.no_grad()
def decode_row(
    shape: LayerShape, batch: int, slots: int, *, device: torch.device, dtype: torch.dtype, repeats: int = 20
) -> dict[str, Any]:
    """Measure one decode step of a layer.

    Returns:
        "batch", "slots", "far_ratio" really selected (None without retrieval heads), "error" and "error_allowed",
        "dense_seconds" by backend, "refused" backends with their reasons, "sparse_seconds", "repeats" (timed runs by
        backend), "dense_bytes" and "sparse_bytes" that must be read (`layer_work.decode_bytes`), "speedup" over the best
        dense one, "dense_tb_per_second" and "sparse_tb_per_second", "dense_cache_bytes" and "sparse_cache_bytes"; of the
        sparse step "peak_bytes" beyond its inputs, "kernel_seconds" by name and their "shares" (None on a CPU).

    Raises:
        ValueError: the sparse step is wrong on these inputs; nothing is timed then.
    """
    step, dense, keep, cache_bytes = sparse_step(shape, batch, slots, device=device, dtype=dtype)
    got, allowed = error(step, dense, keep)
    if not got <= allowed:
        raise ValueError(f"Sparse decode at {slots} tokens is wrong by {got:.3g}, allowed are {allowed:.3g}; not timed.")
    far = keep[:, list(shape.retrieval), shape.sink_tokens : max(shape.sink_tokens, slots - shape.window_tokens)]
    far_ratio = float(far.float().mean()) if far.numel() else None
    dense_bytes, sparse_bytes = decode_bytes(shape, batch, slots, far_ratio or 0.0, element_bytes=dtype.itemsize)
    row: dict[str, Any] = {
        "batch": batch,
        "slots": slots,
        "far_ratio": far_ratio,
        "error": got,
        "error_allowed": allowed,
        "dense_cache_bytes": 2 * dense[1].numel() * dense[1].element_size(),
        "sparse_cache_bytes": cache_bytes,
        "dense_bytes": dense_bytes,
        "sparse_bytes": sparse_bytes,
        "dense_seconds": {},
        "refused": {},
        "repeats": {},
    }
    del keep, far

    def copies(nbytes: int) -> int:
        return max(1, min(8, -(-COLD_BYTES // max(1, nbytes)))) if device.type == "cuda" else 1

    def calls(backend: SDPBackend) -> Sequence[Callable[[], Any]]:
        return [partial(_dense, backend, *its) for its in inputs]

    inputs = [dense] + [tuple(x.clone() for x in dense) for _ in range(copies(row["dense_cache_bytes"]) - 1)]
    _time_dense(row, {name: partial(calls, backend) for name, backend in BACKENDS.items()}, device=device, repeats=repeats)
    inputs.clear()
    del dense
    steps = [step]
    for seed in range(1, copies(cache_bytes)):
        steps.append(sparse_step(shape, batch, slots, device=device, dtype=dtype, seed=seed)[0])
    _time_sparse(row, steps, device=device, repeats=repeats)
    return row | _compared(row, min(row["dense_seconds"].values(), default=None))


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


def prefill_shapes(shape: LayerShape, far_ratio: float) -> dict[str, list[tuple[float, LayerShape]]]:
    """`mode_shapes` of a prefill whose tiles of positions read `far_ratio` of the far tokens, and "paper": the paper's own
    configuration, in which the shape's retrieval heads stay dense until decoding."""
    modes = {
        mode: [(weight, dataclasses.replace(layer, far_ratio=far_ratio)) for weight, layer in layers]
        for mode, layers in mode_shapes(shape).items()
    }
    return modes | {"paper": [(1.0, dataclasses.replace(shape, far_ratio=1.0, top_p=1.0, min_probability=0.0))]}


def bench_layer(
    shape: LayerShape,
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
    *,
    prefill_lengths: tuple[int, ...] = (),
    prefill_far_ratio: float = 0.07,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 20,
) -> dict[str, Any]:
    """Decode steps of an average layer, a row for every batch, length and mode; and prefills, for every length and mode.

    Args:
        prefill_far_ratio: share of far tokens that a tile of positions reads for its retrieval heads.

    Returns:
        "device", "dtype", "torch", "attention" and "prefill_windows" (which implementation computes, and why), "shape",
        and "rows" and "prefill_rows" with "parts", the layers they are made of (see `decode_row` and `prefill_row`): means
        of their times, bytes, FLOPs and kernel times, the largest of their "peak_bytes", the fewest "repeats", and speedup,
        rates and shares that follow; "refused" where memory does not suffice.

    Raises:
        ValueError: a length or batch below 1, or a sparse result that is wrong.
    """
    for name, values in (("lengths", lengths), ("batches", batches), ("prefill_lengths", prefill_lengths or (1,))):
        if min(values, default=0) < 1:
            raise ValueError(f"{name} must be 1 or more, got {', '.join(map(str, values)) or 'none'}.")
    if not 0.0 <= prefill_far_ratio <= 1.0:
        raise ValueError(f"prefill_far_ratio must be in [0, 1], got {prefill_far_ratio}.")

    def row_of(
        row: dict[str, Any], layers: list[tuple[float, LayerShape]], measure: Callable[[LayerShape], dict[str, Any]]
    ) -> dict[str, Any]:
        """A mode's row out of the layers it is made of."""
        try:
            return row | mixed([(weight, measure(layer)) for weight, layer in layers])
        except torch.OutOfMemoryError as problem:
            return {**row, "refused": str(problem).splitlines()[0]}

    measured: dict[int, dict[str, Any]] = {}

    def prefill(layer: LayerShape, slots: int) -> dict[str, Any]:
        row = prefill_row(layer, slots, device=device, dtype=dtype, repeats=min(repeats, 3), dense=measured.get(slots))
        measured.setdefault(slots, row)
        return row

    def decode(layer: LayerShape, batch: int, slots: int) -> dict[str, Any]:
        return decode_row(layer, batch, slots, device=device, dtype=dtype, repeats=repeats)

    rows = [
        row_of({"mode": mode, "batch": batch, "slots": slots}, layers, partial(decode, batch=batch, slots=slots))
        for batch in batches
        for slots in lengths
        for mode, layers in mode_shapes(shape).items()
    ]
    prefill_rows = [
        row_of({"mode": mode, "batch": 1, "slots": slots}, layers, partial(prefill, slots=slots))
        for slots in prefill_lengths
        for mode, layers in prefill_shapes(shape, prefill_far_ratio).items()
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    which, why = ops.backend(device.type, dtype, shape.head_dim)
    windows, why_windows = ops.window_backend(device.type, dtype, shape.head_dim)
    return {
        "device": name,
        "dtype": str(dtype),
        "torch": torch.__version__,
        "attention": f"{which} ({why})",
        "prefill_windows": f"{windows} ({why_windows})",
        "shape": dataclasses.asdict(shape),
        "rows": rows,
        "prefill_rows": prefill_rows,
        "pays_from": {"decode": pays_from(rows), "prefill": pays_from(prefill_rows)},
    }


def pays_from(rows: list[dict[str, Any]]) -> dict[str, int | None]:
    """Per mode (and batch, where above 1) the shortest measured length from which on sparse attention is at least as fast as
    dense; None where it is not even at the longest."""
    found: dict[str, int | None] = {}
    for row in sorted(rows, key=lambda row: row["slots"]):
        if "speedup" in row:
            name = row["mode"] + (f", batch {row['batch']}" if row["batch"] > 1 else "")
            before = found.get(name)
            found[name] = None if row["speedup"] < 1.0 else row["slots"] if before is None else before
    return found


def mixed(parts: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """The row of an average layer out of the measured layers it is made of, with their weights."""
    rows = [part for _, part in parts]
    means = ("sparse_seconds", "sparse_cache_bytes", "dense_cache_bytes", "dense_bytes", "sparse_bytes", "dense_flops")
    mixed: dict[str, Any] = {
        key: sum(weight * part[key] for weight, part in parts) for key in (*means, "sparse_flops") if key in rows[0]
    }
    mixed["repeats"] = {"sparse": min(part["repeats"]["sparse"] for part in rows)}
    dense = [(seconds, name, part) for part in rows for name, seconds in part["dense_seconds"].items()]
    if dense:
        mixed["dense_seconds"], mixed["dense_backend"], part = min(dense, key=lambda one: one[0])
        mixed["repeats"]["dense"] = part["repeats"][mixed["dense_backend"]]
    known = [part for part in rows if part["kernel_seconds"] is not None]
    mixed["peak_bytes"] = max((part["peak_bytes"] for part in known), default=None)
    mixed["kernel_seconds"] = {} if known else None
    for weight, part in parts:
        for name, seconds in (part["kernel_seconds"] or {}).items():
            mixed["kernel_seconds"][name] = mixed["kernel_seconds"].get(name, 0.0) + weight * seconds
    return {
        **mixed,
        **_compared(mixed, mixed.get("dense_seconds")),
        "shares": shares(mixed["kernel_seconds"]),
        "parts": rows,
    }
