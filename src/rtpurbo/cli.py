"""Turn a full-attention language model into a sparse one. `rtpurbo COMMAND --help` states every default and unit."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from .checkpoint import atomic_path, write_json
from .config import CalibrateConfig, DistillConfig, EvalConfig, IndexDtype, IndexerConfig
from .pipeline import HELDOUT, PAPER, TRAINING, ConvertConfig, SparseOptions, say

T = TypeVar("T")
Sources = Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE...")]


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Directory (or file) to write to; default: see the command."""
    seed: int = 0
    """Seed of documents, samples and training."""
    json: Path | None = None
    """Write the machine-readable result to this file."""
    device: str = "auto"
    """"auto" (the GPU when there is one), "cpu", "cuda", "cuda:1", ..."""
    dtype: str = "auto"
    """"auto" (bfloat16 on a GPU, float32 on a CPU), "float32", "bfloat16" or "float16"."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    def load(self, name: str, revision: str | None = None) -> tuple[Any, Any]:
        """The dense model and its tokenizer."""
        from .models import load_model

        say(f"Loading {name}")
        return load_model(
            name, dtype=self.dtype, device=self.device, revision=revision, trust_remote_code=self.trust_remote_code
        )


@dataclass(frozen=True, kw_only=True)
class OfModel(Common):
    """What commands take that start from a dense model."""

    model: tyro.conf.Positional[str]
    """Hub name, local directory, GGUF file, or smollm2-135m (embedded)."""
    revision: str | None = None
    """Revision of a model on the hub (branch, tag or commit)."""


@dataclass(frozen=True, kw_only=True)
class OfArtifact(Common):
    """What commands take that run an artefact's model."""

    base_model: str | None = None
    """Where the base model lies, when not where the artefact says."""

    def load_base(self, artifact: Any) -> tuple[Any, Any]:
        """The artefact's base model, dense, and its tokenizer."""
        from .generate import load_base

        say(f"Loading {self.base_model or artifact.base_model['name']}")
        return load_base(
            artifact, self.base_model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code
        )


@dataclass(frozen=True, kw_only=True)
class Convert(OfModel, ConvertConfig):
    """Make a sparse version of a model: calibrate, train the index, distil, verify, report."""

    sources: Sources = TRAINING
    """Training text: files, directories, hub datasets, installed-docs, installed-python, package:NAME."""
    heldout: Sources = HELDOUT
    """Text for the verification."""
    recipe: Literal["default", "paper"] = "default"
    """What the settings are where no flag says otherwise: this project's, or the paper's (rtpurbo.pipeline.PAPER)."""
    dry_run: bool = False
    """Say what it will take in time, memory and disk, with which settings, and stop."""

    def run(self) -> Any:
        """Convert and print the table."""
        from .checkpoint import check_output
        from .pipeline import check_plan, convert, estimate

        output = self.output or Path("out")
        check_output(output)
        model, tokenizer = self.load(self.model, self.revision)
        config = _seeded(self)
        if self.dry_run:
            check_plan(model, config, [*self.sources, *self.heldout])
            result = estimate(model, config)
            _print_estimate(result, output)
            return result
        convert(
            model, tokenizer, output, sources=self.sources, heldout=self.heldout, config=config, model_name=self.model,
            revision=self.revision,
        )  # fmt: skip
        return _print_result(output)


@dataclass(frozen=True, kw_only=True)
class ConvertByPaper(Convert):
    """Make a sparse version of a model by the paper's recipe: calibrate, train the index, distil, verify, report."""

    recipe: Literal["default", "paper"] = "paper"
    top_p: float = PAPER.top_p
    min_probability: float = PAPER.min_probability
    dense_end_tokens: int = PAPER.dense_end_tokens
    calibrate: CalibrateConfig = PAPER.calibrate
    indexer: IndexerConfig = PAPER.indexer
    distill: DistillConfig = PAPER.distill


