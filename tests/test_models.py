"""Loading a model: code that comes with one runs only when that was asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

from rtpurbo.models import load_model
from tiny_text import random_model, word_tokenizer

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
