"""vLLM's cache of local heads: blocks of the window and of the sinks stay, those between are freed.

vLLM's own sliding window frees all blocks before the window. What has to differ for the sinks' blocks: they are not freed,
they are published for prefix caching, a hit needs them, a hit puts them into the request's table (without this one, vLLM
would put its empty block there, and attention would silently read it), and they count in what a request needs. Where the end
of a prompt is read densely, all its blocks stay until it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from . import compat


def sink_blocks(spec: SinkWindowSpec) -> int:
    """Blocks at the start of a sequence that hold sinks."""
    return -(-spec.sink_tokens // spec.block_size)


class SinkWindowManager(SlidingWindowManager):
    """Blocks of one local pool, for all requests."""

    def __init__(self, kv_cache_spec: SinkWindowSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.sinks, self.keeps_prompts = sink_blocks(kv_cache_spec), kv_cache_spec.keeps_prompts

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what lies between sinks and window, of a prompt that is kept once all of it is read."""
        if self.keeps_prompts and processed_computed_tokens < (num_prompt_tokens or 0):
            return
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self.sinks, skipped)

    def _lost(self, computed_tokens: int) -> int:
        """Sink blocks among those that vLLM leaves out of a hit of so many tokens."""
        return min(self.sinks, self.get_num_skipped_tokens(computed_tokens) // self.block_size)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence, total_computed_tokens: int, *more: Any,
        **named: Any,
    ) -> int:  # fmt: skip
        """Blocks that the free list must have: a hit takes those of the sinks out of it too."""
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *more, **named
        )
        if request_id in self.num_cached_block:  # it runs already: no hits
            return needed
        again = new_computed_blocks[: self._lost(total_computed_tokens)]
        return needed + sum(block.ref_cnt == 0 and not block.is_null for block in again)

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence, num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:  # fmt: skip
        """Put the blocks of a hit into the request's table, those of the sinks too."""
        total = num_local_computed_tokens + num_external_computed_tokens
        again = list(new_computed_blocks[: self._lost(total)])
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        self.block_pool.touch(again)
        self.req_to_blocks[request_id][: len(again)] = again

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], block_pool: Any, kv_cache_spec: Any,
        drop_eagle_block: bool, alignment_tokens: int, *more: Any, **named: Any,
    ) -> Any:  # fmt: skip
        """The longest hit whose window and sinks are both there."""
        found, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, drop_eagle_block, alignment_tokens,
            *more, **named,
        )  # fmt: skip
        hashes = compat.block_hashes(block_hashes, block_pool, kv_cache_spec, alignment_tokens)
        for i in range(min(sink_blocks(kv_cache_spec), len(found[0]))):
            cached = block_pool.get_cached_block(hashes[i], kv_cache_group_ids)
            if not cached:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(found, cached, strict=True):
                blocks[i] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, alignment_tokens: int | None, kv_cache_spec: Any, *more: Any, **named: Any
    ) -> list[bool] | None:
        """Blocks to publish: the window's, as vLLM says, and the sinks'."""
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, *more, **named)
        if mask is not None:
            for i in range(start_block, min(end_block, sink_blocks(kv_cache_spec))):
                mask[i - start_block] = True
        return mask


compat.register_caches_of_vllm()


@register_kv_cache_spec(manager_class=SinkWindowManager)
@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """A sliding window after `sink_tokens` tokens that stay."""

    sink_tokens: int
    keeps_prompts: bool = False
    """Whether a prompt's blocks stay until all of it is read, for an end that is read densely."""

    def max_admission_blocks_per_request(self, *args: Any, **named: Any) -> int:
        """Blocks that a request may hold at once."""
        blocks = super().max_admission_blocks_per_request(*args, **named) + sink_blocks(self)
        longest = named["max_model_len"] if "max_model_len" in named else args[-1]
        return max(blocks, -(-longest // self.block_size)) if self.keeps_prompts else blocks

    @property
    def num_retained_tokens(self) -> int:
        """From vLLM 0.33 on the worker hides blocks before this many tokens; 0: none, as it would hide the sinks'."""
        return 0
