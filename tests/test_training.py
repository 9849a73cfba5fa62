"""The training loop: learning-rate shape, resuming after a kill at any moment, changed settings, NaN."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickletools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rtpurbo import checkpoint, progress
from rtpurbo.config import TrainConfig
from rtpurbo.training import learning_rate, train, trainable_state

CONFIG = TrainConfig(steps=12, learning_rate=0.05, save_every=4, seed=3)


class Killed(Exception):
    """Stands for a kill: nothing in the loop may catch it."""


def make_module() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    module[0].bias.requires_grad_(False)
    return module


def make_step(module: nn.Module, *, kill_at: int | None = None, nan_at: int | None = None, seen: list[int] | None = None):
    def step(number: int) -> dict[str, float]:
        if number == kill_at:
            raise Killed
        if seen is not None:
            seen.append(number)
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1000 + number))
        loss = (module(x) - x[:, :3]).pow(2).mean()
        if number == nan_at:
            loss = loss * math.nan
        loss.backward()
        return {"loss": loss.item(), "other": float(number)}

    return step


def run(work: Path | None, config: TrainConfig = CONFIG, inputs: dict | None = None, **kwargs):
    """(module, history, numbers of the steps that ran)"""
    module, seen = make_module(), []
    history = train(
        module,
        make_step(module, seen=seen, **kwargs),
        config,
        what="Test",
        accelerator=Accelerator(cpu=True),
        work=work,
        inputs=inputs,
    )
    return module, history, seen


def assert_same_end(got, want) -> None:
    for (name, a), (_, b) in zip(got[0].named_parameters(), want[0].named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert got[1] == want[1]


def test_learning_rate_warms_up_then_falls_to_a_tenth():
    config = TrainConfig(steps=200, learning_rate=0.4)
    rates = [learning_rate(i, config) for i in range(200)]
    assert rates[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[105] == pytest.approx(0.4 * 0.55)  # half-way down the cosine, (1 + 0.1) / 2
    assert rates[-1] == pytest.approx(0.04, rel=0.01)


@pytest.mark.parametrize("steps", [1, 2, 3, 19])
def test_learning_rate_of_short_runs(steps):
    config = TrainConfig(steps=steps, learning_rate=0.4)
    rates = [learning_rate(i, config) for i in range(steps)]
    assert rates[0] == 0.4
    assert all(0.04 <= r <= 0.4 for r in rates)


def test_steps_are_those_of_adamw():
    module, history, seen = run(None)
    want = make_module()
    optimizer = torch.optim.AdamW([p for p in want.parameters() if p.requires_grad], weight_decay=0.0)
    step = make_step(want)
    for i in range(CONFIG.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(i, CONFIG)
        step(i)
        torch.nn.utils.clip_grad_norm_(want.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(module.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(module[0].bias, make_module()[0].bias)
    assert seen == list(range(CONFIG.steps)) == [row["step"] for row in history]
    assert [row["learning_rate"] for row in history] == [learning_rate(i, CONFIG) for i in range(CONFIG.steps)]
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(p.grad is None for p in module.parameters())


def test_no_clipping_without_a_limit():
    """A gradient a thousand times too large dominates Adam's moments, unless it is clipped."""
    ends = []
    for clip in (None, 1.0):
        module = make_module()
        config = TrainConfig(steps=3, learning_rate=0.05)
        factors = [1000.0, 1.0, 1.0]

        def step(number: int, module=module, factors=factors) -> dict[str, float]:
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
            loss = (module(x) - x[:, :3]).pow(2).mean() * factors[number]
            loss.backward()
            return {"loss": loss.item()}

        train(module, step, config, what="Test", accelerator=Accelerator(cpu=True), clip=clip)
        ends.append(module[2].weight.detach().clone())
    assert not torch.allclose(*ends, atol=1e-3)


