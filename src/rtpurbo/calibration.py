"""Find the retrieval heads (paper, section 3.1): calibrate(model, tokenizer, ...) -> Artifact.

1. Documents of several lengths, of three kinds in turn: an identical random span near the start and at the end, hidden
   facts with five questions (of one kind: for one, for several, among many, along a chain), ordinary text.
2. Needle score of a head (the paper's): attention mass from the later span to the earlier one.
3. Effect of a head, one per kind and kind of question: what the model's answers lose when the head turns local, to first
   order. Every head's output gets a gate between what it is and what it would be; the gradient of the objective is the
   effect. Answers: the repeated span and the hidden facts, where the dense model gives them; the text's own next tokens.
4. Rounds: effects are measured where all heads are full, then where the best so far are and all others local, fewer in
   every round. What a head is for shows only when those that could stand in for it are local.
5. Lengths at which the model cannot copy the span itself are left out. The effects of the heads of a KV group that is
   chosen as a whole are added; a unit's score is its largest one over the kinds, each scaled to 1; the highest are
   retrieval heads. With `target_recovery`: more of them than the share, until enough of what the dense model does is left
   (recovery.py).
6. With `window_mass`: every local KV head gets the shortest window that keeps this share of its heads' near attention.
7. Check: needle questions, dense model against dense retrieval heads + window.

Every other document is drawn with another seed: its text, its needle, its positions. Both draws together decide; how far
their choices agree when each decides alone says what another seed would have changed. That costs nothing, where a second
calibration would double the time, and it errs on the safe side, because each draw has only half of the documents.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attach import attached, borrowed, checkpoint_activations, gives_back, recording
from .attention import Observed
from .checkpoint import Artifact
from .config import CalibrateConfig, SparseConfig, default_lengths, default_window_tokens
from .data import KNOWN_TOKENS, documents, repeated_span, several_questions
from .evals.needle import grade_all, needle_samples
from .families import attention_layers, check_index_dim, check_lengths, context_tokens, head_counts
from .gates import Gates, gated
from .heads import HeadMap
from .models import fingerprint, model_identity
from .ops import far_slots, near_slots
from .progress import track
from .recovery import choose_share

CAN_COPY = 0.3
"""A length counts when the model predicts at least this share of the repeated span's tokens, a question likewise."""
ROUNDS = 4
KINDS = ("span", "question", "text")
QUESTIONS = ("single", "many_values", "chain", "many_keys", "many_queries")
"""Kinds of question, in turn."""
QUESTIONS_ASKED = 5
"""Questions in a document, at most: one alone says little about 300 heads, and a forward pass costs the same."""
TEXT_POSITIONS = 512
TEXT_WEIGHT = 10.0
"""What a nat of KL on text weighs against a nat on an answer, when gates are learned."""
SHORTEST_WINDOW_TOKENS = 128
"""No rung of the window ladder is shorter, but for window_tokens itself."""
OTHER_SEED = 1_000_003
"""Added to the seed for the second draw; so large that runs with neighbouring seeds share no draw."""


