"""Finding retrieval heads: a head that is known to retrieve must be found, and gradients be what gates really do."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from rtpurbo import calibration
from rtpurbo.attach import recording
from rtpurbo.calibration import (
    DocumentScore,
    Task,
    attention_rows,
    calibrate,
    gate_gradient,
    make_task,
    needle_score,
    score_document,
)
from rtpurbo.checkpoint import Artifact
from rtpurbo.config import CalibrateConfig, SparseConfig, default_lengths
from rtpurbo.data import documents
from rtpurbo.gates import Gates, within_budget
from rtpurbo.heads import HeadMap
from rtpurbo.models import fingerprint
from rtpurbo.questions import training_sample
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


@pytest.mark.parametrize("scoring", ["gates", "needle"])
def test_the_head_that_retrieves_is_found(model, tokenizer, source, scoring):
    made = calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, scoring=scoring), SPARSE)
    layer, head = RETRIEVAL_HEAD
    assert made.heads.retrieval == ((), (head,))
    scores = metrics_of(made)["scores"]
    assert scores[layer][head] == 1.0
    others = sorted(s for i, row in enumerate(scores) for h, s in enumerate(row) if (i, h) != (layer, head))
    assert others[-1] < 0.5


def test_group_granularity_takes_the_whole_group(model, tokenizer, source):
    config = dataclasses.replace(CONFIG, granularity="group", retrieval_ratio=0.25)
    made = calibrate(model, tokenizer, [source], config, SPARSE)
    assert made.heads.granularity == "group"
    assert made.heads.retrieval == ((), (2, 3))
    assert metrics_of(made)["full_kv_ratio"] == 0.25
    assert metrics_of(made)["retrieval_head_ratio"] == 0.25


def test_threshold_instead_of_a_share(model, tokenizer, source):
    config = dataclasses.replace(CONFIG, threshold=0.9)
    assert calibrate(model, tokenizer, [source], config, SPARSE).heads.retrieval == ((), (2,))
    everything = calibrate(model, tokenizer, [source], dataclasses.replace(config, threshold=0.0), SPARSE)
    assert everything.heads.ratio == 1.0


def test_ratio_counts_heads_of_the_whole_model(model, tokenizer, source):
    for ratio, count in ((0.125, 1), (0.25, 2), (0.5, 4), (1.0, 8), (0.01, 1)):
        made = calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, retrieval_ratio=ratio), SPARSE)
        assert sum(len(heads) for heads in made.heads.retrieval) == count
        assert 2 in made.heads.retrieval[1]


# Documents and gradients


def naive(seen, *, local: bool) -> torch.Tensor:
    """Window and sink attention, or full attention, with a full mask: [Hq, N, D]."""
    size = seen.q.shape[1] // seen.k.shape[1]
    k, v = (x[0].repeat_interleave(size, 0) for x in (seen.k, seen.v))
    places = torch.arange(k.shape[1])
    age = places[:, None] - places
    keep = (age >= 0) & ((age < SPARSE.window_tokens) | (places < SPARSE.sink_tokens) | (not local))
    return ((seen.q[0] @ k.transpose(-1, -2)) * seen.scaling).masked_fill(~keep, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("gates", ["open", "some", "between"])
def test_the_gradient_is_the_slope_of_the_loss(tokenizer, source, gates):
    """Central differences: one gate after the other is moved a little, and the rest of the model runs on."""
    some = {"open": [1.0] * 4, "some": [1.0, 0.0, 0.0, 1.0], "between": [0.9, 0.1, 0.5, 0.0]}[gates]
    at = torch.tensor([some, some[::-1], some], dtype=torch.float64)
    model = random_model(layers=3, context=256, seed=3).double()
    tokens = documents([source], tokenizer, length_tokens=120, count=1, seed=2)[0]
    positions = torch.tensor([70, 90, 100, 118])

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, tokens[positions + 1])

    got = gate_gradient(model, tokens, positions, SPARSE, at, loss_of)
    attentions = [layer.self_attn for layer in model.model.layers]

    @torch.no_grad()
    def loss(values: torch.Tensor) -> float:
        mixed = {}

        def watch(seen):
            full, local = (naive(seen, local=which) for which in (False, True))  # [Hq, N, D]
            gate = values[seen.layer][:, None, None]
            mixed[seen.layer] = (gate * full + (1 - gate) * local).transpose(0, 1).flatten(1)[None]

        hooks = [
            module.o_proj.register_forward_pre_hook(lambda module, args, layer=layer: (mixed[layer],))
            for layer, module in enumerate(attentions)
        ]
        with recording(model, watch):
            found = loss_of(model(tokens[None]).logits[0, positions]).item()
        for hook in hooks:
            hook.remove()
        return found

    step = 1e-2  # RMSNorm computes in float32: smaller steps drown in its rounding
    for layer in range(3):
        for head in range(4):
            moved = torch.zeros(3, 4, dtype=torch.float64)
            moved[layer, head] = step
            slope = (loss(at + moved) - loss(at - moved)) / (2 * step)
            assert got[layer, head].item() == pytest.approx(slope, rel=2e-3, abs=1e-4)
    assert got.abs().amin() > 1e-3
    assert not attentions[0].o_proj._forward_pre_hooks


def test_the_loss_falls_where_the_far_head_is_full(model, tokenizer, source):
    """Without it the answers are lost; heads 1 and 2 of layer 0 are all that it lives on, but a window serves them."""
    texts = documents([source], tokenizer, length_tokens=320, count=2, seed=0)
    before = everything_of(model)
    for kind in ("span", "single"):
        task = make_task(*texts, tokenizer, SPARSE, kind=kind, span_tokens=48, seed="1")
        score = score_document(model, task, SPARSE, CONFIG, torch.full((2, 4), 0.5))
        assert everything_of(model) == before
        assert score.right > 0.5
        sizes = score.gradient.abs()
        assert score.gradient[RETRIEVAL_HEAD] == -sizes.max()
        assert sizes.max() > 10 * sizes.flatten().sort().values[-2]
        assert sizes.max() > 100 * sizes[0, 1:3].max()


@torch.no_grad()
def test_what_counts_in_a_document_of_questions(model, tokenizer, source, monkeypatch):
    """Answers' tokens that the dense model gives, and its next tokens elsewhere; in little room fewer are asked."""
    asked, counted = [], []

    def ask(*args, **settings):
        asked.append(training_sample(*args, **settings))
        return asked[-1]

    def gradient(model, tokens, positions, sparse, gates, loss):
        counted.append((positions, loss))
        return torch.zeros(2, 4)

    monkeypatch.setattr(calibration, "training_sample", ask)
    monkeypatch.setattr(calibration, "gate_gradient", gradient)
    for length, questions in ((400, 5), (60, 1)):
        texts = documents([source], tokenizer, length_tokens=length, count=2, seed=0)
        task = make_task(*texts, tokenizer, SPARSE, kind="single", span_tokens=48, seed="c")
        score = score_document(model, task, SPARSE, CONFIG)
        sample, (positions, loss) = asked.pop(), counted.pop()
        assert score.kind == sample.kind == "single"
        assert len(sample.answers) == questions
        logits = model(sample.tokens[None]).logits[0]
        right = [t for t in sample.label_positions if logits[t].argmax() == sample.tokens[t + 1]]
        assert score.right == pytest.approx(len(right) / len(sample.label_positions))
        assert score.right > 0.5
        rest = positions[len(sample.label_positions) :].tolist()
        assert positions.tolist() == sample.label_positions + rest
        assert rest == (sorted({*range(68, length - 1)} - {*sample.label_positions}) or [58])
        want = sample.tokens[torch.tensor(right) + 1][:, None]
        expected = (logits[right].logsumexp(-1) - logits[right].gather(1, want)[:, 0]).mean()
        torch.testing.assert_close(loss(logits[positions]), expected)
        student = logits[positions].clone()
        student[len(sample.label_positions) :] /= 2
        halved = torch.distributions.Categorical(logits=logits[rest] / 2)
        kl = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logits[rest]), halved).mean()
        torch.testing.assert_close(loss(student), expected + 10 * kl)


