"""The command line: every command on a tiny model, its frozen surface, and one sentence for every bad input."""

import contextlib
import dataclasses
import errno
import io
import json
import pickle
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from rtpurbo import checkpoint, cli, demo, distillation
from rtpurbo.checkpoint import CONFIG_FILE, Artifact
from rtpurbo.config import DistillConfig
from rtpurbo.pipeline import PAPER, ConvertConfig, convert
from test_model_card import FakeHub
from test_pipeline import SMALL
from tiny_text import RETRIEVAL_HEAD, copy_model, random_model, word_tokenizer

ROOT = Path(__file__).parent.parent
SURFACE = json.loads((Path(__file__).parent / "cli_surface.json").read_text())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    random_model().save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory, model_dir, source):
    path = tmp_path_factory.mktemp("converted") / "out"
    convert(
        random_model(),
        word_tokenizer(),
        path,
        sources=[source],
        heldout=[source],
        config=SMALL,
        model_name=str(model_dir),
    )
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return code, out.getvalue(), err.getvalue()


def fails(*arguments: object) -> str:
    """The one sentence that a failing command leaves."""
    code, out, err = run(*arguments)
    assert code != 0, (out, err)
    assert "Traceback" not in err + out
    last = [line for line in err.splitlines() if line.startswith("rtpurbo: error: ")]
    return last[-1].removeprefix("rtpurbo: error: ") if last else " ".join((out + err).split())


def flags(command: str, *more: str) -> list[str]:
    code, out, _ = run(command, *more, "--help")
    assert code == 0
    return sorted(set(re.findall(r"--[a-z][a-z0-9.-]*[a-z0-9]", out)))


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_surface_is_frozen(command):
    assert flags(command) == SURFACE[command]


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_takes_output_seed_and_json(command):
    assert {"--output", "--seed", "--json"} <= set(SURFACE[command])


def test_convert_eval_report_info_generate_bench(tmp_path, model_dir, source, converted):
    code, out, err = run("info", converted, "--json", tmp_path / "info.json")
    assert code == 0, err
    info = json.loads((tmp_path / "info.json").read_text())
    assert info["stages"] == ["calibrate", "distill", "train_indexer"]
    assert info["sparse_cache_bytes_per_far_token"] < info["dense_cache_bytes_per_token"]
    heads = Artifact.load(converted).heads
    local = len(heads.layers) * heads.kv_heads * (1 - heads.full_kv_ratio)
    assert info["local_kv_heads_by_window_tokens"] == {"32": round(local)}
    assert info["sparse_cache_bytes_constant"] == round(local) * 2 * 2 * 16 * (32 + 4)
    assert "retrieval heads" in out
    code, out, err = run(
        "eval", converted, "--sources", source, "--lengths-tokens", 192, "--samples", 1, "--kinds", "single",
        "--loss-documents", 1, "--fidelity-documents", 1, "--decode-tokens", 2, "--short-documents", 1,
        "--json", tmp_path / "eval.json",
    )  # fmt: skip
    assert code == 0, err
    assert "single needle, 192 tokens" in out
    assert json.loads((tmp_path / "eval.json").read_text())["needle"][0]["samples"] == 1
    code, out, err = run("report", converted, "--output", tmp_path / "report.html")
    assert code == 0, err
    assert (tmp_path / "report.html").is_file()
    (tmp_path / "book.txt").write_text("a book about all and any city")
    common = ("generate", converted, "--prompt-file", tmp_path / "book.txt", "--prompt", "what", "--max-new-tokens", 3)
    code, out, err = run(*common, "--json", tmp_path / "reply.json")
    assert code == 0, err
    assert json.loads((tmp_path / "reply.json").read_text())["new_tokens"] <= 3
    assert run(*common, "--dense")[0] == 0
    code, out, err = run(*common, "--index-dtype", "float8", "--json", tmp_path / "small.json")
    assert code == 0, err
    replies = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("reply", "small")]
    assert replies[0]["cache_bytes"] > replies[1]["cache_bytes"]
    assert run(*common, "--temperature", "0.7", "--seed", 3)[1] == run(*common, "--temperature", "0.7", "--seed", 3)[1]
    code, out, err = run("bench", converted, "--sources", source, "--lengths-tokens", 96, 160, "--new-tokens", 2)
    assert code == 0, err
    assert len(re.findall(r"tokens/s ", out)) >= 2


