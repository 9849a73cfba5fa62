"""Ways to choose retrieval heads, compared before anything is trained: the chosen heads dense, all others local.

    python benchmarks/head_choice.py smollm2-135m --length 768 --window 96 --choices needle:9 gates:24 gates:60 -o FILE

A choice is SCORING:DOCUMENTS of `rtpurbo calibrate`, with :SHARE for another one than --retrieval-ratio, and then :WEIGHT
for another text_weight. Held-out documents say what is left: of the answers that the dense model gives (several questions
of one kind in a document, a repeated span), and of its next-token distribution beyond the window; --tasks adds RULER's.
The file is written after every choice.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import environment
from torch import Tensor

import rtpurbo
from rtpurbo.attach import attached
from rtpurbo.calibration import QUESTIONS, Task, make_task
from rtpurbo.checkpoint import write_json
from rtpurbo.config import CalibrateConfig, EvalConfig, SparseConfig
from rtpurbo.data import documents
from rtpurbo.evals.harness import load_tasks, score_tasks
from rtpurbo.evals.statistics import paired
from rtpurbo.families import context_tokens
from rtpurbo.models import load_model

KINDS = ("span", *QUESTIONS)
SPAN_TOKENS = 48


@dataclasses.dataclass(frozen=True)
class Sample:
    """A held-out document, and what the dense model says."""

    task: Task
    """Its answers are those that the dense model gets right."""
    logits: Tensor
    """[positions of text, vocabulary], dense"""


@torch.no_grad()
def held_out(model: Any, tokenizer: Any, source: str, sparse: SparseConfig, *, length: int, count: int) -> list[Sample]:
    """`count` documents, the kinds in turn."""
    found = []
    texts = documents([source], tokenizer, length_tokens=length, count=count + 1, seed=5)
    for i in range(count):
        kind, seed = KINDS[i % len(KINDS)], f"held out:{i}"
        task = make_task(texts[i], texts[i + 1], tokenizer, sparse, kind=kind, span_tokens=SPAN_TOKENS, seed=seed)
        task = dataclasses.replace(task, text=task.text[::2])
        logits = logits_at(model, task)
        right = logits[: len(task.answers)].argmax(-1).cpu() == task.tokens[task.answers + 1]
        found.append(Sample(dataclasses.replace(task, answers=task.answers[right]), logits[len(right) :].cpu()))
    return found


def logits_at(model: Any, task: Task) -> Tensor:
    """[positions, vocabulary]"""
    positions = task.positions.to(model.device)
    return model(task.tokens[None].to(model.device), logits_to_keep=positions, use_cache=False).logits[0]


@torch.no_grad()
def left(model: Any, samples: list[Sample]) -> dict[str, list[float]]:
    """Per sample: "loss" on text less the dense model's, and "kl" to it, nats; by kind the share of "answers" left and their
    cross-entropy."""
    found: dict[str, list[float]] = defaultdict(list)
    for task, dense in ((s.task, s.logits) for s in samples):
        logits = logits_at(model, task).float()
        count = len(task.answers)
        want = task.tokens[task.positions + 1].to(logits.device)
        student, teacher = logits[count:].log_softmax(-1), dense.to(logits.device).float().log_softmax(-1)
        found["kl"].append(float(F.kl_div(student, teacher, reduction="batchmean", log_target=True)))
        found["loss"].append(float(F.nll_loss(student, want[count:]) - F.nll_loss(teacher, want[count:])))
        if count:
            found[f"{task.kind} answers"].append(float((logits[:count].argmax(-1) == want[:count]).float().mean()))
            found[f"{task.kind} nats"].append(float(F.cross_entropy(logits[:count], want[:count])))
    return dict(found)


def means(found: dict[str, list[float]]) -> dict[str, float]:
    """For the person who waits."""
    return {name: round(sum(values) / len(values), 4) for name, values in found.items()}


def main() -> None:
    """Calibrate every choice, measure what it leaves, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--train", nargs="+", default=["installed-docs", "installed-python"])
    parser.add_argument("--dev", nargs="+", default=["installed-docs:heldout", "installed-python:heldout"])
    parser.add_argument("--calibrate-lengths", nargs="+", type=int, help="default: --length")
    parser.add_argument("--length", type=int, required=True, help="of the held-out documents, in tokens")
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--granularity", default="auto")
    parser.add_argument("--retrieval-ratio", type=float, default=0.15)
    parser.add_argument("--documents", type=int, default=30, help="held out, of each source")
    parser.add_argument("--choices", nargs="+", required=True)
    parser.add_argument("--tasks", nargs="+", default=[], help="of RULER, by lm-evaluation-harness, at --length")
    parser.add_argument("--no-dense", action="store_true", help="leave the tasks of the dense model out")
    parser.add_argument("--task-samples", type=int, default=100)
    parser.add_argument("--task-batch", type=int, default=16)
    parser.add_argument("--ruler-files", help="folder with RULER's essays and question sets; default: downloaded")
    parser.add_argument("--commit")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=args.dtype)
    sparse = SparseConfig(window_tokens=args.window)
    size = {"length": args.length, "count": args.documents}
    samples = {source: held_out(model, tokenizer, source, sparse, **size) for source in args.dev}
    lengths = tuple(args.calibrate_lengths or [args.length])
    settings = EvalConfig(
        lengths_tokens=(args.length,), tasks=tuple(args.tasks), task_limit=args.task_samples, task_batch=args.task_batch,
        ruler_files=args.ruler_files,
    )  # fmt: skip
    tasks = load_tasks(tokenizer, settings) if args.tasks else {}

    def scores() -> dict[str, list[float]]:
        """Per task of RULER what the model scores on each sample."""
        rows = score_tasks(model, tokenizer, tasks, settings, context_tokens(model)) if tasks else []
        return {row["task"]: row["scores"] for row in rows}

    skipped = ("output", "commit", "model", "ruler_files")
    result: dict[str, Any] = {
        "environment": environment(args.commit),
        "settings": {key: value for key, value in vars(args).items() if key not in skipped},
        "choices": [],
    }
    if args.tasks and not args.no_dense:
        result["dense_tasks"] = scores()
        print("dense", means(result["dense_tasks"]), flush=True)
    for choice in args.choices:
        scoring, count, *more = choice.split(":")
        config = CalibrateConfig(
            granularity=args.granularity, scoring=scoring, documents=int(count), lengths_tokens=lengths, check_samples=0,
            retrieval_ratio=float(more[0]) if more else args.retrieval_ratio,
            text_weight=float(more[1]) if more[1:] else CalibrateConfig.text_weight,
        )  # fmt: skip
        begin = time.perf_counter()
        artifact = rtpurbo.calibrate(model, tokenizer, args.train, config, sparse)
        row: dict[str, Any] = {"choice": choice, "seconds": round(time.perf_counter() - begin, 1)}
        row |= {"heads": artifact.heads.to_dict(), "full_kv_ratio": artifact.heads.full_kv_ratio}
        row["overlap_between_seeds"] = artifact.stages["calibrate"]["metrics"].get("overlap_between_seeds")
        with attached(model, artifact.heads, sparse):
            row["left"] = {Path(source).name: left(model, some) for source, some in samples.items()}
            row["tasks"] = scores()
        result["choices"].append(row)
        write_json(args.output, result)
        first = result["choices"][0]["left"]
        for source, found in row["left"].items():
            apart = paired(first[source]["kl"], found["kl"])["difference_95"]
            print(choice, source, row["seconds"], "s", row["overlap_between_seeds"], means(found), "kl, 95 %:", apart)
        print(choice, means(row["tasks"]), flush=True)


if __name__ == "__main__":
    main()
