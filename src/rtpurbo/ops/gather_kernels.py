"""Triton kernel of retrieval prefill without gradients: token-exact, and only what was selected is read.

A program takes a tile of a few positions with all query heads of their unit. Over the far tokens it compares index scores
with the positions' thresholds, lists the tokens that any of the positions selected, gathers their keys and values once, and
lets every position attend to its own. Blocks of keys would cost ten times the tokens (docs/log.md); few positions a tile
keep the union small, and the heads of a unit fill the rows of a tile product. The near tokens, from the window of the tile's
first position on, are read in order.

Tiles lie at absolute positions: cut at multiples of `positions(...)`, a prompt gives the same bits as in one piece. A tile
that is cut in two gathers two smaller unions, the same attention in another order of summation.

Shapes and names: see `kernels.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import LEAST_DOT, LOG2E, _add_tile, _on

SCORES = 16384
"""Index scores that a program holds at once, positions times tokens: what registers hold."""
KEY_TILE = 64
"""Tokens of one tile product."""
ROWS = 64
"""Queries of one tile product, positions times heads, unless 16 positions make more."""
PROGRAMS = 528
"""Programs that go through all tiles, the longest first: four for each of an H100's 132 multiprocessors."""


def positions(heads_per_unit: int) -> int:
    """Positions of one tile: at least 16, which a tile product of index scores takes."""
    return max(LEAST_DOT, ROWS // triton.next_power_of_2(heads_per_unit))


@triton.jit
def _own_tokens(b_iq, b_ik, b_least, SP: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    """[SP * P, T] which tokens each row's position selects, the positions repeated for every head."""
    hit = (tl.dot(b_iq, tl.trans(b_ik), input_precision="ieee") >= b_least[:, None]).to(tl.int32)
    return tl.reshape(tl.broadcast_to(hit[None, :, :], [SP, P, T]), [SP * P, T]) > 0


@triton.jit(do_not_specialize=["queries", "slots", "tiles"])
def _gather(
    p_q, p_k, p_v, p_iq, p_ik, p_least, p_real, p_sink, p_list, p_out,
    queries, slots, units, tiles, rows, window, scale,
    D: tl.constexpr, d: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, P: tl.constexpr, FAR: tl.constexpr,
    T: tl.constexpr, PADDED: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """All tiles of one program; unit rows (batch and unit) are the inner part of a tile's number."""
    o_p, o_d, o_i, o_r, o_t = tl.arange(0, P), tl.arange(0, D), tl.arange(0, d), tl.arange(0, SP * P), tl.arange(0, T)
    p_mine = p_list + tl.program_id(0).to(tl.int64) * FAR
    offset = slots - queries
    for number in range(tl.program_id(0), tiles * rows, tl.num_programs(0)):
        row = (number % rows).to(tl.int64)
        begin = offset // P * P + (tiles - 1 - number // rows) * P  # the last tile, which sees most, first
        batch = row // units
        o_slot = begin + o_p
        m_p = (o_slot >= offset) & (o_slot < slots)
        b_iq = tl.load(p_iq + (row * queries + o_slot[:, None] - offset) * d + o_i, mask=m_p[:, None], other=0.0)
        b_least = tl.load(p_least + row * queries + o_slot - offset, mask=m_p, other=float("inf"))
        o_q = begin + o_r % P
        m_q = (o_q >= offset) & (o_q < slots) & (o_r // P < S)
        o_row = (row * S + o_r // P) * queries + o_q - offset
        b_q = tl.load(p_q + o_row[:, None] * D + o_d, mask=m_q[:, None], other=0.0)
        p_keys, p_values, p_index = p_k + row * S * slots * D, p_v + row * S * slots * D, p_ik + row * slots * d
        p_is_sink, p_is_real = p_sink + tl.where(ONE_ROW, 0, batch) * slots, p_real + batch * slots
        peak = tl.full([SP * P], float("-inf"), tl.float32)
        total = tl.zeros([SP * P], tl.float32)
        acc = tl.zeros([SP * P, D], tl.float32)
        edge = tl.maximum(begin - window + 1, 0) // T * T  # before it no position of the tile has its window
        for start in range(0, edge, FAR):
            o_c = start + tl.arange(0, FAR)
            m_c = o_c < edge
            b_ic = tl.load(p_index + o_c[:, None].to(tl.int64) * d + o_i, mask=m_c[:, None], other=0.0)
            hits = (tl.dot(b_iq, tl.trans(b_ic), input_precision="ieee") >= b_least[:, None]).to(tl.int32)
            chosen = m_c & ((tl.max(hits, 0) > 0) | (tl.load(p_is_sink + o_c, mask=m_c, other=0) > 0))
            if PADDED:
                chosen = chosen & (tl.load(p_is_real + o_c, mask=m_c, other=0) > 0)
            chosen = chosen.to(tl.int32)
            count = tl.sum(chosen, 0)
            tl.store(p_mine + tl.cumsum(chosen, 0) - 1, o_c, mask=chosen > 0)
            tl.debug_barrier()
            for first in range(0, count, T):
                m_k = first + o_t < count
                o_k = tl.load(p_mine + first + o_t, mask=m_k, other=0).to(tl.int64)
                b_ik = tl.load(p_index + o_k[:, None] * d + o_i, mask=m_k[:, None], other=0.0)
                b_k = tl.load(p_keys + o_k[:, None] * D + o_d, mask=m_k[:, None], other=0.0)
                b_v = tl.load(p_values + o_k[:, None] * D + o_d, mask=m_k[:, None], other=0.0)
                b_sink = tl.load(p_is_sink + o_k, mask=m_k, other=0)
                m_tile = (_own_tokens(b_iq, b_ik, b_least, SP, P, T) | (b_sink > 0)[None, :]) & m_k[None, :]
                peak, total, acc = _add_tile(b_q, b_k, b_v, m_tile, peak, total, acc, scale)
            tl.debug_barrier()  # the list is written again
        for start in range(edge, tl.minimum(begin + P, slots), T):
            o_k = (start + o_t).to(tl.int64)
            m_k = o_k < slots
            b_ik = tl.load(p_index + o_k[:, None] * d + o_i, mask=m_k[:, None], other=0.0)
            b_k = tl.load(p_keys + o_k[:, None] * D + o_d, mask=m_k[:, None], other=0.0)
            b_v = tl.load(p_values + o_k[:, None] * D + o_d, mask=m_k[:, None], other=0.0)
            b_sink = tl.load(p_is_sink + o_k, mask=m_k, other=0)
            age = o_q[:, None] - o_k[None, :]
            m_tile = _own_tokens(b_iq, b_ik, b_least, SP, P, T) | (age < window) | (b_sink > 0)[None, :]
            m_tile = m_tile & (age >= 0) & m_k[None, :]
            if PADDED:
                b_real = tl.load(p_is_real + o_k, mask=m_k, other=0)
                m_tile = m_tile & ((b_real > 0)[None, :] | (age == 0))
            peak, total, acc = _add_tile(b_q, b_k, b_v, m_tile, peak, total, acc, scale)
        acc = acc / tl.where(m_q, total, 1.0)[:, None]
        tl.store(p_out + o_row[:, None] * D + o_d, acc.to(p_out.dtype.element_ty), mask=m_q[:, None])


def retrieval_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    *,
    heads_per_unit: int,
    is_sink: Tensor,
    window_tokens: int,
    scaling: float,
    real: Tensor | None,
) -> Tensor:
    """`prefill.retrieval_attention` by an index, without gradients.

    Args:
        q: [B, U*S, T, D]; k, v: [B, U*S, N, D], of which each unit's first row is read.
        index: queries [B, U, T, d] and keys [B, U, N, d], d at least 16 and a power of two, and thresholds [B, U, T].
        is_sink, real: [B or 1, N] and [B, N] uint8.

    Returns:
        [B, U*S, T, D]
    """
    batch, heads, queries, dim = q.shape
    slots = k.shape[2]
    index_q, index_k, least = index
    units = heads // heads_per_unit
    many = positions(heads_per_unit)
    far = SCORES // many
    tiles = triton.cdiv(slots, many) - (slots - queries) // many
    programs = min(PROGRAMS, tiles * batch * units)
    scratch = torch.empty(programs, far, dtype=torch.int32, device=q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with _on(q):
        _gather[(programs,)](
            q.contiguous(), k.contiguous(), v.contiguous(), index_q, index_k, least, is_sink if real is None else real,
            is_sink, scratch, out, queries, slots, units, tiles, batch * units, window_tokens, scaling * LOG2E,
            D=dim, d=index_q.shape[-1], S=heads_per_unit, SP=triton.next_power_of_2(heads_per_unit), P=many, FAR=far,
            T=KEY_TILE, PADDED=real is not None, ONE_ROW=is_sink.shape[0] == 1, num_warps=8,
        )  # fmt: skip
    return out
