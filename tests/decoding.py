"""Calls of the decode op from whole keys and values, as a cache would make them."""

import torch
from torch import Tensor

from rtpurbo.ops.reference import gather_slots, sink_slots, windows_by_head


def split_roles(query_heads: int, kv_heads: int, retrieval: tuple[int, ...], unit_size: int):
    """(kv_rows, full rows, head_units) of a layer with these retrieval heads."""
    group = query_heads // kv_heads
    full = sorted({h // group for h in retrieval})
    units = {h: i // unit_size for i, h in enumerate(retrieval)}
    rows = (*full, *[g for g in range(kv_heads) if g not in full])
    return rows, len(full), tuple(units.get(h, -1) for h in range(query_heads))


def run_decode(
    op, q: Tensor, k: Tensor, v: Tensor, index_q, index_k, *,
    retrieval, unit_size, window, sink_tokens, top_p, real, scaling, spare=0,
) -> Tensor:  # fmt: skip
    """q [B, Hq, 1, D], k and v [B, Hkv, N, D], index [B, U, 1 or N, d] -> [B, Hq, 1, D].

    Args:
        window: one for all KV heads or one for each.
        spare: older local slots kept.
    """
    slots, kv_heads = k.shape[2], k.shape[1]
    rows, full, head_units = split_roles(q.shape[1], kv_heads, retrieval, unit_size)
    sinks = sink_slots(real, sink_tokens, device=q.device)
    first = max(0, slots - max(windows_by_head(window, kv_heads)) - spare)
    of_full, of_local = list(rows[:full]), list(rows[full:])
    out = op(
        q[:, :, 0].unflatten(1, (kv_heads, -1)),
        *(x[:, of_full] for x in (k, v)),
        *(x[:, of_local, first:] for x in (k, v)),
        *(gather_slots(x[:, of_local], sinks) for x in (k, v)),
        *((None, None) if index_q is None else (index_q[:, :, 0], index_k)),
        kv_rows=rows,
        head_units=head_units,
        slots=slots,
        sinks=sinks,
        window_tokens=window,
        top_p=top_p,
        scaling=scaling,
        real=real,
    )
    assert out.shape == (q.shape[0], kv_heads, q.shape[1] // kv_heads, q.shape[3])
    return out.flatten(1, 2)[:, :, None]


LAYERS = [  # query heads, KV heads, retrieval heads, unit size
    (6, 2, (), 1),  # only local heads
    (6, 2, (0, 1, 2, 3, 4, 5), 3),  # whole groups
    (6, 3, (4, 5), 2),  # one whole group, last
    (9, 3, (0, 6, 7), 1),  # single heads, beside local heads of their groups
    (4, 4, (1, 2), 1),  # no groups
]


def ladder(kv_heads: int, retrieval: tuple[int, ...], group: int, window: int) -> tuple[int, ...]:
    """A window for every KV head: `window` for full ones, the others' get shorter and shorter."""
    full = {h // group for h in retrieval}
    return tuple(window if head in full else max(1, window // (1 + 2 * head)) for head in range(kv_heads))


def attended(q, k, v, keep: Tensor, scaling: float) -> Tensor:
    """Plain attention under keep [B, Hq, 1, N], in the dtype of the inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    logits = (q @ k.mT).float() * scaling
    return logits.masked_fill(~keep, -torch.inf).softmax(-1).to(v.dtype) @ v
