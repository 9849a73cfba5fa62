"""The README's table comes from the results, and the shipped artefact is whole."""

import importlib.util
import json
from pathlib import Path

import rtpurbo
from rtpurbo.checkpoint import Artifact
from rtpurbo.config import SparseConfig
from rtpurbo.data import documents, retrieval_sample
from rtpurbo.pipeline import HELDOUT

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "artefacts" / "smollm2-135m-8k"


def test_table_is_made_from_the_results():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (ROOT / "README.md").read_text()
    for make in tables.TABLES.values():
        assert "|---|---|---|---|" in make()
        assert make() in text
    assert tables.updated(text) == text


def test_first_command_within_twenty_lines():
    lines = (ROOT / "README.md").read_text().splitlines()[:20]
    assert any(line.startswith("make demo") for line in lines)


def test_shipped_artefact_runs():
    """On the embedded weights: their fingerprint on every Transformers version, and a prompt beyond the window."""
    model, tokenizer = rtpurbo.load(SHIPPED)
    document = documents(HELDOUT, tokenizer, length_tokens=1280, count=1, seed=0)[0]
    sample = retrieval_sample(document, tokenizer, kind="single", depth=0.1, seed="0")
    start, stop = sample.answers[0]
    out = model.generate(sample.prompt[None], max_new_tokens=stop - start, do_sample=False, pad_token_id=0)
    assert out[0, len(sample.prompt) :].tolist() == sample.tokens[start:stop].tolist()


def test_shipped_artefact():
    path = SHIPPED
    artifact = Artifact.load(path)
    assert artifact.base_model["name"] == "smollm2-135m"
    assert artifact.weights_kind == "lora"
    assert artifact.indexer is not None
    measured = json.loads((ROOT / "benchmarks" / "results" / "smollm2_8k_group.json").read_text())
    assert measured["base_model"] == artifact.base_model
    assert SparseConfig(**{"min_probability": 0.0} | measured["sparse"]) == artifact.config
    assert measured["stages"] == artifact.stages
    assert sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) < 5e6
    assert (path / "NOTICE").is_file()
