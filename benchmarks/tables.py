"""Write the README's table from the JSON files in benchmarks/results: python benchmarks/tables.py"""

from __future__ import annotations

import json
import re
from pathlib import Path

from rtpurbo.config import SparseConfig

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def smollm2() -> str:
    """The SmolLM2-135M artefact of this repository."""
    found = json.loads((RESULTS / "smollm2_8k_group.json").read_text())
    stages, environment, evaluation = found["stages"], found["environment"], found["evaluation"]
    main, seconds = evaluation["main"], found["seconds"]
    rule = SparseConfig(**{"min_probability": 0.0} | found["sparse"]).rule
    bench = json.loads((RESULTS / "smollm2_cpu_bench.json").read_text())
    at = bench["rows"][-1]
    names = {"single": "one fact hidden", "multi_key": "four facts, one asked", "multi_query": "four facts, two asked"}
    names["multi_value"] = "two facts of one name, both asked"
    needles = [
        (
            f"{names[row['kind']]}, {row['length_tokens']} tokens",
            f"{row['samples']} questions",
            f"{row['dense']:.1%}",
            f"{row['sparse']:.1%} ({' to '.join(f'{x:+.1%}' for x in row['difference_95'])})",
        )
        for part in ("main", "other")
        for row in evaluation[part]["needle"]
        if row["kind"] in ("single", "multi_key")
    ]
    losses = [
        (
            f"held-out loss, {what}",
            f"{row['documents']} documents of {row['length_tokens']}",
            f"{row['dense']:.3f}",
            f"{row['sparse']:.3f} ({row['recovery'] - 1:+.2%})",
        )
        for part, what in (("main", "novels"), ("code", "scikit-learn's source"))
        for row in evaluation[part]["loss"].values()
    ]
    index = [
        (what, f"{part['documents']} documents of {part['length_tokens']}", "100 %", f"{part[key]:.1%}")
        for key, what in (
            ("mass_kept", f"attention mass kept, {rule}"),
            ("far_selected_ratio", "far tokens selected"),
        )
        for part in (evaluation["main"]["index"],)
    ]
    rows = [
        *needles,
        *losses,
        *index,
        (
            "KV cache (bfloat16), measured",
            f"1 document of {main['settings']['lengths_tokens'][-1]}",
            *(f"{main['speed'][name]['cache_bytes'] / 1e6:.0f} MB" for name in ("dense", "sparse")),
        ),
        (
            f"decode (float32), tokens/s on {bench['environment']['device']}",
            f"1 document of {at['length_tokens']}",
            *(f"{at[name]['decode_tokens_per_second']:.1f}" for name in ("dense", "sparse")),
        ),
    ]
    misses = [
        f"one fact in {row['length_tokens']} tokens ({row['recovery']:.3f})"
        for row in main["needle"]
        if row["recovery"] < 0.97
    ] + [
        f"loss on {what} ({row['recovery'] - 1:+.2%})"
        for part, what in (("main", "novels"), ("code", "scikit-learn's source"))
        for row in evaluation[part]["loss"].values()
        if row["recovery"] > 1.007
    ]
    index_steps, settings = stages["train_indexer"]["settings"]["steps"], stages["distill"]["settings"]
    lines = ["| SmolLM2-135M, 8K, window 1024, 15 % of KV groups | samples | dense | sparse |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        f"Decode: CPU; all else: one {environment['device']}, PyTorch {environment['torch']}, Transformers "
        f"{environment['transformers']}. Calibration took {seconds['calibrate']:.0f} s, {index_steps} index steps "
        f"{seconds['train_indexer']:.0f} s, {settings['steps']} distillation steps of {settings['batch_size']} documents "
        f"{seconds['distill']:.0f} s. In brackets: 95 % interval of the paired difference, or the difference.",
        "",
        "Aims were 0.97 of the dense model on single facts and at most 0.7 % more loss. "
        + (f"Missed: {', '.join(misses)}; [docs/log.md](docs/log.md) says what was tried." if misses else "All are met."),
    ]
    return "\n".join(lines)


def layer() -> str:
    """One attention layer on a GPU, dense and sparse."""
    found = json.loads((RESULTS / "h100_layer.json").read_text())
    environment, shape = found["environment"], found["shape"]
    heads = f"{len(shape['retrieval'])} heads select"
    columns = {"heads": heads, "groups": "15 % of KV groups select"}
    lines = [f"| | best dense kernel | {' | '.join(columns.values())} |", "|---|---|---|---|"]
    for phase, rows, unit in (("decode", found["rows"], 1e6), ("prefill", found["prefill_rows"], 1e3)):
        for batch, slots in dict.fromkeys((row["batch"], row["slots"]) for row in rows):
            at = {row["mode"]: row for row in rows if (row["batch"], row["slots"]) == (batch, slots)}
            dense = at["heads"]
            digits = ".0f" if unit == 1e6 else ".1f"
            cells = [
                f"{row['sparse_seconds'] * unit:{digits}} ({row['dense_seconds'] / row['sparse_seconds']:.1f}x)"
                for row in (at[mode] for mode in columns)
            ]
            name = f"{phase}, {slots // 1024}K" + (f", batch {batch}" if phase == "decode" else "")
            best = f"{dense['dense_seconds'] * unit:{digits}} {'us' if unit == 1e6 else 'ms'} ({dense['dense_backend']})"
            lines.append(f"| {name} | {best} | {' | '.join(cells)} |")
    far = found["prefill_rows"][0]["parts"][0]["far_ratio"]
    lines += [
        "",
        f"One layer of {shape['query_heads']} query heads, {shape['kv_heads']} KV heads and {shape['head_dim']} dimensions, "
        f"window {shape['window_tokens']}, bfloat16, one {environment['device']}, PyTorch {environment['torch']}, Triton "
        f"{environment['triton']}, flash-attn-4 {environment['flash-attn-4']}; everything counted, index and selection too. "
        f"In decode a head selects {shape['far_ratio']:.0%} of the far tokens and a group three times as many; in prefill a "
        f"tile of positions reads {far:.0%}. These shares are replayed: on SmolLM2's text at 8K a group selects 4 % "
        "and a tile of 16 positions reads 23 % (docs/log.md). `rtpurbo bench` measures the same on your GPU.",
    ]
    return "\n".join(lines)


TABLES = {"smollm2": smollm2, "layer": layer}


def updated(text: str) -> str:
    """`text` with every table between its markers made anew."""
    for name, make in TABLES.items():
        mark = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text = re.sub(mark, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