def _commands(arguments: list[str]) -> dict[str, Callable[..., Any]]:
    """COMMANDS, with the defaults of the recipe that the arguments of `convert` ask for, so that flags win over it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?")
    asked, _ = parser.parse_known_args(arguments)
    return {**COMMANDS, "convert": ConvertByPaper} if asked.recipe == "paper" else COMMANDS


def _part(command: Any, config: type[T]) -> T:
    """The settings of dataclass `config` out of a command that inherits them."""
    return config(**{f.name: getattr(command, f.name) for f in dataclasses.fields(config)})  # type: ignore[arg-type]


def _seeded(command: Convert) -> ConvertConfig:
    """The command's ConvertConfig, with its seed in every stage that has none of its own."""
    stages = {name: getattr(command, name) for name in ("calibrate", "indexer", "distill", "evaluate")}
    parts = {name: dataclasses.replace(stage, seed=stage.seed or command.seed) for name, stage in stages.items()}
    return dataclasses.replace(_part(command, ConvertConfig), **parts)


@dataclass(frozen=True, kw_only=True)
class Calibrate(OfModel, SparseOptions, CalibrateConfig):
    """Find a model's retrieval heads; the artefact works at once, with dense retrieval heads."""

    sources: Sources = TRAINING
    """Ordinary text."""

    def __post_init__(self) -> None:
        SparseOptions.__post_init__(self)
        CalibrateConfig.__post_init__(self)

    def run(self) -> Any:
        """Calibrate, save, print the map."""
        from .calibration import calibrate
        from .checkpoint import check_output
        from .families import context_tokens
        from .pipeline import findings, save_stage

        output = self.output or Path("out")
        check_output(output)
        model, tokenizer = self.load(self.model, self.revision)
        sparse = self.sparse(context=context_tokens(model))
        settings = _part(self, CalibrateConfig)
        artifact = calibrate(model, tokenizer, self.sources, settings, sparse, model_name=self.model, revision=self.revision)
        save_stage(output, "calibrate", artifact, self.sources)
        metrics = artifact.stages["calibrate"]["metrics"]
        for line in findings(artifact, "calibrate"):
            _out(line)
        _out(f"Saved to {output}. Next: rtpurbo train-indexer {output}")
        return {"heads": artifact.heads.to_dict(), **metrics}


@dataclass(frozen=True, kw_only=True)
class TrainIndexer(OfArtifact, IndexerConfig):
    """Stage 1: train the index of a calibrated artefact."""

    artifact: tyro.conf.Positional[Path]
    """Directory of the artefact; the result goes there unless --output says otherwise."""
    sources: Sources = TRAINING
    """Training text."""

    def run(self) -> Any:
        """Train, save, print the means."""
        from .indexer_training import train_indexer

        return _run_stage(self, "train_indexer", train_indexer, IndexerConfig, "distill")


@dataclass(frozen=True, kw_only=True)
class Distill(OfArtifact, DistillConfig):
    """Stage 2: distil an artefact that has an index."""

    artifact: tyro.conf.Positional[Path]
    """Directory of the artefact; the result goes there unless --output says otherwise."""
    sources: Sources = TRAINING
    """Training text."""

    def run(self) -> Any:
        """Train, save, print the losses."""
        from .distillation import distill

        return _run_stage(self, "distill", distill, DistillConfig, "eval")


def _run_stage(command: Any, name: str, function: Any, config: type, following: str) -> dict[str, Any]:
    from accelerate import Accelerator

    from .checkpoint import STAGES, WORK_DIR, Artifact, check_output
    from .pipeline import findings, save_stage

    output = command.output or command.artifact
    check_output(output)
    artifact = Artifact.load(command.artifact)
    again = [stage for stage in STAGES[STAGES.index(name) :] if stage in artifact.stages]
    if again and output == command.artifact:
        say(f"{output} has been through {' and '.join(again)}; what comes out replaces that.")
    model, tokenizer = command.load_base(artifact)
    settings: Any = _part(command, config)
    accelerator = Accelerator(cpu=model.device.type == "cpu")  # one process, or those of `accelerate launch`
    work = output / WORK_DIR / name
    artifact = function(model, tokenizer, artifact, command.sources, settings, work=work, accelerator=accelerator)
    metrics = artifact.stages[name]["metrics"]
    if not accelerator.is_main_process:
        return metrics
    save_stage(output, name, artifact, command.sources)
    shutil.rmtree(output / WORK_DIR, ignore_errors=True)
    for key, value in metrics.items():
        if isinstance(value, (int, float)):
            _out(f"{key:24s} {value:.4g}")
    for line in findings(artifact, name):
        _out(line)
    _out(f"Saved to {output}. Next: rtpurbo {following} {output}")
    return metrics


