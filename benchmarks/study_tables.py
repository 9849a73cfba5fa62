"""Tables and the figure of docs/results.md, from what `benchmarks/study.py --collect` writes.

Every table is a function of such a file's content, shows the cells that are there, and is "" when none is.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from rivals import our_read_ratio
from study import DENSE_ENDS

from rtpurbo.config import SparseConfig
from rtpurbo.evals.statistics import paired
from rtpurbo.heads import HeadMap

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
PLOT = ROOT / "docs" / "results.svg"
MISSING = "Not measured yet."
MODELS = {
    "study_qwen25_coder_05b_32k": "Qwen2.5-Coder-0.5B, window 4096, documents of 32K",
    "study_qwen25_coder_05b_first_half": "Qwen2.5-Coder-0.5B, window 4096, adapter in half of the layers",
    "study_qwen25_coder_05b_window_4096": "Qwen2.5-Coder-0.5B, window 4096, adapter in all layers",
    "study_qwen25_coder_05b": "Qwen2.5-Coder-0.5B, window 2048",
    "study_smollm2": "SmolLM2-135M",
}
"""File in benchmarks/results -> name of the model."""
RECIPES = {
    "study_qwen25_coder_05b_32k": "window 4096; adapter in layers 0 to 11, 300 steps of two of 32K; last 128 tokens dense",
    "study_qwen25_coder_05b_32k_index_only": "the same heads and index, the same end; no stage 2",
    "study_qwen25_coder_05b_32k_dense_question_ends": "the same heads and index; questions in stage 2 end densely too",
    "study_qwen25_coder_05b_32k_dense_question_ends_1e_4": "the same at a rate of 1e-4",
    "study_qwen25_coder_05b_32k_1e_4": "the same at 1e-4, questions in stage 2 read sparsely",
    "study_qwen25_coder_05b_16k_dense_question_ends": "dense question ends, 3e-4, 300 steps of four of 16K",
    "study_qwen25_coder_05b_paper": "window 4096; the paper's recipe (heads by a span, p 0.9, 600 steps of all weights)",
    "study_qwen25_coder_05b_first_half": "window 4096; adapter in layers 0 to 11, 300 steps of four documents at 3e-4",
    "study_qwen25_coder_05b_window_4096": "the same heads and index; adapter in all layers, 500 steps",
    "study_qwen25_coder_05b_window_4096_first_half_of_it": "the adapter of all layers, in layers 0 to 11 alone",
    "study_qwen25_coder_05b_window_4096_halved": "the adapter of all layers at half its size",
    "study_qwen25_coder_05b_window_4096_more": "the adapter of all layers, least probability 0.00008",
    "study_qwen25_coder_05b_window_4096_index_only": "the same heads and index; no stage 2",
    "study_qwen25_coder_05b_long_mix": "the same heads and index; 300 steps of two of 32K, more chains and examples",
    "study_qwen25_coder_05b_mix_16k": "the same heads and index; 300 steps of four, more chains and examples",
    "study_qwen25_coder_05b_long_mix_calibrated": "both stages and 300 steps at 32K with more chains and examples",
    "study_qwen25_coder_05b_window_4096_without_head_22_2": "the same heads without 22.2; no stage 2",
    "study_qwen25_coder_05b_window_4096_shared_heads": "the 40 heads that two conversions share; no stage 2",
    "study_qwen25_coder_05b": "window 2048; stage 2 in 400 steps of two documents at 5e-4",
    "study_qwen25_coder_05b_four_documents": "the same heads and index; stage 2 in 500 steps of four documents at 3e-4",
    "study_qwen25_coder_05b_window_2048_read_at_4096": "this one with a window of 4096",
    "study_qwen25_coder_05b_window_2048_index_at_4096": "the same heads and index with a window of 4096; no stage 2",
    "study_qwen25_coder_05b_index_only": "the same heads and index; no stage 2",
    "study_qwen25_coder_05b_swapped_heads": "two heads that chains seemed to lack, for the two lowest; no stage 2",
    "study_qwen25_coder_05b_unlabelled": "the same heads and index; no label where the dense model would not answer so",
    "study_qwen25_coder_05b_unlabelled_halved": "its adapter at half its size",
    "study_qwen25_coder_05b_answers_by_kl": "the same heads and index; answers by KL to the teacher, weight 0.25",
    "study_qwen25_coder_05b_groups_by_gates": "15 % of the KV groups by gates",
    "study_qwen25_coder_05b_effects": "heads by effects",
    "study_qwen25_coder_05b_examples": "the same heads and index; answered examples in stage 2",
    "study_qwen25_coder_05b_calibrated_with_examples": "heads by effects, calibrated with answered examples",
    "study_qwen25_coder_05b_calibrated_with_examples_20": "the same with 20 % of the heads",
    "study_qwen25_coder_05b_groups": "15 % of the KV groups by effects; questions for one or two facts",
    "study_qwen25_coder_05b_groups_stage1": "the same, index only",
}
"""File -> what recipes of Qwen2.5-Coder-0.5B differ in."""
CONVERSIONS = {
    ("study_qwen25_coder_05b_32k", "dense_end"): "window 4096, half of the layers, 300 x 2 of 32K, last 128 tokens dense",
    ("study_qwen25_coder_05b_32k_dense_question_ends_1e_4", "dense_end"): "the same, questions in stage 2 too, at 1e-4",
    ("study_qwen25_coder_05b_first_half", "sparse"): "window 4096, adapter in half of the layers, 300 x 4 at 3e-4",
    ("study_qwen25_coder_05b_window_4096", "sparse"): "window 4096, all layers, 500 x 4 at 3e-4",
    ("study_qwen25_coder_05b", "sparse"): "window 2048, all layers, 400 x 2 at 5e-4",
}
"""(File, how prompts are read) -> conversion of that model that README shows."""
TOLD = ("ruler_vt", "niah_multikey_2", "niah_multiquery")
"""Tasks that recipes of that model differ in."""
READS = ("sparse", *DENSE_ENDS)
"""The sparse model, by how it reads a prompt."""
METHODS = (
    "dense",
    *READS,
    "stage1",
    "stage1_end",
    "razor",
    "razor_end",
    "top_k",
    "top_k_end",
    "quest",
    "snapkv",
    "window",
    "window_end",
)
AVERAGED = 10
"""Tasks of RULER that an average stands for what was aimed at, at least."""
NEEDED = 0.95
"""Recovery below which a task is marked, when its interval excludes 0."""
INK = "#848d97"
"""Readable on white and on black."""
Found = dict[str, Any]


def load(name: str) -> Found | None:
    """What was collected of a model, if anything was."""
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def result(found: Found, cell: str) -> Found:
    """A cell's result; {} when it is missing."""
    return found["cells"].get(cell, {}).get("result", {})


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; "" without rows."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]]) if rows else ""


