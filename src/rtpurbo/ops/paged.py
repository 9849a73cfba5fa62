"""Attention over keys and values in pages, as serving engines keep them: sequences of any lengths, nothing padded.

Decode runs in the kernels of `decode_kernels` where `prefill.backend` says so, which read pages as they lie; elsewhere, and
in prefill, the tokens that a part sees are gathered from the pages and go through `decode_attention` and
`prefill_attention`, the same ops as in Transformers.

Shapes: R sequences, T tokens, H KV heads of a part, G query heads of each, D head dimension, U index units, d index
dimension, P pages. A sequence's table names its pages in the order of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .decode import decode_attention
from .prefill import backend, dense_attention, prefill_attention
from .reference import numbers


@dataclass(frozen=True)
class Pages:
    """The cache of one part of a layer: views of any strides whose last dimension is contiguous."""

    k: Tensor
    """[P, page, H, D]"""
    v: Tensor
    """[P, page, H, D], strides as k"""
    index_k: Tensor | None
    """[P, page, U, d], of k's dtype or float8; None without an index"""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some KV heads of a layer with the same fate: kept in full, or in sinks and window only."""

    full: bool
    head_units: tuple[int, ...]
    """Index unit of every query head of these KV heads, -1 for local ones."""
    windows: tuple[int, ...]
    """Window of every KV head in tokens."""
    sink_tokens: int
    scaling: float
    top_p: float = 1.0
    min_probability: float = 0.0
    tile_probability: float = 0.0
    dense_end_tokens: int = 0
    """Last tokens of every piece of a prompt, of two tokens or more, that attend densely to all that is still there."""


