"""The whole conversion: calibrate -> train the index -> distil -> verify, each stage kept as soon as it is finished.

A run that was stopped anywhere goes on where it stopped: a finished stage is recognised by its settings and inputs, an
unfinished one by its state in `OUT/.rtpurbo-work`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import (
    CONFIG_FILE,
    METRICS_DIR,
    STAGES,
    WORK_DIR,
    Artifact,
    atomic_path,
    check_fingerprint,
    check_output,
    sweep,
    write_json,
)
from .config import (
    LARGEST_WHOLE_GROUP,
    LONGEST_TOKENS,
    CalibrateConfig,
    DistillConfig,
    EvalConfig,
    IndexDtype,
    IndexerConfig,
    SparseConfig,
    default_lengths,
    default_window_tokens,
)
from .data import check_source
from .families import attention_layers, check_index_dim, check_lengths, context_tokens, document_length, head_counts
from .model_card import overlap_sentence, read_evaluation
from .models import fingerprint
from .training import METRICS_FILE

EVAL_FILE = "eval.json"
TRAINING = ("installed-docs", "installed-python")
HELDOUT = ("installed-docs:heldout",)
"""Default sources of training and evaluation text."""
_NOT_ASKED_BEFORE: dict[str, dict[str, Any]] = {
    "calibrate": {"window_mass": None, "target_recovery": None, "text_weight": 10.0},
    "distill": {"lora_layers": 1.0},
    "evaluate": {
        "short_documents": 0, "squad": None, "squad_samples": 200, "long_tokens": 0, "long_prompts": 4, "task_batch": 1,
        "ruler_files": None, "dense_end_tokens": None,
    },
}  # fmt: skip
"""Stage -> what its settings say that were written before these existed."""


@dataclass(frozen=True, kw_only=True)
class SparseOptions:
    """A SparseConfig whose window may follow from the model."""

    window_tokens: int | None = None
    """Window of local heads in tokens; default: an eighth of the context, at least 256 and at most 8192."""
    sink_tokens: int = 4
    """First real tokens of a sequence that every head sees."""
    index_dim: int = 16
    """Dimensions of the learned index projection."""
    top_p: float = 1.0
    """Index attention mass at which a selection ends, in (0, 1] (the paper: 0.9); 1: min-probability alone decides."""
    min_probability: float = 1e-4
    """Tokens with less of the index mass than this are never selected, in [0, 1) (the paper: 0); index training may choose
    it (mass-target)."""
    tile_probability: float = 0.0
    """Above 0, a tile of neighbouring positions attends in prefill to all tokens to which the index gives this much for one
    of them: faster, no longer token by token what decode selects."""
    index_dtype: IndexDtype = "auto"
    """What the cache keeps index keys in: the model's dtype (auto), or float8 (e4m3, one byte a dimension)."""
    dense_end_tokens: int = 128
    """Last tokens of a prompt that all heads read densely, the question as a rule; more than it has: all of it (the paper:
    0)."""

    def __post_init__(self) -> None:
        self.sparse(context=8192)  # the same checks, before a model is loaded

    def sparse(self, *, context: int) -> SparseConfig:
        """SparseConfig for a model of this context length in tokens."""
        window = default_window_tokens(context) if self.window_tokens is None else self.window_tokens
        return SparseConfig(
            window_tokens=window,
            sink_tokens=self.sink_tokens,
            index_dim=self.index_dim,
            top_p=self.top_p,
            min_probability=self.min_probability,
            tile_probability=self.tile_probability,
            index_dtype=self.index_dtype,
            dense_end_tokens=self.dense_end_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(SparseOptions):
    """All settings of a conversion."""

    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    """Stage 0: find the retrieval heads."""
    indexer: IndexerConfig = field(default_factory=IndexerConfig)
    """Stage 1: train the index."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Stage 2: distil; 0 steps leave it out."""
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    """The verification at the end."""


PAPER = ConvertConfig(
    top_p=0.9,  # section 3.2: the smallest set that holds 0.9 of the index's mass ...
    min_probability=0.0,  # ... and no other rule
    dense_end_tokens=0,  # section 3.1: local heads read prompts as they decode
    calibrate=CalibrateConfig(
        granularity="head",  # section 3.1: query heads, one by one ...
        retrieval_ratio=0.15,  # ... the highest 15 % over the whole model ...
        scoring="needle",  # ... by the attention from a repeated span to where it was before ...
        documents=3,  # ... in one document. Three is the least here; only the first one has a span, which alone counts
    ),
    indexer=IndexerConfig(
        steps=600,  # section 3.2: about 600
        start="random",  # section 3.2 names no other
        far_weighting=False,  # section 3.2: KL to the whole attention, all queries alike ...
        near_as_one=False,  # ... and token by token
        retrieval_ratio=0.0,  # section 3.2: long documents, no synthetic questions among them
    ),
    distill=DistillConfig(
        steps=600,  # section 3.3: about 600 ...
        batch_size=1,
        labels=2048,  # ... and 1.2M label tokens in all: about 2K a step
        weights="full",  # section 3.3: the sparse model end to end
        top_logits=10,  # section 3.3: the dense model's ten
        answer_weight=0.0,
        retrieval_ratio=0.0,  # section 3.3: nothing but the dense model's distribution is learned
        learning_rate=2e-5,  # not known; what suits all weights, not measured here
    ),
)
"""The paper's recipe, as far as its numbers are known (arXiv 2605.16928); the rest is the default's. The window follows the
model by the default's rule, which gives the paper's 8192 from a context of 64K on; sinks (4) and dimensions (16) are
the paper's by default. What stays ours: half of the training documents are cut to a half or a quarter (the paper's
have 32K to 80K tokens), 256 queries a document teach the index, and the tokens beyond the ten are one more class of
the loss."""


def say(text: str) -> None:
    """A line for the person who waits, on standard error."""
    sys.stderr.write(text + "\n")


def convert(
    model: Any,
    tokenizer: Any,
    output: str | Path,
    *,
    sources: list[str] | tuple[str, ...] = TRAINING,
    heldout: list[str] | tuple[str, ...] = HELDOUT,
    config: ConvertConfig | None = None,
    model_name: str = "",
    revision: str | None = None,
) -> Artifact:
    """Convert a dense model and verify the result; the model is given back unchanged.

    Args:
        output: directory of the artefact; finished stages in it with the same settings are kept.
        sources, heldout: training and evaluation text, see `rtpurbo.data`.
        model_name: what the artefact calls its base model; default: the model's own name.

    Returns:
        The artefact, also written to `output` with `eval.json` and `report.html`.

    Raises:
        ValueError: see `calibrate`, `train_indexer`, `distill`, `evaluate`; `output` holds something else.
    """
    from .calibration import calibrate
    from .distillation import distill
    from .indexer_training import train_indexer
    from .report import write_report

    config = config or ConvertConfig()
    path = Path(output)
    check_output(path)
    sparse = check_plan(model, config, [*sources, *heldout])
    weights = fingerprint(model)
    fresh: Artifact | None = None

    def stage(name: str, settings: Any, run: Callable[[], Artifact]) -> Artifact:
        """Stage `name` as it is in `output`, or run now and saved there."""
        found = finished_stage(path, name, settings, after=fresh, sparse=sparse, sources=sources, weights=weights)
        if found is not None:
            say(f"{name}: finished before, kept")
        else:
            say(f"{name}: running")
            found = save_stage(path, name, run(), sources)
        for line in findings(found, name):
            say(line)
        return found

    fresh = stage(
        "calibrate",
        config.calibrate,
        lambda: calibrate(model, tokenizer, sources, config.calibrate, sparse, model_name=model_name, revision=revision),
    )
    artifact = fresh
    fresh = stage(
        "train_indexer",
        config.indexer,
        lambda: train_indexer(model, tokenizer, artifact, sources, config.indexer, work=path / WORK_DIR / "train_indexer"),
    )
    if config.distill.steps:
        before = fresh
        fresh = stage(
            "distill",
            config.distill,
            lambda: distill(model, tokenizer, before, sources, config.distill, work=path / WORK_DIR / "distill"),
        )
    if Artifact.load(path).stages != fresh.stages:  # of an earlier conversion that went further
        fresh.save(path)
    verify(model, tokenizer, fresh, path, heldout, config.evaluate)
    write_report(path)
    shutil.rmtree(path / WORK_DIR, ignore_errors=True)
    sweep(path)
    return fresh


def check_plan(model: Any, config: ConvertConfig, sources: list[str]) -> SparseConfig:
    """What a conversion would stumble over hours later, refused at once; window, sinks, dimension and p of the result.

    Raises:
        ValueError: a length beyond the context or not longer than window + sinks, an index wider than a head, a source
            that does not exist, an unusable SQuAD file.
    """
    from .evals.short_context import read_squad

    context = context_tokens(model)
    sparse = config.sparse(context=context)
    check_index_dim(sparse, head_counts(model)[3])
    check_lengths(config.calibrate.lengths_tokens or default_lengths(context, sparse), context, sparse)
    for stage in (config.indexer, config.distill):
        document_length(model, stage.length_tokens, sparse)
    config.evaluate.resolved(context, sparse)
    if config.evaluate.squad is not None:
        read_squad(config.evaluate.squad)
    for source in sources:
        check_source(source)
    return sparse


def finished_stage(
    path: Path,
    name: str,
    settings: Any,
    *,
    after: Artifact | None,
    sparse: SparseConfig,
    sources: list[str] | tuple[str, ...],
    weights: str,
) -> Artifact | None:
    """The artefact in `path` cut back to stage `name`, when that stage has these settings and inputs; else None.

    Args:
        weights: fingerprint of the model to convert.
    """
    if not (path / CONFIG_FILE).is_file():
        return None
    artifact = Artifact.load(path)
    record = artifact.stages.get(name)
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    if record is None or record.get("sources") != list(sources) or artifact.base_model["fingerprint"] != weights:
        return None
    got = {**_NOT_ASKED_BEFORE.get(name, {}), **record["settings"]}
    if name == "calibrate":
        if not wanted["lengths_tokens"]:  # the stage recorded the lengths that its default gave
            got["lengths_tokens"] = []
        if record.get("sparse") != sparse.to_dict():
            return None
    elif after is None or any(artifact.stages.get(n) != after.stages[n] for n in after.stages):
        return None
    if got != wanted:
        return None
    if name == STAGES[-1]:
        return artifact
    cut: dict[str, Any] = {"stages": {n: artifact.stages[n] for n in STAGES[: STAGES.index(name) + 1]}}
    cut |= {"weights_kind": None, "weights_path": None}
    if name == "calibrate":
        cut |= {"indexer": None, "config": sparse}
    return dataclasses.replace(artifact, **cut)


def save_stage(path: Path, name: str, artifact: Artifact, sources: list[str] | tuple[str, ...]) -> Artifact:
    """Record the stage's sources, keep its metrics, write the artefact, and read it back.

    The metrics go first: a stage in a written artefact is finished and is not run again.
    """
    record = {**artifact.stages[name], "sources": list(sources)}
    if name == "calibrate":
        record["sparse"] = artifact.config.to_dict()
    artifact = dataclasses.replace(artifact, stages={**artifact.stages, name: record})
    for later in STAGES[STAGES.index(name) :]:
        (path / METRICS_DIR / f"{later}.jsonl").unlink(missing_ok=True)
    lines = path / WORK_DIR / name / METRICS_FILE
    if lines.is_file():
        (path / METRICS_DIR).mkdir(exist_ok=True)
        with atomic_path(path / METRICS_DIR / f"{name}.jsonl") as temporary:
            shutil.copyfile(lines, temporary)
    artifact.save(path)
    return Artifact.load(path)


def findings(artifact: Artifact, name: str) -> list[str]:
    """What a person should read after a stage: calibration's head map, how it came to so many heads, and its overlap; and
    what the stage warns of."""
    metrics = artifact.stages[name]["metrics"]
    chosen = [str(artifact.heads), recovery_sentence(metrics), overlap_sentence(metrics)] if name == "calibrate" else []
    return [line for line in (*chosen, *(f"Note: {note}" for note in metrics.get("notes", []))) if line]


def recovery_sentence(metrics: dict[str, Any]) -> str:
    """Which shares calibration tried for its target and which one it took, "" without a target."""
    found = metrics.get("target_recovery")
    if found is None:
        return ""
    tried = ", ".join(f"{row['ratio']:.0%} {row['recovery']:.3f}" for row in found["tried"])
    return f"Target recovery {found['target']:g}: {found['chosen_ratio']:.0%} chosen (share and recovery: {tried})."


def verify(
    model: Any, tokenizer: Any, artifact: Artifact, path: Path, heldout: list[str] | tuple[str, ...], config: EvalConfig
) -> dict[str, Any]:
    """Evaluate and write `eval.json`; an evaluation of the same artefact with the same settings is kept."""
    from .evals import evaluate

    check_fingerprint(model, artifact)
    config = config.resolved(context_tokens(model), artifact.config)
    wanted = json.loads(json.dumps({"settings": dataclasses.asdict(config), "sources": list(heldout)}))
    of = artifact.digest()
    file = path / EVAL_FILE
    if file.is_file():
        try:
            found = read_evaluation(path)
        except ValueError as error:
            say(f"evaluate: the old result is left aside ({error})")
            found = {}
        before = {**found, "settings": {**_NOT_ASKED_BEFORE["evaluate"], **found.get("settings", {})}}
        if {key: before.get(key) for key in wanted} == wanted and found.get("artifact") == of:
            say("evaluate: finished before, kept")
            return found
    path.mkdir(parents=True, exist_ok=True)
    say("evaluate: running")
    result = {"artifact": of, **evaluate(model, tokenizer, artifact, heldout, config)}
    write_json(file, result)
    return result


def resolved(model: Any, config: ConvertConfig) -> dict[str, tuple[Any, str]]:
    """The settings that a conversion of this model comes to, each with where it comes from.

    Window and lengths follow from the context, what is chosen and how many of it from the heads. Nothing else follows from
    the model by default: the share and the least probability that suit SmolLM2-135M suit Qwen2.5-Coder-0.5B
    (docs/results.md), and two small models do not say how steps or rates should change with size.

    Returns:
        {setting: (value, half a sentence)}
    """
    context = context_tokens(model)
    sparse, default = config.sparse(context=context), ConvertConfig()
    c, i, d = config.calibrate, config.indexer, config.distill
    _, query_heads, kv_heads, _ = head_counts(model)
    size = query_heads // kv_heads
    unit = c.chosen_unit(size)
    what, each = ("KV groups", kv_heads) if unit == "group" else ("query heads", query_heads)
    units = len(attention_layers(model)) * each
    kept = f"{c.retrieval_ratio:.0%} of {units} {what}, over the whole model"
    if c.threshold is not None:
        kept = f"as many of {units} {what} as score {c.threshold:g}"
    elif c.target_recovery is not None:
        kept += f", or more until {c.target_recovery:g} is recovered"
    at_most = f"at most {LONGEST_TOKENS}"
    all_of = f"all of the context of {context}, {at_most}"

    def plain(part: Any, usual: Any, name: str, why: str) -> tuple[Any, str]:
        """A setting that no model changes."""
        value, before = getattr(part, name), getattr(usual, name)
        return value, f"the default; {why}" if value == before else f"asked for; the default is {before}"

    def length(part: Any) -> tuple[int, str]:
        return (part.length_tokens, "asked for") if part.length_tokens else (min(context, LONGEST_TOKENS), all_of)

    window = f"an eighth of the context of {context}, from 256 to 8192"
    parts = f"a quarter, a half and {all_of}, at least 2 windows"
    small, larger = "measured on SmolLM2-135M", "measured on Qwen2.5-Coder-0.5B"
    return {
        "window_tokens": (sparse.window_tokens, window if config.window_tokens is None else "asked for"),
        "granularity": (
            unit,
            f"{size} query heads share a KV head: single heads above {LARGEST_WHOLE_GROUP}"
            if c.granularity == "auto"
            else "asked for",
        ),
        "retrieval_ratio": plain(c, default.calibrate, "retrieval_ratio", "the paper's share of heads"),
        "retrieval_units": (None if c.threshold is not None else max(1, round(c.retrieval_ratio * units)), kept),
        "top_p": plain(config, default, "top_p", "the least probability decides alone"),
        "min_probability": plain(config, default, "min_probability", f"no query selects more than 10000 tokens; {small}"),
        "dense_end_tokens": plain(config, default, "dense_end_tokens", f"of a prompt, read by all heads; {larger}"),
        "calibrate.lengths_tokens": (
            c.lengths_tokens or default_lengths(context, sparse),
            "asked for" if c.lengths_tokens else parts,
        ),
        "indexer.length_tokens": length(i),
        "indexer.steps": plain(i, default.indexer, "steps", f"100 to 600 do the same, {small}"),
        "indexer.batch_size": plain(i, default.indexer, "batch_size", "documents a step and process"),
        "indexer.learning_rate": plain(i, default.indexer, "learning_rate", f"the best of three, {small}"),
        "distill.length_tokens": length(d),
        "distill.steps": plain(d, default.distill, "steps", f"300 and 500 were {larger}"),
        "distill.batch_size": plain(d, default.distill, "batch_size", "documents a step and process"),
        "distill.weights": plain(d, default.distill, "weights", "an adapter; all weights did no better (docs/results.md)"),
        "distill.learning_rate": plain(d, default.distill, "learning_rate", f"for an adapter; {larger}"),
    }


def estimate(model: Any, config: ConvertConfig) -> dict[str, Any]:
    """What a conversion will take: forward passes counted from the settings, timed on this machine with one short pass.

    Returns:
        "seconds" per stage and in all (rough: within a factor of two); "memory_gib" per stage and "largest", computed as
        `memory.memory` says; "disk_mib" of the artefact; "settings", see `resolved`.
    """
    import time

    import torch

    from .memory import Shape, memory

    sparse = config.sparse(context=context_tokens(model))
    context = min(context_tokens(model), LONGEST_TOKENS)
    probe = torch.zeros(1, min(512, context), dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(probe, logits_to_keep=1)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            float(model(probe, logits_to_keep=1).logits.sum())
            times.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        float(model(probe[:, :1], logits_to_keep=1).logits.sum())
        per_step = time.perf_counter() - begin
    per_token = min(times) / probe.shape[1]
    layers, query_heads, kv_heads, head_dim = head_counts(model)
    parameters = sum(p.numel() for p in model.parameters())

    def forward(length: int) -> float:
        """Seconds of one pass: linear in length, plus attention's quadratic share by its operation count."""
        attention = 4 * layers * query_heads * head_dim * length / 2
        return per_token * length * (1 + attention / (2 * parameters))

    c, i, d = config.calibrate, config.indexer, config.distill
    e = config.evaluate.resolved(context_tokens(model), sparse)
    lengths = c.lengths_tokens or default_lengths(context, sparse)
    passes = 5.0 if c.scoring == "gates" else 1.0  # the dense model; forward, recomputation, backward
    indexer_length, distill_length = i.length_tokens or context, d.length_tokens or context
    samples = e.samples * len(e.lengths_tokens) if len(e.samples) == 1 else e.samples
    seconds = {
        "calibrate": sum(passes * c.documents * forward(n) for n in lengths)
        + 2 * c.check_samples * forward(max(lengths))
        + 4 * 50 * forward(max(lengths)) * (c.target_recovery is not None),  # the dense model and about three shares
        "train_indexer": (min(i.documents, i.steps * i.batch_size) + 8) * forward(indexer_length)
        + i.steps * i.batch_size * 0.1 * forward(indexer_length),
        "distill": 6.0 * d.steps * d.batch_size * forward(distill_length),
        "evaluate": sum(2 * n * len(e.kinds) * forward(t) for n, t in zip(samples, e.lengths_tokens, strict=True))
        + 2 * (e.loss_documents + e.fidelity_documents + 1) * forward(max(e.lengths_tokens))
        + (4 if d.steps else 2) * e.short_documents * forward(min(2048, context))
        + 3 * e.long_tokens * (per_step + e.long_prompts * per_token),
    }
    shape = Shape.of(model)
    gpu = model.device.type == "cuda"
    of_gpu = torch.cuda.get_device_properties(model.device).total_memory if gpu else 0
    needed = {name: sum(terms.values()) for name, terms in memory(shape, config, gpu_bytes=of_gpu).items()}
    trained = parameters if d.weights == "full" else shape.lora_parameters(d.lora_rank)
    size = query_heads // kv_heads
    each, per_query = (query_heads, 1) if c.chosen_unit(size) == "head" else (kv_heads, size)
    per_unit = sparse.index_dim * head_dim * (1 + per_query)
    disk = 4 * c.retrieval_ratio * layers * each * per_unit + 2 * trained * bool(d.steps)
    return {
        "seconds": {**{k: round(v) for k, v in seconds.items()}, "total": round(sum(seconds.values()))},
        "memory_gib": {name: round(gib, 2) for name, gib in (needed | {"largest": max(needed.values())}).items()},
        "disk_mib": round(disk / 2**20, 1),
        "settings": {name: {"value": value, "from": why} for name, (value, why) in resolved(model, config).items()},
    }
