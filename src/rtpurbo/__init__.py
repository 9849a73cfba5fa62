"""RTPurbo: turn a full-attention language model into a sparse one (arXiv 2605.16928)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .attach import sparsify
    from .calibration import calibrate
    from .checkpoint import Artifact
    from .config import SparseConfig
    from .distillation import distill
    from .evals import evaluate
    from .generate import load
    from .heads import HeadMap
    from .indexer_training import train_indexer
    from .pipeline import convert

_HOMES = {
    "Artifact": "checkpoint",
    "HeadMap": "heads",
    "SparseConfig": "config",
    "calibrate": "calibration",
    "convert": "pipeline",
    "distill": "distillation",
    "evaluate": "evals",
    "load": "generate",
    "sparsify": "attach",
    "train_indexer": "indexer_training",
}

__all__ = [
    "Artifact",
    "HeadMap",
    "SparseConfig",
    "calibrate",
    "convert",
    "distill",
    "evaluate",
    "load",
    "sparsify",
    "train_indexer",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'rtpurbo' has no attribute {name!r}")