def interval(pair: Found) -> str:
    """The 95 % interval of a difference of scores."""
    return " to ".join(f"{x:+.1%}" for x in pair["difference_95"])


def show(value: float | None, form: str) -> str:
    """A number, or a dash for none."""
    return "–" if value is None else f"{value:{form}}"


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def average(tasks: Iterable[list[float]]) -> float:
    """RULER's average: the mean over tasks of each task's mean."""
    return mean([mean(scores) for scores in tasks])


def ruler_cells(found: Found) -> dict[int, dict[str, dict[str, Found]]]:
    """Length -> task -> method -> result of RULER.

    Raises:
        ValueError: methods were given different prompts of one task and length, or different numbers of them.
    """
    cells: dict[int, dict[str, dict[str, Found]]] = {}
    for name in found["cells"]:
        if name.startswith("ruler/"):
            _, length, task, method = name.split("/")
            at = cells.setdefault(int(length), {}).setdefault(task, {})
            at[method] = result(found, name)
            if len({(row["prompts"], len(row["scores"])) for row in at.values()}) > 1:
                raise ValueError(f"{name}: other prompts than those of {', '.join(m for m in at if m != method)}")
    return {length: {task: cells[length][task] for task in sorted(cells[length])} for length in sorted(cells)}


def our_reading(found: Found) -> str:
    """How the sparse model reads prompts in tables that show one way, of READS: as it does by default, where that ran."""
    return "dense_end" if any(name.endswith("/dense_end") for name in found["cells"]) else "sparse"


def both(
    tasks: dict[str, dict[str, Found]], method: str = "sparse", beside: str = "dense"
) -> dict[str, tuple[list[float], list[float]]]:
    """Task -> scores of another method, by default the dense model, and of a method, where both ran."""
    return {task: (at[beside]["scores"], at[method]["scores"]) for task, at in tasks.items() if {beside, method} <= set(at)}


