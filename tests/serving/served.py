"""Tiny random models exported for vLLM, the tokens that Transformers gives for them, and vLLM engines to compare with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rtpurbo
from rtpurbo.checkpoint import Artifact
from rtpurbo.config import SparseConfig
from rtpurbo.export import export
from rtpurbo.heads import HeadMap
from rtpurbo.indexer import make_indexer
from rtpurbo.models import fingerprint, model_identity

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny import tiny_model

HEAD_DIM, VOCABULARY, CONTEXT, PAGE = 32, 97, 512, 16
CONFIG = SparseConfig(window_tokens=40, sink_tokens=4, index_dim=16, top_p=0.6, min_probability=0.0)
UNEVEN = [(0, 1), (), (0, 1, 4, 5)]
"""Whole KV groups: one, none and two of three."""
HEADS = [(0, 3), (2,), ()]
"""Single query heads: in two groups, in one, in none."""
NEW = 16


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per word, as many as the models know."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")


def dense_model(path: Path, family: str = "llama", **settings: Any) -> Path:
    """A random model of 3 layers with 6 query and 3 KV heads, saved."""
    shape = {"hidden_size": 96, "head_dim": HEAD_DIM, "max_position_embeddings": CONTEXT, **settings}
    model = tiny_model(family, **shape)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def exported(
    path: Path, retrieval: list[tuple[int, ...]], *, family: str = "llama", granularity: str = "group", windows=None,
    config: SparseConfig = CONFIG, indexed: bool = True, **settings: Any,
) -> Path:  # fmt: skip
    """A random model with random index projections, exported to `path`/served; its artefact lies in `path`/out."""
    dense = dense_model(path / "dense", family, **settings)
    model, _ = rtpurbo.models.load_model(str(dense))
    counts = model.config
    heads = HeadMap(
        query_heads=counts.num_attention_heads, kv_heads=counts.num_key_value_heads, granularity=granularity,
        retrieval=tuple(retrieval), windows=windows,
    )  # fmt: skip
    torch.manual_seed(1)
    indexer = make_indexer(heads, head_dim=HEAD_DIM, index_dim=config.index_dim).state_dict() if indexed else None
    base = model_identity(str(dense)) | {"model_type": family, "head_dim": HEAD_DIM, "fingerprint": fingerprint(model)}
    Artifact(base_model=base, config=config, heads=heads, indexer=indexer).save(path / "out")
    return export(path / "out", path / "served")


def prompts(*lengths: int) -> list[list[int]]:
    """Random prompts of these lengths."""
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]


@torch.no_grad()
def reference(source: Path, asked: list[list[int]], new: int = NEW, **options: Any) -> list[list[int]]:
    """Greedy continuations by Transformers, each prompt alone; sparse where `source` is an artefact."""
    if rtpurbo.checkpoint.is_artifact(source):
        model, _ = rtpurbo.load(source, **options)
    else:
        model, _ = rtpurbo.models.load_model(str(source))
    out = []
    for one in asked:
        ids = torch.tensor([one])
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        out.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(one) :].tolist())
    return out


@contextmanager
def engine(path: Path, **settings: Any) -> Iterator[Any]:
    """vLLM's offline engine in this process, until the end of the `with` block."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32", "max_model_len": CONTEXT, "max_num_batched_tokens": 2 * CONTEXT, "enforce_eager": True,
        "block_size": PAGE, "enable_prefix_caching": False, "disable_log_stats": False, "seed": 0, "max_num_seqs": 8,
        "num_gpu_blocks_override": 1024,
    }  # fmt: skip
    llm = LLM(str(path), **(defaults | settings))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def answers(llm: Any, asked: list[list[int]], new: int = NEW) -> list[list[int]]:
    """Greedy continuations by vLLM, all prompts in one batch."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    out = llm.generate([{"prompt_token_ids": one} for one in asked], settings, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in out]


def counter(llm: Any, name: str) -> int:
    """One of vLLM's metrics."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def managers(llm: Any) -> list[Any]:
    """vLLM's managers of blocks, one for each cache group."""
    return list(llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers)
