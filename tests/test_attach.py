"""What `attach` changes, `detach` restores; what cannot be converted is refused by name."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from oracle import oracle
from rtpurbo.attach import attach, attached, checkpoint_activations, detach, is_attached, paused, recording, sparsify
from rtpurbo.checkpoint import Artifact
from rtpurbo.config import SparseConfig
from rtpurbo.families import FAMILIES, attention_layers, check_supported
from rtpurbo.heads import HeadMap
from rtpurbo.models import fingerprint
from tiny import (
    CONFIG,
    FAMILY_NAMES,
    assert_same,
    head_map,
    logits,
    random_indexer,
    shared_model,
    tiny_model,
    tokens,
    with_windows,
)


def frozen(value):
    """Something comparable that changes when `value` is replaced or, for dicts, when its content is."""
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, (int, float, str, bool, tuple, list, type(None))):
        return repr(value)
    return id(value)


def snapshot(model) -> dict:
    """Everything about a model that attach might touch: attributes of every module, configs, weights and flags."""
    state = {f"module {name}": (id(m), frozen(m.__dict__)) for name, m in model.named_modules(remove_duplicate=False)}
    state["config"] = frozen(model.config.__dict__)
    state["config as text"] = model.config.to_json_string()
    state["generation config"] = frozen(model.generation_config.__dict__)
    state["weights"] = {name: (t.data_ptr(), t._version) for name, t in model.state_dict().items()}
    state["gradients"] = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    return state


def assert_unchanged(model, before: dict) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert [key for key in after if after[key] != before[key]] == []


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_detach_restores_everything(family, implementation):
    model = tiny_model(family, attn_implementation=implementation)
    ids = tokens(40)
    want, before = logits(model, ids), snapshot(model)
    heads = head_map(model)
    for _ in range(2):  # and it can be done again
        attach(model, heads, CONFIG, random_indexer(heads))
        assert is_attached(model)
        assert not torch.equal(logits(model, ids), want)
        assert snapshot(model) != before
        detach(model)
        assert not is_attached(model)
        assert_unchanged(model, before)
        assert torch.equal(logits(model, ids), want)
    assert model.config._attn_implementation == implementation


def test_detach_of_a_dense_model_does_nothing():
    model = shared_model("llama")
    before = snapshot(model)
    detach(model)
    assert_unchanged(model, before)


def test_an_exception_inside_the_block_restores_everything():
    model = tiny_model("llama", attn_implementation="eager")
    heads = head_map(model)
    before = snapshot(model)

    def fail():
        with attached(model, heads, CONFIG, random_indexer(heads)):
            logits(model, tokens(40))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert_unchanged(model, before)


def test_a_forward_set_by_others_is_restored():
    """Accelerate's hooks, for example, put a `forward` of their own on the module."""
    model = tiny_model("llama")
    module = model.model.layers[0].self_attn
    plain = module.forward
    calls = []

    def hooked(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    module.forward = hooked
    with attached(model, head_map(model), CONFIG):
        logits(model, tokens(30))
        assert not calls
    assert module.__dict__["forward"] is hooked
    logits(model, tokens(30))
    assert len(calls) == 1


def test_paused_restores_the_sparse_model_after_an_exception():
    model = tiny_model("llama")
    heads = head_map(model)
    dense = logits(model, tokens(40))
    with attached(model, heads, CONFIG, random_indexer(heads)):
        before, sparse = snapshot(model).keys(), logits(model, tokens(40))

        def fail():
            with paused(model):
                assert torch.equal(logits(model, tokens(40)), dense)
                raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"):
            fail()
        assert snapshot(model).keys() == before
        assert torch.equal(logits(model, tokens(40)), sparse)
    assert torch.equal(logits(model, tokens(40)), dense)


def test_recording_shows_every_converted_layer():
    model = tiny_model("gemma3_text")
    ids = tokens(40)
    before, want = snapshot(model), logits(model, ids)
    seen = []
    with recording(model, seen.append):
        got = logits(model, ids)
    assert torch.equal(got, want)  # dense meanwhile
    assert_unchanged(model, before)
    assert [o.layer for o in seen] == [1, 2, 3]
    for o in seen:
        assert o.q.shape == o.q_pre.shape == (1, 6, 40, 16)
        assert o.k.shape == o.k_pre.shape == (1, 3, 40, 16)
        assert o.scaling == model.model.layers[1].self_attn.scaling
        assert torch.equal(o.q[:, :, 0], o.q_pre[:, :, 0])  # position 0 is not rotated
        assert not torch.equal(o.q[:, :, 1], o.q_pre[:, :, 1])
    logits(model, ids)
    assert len(seen) == 3

    heads = head_map(model)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        with recording(model, seen.append):
            logits(model, ids)
        logits(model, ids)
        assert len(seen) == 6
        assert is_attached(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_float32_weights_under_autocast_attend_in_bfloat16(family):
    """So that training all weights on a GPU takes the kernels, which have no float32."""
    model, seen = shared_model(family), []
    heads = head_map(model)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with attached(model, heads, CONFIG, random_indexer(heads)), recording(model, seen.append), autocast:
        logits(model, tokens(40))
    assert {x.dtype for o in seen for x in (o.q, o.k, o.v)} == {torch.bfloat16}


def run_python(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_loads_nothing():
    loaded = run_python(
        "import sys, json, rtpurbo; dir(rtpurbo); rtpurbo.SparseConfig; rtpurbo.HeadMap;"
        "print(json.dumps([m for m in ('torch', 'transformers', 'peft', 'datasets', 'accelerate') if m in sys.modules]))"
    )
    assert loaded == []


def test_import_registers_nothing():
    changed = run_python(
        """
import importlib, json, pkgutil
import transformers
from transformers import cache_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
def state():
    return {
        "attention": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "masks": sorted(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
        "cache layers": sorted(map(str, cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.items())),
        "dynamic cache": sorted(map(str, vars(cache_utils.DynamicCache).items())),
        "llama": sorted(map(str, vars(modeling_llama.LlamaAttention).items())),
        "generate": str(transformers.GenerationMixin.generate),
        "models": len(MODEL_FOR_CAUSAL_LM_MAPPING),
    }
before = state()
import rtpurbo
for name in ("attach", "attention", "cache", "checkpoint", "config", "families", "heads", "indexer", "models", "ops"):
    importlib.import_module("rtpurbo." + name)
print(json.dumps([key for key, value in state().items() if value != before[key]]))
"""
    )
    assert changed == []


def test_sliding_layers_are_left_as_they_are():
    model = tiny_model("gemma3_text")
    ids = tokens(60)
    outputs = []
    sliding = model.model.layers[0].self_attn
    handle = sliding.register_forward_hook(lambda m, inputs, out: outputs.append(out[0]))
    logits(model, ids)
    heads = head_map(model)
    assert heads.layers == (1, 2, 3)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        assert "forward" not in sliding.__dict__
        assert "rtpurbo" not in sliding.__dict__
        logits(model, ids)
        logits(model, ids, chunks=[25, 1])
    handle.remove()
    assert torch.equal(outputs[0], outputs[1])
    assert_same(torch.cat(outputs[2:], 1), outputs[0])


def test_a_model_with_some_sliding_layers():
    types = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny_model("qwen2", dtype=torch.float64, use_sliding_window=True, sliding_window=9, layer_types=types)
    assert list(attention_layers(model)) == [0, 2]
    heads = head_map(model, retrieval=[(0, 1), (5,)])
    indexer = random_indexer(heads)
    with oracle(model, heads, CONFIG, indexer):
        want = logits(model, tokens(60))
    with attached(model, heads, CONFIG, indexer):
        assert_same(logits(model, tokens(60)), want)
        assert_same(logits(model, tokens(60), chunks=[30, 1]), want)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}),
    ],
)
def test_nothing_but_sliding_layers_is_refused(family, overrides):
    model = tiny_model(family, **overrides)
    message = (
        rf"Nothing to convert: every layer of this {family} model already has a sliding window of 8 tokens\. "
        r"Choose a model with full-attention layers\."
    )
    with pytest.raises(ValueError, match=message):
        attention_layers(model)
    with pytest.raises(ValueError, match="Nothing to convert"):
        attach(model, HeadMap(query_heads=6, kv_heads=3, granularity="head", retrieval=((), (), ())), CONFIG)


