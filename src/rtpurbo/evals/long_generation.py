"""Long generations after long prompts: whether the sparse model repeats itself, derails, or drifts away from the dense one.

Shapes: B prompts, P tokens of a prompt, N tokens generated after each, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..cache import CACHE
from ..generate import pieces, read
from ..progress import track
from .fidelity import Switch, divergence, eighths, hidden_states, token_loss
from .statistics import paired

NUCLEUS = 0.95
"""Probability of the most likely tokens among which one is drawn."""
NGRAM_TOKENS = 8
"""Length of the pieces that count as repeated."""
_LABELS_PER_PIECE = 1024


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens at which a text of this model ends."""
    named = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return sorted(ids - {None})


def draw(logits: Tensor, uniform: Tensor, suppressed: list[int]) -> Tensor:
    """Tokens [B] at `uniform` [B] in [0, 1) of the nucleus' distribution function, tokens in the order of their ids.

    In this order close logits [B, V] have close distribution functions, so that two models that agree draw the same.
    """
    logits = logits.double()
    logits[:, suppressed] = -torch.inf
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= NUCLEUS] = 0.0
    function = torch.zeros_like(logits).scatter(-1, order, probabilities).cumsum(-1)
    at = uniform[:, None].to(function) * function[:, -1:]
    return torch.searchsorted(function, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _read(model: Any, prompts: Tensor, what: str) -> tuple[DynamicCache, Tensor]:
    """The cache after prompts [B, P], and the logits [B, V] that follow them."""
    cache = DynamicCache(config=model.config)
    parts = pieces(model, prompts.to(model.device))
    return cache, read(model, parts, cache, what=f"{what}: reading {prompts.shape[1]} tokens")


@torch.no_grad()
def sample(model: Any, prompts: Tensor, *, new_tokens: int, suppressed: list[int], seed: int, what: str) -> Tensor:
    """Exactly `new_tokens` tokens [B, N] after prompts [B, P] of equal length: temperature 1, nucleus 0.95.

    Args:
        suppressed: tokens that are never drawn.
        seed: gives each step and prompt its random number, whatever the model.
    """
    generator = torch.Generator().manual_seed(seed)
    cache, logits = _read(model, prompts, what)
    found: list[Tensor] = []
    for step in track(range(new_tokens), total=new_tokens, what=f"{what}: generating"):
        if step:
            logits = model(found[-1][:, None], **{CACHE: cache}, logits_to_keep=1).logits[:, -1]
        found.append(draw(logits, torch.rand(len(prompts), generator=generator, dtype=torch.float64), suppressed))
    return torch.stack(found, 1).cpu()


def repetition(tokens: list[int]) -> float:
    """Share of a text's pieces of 8 tokens that occurred before in it."""
    pieces = [tuple(tokens[i : i + NGRAM_TOKENS]) for i in range(len(tokens) - NGRAM_TOKENS + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


def _score(model: Any, prompts: Tensor, texts: Tensor) -> tuple[Tensor, list[float]]:
    """Hidden states [B, N, hidden] from which `model` predicts texts [B, N], and each text's loss in nats per token."""
    states, losses, head = [], [], model.get_output_embeddings()
    for prompt, text in zip(prompts, texts, strict=True):
        hidden = hidden_states(model, torch.cat([prompt, text]))[len(prompt) - 1 :].clone()
        pieces = zip(hidden.split(_LABELS_PER_PIECE), text.to(hidden.device).split(_LABELS_PER_PIECE), strict=True)
        losses.append(torch.cat([token_loss(head(piece), labels) for piece, labels in pieces]).mean().item())
        states.append(hidden)
    return torch.stack(states), losses


def _drift(model: Any, prompts: Tensor, texts: Tensor, states: Tensor, head: Any) -> list[dict[str, float]]:
    """How far `model`, fed texts [B, N] token by token, predicts other than `head` does from states [B, N, hidden]."""
    cache, logits = _read(model, prompts, "Drift, sparse")
    tokens, rows = texts.to(model.device), []
    for step in track(range(texts.shape[1]), total=texts.shape[1], what="Drift, sparse: decoding the dense text"):
        if step:
            logits = model(tokens[:, step - 1 : step], **{CACHE: cache}, logits_to_keep=1).logits[:, -1]
        rows.append(divergence(head(states[:, step]), logits).mean(1))
    kl, agreement = torch.stack(rows, 1).cpu()
    return [
        {"from": a, "to": b, "kl": kl[a:b].mean().item(), "top1_agreement": agreement[a:b].mean().item()}
        for a, b in eighths(texts.shape[1])
    ]


@torch.no_grad()
def compare_generations(
    prompts: Tensor, switch: Switch, *, new_tokens: int, suppressed: list[int], seed: int
) -> dict[str, Any]:
    """What both models write after prompts [B, P], drawn with the same random numbers, and how far they come apart.

    Args:
        switch: `with switch("dense") as model` (or "sparse") gives the model that runs so.
        new_tokens: N, at least 8.
        suppressed: tokens that are never drawn, those that end a text.

    Returns:
        "prompts", "prompt_tokens", "tokens": B, P and N; "dense", "sparse": "repetition", the share of pieces of 8 tokens
        that the generated text held before, and "loss" under the dense model in nats per token; "loss": the paired result
        of these losses; "drift": per eighth of the dense model's text, which the sparse model reads by decode steps, "from",
        "to", "kl" (dense || sparse, nats) and "top1_agreement".
    """
    texts = {}
    for name in ("dense", "sparse"):
        with switch(name) as model:
            what = f"Long generation, {name}"
            texts[name] = sample(model, prompts, new_tokens=new_tokens, suppressed=suppressed, seed=seed, what=what)
    with switch("dense") as model:
        _, sparse = _score(model, prompts, texts["sparse"])
        states, dense = _score(model, prompts, texts["dense"])
        head = model.get_output_embeddings()
    with switch("sparse") as model:
        drift = _drift(model, prompts, texts["dense"], states, head)
    result: dict[str, Any] = {"prompts": len(prompts), "prompt_tokens": prompts.shape[1], "tokens": new_tokens}
    for name, losses in (("dense", dense), ("sparse", sparse)):
        repeated = [repetition(text) for text in texts[name].tolist()]
        result[name] = {"repetition": sum(repeated) / len(repeated), "loss": sum(losses) / len(losses)}
    return {**result, "loss": paired(dense, sparse, seed=seed), "drift": drift}
