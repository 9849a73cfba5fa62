"""An exported model: a directory like any other, which gives what its artefact gives."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import rtpurbo
import tiny_text
from rtpurbo.attach import paused
from rtpurbo.checkpoint import Artifact
from rtpurbo.export import export
from rtpurbo.models import fingerprint, model_identity
from tiny import CONFIG, HEAD_DIM, assert_same, head_map, logits, random_indexer, tiny_model, tokens

IDS = tokens(60)


def artefact(path, *, weights=None, indexed=True, family="llama", dtype=torch.float32):
    """An artefact in `path`/out of a base model in `path`/base."""
    model = tiny_model(family, dtype=dtype)
    model.save_pretrained(path / "base")
    tiny_text.word_tokenizer().save_pretrained(path / "base")
    heads = head_map(model, "group")
    kind = {}
    if weights == "lora":
        torch.manual_seed(5)
        adapted = get_peft_model(tiny_model(family), LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
        adapted.save_pretrained(path / "lora")
        kind = {"weights_kind": "lora", "weights_path": path / "lora"}
    if weights == "full":
        tiny_model(family, seed=7).save_pretrained(path / "full")
        tiny_text.word_tokenizer().save_pretrained(path / "full")
        kind = {"weights_kind": "full", "weights_path": path / "full"}
    base = model_identity(str(path / "base")) | {
        "model_type": family,
        "head_dim": HEAD_DIM,
        "fingerprint": fingerprint(model),
    }
    indexer = random_indexer(heads).state_dict() if indexed else None
    Artifact(base_model=base, config=CONFIG, heads=heads, indexer=indexer, **kind).save(path / "out")
    return path / "out"


@pytest.mark.parametrize(
    ("weights", "indexed", "family"),
    [
        (None, True, "llama"),
        ("lora", True, "llama"),
        ("full", True, "qwen3"),
        (None, False, "llama"),
        ("lora", True, "qwen3_moe"),
    ],
)
def test_it_gives_what_its_artefact_gives(tmp_path, weights, indexed, family):
    source = artefact(tmp_path, weights=weights, indexed=indexed, family=family)
    served = export(source, tmp_path / "deep" / "served")
    model, tokenizer = rtpurbo.load(served)
    want, _ = rtpurbo.load(source)
    assert torch.equal(logits(model, IDS), logits(want, IDS))
    assert tokenizer.get_vocab() == tiny_text.word_tokenizer().get_vocab()
    found, made = Artifact.load(served), Artifact.load(source)
    assert (found.heads, found.config) == (made.heads, made.config)
    assert (found.indexer is not None) == indexed


def test_its_files(tmp_path):
    source = artefact(tmp_path)
    served = export(source, tmp_path / "served")
    names = {file.name for file in served.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert len({file.stat().st_mode for file in served.iterdir()}) == 1  # whoever may read one may read all
    config = json.loads((served / "config.json").read_text())
    assert config["architectures"] == ["RTPurboLlamaForCausalLM"]
    block = config["rtpurbo"]
    assert block["base_model"]["name"] == "base"  # not the path on this machine
    assert str(tmp_path) not in (served / "config.json").read_text()
    assert block["indexer"]["file"] in names
    assert names.isdisjoint({"rtpurbo_config.json"})
    assert not list(served.parent.glob(".tmp-*"))


def test_transformers_alone_loads_the_distilled_weights_dense(tmp_path):
    source = artefact(tmp_path, weights="lora")
    served = export(source, tmp_path / "served")
    plain = AutoModelForCausalLM.from_pretrained(served)
    assert AutoTokenizer.from_pretrained(served).get_vocab()
    assert not torch.equal(logits(plain, IDS), logits(tiny_model(), IDS))
    sparse, _ = rtpurbo.load(served)
    with paused(sparse):
        assert_same(logits(sparse, IDS), logits(plain, IDS))


@pytest.mark.parametrize(
    ("base", "asked", "written"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_dtype(tmp_path, base, asked, written):
    served = export(artefact(tmp_path, dtype=base), tmp_path / "served", dtype=asked)
    assert next(AutoModelForCausalLM.from_pretrained(served, dtype="auto").parameters()).dtype == written
    assert json.loads((served / "config.json").read_text())["dtype"] == str(written).removeprefix("torch.")


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path):
    source = artefact(tmp_path)
    served = export(source, tmp_path / "served")
    (served / "left.txt").write_text("from an earlier one")
    export(source, served)
    assert not (served / "left.txt").exists()
    for other in (tmp_path / "base", source):
        with pytest.raises(ValueError, match="expected a new or empty directory, or an earlier export"):
            export(source, other)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a new or empty directory"):
        export(source, tmp_path / "file")


def test_an_export_can_be_exported(tmp_path):
    source = artefact(tmp_path, weights="lora")
    first = export(source, tmp_path / "first")
    second = export(first, tmp_path / "second")
    assert torch.equal(*(logits(rtpurbo.load(path)[0], IDS) for path in (first, second)))


def test_damage_is_noticed(tmp_path):
    served = export(artefact(tmp_path), tmp_path / "served")
    config = json.loads((served / "config.json").read_text())
    for change, message in [
        ({"format_version": 99}, "Upgrade rtpurbo"),
        ({"extra": 1}, "Unknown key 'extra'"),
        ({"heads": None}, "'heads' must be an object"),
    ]:
        (served / "config.json").write_text(json.dumps({**config, "rtpurbo": {**config["rtpurbo"], **change}}))
        with pytest.raises(ValueError, match=message):
            Artifact.load(served)
    (served / "config.json").write_text(json.dumps(config))
    next(served.glob("rtpurbo_indexer*")).write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        Artifact.load(served)


def test_a_model_without_our_section_is_no_artefact(tmp_path):
    artefact(tmp_path)
    with pytest.raises(ValueError, match="is not an artefact"):
        Artifact.load(tmp_path / "base")
