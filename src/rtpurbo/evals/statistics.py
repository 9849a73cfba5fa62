"""Paired comparison of dense and sparse scores on the same samples."""

from __future__ import annotations

import random
from typing import Any


def paired(
    dense: list[float], sparse: list[float], *, seed: int = 0, resamples: int = 2000, other: str = "sparse"
) -> dict[str, Any]:
    """Means, recovery and the paired difference with its 95 % bootstrap interval.

    Args:
        other: what the result calls the second mean, where it is not the sparse model's.

    Returns:
        "samples", "dense", "sparse" (means), "recovery" (sparse / dense, None when dense is 0), "difference"
        (sparse - dense) and "difference_95" [low, high].
    """
    assert len(dense) == len(sparse) > 0
    n = len(dense)
    differences = [s - d for d, s in zip(dense, sparse, strict=True)]
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(resamples))
    a, b = sum(dense) / n, sum(sparse) / n
    return {
        "samples": n,
        "dense": a,
        other: b,
        "recovery": b / a if a else None,
        "difference": b - a,
        "difference_95": [means[int(0.025 * resamples)], means[int(0.975 * resamples)]],
    }
