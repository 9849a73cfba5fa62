"""How close the sparse model's next-token distribution is to the dense one's, by position in the document."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..progress import track

Switch = Callable[[str], AbstractContextManager[Any]]
BUCKETS = 8
_LABELS_PER_PIECE = 1024


@torch.no_grad()
def _hidden(model: Any, tokens: Tensor) -> Tensor:
    """Final hidden states [length - 1, hidden] of all but the last position."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model(input_ids=tokens[None].to(model.device), use_cache=False).last_hidden_state[0, :-1]


@torch.no_grad()
def compare_documents(texts: list[Tensor], switch: Switch) -> dict[str, Any]:
    """Loss, logit KL and top-1 agreement of both models on held-out documents.

    Args:
        switch: `with switch("dense") as model` (or "sparse") gives the model that runs so.

    Returns:
        "loss_dense", "loss_sparse" [documents] means in nats; "kl" mean KL(dense || sparse) in nats; "top1_agreement";
        "by_position": the same per eighth of the document.
    """
    rows = []
    for tokens in track(texts, total=len(texts), what="Loss and fidelity on documents"):
        with switch("dense") as model:
            hidden_dense, head_dense = _hidden(model, tokens), model.get_output_embeddings()
        with switch("sparse") as model:
            hidden_sparse, head_sparse = _hidden(model, tokens), model.get_output_embeddings()
        labels = tokens[1:].to(hidden_dense.device)
        parts = []
        for start in range(0, len(labels), _LABELS_PER_PIECE):
            piece = slice(start, start + _LABELS_PER_PIECE)
            a = head_dense(hidden_dense[piece]).float().log_softmax(-1)
            b = head_sparse(hidden_sparse[piece]).float().log_softmax(-1)
            want = labels[piece, None]
            parts.append(
                torch.stack(
                    [
                        -a.gather(-1, want)[:, 0],
                        -b.gather(-1, want)[:, 0],
                        (a.exp() * (a - b)).sum(-1),
                        (a.argmax(-1) == b.argmax(-1)).float(),
                    ]
                ).cpu()
            )
        rows.append(torch.cat(parts, 1))
    values = torch.stack(rows)  # [documents, 4, length - 1]
    names = ("loss_dense", "loss_sparse", "kl", "top1_agreement")
    edges = torch.linspace(0, values.shape[2], BUCKETS + 1).long().tolist()
    buckets = [
        {
            "from": a,
            "to": b,
            **{n: values[:, i, a:b].mean().item() for i, n in enumerate(names)},
        }
        for a, b in pairwise(edges)
    ]
    per_document = values.mean(2)
    return {
        "documents": len(texts),
        "length_tokens": len(texts[0]),
        "loss_dense": per_document[:, 0].tolist(),
        "loss_sparse": per_document[:, 1].tolist(),
        "kl": per_document[:, 2].mean().item(),
        "top1_agreement": per_document[:, 3].mean().item(),
        "by_position": buckets,
    }
