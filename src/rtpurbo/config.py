"""Every setting, once: a field's docstring is its documentation, its command-line help and its unit."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Granularity = Literal["head", "group"]
LARGEST_WHOLE_GROUP = 4
"""Query heads of a KV group that is chosen as a whole by default, at most."""
IndexDtype = Literal["auto", "float8"]


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {got!r}.")


_NUMBERS: dict[Any, tuple[Any, str]] = {"int": (int, "a whole number"), "float": ((int, float), "a number")}


def from_dict(cls: type[T], values: dict[str, Any], *, where: str) -> T:
    """Build dataclass `cls` from a plain dict; an unknown key raises ValueError with the nearest valid name."""
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
            raise ValueError(f"Unknown key {key!r} in {where}; did you mean {near[0]!r}? Valid keys: {', '.join(names)}.")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values and field.type in _NUMBERS:
            kinds, expected = _NUMBERS[field.type]
            value = values[field.name]
            fits = isinstance(value, kinds) and not isinstance(value, bool)
            _require(fits, f"{field.name} in {where}", expected, value)
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where} is incomplete or has a value of the wrong type: {error}.") from error


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """What a sparse layer keeps (paper, section 3)."""

    window_tokens: int = 8192
    """Tokens that every local head sees: the query itself and those just before it. A head map may give local KV heads
    shorter windows (window_mass of the calibration)."""
    sink_tokens: int = 4
    """First real tokens of a sequence that every head sees (attention sinks)."""
    index_dim: int = 16
    """Dimensions of the learned index projection."""
    top_p: float = 1.0
    """Index attention mass at which a query's selection ends, in (0, 1] (paper: 0.9); 1: min_probability alone decides."""
    min_probability: float = 1e-4
    """Tokens to which the index gives less of its mass than this are not selected, whatever p asks for, in [0, 1); so no
    query selects more than 1 / min_probability far tokens. 0 for no such limit (the paper)."""
    tile_probability: float = 0.0
    """Above 0, a tile of neighbouring positions (16 for a group of 8 heads) attends in prefill to all tokens to which the
    index gives this much for one of them: faster, no longer token by token what decode selects. 0: by min_probability,
    each position for itself."""
    index_dtype: IndexDtype = "auto"
    """What the cache keeps index keys in: the model's dtype (auto), or float8 (e4m3, one byte a dimension)."""
    dense_below_tokens: int = 0
    """While a sequence is shorter, prefill is dense, and in decode the retrieval heads are; what local heads dropped stays
    dropped. Where sparse attention pays on a machine, `rtpurbo bench` says."""
    dense_end_tokens: int = 0
    """Last tokens of a prompt that all heads read densely; more than it has: all of it. The question, as a rule: 128 add as
    many rows of attention. Decode is sparse; so is what is read after local heads have dropped tokens (in an earlier piece
    of a longer prompt, or in decode), and what is read without a cache: documents, in training and evaluation. Stage 2
    reads the end of each question as a prompt's."""

    def __post_init__(self) -> None:
        _require(self.window_tokens >= 1, "window_tokens", "at least 1 token", self.window_tokens)
        _require(self.sink_tokens >= 0, "sink_tokens", "0 or more tokens", self.sink_tokens)
        _require(self.index_dim >= 1, "index_dim", "at least 1", self.index_dim)
        _require(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]", self.top_p)
        _require(0.0 <= self.min_probability < 1.0, "min_probability", "in [0, 1)", self.min_probability)
        _require(0.0 <= self.tile_probability < 1.0, "tile_probability", "in [0, 1)", self.tile_probability)
        if self.tile_probability > 0.0 and not self.selects:
            raise ValueError(
                f"tile_probability must be 0 where everything is selected (top_p 1, min_probability 0), got "
                f"{self.tile_probability:g}."
            )
        _require(self.index_dtype in ("auto", "float8"), "index_dtype", "'auto' or 'float8'", self.index_dtype)
        _require(self.dense_below_tokens >= 0, "dense_below_tokens", "0 or more tokens", self.dense_below_tokens)
        _require(self.dense_end_tokens >= 0, "dense_end_tokens", "0 or more tokens", self.dense_end_tokens)

    def to_dict(self) -> dict[str, Any]:
        """As an artefact holds it. Defaults of newer settings are left out, as if they had never been named: so it is in
        artefacts, checksums and records of stages that are older than they are."""
        values = dataclasses.asdict(self)
        newer = {"tile_probability": 0.0, "index_dtype": "auto", "dense_below_tokens": 0, "dense_end_tokens": 0}
        for name, default in newer.items():
            if values[name] == default:
                del values[name]
        return values

    @property
    def selects(self) -> bool:
        """Whether an index leaves anything out."""
        return self.top_p < 1.0 or self.min_probability > 0.0

    def by_p(self, top_p: float | None) -> SparseConfig:
        """The same with this p as its whole rule; unchanged for None."""
        if top_p is None:
            return self
        return dataclasses.replace(self, top_p=top_p, min_probability=0.0, tile_probability=0.0)

    def with_options(self, **given: Any) -> SparseConfig:
        """The same with these settings; None leaves one as it is."""
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})

    def index_bytes(self, element_bytes: int) -> int:
        """Bytes of one index key in the cache of a model whose numbers take `element_bytes`."""
        return self.index_dim * (1 if self.index_dtype == "float8" else element_bytes)

    @property
    def rule(self) -> str:
        """What a query selects, in words."""
        parts = [f"p = {self.top_p:g}"] if self.top_p < 1.0 else []
        parts += [f"index probability at least {self.min_probability:g}"] if self.min_probability > 0.0 else []
        tile = f"; in prefill by tile at {self.tile_probability:g}" if self.tile_probability > 0.0 else ""
        end = f"; a prompt's last {self.dense_end_tokens:,} tokens read densely" if self.dense_end_tokens else ""
        return (" and ".join(parts) or "everything") + tile + end


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """How retrieval heads are found (paper, section 3.1, and what makes it work on small models)."""

    granularity: Literal["auto", "head", "group"] = "auto"
    """Choose whole KV groups (least cache: nothing full is kept for the rest), or single query heads (the paper); by default
    groups where at most 4 query heads share a KV head, else heads."""
    retrieval_ratio: float = 0.15
    """Share of query heads (or of KV groups) that become retrieval heads, over the whole model."""
    threshold: float | None = None
    """Choose every head whose score in [0, 1] reaches this instead of a fixed share (gates still learn within
    retrieval_ratio)."""
    scoring: Literal["gates", "needle"] = "gates"
    """Score heads by gates that learn which of them may do without far attention (gates), or by the attention from a
    repeated span to where it was before (needle, the paper)."""
    lengths_tokens: tuple[int, ...] = ()
    """Document lengths in tokens; empty: a quarter, a half and all of the context (at most 32768), at least 2 windows."""
    documents: int = 18
    """Documents per length, a third with repeated spans, the others with questions. Gates move once for each."""
    needle_tokens: int = 48
    """Length of the repeated needle span in tokens."""
    text_weight: float = 10.0
    """What a nat of KL on the text between weighs against a nat on an answer, when gates learn."""
    window_mass: float | None = None
    """Give every local KV head the shortest window (an eighth, a quarter, a half or all of window_tokens, at least 128) that
    keeps this share, in (0, 1], of its attention mass in window and sinks; default: all of it."""
    target_recovery: float | None = None
    """Take as many heads as recover this share, in (0, 1], of the dense model's answers and of its probability of ordinary
    text, with nothing trained: retrieval_ratio at least, all at most. Default: retrieval_ratio."""
    check_samples: int = 8
    """Retrieval questions that check the choice, dense against dense retrieval heads + window; 0 skips the check."""
    seed: int = 0
    """Seed of documents, needles and sampled positions."""

    def __post_init__(self) -> None:
        _require(self.granularity in ("auto", "head", "group"), "granularity", "'auto', 'head' or 'group'", self.granularity)
        _require(0.0 < self.retrieval_ratio <= 1.0, "retrieval_ratio", "in (0, 1]", self.retrieval_ratio)
        _require(self.threshold is None or 0.0 <= self.threshold <= 1.0, "threshold", "in [0, 1]", self.threshold)
        _require(self.scoring in ("gates", "needle"), "scoring", "'gates' or 'needle'", self.scoring)
        _require(self.documents >= 3, "documents", "at least 3 (a span and two questions)", self.documents)
        _require(self.needle_tokens >= 8, "needle_tokens", "at least 8 tokens", self.needle_tokens)
        _require(self.text_weight >= 0, "text_weight", "0 or more", self.text_weight)
        mass = self.window_mass
        _require(mass is None or 0.0 < mass <= 1.0, "window_mass", "in (0, 1]", mass)
        target = self.target_recovery
        _require(target is None or 0.0 < target <= 1.0, "target_recovery", "in (0, 1]", target)
        if target is not None and self.threshold is not None:
            raise ValueError(
                f"threshold ({self.threshold}) and target_recovery ({target}) both say how many heads retrieve; "
                "leave one of them out."
            )
        _require(self.check_samples >= 0, "check_samples", "0 or more", self.check_samples)

    def chosen_unit(self, group_size: int) -> Granularity:
        """What is chosen in a model with `group_size` query heads for each KV head."""
        if self.granularity == "auto":
            return "group" if group_size <= LARGEST_WHOLE_GROUP else "head"
        return self.granularity


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What both training stages share: the one loop's settings."""

    steps: int = 300
    """Optimiser steps; 0 keeps the start."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; linear warm-up over the first 5 %, then cosine to a tenth."""
    length_tokens: int = 0
    """Length of a training document in tokens; 0: the model's context (at most 32768)."""
    shortest_tokens: int = 0
    """Half of the documents are cut to a half or a quarter, but not below this; 0: two windows and sinks, at least 512."""
    retrieval_ratio: float = 0.5
    """Share of documents that carry synthetic retrieval questions or a repeated span."""
    batch_size: int = 1
    """Documents per step and process."""
    save_every: int = 50
    """Steps between two saved states, from which a killed run goes on, and two writes of the metrics; 0 for neither."""
    seed: int = 0
    """Seed of documents, sampled positions and the optimiser."""

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "steps", "0 or more", self.steps)
        _require(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)
        _require(self.length_tokens >= 0, "length_tokens", "0 or more tokens", self.length_tokens)
        _require(self.shortest_tokens >= 0, "shortest_tokens", "0 or more tokens", self.shortest_tokens)
        _require(0.0 <= self.retrieval_ratio <= 1.0, "retrieval_ratio", "in [0, 1]", self.retrieval_ratio)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        _require(self.save_every >= 0, "save_every", "0 or more steps", self.save_every)