def test_both_spans_are_there_and_the_earlier_one_lies_outside_the_laters_window(tokenizer, source):
    texts = documents([source], tokenizer, length_tokens=320, count=2, seed=0)
    for seed in range(20):
        task = make_task(*texts, tokenizer, SPARSE, kind="span", span_tokens=48, seed=str(seed))
        assert torch.equal(task.tokens[task.early : task.early + 48], task.tokens[-48:])
        assert task.early + 48 <= 320 - 48 - SPARSE.window_tokens
        assert task.answers.tolist() == list(range(320 - 48 + 4, 319))
        assert task.text.tolist() == list(range(68, 320 - 48 - 1))
        assert task.positions.tolist() == task.answers.tolist() + task.text.tolist()


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


def test_needle_score_by_hand(model, tokenizer, source):
    """The far head puts nearly all of a repeated span's attention on the early span."""
    texts = documents([source], tokenizer, length_tokens=320, count=2, seed=0)

    def score(kind: str) -> DocumentScore:
        task = make_task(*texts, tokenizer, SPARSE, kind=kind, span_tokens=48, seed="0")
        return score_document(model, task, SPARSE, dataclasses.replace(CONFIG, scoring="needle"))

    span = score("span")
    assert span.kind == "span"
    assert span.needle[RETRIEVAL_HEAD] > 0.9
    assert span.needle[0, 1:3].max() < 1e-3  # one and two tokens back
    assert span.right > 0.8
    assert (score("single").needle == 0).all()


