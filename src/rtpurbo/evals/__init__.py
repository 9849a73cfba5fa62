"""Evaluation, dense and sparse on the same samples."""

from .compare import evaluate

__all__ = ["evaluate"]
