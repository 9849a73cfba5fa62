"""Other ways to read less in decode, as baselines: `with rival(model, "quest", budget_tokens=1024) as reads: ...`

Quality baselines: what a method would not read is masked, not moved, so nothing here is faster than the dense model. A
prompt is prefilled alone, whole, with an empty cache; decode takes one token a sequence, in a left-padded batch if need be.
Greedy decoding or sampling only: a cache is neither cropped nor reordered. Layers that are left as they are (sliding
windows) stay so and are not counted.

- razor: retrieval heads read everything, others sinks and window (RazorAttention, H. Tang et al., 2024); budget ignored.
- window: every head reads sinks and window, budget_tokens in all (StreamingLLM, G. Xiao et al., 2023).
- top_k: our heads and our index, but each query selects just budget_tokens far tokens.
- quest: dense prefill; decode reads pages by an upper bound of their logits (Quest, J. Tang et al., 2024).
- snapkv: dense prefill; decode reads the budget_tokens of the prompt that its last 32 queries attended to most, and all
  that came after it (SnapKV, Y. Li et al., 2024).

Bytes are counted in *tokens*, one being a key and a value (2 D numbers) of one KV head.

Shapes: B batch, T new tokens, N slots so far, Hq query heads, Hkv KV heads, G = Hq / Hkv, D head dimension, U index units,
d index dimension, P pages.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rtpurbo.attach import attached
from rtpurbo.attention import LayerState, sparse_forward
from rtpurbo.config import SparseConfig
from rtpurbo.families import attention_layers, head_counts
from rtpurbo.heads import HeadMap
from rtpurbo.indexer import stored_keys
from rtpurbo.ops.prefill import dense_attention, prefill_attention, workspace_elements
from rtpurbo.ops.reference import gather_slots, index_scores, near_slots, pick_heads, sink_slots, visible_slots

METHODS = ("razor", "window", "top_k", "quest", "snapkv")
SINK_TOKENS = 4
"""Sinks of `window`, part of its budget."""
PAGE_TOKENS = 16
QUEST_DENSE_LAYERS = 2
"""The first layers of a model, which Quest leaves dense."""
OBSERVATION_TOKENS = 32
"""Queries at the end of a prompt by which SnapKV chooses."""
POOLING_TOKENS = 7
ELEMENT_BYTES = 2
"""Of a key's or value's number, beside float8 index keys."""
PIECE_ELEMENTS = 1 << 26
"""Mask elements of a piece of `top_k`'s prefill, at most: some hundred megabytes with scores and SDPA's own copy."""


@dataclass
class Reads:
    """What decode read, over what dense decode reads. A decode step is one new token after a prompt."""

    _sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    _count: int = 0

    def add(self, read: Tensor, real_tokens: Tensor) -> None:
        """Count a step of a layer: tokens read [B, Hkv], of `real_tokens` [B] that dense attention reads."""
        ratio = (read.double() / real_tokens[:, None]).sum()
        self._sum = self._sum.to(ratio.device) + ratio
        self._count += read.numel()

    @property
    def bytes_ratio(self) -> float:
        """Mean over steps, sequences, layers and KV heads; NaN before the first step."""
        return float(self._sum) / self._count if self._count else float("nan")


class NotedLayer(DynamicLayer):
    """A dense cache layer with notes about its tokens, [B, H, N, n]: top_k's index keys, or which tokens SnapKV keeps."""

    notes: Tensor | None = None

    def note(self, new: Tensor) -> Tensor:
        """Add the notes of new tokens [B, H, T, n]; all notes so far."""
        self.notes = new if self.notes is None else torch.cat([self.notes, new], 2)
        return self.notes

    def joined(self, others: list[NotedLayer], pads: list[int]) -> NotedLayer:
        """One layer with the sequences of this one and of `others`, behind so many zeros each (this one's first)."""
        made, layers = NotedLayer(), [self, *others]
        made.lazy_initialization(self.keys, self.values)  # type: ignore[arg-type]
        for name in ("keys", "values", "notes") if self.notes is not None else ("keys", "values"):
            rows = [F.pad(getattr(layer, name), (0, 0, pad, 0)) for layer, pad in zip(layers, pads, strict=True)]
            setattr(made, name, torch.cat(rows))
        return made