def lost(pair: Found) -> bool:
    """Whether a task keeps less than NEEDED, and not by chance."""
    return pair["recovery"] is not None and pair["recovery"] < NEEDED and pair["difference_95"][1] < 0


def average_interval(pairs: list[tuple[list[float], list[float]]], *, seed: int = 0, resamples: int = 2000) -> list[float]:
    """95 % interval of the mean over tasks of each task's mean of second - first; samples are redrawn within each task."""
    rng = random.Random(seed)
    differences = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairs]
    means = sorted(mean([mean(rng.choices(task, k=len(task))) for task in differences]) for _ in range(resamples))
    return [means[int(0.025 * resamples)], means[int(0.975 * resamples)]]


def ruler(found: Found, *, method: str = "sparse", beyond_chance: bool = False) -> str:
    """RULER, dense and sparse, a table for every length: the tasks that the sparse model ran on.

    Args:
        method: how the sparse model reads its prompts, of READS.
        beyond_chance: of the tasks show only those whose interval excludes 0.
    """
    parts = []
    for length, tasks in ruler_cells(found).items():
        rows, pairs = [], list(both(tasks, method).values())
        for task, at in tasks.items():
            if method not in at:
                continue
            dense, sparse = (mean(at[name]["scores"]) if name in at else None for name in ("dense", method))
            row = [task, str(len(at[method]["scores"])), f"{at[method]['prompt_tokens']['mean']:.0f}"]
            row += [show(dense, ".1%"), show(sparse, ".1%")]
            telling = False
            if "dense" in at:
                pair = paired(at["dense"]["scores"], at[method]["scores"])
                if lost(pair):
                    row[0] = f"**{task}**"
                row += [show(pair["recovery"], ".3f"), interval(pair)]
                telling = pair["difference_95"][0] > 0 or pair["difference_95"][1] < 0
            else:
                row += ["–", "–"]
            if telling or not beyond_chance:
                rows.append(row)
        if len(pairs) > 1:
            dense, sparse = map(average, zip(*pairs, strict=True))
            row = [f"average of {len(pairs)}", str(sum(len(a) for a, _ in pairs)), "", f"{dense:.1%}", f"{sparse:.1%}"]
            row += [show(sparse / dense if dense else None, ".3f"), interval({"difference_95": average_interval(pairs)})]
            rows.append(row)
            capped = mean([min(mean(a), mean(b)) for a, b in pairs])
            row = ["average, no task above dense", "", "", f"{dense:.1%}", f"{capped:.1%}"]
            rows.append([*row, show(capped / dense if dense else None, ".3f"), "–"])
        header = [f"RULER, {length} tokens", "samples", "prompt tokens", "dense", "sparse", "recovery", "difference, 95 %"]
        parts += [table(header, rows)] if rows else []
        cut = sum(max(row.get("prompts_cut", 0) for row in at.values()) for at in tasks.values() if method in at)
        parts += [f"{cut} prompts did not fit and were cut."] if cut and rows else []
    return "\n\n".join(parts)


def summary() -> str:
    """RULER's averages of the first model, and the tasks that lose or win more than chance would."""
    name = next(iter(MODELS))
    found = load(name)
    text = ruler(found, method=our_reading(found), beyond_chance=True) if found else ""
    return text.replace("| RULER", f"| {MODELS[name]}: RULER") or MISSING


def prose(found: Found) -> str | None:
    """Name of the source that the fidelity cell calls prose: the first."""
    cell = found["cells"].get("fidelity")
    return Path(found["runs"][cell["run"]]["settings"]["dev"][0]).name if cell else None


def our_bytes(found: Found, length: int, setting: str = "") -> float | None:
    """Bytes that a decode step of the sparse model reads over a dense one's, by arithmetic, from the measured share.

    Args:
        setting: another least probability than the artefact's.
    """
    made, row = result(found, "convert"), result(found, "fidelity").get(f"{prose(found)} {length}", {})
    far = result(found, "selected").get(setting) if setting else row.get("index", {}).get("far_selected_ratio")
    if not made or far is None:
        return None
    heads, config = HeadMap.from_dict(made["heads"]), SparseConfig(**made["sparse"])
    return our_read_ratio(heads, config, length, far, made["base_model"]["head_dim"])


