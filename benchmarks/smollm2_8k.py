"""The full recipe on SmolLM2-135M at 8K, measured: python benchmarks/smollm2_8k.py MODEL --train ... --dev ... -o OUT

Writes OUT/NAME (artefact with evaluation and report) and OUT/NAME.json with results, settings, versions
and times. Run again with the same OUT, it keeps finished stages and goes on from the last saved state of a training stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
import warnings
from pathlib import Path

from environment import environment

import rtpurbo
from rtpurbo.checkpoint import WORK_DIR
from rtpurbo.config import CalibrateConfig, DistillConfig, EvalConfig, IndexerConfig
from rtpurbo.models import load_model
from rtpurbo.pipeline import save_stage, verify
from rtpurbo.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--name", default="smollm2_8k_group")
    parser.add_argument("--granularity", default="group")
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument("--dev", nargs="+", required=True, help="prose (questions lie in it), then code")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--calibrate-documents", type=int, default=24)
    parser.add_argument("--index-steps", type=int, default=600)
    parser.add_argument("--index-documents", type=int, default=192)
    parser.add_argument("--distill-steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the distillation")
    parser.add_argument("--batch-size", type=int, default=8, help="of the distillation, in documents")
    parser.add_argument("--samples", type=int, default=400, help="single facts a length")
    parser.add_argument("--other-samples", type=int, default=100, help="questions of each other kind a length")
    parser.add_argument("--loss-documents", type=int, default=16)
    parser.add_argument("--check-samples", type=int, default=40, help="questions that check the calibration")
    parser.add_argument(
        "--min-probability", type=float, default=1e-4, help="what an index must give to a token to select it"
    )
    parser.add_argument("--glances", action="store_true", help="measure also heads and groups without an index, and stage 1")
    parser.add_argument("--commit", default=None)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    args.output.mkdir(parents=True, exist_ok=True)
    begin = last = time.time()
    out, out_json = args.output / args.name, args.output / f"{args.name}.json"
    result: dict = json.loads(out_json.read_text()) if out_json.is_file() else {"seconds": {}, "evaluation": {}}
    result["environment"] = environment(args.commit)

    def finished(what: str, **numbers: object) -> None:
        """Print, and write what is known so far; the seconds of a stage that was cut short are those of its last part."""
        nonlocal last
        now = time.time()
        result["seconds"][what] = round(now - last, 1)
        last = now
        print(f"[{now - begin:6.1f} s] {what}", json.dumps(numbers), flush=True)
        out_json.write_text(json.dumps(result, indent=1) + "\n")

    model, tokenizer = load_model(args.model)
    lengths = (args.length // 4, args.length // 2, args.length)
    artifact = rtpurbo.Artifact.load(out) if out.is_dir() else None
    finished("load")
    if artifact is None:
        artifact = rtpurbo.calibrate(
            model,
            tokenizer,
            args.train,
            CalibrateConfig(
                granularity=args.granularity,
                lengths_tokens=lengths,
                documents=args.calibrate_documents,
                check_samples=args.check_samples,
            ),
            rtpurbo.SparseConfig(window_tokens=args.window, min_probability=args.min_probability),
            model_name="smollm2-135m",
        )
        artifact = save_stage(out, "calibrate", artifact, args.train)
        metrics = artifact.stages["calibrate"]["metrics"]
        finished("calibrate", check=metrics.get("check"), overlap=metrics.get("overlap_between_seeds"))
    if "train_indexer" not in artifact.stages:
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
            work=out / WORK_DIR / "train_indexer",
        )
        artifact = save_stage(out, "train_indexer", artifact, args.train)
        finished("train_indexer", **{k: v for k, v in artifact.stages["train_indexer"]["metrics"].items() if k != "curve"})
    if args.distill_steps and "distill" not in artifact.stages:
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
            work=out / WORK_DIR / "distill",
        )
        artifact = save_stage(out, "distill", artifact, args.train)
        finished("distill", **artifact.stages["distill"]["metrics"])
    result["base_model"], result["sparse"] = artifact.base_model, dataclasses.asdict(artifact.config)
    result["stages"] = artifact.stages
    prose, code = args.dev[:1], args.dev[1:]

    def settings(samples: int = 0, kinds: tuple[str, ...] = ("single",), **more: int) -> EvalConfig:
        chosen = {"loss_documents": 0, "fidelity_documents": 0, "decode_tokens": 0, "short_documents": 0, **more}
        return EvalConfig(lengths_tokens=lengths, samples=(samples,), kinds=kinds, **chosen)

    def note(part: str, found: dict) -> None:
        """Print an evaluation, and write what is known so far."""
        result["evaluation"][part] = found
        for row in found["needle"]:
            print("   ", row["kind"], row["length_tokens"], row["dense"], row["sparse"], row["difference_95"], flush=True)
        for source, row in found.get("loss", {}).items():
            print("    loss", source, row["dense"], row["sparse"], row["recovery"], row["kl"], flush=True)
        if "index" in found:
            print("    index", {k: found["index"][k] for k in ("mass_kept", "far_selected_ratio")}, found.get("speed"))
        finished(f"evaluate {part}")

    def measure(part: str, of: rtpurbo.Artifact, sources: list[str], config: EvalConfig) -> None:
        if part not in result["evaluation"]:
            note(part, rtpurbo.evaluate(model, tokenizer, of, sources, config))

    main_settings = settings(args.samples, loss_documents=args.loss_documents, fidelity_documents=8, decode_tokens=32)
    if "main" not in result["evaluation"]:
        note("main", verify(model, tokenizer, artifact, out, prose, main_settings))
    if code:
        measure("code", artifact, code, settings(loss_documents=args.loss_documents, fidelity_documents=8))
    if args.other_samples:
        measure("other", artifact, prose, settings(args.other_samples, ("multi_key", "multi_value", "multi_query")))
    write_report(out)
    shutil.rmtree(out / WORK_DIR, ignore_errors=True)
    if not args.glances:
        return
    undistilled = dataclasses.replace(artifact, weights_kind=None, weights_path=None)
    parts = {"after stage 1": undistilled}
    for unit in ("head", "group"):  # both ways to choose, nothing trained: dense retrieval heads and windows
        record = artifact.stages["calibrate"]
        heads = rtpurbo.HeadMap.from_scores(
            record["metrics"]["scores"],
            kv_heads=artifact.heads.kv_heads,
            granularity=unit,
            ratio=record["settings"]["retrieval_ratio"],
        )
        parts[f"{unit}s chosen"] = dataclasses.replace(undistilled, heads=heads, indexer=None)
    for part, of in parts.items():
        half = settings(args.other_samples, loss_documents=args.loss_documents // 2)
        measure(f"{part}, prose", of, prose, half)
        if code:
            measure(f"{part}, code", of, code, dataclasses.replace(half, samples=(0,)))


if __name__ == "__main__":
    main()
