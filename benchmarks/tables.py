"""Write the README's table from the JSON files in benchmarks/results: python benchmarks/tables.py"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def smollm2() -> str:
    """What is measured of the SmolLM2-135M artefact so far."""
    found = json.loads((RESULTS / "smollm2_8k_group_training.json").read_text())
    stages, environment = found["stages"], found["environment"]
    check, index = (stages["calibrate"]["metrics"]["check"], stages["train_indexer"]["metrics"])
    at = next(point for point in index["curve"] if point["top_p"] == 0.85)
    distilled, steps = stages["distill"]["metrics"], [stages[s]["settings"]["steps"] for s in ("train_indexer", "distill")]
    rows = [
        (
            "needle questions, heads chosen, nothing trained",
            f"{check['samples']} at {check['length_tokens']} tokens",
            f"{check['dense']:.1%}",
            f"{check['chosen_heads']:.1%}",
        ),
        (
            f"attention mass kept, p = {at['top_p']}",
            f"{index['documents']} documents of {index['length_tokens']}",
            "100 %",
            f"{at['mass_kept']:.1%}",
        ),
        ("far tokens selected", "the same", "100 %", f"{at['far_selected_ratio']:.1%}"),
        ("KV heads kept in full", "", "100 %", f"{stages['calibrate']['metrics']['full_kv_ratio']:.1%}"),
        ("KL to dense, first step of stage 2", "training documents", "0", f"{distilled['loss_first']:.3f}"),
        ("KL to dense, last tenth of stage 2", "training documents", "0", f"{distilled['loss_last']:.3f}"),
    ]
    lines = ["| SmolLM2-135M, 8K, window 1024, 15 % of KV groups | samples | dense | sparse |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        f"One {environment['device']}, PyTorch {environment['torch']}, Transformers {environment['transformers']}; "
        f"{steps[0]} + {steps[1]} steps in {found['seconds']['train_indexer'] + found['seconds']['distill']:.0f} s. "
        "Retrieval and held-out loss of the finished model have not been measured yet.",
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
