"""Stage 2: the loss, the examples, teacher and student, what is saved, what is given back."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rtpurbo import distillation
from rtpurbo.attach import attached, sparsify
from rtpurbo.cache import CACHE
from rtpurbo.config import DistillConfig, IndexerConfig
from rtpurbo.data import documents
from rtpurbo.distillation import HELD_OUT_DOCUMENTS, _rose, distill, top_kl, training_batch
from rtpurbo.evals.compare import both
from rtpurbo.generate import load
from rtpurbo.indexer_training import train_indexer
from rtpurbo.questions import mixed_document
from tiny_text import artifact_for, copy_model, everything_of, random_model

LENGTH = 128
CONFIG = DistillConfig(
    steps=6, batch_size=1, length_tokens=LENGTH, labels=32, lora_rank=4, learning_rate=2e-3, save_every=2, seed=1
)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def made(model, tokenizer, source):
    """`model` after stage 1: a quarter of the heads retrieve, the window is short."""
    before = artifact_for(model, ((1,), (0,)), window_tokens=16, top_p=0.8)
    config = IndexerConfig(steps=0, length_tokens=LENGTH, queries=16, documents=4)
    return train_indexer(model, tokenizer, before, [source], config)


@pytest.fixture
def loss_inputs(monkeypatch):
    """(student logits, teacher logits) of every call of the loss in training."""
    seen = []

    def watch(student, teacher, top):
        if torch.is_grad_enabled():
            seen.append((student.detach().clone(), teacher.clone()))
        return top_kl(student, teacher, top)

    monkeypatch.setattr(distillation, "top_kl", watch)
    return seen


def tensors(artifact) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(artifact.weights_path.glob("*.safetensors")) for k, t in load_file(file).items()}


def assert_same_weights(a, b) -> None:
    got, want = tensors(a), tensors(b)
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert a.stages["distill"] == b.stages["distill"]


# The loss


def brute_force_kl(student: torch.Tensor, teacher: torch.Tensor, top: int) -> torch.Tensor:
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    out = []
    for row in range(len(p)):
        best = sorted(range(p.shape[1]), key=lambda i, row=row: -p[row, i].item())[:top]
        classes = [(p[row, i], q[row, i]) for i in best]
        classes.append((1 - sum(a for a, _ in classes), 1 - sum(b for _, b in classes)))
        out.append(sum(a * (a / b).log() for a, b in classes))
    return torch.stack(out)


def brute_force_nll(student: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of the expected token; 0 where none is."""
    chosen = student.double().log_softmax(-1)[torch.arange(len(expected)), expected.clamp(min=0)]
    return torch.where(expected < 0, 0.0, -chosen)


@pytest.mark.parametrize("top", [1, 4, 10])
def test_top_kl_and_its_gradient_against_brute_force(top):
    torch.manual_seed(0)
    teacher = 2 * torch.randn(5, 30)
    student = (teacher + torch.randn(5, 30)).requires_grad_()
    got = top_kl(student, teacher, top)
    (gradient,) = torch.autograd.grad(got.sum(), student)
    want = brute_force_kl(student, teacher, top)
    (true_gradient,) = torch.autograd.grad(want.sum(), student)
    torch.testing.assert_close(got, want.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient, true_gradient, atol=1e-5, rtol=1e-3)
    assert (got > 0).all()
    assert gradient.abs().amax() > 1e-3


