"""Find the retrieval heads (paper, section 3.1): calibrate(model, tokenizer, ...) -> Artifact.

1. Documents of several lengths: one in three has an identical random span near the start and at the end, the others hidden
   facts with five questions (of one kind: for one, for several, among many, along a chain), some after an answered
   example far ahead of them.
2. Gates (gates.py): each document moves the gates of all heads against the gradient of a loss: cross-entropy of those
   answers, of span and questions, that the dense model gives, and KL to it on the text between. Within a shrinking budget,
   so that every head is judged where the others are as they will be. A unit's score is its gate; the highest are retrieval
   heads. With `target_recovery`: more of them than the share, until enough of what the dense model does is left
   (recovery.py).
3. Or, with scoring="needle" (the paper's): attention mass from the later span to the earlier one.
4. With `window_mass`: every local KV head gets the shortest window that keeps this share of its heads' near attention.
5. Check: needle questions, dense model against dense retrieval heads + window.

Every other document is drawn with another seed: its text, its needle, its positions; each draw moves gates of its own. Both
decide; how far their choices agree when each decides alone says what another seed would have changed. That costs nothing,
where a second calibration would double the time, and it errs on the safe side, because each draw has only half of the
documents.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attach import attached, borrowed, checkpoint_activations, gives_back, recording
from .attention import Observed
from .checkpoint import Artifact
from .config import CalibrateConfig, SparseConfig, default_lengths, default_window_tokens
from .data import documents
from .evals.needle import grade_all, needle_samples
from .families import attention_layers, check_index_dim, check_lengths, context_tokens, head_counts
from .gates import Gates, gated
from .heads import HeadMap
from .models import fingerprint, model_identity
from .ops import near_slots
from .progress import track
from .questions import repeated_span, span_answers, training_sample
from .recovery import choose_share

CAN_COPY = 0.3
"""A span counts when the model predicts at least this share of its tokens, a length when it does so on average."""
CYCLE = 3
"""One document in so many has a span."""
QUESTIONS = ("single", "many_values", "chain", "many_keys", "many_queries")
"""Kinds of question, in turn."""
QUESTIONS_ASKED = 5
"""Questions in a document, at most: one alone says little about 300 heads, and a forward pass costs the same."""
TEXT_POSITIONS = 512
ROWS = 64
"""Queries of a document whose whole attention is looked at, at most."""
SHORTEST_WINDOW_TOKENS = 128
"""No rung of the window ladder is shorter, but for window_tokens itself."""
OTHER_SEED = 1_000_003
"""Added to the seed for the second draw; so large that runs with neighbouring seeds share no draw."""


@dataclass(frozen=True)
class Task:
    """A document, and what of it counts."""

    kind: str
    """"span", or the kind of question"""
    tokens: Tensor
    """[length] int64"""
    answers: Tensor
    """Positions whose next token is part of an answer: of the later span, or of what is asked."""
    text: Tensor
    """Other positions beyond window and sinks, sampled."""
    early: int = 0
    """Where the earlier span begins."""

    @property
    def positions(self) -> Tensor:
        """Those of answers, then those of text."""
        return torch.cat([self.answers, self.text])


@dataclass
class DocumentScore:
    """What one document says about every head, as [layers, query heads] tables; unconverted layers are zero."""

    kind: str
    length_tokens: int
    right: float
    """Share of the answers' tokens that the dense model predicts."""
    needle: Tensor
    """Attention mass from the later span to the earlier one; of documents with a span."""
    gradient: Tensor | None = None
    """Of the loss by the gates; scoring="gates" alone."""
    kept: Tensor | None = None
    """[layers, query heads, rungs]: share of the mass in window and sinks that shorter windows keep, for `window_mass`."""


