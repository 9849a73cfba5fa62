"""More heads until a target is reached: which shares are tried, what recovery counts, and what is written down."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from rtpurbo import calibration
from rtpurbo.calibration import DocumentScore, calibrate
from rtpurbo.config import CalibrateConfig, SparseConfig
from rtpurbo.data import documents
from rtpurbo.heads import HeadMap
from rtpurbo.pipeline import findings
from rtpurbo.recovery import Answers, choose_share, recovery, shares
from tiny_text import copy_model, random_model

SPARSE = SparseConfig(window_tokens=64, sink_tokens=4, index_dim=16)
CONFIG = CalibrateConfig(
    granularity="head", scoring="needle", lengths_tokens=(320,), documents=3, retrieval_ratio=0.125, check_samples=0,
    target_recovery=0.9,
)  # fmt: skip


def answers(single: list[int], multi_key: list[int], log_probability: list[float], likeliest: list[int]) -> Answers:
    right = {"single": [bool(x) for x in single], "multi_key": [bool(x) for x in multi_key]}
    return Answers(right, torch.tensor(log_probability), torch.tensor(likeliest))


def test_shares_are_tried_from_the_first_to_all():
    found = shares(0.15)
    assert [round(x, 4) for x in found] == [0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9375, 1.0]
    assert shares(1.0) == [1.0]
    for first in (0.003, 0.07, 0.6):
        found = shares(first)
        assert found[0] == first
        assert found[-1] == 1.0
        assert found == sorted(set(found))


def test_recovery_by_hand():
    dense = answers([1, 1, 1, 0], [1, 1, 0, 0], [-1.0, -2.0], [3, 4])
    worse = answers([1, 0, 1, 1], [1, 1, 1, 1], [-1.2, -2.2], [3, 5])
    got = recovery(dense, worse)
    assert got["answers"] == 4 / 5  # what only the worse one answers makes up for nothing
    assert got["text"] == pytest.approx(math.exp(-0.2))
    assert got["top1_agreement"] == 0.5
    assert got["recovery"] == 4 / 5
    assert recovery(dense, dense) == {"recovery": 1.0, "answers": 1.0, "text": 1.0, "top1_agreement": 1.0}
    better = dataclasses.replace(dense, log_probability=torch.tensor([-0.5, -2.0]))
    assert recovery(dense, better)["text"] == 1.0


def test_kinds_that_the_dense_model_cannot_answer_do_not_count():
    dense = answers([1, 1, 1, 0], [1, 0, 0, 0], [-1.0], [0])  # a quarter of multi_key
    other = answers([1, 1, 1, 0], [0, 0, 0, 0], [-1.1], [0])
    assert recovery(dense, other)["answers"] == 1.0
    nothing = dataclasses.replace(dense, right={"single": [False] * 4, "multi_key": [False] * 4})
    found = recovery(nothing, other)
    assert found["answers"] is None
    assert found["recovery"] == found["text"] == pytest.approx(math.exp(-0.1))


@pytest.fixture
def badly_scored(monkeypatch):
    """Scores that put the head that retrieves third of eight."""

    needle = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.9, 0.8, 0.0]])

    def score(model, task, *_):
        return DocumentScore(task.kind, len(task.tokens), 1.0, needle)

    monkeypatch.setattr(calibration, "score_document", score)


def test_heads_are_added_until_the_target_is_reached(tokenizer, source, badly_scored):
    made = calibrate(copy_model(), tokenizer, [source], CONFIG, SPARSE)
    assert made.heads.retrieval == ((0,), (1, 2))
    found = made.stages["calibrate"]["metrics"]["target_recovery"]
    assert found["target"] == 0.9
    assert [round(row["ratio"] * 8, 2) for row in found["tried"]] == [1, 1.67, 2.67]  # 1, 2 and 3 heads; none twice
    assert [row["recovery"] >= 0.9 for row in found["tried"]] == [False, False, True]
    assert found["chosen_ratio"] == found["tried"][-1]["ratio"]
    assert found["dense"]["single"] > 0.5
    assert (found["length_tokens"], found["samples"]) == (320, 24)
    assert made.stages["calibrate"]["settings"]["retrieval_ratio"] == 0.125
    line = next(line for line in findings(made, "calibrate") if "Target recovery" in line)
    assert line.startswith("Target recovery 0.9: 33% chosen (share and recovery: 12% ")


def test_gates_that_find_the_head_reach_the_target_at_once(tokenizer, source):
    made = calibrate(copy_model(), tokenizer, [source], dataclasses.replace(CONFIG, scoring="gates"), SPARSE)
    assert made.heads.retrieval == ((), (2,))
    assert [row["ratio"] for row in made.stages["calibrate"]["metrics"]["target_recovery"]["tried"]] == [0.125]


def test_without_a_target_nothing_changes(tokenizer, source, badly_scored):
    made = calibrate(copy_model(), tokenizer, [source], dataclasses.replace(CONFIG, target_recovery=None), SPARSE)
    assert made.heads.retrieval == ((0,), ())
    assert "target_recovery" not in made.stages["calibrate"]["metrics"]
    assert not any("recovery" in line for line in findings(made, "calibrate"))


def test_all_heads_are_the_dense_model(tokenizer, source, monkeypatch):
    """A model that cannot answer: text alone decides, and all heads recover everything."""
    model = random_model(context=512)
    texts = documents([source], tokenizer, length_tokens=320, count=3, seed=0)

    def choose(share: float) -> HeadMap:
        scores = [[0.4, 0.1, 0.2, 0.3], [0.5, 0.6, 0.7, 0.8]]
        return HeadMap.from_scores(scores, kv_heads=2, granularity="head", ratio=share)

    common = {"first": 0.8, "samples": 0, "seed": 0}
    monkeypatch.setattr("rtpurbo.recovery.shares", lambda first: [1.0])
    heads, found, notes = choose_share(model, tokenizer, texts, choose, SPARSE, target=1.0, **common)
    assert heads.ratio == found["chosen_ratio"] == 1.0
    assert [row["recovery"] for row in found["tried"]] == [1.0]
    assert found["tried"][0]["top1_agreement"] == 1.0
    assert "text alone decided" in notes[0]
    assert len(notes) == 1


def test_a_missed_target_is_noted(tokenizer, source, monkeypatch):
    monkeypatch.setattr("rtpurbo.recovery.shares", lambda first: [first])
    monkeypatch.setattr("rtpurbo.recovery.recovery", lambda dense, candidate: {"recovery": 0.5, "answers": 0.5, "text": 1.0})
    texts = documents([source], tokenizer, length_tokens=320, count=3, seed=0)
    heads = HeadMap(query_heads=4, kv_heads=2, granularity="head", retrieval=((), (2,)))
    common = {"first": 0.125, "target": 0.9, "samples": 0, "seed": 0}
    _, _, notes = choose_share(random_model(), tokenizer, texts, lambda share: heads, SPARSE, **common)
    assert notes == ["Not even 12% of the heads reach the target recovery of 0.9 (0.500)."]