def test_unsupported_architectures_are_refused_by_name():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    supported = "gemma3_text, llama, mistral, qwen2, qwen3, qwen3_moe"
    with pytest.raises(ValueError, match=rf"'gpt2' is not supported: it has no RoPE\. Supported: {supported}\."):
        attach(model, HeadMap(query_heads=2, kv_heads=2, granularity="head", retrieval=((),)), CONFIG)
    for name, why in [
        ("deepseek_v3", "multi-head latent attention"),
        ("gpt_oss", "attention sinks"),
        ("smollm3", "no RoPE"),
        ("gemma2", "soft-capped"),
        ("phi3", "not in the table of known families"),
    ]:
        with pytest.raises(ValueError, match=rf"'{name}' is not supported: .*{why}.*Supported: {supported}"):
            check_supported(name)
    for name in FAMILIES:
        check_supported(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"retrieval": ((),) * 2},
            r"head map is for 2 layers of 6 query and 3 KV heads; this model has 3 layers of 6 and 3",
        ),
        ({"query_heads": 3, "retrieval": ((),) * 3}, r"for 3 layers of 3 query and 3 KV heads; .* Calibrate this model"),
        ({"kv_heads": 2}, r"for 3 layers of 6 query and 2 KV heads; this model has 3 layers of 6 and 3"),
        ({"retrieval": ((), None, ())}, r"head map converts layers 0, 2; this model's full-attention layers are 0, 1, 2"),
    ],
)
def test_head_map_of_another_model_is_refused(change, message):
    model = tiny_model("llama")
    before = snapshot(model)
    values = {"query_heads": 6, "kv_heads": 3, "granularity": "head", "retrieval": ((), (), ()), **change}
    with pytest.raises(ValueError, match=message):
        attach(model, HeadMap(**values), CONFIG)
    assert_unchanged(model, before)


