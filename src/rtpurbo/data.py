"""Seeded documents: text from files, datasets or installed packages, and synthetic retrieval questions.

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
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.machinery import ModuleSpec
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .progress import track

if TYPE_CHECKING:
    from .config import SparseConfig, TrainConfig

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


# Synthetic retrieval questions

_ADJECTIVES = (
    "amber ancient bitter brave bright broken calm clever cold copper crimson curious distant dusty eager early faint "
    "famous fierce gentle golden grand hidden hollow humble icy ivory jolly keen lively lonely lucky mellow misty noble "
    "narrow odd pale patient polished proud quiet rapid rusty scarlet secret silent silver simple slender steady stormy "
    "sturdy sudden sunny tall tidy velvet wild wooden young"
).split()
_NOUNS = (
    "anchor apple arrow badge banner barrel basket beacon bell bottle bridge bucket button cabin candle canyon castle "
    "cellar chapel circle clock cloud compass cottage crown curtain desert dragon eagle engine falcon feather ferry field "
    "forest fountain garden gate glacier hammer harbor island jacket kettle kitchen ladder lantern lemon library meadow "
    "mirror mountain needle ocean orchard palace pencil pillow planet pocket rabbit ribbon river saddle shadow ship "
    "station statue summer temple ticket tower tunnel valley village violin wagon window winter"
).split()


@dataclass(frozen=True)
class Template:
    """Wording of a retrieval question."""

    needle: str
    one: str
    several: str
    joiner: str = ", "
    value: str = "number"
    """What is hidden: a "number" (7 digits), a "short" one (4 digits), a "code" (letters and digits) or "words" (two)."""


@dataclass(frozen=True)
class ChainTemplate:
    """Wording of a chain: one name is given a value, each further one the value of the name before."""

    needle: str
    link: str
    question: str
    joiner: str = ", "
    name: str = "words"
    value: str = "short"
    """What names and values are, as in `Template`."""


EVALUATION_TEMPLATE = Template(
    needle="One of the special magic numbers for {key} is: {value}.",
    one="What is the special magic number for {key} mentioned in the text above?\nThe special magic number for {key} is:",
    several="What are all the special magic numbers for {key} mentioned in the text above?\n"
    "The special magic numbers for {key} are, in this order:",
)
EVALUATION_CHAIN = ChainTemplate(
    needle="Team {name} wears shirt number {value}.",
    link="Team {name} wears the same shirt number as team {other}.",
    question="Which teams wear shirt number {value}? The teams that wear shirt number {value} are, in this order:",
)
TRAINING_TEMPLATES = (
    Template(
        needle="The access code of the {key} is {value}.",
        one="Question: What is the access code of the {key}?\nAnswer: The access code of the {key} is",
        several="Question: What are the access codes of the {key}?\nAnswer: The access codes of the {key} are, in order,",
    ),
    Template(
        needle="Note: room {value} was booked for {key}.",
        one="Which room was booked for {key}? For {key} they booked room",
        several="Which rooms were booked for {key}? For {key} they booked these rooms:",
        value="short",
    ),
    Template(
        needle="In the register, {key} has entry number {value}.",
        one="According to the register, the entry number of {key} is",
        several="According to the register, the entry numbers of {key} are",
    ),
    Template(
        needle="Remember this: the password that belongs to {key} is {value}.",
        one="Tell me the password that belongs to {key}. Sure! The password that belongs to {key} is",
        several="Tell me the passwords that belong to {key}. Sure! The passwords that belong to {key} are",
        value="code",
    ),
    Template(
        needle="[{key}] = {value}",
        one="What was assigned to {key} above?\n[{key}] =",
        several="What was assigned to {key} above? In order of appearance:",
        value="code",
    ),
    Template(
        needle="The agent known as {key} always travels under the name {value}.",
        one="Under which name does the agent known as {key} travel? The agent known as {key} travels under the name",
        several="Under which names do the agents known as {key} travel? They travel under the names",
        value="words",
    ),
    Template(
        needle="A parcel for {key} was stored on shelf {value} last night.",
        one="Where is the parcel for {key}? It was stored on shelf",
        several="Where are the parcels for {key}? They were stored on the shelves",
    ),
    Template(
        needle="Telephone of {key}: {value}",
        one="I need the telephone number of {key}, which is written somewhere above. Telephone of {key}:",
        several="I need the telephone numbers of {key}, which are written somewhere above. They are",
    ),
    Template(
        needle="It is said that {key} turns into {value} at midnight.",
        one="The text says what {key} turns into at midnight. It turns into",
        several="The text says what {key} turn into at midnight. In order:",
        value="words",
    ),
)
TRAINING_CHAINS = (
    ChainTemplate(
        needle="{name} = {value}",
        link="{name} = {other}",
        question="Which names were set to {value} above, at once or through another name?\nAnswer:",
        name="code",
    ),
    ChainTemplate(
        needle="The {name} holds exactly {value} coins.",
        link="The {name} holds exactly as many coins as the {other}.",
        question="List all that hold exactly {value} coins, in order of appearance. They are the",
        value="number",
    ),
    ChainTemplate(
        needle="Let {name} be {value}.",
        link="Let {name} be what {other} is.",
        question="All names above that come to be {value}, each once:",
        name="code",
        value="number",
    ),
    ChainTemplate(
        needle="{name} was sent to room {value}.",
        link="{name} was sent to where {other} is.",
        question="Who was sent to room {value}? All who are in room {value}:",
    ),
)


@dataclass(frozen=True)
class RetrievalSample:
    """A document with hidden facts, a question about them, and its answer."""

    tokens: Tensor
    """[length] int64: document, question and answer"""
    answers: tuple[tuple[int, int], ...]
    """Per value asked for, the span (start, stop) of its tokens in `tokens`."""
    depth: float
    """Where the (first) fact asked for lies, 0 start to 1 end."""
    kind: str

    @property
    def prompt(self) -> Tensor:
        """Tokens before the answer."""
        return self.tokens[: self.answers[0][0]]

    @property
    def label_positions(self) -> list[int]:
        """Positions whose next token is part of an answer."""
        return [t - 1 for start, stop in self.answers for t in range(start, stop)]


QUESTION_KINDS = (
    "single", "multi_key", "multi_value", "multi_query", "many_keys", "many_values", "many_queries", "chain",
)  # fmt: skip
"""See `retrieval_sample`."""
_ASKED = {"single": 1, "multi_key": 1, "many_keys": 1, "multi_value": 2, "multi_query": 2}
"""Values that a question asks for; of other kinds two to `_MOST_ASKED`."""
_MOST_ASKED = 5
_MOST_FACTS = 400


def retrieval_sample(
    haystack: Tensor,
    tokenizer: Any,
    *,
    kind: str,
    depth: float,
    seed: str,
    template: Template = EVALUATION_TEMPLATE,
    chain: ChainTemplate = EVALUATION_CHAIN,
) -> RetrievalSample:
    """Hide facts in a document; the result has exactly the haystack's length.

    Args:
        haystack: [length] int64, ordinary text; its end makes room for facts, question and answer.
        kind: "single" (one fact), "multi_key" (four keys, one asked for), "multi_value" (one key, two values, both
            asked for), "multi_query" (four keys, two asked for), "many_keys" (facts in up to half of the text, one asked
            for), "many_values" and "many_queries" (two to five asked for, as many as fit), "chain" (a value, passed on
            through two to five names, which are asked for, beside a second chain).
        depth: where the first fact asked for goes, in [0, 1].
        template, chain: wording of facts and questions; of chains.
    """
    most = _ASKED.get(kind) or random.Random(f"{seed}:asked").randint(2, _MOST_ASKED)
    for count in range(most, _ASKED.get(kind, 2) - 1, -1):
        rng = random.Random(seed)
        facts = _facts(template, chain, kind, count, rng)
        sample = _hidden(haystack, tokenizer, [facts], kind=kind, depth=depth, rng=rng)
        if sample is not None:
            return sample
    raise ValueError(f"A document of {len(haystack)} tokens is too short for a {kind!r} question; use 256 or more.")


def several_questions(
    haystack: Tensor, tokenizer: Any, *, kind: str, count: int, depth: float, seed: str
) -> RetrievalSample:
    """As `retrieval_sample`, with up to `count` questions of a kind, as many as fit, each in one of training's wordings:
    all facts are hidden in the document, then every question is asked and answered in turn, so that the earlier ones are
    examples to the later ones, which none must copy.

    Raises:
        ValueError: not even one fits.
    """
    for most in range(count, 0, -1):
        rng = random.Random(seed)
        asked = [
            _facts(
                rng.choice(TRAINING_TEMPLATES), rng.choice(TRAINING_CHAINS), kind,
                _ASKED.get(kind) or rng.randint(2, _MOST_ASKED), rng,
            )
            for _ in range(most)
        ]  # fmt: skip
        sample = _hidden(haystack, tokenizer, asked, kind=kind, depth=depth, rng=rng)
        if sample is not None:
            return sample
    raise ValueError(f"A document of {len(haystack)} tokens is too short for a {kind!r} question; use 256 or more.")


@dataclass(frozen=True)
class _Facts:
    """Sentences to hide, the first of which the question asks for, and what it asks."""

    sentences: list[str]
    answers: list[str]
    question: str
    joiner: str
    ordered: bool = False
    """The sentences come in this order."""
    filler: tuple[str, ...] = ()
    """More sentences, as many as fit into half of the text."""


def _facts(template: Template, chain: ChainTemplate, kind: str, count: int, rng: random.Random) -> _Facts:
    if kind == "chain":
        return _chains(chain, count, rng)
    one_key = kind in ("multi_value", "many_values")
    number = {"many_keys": _MOST_FACTS, "many_queries": count + 2}.get(kind, max(4, count))
    keys = rng.sample([f"{a} {n}" for a in _ADJECTIVES for n in _NOUNS], number)
    values = [_value(template.value, rng) for _ in keys]
    if one_key:
        keys = [keys[0]] * count
    facts = [template.needle.format(key=k, value=v) for k, v in zip(keys, values, strict=False)]
    shown = {"single": 1, "multi_key": 4, "many_keys": 2}.get(kind, count if one_key else count + 2)
    if count == 1 or one_key:
        question = (template.several if one_key else template.one).format(key=keys[0])
    else:
        question = template.several.format(key=f"{', '.join(keys[: count - 1])} and {keys[count - 1]}")
    filler = tuple(facts[2:]) if kind == "many_keys" else ()
    return _Facts(facts[:shown], values[:count], question, template.joiner, ordered=one_key, filler=filler)


def _chains(chain: ChainTemplate, count: int, rng: random.Random) -> _Facts:
    names: list[str] = []
    while len(names) < 2 * count:
        name = _value(chain.name, rng)
        names += [] if name in names else [name]
    sentences: list[str] = []
    values = [_value(chain.value, rng) for _ in range(2)]
    for value, line in zip(values, (names[:count], names[count:]), strict=True):
        sentences.append(chain.needle.format(name=line[0], value=value))
        sentences += [chain.link.format(name=name, other=other) for other, name in pairwise(line)]
    question = chain.question.format(value=values[0])
    sentences = [s for pair in zip(sentences[:count], sentences[count:], strict=True) for s in pair]
    return _Facts(sentences, names[:count], question, chain.joiner, ordered=True)


def _hidden(
    haystack: Tensor, tokenizer: Any, asked: list[_Facts], *, kind: str, depth: float, rng: random.Random
) -> RetrievalSample | None:
    """The document with the facts of all questions, which follow with their answers; None where they do not fit."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    end: list[int] = []
    spans: list[tuple[int, int]] = []
    for facts in asked:
        end += encode("\n\n" + facts.question)
        for i, value in enumerate(facts.answers):
            end += encode(facts.joiner.rstrip()) if i else []
            ids = encode(" " + value)
            spans.append((len(end), len(end) + len(ids)))
            end += ids
    hidden = [[encode(f"\n{sentence}\n") for sentence in facts.sentences] for facts in asked]
    room = len(haystack) - len(end) - sum(len(ids) for needles in hidden for ids in needles)
    if room < 16:
        return None
    spare = (room - room // 2) // len(asked)
    for facts, needles in zip(asked, hidden, strict=True):
        used = 0
        for sentence in facts.filler:
            ids = encode(f"\n{sentence}\n")
            if used + len(ids) > spare:
                break
            needles.append(ids)
            used += len(ids)
        room -= used
    placed: list[tuple[int, list[int]]] = []
    for facts, needles in zip(asked, hidden, strict=True):
        depths = [rng.random() if placed else depth] + [rng.random() for _ in needles[1:]]
        depths = sorted(depths) if facts.ordered else depths
        depth = depth if placed else depths[0]
        placed += [(max(1, round(d * room)), ids) for d, ids in zip(depths, needles, strict=True)]
    text: list[int] = []
    begin = 0
    for place, needle in sorted(placed, key=lambda p: p[0]):
        text += haystack[begin:place].tolist() + needle
        begin = place
    text += haystack[begin:room].tolist()
    start = len(text)
    return RetrievalSample(
        tokens=torch.tensor(text + end),
        answers=tuple((start + a, start + b) for a, b in spans),
        depth=depth,
        kind=kind,
    )


def _value(kind: str, rng: random.Random) -> str:
    if kind == "words":
        return f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
    if kind == "code":
        return "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ23456789", k=6))
    return str(rng.randrange(10**3, 10**4) if kind == "short" else rng.randrange(10**6, 10**7))