@dataclass
class Rival:
    """One method on one model."""

    method: str
    budget_tokens: int
    reads: Reads


@contextmanager
def rival(
    model: Any,
    method: str,
    *,
    budget_tokens: int,
    heads: HeadMap | None = None,
    indexer: nn.ModuleDict | dict[str, Tensor] | None = None,
    config: SparseConfig | None = None,
) -> Iterator[Reads]:
    """Run a dense model by one of METHODS inside the `with` block; it is as it was after it.

    Args:
        budget_tokens: what a KV head may read in a decode step, in tokens (see `budget_for`); for `top_k` the far tokens
            that a query selects; ignored by `razor`.
        heads, config: roles, window and sinks of `razor` and `top_k`. What `config` says about selection is not used; the
            last `dense_end_tokens` of a prompt are read densely by `razor`, `window` and `top_k` too.
        indexer: of `top_k`, modules or tensors as `attach` takes them.

    Yields:
        Reads: from the masks that attention got; for `razor` and `window` from roles, window and length of every step.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if method in ("razor", "top_k") and (heads is None or config is None):
        raise ValueError(f"{method} needs heads and config, those of an artefact.")
    if method == "top_k" and (indexer is None or budget_tokens < 0):
        raise ValueError(f"top_k needs an indexer and a budget of 0 or more tokens, got {budget_tokens}.")
    if method == "snapkv" and budget_tokens <= OBSERVATION_TOKENS:
        raise ValueError(f"snapkv needs a budget of more than {OBSERVATION_TOKENS} tokens, got {budget_tokens}.")
    if method == "window":
        end = config.dense_end_tokens if config is not None else 0
        config = SparseConfig(window_tokens=budget_tokens - SINK_TOKENS, sink_tokens=SINK_TOKENS, dense_end_tokens=end)
    if method not in ("razor", "top_k"):
        layers, query_heads, kv_heads, _ = head_counts(model)
        which = list(attention_layers(model))
        heads = HeadMap.uniform(layers=which, num_layers=layers, query_heads=query_heads, kv_heads=kv_heads, dense=False)
    assert heads is not None
    spec = Rival(method, budget_tokens, Reads())
    forward = _counted_forward if method in ("razor", "window") else _masked_forward
    with attached(model, heads, config or SparseConfig(), indexer if method == "top_k" else None):
        for module in attention_layers(model).values():
            module.forward = partial(forward, module, spec)  # detaching restores what was there before
        yield spec.reads


def _row_tokens(real: Tensor | None, batch: int, slots: int, device: torch.device) -> Tensor:
    """[B] real tokens of every sequence."""
    return torch.full((batch,), slots, device=device) if real is None else real[:, :slots].sum(1)


def _counted_forward(module: Any, spec: Rival, hidden_states: Tensor, *args, **kwargs):
    """The sparse forward of the product, whose reads follow from roles, window and length."""
    state: LayerState = module.rtpurbo
    whole = kwargs.get("cache") if kwargs.get("cache") is not None else kwargs.get("past_key_values")
    before = 0 if whole is None else whole.get_seq_length(state.layer)
    if before and hidden_states.shape[1] == 1:
        tokens = _row_tokens(kwargs.get("attention_mask"), len(hidden_states), before + 1, hidden_states.device)
        near = torch.tensor(state.windows, device=tokens.device) + state.config.sink_tokens
        near[state.full_kv] = before + 1  # dense
        spec.reads.add(torch.minimum(near, tokens[:, None]), tokens)
    return sparse_forward(module, hidden_states, *args, **kwargs)


@torch.no_grad()
def _masked_forward(
    module: Any,
    spec: Rival,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    cache: DynamicCache | None = None,
    past_key_values: DynamicCache | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Forward of an attention module by `top_k`, `quest` or `snapkv`; arguments as for `sparse_forward`."""
    state: LayerState = module.rtpurbo
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    q_pre, k_pre, v = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
    if state.qk_norm:
        q_pre, k_pre = module.q_norm(q_pre), module.k_norm(k_pre)
    q, k = sys.modules[type(module).__module__].apply_rotary_pos_emb(q_pre, k_pre, *position_embeddings)
    whole = cache if cache is not None else past_key_values
    layer = None if whole is None else _noted_layer(whole, state.layer)
    before = 0 if layer is None else layer.get_seq_length()
    if (before and q.shape[2] > 1) or (not before and attention_mask is not None):
        raise ValueError("A rival takes a prompt whole and without padding, then one token at a time.")
    if layer is not None:
        k, v = layer.update(k, v)
    index_q = index_k = None
    if "rtpurbo_indexer" in module._modules:
        index_q = module.rtpurbo_indexer.project_queries(q_pre).to(k.dtype)
        index_k = stored_keys(module.rtpurbo_indexer.project_keys(k_pre), state.config.index_dtype, k.dtype).to(k.dtype)
        index_k = index_k if layer is None else layer.note(index_k)
    if before:
        real = None if attention_mask is None else attention_mask[:, : k.shape[2]].bool()
        out = _decode(spec, state, q, k, v, index_q, index_k, real, layer, module.scaling)
    elif spec.method == "top_k":
        out = _top_k_prefill(spec, state, q, k, v, index_q, index_k, module.scaling)
    else:
        out = sdpa_attention_forward(module, q, k, v, None, scaling=module.scaling)[0].transpose(1, 2)
        if spec.method == "snapkv" and layer is not None:
            layer.note(snapkv_kept(q, k, spec.budget_tokens, module.scaling)[..., None])
    return module.o_proj(out.transpose(1, 2).flatten(2)), None


