"""The tables of a study: exact rows of made-up cells, with cells missing, and what they refuse."""

import json
from xml.etree import ElementTree

import pytest
import study
import study_tables as tables

SETTINGS = {"dev": ["/text/novels", "package:sklearn"], "lengths": [4096, 8192]}
ENVIRONMENT = {"device": "GPU", "torch": "2", "transformers": "5", "commit": "abc"}
PAIR = {"samples": 4, "dense": 0.5, "sparse": 0.25, "recovery": 0.5, "difference": -0.25, "difference_95": [-0.5, 0.0]}


def found(**cells: dict) -> dict:
    """What `collect` writes."""
    made = {name: {"run": 0, "seconds": 1.0, "result": result} for name, result in cells.items()}
    return {"runs": [{"environment": ENVIRONMENT, "settings": SETTINGS}], "cells": made}


def score(*scores: float, prompts: str = "same", **more: object) -> dict:
    """What a cell of RULER holds."""
    return {"scores": list(scores), "prompts": prompts, "prompt_tokens": {"mean": 4000.4}, "prompts_cut": 0, **more}


def loss(length: int) -> dict:
    """What fidelity holds of a source and length."""
    parts = [{"loss_dense": 2.0, "loss_sparse": 2.0 + 0.01 * i} for i in range(8)]
    index = {"mass_kept": 0.975, "far_selected_ratio": 0.05, "documents": 4}
    return {
        "documents": 8, "length_tokens": length, "dense": 2.0, "sparse": 2.01, "kl": 0.01, "top1_agreement": 0.95,
        "by_position": parts, "index": index,
    }  # fmt: skip


RULER = {
    "ruler/4096/niah_single_2/dense": score(*[1.0] * 8),
    "ruler/4096/niah_single_2/sparse": score(*[1.0] * 8),
    "ruler/4096/ruler_vt/dense": score(*[1.0] * 8, prompts="vt", prompts_cut=2),
    "ruler/4096/ruler_vt/sparse": score(*[0.5] * 8, prompts="vt", prompts_cut=2),
    "ruler/4096/niah_multikey_2/dense": score(*[0.25] * 8),
}


def test_ruler_has_exactly_these_rows():
    assert tables.ruler(found(**RULER)).splitlines() == [
        "| RULER, 4096 tokens | samples | prompt tokens | dense | sparse | recovery | difference, 95 % |",
        "|---|---|---|---|---|---|---|",
        "| niah_single_2 | 8 | 4000 | 100.0% | 100.0% | 1.000 | +0.0% to +0.0% |",
        "| **ruler_vt** | 8 | 4000 | 100.0% | 50.0% | 0.500 | -50.0% to -50.0% |",
        "| average of 2 | 16 |  | 100.0% | 75.0% | 0.750 | -25.0% to -25.0% |",
        "| average, no task above dense |  |  | 100.0% | 75.0% | 0.750 | – |",
        "",
        "2 prompts did not fit and were cut.",
    ]


def test_a_loss_that_may_be_chance_is_not_marked():
    cells = {f"ruler/4096/t/{name}": score(*values) for name, values in (("dense", [1, 0, 1, 1]), ("sparse", [0, 1, 1, 0]))}
    row = tables.ruler(found(**cells)).splitlines()[2]
    assert row.startswith("| t | 4 | 4000 | 75.0% | 50.0% | 0.667 | ")


@pytest.mark.parametrize("other", [score(1.0, prompts="other"), score(1.0, 1.0)])
def test_other_prompts_are_refused(other):
    cells = {"ruler/4096/t/dense": score(1.0), "ruler/4096/t/sparse": other}
    for make in (tables.ruler, tables.rivals):
        with pytest.raises(ValueError, match="ruler/4096/t/sparse: other prompts than those of dense"):
            make(found(**cells))


def test_the_average_redraws_samples_within_tasks():
    low, high = tables.average_interval([([0.0] * 50, [0.0, 1.0] * 25), ([1.0] * 4, [1.0] * 4)])
    assert 0.17 < low < 0.22  # 0.25 -/+ 1.96 * half of the first task's standard error of 0.0707
    assert 0.28 < high < 0.33