def compared(found: Found) -> Found | None:
    """Methods on the tasks that all of them have, at the length where rivals ran (else the middle one).

    A method that ran on few tasks is left out where the others' common tasks then make more cells. Where methods ran at
    other budgets too (METHOD@SETTING), only their tasks count.

    Returns:
        "tasks", "scores": method -> list per task, "bytes": method -> ratio or None; None when there is no task.
    """
    length, some = rivals_length(found)
    budgets = {method for at in some.values() for method in at if "@" in method}
    if budgets:
        some = {task: at for task, at in some.items() if budgets & set(at)}
    ran = {method: sum(method in at for at in some.values()) for method in (*METHODS, *sorted(budgets))}

    def common(methods: list[str]) -> list[str]:
        return [task for task, at in some.items() if all(method in at for method in methods)]

    order = sorted((m for m in ran if ran[m]), key=lambda m: (m not in ("dense", our_reading(found)), -ran[m]))
    methods = max((order[: n + 1] for n in range(len(order))), key=lambda part: len(part) * len(common(part)), default=[])
    methods.sort(key=lambda method: (METHODS.index(method.partition("@")[0]), method))
    tasks = common(methods) if methods else []
    if not tasks:
        return None
    scores = {method: [some[task][method]["scores"] for task in tasks] for method in methods}
    read = {method: bytes_read(found, length, method, [some[task][method] for task in tasks]) for method in methods}
    return {"tasks": tasks, "scores": scores, "bytes": read}