def test_a_long_prompt_is_read_in_pieces(tmp_path, model_dir, converted, monkeypatch):
    (tmp_path / "book.txt").write_text("a book about all and any city " * 40)
    command = ("generate", converted, "--prompt-file", tmp_path / "book.txt", "--max-new-tokens", 5)
    whole = run(*command)
    monkeypatch.setattr("rtpurbo.generate.PIECE_TOKENS", 37)
    pieces = []
    monkeypatch.setattr("rtpurbo.generate.track", lambda items, **_: pieces.extend(items) or items)
    code, out, err = run(*command)
    assert code == 0, err
    assert out == whole[1]
    assert len(pieces) > 2
    assert {piece.shape[1] for piece in pieces[:-1]} == {37}


def test_demo(tmp_path, model_dir, source, monkeypatch):
    """The demo's own path, at tiny sizes: conversion, question, table, report."""
    monkeypatch.setattr(demo, "demo_config", lambda seed: SMALL)
    monkeypatch.setattr(demo, "SOURCES", (str(source),))
    monkeypatch.setattr(demo, "HELDOUT", (str(source),))
    monkeypatch.setattr(demo, "QUESTION_TOKENS", 256)
    out = tmp_path / "demo"
    code, text, err = run("demo", "--model", model_dir, "-o", out)
    assert code == 0, err
    for part in ("right answer: ", "dense says: ", "sparse says: ", "single needle, 192 tokens", "Cache, ", "Decode, "):
        assert part in text
    assert f"Report: {out / 'report.html'}" in text
    assert (out / "report.html").is_file()
    code, _, err = run("demo", "--model", model_dir, "-o", out)
    assert code == 0, err
    assert err.count("finished before, kept") == 4


def test_a_loss_that_is_no_number_and_a_full_disk(tmp_path, model_dir, source, converted, monkeypatch):
    """Both end a command with one sentence, and leave the artefact as it was."""
    out = tmp_path / "out"
    shutil.copytree(converted, out)
    before = {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()}
    command = ("distill", out, "--sources", source, "--length-tokens", 160, "--steps", 2, "--labels", 8, "--lora-rank", 2)
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "top_kl", lambda student, *args: student.sum(-1) * float("nan"))
        assert re.search(r"nan|NaN", fails(*command))
    with monkeypatch.context() as patch:

        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device", str(out / CONFIG_FILE))

        patch.setattr(checkpoint, "_sync", full)
        assert fails(*command).startswith("the disk is full")
    assert {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()} == before


def test_an_evaluation_that_is_refused_leaves_nothing(tmp_path, converted, source):
    beyond = ("eval", converted, "--sources", source, "--lengths-tokens", 100_000, "-o", tmp_path / "new")
    assert "beyond the model's context" in fails(*beyond)
    assert not (tmp_path / "new").exists()


def test_the_stages_one_by_one(tmp_path, model_dir, source):
    out = tmp_path / "out"
    code, text, err = run(
        "calibrate", model_dir, "-o", out, "--sources", source, "--window-tokens", 32, "--index-dim", 4,
        "--lengths-tokens", 160, "--documents", 6, "--needle-tokens", 8, "--check-samples", 0,
    )  # fmt: skip
    assert code == 0, err
    assert "retrieval heads" in text
    assert re.search(
        r"Chosen under two seeds, each with half of the documents, \d+% of the retrieval heads are the same", text
    )
    assert Artifact.load(out).indexer is None
    common = ("--sources", source, "--length-tokens", 160, "--steps", 2)
    code, text, err = run("train-indexer", out, *common, "--documents", 2, "--queries", 8)
    assert code == 0, err
    code, text, err = run("distill", out, *common, "--labels", 8, "--lora-rank", 2)
    assert code == 0, err
    assert Artifact.load(out).weights_kind == "lora"


def test_convert_dry_run_writes_nothing(tmp_path, model_dir, source):
    code, out, err = run("convert", model_dir, "-o", tmp_path / "out", "--dry-run", "--indexer.documents", 2)
    assert code == 0, err
    assert re.search(r"^window_tokens +256 +an eighth of the context of 512, from 256 to 8192$", out, re.M)
    assert re.search(r"^distill +about [\d.]+ min, memory [\d.]+ GiB$", out, re.M)
    assert re.search(r"^memory +[\d.]+ GiB at most, computed", out, re.M)
    assert "disk" in out
    assert not (tmp_path / "out").exists()