def test_top_kl_knows_all_tokens_when_top_covers_the_vocabulary():
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 8), torch.randn(5, 8)
    want = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(top_kl(student, teacher, 7), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(top_kl(student, teacher, 100), want, atol=1e-5, rtol=1e-4)


def test_top_kl_is_zero_for_equal_and_finite_for_extreme_logits():
    logits = torch.tensor([[0.0, 50.0, -50.0, 1.0], [1e4, 0.0, 0.0, -1e4]], requires_grad=True)
    same = top_kl(logits, logits.detach(), 2)
    torch.testing.assert_close(same, torch.zeros(2), atol=1e-5, rtol=0)
    other = top_kl(logits, logits.detach().flip(-1), 2)
    (gradient,) = torch.autograd.grad(other.sum(), logits)
    assert other.isfinite().all()
    assert gradient.isfinite().all()


def test_top_kl_does_not_care_how_the_rest_is_spread_but_how_much_it_is():
    teacher = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0]])
    spread = torch.tensor([[4.0, 3.0, 1.0, -5.0, math.log(3 - math.e - math.exp(-5))]])
    torch.testing.assert_close(top_kl(spread, teacher, 2), torch.zeros(1), atol=1e-5, rtol=0)
    more = torch.tensor([[4.0, 3.0, 2.0, 2.0, 2.0]])
    assert top_kl(more, teacher, 2) > 0.05


# Examples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_in_pieces_have_the_same_gradients(monkeypatch, dtype):
    student, teacher = (torch.randn(37, 50).to(dtype) for _ in range(2))
    expected = torch.where(torch.rand(37) < 0.3, torch.randint(50, (37,)), -1)
    found = []
    for size in (64, 8):
        monkeypatch.setattr(distillation, "LABELS_PER_PIECE", size)
        here = student.clone().requires_grad_()
        losses = distillation.label_losses(here, teacher, expected, 10)
        (losses * torch.arange(37)).sum().backward()
        found.append((losses.detach(), here.grad))
    for whole, pieces in zip(*found, strict=True):
        assert torch.equal(whole, pieces)
    assert found[0][1].abs().sum() > 0


def training_example(document, tokenizer, config, turn, shortest_tokens):
    """The batch of one document: tokens, labels, weights."""
    tokens, labels, weights, _, _ = training_batch(
        [document], tokenizer, config, step=turn, first=turn, shortest_tokens=shortest_tokens
    )
    return tokens[0], labels, weights[0]


def test_examples_carry_questions_at_the_asked_share(tokenizer, source):
    document = documents([source], tokenizer, length_tokens=256, count=1, seed=1)[0]
    carries = []
    for ratio in (0.0, 0.5, 1.0):
        config = dataclasses.replace(CONFIG, retrieval_ratio=ratio)
        turns = [training_example(document, tokenizer, config, turn, 512)[0] for turn in range(40)]
        assert all(len(t) == 256 for t in turns)
        carries.append(sum(not torch.equal(t, document) for t in turns))
    assert carries[0] == 0
    assert 10 <= carries[1] <= 30
    assert carries[2] == 40


def test_labels_are_every_answer_and_random_places(tokenizer, source):
    document = documents([source], tokenizer, length_tokens=256, count=1, seed=1)[0]
    config = dataclasses.replace(CONFIG, retrieval_ratio=1.0)
    spread: set[int] = set()
    lists = 0
    for turn in range(20):
        tokens, labels, _ = training_example(document, tokenizer, config, turn, 512)
        _, answers, _ = mixed_document(document, tokenizer, retrieval_ratio=1.0, seed=f"{config.seed}:{turn}:0")
        places = labels.tolist()
        assert len(tokens) == 256
        assert places == sorted(set(places))
        assert set(answers) <= set(places)
        between = set(range(answers[0], 256)) - set(answers)
        assert between <= set(places)
        lists += len(between) > 1
        others = set(places) - set(answers) - between
        assert 10 <= len(others) <= 32
        assert min(places) < 64  # training must not spoil what is not sparse
        assert max(places) == 255  # what follows the last token of the answer
        spread |= others
    assert 2 <= lists < 20
    assert len([p for p in spread if p < 160]) > 60  # all over the document, not at its end only


