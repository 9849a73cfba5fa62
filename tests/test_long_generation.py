"""Long generation: sampling with shared random numbers, repetition, and drift by real decode steps."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GenerationConfig

import tiny
from rtpurbo.attach import attached
from rtpurbo.checkpoint import Artifact
from rtpurbo.config import EvalConfig, SparseConfig
from rtpurbo.data import documents
from rtpurbo.evals import evaluate, long_generation
from rtpurbo.evals.compare import both
from rtpurbo.evals.long_generation import compare_generations, draw, end_tokens, repetition, sample
from rtpurbo.models import fingerprint
from tiny_text import artifact_for, everything_of, random_model

PROMPT, NEW = 40, 20
OPTIONS = {"suppressed": [], "seed": 5}


def artifact(model, window_tokens: int, retrieval=None) -> Artifact:
    """A tiny model's artefact without an index."""
    heads = tiny.head_map(model, retrieval=retrieval)
    base = {"name": "tiny", "revision": None, "head_dim": tiny.HEAD_DIM, "fingerprint": fingerprint(model)}
    return Artifact(base_model=base, config=SparseConfig(window_tokens=window_tokens, sink_tokens=4), heads=heads)


def compared(model, made, **changes):
    prompts = tiny.tokens(PROMPT, batch=3)
    with both(model, made) as switch:
        return compare_generations(prompts, switch, **{"new_tokens": NEW, **OPTIONS, **changes})


# Drawing


def test_draw_inverts_the_nucleus():
    """Of (0.5, 0.3, 0.16, 0.04) the first three are kept; in the order of ids their shares end at 0.16, 0.66 and 0.96."""
    logits = torch.tensor([0.16, 0.04, 0.5, 0.3]).log().expand(6, 4)
    uniform = torch.tensor([0.0, 0.166, 0.167, 0.687, 0.688, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform, []).tolist() == [0, 0, 2, 2, 3, 3]
    assert draw(logits, uniform, [2]).tolist() == [0, 0, 0, 3, 3, 3]  # 0.32, 0.08, -, 0.6: all are kept, 1 ends at 0.4
    middle = torch.full((6,), 0.35, dtype=torch.float64)
    assert draw(logits, middle, [2]).tolist() == [1] * 6


def test_draws_have_the_right_frequencies():
    logits = torch.tensor([0.16, 0.04, 0.5, 0.3]).log().expand(4000, 4)
    found = draw(logits, torch.rand(4000, dtype=torch.float64), []).bincount(minlength=4) / 4000
    assert found.tolist() == pytest.approx([0.16 / 0.96, 0.0, 0.5 / 0.96, 0.3 / 0.96], abs=0.03)


def test_samples_depend_on_seed_and_prompt_alone(monkeypatch):
    model, prompts = tiny.shared_model(), tiny.tokens(PROMPT, batch=3)
    one = sample(model, prompts, new_tokens=NEW, what="Test", **OPTIONS)
    assert one.shape == (3, NEW)
    monkeypatch.setattr("rtpurbo.generate.PIECE_TOKENS", 7)
    assert torch.equal(one, sample(model, prompts, new_tokens=NEW, what="Test", **OPTIONS))
    assert not torch.equal(one, sample(model, prompts, new_tokens=NEW, suppressed=[], seed=6, what="Test"))
    same = sample(model, prompts[:1].expand(3, -1), new_tokens=NEW, what="Test", **OPTIONS)
    assert torch.equal(same[0], one[0])
    assert not torch.equal(same[0], same[1])  # every prompt has random numbers of its own


def test_samples_are_those_of_one_pass_over_the_text():
    """Every token is drawn from what the whole text before it says."""
    model, prompts = tiny.shared_model(), tiny.tokens(PROMPT, batch=2)
    text = sample(model, prompts, new_tokens=NEW, what="Test", **OPTIONS)
    logits = tiny.logits(model, torch.cat([prompts, text], 1))[:, PROMPT - 1 : -1]
    generator = torch.Generator().manual_seed(OPTIONS["seed"])
    for step in range(NEW):
        uniform = torch.rand(2, generator=generator, dtype=torch.float64)
        assert torch.equal(draw(logits[:, step], uniform, []), text[:, step])


def test_a_text_does_not_end():
    model, prompts = tiny.tiny_model(), tiny.tokens(PROMPT, batch=3)

    class Ends:
        eos_token_id = 3

    model.generation_config = GenerationConfig(eos_token_id=[5, 9])
    assert end_tokens(model, Ends()) == [3, 5, 9]
    model.generation_config.eos_token_id = 7
    assert end_tokens(model, Ends()) == [3, 7]
    Ends.eos_token_id = model.generation_config.eos_token_id = None
    assert end_tokens(model, Ends()) == []
    free = sample(model, prompts, new_tokens=NEW, what="Test", **OPTIONS)
    ends = free.unique()[::2].tolist()
    held = sample(model, prompts, new_tokens=NEW, suppressed=ends, seed=5, what="Test")
    assert not set(ends) & set(held.flatten().tolist())


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        (list(range(20)), 0.0),
        ([1] * 17, 0.9),  # ten pieces, all but the first were there
        ([*range(10), *range(10)], 3 / 13),  # the pieces that begin with the second 0, 1 and 2
        ([1] * 8, 0.0),
        ([1] * 7, 0.0),
    ],
)
def test_repetition_of_a_known_sequence(tokens, share):
    assert repetition(tokens) == pytest.approx(share)