def repeated_span(
    document: Tensor, other: Tensor, *, span_tokens: int, latest: int, rng: random.Random
) -> tuple[Tensor, int]:
    """Put the same random span near the start and at the end of a document: (tokens [length], start of the early one).

    Args:
        other: a document whose shuffled tokens make the span; latest: last position where the early span may start.
    """
    if len(document) < 2 * span_tokens + 8:
        raise ValueError(f"A document of {len(document)} tokens is too short to repeat {span_tokens} of them.")
    latest = min(latest, len(document) - 2 * span_tokens)
    start = rng.randrange(len(other) - span_tokens)
    span = other[start : start + span_tokens][torch.tensor(rng.sample(range(span_tokens), span_tokens))]
    early = rng.randrange(4, max(5, latest))
    tokens = document.clone()
    tokens[early : early + span_tokens] = tokens[len(tokens) - span_tokens :] = span
    return tokens, early


TRAINING_KINDS = (
    "span", "span", "single", "single", "multi_key", "many_keys", "many_values", "many_values", "many_queries", "chain",
)  # fmt: skip
"""What asks for something from far away in training, as often as it is named."""
EXAMPLES = 0.3
"""Share of the questions in training before which one of the same wording is answered."""
SPAN_TOKENS = 48
KNOWN_TOKENS = 4
"""First tokens of a repeated span, which do not yet say what follows."""


