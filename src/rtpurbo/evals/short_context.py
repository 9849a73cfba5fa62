"""At short context nothing should be lost: the sparse model, and its weights with dense attention, against the dense one."""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import EvalConfig
from ..data import documents
from ..generate import chat_prompt, greedy
from ..model_card import check
from ..progress import track
from .fidelity import Switch, compare_documents
from .statistics import paired

SHORT_TOKENS = 2048
"""Length of a short document, where the context holds it."""
REPLY_TOKENS = 32
"""Tokens of a reply at most."""
_BATCH = 16
_SQUAD = {
    "data": [
        {
            "paragraphs": [
                {"context": str, "qas": [{"question": str, "is_impossible?": bool, "answers?": [{"text": str}]}]},
            ]
        }
    ]
}


@dataclass(frozen=True)
class Question:
    """A question about a paragraph, as token ids of its prompt."""

    prompt: list[int]
    answers: tuple[str, ...]
    """Any of them is right."""


def read_squad(file: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(paragraph, question, answers) of all questions of a SQuAD file that have an answer.

    Raises:
        ValueError: there is no such file, or it is no SQuAD file.
    """
    path, advice = Path(file), "Name a file such as dev-v2.0.json in squad."
    if not path.is_file():
        raise ValueError(f"SQuAD file {file!r} does not exist. {advice}")
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"SQuAD file {file!r} is damaged: expected JSON ({error}). {advice}") from error
    check(raw, _SQUAD, f"SQuAD file {file!r}", advice)
    found = []
    for paragraph in (p for article in raw["data"] for p in article["paragraphs"]):
        for one in paragraph["qas"]:
            answers = tuple(a["text"] for a in one.get("answers", []) if a["text"].strip())
            if answers and not one.get("is_impossible", False):
                found.append((paragraph["context"], one["question"], answers))
    return found


def draw_questions(tokenizer: Any, config: EvalConfig, context: int) -> list[Question]:
    """`config.squad_samples` questions, or all that fit in the context with a reply; none without a file.

    Raises:
        ValueError: an unusable file, or no question in it that fits.
    """
    if config.squad is None:
        return []
    rows = read_squad(config.squad)
    random.Random(f"{config.seed}:squad").shuffle(rows)
    found: list[Question] = []
    for paragraph, question, answers in rows:
        prompt = chat_prompt(tokenizer, f"{paragraph}\n\nQuestion: {question}\nAnswer:")
        if len(prompt) + REPLY_TOKENS <= context:
            found.append(Question(prompt, answers))
        if len(found) == config.squad_samples:
            break
    if not found:
        raise ValueError(
            f"SQuAD file {config.squad!r} has no question to ask: expected at least one with an answer whose prompt has at "
            f"most {context - REPLY_TOKENS} tokens, got {len(rows)} with an answer. Name another file in squad."
        )
    return found


def replies(model: Any, tokenizer: Any, questions: list[Question], *, what: str) -> list[str]:
    """The model's greedy replies of at most 32 tokens; outside of a chat a reply ends with its line."""
    by_length = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    batches = [by_length[i : i + _BATCH] for i in range(0, len(by_length), _BATCH)]
    found = [""] * len(questions)
    for batch in track(batches, total=len(batches), what=what):
        new = greedy(model, [torch.tensor(questions[i].prompt) for i in batch], REPLY_TOKENS)
        for i, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            found[i] = text.strip() if tokenizer.chat_template else text.strip().split("\n")[0]
    return found


def contains(reply: str, answers: tuple[str, ...]) -> float:
    """1 when the reply holds one of the answers, upper and lower case alike."""
    return float(any(answer.strip().lower() in reply.lower() for answer in answers))


def _words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, without punctuation and articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def token_f1(reply: str, answers: tuple[str, ...]) -> float:
    """F1 of the reply's words and those of the answer that it fits best."""

    def against(answer: str) -> float:
        got, want = _words(reply), _words(answer)
        common = sum((Counter(got) & Counter(want)).values())
        if not got or not want:
            return float(got == want)
        return 2 * common / (len(got) + len(want))

    return max(map(against, answers))


def _compare_replies(
    switch: Switch, tokenizer: Any, questions: list[Question], names: tuple[str, ...], seed: int
) -> dict[str, Any]:
    said = {}
    for name in ("dense", *names):
        with switch(name) as model:
            said[name] = replies(model, tokenizer, questions, what=f"SQuAD questions, {name}")
    result: dict[str, Any] = {"samples": len(questions)}
    for metric, score in (("contains", contains), ("f1", token_f1)):
        scores = {n: [score(reply, q.answers) for reply, q in zip(said[n], questions, strict=True)] for n in said}
        result[metric] = {name: paired(scores["dense"], scores[name], seed=seed, other=name) for name in names}
    return result


def compare_short(
    switch: Switch,
    tokenizer: Any,
    sources: list[str] | tuple[str, ...],
    questions: list[Question],
    config: EvalConfig,
    *,
    names: tuple[str, ...],
    context: int,
) -> dict[str, Any]:
    """Loss on short held-out documents and answers about short paragraphs, of the dense model and others.

    Args:
        switch: `with switch("dense") as model` (or another name) gives the model that runs so.
        names: what is compared with the dense model: "sparse", and "weights" where there are distilled ones.
        context: longest sequence in tokens.

    Returns:
        "documents": per source "length_tokens" and, by name, the paired losses in nats (the second mean bears the name),
        "kl" to the dense model in nats and "top1_agreement"; "squad": "samples" and, by metric ("contains", "f1") and name,
        the paired result. What was not asked for is left out.

    Raises:
        ValueError: too little text.
    """
    result: dict[str, Any] = {}
    for source in sources if config.short_documents else ():
        texts = documents(
            [source],
            tokenizer,
            length_tokens=min(SHORT_TOKENS, context),
            count=config.short_documents,
            seed=config.seed,
        )
        row: dict[str, Any] = {"length_tokens": len(texts[0])}
        for name in names:
            found = compare_documents(texts, switch, name)
            pair = paired(found["loss_dense"], found[f"loss_{name}"], seed=config.seed, other=name)
            row[name] = {**pair, "kl": found["kl"], "top1_agreement": found["top1_agreement"]}
        result.setdefault("documents", {})[source] = row
    if questions:
        result["squad"] = _compare_replies(switch, tokenizer, questions, names, config.seed)
    return result
