"""The full recipe on SmolLM2-135M at 8K, measured: python benchmarks/smollm2_8k.py MODEL --train ... --dev ... -o OUT

Writes OUT/NAME (artefact: head map, indexer, LoRA) and OUT/NAME.json with results, settings, versions and times. Run again
with the same OUT, it goes on: distillation from its last saved state, a finished artefact with the evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import subprocess
import time
import warnings
from pathlib import Path

import torch
import transformers

import rtpurbo
from rtpurbo.checkpoint import WORK_DIR
from rtpurbo.config import CalibrateConfig, DistillConfig, EvalConfig, IndexerConfig
from rtpurbo.models import load_model
from rtpurbo.training import METRICS_FILE


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


def stages_0_and_1(args, model, tokenizer, lengths: tuple[int, ...], finished) -> rtpurbo.Artifact:
    """Calibration and index training."""
    artifact = rtpurbo.calibrate(
        model,
        tokenizer,
        args.train,
        CalibrateConfig(
            granularity=args.granularity, lengths_tokens=lengths, documents=args.calibrate_documents, check_samples=40
        ),
        rtpurbo.SparseConfig(window_tokens=args.window, min_probability=args.min_probability),
        model_name="smollm2-135m",
    )
    metrics = artifact.stages["calibrate"]["metrics"]
    finished("calibrate", check=metrics.get("check"), overlap=metrics.get("overlap_between_seeds"))
    artifact = rtpurbo.train_indexer(
        model,
        tokenizer,
        artifact,
        args.train,
        IndexerConfig(
            steps=args.index_steps,
            length_tokens=args.length,
            documents=args.index_documents,
            capture_gib=24,
        ),
    )
    metrics = artifact.stages["train_indexer"]["metrics"]
    finished(
        "train_indexer",
        kl=metrics["kl"],
        curve=[
            [c["min_probability"], round(c["mass_kept"], 3), round(c["far_selected_ratio"], 3)] for c in metrics["curve"]
        ],
    )
    return artifact


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
    parser.add_argument("--distill-steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the distillation")
    parser.add_argument("--batch-size", type=int, default=8, help="of the distillation, in documents")
    parser.add_argument("--artifact", default=None, help="go on from this artefact of stage 1")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--other-samples", type=int, default=100)
    parser.add_argument("--stage-1-samples", type=int, default=100, help="needle questions after stage 1")
    parser.add_argument("--loss-documents", type=int, default=16)
    parser.add_argument(
        "--min-probability", type=float, default=1e-4, help="what an index must give to a token to select it"
    )
    parser.add_argument("--commit", default=None)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    args.output.mkdir(parents=True, exist_ok=True)
    begin = last = time.time()
    out, out_json = args.output / args.name, args.output / f"{args.name}.json"
    result: dict = json.loads(out_json.read_text()) if out_json.is_file() else {"seconds": {}, "evaluation": {}}
    result["environment"] = {**environment(), "commit": args.commit or environment()["commit"]}

    def finished(what: str, **numbers: object) -> None:
        """Print, and write what is known so far; seconds count this run alone."""
        nonlocal last
        now = time.time()
        result["seconds"][what] = round(now - last, 1)
        last = now
        print(f"[{now - begin:6.1f} s] {what}", json.dumps(numbers), flush=True)
        out_json.write_text(json.dumps(result, indent=1) + "\n")

    model, tokenizer = load_model(args.model)
    lengths = (args.length // 4, args.length // 2, args.length)
    if out.is_dir():
        artifact = rtpurbo.Artifact.load(out)
    elif args.artifact:
        artifact = rtpurbo.Artifact.load(args.artifact)
        rule = dataclasses.replace(artifact.config, top_p=1.0, min_probability=args.min_probability)
        artifact = dataclasses.replace(artifact, config=rule)
    else:
        artifact = stages_0_and_1(args, model, tokenizer, lengths, finished)
    prose, code = args.dev[:1], args.dev[1:]

    def measure(part: str, of: rtpurbo.Artifact, sources: list[str], kinds: tuple[str, ...], **settings: int) -> None:
        """Evaluate, print, and write what is known so far."""
        samples = (settings.pop("samples", 0),)
        found = rtpurbo.evaluate(
            model, tokenizer, of, sources, EvalConfig(lengths_tokens=lengths, samples=samples, kinds=kinds, **settings)
        )
        result["evaluation"][part] = found
        for row in found["needle"]:
            print("   ", row["kind"], row["length_tokens"], row["dense"], row["sparse"], row["difference_95"], flush=True)
        for source, row in found.get("loss", {}).items():
            print("    loss", Path(source).name, row["dense"], row["sparse"], row["recovery"], row["kl"], flush=True)
        if "index" in found:
            print("    index", {k: found["index"][k] for k in ("mass_kept", "far_selected_ratio")}, found.get("speed"))
        result["base_model"], result["sparse"] = of.base_model, dataclasses.asdict(of.config)
        result["stages"] = of.stages
        finished(f"evaluate {part}")

    none = {"fidelity_documents": 0, "decode_tokens": 0}

    def glance(part: str, of: rtpurbo.Artifact, samples: int) -> None:
        """Fewer samples of retrieval, prose and code."""
        half = args.loss_documents // 2
        measure(f"{part}, prose", of, prose, ("single",), samples=samples, loss_documents=half, **none)
        if code:
            measure(f"{part}, code", of, code, (), loss_documents=half, **none)

    if not (args.artifact or out.is_dir()):
        for unit in ("head", "group"):  # both ways to choose, nothing trained: dense retrieval heads and windows
            heads = rtpurbo.HeadMap.from_scores(
                artifact.stages["calibrate"]["metrics"]["scores"],
                kv_heads=artifact.heads.kv_heads,
                granularity=unit,
                ratio=artifact.stages["calibrate"]["settings"]["retrieval_ratio"],
            )
            glance(f"{unit}s chosen", dataclasses.replace(artifact, heads=heads, indexer=None), args.stage_1_samples // 2)
        glance("after stage 1", artifact, args.stage_1_samples)
    if args.distill_steps and not out.is_dir():
        artifact = rtpurbo.distill(
            model,
            tokenizer,
            artifact,
            args.train,
            DistillConfig(
                steps=args.distill_steps,
                learning_rate=args.learning_rate,
                batch_size=args.batch_size,
                length_tokens=args.length,
                gradient_checkpointing=args.batch_size > 4,
            ),
            work=args.output / WORK_DIR,
        )
        shutil.copy(args.output / WORK_DIR / METRICS_FILE, args.output / f"{args.name}_{METRICS_FILE}")
        finished("distill", **artifact.stages["distill"]["metrics"])
    artifact.save(out)
    artifact = rtpurbo.Artifact.load(out)
    shutil.rmtree(args.output / WORK_DIR, ignore_errors=True)
    measure(
        "main", artifact, prose, ("single",), samples=args.samples, loss_documents=args.loss_documents,
        fidelity_documents=8, decode_tokens=32,
    )  # fmt: skip
    if code:
        measure("code", artifact, code, (), loss_documents=args.loss_documents, fidelity_documents=8, decode_tokens=0)
    if args.other_samples:
        kinds = ("multi_key", "multi_value", "multi_query")
        measure("other", artifact, prose, kinds, samples=args.other_samples, loss_documents=0, **none)


if __name__ == "__main__":
    main()