@dataclass(frozen=True, kw_only=True)
class Eval(OfArtifact, EvalConfig):
    """Compare dense and sparse on the same samples: needles, loss, fidelity, speed, harness tasks."""

    artifact: tyro.conf.Positional[str]
    """Directory or hub name of the artefact; results go to eval.json in its directory (of a hub name: in this one)
    unless --output names another."""
    sources: Sources = HELDOUT
    """Held-out text for haystacks and loss."""

    def run(self) -> Any:
        """Evaluate, save, print the table."""
        from .checkpoint import Artifact, find_artifact
        from .pipeline import EVAL_FILE, verify

        path = find_artifact(self.artifact)
        output = self.output or (path if Path(self.artifact).is_dir() else Path())
        if output.is_file():
            raise ValueError(f"Output {str(output)!r} is a file; expected a directory for {EVAL_FILE}.")
        artifact = Artifact.load(path)
        model, tokenizer = self.load_base(artifact)
        settings = _part(self, EvalConfig)
        result = verify(model, tokenizer, artifact, output, self.sources, settings)
        _table(artifact, output)
        _out(f"Saved to {output / EVAL_FILE}")
        return result


@dataclass(frozen=True, kw_only=True)
class Generate(OfArtifact):
    """Continue a prompt with the sparse model."""

    artifact: tyro.conf.Positional[str]
    """Directory or hub name of the artefact."""
    prompt: str | None = None
    """The prompt, or a question that is put after --prompt-file."""
    prompt_file: Path | None = None
    """A text file, for instance a long document."""
    max_new_tokens: int = 128
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 decodes greedily; above 0 samples."""
    chat: bool = True
    """Put the prompt into the model's chat format where it has one."""
    dense: bool = False
    """Use the dense model instead, for comparison."""
    top_p_mass: float | None = None
    """Select by this p alone (the selection's, not sampling's), in (0, 1], in place of the artefact's rule."""
    index_dtype: IndexDtype | None = None
    """Keep index keys in the model's dtype (auto) or in float8, in place of the artefact's setting."""
    dense_below_tokens: int | None = None
    """While the sequence is shorter, prefill and retrieval heads are dense; where that pays, bench says."""
    tile_probability: float | None = None
    """Above 0, tiles of positions read a long prompt's far tokens together: those with this much for one of them."""
    dense_end_tokens: int | None = None
    """Last tokens of the prompt that all heads read densely, in place of the artefact's setting; more than it has: all."""

    def run(self) -> Any:
        """Generate and print the text as it comes."""
        import torch

        from .checkpoint import Artifact
        from .generate import chat_prompt, load

        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature!r}.")
        options = {
            "--top-p-mass": self.top_p_mass,
            "--index-dtype": self.index_dtype,
            "--dense-below-tokens": self.dense_below_tokens,
            "--tile-probability": self.tile_probability,
            "--dense-end-tokens": self.dense_end_tokens,
        }
        for flag, value in options.items():
            if self.dense and value is not None:
                raise ValueError(f"{flag} is the sparse model's and has no effect with --dense; leave one of them out.")
        text = "" if self.prompt_file is None else _read_text(self.prompt_file)
        text = "\n\n".join(part for part in (text, self.prompt) if part and part.strip())
        if not text:
            raise ValueError("Nothing to continue: give a --prompt or a --prompt-file with text in it.")
        if self.dense:
            model, tokenizer = self.load_base(Artifact.load(self.artifact))
        else:
            say(f"Loading {self.artifact}")
            model, tokenizer = load(
                self.artifact,
                top_p=self.top_p_mass,
                index_dtype=self.index_dtype,
                dense_below_tokens=self.dense_below_tokens,
                tile_probability=self.tile_probability,
                dense_end_tokens=self.dense_end_tokens,
                base_model=self.base_model,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
            )
        ids = chat_prompt(tokenizer, text) if self.chat else tokenizer(text).input_ids
        torch.manual_seed(self.seed)
        reply, speed = stream(model, tokenizer, ids, self.max_new_tokens, self.temperature)
        if self.output:
            with atomic_path(self.output) as temporary:
                temporary.write_text(reply)
        return {"prompt_tokens": len(ids), "text": reply, **speed}