def test_a_window_ladder_of_other_settings_is_refused():
    model = tiny_model("llama")
    before = snapshot(model)
    heads = with_windows(head_map(model), [5], CONFIG.window_tokens)
    with attached(model, heads, CONFIG):
        pass
    with pytest.raises(ValueError, match=r"windows\[0\] of full KV head 0 must be window_tokens \(13\), got 12\."):
        attach(model, heads, dataclasses.replace(CONFIG, window_tokens=13))
    assert_unchanged(model, before)


def test_attaching_twice_is_refused():
    model = shared_model("llama")
    heads = head_map(model)
    with attached(model, heads, CONFIG):
        with pytest.raises(ValueError, match=r"This model is sparse already; detach it first\."):
            attach(model, heads, CONFIG)
        assert is_attached(model)
    assert not is_attached(model)


def test_indexer_of_another_head_map_is_refused():
    model = tiny_model("llama")
    before = snapshot(model)
    state = random_indexer(head_map(model, "group")).state_dict()
    with pytest.raises(ValueError, match=r"does not fit the head map: tensor '0\.key' should be \(3, 8, 16\), is \(1, 8"):
        attach(model, head_map(model), CONFIG, state)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=r"index_dim must be at most the head dimension 16, got 32"):
        attach(model, head_map(model), SparseConfig(index_dim=32), state)
    assert_unchanged(model, before)


def test_indexer_as_tensors_or_modules_is_the_same():
    model = shared_model("llama")
    heads = head_map(model)
    indexer = random_indexer(heads)
    results = []
    for given in (indexer, dict(indexer.state_dict())):
        with attached(model, heads, CONFIG, given):
            results.append(logits(model, tokens(50)))
    assert torch.equal(*results)


def make_artifact(model, **changes) -> Artifact:
    heads = head_map(model)
    values = {
        "base_model": {"name": "tiny", "head_dim": model.config.head_dim, "fingerprint": fingerprint(model)},
        "config": CONFIG,
        "heads": heads,
        "indexer": {name: t.detach() for name, t in random_indexer(heads).state_dict().items()},
        **changes,
    }
    return Artifact(**values)


def save_lora(directory, **overrides):
    """A LoRA adapter for the tiny llama that changes its outputs; returns (directory, dense model with it merged)."""
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny_model("llama", **overrides), config)
    adapted.save_pretrained(str(directory))
    return directory, adapted.merge_and_unload()


def test_sparsify_with_lora_gives_the_model_back(tmp_path):
    path, merged = save_lora(tmp_path / "lora")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "inference_mode": False}))
    model = tiny_model("llama")
    model.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[1].eval()
    ids = tokens(50)
    model_before, want = snapshot(model), None
    artifact = make_artifact(model, weights_kind="lora", weights_path=path)
    heads = head_map(model)
    with attached(merged, heads, CONFIG, artifact.indexer):
        want = logits(merged, ids)
    with sparsify(model, artifact) as sparse:
        assert sparse is not model
        assert not sparse.training
        assert not any(p.requires_grad for p in sparse.parameters())
        assert_same(logits(sparse, ids), want)
        assert is_attached(sparse)
    assert_unchanged(model, model_before)
    assert not hasattr(model, "peft_config")
    with pytest.raises(RuntimeError, match="inside"), sparsify(model, artifact):
        raise RuntimeError("inside")
    assert_unchanged(model, model_before)


