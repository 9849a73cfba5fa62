"""Synthetic questions: their facts can be found, their answers are true, and training documents hold what they should."""

from __future__ import annotations

import random
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rtpurbo import questions
from rtpurbo.questions import (
    EVALUATION_CHAIN,
    EVALUATION_TEMPLATE,
    KNOWN_TOKENS,
    SPAN_TOKENS,
    TRAINING_CHAINS,
    TRAINING_TEMPLATES,
    check_room,
    mixed_document,
    pieces,
    repeated_span,
    retrieval_sample,
    training_sample,
)
from tiny_text import prose, text_source

KINDS = ("single", "multi_key", "multi_value", "multi_query")
MANY = ("many_keys", "many_values", "many_queries")


@pytest.fixture
def source(tmp_path):
    with text_source(tmp_path) as name:
        yield name


def facts_of(text: str) -> list[tuple[str, str]]:
    return re.findall(r"The access code of the (\w+ \w+) is ((?:\d+ ?)+) \.", text)


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_questions_can_be_answered_from_the_text(tokenizer, kind, depth):
    """Read the decoded sample like a person: find the facts, the question, and check the answer against the facts."""
    haystack = torch.tensor(tokenizer(prose(300)).input_ids)[:300]
    for seed in range(6):
        sample = retrieval_sample(
            haystack, tokenizer, kind=kind, depth=depth, seed=str(seed), template=TRAINING_TEMPLATES[0]
        )
        assert sample.tokens.shape == haystack.shape
        assert sample.kind == kind
        text = tokenizer.decode(sample.tokens)
        body, _, ending = text.partition("Question :")
        facts = facts_of(body)
        assert len(facts) == {"single": 1, "multi_key": 4, "multi_value": 2, "multi_query": 4}[kind]
        (asked,) = re.findall(r"What (?:is|are) the access codes? of the ([\w ]+) \?", ending)
        wanted = asked.split(" and ")
        values = [value for key in wanted for k, value in facts if k == key]
        answers = [tokenizer.decode(sample.tokens[a:b]) for a, b in sample.answers]
        assert answers == values
        assert len(set(values)) == len(values) == (2 if kind in ("multi_value", "multi_query") else 1)
        assert sample.answers[-1][1] == 300
        assert tokenizer.decode(sample.tokens[sample.answers[0][0] :]) == " , ".join(values)
        assert torch.equal(sample.prompt, sample.tokens[: sample.answers[0][0]])
        assert sample.label_positions == [t - 1 for a, b in sample.answers for t in range(a, b)]
        # the haystack itself is whole and in order around the facts
        rest = re.sub(r"The access code of the \w+ \w+ is (?:\d+ ?)+ \.", "", body).split()
        assert rest == tokenizer.decode(haystack).split()[: len(rest)]
        assert len(rest) > 150


@pytest.mark.parametrize("kind", MANY)
def test_questions_among_and_for_many_facts(tokenizer, kind):
    haystack = torch.tensor(tokenizer(prose(900)).input_ids)[:900]
    asked_for = set()
    for seed in range(24):
        sample = retrieval_sample(haystack, tokenizer, kind=kind, depth=0.4, seed=str(seed), template=TRAINING_TEMPLATES[0])
        text = tokenizer.decode(sample.tokens)
        body, _, ending = text.partition("Question :")
        facts = facts_of(body)
        (asked,) = re.findall(r"What (?:is|are) the access codes? of the ([\w ,]+) \?", ending)
        wanted = re.split(" , | and ", asked)
        assert [tokenizer.decode(sample.tokens[a:b]) for a, b in sample.answers] == [
            value for key in wanted for k, value in facts if k == key
        ]
        asked_for.add(len(sample.answers))
        if kind == "many_keys":
            assert len(facts) > 15
            assert len({key for key, _ in facts}) == len(facts)
        elif kind == "many_values":
            assert {key for key, _ in facts} == {asked}
        else:
            assert len(facts) == len(wanted) + 2
    assert asked_for == ({1} if kind == "many_keys" else {2, 3, 4, 5})


