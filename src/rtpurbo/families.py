"""The one table that knows where each model family keeps its attention, and which layers can be converted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from .config import LONGEST_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import SparseConfig


class Family(NamedTuple):
    """What the shared sparse forward needs to know of an architecture."""

    attention: str
    """Class name of its attention module."""
    qk_norm: bool
    """Whether query and key are normalised (modules `q_norm`, `k_norm`) before RoPE."""


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaAttention", qk_norm=False),
    "mistral": Family("MistralAttention", qk_norm=False),
    "qwen2": Family("Qwen2Attention", qk_norm=False),
    "qwen3": Family("Qwen3Attention", qk_norm=True),
    "qwen3_moe": Family("Qwen3MoeAttention", qk_norm=True),
    "gemma3_text": Family("Gemma3Attention", qk_norm=True),
}

_WHY_NOT = {
    "deepseek_v2": "multi-head latent attention has no per-head keys",
    "deepseek_v3": "multi-head latent attention has no per-head keys",
    "gpt_oss": "learned attention sinks change the softmax",
    "smollm3": "some layers have no RoPE",
    "gpt2": "it has no RoPE",
    "opt": "it has no RoPE",
    "bloom": "it has no RoPE",
    "gemma2": "attention logits are soft-capped",
}


def check_supported(model_type: str) -> None:
    """Raise ValueError, with the reason and the supported names, for an architecture outside the table."""
    if model_type not in FAMILIES:
        why = _WHY_NOT.get(model_type, "its attention is not in the table of known families")
        raise ValueError(f"Architecture {model_type!r} is not supported: {why}. Supported: {', '.join(sorted(FAMILIES))}.")


def attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Layer index -> attention module of every full-attention layer.

    Layers that already have a sliding window are left out. ValueError for an unsupported architecture, or when no
    full-attention layer is left.
    """
    config = model.config.get_text_config(decoder=True)
    check_supported(config.model_type)
    found: dict[int, nn.Module] = {}
    for module in text_attention(model):
        if not _is_sliding(module, config):
            found[module.layer_idx] = module  # type: ignore[index]
    if not found:
        raise ValueError(
            f"Nothing to convert: every layer of this {config.model_type} model already has a sliding window of "
            f"{getattr(config, 'sliding_window', None)} tokens. Choose a model with full-attention layers."
        )
    return dict(sorted(found.items()))


def text_attention(model: PreTrainedModel) -> list[nn.Module]:
    """Attention modules of all decoder layers, sliding ones too."""
    name = FAMILIES[model.config.get_text_config(decoder=True).model_type].attention
    return [module for module in model.modules() if type(module).__name__ == name]


def _is_sliding(module: nn.Module, config) -> bool:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return getattr(config, "sliding_window", None) is not None
    return layer_types[module.layer_idx] != "full_attention"  # type: ignore[index]


def head_counts(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """(layers, query heads, KV heads, head dimension) of a model."""
    config = model.config.get_text_config(decoder=True)
    module = next(iter(attention_layers(model).values()))
    return (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        int(module.head_dim),  # type: ignore[arg-type]
    )


def context_tokens(model: PreTrainedModel) -> int:
    """Longest sequence the model was made for, in tokens."""
    return int(model.config.get_text_config(decoder=True).max_position_embeddings)


def check_index_dim(sparse: SparseConfig, head_dim: int) -> None:
    """ValueError for an index wider than the heads whose queries and keys it projects."""
    if sparse.index_dim > head_dim:
        raise ValueError(f"index_dim must be at most the head dimension {head_dim}, got {sparse.index_dim}.")


def check_lengths(lengths: tuple[int, ...], context: int, sparse: SparseConfig) -> None:
    """ValueError for a document length beyond the context, or with nothing beyond window + sinks."""
    for length in lengths:
        if length > context:
            raise ValueError(f"A length of {length} tokens is beyond the model's context of {context}; ask for less.")
        if length <= sparse.window_tokens + sparse.sink_tokens:
            raise ValueError(
                f"Documents of {length} tokens are not longer than window + sinks "
                f"({sparse.window_tokens} + {sparse.sink_tokens}); use longer documents or a smaller --window-tokens."
            )


def document_length(model: PreTrainedModel, wanted: int, sparse: SparseConfig) -> int:
    """Length of training documents in tokens: `wanted`, or for 0 the context (at most 32768); checked as above."""
    context = context_tokens(model)
    length = wanted or min(context, LONGEST_TOKENS)
    check_lengths((length,), context, sparse)
    return length