@pytest.mark.parametrize("kill_at", range(13))
def test_resume_after_a_kill_is_bitwise_the_same(tmp_path, kill_at):
    want = run(None)
    if kill_at < CONFIG.steps:
        with pytest.raises(Killed):
            run(tmp_path, kill_at=kill_at)
    else:
        run(tmp_path)
    got = run(tmp_path)
    assert_same_end(got, want)
    assert got[2] == list(range(kill_at - kill_at % CONFIG.save_every, CONFIG.steps))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == want[1]


def test_resume_several_times(tmp_path):
    for kill_at in (5, 6, 9, 11):
        with pytest.raises(Killed):
            run(tmp_path, kill_at=kill_at)
    assert_same_end(run(tmp_path), run(None))


def test_a_kill_while_saving_leaves_the_state_before(tmp_path, monkeypatch):
    real, calls = checkpoint._sync, []

    def torn(path):
        calls.extend([1] * path.name.endswith("state.safetensors"))
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:50])
            raise Killed
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", torn)
        with pytest.raises(Killed):
            run(tmp_path)
    got = run(tmp_path)
    assert got[2] == list(range(4, 12))
    assert_same_end(got, run(None))
    assert {p.name for p in tmp_path.iterdir()} == {"state.safetensors", "metrics.jsonl"}


def test_a_finished_run_is_not_repeated(tmp_path):
    want = run(tmp_path)
    got = run(tmp_path)
    assert got[2] == []
    assert_same_end(got, want)


