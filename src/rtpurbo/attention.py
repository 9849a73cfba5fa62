"""The sparse forward of an attention module, shared by all families: prefill, decode and training.

Six steps: project; rotate; index; remember; attend (each head by its role); project back. Short sequences, at most
the layer's shortest window + sinks, take the dense path of Transformers' SDPA with identical results;
`dense_below_tokens` and `dense_end_tokens` extend it.

Shapes: B batch, T new tokens, N slots so far, Hq query heads, Hkv KV heads, D head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from . import ops
from .cache import KeyValues, SparseLayer, sparse_layer, split_heads
from .config import SparseConfig
from .heads import HeadMap
from .indexer import LayerIndexer, stored_keys
from .ops.reference import visible_slots

IMPLEMENTATION = "rtpurbo"
Recorder = Callable[["Observed"], None]


@dataclass
class Observed:
    """What a recorder is shown once per layer and forward pass."""

    layer: int
    q_pre: Tensor
    """[B, Hq, T, D] before RoPE, after q_norm"""
    k_pre: Tensor
    """[B, Hkv, T, D] before RoPE, after k_norm"""
    q: Tensor
    """[B, Hq, T, D] after RoPE"""
    k: Tensor
    """[B, Hkv, T, D] after RoPE"""
    v: Tensor
    """[B, Hkv, T, D]"""
    scaling: float


@dataclass
class LayerState:
    """A converted layer's roles, settings and (optionally) recorder; held by the attention module while attached."""

    layer: int
    heads: HeadMap
    config: SparseConfig
    qk_norm: bool
    recorder: Recorder | None = None
    reading: bool = False
    """Whether what is read begins a prompt that goes on; see `attach.reading`."""
    dense_ends: list[list[tuple[int, int]]] = field(default_factory=list)
    """For each document of a batch the slots (first, stop) that all heads read densely; see `attach.read_densely`."""
    retrieval: list[int] = field(init=False)
    local: list[int] = field(init=False)
    full_kv: list[int] = field(init=False)
    local_kv: list[int] = field(init=False)
    kv_rows: tuple[int, ...] = field(init=False)
    """Full KV heads, then local ones."""
    head_units: tuple[int, ...] = field(init=False)
    """Index unit of every query head, -1 for local ones."""
    windows: tuple[int, ...] = field(init=False)
    """Window of every KV head in tokens."""

    def __post_init__(self) -> None:
        heads, size = self.heads, self.heads.group_size
        self.retrieval = list(heads.retrieval_heads(self.layer))
        self.local = [h for h in range(heads.query_heads) if h not in self.retrieval]
        self.full_kv = list(heads.full_kv_heads(self.layer))
        self.local_kv = [g for g in range(heads.kv_heads) if g not in self.full_kv]
        self.kv_rows = (*self.full_kv, *self.local_kv)
        units = {h: i // heads.heads_per_unit for i, h in enumerate(self.retrieval)}
        self.head_units = tuple(units.get(h, -1) for h in range(heads.query_heads))
        self.group_size = size
        self.windows = heads.kv_windows(self.layer, self.config.window_tokens)

    def new_cache_layer(self) -> SparseLayer:
        """An empty cache layer for these roles."""
        return SparseLayer(
            full_heads=self.full_kv,
            local_heads=self.local_kv,
            window_tokens=max((self.windows[g] for g in self.local_kv), default=self.config.window_tokens),
            sink_tokens=self.config.sink_tokens,
        )


def mask_interface(*, attention_mask: Tensor | None = None, kv_length: int = 0, local_size: int | None = None, **kw):
    """Mask for Transformers' mask registry: [B, N] padding or None for converted layers, SDPA's for sliding ones."""
    if local_size is not None:
        return sdpa_mask(attention_mask=attention_mask, kv_length=kv_length, local_size=local_size, **kw)
    if kw.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise ValueError("Packed sequences and custom masks are not supported by a sparse model; pass one document a row.")
    if attention_mask is None or bool(attention_mask[:, :kv_length].all()):
        return None
    return attention_mask[:, :kv_length]


def sparse_forward(
    self: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    past_key_values: Cache | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Forward of a converted attention module: hidden states [B, T, hidden] -> ([B, T, hidden], None).

    Args:
        attention_mask: [B, N] bool padding mask, False for padding, or None (see `mask_interface`).
        cache: a DynamicCache, or None; `past_key_values` before Transformers 5.24.
    """
    state: LayerState = self.rtpurbo  # type: ignore[assignment]
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError("A sparse model takes a 2D attention mask [batch, tokens]; custom 4D masks are not supported.")
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    projections: Any = (self.q_proj, self.k_proj, self.v_proj)
    q_pre, k_pre, v = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
    if state.qk_norm:
        q_pre, k_pre = self.q_norm(q_pre), self.k_norm(k_pre)  # type: ignore[operator]
    rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb
    rotated = rotate(q_pre, k_pre, *position_embeddings)  # type: ignore[misc]
    q, k = (x.to(v.dtype) for x in rotated)  # autocast rounds products only, and the kernels take one dtype
    if state.recorder is not None:
        state.recorder(Observed(state.layer, q_pre, k_pre, q, k, v, self.scaling))  # type: ignore[arg-type]

    indexer: LayerIndexer | None = self._modules.get("rtpurbo_indexer")  # type: ignore[assignment]
    selects = indexer is not None and state.config.selects
    index_k = stored_keys(indexer.project_keys(k_pre), state.config.index_dtype, k.dtype) if selects else None  # type: ignore[union-attr]

    whole = cache if cache is not None else past_key_values
    layer = None if whole is None else sparse_layer(whole, state.layer, state.new_cache_layer)
    if layer is not None:
        layer.append(k, v, index_k, attention_mask)
    length = layer.get_seq_length() if layer is not None else k.shape[2]
    real = None if attention_mask is None else attention_mask[:, :length]
    below = length < state.config.dense_below_tokens
    short = length <= min(state.windows) + state.config.sink_tokens
    end = state.config.dense_end_tokens if layer is not None else 0  # a document without a cache is no prompt
    prompt = q.shape[2] > 1 and (layer is None or layer.in_prompt)  # of which nothing is dropped yet
    goes_on = bool(end) and state.reading
    view, whole_prefill = None, prompt and (below or (length <= end and not goes_on))
    if short or whole_prefill or (not state.local and not selects):
        k_all, v_all = layer.all_heads() if layer is not None else (k, v)
        if short or (real is None and q.shape[2] in (1, length)):  # a small mask or none
            mask = _dense_mask(q.shape[2], length, real, q.device)
            dropout = self.attention_dropout if self.training else 0.0
            out, _ = sdpa_attention_forward(self, q, k_all, v_all, mask, dropout=dropout, scaling=self.scaling)  # type: ignore[arg-type]
            out = out.transpose(1, 2)
        else:
            out = ops.dense_attention(q, k_all, v_all, scaling=self.scaling, real=real)  # type: ignore[arg-type]
    else:
        view = layer.view(real) if layer is not None else split_heads(k, v, index_k, state.new_cache_layer(), real)
        index_q = indexer.project_queries(q_pre).to(k.dtype) if selects and not below else None  # type: ignore[union-attr]
        attend = _decode if q.shape[2] == 1 and not torch.is_grad_enabled() else _prefill
        out = attend(q, view, index_q, state, self.scaling, real)  # type: ignore[arg-type]
        if layer is None and any(state.dense_ends):
            out = out.clone()
            for i, ends in enumerate(state.dense_ends):
                for first, stop in ends:
                    some = q[i, None, :, first:stop], k[i, None, :, :stop], v[i, None, :, :stop]
                    out[i, None, :, first:stop] = ops.dense_attention(*some, scaling=self.scaling)  # type: ignore[arg-type]
        if layer is not None and end and prompt and not goes_on:
            last = ops.dense_attention(q[:, :, -end:], *layer.all_heads(), scaling=self.scaling, real=real)  # type: ignore[arg-type]
            out = torch.cat([out[:, :, : -last.shape[2]], last], 2)
    if layer is not None and not (whole_prefill or goes_on):  # the next piece of the prompt may be dense too
        layer.drop(real, view)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None  # type: ignore[operator]


def _dense_mask(queries: int, length: int, real: Tensor | None, device: torch.device) -> Tensor | None:
    """[B or 1, 1, T, N] bool as Transformers' SDPA takes it, or None where its causal flag does."""
    if real is None and (queries == 1 or queries == length):
        return None
    slots = torch.arange(length, device=device)
    return visible_slots(slots[length - queries :], slots, real)


def _prefill(q: Tensor, kv: KeyValues, index_q: Tensor | None, state: LayerState, scaling: float, real: Tensor | None):
    """Attend with many queries: [B, Hq, T, D] -> [B, Hq, T, D]."""
    return ops.prefill_attention(
        q,
        kv.full_k,
        kv.full_v,
        kv.local_k,
        kv.local_v,
        kv.sink_k,
        kv.sink_v,
        index_q,
        kv.index_k.to(index_q.dtype) if index_q is not None and kv.index_k is not None else None,  # float8 fits exactly
        kv_rows=state.kv_rows,
        head_units=state.head_units,
        first_slot=kv.first_slot,
        sinks=kv.sinks,
        window_tokens=state.windows,
        top_p=state.config.top_p,
        min_probability=state.config.min_probability,
        tile_probability=state.config.tile_probability,
        scaling=scaling,
        real=real,
    )


def _decode(q: Tensor, kv: KeyValues, index_q: Tensor | None, state: LayerState, scaling: float, real: Tensor | None):
    """Attend with one query per sequence: [B, Hq, 1, D] -> [B, Hq, 1, D]."""
    out = ops.decode_attention(
        q[:, :, 0].unflatten(1, (-1, state.group_size)),
        kv.full_k,
        kv.full_v,
        kv.local_k,
        kv.local_v,
        kv.sink_k,
        kv.sink_v,
        None if index_q is None else index_q[:, :, 0],
        kv.index_k if index_q is not None else None,
        kv_rows=state.kv_rows,
        head_units=state.head_units,
        slots=kv.full_k.shape[2] if state.full_kv else kv.first_slot + kv.local_k.shape[2],
        sinks=kv.sinks,
        window_tokens=state.windows,
        top_p=state.config.top_p,
        min_probability=state.config.min_probability,
        scaling=scaling,
        real=real,
    )
    return out.flatten(1, 2)[:, :, None]