def rivals_length(found: Found) -> tuple[int, dict[str, dict[str, Found]]]:
    """The length where rivals ran, else the middle one, and its cells of RULER (task -> method -> result)."""
    cells = ruler_cells(found)
    lengths = list(cells)
    if not lengths:
        return 0, {}
    ran = {n: sum(len(set(at) - {"dense", *READS}) for at in cells[n].values()) for n in lengths}
    length = max(lengths, key=lambda n: ran[n]) if any(ran.values()) else lengths[len(lengths) // 2]
    return length, cells[length]


def bytes_read(found: Found, length: int, method: str, cells: list[Found]) -> float | None:
    """Cache bytes of a decode step over the dense model's: the mean over a method's results; None when unknown."""
    name, _, setting = method.partition("@")
    if name == "dense":
        return 1.0
    if name in READS:
        return our_bytes(found, length, setting)
    ratios = [row.get("bytes_ratio") for row in cells]
    ratios = [x for x in ratios if x is not None and not math.isnan(x)]
    return mean(ratios) if ratios else None


def rivals(found: Found) -> str:
    """All methods at one length, each on its own tasks; "" when there is none but dense and sparse."""
    length, some = rivals_length(found)
    reading = our_reading(found)
    ran = {method: [task for task, at in some.items() if method in at and reading in at] for method in METHODS}
    ran = {method: tasks for method, tasks in ran.items() if tasks}
    shown = [task for task in some if any(task in tasks for method, tasks in ran.items() if method not in ("dense", *READS))]
    if not shown:
        return ""
    rows = []
    for method, tasks in ran.items():
        asked = [task for task in tasks if task in shown]
        cells = [some[task][method] for task in asked]
        own, ours = [cell["scores"] for cell in cells], [some[task][reading]["scores"] for task in asked]
        row = [method, str(len(asked)), f"{average(own):.1%}", f"{average(ours):.1%}"]
        low, high = average_interval(list(zip(ours, own, strict=True)))
        row.append("–" if method == reading else f"{average(own) - average(ours):+.1%} ({low:+.1%} to {high:+.1%})")
        row.append(show(bytes_read(found, length, method, cells), ".3f"))
        rows.append([*row, *(f"{mean(some[task][method]['scores']):.1%}" if task in asked else "–" for task in shown)])
    header = [f"RULER, {length} tokens", "tasks", "average", f"{reading} on these", "difference", "bytes read", *shown]
    return (
        table(header, rows) + "\n\nThe same prompts for every method. Bytes read: cache bytes of a decode step over the "
        "dense model's, measured, for our own by arithmetic from the measured share of far tokens."
    )


def curve(found: Found) -> str:
    """Average and bytes read at other budgets (METHOD@SETTING), and of the methods that have those tasks too; "" without."""
    at = compared(found)
    if not at or not any("@" in method for method in at["scores"]):
        return ""
    rows = [
        [method, f"{average(scores):.1%}", show(at["bytes"][method], ".3f"), *(f"{mean(task):.1%}" for task in scores)]
        for method, scores in at["scores"].items()
    ]
    length, _ = rivals_length(found)
    return table([f"RULER, {length} tokens, {len(at['tasks'])} tasks", "average", "bytes read", *at["tasks"]], rows) + (
        "\n\nAfter the @: our least probability, 0.0001 where none is named; a rival's bytes, over those of equal bytes."
    )


def change(row: Found, a: str = "dense", b: str = "sparse") -> float:
    """Relative change from a to b."""
    return row[b] / row[a] - 1


def fidelity(found: Found) -> str:
    """Held-out loss and the index, by source and length."""
    rows = []
    for key, row in result(found, "fidelity").items():
        worst = max(change(part, "loss_dense", "loss_sparse") for part in row["by_position"])
        index = row.get("index", {})
        rows.append(
            [
                key, f"{row['documents']}", f"{row['dense']:.3f}", f"{row['sparse']:.3f}", f"{change(row):+.2%}",
                f"{worst:+.2%}", f"{row['kl']:.4f}", f"{row['top1_agreement']:.1%}", show(index.get("mass_kept"), ".1%"),
                show(index.get("far_selected_ratio"), ".1%"), show(index.get("documents"), ""),
            ]
        )  # fmt: skip
    header = [
        "source, tokens",
        "documents",
        "loss, dense",
        "sparse",
        "change",
        "worst eighth",
        "KL, nats",
        "top-1 agreement",
    ]
    return table([*header, "mass kept", "far tokens", "documents for these"], rows)


def short_context(found: Found) -> str:
    """Short documents and SQuAD questions."""
    cell, rows = result(found, "short_context"), []
    names = {"sparse": "sparse", "weights": "distilled weights, dense attention"}
    for source, row in cell.get("documents", {}).items():
        for name in (n for n in names if n in row):
            one, what = row[name], f"loss, {Path(source).name}, {row['length_tokens']} tokens"
            cells = [what, names[name], f"{one['samples']}", f"{one['dense']:.3f}"]
            rows.append([*cells, f"{one[name]:.3f}", f"{change(one, b=name):+.2%}"])
    for metric in (m for m in ("contains", "f1") if m in cell.get("squad", {})):
        for name, one in cell["squad"][metric].items():
            cells = [f"SQuAD, {metric}", names[name], f"{one['samples']}", f"{one['dense']:.1%}", f"{one[name]:.1%}"]
            rows.append([*cells, interval(one)])
    return table(["short context", "model", "samples", "dense", "this", "change or 95 %"], rows)


def long_generation(found: Found) -> str:
    """Generations after long prompts."""
    cell = result(found, "long_generation")
    if not cell:
        return ""
    rows = [
        [name, f"{cell['prompts']}", f"{cell[name]['repetition']:.1%}", f"{cell[name]['loss']:.3f}"]
        for name in ("dense", "sparse")
    ]
    first, last = cell["drift"][0], cell["drift"][-1]
    header = [f"{cell['tokens']} tokens after {cell['prompt_tokens']}", "prompts", "repeated", "loss under the dense model"]
    return table(header, rows) + (
        f"\n\nFed the dense model's text, the sparse model differs by {first['kl']:.4f} nats (KL) in the first eighth and "
        f"{last['kl']:.4f} in the last; top-1 agreement {first['top1_agreement']:.1%} and {last['top1_agreement']:.1%}."
    )


def needles(found: Found) -> str:
    """Needle questions in held-out prose."""
    cell = result(found, "needles")
    rows = [
        [
            f"{row['kind']}, {row['length_tokens']}", f"{row['samples']}", f"{row['dense']:.1%}", f"{row['sparse']:.1%}",
            show(row["recovery"], ".3f"), interval(row),
        ]
        for row in cell.get("needle", [])
    ]  # fmt: skip
    text = table(["needles, tokens", "samples", "dense", "sparse", "recovery", "difference, 95 %"], rows)
    if text and "speed" in cell:
        dense, sparse = (cell["speed"][name]["cache_bytes"] / 1e6 for name in ("dense", "sparse"))
        text += f"\n\nCache of one document of {max(cell['settings']['lengths_tokens'])}: {dense:.0f} MB, {sparse:.0f} MB."
    return text


def conversion(found: Found) -> str:
    """What the conversion took."""
    cell = result(found, "convert")
    if not cell:
        return ""
    rows = [
        [stage, show(cell["seconds"].get(stage), ".0f"), show(cell["peak_gigabytes"].get(stage), ".1f")]
        for stage in ("calibrate", "train_indexer", "distill")
        if stage in cell["stages"]
    ]
    return table(["stage, one conversion", "seconds", "peak GB of the GPU"], rows) + (
        f"\n\nArtefact {cell['megabytes']:.1f} MB; {cell['full_kv_ratio']:.1%} of the KV groups or heads keep all tokens; "
        f"window {cell['sparse']['window_tokens']}."
    )


def ablations(found: Found) -> str:
    """The short recipe with something changed, one row each."""
    cells = {name.split("/", 1)[1]: cell for name, cell in found["cells"].items() if name.startswith("ablation/")}
    if not cells:
        return ""
    cells = {name: cells[name] for name in sorted(cells, key=lambda name: (name != "default", name))}
    some = next(iter(cells.values()))
    sources = [Path(source).name for source in found["runs"][some["run"]]["settings"]["dev"]]
    asked = [(row["kind"], row["length_tokens"]) for row in some["result"]["needle"]]

    def scores(cell: Found, which: str) -> list[str]:
        at = {(row["kind"], row["length_tokens"]): row for row in cell["result"]["needle"]}
        return [f"{at[key][which]:.1%}" if key in at else "–" for key in asked]

    def each(rows: Found, make: Any) -> list[str]:
        return [make(rows[source]) if rows.get(source) else "–" for source in sources]

    rows = [["(dense)", *scores(some, "dense"), *[""] * (len(sources) + 2)]]
    for name, cell in cells.items():
        kept, far = (
            " / ".join(each(cell["result"]["index"], lambda row, key=key: f"{row[key]:.1%}"))
            for key in ("mass_kept", "far_selected_ratio")
        )
        losses = each(cell["result"]["loss"], lambda row: f"{change(row):+.2%}")
        rows.append([name, *scores(cell, "sparse"), *losses, kept, far])
    header = ["", *(f"{kind}, {n}" for kind, n in asked), *(f"loss, {source}" for source in sources)]
    questions = "/".join(str(n) for n in sorted({row["samples"] for row in some["result"]["needle"]}))
    documents = max((row["documents"] for row in some["result"]["loss"].values()), default=0)
    return table([*header, "mass kept", "far tokens"], rows) + (
        f"\n\n{questions} questions of each kind and length, {documents} documents of each source for the loss. "
        "One training run each: small differences may be chance."
    )


def recipes() -> str:
    """Recipes of one model by RULER at one length and held-out loss, a row each."""
    length, rows = 16384, []
    for name, what in RECIPES.items():
        found = load(name) or {"cells": {}}
        pairs = both(ruler_cells(found).get(length, {}), our_reading(found))
        row = [what, str(len(pairs)), *["–"] * 3]
        if pairs:
            dense, sparse = map(average, zip(*pairs.values(), strict=True))
            row[2:] = [f"{dense:.1%}", f"{sparse:.1%}", f"{sparse / dense:.3f}"]
        row += [f"{mean(pairs[task][1]):.1%}" if task in pairs else "–" for task in TOLD]
        losses = [change(one) for key, one in result(found, "fidelity").items() if key.endswith(f" {length}")]
        if not pairs and not losses:
            continue
        rows.append([*row, " / ".join(f"{x:+.2%}" for x in losses) or "–", f"`{name}.json`"])
    header = [f"RULER, {length} tokens", "tasks", "dense", "sparse", "recovery", *TOLD, "loss, novels / code", "file"]
    return table(header, rows) or MISSING


def reached(found: Found, method: str = "sparse") -> dict[str, str]:
    """Aim -> what a conversion of a model reached; bold where it missed, a dash where it was not measured.

    Args:
        method: how prompts of RULER are read, of READS.
    """
    entries: dict[str, str] = {}

    def tell(aim: str, text: str, *, missed: bool = False) -> None:
        entries[aim] = (f"**{text}**" if missed else text) or "–"

    below, ran = [], False
    for length, least in ((8192, 0.99), (16384, 0.99), (32768, 0.98)):
        pairs = both(ruler_cells(found).get(length, {}), method)
        names = [task.split("_", 1)[1] for task, scores in pairs.items() if lost(paired(*scores))]
        below += [f"{length // 1024}K: {', '.join(names)}"] if names else []
        aim = f"RULER at {length // 1024}K: {least} of dense"
        if len(pairs) < AVERAGED:
            tell(aim, "")
            continue
        ran = True
        dense, sparse = map(average, zip(*pairs.values(), strict=True))
        tell(aim, f"{sparse / dense:.3f} on {len(pairs)} tasks", missed=sparse / dense < least)
    tell("no task below 0.95, beyond its interval", "; ".join(below) or "none" * ran, missed=bool(below))

    end, gaps = "_end" if method in DENSE_ENDS else "", {}
    for rival in (f"razor{end}", "quest", "snapkv", f"window{end}"):
        pairs = list(both(ruler_cells(found).get(16384, {}), method, rival).values())
        if pairs:
            (theirs, ours), (low, high) = map(average, zip(*pairs, strict=True)), average_interval(pairs)
            text = f"{100 * (ours - theirs):+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) on {len(pairs)} tasks"
            gaps[rival.removesuffix("_end")] = text, low, high
    text, _, high = gaps.pop("razor", ("", 0.0, 0.0))
    aim = (
        "points of RULER at 16K ahead of dense retrieval heads and windows, which read more: not below 0 beyond the interval"
    )
    tell(aim, text, missed=high < 0)
    text = ", ".join(f"{name} {gap}" if low > 0 else f"**{name} {gap}**" for name, (gap, low, _) in gaps.items())
    aim = "the same, ahead of what reads as much: above 0 beyond the interval"
    tell(aim, text)

    texts = result(found, "fidelity")
    worst = max(
        (change(part, "loss_dense", "loss_sparse") for row in texts.values() for part in row["by_position"]), default=0.0
    )
    whole = max((change(row) for row in texts.values()), default=0.0)
    text = f"{worst:+.2%} ({whole:+.2%} on the whole)" if texts else ""
    tell("loss at most +0.5 % in every eighth of 8K, 16K and 32K, novels and code", text, missed=worst > 0.005)
    for length, most in ((16384, 0.06), (32768, 0.04)):
        far = [row["index"]["far_selected_ratio"] for key, row in texts.items() if key.endswith(f" {length}")]
        aim = f"far tokens at {length // 1024}K at most {most:.0%}, novels / code".replace("%", " %")
        tell(aim, " / ".join(f"{x:.1%}" for x in far), missed=max(far, default=0.0) > most)
    mass = min((row["index"]["mass_kept"] for row in texts.values()), default=1.0)
    tell("attention mass at least 93 %", f"{mass:.1%}" if texts else "", missed=mass < 0.93)

    short = result(found, "short_context")
    changes = [change(row["sparse"]) for row in short.get("documents", {}).values()]
    tell("loss of 2048 tokens, novels, code", ", ".join(f"{x:+.2%}" for x in changes))
    asked = {metric: row["sparse"] for metric, row in short.get("squad", {}).items() if isinstance(row, dict)}
    text = ", ".join(f"{metric} {row['sparse']:.1%} of {row['dense']:.1%}" for metric, row in asked.items())
    tell("SQuAD within its interval", text, missed=any(row["difference_95"][1] < 0 for row in asked.values()))
    needle = result(found, "needles").get("needle", [])
    outside = sum(row["difference_95"][1] < 0 for row in needle)
    text = f"{len(needle) - outside} of {len(needle)}" if needle else ""
    tell("needle questions at 8K to 32K within their interval", text, missed=outside > 0)
    made = result(found, "convert")
    took, peak = made.get("seconds", {}), max(made.get("peak_gigabytes", {}).values(), default=0.0)
    whole = bool(took) and set(took) == set(made["stages"])  # not so where stages were taken over
    text = f"{sum(took.values()) / 60:.0f} minutes, {peak:.0f} GB" if whole else ""
    tell("conversion in 20 minutes and 40 GB", text, missed=whole and (sum(took.values()) > 1200 or peak > 40))
    return entries


def aims(count: int = 1) -> str:
    """What was aimed at, and what the first `count` of a model's conversions reached: a column each."""
    some = [*CONVERSIONS.items()][:count]
    columns = {what: reached(found, read) for (name, read), what in some if (found := load(name))}
    rows = [[aim, *(column[aim] for column in columns.values())] for aim in next(iter(columns.values()), {})]
    return table(["Qwen2.5-Coder-0.5B", *columns], rows) or MISSING


PARTS = {
    "RULER, prompts read sparsely": ruler,
    f"RULER, the last {DENSE_ENDS['dense_end']} tokens of a prompt read densely": partial(ruler, method="dense_end"),
    "RULER, prompts read densely": partial(ruler, method="dense_prefill"),
    "Rivals": rivals, "Other budgets": curve, "Held-out text": fidelity, "Needles": needles, "Short context": short_context,
    "Long generation": long_generation, "Conversion": conversion, "Ablations": ablations,
}  # fmt: skip


def everything(found: Found | None) -> str:
    """All tables of a model that have rows, under their headings."""
    parts = [f"### {name}\n\n{text}" for name, make in PARTS.items() if found and (text := make(found))]
    if not found or not parts:
        return MISSING
    for run in found["runs"]:
        at = run["environment"]
        parts.append(f"One {at['device']}, PyTorch {at['torch']}, Transformers {at['transformers']}, commit {at['commit']}.")
    return "\n\n".join(dict.fromkeys(parts))


def points(found: Found | None) -> tuple[int, dict[str, list[tuple[float, float]]]]:
    """Number of tasks, and method -> bytes read and RULER average at every budget, of the methods that have both."""
    at = compared(found) if found else None
    made: dict[str, list[tuple[float, float]]] = {}
    for method, ratio in (at["bytes"] if at else {}).items():
        if ratio is not None:
            made.setdefault(method.partition("@")[0], []).append((ratio, average(at["scores"][method])))
    return len(at["tasks"]) if at else 0, {method: sorted(places) for method, places in made.items()}


def results_svg(found: dict[str, Found | None] | None = None) -> str | None:
    """RULER average against bytes read, a panel for each model with rivals: `found`, by default the files; else None."""
    found = {label: load(name) for name, label in MODELS.items()} if found is None else found
    panels = {name: at for name, some in found.items() if set((at := points(some))[1]) - {"dense", *READS}}
    if not panels:
        return None
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {450 * len(panels)} 380" font-family="sans-serif" '
        'font-size="13" fill="none">',
        "<title>RULER average against bytes read by a decode step</title>",
    ]

    def text(x: float, y: float, content: str, anchor: str = "start", colour: str = INK, size: int = 13) -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}"'
        parts.append(f"<text {place}>{content}</text>")

    for left, (name, (tasks, at)) in zip(range(50, 450 * len(panels), 450), panels.items(), strict=True):
        model, _, recipe = name.partition(", ")
        text(left, 16, f"{model}: RULER average of {tasks} task{'s' * (tasks > 1)}", size=14)
        text(left, 34, recipe)
        for i in range(6):
            text(left - 6, 334 - 56 * i, f"{20 * i} %", "end")
            text(left + 10 + 60 * i, 350, f"{i / 5:g}", "middle")
            parts.append(f'<path d="M{left} {330 - 56 * i}h330" stroke="{INK}" stroke-opacity="0.3"/>')
        text(left + 160, 370, "bytes read by a decode step over the dense model's", "middle")
        taken: list[tuple[float, float]] = []
        ours: list[float] = []
        for method, places in sorted(at.items(), key=lambda item: -item[1][-1][1]):
            colour = "#e0702a" if method in READS else "#3b8ed0"
            drawn = [(left + 10 + 300 * ratio, 330 - 280 * score) for ratio, score in places]
            line = "L".join(f"{x:.1f} {y:.1f}" for x, y in drawn) if len(drawn) > 1 else ""
            parts += [f'<path d="M{line}" stroke="{colour}"/>'] if line else []
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in drawn]
            x, y = drawn[0 if method in READS else -1]
            if method in READS:  # left of its point, where no other label is; below a line, which others may cross
                ours.append(max([y + 18 if line else y, *(b + 14 for b in ours)]))
                text(x - 8, ours[-1] + 4, method, "start" if line else "end", colour)
                continue
            below = max([y, *(b + 14 for a, b in taken if abs(a - x) < 60)])  # labels that would overlap are pushed down
            taken.append((x, below))
            text(x + 8, below + 4, method, colour=colour)
    return "\n".join([*parts, "</svg>", ""])


def figure() -> str:
    """The page's line that shows the figure."""
    return "![RULER average against bytes read](results.svg)" if results_svg() else MISSING


def write_plot() -> None:
    """Write docs/results.svg, or remove it when there is nothing to show."""
    svg = results_svg()
    if svg is None:
        PLOT.unlink(missing_ok=True)
    else:
        PLOT.write_text(svg)


def model_tables(name: str) -> str:
    """All tables of a model by the name of its file."""
    return everything(load(name))


TABLES = {name: partial(model_tables, name) for name in MODELS} | {
    "results_plot": figure,
    "ruler": summary,
    "recipes": recipes,
    "aims": aims,
    "all_aims": partial(aims, len(CONVERSIONS)),
}
