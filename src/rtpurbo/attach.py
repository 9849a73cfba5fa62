"""Lend a model the sparse forward and take it back: what `attach` changes, `detach` restores."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import IMPLEMENTATION, LayerState, Recorder, mask_interface, sparse_forward
from .config import IndexDtype, SparseConfig
from .families import FAMILIES, attention_layers, context_tokens, head_counts
from .heads import HeadMap
from .indexer import indexer_from_state

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from .checkpoint import Artifact


def is_attached(model: nn.Module) -> bool:
    """Whether `model` runs the sparse forward now."""
    return any("rtpurbo" in m.__dict__ for m in model.modules())


def attach(
    model: PreTrainedModel,
    heads: HeadMap,
    config: SparseConfig,
    indexer: nn.ModuleDict | dict[str, Tensor] | None = None,
) -> None:
    """Make `model` sparse in place, until `detach`.

    Args:
        heads: roles of the model's heads; must have the model's shape.
        config: window, sinks, p.
        indexer: trained index projections (or their tensors, as an artefact holds them); None leaves retrieval heads
            dense.

    Raises:
        ValueError: unsupported architecture, a head map of another shape or with other windows, or a model that is sparse
            already.
    """
    if is_attached(model):
        raise ValueError("This model is sparse already; detach it first.")
    modules = attention_layers(model)
    layers, query_heads, kv_heads, head_dim = head_counts(model)
    got = (len(heads.retrieval), heads.query_heads, heads.kv_heads)
    if got != (layers, query_heads, kv_heads):
        raise ValueError(
            f"The head map is for {got[0]} layers of {got[1]} query and {got[2]} KV heads; "
            f"this model has {layers} layers of {query_heads} and {kv_heads}. Calibrate this model."
        )
    if heads.layers != tuple(modules):
        mine, its = (", ".join(map(str, numbers)) for numbers in (heads.layers, modules))
        raise ValueError(
            f"The head map converts layers {mine}; this model's full-attention layers are {its}. Calibrate this model."
        )
    heads.check_windows(config.window_tokens)
    if isinstance(indexer, dict):
        indexer = indexer_from_state(indexer, heads, head_dim=head_dim, index_dim=config.index_dim)
    AttentionInterface.register(IMPLEMENTATION, sdpa_attention_forward)  # for layers left as they are
    AttentionMaskInterface.register(IMPLEMENTATION, mask_interface)
    text_config = model.config.get_text_config(decoder=True)
    qk_norm = FAMILIES[text_config.model_type].qk_norm
    for layer, module in modules.items():
        state = LayerState(layer, heads, config, qk_norm)
        module.__dict__["rtpurbo"] = state
        module.__dict__["rtpurbo_before"] = (module.__dict__.get("forward"), text_config._attn_implementation)
        module.forward = types.MethodType(sparse_forward, module)
        if indexer is not None and str(layer) in indexer:
            indexer[str(layer)].to(module.q_proj.weight.device).requires_grad_(False)  # type: ignore[union-attr,arg-type]
            module.rtpurbo_indexer = indexer[str(layer)]  # type: ignore[index]
    text_config._attn_implementation = IMPLEMENTATION


def _dense_forward(model: PreTrainedModel, module: nn.Module) -> None:
    """Put back the forward and the implementation that `attach` found."""
    forward, implementation = module.__dict__["rtpurbo_before"]
    del module.__dict__["forward"]
    if forward is not None:
        module.forward = forward
    model.config.get_text_config(decoder=True)._attn_implementation = implementation


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`; does nothing to a model that is not sparse."""
    for module in model.modules():
        if "rtpurbo" not in module.__dict__:
            continue
        _dense_forward(model, module)
        del module.__dict__["rtpurbo"], module.__dict__["rtpurbo_before"]
        module._modules.pop("rtpurbo_indexer", None)


@contextmanager
def attached(model: PreTrainedModel, heads: HeadMap, config: SparseConfig, indexer: Any = None) -> Iterator[None]:
    """`attach` for the length of a `with` block."""
    attach(model, heads, config, indexer)
    try:
        yield
    finally:
        detach(model)


@contextmanager
def paused(model: PreTrainedModel) -> Iterator[None]:
    """Run an attached model dense inside the `with` block."""
    modules = [m for m in model.modules() if "rtpurbo" in m.__dict__]
    for module in modules:
        _dense_forward(model, module)
    try:
        yield
    finally:
        for module in modules:
            module.forward = types.MethodType(sparse_forward, module)
        model.config.get_text_config(decoder=True)._attn_implementation = IMPLEMENTATION