def test_half_of_the_documents_are_cut(tokenizer, source):
    document = documents([source], tokenizer, length_tokens=640, count=1, seed=1)[0]
    config = dataclasses.replace(CONFIG, retrieval_ratio=1.0, labels=1000)
    for shortest, expected in ((128, {640, 320, 160}), (256, {640, 320, 256}), (1000, {640})):
        lengths = []
        for turn in range(60):
            tokens, labels, _ = training_example(document, tokenizer, config, turn, shortest)
            assert labels.tolist() == list(range(len(tokens)))  # the last one: what follows the answer
            lengths.append(len(tokens))
        assert set(lengths) == expected
        assert shortest == 1000 or 18 <= lengths.count(640) <= 42


def test_labels_of_a_short_document(tokenizer, source):
    document = documents([source], tokenizer, length_tokens=40, count=1, seed=1)[0]
    config = dataclasses.replace(CONFIG, retrieval_ratio=0.0, labels=1000)
    _, labels, _ = training_example(document, tokenizer, config, 0, 512)
    assert labels.tolist() == list(range(39))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_answers_share_their_weight(tokenizer, source, weight):
    document = documents([source], tokenizer, length_tokens=256, count=1, seed=1)[0]
    for ratio in (0.0, 1.0):
        config = dataclasses.replace(CONFIG, retrieval_ratio=ratio, answer_weight=weight)
        for turn in range(10):
            tokens, labels, weights = training_example(document, tokenizer, config, turn, 512)
            _, answers, _ = mixed_document(document, tokenizer, retrieval_ratio=ratio, seed=f"{config.seed}:{turn}:0")
            assert bool(answers) == bool(ratio)
            assert torch.equal(tokens, document) != bool(answers)
            is_answer = torch.isin(labels, torch.tensor(answers, dtype=torch.long))
            assert is_answer.sum() == len(answers)
            assert weights[is_answer].sum().item() == pytest.approx(weight if answers else 0.0)
            assert weights[~is_answer].sum().item() == pytest.approx(1 - weight if answers else 1.0)
            for group in (weights[is_answer], weights[~is_answer]):
                assert len(group.unique()) <= 1


def test_the_loss_is_the_weighted_sum(model, made, tokenizer, source, loss_inputs):
    config = dataclasses.replace(CONFIG, steps=1, retrieval_ratio=1.0, save_every=0)
    done = distill(model, tokenizer, made, [source], config)
    texts = documents([source], tokenizer, length_tokens=LENGTH, count=1, seed=config.seed + 1)
    _, _, weights, expected, _ = training_batch(texts, tokenizer, config, step=0, first=0, shortest_tokens=512)
    ((student, teacher),) = loss_inputs
    wrong = (expected[0] >= 0) & (teacher.argmax(-1) != expected[0])
    assert wrong.any()  # of an untrained model: answers that nobody should learn
    loss = brute_force_kl(student, teacher, 10).where((expected[0] < 0) | wrong, brute_force_nll(student, expected[0]))
    metrics = done.stages["distill"]["metrics"]
    assert metrics["loss_first"] == pytest.approx((loss * weights[0]).sum().item(), rel=1e-3)
    text = (expected[0] < 0) & (weights[0] > 0)
    assert metrics["text_kl_first"] == pytest.approx(loss[text].mean().item(), rel=1e-3)


def test_an_example_depends_on_seed_and_turn_alone(tokenizer, source):
    document = documents([source], tokenizer, length_tokens=256, count=1, seed=1)[0]

    def one(turn: int, seed: int = 1):
        return [t.tolist() for t in training_example(document, tokenizer, dataclasses.replace(CONFIG, seed=seed), turn, 512)]

    assert one(3) == one(3)
    assert one(3) != one(4)
    assert one(3) != one(3, seed=2)


