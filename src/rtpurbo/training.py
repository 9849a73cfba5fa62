"""The one training loop: AdamW, schedule, progress, metrics as JSON lines, and states from which a killed run goes on.

A step depends on (seed, step number) alone, and a state holds parameters, optimiser moments and the step, so a run
that was killed anywhere ends where an undisturbed one does. A state is one safetensors file whose header carries the
JSON part; it replaces the one before in one move.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .checkpoint import Artifact, atomic_path
from .config import TrainConfig
from .progress import track

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE_FILE, METRICS_FILE = "state.safetensors", "metrics.jsonl"
Step = Callable[[int], dict[str, float]]
"""step number -> metrics; leaves gradients in the parameters."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step 0, 1, ...: linear warm-up over the first 5 %, then cosine to a tenth."""
    warmup = max(1, config.steps // 20)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train(
    module: nn.Module,
    step_function: Step,
    config: TrainConfig,
    *,
    what: str,
    accelerator: Accelerator,
    work: Path | None = None,
    inputs: dict[str, Any] | None = None,
    clip: float | None = 1.0,
) -> list[dict[str, float]]:
    """Run `config.steps` steps of AdamW on the trainable parameters of `module`.

    Args:
        module: as `prepare` gives it.
        step_function: computes the loss of a step, runs backward, returns metrics (with "loss").
        work: directory of `state.safetensors` and `metrics.jsonl`; a state there from the same settings, inputs and
            number of processes is resumed.
        inputs: what the steps depend on besides `config`, JSON-able.
        clip: largest gradient norm, None for no clipping.

    Returns:
        One dict of metrics per step, those of the resumed part included.

    Raises:
        ValueError: the loss or a gradient became NaN or infinite (the last good state stays in `work`), or the state in
            `work` is damaged.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    start = saved = 0
    history: list[dict[str, float]] = []
    run = {"config": dataclasses.asdict(config), "inputs": inputs, "processes": accelerator.num_processes}
    settings = json.dumps(run, sort_keys=True)
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        history = _resume(work, module, optimizer, settings)
        start = saved = len(history)
        if history and accelerator.is_main_process:  # it may have been killed between the state and its metrics
            _write_metrics(work, history)
    for step in track(range(start, config.steps), total=config.steps, what=what, done=start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        metrics = step_function(step)
        norm = _gradient_norm(parameters, clip, accelerator)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
            kept = f"the state after step {saved} is kept in {work}" if saved else "nothing was saved"
            raise ValueError(
                f"{what}: the loss became {metrics['loss']} (gradient norm {norm}) at step {step}; {kept}. "
                "Use a lower --learning-rate, which starts the stage anew."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append({"step": step, **metrics, "learning_rate": learning_rate(step, config)})
        done = step + 1
        if work is not None and config.save_every and (done % config.save_every == 0 or done == config.steps):
            _save(work, module, optimizer, settings, history, accelerator)
            saved = done
    return history


def stage_inputs(artifact: Artifact, sources: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """What a stage's steps depend on besides its settings, as `train` takes it."""
    from safetensors.torch import save

    indexer = artifact.indexer
    return {
        "base_model": artifact.base_model["fingerprint"],
        "sparse": artifact.config.to_dict(),
        "heads": artifact.heads.to_dict(),
        "indexer": hashlib.sha256(save(indexer)).hexdigest() if indexer is not None else None,
        "sources": list(sources),
    }


def prepare(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """`module` for training by all processes: as it is, as DDP, or sharded in place by FSDP when `accelerator` says so.

    Raises:
        ValueError: the accelerator asks for the first version of FSDP.
    """
    if accelerator.num_processes == 1:
        return module
    if not accelerator.is_fsdp2:
        if accelerator.distributed_type == "FSDP":
            raise ValueError("FSDP version 1 is not supported; use FullyShardedDataParallelPlugin(fsdp_version=2).")
        return accelerator.prepare(module)
    # Accelerate shards a model only together with an optimiser; `train` makes its own from the sharded parameters
    stand_in = torch.optim.SGD([p for p in module.parameters() if p.requires_grad])
    return accelerator.prepare(module, stand_in)[0]


def _gradient_norm(parameters: list[nn.Parameter], clip: float | None, accelerator: Accelerator) -> float:
    norm = accelerator.clip_grad_norm_(parameters, clip if clip is not None else math.inf)
    if norm is None:
        return 0.0
    return float(_gathered(norm))


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, gathered from all processes, on the CPU."""
    return {name: _gathered(p) for name, p in _trainable(module).items()}


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by their name in the model itself, one name for those that modules share."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _gathered(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()


def _shared_out(value: Tensor, like: Tensor) -> Tensor:
    """This process' part of `value`, placed like `like`."""
    value = value.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def _save(work: Path, module, optimizer, settings: str, history: list[dict[str, float]], accelerator) -> None:
    from safetensors.torch import save

    tensors = {}
    for name, parameter in _trainable(module).items():
        tensors[f"parameter.{name}"] = _gathered(parameter)
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = _gathered(value)
    if accelerator.is_main_process:
        header = {"settings": settings, "metrics": json.dumps(history)}
        with atomic_path(work / STATE_FILE) as path:
            path.write_bytes(save({name: t.contiguous().clone() for name, t in tensors.items()}, metadata=header))
        _write_metrics(work, history)
    accelerator.wait_for_everyone()


def _write_metrics(work: Path, history: list[dict[str, float]]) -> None:
    with atomic_path(work / METRICS_FILE) as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in history))


@torch.no_grad()
def _resume(work: Path, module: nn.Module, optimizer: torch.optim.Optimizer, settings: str) -> list[dict[str, float]]:
    """Load the state in `work`, when it belongs to this run; the metrics of the steps it has done."""
    from safetensors import SafetensorError, safe_open

    file = work / STATE_FILE
    if not file.is_file():
        return []
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(file), framework="pt") as content:
            header = content.metadata() or {}
            if header.get("settings") != settings:
                return []
            for name in content.keys():  # noqa: SIM118
                key, _, parameter_name = name.partition(".")
                tensors.setdefault(parameter_name, {})[key] = content.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it to start this stage again.") from error
    parameters = _trainable(module)
    got = {name: t["parameter"].shape for name, t in tensors.items() if "parameter" in t}
    if got != {name: p.shape for name, p in parameters.items()}:
        raise ValueError(f"{file} holds other parameters than this stage trains; delete it to start this stage again.")
    for name, parameter in parameters.items():
        saved = tensors[name]
        parameter.copy_(_shared_out(saved.pop("parameter"), parameter))
        optimizer.state[parameter] = {k: _shared_out(t, parameter) if t.ndim else t for k, t in saved.items()}
    return json.loads(header["metrics"])
