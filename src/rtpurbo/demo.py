"""`rtpurbo demo`: the whole method at sizes that a laptop's CPU does in minutes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .config import CalibrateConfig, DistillConfig, EvalConfig, IndexerConfig
from .data import documents
from .evals.compare import both
from .pipeline import HELDOUT, ConvertConfig, convert, say
from .progress import track
from .questions import retrieval_sample

SOURCES = ("installed-docs",)
QUESTION_TOKENS = 2048


def demo_config(seed: int) -> ConvertConfig:
    """Small everything: many short documents for calibration, longer ones to train on, and a quarter of the KV groups kept
    whole, since so little text does not find the best 15 %."""
    return ConvertConfig(
        window_tokens=256,
        calibrate=CalibrateConfig(
            granularity="group", retrieval_ratio=0.25, lengths_tokens=(512,), documents=18, check_samples=2, seed=seed
        ),
        indexer=IndexerConfig(
            steps=200, length_tokens=2048, shortest_tokens=1024, documents=24, queries=160, mass_target=0.98, seed=seed
        ),
        distill=DistillConfig(
            steps=2, batch_size=1, learning_rate=1.5e-4, length_tokens=1024, shortest_tokens=1024, labels=512, seed=seed
        ),
        evaluate=EvalConfig(
            lengths_tokens=(1024, 2048), samples=(4, 8), kinds=("single",), loss_documents=2, loss_length_tokens=2048,
            fidelity_documents=1, decode_tokens=16, short_documents=0, seed=seed,
        ),
    )  # fmt: skip


def run_demo(model: Any, tokenizer: Any, output: Path, *, model_name: str, seed: int) -> Path:
    """Convert, then ask both models about a fact hidden in a long document; returns the artefact's directory."""
    config = demo_config(seed)
    artifact = convert(model, tokenizer, output, sources=SOURCES, heldout=HELDOUT, config=config, model_name=model_name)
    haystack = documents(HELDOUT, tokenizer, length_tokens=QUESTION_TOKENS, count=1, seed=seed + 11)[0]
    sample = retrieval_sample(haystack, tokenizer, kind="single", depth=0.4, seed=f"demo:{seed}")
    question = tokenizer.decode(sample.prompt).rsplit("\n\n", 1)[-1]
    start, stop = sample.answers[0]
    say(f"\nA document of {QUESTION_TOKENS} tokens, then the question:\n{question} ...")
    sys.stdout.write(f"right answer: {tokenizer.decode(sample.tokens[start:stop]).strip()}\n")
    said = {}
    with both(model, artifact) as switch:
        for name in track(("dense", "sparse"), total=2, what="Both models answer"):
            with switch(name) as ready:
                out = ready.generate(
                    sample.prompt[None].to(model.device), max_new_tokens=stop - start, do_sample=False, pad_token_id=0
                )
            said[name] = tokenizer.decode(out[0, len(sample.prompt) :]).strip()
    for name, answer in said.items():
        sys.stdout.write(f"{name:>6s} says: {answer}\n")
    return output
