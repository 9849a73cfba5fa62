"""Top-p selection: the one definition that training, evaluation, generation and kernels share.

Scores are rounded down to a grid of 1/16 nat. A query keeps the tokens within `b` grid steps of its best one, `b` being the
smallest number of steps, one or more, whose softmax mass reaches p; tokens 16 nats or more below the best count nothing.
So the rule needs no sort and no sum of floats over tokens: a histogram of 256 counts decides it (paper, section 4), and
every implementation keeps the same tokens however it cut the work. The kept set holds the smallest set that reaches p of the
rounded mass, plus at most the tokens that share the grid step of its last member. A least probability may cut it short: a
flat row would spend most tokens where each of them matters least. At least one whole step below the best
token's is kept: equal tokens have equal scores in the first layer, and rounding must not tell them apart.
"""

from __future__ import annotations

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
        min_probability: keep no token with less of that mass than this, p reached or not, in [0, 1).

    Returns:
        [..., 1] float32, a multiple of STEP_NATS: keep where `scores >= threshold`; -inf (everything visible) when p = 1 and
        min_probability = 0.
    """
    if not leaves_out(top_p, min_probability):
        return torch.full_like(scores[..., :1], -torch.inf)
    below = torch.floor(scores / STEP_NATS)
    best = below.amax(-1, keepdim=True)
    best = torch.where(best.isinf(), torch.zeros_like(best), best)  # a row that sees nothing keeps nothing
    below = best - below  # in grid steps
    weights = torch.where(below < GRID_STEPS, torch.exp(-STEP_NATS * below), 0.0)
    total = weights.sum(-1, keepdim=True)
    needed = top_p * total

    def mass(steps: Tensor) -> Tensor:
        return torch.where(below <= steps, weights, 0.0).sum(-1, keepdim=True)

    steps = torch.zeros_like(best)
    bit = GRID_STEPS // 2
    while bit and top_p < 1.0:  # binary search for the first number of steps whose mass is large enough
        steps = torch.where(mass(steps + (bit - 1)) < needed, steps + bit, steps)
        bit //= 2
    if top_p >= 1.0:
        steps += GRID_STEPS - 1
    if min_probability > 0.0:
        steps = torch.minimum(steps, torch.floor(-torch.log(min_probability * total) / STEP_NATS))
    return (best - steps.clamp(min=1)) * STEP_NATS


def index_scores(index_q: Tensor, index_k: Tensor) -> Tensor:
    """[..., T, d] x [..., N, d] -> [..., T, N] scores in nats, accumulated in float32."""
    with torch.autocast(index_q.device.type, enabled=False):
        return index_q.float() @ index_k.float().transpose(-1, -2)
