"""Artefacts made of random tensors, and how two of them are compared; without any model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from rtpurbo.checkpoint import CONFIG_FILE, Artifact
from rtpurbo.config import SparseConfig
from rtpurbo.heads import HeadMap

CONFIG = SparseConfig(window_tokens=12, sink_tokens=4, index_dim=8, top_p=0.7, min_probability=0.0)
HEADS = HeadMap(query_heads=6, kv_heads=3, granularity="head", retrieval=((0, 1, 2), None, (5,)))


def make_artifact(seed: int | None = None, weights: Path | None = None, kind: str = "lora", **changes) -> Artifact:
    """A head map; with a seed an indexer too; with a path weights too."""
    indexer = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"0.query": (3, 8, 16), "0.key": (3, 8, 16), "2.query": (1, 8, 16), "2.key": (1, 8, 16)}
        indexer = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    values = {
        "base_model": {
            "name": "somebody/model",
            "revision": None,
            "model_type": "llama",
            "head_dim": 16,
            "fingerprint": "f" * 64,
        },
        "config": CONFIG,
        "heads": HEADS,
        "indexer": indexer,
        "weights_kind": None if weights is None else kind,
        "weights_path": weights,
        **changes,
    }
    return Artifact(**values)


def make_weights(path: Path, seed: int = 0, kind: str = "lora", size: int = 8) -> Path:
    """A directory of distilled weights."""
    path.mkdir(parents=True)
    tensors = {"layer": torch.randn(size, size, generator=torch.Generator().manual_seed(seed))}
    save_file(tensors, path / ("adapter_model.safetensors" if kind == "lora" else "model.safetensors"))
    (path / ("adapter_config.json" if kind == "lora" else "config.json")).write_text(json.dumps({"seed": seed}))
    return path


def same(got: Artifact, want: Artifact) -> bool:
    """Equal in every field and in the content of the weights."""
    plain = [f for f in Artifact.__dataclass_fields__ if f not in ("indexer", "weights_path")]
    if any(getattr(got, name) != getattr(want, name) for name in plain):
        return False
    if (got.indexer is None) != (want.indexer is None) or (got.weights_path is None) != (want.weights_path is None):
        return False
    if want.indexer is not None:
        if got.indexer.keys() != want.indexer.keys():
            return False
        if not all(torch.equal(got.indexer[name], want.indexer[name]) for name in want.indexer):
            return False
    if want.weights_path is not None:
        files = [{p.name: p.read_bytes() for p in a.weights_path.iterdir()} for a in (got, want)]
        return files[0] == files[1]
    return True


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def is_tidy(path: Path) -> bool:
    """Nothing but the config and what it names."""
    raw = json.loads((path / CONFIG_FILE).read_text())
    parts = [(raw.get("indexer") or {}).get("file"), (raw.get("weights") or {}).get("directory")]
    return names(path) == sorted([CONFIG_FILE, *filter(None, parts)])
