"""The whole conversion: stages kept, stages run again, runs that are killed, and what a run will take."""

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from rtpurbo.calibration import calibrate
from rtpurbo.checkpoint import CONFIG_FILE, WORK_DIR, Artifact
from rtpurbo.cli import explain
from rtpurbo.config import CalibrateConfig, DistillConfig, EvalConfig, IndexerConfig
from rtpurbo.distillation import distill
from rtpurbo.indexer_training import train_indexer
from rtpurbo.pipeline import PAPER, ConvertConfig, convert, estimate, finished_stage, resolved, save_stage
from tiny_text import random_model, word_tokenizer

SMALL = ConvertConfig(
    window_tokens=32,
    index_dim=4,
    calibrate=CalibrateConfig(
        lengths_tokens=(160,), documents=3, needle_tokens=8, check_samples=1, retrieval_ratio=0.3, granularity="group"
    ),
    indexer=IndexerConfig(steps=4, length_tokens=160, documents=3, queries=8, save_every=1, learning_rate=1e-2),
    distill=DistillConfig(steps=3, batch_size=1, length_tokens=160, labels=16, lora_rank=2, save_every=1),
    evaluate=EvalConfig(
        lengths_tokens=(192,),
        samples=(1,),
        kinds=("single",),
        loss_documents=1,
        fidelity_documents=1,
        decode_tokens=2,
        short_documents=1,
    ),
)


def run(output, source, config=SMALL, model=None):
    return convert(
        model or random_model(),
        word_tokenizer(),
        output,
        sources=[source],
        heldout=[source],
        config=config,
        model_name="tiny",
    )


def content(path):
    """Everything that a run leaves behind and that must not depend on how it got there."""
    artifact = Artifact.load(path)
    weights = {f.name: f.read_bytes() for f in artifact.weights_path.glob("*.safetensors")}
    indexer = {name: t.tolist() for name, t in artifact.indexer.items()}
    metrics = {f.name: f.read_text() for f in (path / "metrics").glob("*")}
    return json.loads((path / CONFIG_FILE).read_text()), indexer, weights, metrics


