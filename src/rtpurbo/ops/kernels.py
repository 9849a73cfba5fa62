"""Triton kernels of `prefill`'s two operations, with gradients: exact flash attention under a mask made on the fly.

What a query sees is decided tile by tile from slots, padding and index scores; nothing of size T x N reaches memory.
Tiles of queries and keys are anchored at absolute slots, so a result does not depend on how a prompt was cut.

Shapes: B batch, H query heads (keys and values one per query head, or the rows that a `Place` names), T queries,
L key slots of which the first is
`first_slot`, D head dimension, U index units, d index dimension, S sink slots. q's slots are the last T.
Names in kernels: p_ pointers, b_ tiles, o_ offsets, m_ masks; M queries and N keys a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .reference import needs_gradient, numbers
from .select import GRID_STEPS, STEP_NATS, leaves_out

HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
LOG2E = 1.4426950408889634
LOWEST = -1e30
"""Below every score."""
LEAST_DOT = 16
"""Smallest inner dimension of a tile product; narrower index keys and sinks are padded to it."""


def _tiles(head_dim: int) -> dict[str, int]:
    """Queries and keys a tile, and warps: small enough for the registers of every GPU since Ampere."""
    if head_dim > 128:
        return {"M": 64, "N": 32, "num_warps": 8, "num_stages": 2}
    return {"M": 64, "N": 64, "num_warps": 4 if head_dim <= 64 else 8, "num_stages": 3}


def _forward_tiles(head_dim: int, tma: bool = False) -> dict[str, int]:
    """The same for the forward pass, which holds less; with TMA as much as fits a Hopper's shared memory."""
    if tma and head_dim == 128:
        return {"M": 128, "N": 128, "num_warps": 8, "num_stages": 3}
    return {"M": 128, "N": 64, "num_warps": 8, "num_stages": 3} if head_dim == 128 else _tiles(head_dim)


TMA_SHARED_BYTES = 230400
"""Shared memory that the largest of these tiles take."""


@cache
def gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability of a GPU, and bytes of shared memory that one program may take, as Triton counts them."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.get_device_capability(index), driver.active.utils.get_device_properties(index)["max_shared_mem"]


def has_tma(device: torch.device) -> bool:
    """Whether the GPU's tensor memory accelerator can fetch whole tiles, and their pipeline fits (Hopper on)."""
    return device.type == "cuda" and gpu(device)[0] >= (9, 0) and gpu(device)[1] >= TMA_SHARED_BYTES


