"""The artefact: round trips, damage, crashes, and what is never done (unpickling, leaving its directory)."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from artefacts import is_tidy, make_artifact, make_weights, names, same
from rtpurbo import checkpoint
from rtpurbo.attach import attached, sparsify
from rtpurbo.checkpoint import CONFIG_FILE, Artifact, check_output, find_artifact
from rtpurbo.config import TrainConfig
from rtpurbo.generate import load
from rtpurbo.models import fingerprint
from tiny import CONFIG, head_map, random_indexer, shared_model, tiny_model


@pytest.mark.parametrize("prefix", ["heads", "indexer", "lora", "full"])
def test_round_trip_of_every_prefix(tmp_path, prefix):
    seed = None if prefix == "heads" else 1
    weights = make_weights(tmp_path / "weights", kind=prefix) if prefix in ("lora", "full") else None
    stages = {"calibrate": {"settings": {"seed": 3}, "metrics": {"overlap": 0.75}}}
    artifact = make_artifact(seed, weights, prefix, stages=stages)
    artifact.save(tmp_path / "out")
    got = Artifact.load(tmp_path / "out")
    assert same(got, artifact)
    assert is_tidy(tmp_path / "out")
    if weights is not None:
        assert got.weights_path.parent == tmp_path / "out"
    assert same(Artifact.load(str(tmp_path / "out")), artifact)


def test_config_file_is_readable_json(tmp_path):
    make_artifact(1).save(tmp_path)
    raw = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert list(raw) == ["format_version", "base_model", "sparse", "heads", "stages", "indexer"]
    assert raw["format_version"] == 1
    assert raw["sparse"] == {"window_tokens": 12, "sink_tokens": 4, "index_dim": 8, "top_p": 0.7, "min_probability": 0.0}
    assert raw["heads"]["retrieval"] == [[0, 1, 2], None, [5]]


def test_float8_index_keys_are_a_setting_of_the_artefact(tmp_path):
    small = dataclasses.replace(CONFIG, index_dtype="float8")
    make_artifact(1, config=small).save(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["sparse"]["index_dtype"] == "float8"
    assert Artifact.load(tmp_path).config == small
    assert make_artifact(1, config=small).digest() != make_artifact(1).digest()
    change(tmp_path, "sparse", "index_dtype", to="fp8")
    load_error(tmp_path, r"index_dtype must be 'auto' or 'float8', got 'fp8'\.")


def test_an_evaluated_artefact_from_before_index_dtype_keeps_its_checksum():
    shipped = Path(__file__).parents[1] / "artefacts" / "smollm2-135m-8k"
    found = Artifact.load(shipped)
    assert "index_dtype" not in json.loads((shipped / CONFIG_FILE).read_text())["sparse"]
    assert found.config.index_dtype == "auto"
    assert found.digest() == json.loads((shipped / "eval.json").read_text())["artifact"]


@pytest.mark.parametrize(("name", "stages"), [("smollm2-135m-8k", 3), ("qwen2.5-coder-0.5b-32k", 3)])
def test_the_artefacts_of_this_repository_are_small_and_whole(name, stages):
    folder = Path(__file__).parents[1] / "artefacts" / name
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 5e6
    found = Artifact.load(folder)
    assert len(found.stages) == stages
    assert found.indexer is not None
    assert {int(key.split(".")[0]) for key in found.indexer} == {i for i, heads in enumerate(found.heads.retrieval) if heads}


def test_a_window_ladder_is_kept(tmp_path):
    artifact = make_artifact(1)
    laddered = dataclasses.replace(
        artifact, heads=dataclasses.replace(artifact.heads, windows=((12, 12, 3), None, (5, 3, 12)))
    )
    laddered.save(tmp_path / "with")
    assert same(Artifact.load(tmp_path / "with"), laddered)
    raw = json.loads((tmp_path / "with" / CONFIG_FILE).read_text())
    assert raw["heads"].pop("windows") == [[12, 12, 3], None, [5, 3, 12]]
    artifact.save(tmp_path / "without")
    assert json.loads((tmp_path / "without" / CONFIG_FILE).read_text()) == raw  # nothing else differs
    assert laddered.digest() != artifact.digest()


def test_with_stage_adds_a_section():
    artifact = make_artifact(stages={"calibrate": {"settings": {}, "metrics": {}}})
    later = artifact.with_stage("train_indexer", TrainConfig(steps=5), {"loss": 1.5}, indexer={"x": torch.ones(1)})
    assert list(later.stages) == ["calibrate", "train_indexer"]
    assert later.stages["train_indexer"]["settings"]["steps"] == 5
    assert later.stages["train_indexer"]["metrics"] == {"loss": 1.5}
    assert later.indexer is not None
    assert artifact.indexer is None
    assert list(artifact.stages) == ["calibrate"]


def test_saving_over_an_artefact_replaces_it(tmp_path):
    out = tmp_path / "out"
    first = make_artifact(1, make_weights(tmp_path / "a", 1))
    second = make_artifact(2, make_weights(tmp_path / "b", 2))
    for artifact in (first, second, first, first, make_artifact(2), make_artifact(), second):
        artifact.save(out)
        assert same(Artifact.load(out), artifact)
        assert is_tidy(out)


def test_saving_a_loaded_artefact_in_its_own_place(tmp_path):
    make_artifact(1, make_weights(tmp_path / "a")).save(tmp_path / "out")
    loaded = Artifact.load(tmp_path / "out")
    before = (loaded.weights_path / "adapter_model.safetensors").stat().st_ino
    later = loaded.with_stage("distill", TrainConfig(), {"loss": 1.0}, weights_kind="lora", weights_path=loaded.weights_path)
    later.save(tmp_path / "out")
    assert same(Artifact.load(tmp_path / "out"), later)
    assert (loaded.weights_path / "adapter_model.safetensors").stat().st_ino == before  # not copied again
    loaded.save(tmp_path / "copy")
    assert same(Artifact.load(tmp_path / "copy"), loaded)


def test_saving_again_repairs_damage(tmp_path):
    out = tmp_path / "out"
    artifact = make_artifact(1, make_weights(tmp_path / "a"))
    artifact.save(out)
    for file in (next(out.glob("*.safetensors")), next(out.glob("lora.*/*.safetensors"))):
        file.write_bytes(file.read_bytes()[:-5])
        with pytest.raises(ValueError, match="is damaged"):
            Artifact.load(out)
        artifact.save(out)
        assert same(Artifact.load(out), artifact)


def test_files_of_others_are_kept(tmp_path):
    make_artifact(1).save(tmp_path)
    (tmp_path / "report.html").write_text("x")
    (tmp_path / checkpoint.WORK_DIR).mkdir()
    (tmp_path / checkpoint.WORK_DIR / "metrics.json").write_text("{}")
    make_artifact(2).save(tmp_path)
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / checkpoint.WORK_DIR / "metrics.json").exists()


# What cannot be loaded


def load_error(path, message):
    with pytest.raises(ValueError, match=message):
        Artifact.load(path)


@pytest.fixture
def saved(tmp_path) -> Path:
    out = tmp_path / "out"
    make_artifact(1, make_weights(tmp_path / "weights")).save(out)
    return out


def change(path: Path, *keys: str, to) -> None:
    """Set a value of the config file; `...` removes it."""
    raw = section = json.loads((path / CONFIG_FILE).read_text())
    for key in keys[:-1]:
        section = section[key]
    if to is ...:
        del section[keys[-1]]
    else:
        section[keys[-1]] = to
    (path / CONFIG_FILE).write_text(json.dumps(raw))


@pytest.mark.parametrize("name", ["missing", "./missing", "a/b/c", "missing/", "~/missing", "/missing/out"])
def test_no_such_directory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    load_error(name, rf"'{name}' is not an artefact: it does not exist\. Make one with `rtpurbo convert`\.")


def test_a_directory_without_config(tmp_path):
    load_error(tmp_path, r"is not an artefact: it has no rtpurbo_config\.json\. Make one with `rtpurbo convert`\.")


@pytest.mark.parametrize("name", ["nobody-at-all/no-such-model", "bad name/x y"])
def test_hub_name_that_cannot_be_reached(name):
    load_error(name, rf"'{name}' is neither a local artefact nor a hub repository that can be reached \(\w+\)\. Check the")


def test_newer_format(saved):
    change(saved, "format_version", to=2)
    load_error(saved, r"has artefact format 2; this version of rtpurbo reads up to 1\. Upgrade rtpurbo\.")


@pytest.mark.parametrize("version", [None, "1", 0, -1, True, 1.0, ...])
def test_impossible_format(saved, version):
    change(saved, "format_version", to=version)
    load_error(saved, r"rtpurbo_config\.json is damaged: its format_version is .*\. Convert again\.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON"),
        ('{"format_version": 1, "heads": {', "expected JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ("null", "expected a JSON object, got NoneType"),
        ("[" * 100_000, "expected JSON"),
        ('{"format_version": ' + "9" * 5000 + "}", "expected JSON"),
        (b"\xff\xfe\x00\x80", "expected JSON"),
        (pickle.dumps({"format_version": 1}), "expected JSON"),
    ],
)
def test_damaged_config(saved, text, message):
    (saved / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    load_error(saved, rf"rtpurbo_config\.json is damaged: {message}")


def test_every_truncation_of_the_config_is_refused(saved):
    content = (saved / CONFIG_FILE).read_bytes()
    for length in range(0, len(content) - 2, 7):
        (saved / CONFIG_FILE).write_bytes(content[:length])
        load_error(saved, "is damaged")


def stage(**more) -> dict:
    return {"calibrate": {"settings": {}, "metrics": {}, **more}}


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["window"], 5, r"Unknown key 'window' in .*; valid keys: format_version, base_model, sparse, heads, stages,"),
        (
            ["sparse", "windows"],
            5,
            r"Unknown key 'windows' in the artefact's sparse section; did you mean 'window_tokens'\?",
        ),
        (["heads", "layers"], 5, r"Unknown key 'layers' in the head map; did you mean"),
        (["base_model"], ..., r"'base_model' must be an object"),
        (["sparse"], ..., r"'sparse' must be an object"),
        (["heads"], [], r"'heads' must be an object"),
        (["stages"], [], r"'stages' must be an object"),
        (["indexer"], "rtpurbo_indexer.safetensors", r"'indexer' must be an object"),
        (["weights"], [1], r"'weights' must be an object"),
        (["base_model", "fingerprint"], ..., r"'base_model\.fingerprint' must be text"),
        (["base_model", "name"], None, r"'base_model\.name' must be text"),
        (["indexer", "sha256"], ..., r"'indexer\.sha256' must be text"),
        (["indexer", "file"], 7, r"'indexer\.file' must be text"),
        (["weights", "kind"], ..., r"'weights\.kind' must be text"),
        (["weights", "kind"], "pickle", r"Weights of kind 'pickle' in .*rtpurbo_config\.json; expected one of lora, full\."),
        (["base_model", "head_dim"], ..., r"'base_model\.head_dim' must be a whole number above 0\. Convert again\."),
        (["base_model", "head_dim"], "64", r"'base_model\.head_dim' must be a whole number above 0"),
        (["base_model", "head_dim"], True, r"'base_model\.head_dim' must be a whole number above 0"),
        (["base_model", "revision"], 3, r"'base_model\.revision' must be text or null"),
        (["base_model", "model_type"], [], r"'base_model\.model_type' must be text or null"),
        (
            ["base_model", "x"],
            1,
            r"Unknown key 'x' in 'base_model' of .*_config\.json; valid keys: name, fingerprint, head_dim,",
        ),
        (["indexer", "x"], 1, r"Unknown key 'x' in 'indexer' of .*_config\.json; valid keys: file, sha256\."),
        (["weights", "x"], 1, r"Unknown key 'x' in 'weights' of .*_config\.json; valid keys: kind, directory\."),
        (["stages"], {"calibrate": 1}, r"'stages\.calibrate' must be an object"),
        (["stages"], {"calibrate": None}, r"'stages\.calibrate' must be an object"),
        (["stages"], {"distill": {"metrics": {}}}, r"'stages\.distill\.settings' must be an object"),
        (["stages"], {"distill": {"settings": {}, "metrics": 1}}, r"'stages\.distill\.metrics' must be an object"),
        (["stages"], stage(sources=[1]), r"'stages\.calibrate\.sources' must be a list of text or null"),
        (["stages"], stage(sparse=3), r"'stages\.calibrate\.sparse' must be an object or null"),
        (
            ["stages"],
            stage(x=3),
            r"Unknown key 'x' in 'stages\.calibrate' of .*; valid keys: settings, metrics, sources, sparse",
        ),
        (["sparse", "top_p"], 0, r"top_p must be in \(0, 1\], got 0\."),
        (
            ["sparse", "window_tokens"],
            "8",
            r"window_tokens in the artefact's sparse section must be a whole number, got '8'",
        ),
        (["heads", "kv_heads"], 4, r"query_heads must be a multiple of kv_heads \(4\), got 6"),
        (["heads", "retrieval"], [[0, 99]], r"retrieval\[0\] must be ascending heads below 6"),
    ],
)
def test_impossible_entries(saved, keys, value, message):
    change(saved, *keys, to=value)
    load_error(saved, message)


def test_the_shipped_artefacts_load():
    for path in (Path(__file__).parent.parent / "artefacts").iterdir():
        assert Artifact.load(path).base_model["fingerprint"]


def test_sections_that_may_be_missing(saved):
    for key in ("weights", "indexer", "stages"):
        change(saved, key, to=...)
        got = Artifact.load(saved)
    assert same(got, make_artifact())
    change(saved, "indexer", to=None)
    assert same(Artifact.load(saved), make_artifact())


OUTSIDE = ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "weights/../../x.safetensors"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_outside(saved, name):
    save_file({"x": torch.ones(1)}, saved.parent / "secret.safetensors")
    for key in (("indexer", "file"), ("weights", "directory")):
        before = (saved / CONFIG_FILE).read_text()
        change(saved, *key, to=name)
        load_error(saved, r"rtpurbo_config\.json names a file outside the artefact: ")
        (saved / CONFIG_FILE).write_text(before)


def indexer_file(path: Path) -> Path:
    return path / json.loads((path / CONFIG_FILE).read_text())["indexer"]["file"]


def test_damaged_indexer(saved):
    file = indexer_file(saved)
    content = file.read_bytes()
    for broken in (content[:-1], content[: len(content) // 2], b"", content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(broken)
        load_error(saved, rf"{file.name} is damaged \(its checksum differs\)\. Fetch it again or train the indexer again\.")
    file.unlink()
    load_error(saved, rf"{file.name} is missing; the artefact is incomplete\. Train the indexer again\.")


def test_damaged_weights(saved):
    file = next(saved.glob("lora.*/adapter_model.safetensors"))
    content = file.read_bytes()
    for broken in (content[:-1], content[:20], b"", b"\xff" * 64):
        file.write_bytes(broken)
        load_error(saved, r"adapter_model\.safetensors is damaged \(.*\)\. Fetch it again or distil again\.")
    file.unlink()
    load_error(saved, r"adapter_model\.safetensors is missing; the artefact is incomplete\. Distil again\.")
    shutil.rmtree(file.parent)
    load_error(saved, rf"{file.parent.name} is missing; the artefact is incomplete\. Distil again\.")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_changed_bit_in_the_adapter(saved, file):
    path = next(saved.glob(f"lora.*/{file}"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    load_error(saved, rf"{path.parent.name} is damaged \(its content has the checksum \w{{8}}\)\. Fetch it again or distil")
    path.write_bytes(content)
    Artifact.load(saved)
    (path.parent / "extra.txt").write_text("x")
    load_error(saved, r"is damaged \(its content has the checksum")


def test_a_changed_bit_in_full_weights(tmp_path):
    """Found by `load`, which reads them anyway; `Artifact.load` reads no more than their headers."""
    out = tmp_path / "out"
    make_artifact(1, make_weights(tmp_path / "weights", kind="full"), "full").save(out)
    path = next(out.glob("full.*/model.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for artifact in (out, Artifact.load(out)):
        with pytest.raises(
            ValueError, match=r"full\.\w{8} is damaged \(its content has the checksum \w{8}\)\. Fetch it again"
        ):
            load(artifact, device="cpu")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickled_indexer_is_refused(saved, tmp_path):
    import hashlib

    mark = tmp_path / "exploded"
    content = pickle.dumps(Bomb(mark))
    for name, message in (
        ("indexer.pt", r"indexer\.pt is not a safetensors file; only safetensors are ever loaded"),
        ("indexer.bin", r"indexer\.bin is not a safetensors file"),
        ("indexer.safetensors", r"indexer\.safetensors is damaged \(.*header.*\)"),
    ):
        (saved / name).write_bytes(content)
        torch.save({"0.key": torch.ones(1)}, saved / "zip.pt")
        change(saved, "indexer", to={"file": name, "sha256": hashlib.sha256(content).hexdigest()})
        load_error(saved, message)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()  # the bomb works


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("decoy", [False, True])
@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "model.pt", "nested/extra.pkl"])
def test_pickled_weights_are_refused(tmp_path, kind, decoy, name):
    """Also when a proper file, or one that only looks like it, lies beside them."""
    out = tmp_path / "out"
    weights = make_weights(tmp_path / "weights", kind=kind)
    make_artifact(1, weights, kind).save(out)
    directory = next(out.glob(f"{kind}.*"))
    proper = next(directory.glob("*.safetensors"))
    if decoy:
        proper.rename(directory / "decoy.safetensors")
    mark = tmp_path / "exploded"
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_bytes(pickle.dumps(Bomb(mark)))
    load_error(out, r"holds a pickled file, [a-z_.]+; only safetensors are ever loaded\. Distil again\.")
    with pytest.raises(ValueError, match="holds a pickled file"):
        make_artifact(1, directory, kind).save(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert not mark.exists()


def test_an_index_that_names_other_files_is_refused(tmp_path):
    out = tmp_path / "out"
    make_artifact(1, make_weights(tmp_path / "weights", kind="full"), "full").save(out)
    directory = next(out.glob("full.*"))
    (directory / "model.safetensors").rename(directory / "decoy.safetensors")
    (directory / "weights.dat").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"layer": "weights.dat"}}))
    load_error(out, r"index\.json names the weights 'weights\.dat'; expected \.safetensors files beside it, nothing else is")
    assert not (tmp_path / "exploded").exists()


def test_adapter_needs_its_own_file(saved):
    directory = next(saved.glob("lora.*"))
    (directory / "adapter_model.safetensors").rename(directory / "other.safetensors")
    load_error(saved, r"adapter_model\.safetensors is missing")


# Output directories


def test_output_directory(tmp_path):
    for fine in ("new", "empty", "artefact", "in_the_making"):
        (tmp_path / fine).mkdir() if fine != "new" else None
    make_artifact().save(tmp_path / "artefact")
    (tmp_path / "in_the_making" / checkpoint.WORK_DIR).mkdir()
    (tmp_path / "in_the_making" / ".tmp-12-rtpurbo_config.json").write_text("{")
    for fine in ("new", "empty", "artefact", "in_the_making"):
        check_output(tmp_path / fine)
        make_artifact(1).save(tmp_path / fine)
        assert same(Artifact.load(tmp_path / fine), make_artifact(1))
        assert names(tmp_path / fine)[-1] in ("work", next((tmp_path / fine).glob("*.safetensors")).name)


def test_foreign_content_is_left_alone(tmp_path):
    for name in ("thesis.tex", "b", "c", "d"):
        (tmp_path / name).write_text("years of work")
    message = r"Output directory .* holds other files \(b, c, d\); expected an empty directory or an artefact\. Choose"
    with pytest.raises(ValueError, match=message):
        make_artifact(1).save(tmp_path)
    assert names(tmp_path) == ["b", "c", "d", "thesis.tex"]
    with pytest.raises(ValueError, match=r"Output '.*thesis\.tex' is a file; expected a directory\."):
        make_artifact(1).save(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


# Crashes

STEPS = [
    (os, "replace"),
    (os, "unlink"),
    (os, "rmdir"),
    (os, "mkdir"),
    (os, "fsync"),
    (shutil, "copyfile"),
    (Path, "write_bytes"),
    (Path, "write_text"),
]


@pytest.fixture
def no_waiting(monkeypatch):
    """The disk's own cache does not matter to a process that crashes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Crash(Exception):
    """The process ends here."""