def test_scoring_by_needle_needs_no_gradients(model, tokenizer, source, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(calibration, "gate_gradient", refuse)
    calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, scoring="needle"), SPARSE)


# Gates


def test_a_budget_is_kept_by_the_nearest_point():
    values = torch.tensor([0.9, 0.5, 0.4, -0.3, 1.2])
    assert torch.equal(within_budget(values, 5.0), values.clamp(0, 1))
    got = within_budget(values, 1.5)
    assert got.sum().item() == pytest.approx(1.5, abs=1e-5)
    shift = (values - got)[(got > 0) & (got < 1)]
    torch.testing.assert_close(shift, shift[:1].expand_as(shift))  # all that are between lose the same
    assert got[3] == 0


def test_gates_keep_what_counts_within_the_budget():
    gates = Gates([True, False, True], 4, 1, ratio=0.25, steps=20)
    cost = torch.tensor([[5.0, 1.0, 0.0, 0.0], [9.0] * 4, [0.1, 0.0, 0.0, 0.0]])
    assert gates.values.tolist() == [[1.0] * 4, [0.0] * 4, [1.0] * 4]
    sums = []
    for _ in range(20):
        gates.step(-cost)
        sums.append(gates.values.sum().item())
    assert sums == sorted(sums, reverse=True)
    assert sums[11:] == pytest.approx([2.0] * 9, abs=1e-4)  # a quarter of eight, from three fifths of the steps on
    assert gates.values[0, :2].tolist() == pytest.approx([1.0, 1.0], abs=0.05)
    assert gates.values[1].tolist() == [0.0] * 4
    order = gates.score.flatten().argsort(descending=True)[:3].tolist()
    assert sorted(order) == [0, 1, 8]  # the weakest of the three is closed, but closed last


def test_heads_of_a_unit_share_a_gate():
    gates = Gates([True], 4, 2, ratio=0.5, steps=4)
    for _ in range(4):
        gates.step(torch.tensor([[1.0, 1.0, -3.0, 1.0]]))
    assert gates.values.tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_a_head_that_stands_in_for_another_is_not_kept_beside_it():
    """Two heads that do the same cost little while the other is open; where there is room for two, one of them stays."""
    gates = Gates([True], 4, 1, ratio=0.5, steps=40)
    for _ in range(40):
        at = gates.values[0].clone().requires_grad_(True)
        (1 - torch.maximum(at[0], 0.95 * at[1]) + 0.1 * (1 - at[2])).backward()
        gates.step(at.grad[None])
    assert gates.values[0].tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0], abs=0.1)


