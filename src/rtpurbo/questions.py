"""What asks for something far back: hidden facts with questions, repeated spans, and the training documents made of them."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .config import SparseConfig, TrainConfig

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
    """A document with hidden facts, and one or several questions about them, each answered."""

    tokens: Tensor
    """[length] int64: document, questions and answers"""
    answers: tuple[tuple[int, int], ...]
    """Per value asked for, in the order of `tokens`, the span (start, stop) of its tokens; those of an example first."""
    depth: float
    """Where the (first) fact asked for lies, 0 start to 1 end."""
    kind: str
    examples: int = 0
    """Of `answers`, how many are an example's, before the document's own questions."""

    @property
    def prompt(self) -> Tensor:
        """Tokens before the first answer."""
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
SAME_WORDING = 0.5
"""Share of training's documents with several questions that ask all of them in the same words."""
EXAMPLES = 0.3
"""Share of training's documents with questions that begin with an example, answered."""


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
    return _asked(haystack, tokenizer, [(template, chain)], kind=kind, depth=depth, seed=seed)


def training_sample(
    document: Tensor, tokenizer: Any, *, kind: str, depth: float, seed: str, count: int = 1
) -> RetrievalSample:
    """As `retrieval_sample`, with up to `count` questions of a kind, as many as fit, in training's wordings, half of the
    time all in the same one: all facts are hidden in the document, then every question is asked and answered in turn, so
    that the earlier ones are examples to the later ones, which none must copy.

    Three in ten documents begin, where there is room, with a short text of its own with such a question, answered: whoever
    only looks for the question's words finds the wrong answer, far away.

    Raises:
        ValueError: not even one fits.
    """
    rng = random.Random(f"{seed}:training")
    wordings = [(rng.choice(TRAINING_TEMPLATES), rng.choice(TRAINING_CHAINS)) for _ in range(count)]
    if rng.random() < SAME_WORDING:
        wordings = wordings[:1] * count
    if rng.random() < EXAMPLES and len(document) >= 4 * SHORTEST_TOKENS:
        gap = torch.tensor(tokenizer("\n\n", add_special_tokens=False).input_ids, dtype=torch.long)
        of = partial(_asked, tokenizer=tokenizer, kind=kind, depth=depth)
        with suppress(ValueError):  # a tokenizer may take many tokens for these words
            first = of(document[: SHORTEST_TOKENS - len(gap)], wordings=wordings[:1], seed=f"{seed}:example")
            rest = of(document[SHORTEST_TOKENS:], wordings=wordings, seed=seed)
            later = tuple((SHORTEST_TOKENS + start, SHORTEST_TOKENS + stop) for start, stop in rest.answers)
            tokens, answers = torch.cat([first.tokens, gap, rest.tokens]), first.answers + later
            return replace(rest, tokens=tokens, answers=answers, examples=len(first.answers))
    return _asked(document, tokenizer, wordings, kind=kind, depth=depth, seed=seed)


def _asked(
    haystack: Tensor, tokenizer: Any, wordings: list[tuple[Template, ChainTemplate]], *, kind: str, depth: float, seed: str
) -> RetrievalSample:
    """A question in each of these wordings; where that does not fit, fewer of them, then one for fewer values."""
    fewer = [(number, _MOST_ASKED) for number in range(len(wordings), 0, -1)]
    fewer += [(1, most) for most in range(_MOST_ASKED - 1, 1, -1)] * (kind not in _ASKED)
    for number, most in fewer:
        rng = random.Random(seed)
        facts = [_facts(*wording, kind, _ASKED.get(kind) or rng.randint(2, most), rng) for wording in wordings[:number]]
        sample = _hidden(haystack, tokenizer, facts, kind=kind, depth=depth, rng=rng)
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


def span_answers(length: int, span_tokens: int) -> range:
    """Positions of a document that ends with a repeated span whose next token is known from the earlier one."""
    return range(length - span_tokens + KNOWN_TOKENS, length - 1)


TRAINING_KINDS = (
    "span", "span", "single", "single", "multi_key", "many_keys", "many_values", "many_values", "many_queries", "chain",
)  # fmt: skip
"""What asks for something from far away in training, as often as it is named."""
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


def mixed_document(document: Tensor, tokenizer: Any, *, retrieval_ratio: float, seed: str) -> tuple[Tensor, list[int], int]:
    """A training document: as it is, or (a share `retrieval_ratio`) one that needs something from far away at its end:
    hidden facts and a question, or a repeated span.

    Returns:
        tokens [length]; the positions whose next token is part of an answer; how many tokens a prompt would have that
        ends with the question (or with what is known of the span), 0 where nothing is asked.
    """
    rng = random.Random(f"{seed}:mixed")
    if rng.random() >= retrieval_ratio:
        return document, [], 0
    kind = rng.choice(TRAINING_KINDS)
    length = len(document)
    if kind == "span":
        tokens, _ = repeated_span(document, document, span_tokens=SPAN_TOKENS, latest=length // 2, rng=rng)
        answers = list(span_answers(length, SPAN_TOKENS))
        return tokens, answers, answers[0] + 1
    sample = training_sample(document, tokenizer, kind=kind, depth=rng.random(), seed=seed)
    return sample.tokens, sample.label_positions, sample.answers[sample.examples][0]
