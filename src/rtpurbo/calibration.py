"""Find the retrieval heads (paper, section 3.1): calibrate(model, tokenizer, ...) -> Artifact.

1. Documents of several lengths; in each, an identical random span near the start and at the end (the needle).
2. One dense forward pass per document. Needle score of a head: attention mass from the later span to the earlier one.
   Far score: attention mass that sampled ordinary queries send beyond window and sinks.
3. Lengths at which the model cannot copy the span itself are left out.
4. A head's score is the larger of both, each scaled to 1; the highest are retrieval heads.
5. Check: needle questions, dense model against dense retrieval heads + window.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .attach import attached, recording
from .attention import Observed
from .checkpoint import Artifact
from .config import CalibrateConfig, SparseConfig, default_window_tokens
from .data import documents
from .evals.needle import grade_all, needle_samples
from .families import attention_layers, context_tokens, head_counts
from .heads import HeadMap
from .models import fingerprint, model_identity
from .progress import track

CAN_COPY = 0.5
"""A length counts when the model predicts at least this share of the repeated span's tokens."""


@dataclass
class DocumentScore:
    """What one document says about every head: [layers, query heads], rows of unconverted layers zero."""

    length_tokens: int
    needle: Tensor
    far: Tensor
    copied: float


def calibrate(
    model: Any,
    tokenizer: Any,
    sources: list[str] | tuple[str, ...],
    config: CalibrateConfig | None = None,
    sparse: SparseConfig | None = None,
    *,
    model_name: str = "",
    revision: str | None = None,
) -> Artifact:
    """Choose the retrieval heads of a dense model.

    Args:
        sources: where ordinary text comes from, see `rtpurbo.data`.
        sparse: window, sinks, dimension and p of the model to be; default: a window of an eighth of the context.
        model_name: what the artefact calls its base model; default: the model's own name.

    Returns:
        An artefact with the head map; usable at once (dense retrieval heads + window).

    Raises:
        ValueError: unsupported model, a length beyond its context or not longer than window + sinks, too little text.
    """
    config = config or CalibrateConfig()
    context = context_tokens(model)
    sparse = sparse or SparseConfig(window_tokens=default_window_tokens(context))
    layers, query_heads, kv_heads, head_dim = head_counts(model)
    if sparse.index_dim > head_dim:
        raise ValueError(f"index_dim must be at most the head dimension {head_dim}, got {sparse.index_dim}.")
    lengths = config.lengths_tokens or default_lengths(context, sparse)
    check_lengths(lengths, context, sparse)
    scores: list[DocumentScore] = []
    plan = [(length, i) for length in lengths for i in range(config.documents)]
    texts = {
        n: documents(sources, tokenizer, length_tokens=n, count=config.documents + 1, seed=config.seed) for n in lengths
    }
    for length, i in track(plan, total=len(plan), what="Calibrating on documents"):
        scores.append(score_document(model, texts[length][i], texts[length][i + 1], sparse, config, index=i))
    usable = [n for n in lengths if _mean_copied(scores, n) >= CAN_COPY]
    notes = []
    if not usable:
        notes.append("The model itself cannot copy a repeated span at any of these lengths; far attention alone decided.")
    chosen_from = [s for s in scores if s.length_tokens in usable] or scores

    def choose(some: list[DocumentScore]) -> tuple[HeadMap, Tensor]:
        total = combine(some, with_needle=bool(usable))
        rows = [total[i].tolist() if i in attention_layers(model) else None for i in range(layers)]
        heads = HeadMap.from_scores(
            rows,
            kv_heads=kv_heads,
            granularity=config.granularity,
            ratio=config.retrieval_ratio,
            threshold=config.threshold,
        )
        return heads, total

    heads, total = choose(chosen_from)
    metrics: dict[str, Any] = {
        "scores": [[round(x, 4) for x in row] for row in total.tolist()],
        "lengths_tokens": list(lengths),
        "usable_lengths_tokens": usable,
        "copy_accuracy": {str(n): _mean_copied(scores, n) for n in lengths},
        "retrieval_head_ratio": heads.ratio,
        "full_kv_ratio": heads.full_kv_ratio,
    }
    if config.check_seed_overlap:
        halves = [choose(chosen_from[half::2])[0] for half in (0, 1)]
        metrics["overlap_between_halves"] = halves[0].overlap(halves[1])
    if config.check_samples:
        metrics["check"], found = check_choice(model, tokenizer, texts, usable or [min(lengths)], heads, sparse, config)
        notes += found
    metrics["notes"] = notes
    model_type = model.config.get_text_config(decoder=True).model_type
    identity = model_identity(model_name or getattr(model, "name_or_path", ""), revision)
    base = {**identity, "model_type": model_type, "head_dim": head_dim, "fingerprint": fingerprint(model)}
    artifact = Artifact(base_model=base, config=sparse, heads=heads)
    return artifact.with_stage("calibrate", replace(config, lengths_tokens=tuple(lengths)), metrics)


