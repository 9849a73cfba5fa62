"""Paired results, needle grading, fidelity, speed, `evaluate` as a whole, and the whole method on a model that retrieves."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from rtpurbo import demo, progress
from rtpurbo.attach import attached, sparsify
from rtpurbo.cache import CACHE, cache_bytes
from rtpurbo.calibration import calibrate
from rtpurbo.checkpoint import Artifact
from rtpurbo.config import CalibrateConfig, DistillConfig, EvalConfig, IndexerConfig, SparseConfig
from rtpurbo.data import documents
from rtpurbo.distillation import distill
from rtpurbo.evals import evaluate, harness
from rtpurbo.evals.compare import both
from rtpurbo.evals.fidelity import compare_documents
from rtpurbo.evals.needle import DEPTHS, grade, grade_all, needle_samples
from rtpurbo.evals.speed import measure_decode
from rtpurbo.evals.statistics import paired
from rtpurbo.indexer_training import train_indexer
from tiny_text import artifact_for, copy_model, everything_of, prose, random_model

KINDS = ("single", "multi_key", "multi_value", "multi_query")


@pytest.fixture(scope="module")
def model():
    return copy_model()


@pytest.fixture(scope="module")
def indexed(model, tokenizer, source) -> Artifact:
    """`copy_model` with its one far head and a trained index."""
    config = IndexerConfig(steps=10, learning_rate=1e-3, length_tokens=256, queries=32, documents=6, save_every=0)
    return train_indexer(model, tokenizer, artifact_for(model, index_dim=16), [source], config)


# Statistics


def test_paired_against_hand_computation():
    got = paired([1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.5])
    assert (got["samples"], got["dense"], got["sparse"]) == (4, 0.75, 0.375)
    assert got["recovery"] == 0.5
    assert got["difference"] == -0.375
    low, high = got["difference_95"]
    # the mean of four draws from (0, 0, -1, -0.5): P(<= -0.875) = 5 / 256 < 2.5 % < P(<= -0.75) and P(= 0) = 1 / 16
    assert (low, high) == (-0.75, 0.0)


def test_paired_of_equal_and_of_constant_differences():
    assert paired([0.2, 0.4], [0.2, 0.4])["difference_95"] == [0.0, 0.0]
    got = paired([0.0, 0.5], [0.25, 0.75])
    assert got["difference_95"] == [0.25, 0.25]
    assert paired([0.0, 0.0], [1.0, 0.0])["recovery"] is None


def test_paired_interval_is_that_of_a_mean():
    rng = random.Random(1)
    dense = [rng.gauss(0.0, 5.0) for _ in range(200)]
    sparse = [d - 0.3 + rng.gauss(0.0, 1.0) for d in dense]
    differences = [s - d for d, s in zip(dense, sparse, strict=True)]
    mean = sum(differences) / 200
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 199 / 200)
    low, high = paired(dense, sparse)["difference_95"]
    # pairing: the spread of the samples themselves, five times larger, must not enter
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.12 * error)


def test_paired_depends_on_its_seed_alone():
    a, b = [0.0, 1.0, 0.5, 0.2, 0.9], [0.3, 0.7, 0.5, 0.1, 0.2]
    assert paired(a, b, seed=3) == paired(a, b, seed=3)


# Needles


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["dense", "sparse"])
def test_grades_are_those_of_generate(tokenizer, source, kind, where):
    """Greedy decoding from before each answer writes it exactly as often as the grade says."""
    model = copy_model(noise=0.02)  # right most of the time only
    made = artifact_for(model)
    haystacks = documents([source], tokenizer, length_tokens=256, count=5, seed=2)
    samples = needle_samples(haystacks, tokenizer, kind=kind, count=10, seed=4)
    with both(model, made) as switch, switch(where) as ready:
        got = grade(ready, samples)
        for sample, score in zip(samples, got, strict=True):
            right = []
            for start, stop in sample.answers:
                prompt = sample.tokens[:start][None]
                out = ready.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=stop - start,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                right.append(torch.equal(out[0, start:], sample.tokens[start:stop]))
            assert score == sum(right) / len(right)
    if kind in ("single", "multi_key"):
        assert 0 < sum(got) < len(got)


def test_grades_follow_the_way_a_prompt_is_read(model, tokenizer, source):
    haystacks = documents([source], tokenizer, length_tokens=256, count=5, seed=2)
    samples = [
        dataclasses.replace(s, answers=((s.answers[0][0], s.answers[0][0] + 1),))  # its prompt says the first token
        for s in needle_samples(haystacks, tokenizer, kind="single", count=10, seed=4)
    ]
    window_only, scores = artifact_for(model, ((), ())), {}
    for end in (0, 16, 1000):
        config = window_only.config.with_options(dense_end_tokens=end)
        with both(model, dataclasses.replace(window_only, config=config)) as switch, switch("sparse") as ready:
            scores[end] = sum(grade(ready, samples))
    assert scores[0] < scores[16] == scores[1000] == sum(grade(model, samples)) == len(samples)


def test_grades_of_a_batch_and_one_by_one(model, tokenizer, source):
    short, long = (documents([source], tokenizer, length_tokens=n, count=3, seed=2) for n in (256, 300))
    samples = [
        s for kind in KINDS for part in (short, long) for s in needle_samples(part, tokenizer, kind=kind, count=3, seed=1)
    ]
    alone = [grade(model, [s])[0] for s in samples]
    assert grade_all(model, samples, what="Test") == alone
    assert grade(model, samples[:3]) == alone[:3]
    assert 0 < sum(alone) < len(alone)


def test_needle_samples_spread_over_the_document(tokenizer, source):
    haystacks = documents([source], tokenizer, length_tokens=256, count=2, seed=2)
    samples = needle_samples(haystacks, tokenizer, kind="single", count=2 * DEPTHS, seed=1)
    assert [s.depth for s in samples] == [(i % DEPTHS + 0.5) / DEPTHS for i in range(2 * DEPTHS)]
    answers = [tuple(s.tokens[a:b].tolist()) for s in samples for a, b in s.answers]
    assert len(set(answers)) == len(answers)


# Fidelity


def test_fidelity_against_brute_force(tokenizer, source):
    model = random_model()
    made = artifact_for(model, ((1,), (2,)), window_tokens=12)
    texts = documents([source], tokenizer, length_tokens=41, count=3, seed=3)
    with both(model, made) as switch:
        got = compare_documents(texts, switch)
    rows = []
    for tokens in texts:
        with torch.no_grad():
            dense = model(tokens[None]).logits[0].double()
            with attached(model, made.heads, made.config):
                sparse = model(tokens[None]).logits[0].double()
        for t in range(40):
            p, q = dense[t].softmax(-1), sparse[t].softmax(-1)
            label = int(tokens[t + 1])
            kl = sum((a * (a / b).log()).item() for a, b in zip(p, q, strict=True))
            rows.append((-p[label].log().item(), -q[label].log().item(), kl, float(p.argmax() == q.argmax())))
    table = torch.tensor(rows).view(3, 40, 4)
    close = {"rel": 1e-4, "abs": 1e-5}
    assert got["loss_dense"] == pytest.approx(table[:, :, 0].mean(1).tolist(), **close)
    assert got["loss_sparse"] == pytest.approx(table[:, :, 1].mean(1).tolist(), **close)
    assert got["kl"] == pytest.approx(table[:, :, 2].mean().item(), **close)
    assert got["top1_agreement"] == pytest.approx(table[:, :, 3].mean().item(), **close)
    assert [(b["from"], b["to"]) for b in got["by_position"]] == [(5 * i, 5 * i + 5) for i in range(8)]
    for i, bucket in enumerate(got["by_position"]):
        for j, name in enumerate(("loss_dense", "loss_sparse", "kl", "top1_agreement")):
            assert bucket[name] == pytest.approx(table[:, 5 * i : 5 * i + 5, j].mean().item(), **close)
    assert got["by_position"][0]["kl"] == pytest.approx(0.0, abs=1e-6)  # all inside the window
    assert got["by_position"][7]["kl"] > 0.01
    assert (got["documents"], got["length_tokens"]) == (3, 41)


def test_fidelity_in_pieces(tokenizer, source, monkeypatch):
    from rtpurbo.evals import fidelity

    model = random_model()
    made = artifact_for(model, ((1,), (2,)), window_tokens=12)
    texts = documents([source], tokenizer, length_tokens=41, count=2, seed=3)
    with both(model, made) as switch:
        whole = compare_documents(texts, switch)
        monkeypatch.setattr(fidelity, "_LABELS_PER_PIECE", 7)
        pieces = compare_documents(texts, switch)
    assert json.loads(json.dumps(pieces), parse_float=lambda x: round(float(x), 4)) == json.loads(
        json.dumps(whole), parse_float=lambda x: round(float(x), 4)
    )


# Speed


def test_decode_measures_what_the_cache_holds(model, indexed, tokenizer, source):
    tokens = documents([source], tokenizer, length_tokens=300, count=1, seed=3)[0]
    found = {}
    with both(model, indexed) as switch:
        for name in ("dense", "sparse"):
            with switch(name) as ready:
                found[name] = measure_decode(ready, tokens, new_tokens=3)
                cache = DynamicCache(config=model.config)
                with torch.no_grad():
                    ready(tokens[None], **{CACHE: cache})
                assert found[name]["cache_bytes"] == cache_bytes(cache)
    assert found["dense"]["cache_bytes"] == 2 * 2 * 2 * 300 * 64 * 4  # k and v, layers, KV heads, tokens, dimensions, bytes
    assert found["sparse"]["cache_bytes"] < 0.6 * found["dense"]["cache_bytes"]
    for one in found.values():
        assert one["length_tokens"] == 300
        assert one["prefill_seconds"] > 0
        assert one["decode_tokens_per_second"] > 0


def test_timing_shows_how_far_it_is(model, tokenizer, source, monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    monkeypatch.setattr("rtpurbo.generate.PIECE_TOKENS", 100)
    tokens = documents([source], tokenizer, length_tokens=300, count=1, seed=0)[0]
    measure_decode(model, tokens, new_tokens=2)
    shown = capsys.readouterr().err
    assert "Timing prefill of 300 tokens: 3/3" in shown
    assert "Timing decode after 300 tokens: 2/2" in shown


def test_the_demos_question(model, tokenizer, source, monkeypatch, capsys, tmp_path):
    """Both models answer it, with a sign of life in between."""
    dense_heads = artifact_for(model)  # the far head without an index: it sees everything
    monkeypatch.setattr(demo, "convert", lambda *args, **kwargs: dense_heads)
    monkeypatch.setattr(demo, "HELDOUT", (source,))
    monkeypatch.setattr(demo, "QUESTION_TOKENS", 320)
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    demo.run_demo(model, tokenizer, tmp_path, model_name="tiny", seed=0)
    shown = capsys.readouterr()
    right, *answers = re.findall(r"(?:right answer:|says:) (.+)", shown.out)
    assert answers == [right, right]
    assert "Both models answer: 1/2" in shown.err


# Switching between both models


@pytest.mark.parametrize("kind", [None, "lora", "full"])
def test_both_models_and_their_return(tokenizer, source, tmp_path, kind):
    model = random_model()
    made = artifact_for(model, ((1,), (0,)), window_tokens=16)
    made = train_indexer(model, tokenizer, made, [source], IndexerConfig(steps=0, length_tokens=128, documents=2))
    before = everything_of(model)
    ids = documents([source], tokenizer, length_tokens=128, count=1, seed=4)[0][None]
    with torch.no_grad():
        dense = model(ids).logits
        with attached(model, made.heads, made.config, made.indexer):
            undistilled = model(ids).logits
    if kind:
        config = DistillConfig(
            weights=kind, steps=5, batch_size=1, length_tokens=128, labels=20, learning_rate=1e-2, save_every=0
        )
        made = distill(model, tokenizer, made, [source], config, work=tmp_path)
    with torch.no_grad(), both(model, made) as switch:
        for _ in range(2):
            with switch("dense") as ready:
                torch.testing.assert_close(ready(ids).logits, dense, atol=1e-5, rtol=0)
            with switch("sparse") as ready:
                difference = (ready(ids).logits - undistilled).abs().amax()
                assert (difference > 1e-2) == (kind is not None)
    assert everything_of(model) == before


# evaluate


def small(**changes) -> EvalConfig:
    settings = {
        "lengths_tokens": (256, 320),
        "samples": (6,),
        "loss_documents": 2,
        "fidelity_documents": 1,
        "decode_tokens": 2,
        "short_documents": 0,
    }
    return EvalConfig(**{**settings, **changes})


def test_evaluate_measures_everything(model, indexed, tokenizer, source, monkeypatch):
    asked = []
    monkeypatch.setattr(harness, "load_tasks", lambda tokenizer, config: {name: None for name in config.tasks})
    monkeypatch.setattr(harness, "run_tasks", lambda *args: asked.append(args) or {"results": []})
    before = everything_of(model)
    found = evaluate(model, tokenizer, indexed, [source], small(tasks=("anything",), kinds=KINDS))
    assert everything_of(model) == before
    assert set(found) == {"settings", "sources", "needle", "loss", "speed", "index", "tasks"}
    json.dumps(found)
    assert found["settings"]["lengths_tokens"] == (256, 320)
    assert found["sources"] == [source]
    assert [(r["kind"], r["length_tokens"]) for r in found["needle"]] == [(k, n) for n in (256, 320) for k in KINDS]
    for row in found["needle"]:
        assert row["samples"] == 6 == sum(cell["samples"] for cell in row["depths"].values())
        total = sum(cell["samples"] * cell["sparse"] for cell in row["depths"].values())
        assert row["sparse"] == pytest.approx(total / 6)
        if row["kind"] in ("single", "multi_key"):
            assert set(row["depths"]) == {"0.1", "0.3", "0.5", "0.7", "0.9"}
            assert (row["dense"], row["sparse"], row["recovery"]) == (1.0, 1.0, 1.0)
    loss = found["loss"][source]
    assert {"samples", "dense", "sparse", "difference_95", "kl", "top1_agreement", "by_position"} <= set(loss)
    assert "loss_dense" not in loss
    assert (loss["samples"], loss["length_tokens"]) == (2, 320)
    assert loss["sparse"] == pytest.approx(sum(b["loss_sparse"] * (b["to"] - b["from"]) for b in loss["by_position"]) / 319)
    assert set(found["speed"]) == {"dense", "sparse"}
    assert found["speed"]["sparse"]["length_tokens"] == 320
    assert found["index"]["mass_kept"] > 0.9
    assert found["index"]["length_tokens"] == 320
    assert [args[3].tasks for args in asked] == [("anything",)]
    assert (asked[0][2], asked[0][4]) == ({"anything": None}, 512)


def test_evaluate_tells_a_model_that_cannot_retrieve(model, tokenizer, source):
    window_only = artifact_for(model, ((1,), ()))
    found = evaluate(model, tokenizer, window_only, [source], small(kinds=("single",), lengths_tokens=(320,)))
    (row,) = found["needle"]
    assert row["dense"] == 1.0
    near_end = row["depths"]["0.9"]["sparse"]
    far = [cell["sparse"] for depth, cell in row["depths"].items() if depth != "0.9"]
    assert far == [0.0] * 4
    assert row["difference_95"][1] < 0
    assert near_end <= 1.0
    assert "index" not in found


def test_evaluate_skips_what_is_not_asked_for(model, indexed, tokenizer, source):
    config = small(samples=(0, 2), loss_documents=0, fidelity_documents=0, decode_tokens=0, kinds=("single",))
    found = evaluate(model, tokenizer, indexed, [source], config)
    assert set(found) == {"settings", "sources", "needle"}
    assert [r["length_tokens"] for r in found["needle"]] == [320]


def test_evaluate_with_prompts_read_densely(model, tokenizer, source):
    window_only = artifact_for(model, ((), ()))
    config = small(lengths_tokens=(320,), samples=(0,), decode_tokens=0, dense_end_tokens=1000)
    found = evaluate(model, tokenizer, window_only, [source], config)
    assert found["settings"]["dense_end_tokens"] == 1000
    assert found["loss"][source]["kl"] > 0.01  # a document is no prompt
    assert window_only.config.dense_end_tokens == 0


def test_evaluate_is_repeatable(model, indexed, tokenizer, source):
    config = small(decode_tokens=0)
    assert evaluate(model, tokenizer, indexed, [source], config) == evaluate(model, tokenizer, indexed, [source], config)


def test_evaluate_refuses_other_weights_and_lengths(model, indexed, tokenizer, source):
    before = everything_of(model)
    with pytest.raises(ValueError, match="made for other weights"):
        evaluate(copy_model(noise=0.02), tokenizer, indexed, [source], small())
    with pytest.raises(ValueError, match="1024 tokens is beyond the model's context of 512"):
        evaluate(model, tokenizer, indexed, [source], small(lengths_tokens=(256, 1024)))
    with pytest.raises(ValueError, match="1024 tokens is beyond"):
        evaluate(model, tokenizer, indexed, [source], small(loss_length_tokens=1024))
    assert everything_of(model) == before


# The whole method


@pytest.mark.parametrize("granularity", ["head", "group"])
def test_the_method_end_to_end(tokenizer, source, tmp_path, monkeypatch, granularity):
    """Calibrate, train the index, distil, save, load, ask: facts far outside the window are found, with few tokens read."""
    monkeypatch.chdir(tmp_path)
    Path(source).write_text(prose(20000, sentences=15))  # sentences come again, as things do in real text
    model = copy_model()
    before = everything_of(model)
    sparse = SparseConfig(window_tokens=64, sink_tokens=4, index_dim=16, top_p=0.9, min_probability=0.0)
    settings = CalibrateConfig(
        lengths_tokens=(448,), documents=6, retrieval_ratio=0.125 if granularity == "head" else 0.25, granularity=granularity
    )
    made = calibrate(model, tokenizer, [source], settings, sparse)
    made = train_indexer(
        model,
        tokenizer,
        made,
        [source],
        IndexerConfig(steps=10, learning_rate=1e-3, length_tokens=384, queries=64, documents=8),
    )
    config = DistillConfig(steps=6, batch_size=1, length_tokens=384, labels=64, learning_rate=1e-4, lora_rank=4)
    made = distill(model, tokenizer, made, [source], config, work=tmp_path / "work")
    assert everything_of(model) == before
    made.save(tmp_path / "artifact")
    loaded = Artifact.load(tmp_path / "artifact")
    assert list(loaded.stages) == ["calibrate", "train_indexer", "distill"]
    question = small(lengths_tokens=(448,), samples=(10,), kinds=("single", "multi_key"))
    found = evaluate(model, tokenizer, loaded, [source], question)
    window_only = dataclasses.replace(
        artifact_for(model, ((), ()), granularity=granularity), config=dataclasses.replace(sparse, top_p=1.0)
    )
    without = evaluate(model, tokenizer, window_only, [source], question)
    for row, row_without in zip(found["needle"], without["needle"], strict=True):
        assert row["dense"] == 1.0
        assert row["sparse"] >= 0.9
        assert row_without["sparse"] <= 0.2
    assert found["index"]["mass_kept"] > 0.9
    assert found["speed"]["sparse"]["cache_bytes"] < 0.7 * found["speed"]["dense"]["cache_bytes"]
    haystack = documents([source], tokenizer, length_tokens=448, count=1, seed=9)
    (sample,) = needle_samples(haystack, tokenizer, kind="single", count=1, seed=9)
    with sparsify(model, loaded) as sparse_model:
        prompt = sample.prompt[None]
        out = sparse_model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
    assert torch.equal(out[0], sample.tokens)
    assert everything_of(model) == before
