"""Write a converted model as one Hugging Face directory, which vLLM (with `rtpurbo.vllm_plugin`) and `rtpurbo.load` read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .checkpoint import CONFIG_FILE, EXPORTED_FILE, EXPORTED_KEY, Artifact, atomic_path, is_artifact, write_json
from .generate import load_distilled, naming_base_model
from .models import own_dtype, public_name

ARCHITECTURE = "RTPurbo"
"""Prefix of the architecture's name, by which vLLM finds the plugin's model; without the plugin vLLM refuses it."""


def export(
    artifact: Artifact | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write weights with the distilled changes merged, tokenizer, index projections and a config with our block in it.

    Steps: load the dense model, merge the adapter, save it with its tokenizer, save the index beside it, and put head map
    and settings into config.json under "rtpurbo".

    Args:
        artifact: an Artifact, a directory or a hub name.
        output: a directory that does not exist, is empty, or holds an earlier export.
        dtype: of the weights: "auto" (that of the base model), "float32", "bfloat16" or "float16".
        device: where the adapter is merged: "auto", "cpu", "cuda", ...
        base_model: where the base model lies, when not where the artefact says.
        trust_remote_code: run code that comes with the base model; off unless asked for.

    Returns:
        The directory.

    Raises:
        ValueError: `output` holds other files; and as `rtpurbo.load`.
    """
    path = Path(output)
    replaceable = path.is_dir() and (not any(path.iterdir()) or (is_artifact(path) and not (path / CONFIG_FILE).is_file()))
    if path.exists() and not replaceable:
        raise ValueError(f"Output {str(path)!r} exists; expected a new or empty directory, or an earlier export.")
    if not isinstance(artifact, Artifact):
        artifact = Artifact.load(artifact)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if dtype == "auto":
        base, place = artifact.base_model, artifact.weights_path if artifact.weights_kind == "full" else base_model
        if place is not None:
            dtype = own_dtype(str(place), **options)
        else:
            with naming_base_model():
                dtype = own_dtype(base["name"], base.get("revision"), **options)
    model, tokenizer = load_distilled(artifact, base_model=base_model, dtype=dtype, device=device, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        write(temporary, model, tokenizer, artifact)
        if path.is_dir():
            shutil.rmtree(path)
    return path


def write(path: Path, model: Any, tokenizer: Any | None, artifact: Artifact) -> None:
    """Write a dense model, its tokenizer, and what makes it sparse into a directory."""
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    block = artifact.sections()
    block["base_model"] = {**artifact.base_model, "name": public_name(artifact.base_model["name"])}
    if artifact.indexer is not None:
        block["indexer"] = artifact.save_indexer(path)
        _add_to_index(path, block["indexer"]["file"], list(artifact.indexer))
    config = json.loads((path / EXPORTED_FILE).read_text())
    config.pop("quantization_config", None)  # of a GGUF file, whose weights are whole numbers no more
    config["architectures"] = [f"{ARCHITECTURE}{name}" for name in config["architectures"]]
    write_json(path / EXPORTED_FILE, {**config, EXPORTED_KEY: block})
    readable = (path / EXPORTED_FILE).stat().st_mode
    for file in path.glob("*.safetensors"):  # safetensors writes for its owner alone; who serves may be another user
        file.chmod(readable)


def _add_to_index(path: Path, file: str, tensors: list[str]) -> None:
    """Name the index projections in the index of sharded weights: vLLM reads no file that it does not name."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"] |= dict.fromkeys(tensors, file)
        write_json(index, content)
