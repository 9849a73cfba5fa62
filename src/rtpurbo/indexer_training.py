"""Stage 1: train the index (paper, section 3.2): train_indexer(model, tokenizer, artifact, ...) -> Artifact.

1. Run the frozen dense model over documents, half of them cut to a half or a quarter of the length; keep pre-RoPE and
   rotated queries and keys of the retrieval heads only (queries at sampled positions). Captures stay in memory while they
   fit. Most documents carry a synthetic question or a repeated span, whose answers' queries are always among the kept
   ones.
2. Start from a closed form: the best rank-d approximation, in the whitened space of queries and keys, of the regression
   from pre-RoPE queries and keys to the attention logits.
3. Each step: `batch_size` documents per process, a fresh sample of their queries; KL from the head's full attention to the
   softmax of the index scores, layer by layer; AdamW.
4. Measure on documents of another seed: KL, attention mass recalled at p, tokens selected, per head and layer.

Shapes: U index units of a layer, S query heads per unit, m sampled queries, N tokens, D head dimension, d index dimension.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attach import gives_back, recording
from .attention import Observed
from .checkpoint import Artifact, check_fingerprint
from .config import IndexDtype, IndexerConfig, SparseConfig
from .data import documents
from .families import document_length, head_counts
from .heads import HeadMap
from .indexer import LayerIndexer, indexer_from_state, make_indexer, stored_keys
from .ops import far_slots, index_scores, top_p_threshold
from .progress import track
from .questions import mixed_document, shorter, shortest_document
from .training import stage_inputs, train, trainable_state

CAPTURED_PER_STEP = 4
"""Query positions kept per document, in multiples of those that one step uses."""
MEASURED_DOCUMENTS = 4
LEAST_WEIGHT = 0.02
P_GRID = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.975, 0.98, 0.99)
LEAST_GRID = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
QUESTION_TOKENS = 64
"""Last positions of a document with a question or a repeated span; like the answers, every step uses their queries."""


@dataclass
class Capture:
    """One layer of one document."""

    rows: Tensor
    """[m] int64, positions of the kept queries"""
    q_pre: Tensor
    """[Hq, m, D] before RoPE"""
    q: Tensor
    """[U, S, m, D] after RoPE"""
    k_pre: Tensor
    """[Hkv, N, D] before RoPE"""
    k: Tensor
    """[U, N, D] after RoPE"""
    scaling: float

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.q_pre, self.q, self.k_pre, self.k))

    def take(self, picks: Tensor) -> Capture:
        """The same with some of the queries."""
        return Capture(self.rows[picks], self.q_pre[:, picks], self.q[:, :, picks], self.k_pre, self.k, self.scaling)

    def size(self) -> tuple[int, int]:
        """Kept queries and tokens."""
        return len(self.rows), self.k.shape[1]

    def of_unit(self, unit: int) -> Capture:
        """The same with rotated queries and keys of one unit."""
        here = slice(unit, unit + 1)
        return replace(self, q=self.q[here], k=self.k[here])


@torch.no_grad()
def capture(model: Any, tokens: Tensor, rows: Tensor, heads: HeadMap) -> dict[int, Capture]:
    """Queries and keys of every retrieval layer in one dense pass over `tokens` [length]."""
    kept: dict[int, Capture] = {}

    def observe(seen: Observed) -> None:
        units = list(heads.units(seen.layer))
        if not units:
            return
        at = rows.to(seen.q.device)
        chosen = seen.q[0, list(heads.retrieval_heads(seen.layer))][:, at]
        kept[seen.layer] = Capture(
            at,
            seen.q_pre[0][:, at].clone(),
            chosen.unflatten(0, (len(units), heads.heads_per_unit)),
            seen.k_pre[0].clone(),
            seen.k[0, units],
            seen.scaling,
        )

    with recording(model, observe):
        model(tokens[None].to(model.device), logits_to_keep=1)
    return kept


def target_attention(c: Capture) -> Tensor:
    """Full attention of every unit, the mean of its heads': [U, m, N] float32. One unit after the other: all of a layer's
    heads at once would take gigabytes."""
    logits = ((q.float() @ k.float().mT) * c.scaling for q, k in zip(c.q, c.k, strict=True))  # [S, m, N] each
    return torch.stack([_causal(unit, c.rows).softmax(-1).mean(0) for unit in logits])


def unit_scores(layer: LayerIndexer, c: Capture, index_dtype: IndexDtype = "auto") -> Tensor:
    """Index scores of every unit: [U, m, N] float32, -inf for later tokens; with keys as they are, or rounded to float8."""
    index_q, index_k = layer.project_queries(c.q_pre[None])[0], layer.project_keys(c.k_pre[None])[0]
    return _causal(index_scores(index_q, stored_keys(index_k, index_dtype, index_k.dtype)), c.rows)


def _causal(scores: Tensor, rows: Tensor) -> Tensor:
    slots = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(slots > rows[:, None], -torch.inf)


def kl_divergence(target: Tensor, scores: Tensor, weights: Tensor | None = None, far: Tensor | None = None) -> Tensor:
    """KL(target || softmax(scores)) in nats per unit, (weighted) mean over queries: [U, m, N] x [U, m, N] -> [U].

    Args:
        weights: [U, m], None for equal ones.
        far: [m, N] bool, tokens outside window and sinks. If given, all others are one class together: they are kept
            whatever the index says, so it need only know how much attention they hold, not where.
    """
    log_index = scores.log_softmax(-1)
    some = target > 0 if far is None else (target > 0) & far
    terms = torch.where(some, target * (target.clamp(min=1e-30).log() - log_index.masked_fill(~some, 0.0)), 0.0)
    per_query = terms.sum(-1)
    if far is not None:
        near = target.masked_fill(far, 0.0).sum(-1)
        log_near = log_index.masked_fill(far, -torch.inf).logsumexp(-1)
        per_query = per_query + near * (near.clamp(min=1e-30).log() - log_near)
    return per_query.mean(-1) if weights is None else (per_query * weights).sum(-1) / weights.sum(-1)


def far_weights(target: Tensor, rows: Tensor, sparse: SparseConfig) -> Tensor:
    """Weight of each query, [U, m, N] -> [U, m]: the attention mass it sends beyond window and sinks, plus a little.

    Window and sinks are kept whatever the index says, so the queries that teach it something are those that look
    further; in most heads they are rare.
    """
    far = far_slots(rows, target.shape[-1], sparse.window_tokens, sparse.sink_tokens)
    return (target * far).sum(-1) + LEAST_WEIGHT


@torch.no_grad()
def closed_form_start(indexer: nn.ModuleDict, captures: Iterable[dict[int, Capture]]) -> None:
    """Set every projection from captures of a few documents, which need not be in memory together, in place.

    With queries q, keys k centred per document and the logits l of the unit's attention centred per query, the bilinear
    form that explains l best is Cq^-1 E[q l k'] Ck^-1; its best rank-d approximation under the covariances Cq and Ck
    comes from the SVD of Cq^-1/2 E[q l k'] Ck^-1/2.
    """
    layers: dict[int, LayerIndexer] = {int(name): layer for name, layer in indexer.items()}  # type: ignore[misc]
    sums: dict[tuple[int, int], list[Tensor]] = {}
    documents = queries = keys = 0
    for document in captures:
        documents += 1
        for number, layer in layers.items():
            for unit in range(layer.query.shape[0]):
                found = _moments(layer, document[number], unit)
                before = sums.get((number, unit))
                sums[number, unit] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
        queries, keys = (n + more for n, more in zip((queries, keys), next(iter(document.values())).size(), strict=True))
        del document  # before the next one is made
    for (number, unit), (query, key, cross) in sums.items():
        layer = layers[number]
        d = layer.query.shape[1]
        root_q, root_k = _inverse_root(query / queries), _inverse_root(key / keys)
        u, s, v = torch.linalg.svd(root_q @ (cross / documents) @ root_k)
        scale = s[:d].sqrt()[:, None]
        layer.query[unit] = (scale * (u[:, :d].T @ root_q)).to(layer.query.dtype)
        layer.key[unit] = (scale * (v[:d] @ root_k)).to(layer.key.dtype)


def _moments(layer: LayerIndexer, c: Capture, unit: int) -> list[Tensor]:
    """Sums over one document of q q' [S*D, S*D], k k' [D, D] and q l k' [S*D, D] for one unit, float64."""
    logits = target_attention(c.of_unit(unit))[0].clamp(min=1e-8).log()  # [m, N]
    seen = torch.arange(logits.shape[-1], device=logits.device) <= c.rows[:, None]
    seen_count = seen.sum(-1, keepdim=True)
    logits = torch.where(seen, logits - (logits * seen).sum(-1, keepdim=True) / seen_count, 0.0)
    q = layer.unit_queries(c.q_pre[None])[0, unit].double()  # [m, S*D]
    k = c.k_pre[layer.kv_heads[unit]].double()  # [N, D]
    k = k - k.mean(0, keepdim=True)
    return [q.mT @ q, k.mT @ k, q.mT @ ((logits / seen_count).double() @ k) / len(c.rows)]


def _inverse_root(covariance: Tensor) -> Tensor:
    """Symmetric inverse square root, with a thousandth of the mean variance as ridge."""
    dim = covariance.shape[0]
    ridge = covariance.diagonal().mean() * 1e-3 * torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
    values, vectors = torch.linalg.eigh(covariance + ridge)
    return (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.T


@gives_back
def train_indexer(
    model: Any,
    tokenizer: Any,
    artifact: Artifact,
    sources: list[str] | tuple[str, ...],
    config: IndexerConfig | None = None,
    *,
    work: Path | None = None,
    accelerator: Any = None,
) -> Artifact:
    """Train the index projections of a calibrated artefact against the frozen dense model.

    Args:
        model: the artefact's base model, dense; it is not changed.
        sources: where documents come from, see `rtpurbo.data`.
        work: directory for states and metrics; a killed run goes on from there.
        accelerator: an accelerate.Accelerator for several processes; default: one made here.

    Returns:
        The artefact with an indexer and this stage's metrics.

    Raises:
        ValueError: other weights than the artefact's, documents not longer than the window or beyond the context, too
            little text, or a loss that became NaN.
    """
    from accelerate import Accelerator
    from accelerate.utils import broadcast

    config = config or IndexerConfig()
    accelerator = accelerator or Accelerator(cpu=model.device.type == "cpu")
    check_fingerprint(model, artifact)
    length = document_length(model, config.length_tokens, artifact.config)
    heads, sparse = artifact.heads, artifact.config
    _, _, _, head_dim = head_counts(model)
    torch.manual_seed(config.seed)
    indexer = make_indexer(heads, head_dim=head_dim, index_dim=sparse.index_dim).to(model.device)
    texts = documents(
        sources, tokenizer, length_tokens=length, count=config.documents + MEASURED_DOCUMENTS, seed=config.seed
    )
    texts, measured = texts[:-MEASURED_DOCUMENTS], texts[-MEASURED_DOCUMENTS:]
    shortest_tokens = shortest_document(config, sparse, length, tokenizer)

    def example(number: int) -> tuple[Tensor, list[int]]:
        """Tokens of a training document, and the positions of question and answer, which every step uses."""
        seed = f"{config.seed}:index:{number}"
        text = shorter(texts[number], shortest_tokens=shortest_tokens, rng=random.Random(seed))
        tokens, answers, _ = mixed_document(text, tokenizer, retrieval_ratio=config.retrieval_ratio, seed=seed)
        end = range(max(0, len(tokens) - QUESTION_TOKENS), len(tokens))
        return tokens, sorted({*answers, *end}) if answers else []

    mixed = [example(i) for i in range(len(texts))]
    store: dict[int, dict[int, Capture]] = {}
    held = 0

    def fetch(number: int) -> dict[int, Capture]:
        nonlocal held
        if number in store:
            return store[number]
        rng = random.Random(f"{config.seed}:rows:{number}")
        tokens, answers = mixed[number]
        kept = min(len(tokens), config.queries * CAPTURED_PER_STEP)
        rows = torch.tensor(answers + rng.sample(range(len(tokens)), kept))
        found = capture(model, tokens, rows, heads)
        size = sum(c.nbytes() for c in found.values())
        if held + size <= config.capture_gib * 2**30:
            store[number] = found
            held += size
        return found

    if config.start == "closed_form":
        first = range(min(4, len(texts)))
        closed_form_start(indexer, map(fetch, track(first, total=len(first), what="Closed-form start")))
    units = sum(len(heads.units(layer)) for layer in heads.layers)
    world, rank = accelerator.num_processes, accelerator.process_index
    for p in indexer.parameters():  # processes that start alike stay alike, also where their hardware rounds differently
        p.data.copy_(broadcast(p.data))

    def step(number: int) -> dict[str, float]:
        total = torch.zeros((), device=model.device)
        for i in range(config.batch_size):
            turn = (number * world + rank) * config.batch_size + i
            document = _shuffled(turn, len(texts), config.seed)
            found = fetch(document)
            rng = random.Random(f"{config.seed}:picks:{turn}")
            answers = len(mixed[document][1])
            others = range(answers, answers + min(len(mixed[document][0]), config.queries * CAPTURED_PER_STEP))
            picks = list(range(answers)) + rng.sample(others, min(config.queries, len(others)))
            for layer, whole in found.items():
                c = whole.take(torch.tensor(picks, device=model.device))
                with torch.no_grad():
                    target = target_attention(c)
                    weights = far_weights(target, c.rows, sparse) if config.far_weighting else None
                far = far_slots(c.rows, target.shape[-1], sparse.window_tokens, sparse.sink_tokens)
                scores = unit_scores(indexer[str(layer)], c)  # type: ignore[arg-type]
                loss = kl_divergence(target, scores, weights, far if config.near_as_one else None).sum()
                loss = loss / units / config.batch_size
                loss.backward()
                total += loss.detach()
        if world > 1:
            for p in indexer.parameters():
                p.grad = accelerator.reduce(p.grad, reduction="mean")
            total = accelerator.reduce(total, reduction="mean")
        return {"loss": float(total)}

    history = train(
        indexer,
        step,
        config,
        what="Stage 1: training the index",
        accelerator=accelerator,
        work=work,
        inputs=stage_inputs(artifact, sources),
        clip=None,
    )
    metrics = measure(
        model,
        indexer,
        measured,
        heads,
        sparse,
        mass_target=config.mass_target,
    )
    sparse = replace(sparse, top_p=metrics["top_p"], min_probability=metrics["min_probability"])
    metrics["loss_first"], metrics["loss_last"] = (history[0]["loss"], history[-1]["loss"]) if history else (None, None)
    return artifact.with_stage("train_indexer", config, metrics, indexer=trainable_state(indexer), config=sparse)


def _shuffled(turn: int, count: int, seed: int) -> int:
    """The document of a turn: every document once per round, each round in its own order."""
    order = list(range(count))
    random.Random(f"{seed}:round:{turn // count}").shuffle(order)
    return order[turn % count]


def selection_rules(sparse: SparseConfig) -> list[tuple[float, float]]:
    """(p, least probability) to choose from, the one of `sparse` among them, in the order of what they select."""
    if sparse.top_p < 1.0:
        return [(p, sparse.min_probability) for p in sorted({sparse.top_p, *P_GRID})]
    return [(1.0, least) for least in sorted({sparse.min_probability, *LEAST_GRID}, reverse=True)]


@torch.no_grad()
def measure(
    model: Any,
    indexer: nn.ModuleDict | dict[str, Tensor],
    texts: list[Tensor],
    heads: HeadMap,
    sparse: SparseConfig,
    *,
    queries: int = 128,
    mass_target: float | None = None,
) -> dict[str, Any]:
    """How well an index finds what full attention looks at, on queries that have something far to look at.

    Args:
        mass_target: instead of the rule of `sparse` use the one of `selection_rules` that selects least and keeps this
            attention mass (the one that selects most if none does).

    Returns:
        Means over all units, and per unit ("units": layer, unit, ...): "kl" in nats, window and sinks as one class;
        "mass_kept", full attention mass on selected tokens, window and sinks; "far_selected_ratio", share of the tokens
        outside window and sinks that was selected; "tokens_selected", their number. "top_p" and "min_probability" are the
        rule used, "curve" the means under every rule.
    """
    if isinstance(indexer, dict):
        dim = next(iter(indexer.values())).shape[1]
        indexer = indexer_from_state(indexer, heads, head_dim=head_counts(model)[3], index_dim=dim).to(model.device)
    names = ("kl", "mass_kept", "far_selected_ratio", "tokens_selected")
    rules = selection_rules(sparse)
    window_tokens, sink_tokens = sparse.window_tokens, sparse.sink_tokens
    sums: dict[tuple[int, int], Tensor] = {}
    for number, tokens in enumerate(track(texts, total=len(texts), what="Measuring the index")):
        low = min(window_tokens + sink_tokens, len(tokens) - 1)
        rng = random.Random(f"measure:{number}")
        rows = torch.tensor(sorted(rng.choices(range(low, len(tokens)), k=queries)))
        for layer, c in capture(model, tokens, rows, heads).items():
            target = target_attention(c)
            scores = unit_scores(indexer[str(layer)], c, sparse.index_dtype)  # type: ignore[arg-type]
            far = far_slots(c.rows, len(tokens), window_tokens, sink_tokens)
            near = ~far  # later tokens too, which hold no attention
            kl, values = kl_divergence(target, scores, far=far), []
            for rule in rules:
                selected = scores >= top_p_threshold(scores, *rule)
                mass = (target * (selected | near)).sum(-1).mean(-1)
                chosen = (selected & far).sum(-1).float()
                share = (chosen / far.sum(-1).clamp(min=1)).mean(-1)
                values.append(torch.stack([kl, mass, share, chosen.mean(-1)], -1))  # [U, 4]
            for unit, row in enumerate(torch.stack(values, 1).cpu()):  # [rules, 4]
                sums[layer, unit] = sums.get((layer, unit), torch.zeros(len(rules), 4)) + row / len(texts)
    means = torch.stack(list(sums.values())).mean(0)
    curve = [
        {"top_p": p, "min_probability": least, **dict(zip(names, row.tolist(), strict=True))}
        for (p, least), row in zip(rules, means, strict=True)
    ]
    at = rules.index((sparse.top_p, sparse.min_probability))
    if mass_target is not None:
        at = next((i for i, point in enumerate(curve) if point["mass_kept"] >= mass_target), len(curve) - 1)
    per_unit = [
        {"layer": layer, "unit": unit, **dict(zip(names, rows[at].tolist(), strict=True))}
        for (layer, unit), rows in sorted(sums.items())
    ]
    documents_seen = {"length_tokens": len(texts[0]), "documents": len(texts)}
    return {**curve[at], **documents_seen, "curve": curve, "units": per_unit}
