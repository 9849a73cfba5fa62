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
def hidden_states(model: Any, tokens: Tensor) -> Tensor:
    """Final hidden states [length - 1, hidden] of all but the last position."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model(input_ids=tokens[None].to(model.device), use_cache=False).last_hidden_state[0, :-1]


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [N] in nats of logits [N, vocabulary] at labels [N]."""
    return -logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """KL(dense || other) in nats and, as 0 or 1, the same most likely token: [2, N] of logits [N, vocabulary]."""
    a, b = dense.float().log_softmax(-1), other.float().log_softmax(-1)
    return torch.stack([(a.exp() * (a - b)).sum(-1), (a.argmax(-1) == b.argmax(-1)).float()])


def eighths(length: int) -> list[tuple[int, int]]:
    """(from, to) of each eighth of `length` positions."""
    return list(pairwise(torch.linspace(0, length, BUCKETS + 1).long().tolist()))


@torch.no_grad()
def compare_documents(texts: list[Tensor], switch: Switch, other: str = "sparse") -> dict[str, Any]:
    """Loss, logit KL and top-1 agreement of the dense and another model on held-out documents.

    Args:
        switch: `with switch("dense") as model` (or another name) gives the model that runs so.
        other: name of the model that is compared with the dense one; that of its losses too.

    Returns:
        "loss_dense", "loss_sparse" [documents] means in nats; "kl" mean KL(dense || sparse) in nats; "top1_agreement";
        "by_position": the same per eighth of the document.
    """
    rows = []
    for tokens in track(texts, total=len(texts), what="Loss and fidelity on documents"):
        with switch("dense") as model:
            hidden_dense, head_dense = hidden_states(model, tokens), model.get_output_embeddings()
        with switch(other) as model:
            hidden_other, head_other = hidden_states(model, tokens), model.get_output_embeddings()
        labels = tokens[1:].to(hidden_dense.device)
        parts = []
        for start in range(0, len(labels), _LABELS_PER_PIECE):
            piece = slice(start, start + _LABELS_PER_PIECE)
            a, b = head_dense(hidden_dense[piece]), head_other(hidden_other[piece])
            losses = torch.stack([token_loss(a, labels[piece]), token_loss(b, labels[piece])])
            parts.append(torch.cat([losses, divergence(a, b)]).cpu())
        rows.append(torch.cat(parts, 1))
    values = torch.stack(rows)  # [documents, 4, length - 1]
    names = ("loss_dense", f"loss_{other}", "kl", "top1_agreement")
    buckets = [
        {
            "from": a,
            "to": b,
            **{n: values[:, i, a:b].mean().item() for i, n in enumerate(names)},
        }
        for a, b in eighths(values.shape[2])
    ]
    per_document = values.mean(2)
    return {
        "documents": len(texts),
        "length_tokens": len(texts[0]),
        "loss_dense": per_document[:, 0].tolist(),
        f"loss_{other}": per_document[:, 1].tolist(),
        "kl": per_document[:, 2].mean().item(),
        "top1_agreement": per_document[:, 3].mean().item(),
        "by_position": buckets,
    }