def default_lengths(context: int, sparse: SparseConfig) -> tuple[int, ...]:
    """An eighth, a quarter and a half of the context, none shorter than twice window + sinks, or the context itself."""
    shortest = 2 * (sparse.window_tokens + sparse.sink_tokens)
    return tuple(sorted({min(context, max(shortest, context // part)) for part in (8, 4, 2)}))


def check_lengths(lengths: tuple[int, ...], context: int, sparse: SparseConfig) -> None:
    """ValueError for a document length beyond the context, or with nothing beyond window + sinks."""
    for length in lengths:
        if length > context:
            raise ValueError(f"A length of {length} tokens is beyond the model's context of {context}; ask for less.")
        if length <= sparse.window_tokens + sparse.sink_tokens:
            raise ValueError(
                f"Documents of {length} tokens are not longer than window + sinks "
                f"({sparse.window_tokens} + {sparse.sink_tokens}); use longer documents or a smaller --window-tokens."
            )


@torch.no_grad()
def score_document(
    model: Any, document: Tensor, other: Tensor, sparse: SparseConfig, config: CalibrateConfig, *, index: int
) -> DocumentScore:
    """Attention of every head in one document: from the later needle to the earlier, and beyond the window.

    Args:
        document, other: [length] int64; the needle is a shuffled span of `other`.
    """
    rng = random.Random(f"{config.seed}:{index}:{len(document)}")
    length, span = len(document), config.needle_tokens
    start = rng.randrange(len(other) - span)
    needle = other[start : start + span][torch.tensor(rng.sample(range(span), span))]
    newest = length - span - sparse.window_tokens  # the earlier span must lie outside the later one's window
    early = rng.randrange(4, max(5, min(newest - span, length // 3)))
    tokens = document.clone()
    tokens[early : early + span] = needle
    tokens[length - span :] = needle
    low = min(sparse.window_tokens + sparse.sink_tokens, length - span - 1)
    positions = torch.tensor(sorted(rng.choices(range(low, length - span), k=config.queries)))
    later = torch.arange(length - span, length)
    layers, query_heads, _, _ = head_counts(model)
    far, near = torch.zeros(layers, query_heads), torch.zeros(layers, query_heads)

    def observe(seen: Observed) -> None:
        slots = torch.arange(length, device=seen.q.device)
        for rows, store in ((positions, far), (later, near)):
            rows = rows.to(seen.q.device)
            weights = attention_rows(seen, rows)  # [Hq, rows, N]
            if store is far:
                beyond = (rows[:, None] - slots >= sparse.window_tokens) & (slots >= sparse.sink_tokens)
                mass = (weights * beyond).sum(-1)
            else:
                mass = weights[..., early : early + span].sum(-1)
            store[seen.layer] = mass.mean(-1).cpu()

    with recording(model, observe):
        logits = model(tokens[None].to(model.device), logits_to_keep=span).logits[0]
    known = 4  # the first tokens of the later span do not yet say what follows
    copied = (logits[known:-1].argmax(-1).cpu() == needle[known + 1 :]).float().mean().item()
    return DocumentScore(length, near, far, copied)


def attention_rows(seen: Observed, rows: Tensor) -> Tensor:
    """Full attention of all query heads at some query positions: [Hq, rows, N] float32 (batch of one)."""
    size = seen.q.shape[1] // seen.k.shape[1]
    k = seen.k[0].float().repeat_interleave(size, 0)
    logits = (seen.q[0, :, rows].float() @ k.transpose(-1, -2)) * seen.scaling
    slots = torch.arange(k.shape[1], device=k.device)
    return logits.masked_fill(slots > rows[:, None], -torch.inf).softmax(-1)


def combine(scores: list[DocumentScore], *, with_needle: bool = True) -> Tensor:
    """[layers, query heads] in [0, 1]: the larger of needle score and far score, each scaled to 1."""
    parts = [torch.stack([s.far for s in scores]).mean(0)]
    if with_needle:
        parts.append(torch.stack([s.needle for s in scores]).mean(0))
    return torch.stack([p / p.max().clamp(min=1e-9) for p in parts]).amax(0)


def _mean_copied(scores: list[DocumentScore], length: int) -> float:
    some = [s.copied for s in scores if s.length_tokens == length]
    return sum(some) / len(some)


def check_choice(
    model: Any,
    tokenizer: Any,
    texts: dict[int, list[Tensor]],
    usable: list[int],
    heads: HeadMap,
    sparse: SparseConfig,
    config: CalibrateConfig,
) -> tuple[dict[str, Any], list[str]]:
    """Needle questions at the longest usable length: dense model against dense retrieval heads + window."""
    length = max(usable)
    samples = needle_samples(texts[length], tokenizer, kind="single", count=config.check_samples, seed=config.seed)
    dense = grade_all(model, samples, what="Checking the dense model")
    with attached(model, heads, sparse):
        chosen = grade_all(model, samples, what="Checking the chosen heads")
    before, after = sum(dense) / len(dense), sum(chosen) / len(chosen)
    notes = []
    if before < CAN_COPY:
        notes.append(f"The dense model answers only {before:.0%} of the needle questions at {length} tokens itself.")
    elif after < 0.9 * before:
        notes.append(
            f"The chosen heads lose retrieval: {before:.0%} -> {after:.0%} at {length} tokens. Choose a larger "
            "--retrieval-ratio or --window-tokens, or calibrate on more documents."
        )
    return {"length_tokens": length, "samples": len(samples), "dense": before, "chosen_heads": after}, notes
