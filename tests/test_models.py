"""Loading a base model: what is read, what never is, and one sentence for everything that is damaged or unknown."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from rtpurbo import models
from rtpurbo.checkpoint import Artifact
from rtpurbo.config import SparseConfig
from rtpurbo.generate import load
from rtpurbo.heads import HeadMap
from rtpurbo.models import check_index, fingerprint, load_model, resolve_device, resolve_dtype
from tiny import FAMILY_NAMES, tiny_model
from tiny_text import random_model, word_tokenizer


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model().save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def directory(tmp_path, pristine) -> Path:
    """A model that may be damaged."""
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.fixture(autouse=True)
def never_unpickled(monkeypatch):
    """Whatever is loaded, nothing reaches `torch.load`."""

    def load(*args, **kwargs):
        raise AssertionError("torch.load was reached")

    monkeypatch.setattr(torch, "load", load)


def load_error(name, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(name), device="cpu", **options)
    assert "\n" not in str(caught.value)


def set_config(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def save_tensors(path: Path, tensors: dict, file: str = "model.safetensors") -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / file, metadata={"format": "pt"})


# What is loaded


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_comes_back(tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    got, _ = load_model(str(tmp_path), device="cpu")
    assert not got.training
    assert fingerprint(got) == fingerprint(model)


def test_tied_and_sharded_weights(tmp_path):
    model = random_model(tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    word_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    got, _ = load_model(str(tmp_path), device="cpu")
    assert got.lm_head.weight is got.model.embed_tokens.weight
    assert fingerprint(got) == fingerprint(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_fingerprint_is_that_of_the_weights_as_they_are_saved(pristine, dtype):
    model, _ = load_model(str(pristine), dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert fingerprint(model) == fingerprint(random_model())
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert fingerprint(model) != fingerprint(random_model())


def test_float16_is_what_transformers_loads(pristine):
    from transformers import AutoModelForCausalLM

    got, _ = load_model(str(pristine), dtype="float16", device="cpu")
    want = AutoModelForCausalLM.from_pretrained(pristine, dtype=torch.float16)
    for ours, theirs in ((got.named_parameters(), want.named_parameters()), (got.named_buffers(), want.named_buffers())):
        for (name, tensor), (_, expected) in zip(ours, theirs, strict=True):
            assert tensor.dtype == expected.dtype, name
            assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_artefact_of_a_float32_model_in_every_dtype(tmp_path, pristine, dtype):
    base = {"name": str(pristine), "head_dim": 16, "fingerprint": fingerprint(random_model())}
    heads = HeadMap.uniform(layers=[0, 1], num_layers=2, query_heads=4, kv_heads=2, dense=True)
    Artifact(base_model=base, config=SparseConfig(window_tokens=8), heads=heads).save(tmp_path / "out")
    sparse, _ = load(tmp_path / "out", dtype=dtype, device="cpu")
    assert sparse.dtype == getattr(torch, dtype)
    with torch.no_grad():
        assert sparse(torch.arange(1, 30)[None]).logits.isfinite().all()
    adapted = get_peft_model(load_model(str(pristine), dtype=dtype, device="cpu")[0], LoraConfig(target_modules=["q_proj"]))
    assert fingerprint(adapted) == base["fingerprint"]


# Options


@pytest.mark.parametrize("dtype", ["int8", "fp16", "torch.float32", ""])
def test_unknown_dtype(pristine, dtype):
    message = rf"^dtype must be one of auto, float32, bfloat16, float16, got '{dtype}'\.$"
    with pytest.raises(ValueError, match=message):
        load_model(str(pristine), dtype=dtype, device="cpu")
    with pytest.raises(ValueError, match=message):
        resolve_dtype(dtype, "cpu")


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("device", ["banana", "cuda:9", "cuda:x", "cuda:-1", "meta", "CPU", ""])
def test_unknown_device(pristine, monkeypatch, device, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    known = "auto, cpu, cuda, cuda:0, cuda:1" if gpus else "auto, cpu"
    with pytest.raises(ValueError, match=rf"^device must be one of {known} \(what PyTorch sees here\), got '{device}'\.$"):
        load_model(str(pristine), device=device)


def test_known_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [resolve_device(name) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(ValueError, match="got 'cuda'"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [resolve_device(name) for name in ("auto", "cuda")] == ["cuda:1", "cuda"]


# What is never unpickled


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_files_that_are_not_gguf(directory, file):
    torch.save({"x": torch.ones(1)}, directory / "pytorch_model.bin")
    load_error(directory / file, r"is a file, but not \*\.gguf; expected a hub name, a local directory or a GGUF file\.$")


def test_a_directory_with_pickled_weights_only(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    load_error(directory, r"has pytorch_model\.bin instead of model\.safetensors, .* convert the model to safetensors\.$")
    (directory / "pytorch_model.bin").unlink()
    load_error(directory, r"has no weights instead of model\.safetensors")


@pytest.mark.parametrize("name", ["weights.dat", "weights.bin", "weights", "../x.safetensors", "/x.safetensors", 7, None])
def test_an_index_that_names_other_files(directory, name):
    tensors = load_file(directory / "model.safetensors")
    torch.save(tensors, directory / "weights.dat")
    (directory / "model.safetensors").rename(directory / "some.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    load_error(
        directory, rf"index\.json names the weights {re.escape(repr(name))}; expected \.safetensors files beside it, nothing"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', "[" * 100_000])
def test_a_damaged_index(tmp_path, text):
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(text)
    with pytest.raises(
        ValueError, match=r"index\.json is damaged: expected JSON with the file of every tensor in weight_map"
    ):
        check_index(file)


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.dat", 7])
def test_a_config_that_names_other_weights(directory, name):
    torch.save(load_file(directory / "model.safetensors"), directory / "adapter_model.bin")
    set_config(directory, transformers_weights=name)
    load_error(directory, rf"config\.json of .* names the weights {name!r}; expected a \.safetensors file, nothing else is")


def test_an_adapter_beside_the_model(directory):
    settings = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 2, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({}, directory / "adapter_model.bin")
    load_error(directory, r"has a PEFT adapter beside it; expected a whole model: merge the adapter into it\.$")


# What is damaged


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_missing_tensor(directory, name):
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_tensors(directory, tensors)
    load_error(directory, rf"are incomplete: tensor '{re.escape(name)}' is missing\. Fetch the model again\.$")


def test_a_tensor_of_another_shape(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    save_tensors(directory, tensors)
    load_error(
        directory, r"do not fit its config\.json: expected 'model\.norm\.weight' of shape \(32,\), got \(31,\)\. Fetch the"
    )


def test_experts_that_cannot_be_put_together(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    save_tensors(tmp_path, {**tensors, name: tensors[name][:-1]})
    load_error(tmp_path, r"do not fit its config\.json: ")
    del tensors[name]
    save_tensors(tmp_path, tensors)
    load_error(tmp_path, r"do not fit its config\.json: expected 'model\.layers\.0\.mlp\.experts\.down_proj' of shape \(4, ")


@pytest.mark.parametrize("length", [0, 4, 100, 10_000, -1])
def test_truncated_weights(directory, length):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    load_error(directory, rf"^The weights of '{directory}' could not be loaded: SafetensorError: ")


def test_a_missing_shard(directory):
    names = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "b.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    load_error(directory, r"could not be loaded: .*b\.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "x"}, r"Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": [1]}, r"Field 'num_attention_heads' expected int, got list"),
        ({"num_attention_heads": 0}, r"ZeroDivisionError"),
        ({"num_attention_heads": -1}, r"do not fit its config\.json: .*negative"),
        ({"hidden_size": 7}, r"not a multiple of the number of attention heads"),
        ({"hidden_act": "nothing"}, r"KeyError: 'nothing'"),
        ({"layer_types": 3}, r"TypeError"),
        ({"dtype": "nothing"}, r"no attribute 'nothing'"),
        ({"num_hidden_layers": 5}, r"are incomplete: tensor 'model\.layers\.2\.input_layernorm\.weight' is missing"),
        ({"attention_bias": True}, r"are incomplete: tensor 'model\.layers\.0\.self_attn\.k_proj\.bias' is missing"),
        ({"vocab_size": 5}, r"expected 'lm_head\.weight' of shape \(5, 32\), got"),
    ],
)
def test_an_impossible_config(directory, changes, message):
    set_config(directory, **changes)
    load_error(directory, message)


@pytest.mark.parametrize("text", ["", "{bad", "null", "3", '{"model_type": []}', "[" * 100_000])
def test_a_damaged_config(directory, text):
    (directory / "config.json").write_text(text)
    load_error(directory, r"could not be found or read; expected a hub name, a local directory or a GGUF file \(")


@pytest.mark.parametrize("length", [0, 3, 100, 5000, 1 << 20])
def test_a_truncated_gguf_file(tmp_path, length):
    with open(models.embedded_model_file(), "rb") as stream:
        (tmp_path / "a.gguf").write_bytes(stream.read(length))
    load_error(tmp_path / "a.gguf", r"a\.gguf' could not be found or read; expected a hub name, a local directory or a GGUF")


# Code that comes with a model

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class Model(LlamaForCausalLM): pass
class Config(LlamaConfig): pass
class Words(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """make(auto class, own class, model type) -> a model that brings code, and the file that this code writes."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(auto: str, own: str, model_type: str) -> tuple[str, Path]:
        folder, marker = tmp_path / "model", tmp_path / "code-has-run"
        random_model().save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        (folder / "own.py").write_text(CODE.format(marker=str(marker)))
        if auto == "AutoTokenizer":
            change(folder / "tokenizer_config.json", auto_map={auto: [None, f"own.{own}"]})
        else:
            change(folder / "config.json", auto_map={auto: f"own.{own}"})
        change(folder / "config.json", model_type=model_type)
        return str(folder), marker

    return make


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(("auto", "own"), [("AutoModelForCausalLM", "Model"), ("AutoTokenizer", "Words")])
def test_code_of_a_model_runs_only_when_asked_for(with_code, auto, own):
    name, marker = with_code(auto, own, "llama")
    model, tokenizer = load_model(name, device="cpu")
    assert not marker.exists()
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert own not in (type(model).__name__, type(tokenizer).__name__)
    model, tokenizer = load_model(name, device="cpu", trust_remote_code=True)
    assert marker.exists()
    assert own in (type(model).__name__, type(tokenizer).__name__)


def test_code_of_an_unknown_architecture_is_refused(with_code):
    name, marker = with_code("AutoConfig", "Config", "own")
    with pytest.raises(ValueError, match=r"could not be found or read.*contains custom code"):
        load_model(name, device="cpu")
    assert not marker.exists()
    with pytest.raises(ValueError, match="is not supported"):
        load_model(name, device="cpu", trust_remote_code=True)
    assert marker.exists()