def stream(
    model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int, temperature: float
) -> tuple[str, dict[str, Any]]:
    """Generate with the text shown as it comes; the text, and the cache's bytes.

    Raises:
        ValueError: prompt and new tokens are beyond the model's context.
    """
    import torch
    from transformers import DynamicCache, TextStreamer

    from .cache import CACHE, cache_bytes
    from .families import context_tokens
    from .generate import pieces, read

    context = context_tokens(model)
    if len(ids) + max_new_tokens > context:
        raise ValueError(
            f"The prompt has {len(ids)} tokens; with {max_new_tokens} new ones that is beyond the model's context of "
            f"{context}. Shorten the prompt or ask for fewer tokens."
        )
    tokens = torch.tensor([ids], device=model.device)
    cache = DynamicCache(config=model.config)
    parts = pieces(model, tokens)
    if len(parts) > 1:  # long enough to wait for; `generate` reads the last one
        read(model, parts[:-1], cache, what=f"Reading {len(ids)} tokens", goes_on=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        **{CACHE: cache},
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    new = out[0, len(ids) :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return text, {"new_tokens": len(new), "cache_bytes": cache_bytes(cache)}


@dataclass(frozen=True, kw_only=True)
class Export(OfArtifact):
    """Write an artefact's model as one Hugging Face directory, to be served by vLLM or loaded by rtpurbo.load."""

    artifact: tyro.conf.Positional[str]
    """Directory or hub name of the artefact."""
    served: tyro.conf.Positional[Path | None] = None
    """Directory to write, the same as --output; default: served. Weights keep the base model's dtype with --dtype auto."""

    def run(self) -> Any:
        """Export and say how to serve it."""
        from .export import export

        if self.served is not None and self.output is not None:
            raise ValueError(f"Expected one directory to write, got {str(self.served)!r} and --output {str(self.output)!r}.")
        path = export(
            self.artifact,
            self.served or self.output or Path("served"),
            dtype=self.dtype,
            device=self.device,
            base_model=self.base_model,
            trust_remote_code=self.trust_remote_code,
        )
        _out(f"Exported to {path}. Next: vllm serve {path} (docs/serving.md)")
        return {"exported": str(path), "bytes": sum(file.stat().st_size for file in path.rglob("*"))}


@dataclass(frozen=True, kw_only=True)
class Report(Common):
    """Write an artefact's report.html from its settings, metrics and eval.json."""

    artifact: tyro.conf.Positional[Path]
    """Directory of the artefact; the report goes there unless --output names a file."""

    def run(self) -> Any:
        """Write the report."""
        from .report import write_report

        path = write_report(self.artifact, self.output)
        _out(f"Report: {path}")
        return {"report": str(path)}


@dataclass(frozen=True, kw_only=True)
class Info(Common):
    """Say what an artefact holds: head map, settings, cache bytes per token."""

    artifact: tyro.conf.Positional[str]
    """Directory or hub name of the artefact."""
    tensor_parallel_size: int = 1
    """Processes that vLLM deals the KV heads out to; what it keeps is given for one of them."""

    def run(self) -> Any:
        """Print it."""
        from .checkpoint import Artifact
        from .vllm_plugin.layout import memory_rows

        artifact = Artifact.load(self.artifact)
        heads, sparse = artifact.heads, artifact.config
        head_dim = artifact.base_model["head_dim"]
        units = sum(len(heads.units(i)) for i in heads.layers)
        element = 2  # bytes of bfloat16
        dense = len(heads.layers) * heads.kv_heads * head_dim * 2 * element
        index = units * sparse.index_bytes(element) if artifact.indexer is not None else 0
        full = dense * heads.full_kv_ratio + index
        held = [window + sparse.sink_tokens for window in heads.held_windows(sparse.window_tokens)]
        result = {
            "base_model": artifact.base_model,
            "sparse": dataclasses.asdict(sparse),
            "stages": sorted(artifact.stages),
            "retrieval_head_ratio": heads.ratio,
            "full_kv_ratio": heads.full_kv_ratio,
            "dense_cache_bytes_per_token": dense,
            "sparse_cache_bytes_per_far_token": round(full),
            "sparse_cache_bytes_constant": sum(held) * head_dim * 2 * element,
            "local_kv_heads_by_window_tokens": heads.window_counts(sparse.window_tokens),
        }
        served = memory_rows(
            heads, sparse, head_dim=head_dim, element_bytes=element, indexed=artifact.indexer is not None,
            ranks=self.tensor_parallel_size,
        )  # fmt: skip
        _out(str(heads))
        for key, value in result.items():
            _out(f"{key:34s} {value}")
        result["served"] = served
        tokens = served["bytes_per_token"]
        _out(
            f"Served by vLLM (bfloat16, blocks of 16 tokens, one of {self.tensor_parallel_size} processes): "
            f"{tokens['sparse']} bytes a token instead of {tokens['dense']}, and {served['local_bytes'] / 2**20:.1f} MiB a "
            f"sequence for windows; {served['cache_groups']} cache groups"
        )
        for length, row in served["sequences"].items():
            _out(f"{length:8d} tokens  dense {row['dense'] / 2**20:9.1f} MiB   sparse {row['sparse'] / 2**20:9.1f} MiB")
        if self.output:
            write_json(self.output, result)
        return result


@dataclass(frozen=True, kw_only=True)
class Doctor(Common):
    """Say what this machine offers and check that the sparse attention computes what its reference says."""

    vllm: bool = False
    """Serve a tiny random model with the vLLM that is installed here, too, and compare it with Transformers (a minute)."""

    def run(self) -> Any:
        """Print versions, devices and the result of a self-test."""
        from .doctor import examine

        result = examine(device=self.device, vllm=self.vllm)
        for key, value in result.items():
            _out(f"{key:24s} {value}")
        if self.output:
            write_json(self.output, result)
        if not result["self_test_passed"]:
            raise ValueError("The self-test failed: sparse attention differs from its reference on this machine.")
        return result


LAYER_SETTINGS = (
    "model", "shape", "plot", "retrieval", "window_tokens", "windows", "far_ratio", "batches", "prefill_lengths_tokens",
    "prefill_far_ratio",
    "tile_probability", "index_dtype",
)  # fmt: skip
"""What `bench` asks about a layer, and not about an artefact's model."""


@dataclass(frozen=True, kw_only=True)
class Bench(OfArtifact):
    """Measure speed and cache bytes on this machine, dense and sparse: an artefact's whole model (`bench OUT`), or one
    attention layer with a model's heads (`bench --model NAME`) or any others (`bench --shape 32/4/128`)."""

    artifact: tyro.conf.Positional[str | None] = None
    """Directory or hub name of the artefact, whose whole model is loaded and run; none: one layer, no weights are read."""
    model: str | None = None
    """Model or local artefact whose numbers of heads and head dimension (of an artefact: window, too) the layer gets, from
    its config alone."""
    lengths_tokens: tuple[int, ...] = ()
    """Lengths in tokens; default: 2048 4096 8192, for a layer 32768 131072 524288 1048576 (on a CPU 8192 32768)."""
    new_tokens: int = 16
    """Tokens to decode at each length of a model."""
    sources: Sources = HELDOUT
    """Where the prompts come from."""
    shape: str | None = None
    """Query heads, KV heads and head dimension of the layer; default: 32/4/128."""
    retrieval: tuple[int, ...] | None = None
    """Retrieval query heads of the layer, where each head selects for itself; default: 2 5 8 11 29 of 32 query heads, else
    15 % of them, evenly spread."""
    window_tokens: int | None = None
    """Window of the layer in tokens; default: the artefact's with --model ARTEFACT, else 8192."""
    windows: tuple[int, ...] | None = None
    """Window of every KV head of the layer in tokens, none longer than the layer's; those whose whole cache is kept have the
    layer's window all the same. Default: the layer's window for all."""
    far_ratio: float = 0.03
    """Share of far tokens that a head of the layer selects; a whole group three times as many."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes of the layer's decode."""
    prefill_lengths_tokens: tuple[int, ...] = ()
    """Lengths of the layer's prefill; default: 32768 131072 (on a CPU 4096)."""
    prefill_far_ratio: float = 0.07
    """Share of far tokens that a tile of positions reads for the layer's retrieval heads in prefill."""
    tile_probability: float = 0.0
    """Above 0, all positions of a tile attend to all that it reads (see the setting of convert)."""
    index_dtype: IndexDtype = "auto"
    """What the layer's decode keeps index keys in: the dtype of keys and values (auto), or float8."""
    plot: Path | None = None
    """Write a page with the layer's speedup over the best dense kernel against length to this HTML file."""

    def run(self) -> Any:
        """Measure and print a line per length."""
        for field in fields(self) if self.artifact is not None else ():
            if field.name in LAYER_SETTINGS and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"--{field.name.replace('_', '-')} is of one layer's benchmark, got the artefact {self.artifact!r} too, "
                    "whose whole model would be measured; leave one of them out."
                )
        result = self.of_layer() if self.artifact is None else self.of_model(self.artifact)
        if self.output:
            write_json(self.output, result)
        return result

    def of_model(self, name: str) -> Any:
        """Prefill, decode and cache of the artefact's model."""
        from .checkpoint import Artifact
        from .evals.speed import bench

        artifact = Artifact.load(name)
        model, tokenizer = self.load_base(artifact)
        lengths = self.lengths_tokens or (2048, 4096, 8192)
        result = bench(model, tokenizer, artifact, self.sources, lengths, self.new_tokens, self.seed)
        _out(f"{result['device']}: decode tokens/s and cache bytes, dense (Transformers SDPA) | sparse")
        for row in result["rows"]:
            dense, sparse = row["dense"], row["sparse"]
            _out(
                f"{row['length_tokens']:8d}  prefill {dense['prefill_seconds']:.2f} | {sparse['prefill_seconds']:.2f} s   "
                f"decode {dense['decode_tokens_per_second']:.1f} | {sparse['decode_tokens_per_second']:.1f} tokens/s   "
                f"cache {dense['cache_bytes'] / 2**20:.1f} | {sparse['cache_bytes'] / 2**20:.1f} MiB"
            )
        return result

    def layer_heads(self) -> tuple[str, int]:
        """Query heads/KV heads/head dimension of the layer, and its window in tokens."""
        window = 8192 if self.window_tokens is None else self.window_tokens
        if self.model is None:
            return self.shape or "32/4/128", window
        if self.shape is not None:
            raise ValueError(
                f"Expected --model or --shape, got both ({self.model!r}, {self.shape!r}); leave one of them out."
            )
        from .checkpoint import CONFIG_FILE, Artifact
        from .models import attention_geometry

        if (Path(self.model) / CONFIG_FILE).is_file():
            artifact = Artifact.load(self.model)
            heads = (artifact.heads.query_heads, artifact.heads.kv_heads, artifact.base_model["head_dim"])
            window = artifact.config.window_tokens if self.window_tokens is None else window
        else:
            heads = attention_geometry(self.model, trust_remote_code=self.trust_remote_code)
        return "/".join(map(str, heads)), window

    def of_layer(self) -> Any:
        """Decode steps and prefills of one layer."""
        import torch

        from .evals.layer_speed import bench_layer, layer_shape
        from .models import resolve_device, resolve_dtype

        place = resolve_device(self.device)
        device, dtype = torch.device(place), resolve_dtype(self.dtype, place)
        heads, window_tokens = self.layer_heads()
        shape = layer_shape(
            heads,
            retrieval=self.retrieval,
            window_tokens=window_tokens,
            far_ratio=self.far_ratio,
            index_dtype=self.index_dtype,
            tile_probability=self.tile_probability,
            windows=self.windows,
        )
        gpu = device.type == "cuda"
        if not gpu:
            _out("No GPU is used: this measures the CPU path, plain PyTorch without the kernels that a GPU would run.")
        result = bench_layer(
            shape,
            self.lengths_tokens or ((32768, 131072, 524288, 1048576) if gpu else (8192, 32768)),
            self.batches,
            prefill_lengths=self.prefill_lengths_tokens or ((32768, 131072) if gpu else (4096,)),
            prefill_far_ratio=self.prefill_far_ratio,
            device=device,
            dtype=dtype,
        )
        window = f"window {shape.window_tokens}"
        if shape.windows is not None:
            window += f" (by KV head {' '.join(map(str, shape.windows))}, but for those kept whole)"
        _out(f"{result['device']}, {result['attention']}; heads {heads}, {window}, {result['dtype']}")
        _layer_table("one decode step of a layer", result["rows"], "us", "TB/s")
        read = f"tiles read {self.prefill_far_ratio:.0%} of the far tokens"
        _layer_table(f"prefill of a layer, {read}", result["prefill_rows"], "ms", "TFLOP/s")
        _out(
            "heads: each retrieval head selects for itself; groups: 15 % of the KV groups select, whole; paper: retrieval\n"
            "heads are dense in prefill. Rates count what is attended to; index share is the time of scores and selection."
        )
        for what, lengths in result["pays_from"].items():
            found = ", ".join(f"{mode}: {'not yet' if n is None else f'{n} tokens'}" for mode, n in lengths.items())
            _out(f"Sparse {what} pays, of the measured lengths, from (see generate --dense-below-tokens): {found}")
        if self.plot:
            from .report import write_speed_plot

            write_speed_plot(result, self.plot)
            _out(f"Plot: {self.plot}")
        return result


@dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """The whole method on the embedded SmolLM2-135M in a few minutes, on a CPU."""

    model: str = "smollm2-135m"
    """Model to convert."""

    def run(self) -> Any:
        """Convert with small settings, show the table and a question answered by both."""
        from .demo import run_demo

        model, tokenizer = self.load(self.model)
        output = self.output or Path("out/demo")
        path = run_demo(model, tokenizer, output, model_name=self.model, seed=self.seed)
        return _print_result(path)


COMMANDS: dict[str, Callable[..., Any]] = {
    "calibrate": Calibrate,
    "train-indexer": TrainIndexer,
    "distill": Distill,
    "convert": Convert,
    "eval": Eval,
    "generate": Generate,
    "export": Export,
    "report": Report,
    "info": Info,
    "doctor": Doctor,
    "bench": Bench,
    "demo": Demo,
}


def _out(text: str) -> None:
    sys.stdout.write(text + "\n")


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"Prompt file {str(path)!r} does not exist; expected a text file.")
    return path.read_text(errors="replace")


