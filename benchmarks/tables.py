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


def updated(text: str) -> str:
    """`text` with every table between its markers made anew."""
    return re.sub(
        r"(<!-- table:smollm2 -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{smollm2()}\n{m[2]}", text, flags=re.DOTALL
    )


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