@pytest.mark.parametrize("chain", [EVALUATION_CHAIN, *TRAINING_CHAINS])
def test_chains_can_be_followed(byte_tokenizer, chain):
    """Follow the sentences of the text from the value that is asked for, and find the names in order."""
    haystack = torch.tensor(byte_tokenizer(prose(900)).input_ids)[:4000]
    patterns = [
        re.escape(sentence).replace(r"\{name\}", "(?P<name>[A-Za-z0-9 ]+)").replace(r"\{value\}", r"(?P<of>\d+)")
        .replace(r"\{other\}", "(?P<of>[A-Za-z0-9 ]+?)") + "$"
        for sentence in (chain.needle, chain.link)
    ]  # fmt: skip
    lengths = set()
    for seed in range(8):
        sample = retrieval_sample(haystack, byte_tokenizer, kind="chain", depth=0.3, seed=str(seed), chain=chain)
        lines = byte_tokenizer.decode(sample.tokens).split("\n")
        matches = ([m for pattern in reversed(patterns) if (m := re.match(pattern, line))] for line in lines)
        found = [some[0] for some in matches if some]
        value = re.search(r"\d{4,7}", byte_tokenizer.decode(sample.prompt).split("\n\n")[-1]).group()
        names, steps = [], [(m["name"], m["of"]) for m in found]
        for name, of in steps:
            if of == value or of in names:
                names.append(name)
        answers = [byte_tokenizer.decode(sample.tokens[a:b]).strip() for a, b in sample.answers]
        assert answers == names
        assert len(steps) == 2 * len(answers)
        lengths.add(len(answers))
    assert len(lengths) > 1


@pytest.mark.parametrize("kind", ["single", "many_values", "chain"])
def test_an_answered_example_comes_first(byte_tokenizer, kind, monkeypatch):
    """Same wording, other facts: the example's answer is in its own part only, and both parts can be answered."""
    haystack = torch.tensor(byte_tokenizer(prose(1500)).input_ids)[:6000]
    monkeypatch.setattr(questions, "TRAINING_TEMPLATES", TRAINING_TEMPLATES[:1])
    monkeypatch.setattr(questions, "TRAINING_CHAINS", TRAINING_CHAINS[1:2])
    wording = {"template": TRAINING_TEMPLATES[0], "chain": TRAINING_CHAINS[1]}

    def ask(length: int, example: bool):
        monkeypatch.setattr(questions, "EXAMPLES", float(example))
        sample = training_sample(haystack[:length], byte_tokenizer, kind=kind, depth=0.5, seed="s")
        return sample.tokens, sample.label_positions

    tokens, positions = ask(6000, True)
    assert len(tokens) == 6000
    assert positions == sorted(set(positions))
    alone = retrieval_sample(haystack[512:], byte_tokenizer, kind=kind, depth=0.5, seed="s", **wording)
    assert torch.equal(tokens[512:], alone.tokens)
    later = [t for t in positions if t >= 512]
    assert later == [512 + t for t in alone.label_positions]
    earlier = [t for t in positions if t < 512]
    assert max(earlier) == 512 - 2 - 2  # then the line ends twice
    example = byte_tokenizer.decode(tokens[[t + 1 for t in earlier]])
    text = byte_tokenizer.decode(tokens)
    question = text[512 - 200 : 510].split("\n\n")[-1][:20]
    assert text.count(question) == 2
    assert byte_tokenizer.decode(tokens[[t + 1 for t in later]]) != example
    without = [ask(6000, False), ask(2047, True)]  # not asked for; a short document
    monkeypatch.setattr(questions, "SHORTEST_TOKENS", 100)
    without.append(ask(6000, True))  # 98 tokens hold no question
    for plain_tokens, answers in without:
        plain = retrieval_sample(haystack[: len(plain_tokens)], byte_tokenizer, kind=kind, depth=0.5, seed="s", **wording)
        assert torch.equal(plain_tokens, plain.tokens)
        assert answers == plain.label_positions


def test_some_training_questions_have_an_example(byte_tokenizer):
    haystack = torch.tensor(byte_tokenizer(prose(900)).input_ids)[:3000]
    found = []
    for seed in range(200):
        tokens, answers, prompt = mixed_document(haystack, byte_tokenizer, retrieval_ratio=1.0, seed=str(seed))
        assert len(tokens) == 3000
        found.append(answers[0] < 512)
        own = [t for t in answers if t >= 512]
        assert prompt == own[0] + 1 > 2800  # the document's question, not the example's
    assert 0.1 < sum(found) / 200 < 0.5


def test_where_little_fits_less_is_asked_for(tokenizer):
    haystack = torch.tensor(tokenizer(prose(300)).input_ids)
    for kind in ("many_values", "many_queries", "chain"):
        counts = [
            [
                len(retrieval_sample(haystack[:length], tokenizer, kind=kind, depth=0.5, seed=str(seed)).answers)
                for seed in range(12)
            ]
            for length in (110, 300)
        ]
        assert all(few <= many for few, many in zip(*counts, strict=True))
        assert sum(counts[0]) < sum(counts[1])


