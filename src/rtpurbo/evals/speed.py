"""Prefill and decode speed, and the bytes a cache really holds, of a whole model on this machine."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..cache import cache_bytes

PREFILL_CHUNK_TOKENS = 2048


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def measure_decode(model: Any, tokens: Tensor, *, new_tokens: int) -> dict[str, float]:
    """Prefill `tokens` [length], then decode greedily.

    Returns:
        "prefill_seconds", "decode_tokens_per_second" (from the median step), "cache_bytes" after prefill, and the
        length.
    """
    cache = DynamicCache(config=model.config)
    ids = tokens[None].to(model.device)
    begin = _now(model.device)
    for start in range(0, ids.shape[1], PREFILL_CHUNK_TOKENS):
        piece = ids[:, start : start + PREFILL_CHUNK_TOKENS]
        logits = model(piece, past_key_values=cache, logits_to_keep=1).logits
    prefill = _now(model.device) - begin
    held = cache_bytes(cache)
    times = []
    for _ in range(new_tokens):
        begin = _now(model.device)
        logits = model(logits[:, -1:].argmax(-1), past_key_values=cache, logits_to_keep=1).logits
        times.append(_now(model.device) - begin)
    return {
        "length_tokens": float(ids.shape[1]),
        "prefill_seconds": prefill,
        "decode_tokens_per_second": 1 / statistics.median(times[1:] or times),
        "cache_bytes": float(held),
    }