def _noted_layer(cache: DynamicCache, index: int) -> NotedLayer:
    """Layer `index` of a cache, a NotedLayer in place of an empty dynamic one."""
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[index]
    if isinstance(layer, NotedLayer):
        return layer
    if type(layer) is not DynamicLayer or layer.get_seq_length():
        raise ValueError(f"A rival needs a new DynamicCache; its layer {index} is a {type(layer).__name__} in use.")
    cache.layers[index] = NotedLayer()
    return cache.layers[index]  # type: ignore[return-value]


def _decode(
    spec: Rival,
    state: LayerState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor | None,
    index_k: Tensor | None,
    real: Tensor | None,
    layer: Any,
    scaling: float,
) -> Tensor:
    """Attention of one query a sequence, and the count of what it read: q [B, Hq, 1, D] -> [B, Hq, 1, D]."""
    batch, kv_heads, slots, head_dim = k.shape
    tokens = _row_tokens(real, batch, slots, k.device)
    groups = q[:, :, 0].unflatten(1, (kv_heads, -1))  # [B, Hkv, G, D]
    more: Tensor = tokens.new_zeros(1, 1)  # what is read beside keys and values, in tokens [B or 1, Hkv or 1]
    if spec.method == "top_k":
        keep = top_k_keep(spec.budget_tokens, state, tokens.new_tensor([slots - 1]), slots, index_q, index_k, real)
        keep = keep.expand(batch, -1, -1, -1)[:, :, 0].unflatten(1, (kv_heads, -1))
        more = _index_tokens(spec.budget_tokens, state, tokens, head_dim)
    elif spec.method == "quest" and state.layer >= QUEST_DENSE_LAYERS:
        keep, more = quest_keep(groups, k, tokens, spec.budget_tokens)
    elif spec.method == "snapkv":
        keep = layer.note(layer.notes.new_ones(batch, kv_heads, 1, 1)).transpose(2, 3)
    else:
        keep = torch.ones(batch, kv_heads, 1, slots, dtype=torch.bool, device=k.device)
    if real is not None:
        keep = keep & real[:, None, None]
    spec.reads.add(keep.any(2).sum(-1) + more, tokens)
    out = F.scaled_dot_product_attention(groups, k, v, attn_mask=keep, scale=scaling)
    return out.flatten(1, 2)[:, :, None]


