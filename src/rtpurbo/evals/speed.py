"""Prefill and decode speed, and the bytes a cache really holds, of a whole model on this machine."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..cache import CACHE, cache_bytes
from ..generate import pieces, read
from ..progress import track


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
    logits = read(model, pieces(model, ids), cache, what=f"Timing prefill of {len(tokens)} tokens")
    prefill = _now(model.device) - begin
    held = cache_bytes(cache)
    times = []
    for _ in track(range(new_tokens), total=new_tokens, what=f"Timing decode after {len(tokens)} tokens"):
        begin = _now(model.device)
        logits = model(logits.argmax(-1, keepdim=True), **{CACHE: cache}, logits_to_keep=1).logits[:, -1]
        times.append(_now(model.device) - begin)
    return {
        "length_tokens": float(ids.shape[1]),
        "prefill_seconds": prefill,
        "decode_tokens_per_second": 1 / statistics.median(times[1:] or times),
        "cache_bytes": float(held),
    }


def bench(
    model: Any,
    tokenizer: Any,
    artifact: Any,
    sources: list[str] | tuple[str, ...],
    lengths_tokens: tuple[int, ...],
    new_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """`measure_decode` of the dense and the sparse model at every length, after a warm-up.

    Args:
        lengths_tokens: a length that leaves no room for `new_tokens` in the context is cut to the longest that does.

    Raises:
        ValueError: other weights than the artefact's.
    """
    from ..checkpoint import check_fingerprint
    from ..data import documents
    from ..families import context_tokens
    from .compare import both

    check_fingerprint(model, artifact)
    context = context_tokens(model)
    longest = context - new_tokens
    if new_tokens < 1 or longest < 1 or min(lengths_tokens, default=0) < 1:
        raise ValueError(
            f"Expected lengths of 1 or more tokens and 1 to {context - 1} new ones (the context holds {context}), got "
            f"lengths {', '.join(map(str, lengths_tokens)) or 'none'} and {new_tokens} new tokens."
        )
    lengths = dict.fromkeys(min(length, longest) for length in lengths_tokens)
    rows = []
    with both(model, artifact) as switch:
        for length in lengths:
            tokens = documents(sources, tokenizer, length_tokens=length, count=1, seed=seed)[0]
            row: dict[str, Any] = {"length_tokens": length}
            for name in ("dense", "sparse"):
                with switch(name) as ready:
                    measure_decode(ready, tokens[:256], new_tokens=2)
                    row[name] = measure_decode(ready, tokens, new_tokens=new_tokens)
            rows.append(row)
    device = (
        torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return {"device": device, "dtype": str(model.dtype), "torch": torch.__version__, "rows": rows}
