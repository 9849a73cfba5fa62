"""Attention of many queries at once, with gradients and without an N x N tensor.

Triton kernels (`kernels.py`) where `backend` says so, flash-attn-4 (`flash4.py`) for the windows of local heads where
`window_backend` says so; else plain PyTorch in pieces of bounded size.

Shapes: B batch, H query heads (keys and values already one per query head), T queries, N or L key slots,
D head dimension, U index units, S query heads per unit, d index dimension. q's slots are the last T.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from .reference import (
    gather_slots,
    keep_mask,
    near_slots,
    needs_gradient,
    pick_heads,
    read_by_tile,
    tile_positions,
    visible_scores,
    visible_slots,
    windows_by_head,
)
from .select import leaves_out, top_p_threshold


@cache
def backend(device_type: str, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """What computes prefill and training attention for such queries: ("triton" or "torch", why)."""
    if device_type != "cuda":
        return "torch", f"the device is {device_type}, the kernels need an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "torch", "the package triton is not installed"
    if torch.cuda.get_device_capability() < (8, 0):
        return "torch", "the GPU is older than Ampere"
    from . import kernels

    if dtype not in kernels.DTYPES:
        return "torch", f"the dtype is {dtype}, the kernels take bfloat16 and float16"
    if head_dim not in kernels.HEAD_DIMS:
        return "torch", f"the head dimension is {head_dim}, the kernels take {', '.join(map(str, kernels.HEAD_DIMS))}"
    return "triton", "kernels for this GPU, dtype and head dimension"


def window_backend(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    queries: int | None = None,
    padded: bool = False,
    gradients: bool = False,
) -> tuple[str, str]:
    """What computes the windows of local heads in prefill: ("flash-attn-4", "triton" or "torch", why).

    Args:
        queries: per sequence; None: a long prompt.
    """
    which, why = backend(device_type, dtype, head_dim)
    if which != "triton":
        return which, why
    from . import flash4

    if gradients:
        problem = "its log-sum-exps are merged without gradients"
    elif padded:
        problem = "the batch is padded"
    elif queries is not None and queries < flash4.LEAST_QUERIES:
        problem = f"{queries} queries are fewer than {flash4.LEAST_QUERIES}"
    else:
        problem = flash4.problem(head_dim)
    if problem:
        return "triton", f"{why}; not flash-attn-4: {problem}"
    return "flash-attn-4", f"installed, takes this GPU and head dimension; from {flash4.LEAST_QUERIES} queries on"


def _kernels(q: Tensor):
    """The module of kernels when they take `q`, else None."""
    if q.device.type != "cuda" or backend("cuda", q.dtype, q.shape[-1])[0] != "triton":
        return None
    from . import kernels

    return kernels


MASK_ELEMENTS = 2**26
"""Of a piece of `dense_attention`, at most."""


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scaling: float, real: Tensor | None = None) -> Tensor:
    """Dense causal attention of the last queries; a group's heads share keys and values.

    In PyTorch's flash kernel where nothing is padded and it takes the tensors (on a GPU, in half precision), which needs
    no mask; else with a mask, in pieces, and under autograd by plain products: on a GPU SDPA's gradient with such a mask
    was not always finite.

    Args:
        q: [B, Hq, T, D] queries of the last T slots.
        k, v: [B, Hkv, N, D] of all slots.
        real: [B, N] bool, False for padding; None when nothing is padded.

    Returns:
        [B, Hq, T, D]
    """
    group = q.shape[1] // k.shape[1]
    if real is None and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, group > 1)):
        last = causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, last, scale=scaling, enable_gqa=group > 1)
    slots = torch.arange(k.shape[2], device=q.device)
    size, stop, parts = max(1, MASK_ELEMENTS // (len(q) * group * len(slots))), len(slots) - q.shape[2], []
    attend = partial(_products if needs_gradient(q, k, v) else F.scaled_dot_product_attention, scale=scaling)
    for part in q.split(size, 2):
        start, stop = stop, stop + part.shape[2]  # no query of this piece sees further
        seen = None if real is None else real[:, :stop]
        mask = visible_slots(slots[start:stop], slots[:stop], seen).repeat(1, 1, group, 1)
        rows = part.unflatten(1, (-1, group)).flatten(2, 3)
        out = _piece(attend, rows, k[:, :, :stop], v[:, :, :stop], mask)
        parts.append(out.unflatten(2, (group, -1)).flatten(1, 2))
    return torch.cat(parts, 2)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    """Attention of q [B, H, T, D] to k, v [B, H, N, D] under a mask [B or 1, 1, T, N], by two products and a softmax."""
    scores = (q @ k.mT).float() * scale
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


def workspace_elements(device: torch.device) -> int:
    """Mask and score elements that one piece of work may hold: on a GPU about a hundredth of its memory in scores."""
    return torch.cuda.get_device_properties(device).total_memory >> 9 if device.type == "cuda" else 1 << 22


def _piece(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Run one piece; under autograd keep its inputs only and compute it again in the backward pass."""
    if needs_gradient(*args):
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def prefill_attention(
    q: Tensor,
    full_k: Tensor,
    full_v: Tensor,
    local_k: Tensor,
    local_v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    index_q: Tensor | None,
    index_k: Tensor | None,
    *,
    kv_rows: tuple[int, ...],
    head_units: tuple[int, ...],
    first_slot: int,
    sinks: Tensor,
    window_tokens: int | tuple[int, ...],
    top_p: float,
    scaling: float,
    real: Tensor | None = None,
    min_probability: float = 0.0,
    tile_probability: float = 0.0,
    window_kernel: str | None = None,
) -> Tensor:
    """Attention of a layer for many queries, every head by its role (paper, sections 3.1 and 3.2).

    Args:
        q: [B, Hq, T, D].
        full_k, full_v: [B, F, N, D], full KV heads.
        local_k, local_v: [B, Hkv - F, L, D], the others at slots `first_slot` to N.
        sink_k, sink_v: [B, Hkv - F, s, D], the others at slots `sinks` [B or 1, s] (-1: none).
        index_q, index_k: [B, U, T, d] and [B, U, N, d]; None: retrieval heads are dense.
        kv_rows: KV head of every row of full_k, then of local_k.
        head_units: index unit of every query head, -1 for local ones.
        window_tokens: one number, or one for every KV head; full ones have the longest.
        real: [B, N] bool, False for padding; None when nothing is padded.
        tile_probability: above 0, tiles of positions read together (`reference.read_by_tile`) what the index gives one of
            them this much, in place of min_probability; not where anything is trained.
        window_kernel: "flash-attn-4" or "triton", for comparisons where nothing is padded or trained; None: `window_backend`
            says.

    Returns:
        [B, Hq, T, D]
    """
    full, group = full_k.shape[1], q.shape[1] // len(kv_rows)
    row = [kv_rows.index(head // group) for head in range(len(head_units))]
    retrieval = [head for head, unit in enumerate(head_units) if unit >= 0]
    windows = windows_by_head(window_tokens, len(kv_rows))
    window_tokens = max(windows)

    def window_of(head: int) -> int:
        return windows[head // group]

    on_local = sorted((head for head in range(len(row)) if row[head] >= full), key=window_of)
    on_full = [head for head, unit in enumerate(head_units) if unit < 0 and row[head] < full]
    units = max(head_units) + 1
    trained = needs_gradient(q, full_k, full_v, local_k, local_v, sink_k, sink_v)  # a layer's values may be, its queries not
    kernels = None if trained else _kernels(q)
    if window_kernel is None and kernels is not None:
        device, queries, dim = q.device.type, q.shape[2], q.shape[3]
        window_kernel, _ = window_backend(device, q.dtype, dim, queries=queries, padded=real is not None)
    out = None if kernels is None else torch.empty_like(q, memory_format=torch.contiguous_format)

    def attend(function: Callable, heads: list[int], rows: list[int], kv: tuple[Tensor, ...], *more: Tensor | None, **rest):
        """The attention of some heads: written to `out` by a kernel, else returned."""
        if kernels is not None:
            assert out is not None
            place = kernels.Place(tuple(heads), tuple(rows), out, group)
            module = kernels
            if function is window_attention and window_kernel == "flash-attn-4" and real is None:
                from . import flash4

                module = flash4 if flash4.fits(place) else kernels
            return getattr(module, function.__name__)(q, *kv, *more, **(shared | rest), place=place)
        picked = (pick_heads(x, rows) for x in kv)
        return function(pick_heads(q, heads), *picked, *more, **(shared | rest))

    shared: dict[str, Any] = {"sinks": sinks, "window_tokens": window_tokens, "scaling": scaling, "real": real}
    parts = []
    if retrieval:
        rule = {"top_p": top_p, "min_probability": min_probability, "heads_per_unit": len(retrieval) // units}
        rule["tile_probability"] = 0.0 if trained else tile_probability
        rows = [row[head] for head in retrieval]
        parts.append(attend(retrieval_attention, retrieval, rows, (full_k, full_v), index_q, index_k, **rule))
    for window, same in groupby(on_local, window_of):
        heads = list(same)
        rows = [row[head] - full for head in heads]
        skip = max(0, local_k.shape[2] - q.shape[2] - window + 1)  # slots that these heads see no more
        near = (local_k[:, :, skip:], local_v[:, :, skip:], sink_k, sink_v)
        parts.append(attend(window_attention, heads, rows, near, first_slot=first_slot + skip, window_tokens=window))
    if on_full:
        rows = [row[head] for head in on_full]
        first = max(0, full_k.shape[2] - q.shape[2] - window_tokens)
        near = (full_k[:, :, first:], full_v[:, :, first:], gather_slots(full_k, sinks), gather_slots(full_v, sinks))
        parts.append(attend(window_attention, on_full, rows, near, first_slot=first))
    if out is not None:
        return out
    order = [*retrieval, *on_local, *on_full]
    return pick_heads(torch.cat(parts, 1).to(q.dtype), [order.index(head) for head in range(len(order))])


def retrieval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor | None,
    index_k: Tensor | None,
    *,
    heads_per_unit: int,
    sinks: Tensor,
    window_tokens: int,
    top_p: float,
    scaling: float,
    real: Tensor | None = None,
    min_probability: float = 0.0,
    tile_probability: float = 0.0,
) -> Tensor:
    """Attention of retrieval heads: selected tokens, window and sinks (paper, section 3.2).

    Args:
        q: [B, U*S, T, D]; k, v: [B, U*S, N, D], the same for all heads of a unit.
        index_q: [B, U, T, d]; index_k: [B, U, N, d]; None for dense retrieval heads.
        sinks: [B or 1, sink_tokens] slots, -1 for none.
        real: [B, N] bool, False for padding; None when nothing is padded.
        tile_probability: see `prefill_attention`; 0, or with gradients: every position attends to what it selects itself.

    Returns:
        [B, U*S, T, D]
    """
    batch, heads, queries, _ = q.shape
    slots = k.shape[2]
    tile_probability = 0.0 if needs_gradient(q, k, v) else tile_probability
    index = (index_q, index_k) if index_q is not None and index_k is not None else None
    if not leaves_out(top_p, min_probability):
        index = None
    if index is None and real is None and queries == slots:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    if kernels := _kernels(q):
        return kernels.retrieval_attention(
            q, k, v, index_q, index_k, heads_per_unit=heads_per_unit, sinks=sinks, window_tokens=window_tokens,
            top_p=top_p, scaling=scaling, real=real, min_probability=min_probability, tile_probability=tile_probability,
        )  # fmt: skip
    size = tile_positions(heads_per_unit, q.shape[3]) if tile_probability else 1
    min_probability = tile_probability or min_probability
    k_slots = torch.arange(slots, device=q.device)
    rows = max(1, workspace_elements(q.device) // (batch * heads * slots) // size) * size
    out = []
    cut = (slots - queries) % size  # pieces end where tiles do
    for start in range(-cut, queries, rows):
        start, stop = max(0, start), min(start + rows, queries)
        end = slots - queries + stop  # no query of this piece sees further
        q_slots = k_slots[slots - queries + start : end]
        seen_real = None if real is None else real[:, :end]
        tiles = None
        if tile_probability:
            tiles = partial(
                read_by_tile, q_slots=q_slots, k_slots=k_slots[:end], window_tokens=window_tokens, positions=size
            )
        seen_index: tuple[Tensor | None, Tensor | None] = (None, None)
        threshold = None
        if index is not None:
            seen_index = seen_q, seen_k = index[0][:, :, start:stop], index[1][:, :, :end]
            if torch.is_grad_enabled():  # found once; the backward pass only compares again
                scores = visible_scores(seen_q, seen_k, visible_slots(q_slots, k_slots[:end], seen_real))
                threshold = top_p_threshold(scores, top_p, min_probability)
                del scores

        def attend(
            q_piece: Tensor, k_seen: Tensor, v_seen: Tensor, end=end, q_slots=q_slots, seen_real=seen_real, index=seen_index,
            threshold=threshold, tiles=tiles,
        ) -> Tensor:  # fmt: skip
            keep = keep_mask(
                *index,
                visible=visible_slots(q_slots, k_slots[:end], seen_real),
                near=near_slots(q_slots, k_slots[:end], sinks, window_tokens),
                top_p=top_p,
                min_probability=min_probability,
                threshold=threshold,
                tiles=tiles,
            )
            if keep.shape[1] > 1 and heads_per_unit > 1:
                keep = keep.repeat_interleave(heads_per_unit, 1)
            return F.scaled_dot_product_attention(q_piece, k_seen, v_seen, attn_mask=keep, scale=scaling)

        out.append(_piece(attend, q[:, :, start:stop], k[:, :, :end], v[:, :, :end]))
    return torch.cat(out, 2)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    *,
    first_slot: int,
    sinks: Tensor,
    window_tokens: int,
    scaling: float,
    real: Tensor | None = None,
) -> Tensor:
    """Attention of local heads: window and sinks, as a batch of overlapping bands.

    Args:
        q: [B, H, T, D]; k, v: [B, H, L, D], the slots `first_slot` to `first_slot + L`, the last T being q's own.
            Everything in a query's window must be among them.
        sink_k, sink_v: [B, H, sink_tokens, D], keys and values of `sinks` [B or 1, sink_tokens] (-1 for none).
        real: [B, first_slot + L] bool, False for padding; None when nothing is padded.

    Returns:
        [B, H, T, D]
    """
    if kernels := _kernels(q):
        return kernels.window_attention(
            q, k, v, sink_k, sink_v, first_slot=first_slot, sinks=sinks, window_tokens=window_tokens, scaling=scaling,
            real=real,
        )  # fmt: skip
    batch, heads, queries, _ = q.shape
    last = first_slot + k.shape[2]
    rows = min(queries, max(64, window_tokens // 2))  # queries per band
    width = window_tokens - 1 + rows  # slots per band
    bands = -(-queries // rows)
    # keys padded so that band i holds exactly the slots [begin + i * rows, begin + i * rows + width)
    begin = last - queries - (window_tokens - 1)
    pad = (0, 0, first_slot - begin, begin + (bands - 1) * rows + width - last)
    k, v = F.pad(k, pad), F.pad(v, pad)
    q = F.pad(q, (0, 0, 0, bands * rows - queries))
    per_band = batch * heads * rows * (width + sinks.shape[1])
    group = max(1, workspace_elements(q.device) // per_band)
    out = []
    for first in range(0, bands, group):
        count = min(group, bands - first)
        here = slice(first * rows, (first + count - 1) * rows + width)

        def attend(q_piece: Tensor, k_piece: Tensor, v_piece: Tensor, sk: Tensor, sv: Tensor, first=first, count=count):
            mask = _band_mask(begin + first * rows, count, rows, width, last, sinks, window_tokens, real)
            bands_q = q_piece.unflatten(2, (count, rows)).transpose(1, 2).flatten(0, 1)
            bands_k, bands_v = (
                torch.cat(
                    [
                        s[:, None].expand(-1, count, -1, -1, -1),
                        x.unfold(2, width, rows).permute(0, 2, 1, 4, 3),
                    ],
                    3,
                ).flatten(0, 1)
                for s, x in ((sk, k_piece), (sv, v_piece))
            )
            mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
            result = F.scaled_dot_product_attention(bands_q, bands_k, bands_v, attn_mask=mask, scale=scaling)
            return result.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)

        q_piece = q[:, :, first * rows : (first + count) * rows]
        out.append(_piece(attend, q_piece, k[:, :, here], v[:, :, here], sink_k, sink_v))
    return torch.cat(out, 2)[:, :, :queries]


def _band_mask(
    begin: int, count: int, rows: int, width: int, last: int, sinks: Tensor, window_tokens: int, real: Tensor | None
) -> Tensor:
    """[B or 1, count, rows, sink_tokens + width] bool: who sees what inside each band, `begin` its first key slot."""
    device = sinks.device
    band = begin + rows * torch.arange(count, device=device)[:, None]
    k_slots = band + torch.arange(width, device=device)  # [count, width]
    q_slots = (band + window_tokens - 1 + torch.arange(rows, device=device))[:, :, None]  # [count, rows, 1]
    age = q_slots - k_slots[:, None]
    window = ((age >= 0) & (age < window_tokens) & (k_slots[:, None] >= 0))[None]
    if real is not None:
        inside = (k_slots >= 0) & (k_slots < last)
        real_here = real[:, k_slots.clamp(0, last - 1)] & inside  # [B, count, width]
        window = window & (real_here[:, :, None] | (age == 0))
    old = (sinks >= 0)[:, None, None] & (q_slots[None] - sinks[:, None, None] >= window_tokens)
    parts = [old, window]
    rows_in_batch = max(p.shape[0] for p in parts)
    return torch.cat([p.expand(rows_in_batch, -1, -1, -1) for p in parts], -1)
