"""What a conversion takes of a GPU's memory, stage by stage, computed from shapes alone; nothing is run.

Legend: N tokens of a document, B documents run together, h hidden size (or all query heads' width, if that is more), f width
of an MLP (of all experts that a token visits), V vocabulary, e bytes of a number in the model.

The factors of one layer were counted once: live tensors of small Llama layers on a CPU, bfloat16 under autocast, with the
code of the stages (8B's proportions, f = 3.5 h). They stand for layers in which f is larger than h. PyTorch's own
context and what its allocator cannot reuse come on top: RESERVED_GIB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .calibration import ROWS, TEXT_POSITIONS
from .config import LONGEST_TOKENS, CalibrateConfig, DistillConfig, EvalConfig, IndexerConfig, SparseConfig, default_lengths
from .distillation import LABELS_PER_PIECE
from .evals.needle import BATCH_TOKENS
from .families import context_tokens, head_counts
from .generate import PIECE_TOKENS
from .indexer_training import CAPTURED_PER_STEP, QUESTION_TOKENS

GIB = 2**30
RESERVED_GIB = 1.0
"""Of a GPU: CUDA's context, cuBLAS, and what the allocator cannot reuse; an allowance, not computed."""
ANSWER_POSITIONS = 256
"""Of a calibration document: five questions for up to five values of about eight tokens, and an example."""
EVALUATED_LABELS = 1024
"""Positions whose logits the evaluation has in float32 at a time."""
CROWDED = 4
"""A layer may have this many times the mean number of index units."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What memory depends on in a model."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_tokens: int
    element_bytes: int

    @classmethod
    def of(cls, model: Any) -> Shape:
        """The shape of a model, which may lie on the meta device."""
        config = model.config.get_text_config(decoder=True)
        layers, query_heads, kv_heads, head_dim = head_counts(model)
        visited = getattr(config, "num_experts_per_tok", None)
        width = config.moe_intermediate_size * visited if visited else config.intermediate_size
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            layers=layers,
            hidden=config.hidden_size,
            intermediate=width,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=config.vocab_size,
            context_tokens=context_tokens(model),
            element_bytes=next(model.parameters()).element_size(),
        )

    @property
    def width(self) -> int:
        """h of the legend."""
        return max(self.hidden, self.query_heads * self.head_dim)

    def lora_parameters(self, rank: int) -> int:
        """Parameters of the adapter on values, attention outputs and MLPs, at most."""
        keys, queries = self.kv_heads * self.head_dim, self.query_heads * self.head_dim
        return self.layers * rank * (2 * self.hidden + keys + queries + 3 * (self.hidden + self.intermediate))

    def layer(self, tokens: int, per_h: int, per_f: int) -> int:
        """Bytes of one layer's intermediate results."""
        return tokens * (per_h * self.width + per_f * self.intermediate)

    def forward(self, tokens: int) -> int:
        """One layer without gradients: 9 h + 6 f bytes a token, of which MLP 6 f: three times f in 2 bytes."""
        return self.layer(tokens, 9, 6) * self.element_bytes // 2

    def cache(self, tokens: int) -> int:
        """A dense cache, 2 N Hkv D e per layer, and one layer's once more while it grows."""
        return 2 * tokens * self.kv_heads * self.head_dim * self.element_bytes * (self.layers + 1)

    def needles(self, lengths: tuple[int, ...]) -> int:
        """Needle questions of these lengths: the caches of a batch, and a forward pass over a piece of its prompts."""
        batches = [(n, max(1, BATCH_TOKENS // n)) for n in lengths]
        return max(self.cache(n * count) + self.forward(min(n, PIECE_TOKENS) * count) for n, count in batches)


def memory(shape: Shape, config: Any, *, gpu_bytes: int = 0) -> dict[str, dict[str, float]]:
    """GiB at the peak of every stage, term by term.

    Args:
        config: a ConvertConfig.
        gpu_bytes: memory of the GPU, a hundredth of which attention takes for scores and masks
            (`ops.prefill.workspace_elements`); 0 where there is none.

    Returns:
        "calibrate", "train_indexer", "distill", "evaluate" -> {term: GiB}, their sum the stage's need. "weights" P e.
        Of terms that are not held at the same time the larger one is given.
    """
    sparse = config.sparse(context=shape.context_tokens)
    stages = {
        "calibrate": _calibrate(shape, config.calibrate, sparse),
        "train_indexer": _train_indexer(shape, config.indexer, config.calibrate),
        "distill": _distill(shape, config.distill),
        "evaluate": _evaluate(shape, config.evaluate.resolved(shape.context_tokens, sparse), config.distill),
    }
    if not config.distill.steps:
        del stages["distill"]
    always = {"weights": shape.parameters * shape.element_bytes, "attention": gpu_bytes // 100}
    return {name: {term: n / GIB for term, n in (always | terms).items()} for name, terms in stages.items()}


def _calibrate(shape: Shape, config: CalibrateConfig, sparse: SparseConfig) -> dict[str, int]:
    """Gates run forward and backward with every layer recomputed.

    - hidden states: what enters each layer, N h e per layer (scoring "gates");
    - layer: one layer's recomputation and gradients, (25 h + 13 f) N; or, for needle scores and window_mass, the whole
      attention of 64 queries, three float32 copies [query heads, 64, N], with queries, keys and outputs 12 h N;
    - logits: 512 labels of text and up to 256 of answers, of both models, in e bytes and five float32 copies; without gates
      the dense model's alone.
    """
    lengths = config.lengths_tokens or default_lengths(min(shape.context_tokens, LONGEST_TOKENS), sparse)
    n = max(lengths)
    looked_at = config.scoring == "needle" or config.window_mass is not None
    rows = 12 * shape.query_heads * ROWS * n + 4 * shape.kv_heads * shape.head_dim * n + 12 * shape.width * n
    gates = config.scoring == "gates"
    layer = shape.layer(n, 25, 13) * shape.element_bytes // 2 if gates else shape.forward(n)
    checked = shape.needles(lengths)
    per_logit = 2 * shape.element_bytes + 20 if gates else shape.element_bytes
    logits = (TEXT_POSITIONS + ANSWER_POSITIONS) * shape.vocabulary * per_logit
    held = shape.layers * n * shape.hidden * shape.element_bytes if gates else 0
    return {"hidden states": held, "layer or logits": max(layer, rows * looked_at, logits, checked - held)}


def _train_indexer(shape: Shape, config: IndexerConfig, chosen: CalibrateConfig) -> dict[str, int]:
    """The model is frozen: one layer at a time, without gradients; then the index alone.

    - captures: as many as capture_gib allows, and the document at hand: per layer with retrieval heads all keys before
      RoPE N Hkv D e and sampled queries, per unit the rotated keys N D e and queries;
    - layer or scores: a layer's forward pass; or per unit the attention of its S heads for m queries, three float32
      copies [S, m, N], beside [units of a layer, m, N] ten times, the graph of the KL; at the start m is four times as large
      and there are one such table in float32 four times and one in float64 (one unit at a time).
    """
    n = config.length_tokens or min(shape.context_tokens, LONGEST_TOKENS)
    e, d = shape.element_bytes, shape.head_dim
    group = shape.query_heads // shape.kv_heads
    per_layer, size = (shape.query_heads, 1) if chosen.chosen_unit(group) == "head" else (shape.kv_heads, group)
    units = math.ceil(chosen.retrieval_ratio * shape.layers * per_layer)
    crowded = min(per_layer, math.ceil(CROWDED * units / shape.layers))
    answers = QUESTION_TOKENS + 16
    few, many = config.queries + answers, config.queries * CAPTURED_PER_STEP + answers
    one = min(units, shape.layers) * d * e * (shape.kv_heads * n + shape.query_heads * many)
    one += units * d * e * (n + size * many)
    kept = min(int(config.capture_gib * GIB), config.documents * one)
    step = 12 * size * few * n + 40 * crowded * few * n
    start = 12 * size * many * n + 24 * many * n if config.start == "closed_form" else 0
    return {"captures": kept + one, "layer or scores": max(shape.forward(n), step, start)}


def _distill(shape: Shape, config: DistillConfig) -> dict[str, int]:
    """Student and teacher share the weights with LoRA; all weights need a float32 copy, and autocast one more of 2 bytes.

    - trained: 16 bytes for each parameter of the adapter (or of the model): itself, gradient, two moments of AdamW;
    - hidden states: what enters each layer, B N h, in e bytes (all weights: 4) per layer; without
      gradient checkpointing everything that a layer keeps, as much as its recomputation;
    - layer: one layer's recomputation and gradients, (24 h + 15 f) B N (all weights: 34 h + 15 f). LoRA turns inputs to
      float32;
    - or logits: those of B labels of the student, their gradient and the teacher's, in e bytes; and six float32 copies of
      256 labels' (the loss is computed in pieces).
    """
    full = config.weights == "full"
    n = config.batch_size * (config.length_tokens or min(shape.context_tokens, LONGEST_TOKENS))
    element = 4 if full else shape.element_bytes
    trained = 16 * shape.parameters if full else 16 * shape.lora_parameters(config.lora_rank)
    casts = 2 * shape.parameters if full else 0
    layer = shape.layer(n, 34, 15) if full else shape.layer(n, 24, 15) * shape.element_bytes // 2
    labels = config.batch_size * min(config.labels + QUESTION_TOKENS, n) * shape.vocabulary
    logits = 3 * labels * shape.element_bytes + 6 * 4 * LABELS_PER_PIECE * shape.vocabulary
    held = shape.layers * (n * shape.hidden * element if config.gradient_checkpointing else layer)
    return {"trained": trained + casts, "hidden states": held, "layer or logits": max(layer, logits)}


def _evaluate(shape: Shape, config: EvalConfig, distilled: DistillConfig) -> dict[str, int]:
    """No gradients; the larger one of

    - needles: the dense cache of one document, or of as many as have 16384 tokens together, and a forward pass over a piece
      of them;
    - loss: both models' last hidden states and 1024 labels, twice in e bytes and five times in float32;
    - decode: the dense cache of the longest prompt, and a forward pass over a piece of it.

    "distilled" is the adapter (float32), or the second model where all weights were trained.
    """
    n, e = max(config.lengths_tokens), shape.element_bytes
    needles = shape.needles(config.lengths_tokens)
    text = config.loss_length_tokens or n
    loss = shape.forward(text) + 2 * text * shape.hidden * e
    loss = max(loss, 2 * text * shape.hidden * e + EVALUATED_LABELS * shape.vocabulary * (2 * e + 20))
    decode = shape.cache(n) + shape.forward(min(n, PIECE_TOKENS))
    full = distilled.weights == "full"
    second = shape.parameters * e if full else 4 * shape.lora_parameters(distilled.lora_rank)
    largest = max(needles, loss if config.loss_documents else 0, decode if config.decode_tokens else 0)
    return {"distilled": second if distilled.steps else 0, "needles, loss or decode": largest}


def longest_documents(shape: Shape, config: Any, *, gpu_gib: float, step: int = 1024) -> dict[str, int]:
    """The longest documents, in multiples of `step` tokens, with which each stage fits a GPU; 0 where none does.

    Args:
        config: a ConvertConfig; its lengths are replaced.
    """
    found = dict.fromkeys(("calibrate", "train_indexer", "distill", "evaluate"), 0)
    for n in range(step, shape.context_tokens + 1, step):
        stages = memory(shape, with_length(config, n), gpu_bytes=int(gpu_gib * GIB))
        fits = [name for name, terms in stages.items() if sum(terms.values()) <= gpu_gib - RESERVED_GIB]
        if not fits:
            break
        found |= dict.fromkeys(fits, n)
    return found


def with_length(config: Any, tokens: int) -> Any:
    """The same ConvertConfig with documents and prompts of this many tokens in every stage."""
    return replace(
        config,
        calibrate=replace(config.calibrate, lengths_tokens=(tokens,)),
        indexer=replace(config.indexer, length_tokens=tokens),
        distill=replace(config.distill, length_tokens=tokens),
        evaluate=replace(config.evaluate, lengths_tokens=(tokens,)),
    )