@pytest.mark.parametrize("kind", ["single", "multi_key", "multi_query"])
def test_the_fact_asked_for_lies_where_it_should(tokenizer, kind):
    haystack = torch.tensor(tokenizer(prose(400)).input_ids)[:400]
    for depth in (0.05, 0.5, 0.95):
        sample = retrieval_sample(haystack, tokenizer, kind=kind, depth=depth, seed="a", template=TRAINING_TEMPLATES[0])
        assert sample.depth == depth
        start, stop = sample.answers[0]
        value = sample.tokens[start:stop].tolist()
        place = next(i for i in range(400) if sample.tokens[i : i + len(value)].tolist() == value)
        assert place / start == pytest.approx(depth, abs=0.13)


@pytest.mark.parametrize("template", [EVALUATION_TEMPLATE, *TRAINING_TEMPLATES])
@pytest.mark.parametrize("kind", KINDS)
def test_every_template(tokenizer, kind, template):
    haystack = torch.tensor(tokenizer(prose(300)).input_ids)[:300]
    sample = retrieval_sample(haystack, tokenizer, kind=kind, depth=0.5, seed="x", template=template)
    assert len(sample.tokens) == 300
    for start, stop in sample.answers:
        value = sample.tokens[start:stop].tolist()
        copies = [i for i in range(start) if sample.tokens[i : i + len(value)].tolist() == value]
        assert len(copies) == 1  # the value is in the text once


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_another_tokenizer(byte_tokenizer):
    haystack = torch.tensor(byte_tokenizer(prose(400)).input_ids)[:900]
    for kind in KINDS:
        sample = retrieval_sample(haystack, byte_tokenizer, kind=kind, depth=0.3, seed="b")
        text = byte_tokenizer.decode(sample.tokens)
        assert len(sample.tokens) == 900
        for start, stop in sample.answers:
            answer = byte_tokenizer.decode(sample.tokens[start:stop])
            assert re.fullmatch(r" \d{7}", answer)
            assert text.count(f"is:{answer}.") == 1


@pytest.mark.parametrize("kind", ["single", "many_keys", "many_values", "many_queries", "chain"])
def test_several_questions(byte_tokenizer, kind, monkeypatch):
    """All facts come before all questions, whose answers are among the facts; as many questions as fit."""
    monkeypatch.setattr(questions, "TRAINING_TEMPLATES", [EVALUATION_TEMPLATE])
    monkeypatch.setattr(questions, "TRAINING_CHAINS", [EVALUATION_CHAIN])
    monkeypatch.setattr(questions, "EXAMPLES", 0.0)
    fact, question = "One of the special magic numbers", "\n\nWhat"
    if kind == "chain":
        fact, question = " wears shirt number", "\n\nWhich teams"
    haystack = torch.tensor(byte_tokenizer(prose(2000)).input_ids)[:9000]

    def ask(length: int, count: int):
        return training_sample(haystack[:length], byte_tokenizer, kind=kind, count=count, depth=0.5, seed="s")

    sample = ask(9000, 4)
    text = byte_tokenizer.decode(sample.tokens)
    assert (len(sample.tokens), sample.kind, sample.answers[-1][1]) == (9000, kind, 9000)
    assert text.count(question) == 4
    facts = text[: text.index(question)]
    assert facts.count(fact) == text.count(fact)
    assert list(sample.answers) == sorted(sample.answers)
    places = [at.start() for at in re.finditer(question, text)]
    asked = [sum(place < start for place in places) for start, _ in sample.answers]
    assert sorted(set(asked)) == [1, 2, 3, 4]
    for start, stop in sample.answers:
        assert byte_tokenizer.decode(sample.tokens[start:stop]).strip() in facts
    few = ask(1200, 40)
    assert len(few.tokens) == 1200
    assert 1 <= byte_tokenizer.decode(few.tokens).count(question) < 40
    one = ask(1200, 1)
    if kind not in ("chain", "many_values"):  # theirs are sorted
        assert one.depth == 0.5
    assert byte_tokenizer.decode(one.tokens).count(question) == 1
    with pytest.raises(ValueError, match=f"20 tokens is too short for a '{kind}' question"):
        ask(20, 4)


def test_half_of_the_documents_with_several_questions_ask_in_one_wording(byte_tokenizer):
    haystack = torch.tensor(byte_tokenizer(prose(1000)).input_ids)[:4000]
    wordings = []
    for seed in range(60):
        sample = training_sample(haystack, byte_tokenizer, kind="single", count=5, depth=0.5, seed=str(seed))
        asked = byte_tokenizer.decode(sample.tokens).split("\n\n")[-5:]
        wordings.append(len({question[:8] for question in asked}))
    assert 20 <= wordings.count(1) <= 40