# Both models


def test_nothing_differs_inside_the_window():
    model = tiny.shared_model()
    before = everything_of(model)
    found = compared(model, artifact(model, window_tokens=PROMPT + NEW))
    assert everything_of(model) == before
    json.dumps(found)
    assert set(found) == {"prompts", "prompt_tokens", "tokens", "dense", "sparse", "loss", "drift"}
    assert (found["prompts"], found["prompt_tokens"], found["tokens"]) == (3, PROMPT, NEW)
    assert found["dense"] == found["sparse"]  # the same tokens were drawn
    assert (found["loss"]["samples"], found["loss"]["difference"], found["loss"]["difference_95"]) == (3, 0.0, [0.0, 0.0])
    assert [(b["from"], b["to"]) for b in found["drift"]] == [
        (0, 2),
        (2, 5),
        (5, 7),
        (7, 10),
        (10, 12),
        (12, 15),
        (15, 17),
        (17, 20),
    ]
    for bucket in found["drift"]:
        assert bucket["kl"] == pytest.approx(0.0, abs=1e-6)
        assert bucket["top1_agreement"] == 1.0


def test_a_tiny_window_shows():
    model = tiny.shared_model()
    found = compared(model, artifact(model, window_tokens=2, retrieval=[(), (), ()]))
    assert found["loss"]["difference"] > 0.05  # the dense model did not expect what the sparse one wrote
    assert (
        found["loss"]["dense"]
        == found["dense"]["loss"]
        == pytest.approx(compared(model, artifact(model, 60))["dense"]["loss"])
    )
    for bucket in found["drift"]:
        assert bucket["kl"] > 0.01
    assert min(b["top1_agreement"] for b in found["drift"]) < 1