def test_rivals_are_compared_on_their_own_tasks():
    cells = {
        f"ruler/4096/{task}/{method}": score(*values, **({"bytes_ratio": 0.25} if method == "quest" else {}))
        for task in ("a", "b")
        for method, values in (("dense", [1, 1]), ("sparse", [1, 1]), ("quest", [0, 0]))
    }
    assert tables.rivals(found(**cells)).splitlines()[:5] == [
        "| RULER, 4096 tokens | tasks | average | sparse on these | difference | bytes read | a | b |",
        "|---|---|---|---|---|---|---|---|",
        "| dense | 2 | 100.0% | 100.0% | +0.0% (+0.0% to +0.0%) | 1.000 | 100.0% | 100.0% |",
        "| sparse | 2 | 100.0% | 100.0% | – | – | 100.0% | 100.0% |",
        "| quest | 2 | 0.0% | 100.0% | -100.0% (-100.0% to -100.0%) | 0.250 | 0.0% | 0.0% |",
    ]
    svg = tables.results_svg({"Model": found(**cells), "Other": None})
    text = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"dense", "quest", "Model: RULER average of 2 tasks"} <= set(text)
    assert "sparse" not in text
    del cells["ruler/4096/a/quest"]
    assert tables.rivals(found(**cells)).splitlines()[2:5] == [
        "| dense | 1 | 100.0% | 100.0% | +0.0% (+0.0% to +0.0%) | 1.000 | 100.0% |",
        "| sparse | 1 | 100.0% | 100.0% | – | – | 100.0% |",
        "| quest | 1 | 0.0% | 100.0% | -100.0% (-100.0% to -100.0%) | 0.250 | 0.0% |",
    ]
    cells |= {f"ruler/4096/a/{name}": score(*values) for name, values in (("window", [1, 0]), ("sparse", [1, 1]))}
    assert tables.rivals(found(**cells)).splitlines()[4:6] == [
        "| quest | 1 | 0.0% | 100.0% | -100.0% (-100.0% to -100.0%) | 0.250 | – | 0.0% |",
        "| window | 1 | 50.0% | 100.0% | -50.0% (-100.0% to +0.0%) | – | 50.0% | – |",
    ]
    del cells["ruler/4096/a/window"]
    del cells["ruler/4096/b/quest"]
    assert tables.rivals(found(**cells)) == ""
    assert tables.results_svg({"Model": found(**cells)}) is None  # what sparse reads is unknown


def test_the_figure_leaves_out_a_method_that_ran_on_few_tasks():
    cells = {f"ruler/4096/{task}/{name}": score(1.0) for task in "abc" for name in ("dense", "sparse", "quest", "window")}
    cells["ruler/4096/b/top_k"] = score(1.0)
    at = tables.compared(found(**cells))
    assert at["tasks"] == ["a", "b", "c"]
    assert list(at["scores"]) == ["dense", "sparse", "quest", "window"]
    assert "| top_k | 1 | 100.0% |" in tables.rivals(found(**cells))
    cells |= {f"ruler/4096/{task}/top_k": score(1.0) for task in "ac"}
    del cells["ruler/4096/a/window"]
    at = tables.compared(found(**cells))  # 5 methods on 2 tasks against 4 on 3
    assert list(at["scores"]) == ["dense", "sparse", "top_k", "quest"]
    assert at["tasks"] == ["a", "b", "c"]


def test_other_budgets_are_compared_on_their_own_tasks():
    cells = {f"ruler/4096/{task}/{name}": score(1.0) for task in "abc" for name in ("dense", "sparse", "quest", "snapkv")}
    del cells["ruler/4096/c/snapkv"]
    assert tables.curve(found(**cells)) == ""
    cells |= {f"ruler/4096/{task}/quest@{times}": score(0.0) | {"bytes_ratio": times} for task in "ab" for times in (0.5, 2)}
    cells["ruler/4096/b/sparse@0.001"] = score(1.0)  # 6 methods on 2 tasks against 7 on 1
    at = tables.compared(found(**cells))
    assert at["tasks"] == ["a", "b"]
    assert list(at["scores"]) == ["dense", "sparse", "quest", "quest@0.5", "quest@2", "snapkv"]
    lines = tables.curve(found(**cells)).splitlines()
    assert lines[0] == "| RULER, 4096 tokens, 2 tasks | average | bytes read | a | b |"
    assert lines[5] == "| quest@0.5 | 0.0% | 0.500 | 0.0% | 0.0% |"
    rivals = tables.rivals(found(**cells))
    assert "@" not in rivals
    assert "| quest | 3 |" in rivals


