"""Top-p selection: the one definition that training, evaluation, generation and kernels share.

A query keeps the tokens whose index score is within `b` grid steps of its best score, `b` being the smallest number
of steps, one or more, whose softmax mass reaches p. The grid (256 steps of 1/16 nat) makes the rule exact for every
implementation, needs no sort and becomes the 256-bin histogram of a decode kernel (paper, section 4): the kept set holds
the smallest set that reaches p, plus at most the tokens within 1/16 nat of its last member. No edge lies at the best
score itself: equal tokens have equal scores in the first layer, and rounding must not tell them apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP_NATS = 1 / 16
GRID_STEPS = 256


@torch.no_grad()
def top_p_threshold(scores: Tensor, top_p: float) -> Tensor:
    """Score from which on tokens are kept.

    Args:
        scores: [..., N] float32 index scores in nats, -inf for tokens that the query cannot see.
        top_p: mass of the softmax over all visible tokens that the kept ones must reach, in (0, 1].

    Returns:
        [..., 1] float32: keep where `scores >= threshold`; -inf (everything visible) when p = 1 or when the grid's
        16 nats do not reach p.
    """
    if top_p >= 1.0:
        return torch.full_like(scores[..., :1], -torch.inf)
    peak = scores.amax(-1, keepdim=True)
    peak = torch.where(peak.isinf(), torch.zeros_like(peak), peak)  # a row that sees nothing keeps nothing
    weights = torch.exp(scores - peak)
    needed = top_p * weights.sum(-1, keepdim=True)

    def mass(steps: Tensor) -> Tensor:
        return torch.where(scores >= peak - steps * STEP_NATS, weights, 0.0).sum(-1, keepdim=True)

    steps = torch.ones_like(peak)
    bit = GRID_STEPS // 2
    while bit:  # binary search for the first grid edge whose mass is large enough
        steps = torch.where(mass(steps + (bit - 1)) < needed, steps + bit, steps)
        bit //= 2
    return torch.where(mass(steps) < needed, -torch.inf, peak - steps * STEP_NATS)


def index_scores(index_q: Tensor, index_k: Tensor) -> Tensor:
    """[..., T, d] x [..., N, d] -> [..., T, N] scores in nats, accumulated in float32."""
    with torch.autocast(index_q.device.type, enabled=False):
        return index_q.float() @ index_k.float().transpose(-1, -2)
