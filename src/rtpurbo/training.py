"""The one training loop: AdamW, schedule, progress, metrics as JSON lines, and states from which a killed run goes on.

A step depends on (seed, step number) alone, and a state holds parameters, optimiser moments and the step, so a run
that was killed anywhere ends where an undisturbed one does. A state is one safetensors file whose header carries the
JSON part; it replaces the one before in one move.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checkpoint import atomic_path
from .config import TrainConfig
from .progress import track

if TYPE_CHECKING:
    from accelerate import Accelerator

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
    clip: float | None = 1.0,
) -> list[dict[str, float]]:
    """Run `config.steps` steps of AdamW on the trainable parameters of `module`.

    Args:
        module: as prepared by `accelerator`.
        step_function: computes the loss of a step, runs backward, returns metrics (with "loss").
        work: directory of `state.safetensors` and `metrics.jsonl`; a state there from the same settings is resumed.
        clip: largest gradient norm, None for no clipping.

    Returns:
        One dict of metrics per step, those of the resumed part included.

    Raises:
        ValueError: the loss or a gradient became NaN or infinite; the last good state stays in `work`.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    start, history = 0, []
    settings = json.dumps(dataclasses.asdict(config), sort_keys=True)
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        start, history = _resume(work, module, optimizer, settings)
    for step in track(range(start, config.steps), total=config.steps, what=what, done=start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        metrics = step_function(step)
        norm = _gradient_norm(parameters, clip, accelerator)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
            kept = f"the state after step {_saved_step(work)} is kept in {work}" if work else "nothing was saved"
            raise ValueError(
                f"{what}: the loss became {metrics['loss']} (gradient norm {norm}) at step {step}; {kept}. "
                "Use a lower --learning-rate."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append({"step": step, **metrics, "learning_rate": learning_rate(step, config)})
        done = step + 1
        if work is not None and config.save_every and (done % config.save_every == 0 or done == config.steps):
            _save(work, module, optimizer, settings, history, accelerator)
    return history


def _gradient_norm(parameters: list[nn.Parameter], clip: float | None, accelerator: Accelerator) -> float:
    norm = accelerator.clip_grad_norm_(parameters, clip if clip is not None else math.inf)
    return float(norm) if norm is not None else 0.0


def _options():
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, flatten_optimizer_state_dict=True, strict=False
    )


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Trainable parameters by name, gathered from all processes, on the CPU."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    names = {name for name, p in module.named_parameters() if p.requires_grad}
    state = get_model_state_dict(module, options=_options())  # without the second name of a tied, frozen weight
    return {name: t.cpu() for name, t in state.items() if name in names}


def _save(work: Path, module, optimizer, settings: str, history: list[dict[str, float]], accelerator) -> None:
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    tensors = {f"model.{name}": t for name, t in trainable_state(module).items()}
    plain: dict[str, Any] = {}
    for name, value in get_optimizer_state_dict(module, optimizer, options=_options()).items():
        if isinstance(value, torch.Tensor):
            tensors[f"optimizer.{name}"] = value.cpu()
        else:
            plain[name] = value
    if accelerator.is_main_process:
        header = {"settings": settings, "step": str(len(history)), "optimizer": json.dumps(plain)}
        with atomic_path(work / "metrics.jsonl") as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in history))
        with atomic_path(work / "state.safetensors") as path:
            save_file({k: t.contiguous().clone() for k, t in tensors.items()}, path, metadata=header)
    accelerator.wait_for_everyone()


def _header(work: Path | None) -> dict[str, str] | None:
    from safetensors import SafetensorError, safe_open

    if work is None or not (work / "state.safetensors").is_file():
        return None
    try:
        with safe_open(str(work / "state.safetensors"), framework="pt") as file:
            return file.metadata()
    except SafetensorError as error:
        raise ValueError(
            f"{work / 'state.safetensors'} is damaged ({error}); delete it to start this stage again."
        ) from error


def _saved_step(work: Path | None) -> int:
    header = _header(work)
    return int(header["step"]) if header else 0


def _resume(work: Path, module, optimizer, settings: str) -> tuple[int, list[dict[str, float]]]:
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    header = _header(work)
    if header is None or header["settings"] != settings:
        return 0, []
    tensors = load_file(work / "state.safetensors")
    model_state = {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
    optimizer_state = {k.removeprefix("optimizer."): t for k, t in tensors.items() if k.startswith("optimizer.")}
    set_model_state_dict(module, model_state, options=_options())
    set_optimizer_state_dict(
        module, optimizer, {**json.loads(header["optimizer"]), **optimizer_state}, options=_options()
    )
    step = int(header["step"])
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return step, rows[:step]