def test_sparse_reads_what_fidelity_measured():
    heads = {"query_heads": 2, "kv_heads": 2, "granularity": "group", "retrieval": [[0]]}
    made = {"heads": heads, "sparse": {"window_tokens": 1024, "sink_tokens": 4}, "base_model": {"head_dim": 64}}
    some = found(convert=made, fidelity={"novels 4096": loss(4096)}, **RULER)
    del some["cells"]["ruler/4096/niah_multikey_2/dense"]
    tasks, points = tables.points(some)
    ((ratio, _),) = points["sparse"]
    assert 0.25 < ratio < 0.5
    assert (tasks, points) == (2, {"dense": [(1.0, 1.0)], "sparse": [(ratio, 0.75)]})


def test_rivals_are_compared_with_the_default_way_of_reading():
    cells = {
        f"ruler/4096/a/{method}": score(*values)
        for method, values in (("dense", [1, 1]), ("sparse", [0, 0]), ("dense_end", [1, 1]), ("razor_end", [1, 0]))
    }
    assert tables.rivals(found(**cells)).splitlines()[::2] == [
        "| RULER, 4096 tokens | tasks | average | dense_end on these | difference | bytes read | a |",
        "| dense | 1 | 100.0% | 100.0% | +0.0% (+0.0% to +0.0%) | 1.000 | 100.0% |",
        "| dense_end | 1 | 100.0% | 100.0% | – | – | 100.0% |",
        "",
    ]
    assert "| razor_end | 1 | 50.0% | 100.0% | -50.0% (-100.0% to +0.0%) | – | 50.0% |" in tables.rivals(found(**cells))


def test_other_budgets_are_points_of_one_line():
    """On the tasks that were run with them; the table of rivals has none of them, and more tasks."""
    cells = {
        f"ruler/4096/{task}/{method}": score(value, bytes_ratio=ratio)
        for task, extra in (("a", True), ("b", False))
        for method, value, ratio in (("dense", 1, None), ("sparse", 1, None), ("quest", 0, 0.25), ("quest@0.5", 0, 0.125))
        if extra or "@" not in method
    }
    heads = {"query_heads": 2, "kv_heads": 2, "granularity": "group", "retrieval": [[0]]}
    made = {"heads": heads, "sparse": {"window_tokens": 1024, "sink_tokens": 4}, "base_model": {"head_dim": 64}}
    some = found(convert=made, fidelity={"novels 4096": loss(4096)}, selected={"0.001": 0.01}, **cells)
    some["cells"]["ruler/4096/a/sparse@0.001"] = {"run": 0, "result": score(0.5)}
    tasks, points = tables.points(some)
    assert tasks == 1
    assert points["quest"] == [(0.125, 0.0), (0.25, 0.0)]
    (less, worse), (more, better) = points["sparse"]
    assert (worse, better) == (0.5, 1.0)
    assert less < more
    svg = ElementTree.fromstring(tables.results_svg({"Model": some}))
    lines = [path.get("stroke") for path in svg.iter("{http://www.w3.org/2000/svg}path") if not path.get("stroke-opacity")]
    assert len(lines) == 2  # quest's and ours
    assert "@" not in tables.rivals(some)
    assert "| quest | 2 |" in tables.rivals(some)


def test_fidelity_has_exactly_these_rows():
    assert tables.fidelity(found(fidelity={"novels 4096": loss(4096)})).splitlines() == [
        "| source, tokens | documents | loss, dense | sparse | change | worst eighth | KL, nats | top-1 agreement "
        "| mass kept | far tokens | documents for these |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        "| novels 4096 | 8 | 2.000 | 2.010 | +0.50% | +3.50% | 0.0100 | 95.0% | 97.5% | 5.0% | 4 |",
    ]


