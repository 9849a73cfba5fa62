"""What an exported model cannot do in vLLM, refused by name before anything is loaded."""

from __future__ import annotations

from typing import Any

from ..config import SparseConfig
from ..heads import HeadMap


def check(vllm_config: Any, heads: HeadMap, config: SparseConfig, prefix_caching_problem: str) -> None:
    """Refuse what would go wrong, silently or late.

    Args:
        vllm_config: vLLM's settings.
        prefix_caching_problem: what keeps prefix caching from being right in this version; "" for nothing.

    Raises:
        ValueError: one sentence with the setting and what to do.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        f"a quantised KV cache (--kv-cache-dtype {cache.cache_dtype}; the model's dtype is {dtype})": cache.cache_dtype
        not in ("auto", dtype),
        "a KV connector (--kv-transfer-config)": vllm_config.kv_transfer_config is not None,
        "fast prefill (--kv-sharing-fast-prefill)": cache.kv_sharing_fast_prefill,
        "two batches at once (--enable-dbo)": getattr(parallel, "enable_dbo", False),
        "dense_below_tokens": config.dense_below_tokens > 0,
        "one cache for all layers (--disable-hybrid-kv-cache-manager), which frees no block of local heads": bool(
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(f"A model of RTPurbo cannot be served with {what}; start vLLM without it.")
    ranks = parallel.tensor_parallel_size
    if heads.kv_heads % ranks:
        raise ValueError(
            f"A model of RTPurbo with {heads.kv_heads} KV heads cannot be dealt out to {ranks} processes; choose a "
            f"--tensor-parallel-size that divides {heads.kv_heads}."
        )
    if cache.enable_prefix_caching and prefix_caching_problem:
        raise ValueError(
            f"Prefix caching would lose the first tokens of a sequence in this vLLM ({prefix_caching_problem}); start vLLM "
            "with --no-enable-prefix-caching."
        )