def test_results_against_brute_force(monkeypatch):
    """Losses from whole dense passes, drift from sparse decode steps, whatever the size of the pieces."""
    model, prompts = tiny.shared_model(), tiny.tokens(PROMPT, batch=3)
    made = artifact(model, window_tokens=8)
    monkeypatch.setattr(long_generation, "_LABELS_PER_PIECE", 7)
    found = compared(model, made)
    losses, texts = {}, {}
    with both(model, made) as switch:
        for name in ("dense", "sparse"):
            with switch(name) as ready:
                text = sample(ready, prompts, new_tokens=NEW, what="Test", **OPTIONS)
            texts[name] = torch.cat([prompts, text], 1)
    for name, ids in texts.items():
        dense = tiny.logits(model, ids)[:, PROMPT - 1 : -1].log_softmax(-1)
        losses[name] = -dense.gather(-1, ids[:, PROMPT:, None])[..., 0].mean(1)
        assert found[name]["loss"] == pytest.approx(losses[name].mean().item(), abs=1e-4)
    assert found["loss"]["difference"] == pytest.approx((losses["sparse"] - losses["dense"]).mean().item(), abs=1e-4)
    assert abs(found["loss"]["difference"]) > 1e-3
    dense = tiny.logits(model, texts["dense"])[:, PROMPT - 1 : -1].log_softmax(-1)
    with attached(model, made.heads, made.config):
        sparse = tiny.logits(model, texts["dense"], chunks=[PROMPT, 1])[:, PROMPT - 1 : -1].log_softmax(-1)
    kl = (dense.exp() * (dense - sparse)).sum(-1).mean(0)
    same = (dense.argmax(-1) == sparse.argmax(-1)).float().mean(0)
    for bucket in found["drift"]:
        here = slice(bucket["from"], bucket["to"])
        assert bucket["kl"] == pytest.approx(kl[here].mean().item(), abs=1e-4)
        assert bucket["top1_agreement"] == pytest.approx(same[here].mean().item())


def test_the_sparse_model_decodes_token_by_token():
    """What it read in drift, after the prompt: one token of every text at a time."""
    model, shapes = tiny.shared_model(), []
    texts = torch.cat([tiny.tokens(PROMPT, batch=3), tiny.tokens(NEW, batch=3, seed=9)], 1)
    prompts, texts = texts.split([PROMPT, NEW], 1)
    made = artifact(model, window_tokens=8)
    with torch.no_grad(), both(model, made) as switch:
        with switch("dense") as ready:
            states, _ = long_generation._score(ready, prompts, texts)
        with switch("sparse") as ready:
            hook = ready.model.embed_tokens.register_forward_pre_hook(
                lambda _, inputs: shapes.append(tuple(inputs[0].shape))
            )
            long_generation._drift(ready, prompts, texts, states, ready.get_output_embeddings())
            hook.remove()
    assert shapes == [(3, PROMPT)] + [(3, 1)] * (NEW - 1)


# evaluate


ONLY_LONG = {"samples": (0,), "loss_documents": 0, "fidelity_documents": 0, "decode_tokens": 0, "short_documents": 0}


def test_evaluate_fills_the_longest_length(tokenizer, source):
    model = random_model(eos_token_id=4)
    config = EvalConfig(lengths_tokens=(64, 96), long_tokens=16, long_prompts=2, **ONLY_LONG)
    before = everything_of(model)
    made = artifact_for(model, window_tokens=16)
    found = evaluate(model, tokenizer, made, [source], config)
    assert everything_of(model) == before
    long = found["long_generation"]
    assert (long["prompts"], long["prompt_tokens"], long["tokens"]) == (2, 80, 16)
    assert found == evaluate(model, tokenizer, made, [source], config)
    prompts = torch.stack(documents([source], tokenizer, length_tokens=80, count=2, seed=0))
    with both(model, made) as switch:
        ends = end_tokens(model, tokenizer)
        assert 4 in ends
        assert compare_generations(prompts, switch, new_tokens=16, suppressed=ends, seed=0) == long


def test_prompts_must_be_longer_than_window_and_sinks(tokenizer, source):
    model = random_model()
    made = artifact_for(model, window_tokens=48)  # and 4 sinks
    message = r"long_tokens must be at most 43 \(the longest of lengths_tokens, 96, less a prompt beyond .*\), got 44\."
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, made, [source], EvalConfig(lengths_tokens=(96,), long_tokens=44, **ONLY_LONG))
    config = EvalConfig(lengths_tokens=(96,), long_tokens=43, long_prompts=1, **ONLY_LONG)
    assert evaluate(model, tokenizer, made, [source], config)["long_generation"]["prompt_tokens"] == 53
    with pytest.raises(ValueError, match=r"long_tokens must be at most 0 "):
        EvalConfig(lengths_tokens=(32,), long_tokens=8).resolved(512, made.config)
