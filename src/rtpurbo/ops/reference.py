"""What sparse attention means, written with full N x N masks: the readable truth that every other op is tested against.

Shapes: B batch, Hq query heads, Hkv KV heads, T queries (the last T of N slots), N key slots, D head dimension,
U index units, S query heads per unit, d index dimension. A *slot* is a place in the cache, padding included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from .select import index_scores, leaves_out, top_p_threshold


def sink_slots(real: Tensor | None, sink_tokens: int, *, device: torch.device | None = None) -> Tensor:
    """Slots of the first `sink_tokens` real tokens of every row, -1 where a row has fewer: [B or 1, sink_tokens].

    Args:
        real: [B, N] bool, False for padding; None when nothing is padded.
    """
    if real is None:
        return torch.arange(sink_tokens, device=device)[None]
    order = torch.arange(real.shape[1], device=real.device).expand_as(real)
    first = torch.where(real, order, real.shape[1]).sort(-1).values[:, :sink_tokens]
    first = torch.nn.functional.pad(first, (0, sink_tokens - first.shape[1]), value=real.shape[1])
    return torch.where(first < real.shape[1], first, -1)


def gather_slots(tokens: Tensor, slots: Tensor) -> Tensor:
    """tokens [B, H, N, D] at slots [B or 1, S] (clamped to 0 where -1) -> [B, H, S, D]."""
    index = slots.clamp(min=0)[:, None, :, None].expand(tokens.shape[0], tokens.shape[1], -1, tokens.shape[3])
    return tokens.gather(2, index)


def visible_slots(q_slots: Tensor, k_slots: Tensor, real: Tensor | None) -> Tensor:
    """[B or 1, 1, T, N] bool: causal and not padding; every query sees itself, so that no row is empty."""
    seen = k_slots <= q_slots[:, None]
    if real is None:
        return seen[None, None]
    return (seen & (real[:, None] | (k_slots == q_slots[:, None])))[:, None]


def near_slots(q_slots: Tensor, k_slots: Tensor, sinks: Tensor, window_tokens: int) -> Tensor:
    """[B or 1, 1, T, N] bool: inside the query's window, or a sink."""
    window = q_slots[:, None] - k_slots < window_tokens
    is_sink = (sinks[:, :, None] == k_slots).any(1)  # [B or 1, N]
    return (window[None] | is_sink[:, None])[:, None]


def windows_by_head(window_tokens: int | tuple[int, ...], kv_heads: int) -> tuple[int, ...]:
    """Window of every KV head in tokens, out of one number or one per KV head."""
    return (window_tokens,) * kv_heads if isinstance(window_tokens, int) else window_tokens


def far_slots(q_slots: Tensor, slots: int, window_tokens: int, sink_tokens: int) -> Tensor:
    """[T, N] bool, in an unpadded sequence: visible, and neither in the query's window nor a sink."""
    k_slots = torch.arange(slots, device=q_slots.device)
    return (q_slots[:, None] - k_slots >= window_tokens) & (k_slots >= sink_tokens)


KEY_TILE = 64
"""Tokens of one tile product in the prefill of retrieval heads."""
ROWS = 128
"""Queries of one such product, positions times heads, unless 16 positions make more; half of it for heads beyond 128."""