def test_a_run_killed_between_metrics_and_artefact_has_both_in_the_end(tmp_path, source, monkeypatch):
    run(tmp_path / "whole", source)
    save = Artifact.save

    def killed(self, path):
        if "train_indexer" in self.stages:
            raise KeyboardInterrupt
        save(self, path)

    monkeypatch.setattr(Artifact, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", source)
    monkeypatch.undo()
    (tmp_path / "out" / "metrics" / ".tmp-12-train_indexer.jsonl").write_text("{")  # half of what was being written
    run(tmp_path / "out", source)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_conversion_says_what_its_stages_found(tmp_path, source, capsys):
    more = dataclasses.replace(SMALL, calibrate=dataclasses.replace(SMALL.calibrate, documents=6))
    for again in (False, True):  # kept stages say it again
        artifact = run(tmp_path / "out", source, more)
        said = capsys.readouterr().err
        assert ("calibrate: finished before, kept" in said) == again
        assert str(artifact.heads) in said
        assert "of the retrieval heads are the same" in said
        notes = [note for stage in artifact.stages.values() for note in stage["metrics"].get("notes", [])]
        assert notes, "a random model cannot retrieve, and is told so"
        for note in notes:
            assert f"Note: {note}" in said


def test_a_second_run_finds_its_stages(tmp_path, source, capsys):
    run(tmp_path / "out", source)
    first = content(tmp_path / "out")
    assert (tmp_path / "out" / "report.html").stat().st_size > 1e6
    assert not (tmp_path / "out" / WORK_DIR).exists()
    assert {p.name for p in (tmp_path / "out" / "metrics").iterdir()} == {"train_indexer.jsonl", "distill.jsonl"}
    capsys.readouterr()
    run(tmp_path / "out", source)
    said = capsys.readouterr().err
    for stage in ("calibrate", "train_indexer", "distill", "evaluate"):
        assert f"{stage}: finished before, kept" in said
    assert "running" not in said
    assert content(tmp_path / "out") == first


def test_a_changed_stage_and_those_after_it_run_again(tmp_path, source, capsys):
    run(tmp_path / "out", source)
    changed = dataclasses.replace(SMALL, distill=dataclasses.replace(SMALL.distill, steps=2))
    capsys.readouterr()
    run(tmp_path / "out", source, changed)
    said = capsys.readouterr().err
    assert "train_indexer: finished before, kept" in said
    assert "distill: running" in said
    assert "evaluate: running" in said
    run(tmp_path / "fresh", source, changed)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
    changed = dataclasses.replace(changed, window_tokens=24)
    capsys.readouterr()
    run(tmp_path / "out", source, changed)
    assert capsys.readouterr().err.count("running") == 4
    assert Artifact.load(tmp_path / "out").config.window_tokens == 24


def test_a_calibration_from_before_newer_settings_is_kept(tmp_path, source):
    artifact = run(tmp_path / "out", source)
    raw = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    for newer in ("window_mass", "target_recovery", "text_weight"):
        del raw["stages"]["calibrate"]["settings"][newer]
    (tmp_path / "out" / CONFIG_FILE).write_text(json.dumps(raw))
    settings = {"after": None, "sparse": artifact.config, "sources": [source], "weights": artifact.base_model["fingerprint"]}
    assert finished_stage(tmp_path / "out", "calibrate", SMALL.calibrate, **settings) is not None
    for newer in ({"window_mass": 0.99}, {"target_recovery": 0.99}, {"text_weight": 3.0}):
        other = dataclasses.replace(SMALL.calibrate, **newer)
        assert finished_stage(tmp_path / "out", "calibrate", other, **settings) is None


def test_a_distillation_from_before_newer_settings_is_kept(tmp_path, source):
    artifact = run(tmp_path / "out", source)
    raw = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    del raw["stages"]["distill"]["settings"]["lora_layers"]
    (tmp_path / "out" / CONFIG_FILE).write_text(json.dumps(raw))
    before = dataclasses.replace(artifact, stages={name: artifact.stages[name] for name in ("calibrate", "train_indexer")})
    settings = {
        "after": before,
        "sparse": artifact.config,
        "sources": [source],
        "weights": artifact.base_model["fingerprint"],
    }
    assert finished_stage(tmp_path / "out", "distill", SMALL.distill, **settings) is not None
    other = dataclasses.replace(SMALL.distill, lora_layers=0.5)
    assert finished_stage(tmp_path / "out", "distill", other, **settings) is None


def test_other_text_is_another_input(tmp_path, source):
    artifact = run(tmp_path / "out", source)
    sparse = dataclasses.replace(artifact.config, top_p=SMALL.top_p)
    weights = artifact.base_model["fingerprint"]

    def found(**changes):
        inputs = {"after": None, "sparse": sparse, "sources": [source], "weights": weights, **changes}
        return finished_stage(tmp_path / "out", "calibrate", SMALL.calibrate, **inputs)

    assert found() is not None
    assert found(sources=["other"]) is None
    assert found(weights="other") is None


def test_another_model_is_converted_anew(tmp_path, source, capsys):
    run(tmp_path / "out", source)
    capsys.readouterr()
    run(tmp_path / "out", source, model=random_model(seed=1))
    assert capsys.readouterr().err.count("running") == 4
    run(tmp_path / "fresh", source, model=random_model(seed=1))
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_no_distillation_when_its_steps_are_zero(tmp_path, source):
    config = dataclasses.replace(SMALL, distill=dataclasses.replace(SMALL.distill, steps=0))
    assert run(tmp_path, source, config).weights_kind is None


def test_no_distillation_takes_an_earlier_one_away(tmp_path, source):
    run(tmp_path, source)
    config = dataclasses.replace(SMALL, distill=dataclasses.replace(SMALL.distill, steps=0))
    made = run(tmp_path, source, config)
    found = Artifact.load(tmp_path)
    assert found.weights_kind is None
    assert list(found.stages) == ["calibrate", "train_indexer"]
    assert found.digest() == made.digest() == json.loads((tmp_path / "eval.json").read_text())["artifact"]


def test_a_stage_takes_away_what_came_after_it(tmp_path, source):
    artifact = run(tmp_path / "out", source)
    model, tokenizer = random_model(), word_tokenizer()
    again = train_indexer(model, tokenizer, artifact, [source], SMALL.indexer)
    assert again.weights_kind is again.weights_path is None
    assert list(again.stages) == ["calibrate", "train_indexer"]
    save_stage(tmp_path / "out", "train_indexer", again, [source])
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == {"metrics"}
    assert not list((tmp_path / "out" / "metrics").iterdir())  # these curves belonged to the stages before
    fresh = calibrate(model, tokenizer, [source], SMALL.calibrate, artifact.config)
    assert again.with_stage("calibrate", SMALL.calibrate, {}).indexer is None
    assert fresh.indexer is None


@pytest.mark.parametrize("name", ["work", "notes"])
def test_files_of_the_user_are_left_alone(tmp_path, source, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match=f"holds other files .{name}."):
        run(tmp_path / "out", source)
    assert (tmp_path / "out" / name / "thesis.txt").read_text() == "years"
    run(tmp_path / "made", source)
    shutil.move(tmp_path / "out" / name, tmp_path / "made")
    run(tmp_path / "made", source, dataclasses.replace(SMALL, window_tokens=24))
    assert (tmp_path / "made" / name / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("content", ["[]", "{bad", '{"needle": 1}'])
def test_a_damaged_evaluation_is_made_again(tmp_path, source, capsys, content):
    run(tmp_path, source)
    good = (tmp_path / "eval.json").read_text()
    (tmp_path / "eval.json").write_text(content)
    capsys.readouterr()
    run(tmp_path, source)
    assert "the old result is left aside" in capsys.readouterr().err
    now, before = json.loads((tmp_path / "eval.json").read_text()), json.loads(good)
    assert now["needle"] == before["needle"]


def test_an_older_evaluation_is_kept_when_nothing_newer_is_asked_for(tmp_path, source, capsys):
    newer = ("short_documents", "squad", "squad_samples", "long_tokens", "long_prompts")
    without = dataclasses.replace(SMALL, evaluate=dataclasses.replace(SMALL.evaluate, short_documents=0))
    run(tmp_path, source, without)
    found = json.loads((tmp_path / "eval.json").read_text())
    assert "short" not in found
    old = {**found, "settings": {k: v for k, v in found["settings"].items() if k not in newer}, "mark": 1}
    (tmp_path / "eval.json").write_text(json.dumps(old))
    run(tmp_path, source, without)
    assert "evaluate: finished before, kept" in capsys.readouterr().err
    assert json.loads((tmp_path / "eval.json").read_text()) == old
    run(tmp_path, source)  # asks for a short document
    again = json.loads((tmp_path / "eval.json").read_text())
    assert "mark" not in again
    assert set(again["short"]["documents"][source]) == {"length_tokens", "sparse", "weights"}


def test_a_conversion_refuses_a_missing_squad_file_at_once(tmp_path, source):
    config = dataclasses.replace(SMALL, evaluate=dataclasses.replace(SMALL.evaluate, squad=str(tmp_path / "none.json")))
    with pytest.raises(ValueError, match=r"SQuAD file '.*none\.json' does not exist"):
        run(tmp_path / "out", source, config)
    assert not (tmp_path / "out" / CONFIG_FILE).exists()


def test_default_lengths_reach_beyond_the_window(tmp_path, source):
    config = dataclasses.replace(
        SMALL, evaluate=EvalConfig(kinds=("single",), samples=(1,), loss_documents=1, decode_tokens=2, short_documents=1)
    )
    run(tmp_path, source, config)
    found = json.loads((tmp_path / "eval.json").read_text())
    assert [row["length_tokens"] for row in found["needle"]] == [128, 256, 512]
    assert found["speed"]["sparse"]["length_tokens"] == 510  # room for what is decoded


def test_the_model_comes_back_unchanged(tmp_path, source):
    model = random_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tokens = torch.arange(64)[None] + 5
    logits = model(tokens).logits
    run(tmp_path, source, model=model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(model(tokens).logits, logits)
    assert not model.training


def test_killed_anywhere_it_ends_where_an_undisturbed_run_does(tmp_path, source):
    """SIGKILL at 20 random moments: what lies there is always a whole artefact (or none yet), and the end is the same."""
    begin = time.monotonic()
    run(tmp_path / "undisturbed", source)
    whole = time.monotonic() - begin
    rng, output = random.Random(0), tmp_path / "killed"
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                run(output, source)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.05, whole / 2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (output / CONFIG_FILE).exists():
            Artifact.load(output)
    run(output, source)
    assert content(output) == content(tmp_path / "undisturbed")
    left = {p.name for p in output.iterdir()}
    assert not [name for name in left if name.startswith(".tmp")]


def test_estimate_grows_with_the_work():
    model = random_model()
    small = estimate(model, SMALL)
    longer = estimate(model, dataclasses.replace(SMALL, distill=dataclasses.replace(SMALL.distill, steps=3000)))
    assert longer["seconds"]["distill"] > 20 * max(small["seconds"]["distill"], 1)
    stages = ("calibrate", "train_indexer", "distill", "evaluate")
    assert set(small["memory_gib"]) == {*stages, "largest"}
    assert small["memory_gib"]["largest"] == max(small["memory_gib"][stage] for stage in stages)
    assert set(small["seconds"]) == {"calibrate", "train_indexer", "distill", "evaluate", "total"}


def test_settings_follow_from_the_model():
    found = resolved(random_model(context=8192, layers=10), ConvertConfig())
    assert found["window_tokens"] == (1024, "an eighth of the context of 8192, from 256 to 8192")
    assert found["retrieval_units"] == (3, "15% of 20 KV groups, over the whole model")
    assert found["granularity"] == ("group", "2 query heads share a KV head: single heads above 4")
    wide = resolved(random_model(context=8192, layers=10, num_attention_heads=8, num_key_value_heads=1), ConvertConfig())
    assert wide["granularity"] == ("head", "8 query heads share a KV head: single heads above 4")
    assert wide["retrieval_units"] == (12, "15% of 80 query heads, over the whole model")
    assert found["calibrate.lengths_tokens"][0] == (2056, 4096, 8192)
    assert found["indexer.length_tokens"] == (8192, "all of the context of 8192, at most 32768")
    defaults = {
        "top_p": 1.0,
        "min_probability": 1e-4,
        "indexer.steps": 300,
        "distill.batch_size": 4,
        "retrieval_ratio": 0.15,
    }
    defaults |= {"indexer.learning_rate": 1e-2, "distill.learning_rate": 3e-4, "distill.weights": "lora"}
    for name, value in defaults.items():
        assert found[name][0] == value
        assert found[name][1].startswith("the default; ")
    assert resolved(random_model(context=131072), ConvertConfig())["window_tokens"][0] == 8192
    assert resolved(random_model(context=131072), ConvertConfig())["distill.length_tokens"][0] == 32768


def test_settings_that_were_asked_for_say_so():
    found = resolved(random_model(context=8192), PAPER)
    assert found["distill.weights"] == ("full", "asked for; the default is lora")
    assert found["retrieval_units"] == (1, "15% of 8 query heads, over the whole model")
    assert found["granularity"] == ("head", "asked for")
    assert found["top_p"] == (0.9, "asked for; the default is 1.0")
    found = resolved(random_model(), SMALL)
    assert found["window_tokens"] == (32, "asked for")
    assert found["calibrate.lengths_tokens"] == ((160,), "asked for")
    assert found["distill.length_tokens"] == (160, "asked for")
    by_score = dataclasses.replace(SMALL, calibrate=CalibrateConfig(threshold=0.5))
    assert resolved(random_model(), by_score)["retrieval_units"] == (None, "as many of 4 KV groups as score 0.5")
    by_target = dataclasses.replace(SMALL, calibrate=CalibrateConfig(target_recovery=0.99))
    assert "or more until 0.99 is recovered" in resolved(random_model(), by_target)["retrieval_units"][1]


@pytest.mark.parametrize("part", ["state", "weights"])
def test_a_full_disk_while_training_is_one_sentence(small_disk, tmp_path, source, part):
    disk, limited = small_disk
    settings = dataclasses.replace(SMALL.distill, lora_rank=1024, save_every=int(part == "state"))
    untrained = dataclasses.replace(SMALL, distill=dataclasses.replace(SMALL.distill, steps=0))
    artifact = run(tmp_path / "whole", source, untrained)
    with limited(), pytest.raises(OSError, match=r"No space left|File too large") as failed:
        distill(random_model(), word_tokenizer(), artifact, [source], settings, work=disk / "work")
    if failed.value.errno == errno.ENOSPC:
        assert explain(failed.value).startswith("the disk is full")
