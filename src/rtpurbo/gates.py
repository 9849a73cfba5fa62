"""Which heads may turn local, learned: every head's output is g times what it is and 1 - g times what it would be.

One document a step. The gates follow the gradient of a loss that has the dense model's answers and its next-token
distribution in it, and are projected onto a budget, which shrinks from all heads to the share that is to be kept. So
they are judged where the others are as they will be: heads that can stand in for each other are not all kept, and none
is dropped whose stand-in is gone. (Gates trained under a penalty: DuoAttention, arXiv 2410.10819; here with a budget, and
with answers as the model gives them.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .attach import recording
from .attention import Observed
from .config import SparseConfig
from .families import attention_layers
from .ops import window_attention

SHRINKING = 0.6
"""Share of the steps in which the budget shrinks; in the rest the choice settles."""
MOMENTUM = 0.8
DISTANCE = 10.0
"""Sum of all steps' sizes, were they like the first, root mean square over the gates; from local to full a gate goes 1."""
SLOWEST = 0.2
"""Size of the last step, by that of the first."""


class Gates:
    """The gates of a run, [layers, query heads] in [0, 1], 1 for full; heads of a unit share one."""

    def __init__(self, converted: list[bool], query_heads: int, unit: int, *, ratio: float, steps: int) -> None:
        self.converted = torch.tensor(converted)
        self.unit, self.ratio, self.steps = unit, ratio, steps
        self.done = 0
        self._values = self.converted[:, None].repeat(1, query_heads // unit).float()
        self._velocity, self._sum = torch.zeros_like(self._values), torch.zeros_like(self._values)

    @property
    def score(self) -> Tensor:
        """[layers, query heads] in [0, 1]: the gates, and for a tenth how long each stayed open, which orders the closed."""
        return (0.9 * self._values + 0.1 * self._sum / max(1, self.done)).repeat_interleave(self.unit, 1)

    @property
    def values(self) -> Tensor:
        """[layers, query heads]; 0 in layers that are not converted."""
        return self._values.repeat_interleave(self.unit, 1)

    def step(self, gradient: Tensor) -> None:
        """Go against `gradient` [layers, query heads] of the loss, and shrink to the budget."""
        self._velocity.lerp_(gradient.unflatten(1, (-1, self.unit)).sum(-1), 1 - MOMENTUM)
        direction = self._velocity.sign() * self._velocity.abs().sqrt()  # a few heads' are far larger than all others'
        size = direction[self.converted].pow(2).mean().sqrt().clamp(min=1e-12)
        self.done += 1
        shrunk = min(1.0, self.done / max(1.0, SHRINKING * self.steps))
        settling = max(0.0, (self.done / self.steps - SHRINKING) / (1 - SHRINKING))
        moved = self._values - DISTANCE / self.steps * (1 - (1 - SLOWEST) * settling) * direction / size
        budget = self.ratio**shrunk * float(self.converted.sum()) * self._values.shape[1]
        self._values[self.converted] = within_budget(moved[self.converted], budget)
        self._sum += self._values


def within_budget(values: Tensor, budget: float) -> Tensor:
    """The nearest point in [0, 1] whose sum is at most `budget` (bisection)."""
    if values.clamp(0, 1).sum() <= budget:
        return values.clamp(0, 1)
    low, high = float(values.min()) - 1, float(values.max())
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (values - middle).clamp(0, 1).sum() > budget else (low, middle)
    return (values - high).clamp(0, 1)


@contextmanager
def gated(model: Any, sparse: SparseConfig, gates: Tensor) -> Iterator[None]:
    """Inside the `with` block every head of the dense `model` gives g * full + (1 - g) * local.

    Args:
        gates: [layers, query heads] float32 on the model's device; gradients flow into it.
    """
    local: dict[int, Tensor] = {}

    def watch(seen: Observed) -> None:
        sinks = torch.arange(sparse.sink_tokens, device=seen.k.device)[None]
        k, v = (x.repeat_interleave(seen.q.shape[1] // seen.k.shape[1], 1) for x in (seen.k, seen.v))
        local[seen.layer] = window_attention(
            seen.q, k, v, *(x[:, :, : sparse.sink_tokens] for x in (k, v)), first_slot=0,
            sinks=sinks, window_tokens=sparse.window_tokens, scaling=seen.scaling,
        )  # fmt: skip

    def mix(layer: int):
        def hook(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            full = args[0].unflatten(-1, (gates.shape[1], -1))  # [1, N, Hq, D]
            near = local.pop(layer).transpose(1, 2)  # popped: one layer's at a time
            return ((full + (1 - gates[layer])[:, None].to(full.dtype) * (near - full)).flatten(2),)

        return hook

    modules = attention_layers(model)
    hooks = [m.o_proj.register_forward_pre_hook(mix(layer)) for layer, m in modules.items()]  # type: ignore[union-attr]
    try:
        with recording(model, watch):
            yield
    finally:
        for hook in hooks:
            hook.remove()