def test_a_kill_between_the_last_state_and_its_metrics_loses_none(tmp_path):
    _, history, _ = run(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_text()
    for before in ("".join(whole.splitlines(keepends=True)[:8]), None):
        metrics.unlink() if before is None else metrics.write_text(before)
        _, again, seen = run(tmp_path)
        assert (again, seen) == (history, [])
        assert metrics.read_text() == whole


def test_a_last_state_is_saved_between_intervals(tmp_path):
    import dataclasses

    config = dataclasses.replace(CONFIG, steps=10)
    want = run(tmp_path, config)
    got = run(tmp_path, config)
    assert got[2] == []
    assert_same_end(got, want)


def test_save_every_0_writes_nothing(tmp_path):
    import dataclasses

    run(tmp_path / "work", dataclasses.replace(CONFIG, save_every=0))
    assert not list((tmp_path / "work").glob("*"))


def test_no_steps(tmp_path):
    import dataclasses

    module, history, seen = run(tmp_path, dataclasses.replace(CONFIG, steps=0))
    assert history == seen == []
    for a, b in zip(module.parameters(), make_module().parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", [{"learning_rate": 0.04}, {"seed": 4}, {"steps": 13}, {"batch_size": 2}])
def test_changed_settings_start_anew(tmp_path, change):
    import dataclasses

    with pytest.raises(Killed):
        run(tmp_path, kill_at=10)
    config = dataclasses.replace(CONFIG, **change)
    got = run(tmp_path, config)
    assert got[2] == list(range(config.steps))
    assert_same_end(got, run(None, config))


def test_changed_inputs_start_anew(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, kill_at=10, inputs={"sources": ["a"]})
    assert run(tmp_path, inputs={"sources": ["b"]})[2] == list(range(CONFIG.steps))
    assert run(tmp_path, inputs={"sources": ["b"]})[2] == []


def test_a_state_of_other_parameters_is_refused(tmp_path):
    """A state that has the right settings but not the module's tensors must not be taken for a resumed run."""
    run(tmp_path)
    file = tmp_path / "state.safetensors"
    with safe_open(str(file), framework="pt") as state:
        header = state.metadata()
    tensors = load_file(file)
    del tensors["parameter.2.weight"]
    save_file(tensors, file, metadata=header)
    with pytest.raises(ValueError, match=r"state\.safetensors.*delete it"):
        run(tmp_path)


def test_a_truncated_state_is_refused_with_what_to_do(tmp_path):
    run(tmp_path)
    file = tmp_path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged.*delete it"):
        run(tmp_path)


def test_nan_stops_and_keeps_the_last_good_state(tmp_path):
    with pytest.raises(ValueError, match=r"Test: the loss became nan .*at step 9; the state after step 8 is kept") as caught:
        run(tmp_path, nan_at=9)
    assert str(tmp_path) in str(caught.value)
    assert "learning-rate" in str(caught.value)
    assert all(t.isfinite().all() for t in load_file(tmp_path / "state.safetensors").values())
    assert_same_end(run(tmp_path), run(None))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_behind_a_good_loss_stops_too(tmp_path, value):
    module = make_module()
    good = make_step(module)

    def step(number: int) -> dict[str, float]:
        metrics = good(number)
        if number == 5:
            module[0].weight.grad[0, 0] = value
        return metrics

    with pytest.raises(ValueError, match="at step 5; the state after step 4 is kept"):
        train(module, step, CONFIG, what="Test", accelerator=Accelerator(cpu=True), work=tmp_path)
    assert_same_end(run(tmp_path), run(None))


def test_nan_without_a_work_directory():
    with pytest.raises(ValueError, match="at step 2; nothing was saved"):
        run(None, nan_at=2)


def test_the_state_is_safetensors_and_json(tmp_path):
    run(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"state.safetensors", "metrics.jsonl"}
    with safe_open(str(tmp_path / "state.safetensors"), framework="pt") as state:
        header, names = state.metadata(), set(state.keys())
    assert {n for n in names if n.startswith("parameter.")} == {f"parameter.{n}" for n in ("0.weight", "2.weight", "2.bias")}
    assert any(n.startswith("exp_avg_sq.") for n in names)
    assert len(json.loads(header["metrics"])) == CONFIG.steps
    assert json.loads(header["settings"])
    with pytest.raises((ValueError, IndexError)):
        pickletools.dis((tmp_path / "state.safetensors").read_bytes())


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read")

    with pytest.raises(Killed):
        run(tmp_path, kill_at=7)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    assert run(tmp_path)[2] == list(range(4, 12))


def test_trainable_state_holds_trainable_parameters_only():
    module = make_module()
    state = trainable_state(module)
    assert set(state) == {"0.weight", "2.weight", "2.bias"}
    assert torch.equal(state["2.weight"], module[2].weight)


def test_a_tied_weight_is_kept_once():
    module = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    module["b"].weight = module["a"].weight
    assert set(trainable_state(module)) == {"a.weight"}


_KILLED_PROCESS = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_training
from test_training import CONFIG, make_module, make_step
from accelerate import Accelerator
from rtpurbo.training import train

module = make_module()
step = make_step(module)

def slow(number):
    print(number, flush=True)
    time.sleep(0.03)
    return step(number)

train(module, slow, CONFIG, what="Test", accelerator=Accelerator(cpu=True), work=Path({work!r}))
"""


def test_resume_after_sigkill(tmp_path):
    code = _KILLED_PROCESS.format(tests=str(Path(__file__).parent), work=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "6":
            time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "state.safetensors").is_file()
    got = run(tmp_path)
    assert got[2] == list(range(4, 12))
    assert_same_end(got, run(None))


# Progress


def test_progress_lines_count_what_was_done_before(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    assert list(progress.track(iter("abc"), total=5, what="Work", done=2)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["Work: 3/5", "Work: 4/5", "Work: 5/5"]
    assert lines[-1].endswith("about 0 s left")


def test_short_work_is_silent_without_a_terminal(capsys):
    assert list(progress.track(range(3), total=3, what="Work")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "SHORT_SECONDS", 0.0)
    assert list(progress.track(range(3), total=3, what="Work")) == [0, 1, 2]
    shown = capsys.readouterr()
    assert "Work" in shown.err
    assert "3/3" in shown.err
    assert shown.out == ""


def test_the_bar_of_short_work_does_not_stay(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal to Rich, too
    monkeypatch.setenv("TERM", "xterm")
    erased = "\x1b[2K"
    assert list(progress.track(range(3), total=3, what="Work")) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "Work" in shown
    assert "Work" not in shown.split(erased)[-1]
    monkeypatch.setattr(progress, "SHORT_SECONDS", 0.0)
    assert list(progress.track(range(3), total=3, what="Work")) == [0, 1, 2]
    assert "Work" in capsys.readouterr().err.split(erased)[-1]
