"""The report: what it says of complete and partial artefacts, what it refuses, and how a browser shows it."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import random
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rtpurbo import model_card as card
from rtpurbo.checkpoint import Artifact
from rtpurbo.config import CalibrateConfig, DistillConfig, EvalConfig, IndexerConfig, SparseConfig
from rtpurbo.evals.statistics import paired
from rtpurbo.heads import HeadMap
from rtpurbo.indexer import make_indexer
from rtpurbo.report import write_report, write_speed_plot

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 8, 6, 3, 16
KINDS = ("single", "multi_key")
LENGTHS = (1024, 2048)
SOURCES = ("installed-docs:heldout", "books.txt")
ALL_STAGES = ("calibrate", "train_indexer", "distill")


def make_artifact(
    stages: tuple[str, ...] = ALL_STAGES, *, name: str = "owner/Tiny-Model", left: int | None = None
) -> Artifact:
    """An artefact with the metrics that its stages leave; layer `left` is one that stays as it is."""
    rng = random.Random(0)
    scores = [[round(rng.random(), 4) for _ in range(QUERY_HEADS)] for _ in range(LAYERS)]
    rows = [None if i == left else row for i, row in enumerate(scores)]
    heads = HeadMap.from_scores(rows, kv_heads=KV_HEADS, granularity="head", ratio=0.15)
    base = {"name": name, "revision": None, "model_type": "llama", "head_dim": HEAD_DIM, "fingerprint": "ba3ac923" * 8}
    artifact = Artifact(base_model=base, config=SparseConfig(window_tokens=256), heads=heads)
    if "calibrate" in stages:
        check = {"length_tokens": 2048, "samples": 8, "dense": 0.875, "chosen_heads": 0.75}
        metrics = {"scores": scores, "check": check, "overlap_between_seeds": 0.825, "notes": ["88% -> 75%."]}
        artifact = artifact.with_stage("calibrate", CalibrateConfig(lengths_tokens=LENGTHS), metrics)
    if "train_indexer" in stages:
        tensors = make_indexer(heads, head_dim=HEAD_DIM, index_dim=16).state_dict()
        artifact = artifact.with_stage("train_indexer", IndexerConfig(), index_metrics(heads, 1024), indexer=tensors)
    if "distill" in stages:
        artifact = artifact.with_stage("distill", DistillConfig(), {"loss_first": 0.2, "loss_last": 0.05})
    return artifact


def index_metrics(heads: HeadMap, length: int) -> dict:
    """What `measure` returns."""
    rng = random.Random(length)
    units = []
    for layer in heads.layers:
        for unit in range(len(heads.units(layer))):
            share, mass = rng.betavariate(1, 6), 1 - rng.betavariate(1, 30)
            values = {"kl": rng.random(), "mass_kept": mass, "far_selected_ratio": share, "tokens_selected": share * length}
            units.append({"layer": layer, "unit": unit, **values})
    names = ("kl", "mass_kept", "far_selected_ratio", "tokens_selected")
    means = {name: sum(u[name] for u in units) / len(units) for name in names}
    return {**means, "length_tokens": length, "documents": 4, "units": units}


def make_evaluation(heads: HeadMap, *, lengths=LENGTHS, sources=SOURCES, kinds=KINDS, samples: int = 15) -> dict:
    """What `evaluate` returns, with made-up numbers."""
    rng = random.Random(1)
    needle = []
    for length in lengths:
        for kind in kinds:
            dense, sparse = ([float(rng.random() < right) for _ in range(samples)] for right in (0.9, 0.7))
            depths = {}
            for i in range(5):
                some = {"dense": dense[i::5], "sparse": sparse[i::5]}
                means = {name: sum(values) / len(values) for name, values in some.items()}
                depths[f"{(i + 0.5) / 5:.1f}"] = {"samples": len(dense[i::5]), **means}
            needle.append({"kind": kind, "length_tokens": length, **paired(dense, sparse), "depths": depths})
    loss = {}
    for source in sources:
        dense = [rng.gauss(3, 0.1) for _ in range(8)]
        sparse = [d + 0.01 for d in dense]
        step = lengths[-1] // 8
        buckets = [
            {"from": step * i, "to": step * (i + 1), "loss_dense": 3 / (i + 1), "loss_sparse": 3.1 / (i + 1), "kl": 0.02}
            for i in range(8)
        ]
        facts = {"documents": 8, "length_tokens": lengths[-1], "kl": 0.0213, "top1_agreement": 0.951, "by_position": buckets}
        loss[source] = {**facts, **paired(dense, sparse)}
    short = {"documents": {}, "squad": {"samples": 50, "contains": {}, "f1": {}}}
    for source in sources:
        row = {name: paired([3.0, 2.0], [3.1, 2.1], other=name) for name in ("sparse", "weights")}
        close = {"kl": 0.001, "top1_agreement": 0.99}
        short["documents"][source] = {"length_tokens": 2048, **{name: {**pair, **close} for name, pair in row.items()}}
    for name, right in (("sparse", [1.0, 0.0]), ("weights", [1.0, 1.0])):
        short["squad"]["contains"][name] = short["squad"]["f1"][name] = paired([1.0, 0.5], right, other=name)
    drift = [{"from": 4 * i, "to": 4 * i + 4, "kl": 0.01 * (i + 1), "top1_agreement": 1 - 0.01 * i} for i in range(8)]
    long = {"prompts": 2, "prompt_tokens": 1000, "tokens": 32, "loss": paired([1.0, 2.0], [1.5, 2.5]), "drift": drift}
    long |= {"dense": {"repetition": 0.02, "loss": 1.5}, "sparse": {"repetition": 0.125, "loss": 2.0}}
    speed = {}
    for name, factor, share in (("dense", 1.0, 1.0), ("sparse", 1.25, 0.5)):
        bytes_each = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2 * share
        speed[name] = {
            "length_tokens": float(lengths[-1]),
            "prefill_seconds": 2 * factor,
            "decode_tokens_per_second": 20 / factor,
            "cache_bytes": bytes_each * lengths[-1],
        }
    settings = json.loads(json.dumps(dataclasses.asdict(EvalConfig(lengths_tokens=lengths))))
    index = index_metrics(heads, lengths[-1])
    facts = {"settings": settings, "sources": list(sources), "needle": needle, "loss": loss, "speed": speed, "index": index}
    return {**facts, "short": short, "long_generation": long}


def make_curve(steps: int, *, agreement: bool) -> list[dict]:
    """Rows of a metrics file."""
    losses = [0.05 + 2 * math.exp(-6 * i / steps) for i in range(steps)]
    extra = [{"top1_agreement": 0.9 - 0.1 * loss} if agreement else {} for loss in losses]
    rates = [1e-3 * (1 - i / steps) for i in range(steps)]
    rows = enumerate(zip(losses, extra, rates, strict=True))
    return [{"step": i, "loss": loss, **more, "learning_rate": rate} for i, (loss, more, rate) in rows]


def save(folder: Path, artifact: Artifact, *, evaluation: dict | None = None, curves: bool = False) -> Path:
    """Write an artefact's directory."""
    artifact.save(folder)
    if evaluation is not None:
        (folder / "eval.json").write_text(json.dumps(evaluation))
    if curves:
        (folder / "metrics").mkdir()
        for stage in ("train_indexer", "distill"):
            lines = [json.dumps(row) for row in make_curve(60, agreement=stage == "distill")]
            (folder / "metrics" / f"{stage}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def save_full(folder: Path, **options) -> Path:
    artifact = make_artifact()
    return save(folder, artifact, evaluation=make_evaluation(artifact.heads, **options), curves=True)


class Page(HTMLParser):
    """What a report holds: tags, text outside scripts and styles, rows of cells, and Plotly figures by name."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.headings: list[str] = []
        self.figures: dict[str, dict] = {}
        self.rows: list[list[str]] = []
        self.text = ""
        self._open = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        self._open = tag
        if "data-figure" in found:
            self.figures[found["id"]] = json.loads(found["data-figure"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_data(self, data):
        if self._open in ("script", "style"):
            return
        self.text += data
        if self._open in ("td", "th", "small"):
            self.rows[-1][-1] += data
        if self._open in ("h1", "h2", "h3", "wbr"):
            self.headings[-1] += data

    def handle_endtag(self, tag):
        self._open = ""


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return write_report(save_full(tmp_path_factory.mktemp("full") / "artefact"))


def test_full_report_has_every_part(full):
    page = Page(full)
    sections = [text for tag, text in zip(_heading_tags(page), page.headings, strict=True) if tag == "h2"]
    assert sections == [
        "Dense and sparse", "Head map", "Index", "Distillation", "Needles in long documents", "Loss by position",
        "Short context", "Long generation", "Cache", "Settings",
    ]  # fmt: skip
    assert page.headings[0] == "owner/Tiny-Model"
    assert list(page.figures) == [
        "head-map", "train_indexer-loss", "train_indexer-learning_rate", "index-units", "distill-loss",
        "distill-top1_agreement", "distill-learning_rate", "loss-0", "loss-1", "drift-kl",
        "drift-top1_agreement", "cache-bytes",
    ]  # fmt: skip
    assert "has not been run" not in page.text
    assert full.name == "report.html"
    assert not [p for p in full.parent.iterdir() if p.name.startswith(".tmp")]


def _heading_tags(page: Page) -> list[str]:
    return [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")]


def test_report_is_one_file_that_asks_for_nothing(full):
    page = Page(full)
    assert not [a for _, a in page.tags if "src" in a or "href" in a]
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert any("default-src 'none'" in a.get("content", "") for _, a in page.tags)


def test_report_is_the_same_every_time(full, tmp_path):
    other = write_report(full.parent, tmp_path / "new" / "other.html")
    assert other == tmp_path / "new" / "other.html"
    assert other.read_bytes() == full.read_bytes()


def test_summary_has_the_measured_numbers(full):
    rows = {row[0]: row[1:] for row in Page(full).rows}
    assert [name for name in rows if " needle, " in name] == [
        f"Answers right, {kind.replace('_', '-')} needle, {length:,} tokens" for kind in KINDS for length in LENGTHS
    ]
    evaluation = json.loads((full.parent / "eval.json").read_text())
    one = evaluation["needle"][0]
    dense, sparse, difference, samples = rows["Answers right, single needle, 1,024 tokens"]
    assert (dense, sparse, samples) == (f"{one['dense']:.1%}", f"{one['sparse']:.1%}", "15")
    low, high = one["difference_95"]
    want = f"{100 * one['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    assert difference == want.replace("-", "−")
    assert rows["Loss in nats, books.txt, 2,048 tokens"][2] == "+0.0100 [+0.0100, +0.0100]"
    assert rows["Same most likely token as dense, books.txt, 2,048 tokens"] == ["–", "95.1%", "–", "8"]
    assert rows["Decode, 2,048 tokens"] == ["20.0 tokens/s", "16.0 tokens/s", "0.80 × dense", "1 run"]
    assert rows["Cache, 2,048 tokens"][2] == "0.50 × dense"
    check = rows["Answers right, check of the head map without index, 2,048 tokens"]
    assert check == ["87.5%", "75.0%", "−12.5 points", "8"]  # no interval was measured
    assert rows["window_tokens"] == ["256"]


def test_short_context_has_all_three_models(full):
    page = Page(full)
    header = ["Measure", "Dense", "Sparse", "Sparse − dense [95 %]", "Weights", "Weights − dense [95 %]", "Samples"]
    start = page.rows.index(header)
    more = "+0.1000 [+0.1000, +0.1000]"
    assert page.rows[start + 1] == [
        "Loss in nats at short context, installed-docs:heldout, 2,048 tokens", "2.5000", "2.6000", more, "2.6000", more, "2",
    ]  # fmt: skip
    assert page.rows[start + 3] == [
        "SQuAD, replies with the answer", "75.0%", "50.0%", "−25.0 points [−50.0, +0.0]", "100.0%",
        "+25.0 points [+0.0, +50.0]", "50",
    ]  # fmt: skip
    assert "distilled ones with dense attention" in page.text


def test_drift_is_a_step_for_every_eighth(full):
    page = Page(full)
    (kl,), (same,) = (page.figures[f"drift-{key}"]["data"] for key in ("kl", "top1_agreement"))
    assert kl["x"] == [0, 4, 8, 12, 16, 20, 24, 28, 32] == same["x"]
    assert kl["y"][:2] == [0.01, 0.02]
    assert kl["y"][-1] == kl["y"][-2] == 0.08
    assert same["y"][-1] == pytest.approx(0.93)
    rows = {row[0]: row[1:] for row in page.rows}
    what = "32 tokens generated after 1,000 tokens"
    assert rows[f"Dense model's loss in nats on {what}"] == ["1.5000", "2.0000", "+0.5000 [+0.5000, +0.5000]", "2"]
    assert rows[f"Repeated pieces of 8 tokens among {what}"] == ["2.0%", "12.5%", "–", "2"]


@pytest.mark.parametrize("part", ["documents", "squad"])
def test_short_context_without_distilled_weights_or_a_part(tmp_path, part):
    artifact = make_artifact()
    evaluation = make_evaluation(artifact.heads)
    short = {part: evaluation["short"][part]}
    for one in short[part].values():
        if isinstance(one, dict):
            one.pop("weights", None)
    page = Page(write_report(save(tmp_path / "a", artifact, evaluation={**evaluation, "short": short})))
    start = page.rows.index(["Measure", "Dense", "Sparse", "Sparse − dense [95 %]", "Samples"])
    assert [len(row) for row in page.rows[start : start + 3]] == [5] * 3
    assert "distilled ones" not in page.text


def test_an_evaluation_from_before_short_and_long_still_renders(tmp_path):
    artifact = make_artifact()
    evaluation = {k: v for k, v in make_evaluation(artifact.heads).items() if k not in ("short", "long_generation")}
    page = Page(write_report(save(tmp_path / "a", artifact, evaluation=evaluation)))
    assert "Short context" not in page.headings
    assert "Long generation" not in page.headings
    assert not [row for row in page.rows if "short context" in row[0] or "generated" in row[0]]
    assert "Loss by position" in page.headings


def test_needle_cells_hold_share_and_count(full):
    evaluation = json.loads((full.parent / "eval.json").read_text())
    cells = [cell for row in Page(full).rows for cell in row if "n = " in cell]
    grid = [one["depths"]["0.1"] for one in evaluation["needle"] if one["kind"] == "single"]
    assert len(cells) == len(KINDS) * 2 * 5 * len(LENGTHS)
    assert cells[: len(grid)] == [f"{c['dense']:.0%}n = {c['samples']}" for c in grid]


def test_needle_grid_has_holes_where_a_depth_was_not_asked(tmp_path):
    artifact = make_artifact()
    evaluation = make_evaluation(artifact.heads)
    del evaluation["needle"][0]["depths"]["0.5"]
    page = Page(write_report(save(tmp_path / "a", artifact, evaluation=evaluation)))
    assert next(row for row in page.rows if row[0] == "0.5")[1] == ""


def test_head_map_outlines_the_retrieval_heads(full):
    heads = Artifact.load(full.parent).heads
    heat, outline = Page(full).figures["head-map"]["data"]
    scores = Artifact.load(full.parent).stages["calibrate"]["metrics"]["scores"]
    assert heat["z"] == [list(column) for column in zip(*scores, strict=True)]
    x, y = (outline[axis] for axis in ("x", "y"))
    marked = {(round(x[i] + 0.42), round(y[i] + 0.42)) for i in range(0, len(x), 6)}
    assert marked == {(layer, head) for layer in heads.layers for head in heads.retrieval_heads(layer)}
    lines = [shape["y0"] for shape in Page(full).figures["head-map"]["layout"]["shapes"]]
    assert lines == [1.5, 3.5]  # between KV heads of two query heads each


def test_group_map_outlines_whole_groups(tmp_path):
    heads = HeadMap(query_heads=6, kv_heads=3, granularity="group", retrieval=((0, 1, 4, 5),))
    artifact = dataclasses.replace(make_artifact(()), heads=heads)
    outline = Page(write_report(save(tmp_path / "a", artifact))).figures["head-map"]["data"][1]
    assert outline["y"] == [-0.42, -0.42, 1.42, 1.42, -0.42, None, 3.58, 3.58, 5.42, 5.42, 3.58, None]


def test_layers_left_as_they_are_are_blank(tmp_path):
    artifact = make_artifact(("calibrate",), left=2)
    page = Page(write_report(save(tmp_path / "a", artifact)))
    z = page.figures["head-map"]["data"][0]["z"]
    assert all(row[2] is None and row[3] is not None for row in z)
    assert "left as they are" in page.text


def test_curves_use_a_log_scale_only_for_positive_losses(tmp_path):
    folder = save_full(tmp_path / "a")
    assert Page(write_report(folder)).figures["distill-loss"]["layout"]["yaxis"]["type"] == "log"
    (folder / "metrics" / "distill.jsonl").write_text('{"step": 0, "loss": -1e-9, "learning_rate": 0.1}\n')
    page = Page(write_report(folder))
    assert page.figures["distill-loss"]["layout"]["yaxis"]["type"] == "linear"
    assert page.figures["distill-loss"]["data"][0]["mode"] == "lines+markers"  # one step alone draws no line


def test_index_marks_are_its_units(full):
    trained, evaluated = Page(full).figures["index-units"]["data"]
    units = json.loads((full.parent / "eval.json").read_text())["index"]["units"]
    assert evaluated["x"] == [u["tokens_selected"] for u in units]
    assert evaluated["y"] == [u["mass_kept"] for u in units]
    assert (trained["name"], evaluated["name"]) == ("after training, 1,024 tokens", "evaluation, 2,048 tokens")


def test_cache_curve_says_what_is_computed(full):
    traces = {t["name"]: t for t in Page(full).figures["cache-bytes"]["data"]}
    assert set(traces) == {f"{a}, {b}" for a in ("dense", "sparse") for b in ("measured", "computed")}
    assert traces["dense, measured"]["x"] == [2048.0]
    assert traces["dense, measured"]["y"] == [2 * LAYERS * KV_HEADS * HEAD_DIM * 2 * 2048 / 2**20]


def test_several_speed_lengths(tmp_path):
    artifact = make_artifact()
    evaluation = make_evaluation(artifact.heads)
    one = evaluation["speed"]
    longer = {n: [{**row, "length_tokens": 4096.0, "cache_bytes": 2 * row["cache_bytes"]}, row] for n, row in one.items()}
    page = Page(write_report(save(tmp_path / "a", artifact, evaluation={**evaluation, "speed": longer})))
    assert page.figures["cache-bytes"]["data"][0]["x"] == [2048.0, 4096.0]
    assert {"Cache, 2,048 tokens", "Cache, 4,096 tokens"} <= {row[0] for row in page.rows}


def test_no_computed_cache_where_the_formula_does_not_hold(tmp_path):
    artifact = make_artifact()
    evaluation = make_evaluation(artifact.heads)
    evaluation["speed"]["dense"]["cache_bytes"] *= 0.9
    page = Page(write_report(save(tmp_path / "a", artifact, evaluation=evaluation)))
    assert {t["name"] for t in page.figures["cache-bytes"]["data"]} == {"dense, measured", "sparse, measured"}


def test_calibrated_artifact_names_what_is_missing(tmp_path):
    page = Page(write_report(save(tmp_path / "a", make_artifact(("calibrate",)))))
    for stage, command in (("Index training", "train-indexer"), ("Distillation", "distill"), ("Evaluation", "eval")):
        assert f"{stage} has not been run: rtpurbo {command} adds it." in page.text
    assert "Calibration has not been run" not in page.text
    assert list(page.figures) == ["head-map"]
    assert "read all earlier tokens" in page.text
    for absent in ("Needles", "Loss by position", "Cache", "Distillation\n", "decode"):
        assert absent not in page.headings
    assert [r[0] for r in page.rows if "–" in r] == []


def test_head_map_without_calibration(tmp_path):
    page = Page(write_report(save(tmp_path / "a", make_artifact(()))))
    assert "made without calibration" in page.text
    assert "rtpurbo calibrate" in page.text
    assert page.figures["head-map"]["data"][0]["showscale"] is False
    assert not [row for row in page.rows if len(row) == 5]  # nothing was measured: no table


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("overlap_between_seeds", "Chosen under two seeds, each with half of the documents, 71% of the retrieval heads"),
        ("overlap_between_halves", "Chosen from either half of the documents alone, 71% of the retrieval heads"),
    ],
)
def test_the_overlap_of_the_choice_is_told(tmp_path, key, said):
    artifact = make_artifact()
    metrics = artifact.stages["calibrate"]["metrics"]
    del metrics["overlap_between_seeds"]
    artifact.save(tmp_path / "without")
    assert "retrieval heads are the same" not in Page(write_report(tmp_path / "without")).text
    metrics[key] = 0.714
    artifact.save(tmp_path / "with")
    assert said in Page(write_report(tmp_path / "with")).text


def test_finished_stage_without_its_metrics_file(tmp_path):
    page = Page(write_report(save(tmp_path / "a", make_artifact())))
    assert "No curves: there is no metrics/train_indexer.jsonl." in page.text
    assert "No curves: there is no metrics/distill.jsonl." in page.text


def test_evaluation_of_an_earlier_state_is_called_so(tmp_path):
    folder = save_full(tmp_path / "a")
    evaluation = json.loads((folder / "eval.json").read_text())
    now = Artifact.load(folder)
    (folder / "eval.json").write_text(json.dumps({**evaluation, "artifact": now.digest()}))
    assert "earlier state" not in Page(write_report(folder)).text
    before = dataclasses.replace(now, config=dataclasses.replace(now.config, top_p=0.5))
    (folder / "eval.json").write_text(json.dumps({**evaluation, "artifact": before.digest()}))
    assert "earlier state of this artefact: rtpurbo eval measures it" in Page(write_report(folder)).text


def test_text_is_escaped(tmp_path):
    evil = "<script>alert('1')</script><img src=x onerror=alert(2)>&amp;\"'"
    artifact = make_artifact(name=evil)
    artifact.stages["calibrate"]["metrics"]["notes"] = [evil]
    artifact.stages["calibrate"]["settings"][evil] = evil
    artifact.stages[evil] = {"settings": {"a": evil}, "metrics": {}}
    evaluation = make_evaluation(artifact.heads, sources=(evil,), kinds=(evil,))
    evaluation["needle"][0]["depths"][evil] = evaluation["needle"][0]["depths"]["0.1"]
    path = write_report(save(tmp_path / "a", artifact, evaluation=evaluation, curves=True))
    page = Page(path)
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2
    assert "img" not in names
    assert page.headings[0] == evil
    assert page.text.count(evil) >= 6
    assert f"<title>RTPurbo report: {'&lt;script&gt;'}" in path.read_text()


BAD_EVALUATIONS = [
    ("{", "expected JSON"),
    ("[]", "expected an object, got '\\[\\]'"),
    ('{"needle": {}}', "'needle': expected a list"),
    ('{"needle": [{"kind": 1}]}', "'needle', entry 0: expected the key 'samples', got kind"),
    ('{"loss": {"a": {}}}', "'loss', 'a': expected the key 'samples', got no key"),
    ('{"speed": {"dense": []}}', "'speed': expected the key 'sparse', got dense"),
    ('{"speed": {"dense": 3, "sparse": []}}', "'speed', 'dense': expected a list, got '3'"),
    ('{"index": null}', "'index': expected an object, got 'None'"),
    ('{"sources": [3]}', "'sources', entry 0: expected text, got '3'"),
]


@pytest.mark.parametrize(("content", "message"), BAD_EVALUATIONS)
def test_malformed_evaluation_is_refused(tmp_path, content, message):
    folder = save(tmp_path / "a", make_artifact())
    (folder / "report.html").write_text("the old report")
    (folder / "eval.json").write_text(content)
    with pytest.raises(ValueError, match=f"eval.json.*{message}.*Run `rtpurbo eval` again"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "the old report"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": True}, "'dense': expected a finite number, got 'True'"),
        ({"dense": math.nan}, "'dense': expected a finite number, got 'nan'"),
        ({"difference_95": [0.1]}, "'difference_95': expected a list of 2"),
        ({"depths": {"0.1": {"samples": 3}}}, "'depths', '0.1': expected the key 'dense'"),
    ],
)
def test_malformed_needle_result_is_refused(tmp_path, change, message):
    artifact = make_artifact()
    evaluation = make_evaluation(artifact.heads)
    evaluation["needle"][1].update(change)
    with pytest.raises(ValueError, match=f"'needle', entry 1, {message}"):
        write_report(save(tmp_path / "a", artifact, evaluation=evaluation))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 0, "lo', "line 2 is damaged: expected JSON"),
        ('{"step": 0, "loss": 1}', "entry 1: expected the key 'learning_rate', got step, loss"),
        ('{"step": 0, "loss": NaN, "learning_rate": 1}', "entry 1, 'loss': expected a finite number"),
        ("7", "entry 1: expected an object, got '7'"),
    ],
)
def test_malformed_curve_is_refused(tmp_path, line, message):
    folder = save(tmp_path / "a", make_artifact(), curves=True)
    good = json.dumps(make_curve(2, agreement=False)[0])
    (folder / "metrics" / "distill.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=f"distill.jsonl.*{message}.*Delete the file"):
        write_report(folder)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({}, "expected the key 'scores'"),
        ({"scores": [[0.1] * QUERY_HEADS]}, "expected 8 layers of 6 heads, got 1 layers of 6 heads. Calibrate again"),
        ({"scores": []}, "got 0 layers of no heads"),
        ({"scores": [["a"]]}, "'scores', entry 0, entry 0: expected a finite number, got 'a'"),
    ],
)
def test_malformed_stage_is_refused(tmp_path, metrics, message):
    artifact = make_artifact(("calibrate",))
    artifact.stages["calibrate"]["metrics"] = metrics
    with pytest.raises(ValueError, match=message):
        write_report(save(tmp_path / "a", artifact))


def test_wrong_places_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not an artefact: expected a directory with rtpurbo_config.json.*convert"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="is not an artefact"):
        write_report(Path("owner/name"))  # never fetched from the hub
    folder = save(tmp_path / "a", make_artifact(()))
    with pytest.raises(ValueError, match="is a directory; expected a file"):
        write_report(folder, tmp_path)


def test_computed_cache_by_hand():
    heads = HeadMap(query_heads=4, kv_heads=2, granularity="head", retrieval=((0, 1), ()))
    config = SparseConfig(window_tokens=8, sink_tokens=2, index_dim=3)
    artifact = Artifact(base_model={"name": "m", "head_dim": 5}, config=config, heads=heads, indexer={})
    dense = {"length_tokens": 100.0, "cache_bytes": 2.0 * (2 * 2 * 2 * 5) * 100}
    found = card.computed_cache(artifact, dense, [4.0, 100.0])
    # One full KV head; three local ones that hold 7 + 2 tokens; two index keys of three numbers per token.
    assert found["dense"] == [2 * 40 * 4, 2 * 40 * 100]
    assert found["sparse"] == [2 * (10 * (4 + 3 * 4) + 6 * 4), 2 * (10 * (100 + 3 * 9) + 6 * 100)]
    artifact = dataclasses.replace(artifact, config=dataclasses.replace(config, index_dtype="float8"))
    found = card.computed_cache(artifact, dense, [4.0, 100.0])  # its index keys take one byte a number
    assert found["sparse"] == [2 * 10 * (4 + 3 * 4) + 6 * 4, 2 * 10 * (100 + 3 * 9) + 6 * 100]


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium; without it the tests are skipped, but not in CI."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        reason = "Chromium or its driver is not installed (Debian: chromium, chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()


def show(browser, path: Path, *, width: int) -> None:
    """Load a page as a screen of this width shows it; below 600 px a phone's."""
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_script("window.left = true")
    browser.get(path.as_uri())
    loaded = "return !window.left && document.readyState == 'complete' && location.href == arguments[0]"
    deadline = time.monotonic() + 30
    while not browser.execute_script(loaded, path.as_uri()):  # `get` may return before the page it left is gone
        assert time.monotonic() < deadline, f"{path} is not shown"
        time.sleep(0.02)


PLOTS = """return [...document.querySelectorAll("[data-figure]")].map((plot) => {
  const box = plot.querySelector(".main-svg").getBoundingClientRect();
  const marks = [...plot.querySelectorAll(".scatterlayer .trace path, .heatmaplayer image")];
  const drawn = marks.filter((mark) => mark.getBoundingClientRect().width > 0);
  return {id: plot.id, traces: plot.data.length, drawn: drawn.length, width: box.width, height: box.height,
          right: box.right, column: plot.parentElement.getBoundingClientRect().width};
})"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["full", "calibrated", "long"])
def test_browser_draws_every_figure_within_the_page(browser, full, tmp_path, width, kind):
    path = full
    if kind == "calibrated":
        path = write_report(save(tmp_path / "a", make_artifact(("calibrate",))))
    if kind == "long":  # many lengths, and names without a place to break
        artifact = make_artifact(name="n" * 120)
        lengths = tuple(1024 * 2**i for i in range(10))
        evaluation = make_evaluation(artifact.heads, lengths=lengths, sources=("/" + "s" * 150,))
        path = write_report(save(tmp_path / "a", artifact, evaluation=evaluation, curves=True))
    show(browser, path, width=width)
    plots = browser.execute_script(PLOTS)
    assert [p["id"] for p in plots] == list(Page(path).figures)
    for plot in plots:
        assert plot["traces"] >= 1, plot
        assert plot["drawn"] >= plot["traces"], plot
        assert plot["height"] > 150, plot
        assert abs(plot["width"] - plot["column"]) < 1, plot  # drawn for the column it stands in
        assert plot["right"] <= width, plot
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def test_browser_runs_no_script_of_a_name(browser, tmp_path):
    evil = "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>"
    artifact = make_artifact(name=evil)
    evaluation = make_evaluation(artifact.heads, sources=(evil,), kinds=(evil,))
    show(browser, write_report(save(tmp_path / "a", artifact, evaluation=evaluation)), width=1280)
    assert browser.execute_script("return window.hit ?? null") is None
    assert browser.get_log("browser") == []


def test_browser_prints(browser, full):
    show(browser, full, width=1280)
    browser.execute_script(f"addEventListener('beforeprint', () => window.printed = (() => {{ {PLOTS} }})())")
    sheet = {"printBackground": True, "preferCSSPageSize": True, "paperWidth": 8.27, "paperHeight": 11.69}  # A4 in inches
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", sheet)["data"])
    assert pdf.startswith(b"%PDF-")
    assert 3 <= pdf.count(b"/Type /Page\n") <= 12
    printed = browser.execute_script("return window.printed")
    assert len(printed) == 12
    assert [p["width"] for p in printed if not 0 < p["width"] <= 703] == []  # A4 less its margins
    after = browser.execute_script(PLOTS)
    assert [(p["width"], p["column"]) for p in after if abs(p["width"] - p["column"]) >= 1] == []


def layer_result() -> dict:
    """What `bench_layer` returns, made up: heads at two lengths and batches, one of them refused; one prefill."""
    rows = [
        {"mode": mode, "batch": batch, "slots": slots, "speedup": batch * slots / 4096}
        for batch in (1, 8)
        for slots in (4096, 8192)
        for mode in ("heads", "groups")
    ]
    rows[-1] = {"mode": "groups", "batch": 8, "slots": 8192, "refused": "out of memory"}
    prefill = [{"mode": mode, "batch": 1, "slots": 5000, "speedup": 2.0} for mode in ("heads", "groups", "paper")]
    shape = {"query_heads": 32, "kv_heads": 4, "head_dim": 128, "window_tokens": 8192}
    about = {"device": "GPU <1>", "dtype": "torch.bfloat16", "torch": "2.11", "attention": "triton (kernels)"}
    return {**about, "shape": shape, "rows": rows, "prefill_rows": prefill}


def test_speed_plot_has_a_line_per_mode_and_batch(tmp_path):
    write_speed_plot(layer_result(), tmp_path / "speed.html")
    page = Page(tmp_path / "speed.html")
    assert page.headings == ["Speed of one attention layer", "Decode", "Prefill"]
    assert "GPU <1>" in page.text
    lines = {one["name"]: (one["x"], one["y"]) for one in page.figures["decode"]["data"]}
    assert lines == {
        "single heads select, batch 1": ([4096, 8192], [1.0, 2.0]),
        "whole groups select, batch 1": ([4096, 8192], [1.0, 2.0]),
        "single heads select, batch 8": ([4096, 8192], [8.0, 16.0]),
        "whole groups select, batch 8": ([4096], [8.0]),
    }
    axis = page.figures["decode"]["layout"]["xaxis"]
    assert (axis["type"], axis["tickvals"], axis["ticktext"]) == ("log", [4096, 8192], ["4K", "8K"])
    prefill = page.figures["prefill"]
    assert [one["name"] for one in prefill["data"]][2] == "retrieval heads dense in prefill (paper)"
    assert prefill["layout"]["xaxis"]["ticktext"] == ["5,000"]


def test_speed_plot_without_a_dense_kernel_says_so(tmp_path):
    result = layer_result() | {"prefill_rows": [{"mode": "heads", "batch": 1, "slots": 5000}]}
    write_speed_plot(result, tmp_path / "speed.html")
    page = Page(tmp_path / "speed.html")
    assert list(page.figures) == ["decode"]
    assert "No dense kernel ran" in page.text
