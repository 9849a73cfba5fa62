"""Short context: the third model of the comparison, losses on short documents, and SQuAD's questions."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from rtpurbo.attach import with_adapter
from rtpurbo.config import DistillConfig, EvalConfig, IndexerConfig
from rtpurbo.data import documents
from rtpurbo.distillation import distill
from rtpurbo.evals import evaluate, short_context
from rtpurbo.evals.compare import both
from rtpurbo.evals.short_context import (
    REPLY_TOKENS,
    Question,
    compare_short,
    contains,
    draw_questions,
    read_squad,
    replies,
    token_f1,
)
from rtpurbo.indexer_training import train_indexer
from rtpurbo.models import load_model
from tiny_text import artifact_for, copy_model, everything_of, prose, random_model, word_tokenizer

ONLY_SHORT = {"samples": (0,), "loss_documents": 0, "fidelity_documents": 0, "decode_tokens": 0}


def distilled(model, tokenizer, source, work, kind):
    """An artefact of `model` with a window of 16 tokens whose second stage moved its weights far."""
    made = artifact_for(model, ((1,), (0,)), window_tokens=16)
    made = train_indexer(model, tokenizer, made, [source], IndexerConfig(steps=0, length_tokens=128, documents=2))
    config = DistillConfig(
        weights=kind, steps=5, batch_size=1, length_tokens=128, labels=20, learning_rate=1e-2, save_every=0
    )
    return distill(model, tokenizer, made, [source], config, work=work)


def squad_file(folder, paragraphs) -> str:
    """A SQuAD file of (paragraph, [(question, answers, is_impossible)])."""
    rows = [
        {
            "context": text,
            "qas": [
                {"question": q, "id": "x", "is_impossible": no, "answers": [{"text": a, "answer_start": 0} for a in answers]}
                for q, answers, no in questions
            ],
        }
        for text, questions in paragraphs
    ]
    file = folder / "squad.json"
    file.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": rows}]}))
    return str(file)


# The third model


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_weights_are_the_distilled_ones_with_dense_attention(tokenizer, source, tmp_path, kind):
    model = random_model()
    made = distilled(model, tokenizer, source, tmp_path, kind)
    before = everything_of(model)
    ids = documents([source], tokenizer, length_tokens=128, count=1, seed=4)[0][None]
    got = {}
    with torch.no_grad(), both(model, made) as switch:
        for name in ("weights", "dense", "weights", "sparse", "weights"):
            with switch(name) as ready:
                got.setdefault(name, []).append(ready(ids).logits)
    assert everything_of(model) == before
    alone = with_adapter(random_model(), made.weights_path) if kind == "lora" else load_model(str(made.weights_path))[0]
    with torch.no_grad():
        want = alone(ids).logits
    for logits in got["weights"]:
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)
    for other in ("dense", "sparse"):
        assert (got[other][0] - want).abs().amax() > 1e-2


def test_without_a_second_stage_weights_are_the_dense_model(tokenizer, source):
    model = random_model()
    ids = documents([source], tokenizer, length_tokens=128, count=1, seed=4)[0][None]
    with torch.no_grad(), both(model, artifact_for(model, window_tokens=16)) as switch:
        with switch("weights") as ready:
            got = ready(ids).logits
        with switch("sparse") as ready:
            assert (ready(ids).logits - got).abs().amax() > 1e-2
        with switch("dense") as ready:
            assert torch.equal(got, ready(ids).logits)
        with pytest.raises(AssertionError), switch("sprase"):
            pass


# Documents


def compared(model, made, tokenizer, source, *, names=("sparse",), **settings):
    config = EvalConfig(**{"short_documents": 3, **settings})
    with both(model, made) as switch:
        return compare_short(switch, tokenizer, [source], [], config, names=names, context=256)


def test_nothing_differs_inside_the_window(tokenizer, source):
    model = random_model(context=256)
    row = compared(model, artifact_for(model, window_tokens=252), tokenizer, source)["documents"][source]
    assert row["length_tokens"] == 256
    assert set(row) == {"length_tokens", "sparse"}
    pair = row["sparse"]
    assert (pair["samples"], pair["difference"], pair["difference_95"]) == (3, 0.0, [0.0, 0.0])
    assert (pair["kl"], pair["top1_agreement"]) == (0.0, 1.0)
    assert pair["dense"] > 1


def test_damage_shows_and_is_told_apart(tokenizer, source, tmp_path):
    """Weights that were spoilt show in both comparisons, a window that is too short in one alone."""
    model = copy_model(context=256)
    narrow = compared(model, artifact_for(model, ((), ()), window_tokens=8), tokenizer, source, names=("sparse", "weights"))
    pairs = narrow["documents"][source]
    assert pairs["sparse"]["kl"] > 0.01
    assert pairs["sparse"]["top1_agreement"] < 1
    assert (pairs["weights"]["difference"], pairs["weights"]["kl"]) == (0.0, 0.0)
    texts = torch.stack(documents([source], tokenizer, length_tokens=256, count=3, seed=0))
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(model(texts).logits[:, :-1].flatten(0, 1), texts[:, 1:].flatten()).item()
    assert pairs["sparse"]["dense"] == pytest.approx(want, abs=1e-4)
    assert abs(pairs["sparse"]["sparse"] - want) > 1e-3
    model = random_model(context=256)
    made = distilled(model, tokenizer, source, tmp_path, "lora")
    made = dataclasses.replace(made, config=dataclasses.replace(made.config, window_tokens=252))
    pairs = compared(model, made, tokenizer, source, names=("sparse", "weights"))["documents"][source]
    assert pairs["weights"]["kl"] > 1e-3
    assert pairs["weights"]["kl"] == pairs["sparse"]["kl"]  # all inside the window: weights are the only difference
    assert pairs["weights"]["dense"] == pairs["sparse"]["dense"]
    assert pairs["weights"]["weights"] == pytest.approx(pairs["weights"]["dense"] + pairs["weights"]["difference"])


# SQuAD


@pytest.mark.parametrize(
    ("reply", "answers", "found", "f1"),
    [
        ("The Eiffel Tower, in Paris.", ("Eiffel tower", "tower"), 1.0, 2 * 2 / (4 + 2)),
        ("the an A", ("the",), 1.0, 1.0),  # nothing but articles on either side
        ("in 1999", ("year 1999 AD",), 0.0, 2 * 1 / (2 + 3)),
        ("one one two", ("one two two",), 0.0, 2 * 2 / 6),  # each word counts as often as it stands in both
        ("", ("Paris",), 0.0, 0.0),
        ("U.S.", ("us",), 0.0, 1.0),  # F1 goes without punctuation
        ("blue", ("red", "dark blue", "blue sky today"), 0.0, 2 / 3),  # the best answer counts
    ],
)
def test_scores_against_hand_computation(reply, answers, found, f1):
    assert contains(reply, answers) == found
    assert token_f1(reply, answers) == pytest.approx(f1)


def test_questions_without_an_answer_are_left_out(tmp_path):
    file = squad_file(
        tmp_path,
        [
            ("one", [("a?", ["x", " "], False), ("b?", ["y"], True), ("c?", [], False)]),
            ("two", [("d?", ["z", "zz"], False)]),
        ],
    )
    assert read_squad(file) == [("one", "a?", ("x",)), ("two", "d?", ("z", "zz"))]


def test_a_draw_depends_on_its_seed_and_fits_the_context(tmp_path, tokenizer):
    paragraphs = [(prose(20), [(f"what {i}", ["city"], False)]) for i in range(12)] + [
        (prose(400), [("what", ["city"], False)])
    ]
    file = squad_file(tmp_path, paragraphs)

    def drawn(count: int, seed: int = 0) -> list[Question]:
        return draw_questions(tokenizer, EvalConfig(squad=file, squad_samples=count, seed=seed), 256)

    assert drawn(5) == drawn(5)
    assert len(drawn(5)) == 5
    assert drawn(5) != drawn(5, seed=1)
    assert len(drawn(200)) == 12
    assert all(len(q.prompt) + REPLY_TOKENS <= 256 for q in drawn(200))
    assert "what" in tokenizer.decode(drawn(1)[0].prompt)
    assert tokenizer.decode(drawn(1)[0].prompt).endswith("Answer :")
    assert draw_questions(tokenizer, EvalConfig(), 256) == []


def test_prompts_are_in_the_chat_format_where_there_is_one(tmp_path):
    file = squad_file(tmp_path, [("a book about food", [("what", ["food"], False)])])
    chat = word_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}good {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} girl{% endif %}"
    )
    (question,) = draw_questions(chat, EvalConfig(squad=file), 256)
    assert chat.decode(question.prompt).startswith("good a book")
    assert chat.decode(question.prompt).endswith("Answer : girl")


def test_a_batch_replies_as_each_alone(tmp_path, tokenizer, monkeypatch):
    model = random_model()
    file = squad_file(tmp_path, [(prose(5 + 9 * i, seed=i), [("what", ["city"], False)]) for i in range(5)])
    questions = draw_questions(tokenizer, EvalConfig(squad=file), 256)
    with both(model, artifact_for(model, window_tokens=16)) as switch:
        for name in ("dense", "sparse"):
            with switch(name) as ready:
                together = replies(ready, tokenizer, questions, what="Test")
                assert together == [replies(ready, tokenizer, [q], what="Test")[0] for q in questions]
                assert len(set(together)) == len(together)
                monkeypatch.setattr(short_context, "_BATCH", 2)
                assert replies(ready, tokenizer, questions, what="Test") == together
                monkeypatch.undo()


def test_a_model_that_cannot_look_back_loses_answers(tmp_path, tokenizer, source):
    """The answer follows an earlier "Answer:", which `copy_model` continues as before, however far away it is."""
    model = copy_model()
    names = ("anchor", "falcon", "violin", "tunnel")  # in no other place
    paragraphs = [(f"{prose(20)} Answer: {n} {prose(100, seed=i)}", [("What", [n], False)]) for i, n in enumerate(names)]
    config = EvalConfig(lengths_tokens=(256,), squad=squad_file(tmp_path, paragraphs), short_documents=0, **ONLY_SHORT)
    found = evaluate(model, tokenizer, artifact_for(model), [source], config)["short"]
    assert set(found) == {"squad"}
    assert found["squad"]["samples"] == 4
    pair = found["squad"]["contains"]["sparse"]
    assert (pair["dense"], pair["sparse"]) == (1.0, 1.0)
    assert 0 < found["squad"]["f1"]["sparse"]["dense"] < 0.2  # of 32 words one is the answer
    found = evaluate(model, tokenizer, artifact_for(model, ((), ())), [source], config)["short"]
    pair = found["squad"]["contains"]["sparse"]
    assert (pair["dense"], pair["sparse"], pair["difference"]) == (1.0, 0.0, -1.0)


def test_a_reply_ends_with_its_line():
    class Lines:
        pad_token_id = eos_token_id = chat_template = None

        def batch_decode(self, ids, skip_special_tokens):
            assert skip_special_tokens
            return [" a city\nQuestion: what"] * len(ids)

    question = Question([1, 2, 3], ("a city",))
    assert replies(random_model(), Lines(), [question], what="Test") == ["a city"]
    chat = Lines()
    chat.chat_template = "some"
    assert replies(random_model(), chat, [question], what="Test") == ["a city\nQuestion: what"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"SQuAD file '.*squad\.json' does not exist\. Name a file such as dev-v2\.0\.json in squad\."),
        ("{", r"SQuAD file '.*' is damaged: expected JSON \(.*Name a file"),
        ("[]", r"SQuAD file '.*': expected an object, got '\[\]'"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"answers": []}]}]}]}',
            r"expected the key 'question', got answers",
        ),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}]}',
            r"has no question to ask: expected at least one .* at most 224 tokens, got 0 with an answer\. Name another",
        ),
    ],
)
def test_unusable_files_are_refused(tmp_path, tokenizer, content, message):
    file = tmp_path / "squad.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        draw_questions(tokenizer, EvalConfig(squad=str(file)), 256)


# evaluate


def test_evaluate_names_weights_only_after_a_second_stage(tokenizer, source, tmp_path):
    model = random_model()
    file = squad_file(tmp_path, [("a book about food", [("what", ["food"], False)])])
    config = EvalConfig(lengths_tokens=(256,), short_documents=2, squad=file, **ONLY_SHORT)
    made = distilled(model, tokenizer, source, tmp_path, "lora")
    before = everything_of(model)
    found = evaluate(model, tokenizer, made, [source], config)
    assert everything_of(model) == before
    json.dumps(found)
    short = found["short"]
    assert set(short["documents"][source]) == {"length_tokens", "sparse", "weights"}
    assert short["documents"][source]["length_tokens"] == 512
    for metric in ("contains", "f1"):
        assert set(short["squad"][metric]) == {"sparse", "weights"}
    assert found["settings"]["short_documents"] == 2
    plain = evaluate(model, tokenizer, artifact_for(model), [source], config)["short"]
    assert set(plain["documents"][source]) == {"length_tokens", "sparse"}
    assert set(plain["squad"]["f1"]) == {"sparse"}
