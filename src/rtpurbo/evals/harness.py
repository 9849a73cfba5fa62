"""Tasks of lm-evaluation-harness, dense and sparse on the same samples."""

from __future__ import annotations

import difflib
import importlib.metadata
import random
import sys
import tempfile
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import EvalConfig
from ..generate import greedy
from ..progress import track
from . import ruler
from .fidelity import Switch
from .statistics import paired


def run_tasks(switch: Switch, tokenizer: Any, tasks: dict[str, Any], config: EvalConfig, context: int) -> dict[str, Any]:
    """Run tasks with both models.

    Args:
        tasks: from `load_tasks`.
        switch: `with switch("dense") as model` (or "sparse") gives the model that runs so.
        context: longest sequence in tokens; longer prompts lose their beginning.

    Returns:
        "lm_eval": its version; "results": a list with, per task and metric, "task", "task_version", "metric", the paired
        result, "higher_is_better", "prompt_tokens" (lengths of the prompts as the models see them: "min", "mean", "max")
        and "prompts_cut" (how many lost their beginning).
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("dense", "sparse"):
        with switch(name) as model:
            found[name] = score_tasks(model, tokenizer, tasks, config, context)
    results = []
    for dense, sparse in zip(found["dense"], found["sparse"], strict=True):
        assert dense["prompts"] == sparse["prompts"]
        row = {key: dense[key] for key in ("task", "task_version", "metric")}
        row |= paired(dense["scores"], sparse["scores"], seed=config.seed)
        results.append(row | {key: dense[key] for key in ("higher_is_better", "prompt_tokens", "prompts_cut")})
    return {"lm_eval": importlib.metadata.version("lm_eval"), "results": results}


def _installed() -> Any:
    try:
        import lm_eval.models.huggingface
    except ImportError as error:
        raise ValueError(f"Tasks need the package lm_eval ({error}); run `pip install rtpurbo[eval]`.") from error
    return lm_eval


def _model(model: Any, tokenizer: Any, config: EvalConfig, context: int) -> Any:
    """The harness's own wrapper of a model, but greedy generation reads prompts one by one and decodes them together, and
    log-likelihoods are those of documents."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils_hf import stop_sequences_criteria

    class Batched(HFLM):
        def _model_generate(self, context, max_length, stop, *, attention_mask, do_sample=False, temperature=0.0, **more):
            if do_sample or temperature or more:
                sampling = {"do_sample": do_sample, "temperature": temperature, "attention_mask": attention_mask}
                return super()._model_generate(context, max_length, stop, **sampling, **more)
            prompts = [row[mask.bool()] for row, mask in zip(context, attention_mask, strict=True)]
            room = max_length - context.shape[1]
            stopped = stop_sequences_criteria(self.tokenizer, stop, 0, len(prompts))
            new = greedy(self.model, prompts, room, finished=lambda new: bool(stopped(new, None).all()))
            return torch.cat([context.cpu(), new], 1)

        def _model_call(self, inps, attn_mask=None, labels=None):
            with torch.no_grad():  # texts padded on the right are no prompts: without a cache
                return self.model(inps, use_cache=False).logits

    return Batched(pretrained=model, tokenizer=tokenizer, batch_size=config.task_batch, max_length=context)