def write(pages: Pages, slots: Tensor, k: Tensor, v: Tensor, index_k: Tensor | None) -> None:
    """Store new tokens: k and v [T, H, D], index_k [T, U, d].

    Args:
        slots: [T] int64, page times tokens per page plus place in it; below 0 for what is no token: it is written to the
            first place of page 0, which no table may name for what is read.
    """
    slots = slots.clamp(min=0)
    size = pages.k.shape[1]
    place = (slots // size, slots % size)
    pages.k[place], pages.v[place] = k, v
    if pages.index_k is not None and index_k is not None:
        stored, index_k = pages.index_k, index_k.to(pages.index_k.dtype)
        if stored.dtype.itemsize == 1:  # few operations know float8
            stored, index_k = stored.view(torch.uint8), index_k.view(torch.uint8)
        stored[place] = index_k


def gather(store: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
    """Tokens [R, n] of sequences with `table` [R, pages], out of pages [P, page, H, D] -> [R, H, n, D]."""
    size = store.shape[1]
    place = (table.gather(1, tokens // size).long(), tokens % size)
    if store.dtype.itemsize == 1:
        return store.view(torch.uint8)[place].transpose(1, 2).view(store.dtype)
    return store[place].transpose(1, 2)


def decode(
    q: Tensor, index_q: Tensor | None, pages: Pages, table: Tensor, lengths: Tensor, longest: int, part: Part
) -> Tensor:
    """One new query of every sequence, whose own key and value are written already: [R, H, G, D] -> the same shape.

    Nothing is copied to the host on a GPU, and shapes follow from the arguments alone, so that a CUDA graph may hold it.

    Args:
        index_q: [R, U, d], or None where nothing is selected.
        table: [R, pages] int32.
        lengths: [R] int32 tokens of every sequence, the query's own counted.
        longest: no sequence has more tokens than this.
    """
    if q.device.type == "cuda" and backend("cuda", q.dtype, q.shape[-1])[0] == "triton":
        return decode_by_kernels(q, index_q, pages, table, lengths, longest, part)
    index_k = pages.index_k if index_q is not None else None
    sinks = torch.arange(part.sink_tokens, device=q.device)
    pad = longest - lengths.long()[:, None]  # sequences end together
    real = torch.arange(longest, device=q.device) >= pad
    tokens = (torch.arange(longest, device=q.device) - pad).clamp(min=0)
    old = sinks.expand(len(q), -1)
    sink_slots = torch.where(old < lengths[:, None], old + pad, -1)
    empty = pages.k.new_empty(len(q), 0, longest, q.shape[-1])
    if part.full:
        k, v = (gather(x, table, tokens) for x in (pages.k, pages.v))
        keys = None if index_k is None else gather(index_k, table, tokens)
        kept: Any = (k, v, empty, empty, empty, empty, index_q, keys)
    else:
        near = tokens[:, max(0, longest - max(part.windows)) :]
        first = torch.where(old < lengths[:, None], old, 0)
        kept = (empty, empty, *(gather(x, table, where) for where in (near, first) for x in (pages.k, pages.v)), None, None)
    return decode_attention(q, *kept, sinks=sink_slots, real=real, **_rule(part, longest))


def decode_by_kernels(
    q: Tensor, index_q: Tensor | None, pages: Pages, table: Tensor, lengths: Tensor, longest: int, part: Part
) -> Tensor:
    """`decode` in Triton kernels; the pages are read as they lie, and of local parts only those of sinks and window."""
    from . import decode_kernels

    here, none = (pages.k, pages.v), (pages.k[:, :, :0], pages.v[:, :, :0])
    full, local = (here, none) if part.full else (none, here)
    index_k = pages.index_k if index_q is not None else None
    return decode_kernels.decode_attention(
        q, *full, *local, q[:, :0], q[:, :0], index_q, index_k, sinks=_sinks(part.sink_tokens, q.device), lengths=lengths,
        block_tables=(table, table), index_table=None if index_k is None else table, **_rule(part, longest),
    )  # fmt: skip


def _rule(part: Part, longest: int) -> dict[str, Any]:
    """What the ops of decode are told of a part."""
    return {
        "kv_rows": tuple(range(len(part.windows))),
        "head_units": part.head_units,
        "window_tokens": part.windows,
        "slots": longest,
        "top_p": part.top_p,
        "min_probability": part.min_probability,
        "scaling": part.scaling,
    }


def _sinks(count: int, device: torch.device) -> Tensor:
    """Slots [1, count] of the sinks, a tensor that stays on the device."""
    return numbers(tuple(range(count)), device)[None]


def prefill(q: Tensor, index_q: Tensor | None, pages: Pages, table: Tensor, length: int, part: Part) -> Tensor:
    """The newest tokens of one sequence, whose keys and values are written already: [T, H*G, D] -> the same shape.

    Args:
        index_q: [T, U, d], or None where nothing is selected.
        table: [pages] int32.
        length: tokens of the sequence, the T new ones counted.
    """
    sinks = torch.arange(part.sink_tokens, device=q.device)[None]
    first = 0 if part.full else max(0, length - len(q) - max(part.windows) + 1)
    tokens = torch.arange(first, length, device=q.device)[None]
    k, v = (gather(x, table[None], tokens) for x in (pages.k, pages.v))
    none = k[:, :0]
    if part.full:
        keys = gather(pages.index_k, table[None], tokens) if index_q is not None and pages.index_k is not None else None
        if index_q is not None and keys is not None:
            index_q, keys = index_q.transpose(0, 1)[None], keys.to(index_q.dtype)
        kept: Any = (k, v, none, none, none, none, index_q, keys)
    else:
        old = sinks.clamp(max=length - 1)  # the mask leaves out those that repeat
        kept = (none, none, k, v, *(gather(x, table[None], old) for x in (pages.k, pages.v)), None, None)
    rows = q.transpose(0, 1)[None]
    out = prefill_attention(
        rows,
        *kept,
        kv_rows=tuple(range(k.shape[1])),
        head_units=part.head_units,
        first_slot=first,
        sinks=torch.where(sinks < length, sinks, -1),
        window_tokens=part.windows,
        top_p=part.top_p,
        min_probability=part.min_probability,
        tile_probability=part.tile_probability,
        scaling=part.scaling,
    )
    if part.dense_end_tokens:
        last, real = rows[:, :, -part.dense_end_tokens :], None
        if not part.full:
            every = torch.arange(length, device=q.device)[None]
            real = table[every // pages.k.shape[1]] != 0  # page 0 stands for what the cache of an earlier prompt lacks
            k, v = (gather(x, table[None], every).masked_fill_(~real[:, None, :, None], 0) for x in (pages.k, pages.v))
        out[:, :, -last.shape[2] :] = dense_attention(last, k, v, scaling=part.scaling, real=real)
    return out[0].transpose(0, 1)
