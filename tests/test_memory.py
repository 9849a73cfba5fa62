"""Computed memory: its factors against live tensors, its terms, and the setting of docs/memory.md."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
import weakref
from pathlib import Path

import pytest
import tables
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rtpurbo import calibration, cli, distillation
from rtpurbo.attach import checkpoint_activations
from rtpurbo.config import DistillConfig, SparseConfig
from rtpurbo.memory import GIB, RESERVED_GIB, Shape, memory, with_length
from rtpurbo.pipeline import PAPER
from tiny_text import random_model

DOCS = Path(__file__).parent.parent / "docs"
STAGES = ("calibrate", "train_indexer", "distill", "evaluate")


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that live, those of a model and its inputs left out."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.sizes and key not in self.known:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, key)
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def small_llama(layers: int = 2):
    """8B's proportions, bfloat16."""
    shape = {
        "hidden_size": 256,
        "intermediate_size": 896,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    return random_model(layers=layers, context=4096, **shape).to(torch.bfloat16)


TOKENS = 1024


def test_a_forward_pass_against_live_tensors():
    model = small_llama()
    with Live(*model.parameters(), *model.buffers()) as live, torch.no_grad():
        model(torch.zeros(1, TOKENS, dtype=torch.long), logits_to_keep=1, use_cache=False)
    assert live.peak <= Shape.of(model).forward(TOKENS) * 1.05
    assert live.peak >= Shape.of(model).forward(TOKENS) * 0.8


def test_distillation_against_live_tensors():
    """Hidden states and one layer's recomputation with an adapter."""
    model = small_llama()
    shape, tokens = Shape.of(model), torch.zeros(1, TOKENS, dtype=torch.long)
    student = distillation._student(model, DistillConfig(lora_rank=2))
    checkpoint_activations(student)
    with Live(*student.parameters(), *student.buffers()) as live:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = student(input_ids=tokens, logits_to_keep=torch.arange(1), use_cache=False).logits
        logits.float().sum().backward()
    terms = memory_of_distillation(shape)
    assert 0.85 * terms <= live.peak <= 1.1 * terms


def memory_of_distillation(shape: Shape) -> float:
    config = dataclasses.replace(tables.EIGHT_B, distill=DistillConfig(batch_size=1, labels=1))
    terms = memory(shape, with_length(config, TOKENS))["distill"]
    return (terms["hidden states"] + terms["layer or logits"]) * GIB


def test_gates_against_live_tensors():
    """They grow with the depth by the hidden states alone; no layer keeps its windows' outputs."""
    peaks, length = [], 512
    for layers in (2, 4):
        model, gates = small_llama(layers), torch.full((layers, 8), 0.5)
        sparse = SparseConfig(window_tokens=128, index_dim=16)
        with Live(*model.parameters(), *model.buffers()) as live:
            tokens, positions = torch.zeros(length, dtype=torch.long), torch.tensor([length - 3])

            def loss(logits: torch.Tensor) -> torch.Tensor:
                return logits.float().logsumexp(-1).sum()

            calibration.gate_gradient(model, tokens, positions, sparse, gates, loss)
        peaks.append(live.peak)
        shape = Shape.of(model)
        assert live.peak == pytest.approx(shape.layer(length, 25, 13) + layers * length * 2 * shape.hidden, rel=0.1)
    assert peaks[1] - peaks[0] == pytest.approx(2 * length * 2 * 256, rel=0.1)


def test_the_loss_in_pieces_takes_less(monkeypatch):
    peaks = []
    for size in (1024, 64):
        monkeypatch.setattr(distillation, "LABELS_PER_PIECE", size)
        teacher, student = (torch.randn(1024, 2000).to(torch.bfloat16) for _ in range(2))
        expected = torch.full((1024,), -1)
        with Live(teacher, student, expected) as live:
            distillation.label_losses(student.requires_grad_(), teacher, expected, 10).sum().backward()
        peaks.append(live.peak / teacher.numel())
    assert peaks[0] > 12  # bytes a logit: three copies in float32 and more
    assert peaks[1] < 6  # the gradient in bfloat16, twice while it is joined, and a piece


def test_the_published_shapes():
    assert tables.shape_of("Llama-3.1-8B").parameters == 8_030_261_248
    assert tables.shape_of("Qwen3-8B").parameters == 8_190_735_360


@pytest.mark.parametrize("name", sorted(tables.SHAPES))
def test_the_command_of_the_docs_fits(name):
    command = re.search(r"^rtpurbo (convert .*)$", (DOCS / "memory.md").read_text(), re.M)[1]
    with contextlib.suppress(SystemExit):
        asked = tyro.extras.subcommand_cli_from_dict(cli.COMMANDS, args=shlex.split(command))
    assert cli._seeded(asked) == tables.EIGHT_B
    found = memory(tables.shape_of(name), tables.EIGHT_B, gpu_bytes=24 << 30)
    assert set(found) == set(STAGES)
    assert all(sum(terms.values()) <= 24 - RESERVED_GIB for terms in found.values())


def test_terms_grow_with_what_they_depend_on():
    shape = tables.shape_of("Qwen3-8B")

    def needed(config) -> dict[str, float]:
        return {name: sum(terms.values()) for name, terms in memory(shape, config).items()}

    base = needed(with_length(tables.EIGHT_B, 8192))
    longer = needed(with_length(tables.EIGHT_B, 32768))
    assert all(longer[stage] > base[stage] for stage in STAGES)
    more = dataclasses.replace(tables.EIGHT_B, distill=dataclasses.replace(tables.EIGHT_B.distill, batch_size=4))
    assert needed(more)["distill"] > needed(tables.EIGHT_B)["distill"] + 10
    assert needed(dataclasses.replace(tables.EIGHT_B, distill=DistillConfig(steps=0))).keys() == set(STAGES) - {"distill"}
    assert needed(PAPER)["distill"] > 8 * shape.parameters * 2 / GIB