def tile_positions(heads_per_unit: int, head_dim: int = 128) -> int:
    """Positions that read their tokens together in prefill; 16 are the least that a tile product of index scores takes."""
    rows = ROWS if head_dim <= 128 else ROWS // 2
    return max(16, rows // (1 << (heads_per_unit - 1).bit_length()))


def tile_window(q_slots: Tensor, window_tokens: int, positions: int) -> Tensor:
    """[T] first slot of what a tile reads whole: the key tile in which the window of its first position begins."""
    begin = q_slots // positions * positions
    return (begin - window_tokens + 1).clamp(min=0) // KEY_TILE * KEY_TILE


def read_by_tile(chosen: Tensor, q_slots: Tensor, k_slots: Tensor, window_tokens: int, positions: int) -> Tensor:
    """[B, U, T, N] bool: what the positions of a tile choose together, and all from its window on (whole key tiles).

    Args:
        chosen: [B, U, T, N] bool, what each position chooses.
        positions: of a tile; tiles lie at absolute slots. A tile that is cut chooses by the positions that are there.
    """
    tile = q_slots // positions - q_slots[0] // positions
    together = chosen.new_zeros(*chosen.shape[:2], int(tile[-1]) + 1, chosen.shape[3], dtype=torch.int32)
    together = together.index_add(2, tile, chosen.int()) > 0
    return together.index_select(2, tile) | (k_slots >= tile_window(q_slots, window_tokens, positions)[:, None])


@torch.no_grad()
def visible_scores(index_q: Tensor, index_k: Tensor, visible: Tensor) -> Tensor:
    """Index scores of every query for the tokens it sees, -inf for others: [B, U, T, N] float32."""
    return index_scores(index_q, index_k).masked_fill(~visible, -torch.inf)


def keep_mask(
    index_q: Tensor | None,
    index_k: Tensor | None,
    *,
    visible: Tensor,
    near: Tensor,
    top_p: float,
    min_probability: float = 0.0,
    threshold: Tensor | None = None,
    tiles: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What retrieval queries attend to: visible tokens that are near or selected.

    Args:
        index_q, index_k: [B, U, T, d] and [B, U, N, d]; None selects everything (a head map without an indexer).
        visible, near: [B or 1, 1, T, N] bool.
        threshold: [B, U, T, 1], what `top_p_threshold` gave for these queries; None finds it.
        tiles: makes what tiles of queries read out of what each selects (`read_by_tile`); None: each query for itself.

    Returns:
        [B, U, T, N] bool, or `visible` itself without an index.
    """
    if index_q is None or index_k is None or not leaves_out(top_p, min_probability):
        return visible
    scores = visible_scores(index_q, index_k, visible)
    if threshold is None:
        threshold = top_p_threshold(scores, top_p, min_probability)
    chosen = scores >= threshold
    return ((chosen if tiles is None else tiles(chosen)) | near) & visible


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor | None,
    index_k: Tensor | None,
    *,
    retrieval_heads: tuple[int, ...],
    heads_per_unit: int,
    window_tokens: int | tuple[int, ...],
    sink_tokens: int,
    top_p: float,
    scaling: float,
    real: Tensor | None = None,
    min_probability: float = 0.0,
    tile_probability: float = 0.0,
) -> Tensor:
    """Sparse attention of a layer (paper, section 3): q [B, Hq, T, D], k and v [B, Hkv, N, D] -> [B, Hq, T, D].

    Args:
        window_tokens: one number, or one for every KV head; those of retrieval heads have the longest.
    """
    query_heads, kv_heads, queries, slots = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    k_slots = torch.arange(slots, device=q.device)
    q_slots = k_slots[slots - queries :]
    visible = visible_slots(q_slots, k_slots, real)
    sinks, windows = sink_slots(real, sink_tokens, device=q.device), windows_by_head(window_tokens, kv_heads)
    each = torch.cat([visible & near_slots(q_slots, k_slots, sinks, window) for window in windows], 1)
    allowed = each.repeat_interleave(query_heads // kv_heads, 1).expand(q.shape[0], -1, -1, -1).clone()
    if retrieval_heads:
        near, tiles = near_slots(q_slots, k_slots, sinks, max(windows)), None
        if tile_probability and leaves_out(top_p, min_probability):
            size = tile_positions(heads_per_unit, q.shape[3])
            tiles = partial(read_by_tile, q_slots=q_slots, k_slots=k_slots, window_tokens=max(windows), positions=size)
        keep = keep_mask(
            index_q, index_k, visible=visible, near=near, top_p=top_p, min_probability=tile_probability or min_probability,
            tiles=tiles,
        )  # fmt: skip
        units = keep.expand(q.shape[0], len(retrieval_heads) // heads_per_unit, -1, -1)
        allowed[:, list(retrieval_heads)] = units.repeat_interleave(heads_per_unit, 1)
    k, v = (x.repeat_interleave(query_heads // kv_heads, 1) for x in (k, v))
    logits = (q.float() @ k.float().transpose(-1, -2)) * scaling
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ v.float()).to(q.dtype)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd follows what is computed from any of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


@lru_cache(maxsize=4096)
def numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 numbers that stay on a device: a list would be copied there, and waited for, each time."""
    with torch.inference_mode(False):  # the same tensor serves training and inference
        return torch.tensor(values, dtype=torch.int32, device=device)


def pick_heads(x: Tensor, heads: list[int]) -> Tensor:
    """x[:, heads]; x itself for all of them in order."""
    if heads == list(range(x.shape[1])):
        return x
    return x.index_select(1, numbers(tuple(heads), x.device))
