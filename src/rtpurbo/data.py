"""Seeded documents: text from files, datasets or installed packages.

A *source* is one of
- a text, Markdown, JSON lines (`.jsonl`, `.jsonl.gz`, field `text`) or Parquet file, or a directory of text files;
- a dataset on the hub (`owner/name`, optionally `owner/name:config`), field `text`, split `train`;
- `installed-docs`: the docstrings of installed Python packages, English prose for the most part, joined by directory;
  `installed-python`: their source. A tenth of the packages is held out: `installed-docs:heldout`,
  `installed-python:heldout`. `package:NAME`: the source of one installed package.
"""

from __future__ import annotations

import importlib.util
import inspect
import random
import re
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .progress import track

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_SHORTEST_DOCSTRING = 200  # characters
_TEXTS_AT_ONCE = 32  # a tokenizer works on them in parallel
_MAX_PACKAGE_BYTES = 1 << 20  # of one directory's source; longer ones are cut into several texts


def read_source(source: str) -> list[str]:
    """All texts of a source, in a fixed order; ValueError when there is nothing to read."""
    if source.startswith("package:"):
        texts = _package_texts(source.removeprefix("package:"))
    elif source.removesuffix(":heldout") in ("installed-docs", "installed-python"):
        texts = list(_installed_texts(source, Path(sysconfig.get_paths()["purelib"])))
    else:
        texts = _file_or_dataset_texts(source)
    texts = [t for t in texts if isinstance(t, str) and t.strip()]
    if not texts:
        raise ValueError(f"Source {source!r} holds no text; expected a file, directory or dataset with a field 'text'.")
    return texts


def check_source(source: str) -> None:
    """ValueError for a source that does not exist, without reading it; hub names are taken on trust."""
    path = Path(source)
    if source.startswith("package:"):
        _package(source.removeprefix("package:"))
    elif source.removesuffix(":heldout") not in ("installed-docs", "installed-python") and not path.exists():
        _check_hub_name(source)


def _check_hub_name(source: str) -> None:
    if Path(source).exists() or source.startswith((".", "/")) or source.count("/") != 1:
        raise ValueError(
            f"Source {source!r} does not exist or has an unknown type; expected .txt, .md, .jsonl(.gz), .parquet, "
            "a directory, owner/dataset, installed-docs, installed-python or package:NAME."
        )


def _file_or_dataset_texts(source: str) -> list[str]:
    path = Path(source)
    if path.is_dir():
        return [_read(p) for p in sorted(path.rglob("*")) if p.suffix in _TEXT_SUFFIXES and p.is_file()]
    if path.is_file() and path.suffix in _TEXT_SUFFIXES:
        return [_read(path)]
    import datasets
    from pyarrow import ArrowInvalid

    name = path.name.removesuffix(".gz").removesuffix(".zst")
    try:
        if path.is_file() and name.endswith((".jsonl", ".json")):
            rows = datasets.load_dataset("json", data_files=str(path), split="train")
        elif path.is_file() and name.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
        else:
            _check_hub_name(source)
            repository, _, config = source.partition(":")
            rows = datasets.load_dataset(repository, config or None, split="train")
    except (OSError, RuntimeError, ArrowInvalid, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # datasets says "an error occurred" and has the reason below
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ValueError(f"Source {source!r} could not be read: {reason}") from error
    if "text" not in rows.column_names:
        raise ValueError(f"Source {source!r} has no field 'text'; its fields: {', '.join(rows.column_names)}.")
    return list(rows["text"])


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="ignore")


