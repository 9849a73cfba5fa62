"""The study: what a converted model keeps, against rivals and with parts left out, cell by cell.

    python benchmarks/study.py smollm2-135m --name smollm2 -o out/study           (or: make study)

A cell is one question with one answer, a JSON file OUT/NAME/CELL.json with settings, environment, seconds and result. Cells
lie in order of what they tell; what is there is kept, so a killed study goes on where it was. Several workers share them
(and the GPUs: a small model's decode step is bound by Python). `--list` shows the cells, `--cells 'ruler/*'` chooses some.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import gzip
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environment import environment
from rivals import budget_for, rival
from transformers import AutoTokenizer

import rtpurbo
from rtpurbo.checkpoint import WORK_DIR, atomic_path, write_json
from rtpurbo.config import CalibrateConfig, DistillConfig, EvalConfig, IndexerConfig, SparseConfig
from rtpurbo.evals.compare import both
from rtpurbo.families import context_tokens
from rtpurbo.models import load_model
from rtpurbo.pipeline import PAPER, ConvertConfig, save_stage

TASKS = (
    "niah_single_2", "niah_multikey_2", "niah_multiquery", "ruler_vt", "niah_multikey_3", "niah_multivalue",
    "ruler_qa_squad", "niah_single_3", "niah_multikey_1", "ruler_cwe", "ruler_fwe", "ruler_qa_hotpot", "niah_single_1",
)  # fmt: skip
"""RULER's thirteen, the telling ones first."""
DENSE_ENDS = {"dense_end": 128, "dense_end_2048": 2048, "dense_prefill": 10**9}
"""Last tokens of a prompt that the sparse model reads densely: the question, or all, as rivals do that choose in decode."""
ENDED = {f"{name}_end": name for name in ("stage1", "razor", "window", "top_k")}
"""Name -> what else reads prompts sparsely, here with the end read densely as `dense_end` does."""
OURS = ("dense", "sparse", "stage1", "stage1_end", *DENSE_ENDS)
READ_TASKS = ("ruler_vt", "ruler_cwe", "ruler_fwe")
"""Tasks that lose what all heads find while they read."""
CURVE_TASKS = TASKS[:4]
LEAST = ("0.001", "0.0003", "3e-05")
"""Other least probabilities of the sparse model."""
CURVE = (
    *(f"dense_end@{least}" for least in LEAST),
    *(f"{method}@{times:g}" for method in ("window_end", "quest", "snapkv", "top_k_end") for times in (0.5, 2)),
)
"""METHOD@SETTING, more points of quality against bytes: our least probability, a rival's budget over that of equal bytes."""


@dataclass
class Study:
    """Model, text and settings, and what has been loaded so far."""

    args: argparse.Namespace
    folder: Path
    loaded: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> tuple[Any, Any]:
        """The dense model and its tokenizer."""
        if "model" not in self.loaded:
            self.loaded["model"] = load_model(self.args.model, dtype=self.args.dtype)
        return self.loaded["model"]

    @property
    def artifact(self) -> rtpurbo.Artifact:
        """The artefact of the default recipe, which reads prompts sparsely to their end: a method of its own does not."""
        if "artifact" not in self.loaded:
            found = rtpurbo.Artifact.load(self.folder / "artefact")
            config = found.config.with_options(dense_end_tokens=0)
            self.loaded["artifact"] = dataclasses.replace(found, config=config)
        return self.loaded["artifact"]

    def with_least(self, probability: float) -> rtpurbo.Artifact:
        """The artefact with another least probability."""
        return dataclasses.replace(self.artifact, config=self.artifact.config.with_options(min_probability=probability))

    def sparse(self, **settings: Any) -> SparseConfig:
        """What the artefact is to be."""
        least = self.recipe.min_probability if self.args.min_probability is None else self.args.min_probability
        own = {"window_tokens": self.args.window, "top_p": self.recipe.top_p, "min_probability": least}
        return SparseConfig(**own | settings)

    @property
    def recipe(self) -> ConvertConfig:
        """What --recipe starts from."""
        return PAPER if self.args.recipe == "paper" else ConvertConfig()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer alone: no weights are read for it when the model is a directory."""
        if "model" in self.loaded or not Path(self.args.model).is_dir():
            return self.model[1]
        return AutoTokenizer.from_pretrained(self.args.model)

    def samples(self, length: int, task: str) -> Path:
        """Where RULER's documents of a task and length lie."""
        return self.folder / "samples" / str(length) / f"{task}.json.gz"

    def result(self, cell: str) -> Path:
        """Where the result of a cell lies."""
        return self.folder / f"{cell}.json"

    def claim(self, cell: str) -> Path:
        """What says that a worker has begun a cell; with the suffix .failed: that it has not finished it."""
        return self.folder / "claims" / cell.replace("/", "+")

    def far_ratio(self, length: int) -> float:
        """Share of the far tokens that a unit selects in prose of this length, as the cell `fidelity` measured."""
        found = json.loads(self.result("fidelity").read_text())["result"]
        return found[f"{Path(self.args.dev[0]).name} {length}"]["index"]["far_selected_ratio"]


