"""Needle retrieval: facts hidden in a long document, a question at its end, graded by exact greedy answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..progress import track
from ..questions import RetrievalSample, retrieval_sample

DEPTHS = 5
BATCH_TOKENS = 16384


def needle_samples(haystacks: list[Tensor], tokenizer: Any, *, kind: str, count: int, seed: int) -> list[RetrievalSample]:
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
def grade(model: Any, samples: list[RetrievalSample]) -> list[float]:
    """Per sample (all of one length) the share of the values asked for that greedy decoding gets right.

    One forward pass over prompts and answers: greedy decoding writes a value exactly when every one of its tokens is the
    most likely next token after the right ones before it.
    """
    length = len(samples[0].tokens)
    tail = length - min(s.answers[0][0] for s in samples) + 1
    tokens = torch.stack([s.tokens for s in samples])
    logits = model(tokens.to(model.device), logits_to_keep=tail, use_cache=False).logits
    guess = logits.argmax(-1).cpu()  # [samples, tail]: the token after position length - tail + i
    grades = []
    for sample, row in zip(samples, guess, strict=True):
        right = [
            all(row[t - 1 - (length - tail)] == sample.tokens[t] for t in range(start, stop))
            for start, stop in sample.answers
        ]
        grades.append(sum(right) / len(right))
    return grades


def grade_all(model: Any, samples: list[RetrievalSample], *, what: str) -> list[float]:
    """`grade` of every sample, in batches of samples of one length, with progress."""
    budget = BATCH_TOKENS if model.device.type == "cuda" else 1
    batches: list[list[RetrievalSample]] = []
    for sample in samples:
        length = len(sample.tokens)
        if batches and len(batches[-1][0].tokens) == length and (len(batches[-1]) + 1) * length <= budget:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    done = track(batches, total=len(batches), what=what)
    return [g for batch in done for g in grade(model, batch)]
