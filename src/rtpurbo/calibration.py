"""Find the retrieval heads (paper, section 3.1): calibrate(model, tokenizer, ...) -> Artifact.

1. Documents of several lengths, of three kinds in turn: an identical random span near the start and at the end, hidden
   facts with a question (for one, for several, among many, along a chain; half of them after an answered example of the
   same wording, which tempts to copy its answer), ordinary text.
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
from .data import KNOWN_TOKENS, TRAINING_CHAINS, TRAINING_TEMPLATES, documents, question_document, repeated_span
from .evals.needle import grade_all, needle_samples
from .families import attention_layers, check_index_dim, check_lengths, context_tokens, head_counts
from .heads import HeadMap
from .models import fingerprint, model_identity
from .ops import far_slots, near_slots, window_attention
from .progress import track
from .recovery import choose_share

CAN_COPY = 0.3
"""A length counts when the model predicts at least this share of the repeated span's tokens, a question likewise."""
ROUNDS = 4
KINDS = ("span", "question", "text")
QUESTIONS = ("single", "many_values", "chain", "many_keys", "many_queries")
"""Kinds of question, in turn."""
EXAMPLES = 0.5
"""Share of the questions before which one of the same wording is answered."""
TEXT_POSITIONS = 512
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

    def choose(some: list[DocumentScore], ratio: float) -> tuple[HeadMap, Tensor]:
        total = combine(counted(some), config.scoring, group_size if granularity == "group" else 1)
        rows = [total[i].tolist() if i in attention_layers(model) else None for i in range(layers)]
        heads = HeadMap.from_scores(
            rows,
            kv_heads=kv_heads,
            granularity=granularity,
            ratio=ratio,
            threshold=config.threshold,
        )
        return heads, total

    rounds = min(ROUNDS, config.documents // len(KINDS)) if config.scoring == "effect" and config.threshold is None else 1
    plan = [(i * rounds // config.documents, at, i) for i in range(config.documents) for at in range(len(lengths))]
    drawn: tuple[list[DocumentScore], list[DocumentScore]] = ([], [])
    now, full = 0, None
    for turn, at, i in track(plan, total=len(plan), what="Calibrating on documents"):
        if turn > now:
            now, full = turn, choose(drawn[0] + drawn[1], config.retrieval_ratio ** (turn / rounds))[0]
        draw = i % len(draws)  # kinds alternate in threes, so that both draws see all of them
        number = i % len(KINDS) * -(-config.documents // len(KINDS)) + i // len(KINDS)  # every kind meets every source
        document, other = (texts[draw][lengths[at]][n % (config.documents + 1)] for n in (number, number + 1))
        index = i + len(KINDS) * at  # every length begins with another kind of question
        found = score_document(model, tokenizer, document, other, sparse, draws[draw], index=index, heads=full)
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
    heads, total = choose(scores, ratio)
    if config.target_recovery is not None:
        heads, recovered, more = choose_share(
            model, tokenizer, texts[0][max(usable or lengths)], lambda share: choose(scores, share)[0], sparse,
            first=ratio, target=config.target_recovery, samples=config.check_samples, seed=config.seed,
        )  # fmt: skip
        ratio, notes = recovered["chosen_ratio"], notes + more
    metrics: dict[str, Any] = {
        "scores": [[round(x, 4) for x in row] for row in total.tolist()],
        "lengths_tokens": list(lengths),
        "usable_lengths_tokens": usable,
        "copy_accuracy": {str(n): _mean_copied(scores, n) for n in lengths},
        "retrieval_head_ratio": heads.ratio,
        "full_kv_ratio": heads.full_kv_ratio,
    }
    if recovered:
        metrics["target_recovery"] = recovered
    if config.documents >= len(KINDS) * len(draws):  # every draw has every kind
        first, second = (choose(some, ratio)[0] for some in drawn)
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
    heads: HeadMap | None = None,
) -> DocumentScore:
    """Scores of every head from document number `index`, whose kind follows from its number.

    Args:
        document, other: [length] int64; a repeated span is a shuffled piece of `other`.
        heads: the heads that are full while effects are measured, the others being local; default: all.
    """
    rng = random.Random(f"{config.seed}:{index}:{len(document)}")
    kind, length, span = KINDS[index % len(KINDS)], len(document), config.needle_tokens
    turn = index // len(KINDS)
    tokens, early = document.clone(), 0
    if kind == "span":
        newest = length - 2 * span - sparse.window_tokens  # the earlier span lies outside the later one's window
        latest = min(newest, length // 3)
        tokens, early = repeated_span(document, other, span_tokens=span, latest=latest, rng=rng)
        targets = torch.arange(length - span + KNOWN_TOKENS, length - 1)
    elif kind == "question":
        kind = QUESTIONS[turn % len(QUESTIONS)]
        depth = rng.uniform(0, max(0.05, 0.9 - sparse.window_tokens / length))
        tokens, _, last = question_document(
            document, tokenizer, kind=kind, depth=depth, seed=str(rng.random()), example=rng.random() < EXAMPLES,
            template=TRAINING_TEMPLATES[turn % len(TRAINING_TEMPLATES)], chain=TRAINING_CHAINS[turn % len(TRAINING_CHAINS)],
        )  # fmt: skip
        targets = torch.tensor(last)
    else:
        low = min(sparse.window_tokens + sparse.sink_tokens, length - 2)
        count = min(TEXT_POSITIONS, length - 1 - low)
        targets = torch.tensor(sorted(rng.sample(range(low, length - 1), count)))
    right = 1.0
    if kind != "text":  # what the dense model does not do, no head is needed for
        with borrowed(model), torch.no_grad():
            guess = model(tokens[None].to(model.device), logits_to_keep=targets.to(model.device), use_cache=False).logits[0]
        done = guess.argmax(-1).cpu() == tokens[targets + 1]
        right = done.float().mean().item()
        targets = targets[done] if done.any() else targets
    layers, query_heads, _, _ = head_counts(model)
    tables = {name: torch.zeros(layers, query_heads) for name in ("needle", "far", "effect")}
    ladder = rungs(sparse.window_tokens) if kind == "text" and config.window_mass is not None else ()
    kept = torch.zeros(layers, query_heads, len(ladder))

    def observe(seen: Observed) -> None:
        rows = targets[:: max(1, len(targets) // 64)].to(seen.q.device)
        weights = attention_rows(seen, rows)  # [Hq, rows, N]
        beyond = far_slots(rows, length, sparse.window_tokens, sparse.sink_tokens)
        tables["far"][seen.layer] = (weights * beyond).sum(-1).mean(-1).cpu()
        if ladder:
            kept[seen.layer] = kept_mass(weights, rows, ladder, sparse.sink_tokens).cpu()
        if kind == "span":
            tables["needle"][seen.layer] = weights[..., early : early + span].sum(-1).mean(-1).cpu()

    if config.scoring == "effect":
        _effects(model, tokens, targets, sparse, tables["effect"], observe, margin=kind != "text", heads=heads)
    else:
        with torch.no_grad(), recording(model, observe):
            model(tokens[None].to(model.device), logits_to_keep=1)
    return DocumentScore(kind, length, tables, right, kept if ladder else None)


def _effects(
    model: Any,
    tokens: Tensor,
    targets: Tensor,
    sparse: SparseConfig,
    table: Tensor,
    observe: Any,
    *,
    margin: bool,
    heads: HeadMap | None = None,
) -> None:
    """Fill `table` [layers, query heads] with each head's effect.

    Args:
        heads: who is full meanwhile. A local head's effect is what the model would win were it full.
        margin: measure the right token's logit against all others (it does not saturate), else its log-probability.
    """
    modules = attention_layers(model)
    gates = {layer: torch.zeros(table.shape[1], device=model.device, requires_grad=True) for layer in modules}
    every = torch.arange(table.shape[1])
    full = {i: torch.isin(every, every if heads is None else torch.tensor(heads.retrieval_heads(i))) for i in modules}
    other: dict[int, Tensor] = {}
    seen_once: set[int] = set()

    def watch(seen: Observed) -> None:
        with torch.no_grad():
            if seen.layer not in seen_once:  # activation checkpointing runs every layer twice
                observe(seen)
                seen_once.add(seen.layer)
            size = seen.q.shape[1] // seen.k.shape[1]
            k, v = (x.repeat_interleave(size, 1) for x in (seen.k, seen.v))
            to_local, to_full = full[seen.layer].nonzero()[:, 0], (~full[seen.layer]).nonzero()[:, 0]
            sinks = torch.arange(sparse.sink_tokens, device=k.device)[None]
            out = torch.empty_like(seen.q)
            if len(to_local):
                keys, values = k[:, to_local], v[:, to_local]
                out[:, to_local] = window_attention(
                    seen.q[:, to_local], keys, values, *(x[:, :, : sparse.sink_tokens] for x in (keys, values)),
                    first_slot=0, sinks=sinks, window_tokens=sparse.window_tokens, scaling=seen.scaling,
                )  # fmt: skip
            if len(to_full):
                out[:, to_full] = F.scaled_dot_product_attention(
                    seen.q[:, to_full], k[:, to_full], v[:, to_full], is_causal=True, scale=seen.scaling
                )
            other[seen.layer] = out

    def gate(layer: int):
        def hook(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            now = args[0].unflatten(-1, (table.shape[1], -1))  # [1, N, Hq, D]
            away = (other.pop(layer).transpose(1, 2) - now).detach()  # popped: one layer's at a time
            return ((now + gates[layer][:, None].to(now.dtype) * away).flatten(2),)

        return hook

    hooks = [m.o_proj.register_forward_pre_hook(gate(layer)) for layer, m in modules.items()]  # type: ignore[union-attr]
    try:
        sparsely = nullcontext() if heads is None else attached(model, heads, sparse)
        with borrowed(model), torch.enable_grad(), sparsely, recording(model, watch):
            model.requires_grad_(False)
            checkpoint_activations(model)
            logits = model(tokens[None].to(model.device), logits_to_keep=targets.to(model.device), use_cache=False).logits[0]
            want = tokens[targets + 1].to(logits.device)[:, None]
            scores = logits.float()
            right = scores.gather(1, want)[:, 0]
            others = scores.scatter(1, want, -torch.inf) if margin else scores
            (others.logsumexp(-1) - right).mean().backward()
    finally:
        for hook in hooks:
            hook.remove()
    for layer, values in gates.items():
        table[layer] = values.grad.cpu().where(full[layer], -values.grad.cpu())  # type: ignore[union-attr]


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