# Teacher and student


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_teacher_is_dense_and_student_sparse(model, made, tokenizer, source, loss_inputs, weights):
    config = dataclasses.replace(CONFIG, weights=weights, steps=3, save_every=0)
    distill(model, tokenizer, made, [source], config)
    texts = documents([source], tokenizer, length_tokens=LENGTH, count=3, seed=config.seed + 1)
    for turn, (student, teacher) in enumerate(loss_inputs):
        tokens, labels, _ = training_example(texts[turn], tokenizer, config, turn, 512)
        with torch.no_grad():
            dense = model(tokens[None]).logits[0, labels]
            with attached(model, made.heads, made.config, made.indexer):
                sparse = model(tokens[None]).logits[0, labels]
        torch.testing.assert_close(teacher, dense, atol=1e-4, rtol=1e-4)
        assert (dense - sparse).abs().amax() > 0.5
        difference = (student - sparse).abs().amax()
        assert difference < 1e-3 if turn == 0 else difference > 1e-3  # training has moved it


@pytest.mark.parametrize(("weights", "rate"), [("lora", 1e-2), ("full", 3e-3)])
def test_training_brings_the_sparse_model_closer_on_unseen_text(model, made, tokenizer, source, tmp_path, weights, rate):
    config = dataclasses.replace(
        CONFIG, weights=weights, steps=80, learning_rate=rate, labels=100, retrieval_ratio=0.0, save_every=80
    )
    done = distill(model, tokenizer, made, [source], config, work=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    metrics = done.stages["distill"]["metrics"]
    assert metrics["loss_first"] == rows[0]["loss"]
    assert metrics["loss_last"] == pytest.approx(sum(row["loss"] for row in rows[-8:]) / 8)
    assert metrics["top1_agreement_last"] == pytest.approx(sum(row["top1_agreement"] for row in rows[-8:]) / 8)

    @torch.no_grad()
    def loss(artifact) -> float:
        total = 0.0
        with both(model, artifact) as switch:
            for tokens in documents([source], tokenizer, length_tokens=LENGTH, count=8, seed=99):
                logits = {}
                for name in ("dense", "sparse"):
                    with switch(name) as ready:
                        logits[name] = ready(tokens[None]).logits[0, 20:]
                total += top_kl(logits["sparse"], logits["dense"], 10).mean().item() / 8
        return total

    assert loss(done) < 0.9 * loss(made)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_the_index_stays_as_it_was(model, made, tokenizer, source, weights):
    before = {name: t.clone() for name, t in made.indexer.items()}
    done = distill(model, tokenizer, made, [source], dataclasses.replace(CONFIG, weights=weights))
    assert done.indexer.keys() == before.keys()
    assert all(torch.equal(done.indexer[name], before[name]) for name in before)
    assert not any("rtpurbo" in name for name in tensors(done))


def test_checkpointing_changes_nothing_but_memory(model, made, tokenizer, source, loss_inputs):
    done = [
        distill(model, tokenizer, made, [source], dataclasses.replace(CONFIG, gradient_checkpointing=on, save_every=0))
        for on in (True, False)
    ]
    half = len(loss_inputs) // 2
    for (a, _), (b, _) in zip(loss_inputs[:half], loss_inputs[half:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    for name, t in tensors(done[0]).items():
        torch.testing.assert_close(t, tensors(done[1])[name], atol=1e-3, rtol=1e-2)


def test_checkpointing_recomputes_every_layer(model, made, tokenizer, source, monkeypatch):
    runs = []
    part = model.model.layers[1].mlp
    hook = part.register_forward_pre_hook(lambda *args: runs.append(torch.is_grad_enabled()))
    try:
        for on, times in ((False, 1), (True, 2)):
            runs.clear()
            config = dataclasses.replace(CONFIG, steps=1, gradient_checkpointing=on, save_every=0)
            distill(model, tokenizer, made, [source], config)
            assert sum(runs) == times
            held_out = 2 * 2 * 1  # before and after, teacher and student, as many documents as are trained on
            assert len(runs) - sum(runs) == 1 + held_out  # the teacher
    finally:
        hook.remove()


def test_a_batch_weighs_every_document_alike(tokenizer, source):
    texts = documents([source], tokenizer, length_tokens=256, count=3, seed=1)
    config = dataclasses.replace(CONFIG, retrieval_ratio=0.5, answer_weight=0.25)
    cut = set()
    for turn in range(12):
        tokens, labels, weights, expected, ends = training_batch(
            texts, tokenizer, config, step=turn, first=7, shortest_tokens=128, dense_end_tokens=20
        )
        cut.add(tokens.shape[1])
        assert tokens.shape[0] == weights.shape[0] == 3
        assert labels.tolist() == sorted(set(labels.tolist()))
        torch.testing.assert_close(weights.sum(-1), torch.ones(3))
        for i, text in enumerate(texts):
            part = text[: tokens.shape[1]]
            row, answers, prompt = mixed_document(part, tokenizer, retrieval_ratio=0.5, seed=f"{config.seed}:{7 + i}:0")
            assert torch.equal(tokens[i], row)
            assert ends[i] == ([(prompt - 20, prompt)] if answers else [])
            assert set(answers) <= set(labels.tolist())
            alone = training_batch([text], tokenizer, config, step=turn, first=7 + i, shortest_tokens=128)
            mine = weights[i] > 0
            assert torch.equal(labels[mine], alone[1])
            torch.testing.assert_close(weights[i][mine], alone[2][0])
            is_answer = torch.isin(labels, torch.tensor(answers, dtype=torch.long))
            following = torch.cat([row, row.new_zeros(1)])[labels + 1]
            assert torch.equal(expected[i], following.where(is_answer, -1))
            mine = weights[i][is_answer]
            assert mine.sum().item() == pytest.approx(0.25 if answers else 0.0)
    assert cut == {256, 128}


def test_pieces_of_a_document_have_questions_of_their_own(tokenizer, source):
    text = documents([source], tokenizer, length_tokens=2048, count=1, seed=1)[0]
    config = dataclasses.replace(CONFIG, retrieval_ratio=1.0)
    starts = set()
    for turn in range(40):
        tokens, labels, _, expected, questions = training_batch(
            [text], tokenizer, config, step=0, first=turn, shortest_tokens=2048, dense_end_tokens=600
        )
        answers = labels[expected[0] >= 0]
        assert {stop - 1 for _, stop in questions[0]} <= set(answers.tolist()) - {int(t) + 1 for t in answers}
        assert torch.equal(tokens[0, answers + 1], expected[0][expected[0] >= 0])
        ends = {int(t) + 2 for t in answers if t + 2 == 2048 or int(t) + 1 not in answers.tolist()}
        asked = [size for size in (2048, 1024, 512) if set(range(size, 2049, size)) <= ends]
        assert asked
        begins = range(0, 2048, asked[-1])
        assert [first for first, _ in questions[0]] == [
            max(begin, stop - 600) for begin, (_, stop) in zip(begins, questions[0], strict=True)
        ]
        after = [begin + asked[-1] - stop for begin, (_, stop) in zip(begins, questions[0], strict=True)]
        assert all(0 < tokens_left < 256 for tokens_left in after)  # a piece's own answers, not those of an example before
        starts.add(asked[-1])
    assert starts == {512, 1024, 2048}


@pytest.mark.parametrize("dense_end_tokens", [0, 20])
def test_a_batch_of_two_is_the_mean_of_its_documents(model, made, tokenizer, source, loss_inputs, dense_end_tokens):
    """A question's end is read as generation reads it: as the end of a prompt, with a cache."""
    config = dataclasses.replace(CONFIG, steps=1, batch_size=2, save_every=0, retrieval_ratio=1.0, answer_weight=0.5)
    made = dataclasses.replace(made, config=made.config.with_options(dense_end_tokens=dense_end_tokens))
    both = distill(model, tokenizer, made, [source], config).stages["distill"]["metrics"]
    texts = documents([source], tokenizer, length_tokens=LENGTH, count=2, seed=config.seed + 1)
    tokens, labels, weights, expected, ends = training_batch(
        texts, tokenizer, config, step=0, first=0, shortest_tokens=512, dense_end_tokens=20
    )
    means = []
    with torch.no_grad():
        for row, weight, answer, ((first, end),) in zip(tokens, weights, expected, ends, strict=True):
            dense = model(row[None]).logits[0, labels]
            cache = DynamicCache(config=model.config)
            with attached(model, made.heads, made.config, made.indexer):
                assert first == end - 20
                parts = row[None].tensor_split([end, end + 1], 1)
                sparse = torch.cat([model(part, **{CACHE: cache}).logits[0] for part in parts if part.shape[1]])[labels]
            known = (answer >= 0) & (dense.argmax(-1) == answer)
            loss = brute_force_nll(sparse, answer).where(known, brute_force_kl(sparse, dense, 10))
            means.append((loss * weight).sum().item())
    assert both["loss_first"] == pytest.approx(sum(means) / 2, rel=1e-3)


def test_ends_are_read_again_as_they_were(model, made, tokenizer, source):
    """Where activations are computed anew in the backward pass."""
    made = dataclasses.replace(made, config=made.config.with_options(dense_end_tokens=20))
    config = dataclasses.replace(CONFIG, steps=3, batch_size=2, save_every=0, retrieval_ratio=1.0, answer_weight=0.5)
    again = distill(model, tokenizer, made, [source], config)
    kept = distill(model, tokenizer, made, [source], dataclasses.replace(config, gradient_checkpointing=False))
    for name, tensor in tensors(kept).items():
        torch.testing.assert_close(tensors(again)[name], tensor)
    sparsely = dataclasses.replace(made, config=made.config.with_options(dense_end_tokens=0))
    other = distill(model, tokenizer, sparsely, [source], config)
    assert again.stages["distill"]["metrics"]["loss_first"] != other.stages["distill"]["metrics"]["loss_first"]


def test_harm_is_noted(model, made, tokenizer, source):
    good = dataclasses.replace(CONFIG, steps=60, learning_rate=1e-2, labels=100, retrieval_ratio=0.0, save_every=0)
    metrics = distill(model, tokenizer, made, [source], good).stages["distill"]["metrics"]
    assert metrics["held_out_loss_after"] < metrics["held_out_loss_before"]
    assert metrics["notes"] == []
    bad = dataclasses.replace(good, steps=20, learning_rate=0.5)
    metrics = distill(model, tokenizer, made, [source], bad).stages["distill"]["metrics"]
    assert metrics["held_out_loss_after"] > metrics["held_out_loss_before"]
    assert metrics["held_out_text_kl_after"] > metrics["held_out_text_kl_before"]
    assert [note.split(" on held-out")[0] for note in metrics["notes"]] == [
        "Distillation did harm: loss against the dense model", "Distillation did harm: KL from the dense model in text",
    ]  # fmt: skip


def test_harm_is_what_goes_beyond_chance():
    assert _rose([1.0], [1.01])
    assert not _rose([1.0], [1.0])
    assert _rose([1.0, 2.0, 3.0, 4.0], [1.1, 2.1, 3.1, 4.2])
    assert not _rose([1.0, 2.0, 3.0, 4.0], [1.5, 1.7, 3.4, 4.0])  # 0.15 with a standard error of 0.18
    assert not _rose([1.0, 2.0], [0.9, 1.9])


def test_every_source_has_a_judge(model, made, tokenizer, source, monkeypatch):
    """Documents beside those that are trained on, of all sources, and no more than those."""
    asked = []

    def counted(sources: list[str], *args: object, count: int, **settings: object) -> list[torch.Tensor]:
        asked.append(count)
        return documents(sources, *args, count=count, **settings)

    monkeypatch.setattr("rtpurbo.distillation.documents", counted)
    config = dataclasses.replace(CONFIG, steps=12, save_every=0)
    for some, judges in (([source], HELD_OUT_DOCUMENTS), ([source] * 10, 10), ([source] * 20, 12)):
        distill(model, tokenizer, made, some, config)
        assert asked.pop() == 12 + judges
    assert HELD_OUT_DOCUMENTS == 8


@pytest.mark.parametrize(("share", "layers"), [(1.0, {"0", "1"}), (0.5, {"0"}), (0.4, {"0"}), (0.6, {"0", "1"})])
def test_an_adapter_can_leave_later_layers_alone(model, made, tokenizer, source, share, layers):
    config = dataclasses.replace(CONFIG, steps=1, lora_layers=share, save_every=0)
    done = distill(model, tokenizer, made, [source], config)
    names = list(tensors(done))
    assert {name.split(".layers.")[1].split(".")[0] for name in names} == layers
    assert len(names) == len(layers) * 5 * 2  # A and B of five projections


# What is saved


def test_the_saved_adapter_is_what_was_trained(model, made, tokenizer, source, tmp_path, loss_inputs):
    work, output = tmp_path / "work", tmp_path / "artifact"
    done = distill(model, tokenizer, made, [source], CONFIG, work=work)
    assert {p.name for p in done.weights_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    state = load_file(work / "state.safetensors")
    saved = tensors(done)
    assert len(saved) == 2 * 5 * 2  # A and B of five projections in two layers
    for name, t in saved.items():
        trained = state[f"parameter.{name.replace('.weight', '.default.weight')}"]
        assert t.dtype == torch.bfloat16
        assert torch.equal(t, trained.bfloat16())
    done.save(output)
    ids = documents([source], tokenizer, length_tokens=LENGTH, count=1, seed=4)[0][None]
    with torch.no_grad(), sparsify(model, str(output)) as sparse:
        adapted = sparse(ids).logits
    with torch.no_grad(), sparsify(model, made) as sparse:
        plain = sparse(ids).logits
    assert (adapted - plain).abs().amax() > 0.01


def test_the_saved_full_model_stands_alone(model, made, tokenizer, source, tmp_path):
    config = dataclasses.replace(CONFIG, weights="full")
    done = distill(model, tokenizer, made, [source], config, work=tmp_path / "work")
    done.save(tmp_path / "artifact")
    got = json.loads(next((tmp_path / "artifact").glob("full.*/config.json")).read_text())
    assert "rtpurbo" not in json.dumps(got)
    sparse, own_tokenizer = load(tmp_path / "artifact")
    assert own_tokenizer("good day").input_ids == tokenizer("good day").input_ids
    state = load_file(tmp_path / "work" / "state.safetensors")
    trained = {name: p for name, p in sparse.named_parameters() if "rtpurbo" not in name}
    assert trained.keys() == dict(model.named_parameters()).keys()
    for name, p in trained.items():
        assert torch.equal(p, state[f"parameter.{name}"].bfloat16().float()), name
        assert not torch.equal(p, model.get_parameter(name)), name


def test_a_tied_model_is_saved_whole(tokenizer, source, tmp_path):
    model = random_model(tie_word_embeddings=True)
    made = artifact_for(model, ((1,), (0,)), window_tokens=16)
    made = train_indexer(model, tokenizer, made, [source], IndexerConfig(steps=0, length_tokens=LENGTH, documents=2))
    config = dataclasses.replace(CONFIG, weights="full", steps=2)
    done = distill(model, tokenizer, made, [source], config, work=tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(done.weights_path, dtype=torch.float32)
    AutoTokenizer.from_pretrained(done.weights_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    trained = load_file(tmp_path / "state.safetensors")["parameter.model.embed_tokens.weight"]
    assert torch.equal(loaded.lm_head.weight, trained.bfloat16().float())


# Resuming


class Killed(Exception):
    pass


@pytest.mark.parametrize(("weights", "kill_at"), [("lora", 1), ("lora", 5), ("full", 3)])
def test_resume_is_bitwise_the_same(model, made, tokenizer, source, tmp_path, monkeypatch, weights, kill_at):
    config = dataclasses.replace(CONFIG, weights=weights)
    want = distill(model, tokenizer, made, [source], config)
    calls = []

    def counting(*args):
        calls.extend([1] * torch.is_grad_enabled())  # not the held-out documents
        return top_kl(*args)

    def killing(*args):
        calls.extend([1] * torch.is_grad_enabled())
        if len(calls) > kill_at:
            raise Killed
        return top_kl(*args)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "top_kl", killing)
        with pytest.raises(Killed):
            distill(model, tokenizer, made, [source], config, work=tmp_path)
    calls.clear()
    monkeypatch.setattr(distillation, "top_kl", counting)
    got = distill(model, tokenizer, made, [source], config, work=tmp_path)
    assert len(calls) == config.steps - kill_at // 2 * 2
    assert_same_weights(got, want)


def test_another_index_starts_anew(model, made, tokenizer, source, tmp_path):
    distill(model, tokenizer, made, [source], CONFIG, work=tmp_path)
    other = dataclasses.replace(made, indexer={name: -2 * t for name, t in made.indexer.items()})
    got = distill(model, tokenizer, other, [source], CONFIG, work=tmp_path)
    assert_same_weights(got, distill(model, tokenizer, other, [source], CONFIG))


# What is given back


@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("how", ["as loaded", "in training", "checkpointing"])
def test_the_model_comes_back_unchanged(tokenizer, source, weights, how):
    model = copy_model(noise=0.02)
    made = artifact_for(model)
    made = train_indexer(model, tokenizer, made, [source], IndexerConfig(steps=0, length_tokens=LENGTH, documents=2))
    if how != "as loaded":
        model.train()
        model.model.layers[0].requires_grad_(False)
    if how == "checkpointing":
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    before = everything_of(model)
    distill(model, tokenizer, made, [source], dataclasses.replace(CONFIG, weights=weights, steps=2))
    assert everything_of(model) == before


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_nan_names_the_step_and_gives_the_model_back(made, tokenizer, source, tmp_path, monkeypatch, weights):
    model = random_model()
    before, calls = everything_of(model), []

    def bad(student, teacher, top):
        calls.extend([1] * torch.is_grad_enabled())
        return top_kl(student, teacher, top) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(distillation, "top_kl", bad)
    with pytest.raises(ValueError, match=r"Stage 2.*nan.*step 3; the state after step 2 is kept"):
        distill(model, tokenizer, made, [source], dataclasses.replace(CONFIG, weights=weights), work=tmp_path)
    assert everything_of(model) == before
    assert all(t.isfinite().all() for t in load_file(tmp_path / "state.safetensors").values())


def test_no_steps(model, made, tokenizer, source):
    done = distill(model, tokenizer, made, [source], dataclasses.replace(CONFIG, steps=0))
    assert done.stages["distill"]["metrics"] == {}
    assert all((t == 0).all() for name, t in tensors(done).items() if "lora_B" in name)


def test_wrong_inputs_are_named(model, made, tokenizer, source):
    with pytest.raises(ValueError, match="no indexer yet"):
        distill(model, tokenizer, artifact_for(model), [source], CONFIG)
    other = dataclasses.replace(made, base_model={**made.base_model, "fingerprint": "0" * 64})
    with pytest.raises(ValueError, match="made for other weights"):
        distill(model, tokenizer, other, [source], CONFIG)
    with pytest.raises(ValueError, match="beyond the model's context"):
        distill(model, tokenizer, made, [source], dataclasses.replace(CONFIG, length_tokens=513))
    with pytest.raises(ValueError, match=r"not longer than window \+ sinks"):
        distill(model, tokenizer, made, [source], dataclasses.replace(CONFIG, length_tokens=20))
    with pytest.raises(ValueError, match="60 tokens is too short for a 'multi_query' question"):
        distill(model, tokenizer, made, [source], dataclasses.replace(CONFIG, length_tokens=60, retrieval_ratio=0.01))
