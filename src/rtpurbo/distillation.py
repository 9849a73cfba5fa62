"""Stage 2: self-distillation (paper, section 3.3): distill(model, tokenizer, artifact, ...) -> Artifact.

1. Documents as long as the context, half of them cut to a half or a quarter of it, so that short contexts stay as they
   were, some joined from pieces; a share of documents and pieces ends with a synthetic retrieval question.
2. Teacher: the dense model (adapter switched off, or a frozen copy when all weights are trained). Student: the sparse one,
   which reads the end of a question densely where it will do so in generation (`dense_end_tokens`).
3. Labels: random positions (those before the window is full too: training must not spoil what is not sparse) and every
   synthetic answer. Where the teacher would say something else, what it would say is the label: what it does not find,
   nobody learns from it, and how it begins an answer stays its own.
   Loss: KL between teacher and student over the teacher's top-10 tokens, the rest of the vocabulary being one more class,
   so that no mass leaks out of the ten. For answers that the teacher gives too, the cross-entropy, with a weight of their
   own: learned from text alone, the adapter forgets how to retrieve.
4. No gradient flows through the selection, and an adapter leaves queries and keys alone: what the index was trained on
   stays as it was. It adapts what comes after the attention weights, values, outputs and MLPs.
5. Held-out documents of the same mix say whether the loss fell, and its part in text; a stage that did harm to either,
   beyond chance, says so in its notes.
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from .attach import attach, checkpoint_activations, detach, gives_back, paused, read_densely
from .checkpoint import Artifact, check_fingerprint, writing
from .config import DistillConfig
from .data import documents
from .families import document_length, text_attention
from .models import public_name
from .questions import mixed_document, pieces, shorter, shortest_document, shortest_piece
from .training import prepare, stage_inputs, train, trainable_state

LORA_TARGETS = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOST_DOCUMENTS = 2048
"""Different training documents; longer runs see them again, cut and labelled otherwise."""
HELD_OUT_DOCUMENTS = 8
"""Documents that judge the stage, at least one of every source; as many as training ones where these are fewer."""
LONGEST_JOINER = 16
"""Tokens between two answers, at most, if they belong to one list."""
LABELS_PER_PIECE = 256
"""Labels whose logits are in float32 at a time."""


def top_kl(student: Tensor, teacher: Tensor, top: int) -> Tensor:
    """KL(teacher || student) in nats over the teacher's `top` tokens and one class for the rest.

    Args:
        student, teacher: [labels, vocabulary] logits.

    Returns:
        [labels] float32
    """
    log_teacher, places = teacher.float().log_softmax(-1).topk(min(top, teacher.shape[-1] - 1), -1)
    log_student = student.float().log_softmax(-1).gather(-1, places)
    kl = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    rest_teacher, rest_student = (_log_rest(x) for x in (log_teacher, log_student))
    return kl + rest_teacher.exp() * (rest_teacher - rest_student)


def _log_rest(log_top: Tensor) -> Tensor:
    """log(1 - sum(exp(log_top))), safe where the top classes hold nearly everything."""
    return torch.log1p(-log_top.exp().sum(-1).clamp(max=1 - 1e-6))


def label_losses(student: Tensor, teacher: Tensor, expected: Tensor, top: int) -> Tensor:
    """What every label loses: `top_kl`, or the cross-entropy where it is an answer.

    In pieces that the backward pass computes again where there are many labels: each float32 copy of the logits of 2048
    labels takes a gigabyte with a vocabulary of 128K, and there would be five.

    Args:
        student, teacher: [labels, vocabulary] logits.
        expected: [labels] the token of an answer, -1 for other labels.

    Returns:
        [labels] float32
    """

    def losses(student: Tensor, teacher: Tensor, expected: Tensor) -> Tensor:
        nll = F.cross_entropy(student.float(), expected, ignore_index=-1, reduction="none")
        return top_kl(student, teacher, top).where(expected < 0, nll)

    if len(expected) <= LABELS_PER_PIECE:
        return losses(student, teacher, expected)
    pieces = zip(*(part.split(LABELS_PER_PIECE) for part in (student, teacher, expected)), strict=True)
    return torch.cat([checkpoint(losses, *piece, use_reentrant=False) for piece in pieces])


def training_batch(
    texts: list[Tensor],
    tokenizer: Any,
    config: DistillConfig,
    *,
    step: int,
    first: int,
    shortest_tokens: int,
    dense_end_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[list[tuple[int, int]]]]:
    """What one forward pass learns from. A document's part does not depend on which others it is batched with.

    Args:
        texts: documents of one length.
        step: decides the length that all are cut to, and the labels.
        first: number of the first document in the whole run, which decides its question.
        dense_end_tokens: how much of a piece that ends with a question is read densely.

    Returns:
        tokens [B, length]; the positions [labels] whose next token is a label of some document; their weights
        [B, labels], 0 for another document's answers, 1 in sum for each document; [B, labels] the token of an answer,
        -1 where the label is none of this document's answers; for each document the parts (first, stop) to read
        densely: the end of what is before a piece's answer, as if it were a prompt of its own.
    """
    rows: list[Tensor] = []
    answers: list[set[int]] = []
    between: list[set[int]] = []
    ends: list[list[tuple[int, int]]] = []
    for number, text in enumerate(texts, start=first):
        text = shorter(text, shortest_tokens=shortest_tokens, rng=random.Random(f"{config.seed}:cut:{step}")).clone()
        cuts = random.Random(f"{config.seed}:pieces:{number}")
        begin, places, joiners = 0, set[int](), set[int]()
        ends.append([])
        for i, piece in enumerate(pieces(text, shortest_tokens=shortest_piece(shortest_tokens), rng=cuts)):
            seed = f"{config.seed}:{number}:{i}"
            mixed, asked, prompt = mixed_document(piece, tokenizer, retrieval_ratio=config.retrieval_ratio, seed=seed)
            text[begin : begin + len(piece)] = mixed
            places.update(begin + t for t in asked)
            if prompt and dense_end_tokens:
                ends[-1].append((begin + max(0, prompt - dense_end_tokens), begin + prompt))
            for t, later in pairwise([*asked, len(text)] if asked else []):  # how a list goes on, and how it ends, is the
                joiners.update(begin + k for k in range(t + 1, later if later - t <= LONGEST_JOINER else t + 2))  # teacher's
            begin += len(piece)
        rows.append(text)
        answers.append(places)
        between.append(joiners - places)
    length = len(rows[0])
    body = set(random.Random(f"{config.seed}:labels:{step}").sample(range(length - 1), min(config.labels, length - 1)))
    labels = sorted(body.union(*answers, *between))
    weights, expected = [], []
    for row, its, more in zip(rows, answers, between, strict=True):
        others = (body | more) - its
        share = config.answer_weight if its and others else float(bool(its))
        of_answer, of_other = share / max(1, len(its)), (1 - share) / max(1, len(others))
        weights.append([of_answer if t in its else of_other if t in others else 0.0 for t in labels])
        expected.append([int(row[t + 1]) if t in its else -1 for t in labels])
    return torch.stack(rows), torch.tensor(labels), torch.tensor(weights), torch.tensor(expected), ends


@gives_back
def distill(
    model: Any,
    tokenizer: Any,
    artifact: Artifact,
    sources: list[str] | tuple[str, ...],
    config: DistillConfig | None = None,
    *,
    work: Path | None = None,
    accelerator: Any = None,
) -> Artifact:
    """Train the sparse model to match its dense self.

    Args:
        model: the artefact's base model, dense; given back unchanged.
        work: directory for states, metrics and the distilled weights; default: a temporary one for the weights only.
        accelerator: an accelerate.Accelerator, with a FullyShardedDataParallelPlugin(fsdp_version=2) to shard what is
            trained; default: one made here. Leave its mixed precision at "no": on GPUs bfloat16 is switched on here.

    Returns:
        The artefact with distilled weights and this stage's metrics.

    Raises:
        ValueError: an artefact without indexer or for other weights, documents not longer than the window or beyond the
            context, too little text, several processes without `work`, or a loss that became NaN.
    """
    from accelerate import Accelerator

    config = config or DistillConfig()
    accelerator = accelerator or Accelerator(cpu=model.device.type == "cpu")
    if artifact.indexer is None:
        raise ValueError("This artefact has no indexer yet; run stage 1 (`rtpurbo train-indexer`) before distillation.")
    if work is None and accelerator.num_processes > 1:
        raise ValueError("Several processes need a directory `work`, the same for all of them.")
    check_fingerprint(model, artifact)
    length = document_length(model, config.length_tokens, artifact.config)
    shortest_tokens = shortest_document(config, artifact.config, length, tokenizer)
    dense_end = artifact.config.dense_end_tokens
    total = config.steps * config.batch_size * accelerator.num_processes
    count = max(1, min(total, MOST_DOCUMENTS))
    judges = min(count, max(HELD_OUT_DOCUMENTS, len(sources)))
    texts = documents(sources, tokenizer, length_tokens=length, count=count + judges, seed=config.seed + 1)
    texts, held_out = texts[:count], texts[count:]
    torch.manual_seed(config.seed)
    sharded = accelerator.num_processes > 1 and accelerator.is_fsdp2  # in place, so never the caller's model
    student = _student(copy.deepcopy(model) if sharded else model, config)
    try:
        with torch.no_grad():
            attach(student, artifact.heads, artifact.config, artifact.indexer)
        if config.gradient_checkpointing:
            checkpoint_activations(student)
        prepared = prepare(student, accelerator)
        device = next(prepared.parameters()).device
        world, rank = accelerator.num_processes, accelerator.process_index

        def compare(some: list[Tensor], step: int, first: int) -> dict[str, Tensor]:
            """Means of a batch: the loss, its part without answers ("text_kl"), and the share of labels on which teacher
            and student prefer the same token."""
            *batch, ends = training_batch(
                some, tokenizer, config, step=step, first=first, shortest_tokens=shortest_tokens,
                dense_end_tokens=dense_end,
            )  # fmt: skip
            tokens, labels, weights, expected = (part.to(device) for part in batch)
            want = _teach(model, student, prepared, config, tokens, labels)
            read_densely(student, ends)
            counted = weights > 0
            text = counted & (expected < 0)
            expected = expected.where(want.argmax(-1) == expected, -1)  # else the teacher's own word is the label
            with _autocast(device):
                got = prepared(input_ids=tokens, logits_to_keep=labels, use_cache=False).logits
            same = (got.argmax(-1) == want.argmax(-1)) & counted
            losses = label_losses(got.flatten(0, 1), want.flatten(0, 1), expected.flatten(), config.top_logits)
            losses = losses.view_as(weights)
            return {
                "loss": (losses * weights).sum() / len(some),
                "text_kl": ((losses.detach() * text).sum(-1) / text.sum(-1).clamp(min=1)).mean(),
                "top1_agreement": (same.sum(-1) / counted.sum(-1)).mean(),
            }

        @torch.no_grad()
        def on_held_out() -> dict[str, list[float]]:
            """Values on the held-out documents, one each; every process sees the same ones."""
            found = [compare([text], -1 - i, -1 - i) for i, text in enumerate(held_out)]
            for module in prepared.modules():
                if isinstance(module, FSDPModule):  # it may leave weights whole, which no optimiser may see
                    module.reshard()
            return {name: [float(row[name]) for row in found] for name in found[0]}

        def step(number: int) -> dict[str, float]:
            first = (number * world + rank) * config.batch_size
            found = compare([texts[i % len(texts)] for i in range(first, first + config.batch_size)], number, first)
            accelerator.backward(found["loss"])
            found["loss"] = found["loss"].detach()
            if world > 1:
                found = {name: accelerator.reduce(value, reduction="mean") for name, value in found.items()}
            return {name: float(value) for name, value in found.items()}

        before = on_held_out() if config.steps else {}
        history = train(
            prepared,
            step,
            config,
            what="Stage 2: distilling",
            accelerator=accelerator,
            work=work,
            inputs=stage_inputs(artifact, sources) | ({"question_ends": "dense"} if dense_end else {}),  # or an older state
        )
        after = on_held_out() if config.steps else {}
        if config.weights == "lora":  # what the artefact calls its base, not where it lies on this machine
            student.peft_config["default"].base_model_name_or_path = public_name(artifact.base_model["name"])
        weights = _write_weights(student, prepared, tokenizer, config, work, accelerator.is_main_process)
        accelerator.wait_for_everyone()
    finally:
        detach(student)
        if config.weights == "lora" and not sharded:
            student.unload()
            model.__dict__.pop("peft_config", None)
        if accelerator.num_processes > 1:
            accelerator.free_memory()  # it would keep what it prepared
    metrics: dict[str, Any] = {}
    if history:
        tail = history[-max(1, len(history) // 10) :]
        metrics = {
            f"held_out_{name}_{when}": fmean(row[name])
            for name in before
            for when, row in (("before", before), ("after", after))
        }
        for name in before:
            metrics |= {f"{name}_first": history[0][name], f"{name}_last": sum(r[name] for r in tail) / len(tail)}
        metrics["notes"] = [
            f"Distillation did harm: {what} on held-out documents {fmean(before[name]):.3g} -> {fmean(after[name]):.3g}. "
            "Use a lower --learning-rate, more documents a step, or the artefact without this stage."
            for name, what in (("loss", "loss against the dense model"), ("text_kl", "KL from the dense model in text"))
            if _rose(before[name], after[name])
        ]
    return artifact.with_stage("distill", config, metrics, weights_kind=config.weights, weights_path=weights)


def _rose(before: list[float], after: list[float]) -> bool:
    """Whether the mean rose by more than two standard errors of the documents' differences; of one document: at all."""
    changes = [b - a for a, b in zip(before, after, strict=True)]
    error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
    return fmean(changes) > 2 * error