# top_k


def top_k_keep(
    budget_tokens: int,
    state: LayerState,
    q_slots: Tensor,
    slots: int,
    index_q: Tensor | None,
    index_k: Tensor | None,
    real: Tensor | None,
) -> Tensor:
    """[B or 1, Hq, T, N] bool: window and sinks, and for retrieval heads what `top_k_chosen` says. Arguments as there, and

    Args:
        slots: N.
        index_q, index_k: None in a layer without retrieval heads.
    """
    k_slots = torch.arange(slots, device=q_slots.device)
    visible, sinks = visible_slots(q_slots, k_slots, real), sink_slots(real, state.config.sink_tokens, device=q_slots.device)
    near = torch.cat([visible & near_slots(q_slots, k_slots, sinks, window) for window in state.windows], 1)
    keep = near.repeat_interleave(state.group_size, 1)
    if index_q is None or index_k is None:
        return keep
    chosen = top_k_chosen(budget_tokens, state, q_slots, index_q, index_k, real)
    keep = keep.expand(len(chosen), -1, -1, -1).clone()
    keep[:, state.retrieval] = chosen.repeat_interleave(state.heads.heads_per_unit, 1)
    return keep


def top_k_chosen(
    budget_tokens: int, state: LayerState, q_slots: Tensor, index_q: Tensor, index_k: Tensor, real: Tensor | None
) -> Tensor:
    """[B, U, T, N] bool: window and sinks, and the `budget_tokens` far tokens that score highest.

    Among equal scores (equal tokens have them in the first layer) it is left open which are taken.

    Args:
        q_slots: [T].
        index_q, index_k: [B, U, T, d] and [B, U, N, d].
        real: [B, N] bool, False for padding; None when nothing is padded.
    """
    k_slots = torch.arange(index_k.shape[2], device=q_slots.device)
    visible, sinks = visible_slots(q_slots, k_slots, real), sink_slots(real, state.config.sink_tokens, device=q_slots.device)
    near = visible & near_slots(q_slots, k_slots, sinks, state.config.window_tokens)
    scores = index_scores(index_q, index_k).masked_fill(near | ~visible, -torch.inf)
    best = scores.topk(min(budget_tokens, len(k_slots)), -1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)  # of few far ones: others too
    return near | (chosen & visible)


