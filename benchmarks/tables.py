"""Write the README's table from the JSON files in benchmarks/results: python benchmarks/tables.py"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def smollm2() -> str:
    """The SmolLM2-135M artefact of this repository, and what a distillation of it gave."""
    found = json.loads((RESULTS / "smollm2_8k_group.json").read_text())
    stages, environment, evaluation = found["stages"], found["environment"], found["evaluation"]
    index, settings = stages["train_indexer"]["metrics"], stages["distill"]["settings"]
    shipped, distilled = evaluation["after_stage_1"], evaluation["main"]

    def needles(part: dict) -> list[tuple[str, ...]]:
        return [
            (
                f"needle questions answered, {row['length_tokens']} tokens",
                f"{row['samples']}",
                f"{row['dense']:.1%}",
                f"{row['sparse']:.1%}",
            )
            for row in part["needle"]
        ]

    def losses(part: dict, what: str) -> list[tuple[str, ...]]:
        return [
            (
                f"held-out loss, {what}",
                f"{row['documents']} documents of {row['length_tokens']}",
                f"{row['dense']:.3f}",
                f"{row['sparse']:.3f} ({row['recovery'] - 1:+.2%})",
            )
            for row in part["loss"].values()
        ]

    loss = json.loads((RESULTS / "smollm2_cpu_eval.json").read_text())["loss"]
    on_cpu = {"loss": {source: row for source, row in loss.items() if source.startswith("package:")}}
    bench = json.loads((RESULTS / "smollm2_cpu_bench.json").read_text())
    at = bench["rows"][-1]
    decode = [f"{at[name]['decode_tokens_per_second']:.1f}" for name in ("dense", "sparse")]
    cache = [f"{distilled['speed'][name]['cache_bytes'] / 1e6:.0f} MB" for name in ("dense", "sparse")]
    rows = [
        ("**index trained** (the artefact in this repository)", "", "", ""),
        *needles(shipped),
        *losses(shipped, "novels"),
        *losses(on_cpu, "code"),
        (
            f"attention mass kept, p = {index['top_p']}",
            f"{index['documents']} documents of {index['length_tokens']}",
            "100 %",
            f"{index['mass_kept']:.1%}",
        ),
        ("far tokens selected", "the same", "100 %", f"{index['far_selected_ratio']:.1%}"),
        ("KV cache, measured", f"1 document of {index['length_tokens']}", *cache),
        (f"decode, tokens/s on {bench['environment']['device']}", f"1 document of {at['length_tokens']}", *decode),
        (f"**then {settings['steps']} steps of distillation**, rate {settings['learning_rate']} (not shipped)", "", "", ""),
        *needles(distilled),
        *losses(distilled, "novels"),
        *losses(evaluation["code"], "code"),
    ]
    lines = ["| SmolLM2-135M, 8K, window 1024, 15 % of KV groups | samples | dense | sparse |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        f"Decode and the first loss on code: CPU; all else: one {environment['device']}, PyTorch {environment['torch']}, "
        f"Transformers {environment['transformers']}; calibration {found['seconds']['calibrate']:.0f} s, index "
        f"{found['seconds']['train_indexer']:.0f} s, distillation {found['seconds']['distill']:.0f} s. That distillation "
        "repaired loss and cost retrieval, so the artefact has no adapter; the default rate is lower now, see "
        "[docs/log.md](docs/log.md).",
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