def score_tasks(model: Any, tokenizer: Any, tasks: dict[str, Any], config: EvalConfig, context: int) -> list[dict[str, Any]]:
    """What one model scores on every sample of tasks that are loaded.

    Returns:
        Per task and metric: "task", "task_version", "metric", "higher_is_better", "scores" (one a sample), "prompts" (a
        hash of each sample's prompt), "prompt_tokens" and "prompts_cut" (see `run_tasks`).
    """
    lm_eval = _installed()
    lm = _model(model, tokenizer, config, context)
    found = lm_eval.simple_evaluate(
        lm,
        tasks=list(tasks.values()),
        samples={name: _sample_numbers(task, config.task_limit) for name, task in tasks.items()},
        log_samples=True,
        bootstrap_iters=0,
        task_manager=_no_tasks(),
        random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    rows = []
    for name in tasks:
        better = found["higher_is_better"][name]
        for metric, pairs in _metrics(found["samples"][name]).items():
            rows.append(
                {
                    "task": name,
                    "task_version": found["versions"][name],
                    "metric": metric,
                    "higher_is_better": bool(better.get(metric.split(",")[0], True)),
                    "scores": [score for _, score in pairs],
                    "prompts": [sample["prompt_hash"] for sample, _ in pairs],
                    **_prompt_lengths(lm, [sample for sample, _ in pairs], context),
                }
            )
    return rows


def _no_tasks() -> Any:
    """A task manager for tasks that are loaded already; finding lm_eval's own thousands takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def load_tasks(tokenizer: Any, config: EvalConfig, made: dict[str, list[dict[str, Any]]] | None = None) -> dict[str, Any]:
    """Leaf tasks by name, with their documents.

    Those that make their own documents (RULER) make them at `config.lengths_tokens`, `config.task_limit` of each length.

    Args:
        made: documents of RULER's tasks by task, from `ruler.documents`; others are made now.

    Raises:
        ValueError: lm_eval or a package that a task needs is missing, an unknown task, or data that cannot be fetched.
    """
    _installed()
    import datasets
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    made = dict(made or {})
    names = [name for given in config.tasks for name in (ruler.TASKS if given == "ruler" else (given,))]
    paths = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"Task file {str(path)!r} does not exist.")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)  # tasks load a tokenizer by name; this one may have come from elsewhere
        metadata = {"max_seq_lengths": list(config.lengths_tokens), "tokenizer": folder}
        others = [name for name in names if name not in ruler.TASKS and Path(name) not in paths]
        manager = TaskManager(include_defaults=bool(others), include_path=ruler.folder(), metadata=metadata)
        for name in others:
            if name not in manager.task_index:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3) or ["none"]
                raise ValueError(f"Unknown task {name!r}; near matches: {', '.join(near)}.")
        before = random.getstate()
        random.seed(config.seed)
        try:
            with redirect_stdout(sys.stderr):  # some tasks report downloads there
                missing = [name for name in names if name in ruler.TASKS and name not in made]
                for name in track(missing, total=len(missing), what="Making RULER's documents"):
                    made[name] = ruler.documents(
                        name, tokenizer, config.lengths_tokens, count=config.task_limit, files=config.ruler_files,
                        seed=config.seed,
                    )  # fmt: skip
                rows = {name: {"test": datasets.Dataset.from_list(made[name])} for name in names if name in made}
                given = [{"task": name, "custom_dataset": partial(_given, rows[name])} for name in rows]
                group = [{"group": "ruler_given", "task": given}] if given else []
                with ruler.offline() if given else nullcontext():
                    return manager.load([name for name in names if name not in rows] + group)["tasks"]
        except ImportError as error:
            raise ValueError(f"A task needs a package that is missing: {error}. Run `pip install rtpurbo[eval]`.") from error
        except (OSError, DatasetsError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"The data of {', '.join(config.tasks)} could not be read: {reason}") from error
        finally:
            random.setstate(before)


def _given(rows: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    """A task's documents, already made."""
    return rows


def _sample_numbers(task: Any, limit: int | None) -> list[int]:
    """The first `limit` documents of a task, or of every length where its documents come in several."""
    taken: dict[Any, int] = {}
    numbers = []
    for number, document in enumerate(task.eval_docs):
        length = document.get("max_length") if isinstance(document, dict) else None
        taken[length] = taken.get(length, 0) + 1
        if limit is None or taken[length] <= limit:
            numbers.append(number)
    return numbers


def _metrics(samples: list[dict[str, Any]]) -> dict[str, list[tuple[Any, float]]]:
    """(sample, score) of every metric that has a number per sample."""
    found: dict[str, list[tuple[Any, float]]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], (int, float)) and not _of_another_length(sample["doc"], metric):
                key = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                found.setdefault(key, []).append((sample, float(sample[metric])))
    return found


def _prompt_lengths(lm: Any, samples: list[dict[str, Any]], context: int) -> dict[str, Any]:
    """Tokens of every document's longest prompt, which leaves room for the answer."""
    lengths, cut = [], 0
    for sample in samples:
        found = []
        for prompt, *rest in sample["arguments"]:
            room = context
            if rest and isinstance(rest[0], dict):
                room -= int(rest[0].get("max_gen_toks", lm.max_gen_toks))
            elif rest:
                room -= len(lm.tok_encode(rest[0]))
            found.append((len(lm.tok_encode(prompt)), room))
        lengths.append(max(min(tokens, room) for tokens, room in found))
        cut += any(tokens > room for tokens, room in found)
    return {
        "prompt_tokens": {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)},
        "prompts_cut": cut,
    }


def _of_another_length(document: Any, metric: str) -> bool:
    """RULER names a metric after every length and marks those that are not the document's."""
    if not isinstance(document, dict) or "max_length" not in document:
        return False
    return metric.isdigit() and metric != str(document["max_length"])
