"""Selection: the one definition that training, evaluation, generation and kernels share.

A threshold decides, a whole number of grid steps of 1/16 nat, so that every implementation keeps the same tokens however it
cuts the work. Two rules, alone or together:

- Least probability: a token is kept when the softmax of the index scores gives it that much. So no query keeps more than
  1 / min_probability tokens, and a flat row spends nothing where each token matters least.
- Top-p (paper, section 4): scores are rounded down to the grid, and the tokens within `b` steps of the best one are kept,
  `b` being the smallest number of steps whose mass reaches p; tokens 16 nats or more below the best count nothing. No sort
  is needed: a histogram of 256 counts decides. The kept set holds the smallest set that reaches p of the rounded mass, plus
  at most the tokens that share the grid step of its last member.

At least one whole step below the best token's is kept in any case: equal tokens have equal scores in the first layer, and
rounding must not tell them apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEP_NATS = 1 / 16
GRID_STEPS = 256


def leaves_out(top_p: float, min_probability: float) -> bool:
    """Whether a selection by these leaves any visible token out."""
    return top_p < 1.0 or min_probability > 0.0


@torch.no_grad()
def top_p_threshold(scores: Tensor, top_p: float, min_probability: float = 0.0) -> Tensor:
    """Score from which on tokens are kept.

    Args:
        scores: [..., N] float32 index scores in nats, -inf for tokens that the query cannot see.
        top_p: mass of the softmax over all visible tokens that the kept ones must reach, in (0, 1].
        min_probability: keep no token to which that softmax gives less than this, p reached or not, in [0, 1).

    Returns:
        [..., 1] float32, a multiple of STEP_NATS: keep where `scores >= threshold`; -inf (everything visible) when p = 1 and
        min_probability = 0.
    """
    if not leaves_out(top_p, min_probability):
        return torch.full_like(scores[..., :1], -torch.inf)
    best = torch.floor(scores.amax(-1, keepdim=True) / STEP_NATS)
    sees = best.isfinite()
    best = torch.where(sees, best, torch.zeros_like(best))  # a row that sees nothing keeps nothing
    least = torch.full_like(best, -torch.inf)
    if top_p < 1.0:
        least = best - _steps_to_mass(best - torch.floor(scores / STEP_NATS), top_p)
    if min_probability > 0.0:
        nats = torch.logsumexp(scores, -1, keepdim=True) + math.log(min_probability)
        least = torch.maximum(least, torch.where(sees, torch.ceil(nats / STEP_NATS), best))
    return torch.minimum(least, best - 1) * STEP_NATS


def _steps_to_mass(below: Tensor, top_p: float) -> Tensor:
    """Smallest number of grid steps below the best within which lies p of the mass: [..., N] steps below -> [..., 1]."""
    weights = torch.where(below < GRID_STEPS, torch.exp(-STEP_NATS * below), 0.0)
    needed = top_p * weights.sum(-1, keepdim=True)
    steps = torch.zeros_like(needed)
    bit = GRID_STEPS // 2
    while bit:  # binary search
        mass = torch.where(below <= steps + (bit - 1), weights, 0.0).sum(-1, keepdim=True)
        steps = torch.where(mass < needed, steps + bit, steps)
        bit //= 2
    return steps


def index_scores(index_q: Tensor, index_k: Tensor) -> Tensor:
    """[..., T, d] x [..., N, d] -> [..., T, N] scores in nats, accumulated in float32."""
    with torch.autocast(index_q.device.type, enabled=False):
        return index_q.float() @ index_k.float().transpose(-1, -2)
