"""Both stages on two CPU processes over gloo: plain data parallelism, and the student sharded by FSDP2.

Accelerate takes an FSDP plugin for accelerators only; on CPUs it falls back to plain data parallelism. PyTorch's FSDP2
itself works over gloo, so the workers here tell Accelerate's state that it is in use, and from there on everything is
the code that runs on GPUs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rtpurbo import cli, distillation
from rtpurbo.checkpoint import Artifact
from rtpurbo.config import DistillConfig, IndexerConfig
from rtpurbo.distillation import distill, top_kl
from rtpurbo.indexer_training import train_indexer
from rtpurbo.training import prepare
from tiny_text import artifact_for, everything_of, prose, random_model, word_tokenizer

WORLD = 2
KINDS = ("ddp", "fsdp")
WHAT = ("lora", "full", "tied", "questions")
"""An adapter, all weights, all weights of a model with tied embeddings, an adapter by questions whose ends are dense."""


def index_config(**changes) -> IndexerConfig:
    settings = {"steps": 5, "length_tokens": 96, "queries": 16, "documents": 5, "learning_rate": 3e-3, "save_every": 2}
    return IndexerConfig(retrieval_ratio=0.0, **{**settings, **changes})


def distill_config(what: str, **changes) -> DistillConfig:
    """Of one of WHAT."""
    settings = {
        "weights": {"tied": "full", "questions": "lora"}.get(what, what),
        "retrieval_ratio": 0.0,
        "steps": 4,
        "batch_size": 1,
        "length_tokens": 96,
        "labels": 24,
        "lora_rank": 4,
        "learning_rate": 1e-3,
        "save_every": 2,
    }
    if what == "questions":
        settings |= {"length_tokens": 256, "retrieval_ratio": 1.0, "answer_weight": 0.5}
    return DistillConfig(**settings | changes)


def with_dense_ends(artifact: Artifact) -> Artifact:
    return dataclasses.replace(artifact, config=artifact.config.with_options(dense_end_tokens=20))


def calibrated(model) -> Artifact:
    return artifact_for(model, ((1,), (0,)), window_tokens=16, top_p=0.8)


class Killed(Exception):
    pass


def worker(folder: Path) -> None:
    """What each process runs; findings go to `folder`, works to a directory per process (only rank 0 may write there)."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    os.chdir(folder)
    tokenizer, sharing = word_tokenizer(), []

    def accelerator(kind: str) -> Accelerator:
        AcceleratorState._reset_state()
        made = Accelerator(cpu=True)
        if kind == "fsdp":
            made.state.distributed_type = DistributedType.FSDP
            made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
            )
        assert made.num_processes == WORLD
        return made

    def watching(module, made):
        prepared = prepare(module, made)
        held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in prepared.parameters())
        sharing.append((type(prepared).__name__, held / sum(p.numel() for p in prepared.parameters())))
        return prepared

    distillation.prepare = watching
    found: dict[str, object] = {}
    model = random_model()
    before = everything_of(model)
    made = accelerator("ddp")
    own = Path(f"rank{made.process_index}")
    start = calibrated(model)
    indexed = train_indexer(model, tokenizer, start, ["prose.txt"], index_config(), work=own / "stage1", accelerator=made)
    if made.is_main_process:
        indexed.save("indexed")
    found["indexer"] = {name: t.tolist() for name, t in indexed.indexer.items()}
    tied = random_model(tie_word_embeddings=True)
    tied_made = train_indexer(tied, tokenizer, calibrated(tied), ["prose.txt"], index_config(steps=0), accelerator=made)
    for kind in KINDS:
        for weights in WHAT:
            made = accelerator(kind)
            base, artifact = (tied, tied_made) if weights == "tied" else (model, indexed)
            artifact = with_dense_ends(artifact) if weights == "questions" else artifact
            config = distill_config(weights)
            done = distill(base, tokenizer, artifact, ["prose.txt"], config, work=own / kind / weights, accelerator=made)
            if made.is_main_process:
                done.save(f"{kind}-{weights}")
            found[f"{kind}-{weights}"] = {"sharing": sharing[-1], "metrics": done.stages["distill"]["metrics"]}
    calls = []

    def killing(*args):
        calls.extend([1] * torch.is_grad_enabled())  # not the held-out documents
        if len(calls) == 4:
            raise Killed
        return top_kl(*args)

    config, options = distill_config("full"), {"work": Path("shared"), "accelerator": accelerator("fsdp")}
    distillation.top_kl = killing
    try:
        distill(model, tokenizer, indexed, ["prose.txt"], config, **options)
    except Killed:
        found["killed"] = True
    calls.clear()
    distillation.top_kl = lambda *args: calls.extend([1] * torch.is_grad_enabled()) or top_kl(*args)
    resumed = distill(model, tokenizer, indexed, ["prose.txt"], config, **options)
    if made.is_main_process:
        resumed.save("resumed")
    found["steps after the kill"] = len(calls)
    found["model unchanged"] = everything_of(model) == before
    found["files"] = sorted(str(p.relative_to(own)) for p in own.rglob("*") if p.is_file())
    Path(f"found{made.process_index}.json").write_text(json.dumps(found))
    made.wait_for_everyone()
    torch.distributed.destroy_process_group()


