"""Needle retrieval: facts hidden in a long document, a question at its end, graded by exact greedy answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data import RetrievalSample, retrieval_sample
from ..progress import track

DEPTHS = 5


def needle_samples(
    haystacks: list[Tensor], tokenizer: Any, *, kind: str, count: int, seed: int
) -> list[RetrievalSample]:
    """`count` questions over the haystacks in turn, their depths spread evenly over the document."""
    return [
        retrieval_sample(
            haystacks[i % len(haystacks)],
            tokenizer,
            kind=kind,
            depth=(i % DEPTHS + 0.5) / DEPTHS,
            seed=f"{seed}:{kind}:{len(haystacks[0])}:{i}",
        )
        for i in range(count)
    ]


@torch.no_grad()
def grade(model: Any, sample: RetrievalSample) -> float:
    """Share of the values asked for that greedy decoding gets right.

    One forward pass over prompt and answer: greedy decoding writes a value exactly when every one of its tokens is the
    most likely next token after the right ones before it.
    """
    positions = torch.tensor(sample.label_positions, device=model.device)
    logits = model(sample.tokens[None].to(model.device), logits_to_keep=positions).logits[0]
    right = (logits.argmax(-1).cpu() == sample.tokens[positions.cpu() + 1]).tolist()
    values = []
    for start, stop in sample.answers:
        values.append(all(right[: stop - start]))
        right = right[stop - start :]
    return sum(values) / len(values)


def grade_all(model: Any, samples: list[RetrievalSample], *, what: str) -> list[float]:
    """`grade` of every sample, with progress."""
    return [grade(model, s) for s in track(samples, total=len(samples), what=what)]
