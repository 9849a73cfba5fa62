"""Attention of one new query per sequence: score the index, gather what was selected, read nothing else.

Triton kernels (`decode_kernels.py`) where `prefill.backend` says so; else plain PyTorch.

Shapes: B batch, Hkv KV heads, of which F are full (all slots kept), G query heads of each, N key slots, D head dimension,
U index units, S query heads per unit, d index dimension.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .prefill import backend
from .reference import gather_slots, keep_mask, near_slots, visible_slots, windows_by_head


def decode_attention(
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
    slots: int,
    sinks: Tensor,
    window_tokens: int | tuple[int, ...],
    top_p: float,
    scaling: float,
    real: Tensor | None = None,
    min_probability: float = 0.0,
) -> Tensor:
    """Decode step of a layer, every head by its role (paper, sections 3.1 and 3.2).

    Args:
        q: [B, Hkv, G, D], the query heads of every KV head.
        full_k, full_v: [B, F, N, D], full KV heads.
        local_k, local_v: [B, Hkv - F, L, D], the last L slots of the others.
        sink_k, sink_v: [B, Hkv - F, s, D], the others at slots `sinks` [B or 1, s] (-1: none).
        index_q, index_k: [B, U, d] and [B, U, N, d], keys in float8 (e4m3) too; None: retrieval heads are dense.
        kv_rows: KV head of every row of full_k, then of local_k.
        head_units: index unit of every query head, -1 for local ones; without an index any number stands for retrieval.
        slots: N.
        window_tokens: one number, or one for every KV head; full ones have the longest.
        real: [B, N] bool, False for padding; None when nothing is padded.

    Returns:
        [B, Hkv, G, D]
    """
    if q.device.type == "cuda" and backend("cuda", q.dtype, q.shape[-1])[0] == "triton":
        from . import decode_kernels

        return decode_kernels.decode_attention(
            q, full_k, full_v, local_k, local_v, sink_k, sink_v, index_q, index_k, kv_rows=kv_rows, head_units=head_units,
            slots=slots, sinks=sinks, window_tokens=window_tokens, top_p=top_p, scaling=scaling, real=real,
            min_probability=min_probability,
        )  # fmt: skip
    out = torch.empty_like(q)
    group, full_rows = q.shape[2], full_k.shape[1]
    windows, local = windows_by_head(window_tokens, len(kv_rows)), kv_rows[full_rows:]
    window_tokens = max(windows)
    window = partial(decode_window, sinks=sinks, scaling=scaling, real=real)
    for tokens in sorted({windows[head] for head in local}):
        rows = [row for row, head in enumerate(local) if windows[head] == tokens]
        first, heads = max(0, slots - tokens), [local[row] for row in rows]
        near = [x[:, :, first - slots + x.shape[2] :] for x in (local_k, local_v)]
        if len(rows) < len(local):
            near, old = ([x[:, rows] for x in pair] for pair in (near, (sink_k, sink_v)))
        else:  # nothing is copied
            old = [sink_k, sink_v]
        out[:, heads] = window(q[:, heads], *near, *old, first_slot=first)
    first = max(0, slots - window_tokens)
    members: dict[int, list[tuple[int, int]]] = {}  # unit -> its query heads as (row, place in the group)
    for row, head in enumerate(kv_rows[:full_rows]):
        mine = head_units[head * group : (head + 1) * group]
        for place, unit in enumerate(mine):
            if unit >= 0:
                members.setdefault(unit, []).append((row, place))
        if -1 in mine:
            places = [place for place, unit in enumerate(mine) if unit == -1]
            k, v = (x[:, row : row + 1] for x in (full_k, full_v))
            recent, old = [x[:, :, first:] for x in (k, v)], [gather_slots(x, sinks) for x in (k, v)]
            out[:, head, places] = window(q[:, head, places][:, None], *recent, *old, first_slot=first)[:, 0]
    if members:
        units = [members[u] for u in sorted(members)]
        rows_of = [[kv_rows[row] for row, _ in unit] for unit in units]
        where = (slice(None), torch.tensor(rows_of), torch.tensor([[place for _, place in unit] for unit in units]))
        out[where] = decode_retrieval(
            q[where],
            full_k,
            full_v,
            None if index_q is None else index_q[:, :, None],
            index_k,
            kv_heads=[u[0][0] for u in units],
            sinks=sinks,
            window_tokens=window_tokens,
            top_p=top_p,
            scaling=scaling,
            real=real,
            min_probability=min_probability,
        )
    return out


def decode_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    *,
    first_slot: int,
    sinks: Tensor,
    scaling: float,
    real: Tensor | None = None,
) -> Tensor:
    """A local head's decode step: one softmax over sinks and window, neither of them copied.

    Args:
        q: [B, Hkv, G, D], the G query heads of every KV head.
        k, v: [B, Hkv, L, D], exactly the window, `first_slot` its first slot and the query's own its last.
        sink_k, sink_v: [B, Hkv, sink_tokens, D], at slots `sinks` [B or 1, s] (-1: none).
        real: [B, first_slot + L] bool, False for padding; None when nothing is padded.

    Returns:
        [B, Hkv, G, D]
    """
    near = (q @ k.transpose(-1, -2)).float() * scaling
    if real is not None:
        hidden = ~real[:, None, None, first_slot:]
        hidden[..., -1] = False  # padding sees itself, so that no row is empty
        near = near.masked_fill(hidden, -torch.inf)
    old = (q @ sink_k.transpose(-1, -2)).float() * scaling
    old = old.masked_fill(~((sinks >= 0) & (sinks < first_slot))[:, None, None], -torch.inf)
    weights = torch.cat([old, near], -1).softmax(-1).to(v.dtype)
    split = sinks.shape[1]
    return weights[..., :split] @ sink_v + weights[..., split:] @ v


def decode_retrieval(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor | None,
    index_k: Tensor | None,
    *,
    kv_heads: list[int],
    sinks: Tensor,
    window_tokens: int,
    top_p: float,
    scaling: float,
    real: Tensor | None = None,
    min_probability: float = 0.0,
) -> Tensor:
    """A retrieval unit's decode step: score all index keys, keep top-p with window and sinks, attend to those only.

    Args:
        q: [B, U, S, D]; k, v: [B, Hkv, N, D]; kv_heads: row of k and v that each unit reads.
        index_q: [B, U, 1, d]; index_k: [B, U, N, d]; None for dense retrieval heads.

    Returns:
        [B, U, S, D]
    """
    slots = k.shape[2]
    k_slots = torch.arange(slots, device=q.device)
    visible = visible_slots(k_slots[-1:], k_slots, real)
    near = near_slots(k_slots[-1:], k_slots, sinks, window_tokens)
    keep = keep_mask(index_q, index_k, visible=visible, near=near, top_p=top_p, min_probability=min_probability)
    keep = keep[:, :, 0]
    keep = keep.expand(q.shape[0], q.shape[1], -1)  # [B, U, N]
    place = keep.cumsum(-1) - 1
    most = int(place[..., -1].max()) + 1
    row, unit, slot = keep.nonzero(as_tuple=True)
    chosen = torch.zeros(*keep.shape[:2], most, dtype=torch.long, device=q.device)
    chosen[row, unit, place[row, unit, slot]] = slot
    empty = torch.arange(most, device=q.device) > place[..., -1:]  # shorter selections are padded
    rows = torch.arange(q.shape[0], device=q.device)[:, None, None]
    heads = torch.tensor(kv_heads, device=q.device)[None, :, None]
    logits = (q @ k[rows, heads, chosen].transpose(-1, -2)).float() * scaling
    weights = logits.masked_fill(empty[:, :, None], -torch.inf).softmax(-1).to(v.dtype)
    return weights @ v[rows, heads, chosen]