@gives_back
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
        An artefact with the head map; usable at once (dense retrieval heads + window). Its metrics have, from 6 documents
        on, "overlap_between_seeds": the share of the retrieval heads that two halves of the documents, drawn with two
        seeds, both choose.

    Raises:
        ValueError: unsupported model, a length beyond its context or not longer than window + sinks, too little text, or
            a model that cannot copy, with scoring="needle".
    """
    config = config or CalibrateConfig()
    context = context_tokens(model)
    sparse = sparse or SparseConfig(window_tokens=default_window_tokens(context))
    layers, query_heads, kv_heads, head_dim = head_counts(model)
    group_size = query_heads // kv_heads
    granularity = config.chosen_unit(group_size)
    check_index_dim(sparse, head_dim)
    lengths = config.lengths_tokens or default_lengths(context, sparse)
    check_lengths(lengths, context, sparse)
    seeds = (config.seed, config.seed + OTHER_SEED)  # one for each draw
    of_draw = (-(-config.documents // 2), config.documents // 2)
    texts = [
        {n: documents(sources, tokenizer, length_tokens=n, count=of_draw[0] + 1, seed=seed) for n in lengths}
        for seed in seeds
    ]

    unit = group_size if granularity == "group" else 1
    converted = [i in attention_layers(model) for i in range(layers)]
    drawn: tuple[list[DocumentScore], list[DocumentScore]] = ([], [])
    gates = [
        Gates(converted, query_heads, unit, ratio=config.retrieval_ratio, steps=count * len(lengths)) for count in of_draw
    ]

    def score(of: tuple[int, ...] = (0, 1)) -> Tensor:
        """[layers, query heads], from these draws."""
        if config.scoring == "gates":
            return torch.stack([gates[draw].score for draw in of]).mean(0)
        return needle_score([s for draw in of for s in drawn[draw]], unit)

    def choose(ratio: float, of: tuple[int, ...] = (0, 1)) -> HeadMap:
        rows = [row if there else None for row, there in zip(score(of).tolist(), converted, strict=True)]
        return HeadMap.from_scores(rows, kv_heads=kv_heads, granularity=granularity, ratio=ratio, threshold=config.threshold)

    plan = [(i, at) for i in range(config.documents) for at in range(len(lengths))]
    for i, at in track(plan, total=len(plan), what="Calibrating on documents"):
        turn, draw = divmod(i, len(seeds))
        number = turn % CYCLE * -(-of_draw[0] // CYCLE) + turn // CYCLE  # sources alternate, so that every kind meets all
        document, other = (texts[draw][lengths[at]][n % (of_draw[0] + 1)] for n in (number, number + 1))
        index = turn + CYCLE * at  # every length begins with another kind of question
        kind = QUESTIONS[(index - index // CYCLE - 1) % len(QUESTIONS)] if index % CYCLE else "span"
        seed = f"{seeds[draw]}:{index}:{len(document)}"
        task = make_task(document, other, tokenizer, sparse, kind=kind, span_tokens=config.needle_tokens, seed=seed)
        found = score_document(model, task, sparse, config, gates[draw].values)
        if found.gradient is not None:
            gates[draw].step(found.gradient)
        drawn[draw].append(found)
    scores = drawn[0] + drawn[1]
    copied = {n: _mean_copied(scores, n) for n in lengths}
    usable = [n for n in lengths if copied[n] >= CAN_COPY]
    notes = []
    if not usable:
        notes.append("The model itself cannot copy a repeated span at any of these lengths; what else it knows decided.")
        if config.scoring == "needle":
            raise ValueError(
                f"The model cannot copy a repeated span at {', '.join(map(str, lengths))} tokens, which is all that "
                "scoring='needle' looks at; use scoring='gates' or other lengths."
            )

    ratio = config.retrieval_ratio
    recovered: dict[str, Any] = {}
    heads = choose(ratio)
    if config.target_recovery is not None:
        heads, recovered, more = choose_share(
            model, tokenizer, texts[0][max(usable or lengths)], choose, sparse,
            first=ratio, target=config.target_recovery, samples=config.check_samples, seed=config.seed,
        )  # fmt: skip
        ratio, notes = recovered["chosen_ratio"], notes + more
    metrics: dict[str, Any] = {
        "scores": [[round(x, 4) for x in row] for row in score().tolist()],
        "lengths_tokens": list(lengths),
        "usable_lengths_tokens": usable,
        "copy_accuracy": {str(n): share for n, share in copied.items()},
        "retrieval_head_ratio": heads.ratio,
        "full_kv_ratio": heads.full_kv_ratio,
    }
    if recovered:
        metrics["target_recovery"] = recovered
    if config.documents >= CYCLE * len(seeds):  # every draw has spans and questions
        first, second = (choose(ratio, (draw,)) for draw in range(len(seeds)))
        metrics["overlap_between_seeds"] = first.overlap(second)
    if config.window_mass is not None:
        kept = kept_by_group(scores, heads)
        heads = with_ladder(heads, kept, sparse.window_tokens, config.window_mass)
        metrics["window_ladder"] = {
            "rungs_tokens": list(rungs(sparse.window_tokens)),
            "kept_mass": [
                None if row is None else [[round(x, 4) for x in group] for group in layer]
                for layer, row in zip(kept.tolist(), heads.retrieval, strict=True)
            ],
            "local_kv_heads": {str(n): count for n, count in heads.window_counts(sparse.window_tokens).items()},
        }
    if config.check_samples:
        metrics["check"], more = check_choice(model, tokenizer, texts[0], usable or [min(lengths)], heads, sparse, config)
        notes += more
    metrics["notes"] = notes
    model_type = model.config.get_text_config(decoder=True).model_type
    identity = model_identity(model_name or getattr(model, "name_or_path", ""), revision)
    base = {**identity, "model_type": model_type, "head_dim": head_dim, "fingerprint": fingerprint(model)}
    artifact = Artifact(base_model=base, config=sparse, heads=heads)
    return artifact.with_stage("calibrate", replace(config, lengths_tokens=tuple(lengths)), metrics)


def make_task(
    document: Tensor, other: Tensor, tokenizer: Any, sparse: SparseConfig, *, kind: str, span_tokens: int, seed: str
) -> Task:
    """What is asked of a document.

    Args:
        document, other: [length] int64; a repeated span is a shuffled piece of `other`.
        kind: "span" or a kind of question (`rtpurbo.questions.QUESTION_KINDS`).
        span_tokens: length of a repeated span.

    Raises:
        ValueError: the document has no room for it.
    """
    rng, length, early, end = random.Random(seed), len(document), 0, len(document) - 1
    if kind == "span":
        newest = length - 2 * span_tokens - sparse.window_tokens  # the earlier span lies outside the later one's window
        tokens, early = repeated_span(document, other, span_tokens=span_tokens, latest=min(newest, length // 3), rng=rng)
        answers = torch.tensor(span_answers(length, span_tokens))
        end = length - span_tokens - 1
    else:
        depth = rng.uniform(0, max(0.05, 0.9 - sparse.window_tokens / length))
        sample = training_sample(document, tokenizer, kind=kind, depth=depth, seed=str(rng.random()), count=QUESTIONS_ASKED)
        tokens, answers = sample.tokens, torch.tensor(sample.label_positions)
    low = min(sparse.window_tokens + sparse.sink_tokens, length - 2)
    rest = sorted({*range(low, end)} - {*answers.tolist()}) or [low]
    text = torch.tensor(sorted(rng.sample(rest, min(TEXT_POSITIONS, len(rest)))))
    return Task(kind, tokens, answers, text, early)


def score_document(
    model: Any, task: Task, sparse: SparseConfig, config: CalibrateConfig, gates: Tensor | None = None
) -> DocumentScore:
    """Scores of every head from one document.

    Args:
        gates: [layers, query heads], how far every head is full (1) and not local (0); default: all are full.
    """
    tokens, answers, positions, length = task.tokens, task.answers, task.positions, len(task.tokens)
    layers, query_heads, _, _ = head_counts(model)
    needle = torch.zeros(layers, query_heads)
    ladder = rungs(sparse.window_tokens) if config.window_mass is not None else ()
    kept = torch.zeros(layers, query_heads, len(ladder))

    def observe(seen: Observed) -> None:
        if ladder:
            rows = _spread(task.text).to(seen.q.device)
            kept[seen.layer] = kept_mass(attention_rows(seen, rows), rows, ladder, sparse.sink_tokens).cpu()
        if config.scoring == "needle" and task.kind == "span":
            weights = attention_rows(seen, _spread(answers).to(seen.q.device))  # [Hq, rows, N]
            needle[seen.layer] = weights[..., task.early : task.early + config.needle_tokens].sum(-1).mean(-1).cpu()

    looked_at = ladder or config.scoring == "needle"
    with borrowed(model), torch.no_grad(), recording(model, observe) if looked_at else nullcontext():
        inputs = tokens[None].to(model.device)
        dense = model(inputs, logits_to_keep=positions.to(model.device), use_cache=False).logits[0]
    done = dense[: len(answers)].argmax(-1).cpu() == tokens[answers + 1]  # what it does not do, no head is needed for

    def loss(logits: Tensor) -> Tensor:
        count = len(answers)
        student, teacher = (x[count:].float().log_softmax(-1) for x in (logits, dense))
        found = config.text_weight * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        if done.any():
            expected = tokens[answers[done] + 1].to(logits.device)
            found = found + F.cross_entropy(logits[:count][done.to(logits.device)].float(), expected)
        return found

    gradient = None
    if config.scoring == "gates":
        at = torch.ones(layers, query_heads) if gates is None else gates
        gradient = gate_gradient(model, tokens, positions, sparse, at, loss)
    right = done.float().mean().item()
    return DocumentScore(task.kind, length, right, needle, gradient, kept if ladder else None)


def _spread(positions: Tensor) -> Tensor:
    return positions[:: -(-len(positions) // ROWS)]


def gate_gradient(
    model: Any,
    tokens: Tensor,
    positions: Tensor,
    sparse: SparseConfig,
    gates: Tensor,
    loss: Callable[[Tensor], Tensor],
) -> Tensor:
    """[layers, query heads]: how much more `loss` of the logits at `positions` becomes with a gate, per unit of it."""
    at = gates.to(model.device, torch.float32, copy=True).requires_grad_(True)
    with borrowed(model), torch.enable_grad(), gated(model, sparse, at):
        model.requires_grad_(False)
        checkpoint_activations(model)
        inputs = tokens[None].to(model.device)
        loss(model(inputs, logits_to_keep=positions.to(model.device), use_cache=False).logits[0]).backward()
    assert at.grad is not None
    return at.grad.cpu()


def attention_rows(seen: Observed, rows: Tensor) -> Tensor:
    """Full attention of all query heads at some query positions: [Hq, rows, N] float32 (batch of one)."""
    k = seen.k[0].float()
    q = seen.q[0, :, rows].float().unflatten(0, (k.shape[0], -1)).flatten(1, 2)  # [Hkv, group * rows, D]
    logits = (q @ k.transpose(-1, -2)).unflatten(1, (-1, len(rows))).flatten(0, 1) * seen.scaling
    slots = torch.arange(k.shape[1], device=k.device)
    return logits.masked_fill_(slots > rows[:, None], -torch.inf).softmax(-1)


def rungs(window_tokens: int) -> tuple[int, ...]:
    """Windows to choose from, in tokens, ascending: an eighth, a quarter and a half of the window, and all of it."""
    shorter = (window_tokens // part for part in (8, 4, 2))
    return (*(n for n in shorter if n >= SHORTEST_WINDOW_TOKENS), window_tokens)


def kept_mass(weights: Tensor, rows: Tensor, ladder: tuple[int, ...], sink_tokens: int) -> Tensor:
    """[Hq, rungs]: the attention in a rung's window and sinks by that in the longest one's, mean over queries.

    It is the share of what a local head attends to that is left when its window is that short.

    Args:
        weights: [Hq, rows, N] full attention of the queries at `rows`, which have the whole window behind them.
        ladder: windows in tokens, the longest last.
    """
    slots, sinks = torch.arange(weights.shape[-1], device=rows.device), torch.arange(sink_tokens, device=rows.device)[None]
    near = [(weights * near_slots(rows, slots, sinks, window)[0, 0]).sum(-1) for window in ladder]
    return torch.stack([(mass / near[-1].clamp(min=1e-30)).mean(-1) for mass in near], -1)


def kept_by_group(scores: list[DocumentScore], heads: HeadMap) -> Tensor:
    """[layers, KV heads, rungs]: `kept_mass` of the KV head's query head that keeps least, at the length where it does.

    At each length it is the mean of the documents.
    """
    lengths = sorted({s.length_tokens for s in scores})
    means = [torch.stack([s.kept for s in scores if s.kept is not None and s.length_tokens == n]).mean(0) for n in lengths]
    return torch.stack(means).amin(0).unflatten(1, (heads.kv_heads, -1)).amin(2)


def with_ladder(heads: HeadMap, kept: Tensor, window_tokens: int, window_mass: float) -> HeadMap:
    """The same roles, every local KV head with the shortest window that keeps `window_mass`.

    Args:
        kept: [layers, KV heads, rungs], see `kept_by_group`.
    """
    ladder = rungs(window_tokens)

    def shortest(layer: int, kv_head: int) -> int:
        if kv_head in heads.full_kv_heads(layer):
            return window_tokens
        enough = zip(ladder, kept[layer, kv_head].tolist(), strict=True)
        return next((window for window, mass in enough if mass >= window_mass), window_tokens)

    windows = tuple(
        None if row is None else tuple(shortest(layer, g) for g in range(heads.kv_heads))
        for layer, row in enumerate(heads.retrieval)
    )
    return replace(heads, windows=windows)


def needle_score(scores: list[DocumentScore], unit: int = 1) -> Tensor:
    """[layers, query heads] in [0, 1]: mean needle mass over the spans that the dense model copies, the largest one 1.

    Args:
        unit: query heads that are chosen together; all get the largest of their scores.
    """
    spans = [s.needle for s in scores if s.kind == "span" and s.right >= CAN_COPY]
    if not spans:
        return torch.zeros_like(scores[0].needle)
    units = torch.stack(spans).mean(0).unflatten(1, (-1, unit)).amax(-1)
    return (units / units.max().clamp(min=1e-12)).repeat_interleave(unit, 1)


def _mean_copied(scores: list[DocumentScore], length: int) -> float:
    some = [s.right for s in scores if s.length_tokens == length and s.kind == "span"]
    return sum(some) / max(1, len(some))


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
            f"The chosen heads lose retrieval: {before:.0%} -> {after:.0%} of {len(samples)} questions at {length} tokens. "
            "Choose a larger --retrieval-ratio or --window-tokens, or calibrate on more documents."
        )
    return {"length_tokens": length, "samples": len(samples), "dense": before, "chosen_heads": after}, notes