def test_doctor():
    code, out, _ = run("doctor")
    assert code == 0
    assert "self_test_passed" in out
    assert "prefill_windows" in out


def test_missing_and_unknown_models(tmp_path):
    assert "does not exist; expected a hub name, a local directory or a GGUF file" in fails(
        "convert", "./no-such-model", "-o", tmp_path / "out"
    )
    assert "could not be found or read" in fails("convert", "nobody/nothing", "-o", tmp_path / "out")
    assert "has no config.json" in fails("convert", tmp_path, "-o", tmp_path / "out")
    assert "expected a GGUF file" in fails("convert", tmp_path / "a.gguf", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_is_not_there(tmp_path, converted):
    out = tmp_path / "moved"
    shutil.copytree(converted, out)
    config = json.loads((out / CONFIG_FILE).read_text())
    for name, reason in ((str(tmp_path / "gone"), "does not exist"), ("nobody/nothing", "could not be found")):
        config["base_model"]["name"] = name
        (out / CONFIG_FILE).write_text(json.dumps(config))
        message = fails("export", out, tmp_path / "served")
        assert message.startswith(f"The artefact's base model is not where the artefact says. Model {name!r} {reason}")
        assert "Say where it is with --base-model" in message
    for command in (
        ("generate", out, "--prompt", "a"),
        ("eval", out, "-o", tmp_path),
        ("generate", out, "--prompt", "a", "--dense"),
    ):
        message = fails(*command)
        assert message.startswith(
            "The artefact's base model is not where the artefact says. Model 'nobody/nothing' could not"
        )
        assert "Say where it is with --base-model" in message
    assert "device must be one of" in fails("generate", out, "--prompt", "a", "--device", "nowhere")


def test_what_cannot_be_done_is_said_first(tmp_path, model_dir, source, converted, monkeypatch):
    assert "device must be one of" in fails("doctor", "--device", "cuda:99")
    code, out, err = run("info", converted, "--tensor-parallel-size", 3)
    assert (code, out) == (1, "")
    assert "a divisor of the 2 KV heads, got 3" in err
    monkeypatch.setattr("rtpurbo.evals.compare.grade_all", None)  # not so far
    assert "Unknown task 'rulerr'; near matches: ruler" in fails("eval", converted, "--sources", source, "--tasks", "rulerr")


def test_a_stage_that_is_done_again_says_so(tmp_path, source, converted):
    out = tmp_path / "again"
    shutil.copytree(converted, out)
    more = ("--sources", source, "--length-tokens", 160, "--steps", 1)
    code, _, err = run("train-indexer", out, *more, "--documents", 2, "--queries", 8)
    assert code == 0, err
    assert f"{out} has been through train_indexer and distill; what comes out replaces that." in err
    assert set(Artifact.load(out).stages) == {"calibrate", "train_indexer"}
    more = (*more, "--labels", 8, "--lora-rank", 2)
    for place, said in ((tmp_path / "other", False), (out, False), (out, True)):
        code, _, err = run("distill", out, "-o", place, *more)
        assert code == 0, err
        assert ("has been through distill; what comes out" in err) == said


def test_unsupported_architecture_and_missing_tokenizer(tmp_path):
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    message = fails("convert", tmp_path / "gpt", "-o", tmp_path / "out")
    assert "'gpt2' is not supported" in message
    assert "qwen3" in message
    random_model().save_pretrained(tmp_path / "bare")
    assert "has no tokenizer" in fails("convert", tmp_path / "bare", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        (["--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        (["--calibrate.retrieval-ratio", "0"], "retrieval_ratio must be in (0, 1], got 0.0"),
        (["--window-tokens", "-3"], "window_tokens must be at least 1 token"),
        (["--index-dim", "64"], "index_dim must be at most the head dimension"),
        (["--calibrate.lengths-tokens", "20"], "not longer than window + sinks"),
        (["--calibrate.lengths-tokens", "9999"], "beyond the model's context of 512"),
        (["--sources", "nowhere.txt"], "does not exist or has an unknown type"),
        (["--unknown-option", "1"], "Unrecognized options: --unknown-option"),
    ],
)
def test_bad_settings(tmp_path, model_dir, source, arguments, message):
    given = ["--sources", source, "--window-tokens", "32", *arguments]
    assert message in fails("convert", model_dir, "-o", tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


def test_artefacts_that_cannot_be_used(tmp_path, model_dir, source, converted):
    assert "is not an artefact" in fails("info", tmp_path)
    assert "holds other files" in fails("convert", model_dir, "-o", model_dir)
    raw = json.loads((converted / CONFIG_FILE).read_text())

    def variant(name, **changes):
        (tmp_path / name).mkdir()
        for file in converted.glob("rtpurbo_indexer.*"):
            save_file(load_file(file), tmp_path / name / file.name)
        (tmp_path / name / CONFIG_FILE).write_text(json.dumps({**raw, "weights": None, **changes}))
        return tmp_path / name

    assert "Upgrade rtpurbo" in fails("info", variant("newer", format_version=99))
    assert "Unknown key 'extra'" in fails("info", variant("extra", extra=1))
    other = {**raw["base_model"], "fingerprint": "0" * 64}
    assert "made for other weights" in fails("generate", variant("other", base_model=other), "--prompt", "a")
    cut = variant("cut")
    file = next(cut.glob("rtpurbo_indexer.*"))
    file.write_bytes(file.read_bytes()[:100])
    assert "is damaged" in fails("info", cut)
    file.write_bytes(pickle.dumps({"layers.0.query": [0.0]}))
    assert "is damaged" in fails("info", cut)


def test_prompts_that_cannot_be_used(tmp_path, converted):
    assert "give a --prompt or a --prompt-file" in fails("generate", converted)
    assert "does not exist; expected a text file" in fails("generate", converted, "--prompt-file", tmp_path / "no.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    assert "with text in it" in fails("generate", converted, "--prompt-file", tmp_path / "empty.txt")
    for bad in ("-1", "nan"):
        assert "temperature must be 0 (greedy) or above" in fails(
            "generate", converted, "--prompt", "a city", "--temperature", bad
        )
    for flag, value in (
        ("--top-p-mass", "0.5"),
        ("--index-dtype", "float8"),
        ("--dense-below-tokens", "9"),
        ("--tile-probability", "0.01"),
        ("--dense-end-tokens", "9"),
    ):
        assert f"{flag} is the sparse model's and has no effect with --dense" in fails(
            "generate", converted, "--prompt", "a city", "--dense", flag, value
        )
    long = "city " * 600
    assert "beyond the model's context of 512" in fails("generate", converted, "--prompt", long)


@pytest.mark.parametrize("flag", ["--json", "--output"])
@pytest.mark.parametrize("command", ["info", "bench", "generate"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, converted, monkeypatch, command, flag):
    monkeypatch.setattr(Artifact, "load", lambda *args: pytest.fail("it ran"))
    more = ["--prompt", "a"] if command == "generate" else []
    nowhere = tmp_path / "missing" / "file"
    assert f"{flag} {str(nowhere)!r} lies in a directory that does not exist" in fails(
        command, converted, *more, flag, nowhere
    )
    assert "is a directory; expected a file" in fails(command, converted, *more, flag, tmp_path)


def test_doctor_writes_its_output(tmp_path):
    assert run("doctor", "--output", tmp_path / "doctor.json")[0] == 0
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["self_test_passed"] is True
    assert found["prefill_windows"].startswith(("flash-attn-4: ", "triton: ", "torch: the device is cpu"))


def test_eval_into_a_file_is_refused(tmp_path, converted):
    (tmp_path / "file").write_text("")
    assert "is a file; expected a directory for eval.json" in fails("eval", converted, "--output", tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--new-tokens", "0"], "1 to 511 new ones"),
        (["--new-tokens", "600"], "1 to 511 new ones"),
        (["--lengths-tokens", "-3"], "lengths -3"),
    ],
)
def test_bench_sizes_that_cannot_be(converted, source, more, message):
    assert message in fails("bench", converted, "--sources", source, *more)


LAYER = ("--device", "cpu", "--window-tokens", 32, "--lengths-tokens", 200, "--batches", 2, "--prefill-lengths-tokens", 150)


def test_bench_of_a_layer(tmp_path):
    sizes = ("--shape", "8/4/16", "--retrieval", 1, 6, *LAYER, "--prefill-far-ratio", 0.2)
    code, out, err = run("bench", *sizes, "--json", tmp_path / "layer.json", "--plot", tmp_path / "layer.html")
    assert code == 0, err
    assert out.startswith("No GPU is used: this measures the CPU path")
    assert "heads 8/4/16, window 32, torch.float32" in out
    assert "one decode step of a layer" in out
    result = json.loads((tmp_path / "layer.json").read_text())
    assert [(row["mode"], row["batch"], row["slots"]) for row in result["rows"]] == [("heads", 2, 200), ("groups", 2, 200)]
    assert result["attention"].startswith("torch (")
    assert result["prefill_windows"].startswith("torch (")
    assert [(row["mode"], row["slots"]) for row in result["prefill_rows"]] == [
        ("heads", 150), ("groups", 150), ("paper", 150),
    ]  # fmt: skip
    assert result["prefill_rows"][0]["parts"][0]["far_ratio"] == pytest.approx(0.2, abs=0.1)
    assert "prefill of a layer, tiles read 20% of the far tokens" in out
    for row in result["rows"] + result["prefill_rows"]:
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["sparse_seconds"])
    for row in result["rows"]:
        assert row["sparse_cache_bytes"] < row["dense_cache_bytes"] == 2 * 2 * 4 * 200 * 16 * 4
    assert f"Plot: {tmp_path / 'layer.html'}" in out
    assert "Speed of one attention layer" in (tmp_path / "layer.html").read_text()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    for row, found in zip(result["rows"] + result["prefill_rows"], cells, strict=True):
        scale, digits, rate = (1e6, 0, "tb_per_second") if row in result["rows"] else (1e3, 2, "tflops")
        assert found[:9] == [
            row["mode"], str(row["batch"]), str(row["slots"]),
            f"{row['dense_seconds'] * scale:.{digits}f} ({row['dense_backend']})",
            f"{row['sparse_seconds'] * scale:.{digits}f}", f"{row['speedup']:.2f}",
            f"{row[f'dense_{rate}']:.3g} | {row[f'sparse_{rate}']:.3g}", "–", "–",
        ]  # fmt: skip
        if row in result["rows"]:
            assert found[9] == f"{row['dense_cache_bytes'] / 2**20:.1f} | {row['sparse_cache_bytes'] / 2**20:.1f}"


def test_the_layer_table_shows_shares_and_what_was_refused(capsys):
    row = {"mode": "heads", "batch": 1, "slots": 8, "sparse_seconds": 2e-3, "sparse_tflops": 500.0, "peak_bytes": 3 * 2**20}
    refused = {"mode": "paper", "batch": 1, "slots": 8, "refused": "CUDA out of memory."}
    cli._layer_table("prefill", [row | {"shares": {"index": 0.123}}, refused], "ms", "TFLOP/s")
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert cells[0] == ["heads", "1", "8", "–", "2.00", "–", "– | 500", "12%", "3.0"]
    assert cells[1][:4] == ["paper", "1", "8", "refused"]
    assert "paper, batch 1, 8 tokens: CUDA out of memory." in out


def test_bench_of_a_models_layer_reads_no_weights(tmp_path, model_dir, converted):
    (tmp_path / "bare").mkdir()
    shutil.copy(model_dir / "config.json", tmp_path / "bare")
    for name in (tmp_path / "bare", converted):
        code, _, err = run("bench", "--model", name, *LAYER, "--json", tmp_path / "layer.json")
        assert code == 0, err
        shape = json.loads((tmp_path / "layer.json").read_text())["shape"]
        assert (shape["query_heads"], shape["kv_heads"], shape["head_dim"]) == (4, 2, 16)
        assert shape["retrieval"] == [2]


def test_a_layer_gets_the_artefacts_window(converted):
    assert cli.Bench(model=str(converted)).layer_heads() == ("4/2/16", 32)
    assert cli.Bench(model=str(converted), window_tokens=8).layer_heads() == ("4/2/16", 8)
    assert cli.Bench().layer_heads() == ("32/4/128", 8192)


def test_bench_of_a_layer_with_a_window_ladder(tmp_path):
    ladder = ("--shape", "8/4/16", "--retrieval", 1, "--windows", 32, 8, 16, 24)
    code, out, err = run("bench", *ladder, *LAYER, "--json", tmp_path / "layer.json", "--plot", tmp_path / "layer.html")
    assert code == 0, err
    assert "window 32 (by KV head 32 8 16 24, but for those kept whole)" in out
    result = json.loads((tmp_path / "layer.json").read_text())
    assert result["shape"]["windows"] == [32, 8, 16, 24]
    assert all(row["speedup"] > 0 for row in result["rows"] + result["prefill_rows"])
    assert "window of at most 32" in (tmp_path / "layer.html").read_text()


def test_bench_of_a_model_that_cannot_be(tmp_path, converted):
    assert "Expected --model or --shape, got both" in fails("bench", "--model", "any/model", "--shape", "4/2/16")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "'gpt2' is not supported: it has no RoPE" in fails("bench", "--model", tmp_path)
    assert "does not exist; expected a hub name" in fails("bench", "--model", tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "num_attention_heads": 0, "hidden_size": 60}')
    assert "a multiple of the KV heads" in fails("bench", "--model", tmp_path)
    flags = {"--model": "any/model", "--shape": "4/2/16", "--plot": tmp_path / "plot.html", "--index-dtype": "float8"}
    for flag, value in flags.items():
        message = fails("bench", converted, flag, value)
        assert f"{flag} is of one layer's benchmark, got the artefact {str(converted)!r} too" in message
    missing = tmp_path / "missing" / "plot.html"
    assert f"--plot {str(missing)!r} lies in a directory that does not exist" in fails("bench", "--plot", missing)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shape", "32x4"], "such as 32/4/128"),
        (["--shape", "6/4/16"], "a multiple of the KV heads"),
        (["--shape", "4/2/16", "--retrieval", "9"], "heads below 4"),
        (["--windows", "9"], "windows must be one for each of 4 KV heads, from 1 to window_tokens (8192), got 9"),
        (["--far-ratio", "2"], "far_ratio must be in [0, 1]"),
        (["--lengths-tokens", "-3"], "lengths must be 1 or more"),
        (["--prefill-lengths-tokens", "-3"], "prefill_lengths must be 1 or more"),
        (["--prefill-far-ratio", "2"], "prefill_far_ratio must be in [0, 1]"),
    ],
)
def test_bench_of_a_layer_that_cannot_be(more, message):
    assert message in fails("bench", *more)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--index-dim", "99"], "index_dim must be at most the head dimension"),
        (["--window-tokens", "0"], "window_tokens must be at least 1 token, got 0"),
        (["--heldout", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["--heldout", "package:no_such_package"], "is not installed"),
        (["--distill.length-tokens", "99999"], "beyond the model's context of 512"),
        (["--evaluate.lengths-tokens", "600"], "beyond the model's context of 512"),
        (["--indexer.length-tokens", "20"], "not longer than window + sinks"),
    ],
)
def test_convert_refuses_at_once_what_would_fail_later(tmp_path, model_dir, source, monkeypatch, dry, more, message):
    monkeypatch.setattr("rtpurbo.calibration.calibrate", lambda *args, **kw: pytest.fail("it began"))
    base = ["convert", model_dir, "--sources", source, "--window-tokens", "32", "-o", tmp_path / "out", *dry]
    base += [] if "--heldout" in more else ["--heldout", source]
    assert message in fails(*base, *more)
    assert not (tmp_path / "out").exists()