def _top_k_prefill(
    spec: Rival,
    state: LayerState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor | None,
    index_k: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attention of a whole prompt by `top_k_chosen`: q [B, Hq, T, D] -> [B, Hq, T, D]. Windows by the product's kernels,
    retrieval heads in pieces of queries with a mask."""
    slots, config = k.shape[2], state.config
    sinks = sink_slots(None, min(config.sink_tokens, slots), device=q.device)
    out = prefill_attention(
        q, k[:, :0], v[:, :0], k, v, gather_slots(k, sinks), gather_slots(v, sinks), None, None,
        kv_rows=tuple(range(k.shape[1])), head_units=(-1,) * q.shape[1], first_slot=0, sinks=sinks,
        window_tokens=state.windows, top_p=1.0, scaling=scaling,
    )  # fmt: skip
    if index_q is not None and index_k is not None:
        rows = [head // state.group_size for head in state.retrieval]
        far_q, far_k, far_v = pick_heads(q, state.retrieval), pick_heads(k, rows), pick_heads(v, rows)
        size = max(1, min(PIECE_ELEMENTS, workspace_elements(q.device)) // (q.shape[0] * len(rows) * slots))
        for start in range(0, slots, size):
            stop = min(start + size, slots)  # no query of this piece sees further
            q_slots, seen = torch.arange(start, stop, device=q.device), index_k[:, :, :stop]
            keep = top_k_chosen(spec.budget_tokens, state, q_slots, index_q[:, :, start:stop], seen, None)
            keep = keep.repeat_interleave(state.heads.heads_per_unit, 1)
            part = far_q[:, :, start:stop], far_k[:, :, :stop], far_v[:, :, :stop]
            out[:, state.retrieval, start:stop] = F.scaled_dot_product_attention(*part, attn_mask=keep, scale=scaling)
    if end := min(config.dense_end_tokens, slots):
        return torch.cat([out[:, :, :-end], dense_attention(q[:, :, -end:], k, v, scaling=scaling)], 2)
    return out


def _index_share(config: SparseConfig, head_dim: int) -> float:
    """Bytes of an index key over those of a key and a value."""
    return config.index_bytes(ELEMENT_BYTES) / (2 * head_dim * ELEMENT_BYTES)


def _index_tokens(budget_tokens: int, state: LayerState, tokens: Tensor, head_dim: int) -> Tensor:
    """[B, Hkv] what reading every unit's index keys costs, in tokens; they are read where they leave something out."""
    units = state.heads.units(state.layer)
    each = torch.tensor([units.count(g) for g in range(state.heads.kv_heads)], device=tokens.device)
    leaves_out = tokens - state.config.window_tokens - state.config.sink_tokens > budget_tokens
    return (tokens * leaves_out)[:, None] * each * _index_share(state.config, head_dim)


# Quest


def quest_bounds(k: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest number of every page in every dimension, [B, Hkv, P, D] each.

    Args:
        k: [B, Hkv, N, D] after RoPE, every sequence from slot 0 on and `tokens` [B] long; a page behind it gets inf, -inf.
    """
    past = torch.arange(k.shape[2], device=k.device) >= tokens[:, None]  # [B, N]
    pad = (0, 0, 0, -k.shape[2] % PAGE_TOKENS)
    parts = (F.pad(k.masked_fill(past[:, None, :, None], end), pad, value=end) for end in (torch.inf, -torch.inf))
    low, high = (x.unflatten(2, (-1, PAGE_TOKENS)) for x in parts)
    return low.amin(3), high.amax(3)


def quest_scores(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """[B, Hkv, P] greatest q.k that any key of a page could have with any of a group's queries [B, Hkv, G, D]."""
    q, low, high = q.float(), low.float(), high.float()
    bound = q.clamp(min=0) @ high.transpose(-1, -2) + q.clamp(max=0) @ low.transpose(-1, -2)
    return bound.amax(2)


def quest_keep(q: Tensor, k: Tensor, tokens: Tensor, budget_tokens: int) -> tuple[Tensor, Tensor]:
    """What a group reads (Quest, section 3.3): ([B, Hkv, 1, N] bool, bounds read, in tokens [B, 1]).

    The bounds of a page cost as much as one token, so (budget_tokens - P) / 16 pages are left; the last one is always read.
    A sequence within the budget is read whole, without bounds.

    Args:
        q, k: [B, Hkv, G, D] and [B, Hkv, N, D] after RoPE, the last `tokens` [B] slots of each sequence being real.
    """
    slots, pages = k.shape[2], -(-tokens // PAGE_TOKENS)
    place = torch.arange(slots, device=k.device)
    first = slots - tokens[:, None]
    moved = (place + first).clamp(max=slots - 1)[:, None, :, None]
    low, high = quest_bounds(k.gather(2, moved.expand_as(k)), tokens)
    page = torch.arange(low.shape[2], device=k.device)
    scores = quest_scores(q, low, high).masked_fill((page >= pages[:, None])[:, None], -torch.inf)
    scores = scores.masked_fill((page == pages[:, None] - 1)[:, None], torch.inf)
    whole = budget_tokens >= tokens
    count = torch.where(whole, pages, ((budget_tokens - pages) // PAGE_TOKENS).clamp(min=1))
    rank = scores.argsort(stable=True, dim=-1, descending=True).argsort(-1)
    chosen = rank < count[:, None, None]
    position = place - first  # [B, N] of every slot in its sequence, below 0 for padding
    of_page = (position.clamp(min=0) // PAGE_TOKENS)[:, None].expand(-1, k.shape[1], -1)
    keep = chosen.gather(2, of_page) & (position >= 0)[:, None]
    return keep[:, :, None], torch.where(whole, 0, pages)[:, None]


# SnapKV


def snapkv_kept(q: Tensor, k: Tensor, budget_tokens: int, scaling: float) -> Tensor:
    """[B, Hkv, N] bool: the tokens of a prompt that a KV head keeps (SnapKV, section 4).

    Its last 32 tokens, and of the others those with most attention from these 32 queries, summed over them and the group's
    heads, then averaged over 7 neighbours.

    Args:
        q, k: [B, Hq, N, D] and [B, Hkv, N, D] of the prompt after RoPE.
    """
    slots = k.shape[2]
    kept = torch.ones(*k.shape[:3], dtype=torch.bool, device=k.device)
    if slots <= budget_tokens:
        return kept
    older = slots - OBSERVATION_TOKENS
    groups = q[:, :, older:].unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, 32, D]
    logits = (groups @ k[:, :, None].transpose(-1, -2)).float() * scaling
    place = torch.arange(slots, device=k.device)
    mass = logits.masked_fill(place > place[older:, None], -torch.inf).softmax(-1).sum((2, 3))[..., :older]
    mass = F.avg_pool1d(mass, POOLING_TOKENS, stride=1, padding=POOLING_TOKENS // 2)
    kept[..., :older] = False
    return kept.scatter_(2, mass.topk(budget_tokens - OBSERVATION_TOKENS, -1).indices, True)


# Equal bytes


def our_read_ratio(heads: HeadMap, config: SparseConfig, length_tokens: int, far_ratio: float, head_dim: int) -> float:
    """Bytes that a decode step of our sparse model reads over those of a dense one: `Reads.bytes_ratio`, by arithmetic.

    Every unit reads an index key of every token. Several units on one KV head (granularity "head") are taken to select
    different tokens, so that there it is an upper bound.

    Args:
        far_ratio: mean share of the far tokens that a unit selects.
    """
    ratios = []
    for layer in heads.layers:
        units = heads.units(layer)
        for head, window in enumerate(heads.kv_windows(layer, config.window_tokens)):
            far, count = max(0, length_tokens - window - config.sink_tokens), units.count(head)
            read = length_tokens - far + min(1.0, count * far_ratio) * far
            read += count * length_tokens * _index_share(config, head_dim) if far else 0
            ratios.append(read / length_tokens)
    return sum(ratios) / len(ratios)


def budget_for(
    method: str, heads: HeadMap, config: SparseConfig, length_tokens: int, far_ratio: float, head_dim: int
) -> int:
    """The budget_tokens with which a method reads as much as our sparse model does at this length.

    Quest pays for its dense layers out of the same bytes. `razor` takes no budget (0) and reads more.
    """
    ratio = our_read_ratio(heads, config, length_tokens, far_ratio, head_dim)
    if method == "razor":
        return 0
    if method == "top_k":
        return round(far_ratio * max(0, length_tokens - config.window_tokens - config.sink_tokens))
    if method == "quest":
        layers, dense = len(heads.layers), sum(layer < QUEST_DENSE_LAYERS for layer in heads.layers)
        ratio = max(0.0, (ratio * layers - dense) / max(1, layers - dense))
    return round(ratio * length_tokens)