@dataclass
class DocumentScore:
    """What one document says about every head, as [layers, query heads] tables; unconverted layers are zero."""

    kind: str
    """"span", "text", or the kind of question"""
    length_tokens: int
    tables: dict[str, Tensor]
    """"needle" (span documents), "far" (attention mass beyond the window), "effect" """
    right: float
    """Share of the span's or answer's tokens that the dense model predicts; 1 for text."""
    kept: Tensor | None = None
    """[layers, query heads, rungs]: share of the mass in window and sinks that shorter windows keep (text documents)."""


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
    draws = (config, replace(config, seed=config.seed + OTHER_SEED))
    texts = [
        {n: documents(sources, tokenizer, length_tokens=n, count=config.documents + 1, seed=draw.seed) for n in lengths}
        for draw in draws
    ]

    def usable_lengths(some: list[DocumentScore]) -> list[int]:
        return [n for n in lengths if _mean_copied(some, n) >= CAN_COPY]

    def counted(some: list[DocumentScore]) -> list[DocumentScore]:
        usable = usable_lengths(some)
        return [s for s in some if (s.length_tokens in usable if usable else s.kind == "text")]

    unit = group_size if granularity == "group" else 1
    converted = [i in attention_layers(model) for i in range(layers)]
    drawn: tuple[list[DocumentScore], list[DocumentScore]] = ([], [])
    learned = [
        Gates(converted, query_heads, unit, ratio=config.retrieval_ratio, steps=documents_of * len(lengths))
        for documents_of in (-(-config.documents // 2), config.documents // 2)
    ]

    def score(of: tuple[int, ...]) -> Tensor:
        """[layers, query heads], from these draws."""
        if config.scoring == "gates":
            return torch.stack([learned[draw].score for draw in of]).mean(0)
        return combine(counted([s for draw in of for s in drawn[draw]]), config.scoring, unit)

    def choose(ratio: float, of: tuple[int, ...] = (0, 1)) -> HeadMap:
        rows = [row if there else None for row, there in zip(score(of).tolist(), converted, strict=True)]
        return HeadMap.from_scores(rows, kv_heads=kv_heads, granularity=granularity, ratio=ratio, threshold=config.threshold)

    rounds = min(ROUNDS, config.documents // len(KINDS)) if config.scoring == "effect" and config.threshold is None else 1
    plan = [(i * rounds // config.documents, at, i) for i in range(config.documents) for at in range(len(lengths))]
    now, full = 0, torch.ones(layers, query_heads)
    for turn, at, i in track(plan, total=len(plan), what="Calibrating on documents"):
        if turn > now:
            now, best = turn, choose(config.retrieval_ratio ** (turn / rounds))
            full = torch.zeros(layers, query_heads)
            for layer in best.layers:
                full[layer, list(best.retrieval_heads(layer))] = 1.0
        number = i % len(KINDS) * -(-config.documents // len(KINDS)) + i // len(KINDS)  # every kind meets every source
        draw = i % len(draws)  # kinds alternate in threes, so that both draws see all of them
        document, other = (texts[draw][lengths[at]][n % (config.documents + 1)] for n in (number, number + 1))
        index = i + len(KINDS) * at  # every length begins with another kind of question
        gates = learned[draw].values if config.scoring == "gates" else full
        found = score_document(model, tokenizer, document, other, sparse, draws[draw], index=index, gates=gates)
        if config.scoring == "gates":
            learned[draw].step(-found.tables["effect"])
        drawn[draw].append(found)
    scores = drawn[0] + drawn[1]
    usable = usable_lengths(scores)
    notes = []
    if not usable:
        notes.append("The model itself cannot copy a repeated span at any of these lengths; ordinary text alone decided.")
        if config.scoring == "needle":
            raise ValueError(
                f"The model cannot copy a repeated span at {', '.join(map(str, lengths))} tokens, which is all that "
                "scoring='needle' looks at; use scoring='effect' or other lengths."
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
        "scores": [[round(x, 4) for x in row] for row in score((0, 1)).tolist()],
        "lengths_tokens": list(lengths),
        "usable_lengths_tokens": usable,
        "copy_accuracy": {str(n): _mean_copied(scores, n) for n in lengths},
        "retrieval_head_ratio": heads.ratio,
        "full_kv_ratio": heads.full_kv_ratio,
    }
    if recovered:
        metrics["target_recovery"] = recovered
    if config.documents >= len(KINDS) * len(draws):  # every draw has every kind
        first, second = (choose(ratio, (draw,)) for draw in range(len(draws)))
        metrics["overlap_between_seeds"] = first.overlap(second)
    if config.window_mass is not None:
        kept = kept_by_group(counted(scores), heads)
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


def score_document(
    model: Any,
    tokenizer: Any,
    document: Tensor,
    other: Tensor,
    sparse: SparseConfig,
    config: CalibrateConfig,
    *,
    index: int,
    gates: Tensor | None = None,
) -> DocumentScore:
    """Scores of every head from document number `index`, whose kind follows from its number.

    Args:
        document, other: [length] int64; a repeated span is a shuffled piece of `other`.
        gates: [layers, query heads], how far every head is full (1) and not local (0) while effects are measured; default:
            all are full.
    """
    rng = random.Random(f"{config.seed}:{index}:{len(document)}")
    kind, length, span = KINDS[index % len(KINDS)], len(document), config.needle_tokens
    turn = index // len(KINDS)
    tokens, early, answers = document.clone(), 0, torch.tensor([], dtype=torch.long)
    if kind == "span":
        newest = length - 2 * span - sparse.window_tokens  # the earlier span lies outside the later one's window
        latest = min(newest, length // 3)
        tokens, early = repeated_span(document, other, span_tokens=span, latest=latest, rng=rng)
        answers = torch.arange(length - span + KNOWN_TOKENS, length - 1)
    elif kind == "question":
        kind = QUESTIONS[turn % len(QUESTIONS)]
        depth = rng.uniform(0, max(0.05, 0.9 - sparse.window_tokens / length))
        seed = str(rng.random())
        sample = several_questions(document, tokenizer, kind=kind, count=QUESTIONS_ASKED, depth=depth, seed=seed)
        tokens, answers = sample.tokens, torch.tensor(sample.label_positions)
    body = torch.tensor([], dtype=torch.long)
    if kind == "text" or config.scoring == "gates":
        low = min(sparse.window_tokens + sparse.sink_tokens, length - 2)
        count = min(TEXT_POSITIONS, length - 1 - low)
        body = torch.tensor(sorted(rng.sample(range(low, length - 1), count)))
    positions = torch.cat([answers, body])
    with borrowed(model), torch.no_grad():  # what the dense model does not do, no head is needed for
        inputs = tokens[None].to(model.device)
        dense = model(inputs, logits_to_keep=positions.to(model.device), use_cache=False).logits[0]
    done = dense[: len(answers)].argmax(-1).cpu() == tokens[answers + 1]
    right = done.float().mean().item() if len(answers) else 1.0
    layers, query_heads, _, _ = head_counts(model)
    tables = {name: torch.zeros(layers, query_heads) for name in ("needle", "far", "effect")}
    ladder = rungs(sparse.window_tokens) if kind == "text" and config.window_mass is not None else ()
    kept = torch.zeros(layers, query_heads, len(ladder))
    shown = answers if len(answers) else body
    shown = shown[:: max(1, len(shown) // 64)]

    def observe(seen: Observed) -> None:
        rows = shown.to(seen.q.device)
        weights = attention_rows(seen, rows)  # [Hq, rows, N]
        beyond = far_slots(rows, length, sparse.window_tokens, sparse.sink_tokens)
        tables["far"][seen.layer] = (weights * beyond).sum(-1).mean(-1).cpu()
        if ladder:
            kept[seen.layer] = kept_mass(weights, rows, ladder, sparse.sink_tokens).cpu()
        if kind == "span":
            tables["needle"][seen.layer] = weights[..., early : early + span].sum(-1).mean(-1).cpu()

    def learned_loss(logits: Tensor) -> Tensor:
        """What the gates learn from: the answers, and the dense model's next tokens."""
        count = len(answers)
        student, teacher = (x[count:].float().log_softmax(-1) for x in (logits, dense))
        loss = TEXT_WEIGHT * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        if done.any():
            expected = tokens[answers[done] + 1].to(logits.device)
            loss = loss + F.cross_entropy(logits[:count][done.to(logits.device)].float(), expected)
        return loss

    def effect_loss(logits: Tensor) -> Tensor:
        """Answers: the right token's logit against all others (it does not saturate); text: its log-probability."""
        counted = done if done.any() else torch.ones(len(positions), dtype=torch.bool)
        want = tokens[positions[counted] + 1].to(logits.device)[:, None]
        scores = logits[counted.to(logits.device)].float()
        others = scores if kind == "text" else scores.scatter(1, want, -torch.inf)
        return (others.logsumexp(-1) - scores.gather(1, want)[:, 0]).mean()

    if config.by_gradient:
        at = torch.ones(layers, query_heads) if gates is None else gates
        loss = learned_loss if config.scoring == "gates" else effect_loss
        tables["effect"] = -gate_gradient(model, tokens, positions, sparse, at, loss, observe)
    else:
        with torch.no_grad(), recording(model, observe):
            model(tokens[None].to(model.device), logits_to_keep=1)
    return DocumentScore(kind, length, tables, right, kept if ladder else None)


def gate_gradient(
    model: Any,
    tokens: Tensor,
    positions: Tensor,
    sparse: SparseConfig,
    gates: Tensor,
    loss: Callable[[Tensor], Tensor],
    observe: Callable[[Observed], None],
) -> Tensor:
    """[layers, query heads]: what `loss` of the logits at `positions` gains when a head becomes more full, to first order.

    Its negative is what a full head's turning local costs, and what a local head's turning full would win.
    """
    at = gates.to(model.device, torch.float32, copy=True).requires_grad_(True)
    with borrowed(model), torch.enable_grad(), gated(model, sparse, at, observe):
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

    At each length it is the mean of the text documents.
    """
    texts = [s for s in scores if s.kept is not None]
    lengths = sorted({s.length_tokens for s in texts})
    means = [torch.stack([s.kept for s in texts if s.kept is not None and s.length_tokens == n]).mean(0) for n in lengths]
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


def combine(scores: list[DocumentScore], scoring: str, unit: int = 1) -> Tensor:
    """[layers, query heads] in [0, 1]: the largest of the scores that `scoring` names, each scaled to 1.

    Every document counts the same. Questions of which the dense model gets too little right do not count.

    Args:
        unit: query heads that are chosen together; their effects are added, of the paper's masses the largest counts, and
            all get the same score.
    """
    kinds = {
        "effect": [("effect", kind) for kind in ("span", *QUESTIONS, "text")],
        "attention": [("needle", "span"), ("far", "text")],
        "needle": [("needle", "span")],
    }[scoring]
    parts = []
    for table, kind in kinds:
        some = [s.tables[table] for s in scores if s.kind == kind and s.right >= CAN_COPY]
        if some:
            units = torch.stack([t / t.clamp(min=0).sum().clamp(min=1e-12) for t in some]).mean(0).unflatten(1, (-1, unit))
            whole = units.sum(-1) if table == "effect" else units.amax(-1)
            parts.append(_scaled(whole).repeat_interleave(unit, 1))
    return torch.stack(parts).amax(0)


def _scaled(table: Tensor) -> Tensor:
    positive = table.clamp(min=0)
    return positive / positive.max().clamp(min=1e-12)


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
