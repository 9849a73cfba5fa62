"""Needle retrieval: facts hidden in a long document, a question at its end, graded by exact greedy answers."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..cache import CACHE
from ..generate import pieces, read
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
    """Per sample the share of the values asked for that greedy decoding gets right.

    The prompt is read as generation reads it, its first new token by itself, which ends the prompt, and then the rest at
    once: greedy decoding writes a value exactly when every one of its tokens is the most likely next token after the right
    ones before it.

    Args:
        samples: all of one length, with prompts of one length.
    """
    prompt = len(samples[0].prompt)
    tokens = torch.stack([s.tokens for s in samples]).to(model.device)
    cache = DynamicCache(config=model.config)
    logits = [read(model, pieces(model, tokens[:, :prompt]), cache)[:, None]]
    logits += [model(part, **{CACHE: cache}).logits for part in tokens[:, prompt:].tensor_split([1], 1) if part.shape[1]]
    guess = torch.cat(logits, 1).argmax(-1).cpu()  # [samples, ...]: the token after position prompt - 1 + i
    grades = []
    for sample, row in zip(samples, guess, strict=True):
        right = [all(row[t - prompt] == sample.tokens[t] for t in range(start, stop)) for start, stop in sample.answers]
        grades.append(sum(right) / len(right))
    return grades


def grade_all(model: Any, samples: list[RetrievalSample], *, what: str) -> list[float]:
    """`grade` of every sample, in batches of like samples, with progress."""
    budget = BATCH_TOKENS if model.device.type == "cuda" else 1
    batches: list[list[RetrievalSample]] = []
    for (length, _), some in groupby(samples, lambda s: (len(s.tokens), len(s.prompt))):
        same, size = list(some), max(1, budget // length)
        batches += [same[at : at + size] for at in range(0, len(same), size)]
    done = track(batches, total=len(batches), what=what)
    return [g for batch in done for g in grade(model, batch)]
