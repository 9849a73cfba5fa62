"""Triton kernels of `decode`: a layer's decode step in two launches, whatever the roles of its heads.

1. `_score`: index scores of all tokens, rounded down to the grid (int16), and for every split of the keys their softmax's
   sum and, for top-p, a histogram of them. The last split of a unit to finish adds these up and finds the threshold
   (`select.top_p_threshold`).
2. `_attend`: near splits (the window; the first one takes the sinks too) and far splits (selected tokens: compacted, then
   gathered) of every KV head, all query heads of its group together, so that keys and values are read once. The last
   split of a KV head to finish combines them by their log-sum-exp.

From Hopper on the second launch starts while the first one runs, and its far splits wait for the scores. Nothing is copied
to the host and all shapes are static, so that a CUDA graph may hold both launches.

Shapes: B batch, Hkv KV heads, of which the first F *rows* are full and the others local, G query heads of each, N key
slots, D head dimension, U index units, d index dimension. Keys lie contiguous per head, or in pages.
Names in kernels: p_ pointers, b_ tiles, o_ offsets, m_ masks, s_ strides; batch, row and unit as int64 in addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .kernels import LEAST_DOT, LOG2E, _add_tile, _flags, _on, gpu
from .reference import windows_by_head
from .select import GRID_STEPS, STEP_NATS, leaves_out

UNSEEN = -32768
"""Grid score of a slot that the query does not see."""
SCORE_TILE = 1024
"""Tokens whose index keys one program loads at once."""
FAR_TILE = 2048
"""Tokens whose selection one program compacts at once."""
NEAR_TOKENS = 256
"""Tokens of the window a program attends to: all of them are read, so few enough to fill a GPU."""
KEY_TILE = 64
"""Tokens of one tile product."""
PARTS = 16
"""Results of splits that one program combines, in two rounds where there are more: at most PARTS * PARTS splits of a row."""
HELD_VALUES = 16384
"""Values of such results that it loads at once."""
PROGRAMS = 528
"""Programs that a launch is cut into, if there is work for so many: four for each of an H100's 132 multiprocessors."""