def _check_files(command: Common) -> None:
    """ValueError, before anything runs, for a file that could not be written in the end."""
    files = {"--json": command.json}
    if isinstance(command, Generate | Info | Doctor | Bench):
        files["--output"] = command.output
    if isinstance(command, Bench):
        files["--plot"] = command.plot
    for flag, path in files.items():
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            what = "is a directory" if path.is_dir() else "lies in a directory that does not exist"
            raise ValueError(f"{flag} {str(path)!r} {what}; expected a file in an existing directory.")


def _print_estimate(result: dict[str, Any], output: Path) -> None:
    for name, row in result["settings"].items():
        value = " ".join(map(str, row["value"])) if isinstance(row["value"], tuple) else row["value"]
        _out(f"{name:26s} {'–' if value is None else value!s:18s} {row['from']}")
    for name, seconds in result["seconds"].items():
        memory = result["memory_gib"].get(name)
        _out(f"{name:16s} about {seconds / 60:.1f} min" + (f", memory {memory:.1f} GiB" if memory is not None else ""))
    _out(f"{'memory':16s} {result['memory_gib']['largest']:.1f} GiB at most, computed (docs/memory.md)")
    _out(f"{'disk':16s} about {result['disk_mib']} MiB in {output}")


def _print_result(path: Path) -> dict[str, Any]:
    """The table of an artefact's eval.json, and where its report is."""
    from .checkpoint import Artifact
    from .pipeline import EVAL_FILE

    artifact = Artifact.load(path)
    result = json.loads((path / EVAL_FILE).read_text())
    _table(artifact, path)
    _out(f"Artefact: {path}   Report: {path / 'report.html'}")
    return result


