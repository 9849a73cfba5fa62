"""Finding retrieval heads: a head that is known to retrieve must be found, and effects must be what gates really do."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch

from rtpurbo import calibration, data
from rtpurbo.attach import attached, recording
from rtpurbo.calibration import (
    DocumentScore,
    attention_rows,
    calibrate,
    combine,
    score_document,
)
from rtpurbo.checkpoint import Artifact
from rtpurbo.config import CalibrateConfig, SparseConfig, default_lengths
from rtpurbo.data import documents, question_document
from rtpurbo.heads import HeadMap
from rtpurbo.models import fingerprint
from tiny_text import RETRIEVAL_HEAD, copy_model, everything_of, random_model, text_source

SPARSE = SparseConfig(window_tokens=64, sink_tokens=4, index_dim=16)
CONFIG = CalibrateConfig(granularity="head", lengths_tokens=(320,), documents=3, retrieval_ratio=0.125, check_samples=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    # sentences come again, so that ordinary text, too, is easier for a model that looks far back
    with text_source(tmp_path_factory.mktemp("text"), sentences=15) as name:
        yield name


@pytest.fixture(scope="module")
def model():
    return copy_model()


def metrics_of(artifact) -> dict:
    return artifact.stages["calibrate"]["metrics"]


# The head that retrieves


@pytest.mark.parametrize("scoring", ["effect", "attention", "needle"])
def test_the_head_that_retrieves_is_found(model, tokenizer, source, scoring):
    """Alone at the top; with far attention, which noise heads have too, one of them shares the highest score."""
    ratio = 0.25 if scoring == "attention" else 0.125
    config = dataclasses.replace(CONFIG, scoring=scoring, retrieval_ratio=ratio)
    made = calibrate(model, tokenizer, [source], config, SPARSE)
    layer, head = RETRIEVAL_HEAD
    assert head in made.heads.retrieval[layer]
    assert sum(map(len, made.heads.retrieval)) == 8 * ratio
    scores = metrics_of(made)["scores"]
    assert scores[layer][head] == 1.0
    others = sorted(s for i, row in enumerate(scores) for h, s in enumerate(row) if (i, h) != (layer, head))
    assert others[-2 if scoring == "attention" else -1] < (1.0 if scoring == "attention" else 0.5)


def test_layer_0_heads_that_look_just_back_have_no_effect(model, tokenizer, source):
    """Heads 1 and 2 of layer 0 are all that the far head lives on, but a window serves them."""
    scores = metrics_of(calibrate(model, tokenizer, [source], CONFIG, SPARSE))["scores"]
    assert max(scores[0][1:3]) < 0.01


def test_group_granularity_takes_the_whole_group(model, tokenizer, source):
    config = dataclasses.replace(CONFIG, granularity="group", retrieval_ratio=0.25)
    made = calibrate(model, tokenizer, [source], config, SPARSE)
    assert made.heads.granularity == "group"
    assert made.heads.retrieval == ((), (2, 3))
    assert metrics_of(made)["full_kv_ratio"] == 0.25
    assert metrics_of(made)["retrieval_head_ratio"] == 0.25


def test_threshold_instead_of_a_share(model, tokenizer, source):
    config = dataclasses.replace(CONFIG, threshold=0.9, retrieval_ratio=0.5)
    assert calibrate(model, tokenizer, [source], config, SPARSE).heads.retrieval == ((), (2,))
    everything = calibrate(model, tokenizer, [source], dataclasses.replace(config, threshold=0.0), SPARSE)
    assert everything.heads.ratio == 1.0


def test_ratio_counts_heads_of_the_whole_model(model, tokenizer, source):
    for ratio, count in ((0.125, 1), (0.25, 2), (0.5, 4), (1.0, 8), (0.01, 1)):
        made = calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, retrieval_ratio=ratio), SPARSE)
        assert sum(len(heads) for heads in made.heads.retrieval) == count
        assert 2 in made.heads.retrieval[1]


# Effects


def naive(seen, *, local: bool) -> torch.Tensor:
    """Window and sink attention, or full attention, with a full mask: [Hq, N, D]."""
    size = seen.q.shape[1] // seen.k.shape[1]
    k, v = (x[0].repeat_interleave(size, 0) for x in (seen.k, seen.v))
    places = torch.arange(k.shape[1])
    age = places[:, None] - places
    keep = (age >= 0) & ((age < SPARSE.window_tokens) | (places < SPARSE.sink_tokens) | (not local))
    return ((seen.q[0] @ k.transpose(-1, -2)) * seen.scaling).masked_fill(~keep, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("full", [None, ((0, 1, 2, 3), (1, 2), ())])
@pytest.mark.parametrize("margin", [True, False])
def test_effects_are_the_slope_of_the_loss(tokenizer, source, margin, full):
    """Central differences: every head alone is moved a little towards what it would be, local or full, and the rest of the
    model runs on."""
    heads = full and HeadMap(query_heads=4, kv_heads=2, granularity="head", retrieval=full)
    model = random_model(layers=3, context=256, seed=3).double()
    tokens = documents([source], tokenizer, length_tokens=120, count=1, seed=2)[0]
    targets = torch.tensor([70, 90, 100, 118])
    got = torch.zeros(3, 4, dtype=torch.float64)
    calibration._effects(model, tokens, targets, SPARSE, got, lambda seen: None, margin=margin, heads=heads)
    attentions = [layer.self_attn for layer in model.model.layers]

    @torch.no_grad()
    def loss(layer: int, head: int, gate: float) -> float:
        other, local = {}, heads is None or head in heads.retrieval_heads(layer)

        def move(module, args):
            outputs = args[0].unflatten(-1, (4, 16)).clone()
            outputs[0, :, head] += gate * (other[layer][head] - outputs[0, :, head])
            return (outputs.flatten(2),)

        hook = attentions[layer].o_proj.register_forward_pre_hook(move)
        watch = recording(model, lambda seen: other.__setitem__(seen.layer, naive(seen, local=local)))
        with nullcontext() if heads is None else attached(model, heads, SPARSE), watch:
            logits = model(tokens[None]).logits[0, targets]
        hook.remove()
        want = tokens[targets + 1][:, None]
        right = logits.gather(1, want)[:, 0]
        others = logits.scatter(1, want, -torch.inf) if margin else logits
        return (others.logsumexp(-1) - right).mean().item()

    step = 1e-2  # RMSNorm computes in float32: smaller steps drown in its rounding
    for layer in range(3):
        for head in range(4):
            slope = (loss(layer, head, step) - loss(layer, head, -step)) / (2 * step)
            cost = slope if heads is None or head in heads.retrieval_heads(layer) else -slope  # local: what full would win
            assert got[layer, head].item() == pytest.approx(cost, rel=2e-3, abs=1e-4)
    assert got.abs().amin() > 1e-3


def test_effects_have_the_sign_of_what_is_lost(model, tokenizer, source):
    """Questions: without the far head the answer is lost, so its effect is positive and far above all others."""
    texts = documents([source], tokenizer, length_tokens=320, count=2, seed=0)
    before = everything_of(model)
    score = score_document(model, tokenizer, *texts, SPARSE, CONFIG, index=1)
    assert everything_of(model) == before
    assert score.kind == "single"
    assert score.right == 1.0
    effect = score.tables["effect"]
    assert effect[RETRIEVAL_HEAD] > 1.0
    assert effect[RETRIEVAL_HEAD] > 10 * effect.flatten().sort().values[-2]


def test_half_of_the_questions_come_after_an_answered_example(model, tokenizer, source, monkeypatch):
    """What counts is the answer at the end, not that of the example, which ends the first part."""
    asked, counted = [], []

    def ask(*args, example, **wording):
        made = question_document(*args, example=example, **wording)
        asked.append((example, *made))
        return made

    def effects(model, tokens, targets, *rest, **settings):
        counted.append(targets)

    monkeypatch.setattr(data, "SHORTEST_TOKENS", 128)
    monkeypatch.setattr(calibration, "question_document", ask)
    monkeypatch.setattr(calibration, "_effects", effects)
    texts = documents([source], tokenizer, length_tokens=512, count=2, seed=0)
    for seed in range(16):
        score_document(model, tokenizer, *texts, SPARSE, dataclasses.replace(CONFIG, seed=seed), index=1)
    for (example, tokens, first, last), targets in zip(asked, counted, strict=True):
        assert bool(first) == example
        assert len(tokens) == 512
        assert max(first, default=0) < 128
        assert set(targets.tolist()) <= set(last)
        assert min(last) > 480
    assert 4 <= sum(example for example, *_ in asked) <= 12


# Attention


@torch.no_grad()
def test_attention_rows_are_the_models_attention(model, tokenizer, source):
    tokens = documents([source], tokenizer, length_tokens=96, count=1, seed=2)[0]
    rows, got = torch.tensor([0, 5, 95]), {}
    with recording(model, lambda seen: got.__setitem__(seen.layer, attention_rows(seen, rows))):
        model(tokens[None])
    eager = copy_model()
    eager.set_attn_implementation("eager")
    for layer, want in enumerate(eager(tokens[None], output_attentions=True).attentions):
        torch.testing.assert_close(got[layer], want[0][:, rows], atol=1e-5, rtol=0)


def test_needle_and_far_scores_by_hand(model, tokenizer, source):
    """The far head puts nearly all of a repeated span's attention on the early span; a dense model's rows sum to one."""
    texts = documents([source], tokenizer, length_tokens=320, count=2, seed=0)
    span = score_document(model, tokenizer, *texts, SPARSE, CONFIG, index=0)
    assert span.kind == "span"
    assert span.tables["needle"][RETRIEVAL_HEAD] > 0.9
    assert span.tables["needle"][0, 1:3].max() < 1e-3  # one and two tokens back
    assert span.tables["far"][RETRIEVAL_HEAD] > 0.9
    assert (span.tables["needle"] <= span.tables["far"] + 1e-5).all()
    assert span.right > 0.8
    text = score_document(model, tokenizer, *texts, SPARSE, CONFIG, index=2)
    assert text.kind == "text"
    assert (text.tables["needle"] == 0).all()
    assert text.right == 1.0
    assert text.tables["far"][0, 1:3].max() < 1e-3
    assert text.tables["far"].max() < 1.0


def test_scoring_by_attention_needs_no_gradients(model, tokenizer, source, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(calibration, "_effects", refuse)
    calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, scoring="attention"), SPARSE)


# From scores to heads


def fake(kind: str, length: int, right: float = 1.0, **tables: list[list[float]]) -> DocumentScore:
    full = {name: torch.tensor(tables.get(name, [[0.0] * 4] * 2)) for name in ("needle", "far", "effect")}
    return DocumentScore(kind, length, full, right)


def test_combine_by_hand():
    span, other = [[0.0, 0.0, 6.0, 2.0], [-4.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.25], [0.5, 0.25, 0.0, 0.0]]
    scores = [
        fake("span", 100, needle=[[0.2, 0.0, 0.0, 0.0], [0.0, 0.6, 0.0, 0.0]], effect=span),
        fake("span", 200, needle=[[0.3, 0.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0]], effect=other),
        fake("single", 100, effect=[[0.0, 2.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]),
        fake("chain", 100, effect=[[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]]),
        fake("chain", 200, right=0.2, effect=[[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]]),  # not answered
        fake("text", 100, far=[[0.0, 0.0, 0.0, 0.5], [0.1, 0.0, 0.0, 0.0]], effect=[[0.0] * 4, [0.1, 0.0, 0.0, 0.1]]),
    ]
    # every document by its sum: needle (0.25, 0.75) and (0.75, 0.25); span 0.75, 0.25, -0.5 and 0.25, 0.5, 0.25
    needle = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(combine(scores, "needle"), needle)
    attention = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.2, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(combine(scores, "attention"), attention)
    effect = torch.tensor([[0.0, 1.0, 1.0, 2 / 3], [1.0, 0.5, 1.0, 1.0]])
    torch.testing.assert_close(combine(scores, "effect"), effect)
    # in pairs: span (0, 1), (0, 0) and (0, 0.25), (0.75, 0); needle and far by their largest
    torch.testing.assert_close(combine(scores, "attention", 2), torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]))
    pairs = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(combine(scores, "effect", 2), pairs)
    torch.testing.assert_close(combine(scores[:2], "effect", 2), torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.2, 0.0, 0.0]]))


def test_rounds_turn_more_and_more_heads_local(model, tokenizer, source, monkeypatch):
    """All heads, then the best so far, fewer each time; what an earlier round saw decides who is full in the next."""
    seen = []

    def score(model, tokenizer, document, other, sparse, config, *, index, heads):
        seen.append((len(document), index, heads))
        effect = [[0.0, 1.0, 0.9, 0.8], [0.7, 0.6, 0.5, 0.4]]
        return fake("span", len(document), effect=effect)

    monkeypatch.setattr(calibration, "score_document", score)
    config = dataclasses.replace(CONFIG, documents=12, lengths_tokens=(200, 320), retrieval_ratio=1 / 16)
    made = calibrate(model, tokenizer, [source], config, SPARSE)
    assert made.heads.retrieval == ((1,), ())
    rounds = [None, ((1, 2, 3), (0,)), ((1, 2), ()), ((1,), ())]
    assert [heads and heads.retrieval for _, _, heads in seen] == [full for full in rounds for _ in range(6)]
    assert [(length, index % 3) for length, index, _ in seen] == [(n, i % 3) for i in range(12) for n in (200, 320)]
    questions = {length: [i // 3 for n, i, _ in seen if n == length and i % 3 == 1] for length in (200, 320)}
    assert questions == {200: [0, 1, 2, 3], 320: [1, 2, 3, 4]}  # every length begins with another kind
    for other in (dataclasses.replace(config, threshold=0.9), dataclasses.replace(config, documents=5)):
        seen.clear()
        calibrate(model, tokenizer, [source], other, SPARSE)
        assert {heads for _, _, heads in seen} == {None}


def test_lengths_that_the_model_cannot_copy_are_left_out(model, tokenizer, source, monkeypatch):
    good, bad = [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]

    def score(model, tokenizer, document, other, sparse, config, *, index, heads):
        kind = calibration.KINDS[index % 3]
        at = len(document)
        return fake(kind, at, (0.9 if at == 120 else 0.1) if kind == "span" else 1.0, effect=good if at == 120 else bad)

    monkeypatch.setattr(calibration, "score_document", score)
    config = dataclasses.replace(CONFIG, lengths_tokens=(120, 160))
    made = calibrate(model, tokenizer, [source], config, SPARSE)
    assert made.heads.retrieval == ((), (2,))
    found = metrics_of(made)
    assert found["usable_lengths_tokens"] == [120]
    assert found["copy_accuracy"] == {"120": 0.9, "160": 0.1}
    assert found["notes"] == []


def test_a_model_that_cannot_copy_is_judged_by_text_alone(tokenizer, source):
    model = random_model(context=512)
    made = calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, documents=5), SPARSE)
    found = metrics_of(made)
    assert found["usable_lengths_tokens"] == []
    assert "ordinary text alone decided" in found["notes"][0]
    texts = documents([source], tokenizer, length_tokens=320, count=6, seed=0)
    mean = score_document(model, tokenizer, texts[4], texts[5], SPARSE, CONFIG, index=2).tables["effect"].clamp(min=0)
    best = int((mean / mean.max()).argmax())
    assert made.heads.retrieval == tuple((best % 4,) if i == best // 4 else () for i in range(2))
    with pytest.raises(ValueError, match=r"cannot copy a repeated span at 320 tokens.*scoring='needle'"):
        calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, scoring="needle"), SPARSE)


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("scoring", ["effect", "needle"])
def test_any_number_of_documents(model, tokenizer, source, count, scoring):
    made = calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, documents=count, scoring=scoring), SPARSE)
    assert made.heads.retrieval == ((), (2,))
    assert metrics_of(made).get("overlap_between_seeds") == (None if count < 6 else 1.0)


@pytest.mark.parametrize("count", [6, 7, 9])
def test_the_overlap_is_that_of_two_seeds(model, tokenizer, source, monkeypatch, count):
    """Half of the documents, of every kind and length, come from another seed, which here moves one of the two heads."""
    seen = {}

    def score(model, tokenizer, document, other, sparse, config, *, index, heads):
        kind, length = calibration.KINDS[index % 3], len(document)
        seen.setdefault(config.seed, []).append((kind, length))
        drawn = documents([source], tokenizer, length_tokens=length, count=count + 1, seed=config.seed)
        assert any(torch.equal(document, text) for text in drawn)
        effect = [[0.0, 1.0, 0.0, 0.0], [0.0] * 4]
        effect[1][2 if config.seed == 7 else 3] = 0.9
        return fake(kind, length, effect=effect)

    monkeypatch.setattr(calibration, "score_document", score)
    config = dataclasses.replace(CONFIG, documents=count, lengths_tokens=(200, 320), retrieval_ratio=0.25, seed=7)
    assert metrics_of(calibrate(model, tokenizer, [source], config, SPARSE))["overlap_between_seeds"] == 0.5
    first, second = seen[7], seen[7 + calibration.OTHER_SEED]
    assert set(first) == set(second) == {(kind, length) for kind in calibration.KINDS for length in (200, 320)}
    assert len(first) - len(second) == 2 * (count % 2)


# The window ladder

LADDER = SparseConfig(window_tokens=512, sink_tokens=4, index_dim=16)
LADDER_CONFIG = CalibrateConfig(
    scoring="attention", lengths_tokens=(700, 1000), documents=3, retrieval_ratio=0.25, check_samples=0, window_mass=0.99
)


@torch.no_grad()
def looking_back(back: dict[tuple[int, int], int | None]):
    """A model whose heads (layer, query head) look this many tokens back, by position in RoPE; None: everywhere alike."""
    theta, dim, hidden = 1e6, 64, 96
    model = random_model(
        context=1024, hidden_size=hidden, head_dim=dim, rope_parameters={"rope_type": "default", "rope_theta": theta},
        initializer_range=0.01,
    )  # fmt: skip
    model.get_input_embeddings().weight[:, -1] = 1.0  # nearly all that the norm leaves
    half, fast = dim // 2, dim // 4
    angles = theta ** (-torch.arange(fast) / half)
    strength = (25 * dim**0.5 / hidden) ** 0.5
    for (layer, head), tokens in back.items():
        attention = model.model.layers[layer].self_attn
        q, k = attention.q_proj.weight[head * dim :][:dim], attention.k_proj.weight[head // 2 * dim :][:dim]
        q.zero_()
        k.zero_()
        k[:fast, -1] = strength
        if tokens is not None:
            q[:fast, -1] = strength * torch.cos(tokens * angles)
            q[half : half + fast, -1] = -strength * torch.sin(tokens * angles)
    return model


def test_rungs():
    assert calibration.rungs(8192) == (1024, 2048, 4096, 8192)
    assert calibration.rungs(1024) == (128, 256, 512, 1024)
    assert calibration.rungs(1000) == (250, 500, 1000)
    assert calibration.rungs(64) == (64,)


def test_every_group_gets_the_shortest_window_that_its_heads_need(tokenizer, source, tmp_path):
    """Within 100 tokens, 200 tokens and three quarters of the window back; the group that looks everywhere retrieves."""
    looks = {(0, 0): 100, (0, 1): 60, (0, 2): 30, (0, 3): 384, (1, 0): 200, (1, 1): 3, (1, 2): None, (1, 3): None}
    model = looking_back(looks)
    made = calibrate(model, tokenizer, [source], LADDER_CONFIG, LADDER)
    assert made.heads.retrieval == ((), (2, 3))
    assert made.heads.windows == ((128, 512), (256, 512))
    found = metrics_of(made)["window_ladder"]
    assert found["rungs_tokens"] == [128, 256, 512]
    assert found["local_kv_heads"] == {"128": 1, "256": 1, "512": 1}
    want = [[[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]], [[0.0, 1.0, 1.0]]]
    for layer, rows in enumerate(want):
        for kept, row in zip(found["kept_mass"][layer], rows, strict=False):
            assert kept == pytest.approx(row, abs=0.01)
    made.save(tmp_path / "artifact")
    assert Artifact.load(tmp_path / "artifact").heads == made.heads
    without = calibrate(model, tokenizer, [source], dataclasses.replace(LADDER_CONFIG, window_mass=None), LADDER)
    assert without.heads == dataclasses.replace(made.heads, windows=None)
    assert "window_ladder" not in metrics_of(without)


def test_kept_mass_is_the_share_that_a_shorter_window_leaves_of_a_local_heads_attention(model, tokenizer, source):
    tokens = documents([source], tokenizer, length_tokens=96, count=1, seed=2)[0]
    rows, seen = torch.tensor([40, 70, 95]), {}
    with torch.no_grad(), recording(model, lambda its: seen.__setitem__(its.layer, its)):
        model(tokens[None])
    got = calibration.kept_mass(attention_rows(seen[1], rows), rows, (6, 30), 3)
    age, slot = rows[:, None] - torch.arange(96), torch.arange(96)
    logits = (seen[1].q[0][:, rows] @ seen[1].k[0].repeat_interleave(2, 0).mT) * seen[1].scaling
    local = logits.masked_fill((age < 0) | ((age >= 30) & (slot >= 3)), -torch.inf).softmax(-1)
    want = (local * ((age < 6) | (slot < 3))).sum(-1).mean(-1)
    torch.testing.assert_close(got, torch.stack([want, torch.ones(4)], -1), atol=1e-5, rtol=0)


def test_the_head_and_the_length_that_keep_least_decide():
    def text(length: int, *rows: list[float]) -> DocumentScore:
        table = torch.tensor(rows)[:, :, None].expand(-1, -1, 2).clone()
        table[..., 1] = 1.0
        return dataclasses.replace(fake("text", length), kept=table)

    heads = HeadMap(query_heads=4, kv_heads=2, granularity="group", retrieval=(None, ()))
    scores = [
        text(100, [0.0] * 4, [1.0, 0.9, 1.0, 1.0]), text(100, [0.0] * 4, [1.0, 0.7, 1.0, 1.0]),
        text(200, [0.0] * 4, [1.0, 1.0, 0.95, 1.0]), fake("span", 100, 1.0),
    ]  # fmt: skip
    kept = calibration.kept_by_group(scores, heads)
    torch.testing.assert_close(kept[1], torch.tensor([[0.8, 1.0], [0.95, 1.0]]))
    for mass, windows in ((0.97, (256, 256)), (0.95, (256, 128)), (0.8, (128, 128))):
        assert calibration.with_ladder(heads, kept.double().round(decimals=6), 256, mass).windows == (None, windows)


# The check, the record, the model


def test_the_check_compares_dense_and_chosen_heads(model, tokenizer, source, monkeypatch):
    config = dataclasses.replace(CONFIG, check_samples=5)
    found = metrics_of(calibrate(model, tokenizer, [source], config, SPARSE))
    assert found["check"] == {"length_tokens": 320, "samples": 5, "dense": 1.0, "chosen_heads": 1.0}
    assert found["notes"] == []

    def wrong(model, *args, index, **kwargs):
        return fake("span", 320, effect=[[0.0, 1.0, 0.0, 0.0], [0.0] * 4])

    monkeypatch.setattr(calibration, "score_document", wrong)
    found = metrics_of(calibrate(model, tokenizer, [source], config, SPARSE))
    assert found["check"]["dense"] == 1.0
    assert found["check"]["chosen_heads"] < 0.5
    assert "lose retrieval: 100% ->" in found["notes"][0]


def test_the_check_says_when_the_dense_model_fails_itself(tokenizer, source):
    model = random_model(context=512)
    found = metrics_of(calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, check_samples=2), SPARSE))
    assert any("dense model answers only 0%" in note for note in found["notes"])


def test_what_is_recorded(model, tokenizer, source, tmp_path):
    made = calibrate(model, tokenizer, [source], CONFIG, SPARSE, model_name="owner/name", revision="abc")
    assert made.base_model == {
        "name": "owner/name",
        "revision": "abc",
        "model_type": "llama",
        "head_dim": 64,
        "fingerprint": fingerprint(model),
    }
    assert made.config == SPARSE
    assert made.indexer is None
    assert made.weights_kind is None
    stage = made.stages["calibrate"]
    assert stage["settings"]["lengths_tokens"] == (320,)
    assert stage["settings"]["retrieval_ratio"] == 0.125
    json.dumps(stage)
    made.save(tmp_path / "artifact")


def test_same_arguments_same_heads_and_scores(model, tokenizer, source):
    first, second = (metrics_of(calibrate(model, tokenizer, [source], CONFIG, SPARSE)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("scoring", ["effect", "attention"])
@pytest.mark.parametrize("how", ["as loaded", "in training", "checkpointing"])
def test_the_model_comes_back_unchanged(tokenizer, source, scoring, how):
    model = copy_model()
    if how != "as loaded":
        model.train()
        model.model.layers[0].requires_grad_(False)
    if how == "checkpointing":
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    before = everything_of(model)
    calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, scoring=scoring, check_samples=1), SPARSE)
    assert everything_of(model) == before


def test_the_model_comes_back_unchanged_after_an_error(tokenizer, source, monkeypatch):
    model = copy_model()
    before = everything_of(model)

    def fail(seen, rows):
        raise RuntimeError("no memory")

    monkeypatch.setattr(calibration, "attention_rows", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        calibrate(model, tokenizer, [source], CONFIG, SPARSE)
    assert everything_of(model) == before


def test_lengths():
    sparse = SparseConfig(window_tokens=64, sink_tokens=4)
    assert default_lengths(1024, sparse) == (256, 512, 1024)
    assert default_lengths(256, sparse) == (136, 256)  # twice window and sinks, and the context
    assert default_lengths(100, sparse) == (100,)
    assert default_lengths(131072, sparse) == (8192, 16384, 32768)


def test_wrong_lengths_are_named(model, tokenizer, source):
    def run(*lengths: int, sparse: SparseConfig = SPARSE) -> None:
        calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, lengths_tokens=lengths), sparse)

    with pytest.raises(ValueError, match="513 tokens is beyond the model's context of 512"):
        run(320, 513)
    with pytest.raises(ValueError, match=r"Documents of 68 tokens are not longer than window \+ sinks \(64 \+ 4\)"):
        run(68)
    with pytest.raises(ValueError, match="too short to repeat 48"):
        run(90)
    with pytest.raises(ValueError, match="index_dim must be at most the head dimension 64"):
        run(320, sparse=SparseConfig(window_tokens=64, index_dim=65))
    with pytest.raises(ValueError, match="not longer than window"):
        calibrate(model, tokenizer, [source], None, SparseConfig(window_tokens=512))
