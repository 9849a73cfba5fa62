"""Attention of one new query per sequence, in plain PyTorch: gather what was selected, read nothing else.

Shapes: B batch, H query heads, Hkv KV heads, N key slots, D head dimension, U index units, S query heads per unit,
d index dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import keep_mask, near_slots, visible_slots


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
        sink_k, sink_v: [B, Hkv, sink_tokens, D] at slots `sinks` [B or 1, sink_tokens] (-1 for none).
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
    keep = keep_mask(index_q, index_k, visible=visible, near=near, top_p=top_p)[:, :, 0]
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
