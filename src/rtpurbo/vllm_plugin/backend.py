"""vLLM's attention backend for our pages: metadata of a step, views of a part's pages, and the calls of `ops.paged`.

Shapes: T tokens of a step, R sequences, H KV heads of a part, G query heads of each, D head dimension, U index units,
d index dimension, N tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.kv_cache_layout import KVCacheLayout

from ..ops import paged
from .compat import BACKEND, host_lengths
from .layout import Place

COPIES = 4
"""Of what a prompt's piece may see, in one layer at a time: keys and values, gathered from blocks, then head by head."""


@dataclass
class Step:
    """What attention must know of a step; the sequences with one new token come first, as vLLM sorts them."""

    tokens: int
    decodes: int
    """Sequences that are decoded together."""
    lengths: Tensor
    """[R] int32 tokens of every sequence, the new ones counted"""
    longest: int
    """No decoded sequence is longer."""
    table: Tensor
    """[R, pages] int32"""
    slots: Tensor
    """[T] int64 where new tokens are stored, -1 for padding"""
    prefills: list[tuple[int, int, int, int]]
    """(sequence, first token, end, length) of the others"""


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes the metadata of a step out of vLLM's."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.context = vllm_config.model_config.max_model_len

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        """Without a look at the device: vLLM has starts and lengths on the host too."""
        common, lengths, prefills = common_attn_metadata, None, []
        decodes = count = common.num_reqs
        if common.max_query_len > 1:
            starts, lengths = common.query_start_loc_cpu.tolist(), host_lengths(common).tolist()
            new = [end - start for start, end in pairwise(starts)][:count]
            decodes = next((i for i, tokens in enumerate(new) if tokens != 1), count)
            prefills = [(i, starts[i], starts[i + 1], lengths[i]) for i in range(decodes, count) if new[i]]
        return Step(
            tokens=common.num_actual_tokens,
            decodes=decodes,
            lengths=common.seq_lens,
            longest=common.max_seq_len if lengths is None else max(lengths[:decodes], default=0),
            table=common.block_table_tensor,
            slots=common.slot_mapping,
            prefills=prefills,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Step:
        """A graph is replayed for sequences of any length."""
        step = self.build(0, common_attn_metadata)
        step.longest = self.context
        return step


class PagedImpl(AttentionImpl):
    """One part of a layer. Its query is queries, then index queries; its key is keys, then index keys."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, alibi_slopes: Any = None,
        sliding_window: int | None = None, kv_cache_dtype: str = "auto", logits_soft_cap: float | None = None,
        attn_type: str = "decoder", kv_sharing_target_layer_name: str | None = None, *,
        part: paged.Part | None = None, place: Place | None = None,
    ):  # fmt: skip
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.kv_cache_dtype, self.kv_sharing_target_layer_name = kv_cache_dtype, kv_sharing_target_layer_name
        self.part, self.place, self.context = part, place, 0
        self._views: tuple[Tensor, paged.Pages] | None = None

    def pages(self, cache: Tensor) -> paged.Pages:
        """This part's views of the cache."""
        if self._views is None or self._views[0] is not cache:
            assert self.place is not None
            self._views = (cache, self.place.pages(cache))
        return self._views[1]

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Step | None,
        output: Tensor, output_scale: Any = None, output_block_scale: Any = None,
    ) -> Tensor:  # fmt: skip
        """Write the step's tokens, then attend: query [T, H*G*D + U*d], key [T, H*D + U*d], value [T, H*D] -> output
        [T, H*G*D]."""
        part, place, step = self.part, self.place, attn_metadata
        assert part is not None
        assert place is not None
        if step is None:  # vLLM measures what a step needs beside the cache: here copies of a sequence's keys and values
            whole = part.full or part.dense_end_tokens
            tokens = self.context if whole else min(self.context, max(part.windows) + len(query))
            query.new_empty(COPIES * place.rows * tokens * place.head_dim)
            return output.zero_()
        pages, dim, width = self.pages(kv_cache), place.head_dim, place.units * place.index_dim

        def heads(x: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
            x = x[: step.tokens]
            tail = x[:, x.shape[1] - index :].unflatten(1, (-1, place.index_dim)) if index else None
            return x[:, : x.shape[1] - index].unflatten(1, (-1, dim)), tail

        (q, index_q), (k, index_k), (v, _) = heads(query, width), heads(key, width), heads(value, 0)
        paged.write(pages, step.slots[: step.tokens], k, v, index_k)
        out = output.view(len(output), -1, dim)
        count = step.decodes
        if count:
            index = None if index_q is None else index_q[:count]
            one = q[:count].unflatten(1, (place.rows, -1))
            done = paged.decode(one, index, pages, step.table[:count], step.lengths[:count], step.longest, part)
            out[:count] = done.flatten(1, 2)
        for i, start, end, length in step.prefills:
            index = None if index_q is None else index_q[start:end]
            out[start:end] = paged.prefill(q[start:end], index, pages, step.table[i], length, part)
        return output


class PagedBackend(AttentionBackend):
    """What vLLM asks of a backend. The cache is written by its forward."""

    forward_includes_kv_cache_update = True
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012
    supported_kv_cache_dtypes = ["auto"]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        """Its name in vLLM's enumeration."""
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[PagedImpl]:
        """What computes a part."""
        return PagedImpl

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        """What makes a step's metadata."""
        return StepBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Local parts have one."""
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those in which a block of a layer is one piece."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC, KVCacheLayout.BLHNC, KVCacheLayout.BLNHC)
