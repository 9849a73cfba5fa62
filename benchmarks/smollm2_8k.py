"""The full recipe on SmolLM2-135M at 8K, measured: python benchmarks/smollm2_8k.py MODEL --train ... --dev ... -o OUT

Writes OUT/ARTEFACT (head map, indexer, LoRA) and OUT/NAME.json with results, settings, versions and times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import time
import warnings
from pathlib import Path

import torch
import transformers

import rtpurbo
from rtpurbo.config import CalibrateConfig, DistillConfig, EvalConfig, IndexerConfig
from rtpurbo.models import load_model


def environment() -> dict:
    """Device, versions and commit that a result belongs to."""
    gpu = torch.cuda.is_available()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rtpurbo": rtpurbo.__version__,
        "commit": commit or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--name", default="smollm2_8k_group")
    parser.add_argument("--granularity", default="group")
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument("--dev", nargs="+", required=True)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--calibrate-documents", type=int, default=24)
    parser.add_argument("--index-steps", type=int, default=600)
    parser.add_argument("--index-documents", type=int, default=192)
    parser.add_argument("--distill-steps", type=int, default=150)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--other-samples", type=int, default=100)
    parser.add_argument("--loss-documents", type=int, default=16)
    parser.add_argument("--mass-target", type=float, default=0.955)
    parser.add_argument("--commit", default=None)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    args.output.mkdir(parents=True, exist_ok=True)
    begin, seconds = time.time(), {}

    def finished(what: str, **numbers: object) -> None:
        seconds[what] = round(time.time() - begin - sum(seconds.values()), 1)
        print(f"[{time.time() - begin:6.1f} s] {what}", json.dumps(numbers), flush=True)

    model, tokenizer = load_model(args.model)
    lengths = (args.length // 4, args.length // 2, args.length)
    artifact = rtpurbo.calibrate(
        model,
        tokenizer,
        args.train,
        CalibrateConfig(
            granularity=args.granularity, lengths_tokens=lengths, documents=args.calibrate_documents, check_samples=40
        ),
        rtpurbo.SparseConfig(window_tokens=args.window),
        model_name="smollm2-135m",
    )
    metrics = artifact.stages["calibrate"]["metrics"]
    finished("calibrate", check=metrics.get("check"), overlap=metrics.get("overlap_between_halves"))
    artifact = rtpurbo.train_indexer(
        model,
        tokenizer,
        artifact,
        args.train,
        IndexerConfig(
            steps=args.index_steps,
            learning_rate=1e-2,
            length_tokens=args.length,
            documents=args.index_documents,
            capture_gib=24,
            mass_target=args.mass_target,
        ),
    )
    metrics = artifact.stages["train_indexer"]["metrics"]
    finished(
        "train_indexer",
        kl=metrics["kl"],
        top_p=metrics["top_p"],
        curve=[[round(x, 3) for x in (c["top_p"], c["mass_kept"], c["far_selected_ratio"])] for c in metrics["curve"]],
    )
    before = rtpurbo.evaluate(
        model,
        tokenizer,
        artifact,
        args.dev[:1],
        EvalConfig(
            lengths_tokens=lengths[::2],
            samples=(max(2, args.samples // 5),),
            kinds=("single",),
            loss_documents=max(1, args.loss_documents // 4),
            fidelity_documents=0,
            decode_tokens=0,
        ),
    )
    finished("evaluate stage 1", needle=[(r["length_tokens"], r["dense"], r["sparse"]) for r in before["needle"]])
    if args.distill_steps:
        artifact = rtpurbo.distill(
            model,
            tokenizer,
            artifact,
            args.train,
            DistillConfig(
                steps=args.distill_steps, learning_rate=3e-4, length_tokens=args.length, gradient_checkpointing=False
            ),
        )
        finished("distill", **artifact.stages["distill"]["metrics"])
    artifact.save(args.output / args.name)
    result: dict = {"environment": {**environment(), "commit": args.commit or environment()["commit"]}}
    result["base_model"], result["sparse"] = artifact.base_model, dataclasses.asdict(artifact.config)
    result["stages"] = artifact.stages
    result["evaluation"] = {"after_stage_1": before}
    prose, code = args.dev[:1], args.dev[1:]
    for part, sources, kinds, samples, documents in (
        ("main", prose, ("single",), args.samples, args.loss_documents),
        ("code", code, (), 0, args.loss_documents),
        ("other", prose, ("multi_key", "multi_value", "multi_query"), args.other_samples, 0),
    ):
        if not sources or not samples + documents:
            continue
        found = rtpurbo.evaluate(
            model,
            tokenizer,
            artifact,
            sources,
            EvalConfig(
                lengths_tokens=lengths,
                samples=(samples,),
                kinds=kinds,
                loss_documents=documents,
                fidelity_documents=8 if part == "main" else 0,
                decode_tokens=32 if part == "main" else 0,
            ),
        )
        result["evaluation"][part] = found
        for row in found["needle"]:
            keys = ("dense", "sparse", "recovery", "difference_95")
            print("   ", row["kind"], row["length_tokens"], {k: row[k] for k in keys}, flush=True)
        for source, row in found.get("loss", {}).items():
            print("    loss", Path(source).name, row["dense"], row["sparse"], row["recovery"], row["kl"], flush=True)
        if "index" in found:
            print("    index", {k: found["index"][k] for k in ("mass_kept", "far_selected_ratio")}, found.get("speed"))
        finished(f"evaluate {part}")
        result["seconds"] = seconds
        (args.output / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
