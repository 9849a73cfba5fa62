"""How many heads have to retrieve: shares are tried until one recovers what the dense model does (`target_recovery`).

Every candidate is the best-scored heads of a share, dense, and all others in their windows: nothing is trained, so what it
loses is what its windows lose.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attach import attached
from .config import SparseConfig
from .evals.needle import grade_all, needle_samples
from .heads import HeadMap

SHARES = (1, 4 / 3, 5 / 3, 2, 8 / 3, 10 / 3, 4)
"""Shares to try, in multiples of the first one; beyond them a quarter more each time, up to all heads."""
KINDS = ("single", "multi_key")
SAMPLES = 24
"""Questions of each kind, at least."""
CAN_ANSWER = 0.3
"""A kind counts when the dense model answers at least this share of its questions."""
TEXTS = 2
TEXT_POSITIONS = 512
"""Positions of each text, at most."""


@dataclass
class Answers:
    """What a model makes of the questions and the text."""

    right: dict[str, list[bool]]
    """Per kind, of every question whether it is answered."""
    log_probability: Tensor
    """[positions] of the text's own next token, in nats"""
    likeliest: Tensor
    """[positions] int64, the most likely next token"""


def shares(first: float) -> list[float]:
    """Shares of the heads to try, ascending from `first` to 1."""
    found, factors = [first], list(SHARES[1:])
    while found[-1] < 1:
        factor = factors.pop(0) if factors else found[-1] / first * 1.25
        found.append(min(1.0, factor * first))
    return found


def recovery(dense: Answers, candidate: Answers) -> dict[str, float | None]:
    """How much of what the dense model does a candidate does too, each number in [0, 1].

    Returns:
        "answers": of the questions that the dense model answers, the share that the candidate answers too, over the kinds
        of which the dense model answers enough; None where it does of none. Questions that only the candidate answers
        make up for nothing.
        "text": the share of the probability of the text's own next token that the candidate keeps, the geometric mean
        over positions: exp(loss of the dense model - loss of the candidate), at most 1.
        "top1_agreement": the share of positions whose most likely token is the dense model's, for information.
        "recovery": the lower one of answers and text; text alone where the model cannot answer.

    Both are needed: few heads answer questions, and ordinary text hardly notices when they are gone; but text is what the
    many others serve. For text the loss decides and not the agreement on the likeliest token, because the agreement
    counts near ties, which any change at all turns over: a finished sparse model of SmolLM2 agrees at 93 % of the
    positions with 0.2 % more loss (docs/log.md), so that a target of 0.99 would ask for every head whatever it gains.
    The loss is smooth, and falls as heads are added, since each one only gets back what the dense model sees.
    """
    counted = [kind for kind, right in dense.right.items() if sum(right) >= CAN_ANSWER * len(right)]
    kept = [b for kind in counted for a, b in zip(dense.right[kind], candidate.right[kind], strict=True) if a]
    answers = sum(kept) / len(kept) if kept else None
    text = min(1.0, (candidate.log_probability - dense.log_probability).mean().exp().item())
    same = (candidate.likeliest == dense.likeliest).float().mean().item()
    lower = text if answers is None else min(answers, text)
    return {"recovery": lower, "answers": answers, "text": text, "top1_agreement": same}


def choose_share(
    model: Any,
    tokenizer: Any,
    texts: list[Tensor],
    choose: Callable[[float], HeadMap],
    sparse: SparseConfig,
    *,
    first: float,
    target: float,
    samples: int,
    seed: int,
) -> tuple[HeadMap, dict[str, Any], list[str]]:
    """The smallest share of heads that reaches `target`, as `recovery` counts.

    Args:
        texts: documents of one length, with room beyond the window; questions are hidden in all, the first ones are text.
        choose: the head map of a share.
        first: the smallest share to try.
        samples: questions of each kind, at least 24 are asked.

    Returns:
        The head map; "target", "tried" (per share "ratio" and what `recovery` returns), "chosen_ratio" and what was
        asked; notes.
    """
    count, length = max(SAMPLES, samples), len(texts[0])
    questions = {k: needle_samples(texts, tokenizer, kind=k, count=count, seed=seed) for k in KINDS}
    low = min(sparse.window_tokens + sparse.sink_tokens, length - 2)
    rng = random.Random(f"{seed}:recovery:{length}")
    rows = torch.tensor(sorted(rng.sample(range(low, length - 1), min(TEXT_POSITIONS, length - 1 - low))))

    def ask(what: str) -> Answers:
        right = {k: [g == 1.0 for g in grade_all(model, some, what=f"{what}, {k}")] for k, some in questions.items()}
        return Answers(right, *_next_tokens(model, texts[:TEXTS], rows))

    dense = ask("Dense model")
    tried: list[dict[str, Any]] = []
    heads, seen = choose(first), set[int]()
    for ratio in shares(first):
        heads = choose(ratio)
        chosen = sum(len(heads.retrieval_heads(i)) for i in heads.layers)
        if chosen in seen:  # a small model has no more heads at this share than at the last one
            continue
        seen.add(chosen)
        with attached(model, heads, sparse):
            tried.append({"ratio": ratio, **recovery(dense, ask(f"{ratio:.0%} of the heads"))})
        if tried[-1]["recovery"] >= target:
            break
    last = tried[-1]
    found = {
        "target": target,
        "tried": tried,
        "chosen_ratio": last["ratio"],
        "length_tokens": length,
        "samples": count,
        "dense": {kind: sum(right) / count for kind, right in dense.right.items()},
    }
    notes = []
    if last["answers"] is None:
        notes.append(
            f"The dense model answers too few questions at {length} tokens; text alone decided how many heads retrieve."
        )
    if last["recovery"] < target:
        notes.append(
            f"Not even {last['ratio']:.0%} of the heads reach the target recovery of {target:g} ({last['recovery']:.3f})."
        )
    return heads, found, notes


@torch.no_grad()
def _next_tokens(model: Any, texts: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the text's own next token and the most likely one, at `rows` of every text: [texts * rows]."""
    log_probabilities, likeliest = [], []
    for tokens in texts:
        logits = model(tokens[None].to(model.device), logits_to_keep=rows.to(model.device), use_cache=False).logits[0]
        want = tokens[rows + 1].to(logits.device)[:, None]
        log_probabilities.append(logits.float().log_softmax(-1).gather(1, want)[:, 0].cpu())
        likeliest.append(logits.argmax(-1).cpu())
    return torch.cat(log_probabilities), torch.cat(likeliest)