@triton.jit
def _merged(
    p_counts, p_tops, p_mass, first, count, PARTS: tl.constexpr, STEPS: tl.constexpr, LOWEST: tl.constexpr,
    STEP: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """(best grid score, mass relative to it, histogram below it) of `count` splits that other programs wrote, past the L1
    cache."""
    o_p, o_s = tl.arange(0, PARTS), tl.arange(0, STEPS)
    m_p = o_p < count
    tops = tl.load(p_tops + first + o_p, mask=m_p, other=LOWEST, cache_modifier=".cg")
    best = tl.max(tops, 0)
    parts = tl.load(p_mass + first + o_p, mask=m_p, other=0.0, cache_modifier=".cg")
    mass = tl.sum(parts * tl.exp(STEP * (tops - best).to(tl.float32)), 0)
    counts = tl.zeros([STEPS], tl.int32)
    if SEARCH:
        place = o_s[None, :] - (best - tops)[:, None]
        p_part = p_counts + (first + o_p)[:, None] * STEPS + place
        counts = tl.sum(tl.load(p_part, mask=m_p[:, None] & (place >= 0), other=0, cache_modifier=".cg"), 0)
    return best, mass, counts


@triton.jit
def _index_values(b_ik):
    """Index keys in float32: of any float dtype, or e4m3 codes as uint8, taken apart by integers. Those are float16 but for
    their bias, subnormal numbers too, once sign and exponent are in their places."""
    if b_ik.dtype == tl.uint8:
        b_code = b_ik.to(tl.int16)
        b_half = (((b_code & 0x80) << 8) | ((b_code & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return tl.where((b_code & 0x7F) == 0x7F, float("nan"), b_half.to(tl.float32) * 256.0)
    return b_ik.to(tl.float32)


@triton.jit
def _slot_offset(o_k, p_table, first_slot, s_page, s_n, PAGE: tl.constexpr):
    """Offset of slots in one head's keys: contiguous from `first_slot` on, or in the pages of a block table."""
    if PAGE:
        page = tl.load(p_table + o_k // PAGE).to(tl.int64)
        return page * s_page + (o_k % PAGE).to(tl.int64) * s_n
    return (o_k - first_slot).to(tl.int64) * s_n


@triton.jit(do_not_specialize=["slots", "splits"])
def _score(
    p_iq, p_ik, p_real, p_lengths, p_table, p_bins, p_counts, p_tops, p_mass, p_arrived, p_least,
    units, slots, width, span, splits, table_width, top_p, min_probability, s_kb, s_ku, s_kn, s_page,
    d: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    PADDED: tl.constexpr, RAGGED: tl.constexpr, LOWEST: tl.constexpr, OVERLAP: tl.constexpr, SEARCH: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Grid scores of `span` tokens of one unit, their softmax's sum and, for top-p, their histogram; the last one to finish
    finds the unit's threshold."""
    if OVERLAP:
        gdc_launch_dependents()
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, unit = row // units, row % units
    length = slots
    if RAGGED:
        length = tl.load(p_lengths + batch)
    o_d = tl.arange(0, D)
    b_iq = tl.load(p_iq + row * d + o_d, mask=o_d < d, other=0.0).to(tl.float32)
    begin = split * span
    stop = tl.minimum(begin + span, length)
    p_keys = p_ik + batch * s_kb + unit * s_ku
    top = tl.full([], LOWEST, tl.int32)
    mass = tl.zeros([], tl.float32)
    for start in range(begin, stop, TILE):
        o_k = start + tl.arange(0, TILE)
        m_k = o_k < stop
        m_ik = m_k[:, None]
        if d < D:
            m_ik = m_ik & (o_d < d)[None, :]
        if PAGE:
            o_n = _slot_offset(tl.where(m_k, o_k, begin), p_table + batch * table_width, 0, s_page, s_kn, PAGE)
        else:
            o_n = o_k.to(tl.int64) * s_kn
        b_ik = _index_values(tl.load(p_keys + o_n[:, None] + o_d, mask=m_ik, other=0.0))
        scores = tl.sum(b_ik * b_iq[None, :], 1)
        bins = tl.minimum(tl.maximum(tl.floor(scores / STEP), LOWEST + 1.0), -(LOWEST + 1.0)).to(tl.int32)
        m_seen = m_k
        if PADDED:
            b_real = tl.load(p_real + batch * slots + o_k, mask=m_k, other=0)
            m_seen = m_k & ((b_real != 0) | (o_k == length - 1))
        bins = tl.where(m_seen, bins, LOWEST)
        tl.store(p_bins + row * width + o_k, bins.to(tl.int16))  # unmasked, so in whole vectors: rows are wide enough
        higher = tl.maximum(top, tl.max(bins, 0))
        weights = tl.exp(tl.where(m_seen, scores - STEP * higher.to(tl.float32), float("-inf")))
        mass = mass * tl.exp(STEP * (top - higher).to(tl.float32)) + tl.sum(weights, 0)
        top = higher
    o_s = tl.arange(0, STEPS)
    counts = tl.zeros([STEPS], tl.int32)
    if SEARCH:
        tl.debug_barrier()
        for start in range(begin, stop, TILE):
            o_k = start + tl.arange(0, TILE)
            bins = tl.load(p_bins + row * width + o_k).to(tl.int32)
            below = top - bins
            counts += tl.histogram(below, STEPS, mask=(bins > LOWEST) & (below < STEPS))
    sets = (splits + PARTS - 1) // PARTS
    mine = split // PARTS
    place = row * (splits + sets)  # splits, then sets of them
    if SEARCH:
        tl.store(p_counts + (place + split) * STEPS + o_s, counts)
    tl.store(p_tops + place + split, top)
    tl.store(p_mass + place + split, mass)
    tl.debug_barrier()
    p_count = p_arrived + row * (PARTS + 1)
    its = tl.minimum(splits - mine * PARTS, PARTS)
    if tl.atomic_add(p_count + 1 + mine, 1) == its - 1:
        best, total, merged = _merged(
            p_counts, p_tops, p_mass, place + mine * PARTS, its, PARTS, STEPS, LOWEST, STEP, SEARCH
        )
        tl.store(p_count + 1 + mine, 0)
        last = sets == 1
        if sets > 1:
            if SEARCH:
                tl.store(p_counts + (place + splits + mine) * STEPS + o_s, merged)
            tl.store(p_tops + place + splits + mine, best)
            tl.store(p_mass + place + splits + mine, total)
            tl.debug_barrier()
            last = tl.atomic_add(p_count, 1) == sets - 1
            if last:
                best, total, merged = _merged(
                    p_counts, p_tops, p_mass, place + splits, sets, PARTS, STEPS, LOWEST, STEP, SEARCH
                )
                tl.store(p_count, 0)
        if last:
            least = tl.full([], LOWEST, tl.int32)
            if SEARCH:
                kept = merged.to(tl.float32) * tl.exp(-STEP * o_s.to(tl.float32))
                short = tl.cumsum(kept, 0) < top_p * tl.sum(kept, 0)
                least = best - tl.minimum(tl.sum(short.to(tl.int32), 0), STEPS - 1)
            if min_probability > 0:
                nats = tl.log(min_probability * tl.maximum(total, 1e-20))  # above the best step
                least = tl.maximum(least, best + tl.ceil(nats / STEP).to(tl.int32))
            tl.store(p_least + row, tl.minimum(least, best - 1))


@triton.jit
def _store_part(p_ml, p_acc, part, peak, total, acc, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr):
    """Write one unnormalised result: base-2 peak, total and sum of values of every head."""
    o_g, o_d = tl.arange(0, HEADS), tl.arange(0, D)
    m_g = o_g < G
    o_part = part * G + o_g
    tl.store(p_ml + o_part * 2, peak, mask=m_g)
    tl.store(p_ml + o_part * 2 + 1, total, mask=m_g)
    tl.store(p_acc + o_part[:, None] * D + o_d, acc, mask=m_g[:, None] & (peak > float("-inf"))[:, None])


@triton.jit
def _combined(p_ml, p_acc, first, count, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Sum of `count` results that other programs wrote, past the L1 cache; AT_ONCE of them do not wait for each other."""
    o_p, o_g, o_d = tl.arange(0, AT_ONCE), tl.arange(0, HEADS), tl.arange(0, D)
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, D], tl.float32)
    for begin in range(0, count, AT_ONCE):
        o_part = (first + begin + o_p)[:, None] * G + o_g[None, :]
        m_part = (begin + o_p < count)[:, None] & (o_g < G)[None, :]
        peaks = tl.load(p_ml + o_part * 2, mask=m_part, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(p_ml + o_part * 2 + 1, mask=m_part, other=0.0, cache_modifier=".cg")
        values = tl.load(
            p_acc + o_part[:, :, None] * D + o_d[None, None, :], mask=m_part[:, :, None], other=0.0, cache_modifier=".cg"
        )
        higher = tl.maximum(peak, tl.max(peaks, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        keep, share = tl.exp2(peak - base), tl.exp2(peaks - base[None, :])
        total = total * keep + tl.sum(share * totals, 0)
        values = tl.where((peaks > float("-inf"))[:, :, None], values, 0.0)  # else nobody wrote them
        acc = acc * keep[:, None] + tl.sum(share[:, :, None] * values, 0)
        peak = higher
    return peak, total, acc


@triton.jit(do_not_specialize=["slots", "first_slot", "near", "far"])
def _attend(
    p_q, p_k, p_v, p_lk, p_lv, p_sk, p_sv, p_sinks, p_bins, p_least, p_list, p_heads, p_row_units, p_head_units,
    p_windows, p_lengths, p_real, p_table, p_local_table, p_acc, p_ml, p_arrived, p_out,
    rows, full_rows, units, slots, width, first_slot, near, far, span, sink_count, table_width, scale,
    s_kb, s_kh, s_kn, s_lb, s_lh, s_ln, s_page, s_local_page,
    D: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    NEAR: tl.constexpr, FAR: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, AT_ONCE: tl.constexpr, PAGE: tl.constexpr,
    SELECT: tl.constexpr, PADDED: tl.constexpr, RAGGED: tl.constexpr, ONE_ROW: tl.constexpr, LOWEST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One split of one row (KV head) for all its query heads; the last one to finish combines the row's splits."""
    pid, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    is_near, is_far = pid < rows * near, pid >= rows * near
    beyond = pid - rows * near
    row = tl.where(is_near, pid // near, beyond // tl.maximum(far, 1)).to(tl.int64)
    split = tl.where(is_near, pid % near, near + beyond % tl.maximum(far, 1))
    is_full = row < full_rows
    length = slots
    if RAGGED:
        length = tl.load(p_lengths + batch)
    edge = tl.maximum(length - tl.load(p_windows + row), 0)  # near splits beyond a shorter window find nothing
    head = tl.load(p_heads + row).to(tl.int64)
    o_g, o_d, o_t = tl.arange(0, GROUP), tl.arange(0, D), tl.arange(0, T)
    m_g = o_g < G
    p_here = p_q + (batch * rows + head) * G * D + o_g[:, None] * D + o_d
    b_q = tl.load(p_here, mask=m_g[:, None], other=0.0)
    s_n, s_pg = tl.where(is_full, s_kn, s_ln), tl.where(is_full, s_page, s_local_page)
    origin = tl.where(is_full, 0, first_slot)
    if is_full:
        o_base = batch * s_kb + row * s_kh
        p_keys, p_values, p_pages = p_k + o_base, p_v + o_base, p_table + batch * table_width
    else:
        o_base = batch * s_lb + (row - full_rows) * s_lh
        p_keys, p_values, p_pages = p_lk + o_base, p_lv + o_base, p_local_table + batch * table_width
    peak = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    acc = tl.zeros([GROUP, D], tl.float32)
    o_sink = tl.arange(0, S)
    p_sinks += tl.where(ONE_ROW, 0, batch * sink_count)
    b_unit = tl.load(p_head_units + row * G + o_g, mask=o_g < tl.where(is_full, G, 0), other=-1).to(tl.int64)
    m_here = m_g & (b_unit >= tl.where(is_near, -1, 0))
    b_flag = tl.zeros([GROUP], tl.int32)  # of each head's unit
    if SELECT and R > 1:
        for r in tl.static_range(R):
            b_flag = tl.where(b_unit == tl.load(p_row_units + tl.where(is_full, row, 0) * R + r), r, b_flag)
    p_chosen = p_list + (batch * full_rows + row) * width
    if is_near & (split == 0):
        b_sinks = tl.load(p_sinks + o_sink, mask=o_sink < sink_count, other=-1)
        m_old = (b_sinks >= 0) & (b_sinks < edge)
        if is_full | (PAGE > 0):
            o_n = _slot_offset(tl.maximum(b_sinks, 0), p_pages, 0, s_pg, s_n, PAGE)
            b_k = tl.load(p_keys + o_n[:, None] + o_d, mask=m_old[:, None], other=0.0)
            b_v = tl.load(p_values + o_n[:, None] + o_d, mask=m_old[:, None], other=0.0)
        else:
            o_n = ((batch * (rows - full_rows) + row - full_rows) * sink_count + o_sink) * D
            b_k = tl.load(p_sk + o_n[:, None] + o_d, mask=m_old[:, None], other=0.0)
            b_v = tl.load(p_sv + o_n[:, None] + o_d, mask=m_old[:, None], other=0.0)
        peak, total, acc = _add_tile(b_q, b_k, b_v, m_old[None, :] & m_g[:, None], peak, total, acc, scale)
    if OVERLAP:  # noqa: SIM102
        if is_far:
            gdc_wait()  # for the scores; the window needs none
    start = tl.where(is_near, edge + split * NEAR, (split - near) * span)
    stop = tl.where(is_near, tl.minimum(start + NEAR, length), tl.minimum(start + span, edge))
    for round in range(0, stop - start, FAR):
        begin = start + round
        count = tl.minimum(stop - begin, FAR)
        if is_far:
            o_c = (split - near) * span + round + tl.arange(0, FAR)  # begin, in a form that is seen to be aligned
            m_c = o_c < stop
            m_any = m_c
            marked = o_c  # the slot, and in the highest bits the units that selected it
            if SELECT:
                m_any = o_c < 0
                for r in tl.static_range(R):
                    unit = tl.load(p_row_units + row * R + r).to(tl.int64)
                    if unit >= 0:
                        least = tl.load(p_least + batch * units + unit)
                        bins = tl.load(p_bins + (batch * units + unit) * width + o_c).to(tl.int32)
                        m_unit = m_c & (bins >= least) & (bins > LOWEST)
                        m_any = m_any | m_unit
                        if R > 1:
                            marked = marked | (m_unit.to(tl.int32) << (32 - R + r))
            elif PADDED:
                m_any = m_any & (tl.load(p_real + batch * slots + o_c, mask=m_c, other=0) != 0)
            for i in range(sink_count):  # the first near split has them
                m_any = m_any & (o_c != tl.load(p_sinks + i))
            chosen = m_any.to(tl.int32)
            count = tl.sum(chosen, 0)
            tl.store(p_chosen + begin + tl.cumsum(chosen, 0) - 1, marked, mask=m_any)
            tl.debug_barrier()
        for first in range(0, count, T):
            o_i = first + o_t
            m_k, m_near, m_far = o_i < count, o_i < tl.where(is_near, count, 0), o_i < tl.where(is_near, 0, count)
            entry = tl.load(p_chosen + begin + o_i, mask=m_far, other=0)
            o_k = entry
            if SELECT and R > 1:
                o_k = entry & ((1 << (32 - R)) - 1)
            o_k = tl.where(m_near, begin + o_i, tl.where(m_far, o_k, start))
            o_n = _slot_offset(o_k, p_pages, origin, s_pg, s_n, PAGE)
            b_k = tl.load(p_keys + o_n[:, None] + o_d, mask=m_k[:, None], other=0.0)
            b_v = tl.load(p_values + o_n[:, None] + o_d, mask=m_k[:, None], other=0.0)
            if PADDED:
                b_real = tl.load(p_real + batch * slots + o_k, mask=m_near, other=1)
                m_k = m_k & ((b_real != 0) | (o_k == length - 1))
            m_tile = m_k[None, :] & m_here[:, None]
            if SELECT and R > 1:  # a row of several units: each head takes its own unit's tokens
                m_unit = ((entry[None, :] >> (32 - R + b_flag)[:, None]) & 1) != 0
                m_tile = m_tile & (m_near[None, :] | m_unit)
            peak, total, acc = _add_tile(b_q, b_k, b_v, m_tile, peak, total, acc, scale)
    parts = tl.where(is_full, near + far, near)
    sets = (parts + PARTS - 1) // PARTS
    mine = split // PARTS
    place = (batch * rows + row) * (near + far + PARTS)  # splits, then sets of them
    _store_part(p_ml, p_acc, place + split, peak, total, acc, G, D, GROUP)
    tl.debug_barrier()
    p_count = p_arrived + (batch * rows + row) * (PARTS + 1)
    its = tl.minimum(parts - mine * PARTS, PARTS)
    if tl.atomic_add(p_count + 1 + mine, 1) == its - 1:
        its_peak, its_total, its_acc = _combined(p_ml, p_acc, place + mine * PARTS, its, G, D, HEADS, AT_ONCE)
        tl.store(p_count + 1 + mine, 0)
        last = sets == 1
        if sets > 1:
            _store_part(p_ml, p_acc, place + near + far + mine, its_peak, its_total, its_acc, G, D, HEADS)
            tl.debug_barrier()
            last = tl.atomic_add(p_count, 1) == sets - 1
            if last:
                its_peak, its_total, its_acc = _combined(p_ml, p_acc, place + near + far, sets, G, D, HEADS, AT_ONCE)
                tl.store(p_count, 0)
        if last:
            its_acc = its_acc / tl.where(its_total > 0, its_total, 1.0)[:, None]
            o_h = tl.arange(0, HEADS)
            p_there = p_out + (batch * rows + head) * G * D + o_h[:, None] * D + o_d
            tl.store(p_there, its_acc.to(p_out.dtype.element_ty), mask=(o_h < G)[:, None])


@dataclass(frozen=True)
class _Roles:
    """Head roles of a layer on the device, int32."""

    heads: Tensor
    """[Hkv] KV head of every row"""
    row_units: Tensor
    """[F, R] units of every full row, -1 for none"""
    head_units: Tensor
    """[F, G] unit of every query head of a full row, -1 for local ones"""
    windows: Tensor
    """[Hkv] window of every row in tokens"""


@lru_cache(maxsize=4096)
def _roles(
    kv_rows: tuple[int, ...], full_rows: int, head_units: tuple[int, ...], windows: tuple[int, ...], device: torch.device
) -> _Roles:
    group = len(head_units) // len(kv_rows)
    per_row = [head_units[g * group : (g + 1) * group] for g in kv_rows[:full_rows]]
    distinct = [sorted({u for u in row if u >= 0}) for row in per_row]
    most = max(map(len, distinct), default=1)
    padded = [[*row, *[-1] * (most - len(row))] for row in distinct]
    with torch.inference_mode(False):

        def tensor(values: Any, *shape: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device).reshape(shape)

        return _Roles(
            tensor(kv_rows, len(kv_rows)), tensor(padded, full_rows, most), tensor(per_row, full_rows, group),
            tensor([windows[head] for head in kv_rows], len(kv_rows)),
        )  # fmt: skip


@lru_cache(maxsize=64)
def _counters(device: torch.device, count: int, kernel: str) -> Tensor:
    """Zeros of one kernel, which every launch leaves as zeros. Its launches must follow each other on one stream."""
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.int32, device=device)


def _cut(length: int, tile: int, most: int) -> tuple[int, int]:
    """(span, splits): `length` tokens in at most `most` splits of whole tiles."""
    tiles = max(1, -(-length // tile))
    span = -(-tiles // max(1, min(most, tiles)))
    return span * tile, -(-tiles // span)


def _overlaps(device: torch.device) -> bool:
    """Whether the second launch may start before the first one ends (programmatic dependent launch, Hopper on)."""
    return device.type == "cuda" and gpu(device)[0] >= (9, 0)


def _reads_float8(device: torch.device) -> bool:
    """Whether the GPU converts e4m3 itself (Ada and Hopper on). Others get the codes as bytes: exact too, and so the cache
    is as small on Ampere, whose compiler refuses the type; but several integer operations a number, which a million tokens
    would feel where memory is fast."""
    return device.type == "cuda" and gpu(device)[0] >= (8, 9)


def _width(slots: int) -> int:
    """Length of a row of grid scores or chosen slots: whole tiles of either kernel."""
    most = max(SCORE_TILE, FAR_TILE)
    return triton.cdiv(slots, most) * most


def thresholds(
    index_q: Tensor,
    index_k: Tensor,
    *,
    top_p: float,
    min_probability: float = 0.0,
    real: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Index scores of one query per sequence, in grid steps, and the least that is kept.

    Args:
        index_q: [B, U, d]; index_k: [B, U, N, d], the last dimension contiguous; keys may be float8 (e4m3).
        real: [B, N] bool, False for padding; the last slot always counts.
        lengths: [B] int32 slots in use of each sequence; None for all.

    Returns:
        [B, U, N] int16 (undefined beyond a sequence's length), [B, U] int32.
    """
    bins, least, _ = _launch_score(index_q, index_k, top_p, min_probability, real, lengths)
    return bins[..., : index_k.shape[2]], least


def _launch_score(
    index_q: Tensor, index_k: Tensor, top_p: float, min_probability: float, real: Tensor | None, lengths: Tensor | None,
    table: Tensor | None = None, slots: int = 0,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """(grid scores in whole tiles, thresholds, what the launch works on: to be kept until no other one runs beside it)."""
    batch, units, dim = index_q.shape
    strides = (*index_k.stride()[:3], 0) if table is None else (0, index_k.stride(2), index_k.stride(1), index_k.stride(0))
    page, slots = (0, index_k.shape[2]) if table is None else (index_k.shape[1], slots)
    device = index_q.device
    if index_k.dtype == torch.float8_e4m3fn and not _reads_float8(device):
        index_k = index_k.view(torch.uint8)
    span, splits = _cut(slots, SCORE_TILE, min(max(1, PROGRAMS // (batch * units)), PARTS**2))
    sets = -(-splits // PARTS)
    width = _width(slots)
    bins = torch.empty(batch, units, width, dtype=torch.int16, device=device)
    search = top_p < 1.0
    counts = torch.empty(batch, units, splits + sets, GRID_STEPS if search else 0, dtype=torch.int32, device=device)
    tops = torch.empty(batch, units, splits + sets, dtype=torch.int32, device=device)
    mass = torch.empty(batch, units, splits + sets, dtype=torch.float32, device=device)
    least = torch.empty(batch, units, dtype=torch.int32, device=device)
    index_q, flags = index_q.contiguous(), _flags(real, slots, least)
    with _on(index_q):
        _score[(splits, batch * units)](
            index_q, index_k, flags, least if lengths is None else lengths, least if table is None else table, bins, counts,
            tops, mass, _counters(device, batch * units * (PARTS + 1), "score"), least, units, slots, width, span, splits,
            0 if table is None else table.shape[1], top_p, min_probability, *strides,
            d=dim, D=triton.next_power_of_2(dim), TILE=SCORE_TILE, PARTS=PARTS, STEP=STEP_NATS, STEPS=GRID_STEPS,
            PADDED=real is not None, RAGGED=lengths is not None, LOWEST=UNSEEN, OVERLAP=_overlaps(device), SEARCH=search,
            PAGE=page, num_warps=8,
        )  # fmt: skip
    return bins, least, (index_q, flags, counts, tops, mass)


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
    lengths: Tensor | None = None,
    block_tables: tuple[Tensor, Tensor] | None = None,
    index_table: Tensor | None = None,
) -> Tensor:
    """`decode.decode_attention`, same arguments and meaning, and for serving:

    Args:
        lengths: [B] int32 slots in use of each sequence, its query's own slot the last; None for all `slots`. With it, local
            keys must be in pages.
        block_tables: for full and for local rows, [B, pages] int32; keys and values are then [pages, page, rows, D] and
            sinks lie in their pages (`sink` is not read). Pages of local rows outside window and sinks are never read.
        index_table: [B, pages] int32; index keys are then [pages, page, U, d].
    """
    batch, rows, group, dim = q.shape
    device = q.device
    page, tables = 0, (sinks, sinks)
    if block_tables is not None:
        page, tables = (full_k if full_k.numel() else local_k).shape[1], block_tables
        if tables[0].shape != tables[1].shape:
            raise ValueError(f"Block tables must have one shape, got {tuple(tables[0].shape)}, {tuple(tables[1].shape)}.")
    full_rows = full_k.shape[2 if page else 1]
    if lengths is not None and full_rows < rows and not page:
        raise ValueError("Sequences of different lengths need local keys in pages; pass block_tables.")
    for k, v in ((full_k, full_v), (local_k, local_v)):
        if k.stride() != v.stride() or k.stride(-1) != 1:
            raise ValueError(
                f"Keys and values need one layout with a contiguous head dimension, got strides {k.stride()}, {v.stride()}."
            )
    windows = windows_by_head(window_tokens, rows)
    window_tokens = max(windows)
    roles = _roles(kv_rows, full_rows, head_units, windows, device)
    units = max(head_units) + 1
    far_tokens = max(0, slots - window_tokens) if full_rows else 0
    select = index_k is not None and leaves_out(top_p, min_probability) and far_tokens > 0
    per_row = roles.row_units.shape[1] if full_rows else 1
    if select and per_row > 1 and slots > 1 << (32 - per_row):
        raise ValueError(f"{per_row} selections in one KV group allow at most {1 << (32 - per_row)} tokens, got {slots}.")
    near_tokens = max(NEAR_TOKENS, triton.next_power_of_2(-(-min(window_tokens, slots) * 2 // PARTS**2)))
    near = -(-min(window_tokens, slots) // near_tokens)
    span, far = 0, 0
    if far_tokens:
        most = min(max((PROGRAMS - rows * near) // (batch * full_rows), 16), PARTS**2 - near)
        span, far = _cut(far_tokens, FAR_TILE, most)
    width = _width(slots)
    chosen = torch.empty(batch, full_rows, width if far else 0, dtype=torch.int32, device=device)
    acc = torch.empty(batch, rows, near + far + PARTS, group, dim, dtype=torch.float32, device=device)
    ml = torch.empty(batch, rows, near + far + PARTS, group, 2, dtype=torch.float32, device=device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    heads, overlap = triton.next_power_of_2(group), select and _overlaps(device)
    both = (full_k, local_k)
    strides = [(0, x.stride(2), x.stride(1)) if page else x.stride()[:3] for x in both]
    q, sink_k, sink_v, flags = q.contiguous(), sink_k.contiguous(), sink_v.contiguous(), _flags(real, slots, sinks)
    arrived = _counters(device, batch * rows * (PARTS + 1), "attend")
    bins = least = roles.heads
    held: tuple[Tensor, ...] = ()
    if select:  # nothing may be launched, or given the memory of `held`, between this launch and the next: they overlap
        assert index_q is not None
        assert index_k is not None
        bins, least, held = _launch_score(index_q, index_k, top_p, min_probability, real, lengths, index_table, slots)
    with _on(q):
        _attend[(rows * near + full_rows * far, batch)](
            q, full_k, full_v, local_k, local_v, sink_k, sink_v, sinks, bins, least,
            chosen, roles.heads, roles.row_units, roles.head_units, roles.windows,
            sinks if lengths is None else lengths, flags, *tables, acc, ml, arrived, out,
            rows, full_rows, units, slots, width, slots - local_k.shape[2], near, far, span, sinks.shape[1],
            tables[0].shape[1], scaling * LOG2E, *strides[0], *strides[1], full_k.stride(0), local_k.stride(0),
            D=dim, G=group, GROUP=max(LEAST_DOT, heads), HEADS=heads,
            AT_ONCE=max(1, min(PARTS, HELD_VALUES // (heads * dim))),
            S=max(LEAST_DOT, triton.next_power_of_2(sinks.shape[1])), R=per_row, NEAR=near_tokens, FAR=FAR_TILE,
            T=KEY_TILE, PARTS=PARTS, PAGE=page, SELECT=select, PADDED=real is not None,
            RAGGED=lengths is not None, ONE_ROW=sinks.shape[0] == 1, LOWEST=UNSEEN, OVERLAP=overlap, num_warps=4,
            **{"launch_pdl": True} if overlap else {},
        )  # fmt: skip
    del held
    return out
