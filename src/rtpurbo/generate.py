"""Load a converted model, and generate with it."""

from __future__ import annotations

import os
from typing import Any

import torch

from .attach import attach, with_adapter
from .checkpoint import Artifact, check_digest, check_fingerprint
from .config import IndexDtype
from .models import load_model


def load(
    artifact: Artifact | str | os.PathLike[str],
    *,
    top_p: float | None = None,
    index_dtype: IndexDtype | None = None,
    dense_below_tokens: int | None = None,
    tile_probability: float | None = None,
    dtype: str = "auto",
    device: str = "auto",
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A sparse Transformers model and its tokenizer, ready for `generate`.

    Args:
        artifact: an Artifact, a directory or a hub name.
        top_p: select by this p alone, in (0, 1], in place of the artefact's rule.
        index_dtype: keep index keys in this, "auto" or "float8", in place of the artefact's setting.
        dense_below_tokens: while a sequence is shorter, prefill and retrieval heads are dense (`rtpurbo bench` says where
            sparse attention begins to pay on a machine); default: the artefact's setting.
        tile_probability: above 0, prefill by tiles of positions (see SparseConfig); default: the artefact's setting.
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", ...
        base_model: where the base model lies, when not where the artefact says.
        trust_remote_code: run code that comes with the base model; off unless asked for.

    Returns:
        (model, tokenizer); a LoRA adapter is merged into the weights.

    Raises:
        ValueError: a damaged artefact (of full weights, every byte is compared with the checksum in their name), a base
            model that is missing, or one with other weights.
    """
    if not isinstance(artifact, Artifact):
        artifact = Artifact.load(artifact)
    config = artifact.config.by_p(top_p).with_options(
        index_dtype=index_dtype, dense_below_tokens=dense_below_tokens, tile_probability=tile_probability
    )
    source = base_model or artifact.base_model["name"]
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    if artifact.weights_kind == "full":
        assert artifact.weights_path is not None
        check_digest(artifact.weights_path)
        model, tokenizer = load_model(str(artifact.weights_path), **options)
    else:
        model, tokenizer = load_model(source, revision=artifact.base_model.get("revision"), **options)
        check_fingerprint(model, artifact)
    if artifact.weights_kind == "lora":
        assert artifact.weights_path is not None
        model = with_adapter(model, artifact.weights_path).merge_and_unload()
    with torch.no_grad():
        attach(model.eval(), artifact.heads, config, artifact.indexer)
    return model, tokenizer


def chat_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one user message in the model's chat format, or of the bare text where it has none."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
    return tokenizer(text).input_ids
