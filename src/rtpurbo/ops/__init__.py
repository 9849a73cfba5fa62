"""Attention operations. `reference` says what they mean; `prefill` (on a GPU with Triton `kernels` and `flash4`) and
`decode` (with `decode_kernels`) compute it in bounded memory."""

from .decode import decode_attention
from .prefill import (
    backend,
    dense_attention,
    prefill_attention,
    retrieval_attention,
    window_attention,
    window_backend,
)
from .reference import far_slots, gather_slots, near_slots, sink_slots, sparse_attention
from .select import index_scores, top_p_threshold

__all__ = [
    "backend",
    "decode_attention",
    "dense_attention",
    "far_slots",
    "gather_slots",
    "index_scores",
    "near_slots",
    "prefill_attention",
    "retrieval_attention",
    "sink_slots",
    "sparse_attention",
    "top_p_threshold",
    "window_attention",
    "window_backend",
]