def launch(path: Path, command: list[str]) -> None:
    """Run a Python command in two processes that know of each other, from directory `path`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared["MKL_CBWR"] = "COMPATIBLE"  # else MKL's last bit depends on where a tensor lies in memory
    running = []
    for rank in range(WORLD):
        env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (path / f"log{rank}.txt").open("w") as log:
            running.append(
                subprocess.Popen([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, env=env, cwd=path)
            )
    try:
        for rank, process in enumerate(running):
            assert process.wait(timeout=240) == 0, (path / f"log{rank}.txt").read_text()[-3000:]
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Directory in which two processes have run `worker`."""
    path = tmp_path_factory.mktemp("distributed")
    (path / "prose.txt").write_text(prose(20000))
    launch(path, [__file__, str(path)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def found(folder) -> list[dict]:
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def single(folder):
    """(model, artefact after stage 1) of one process that sees both documents of a step."""
    model = random_model()
    made = calibrated(model)
    return model, train_indexer(model, word_tokenizer(), made, ["prose.txt"], index_config(batch_size=WORLD))


def history(work: Path) -> list[dict]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def weights_of(artifact: Artifact) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(artifact.weights_path.glob("*.safetensors")) for k, t in load_file(file).items()}


def test_stage_1_is_that_of_one_process(folder, found, single):
    _, want = single
    got = Artifact.load(folder / "indexed")
    for name, t in want.indexer.items():
        torch.testing.assert_close(got.indexer[name], t, atol=1e-5, rtol=1e-4)
    a, b = (x.stages["train_indexer"]["metrics"] for x in (got, want))
    assert a["loss_last"] == pytest.approx(b["loss_last"], rel=1e-4)
    assert a["kl"] == pytest.approx(b["kl"], rel=1e-4)


def test_processes_end_with_the_same_index(found):
    assert found[0]["indexer"] == found[1]["indexer"]
    for kind in KINDS:
        for weights in WHAT:
            assert found[0][f"{kind}-{weights}"]["metrics"] == found[1][f"{kind}-{weights}"]["metrics"]


@pytest.mark.parametrize("weights", WHAT)
@pytest.mark.parametrize("kind", KINDS)
def test_stage_2_is_that_of_one_process(folder, single, tmp_path, kind, weights):
    model, indexed = single
    if weights == "tied":
        model = random_model(tie_word_embeddings=True)
        indexed = train_indexer(model, word_tokenizer(), calibrated(model), ["prose.txt"], index_config(steps=0))
    if weights == "questions":
        indexed = with_dense_ends(indexed)
    config = distill_config(weights, batch_size=WORLD)
    want = distill(model, word_tokenizer(), indexed, ["prose.txt"], config, work=tmp_path)
    got = Artifact.load(folder / f"{kind}-{weights}")
    for a, b in zip(history(folder / "rank0" / kind / weights), history(tmp_path), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    start = dict(model.named_parameters())
    state = load_file(folder / "rank0" / kind / weights / "state.safetensors")
    for name, t in load_file(tmp_path / "state.safetensors").items():
        torch.testing.assert_close(state[name], t, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        if name.startswith("parameter.") and weights in ("full", "tied"):
            assert not torch.equal(t, start[name.removeprefix("parameter.")])
    mine, theirs = weights_of(got), weights_of(want)
    assert mine.keys() == theirs.keys()
    for name, t in theirs.items():
        torch.testing.assert_close(mine[name], t, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("weights", ["lora", "full", "tied"])
def test_what_is_trained_is_shared_out(found, weights):
    for rank in range(WORLD):
        name, held = found[rank][f"ddp-{weights}"]["sharing"]
        assert (name, held) == ("DistributedDataParallel", 1.0)
        name, held = found[rank][f"fsdp-{weights}"]["sharing"]
        assert name.startswith("FSDP")
        assert 0.4 < held < 0.6


def test_only_the_first_process_writes(found):
    assert found[1]["files"] == []
    for kind in KINDS:
        for name in ("state.safetensors", "metrics.jsonl"):
            assert f"{kind}/full/{name}" in found[0]["files"]
    assert "stage1/state.safetensors" in found[0]["files"]


def test_a_sharded_run_that_was_killed_goes_on_bitwise(folder, found):
    for rank in range(WORLD):
        assert found[rank]["killed"]
        assert found[rank]["steps after the kill"] == 2
    want, got = (load_file(folder / path / "state.safetensors") for path in ("rank0/fsdp/full", "shared"))
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    a, b = (weights_of(Artifact.load(folder / name)) for name in ("resumed", "fsdp-full"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_commands_run_in_two_processes(single, tmp_path):
    """What `accelerate launch -m rtpurbo.cli` runs: both stages, saved by one process, as one process would do it."""
    model, indexed = single
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prose.txt").write_text(prose(20000))
    base = {**indexed.base_model, "name": str(tmp_path / "model")}
    dataclasses.replace(indexed, base_model=base, indexer=None, stages={}).save(tmp_path / "start")
    common = ["--sources", "prose.txt", "--length-tokens", "96", "--retrieval-ratio", "0", "--device", "cpu", "--steps", "3"]
    first = ["train-indexer", "start", "--documents", "4", "--queries", "16", *common]
    second = ["distill", "--labels", "24", "--lora-rank", "4", "--learning-rate", "1.5e-4", *common]
    module = ["-m", "rtpurbo.cli"]
    launch(tmp_path, [*module, *first, "-o", "two"])
    launch(tmp_path, [*module, *second, "two", "--batch-size", "1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert cli.main([*first, "-o", "one", "--batch-size", "2"]) == 0
        assert cli.main([*second, "one", "--batch-size", "2"]) == 0
    one, two = (Artifact.load(tmp_path / name) for name in ("one", "two"))
    assert {p.name.split(".")[0] for p in (tmp_path / "two").iterdir()} == {
        "rtpurbo_config", "rtpurbo_indexer", "lora", "metrics",
    }  # fmt: skip
    for name, t in one.indexer.items():
        torch.testing.assert_close(two.indexer[name], t, atol=1e-5, rtol=1e-4)
    for key, value in one.stages["distill"]["metrics"].items():
        assert two.stages["distill"]["metrics"][key] == pytest.approx(value, rel=1e-3), key


def test_the_model_comes_back_unsharded_and_unchanged(found):
    assert all(f["model unchanged"] for f in found)


def test_the_first_version_of_fsdp_is_refused():
    accelerator = SimpleNamespace(num_processes=2, is_fsdp2=False, distributed_type="FSDP")
    with pytest.raises(ValueError, match="fsdp_version=2"):
        prepare(torch.nn.Linear(2, 2), accelerator)


def test_several_processes_need_a_shared_directory(single):
    model, indexed = single
    with pytest.raises(ValueError, match="directory `work`"):
        distill(model, None, indexed, ["prose.txt"], accelerator=SimpleNamespace(num_processes=2))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