def _autocast(device: torch.device):
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def _student(model: Any, config: DistillConfig) -> Any:
    """The model to train: a LoRA adapter around `model`, or a float32 copy of it."""
    if config.weights == "full":
        return copy.deepcopy(model).float().requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    rank = config.lora_rank
    targets: list[str] = list(LORA_TARGETS)
    other_towers = model.config.get_text_config(decoder=True) is not model.config  # they may use the same names
    if other_towers or config.lora_layers < 1:
        ours = {id(module) for module in text_attention(model)}
        layers = [name.rpartition(".")[0] + "." for name, module in model.named_modules() if id(module) in ours]
        layers = layers[: math.ceil(config.lora_layers * len(layers))]
        names = [name for name, _ in model.named_modules() if name.endswith(LORA_TARGETS)]
        targets = [name for name in names if name.startswith(tuple(layers))]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


@torch.no_grad()
def _teach(model: Any, student: Any, prepared: Any, config: DistillConfig, tokens: Tensor, labels: Tensor) -> Tensor:
    """Dense logits [B, labels, vocabulary]; with LoRA from the student's own weights, adapter off and attention dense."""
    if config.weights == "full":
        here = model.device
        return model(input_ids=tokens.to(here), logits_to_keep=labels.to(here), use_cache=False).logits.to(tokens.device)
    with student.disable_adapter(), paused(student), _autocast(tokens.device):
        return prepared(input_ids=tokens, logits_to_keep=labels, use_cache=False).logits


def _write_weights(
    student: Any, prepared: Any, tokenizer: Any, config: DistillConfig, work: Path | None, main: bool
) -> Path:
    """Save the trained weights as bfloat16 safetensors; the directory that holds them."""
    state = {name: t.to(torch.bfloat16) for name, t in trainable_state(prepared).items()}
    target = Path(tempfile.mkdtemp(prefix="rtpurbo-")) if work is None else work / config.weights
    if not main:
        return target
    options = {"save_embedding_layers": False} if config.weights == "lora" else {}  # PEFT would ask the hub about them
    with writing(target):
        student.save_pretrained(target, state_dict=state, **options)
    (target / "README.md").unlink(missing_ok=True)  # PEFT's card template; the artefact has its own
    if config.weights == "full":
        tokenizer.save_pretrained(target)
    return target