def _directory_texts(root: Path, *, docs: bool = False) -> Iterator[str]:
    """The .py files of every directory below `root` joined, or only their docstrings."""
    folders: dict[Path, list[Path]] = {}
    for file in sorted(p for p in root.rglob("*.py") if p.is_file()):
        folders.setdefault(file.parent, []).append(file)
    for folder in sorted(folders):
        text = ""
        for file in folders[folder]:
            content = _read(file)
            if docs:
                long = (inspect.cleandoc(d) for d in _DOCSTRING.findall(content) if len(d) > _SHORTEST_DOCSTRING)
                text += "".join(f"{d}\n\n" for d in long)
            else:
                text += f"# {file.relative_to(root.parent)}\n{content}\n"
            if len(text) > _MAX_PACKAGE_BYTES:
                yield text
                text = ""
        if text:
            yield text


def _package(name: str) -> ModuleSpec:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ValueError(f"Package {name!r} is not installed; install it or name another source.")
    return spec


def _package_texts(name: str) -> list[str]:
    spec = _package(name)
    if spec.submodule_search_locations is not None:
        return [text for folder in spec.submodule_search_locations for text in _directory_texts(Path(folder))]
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"Module {name!r} has no Python source; name another source.")
    return [_read(Path(spec.origin))]


@cache  # every stage and every length asks again, and reading takes seconds
def _installed_texts(source: str, site: Path) -> tuple[str, ...]:
    heldout, docs = source.endswith(":heldout"), source.startswith("installed-docs")
    names = sorted(p.name for p in site.iterdir() if (p / "__init__.py").is_file())
    chosen = [n for n in names if (zlib.crc32(n.encode()) % 10 == 0) == heldout]
    packages = track(chosen, total=len(chosen), what=f"Reading {source}")
    return tuple(text for name in packages for text in _directory_texts(site / name, docs=docs))


def documents(
    sources: list[str] | tuple[str, ...], tokenizer: Any, *, length_tokens: int, count: int, seed: int
) -> list[Tensor]:
    """`count` documents of exactly `length_tokens` tokens, [length] int64, in equal parts from every source.

    Long texts give random spans, short ones are joined. The same arguments always give the same documents.

    Raises:
        ValueError: no source, or too little text in one.
    """
    if not sources:
        raise ValueError("No source of text was named; expected at least one.")
    prefix = tokenizer("").input_ids
    shares = [count // len(sources) + (i < count % len(sources)) for i in range(len(sources))]
    parts = [
        _source_documents(source, tokenizer, prefix, length_tokens, share, seed)
        for source, share in zip(sources, shares, strict=True)
        if share
    ]
    mixed = [part[i] for i in range(max(shares)) for part in parts if i < len(part)]
    return mixed


def _encoded(texts: list[str], tokenizer: Any, *, span: int, at_once: int, rng: random.Random) -> Iterator[list[int]]:
    """Token ids of a random piece of every text, `span` characters (enough for prose and code), several at a time."""
    for first in range(0, len(texts), at_once):
        pieces = []
        for text in texts[first : first + at_once]:
            start = rng.randrange(max(1, len(text) - span + 1))
            pieces.append(text[start : start + span])
        yield from tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids


def _source_documents(source: str, tokenizer: Any, prefix: list[int], length: int, count: int, seed: int) -> list[Tensor]:
    rng = random.Random(f"{seed}:{source}")
    texts = read_source(source)
    body = length - len(prefix)

    def pieces() -> Iterator[Tensor]:
        joined: list[int] = []
        more = True
        while more:  # a long text gives another span in every pass
            more = False
            rng.shuffle(texts)
            for ids in _encoded(texts, tokenizer, span=body * 6, at_once=min(count, _TEXTS_AT_ONCE), rng=rng):
                if len(ids) < body:
                    joined += ids
                    if len(joined) < body:
                        continue
                    ids, joined = joined, []
                more = True
                yield torch.tensor(prefix + ids[:body])

    found = list(track(islice(pieces(), count), total=count, what=f"Tokenising {source}"))
    if len(found) < count:
        raise ValueError(
            f"Source {source!r} holds too little text: expected {count} documents of {length} tokens, got {len(found)}. "
            "Add sources or ask for shorter or fewer documents."
        )
    return found
