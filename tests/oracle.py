"""Sparse attention said once more, without any code of ours: eager attention with a mask per head, top-p by sorting."""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "sparse_oracle"


def exact_smallest_set(scores: Tensor, top_p: float) -> Tensor:
    """[..., N] bool: the highest of `scores` until their softmax mass reaches p, in float64."""
    weights = scores.double().softmax(-1)
    order = weights.argsort(dim=-1, descending=True, stable=True)
    mass_before = weights.gather(-1, order).cumsum(-1) - weights.gather(-1, order)
    kept = mass_before < top_p
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


def selected(scores: Tensor, top_p: float, min_probability: float = 0.0) -> Tensor:
    """[..., N] bool: of scores rounded down to 1/16 nat, nothing 16 nats or more below the best counting, the exact
    smallest set with all that tie with its last member; of these, those whose grid step is as probable as asked for; and
    whatever lies one step below the best."""
    if top_p >= 1.0 and min_probability == 0.0:
        return scores.isfinite()
    grid = (scores.double() * 16).floor()
    best = grid.amax(-1, keepdim=True)
    counted = (grid / 16).masked_fill(best - grid >= 256, -torch.inf)
    last = grid.masked_fill(~exact_smallest_set(counted, top_p), torch.inf).amin(-1, keepdim=True)
    if top_p >= 1.0:
        last = torch.full_like(last, -torch.inf)
    probable = (grid / 16 - scores.double().logsumexp(-1, keepdim=True)).exp() >= min_probability
    return scores.isfinite() & (((grid >= last) & probable) | (grid >= best - 1))


def allowed(visible: Tensor, real: Tensor, heads, layer: int, config, query_heads: int) -> Tensor:
    """[B, Hq, N, N] bool: what local heads see, and for retrieval heads what they see when everything is selected."""
    length = real.shape[1]
    slot = torch.arange(length)
    nth_real = real.long().cumsum(-1)  # 1 for the first real token
    sink = real & (nth_real <= config.sink_tokens)
    windows = [config.window_tokens] * heads.kv_heads if heads.windows is None else heads.windows[layer]
    each = torch.tensor([windows[head // (query_heads // heads.kv_heads)] for head in range(query_heads)])
    near = (slot[:, None] - slot < each[:, None, None])[None] | sink[:, None, None]
    out = visible[:, None] & near
    for head in heads.retrieval[layer]:
        out[:, head] = visible
    return out


@contextmanager
def oracle(model, heads, config, indexer=None):
    """Inside the block `model` computes sparse attention the slow way; whole documents without a cache only."""
    inputs: dict[int, dict[str, Tensor]] = {}
    handles = []
    for module in model.modules():
        if not hasattr(module, "q_proj"):
            continue
        for short in ("q", "k"):
            source = getattr(module, f"{short}_norm", None) or getattr(module, f"{short}_proj")
            store = inputs.setdefault(module.layer_idx, {})
            handles.append(
                source.register_forward_hook(lambda _m, _i, out, store=store, short=short: store.update({short: out}))
            )

    def attend(module, q, k, v, mask, scaling, **kwargs):
        batch, query_heads, length, dim = q.shape
        group = query_heads // k.shape[1]
        slot = torch.arange(length)
        itself = slot[:, None] == slot
        if heads.retrieval[module.layer_idx] is None:
            who = mask | itself  # padding sees itself, so that no row is empty
        else:
            real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
            visible = (slot[:, None] >= slot) & (real[:, None] | itself)
            who = allowed(visible, real, heads, module.layer_idx, config, query_heads)
            name = str(module.layer_idx)
            if indexer is not None and name in indexer and config.selects:
                pre = inputs[module.layer_idx]
                pre_q, pre_k = (_tokens_first(pre[short], length, dim).float() for short in ("q", "k"))
                size = group if heads.granularity == "group" else 1
                chosen = heads.retrieval[module.layer_idx]
                local = allowed(visible, real, _nothing(heads), module.layer_idx, config, query_heads)
                for unit, first in enumerate(chosen[::size]):
                    unit_q = torch.cat([pre_q[:, :, h] for h in chosen[unit * size : (unit + 1) * size]], -1)
                    index_q = unit_q @ indexer[name].query[unit].T
                    index_k = pre_k[:, :, first // group] @ indexer[name].key[unit].T
                    if config.index_dtype == "float8":
                        index_k = index_k.to(torch.float8_e4m3fn).to(index_k.dtype)
                    scores = (index_q @ index_k.transpose(1, 2)).masked_fill(~visible, -torch.inf)
                    keep = selected(scores, config.top_p, config.min_probability) & visible
                    for h in chosen[unit * size : (unit + 1) * size]:
                        who[:, h] = local[:, h] | keep
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        weights = (q @ k.transpose(-1, -2) * scaling).masked_fill(~who, -math.inf).softmax(-1)
        return (weights @ v).transpose(1, 2), None

    def make_mask(*args, attention_mask=None, local_size=None, **kwargs):
        if local_size is None:
            return attention_mask
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        for handle in handles:
            handle.remove()


def _tokens_first(x: Tensor, length: int, dim: int) -> Tensor:
    """[B, T, H, D] from a projection's [B, T, H*D] or a norm's output in either order."""
    if x.ndim == 3:
        return x.view(*x.shape[:2], -1, dim)
    assert x.shape[1] != x.shape[2]  # else the order could not be told
    return x if x.shape[1] == length else x.transpose(1, 2)


def _nothing(heads):
    return dataclasses.replace(heads, retrieval=tuple(None if row is None else () for row in heads.retrieval))
