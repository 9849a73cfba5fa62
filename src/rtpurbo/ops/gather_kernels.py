"""Triton kernels of retrieval prefill without gradients: token-exact, and only what was selected is read.

1. `_far_bits`: which far tokens any of a tile's positions selects, a bit a token.
2. `_gather`: a program takes a tile of a few positions with all query heads of their unit, lists the tokens of its bits,
   gathers their keys and values once, and lets every position attend to its own. The near tokens, from the window of the
   tile's first position on, are read in order.

Blocks of keys would cost ten times the tokens (docs/log.md); few positions a tile keep the union small, and the heads of a
unit fill the rows of a tile product. Tiles lie at absolute positions: cut at multiples of `tile_positions(...)`, a prompt
gives the same bits as in one piece. A tile that is cut in two gathers two smaller unions: the same attention in another
order of summation.

Shapes and names: see `kernels.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import LOG2E, _add_tile, _add_whole_tile, _on, _whole_tiles, gpu
from .reference import KEY_TILE, numbers, tile_positions

BIT_POSITIONS = 128
"""Positions whose scores a program of `_far_bits` compares with their thresholds at once."""
BIT_TOKENS = 64
"""Tokens that it compares them for."""
FAR_TOKENS = 8192
"""Tokens whose bits a program of `_gather` makes a list of at once."""
WORKSPACE_WORDS = 1 << 28
"""Words of 32 bits that the bits of one launch may take: a GiB."""
PROGRAMS = 528
"""Programs that go through all tiles, the longest first: four for each of an H100's 132 multiprocessors."""


