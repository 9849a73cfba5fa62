"""The README's table comes from the results, and the shipped artefact is whole."""

import importlib.util
import json
from pathlib import Path

from rtpurbo.checkpoint import Artifact
from rtpurbo.config import SparseConfig

ROOT = Path(__file__).parent.parent


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


def test_shipped_artefact():
    path = ROOT / "artefacts" / "smollm2-135m-8k"
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
