"""A small tokenizer and text for it, and a model whose retrieval head is known because it was built by hand."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rtpurbo.checkpoint import Artifact
from rtpurbo.config import SparseConfig
from rtpurbo.families import head_counts
from rtpurbo.heads import HeadMap
from rtpurbo.models import fingerprint
from rtpurbo.questions import _ADJECTIVES, _NOUNS, EVALUATION_TEMPLATE, TRAINING_TEMPLATES

FILLERS = (
    "a about after again air all also always and any around at back be because been before began between book both boy "
    "but by call came can children city come could country day did different do does each earth end even every eye face "
    "family far father feel few find first follow food form found from get girl give go good great group grow had hand"
).split()


@functools.cache
def _vocabulary() -> dict[str, int]:
    wordings = [EVALUATION_TEMPLATE, *TRAINING_TEMPLATES]
    text = " ".join(f"{t.needle} {t.one} {t.several}" for t in wordings).replace("{key}", "").replace("{value}", "")
    words = ["<unk>", "<bos>", *FILLERS, *_ADJECTIVES, *_NOUNS, *re.findall(r"\w+|[^\w\s]", text)]
    words += [f"{i:02d}" for i in range(100)] + [str(i) for i in range(10)]
    return {word: i for i, word in enumerate(dict.fromkeys(words))}


def word_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A token per word, sign or two digits; evaluation questions shrink to their key, which a bigram copier can answer."""
    core = Tokenizer(models.WordLevel(_vocabulary(), unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"What (is|are all) the special magic numbers? for [\w ]* mentioned[^\n]*\n"), ""),
            normalizers.Replace(Regex(r" (is:$|are, in this order:$)"), ""),
            normalizers.Replace(Regex(r" is: "), " "),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    if bos:
        from tokenizers import processors

        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", _vocabulary()["<bos>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<bos>")


def prose(words: int, seed: int = 0, *, sentences: int | None = None) -> str:
    """Random words, a sentence of twelve a line; `sentences`: only so many different ones, which come again and again."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(FILLERS, k=12)) for _ in range(sentences or -(-words // 12))]
    chosen = rng.choices(lines, k=-(-words // 12)) if sentences else lines
    return " ".join(" \n".join(chosen).split(" ")[:words])


@contextmanager
def text_source(folder: Path, *, words: int = 20000, sentences: int | None = None) -> Iterator[str]:
    """A source of prose; relative to the working directory, so that its name and what a seed draws from it stay the same."""
    (folder / "prose.txt").write_text(prose(words, sentences=sentences))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield "prose.txt"


def random_model(*, seed: int = 0, context: int = 512, layers: int = 2, **overrides) -> LlamaForCausalLM:
    """A random model over the words, with attention and logits far from uniform."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(_vocabulary()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": context,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
        "initializer_range": 0.25,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


_CODE, _HEAD_DIM, _HIDDEN, _THETA = 16, 64, 96, 1e6
RETRIEVAL_HEAD = (1, 2)
"""(layer, query head) of `copy_model` that looks far away; no other head matters beyond a few tokens."""