def test_gates_need_no_more_than_the_model_does_itself(tokenizer, source):
    """A model that knows nothing gives no answers: the text alone decides, and nothing fails."""
    config = dataclasses.replace(CONFIG, documents=6)
    made = calibrate(random_model(context=512), tokenizer, [source], config, SPARSE)
    assert sum(map(len, made.heads.retrieval)) == 1
    assert metrics_of(made)["usable_lengths_tokens"] == []
    assert "cannot copy a repeated span at any" in metrics_of(made)["notes"][0]
    with pytest.raises(ValueError, match=r"cannot copy a repeated span at 320 tokens.*scoring='needle'"):
        calibrate(random_model(context=512), tokenizer, [source], dataclasses.replace(CONFIG, scoring="needle"), SPARSE)


# From scores to heads


def fake(kind: str, length: int, needle: list[list[float]] | None = None, *, right: float = 1.0) -> DocumentScore:
    return DocumentScore(kind, length, right, torch.tensor(needle or [[0.0] * 4] * 2))


def test_needle_scores_to_heads_by_hand():
    scores = [
        fake("span", 100, [[0.2, 0.0, 0.0, 0.0], [0.0, 0.6, 0.0, 0.0]]),
        fake("span", 200, [[0.3, 0.0, 0.0, 0.0], [0.0, 0.2, 0.0, 0.0]]),
        fake("span", 200, [[0.0, 0.0, 0.0, 9.0], [0.0, 0.0, 0.0, 0.0]], right=0.2),  # not copied
        fake("single", 100), fake("chain", 100),
    ]  # fmt: skip
    torch.testing.assert_close(needle_score(scores), torch.tensor([[0.625, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(needle_score(scores, 2), torch.tensor([[0.625, 0.625, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]))
    assert needle_score(scores[2:]).tolist() == [[0.0] * 4] * 2


def tasks_seen(monkeypatch, score) -> list[tuple[str, int, int, torch.Tensor]]:
    """(kind, length, seed, document) of every task; documents are scored by `score(kind, length, seed)` instead."""
    seen = []

    def make(document, other, tokenizer, sparse, *, kind, span_tokens, seed):
        seen.append((kind, len(document), int(seed.split(":")[0]), document))
        none = torch.tensor([], dtype=torch.long)
        return Task(kind, document, none, none)

    monkeypatch.setattr(calibration, "make_task", make)
    monkeypatch.setattr(calibration, "score_document", lambda *args: score(*seen[-1][:3]))
    return seen


def test_every_length_meets_every_kind_of_question_and_begins_with_another(model, tokenizer, source, monkeypatch):
    seen = tasks_seen(monkeypatch, lambda kind, length, seed: fake(kind, length, [[1.0] * 4] * 2))
    config = dataclasses.replace(CONFIG, scoring="needle", documents=18, lengths_tokens=(200, 320))
    calibrate(model, tokenizer, [source], config, SPARSE)
    order = ("single", "many_values", "chain", "many_keys", "many_queries")
    for length, first in ((200, 0), (320, 2)):
        for draw in (0, 1):
            kinds = [kind for kind, n, _, _ in seen if n == length][draw::2]
            assert kinds[::3] == ["span"] * len(kinds[::3])
            turning = [*order[first:], *order, *order]
            asked = [kind for kind in kinds if kind != "span"]
            assert asked == turning[: len(asked)]
            assert set(asked) == set(order)


def test_gates_of_a_draw_move_with_its_documents(model, tokenizer, source, monkeypatch):
    """One draw's documents want head 2, the other's head 3 of layer 1; the budget leaves two of eight to each draw."""
    seen = []

    def gradient(model, tokens, positions, sparse, gates, loss):
        wanted = 2 + len(seen) % 2
        seen.append((wanted, gates))
        slope = torch.zeros(2, 4)
        slope[1, wanted] = -1.0
        return slope

    monkeypatch.setattr(calibration, "gate_gradient", gradient)
    made = calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, documents=12, retrieval_ratio=0.25), SPARSE)
    assert made.heads.retrieval == ((), (2, 3))
    for wanted in (2, 3):
        sums = [gates.sum().item() for head, gates in seen if head == wanted]
        assert sums[0] == 8.0
        assert sums == sorted(sums, reverse=True)
        assert sums[-1] == pytest.approx(2.0, abs=1e-4)
    metrics = metrics_of(made)
    assert metrics["scores"][1][2] > metrics["scores"][1][1]


def test_spans_that_the_model_cannot_copy_are_left_out(model, tokenizer, source, monkeypatch):
    good, bad = [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]

    def score(kind: str, length: int, seed: int) -> DocumentScore:
        easy = length == 120
        return fake(kind, length, good if easy else bad, right=0.9 if easy else 0.1)

    tasks_seen(monkeypatch, score)
    config = dataclasses.replace(CONFIG, scoring="needle", lengths_tokens=(120, 160))
    made = calibrate(model, tokenizer, [source], config, SPARSE)
    assert made.heads.retrieval == ((), (2,))
    found = metrics_of(made)
    assert found["usable_lengths_tokens"] == [120]
    assert found["copy_accuracy"] == {"120": 0.9, "160": 0.1}
    assert found["notes"] == []


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("scoring", ["gates", "needle"])
def test_any_number_of_documents(model, tokenizer, source, count, scoring):
    made = calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, documents=count, scoring=scoring), SPARSE)
    assert made.heads.retrieval == ((), (2,))
    assert metrics_of(made).get("overlap_between_seeds") == (None if count < 6 else 1.0)


@pytest.mark.parametrize("count", [6, 7, 9])
def test_the_overlap_is_that_of_two_seeds(model, tokenizer, source, monkeypatch, count):
    """Half of the documents, of every kind and length, come from another seed, which here moves one of the two heads."""

    def score(kind: str, length: int, seed: int) -> DocumentScore:
        needle = [[0.0, 1.0, 0.0, 0.0], [0.0] * 4]
        needle[1][2 if seed == 7 else 3] = 0.9
        return fake(kind, length, needle)

    seen = tasks_seen(monkeypatch, score)
    config = dataclasses.replace(
        CONFIG, scoring="needle", documents=count, lengths_tokens=(200, 320), retrieval_ratio=0.25, seed=7
    )
    assert metrics_of(calibrate(model, tokenizer, [source], config, SPARSE))["overlap_between_seeds"] == 0.5
    by_seed = {}
    for kind, length, seed, document in seen:
        by_seed.setdefault(seed, []).append(("question" if kind in calibration.QUESTIONS else kind, length))
        drawn = documents([source], tokenizer, length_tokens=length, count=-(-count // 2) + 1, seed=seed)
        assert any(torch.equal(document, text) for text in drawn)
    first, second = by_seed[7], by_seed[7 + calibration.OTHER_SEED]
    assert set(first) == set(second) == {(kind, length) for kind in ("span", "question") for length in (200, 320)}
    assert len(first) - len(second) == 2 * (count % 2)


# The window ladder

LADDER = SparseConfig(window_tokens=512, sink_tokens=4, index_dim=16)
LADDER_CONFIG = CalibrateConfig(
    lengths_tokens=(700, 1000), documents=3, retrieval_ratio=0.25, check_samples=0, window_mass=0.99
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
    def document(length: int, *rows: list[float]) -> DocumentScore:
        table = torch.tensor(rows)[:, :, None].expand(-1, -1, 2).clone()
        table[..., 1] = 1.0
        return dataclasses.replace(fake("single", length), kept=table)

    heads = HeadMap(query_heads=4, kv_heads=2, granularity="group", retrieval=(None, ()))
    scores = [
        document(100, [0.0] * 4, [1.0, 0.9, 1.0, 1.0]), document(100, [0.0] * 4, [1.0, 0.7, 1.0, 1.0]),
        document(200, [0.0] * 4, [1.0, 1.0, 0.95, 1.0]),
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

    wrong = [[0.0, 1.0, 0.0, 0.0], [0.0] * 4]
    tasks_seen(monkeypatch, lambda kind, length, seed: fake(kind, length, wrong))
    config = dataclasses.replace(config, scoring="needle")
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


@pytest.mark.parametrize("scoring", ["gates", "needle"])
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


@pytest.mark.parametrize(
    ("scoring", "part"), [("gates", "gates.window_attention"), ("needle", "calibration.attention_rows")]
)
def test_the_model_comes_back_unchanged_after_an_error(tokenizer, source, monkeypatch, scoring, part):
    model = copy_model()
    before = everything_of(model)

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(f"rtpurbo.{part}", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        calibrate(model, tokenizer, [source], dataclasses.replace(CONFIG, scoring=scoring), SPARSE)
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