def test_a_stage_may_have_its_own_seed():
    command = cli.Convert(model="m", seed=3, distill=DistillConfig(seed=5))
    config = cli._seeded(command)
    assert (config.calibrate.seed, config.indexer.seed, config.distill.seed, config.evaluate.seed) == (3, 3, 5, 3)


def test_the_base_model_may_lie_elsewhere(tmp_path, converted, model_dir):
    moved = tmp_path / "moved"
    shutil.copytree(converted, moved)
    raw = json.loads((moved / "rtpurbo_config.json").read_text())
    raw["base_model"]["name"] = str(tmp_path / "gone")
    (moved / "rtpurbo_config.json").write_text(json.dumps(raw))
    prompt = ["--prompt", "a city", "--max-new-tokens", "2"]
    assert "does not exist" in fails("generate", moved, *prompt)
    assert run("generate", moved, *prompt, "--base-model", model_dir)[0] == 0


def parsed(monkeypatch, *arguments: str):
    """The settings of a conversion that would begin."""
    seen = []
    monkeypatch.setattr(cli.Convert, "run", lambda self: seen.append(self))
    assert run("convert", "m", *arguments)[0] == 0
    return seen[0]


@pytest.mark.parametrize("asked", [["--recipe", "paper"], ["--recipe=paper"]])
def test_the_papers_recipe_by_its_name(monkeypatch, asked):
    assert cli._seeded(parsed(monkeypatch, *asked)) == PAPER
    assert cli._seeded(parsed(monkeypatch)) == cli._seeded(parsed(monkeypatch, "--recipe", "default")) == ConvertConfig()
    assert cli._seeded(parsed(monkeypatch, *asked, "--seed", "3")).distill.seed == 3


