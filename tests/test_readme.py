"""The README's table comes from the results, and the shipped artefact is whole."""

import importlib.util
import json
from pathlib import Path

import study_tables

import rtpurbo
from rtpurbo.checkpoint import Artifact
from rtpurbo.config import SparseConfig
from rtpurbo.data import documents
from rtpurbo.pipeline import HELDOUT
from rtpurbo.questions import retrieval_sample

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "artefacts" / "smollm2-135m-8k"


def tables():
    """The module benchmarks/tables.py."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_is_made_from_the_results():
    pages = [page.read_text() for page in tables().PAGES]
    for name, make in tables().TABLES.items():
        columns = 2 if name == "aims" else 4
        assert "|" + "---|" * columns in make() or make() == study_tables.MISSING or "](results.svg)" in make()
        assert any(make() in page for page in pages)
    for page in pages:
        assert tables().updated(page) == page


def test_plot_is_made_from_the_results():
    assert (ROOT / "docs" / "speed.svg").read_text() == tables().speed_svg()
    assert "](docs/speed.svg)" in (ROOT / "README.md").read_text()


def layer_result() -> dict:
    """What `rtpurbo bench` measured of a layer, small and made up."""
    rows = []
    for mode, seconds in (("heads", 2e-3), ("groups", 1e-3), ("paper", 4e-3)):
        row = {"mode": mode, "batch": 1, "slots": 65536, "sparse_seconds": seconds, "dense_seconds": 8e-3}
        row |= {"dense_backend": "flash", "speedup": 8e-3 / seconds, "dense_tflops": 600.0, "sparse_tflops": 400.0}
        rows.append(row | {"shares": {"index": 0.25, "attention": 0.7, "other": 0.05}, "parts": [{"far_ratio": 0.07}]})
    decode = {"mode": "heads", "batch": 1, "slots": 65536, "sparse_seconds": 1e-5, "sparse_tb_per_second": 2.0}
    groups = {"mode": "groups", "batch": 1, "slots": 65536, "refused": "out of memory"}
    shape = {"query_heads": 32, "kv_heads": 4, "head_dim": 128, "window_tokens": 8192, "retrieval": [1], "far_ratio": 0.03}
    environment = {"device": "GPU", "torch": "2", "triton": "3", "flash-attn-4": "4"}
    faster = {**decode, "slots": 131072, "dense_seconds": 5e-5, "dense_backend": "cudnn", "speedup": 5.0}
    faster["dense_tb_per_second"] = 2.5
    return {"environment": environment, "shape": shape, "rows": [decode, groups, faster], "prefill_rows": rows}


def test_the_layer_table_has_what_a_result_has():
    lines = tables().layer(layer_result()).splitlines()
    assert lines[:5] == [
        "| | best dense kernel | 1 heads select | 15 % of KV groups select | 1 heads dense in prefill (paper) "
        "| achieved, dense and sparse | index and selection |",
        "|---|---|---|---|---|---|---|",
        "| decode, 64K, batch 1 | refused | 10 | refused | – | –, 2.00 TB/s | – |",
        "| decode, 128K, batch 1 | 50 us (cudnn) | 10 (5.0x) | – | – | 2.50, 2.00 TB/s | – |",
        "| prefill, 64K | 8.0 ms (flash) | 2.0 (4.0x) | 1.0 (8.0x) | 4.0 (2.0x) | 600, 400 / 400 / 400 TFLOP/s "
        "| 25% / 25% / 25% |",
    ]


def test_the_plot_has_a_line_for_every_mode():
    from xml.etree import ElementTree

    svg = ElementTree.fromstring(tables().speed_svg(layer_result()))
    text = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"1 heads, batch 1", "1 heads", "15 % of groups", "paper", "64K", "128K"} <= set(text)
    marks = [float(c.get("cy")) for c in svg.iter("{http://www.w3.org/2000/svg}circle") if float(c.get("cx")) > 450]
    assert marks == [330 - 280 * speedup / 8 for speedup in (4, 8, 2)]


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
