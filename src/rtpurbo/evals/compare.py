"""evaluate(artifact, ...) -> dict: everything `rtpurbo eval` measures, dense and sparse on the same samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..attach import adapted, attached, gives_back, paused
from ..checkpoint import Artifact, check_digest, check_fingerprint
from ..config import EvalConfig
from ..data import documents
from ..families import context_tokens
from ..indexer_training import measure
from .fidelity import compare_documents
from .long_generation import compare_generations, end_tokens
from .needle import DEPTHS, grade_all, needle_samples
from .short_context import compare_short, draw_questions
from .speed import measure_decode
from .statistics import paired

HAYSTACKS = 100
"""Different documents per length at most; further samples hide other facts in the same documents."""


@contextmanager
def both(model: Any, artifact: Artifact) -> Iterator[Any]:
    """`switch(name)`: a context manager that gives a model, sharing weights where possible.

    Its names: "dense"; "sparse"; "weights", the sparse model's weights with dense attention (without distilled weights the
    same as "dense").
    """
    kind, path = artifact.weights_kind, artifact.weights_path

    @contextmanager
    def switch(name: str) -> Iterator[Any]:
        assert name in ("dense", "sparse", "weights")
        if name == "sparse":
            yield sparse
        elif name == "weights":
            with paused(sparse):
                yield sparse
        elif kind == "full":
            yield model
        elif kind == "lora":
            with sparse.disable_adapter(), paused(sparse):
                yield sparse
        else:
            with paused(model):
                yield model

    with ExitStack() as stack:
        sparse = model
        if kind == "full":
            from ..models import load_model

            assert path is not None
            check_digest(path)
            sparse, _ = load_model(str(path), dtype=str(model.dtype).removeprefix("torch."), device=str(model.device))
        elif kind == "lora":
            assert path is not None
            sparse = stack.enter_context(adapted(model, path))
        stack.enter_context(attached(sparse, artifact.heads, artifact.config, artifact.indexer))
        yield switch


@gives_back
def evaluate(
    model: Any,
    tokenizer: Any,
    artifact: Artifact,
    sources: list[str] | tuple[str, ...],
    config: EvalConfig | None = None,
) -> dict[str, Any]:
    """Compare a dense model with its sparse version.

    Args:
        model: the artefact's base model, dense; given back unchanged.
        sources: held-out text for haystacks and loss, see `rtpurbo.data`.

    Returns:
        "needle": per kind and length the paired result and the grid over depths; "loss": held-out loss, logit KL and
        top-1 agreement, by source and position; "short": the same and SQuAD at short context, see `compare_short`;
        "index": attention mass kept and tokens selected; "speed": prefill, decode and cache bytes; "long_generation": see
        `compare_generations`; "tasks": results of lm-evaluation-harness; "settings".

    Raises:
        ValueError: other weights than the artefact's, lengths beyond the context, too little text, an unusable SQuAD file;
            lm_eval or a package that a task needs is missing, an unknown task, or data that cannot be fetched.
    """
    check_fingerprint(model, artifact)
    context = context_tokens(model)
    config = (config or EvalConfig()).resolved(context, artifact.config)
    sparse = artifact.config.with_options(dense_end_tokens=config.dense_end_tokens)
    artifact = dataclasses.replace(artifact, config=sparse)
    longest = max(config.lengths_tokens)
    loss_length = config.loss_length_tokens or longest
    result: dict[str, Any] = {"settings": dataclasses.asdict(config), "sources": list(sources)}
    questions = draw_questions(tokenizer, config, context)
    if config.tasks:  # before anything that takes long: a task may be unknown, or lack its data
        from .harness import load_tasks, run_tasks

        tasks = load_tasks(tokenizer, config)
    with both(model, artifact) as switch:
        result["needle"] = _needles(switch, tokenizer, sources, config)
        if config.loss_documents:
            result["loss"] = {}
            for source in sources:
                texts = documents(
                    [source], tokenizer, length_tokens=loss_length, count=config.loss_documents, seed=config.seed
                )
                found = compare_documents(texts, switch)
                pair = paired(found.pop("loss_dense"), found.pop("loss_sparse"), seed=config.seed)
                result["loss"][source] = {**found, **pair}
        names = ("sparse", "weights") if artifact.weights_kind else ("sparse",)
        short = compare_short(switch, tokenizer, sources, questions, config, names=names, context=context)
        result |= {"short": short} if short else {}
        texts = documents(
            sources, tokenizer, length_tokens=longest, count=max(1, config.fidelity_documents), seed=config.seed + 7
        )
        if config.decode_tokens:
            result["speed"] = {}
            for name in ("dense", "sparse"):
                with switch(name) as ready:
                    prompt = texts[0][: context - config.decode_tokens]
                    result["speed"][name] = measure_decode(ready, prompt, new_tokens=config.decode_tokens)
        if config.fidelity_documents and artifact.indexer is not None:
            with switch("sparse") as ready:
                result["index"] = measure(
                    ready,
                    artifact.indexer,
                    texts,
                    artifact.heads,
                    artifact.config,
                )
        if config.long_tokens:
            prompts = documents(
                sources, tokenizer, length_tokens=longest - config.long_tokens, count=config.long_prompts, seed=config.seed
            )
            result["long_generation"] = compare_generations(
                torch.stack(prompts),
                switch,
                new_tokens=config.long_tokens,
                suppressed=end_tokens(model, tokenizer),
                seed=config.seed,
            )
        if config.tasks:
            result["tasks"] = run_tasks(switch, tokenizer, tasks, config, context)
    return result


def _needles(switch: Any, tokenizer: Any, sources: Any, config: EvalConfig) -> list[dict[str, Any]]:
    counts = config.samples if len(config.samples) > 1 else config.samples * len(config.lengths_tokens)
    plan = []
    for length, count in zip(config.lengths_tokens, counts, strict=True):
        if count == 0:
            continue
        haystacks = documents(sources, tokenizer, length_tokens=length, count=min(count, HAYSTACKS), seed=config.seed)
        for kind in config.kinds:
            samples = needle_samples(haystacks, tokenizer, kind=kind, count=count, seed=config.seed)
            plan += [(kind, length, sample) for sample in samples]
    scores: dict[str, list[float]] = {"dense": [], "sparse": []}
    for name in scores:
        with switch(name) as ready:
            scores[name] = grade_all(ready, [s for _, _, s in plan], what=f"Needle questions, {name}")
    cells: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for (kind, length, sample), dense, sparse in zip(plan, scores["dense"], scores["sparse"], strict=True):
        cells.setdefault((kind, length), []).append((sample.depth, dense, sparse))
    results = []
    for (kind, length), rows in cells.items():
        depths = {}
        for i in range(DEPTHS):
            depth = (i + 0.5) / DEPTHS
            some = [(d, s) for at, d, s in rows if min(int(at * DEPTHS), DEPTHS - 1) == i]
            if some:
                depths[f"{depth:.1f}"] = {
                    "samples": len(some),
                    "dense": sum(d for d, _ in some) / len(some),
                    "sparse": sum(s for _, s in some) / len(some),
                }
        pair = paired([d for _, d, _ in rows], [s for _, _, s in rows], seed=config.seed)
        results.append({"kind": kind, "length_tokens": length, **pair, "depths": depths})
    return results