@dataclass(frozen=True, kw_only=True)
class IndexerConfig(TrainConfig):
    """Stage 1: train the index projections (paper, section 3.2)."""

    learning_rate: float = 1e-2
    """Peak learning rate of AdamW; linear warm-up over the first 5 %, then cosine to a tenth."""
    queries: int = 256
    """Sampled query positions per document and step."""
    start: Literal["closed_form", "random"] = "closed_form"
    """Where training starts: an SVD of the whitened pre-RoPE query-key product, or random projections."""
    retrieval_ratio: float = 0.75
    """Share of documents that carry synthetic retrieval questions or a repeated span."""
    far_weighting: bool = True
    """Weigh each query's KL by the attention mass it sends beyond window and sinks (the paper: all alike)."""
    near_as_one: bool = True
    """Count window and sinks, which are always kept, as one class of the KL (the paper: token by token)."""
    documents: int = 64
    """Different training documents; their queries and keys are kept in memory while they fit."""
    mass_target: float | None = None
    """Afterwards select the fewest tokens that keep this share of the attention mass (with window and sinks), in (0, 1):
    by p where p is below 1, else by min_probability."""
    capture_gib: float = 4.0
    """Memory for captured queries and keys in GiB; documents beyond it are run again when their turn comes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.queries >= 1, "queries", "at least 1", self.queries)
        _require(self.start in ("closed_form", "random"), "start", "'closed_form' or 'random'", self.start)
        _require(self.documents >= 1, "documents", "at least 1", self.documents)
        target = self.mass_target
        _require(target is None or 0.0 < target < 1.0, "mass_target", "in (0, 1)", target)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """Stage 2: match the dense model's next-token distribution (paper, section 3.3)."""

    learning_rate: float = 3e-4
    """Peak learning rate of AdamW; linear warm-up over the first 5 %, then cosine to a tenth. For all weights use a tenth
    or less."""
    batch_size: int = 4
    """Documents per step and process, run in one forward pass."""
    labels: int = 2048
    """Label positions per document and step, beside every synthetic answer."""
    top_logits: int = 10
    """Teacher logits that are matched; the rest of the vocabulary counts as one more class."""
    weights: Literal["lora", "full"] = "lora"
    """Train a PEFT LoRA adapter, or all weights."""
    lora_rank: int = 8
    """Rank of the LoRA adapter on values, attention outputs and MLPs."""
    lora_layers: float = 1.0
    """Share of the layers, from the first on, that get an adapter."""
    answer_weight: float = 0.05
    """Weight of a document's synthetic answers in its loss (cross-entropy; where the dense model says something else, KL to
    that); the other labels share the rest."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass to save memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.labels >= 1, "labels", "at least 1", self.labels)
        _require(self.top_logits >= 1, "top_logits", "at least 1", self.top_logits)
        _require(self.weights in ("lora", "full"), "weights", "'lora' or 'full'", self.weights)
        _require(self.lora_rank >= 1, "lora_rank", "at least 1", self.lora_rank)
        _require(0.0 < self.lora_layers <= 1.0, "lora_layers", "in (0, 1]", self.lora_layers)
        _require(0.0 <= self.answer_weight <= 1.0, "answer_weight", "in [0, 1]", self.answer_weight)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What `rtpurbo eval` measures, dense and sparse on the same samples."""

    lengths_tokens: tuple[int, ...] = ()
    """Prompt lengths of the needle grid in tokens; empty: a quarter, a half and all of the context (at most 32768), at
    least 2 windows."""
    samples: tuple[int, ...] = (40,)
    """Needle samples per length and kind; one number for all lengths or one per length."""
    kinds: tuple[str, ...] = ("single", "multi_key", "multi_value", "multi_query")
    """Kinds of needle question: single, multi_key, multi_value, multi_query."""
    loss_documents: int = 8
    """Held-out documents for loss, logit KL and top-1 agreement; 0 skips them."""
    loss_length_tokens: int = 0
    """Length of a held-out document in tokens; 0: the longest of lengths_tokens."""
    fidelity_documents: int = 4
    """Documents on which attention mass and selected tokens are measured; 0 skips them."""
    short_documents: int = 8
    """Held-out documents of at most 2048 tokens from every source, on which sparse and distilled weights are compared with
    dense; 0 skips them."""
    squad: str | None = None
    """A JSON file of SQuAD (version 2), whose questions about short paragraphs are asked as well; not set: none are."""
    squad_samples: int = 200
    """Questions drawn from that file."""
    long_tokens: int = 0
    """Tokens that both models generate after long prompts, which with them are as long as the longest of lengths_tokens;
    0 skips them."""
    long_prompts: int = 4
    """Prompts of the long generations, in one batch."""
    decode_tokens: int = 16
    """Tokens generated to measure decode speed and cache bytes at the longest length; 0 skips them."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness to run as well, by name (needs the package lm_eval)."""
    task_limit: int | None = None
    """At most this many samples of each harness task."""
    task_batch: int = 1
    """Samples of a harness task that are run together."""
    ruler_files: str | None = None
    """Folder with PaulGrahamEssays.json, squad.json and hotpotqa.json for RULER (tasks: ruler); default: they
    are downloaded."""
    dense_end_tokens: int | None = None
    """Last tokens of a prompt that all heads read densely, in place of the artefact's setting; more than it has: all."""
    seed: int = 0
    """Seed of the samples."""

    def __post_init__(self) -> None:
        counts = len(self.samples)
        fits = counts in (1, len(self.lengths_tokens)) if self.lengths_tokens else counts > 0
        _require(fits, "samples", "one number, or one per length", self.samples)
        for name in ("lengths_tokens", "samples"):
            least = 1 if name == "lengths_tokens" else 0
            _require(min(getattr(self, name), default=1) >= least, name, f"{least} or more", getattr(self, name))
        for name in ("loss_documents", "loss_length_tokens", "fidelity_documents", "decode_tokens", "short_documents"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("squad_samples", "long_prompts"):
            _require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        _require(self.long_tokens == 0 or self.long_tokens >= 8, "long_tokens", "0 or at least 8", self.long_tokens)
        _require(self.task_limit is None or self.task_limit >= 1, "task_limit", "1 or more", self.task_limit)
        _require(self.task_batch >= 1, "task_batch", "1 or more", self.task_batch)
        _require((self.dense_end_tokens or 0) >= 0, "dense_end_tokens", "0 or more tokens", self.dense_end_tokens)
        known = ("single", "multi_key", "multi_value", "multi_query")
        for kind in self.kinds:
            _require(kind in known, "kinds", f"among {', '.join(known)}", kind)

    def resolved(self, context: int, sparse: SparseConfig) -> EvalConfig:
        """The same with its lengths, for a model of this context length.

        Raises:
            ValueError: a length beyond the context, or so many long_tokens that a prompt is not longer than window + sinks.
        """
        lengths = self.lengths_tokens or default_lengths(context, sparse)
        for length in (*lengths, self.loss_length_tokens):
            if length > context:
                raise ValueError(f"A length of {length} tokens is beyond the model's context of {context}; ask for less.")
        _require(
            len(self.samples) in (1, len(lengths)),
            "samples",
            f"one number, or one per length ({len(lengths)})",
            self.samples,
        )
        most = max(0, max(lengths) - (sparse.window_tokens + sparse.sink_tokens + 1))
        expected = f"at most {most} (the longest of lengths_tokens, {max(lengths)}, less a prompt beyond window + sinks)"
        _require(self.long_tokens <= most, "long_tokens", expected, self.long_tokens)
        return dataclasses.replace(self, lengths_tokens=lengths)


LONGEST_TOKENS = 32768
"""Documents are no longer than this by default, however long the context."""


def default_lengths(context: int, sparse: SparseConfig) -> tuple[int, ...]:
    """A quarter, a half and all of the context (at most 32768), none shorter than twice window + sinks."""
    context = min(context, LONGEST_TOKENS)
    shortest = 2 * (sparse.window_tokens + sparse.sink_tokens)
    return tuple(sorted({min(context, max(shortest, context // part)) for part in (4, 2, 1)}))


def default_window_tokens(context_tokens: int) -> int:
    """Window for a model of this context length: an eighth of it, at least 256 and at most the paper's 8192."""
    return max(256, min(8192, context_tokens // 8))