def test_samples_depend_on_their_seed_alone(tokenizer):
    haystack = torch.tensor(tokenizer(prose(300)).input_ids)[:300]

    def draw(seed: str):
        return retrieval_sample(haystack, tokenizer, kind="multi_query", depth=0.4, seed=seed).tokens.tolist()

    assert draw("a") == draw("a")
    assert draw("a") != draw("b")


@pytest.mark.parametrize("kind", KINDS)
def test_too_short_for_a_question(tokenizer, kind):
    haystack = torch.tensor(tokenizer(prose(300)).input_ids)
    shortest = next(n for n in range(10, 300) if _fits(haystack[:n], tokenizer, kind))
    sample = retrieval_sample(haystack[:shortest], tokenizer, kind=kind, depth=0.5, seed="a")
    assert len(sample.tokens) == shortest
    with pytest.raises(ValueError, match=f"{shortest - 1} tokens is too short for a '{kind}' question; use 256 or more"):
        retrieval_sample(haystack[: shortest - 1], tokenizer, kind=kind, depth=0.5, seed="a")


def _fits(haystack, tokenizer, kind: str) -> bool:
    try:
        retrieval_sample(haystack, tokenizer, kind=kind, depth=0.5, seed="a")
    except ValueError:
        return False
    return True


# Repeated spans and mixed documents


@pytest.mark.parametrize("length", [110, 200, 500])
def test_a_repeated_span(length):
    for seed in range(20):
        document, other = torch.arange(length), 1000 + torch.arange(length)
        tokens, early = repeated_span(document, other, span_tokens=48, latest=length // 2, rng=random.Random(seed))
        first, last = tokens[early : early + 48], tokens[-48:]
        assert torch.equal(first, last)
        values = sorted(first.tolist())
        assert values == list(range(values[0], values[0] + 48))  # a piece of the other document
        assert values[0] >= 1000
        assert first.tolist() != values  # shuffled
        assert 4 <= early <= max(4, length // 2)
        rest = torch.cat([tokens[:early], tokens[early + 48 : -48]])
        assert torch.equal(rest, torch.cat([document[:early], document[early + 48 : -48]]))


def test_too_short_to_repeat():
    with pytest.raises(ValueError, match="100 tokens is too short to repeat 48"):
        repeated_span(torch.arange(100), torch.arange(100), span_tokens=48, latest=50, rng=random.Random(0))


def test_mixed_documents(tokenizer):
    document = torch.tensor(tokenizer(prose(400)).input_ids)[:400]
    found = {"plain": 0, "span": 0, "question": 0}
    for i in range(60):
        tokens, answers, prompt = mixed_document(document, tokenizer, retrieval_ratio=0.75, seed=str(i))
        assert len(tokens) == 400
        if not answers:
            assert torch.equal(tokens, document)
            assert prompt == 0
            found["plain"] += 1
            continue
        assert prompt == answers[0] + 1
        if torch.equal(tokens[:4], document[:4]) and len(answers) == SPAN_TOKENS - KNOWN_TOKENS - 1:
            found["span"] += 1
            assert answers == list(range(400 - SPAN_TOKENS + KNOWN_TOKENS, 399))
            last = tokens[-SPAN_TOKENS:]
            assert any(torch.equal(tokens[i : i + SPAN_TOKENS], last) for i in range(4, 204))
        else:
            found["question"] += 1
            assert max(answers) == 398
            assert all(int(tokens[t + 1]) != int(document[t + 1]) for t in answers[-4:])
    assert found["plain"] == pytest.approx(15, abs=9)
    assert found["span"] == pytest.approx(45 * 2 / 7, abs=9)
    assert found["question"] == pytest.approx(45 * 5 / 7, abs=12)


def test_pieces_make_up_the_document():
    document = torch.arange(4100)
    counts = set()
    for i in range(60):
        cut = pieces(document, shortest_tokens=600, rng=random.Random(i))
        assert torch.equal(torch.cat(cut), document)
        assert min(map(len, cut)) >= 600
        counts.add(len(cut))
    assert counts == {1, 2, 4}
    assert len(pieces(document, shortest_tokens=5000, rng=random.Random(0))) == 1


def test_room_for_mixed_documents_is_checked(tokenizer):
    check_room(160, tokenizer)
    with pytest.raises(ValueError, match="too short"):
        check_room(80, tokenizer)
    document = torch.tensor(tokenizer(prose(200)).input_ids)[:160]
    for i in range(60):
        mixed_document(document, tokenizer, retrieval_ratio=1.0, seed=str(i))
