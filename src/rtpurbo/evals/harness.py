"""Tasks of lm-evaluation-harness, dense and sparse on the same samples."""

from __future__ import annotations

import difflib
import importlib.metadata
import random
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ..config import EvalConfig
from .fidelity import Switch
from .statistics import paired


def run_tasks(switch: Switch, tokenizer: Any, config: EvalConfig, context: int) -> dict[str, Any]:
    """Run `config.tasks` with both models.

    Tasks that make their own documents (RULER) make them at `config.lengths_tokens`, `config.task_limit` of each length.

    Args:
        switch: `with switch("dense") as model` (or "sparse") gives the model that runs so.
        context: longest sequence in tokens; longer prompts lose their beginning.

    Returns:
        "lm_eval": its version; "results": a list with, per task and metric, "task", "task_version", "metric", the paired
        result, "higher_is_better", "prompt_tokens" (lengths of the prompts as the models see them: "min", "mean", "max")
        and "prompts_cut" (how many lost their beginning).

    Raises:
        ValueError: lm_eval or a package that a task needs is missing, an unknown task, or data that cannot be fetched.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(f"Tasks need the package lm_eval ({error}); run `pip install rtpurbo[eval]`.") from error

    tasks = _load(tokenizer, config)
    chosen = {name: _sample_numbers(task, config.task_limit) for name, task in tasks.items()}
    found: dict[str, Any] = {}
    for name in ("dense", "sparse"):
        with switch(name) as model:
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=context)
            found[name] = lm_eval.simple_evaluate(
                lm,
                tasks=list(tasks.values()),
                samples=chosen,
                log_samples=True,
                bootstrap_iters=0,
                task_manager=_no_tasks(),
                random_seed=config.seed,
                fewshot_random_seed=config.seed,
            )
    results = []
    for name in tasks:
        dense, sparse = (found[which]["samples"][name] for which in ("dense", "sparse"))
        better, version = found["dense"]["higher_is_better"][name], found["dense"]["versions"][name]
        for metric, pairs in _metrics(dense, sparse).items():
            results.append(
                {
                    "task": name,
                    "task_version": version,
                    "metric": metric,
                    **paired([a for _, a, _ in pairs], [b for _, _, b in pairs], seed=config.seed),
                    "higher_is_better": bool(better.get(metric.split(",")[0], True)),
                    **_prompt_lengths(lm, [sample for sample, _, _ in pairs], context),
                }
            )
    return {"lm_eval": importlib.metadata.version("lm_eval"), "results": results}


def _no_tasks() -> Any:
    """A task manager for tasks that are loaded already; finding lm_eval's own thousands takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def _load(tokenizer: Any, config: EvalConfig) -> dict[str, Any]:
    """Leaf tasks by name, with their documents."""
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    paths = [Path(name) for name in config.tasks if name.endswith((".yaml", ".yml"))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"Task file {str(path)!r} does not exist.")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)  # RULER loads a tokenizer by name; this one may have come from elsewhere
        metadata = {"max_seq_lengths": list(config.lengths_tokens), "tokenizer": folder}
        manager = TaskManager(include_defaults=len(paths) < len(config.tasks), metadata=metadata)
        for name in config.tasks:
            if Path(name) not in paths and name not in manager.task_index:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3) or ["none"]
                raise ValueError(f"Unknown task {name!r}; near matches: {', '.join(near)}.")
        before = random.getstate()
        random.seed(config.seed)
        try:
            with redirect_stdout(sys.stderr):  # some tasks report downloads there
                return manager.load(list(config.tasks))["tasks"]
        except ImportError as error:
            raise ValueError(f"A task needs a package that is missing: {error}. Run `pip install rtpurbo[eval]`.") from error
        except (OSError, DatasetsError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"The data of {', '.join(config.tasks)} could not be read: {reason}") from error
        finally:
            random.setstate(before)


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


def _metrics(dense: list[dict[str, Any]], sparse: list[dict[str, Any]]) -> dict[str, list[tuple[Any, float, float]]]:
    """(sample, dense, sparse) of every metric that has a number per sample."""
    found: dict[str, list[tuple[Any, float, float]]] = {}
    for a, b in zip(dense, sparse, strict=True):
        assert (a["doc_id"], a["filter"], a["prompt_hash"]) == (b["doc_id"], b["filter"], b["prompt_hash"])
        for metric in a["metrics"]:
            if isinstance(a[metric], (int, float)) and not _of_another_length(a["doc"], metric):
                key = metric if a["filter"] == "none" else f"{metric},{a['filter']}"
                found.setdefault(key, []).append((a, float(a[metric]), float(b[metric])))
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
