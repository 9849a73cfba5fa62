"""Windows of local heads in flash-attn-4's kernel (Hopper, Blackwell); the sinks outside of them merged by log-sum-exp.

Its tiles follow the prompt's own begin: how a prompt was cut may change the last bits of a result, unlike in `kernels`.

Shapes: B batch, Hq query heads, G of them per KV head, T queries, L key slots of which the first is `first_slot`, D head
dimension, S sink slots. q's slots are the last T.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import LOG2E, Place, _add_sinks, _on, padded_sinks
from .reference import numbers

HEAD_DIMS = (64, 128, 256)
"""Head dimensions that its kernels for Hopper and Blackwell have tiles of their own for."""
LEAST_QUERIES = 1024
"""Fewer queries are left to our own kernel: it takes one launch, where every run of heads takes two here."""


@cache
def problem(head_dim: int) -> str:
    """Why flash-attn-4 cannot be used on this GPU at all, found once; "" when it can."""
    major, minor = torch.cuda.get_device_capability()
    if not 9 <= major <= 11:
        return f"the GPU's compute capability is {major}.{minor}, not Hopper's or Blackwell's 9.0 to 11.0"
    if head_dim not in HEAD_DIMS:
        return f"the head dimension is {head_dim}, not one of {', '.join(map(str, HEAD_DIMS))}"
    try:
        version("flash-attn-4")  # flash-attn 2 installs modules of the same names
        from flash_attn.cute.interface import flash_attn_func  # noqa: F401
    except PackageNotFoundError:
        return "it is not installed: pip install flash-attn-4"
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError) as error:
        return f"it cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def _runs(place: Place) -> list[tuple[int, int, int]]:
    """(first KV group of q, first row of k and v, groups): consecutive groups that read consecutive rows."""
    runs: list[tuple[int, int, int]] = []
    for pair in sorted({(head // place.group, row) for head, row in zip(place.heads, place.rows, strict=True)}):
        if runs and pair == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((*pair, 1))
    return runs


def fits(place: Place) -> bool:
    """Whether at least half of the heads that whole KV groups make are asked for; the others are computed in vain."""
    return 2 * len(place.heads) >= place.group * sum(groups for *_, groups in _runs(place))


@triton.jit
def _merge_sinks(
    p_q, p_near, p_lse, p_sk, p_sv, p_sinks, p_heads, p_out,
    queries, last, heads, group, first_head, near_heads, first_row, kv_heads, q_heads, window, scale,
    s_b, s_h, s_t, s_d,
    D: tl.constexpr, S: tl.constexpr, M: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """A tile of M queries of one head: attention inside the window and its log-sum-exp, the sinks outside of it added.

    near [B, T, near_heads, D] and lse [B, near_heads, T] begin with q's head `first_head`, whose keys are row `first_row`
    of sk and sv [B, kv_heads, S, D]; q has strides s_, out is a contiguous [B, q_heads, T, D].
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = row // heads
    head = tl.load(p_heads + row % heads).to(tl.int64)
    near = head - first_head
    o_t = tile.to(tl.int64) * M + tl.arange(0, M)
    m_q = o_t < queries
    o_q = last - queries + o_t
    o_d = tl.arange(0, D)
    b_q = tl.load(p_q + batch * s_b + head * s_h + o_t[:, None] * s_t + o_d * s_d, mask=m_q[:, None], other=0.0)
    acc = tl.load(p_near + ((batch * queries + o_t[:, None]) * near_heads + near) * D + o_d, mask=m_q[:, None], other=0.0)
    lse = tl.load(p_lse + (batch * near_heads + near) * queries + o_t, mask=m_q, other=0.0)
    kv_row = batch * kv_heads + first_row + near // group
    p_slots = p_sinks + (0 if ONE_ROW else batch) * S
    one, peak, acc = tl.full([M], 1.0, tl.float32), lse * 1.4426950408889634, acc.to(tl.float32)
    _, total, acc = _add_sinks(b_q, p_sk, p_sv, p_slots, kv_row, o_q, window, peak, one, acc, scale, D, S)
    o_out = ((batch * q_heads + head) * queries + o_t[:, None]) * D + o_d
    tl.store(p_out + o_out, (acc / total[:, None]).to(p_out.dtype.element_ty), mask=m_q[:, None])


def _merge_tile(head_dim: int) -> dict[str, int]:
    return {"M": 64, "num_warps": 4 if head_dim <= 64 else 8}


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
    place: Place,
) -> Tensor:
    """`kernels.window_attention` of the heads in `place`, same arguments and meaning; no padding, no gradients.

    Every run of consecutive KV groups is a call on views of q [B, Hq, T, D], k and v [B, Hkv, L, D]; heads of a group that
    are not in `place` are computed too and not written.
    """
    from flash_attn.cute.interface import flash_attn_func

    assert real is None
    batch, q_heads, queries, dim = q.shape
    sink_k, sink_v, sinks = padded_sinks(sink_k, sink_v, sinks)
    tile = _merge_tile(dim)
    for first_group, first_row, groups in _runs(place):
        first, count = first_group * place.group, groups * place.group
        heads = tuple(head for head in place.heads if first <= head < first + count)
        rows = slice(first_row, first_row + groups)
        with _on(q):
            # [B, T, heads, D], and natural log-sum-exps [B, heads, T]
            near, lse = flash_attn_func(
                q[:, first : first + count].transpose(1, 2), k[:, rows].transpose(1, 2), v[:, rows].transpose(1, 2),
                softmax_scale=scaling, causal=True, window_size=(window_tokens - 1, 0), return_lse=True,
            )  # fmt: skip
            _merge_sinks[(batch * len(heads), -(-queries // tile["M"]))](
                q, near, lse, sink_k, sink_v, sinks, numbers(heads, q.device), place.out,
                queries, first_slot + k.shape[2], len(heads), place.group, first, count, first_row, k.shape[1], q_heads,
                window_tokens, scaling * LOG2E, *q.stride(),
                D=dim, S=sinks.shape[1], ONE_ROW=sinks.shape[0] == 1, **tile,
            )  # fmt: skip
    return place.out