def crash_at(monkeypatch, step: int, *, after: bool, forever: bool) -> list[str]:
    """Make the `step`-th change of the file system fail, before or after it is done (of a written file: half of it).

    With `forever` all later ones fail too, as nothing is cleaned up by a process that was killed.
    """
    done: list[str] = []

    def wrap(owner, name):
        real = getattr(owner, name)

        def run(*args, **kwargs):
            index = len(done)
            done.append(name)
            if index == step and not after and name == "write_bytes":
                real(args[0], args[1][: len(args[1]) // 2])
            if index == step and not after and name == "write_text":
                real(args[0], args[1][: len(args[1]) // 2])
            if (index == step and not after) or (forever and index > step):
                raise Crash
            try:
                return real(*args, **kwargs)
            finally:
                if index == step:
                    raise Crash

        monkeypatch.setattr(owner, name, run)

    for owner, name in STEPS:
        wrap(owner, name)
    return done


def count_steps(tmp_path, monkeypatch, old, new) -> int:
    old.save(tmp_path / "count")
    with monkeypatch.context() as patch:
        done = crash_at(patch, -1, after=False, forever=False)
        new.save(tmp_path / "count")
    return len(done)


def prefixes(tmp_path):
    """Pairs (old, new) that change every kind of part."""
    a, b = make_weights(tmp_path / "a", 1), make_weights(tmp_path / "b", 2)
    full = make_weights(tmp_path / "full", 3, kind="full")
    return {
        "everything": (make_artifact(1, a), make_artifact(2, b)),
        "more": (make_artifact(), make_artifact(1, a)),
        "less": (make_artifact(1, a), make_artifact()),
        "kind": (make_artifact(1, a), make_artifact(1, full, "full")),
        "nothing": (make_artifact(1, a), make_artifact(1, a)),
    }


@pytest.mark.parametrize("forever", [False, True], ids=["exception", "killed"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("pair", ["everything", "more", "less", "kind", "nothing"])
def test_a_crash_at_every_step_leaves_old_or_new(tmp_path, monkeypatch, no_waiting, pair, after, forever):
    old, new = prefixes(tmp_path)[pair]
    steps = count_steps(tmp_path, monkeypatch, old, new)
    assert steps >= 4
    seen = set()
    for step in range(steps):
        out = tmp_path / f"out{step}"
        old.save(out)
        with monkeypatch.context() as patch:
            crash_at(patch, step, after=after, forever=forever)
            with pytest.raises(Crash):
                new.save(out)
        got = Artifact.load(out)
        assert same(got, old) or same(got, new), f"step {step}"
        seen.add(same(got, new))
        # and a next process, even one with the same number, comes to the end of either
        for artifact in (old, new):
            copy = tmp_path / f"copy{step}"
            shutil.copytree(out, copy)
            artifact.save(copy)
            assert same(Artifact.load(copy), artifact), f"step {step}"
            assert is_tidy(copy)
            shutil.rmtree(copy)
    only_before = pair == "more" and not after  # nothing is left to do after the swap
    assert seen == ({True} if pair == "nothing" else {False} if only_before else {False, True})


def test_an_exception_leaves_no_trace(tmp_path, monkeypatch, no_waiting):
    """Until the moment of the swap, a save that fails leaves the directory as it was."""
    old, new = prefixes(tmp_path)["everything"]
    out = tmp_path / "out"
    old.save(out)
    before = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    steps = count_steps(tmp_path, monkeypatch, old, new)
    unchanged = 0
    for step in range(steps):
        with monkeypatch.context() as patch:
            crash_at(patch, step, after=False, forever=False)
            with pytest.raises(Crash):
                new.save(out)
        if same(Artifact.load(out), new):
            break
        assert {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()} == before, f"step {step}"
        unchanged += 1
    assert unchanged >= 8


def test_the_first_save_crashing_leaves_something_that_can_be_saved_over(tmp_path, monkeypatch, no_waiting):
    new = prefixes(tmp_path)["everything"][1]
    new.save(tmp_path / "count")
    for step in range(12):
        out = tmp_path / f"out{step}"
        with monkeypatch.context() as patch:
            crash_at(patch, step, after=False, forever=True)
            with pytest.raises(Crash):
                new.save(out)
        new.save(out)
        assert same(Artifact.load(out), new)
        assert is_tidy(out)


KILL = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from pathlib import Path
from artefacts import Artifact, is_tidy, make_artifact, make_weights, same
base, out = Path(sys.argv[1]), Path(sys.argv[1]) / "out"
choices = [make_artifact(1, make_weights(base / "a", 1)), make_artifact(2, make_weights(base / "b", 2)), make_artifact()]
choices[0].save(out)
start = time.perf_counter()
for _ in range(5):
    choices[1].save(out)
    choices[0].save(out)
one = (time.perf_counter() - start) / 10
random.seed(7)
counts = [0, 0, 0, 0]
for _ in range(20):
    child = os.fork()
    if child == 0:
        while True:
            for artifact in choices:
                artifact.save(out)
    time.sleep(random.uniform(0, 6 * one))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    got = Artifact.load(out)
    which = [same(got, artifact) for artifact in choices]
    assert sum(which) == 1, which
    counts[which.index(True)] += 1
    counts[3] += not is_tidy(out)
choices[1].save(out)
assert same(Artifact.load(out), choices[1]) and is_tidy(out)
print(counts)
"""


def test_kill_9_at_random_moments(tmp_path):
    """A process that saves in a loop is killed twenty times; each time a whole artefact is there."""
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, interrupted = json.loads(done.stdout)
    assert interrupted > 0  # some were in the middle of a save


@pytest.mark.parametrize("part", ["indexer", "weights"])
def test_a_full_disk_leaves_the_old_artefact(small_disk, tmp_path, part):
    disk, limited = small_disk
    out = disk / "out"
    old = make_artifact(1, make_weights(tmp_path / "a", 1))
    old.save(out)
    before = names(out)
    if part == "indexer":
        new = make_artifact(indexer={"big": torch.randn(200_000)})
    else:
        new = make_artifact(2, make_weights(tmp_path / "b", 2, size=500))
    with limited(), pytest.raises(OSError, match=r"No space left|File too large"):
        new.save(out)
    assert names(out) == before
    assert same(Artifact.load(out), old)
    newer = make_artifact(3)
    newer.save(out)
    assert same(Artifact.load(out), newer)


# Fingerprints


def test_fingerprint_does_not_depend_on_the_dtype():
    model = tiny_model("llama")
    want = fingerprint(model)
    assert len(want) == 64
    assert fingerprint(tiny_model("llama", dtype=torch.bfloat16)) == want
    assert fingerprint(tiny_model("llama", dtype=torch.float64)) == want
    assert fingerprint(tiny_model("llama")) == want


def test_fingerprint_depends_on_every_tensor():
    model = tiny_model("llama")
    want = {fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            for place in (0, -1):
                kept = parameter.view(-1)[place].clone()
                parameter.view(-1)[place] = kept * 1.5 + 0.1
                want.add(fingerprint(model))
                parameter.view(-1)[place] = kept
    assert len(want) == 1 + 2 * len(list(model.parameters()))
    assert fingerprint(tiny_model("llama", seed=1)) not in want
    assert fingerprint(tiny_model("llama", intermediate_size=72)) not in want


def test_fingerprint_looks_through_adapters_and_indexers():
    model = tiny_model("llama")
    want = fingerprint(model)
    heads = head_map(model)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        assert fingerprint(model) == want
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        assert fingerprint(adapted) == want
        adapted.unload()


def test_artefact_of_another_model_is_refused():
    model = shared_model("llama")
    base = {"name": "somebody/model", "fingerprint": fingerprint(tiny_model("llama", seed=1))}
    artifact = make_artifact(base_model=base, heads=head_map(model))
    message = (
        rf"made for other weights: expected somebody/model with fingerprint {base['fingerprint'][:12]}, "
        rf"got a model with {fingerprint(model)[:12]}\. Load its own base model, or convert this one\."
    )
    with pytest.raises(ValueError, match=message), sparsify(model, artifact):
        pass


def test_find_artifact_prefers_a_local_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_artifact().save("somebody/model")
    assert find_artifact("somebody/model") == Path("somebody/model")
    assert same(Artifact.load("somebody/model/"), make_artifact())