def test_small_tables():
    convert = {
        "stages": {"calibrate": {}, "distill": {}}, "seconds": {"calibrate": 10.4}, "peak_gigabytes": {}, "megabytes": 3.21,
        "full_kv_ratio": 0.15, "sparse": {"window_tokens": 1024},
    }  # fmt: skip
    squad = {"samples": 4, "f1": {"sparse": PAIR}}
    drift = [{"kl": 0.1, "top1_agreement": 0.9}, {"kl": 0.2, "top1_agreement": 0.8}]
    one = {"repetition": 0.1, "loss": 2.0}
    long = {"prompts": 4, "prompt_tokens": 6144, "tokens": 2048, "dense": one, "sparse": one, "drift": drift}
    needle = [{"kind": "single", "length_tokens": 2048, **PAIR}]
    ablation = {"needle": needle, "loss": {"novels": loss(2048)}, "index": {"novels": loss(2048)["index"]}}
    some = found(convert=convert, short_context={"squad": squad}, long_generation=long, needles={"needle": needle})
    some["cells"]["ablation/p_0.90"] = {"run": 0, "result": ablation}
    page = tables.everything(some)
    for line in (
        "| calibrate | 10 | – |",
        "| distill | – | – |",
        "Artefact 3.2 MB; 15.0% of the KV groups or heads keep all tokens; window 1024.",
        "| SQuAD, f1 | sparse | 4 | 50.0% | 25.0% | -50.0% to +0.0% |",
        "| sparse | 4 | 10.0% | 2.000 |",
        "| single, 2048 | 4 | 50.0% | 25.0% | 0.500 | -50.0% to +0.0% |",
        "| (dense) | 50.0% |  |  |  |  |",
        "| p_0.90 | 25.0% | +0.50% | – | 97.5% / – | 5.0% / – |",
        "One GPU, PyTorch 2, Transformers 5, commit abc.",
    ):
        assert line in page.splitlines()
    assert "### RULER" not in page


def test_nothing_measured():
    assert tables.everything(None) == tables.everything(found()) == tables.MISSING
    assert all(make(found()) == "" for make in tables.PARTS.values())
    assert tables.results_svg({"Model": None}) is None


def test_figure_is_made_from_the_results():
    svg = tables.results_svg()
    assert (tables.PLOT.read_text() if tables.PLOT.is_file() else None) == svg


def test_collect_gathers_what_the_tables_read(tmp_path):
    for method in ("dense", "sparse"):
        name = f"ruler/4096/niah_single_2/{method}"
        file = tmp_path / "out" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        cell = {"cell": name, "environment": ENVIRONMENT, "settings": SETTINGS, "seconds": 1.0, "result": RULER[name]}
        file.write_text(json.dumps(cell))
    (tmp_path / "out" / "artefact").mkdir()
    (tmp_path / "out" / "artefact" / "manifest.json").write_text("{}")
    study.collect(tmp_path / "out", tmp_path / "study.json")
    read = json.loads((tmp_path / "study.json").read_text())
    assert read == found(**{name: RULER[name] for name in RULER if "single" in name})
    assert "| niah_single_2 | 8 | 4000 | 100.0% | 100.0% | 1.000 | +0.0% to +0.0% |" in tables.everything(read)


def test_the_summary_and_the_recipes_show_a_model_as_it_reads(monkeypatch):
    scores = {"dense": (1.0, 0.0) * 10, "sparse": (0.0, 0.0) * 10, "dense_end": (1.0, 1.0) * 10}
    cells = {f"ruler/16384/t/{method}": score(*values) for method, values in scores.items()}
    first = next(iter(tables.MODELS))
    monkeypatch.setattr(tables, "load", lambda name: found(**cells) if name == first else None)
    for named, shown in (("t", "100.0%"), ("**t**", "0.0%")):
        assert tables.summary().splitlines()[2].startswith(f"| {named} | 20 | 4000 | 50.0% | {shown} |")
        (row,) = tables.recipes().splitlines()[2:]
        assert f"| 1 | 50.0% | {shown} |" in row
        cells.pop("ruler/16384/t/dense_end", None)


def test_the_summary_has_averages_and_what_is_beyond_chance(monkeypatch):
    cells = {
        f"ruler/100/{task}/{method}": score(*values)
        for task, after in (("same", (1.0, 0.0)), ("worse", (0.0, 0.0)), ("better", (1.0, 1.0)))
        for method, values in (("dense", (1.0, 0.0) * 10), ("sparse", after * 10))
    }
    cells |= {f"ruler/200/t/{name}": score(1.0, prompts_cut=1) for name in ("dense", "sparse")}  # no row, so not told
    monkeypatch.setattr(tables, "load", lambda name: found(**cells))
    lines = tables.summary().splitlines()
    assert lines[0].startswith(f"| {next(iter(tables.MODELS.values()))}: RULER, 100 tokens |")
    shown = [line.split("|")[1].strip() for line in lines[2:]]
    assert shown == ["better", "**worse**", "average of 3", "average, no task above dense"]
    assert lines[-1].endswith("| 50.0% | 33.3% | 0.667 | – |")  # worse: 0 of 0.5; better: 1.0 counts as 0.5


