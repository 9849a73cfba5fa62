"""Sources of text of every kind, and seeded documents."""

from __future__ import annotations

import gzip
import json
import random
import re
import sys

import datasets
import pytest
import torch

from rtpurbo import data, progress
from rtpurbo.data import documents, read_source
from tiny_text import FILLERS, prose, text_source, word_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# Sources


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".py"])
def test_text_files(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes("Grüße, one text.\n".encode() + b"\xff\xfe")
    assert read_source(str(file)) == ["Grüße, one text.\n"]


def test_directories(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "folder.md").mkdir()
    for name, text in (("b/z.txt", "last"), ("b/a.md", "middle"), ("a.txt", "first"), ("empty.txt", " \n")):
        (tmp_path / name).write_text(text)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read_source(str(tmp_path)) == ["first", "middle", "last"]


ROWS = [{"text": "one", "id": 1}, {"text": "two", "id": 2}, {"text": None, "id": 3}, {"text": " ", "id": 4}]


def write_rows(path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        path.write_text(lines)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"])
def test_tables(tmp_path, name):
    write_rows(tmp_path / name)
    assert read_source(str(tmp_path / name)) == ["one", "two"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_table_without_text_names_its_fields(tmp_path, name):
    table = datasets.Dataset.from_list([{"content": "one", "id": 1}])
    getattr(table, "to_json" if name.endswith("jsonl") else "to_parquet")(str(tmp_path / name))
    with pytest.raises(ValueError, match="has no field 'text'; its fields: content, id"):
        read_source(str(tmp_path / name))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_a_damaged_table(tmp_path, name):
    (tmp_path / name).write_bytes(b"{not a table")
    with pytest.raises(ValueError, match=f"{name}' could not be read"):
        read_source(str(tmp_path / name))


def test_numbers_are_not_text(tmp_path):
    datasets.Dataset.from_list([{"text": 1}, {"text": 2}]).to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.raises(ValueError, match="holds no text"):
        read_source(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("name", ["none.txt", "./none", "/nowhere/else.jsonl", "a/b/c", "table.csv", "empty"])
def test_what_is_not_a_source(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("text\none\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"Source '{re.escape(name)}' (does not exist|holds no text)"):
        read_source(name)


@pytest.mark.parametrize(
    ("source", "arguments"), [("owner/set", ("owner/set", None)), ("owner/set:de", ("owner/set", "de"))]
)
def test_a_dataset_on_the_hub(monkeypatch, source, arguments):
    def load(name, config=None, *, split):
        assert (name, config) == arguments
        assert split == "train"
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_source(source) == ["one", "two"]


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' doesn't exist\nmore"),
        ConnectionError("no network"),
        RuntimeError("Dataset scripts are no longer supported"),
        OSError(),
    ],
)
def test_a_dataset_that_cannot_be_read(monkeypatch, error):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    reason = (str(error) or "OSError").splitlines()[0]
    with pytest.raises(ValueError, match=f"Source 'owner/set' could not be read: {re.escape(reason)}$"):
        read_source("owner/set")


def make_package(folder, monkeypatch) -> None:
    package = folder / "tiny_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text('"""Short."""\n')
    (package / "b.py").write_text(f'def f():\n    """{"Words that explain much. " * 20}"""\n')
    (package / "inner" / "a.py").write_text("x = 1\n")
    (folder / "tiny_module.py").write_text("only = 'this'\n")
    (folder / "other_module.py").write_text("not = 'this'\n")
    monkeypatch.syspath_prepend(str(folder))


def test_the_source_of_a_package(tmp_path, monkeypatch):
    make_package(tmp_path, monkeypatch)
    first, second = read_source("package:tiny_package")
    assert first.index("# tiny_package/__init__.py") < first.index("# tiny_package/b.py")
    assert "def f():" in first
    assert second == "# tiny_package/inner/a.py\nx = 1\n\n"


def test_a_module_is_one_file_not_its_whole_directory(tmp_path, monkeypatch):
    make_package(tmp_path, monkeypatch)
    assert read_source("package:tiny_module") == ["only = 'this'\n"]
    assert read_source("package:tiny_package.inner") == ["# inner/a.py\nx = 1\n\n"]  # a namespace package


@pytest.mark.parametrize("name", ["no_such_package", "no_such.inner", "", ".relative"])
def test_a_package_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"Package '{name}' is not installed"):
        read_source(f"package:{name}")


def test_a_module_without_source():
    assert "sys" in sys.builtin_module_names
    with pytest.raises(ValueError, match="'sys' has no Python source"):
        read_source("package:sys")


def test_installed_packages(tmp_path, monkeypatch):
    import sysconfig

    site = tmp_path / "site"
    for i in range(40):
        package = site / f"package{i}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f'"""{f"Package {i} explains itself. " * 20}"""\nx = {i}\n')
    (site / "not_a_package").mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(site)})
    for source, code in (("installed-docs", False), ("installed-python", True)):
        kept, held = read_source(source), read_source(f"{source}:heldout")
        assert len(kept) + len(held) == 40
        assert 1 <= len(held) <= 12
        assert not set(kept) & set(held)
        assert all(("x = " in text) == code for text in kept + held)
        assert all("explains itself" in text for text in kept + held)
    monkeypatch.setattr(data, "_MAX_PACKAGE_BYTES", 10)
    data._installed_texts.cache_clear()
    assert len(read_source("installed-docs")) == len(kept)


def test_reading_and_tokenising_show_how_far_they_are(tmp_path, monkeypatch, capsys, tokenizer):
    import sysconfig

    for i in range(3):
        (tmp_path / f"package{i}").mkdir()
        (tmp_path / f"package{i}" / "__init__.py").write_text("a = 1\n" * 200)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    first = documents(["installed-python"], tokenizer, length_tokens=20, count=2, seed=0)
    shown = capsys.readouterr().err
    assert "Reading installed-python: 3/3" in shown
    assert "Tokenising installed-python: 2/2" in shown
    again = documents(["installed-python"], tokenizer, length_tokens=20, count=2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert "Reading" not in capsys.readouterr().err  # once is enough


def test_long_directories_are_cut(tmp_path, monkeypatch):
    make_package(tmp_path, monkeypatch)
    monkeypatch.setattr(data, "_MAX_PACKAGE_BYTES", 100)
    texts = read_source("package:tiny_package")
    assert len(texts) == 2
    assert "".join(texts).count("# tiny_package/") == 3


# Documents


@pytest.fixture
def source(tmp_path):
    with text_source(tmp_path) as name:
        yield name


def test_documents_have_the_asked_length_and_number(tokenizer, source):
    got = documents([source], tokenizer, length_tokens=100, count=7, seed=0)
    assert len(got) == 7
    assert all(d.shape == (100,) and d.dtype == torch.int64 for d in got)
    assert len({tuple(d.tolist()) for d in got}) == 7


def test_documents_are_pieces_of_the_text(tokenizer, source):
    text = " ".join(map(str, tokenizer(read_source(source)[0]).input_ids))
    for d in documents([source], tokenizer, length_tokens=60, count=5, seed=0):
        assert " ".join(map(str, d[1:-1].tolist())) in text  # a cut may fall inside the first word


def test_documents_depend_on_their_arguments_alone(tokenizer, source):
    def draw(seed: int, count: int = 4):
        return [d.tolist() for d in documents([source], tokenizer, length_tokens=50, count=count, seed=seed)]

    random.seed(1)
    first = draw(0)
    random.seed(2)
    assert draw(0) == first
    assert draw(1) != first
    assert draw(0, count=6)[:4] == first


def test_documents_start_with_the_tokenizers_prefix(source):
    tokenizer = word_tokenizer(bos=True)
    for d in documents([source], tokenizer, length_tokens=50, count=3, seed=0):
        assert d[0] == tokenizer.bos_token_id
        assert len(d) == 50
        assert (d[1:] != tokenizer.bos_token_id).all()


def test_short_texts_are_joined(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": prose(12, seed=i)}) + "\n" for i in range(40)))
    got = documents([str(tmp_path / "rows.jsonl")], tokenizer, length_tokens=100, count=3, seed=0)
    assert [len(d) for d in got] == [100] * 3


def test_sources_share_equally(tokenizer, tmp_path):
    names = []
    for i in range(3):
        path = tmp_path / f"{i}.txt"
        path.write_text(" ".join([FILLERS[i]] * 3000))
        names.append(str(path))
    got = documents(names, tokenizer, length_tokens=20, count=7, seed=0)
    marks = [tokenizer.get_vocab()[FILLERS[i]] for i in range(3)]
    origin = [marks.index(int(d[10])) for d in got]
    assert origin == [0, 1, 2, 0, 1, 2, 0]


def test_too_little_text(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(prose(30))
    with pytest.raises(ValueError, match=r"too little text: expected 2 documents of 40 tokens, got 0\. Add sources"):
        documents([str(path)], tokenizer, length_tokens=40, count=2, seed=0)
    assert len(documents([str(path)], tokenizer, length_tokens=20, count=5, seed=0)) == 5
    with pytest.raises(ValueError, match="No source"):
        documents([], tokenizer, length_tokens=20, count=1, seed=0)