@pytest.mark.parametrize("hooked", [False, True])
def test_sparsify_with_lora_while_activations_are_checkpointed(tmp_path, hooked):
    path, _ = save_lora(tmp_path / "lora")
    model = tiny_model("llama")
    checkpoint_activations(model)
    if hooked:
        model.enable_input_require_grads()
    before = snapshot(model)
    with sparsify(model, make_artifact(model, weights_kind="lora", weights_path=path)) as sparse:
        logits(sparse, tokens(30))
    assert_unchanged(model, before)


def test_sparsify_with_an_adapter_that_does_not_fit(tmp_path):
    path, _ = save_lora(tmp_path / "lora", hidden_size=96)
    model = tiny_model("llama")
    before = snapshot(model)
    with (
        pytest.raises(ValueError, match=r"adapter in '.*lora' does not fit the model: .*size mismatch.* Distil again\."),
        sparsify(model, make_artifact(model, weights_kind="lora", weights_path=path)),
    ):
        pass
    assert_unchanged(model, before)
    save_lora(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "input_layernorm"]  # the first is replaced before the second is refused
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
    artifact = make_artifact(model, weights_kind="lora", weights_path=tmp_path / "other")
    with pytest.raises(ValueError, match=r"does not fit the model: .*LlamaRMSNorm"), sparsify(model, artifact):
        pass
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{}", ""),
        ("[]", ""),
        ("null", ""),
        ("{bad", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ({"peft_type": "NOTHING"}, "NOTHING"),
        ({"peft_type": "PROMPT_TUNING"}, ""),
        ({"peft_type": "IA3"}, ""),
        ({"peft_type": []}, ""),
        ({"task_type": "NOTHING"}, "NOTHING"),
    ],
)
def test_settings_that_are_not_of_a_lora_adapter(tmp_path, text, reason):
    path, _ = save_lora(tmp_path / "lora")
    file = path / "adapter_config.json"
    file.write_text(text if isinstance(text, str) else json.dumps({**json.loads(file.read_text()), **text}))
    model = tiny_model("llama")
    before = snapshot(model)
    message = (
        rf"lora/adapter_config\.json is damaged: expected the settings of a LoRA adapter \(.*{reason}.*\)\. Distil again\.$"
    )
    artifact = make_artifact(model, weights_kind="lora", weights_path=path)
    with pytest.raises(ValueError, match=message) as caught, sparsify(model, artifact):
        pass
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "change", [{"r": "x"}, {"r": 3.5}, {"lora_alpha": None}, {"target_modules": [5]}, {"target_modules": "["}, {}]
)
def test_an_adapter_with_impossible_values(tmp_path, change):
    """Or, without a change of its settings, with a truncated file."""
    path, _ = save_lora(tmp_path / "lora")
    file, tensors = path / "adapter_config.json", path / "adapter_model.safetensors"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    if not change:
        tensors.write_bytes(tensors.read_bytes()[:-1])
    model = tiny_model("llama")
    before = snapshot(model)
    artifact = make_artifact(model, weights_kind="lora", weights_path=path)
    with (
        pytest.raises(ValueError, match=r"adapter in '.*lora' does not fit the model: .+ Distil again"),
        sparsify(model, artifact),
    ):
        pass
    assert_unchanged(model, before)


def test_sparsify_with_an_indexer_that_does_not_fit(tmp_path):
    path, _ = save_lora(tmp_path / "lora")
    model = tiny_model("llama")
    before = snapshot(model)
    wrong = {name: t.detach() for name, t in random_indexer(head_map(model, "group")).state_dict().items()}
    for changes in ({}, {"weights_kind": "lora", "weights_path": path}):
        with (
            pytest.raises(ValueError, match="does not fit the head map"),
            sparsify(model, make_artifact(model, indexer=wrong, **changes)),
        ):
            pass
        assert_unchanged(model, before)


def test_sparsify_refuses_other_weights_and_full_weights(tmp_path):
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"made for other weights: expected tiny with fingerprint \w{12}, got a model with"):
        sparsify(model, make_artifact(other)).__enter__()
    full = make_artifact(model, weights_kind="full", weights_path=tmp_path)
    with pytest.raises(ValueError, match=r"full distilled weights; load it with rtpurbo\.load instead of sparsify"):
        sparsify(model, full).__enter__()
    assert_unchanged(model, before)


def test_sparsify_takes_a_directory(tmp_path):
    model = tiny_model("llama")
    make_artifact(model).save(tmp_path / "out")
    heads = head_map(model)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        want = logits(model, tokens(50))
    with sparsify(model, str(tmp_path / "out")) as sparse:
        assert torch.equal(logits(sparse, tokens(50)), want)
