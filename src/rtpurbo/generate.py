"""Load a converted model, and generate with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .attach import attach, dense_end_tokens, reading, with_adapter
from .cache import CACHE, join
from .checkpoint import Artifact, check_digest, check_fingerprint
from .config import IndexDtype
from .models import UnreadableModel, load_model
from .progress import track


def load(
    artifact: Artifact | str | os.PathLike[str],
    *,
    top_p: float | None = None,
    index_dtype: IndexDtype | None = None,
    dense_below_tokens: int | None = None,
    tile_probability: float | None = None,
    dense_end_tokens: int | None = None,
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
        dense_end_tokens: last tokens of a prompt that all heads read densely (see SparseConfig); default: the artefact's
            setting.
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
        index_dtype=index_dtype,
        dense_below_tokens=dense_below_tokens,
        tile_probability=tile_probability,
        dense_end_tokens=dense_end_tokens,
    )
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    model, tokenizer = load_distilled(artifact, base_model=base_model, **options)
    with torch.no_grad():
        attach(model.eval(), artifact.heads, config, artifact.indexer)
    return model, tokenizer


def load_base(artifact: Artifact, base_model: str | None = None, **options: Any) -> tuple[Any, Any]:
    """The artefact's base model, dense, and its tokenizer.

    Raises:
        ValueError: it is not there, or cannot be read.
    """
    if base_model is not None:
        return load_model(base_model, **options)
    with naming_base_model():
        return load_model(artifact.base_model["name"], revision=artifact.base_model.get("revision"), **options)


@contextmanager
def naming_base_model() -> Iterator[None]:
    """Where an artefact's base model is not there, the error says how to name another place."""
    try:
        yield
    except UnreadableModel as error:
        raise UnreadableModel(
            f"The artefact's base model is not where the artefact says. {error} Say where it is with --base-model (Python: "
            "base_model): a directory, a GGUF file or a hub name."
        ) from error


def load_distilled(artifact: Artifact, *, base_model: str | None = None, **options: Any) -> tuple[Any, Any]:
    """The artefact's weights as a dense model, a LoRA adapter merged, and its tokenizer; arguments and errors of `load`."""
    if artifact.weights_kind == "full":
        assert artifact.weights_path is not None
        check_digest(artifact.weights_path)
        return load_model(str(artifact.weights_path), **options)
    model, tokenizer = load_base(artifact, base_model, **options)
    check_fingerprint(model, artifact)
    if artifact.weights_kind == "lora":
        assert artifact.weights_path is not None
        model = with_adapter(model, artifact.weights_path).merge_and_unload()
    return model, tokenizer


def chat_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one user message in the model's chat format, or of the bare text where it has none."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
    return tokenizer(text).input_ids


def end_tokens(model: Any) -> list[int]:
    """Tokens that end a text, by the model's generation config."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


PIECE_TOKENS = 2048
"""Of a long prompt that is read piece by piece."""


def pieces(model: Any, tokens: Tensor) -> list[Tensor]:
    """Prompts [B, N] in pieces of PIECE_TOKENS; the last one has all that the model reads densely (`dense_end_tokens`)."""
    first = max(0, tokens.shape[1] - max(PIECE_TOKENS, dense_end_tokens(model)))
    return [*(tokens[:, :first].split(PIECE_TOKENS, 1) if first else ()), tokens[:, first:]]


@torch.no_grad()
def read(model: Any, parts: list[Tensor], cache: DynamicCache, *, what: str | None = None, goes_on: bool = False) -> Tensor:
    """Read prompts piece by piece: the logits [B, V] after their last token.

    Args:
        parts: [B, n] int64 each, on the model's device; see `pieces`.
        what: named in a line of progress; None: no line.
        goes_on: whether the prompts have more than these parts.
    """
    for at, part in enumerate(parts if what is None else track(parts, total=len(parts), what=what)):
        with reading(model) if goes_on or at + 1 < len(parts) else nullcontext():
            logits = model(part, **{CACHE: cache}, logits_to_keep=1).logits
    return logits[:, -1]


@torch.no_grad()
def greedy(
    model: Any, prompts: list[Tensor], max_new_tokens: int, *, finished: Callable[[Tensor], bool] | None = None
) -> Tensor:
    """Continue prompts of any lengths with the most likely tokens, dense or sparse.

    Prompts are read one by one, without padding, which long ones make costly, then decoded together, as a step takes
    little longer for many sequences than for one.

    Args:
        prompts: [length] int64 each.
        finished: called with the new tokens so far [B, count] on the CPU; True ends all. Without it, and with it, all ends
            when every sequence has an end-of-text token of the model's generation config.

    Returns:
        [B, new tokens] int64 on the CPU, at most `max_new_tokens`; a sequence that has ended repeats its last token.
    """
    ends = torch.tensor(end_tokens(model), dtype=torch.long)
    caches, following = [], []
    for prompt in prompts:
        cache = DynamicCache()
        logits = model(prompt[None].to(model.device), **{CACHE: cache}, logits_to_keep=1).logits
        caches.append(cache)
        following.append(logits[:, -1].argmax(-1))
    cache, real = join(caches)
    real, token = real.to(model.device), torch.cat(following)[:, None]
    new: list[Tensor] = []
    while True:
        new.append(token.cpu() if not new else torch.where(torch.isin(new[-1], ends), new[-1], token.cpu()))
        if len(new) == max_new_tokens or bool(torch.isin(new[-1], ends).all()) or (finished and finished(torch.cat(new, 1))):
            return torch.cat(new, 1)
        real = torch.cat([real, real.new_ones(len(real), 1)], 1)
        position = real.sum(1, keepdim=True) - 1
        logits = model(token, attention_mask=real.long(), position_ids=position, **{CACHE: cache}, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