def _table(artifact: Any, path: Path) -> None:
    """Print everything that was measured of an artefact, from the eval.json in `path`."""
    from rich.console import Console
    from rich.table import Table

    from .model_card import HEADER, measured_rows, read_evaluation

    evaluation = read_evaluation(path)
    end = evaluation.get("settings", {}).get("dense_end_tokens")
    sparse = artifact.config.with_options(dense_end_tokens=end)
    table = Table(title=f"{artifact.base_model['name']}, window of {sparse.window_tokens} tokens, {sparse.rule}")
    for column in HEADER:
        table.add_column(column, justify="left" if column == HEADER[0] else "right")
    for row in measured_rows(artifact, evaluation):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _layer_table(title: str, rows: list[dict[str, Any]], time: str, rate: str) -> None:
    """Print a layer's rows: times in `time` ("us" or "ms"), what was achieved in `rate` ("TB/s" or "TFLOP/s")."""
    from rich.console import Console
    from rich.table import Table

    scale, digits, key = {"us": (1e6, 0, "tb_per_second"), "ms": (1e3, 2, "tflops")}[time]
    decode = time == "us"
    table = Table(title=title, title_justify="left")
    columns = ["batch", "tokens", f"best dense, {time}", f"sparse, {time}", "speedup", f"{rate}, dense | sparse"]
    table.add_column("mode")
    for column in (*columns, "index share", "peak MiB", *["cache MiB, dense | sparse"] * decode):
        table.add_column(column, justify="right")

    def cell(row: dict[str, Any], name: str, form: str, scale: float = 1) -> str:
        return "–" if row.get(name) is None else format(row[name] * scale, form)

    def pair(row: dict[str, Any], name: str, form: str, scale: float = 1) -> str:
        return " | ".join(cell(row, f"{which}_{name}", form, scale) for which in ("dense", "sparse"))

    for row in rows:
        head = (row["mode"], str(row["batch"]), str(row["slots"]))
        if "refused" in row:
            table.add_row(*head, "refused")
            continue
        dense = cell(row, "dense_seconds", f".{digits}f", scale) + (f" ({row['dense_backend']})" if "speedup" in row else "")
        table.add_row(
            *head, dense, cell(row, "sparse_seconds", f".{digits}f", scale), cell(row, "speedup", ".2f"),
            pair(row, key, ".3g"), cell(row["shares"] or {}, "index", ".0%"), cell(row, "peak_bytes", ".1f", 2**-20),
            *[pair(row, "cache_bytes", ".1f", 2**-20)] * decode,
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    for row in rows:
        if "refused" in row:
            _out(f"{row['mode']}, batch {row['batch']}, {row['slots']} tokens: {row['refused']}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point: run a command; 0, or 1 with one sentence on standard error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.warnoptions:  # how the libraries below talk to each other is not the user's business
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|torch")
    commands = _commands(sys.argv[1:] if arguments is None else arguments)
    try:
        command = tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="rtpurbo", description=__doc__)
        _check_files(command)
        result = command.run()
        if command.json is not None:
            write_json(command.json, result)
    except KeyboardInterrupt:
        say("rtpurbo: stopped; the same command goes on from its last finished stage or saved training state.")
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        say(f"rtpurbo: error: {explain(error)}")
        if os.environ.get("RTPURBO_TRACEBACK"):
            raise
        return 1
    return 0


def explain(error: BaseException) -> str:
    """One sentence for a person."""
    import errno

    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or 'while writing'}); free some space and run the same command again."
    text = " ".join(str(error).split())
    if "out of memory" in text.lower():
        return f"out of memory; use shorter documents, a smaller batch or a bigger device ({text[:200]})."
    if isinstance(error, (ValueError, OSError)):
        return text
    return f"{type(error).__name__}: {text} (set RTPURBO_TRACEBACK=1 to see where)."


if __name__ == "__main__":
    sys.exit(main())