def check_room(length: int, tokenizer: Any) -> None:
    """ValueError when documents of `length` tokens are too short for `mixed_document`."""
    document = torch.zeros(length, dtype=torch.long)
    for i, template in enumerate(TRAINING_TEMPLATES * 4):
        chain = TRAINING_CHAINS[i % len(TRAINING_CHAINS)]
        for kind in ("multi_query", "chain"):
            retrieval_sample(document, tokenizer, kind=kind, depth=0.5, seed=str(i), template=template, chain=chain)


SHORTEST_TOKENS = 512
"""No training document is cut below this, nor below two windows."""


def shortest_document(config: TrainConfig, sparse: SparseConfig, length: int, tokenizer: Any) -> int:
    """Tokens below which a stage cuts no document; ValueError when they leave no room for its questions."""
    shortest = config.shortest_tokens or max(SHORTEST_TOKENS, 2 * (sparse.window_tokens + sparse.sink_tokens))
    if config.retrieval_ratio:
        check_room(min(length, shortest, shortest_piece(shortest)), tokenizer)
    return shortest


def shortest_piece(shortest_tokens: int) -> int:
    """Tokens of the shortest piece with a question of its own: half of a window, so that near questions stay as they
    were."""
    return max(SHORTEST_TOKENS, shortest_tokens // 4)


def pieces(document: Tensor, *, shortest_tokens: int, rng: random.Random) -> tuple[Tensor, ...]:
    """The document whole, or cut into 2, 4 or 8 pieces of at least `shortest_tokens`, each with room for a question."""
    return document.tensor_split(rng.choice([n for n in (1, 2, 4, 8) if n == 1 or len(document) >= n * shortest_tokens]))


def shorter(document: Tensor, *, shortest_tokens: int, rng: random.Random) -> Tensor:
    """Half of all documents as they are, the others cut to a half or a quarter, so that short contexts count too."""
    return document[: max(len(document) // rng.choice((1, 1, 2, 4)), shortest_tokens)]


def mixed_document(document: Tensor, tokenizer: Any, *, retrieval_ratio: float, seed: str) -> tuple[Tensor, list[int]]:
    """A training document: as it is, or (a share `retrieval_ratio`) one that needs something from far away at its end:
    hidden facts and a question, or a repeated span.

    Returns:
        tokens [length], and the positions whose next token is part of the answer.
    """
    rng = random.Random(f"{seed}:mixed")
    if rng.random() >= retrieval_ratio:
        return document, []
    kind = rng.choice(TRAINING_KINDS)
    length = len(document)
    if kind == "span":
        tokens, _ = repeated_span(document, document, span_tokens=SPAN_TOKENS, latest=length // 2, rng=rng)
        return tokens, list(range(length - SPAN_TOKENS + KNOWN_TOKENS, length - 1))
    return question_document(
        document,
        tokenizer,
        kind=kind,
        depth=rng.random(),
        seed=seed,
        template=rng.choice(TRAINING_TEMPLATES),
        chain=rng.choice(TRAINING_CHAINS),
        example=rng.random() < EXAMPLES,
    )


def question_document(
    document: Tensor,
    tokenizer: Any,
    *,
    kind: str,
    depth: float,
    seed: str,
    template: Template,
    chain: ChainTemplate,
    example: bool,
) -> tuple[Tensor, list[int]]:
    """A document that ends with a question, and, where an `example` is asked for and fits, begins with one of the same
    wording, answered: whoever only looks for the question's words finds the wrong answer.

    Returns:
        tokens [length], and the positions whose next token is part of an answer, those of the example first.
    """
    ask = partial(retrieval_sample, tokenizer=tokenizer, kind=kind, template=template, chain=chain)
    gap = torch.tensor(tokenizer("\n\n", add_special_tokens=False).input_ids, dtype=torch.long)
    if example and len(document) >= 4 * SHORTEST_TOKENS:
        with suppress(ValueError):  # it does not fit, where a tokenizer takes many tokens for these words
            first = ask(document[: SHORTEST_TOKENS - len(gap)], depth=depth, seed=f"{seed}:example")
            sample = ask(document[SHORTEST_TOKENS:], depth=depth, seed=seed)
            tokens = torch.cat([first.tokens, gap, sample.tokens])
            return tokens, first.label_positions + [SHORTEST_TOKENS + t for t in sample.label_positions]
    sample = ask(document, depth=depth, seed=seed)
    return sample.tokens, sample.label_positions