def test_flags_win_over_a_recipe(monkeypatch):
    flags = "--top-p 0.8 --min-probability 0.01 --calibrate.scoring gates --indexer.start closed_form --distill.steps 5"
    for arguments in ([*flags.split(), "--recipe", "paper"], ["--recipe", "paper", *flags.split()]):
        config = cli._seeded(parsed(monkeypatch, *arguments))
        want = dataclasses.replace(
            PAPER,
            top_p=0.8,
            min_probability=0.01,
            calibrate=dataclasses.replace(PAPER.calibrate, scoring="gates"),
            indexer=dataclasses.replace(PAPER.indexer, start="closed_form"),
            distill=dataclasses.replace(PAPER.distill, steps=5),
        )
        assert config == want


def test_an_unknown_recipe_is_refused():
    assert "paper" in fails("convert", "m", "--recipe", "papers")
    assert flags("convert", "--recipe", "paper") == SURFACE["convert"]


def test_the_papers_recipe_runs(tmp_path, source):
    copy_model().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    common = (*SMALL_FLAGS, "--calibrate.lengths-tokens", 320, "--sources", source, "--heldout", source)
    code, _, err = run("convert", tmp_path / "model", "-o", tmp_path / "out", "--recipe", "paper", *common)
    assert code == 0, err
    artifact = Artifact.load(tmp_path / "out")
    assert artifact.heads.granularity == "head"
    assert RETRIEVAL_HEAD[1] in artifact.heads.retrieval[RETRIEVAL_HEAD[0]]
    assert artifact.weights_kind == "full"
    assert artifact.config.rule == "p = 0.9"