Run = Callable[[Study], dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One question."""

    name: str
    run: Run
    needs: tuple[str, ...] = ()
    """Cells that come first."""


def cells(args: argparse.Namespace) -> list[Cell]:
    """All cells, the most telling first."""
    middle = sorted(args.lengths)[len(args.lengths) // 2]
    order = [middle, *(n for n in sorted(args.lengths, reverse=True) if n != middle)]
    found = [Cell("convert", convert)]
    found += [
        Cell(f"samples/{length}/{task}", partial(make_samples, task=task, length=length))
        for length in order
        for task in TASKS
    ]

    def ruler(length: int, methods: tuple[str, ...], tasks: tuple[str, ...] = TASKS) -> Iterator[Cell]:
        for task in tasks:
            for method in methods:
                ours = method.partition("@")[0] in OURS
                first = () if method == "dense" else ("convert",) if ours else ("convert", "fidelity")
                needs = (f"samples/{length}/{task}", *first)
                run = partial(run_ruler, task=task, length=length, method=method)
                yield Cell(f"ruler/{length}/{task}/{method}", run, needs)

    found += [Cell("fidelity", fidelity, ("convert",))]
    for length in order:
        found += ruler(length, ("dense", "sparse", "dense_end"))
    found += [Cell("needles", needles, ("convert",))]
    found += [Cell("short_context", short_context, ("convert",)), Cell("long_generation", long_generation, ("convert",))]
    found += ruler(middle, ("stage1_end", "razor_end", "window_end", "quest", "snapkv"))
    found += ruler(middle, ("dense_prefill", "stage1", "razor", "window"))
    found += [Cell("selected", partial(selected, length=middle), ("convert",)), *ruler(middle, CURVE, CURVE_TASKS)]
    found += ruler(middle, ("top_k_end", "top_k"))
    for length in order:
        found += ruler(length, ("dense_end_2048",), READ_TASKS)
    for length in order[1:]:
        found += ruler(length, ("dense_prefill",))
    for name, changes in ABLATIONS.items():
        found.append(Cell(f"ablation/{name}", partial(ablation, **changes)))
    return found


def convert(study: Study) -> dict[str, Any]:
    """Calibrate, index, distil. The artefact goes to OUT/NAME/artefact, resumable stage by stage."""
    args, out = study.args, study.folder / "artefact"
    model, tokenizer = study.model
    recipe = study.recipe
    ours = args.recipe == "default"  # the paper's settings are its own but for lengths, steps and what fits the machine
    longest = max(args.lengths)
    artifact = rtpurbo.Artifact.load(out) if out.is_dir() else None
    seconds: dict[str, float] = {}
    peak: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        begin = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        yield
        seconds[what] = time.perf_counter() - begin
        if torch.cuda.is_available():
            peak[what] = torch.cuda.max_memory_allocated() / 1e9
        say(f"{what}: {seconds[what]:.0f} s", json.dumps(short(artifact.stages[what]["metrics"]))[:600])

    if artifact is None:
        with timed("calibrate"):
            own = {"granularity": args.granularity, "scoring": args.scoring, "documents": args.calibrate_documents}
            settings = dataclasses.replace(
                recipe.calibrate, lengths_tokens=tuple(args.lengths), retrieval_ratio=args.retrieval_ratio,
                check_samples=args.check_samples, **own if ours else {},
            )  # fmt: skip
            sparse = study.sparse(dense_end_tokens=recipe.dense_end_tokens)
            found = rtpurbo.calibrate(model, tokenizer, args.train, settings, sparse, model_name=args.model_name)
            artifact = save_stage(out, "calibrate", found, args.train)
    if "train_indexer" not in artifact.stages:
        with timed("train_indexer"):
            settings = dataclasses.replace(
                recipe.indexer, steps=args.index_steps, length_tokens=longest, documents=args.index_documents,
                queries=args.index_queries, capture_gib=args.capture_gib,
            )  # fmt: skip
            work = out / WORK_DIR / "train_indexer"
            found = rtpurbo.train_indexer(model, tokenizer, artifact, args.train, settings, work=work)
            artifact = save_stage(out, "train_indexer", found, args.train)
    if args.distill_steps and "distill" not in artifact.stages:
        with timed("distill"):
            own = {
                "weights": args.weights, "learning_rate": args.learning_rate, "batch_size": args.batch_size,
                "retrieval_ratio": args.distill_questions, "lora_layers": args.lora_layers,
            }  # fmt: skip
            settings = dataclasses.replace(
                recipe.distill, steps=args.distill_steps, length_tokens=args.distill_length or longest, labels=args.labels,
                gradient_checkpointing=not args.keep_activations, **own if ours else {},
            )  # fmt: skip
            work = out / WORK_DIR / "distill"
            found = rtpurbo.distill(model, tokenizer, artifact, args.train, settings, work=work)
            artifact = save_stage(out, "distill", found, args.train)
    megabytes = sum(f.stat().st_size for f in out.rglob("*") if f.is_file() and WORK_DIR not in f.parts) / 1e6
    return {
        "stages": {name: {**stage, "metrics": short(stage["metrics"])} for name, stage in artifact.stages.items()},
        "sparse": artifact.config.to_dict(), "seconds": seconds, "peak_gigabytes": peak, "megabytes": megabytes,
        "base_model": artifact.base_model, "full_kv_ratio": artifact.heads.full_kv_ratio,
        "heads": artifact.heads.to_dict(),
    }  # fmt: skip


def short(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without what is listed per head."""
    return {key: value for key, value in metrics.items() if key not in ("scores", "units")}


def make_samples(study: Study, *, task: str, length: int) -> dict[str, Any]:
    """RULER's documents of one task and length, as lm-evaluation-harness makes them."""
    from rtpurbo.evals.ruler import documents

    count, files = study.args.samples, study.args.ruler_files
    made = documents(task, study.tokenizer, (length,), count=count, files=files, seed=study.args.seed)
    file = study.samples(length, task)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as path:
        path.write_bytes(gzip.compress(json.dumps(made).encode(), 3))
    return {"documents": len(made)}


@contextmanager
def running(study: Study, method: str, length: int) -> Iterator[tuple[Any, Any]]:
    """The model running one method (METHOD or METHOD@SETTING), and what its decode steps read (rivals only)."""
    model, _ = study.model
    method, _, setting = method.partition("@")
    end = DENSE_ENDS["dense_end"] if method in ENDED else DENSE_ENDS.get(method, 0)
    method = ENDED.get(method, method)
    if method == "dense":
        yield model, None
    elif method in OURS:
        artifact = study.with_least(float(setting)) if setting else study.artifact
        if method == "stage1":
            artifact = dataclasses.replace(artifact, weights_kind=None, weights_path=None)
        artifact = dataclasses.replace(artifact, config=artifact.config.with_options(dense_end_tokens=end))
        with both(model, artifact) as switch, switch("sparse") as ready:
            yield ready, None
    else:
        artifact, far = study.artifact, study.far_ratio(length)
        head_dim = artifact.base_model["head_dim"]
        budget = round(budget_for(method, artifact.heads, artifact.config, length, far, head_dim) * float(setting or 1))
        config = artifact.config.with_options(dense_end_tokens=end)
        chosen = {"heads": artifact.heads, "indexer": artifact.indexer, "config": config}
        with rival(model, method, budget_tokens=budget, **chosen) as reads:
            yield model, reads


def run_ruler(study: Study, *, task: str, length: int, method: str) -> dict[str, Any]:
    """One task of RULER at one length by one method: a score for every sample."""
    from rtpurbo.evals.harness import load_tasks, score_tasks

    model, tokenizer = study.model
    batch = max(1, study.args.batch_tokens // length)
    settings = EvalConfig(
        lengths_tokens=(length,), tasks=(task,), task_limit=study.args.samples, task_batch=batch, seed=study.args.seed
    )
    made = json.loads(gzip.decompress(study.samples(length, task).read_bytes()))
    tasks = load_tasks(tokenizer, settings, {task: made})
    with running(study, method, length) as (ready, reads):
        rows = score_tasks(ready, tokenizer, tasks, settings, context_tokens(model))
    (row,) = rows
    row["prompts"] = hashlib.sha256("".join(row["prompts"]).encode()).hexdigest()[:16]
    row |= {"method": method, "length_tokens": length, "lm_eval": importlib.metadata.version("lm_eval")}
    if reads is not None:
        row["bytes_ratio"] = reads.bytes_ratio
    return row


def fidelity(study: Study) -> dict[str, Any]:
    """Held-out loss, KL and agreement by position, attention mass and tokens selected, at every length and source."""
    found = {}
    args = study.args
    for length in args.lengths:
        for source in args.dev:
            settings = quiet(
                lengths_tokens=(length,), samples=(0,), loss_documents=args.loss_documents, fidelity_documents=4
            )
            key = f"{Path(source).name} {length}"
            result = rtpurbo.evaluate(*study.model, study.artifact, [source], settings)
            (found[key],) = result["loss"].values()
            found[key]["index"] = short(result["index"])
            say(key, {k: round(found[key][k], 4) for k in ("dense", "sparse", "recovery", "kl", "top1_agreement")})
    return found


def selected(study: Study, *, length: int) -> dict[str, Any]:
    """Share of the far tokens that a unit selects in prose of this length, for every least probability in LEAST."""
    found = {}
    settings = quiet(lengths_tokens=(length,), samples=(0,), fidelity_documents=4)
    for least in LEAST:
        measured = rtpurbo.evaluate(*study.model, study.with_least(float(least)), study.args.dev[:1], settings)
        found[least] = measured["index"]["far_selected_ratio"]
    return found


def needles(study: Study) -> dict[str, Any]:
    """Needle questions of all kinds in held-out prose, and cache bytes."""
    settings = quiet(lengths_tokens=tuple(study.args.lengths), samples=(study.args.samples,), decode_tokens=8)
    result = rtpurbo.evaluate(*study.model, study.artifact, study.args.dev[:1], settings)
    return {key: result[key] for key in ("needle", "speed", "settings")}


def short_context(study: Study) -> dict[str, Any]:
    """Loss of documents of 2048 tokens and short SQuAD questions: dense, sparse, and the distilled weights run dense."""
    squad = str(Path(study.args.ruler_files) / "squad.json") if study.args.ruler_files else None
    settings = quiet(
        lengths_tokens=(min(study.args.lengths),), samples=(0,), short_documents=16, squad=squad, squad_samples=400
    )
    return rtpurbo.evaluate(*study.model, study.artifact, study.args.dev, settings)["short"]


def long_generation(study: Study) -> dict[str, Any]:
    """Thousands of tokens after a long prompt."""
    longest = max(study.args.lengths)
    settings = quiet(lengths_tokens=(longest,), samples=(0,), long_tokens=min(4096, longest // 4), long_prompts=4)
    return rtpurbo.evaluate(*study.model, study.artifact, study.args.dev[:1], settings)["long_generation"]


def quiet(**settings: Any) -> EvalConfig:
    """An EvalConfig that measures only what is asked for."""
    none = {"loss_documents": 0, "fidelity_documents": 0, "decode_tokens": 0, "short_documents": 0}
    return EvalConfig(**none | settings)


def say(*parts: Any) -> None:
    """A line for the person who waits."""
    print(time.strftime("[%H:%M:%S]"), *parts, flush=True)


ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "stage_1_only": {"distill": {"steps": 0}},
    "window_half": {"window": {"factor": 0.5}},
    "window_double": {"window": {"factor": 2.0}},
    "share_0.10": {"calibrate": {"retrieval_ratio": 0.10}},
    "share_0.30": {"calibrate": {"retrieval_ratio": 0.30}},
    "query_heads": {"calibrate": {"granularity": "head"}},
    "kv_groups": {"calibrate": {"granularity": "group"}},
    "heads_by_needle": {"calibrate": {"scoring": "needle"}},
    "dimension_4": {"sparse": {"index_dim": 4}},
    "dimension_8": {"sparse": {"index_dim": 8}},
    "dimension_32": {"sparse": {"index_dim": 32}},
    "p_0.80": {"sparse": {"top_p": 0.8, "min_probability": 0.0}},
    "p_0.90": {"sparse": {"top_p": 0.9, "min_probability": 0.0}},
    "p_0.95": {"sparse": {"top_p": 0.95, "min_probability": 0.0}},
    "least_0.0003": {"sparse": {"min_probability": 3e-4}},
    "least_0.00003": {"sparse": {"min_probability": 3e-5}},
    "post_rope": {"patch": {"post_rope": True}},
    "random_start": {"indexer": {"start": "random"}},
    "kl_token_by_token": {"indexer": {"near_as_one": False}},
    "queries_alike": {"indexer": {"far_weighting": False}},
    "index_steps_0": {"indexer": {"steps": 0}},
    "index_steps_50": {"indexer": {"steps": 50}},
    "index_steps_100": {"indexer": {"steps": 100}},
    "index_steps_600": {"indexer": {"steps": 600}},
    "distill_steps_50": {"distill": {"steps": 50}},
    "distill_steps_300": {"distill": {"steps": 300}},
    "distill_steps_600": {"distill": {"steps": 600}},
    "all_weights": {"distill": {"weights": "full", "learning_rate": 3e-5}},
    "no_answers": {"distill": {"answer_weight": 0.0, "retrieval_ratio": 0.0}},
    "prefill_by_tile": {"sparse": {"tile_probability": 3e-4}},
    "ladder": {"calibrate": {"window_mass": 0.98}},
}
"""What each changes in the short recipe; `default` changes nothing."""


def ablation(
    study: Study,
    *,
    calibrate: dict[str, Any] | None = None,
    sparse: dict[str, Any] | None = None,
    indexer: dict[str, Any] | None = None,
    distill: dict[str, Any] | None = None,
    window: dict[str, float] | None = None,
    patch: dict[str, bool] | None = None,
) -> dict[str, Any]:
    """The short recipe with something changed; stages that two ablations share run once."""
    args, (model, tokenizer) = study.args, study.model
    length = args.ablation_length
    lengths = (length // 4, length)
    config = study.sparse(**sparse or {})
    config = dataclasses.replace(config, window_tokens=int(config.window_tokens * (window or {}).get("factor", 1.0)))
    beyond = tuple(n for n in (length // 4, length // 2, length) if n > config.window_tokens + config.sink_tokens)
    stages = {
        "calibrate": CalibrateConfig(**{"lengths_tokens": beyond, "documents": 18} | (calibrate or {})),
        "train_indexer": IndexerConfig(
            **{"steps": 300, "length_tokens": length, "documents": 96, "capture_gib": args.capture_gib} | (indexer or {})
        ),
        "distill": DistillConfig(
            **{
                "steps": 100,
                "length_tokens": length,
                "gradient_checkpointing": not args.keep_activations,
                "learning_rate": args.learning_rate,
            }
            | (distill or {})
        ),
    }
    run = {"calibrate": rtpurbo.calibrate, "train_indexer": rtpurbo.train_indexer, "distill": rtpurbo.distill}
    settings: list[Any] = [config.to_dict(), patch]
    artifact: rtpurbo.Artifact | None = None
    seconds = {}
    with post_rope() if patch else nullcontext():
        for name, stage in stages.items():
            if name == "distill" and not stage.steps:
                continue
            settings.append(dataclasses.asdict(stage))
            key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
            place = study.folder / "stages" / f"{name}_{key}"
            if not place.is_dir():
                begin = time.perf_counter()
                given = (stage, config) if artifact is None else (artifact, args.train, stage)
                given = (args.train, *given) if artifact is None else given
                save_stage(place, name, run[name](model, tokenizer, *given), args.train)
                seconds[name] = time.perf_counter() - begin
            artifact = rtpurbo.Artifact.load(place)
        assert artifact is not None
        result: dict[str, Any] = {"seconds": seconds, "sparse": artifact.config.to_dict(), "loss": {}, "index": {}}
        result["full_kv_ratio"] = artifact.heads.full_kv_ratio
        for source in args.dev:
            samples = (args.ablation_samples if source == args.dev[0] else 0,)
            some = quiet(
                lengths_tokens=lengths,
                samples=samples,
                kinds=("single", "multi_key"),
                loss_documents=4,
                fidelity_documents=2,
            )
            found = rtpurbo.evaluate(model, tokenizer, artifact, [source], some)
            result["loss"] |= {Path(name).name: row for name, row in found["loss"].items()}
            result["index"][Path(source).name] = short(found.get("index", {}))
            result.setdefault("needle", found["needle"])
    for row in result["needle"]:
        say("   ", row["kind"], row["length_tokens"], row["dense"], row["sparse"])
    return result


@contextmanager
def post_rope() -> Iterator[None]:
    """Index projections of rotated queries and keys instead of those before RoPE."""
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2

    def rotated(original: Callable[..., Any]) -> Callable[..., Any]:
        def rotate(q: torch.Tensor, k: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            turned = original(q, k, *args)
            with torch.no_grad():
                q.data, k.data = (x.detach().clone() for x in turned)  # what the index will read
            return turned

        return rotate

    modules = (modeling_llama, modeling_qwen2)
    before = [module.apply_rotary_pos_emb for module in modules]
    for module, original in zip(modules, before, strict=True):
        module.apply_rotary_pos_emb = rotated(original)
    try:
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            module.apply_rotary_pos_emb = original


def work(study: Study, plan: list[Cell]) -> None:
    """Run cells that nobody has begun, in order, as soon as what they need is there; ends when nothing is left to begin."""
    while True:
        waiting = False
        for cell in plan:
            if study.result(cell.name).is_file() or study.claim(cell.name).exists():
                continue
            if not all(study.result(need).is_file() for need in cell.needs):
                waiting |= not any(study.claim(f"{need}.failed").exists() for need in cell.needs)
                continue
            if study.args.deadline and time.time() > study.args.deadline:
                return
            try:
                with study.claim(cell.name).open("x") as claim:
                    claim.write(str(os.getpid()))
            except FileExistsError:
                continue
            run_cell(study, cell)
            break  # from the top: something more telling may be ready now
        else:
            if not waiting:
                return
            time.sleep(1.0)


def run_cell(study: Study, cell: Cell) -> None:
    """Run one cell and write its file; a failure ends this process, says why, and leaves the cell undone."""
    failed, file = study.claim(f"{cell.name}.failed"), study.result(cell.name)
    failed.touch()
    begin = time.perf_counter()
    result = cell.run(study)
    seconds = time.perf_counter() - begin
    settings = {key: value for key, value in vars(study.args).items() if key not in PRIVATE}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        file,
        {
            "cell": cell.name, "environment": environment(study.args.commit), "settings": settings, "seconds": seconds,
            "result": result,
        },
    )  # fmt: skip
    failed.unlink(missing_ok=True)  # claims are cleared when a study is started again beside a worker
    line = {k: v for k, v in result.items() if isinstance(v, (int, float, str))}
    if "scores" in result:
        line = {"score": round(sum(result["scores"]) / len(result["scores"]), 3)}
    say(f"{cell.name}: {seconds:.1f} s", json.dumps(line)[:300])


def collect(folder: Path, file: Path) -> None:
    """All finished cells in one file: {"runs": settings and environments, "cells": name -> run, seconds, result}."""
    runs: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name.split("/")[0] in ("artefact", "stages", "samples"):
            continue
        cell = json.loads(path.read_text())
        run = {"environment": cell["environment"], "settings": cell["settings"]}
        if run not in runs:
            runs.append(run)
        found[name] = {"run": runs.index(run), "seconds": round(cell["seconds"], 1), "result": cell["result"]}
    write_json(file, {"runs": runs, "cells": found})


PRIVATE = (
    "output",
    "collect",
    "cells",
    "workers",
    "worker",
    "deadline",
    "minutes",
    "list",
    "commit",
    "model",
    "ruler_files",
)


def main() -> None:
    """Parse, then work alone or start the workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", required=True, help="folder of the results below --output")
    parser.add_argument("--model-name", default="", help="what the artefact calls its base model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--train", nargs="+", default=["installed-docs", "installed-python"])
    parser.add_argument(
        "--dev", nargs="+", default=["installed-docs:heldout", "installed-python:heldout"], help="prose first"
    )
    parser.add_argument("--ruler-files", help="folder with RULER's essays and question sets; default: downloaded")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--min-probability", type=float, help="default: the recipe's")
    parser.add_argument(
        "--recipe", default="default", choices=("default", "paper"),
        help="paper: its settings wherever they are known, instead of the options for scoring, granularity and distillation",
    )  # fmt: skip
    parser.add_argument("--granularity", default="auto")
    parser.add_argument("--scoring", default="gates", choices=("gates", "needle"), help="how heads are chosen")
    parser.add_argument("--retrieval-ratio", type=float, default=0.15)
    parser.add_argument("--calibrate-documents", type=int, default=18)
    parser.add_argument("--check-samples", type=int, default=40)
    parser.add_argument("--index-steps", type=int, default=600)
    parser.add_argument("--index-documents", type=int, default=192)
    parser.add_argument("--index-queries", type=int, default=IndexerConfig.queries, help="of a document, in each step")
    parser.add_argument("--capture-gib", type=float, default=24.0)
    parser.add_argument("--distill-steps", type=int, default=600)
    parser.add_argument("--distill-length", type=int, default=0, help="0: the longest of --lengths")
    parser.add_argument("--weights", default="lora", choices=("lora", "full"))
    parser.add_argument("--labels", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=DistillConfig.learning_rate, help="of the distillation")
    parser.add_argument("--batch-size", type=int, default=4, help="of the distillation, in documents")
    parser.add_argument(
        "--distill-questions", type=float, default=DistillConfig.retrieval_ratio, help="share of documents with questions"
    )
    parser.add_argument("--lora-layers", type=float, default=DistillConfig.lora_layers, help="share of the layers it adapts")
    parser.add_argument("--keep-activations", action="store_true", help="distil without gradient checkpointing")
    parser.add_argument("--samples", type=int, default=100, help="of every RULER task and needle kind")
    parser.add_argument("--loss-documents", type=int, default=8)
    parser.add_argument("--ablation-length", type=int, default=8192)
    parser.add_argument("--ablation-samples", type=int, default=60)
    parser.add_argument("--batch-tokens", type=int, default=1 << 18, help="prompt tokens that are decoded together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", nargs="+", default=["*"], help="patterns of cells to run")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="begin no cell later than this")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--collect", type=Path, help="write all finished cells to this one file, and stop")
    parser.add_argument("--commit")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    study = Study(args, args.output / args.name)
    plan = [cell for cell in cells(args) if any(fnmatch.fnmatch(cell.name, pattern) for pattern in args.cells)]
    if args.collect:
        collect(study.folder, args.collect)
        return
    if args.list:
        for cell in plan:
            print("done" if study.result(cell.name).is_file() else "    ", cell.name)
        return
    if args.worker:
        work(study, plan)
        return
    claims = study.folder / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    for claim in claims.iterdir():
        claim.unlink()
    if args.minutes and not args.deadline:
        args.deadline = time.time() + 60 * args.minutes
    if args.workers == 1:
        work(study, plan)
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    command += ["--deadline", str(args.deadline)] if args.deadline else []
    every = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")  # which workers share evenly

    def start(number: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]})

    running = {number: start(number) for number in range(args.workers)}
    while running:  # a worker whose cell failed is replaced; the cell stays undone
        time.sleep(0.5)
        for number, process in list(running.items()):
            if process.poll() is not None:
                del running[number]
                if process.returncode:
                    running[number] = start(number)


if __name__ == "__main__":
    main()
