"""The plugin itself: harmless to others, and refusing by name what it cannot do."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from served import CONFIG, UNEVEN, answers, dense_model, engine, exported, prompts, reference
from vllm import ModelRegistry
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from rtpurbo import vllm_plugin
from rtpurbo.ops import paged
from rtpurbo.vllm_plugin import compat
from rtpurbo.vllm_plugin.cache import SinkWindowManager, SinkWindowSpec
from rtpurbo.vllm_plugin.check import check_vllm


def test_registering_again_changes_nothing():
    vllm_plugin.register()
    models = list(ModelRegistry.get_supported_archs())
    vllm_plugin.register()
    assert list(ModelRegistry.get_supported_archs()) == models
    assert {f"RTPurbo{family}ForCausalLM" for family in vllm_plugin.ARCHITECTURES} <= set(models)


def test_registering_imports_nothing_of_ours_but_the_plugin():
    code = (
        "import sys; from rtpurbo.vllm_plugin import register; register();"
        "print(sorted(name for name in sys.modules if name.startswith('rtpurbo')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "['rtpurbo', 'rtpurbo.vllm_plugin']"


def test_vllms_own_caches_keep_their_managers():
    vllm_plugin.register()
    shape = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": None}
    window = SlidingWindowSpec(sliding_window=8, **shape)
    assert KVCacheSpecRegistry.get_manager_class(window) is SlidingWindowManager
    assert KVCacheSpecRegistry.get_manager_class(FullAttentionSpec(**shape)) is not None
    ours = SinkWindowSpec(sliding_window=8, sink_tokens=4, **shape)
    assert KVCacheSpecRegistry.get_manager_class(ours) is SinkWindowManager


def test_a_model_that_is_not_ours_is_left_alone(tmp_path):
    with engine(dense_model(tmp_path / "dense"), block_size=32) as llm:
        found = llm.apply_model(lambda model: [(type(m).__name__, type(m).__module__) for m in model.modules()])[0]
    assert not any("rtpurbo" in module for _, module in found)
    assert sum(name == Attention.__name__ for name, _ in found) == 3


def test_this_vllm_has_the_hooks_of_prefix_caching():
    assert compat.prefix_caching_problem(SlidingWindowManager) == ""


@pytest.mark.parametrize("name", compat._OVERRIDDEN)
def test_a_vllm_without_a_hook_would_be_noticed(name):
    changed = type("Changed", (SlidingWindowManager,), {name: lambda self, renamed: None})
    assert name in compat.prefix_caching_problem(changed)
    gone = type("Gone", (SlidingWindowManager,), {name: None})
    assert name in compat.prefix_caching_problem(gone)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("model"), UNEVEN)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"kv_cache_dtype": "fp8"}, "cannot be served with a quantised KV cache"),
        ({"disable_hybrid_kv_cache_manager": True}, "cannot be served with one cache for all layers"),
    ],
)
def test_refusals(served, asked, named):
    with pytest.raises(Exception, match=named), engine(served, **asked):
        pass


SPECULATING = """
import sys
from served import Path, engine
settings = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
with engine(Path(sys.argv[1]), speculative_config=settings):
    pass
"""


def test_speculative_decoding_is_refused(served):
    """In a process of its own, as vLLM's n-gram speculation leaves one behind in which no engine starts."""
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", SPECULATING, served], cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "cannot be served with speculative decoding" in done.stderr


def test_prefix_caching_is_refused_by_a_vllm_without_the_hooks(served, monkeypatch):
    monkeypatch.setattr(compat, "prefix_caching_problem", lambda manager: "a method is gone")
    with pytest.raises(Exception, match="a method is gone"), engine(served, enable_prefix_caching=True):
        pass


def test_missing_index_projections_are_noticed(served):
    block = json.loads((served / "config.json").read_text())["rtpurbo"]
    file = served / block["indexer"]["file"]
    file.rename(served / "elsewhere")
    try:
        with pytest.raises(Exception, match="are not among the weights; export the model again"), engine(served):
            pass
    finally:
        (served / "elsewhere").rename(file)


def test_sharded_weights(tmp_path, served):
    """vLLM reads what the index of the weights names, and so our projections must be named there."""
    from transformers import AutoModelForCausalLM

    from rtpurbo.export import _add_to_index

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(served).save_pretrained(sharded, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    block = json.loads((served / "config.json").read_text())["rtpurbo"]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", block["indexer"]["file"]):
        (sharded / name).write_bytes((served / name).read_bytes())
    tensors = [f"{layer}.{kind}" for layer in (0, 2) for kind in ("query", "key")]
    _add_to_index(sharded, block["indexer"]["file"], tensors)
    asked = prompts(17, 200)
    assert CONFIG.window_tokens < 200
    with engine(sharded) as llm:
        assert answers(llm, asked) == reference(served, asked) == reference(sharded, asked)


def test_the_doctor_serves_a_model():
    """As a user's first check does; here in this process."""
    found = check_vllm()
    assert found["vllm_passed"]
    assert float(found["vllm_largest_error"].split()[0]) < 1e-4
    assert float(found["vllm_dense_end_largest_error"].split()[0]) < 1e-4
    assert found["vllm_prefix_caching"] == "has the hooks that it needs"


def test_the_doctor_notices_other_tokens(monkeypatch):
    """Where sinks get lost in a hit, the second answers differ."""
    monkeypatch.delattr(SinkWindowManager, "add_local_computed_blocks")
    assert not check_vllm()["vllm_passed"]


def test_the_doctor_notices_an_end_that_is_read_sparsely(monkeypatch):
    right = paged.prefill
    monkeypatch.setattr(paged, "prefill", lambda *a: right(*a[:-1], dataclasses.replace(a[-1], dense_end_tokens=0)))
    found = check_vllm()
    assert not found["vllm_passed"]
    assert float(found["vllm_largest_error"].split()[0]) < 1e-4 < float(found["vllm_dense_end_largest_error"].split()[0])
