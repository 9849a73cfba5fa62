"""Tiny random models of every family, head maps and indexers for them, and ways to run them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rtpurbo.cache import CACHE
from rtpurbo.config import SparseConfig
from rtpurbo.heads import HeadMap
from rtpurbo.indexer import make_indexer

FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text")
ROPE_TYPES = tuple(dict.fromkeys(("default", *ROPE_INIT_FUNCTIONS)))
"""All kinds of the installed Transformers; one that `rope_parameters` does not know yet fails every test over them."""
VOCABULARY, QUERY_HEADS, KV_HEADS, HEAD_DIM, INDEX_DIM = 97, 6, 3, 16, 8
ORIGINAL_TOKENS = 64
"""Length that scaled RoPE was made for; "dynamic" and "longrope" change all frequencies beyond it."""

CONFIG = SparseConfig(window_tokens=12, sink_tokens=4, index_dim=INDEX_DIM, top_p=0.7, min_probability=0.0)
RETRIEVAL = {
    "head": [(0, 1, 2), (), (0, 3, 5)],  # a whole and a mixed KV group; nothing; every KV group mixed
    "group": [(0, 1), (), (2, 3, 4, 5)],
}
_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}
_EXTRA = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "experts_implementation": "eager",
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 2 * HEAD_DIM,
        "tie_word_embeddings": False,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", *["full_attention"] * 3],
        "sliding_window": 10,
    },
}


def rope_parameters(kind: str) -> dict:
    """RoPE settings of one kind, for models made for ORIGINAL_TOKENS tokens."""
    extra = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL_TOKENS},
        "longrope": {
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_TOKENS,
            "short_factor": [1.0 + 0.1 * i for i in range(HEAD_DIM // 2)],
            "long_factor": [1.0 + 0.5 * i for i in range(HEAD_DIM // 2)],
        },
        "llama3": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_TOKENS,
        },
        "proportional": {"partial_rotary_factor": 0.5},
    }
    return {"rope_type": kind, "rope_theta": 1000.0, **extra[kind]}


def tiny_model(family: str = "llama", *, rope: str = "default", dtype=torch.float32, seed: int = 0, **overrides):
    """A random model in eval mode whose attention and logits are far from uniform."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": QUERY_HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": ORIGINAL_TOKENS if rope == "dynamic" else 4 * ORIGINAL_TOKENS,
        "rope_parameters": rope_parameters(rope),
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attn_implementation": "sdpa",
        **_EXTRA.get(family, {}),
        **overrides,
    }
    if family == "gemma3_text":
        full = settings["rope_parameters"]
        settings["rope_parameters"] = {"full_attention": full, "sliding_attention": rope_parameters("default")}
    config_class, model_class = (getattr(transformers, name) for name in _CLASSES[family])
    model = model_class(config_class(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                norm_weight = 1.0 if "norm" in name and family != "gemma3_text" else 0.0
                parameter.copy_(norm_weight + 0.2 * noise)
            else:
                gain = 1.0 if "embed" in name else 1.6 / math.sqrt(parameter.shape[-1])
                parameter.copy_(gain * noise)
    return model.to(dtype).eval()


@functools.cache
def shared_model(family: str = "llama", *, rope: str = "default", dtype=torch.float32):
    """`tiny_model`, built once for all tests that give it back unchanged."""
    return tiny_model(family, rope=rope, dtype=dtype)


def converted_layers(model) -> list[int]:
    """Layers with full attention."""
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return [i for i, kind in enumerate(types) if kind == "full_attention"]


def head_map(model, granularity: str = "head", retrieval: list[tuple[int, ...]] | None = None) -> HeadMap:
    """A map with every mix of roles: `retrieval` names the retrieval heads of each converted layer."""
    rows = dict(zip(converted_layers(model), retrieval or RETRIEVAL[granularity], strict=True))
    return HeadMap(
        query_heads=QUERY_HEADS,
        kv_heads=KV_HEADS,
        granularity=granularity,
        retrieval=tuple(rows.get(i) for i in range(model.config.num_hidden_layers)),
    )


def with_windows(heads: HeadMap, windows: list[int], window_tokens: int) -> HeadMap:
    """The same roles; local KV heads have these windows in turn, full ones `window_tokens`."""
    turn = itertools.cycle(windows)
    rows = [
        None
        if heads.retrieval[i] is None
        else tuple(window_tokens if g in heads.full_kv_heads(i) else next(turn) for g in range(heads.kv_heads))
        for i in range(len(heads.retrieval))
    ]
    return dataclasses.replace(heads, windows=tuple(rows))


def random_indexer(heads: HeadMap, seed: int = 1, index_dim: int = INDEX_DIM):
    """Random index projections for `heads`."""
    torch.manual_seed(seed)
    return make_indexer(heads, head_dim=HEAD_DIM, index_dim=index_dim)


def tokens(length: int, batch: int = 1, seed: int = 2) -> Tensor:
    """Random token ids [batch, length], none of them the padding token."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 2) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [len(lengths), max(lengths)]: rows of these many random tokens behind padding."""
    longest = max(lengths)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths])
    return tokens(longest, len(lengths), seed) * mask, mask


def positions(mask: Tensor) -> Tensor:
    """Position of every token in its row, as `generate` counts them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def logits(model, ids: Tensor, mask: Tensor | None = None, chunks: list[int] | None = None, cache=None) -> Tensor:
    """Logits [B, T, vocabulary], without a cache, or with one in pieces of these many tokens (the last one repeats)."""
    places = positions(mask if mask is not None else torch.ones_like(ids))
    if chunks is None:
        return model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    cache = DynamicCache(config=model.config) if cache is None else cache
    out, start, chunks = [], 0, list(chunks)
    while start < ids.shape[1]:
        stop = start + (chunks.pop(0) if len(chunks) > 1 else chunks[0])
        here = None if mask is None else mask[:, :stop]
        piece = model(
            ids[:, start:stop],
            attention_mask=here,
            position_ids=places[:, start:stop],
            **{CACHE: cache},
            use_cache=True,
        )
        out.append(piece.logits)
        start = stop
    return torch.cat(out, 1)


def assert_same(got: Tensor, want: Tensor, mask: Tensor | None = None, *, atol: float = 1e-4) -> None:
    """Equal to rounding, at real tokens; NaN nowhere, padding included."""
    assert got.isfinite().all()
    if mask is not None:
        got, want = got[mask], want[mask]
    torch.testing.assert_close(got, want, atol=atol, rtol=0)
