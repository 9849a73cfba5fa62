"""The model card, and what goes to the hub and comes from there (no network: the hub's client is replaced)."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import save_file

from rtpurbo.checkpoint import Artifact
from rtpurbo.config import CalibrateConfig, DistillConfig, IndexerConfig, SparseConfig
from rtpurbo.evals.statistics import paired
from rtpurbo.heads import HeadMap
from rtpurbo.indexer import make_indexer
from rtpurbo.model_card import HEADER, model_card
from rtpurbo.models import EMBEDDED

HEADS = HeadMap(query_heads=4, kv_heads=2, granularity="head", retrieval=((0,), (3,)))
CONFIG = SparseConfig(window_tokens=64, index_dim=4, top_p=0.85)


def make_artifact(name: str = "owner/Tiny-Model", **changes) -> Artifact:
    base = {"name": name, "revision": None, "model_type": "llama", "head_dim": 8, "fingerprint": "ab" * 32}
    return dataclasses.replace(Artifact(base_model=base, config=CONFIG, heads=HEADS), **changes)


def calibrated(**metrics) -> Artifact:
    return make_artifact().with_stage("calibrate", CalibrateConfig(), {"scores": [[0.1] * 4] * 2, **metrics})


def with_indexer(artifact: Artifact) -> Artifact:
    units = [
        {"layer": layer, "unit": 0, "kl": 0.2, "mass_kept": 0.97, "far_selected_ratio": 0.1, "tokens_selected": 12.4}
        for layer in (0, 1)
    ]
    means = {"kl": 0.2, "mass_kept": 0.97, "far_selected_ratio": 0.1, "tokens_selected": 12.4}
    metrics = {**means, "length_tokens": 256, "documents": 4, "units": units}
    tensors = make_indexer(HEADS, head_dim=8, index_dim=4).state_dict()
    return artifact.with_stage("train_indexer", IndexerConfig(), metrics, indexer=tensors)


def with_adapter(artifact: Artifact, folder: Path) -> Artifact:
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    return artifact.with_stage("distill", DistillConfig(), {}, weights_kind="lora", weights_path=folder)


def needle(**changes) -> dict:
    result = {"kind": "multi_key", "length_tokens": 2048, **paired([1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]), "depths": {}}
    return {"needle": [{**result, **changes}]}


def front_matter(card: str) -> dict:
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front)


def table(card: str) -> list[list[str]]:
    """Rows of the measured table, its head and rule included."""
    lines = [line for line in card.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_front_matter_parses():
    assert front_matter(model_card(make_artifact())) == {
        "base_model": "owner/Tiny-Model",
        "library_name": "rtpurbo",
        "pipeline_tag": "text-generation",
        "tags": ["rtpurbo", "sparse-attention", "long-context", "kv-cache"],
    }


@pytest.mark.parametrize("name", ['a: "b"\n---\nlicense: mit', "{x: [1]}", "größe/模型-🦙", "#", "- 'x'", "yes", "1.0"])
def test_front_matter_holds_any_name(name):
    found = front_matter(model_card(make_artifact(name)))
    assert found["base_model"] == name
    assert "license" not in found


def test_embedded_model_has_its_name_on_the_hub():
    found = front_matter(model_card(make_artifact(EMBEDDED)))
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_no_directory_of_this_machine_in_the_card(tmp_path):
    artifact = with_adapter(with_indexer(make_artifact(str(tmp_path / "my-model"))), tmp_path / "adapter")
    artifact.stages["distill"]["sources"] = ["/data/private/books.txt", "owner/set"]
    loss = {**paired([3.0, 2.0], [3.1, 2.0]), "length_tokens": 512, "kl": 0.01, "top1_agreement": 0.9, "by_position": []}
    evaluation = {"loss": {"/data/private/books.txt": loss}, "settings": {}, "sources": ["/data/private/books.txt"]}
    card = model_card(artifact, evaluation)
    assert str(tmp_path) not in card
    assert "private" not in card
    assert "base_model" not in front_matter(card)
    assert "# my-model, sparse with RTPurbo" in card
    assert 'rtpurbo.load("OWNER/NAME", base_model="path/to/it")' in card
    assert "books.txt, 512 tokens" in card


def test_table_has_only_what_was_measured():
    card = model_card(make_artifact())
    assert table(card) == []
    assert "Nothing has been measured yet." in card
    assert "Evaluation has not been run: `rtpurbo eval` adds it." in card
    check = {"length_tokens": 1024, "samples": 8, "dense": 1.0, "chosen_heads": 0.875}
    card = model_card(with_indexer(calibrated(check=check)))
    assert table(card)[0] == list(HEADER)
    assert table(card)[2:] == [
        ["Attention mass recalled, index, 256 tokens", "–", "97.0%", "–", "4 documents"],
        ["Far tokens selected per query, index, 256 tokens", "–", "12, 10.0%", "–", "4 documents"],
        ["Answers right, check of the head map without index, 1,024 tokens", "100.0%", "87.5%", "−12.5 points", "8"],
    ]
    assert "Nothing has been measured" not in card


def test_table_of_an_evaluation():
    evaluation = needle()
    low, high = evaluation["needle"][0]["difference_95"]
    card = model_card(make_artifact(), evaluation)
    interval = f"[{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", "−")
    assert table(card)[2:] == [
        ["Answers right, multi-key needle, 2,048 tokens", "75.0%", "50.0%", rf"−25.0 points \{interval[:-1]}\]", "4"]
    ]
    assert "Evaluation has not been run" not in card
    assert "95 % interval" in card
    said = "The sparse model read the last 1,280 tokens of a prompt densely."
    for end in (None, 1280):
        card = model_card(make_artifact(), {**evaluation, "settings": {"dense_end_tokens": end}})
        assert (said in card) == (end is not None)


def test_no_interval_from_one_sample():
    card = model_card(make_artifact(), needle(**paired([1.0], [0.0])))
    assert table(card)[2][3] == "−100.0 points"


def test_speed_of_one_and_of_several_lengths():
    dense = {"length_tokens": 4096.0, "prefill_seconds": 2.0, "decode_tokens_per_second": 10.0, "cache_bytes": 3.0 * 2**30}
    sparse = {**dense, "decode_tokens_per_second": 30.0, "cache_bytes": 0.75 * 2**30}
    one = model_card(make_artifact(), {"speed": {"dense": dense, "sparse": sparse}})
    assert table(one)[2:] == [
        ["Cache, 4,096 tokens", "3.00 GiB", "768.0 MiB", "0.25 × dense", "1 run"],
        ["Prefill, 4,096 tokens", "2.000 s", "2.000 s", "1.00 × dense", "1 run"],
        ["Decode, 4,096 tokens", "10.0 tokens/s", "30.0 tokens/s", "3.00 × dense", "1 run"],
    ]
    short = {**dense, "length_tokens": 2048.0}
    several = model_card(make_artifact(), {"speed": {"dense": [dense, short], "sparse": [sparse]}})
    assert table(several) == table(one)  # a length without its pair compares nothing


def test_harness_tasks():
    result = {"task": "arc_easy", "metric": "acc", "higher_is_better": True, **paired([1.0, 0.0], [1.0, 0.0])}
    worse = {**result, "metric": "ppl", "higher_is_better": False, **paired([8.0, 8.0], [8.5, 8.5]), "prompts_cut": 1}
    card = model_card(make_artifact(), {"tasks": {"lm_eval": "0.4.13", "results": [result, worse]}})
    assert table(card)[2:] == [
        ["arc\\_easy, acc", "0.5000", "0.5000", r"+0.0000 \[+0.0000, +0.0000\]", "2"],
        [r"arc\_easy, ppl \(lower is better\), 1 prompts cut", "8.0000", "8.5000", r"+0.5000 \[+0.5000, +0.5000\]", "2"],
    ]
    with pytest.raises(ValueError, match=r"'higher_is_better': expected true or false, got '1'"):
        model_card(make_artifact(), {"tasks": {"results": [{**result, "higher_is_better": 1}]}})


def test_short_context_and_long_generation():
    pair = paired([2.0, 3.0], [2.5, 3.5])
    squad = {"samples": 2, **{key: {"sparse": paired([1.0, 1.0], [1.0, 1.0])} for key in ("contains", "f1")}}
    documents = {"/data/private/books.txt": {"length_tokens": 2048, "sparse": {**pair, "kl": 0.1, "top1_agreement": 0.9}}}
    texts = {"dense": {"repetition": 0.01, "loss": 2.5}, "sparse": {"repetition": 0.5, "loss": 3.0}}
    long = {"prompts": 2, "prompt_tokens": 900, "tokens": 100, "loss": pair, "drift": [], **texts}
    evaluation = {"short": {"documents": documents, "squad": squad}, "long_generation": long}
    half = r"+0.5000 \[+0.5000, +0.5000\]"
    assert table(model_card(make_artifact(), evaluation))[2:] == [
        ["Loss in nats at short context, books.txt, 2,048 tokens", "2.5000", "3.0000", half, "2"],
        ["SQuAD, replies with the answer", "100.0%", "100.0%", r"+0.0 points \[+0.0, +0.0\]", "2"],
        ["SQuAD, F1 of the words", "100.0%", "100.0%", r"+0.0 points \[+0.0, +0.0\]", "2"],
        ["Dense model's loss in nats on 100 tokens generated after 900 tokens", "2.5000", "3.0000", half, "2"],
        ["Repeated pieces of 8 tokens among 100 tokens generated after 900 tokens", "1.0%", "50.0%", "–", "2"],
    ]
    with pytest.raises(ValueError, match=r"'long_generation'.*expected the key 'drift'"):
        model_card(make_artifact(), {"long_generation": {k: v for k, v in long.items() if k != "drift"}})


def test_text_is_escaped():
    evil = "<img src=x>|`[a](b)*"
    artifact = make_artifact(evil)
    artifact.stages[evil] = {"settings": {evil: evil}, "metrics": {}}
    card = model_card(artifact, needle(kind=evil))
    body = card.split("---\n", 2)[2]
    assert "<img" not in re.sub(r"\\.", "", body)
    assert len(table(card)[2]) == len(HEADER)


def test_card_says_what_it_is():
    card = model_card(with_indexer(calibrated()))
    for part in (
        'rtpurbo.load("OWNER/NAME")',
        "rtpurbo generate OWNER/NAME",
        "arXiv:2605.16928",
        "Y. Zhou et al.",
        "Full Attention Strikes Back: Transferring Full Attention into Sparse within Hundred Training Steps",
        "The license of the base model applies",
        "a window of 64 tokens and 4\nsinks",
        "head map: 25.0% of the query heads retrieve, 50.0% of the KV heads keep their whole cache",
        "index: selects far tokens with p = 0.85",
        "distilled weights: none yet",
        "**Calibration**: granularity = auto",
        "Distillation has not been run: `rtpurbo distill` adds it.",
    ):
        assert part in card, part
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    assert code[1].count("\n") == 3
    compile(code[1], "card", "exec")


def test_full_weights_need_no_base_model():
    artifact = make_artifact("/data/model", weights_kind="full")
    card = model_card(artifact)
    assert 'rtpurbo.load("OWNER/NAME")' in card
    assert "distilled weights: a whole model" in card


def test_malformed_input_is_refused():
    with pytest.raises(ValueError, match=r"the evaluation, 'needle', entry 0.*expected a finite number, got 'many'.*eval"):
        model_card(make_artifact(), needle(dense="many"))
    with pytest.raises(ValueError, match=r"the artefact, stages.*expected the key 'scores'.*Convert again"):
        model_card(make_artifact().with_stage("calibrate", CalibrateConfig(), {}))
    with pytest.raises(ValueError, match=r"the artefact, base model.*expected the key 'name', got no key"):
        model_card(make_artifact(base_model={}))


class FakeHub:
    """In place of `HfApi`: keeps what would be uploaded."""

    def __init__(self, token=None):
        FakeHub.calls, self.token = [], token

    def create_repo(self, repo_id, **options):
        FakeHub.calls.append(("create_repo", repo_id, options, self.token))
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        files = {str(p.relative_to(folder_path)): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}
        FakeHub.calls.append(("upload_folder", repo_id, files, commit_message))


def test_push_uploads_artefact_and_card(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    artifact = with_adapter(with_indexer(calibrated()), tmp_path / "adapter")
    assert artifact.push_to_hub("me/sparse", private=True, token="secret") == "https://hub.example/me/sparse"
    created, uploaded = FakeHub.calls
    assert created == ("create_repo", "me/sparse", {"private": True, "exist_ok": True}, "secret")
    assert uploaded[:2] == ("upload_folder", "me/sparse")
    files = uploaded[2]
    raw = json.loads(files["rtpurbo_config.json"])
    weights = raw["weights"]["directory"]
    assert set(files) == {
        "README.md",
        "rtpurbo_config.json",
        raw["indexer"]["file"],
        f"{weights}/adapter_model.safetensors",
        f"{weights}/adapter_config.json",
    }
    assert files["README.md"].decode() == model_card(artifact)
    assert not [name for name, content in files.items() if b"secret" in content]


def test_push_names_no_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    artifact = with_indexer(calibrated())
    path = str(tmp_path / "somebody" / "my-model")
    dataclasses.replace(artifact, base_model={**artifact.base_model, "name": path}).push_to_hub("me/sparse")
    files = FakeHub.calls[1][2]
    assert json.loads(files["rtpurbo_config.json"])["base_model"]["name"] == "my-model"
    assert not [name for name, content in files.items() if b"somebody" in content]


def test_load_by_hub_name(tmp_path, monkeypatch):
    artifact = with_adapter(with_indexer(calibrated()), tmp_path / "adapter")
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    artifact.push_to_hub("me/sparse")
    asked = []

    def snapshot_download(repo_id, *, revision=None):
        asked.append((repo_id, revision))
        for name, content in FakeHub.calls[1][2].items():
            path = tmp_path / "cache" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    found = Artifact.load("me/sparse", revision="v1")
    assert asked == [("me/sparse", "v1")]
    assert (found.base_model, found.config, found.heads) == (artifact.base_model, artifact.config, artifact.heads)
    assert found.indexer is not None
    assert artifact.indexer is not None
    torch.testing.assert_close(found.indexer, artifact.indexer)
    assert found.weights_kind == "lora"
    assert found.weights_path is not None
    assert (found.weights_path / "adapter_config.json").read_text() == "{}"


def test_load_by_a_hub_name_that_is_not_there(tmp_path, monkeypatch):
    def unreachable(repo_id, *, revision=None):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'me/sparse' is neither a local artefact nor a hub repository.*Check the name"):
        Artifact.load("me/sparse")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(ValueError, match=r"is not an artefact: it has no rtpurbo_config.json"):
        Artifact.load("me/sparse")