def test_recipes_are_compared_where_both_models_were_run(monkeypatch):
    cells = {
        f"ruler/16384/ruler_vt/{name}": score(*values) for name, values in (("dense", (1.0, 1.0)), ("sparse", (1.0, 0.0)))
    }
    some = found(**cells, **{"ruler/16384/t/sparse": score(1.0), "fidelity": {"novels 16384": loss(16384)}})
    files = {"study_qwen25_coder_05b": some, "study_qwen25_coder_05b_groups": found(**{"ruler/16384/t/dense": score(1.0)})}
    files["study_qwen25_coder_05b_effects"] = found(fidelity={"novels 16384": loss(16384)})
    monkeypatch.setattr(tables, "load", files.get)
    both, one = (tables.RECIPES[name] for name in ("study_qwen25_coder_05b", "study_qwen25_coder_05b_effects"))
    assert tables.recipes().splitlines()[2:] == [
        f"| {both} | 1 | 100.0% | 50.0% | 0.500 | 50.0% | – | – | +0.50% | `study_qwen25_coder_05b.json` |",
        f"| {one} | 0 | – | – | – | – | – | – | +0.50% | `study_qwen25_coder_05b_effects.json` |",
    ]


def test_a_task_that_is_lost_altogether_is_lost():
    assert tables.lost(tables.paired([1.0] * 8, [0.0] * 8))
    assert not tables.lost(tables.paired([0.0] * 8, [0.0] * 8))  # nothing to keep
    assert not tables.lost(tables.paired([1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]))


def test_aims_say_what_was_missed(monkeypatch):
    monkeypatch.setattr(tables, "AVERAGED", 2)

    def cells(length: int, sparse: float) -> dict:
        return {
            f"ruler/{length}/{task}/{name}": score(*[value] * 8)
            for task, after in (("niah_a", 1.0), ("ruler_vt", sparse))
            for name, value in (("dense", 1.0), ("sparse", after))
        }

    low = {**loss(32768), "index": {"mass_kept": 0.925, "far_selected_ratio": 0.05}}
    part = {"dense": 2.0, "sparse": 2.01}
    short = {
        "documents": {"novels": {"sparse": part}, "code": {"sparse": part}},
        "squad": {"samples": 4, "f1": {"sparse": PAIR}},
    }
    worse = {**PAIR, "difference_95": [-0.5, -0.1]}
    rivals = ("razor", 1.0), ("quest", 1.0), ("snapkv", 0.5)
    made = {"stages": {"calibrate": {}, "distill": {}}, "peak_gigabytes": {"calibrate": 12.0, "distill": 41.0}}
    bad = found(
        convert={**made, "seconds": {"calibrate": 60.0, "distill": 600.0}},
        fidelity={"novels 16384": loss(16384), "novels 32768": low}, short_context=short, needles={"needle": [PAIR, worse]},
        **cells(8192, 1.0), **cells(16384, 0.9),
        **{f"ruler/16384/niah_a/{name}": score(*[value] * 8) for name, value in rivals},
    )  # fmt: skip
    (first, _), (second, _), *_ = [key for key in tables.CONVERSIONS if key[1] == "sparse"]
    monkeypatch.setattr(tables, "load", {first: bad, second: found()}.get)
    rows = [line.split(" | ") for line in tables.aims(len(tables.CONVERSIONS)).splitlines()]
    assert [row[1] for row in rows[2:]] == [
        "1.000 on 2 tasks", "**0.950 on 2 tasks**", "–", "**16K: vt**",
        "+0.0 (+0.0 to +0.0) on 1 tasks",
        "**quest +0.0 (+0.0 to +0.0) on 1 tasks**, snapkv +50.0 (+50.0 to +50.0) on 1 tasks",
        "**+3.50% (+0.50% on the whole)**", "5.0%",
        "**5.0%**", "**92.5%**", "+0.50%, +0.50%", "f1 25.0% of 50.0%", "**1 of 2**",
        "**11 minutes, 41 GB**",
    ]  # fmt: skip
    assert [row[2] for row in rows[2:]] == ["– |"] * 14
    good = found(
        fidelity={"novels 16384": {**loss(16384), "by_position": [{"loss_dense": 2.0, "loss_sparse": 2.01}]}},
        needles={"needle": [PAIR]}, convert={**made, "seconds": {"distill": 600.0}}, **cells(8192, 1.0),
    )  # fmt: skip
    assert list(tables.reached(good).values()) == [
        "1.000 on 2 tasks", "–", "–", "none", "–", "–", "+0.50% (+0.50% on the whole)", "5.0%", "–", "97.5%", "–", "–",
        "1 of 1", "–",
    ]  # fmt: skip