SMALL_FLAGS = (
    "--window-tokens 32 --index-dim 4 --calibrate.lengths-tokens 160 --calibrate.documents 3 --calibrate.needle-tokens 8 "
    "--calibrate.check-samples 0 --indexer.length-tokens 160 --indexer.documents 2 --indexer.queries 8 --indexer.steps 2 "
    "--distill.length-tokens 160 --distill.steps 1 --distill.labels 8 --distill.lora-rank 2 --evaluate.lengths-tokens 160 "
    "--evaluate.samples 1 --evaluate.kinds single --evaluate.loss-documents 1 --evaluate.fidelity-documents 1 "
    "--evaluate.decode-tokens 2 --evaluate.short-documents 1"
).split()


def test_readme_commands(tmp_path, monkeypatch, model_dir, source):
    """Every command and the Python of the README run, one after the other, a tiny model standing in for the one it names."""
    text = (ROOT / "README.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    commands = [line.split("#")[0].strip() for line in lines if "rtpurbo " in line]
    assert [c.split()[1] for c in commands] == ["convert", "generate", "export", "generate", "eval"]
    prose = Path(source).resolve()
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("a letter from the city")
    Path("out/demo/metrics").mkdir(parents=True)  # what `make demo` leaves
    for command in commands:
        words = [w.strip('"').replace("Qwen/Qwen3-8B", str(model_dir)) for w in re.findall(r'"[^"]*"|\S+', command)[1:]]
        words = ["sparse" if w.startswith("artefacts/") else "192" if w == "2048" else w for w in words]
        if words[0] == "convert":
            assert str(model_dir) in words
            words += [*SMALL_FLAGS, "--sources", str(prose), "--heldout", str(prose)]
        elif words[0] == "generate":
            words += ["--max-new-tokens", "2", "--json", "reply.json"]
        elif words[0] == "eval":
            words += ["--sources", str(prose), "--decode-tokens", "2"]
        code, _, err = run(*words)
        assert code == 0, (command, err)
    assert {"eval.json", "report.html", CONFIG_FILE} <= {file.name for file in Path("sparse").iterdir()}
    assert set(Artifact.load("sparse").stages) == {"calibrate", "train_indexer", "distill"}
    assert json.loads(Path("reply.json").read_text())["new_tokens"] == 2
    assert Path("eval/eval.json").is_file()
    assert set(Artifact.load("served").base_model) == set(Artifact.load("sparse").base_model)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    names = {"dense_model": random_model()}
    for python in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(python, "README.md", "exec"), names)
    assert b"ingle needle, 160 tokens" in FakeHub.calls[1][2]["README.md"]
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(lines), re.M):
        assert f"\n{target}:" in makefile
