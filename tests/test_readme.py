"""The README's table comes from the results, and the shipped artefact is whole."""

import importlib.util
import json
from pathlib import Path

import rtpurbo
from rtpurbo.checkpoint import Artifact
from rtpurbo.config import SparseConfig

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "artefacts" / "smollm2-135m-8k"


def test_table_is_made_from_the_results():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (ROOT / "README.md").read_text()
    assert "|---|---|---|---|" in tables.smollm2()
    assert tables.updated(text) == text


def test_first_command_within_twenty_lines():
    lines = (ROOT / "README.md").read_text().splitlines()[:20]
    assert any(line.startswith("make demo") for line in lines)


def test_shipped_artefact_runs():
    """On the embedded weights: their fingerprint on every Transformers version, and a prompt beyond the window."""
    model, tokenizer = rtpurbo.load(SHIPPED)
    text = "The museum closes at five. " * 200 + "\nQuestion: when does the museum close? Answer: at"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.shape[1] > 1100
    out = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(out[0, ids.shape[1] :]).strip() == "five"


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
