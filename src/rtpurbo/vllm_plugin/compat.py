"""All that depends on vLLM's version: 0.29 to 0.33. Nothing else here reaches for a private name of vLLM."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

BACKEND = "CUSTOM"
"""vLLM wants every backend's name to be in its enumeration. This one is there for others' backends, in every version;
nothing is registered under it, as our layers bring their backend themselves."""


def register_caches_of_vllm() -> None:
    """Let vLLM name its own kinds of cache, which it does only as long as nobody has named any."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()


def attend(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: str) -> None:
    """vLLM's attention op, which torch.compile and CUDA graphs know: calls the layer's backend with these tensors."""
    from vllm.utils.torch_utils import _encode_layer_name

    torch.ops.vllm.unified_attention_with_output(query, key, value, output, _encode_layer_name(layer_name))


def host_lengths(common: Any) -> Tensor:
    """Length of every sequence on the host, new tokens counted; copied from the device only where vLLM keeps none."""
    known = common.seq_lens_cpu_upper_bound  # exact without speculative decoding, which is refused
    return common.seq_lens.cpu() if known is None else known


_OVERRIDDEN = {
    "find_longest_cache_hit": (
        "block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec", "drop_eagle_block",
        "alignment_tokens",
    ),
    "reachable_block_mask": ("start_block", "end_block", "alignment_tokens", "kv_cache_spec"),
    "add_local_computed_blocks": (
        "self", "request_id", "new_computed_blocks", "num_local_computed_tokens", "num_external_computed_tokens",
    ),
    "get_num_blocks_to_allocate": (
        "self", "request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens",
    ),
    "remove_skipped_blocks": ("self", "request_id", "processed_computed_tokens"),
    "_remove_blocks_in_range": ("self", "request_id", "first_block", "last_block"),
    "get_num_skipped_tokens": ("self", "num_computed_tokens"),
}  # fmt: skip
"""What `cache.SinkWindowManager` overrides or calls, with the leading arguments that it counts on."""


def prefix_caching_problem(manager: type) -> str:
    """Why blocks of sinks could get lost in this vLLM's prefix caching: a method of its window manager that is not there or
    has other arguments; "" where all are as expected."""
    for name, expected in _OVERRIDDEN.items():
        method = getattr(manager, name, None)
        if method is None:
            return f"{manager.__name__} has no {name}"
        method = getattr(method, "__func__", method)
        got = [argument for argument in inspect.signature(method).parameters if argument != "cls"]
        if tuple(got[: len(expected)]) != expected:
            return f"{manager.__name__}.{name} takes {', '.join(got)}"
    return ""


def block_hashes(hashes: Any, block_pool: Any, spec: Any, alignment_tokens: int) -> Any:
    """A request's hashes, one for each block of `spec`."""
    from vllm.v1.core.kv_cache_utils import resolve_block_hashes

    return resolve_block_hashes(
        hashes,
        block_pool.hash_block_size,
        spec.block_size,
        supports_fine_grained_hash_lookup=False,
        alignment_tokens=alignment_tokens,
    )