def stages(head_dim: int, rows: int, capability: tuple[int, int], shared_bytes: int) -> int:
    """Tiles of keys and values that `_gather` may have under way, three at most, in a program's shared memory."""
    queries = 2 * rows * head_dim if capability >= (9, 0) else 0  # before Hopper they stay in registers
    return max(1, min(3, (shared_bytes - queries - 4096) // (KEY_TILE * (4 * head_dim + 32))))


@triton.jit(do_not_specialize=["queries", "slots", "first"])
def _far_bits(
    p_iq, p_ik, p_least, p_real, p_sink, p_bits, queries, slots, first, units, words, window,
    d: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr,
    ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Bits of the tiles of P positions in the Q positions from slot `first` + Q * program on: [Q / P tiles, words].

    Tokens lie along the rows of a score tile, positions along its columns, so that most of the maximum over positions stays
    in a thread.
    """
    block, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)  # the longest first
    offset, batch = slots - queries, row // units
    begin = first + block * Q
    o_q, o_d = begin + tl.arange(0, Q), tl.arange(0, d)
    m_q = (o_q >= offset) & (o_q < slots)
    b_iq = tl.load(p_iq + (row * queries + o_q[:, None] - offset) * d + o_d, mask=m_q[:, None], other=0.0)
    b_least = tl.load(p_least + row * queries + o_q - offset, mask=m_q, other=float("inf"))
    o_j, o_w, o_b = tl.arange(0, Q // P), tl.arange(0, N // 32), tl.arange(0, 32)
    p_tiles = p_bits + (row * tl.num_programs(0) + block) * (Q // P) * words
    for start in range(0, tl.maximum(tl.minimum(begin + Q - P, slots) - window + 1, 0) // T * T, N):
        o_k = start + tl.arange(0, N)
        m_k = o_k < slots
        b_ik = tl.load(p_ik + (row * slots + o_k[:, None]) * d + o_d, mask=m_k[:, None], other=0.0)
        above = tl.dot(b_ik, tl.trans(b_iq), input_precision="ieee") - b_least[None, :]
        chosen = tl.max(tl.reshape(above, [N, Q // P, P]), 2) >= 0
        sinks = tl.load(p_sink + tl.where(ONE_ROW, 0, batch) * slots + o_k, mask=m_k, other=0)
        chosen = chosen | (sinks > 0)[:, None]
        if PADDED:
            chosen = chosen & (tl.load(p_real + batch * slots + o_k, mask=m_k, other=0) > 0)[:, None]
        bits = tl.reshape(chosen.to(tl.int32), [N // 32, 32, Q // P]) << o_b[None, :, None]
        m_w = (start // 32 + o_w) < words
        tl.store(p_tiles + o_j[None, :] * words + start // 32 + o_w[:, None], tl.sum(bits, 1), mask=m_w[:, None])


@triton.jit
def _own_tokens(b_iq, b_ik, b_least, SP: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    """[SP * P, T] which tokens each row's position selects, the positions repeated for every head."""
    hit = (tl.dot(b_iq, tl.trans(b_ik), input_precision="ieee") >= b_least[:, None]).to(tl.int32)
    return tl.reshape(tl.broadcast_to(hit[None, :, :], [SP, P, T]), [SP * P, T]) > 0


@triton.jit
def _near_tile(
    p_keys, p_values, p_index, p_is_real, p_is_sink, start, slots, o_q, b_iq, b_least, window,
    D: tl.constexpr, d: tl.constexpr, SP: tl.constexpr, P: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Keys and values of the T slots from `start` on, of which the oldest queries' windows may begin or end inside, and
    which queries attend to them: [T, D], [T, D], [SP * P, T]."""
    o_k, o_d, o_i = (start + tl.arange(0, T)).to(tl.int64), tl.arange(0, D), tl.arange(0, d)
    m_k = o_k < slots
    b_k = tl.load(p_keys + o_k[:, None] * D + o_d, mask=m_k[:, None], other=0.0)
    b_v = tl.load(p_values + o_k[:, None] * D + o_d, mask=m_k[:, None], other=0.0)
    age = o_q[:, None] - o_k[None, :]
    m_tile = (age >= 0) & m_k[None, :]
    if not TILE:
        b_ik = tl.load(p_index + o_k[:, None] * d + o_i, mask=m_k[:, None], other=0.0)
        b_sink = tl.load(p_is_sink + o_k, mask=m_k, other=0)
        own = _own_tokens(b_iq, b_ik, b_least, SP, P, T) | (age < window) | (b_sink > 0)[None, :]
        m_tile = m_tile & own
    if PADDED:
        b_real = tl.load(p_is_real + o_k, mask=m_k, other=0)
        m_tile = m_tile & ((b_real > 0)[None, :] | (age == 0))
    return b_k, b_v, m_tile


@triton.jit(do_not_specialize=["queries", "slots", "first", "tiles"])
def _gather(
    p_q, p_k, p_v, p_iq, p_ik, p_least, p_real, p_sink, p_heads, p_rows, p_bits, p_list, p_out,
    queries, slots, first, units, words, tiles, rows, window, scale, q_heads, kv_heads,
    D: tl.constexpr, d: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, P: tl.constexpr, FAR: tl.constexpr,
    T: tl.constexpr, PADDED: tl.constexpr, ONE_ROW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The tiles of one program, from slot `first` on; unit rows (batch and unit) are the inner part of a tile's number."""
    o_p, o_d, o_i, o_r, o_t = tl.arange(0, P), tl.arange(0, D), tl.arange(0, d), tl.arange(0, SP * P), tl.arange(0, T)
    p_mine = p_list + tl.program_id(0).to(tl.int64) * FAR
    offset = slots - queries
    for number in range(tl.program_id(0), tiles * rows, tl.num_programs(0)):
        row = (number % rows).to(tl.int64)
        tile = tiles - 1 - number // rows  # the last tile, which sees most, first
        begin = first + tile * P
        batch = row // units
        o_slot = begin + o_p
        m_p = (o_slot >= offset) & (o_slot < slots)
        b_iq = tl.load(p_iq + (row * queries + o_slot[:, None] - offset) * d + o_i, mask=m_p[:, None], other=0.0)
        b_least = tl.load(p_least + row * queries + o_slot - offset, mask=m_p, other=float("inf"))
        o_q = begin + o_r % P
        m_q = (o_q >= offset) & (o_q < slots) & (o_r // P < S)
        first_head = row % units * S
        heads = tl.load(p_heads + first_head + tl.minimum(o_r // P, S - 1))
        o_row = (batch * q_heads + heads) * queries + o_q - offset
        kv_row = batch * kv_heads + tl.load(p_rows + first_head)
        b_q = tl.load(p_q + o_row[:, None] * D + o_d, mask=m_q[:, None], other=0.0)
        p_keys, p_values, p_index = p_k + kv_row * slots * D, p_v + kv_row * slots * D, p_ik + row * slots * d
        p_is_sink, p_is_real = p_sink + tl.where(ONE_ROW, 0, batch) * slots, p_real + batch * slots
        peak = tl.full([SP * P], float("-inf"), tl.float32)
        total = tl.zeros([SP * P], tl.float32)
        acc = tl.zeros([SP * P, D], tl.float32)
        live = (begin + P > offset) & (begin < slots)  # a block may begin before the queries and end after them
        edge = tl.where(live, tl.maximum(begin - window + 1, 0) // T * T, 0)  # before it no position has its window
        stop = tl.where(live, tl.minimum(begin + P, slots), 0)
        for start in range(0, edge, FAR):
            o_w, o_c = start // 32 + tl.arange(0, FAR // 32), start + tl.arange(0, FAR)
            b_bits = tl.load(p_bits + (row * tiles + tile) * words + o_w, mask=o_w * 32 < edge, other=0)
            chosen = tl.reshape((b_bits[:, None] >> tl.arange(0, 32)[None, :]) & 1, [FAR]) * (o_c < edge)
            count = tl.sum(chosen, 0)
            tl.store(p_mine + tl.cumsum(chosen, 0) - 1, o_c, mask=chosen > 0)
            tl.debug_barrier()
            masked_from = 0
            if TILE:
                masked_from = count // T * T
                for at in range(0, masked_from, T):
                    o_k = tl.load(p_mine + at + o_t).to(tl.int64)
                    b_k, b_v = tl.load(p_keys + o_k[:, None] * D + o_d), tl.load(p_values + o_k[:, None] * D + o_d)
                    peak, total, acc = _add_whole_tile(b_q, b_k, b_v, peak, total, acc, scale)
            for at in range(masked_from, count, T):
                m_k = at + o_t < count
                o_k = tl.load(p_mine + at + o_t, mask=m_k, other=0).to(tl.int64)
                b_k = tl.load(p_keys + o_k[:, None] * D + o_d, mask=m_k[:, None], other=0.0)
                b_v = tl.load(p_values + o_k[:, None] * D + o_d, mask=m_k[:, None], other=0.0)
                m_tile = tl.broadcast_to(m_k[None, :], [SP * P, T])
                if not TILE:
                    b_ik = tl.load(p_index + o_k[:, None] * d + o_i, mask=m_k[:, None], other=0.0)
                    b_sink = tl.load(p_is_sink + o_k, mask=m_k, other=0)
                    m_tile = m_tile & (_own_tokens(b_iq, b_ik, b_least, SP, P, T) | (b_sink > 0)[None, :])
                peak, total, acc = _add_tile(b_q, b_k, b_v, m_tile, peak, total, acc, scale)
            tl.debug_barrier()  # the list is written again
        whole_from, whole_to = stop, stop  # tiles in between lie in every position's window
        if not PADDED:
            whole_from, whole_to = _whole_tiles(begin, edge, stop, window, P, T, not TILE)
        for start in range(edge, whole_from, T):
            b_k, b_v, m_tile = _near_tile(
                p_keys, p_values, p_index, p_is_real, p_is_sink, start, slots, o_q, b_iq, b_least, window,
                D, d, SP, P, T, PADDED, TILE,
            )  # fmt: skip
            peak, total, acc = _add_tile(b_q, b_k, b_v, m_tile, peak, total, acc, scale)
        if not PADDED:
            for start in range(whole_from, whole_to, T):
                o_k = (start + o_t).to(tl.int64)
                b_k, b_v = tl.load(p_keys + o_k[:, None] * D + o_d), tl.load(p_values + o_k[:, None] * D + o_d)
                peak, total, acc = _add_whole_tile(b_q, b_k, b_v, peak, total, acc, scale)
            for start in range(whole_to, stop, T):
                b_k, b_v, m_tile = _near_tile(
                    p_keys, p_values, p_index, p_is_real, p_is_sink, start, slots, o_q, b_iq, b_least, window,
                    D, d, SP, P, T, PADDED, TILE,
                )  # fmt: skip
                peak, total, acc = _add_tile(b_q, b_k, b_v, m_tile, peak, total, acc, scale)
        acc = acc / tl.where(m_q, total, 1.0)[:, None]
        tl.store(p_out + o_row[:, None] * D + o_d, acc.to(p_out.dtype.element_ty), mask=m_q[:, None])


def retrieval_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    *,
    heads: tuple[int, ...],
    rows: tuple[int, ...],
    out: Tensor | None,
    heads_per_unit: int,
    is_sink: Tensor,
    window_tokens: int,
    scaling: float,
    real: Tensor | None,
    by_tile: bool = False,
) -> Tensor:
    """`prefill.retrieval_attention` by an index, without gradients.

    Args:
        q: [B, Hq, T, D]; k, v: [B, Hk, N, D].
        heads, rows: U*S heads of q, unit by unit, and the rows of k and v that they read, the same for all of a unit.
        out: like q, contiguous, to write these heads into; None: a new tensor.
        index: queries [B, U, T, d] and keys [B, U, N, d], d at least 16 and a power of two, and thresholds [B, U, T].
        is_sink, real: [B or 1, N] and [B, N] uint8.
        by_tile: all positions of a tile attend to all that it reads (`reference.read_by_tile`).

    Returns:
        `out`
    """
    batch, _, queries, dim = q.shape
    slots = k.shape[2]
    index_q, index_k, least = index
    units = len(heads) // heads_per_unit
    many = tile_positions(heads_per_unit, dim)
    padded = triton.next_power_of_2(heads_per_unit)
    pipeline = 3 if not q.is_cuda else stages(dim, padded * many, *gpu(q.device))
    flags = {"d": index_q.shape[-1], "P": many, "T": KEY_TILE, "PADDED": real is not None, "ONE_ROW": is_sink.shape[0] == 1}
    words = triton.cdiv(max(slots - window_tokens, 1), 32 * KEY_TILE) * KEY_TILE
    block = max(BIT_POSITIONS, many)
    at_once = max(1, WORKSPACE_WORDS // (batch * units * words * (block // many)))  # blocks of positions
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    maps = (numbers(heads, q.device), numbers(rows, q.device))
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    masks = (is_sink if real is None else real, is_sink)
    with _on(q):
        for first in range((slots - queries) // block * block, slots, at_once * block):
            blocks = min(at_once, triton.cdiv(slots - first, block))
            tiles = blocks * block // many
            bits = torch.empty(batch * units, tiles, words, dtype=torch.int32, device=q.device)
            _far_bits[(blocks, batch * units)](
                index_q, index_k, least, *masks, bits, queries, slots, first, units, words, window_tokens,
                Q=block, N=BIT_TOKENS, **flags, num_warps=4,
            )  # fmt: skip
            programs = min(PROGRAMS, tiles * batch * units)
            scratch = torch.empty(programs, FAR_TOKENS, dtype=torch.int32, device=q.device)
            _gather[(programs,)](
                q, k, v, index_q, index_k, least, *masks, *maps, bits, scratch, out,
                queries, slots, first, units, words, tiles, batch * units, window_tokens, scaling * LOG2E, q.shape[1],
                k.shape[1],
                D=dim, S=heads_per_unit, SP=padded, FAR=FAR_TOKENS, TILE=by_tile, **flags, num_warps=8, num_stages=pipeline,
            )  # fmt: skip
    return out
