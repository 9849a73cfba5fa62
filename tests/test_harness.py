"""lm-evaluation-harness tasks on both models, without a network."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rtpurbo.config import EvalConfig
from rtpurbo.evals import harness
from rtpurbo.evals.compare import both
from rtpurbo.evals.harness import load_tasks, run_tasks
from tiny_text import FILLERS, artifact_for, copy_model, random_model, word_tokenizer

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install rtpurbo[eval]")

CONTEXT = 512
_CODE = f"""
import random

import datasets

FILLERS = {FILLERS!r}


def make(max_seq_lengths=(200,), tokenizer=None, **kwargs):
    assert tokenizer
    rng, rows = random.Random(0), []
    for length in max_seq_lengths:
        for i in range(6):
            words = [rng.choice(FILLERS) for _ in range(length)]
            words[10 + i] = "The access code of the amber anchor is " + str(1000000 + 12345 * i) + "."
            text = " ".join(words) + " The access code of the amber anchor is"
            answer = str(1000000 + 12345 * i)
            wrong = str(2000000 + 54321 * i)
            rows.append(dict(input=text, answer=answer, wrong=wrong, max_length=length))
    return dict(test=datasets.Dataset.from_list(rows))


def grade(doc, results):
    return {{"4096": -1.0, str(doc["max_length"]): float(results[0].replace(" ", "") == doc["answer"])}}


def mean(values):
    return sum(values) / len(values)
"""
_GENERATE = """
task: {name}
custom_dataset: !function {code}.make
dataset_path: ""
output_type: generate_until
test_split: test
doc_to_text: "{{{{input}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function {code}.grade
metric_list:
  - metric: "4096"
    aggregation: !function {code}.mean
    higher_is_better: true
generation_kwargs: {{do_sample: false, max_gen_toks: 4, until: []}}
metadata: {{version: 2.5}}
"""
_CHOOSE = """
task: tiny_choice
custom_dataset: !function {code}.make
dataset_path: ""
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{input}}}}"
doc_to_choice: "{{{{[wrong, answer]}}}}"
doc_to_target: 1
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Directory of two tasks of our own."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "tiny_code.py").write_text(_CODE)
    (folder / "generate.yaml").write_text(_GENERATE.format(name="tiny_recall", code="tiny_code"))
    (folder / "choose.yaml").write_text(_CHOOSE.format(code="tiny_code"))
    return folder


@pytest.fixture(scope="module")
def model():
    return copy_model(context=CONTEXT)


def config(*names: object, lengths: tuple[int, ...] = (200,), limit: int | None = None) -> EvalConfig:
    return EvalConfig(lengths_tokens=lengths, tasks=tuple(map(str, names)), task_limit=limit)


def run(model, settings: EvalConfig, retrieval=((), (2,)), context: int = CONTEXT):
    with both(model, artifact_for(model, retrieval)) as switch:
        return run_tasks(switch, word_tokenizer(), load_tasks(word_tokenizer(), settings), settings, context)


@pytest.fixture(scope="module")
def recall(model, tasks):
    """Both tasks at two lengths with a window-only model."""
    names = (tasks / "generate.yaml", tasks / "choose.yaml")
    return run(model, config(*names, lengths=(100, 200), limit=4), retrieval=((1,), ()))


def by_metric(found) -> dict[tuple[str, str], dict]:
    return {(r["task"], r["metric"]): r for r in found["results"]}


def test_a_task_file_on_both_models(recall):
    found = by_metric(recall)
    assert set(found) >= {("tiny_recall", "100"), ("tiny_recall", "200"), ("tiny_choice", "acc")}
    assert ("tiny_recall", "4096") not in found  # the mark of another length is not a score
    for length in ("100", "200"):
        one = found["tiny_recall", length]
        assert (one["dense"], one["sparse"]) == (1.0, 0.0)
        assert one["recovery"] == 0.0
        assert one["difference"] == -1.0
        assert one["difference_95"] == [-1.0, -1.0]
        assert one["samples"] == 4  # the limit counts for every length
        assert one["task_version"] == 2.5
        assert one["higher_is_better"] is True
    assert found["tiny_choice", "acc"]["dense"] == 1.0
    assert found["tiny_choice", "acc"]["sparse"] < 1.0
    assert found["tiny_choice", "acc"]["samples"] == 8
    import importlib.metadata

    assert recall["lm_eval"] == importlib.metadata.version("lm_eval")


def test_a_sparse_model_that_retrieves_recovers_all(model, tasks):
    found = by_metric(run(model, config(tasks / "generate.yaml", limit=3)))
    assert found["tiny_recall", "200"]["recovery"] == 1.0
    assert found["tiny_recall", "200"]["difference_95"] == [0.0, 0.0]


