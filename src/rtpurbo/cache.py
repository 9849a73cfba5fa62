"""The KV cache of a sparse layer: full for KV heads that serve retrieval, sinks + window for the others, index keys.

A `DynamicCache` is used as it is: on its first use each empty layer of a converted attention module is replaced by a
`SparseLayer`. As long as everything fits in window + sinks the layer holds all KV heads alike (the dense path); the
first token beyond splits it, and from then on local KV heads drop what no query will see again. All local KV heads of a
layer keep the longest of their windows.

Shapes: B batch, Hkv KV heads, N slots so far, D head dimension, U index units, d index dimension.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask

from .ops.reference import gather_slots, pick_heads, sink_slots

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What models, `generate` and their outputs call the cache; renamed in Transformers 5.24."""


class TokenBuffer:
    """Tokens [B, H, length, D] in one tensor that grows by an eighth, so that appending is cheap; its front can go."""

    def __init__(self, tokens: Tensor):
        self._data = tokens.contiguous()
        self._start, self._end = 0, tokens.shape[2]

    def __len__(self) -> int:
        return self._end - self._start

    @property
    def tokens(self) -> Tensor:
        """A view of the live tokens."""
        return self._data[:, :, self._start : self._end]

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return self._data.untyped_storage().nbytes()

    def append(self, new: Tensor) -> None:
        """Add tokens [B, H, T, D] at the end."""
        end = self._end + new.shape[2]
        if end > self._data.shape[2]:
            self._move(len(self) + new.shape[2])
            end = self._end + new.shape[2]
        self._data[:, :, self._end : end] = new
        self._end = end

    def keep_last(self, count: int) -> None:
        """Forget all but the last `count` tokens, and give memory back when a quarter or more of it lies idle."""
        self._start = max(self._start, self._end - count)
        if self._data.shape[2] > len(self) * 5 // 4 + 64:
            self._move(len(self))

    def map(self, function) -> None:
        """Replace the tensor by `function(tensor)`, which may change B only."""
        data = self._data
        if data.dtype.itemsize == 1:  # bytes: few operations know float8
            self._data = function(data.view(torch.uint8)).contiguous().view(data.dtype)
        else:
            self._data = function(data).contiguous()

    def _move(self, needed: int) -> None:
        live = self.tokens
        data = live.new_empty(*live.shape[:2], needed + needed // 8 + 16, live.shape[3])
        data[:, :, : live.shape[2]] = live
        self._data, self._start, self._end = data, 0, live.shape[2]


@dataclass
class KeyValues:
    """What attention reads: all slots for full KV heads, sinks and recent slots for local ones."""

    full_k: Tensor
    """[B, Hfull, N, D], rows as `HeadMap.full_kv_heads`"""
    full_v: Tensor
    local_k: Tensor
    """[B, Hlocal, N - first_slot, D]"""
    local_v: Tensor
    first_slot: int
    """Slot of local_k's first token."""
    sink_k: Tensor
    """[B, Hlocal, sink_tokens, D]"""
    sink_v: Tensor
    sinks: Tensor
    """[B or 1, sink_tokens] slots, -1 for none"""
    index_k: Tensor | None
    """[B, U, N, d], of the model's dtype or float8 (`SparseConfig.index_dtype`)"""


class SparseLayer(CacheLayerMixin):
    """Cache of one converted layer."""

    is_sliding = False
    is_compileable = False

    def __init__(self, *, full_heads: list[int], local_heads: list[int], window_tokens: int, sink_tokens: int):
        super().__init__()
        self.full_heads, self.local_heads = full_heads, local_heads
        self.window_tokens, self.sink_tokens = window_tokens, sink_tokens
        self.reset()

    def reset(self) -> None:
        """Empty the layer."""
        self._length = 0
        self.in_prompt = True
        """Whether all so far may belong to one prompt that is still read: `drop` was not due yet."""
        self._buffers: dict[str, TokenBuffer] = {}
        self._sinks: tuple[Tensor, Tensor, Tensor] | None = None  # keys, values, slots; set when the layer splits
        self.is_initialized = False

    @property
    def roles(self) -> tuple[list[int], int, int]:
        """What decides which tokens are kept: (full KV heads, window, sinks)."""
        return self.full_heads, self.window_tokens, self.sink_tokens

    @property
    def is_split(self) -> bool:
        """Whether local KV heads have begun to drop tokens."""
        return self._sinks is not None

    def append(self, k: Tensor, v: Tensor, index_k: Tensor | None, real: Tensor | None) -> None:
        """Add the keys and values [B, Hkv, T, D] and index keys [B, U, T, d] of new tokens.

        Args:
            real: [B, N] bool over all slots so far, these included; None when nothing is padded.
        """
        if index_k is not None and len(self._buffers.get("index_k", ())) != self._length:
            raise ValueError(
                "Some tokens of this cache have no index keys: they were written while everything was selected, or "
                "without an indexer. Start a new cache to select."
            )
        held = self._buffers["index_k"].tokens.dtype if index_k is not None and self._length else None
        if index_k is not None and held not in (None, index_k.dtype) and torch.float8_e4m3fn in (held, index_k.dtype):
            raise ValueError(
                f"The index keys of this cache are {held}, new ones {index_k.dtype}. "
                "Start a new cache after changing index_dtype."
            )
        new = {"index_k": index_k} if index_k is not None else {}
        if self.is_split:
            new |= {"full_k": pick_heads(k, self.full_heads), "full_v": pick_heads(v, self.full_heads)}
            new |= {"local_k": pick_heads(k, self.local_heads), "local_v": pick_heads(v, self.local_heads)}
            self._late_sinks(new["local_k"], new["local_v"], real)
        else:
            new |= {"k": k, "v": v}
        for name, tokens in new.items():
            if name in self._buffers:
                self._buffers[name].append(tokens)
            else:
                self._buffers[name] = TokenBuffer(tokens)
        self._length += k.shape[2]
        self.is_initialized = True

    def all_heads(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, N, D] of every KV head; only before the split."""
        return self._buffers["k"].tokens, self._buffers["v"].tokens

    def view(self, real: Tensor | None) -> KeyValues:
        """What attention over window, sinks and selected tokens reads."""
        index_k = self._buffers["index_k"].tokens if "index_k" in self._buffers else None
        if not self.is_split:
            return split_heads(*self.all_heads(), index_k, self, real)
        assert self._sinks is not None
        b = {name: buffer.tokens for name, buffer in self._buffers.items()}
        first = self._length - b["local_k"].shape[2]
        return KeyValues(b["full_k"], b["full_v"], b["local_k"], b["local_v"], first, *self._sinks, index_k)

    def drop(self, real: Tensor | None, view: KeyValues | None = None) -> None:
        """Forget what local KV heads cannot see any more; called after each attention, with what it read if at hand."""
        if self._length <= self.window_tokens + self.sink_tokens:
            return
        self.in_prompt = False
        if not self.local_heads:
            return
        if not self.is_split:
            self._split(view or self.view(real))
        for name in ("local_k", "local_v"):
            self._buffers[name].keep_last(self.window_tokens - 1)

    def _split(self, view: KeyValues) -> None:
        self._sinks = (view.sink_k.clone(), view.sink_v.clone(), view.sinks)
        del self._buffers["k"], self._buffers["v"]
        for name in ("full_k", "full_v", "local_k", "local_v"):
            self._buffers[name] = TokenBuffer(getattr(view, name))

    def _late_sinks(self, k: Tensor, v: Tensor, real: Tensor | None) -> None:
        """A row that had fewer real tokens than sinks when the layer split takes its missing sinks from new tokens."""
        assert self._sinks is not None
        sink_k, sink_v, sinks = self._sinks
        if real is None or not bool((sinks < 0).any()):
            return
        now = sink_slots(real, self.sink_tokens).expand(k.shape[0], -1)
        late = ((now >= self._length) & (sinks < 0))[:, None, :, None]
        place = torch.where(now >= self._length, now - self._length, -1)
        self._sinks = (
            torch.where(late, gather_slots(k, place), sink_k),
            torch.where(late, gather_slots(v, place), sink_v),
            now,
        )

    def nbytes(self) -> int:
        """Allocated bytes of keys, values, sinks and index keys."""
        held = sum(buffer.nbytes for buffer in self._buffers.values())
        return held + (sum(t.untyped_storage().nbytes() for t in self._sinks[:2]) if self._sinks else 0)

    def joined(self, others: list[SparseLayer], pads: list[int]) -> SparseLayer:
        """One layer of this and other unpadded sequences, each moved right by its number of `pads`; they are used up."""
        layers = [self, *others]
        if any(layer.is_split for layer in layers):
            for layer in layers:
                if not layer.is_split:
                    real = layer.all_heads()[0].new_ones(1, layer._length, dtype=torch.bool)
                    layer._split(layer.view(real))
            k, v, slots = zip(*(layer._sinks for layer in layers if layer._sinks is not None), strict=True)
            moved = [torch.where(s < 0, s, s + pad) for s, pad in zip(slots, pads, strict=True)]
        whole = SparseLayer(
            full_heads=self.full_heads,
            local_heads=self.local_heads,
            window_tokens=self.window_tokens,
            sink_tokens=self.sink_tokens,
        )
        whole._length, whole.is_initialized = self._length + pads[0], True
        whole._sinks = (torch.cat(k), torch.cat(v), torch.cat(moved)) if self.is_split else None
        for name in list(self._buffers):
            whole._buffers[name] = TokenBuffer(_padded([layer._buffers.pop(name).tokens for layer in layers]))
        return whole

    # What transformers' Cache asks of a layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: buffers are made by the first append."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Not for a sparse layer: it is filled by the sparse forward."""
        raise ValueError("This cache was filled by a sparse model and cannot be used by a dense one; start a new cache.")

    def get_seq_length(self) -> int:
        """Slots seen so far, dropped ones included."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(slots after the next `query_length`, 0): masks cover every slot, dropped ones included."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    get_max_cache_shape = get_max_length  # the name before Transformers 5.20

    def crop(self, *args, **kwargs) -> None:
        """Refused: dropped tokens cannot come back."""
        raise ValueError(
            "A sparse cache cannot be rolled back, which assisted and speculative decoding need; generate without it."
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beam search would copy the whole cache at every step."""
        raise ValueError("Beam search is not supported by the sparse cache; use num_beams=1 (greedy or sampling).")

    def _map(self, function) -> None:
        for buffer in self._buffers.values():
            buffer.map(function)
        if self._sinks is not None:
            k, v, slots = self._sinks
            self._sinks = (function(k), function(v), function(slots) if slots.shape[0] > 1 else slots)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` only."""
        self._map(lambda t: t[indices])

    def offload(self) -> None:
        """Refused: an offloaded cache is not supported."""
        raise ValueError("An offloaded cache is not supported by a sparse model; use the default cache.")

    prefetch = offload


def split_heads(k: Tensor, v: Tensor, index_k: Tensor | None, layer: SparseLayer, real: Tensor | None) -> KeyValues:
    """The view of keys and values [B, Hkv, N, D] that hold every head and slot."""
    sinks = sink_slots(real, layer.sink_tokens, device=k.device)
    local_k, local_v = pick_heads(k, layer.local_heads), pick_heads(v, layer.local_heads)
    return KeyValues(
        pick_heads(k, layer.full_heads),
        pick_heads(v, layer.full_heads),
        local_k,
        local_v,
        0,
        gather_slots(local_k, sinks),
        gather_slots(local_v, sinks),
        sinks,
        index_k,
    )


def sparse_layer(cache: Cache, layer_idx: int, new_layer) -> SparseLayer:
    """The cache's SparseLayer number `layer_idx`, made by `new_layer()` in place of an empty dynamic layer.

    ValueError for a cache that cannot hold one (static, quantised, offloaded, or filled by another model).
    """
    offloading = getattr(cache, "offloading", False)
    if not isinstance(cache, DynamicCache) or offloading:
        got = f"{type(cache).__name__}{' with offloading' if offloading else ''}"
        raise ValueError(
            f"A sparse model needs a transformers DynamicCache without offloading, got {got}. "
            f"Leave cache_implementation unset or pass {CACHE}=DynamicCache()."
        )
    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[layer_idx]
    empty = new_layer()
    held = layer.get_seq_length()
    if isinstance(layer, SparseLayer) and layer.roles == empty.roles:
        return layer
    if held > 0:
        by = "another head map, window or number of sinks" if isinstance(layer, SparseLayer) else "a dense model"
        raise ValueError(
            f"This cache was filled by {by}: its layer {layer_idx} holds {held} tokens already. Start a new cache."
        )
    if not isinstance(layer, SparseLayer) and type(layer) is not DynamicLayer:
        raise ValueError(
            f"Layer {layer_idx} of this cache is a {type(layer).__name__}; a sparse model needs a DynamicLayer there. "
            f"Pass {CACHE}=DynamicCache(config=model.config)."
        )
    cache.layers[layer_idx] = empty
    return empty


def _padded(parts: list[Tensor]) -> Tensor:
    """Tokens [B, H, length, D] of several batches as one, shorter ones moved to the right, zeros before them."""
    longest = max(part.shape[2] for part in parts)
    rows = [part.new_zeros(*part.shape[:2], longest, part.shape[3]) for part in parts]
    for row, part in zip(rows, parts, strict=True):
        row[:, :, longest - part.shape[2] :] = part
    return torch.cat(rows)


def join(caches: list[DynamicCache]) -> tuple[DynamicCache, Tensor]:
    """One left-padded cache of several of one unpadded sequence each, dense or sparse, which are used up.

    So that prompts of different lengths are read one by one, without padding, and decoded together.

    Returns:
        The cache, and the mask [sequences, slots] bool of its real tokens.

    Raises:
        ValueError: a layer of a kind that cannot be joined.
    """
    lengths = [cache.get_seq_length() for cache in caches]
    pads = [max(lengths) - length for length in lengths]
    whole = DynamicCache()
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        first, *others = layers
        if hasattr(first, "joined"):
            layer = first.joined(others, pads)
        elif type(first) is DynamicLayer:
            layer = DynamicLayer()
            layer.update(*(_padded([getattr(one, name) for one in layers]) for name in ("keys", "values")))
        else:
            raise ValueError(f"Caches with a {type(first).__name__} cannot be joined; make them by DynamicCache().")
        whole.layers.append(layer)
    slots = torch.arange(max(lengths))
    return whole, slots >= torch.tensor(pads)[:, None]


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache really holds: allocated keys, values, sinks and index keys of all layers, dense ones too."""
    total = 0
    layers: list[Any] = cache.layers
    for layer in layers:
        if isinstance(layer, SparseLayer):
            total += layer.nbytes()
        elif layer.get_seq_length() > 0:
            total += sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values))
    return total
