"""How much work one attention layer's prefill or decode step is, in closed form, and which kernels spend the time.

Symbols: N tokens, W window, D head dimension; a *pair* is a query and a key that it attends to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .layer_speed import LayerShape

ROLES = {
    "_thresholds": "index",
    "_score": "index",
    "_far_bits": "index",
    "_gather": "attention",
    "_attend": "attention",
    "_forward": "attention",
    "_merge_sinks": "attention",
}
"""What the kernels of `ops` are for; "index" is scores and selection. Libraries' attention kernels have "flash" or "fmha" in
their names; anything else is "other"."""


def causal_pairs(tokens: int) -> int:
    """Pairs of dense causal attention, per head."""
    return tokens * (tokens + 1) // 2


def near_pairs(tokens: int, window_tokens: int, sink_tokens: int) -> int:
    """Pairs in the window or with a sink, per head."""
    beyond = max(0, tokens - window_tokens)  # queries whose window no longer reaches the first token
    sinks = min(sink_tokens, beyond)
    return causal_pairs(tokens - beyond) + beyond * window_tokens + sinks * beyond - sinks * (sinks - 1) // 2


def prefill_flops(shape: LayerShape, tokens: int, far_ratio: float) -> tuple[float, float]:
    """(dense, sparse) FLOPs of attention over a prompt: 4 D per pair and query head, without index and selection.

    Args:
        far_ratio: share of the pairs beyond window and sinks that retrieval heads attend to.
    """
    causal = causal_pairs(tokens)
    by_head = [near_pairs(tokens, window, shape.sink_tokens) for window in shape.kv_windows]
    near = shape.query_heads // shape.kv_heads * sum(by_head)
    far = causal - near_pairs(tokens, shape.window_tokens, shape.sink_tokens)
    sparse = near + len(shape.retrieval) * far_ratio * far
    return 4.0 * shape.head_dim * shape.query_heads * causal, 4.0 * shape.head_dim * sparse


def decode_bytes(shape: LayerShape, batch: int, tokens: int, far_ratio: float, *, element_bytes: int) -> tuple[float, float]:
    """(dense, sparse) bytes that one decode step must read: keys and values of every attended token once, index keys.

    Args:
        far_ratio: share of the tokens beyond window and sinks that a unit selects. Units that share a KV head are taken to
            select independently; what several of them select is read once.
    """
    group = shape.query_heads // shape.kv_heads
    read = 0.0
    for row in range(shape.kv_heads):
        window = min(tokens, shape.kv_windows[row])
        near = window + min(shape.sink_tokens, tokens - window)
        units = set(shape.head_units[row * group : (row + 1) * group]) - {-1}
        read += near + (1 - (1 - far_ratio) ** len(units)) * (tokens - near)
    token = 2 * shape.head_dim * element_bytes
    index = shape.units * tokens * shape.index_dim * (1 if shape.index_dtype == "float8" else element_bytes)
    return float(batch * shape.kv_heads * tokens * token), batch * (read * token + index)


def observe(step: Callable[[], Any], device: torch.device) -> tuple[int | None, dict[str, float] | None]:
    """(peak bytes beyond what is held already, seconds by kernel name) of one call; None and None on a CPU."""
    if device.type != "cuda":
        return None, None
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return peak, seconds_by_name(found.events())


def seconds_by_name(events: Iterable[Any]) -> dict[str, float]:
    """Seconds that the GPU spent on kernels, copies and fills, out of a profiler's events."""
    found: dict[str, float] = {}
    for event in events:
        waits = event.name.endswith(" Sync")  # "Context Sync" is an event of the GPU too, as long as all the others
        if event.device_type == torch.autograd.DeviceType.CUDA and not waits:
            found[event.name] = found.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
    return found


def shares(kernel_seconds: dict[str, float] | None) -> dict[str, float] | None:
    """Share of "index", "attention" and "other" in the sum of kernel times (kernels may overlap); None without any."""
    if not kernel_seconds:
        return None
    found = {"index": 0.0, "attention": 0.0, "other": 0.0}
    for name, seconds in kernel_seconds.items():
        library = "attention" if "flash" in name or "fmha" in name else "other"
        found[ROLES.get(name, library)] += seconds
    return {role: seconds / sum(kernel_seconds.values()) for role, seconds in found.items()}