P = ParamSpec("P")
T = TypeVar("T")
_FLAGS = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no activation checkpointing inside the `with` block; modes and gradient flags return after it."""
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    modules = [(m, {name: m.__dict__[name] for name in _FLAGS if name in m.__dict__}) for m in model.modules()]
    model.eval()
    for module, before in modules:
        if "gradient_checkpointing" in before:
            module.__dict__["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for module, before in modules:
            for name in _FLAGS:
                module.__dict__.pop(name, None)
            module.__dict__.update(before)
        for parameter, trainable in parameters:
            parameter.requires_grad_(trainable)


def gives_back(stage: Callable[P, T]) -> Callable[P, T]:
    """Decorator for stages: `borrowed` around their first argument, the model."""

    @wraps(stage)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        model: Any = args[0] if args else kwargs["model"]
        with borrowed(model):
            return stage(*args, **kwargs)

    return run


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute every decoder layer in the backward pass, until `borrowed` ends.

    The model's own switch would leave a hook on the embeddings behind, and its layers work in training mode only, where
    dropout would make steps differ; here no module inside a layer is in training mode.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = module.gradient_checkpointing = True
            module.__dict__["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)


@contextmanager
def recording(model: PreTrainedModel, recorder: Recorder) -> Iterator[None]:
    """Show `recorder` the queries and keys of every converted layer; a model that is not sparse runs dense meanwhile."""
    was_dense = not is_attached(model)
    if was_dense:
        layers, query_heads, kv_heads, _ = head_counts(model)
        dense = HeadMap.uniform(
            layers=list(attention_layers(model)),
            num_layers=layers,
            query_heads=query_heads,
            kv_heads=kv_heads,
            dense=True,
        )
        attach(model, dense, SparseConfig(window_tokens=context_tokens(model)))
    states = _states(model)
    for state in states:
        state.recorder = recorder
    try:
        yield
    finally:
        for state in states:
            state.recorder = None
        if was_dense:
            detach(model)


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """What is read inside the `with` block begins a prompt that goes on: if its end is to be read densely
    (`dense_end_tokens`), no head drops anything yet."""
    states = _states(model)
    for state in states:
        state.reading = True
    try:
        yield
    finally:
        for state in states:
            state.reading = False


def read_densely(model: nn.Module, ends: list[list[tuple[int, int]]]) -> None:
    """Until the next call, all heads read these parts of documents densely where there is no cache, as generation reads the
    end of a prompt (`dense_end_tokens`). The backward pass may compute a layer again and needs the same parts.

    Args:
        ends: for each document of the batch (first, stop) of such parts, none or more; []: no part of any.
    """
    for state in _states(model):
        state.dense_ends = ends


def dense_end_tokens(model: nn.Module) -> int:
    """Last tokens of a prompt that all heads of this model read densely; 0 for a dense model."""
    return max((state.config.dense_end_tokens for state in _states(model)), default=0)


def _states(model: nn.Module) -> list[LayerState]:
    return [m.__dict__["rtpurbo"] for m in model.modules() if "rtpurbo" in m.__dict__]


def with_adapter(model: PreTrainedModel, path: Path) -> Any:
    """A PEFT model around `model` with the LoRA adapter in `path`, in eval mode; ValueError when it is no LoRA or unfit."""
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
    from safetensors import SafetensorError

    try:
        config = PeftConfig.from_pretrained(str(path))
        if config.peft_type != "LORA":
            raise ValueError(f"got an adapter of type {config.peft_type}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path / 'adapter_config.json'} is damaged: expected the settings of a LoRA adapter ({reason}). Distil again."
        ) from error
    config.inference_mode = True
    try:
        sparse = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(model, config)
        result = sparse.load_adapter(str(path), "default", torch_device=str(model.device))
        unfit = [*result.missing_keys, *result.unexpected_keys]
        if unfit:
            raise ValueError(f"tensor {unfit[0]!r} is {'missing' if result.missing_keys else 'not in the model'}")
    except (RuntimeError, ValueError, TypeError, AttributeError, re.error, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"The adapter in {str(path)!r} does not fit the model: {reason}. Distil again.") from error
    return sparse.eval()


@contextmanager
def adapted(model: PreTrainedModel, path: Path) -> Iterator[Any]:
    """`with_adapter` for the length of a `with` block; `model` is as it was after it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    with borrowed(model):
        try:
            yield with_adapter(model, path)
        finally:
            for parent in list(model.modules()):  # PEFT's own `unload` needs a PEFT model that came to be
                for name, child in list(parent.named_children()):
                    if isinstance(child, BaseTunerLayer):
                        setattr(parent, name, child.get_base_layer())
            model.__dict__.pop("peft_config", None)


@contextmanager
def sparsify(
    model: PreTrainedModel,
    artifact: Artifact | str,
    *,
    top_p: float | None = None,
    index_dtype: IndexDtype | None = None,
    dense_below_tokens: int | None = None,
    tile_probability: float | None = None,
    dense_end_tokens: int | None = None,
) -> Iterator[Any]:
    """Borrow a model: sparse inside the `with` block, as it was after it.

    Args:
        model: the base model that the artefact was made for.
        artifact: an Artifact, a directory or a hub name.
        top_p: select by this p alone, in place of the artefact's rule.
        index_dtype: keep index keys in this, "auto" or "float8", in place of the artefact's setting.
        dense_below_tokens: while a sequence is shorter, prefill and retrieval heads are dense (`rtpurbo bench` says where
            sparse attention begins to pay on a machine); default: the artefact's setting.
        tile_probability: above 0, prefill by tiles of positions (see SparseConfig); default: the artefact's setting.
        dense_end_tokens: last tokens of a prompt that all heads read densely (see SparseConfig); default: the artefact's
            setting.

    Yields:
        The sparse model: `model` itself, or a PEFT model around it when the artefact has a LoRA adapter.

    Raises:
        ValueError: the artefact was made for other weights, or holds full weights (use `rtpurbo.load`).
    """

    from .checkpoint import Artifact, check_fingerprint

    if not isinstance(artifact, Artifact):
        artifact = Artifact.load(artifact)
    check_fingerprint(model, artifact)
    if artifact.weights_kind == "full":
        raise ValueError("This artefact holds full distilled weights; load it with rtpurbo.load instead of sparsify.")
    config = artifact.config.by_p(top_p).with_options(
        index_dtype=index_dtype,
        dense_below_tokens=dense_below_tokens,
        tile_probability=tile_probability,
        dense_end_tokens=dense_end_tokens,
    )
    lora = artifact.weights_kind == "lora"
    with (
        adapted(model, artifact.weights_path) if lora else nullcontext(model) as sparse,  # type: ignore[arg-type]
        attached(sparse, artifact.heads, config, artifact.indexer),
    ):
        yield sparse