@torch.no_grad()
def test_padding_changes_no_log_likelihood(model):
    """Shorter texts of a batch are padded on the right, so their end is not the batch's: none is read densely."""
    made = artifact_for(model, ((1,), ()))
    made = dataclasses.replace(made, config=made.config.with_options(dense_end_tokens=20))
    text = torch.randint(3, 40, (1, 150), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([text, torch.zeros(1, 20, dtype=torch.long)], 1)
    with both(model, made) as switch, switch("sparse") as ready:
        lm = harness._model(ready, word_tokenizer(), config(), CONTEXT)
        torch.testing.assert_close(lm._model_call(padded)[:, :150], lm._model_call(text))
        assert (ready(padded).logits[:, :150] - ready(text).logits).abs().max() > 0.1  # where there is a cache, it would


def test_prompt_lengths_are_real_tokens(recall):
    tokenizer, found = word_tokenizer(), by_metric(recall)
    for length in (100, 200):
        assert length + 10 < found["tiny_recall", str(length)]["prompt_tokens"]["min"] < length + 40
        assert found["tiny_recall", str(length)]["prompts_cut"] == 0
    text = "The access code of the amber anchor is 1000000."
    extra = len(tokenizer(text).input_ids) - 1 + len(tokenizer("The access code of the amber anchor is").input_ids)
    assert found["tiny_recall", "100"]["prompt_tokens"] == {"min": 100 + extra, "mean": 100 + extra, "max": 100 + extra}
    assert found["tiny_choice", "acc"]["prompt_tokens"]["min"] == 100 + extra
    assert found["tiny_choice", "acc"]["prompt_tokens"]["max"] == 200 + extra


def test_prompts_that_lose_their_beginning_are_counted(model, tasks):
    found = by_metric(run(model, config(tasks / "generate.yaml", lengths=(100, 200), limit=2), context=160))
    assert found["tiny_recall", "100"]["prompts_cut"] == 0
    assert found["tiny_recall", "200"]["prompts_cut"] == 2
    assert found["tiny_recall", "200"]["prompt_tokens"] == {"min": 156, "mean": 156, "max": 156}
    assert found["tiny_recall", "100"]["dense"] == 1.0
    assert found["tiny_recall", "200"]["dense"] == 0.0  # the fact was in the part that is gone


def test_the_same_samples_for_both_models(model, tasks, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    seen = []
    real = HFLM.generate_until
    monkeypatch.setattr(
        HFLM,
        "generate_until",
        lambda self, requests, **kw: seen.append([r.args[0] for r in requests]) or real(self, requests, **kw),
    )
    run(model, config(tasks / "generate.yaml", limit=2))
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 2


def test_an_adapter(tasks, tmp_path):
    """A PEFT model: dense with the adapter off, sparse with it on."""
    from peft import LoraConfig, get_peft_model

    model = random_model(context=CONTEXT)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    adapted.unload()
    made = dataclasses.replace(artifact_for(model, ((1,), (2,))), weights_kind="lora", weights_path=tmp_path)
    with both(model, made) as switch:
        settings = config(tasks / "choose.yaml", limit=2)
        found = run_tasks(switch, word_tokenizer(), load_tasks(word_tokenizer(), settings), settings, CONTEXT)
    assert by_metric(found)["tiny_choice", "acc"]["samples"] == 2


def test_ruler(model, monkeypatch):
    """lm_eval's own long-context task makes its documents at our lengths with our tokenizer."""
    import lm_eval

    pytest.importorskip("wonderwords", reason="wonderwords is not installed: pip install rtpurbo[eval]")
    pytest.importorskip("nltk", reason="nltk is not installed: pip install rtpurbo[eval]")
    import nltk
    import wonderwords

    few = {"nouns": ["anchor", "apple"], "adjectives": ["amber", "brave"], "verbs": []}
    monkeypatch.setattr(wonderwords, "RandomWord", lambda: SimpleNamespace(_categories=few))  # listing all takes 9 s
    monkeypatch.setattr(nltk, "download", lambda name: False)  # this task needs none of it
    file = Path(lm_eval.__file__).parent / "tasks" / "ruler" / "niah_single_1.yaml"
    found = by_metric(run(model, config(file, lengths=(448,), limit=1)))
    assert set(found) == {("niah_single_1", "448")}
    one = found["niah_single_1", "448"]
    assert 220 < one["prompt_tokens"]["max"] <= 448 - 128  # 128 tokens are kept for the answer
    assert one["prompts_cut"] == 0


def test_unknown_tasks_are_named_with_near_ones(model, tasks, monkeypatch, tmp_path):
    import lm_eval.tasks

    few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=str(tasks))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults, include_path=None, **more: few(**more))
    with pytest.raises(ValueError, match="Unknown task 'tiny_recal'; near matches: tiny_recall"):
        run(model, config("tiny_recal"))
    with pytest.raises(ValueError, match=r"Task file .*none\.yaml' does not exist"):
        run(model, config(tmp_path / "none.yaml"))
    assert by_metric(run(model, config("tiny_choice", limit=1)))["tiny_choice", "acc"]["samples"] == 1


def test_data_that_cannot_be_fetched(model, tmp_path):
    (tmp_path / "away.yaml").write_text(
        "task: away\ndataset_path: nobody/nothing-of-that-name\noutput_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: a\ndoc_to_choice: [a, b]\ndoc_to_target: 0\nmetric_list:\n  - metric: acc\n"
    )
    with pytest.raises(ValueError, match=r"The data of .*away\.yaml could not be read"):
        run(model, config(tmp_path / "away.yaml"))


def test_a_task_whose_package_is_missing(model, tasks, tmp_path):
    code = _CODE.replace("import datasets", "import datasets\nimport no_such_package_anywhere")
    (tmp_path / "needy_code.py").write_text(code)
    (tmp_path / "needy.yaml").write_text(_GENERATE.format(name="needy", code="needy_code"))
    with pytest.raises(ValueError, match=r"no_such_package_anywhere.*pip install rtpurbo\[eval\]"):
        run(model, config(tmp_path / "needy.yaml"))


def test_without_lm_eval(model, tasks, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install rtpurbo\[eval\]"):
        run(model, config(tasks / "choose.yaml"))