def _row_tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` rows of a contiguous [..., D], its heads one after the other."""
    flat = x.view(-1, x.shape[-1])
    return TensorDescriptor.from_tensor(flat, [rows, x.shape[-1]])


@triton.jit
def _seen(q_slot, k_slot, b_real, LOCAL: tl.constexpr, PADDED: tl.constexpr, window):
    """[M, N] causal, not padding (but every query sees itself), and inside the window when LOCAL."""
    age = q_slot[:, None] - k_slot[None, :]
    m_seen = age >= 0
    if PADDED:
        m_seen = m_seen & ((b_real[None, :] > 0) | (age == 0))
    if LOCAL:
        m_seen = m_seen & (age < window)
    return m_seen


@triton.jit
def _kept(m_seen, q_slot, k_slot, b_iq, b_ik, b_least, b_sink, window):
    """[M, N] what a retrieval unit keeps of what it sees: index score high enough, window, sinks."""
    scores = tl.dot(b_iq, tl.trans(b_ik), input_precision="ieee")
    near = (q_slot[:, None] - k_slot[None, :] < window) | (b_sink[None, :] > 0)
    return m_seen & ((scores >= b_least[:, None]) | near)


@triton.jit
def _first_key(begin, first_query, first_slot, window, N: tl.constexpr, LOCAL: tl.constexpr):
    """Slot of the first key tile that a tile of queries from slot `begin` on looks at."""
    start_at = first_slot // N * N
    if LOCAL:
        oldest = tl.maximum(tl.maximum(begin, first_query) - window + 1, 0)
        start_at = tl.maximum(start_at, oldest // N * N)
    return start_at


@triton.jit
def _whole_tiles(begin, start_at, stop, window, M: tl.constexpr, N: tl.constexpr, LOCAL: tl.constexpr):
    """Slots of the first key tile that all M queries from `begin` on see whole, and of the first one after those."""
    whole_from = start_at
    if LOCAL:
        whole_from = tl.maximum(start_at, (tl.maximum(begin + M - window, 0) + N - 1) // N * N)
    whole_from = tl.minimum(whole_from, stop)
    return whole_from, tl.maximum(whole_from, tl.minimum(begin + 1, stop) // N * N)


@triton.jit
def _key_tile(
    p_k, p_v, p_ik, p_real, p_sink, kv_row, unit, batch, start, length, first_slot, o_q, b_iq, b_least, window,
    D: tl.constexpr, d: tl.constexpr, N: tl.constexpr,
    LOCAL: tl.constexpr, SELECT: tl.constexpr, PADDED: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Keys and values of the N slots from `start` on, and which queries attend to them: [N, D], [N, D], [M, N]."""
    last = first_slot + length
    o_k = start + tl.arange(0, N)
    m_k = (o_k >= first_slot) & (o_k < last)
    o_l, o_d = o_k - first_slot, tl.arange(0, D)
    b_k = tl.load(p_k + (kv_row * length + o_l[:, None]) * D + o_d, mask=m_k[:, None], other=0.0)
    b_v = tl.load(p_v + (kv_row * length + o_l[:, None]) * D + o_d, mask=m_k[:, None], other=0.0)
    b_real = o_k
    if PADDED:
        b_real = tl.load(p_real + batch * last + o_k, mask=m_k, other=0).to(tl.int32)
    m_seen = _seen(o_q, o_k, b_real, LOCAL, PADDED, window) & m_k[None, :]
    if SELECT:
        b_ik = tl.load(p_ik + (unit * length + o_l[:, None]) * d + tl.arange(0, d), mask=m_k[:, None], other=0.0)
        b_sink = tl.load(p_sink + (0 if ONE_ROW else batch) * last + o_k, mask=m_k, other=0).to(tl.int32)
        m_seen = _kept(m_seen, o_q, o_k, b_iq, b_ik, b_least, b_sink, window)
    return b_k, b_v, m_seen


@triton.jit
def _whole_tile(p_k, p_v, t_k, t_v, first, D: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr):
    """Keys and values of N rows from `first` on, all of them there."""
    if TMA:
        return t_k.load([first.to(tl.int32), 0]), t_v.load([first.to(tl.int32), 0])
    o_kd = (first + tl.arange(0, N))[:, None] * D + tl.arange(0, D)
    return tl.load(p_k + o_kd), tl.load(p_v + o_kd)


@triton.jit
def _scores(p_ik, p_real, row, units, b_iq, o_q, start, slots, d: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr):
    """[M, N] index scores of the N slots from `start` on, in nats, -inf where a query does not see."""
    o_k = start + tl.arange(0, N)
    b_ik = tl.load(p_ik + (row * slots + o_k[:, None]) * d + tl.arange(0, d), mask=o_k[:, None] < slots, other=0.0)
    b_real = o_k
    if PADDED:
        b_real = tl.load(p_real + row // units * slots + o_k, mask=o_k < slots, other=0).to(tl.int32)
    m_seen = _seen(o_q, o_k, b_real, False, PADDED, 0)
    return tl.where(m_seen, tl.dot(b_iq, tl.trans(b_ik), input_precision="ieee"), float("-inf"))


@triton.jit
def _add_mass(scores, best, total):
    """One step of the sum of exp(score - best score so far): [M, N] scores -> (best [M], total [M])."""
    higher = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores * 1.4426950408889634 - (higher * 1.4426950408889634)[:, None])
    keep = tl.exp2((best - higher) * 1.4426950408889634)  # the difference first: exactly 1 where nothing changed
    return higher, total * keep + tl.sum(weights, 1)


@triton.jit
def _thresholds(
    p_iq, p_ik, p_real, p_least, queries, slots, units, top_p, min_probability,
    d: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    SEARCH: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """`select.top_p_threshold` of M queries: one pass for the best score and the softmax's sum; for top-p, a search of the
    grid, four ways a pass."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = (slots - queries) // M * M + tile * M
    o_q = begin + tl.arange(0, M)
    o_t = o_q - (slots - queries)
    m_q = (o_t >= 0) & (o_t < queries)
    o_d = tl.arange(0, d)
    b_iq = tl.load(p_iq + (row * queries + o_t[:, None]) * d + o_d, mask=m_q[:, None], other=0.0)
    stop = tl.minimum(begin + M, slots)
    best = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    whole = 0 if PADDED else tl.minimum(begin + 1, stop) // N * N  # tiles before it are seen whole by all queries
    for start in range(0, whole, N):
        b_ik = tl.load(p_ik + (row * slots + start + tl.arange(0, N)[:, None]) * d + o_d)
        best, total = _add_mass(tl.dot(b_iq, tl.trans(b_ik), input_precision="ieee"), best, total)
    for start in range(whole, stop, N):
        best, total = _add_mass(_scores(p_ik, p_real, row, units, b_iq, o_q, start, slots, d, N, PADDED), best, total)
    sees = best > LOWEST
    nats = best + tl.log(tl.where(sees, total, 1.0))
    best = tl.where(sees, tl.floor(best / STEP), 0.0)
    least = tl.full([M], float("-inf"), tl.float32)
    if SEARCH:
        steps = tl.zeros([M], tl.float32)
        width = STEPS // 4
        while width > 0:
            first, second, third = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
            mass = tl.zeros([M], tl.float32)
            edge = (steps + (width - 1))[:, None]
            for start in range(0, stop, N):
                scores = _scores(p_ik, p_real, row, units, b_iq, o_q, start, slots, d, N, PADDED)
                below = best[:, None] - tl.floor(scores / STEP)
                weights = tl.where(below < STEPS, tl.exp(-STEP * below), 0.0)
                first += tl.sum(tl.where(below <= edge, weights, 0.0), 1)
                second += tl.sum(tl.where(below <= edge + width, weights, 0.0), 1)
                third += tl.sum(tl.where(below <= edge + 2 * width, weights, 0.0), 1)
                mass += tl.sum(weights, 1)
            needed = top_p * mass
            more = (first < needed).to(tl.float32) + (second < needed).to(tl.float32) + (third < needed).to(tl.float32)
            steps += width * more
            width = width // 4
        least = best - steps
    if min_probability > 0:
        least = tl.maximum(least, tl.where(sees, tl.ceil((nats + tl.log(min_probability)) / STEP), best))
    tl.store(p_least + row * queries + o_t, tl.minimum(least, best - 1.0) * STEP, mask=m_q)


@triton.jit
def _add_tile(b_q, b_k, b_v, m_tile, peak, total, acc, scale):
    """One step of the online softmax: logits of a tile, allowed where m_tile [queries, tokens]."""
    logits = tl.where(m_tile, tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale, float("-inf"))
    higher = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(logits - base[:, None])
    keep = tl.exp2(peak - base)
    acc = acc * keep[:, None] + tl.dot(weights.to(b_v.dtype), b_v, input_precision="ieee")
    return higher, total * keep + tl.sum(weights, 1), acc


@triton.jit
def _add_whole_tile(b_q, b_k, b_v, peak, total, acc, scale):
    """`_add_tile` where every query sees every token."""
    logits = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    higher = tl.maximum(peak, tl.max(logits, 1) * scale)
    weights = tl.exp2(logits * scale - higher[:, None])
    keep = tl.exp2(peak - higher)
    acc = acc * keep[:, None]
    acc = tl.dot(weights.to(b_v.dtype), b_v, acc, input_precision="ieee")
    return higher, total * keep + tl.sum(weights, 1), acc


@triton.jit
def _add_sinks(b_q, p_sk, p_sv, p_sinks, kv_row, o_q, window, peak, total, acc, scale, D: tl.constexpr, S: tl.constexpr):
    """`_add_tile` of the sinks outside of the queries' windows, keys and values at row kv_row of [rows, S, D]."""
    o_s, o_d = tl.arange(0, S), tl.arange(0, D)
    b_sinks = tl.load(p_sinks + o_s)
    b_sk = tl.load(p_sk + (kv_row * S + o_s[:, None]) * D + o_d)
    b_sv = tl.load(p_sv + (kv_row * S + o_s[:, None]) * D + o_d)
    m_old = (b_sinks[None, :] >= 0) & (o_q[:, None] - b_sinks[None, :] >= window)
    return _add_tile(b_q, b_sk, b_sv, m_old, peak, total, acc, scale)


@triton.jit
def _forward(
    p_q, p_k, p_v, t_q, t_k, t_v, p_sk, p_sv, p_sinks, p_iq, p_ik, p_least, p_real, p_sink, p_heads, p_rows, p_out, p_lse,
    queries, length, first_slot, heads, per_unit, window, scale, q_heads, kv_heads,
    D: tl.constexpr, d: tl.constexpr, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LOCAL: tl.constexpr, SELECT: tl.constexpr, PADDED: tl.constexpr, ONE_ROW: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Softmax attention of one tile of M queries of one head, online over key tiles; base-2 log-sum-exp beside it.

    Head number h of a launch is q's head p_heads[h] and reads the keys and values of row p_rows[h]. t_: the rows of q, k
    and v as tensor descriptors, with TMA.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)  # the longest first
    last = first_slot + length
    begin = (last - queries) // M * M + tile * M
    o_q = begin + tl.arange(0, M)
    o_t = o_q - (last - queries)
    m_q = (o_t >= 0) & (o_t < queries)
    o_d, o_i = tl.arange(0, D), tl.arange(0, d)
    unit = row // per_unit
    batch = row // heads
    q_row = batch * q_heads + tl.load(p_heads + row % heads)
    kv_row = batch * kv_heads + tl.load(p_rows + row % heads)
    if TMA:  # rows before and after a head's own are another's, and not stored
        b_q = t_q.load([(q_row * queries + begin - (last - queries)).to(tl.int32), 0])
    else:
        b_q = tl.load(p_q + (q_row * queries + o_t[:, None]) * D + o_d, mask=m_q[:, None], other=0.0)
    b_iq, b_least = b_q, o_q.to(tl.float32)
    if SELECT:
        b_iq = tl.load(p_iq + (unit * queries + o_t[:, None]) * d + o_i, mask=m_q[:, None], other=0.0)
        b_least = tl.load(p_least + unit * queries + o_t, mask=m_q, other=0.0)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    stop = tl.minimum(begin + M, last)
    start_at = _first_key(begin, last - queries, first_slot, window, N, LOCAL)
    whole_from, whole_to = stop, stop  # tiles in between are seen whole by all queries
    if not SELECT and not PADDED:
        whole_from, whole_to = _whole_tiles(begin, start_at, stop, window, M, N, LOCAL)
    for start in range(start_at, whole_from, N):
        b_k, b_v, m_seen = _key_tile(
            p_k, p_v, p_ik, p_real, p_sink, kv_row, unit, batch, start, length, first_slot, o_q, b_iq, b_least, window,
            D, d, N, LOCAL, SELECT, PADDED, ONE_ROW,
        )  # fmt: skip
        peak, total, acc = _add_tile(b_q, b_k, b_v, m_seen, peak, total, acc, scale)
    if not SELECT and not PADDED:
        for start in range(whole_from, whole_to, N):
            b_k, b_v = _whole_tile(p_k, p_v, t_k, t_v, kv_row * length + start - first_slot, D, N, TMA)
            peak, total, acc = _add_whole_tile(b_q, b_k, b_v, peak, total, acc, scale)
        for start in range(whole_to, stop, N):
            b_k, b_v, m_seen = _key_tile(
                p_k, p_v, p_ik, p_real, p_sink, kv_row, unit, batch, start, length, first_slot, o_q, b_iq, b_least, window,
                D, d, N, LOCAL, SELECT, PADDED, ONE_ROW,
            )  # fmt: skip
            peak, total, acc = _add_tile(b_q, b_k, b_v, m_seen, peak, total, acc, scale)
    if LOCAL:  # the sinks last: their tile then takes no shared memory beside the others
        p_slots = p_sinks + (0 if ONE_ROW else batch) * S
        peak, total, acc = _add_sinks(b_q, p_sk, p_sv, p_slots, kv_row, o_q, window, peak, total, acc, scale, D, S)
    total = tl.where(m_q, total, 1.0)
    peak = tl.where(m_q, peak, 0.0)
    o_out = (q_row * queries + o_t[:, None]) * D + o_d
    tl.store(p_out + o_out, (acc / total[:, None]).to(p_out.dtype.element_ty), mask=m_q[:, None])
    tl.store(p_lse + row * queries + o_t, peak + tl.log2(total), mask=m_q)


@triton.jit
def _backward_queries(
    p_q, p_k, p_v, p_sk, p_sv, p_sinks, p_iq, p_ik, p_least, p_real, p_sink, p_go, p_lse, p_delta, p_gq, p_gsk, p_gsv,
    queries, length, first_slot, heads, per_unit, window, scale, rows,
    D: tl.constexpr, d: tl.constexpr, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LOCAL: tl.constexpr, SELECT: tl.constexpr, PADDED: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries; and this tile's part of the sinks' gradients, summed afterwards."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    last = first_slot + length
    begin = (last - queries) // M * M + tile * M
    o_q = begin + tl.arange(0, M)
    o_t = o_q - (last - queries)
    m_q = (o_t >= 0) & (o_t < queries)
    o_d, o_i = tl.arange(0, D), tl.arange(0, d)
    o_qd = (row * queries + o_t[:, None]) * D + o_d
    b_q = tl.load(p_q + o_qd, mask=m_q[:, None], other=0.0)
    b_go = tl.load(p_go + o_qd, mask=m_q[:, None], other=0.0)
    b_lse = tl.load(p_lse + row * queries + o_t, mask=m_q, other=0.0)
    b_delta = tl.load(p_delta + row * queries + o_t, mask=m_q, other=0.0)
    unit = row // per_unit
    batch = row // heads
    b_iq, b_least = b_q, b_lse
    if SELECT:
        b_iq = tl.load(p_iq + (unit * queries + o_t[:, None]) * d + o_i, mask=m_q[:, None], other=0.0)
        b_least = tl.load(p_least + unit * queries + o_t, mask=m_q, other=0.0)
    acc = tl.zeros([M, D], tl.float32)
    stop = tl.minimum(begin + M, last)
    start_at = _first_key(begin, last - queries, first_slot, window, N, LOCAL)
    if LOCAL:
        o_s = tl.arange(0, S)
        b_sinks = tl.load(p_sinks + (0 if ONE_ROW else batch) * S + o_s)
        b_sk = tl.load(p_sk + (row * S + o_s[:, None]) * D + o_d)
        b_sv = tl.load(p_sv + (row * S + o_s[:, None]) * D + o_d)
        m_old = (b_sinks[None, :] >= 0) & (o_q[:, None] - b_sinks[None, :] >= window) & m_q[:, None]
        old = tl.dot(b_q, tl.trans(b_sk), input_precision="ieee") * scale
        old = tl.where(m_old, tl.exp2(old - b_lse[:, None]), 0.0)
        g_old = (old * (tl.dot(b_go, tl.trans(b_sv), input_precision="ieee") - b_delta[:, None])).to(b_q.dtype)
        acc += tl.dot(g_old, b_sk, input_precision="ieee")
        o_part = ((tile * rows + row) * S + o_s[:, None]) * D + o_d
        tl.store(p_gsv + o_part, tl.dot(tl.trans(old.to(b_go.dtype)), b_go, input_precision="ieee"))
        tl.store(p_gsk + o_part, tl.dot(tl.trans(g_old), b_q, input_precision="ieee"))
    for start in range(start_at, stop, N):
        b_k, b_v, m_seen = _key_tile(
            p_k, p_v, p_ik, p_real, p_sink, row, unit, batch, start, length, first_slot, o_q, b_iq, b_least, window,
            D, d, N, LOCAL, SELECT, PADDED, ONE_ROW,
        )  # fmt: skip
        logits = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        weights = tl.where(m_seen, tl.exp2(logits - b_lse[:, None]), 0.0)
        g_weights = tl.dot(b_go, tl.trans(b_v), input_precision="ieee")
        g_logits = weights * (g_weights - b_delta[:, None])
        acc += tl.dot(g_logits.to(b_k.dtype), b_k, input_precision="ieee")
    tl.store(p_gq + o_qd, (acc * (scale / 1.4426950408889634)).to(p_gq.dtype.element_ty), mask=m_q[:, None])


@triton.jit
def _backward_keys(
    p_q, p_k, p_v, p_iq, p_ik, p_least, p_real, p_sink, p_go, p_lse, p_delta, p_gk, p_gv,
    queries, length, first_slot, heads, per_unit, window, scale,
    D: tl.constexpr, d: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LOCAL: tl.constexpr, SELECT: tl.constexpr, PADDED: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    last = first_slot + length
    start = first_slot // N * N + tile * N
    o_k = start + tl.arange(0, N)
    m_k = (o_k >= first_slot) & (o_k < last)
    o_l = o_k - first_slot
    o_d, o_i = tl.arange(0, D), tl.arange(0, d)
    o_kd = (row * length + o_l[:, None]) * D + o_d
    b_k = tl.load(p_k + o_kd, mask=m_k[:, None], other=0.0)
    b_v = tl.load(p_v + o_kd, mask=m_k[:, None], other=0.0)
    unit = row // per_unit
    batch = row // heads
    b_ik, b_sink, b_real = b_k, o_k, o_k
    if SELECT:
        b_ik = tl.load(p_ik + (unit * length + o_l[:, None]) * d + o_i, mask=m_k[:, None], other=0.0)
        b_sink = tl.load(p_sink + (0 if ONE_ROW else batch) * last + o_k, mask=m_k, other=0).to(tl.int32)
    if PADDED:
        b_real = tl.load(p_real + batch * last + o_k, mask=m_k, other=0).to(tl.int32)
    acc_k = tl.zeros([N, D], tl.float32)
    acc_v = tl.zeros([N, D], tl.float32)
    begin_at = tl.maximum(start, last - queries) // M * M
    stop = last
    if LOCAL:
        stop = tl.minimum(last, start + N - 1 + window)
    for begin in range(begin_at, stop, M):
        o_q = begin + tl.arange(0, M)
        o_t = o_q - (last - queries)
        m_q = (o_t >= 0) & (o_t < queries)
        o_qd = (row * queries + o_t[:, None]) * D + o_d
        b_q = tl.load(p_q + o_qd, mask=m_q[:, None], other=0.0)
        b_go = tl.load(p_go + o_qd, mask=m_q[:, None], other=0.0)
        b_lse = tl.load(p_lse + row * queries + o_t, mask=m_q, other=0.0)
        b_delta = tl.load(p_delta + row * queries + o_t, mask=m_q, other=0.0)
        m_seen = _seen(o_q, o_k, b_real, LOCAL, PADDED, window) & m_k[None, :] & m_q[:, None]
        if SELECT:
            b_iq = tl.load(p_iq + (unit * queries + o_t[:, None]) * d + o_i, mask=m_q[:, None], other=0.0)
            b_least = tl.load(p_least + unit * queries + o_t, mask=m_q, other=0.0)
            m_seen = _kept(m_seen, o_q, o_k, b_iq, b_ik, b_least, b_sink, window)
        logits = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        weights = tl.where(m_seen, tl.exp2(logits - b_lse[:, None]), 0.0)
        acc_v += tl.dot(tl.trans(weights.to(b_go.dtype)), b_go, input_precision="ieee")
        g_weights = tl.dot(b_go, tl.trans(b_v), input_precision="ieee")
        g_logits = (weights * (g_weights - b_delta[:, None])).to(b_q.dtype)
        acc_k += tl.dot(tl.trans(g_logits), b_q, input_precision="ieee")
    acc_k = acc_k * (scale / 1.4426950408889634)
    tl.store(p_gk + o_kd, acc_k.to(p_gk.dtype.element_ty), mask=m_k[:, None])
    tl.store(p_gv + o_kd, acc_v.to(p_gv.dtype.element_ty), mask=m_k[:, None])


class _MaskedFlash(torch.autograd.Function):
    """The kernels as one differentiable function; gradients for q, k, v and the sinks' keys and values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor | None, sink_v: Tensor | None, call: _Call):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        lse = call.forward(q, k, v, sink_k, sink_v, out)
        ctx.call = call
        ctx.save_for_backward(q, k, v, sink_k, sink_v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any):  # type: ignore[override]
        q, k, v, sink_k, sink_v, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        delta = (grad.float() * out.float()).sum(-1)
        gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        call: _Call = ctx.call
        parts = call.launch_backward_queries(q, k, v, sink_k, sink_v, grad, lse, delta, gq)
        call.launch_backward_keys(q, k, v, grad, lse, delta, gk, gv)
        gsk = gsv = None
        if parts is not None:
            gsv = parts[1].sum(0).to(v.dtype)
            gsk = (parts[0].sum(0) * call.scaling).to(k.dtype)
        return gq, gk, gv, gsk, gsv, None


class _Call:
    """Everything of a call that needs no gradient."""

    def __init__(
        self,
        q: Tensor,
        *,
        length: int,
        first_slot: int,
        window_tokens: int,
        scaling: float,
        real: Tensor | None,
        sinks: Tensor,
        index: tuple[Tensor, Tensor, Tensor] | None = None,
        heads_per_unit: int = 1,
        local: bool = False,
        heads: tuple[int, ...] | None = None,
        rows: tuple[int, ...] | None = None,
    ):
        """`heads` of q, in this order, read `rows` of k and v; None: all, each its own."""
        every = tuple(range(q.shape[1]))
        self.heads, self.rows = heads or every, rows or every
        self.q_shape = (q.shape[0], len(self.heads), *q.shape[2:])
        self.length, self.first_slot, self.window, self.scaling = length, first_slot, window_tokens, scaling
        self.index, self.per_unit, self.local = index, heads_per_unit, local
        last = first_slot + length
        self.real = None if real is None else _flags(real, last, real)
        self.sinks = sinks.to(torch.int32).contiguous()
        self.is_sink = None
        if index is not None:
            flags = torch.zeros(sinks.shape[0], last + 1, dtype=torch.uint8, device=q.device)
            flags.scatter_(1, torch.where(sinks >= 0, sinks, last), 1)
            self.is_sink = flags[:, :last].contiguous()

    @property
    def _tile(self) -> dict[str, int]:
        return _tiles(self.q_shape[3])

    def _flags(self, tile: dict[str, int]) -> dict[str, Any]:
        dim = self.index[0].shape[-1] if self.index is not None else LEAST_DOT
        return {
            "D": self.q_shape[3],
            "d": dim,
            "LOCAL": self.local,
            "SELECT": self.index is not None,
            "PADDED": self.real is not None,
            "ONE_ROW": self.sinks.shape[0] == 1,
            **tile,
        }

    def _numbers(self) -> tuple[Any, ...]:
        _, heads, queries, _ = self.q_shape
        return queries, self.length, self.first_slot, heads, self.per_unit, self.window, self.scaling * LOG2E

    def _masks(self, stand_in: Tensor) -> tuple[Tensor, ...]:
        index = self.index if self.index is not None else (stand_in,) * 3
        return (*index, *(stand_in if x is None else x for x in (self.real, self.is_sink)))

    def _query_grid(self, tile: int) -> tuple[int, int]:
        batch, heads, queries, _ = self.q_shape
        last = self.first_slot + self.length
        return -(-last // tile) - (last - queries) // tile, batch * heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sk: Tensor | None, sv: Tensor | None, out: Tensor) -> Tensor:
        """Write the heads' attention into `out`, like q; all tensors contiguous. Returns base-2 log-sum-exps."""
        sinks = (sk, sv, self.sinks) if sk is not None and sv is not None else (q,) * 3
        lse = torch.empty(self.q_shape[:3], dtype=torch.float32, device=q.device)
        maps = (numbers(self.heads, q.device), numbers(self.rows, q.device))
        tma = self.index is None and self.real is None and has_tma(q.device)
        tma = tma and not any(x.data_ptr() % 16 for x in (q, k, v))  # what a tensor descriptor asks for
        tile = _tiles(q.shape[3]) if self.index is not None else _forward_tiles(q.shape[3], tma)
        tiles = (_row_tiles(q, tile["M"]), _row_tiles(k, tile["N"]), _row_tiles(v, tile["N"])) if tma else (q, k, v)
        with _on(q):
            _forward[self._query_grid(tile["M"])[::-1]](
                q, k, v, *tiles, *sinks, *self._masks(q), *maps, out, lse, *self._numbers(), q.shape[1], k.shape[1],
                S=self._sink_rows, TMA=tma, **self._flags(tile),
            )  # fmt: skip
        return lse

    @property
    def _sink_rows(self) -> int:
        return self.sinks.shape[1] if self.local else LEAST_DOT

    def launch_backward_queries(self, q, k, v, sk, sv, grad, lse, delta, gq):
        tiles, rows = self._query_grid(self._tile["M"])
        parts = None
        if self.local:
            parts = torch.empty(2, tiles, *sk.shape, dtype=torch.float32, device=q.device)
        sinks = (sk, sv, self.sinks) if self.local else (q,) * 3
        partial = (parts[0], parts[1]) if parts is not None else (q, q)
        with _on(q):
            _backward_queries[(tiles, rows)](
                q, k, v, *sinks, *self._masks(q), grad, lse, delta, gq, *partial, *self._numbers(), rows,
                S=self._sink_rows, **self._flags(self._tile),
            )  # fmt: skip
        return parts

    def launch_backward_keys(self, q, k, v, grad, lse, delta, gk, gv):
        tile = self._tile["N"]
        tiles = -(-(self.first_slot + self.length) // tile) - self.first_slot // tile
        with _on(q):
            _backward_keys[(tiles, self.q_shape[0] * self.q_shape[1])](
                q, k, v, *self._masks(q), grad, lse, delta, gk, gv, *self._numbers(), **self._flags(self._tile)
            )


def _flags(real: Tensor | None, slots: int, stand_in: Tensor) -> Tensor:
    """The padding mask of the first `slots` slots as a kernel reads it, uint8; any tensor when nothing is padded."""
    return stand_in if real is None else real[:, :slots].contiguous().view(torch.uint8)


def _on(tensor: Tensor):
    """Launch on the tensor's GPU, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.no_grad()


def top_p_thresholds(
    index_q: Tensor, index_k: Tensor, real: Tensor | None, top_p: float, min_probability: float = 0.0
) -> Tensor:
    """`select.top_p_threshold` of all queries without their scores in memory: [B, U, T, d], [B, U, N, d] -> [B, U, T]."""
    batch, units, queries, dim = index_q.shape
    slots = index_k.shape[2]
    least = torch.empty(batch, units, queries, dtype=torch.float32, device=index_q.device)
    tile = {"M": 64, "N": 64 if top_p < 1.0 else 128, "num_warps": 4}
    m = tile["M"]
    grid = (-(-slots // m) - (slots - queries) // m, batch * units)
    with _on(index_q):
        _thresholds[grid](
            index_q, index_k, _flags(real, slots, index_q), least, queries, slots, units, top_p, min_probability,
            d=dim, PADDED=real is not None, STEP=STEP_NATS, STEPS=GRID_STEPS, SEARCH=top_p < 1.0,
            LOWEST=LOWEST, **tile,
        )  # fmt: skip
    return least


def _padded_index(index: Tensor) -> Tensor:
    """Index vectors with zeros up to a dimension that a tile product takes."""
    dim = max(LEAST_DOT, triton.next_power_of_2(index.shape[-1]))
    return F.pad(index.detach(), (0, dim - index.shape[-1])).contiguous()


def padded_sinks(sink_k: Tensor, sink_v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, H, s, D] and slots [B or 1, s] of sinks, up to as many (of slot -1) as a tile product takes."""
    pad = max(LEAST_DOT, triton.next_power_of_2(sinks.shape[1])) - sinks.shape[1]
    sink_k, sink_v = (F.pad(x, (0, 0, 0, pad)).contiguous() for x in (sink_k, sink_v))
    return sink_k, sink_v, F.pad(sinks, (0, pad), value=-1).to(torch.int32).contiguous()


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
    place: Place | None = None,
) -> Tensor:
    """`prefill.retrieval_attention`, same arguments and meaning; with a `place`, no gradients."""
    index = None
    if index_q is not None and index_k is not None and leaves_out(top_p, min_probability):
        index_q, index_k = _padded_index(index_q), _padded_index(index_k)
        tile_probability = 0.0 if needs_gradient(q, k, v) else tile_probability
        least = top_p_thresholds(index_q, index_k, real, top_p, tile_probability or min_probability)
        index = (index_q, index_k, least)
    call = _Call(
        q, length=k.shape[2], first_slot=0, window_tokens=window_tokens, scaling=scaling, real=real, sinks=sinks,
        index=index, heads_per_unit=heads_per_unit, heads=place.heads if place else None,
        rows=place.rows if place else None,
    )  # fmt: skip
    if index is not None and call.is_sink is not None and not needs_gradient(q, k, v):
        from .gather_kernels import retrieval_prefill

        return retrieval_prefill(
            q, k, v, index, heads=call.heads, rows=call.rows, out=place.out if place else None,
            heads_per_unit=heads_per_unit, is_sink=call.is_sink, window_tokens=window_tokens, scaling=scaling,
            real=call.real, by_tile=tile_probability > 0,
        )  # fmt: skip
    return _attend(q, k, v, None, None, call, place)


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
    place: Place | None = None,
) -> Tensor:
    """`prefill.window_attention`, same arguments and meaning; with a `place`, no gradients."""
    sink_k, sink_v, sinks = padded_sinks(sink_k, sink_v, sinks)
    call = _Call(
        q, length=k.shape[2], first_slot=first_slot, window_tokens=window_tokens, scaling=scaling, real=real,
        sinks=sinks, local=True, heads=place.heads if place else None,
        rows=place.rows if place else None,
    )  # fmt: skip
    return _attend(q, k, v, sink_k, sink_v, call, place)


@dataclass(frozen=True)
class Place:
    """Where a launch finds its heads in a layer's tensors, and where its result goes."""

    heads: tuple[int, ...]
    """Heads of q, in this order."""
    rows: tuple[int, ...]
    """Row of k and v that each of them reads."""
    out: Tensor
    """Contiguous, of q's shape; the other heads of it are left as they are."""
    group: int
    """Query heads that share a KV head, consecutive in q."""


def _attend(
    q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor | None, sink_v: Tensor | None, call: _Call, place: Place | None
) -> Tensor:
    if place is None:
        return _MaskedFlash.apply(q, k, v, sink_k, sink_v, call)[0]  # type: ignore[no-untyped-call]
    call.forward(q.contiguous(), k.contiguous(), v.contiguous(), sink_k, sink_v, place.out)
    return place.out