@torch.no_grad()
def copy_model(*, context: int = 512, noise: float = 0.01) -> LlamaForCausalLM:
    """A Llama that continues a pair of tokens as it was continued before, however far away; built, not trained.

    The residual stream holds the codes of the token, of the one before, of the one before that, and of the answer. In
    layer 0 heads 1 and 2 look one and two tokens back. In layer 1 head 2 looks for the place whose two previous
    tokens are the current ones, by content in RoPE's slow dimensions, and copies the token there. All other weights are
    noise.
    """
    vocabulary = len(_vocabulary())
    model = random_model(
        context=context,
        hidden_size=_HIDDEN,
        head_dim=_HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
        initializer_range=noise,
    )
    codes = _codes(vocabulary)
    token, previous, before, answer = (slice(i * _CODE, (i + 1) * _CODE) for i in range(4))
    constant, eye = 4 * _CODE, torch.eye(_CODE)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding.zero_()
    embedding[:, token], embedding[:, constant] = codes, 1.0
    head.zero_()
    head[:, answer] = 1.2 * codes  # sure enough to be right, not so sure that losing the answer changes nothing
    first, second = (layer.self_attn for layer in model.model.layers)
    for layer in model.model.layers:
        for p in layer.mlp.parameters():
            p.mul_(0.1)

    def rows(head: int, start: int = 0, count: int = _HEAD_DIM) -> slice:
        return slice(head * _HEAD_DIM + start, head * _HEAD_DIM + start + count)

    half, fast = _HEAD_DIM // 2, _HEAD_DIM // 4
    angles = _THETA ** (-torch.arange(fast) / half)
    scale = math.sqrt(_HIDDEN / 2)  # what RMSNorm makes of a unit code beside a unit constant
    strength = math.sqrt(25 * math.sqrt(_HEAD_DIM)) / scale
    for head_number, back, kv_head, target in ((1, 1, 0, previous), (2, 2, 1, before)):
        q, k = first.q_proj.weight[rows(head_number)], first.k_proj.weight[rows(kv_head)]
        for w in (q, k):
            w.zero_()
        q[:fast, constant] = strength * torch.cos(back * angles)
        q[half : half + fast, constant] = -strength * torch.sin(back * angles)
        k[:fast, constant] = strength
        first.v_proj.weight[rows(kv_head, 0, _CODE), token] = eye / scale
        first.o_proj.weight[target, rows(head_number, 0, _CODE)] = eye
    scale = math.sqrt(_HIDDEN / 4)
    strength = math.sqrt(18 * math.sqrt(_HEAD_DIM)) / scale
    q, k = second.q_proj.weight[rows(2)], second.k_proj.weight[rows(1)]
    for w, parts in ((q, (token, previous)), (k, (previous, before))):
        w.zero_()
        w[fast : fast + _CODE, parts[0]] = strength * eye
        w[half + fast : half + fast + _CODE, parts[1]] = strength * eye
    second.v_proj.weight[rows(1, 0, _CODE), token] = eye / scale
    second.o_proj.weight[answer, rows(2, 0, _CODE)] = eye
    return model.eval()


def _codes(count: int) -> Tensor:
    """[count, 16] unit vectors, pushed apart so that the closest two still differ clearly."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.nn.functional.normalize(torch.randn(count, _CODE, generator=generator), dim=-1)
    for _ in range(60):
        close = (codes @ codes.T - torch.eye(count)).clamp(min=0) ** 7
        codes = torch.nn.functional.normalize(
            codes - 0.5 * close @ codes / close.sum(-1, keepdim=True).clamp(min=1e-3), dim=-1
        )
    return codes


def artifact_for(
    model,
    retrieval: tuple[tuple[int, ...] | None, ...] = ((), (2,)),
    *,
    granularity: str = "head",
    window_tokens: int = 48,
    index_dim: int = 8,
    top_p: float = 0.9,
    min_probability: float = 0.0,
) -> Artifact:
    """A calibrated artefact of `model` with these retrieval heads; those of `copy_model` unless told otherwise."""
    heads = HeadMap(query_heads=4, kv_heads=2, granularity=granularity, retrieval=retrieval)
    base = {"name": "tiny", "revision": None, "head_dim": head_counts(model)[3], "fingerprint": fingerprint(model)}
    config = SparseConfig(
        window_tokens=window_tokens, sink_tokens=4, index_dim=index_dim, top_p=top_p, min_probability=min_probability
    )
    return Artifact(base_model=base, config=config, heads=heads)


def everything_of(model) -> dict[str, object]:
    """What a model that was lent must come back with: weights, flags, modes, hooks, attributes, settings."""
    found: dict[str, object] = {"config": model.config.to_dict(), "attention": model.config._attn_implementation}
    for name, module in model.named_modules():
        attributes = {k: repr(v) for k, v in module.__dict__.items() if not k.startswith("_") or k.startswith("_grad")}
        hooks = {k: len(v) for k, v in module.__dict__.items() if k.endswith("hooks") and v is not None}
        found[name] = (type(module), attributes, sorted(module.__dict__), hooks)
    for name, p in model.named_parameters():
        found[f"parameter {name}"] = (type(p), p.requires_grad, p.dtype, p.device, p.tolist(), p.grad is None)
    return found
