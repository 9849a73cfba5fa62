"""The artefact: what a conversion leaves behind, in one small directory.

`rtpurbo_config.json` is the whole truth: it names the files that belong to it, by content, so that replacing it is
the one atomic moment of a save. Every prefix of the pipeline is a valid artefact: head map alone, head map + indexer,
head map + indexer + distilled weights. Tensors are safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .config import SparseConfig, from_dict
from .heads import HeadMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "rtpurbo_config.json"
EXPORTED_FILE, EXPORTED_KEY = "config.json", "rtpurbo"
"""Where an exported model has the same sections: in its Transformers config, whose directory holds the weights too."""
FORMAT_VERSION = 1
STAGES = ("calibrate", "train_indexer", "distill")
WORK_DIR = ".rtpurbo-work"
METRICS_DIR = "metrics"
"""Subdirectory for states of unfinished stages, removed when a conversion ends."""
_KEYS = ("format_version", "base_model", "sparse", "heads", "stages", "indexer", "weights")
_SECTIONS = {
    "base_model": {
        "name": "text",
        "fingerprint": "text",
        "head_dim": "a whole number above 0",
        "revision": "text or null",
        "model_type": "text or null",
    },
    "sparse": {},
    "heads": {},
    "stages": {},
    "indexer": {"file": "text", "sha256": "text"},
    "weights": {"kind": "text", "directory": "text"},
}
"""Sections that must be objects, and what their keys must hold; the empty ones are checked where they are used."""
_STAGE = {
    "settings": "an object",
    "metrics": "an object",
    "sources": "a list of text or null",
    "sparse": "an object or null",
}
"""What a stage records."""
_IS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "an object": lambda value: isinstance(value, dict),
    "a whole number above 0": lambda value: type(value) is int and value > 0,
    "a list of text": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
}
_OURS = re.compile(r"rtpurbo_indexer\.[0-9a-f]{8}\.safetensors|(lora|full)\.[0-9a-f]{8}|\.tmp-\d+-.+")
"""Names that `save` gives."""
_FILES = {"lora": ("adapter_config.json", "adapter_model.safetensors"), "full": ("config.json",)}
"""Files that each kind of weights must hold."""
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A converted model, without the base model's weights."""

    base_model: dict[str, Any]
    """name, revision, model_type, fingerprint of the model it was made for."""
    config: SparseConfig
    """Window, sinks, index dimension and dtype, p."""
    heads: HeadMap
    """Roles of all heads."""
    stages: dict[str, Any] = field(default_factory=dict)
    """Per finished stage its settings and metrics."""
    indexer: dict[str, Tensor] | None = None
    """Index projections by name, or None before stage 1."""
    weights_kind: str | None = None
    """"lora" (a PEFT adapter), "full" (a whole model), or None before stage 2."""
    weights_path: Path | None = None
    """Directory of the distilled weights."""

    @classmethod
    def load(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Artifact:
        """Read an artefact from a directory or a hub repository.

        Raises:
            ValueError: no artefact there, a newer format, an unknown key, or a damaged file. A LoRA adapter is read whole
                and compared with the checksum in its name; of full weights, which may be many GB, `rtpurbo.load` does it.
        """
        path = find_artifact(source, revision)
        file = path / CONFIG_FILE if (path / CONFIG_FILE).is_file() else path / EXPORTED_FILE
        exported = file.name == EXPORTED_FILE
        try:
            raw: Any = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: expected JSON ({error}). Convert again.") from error
        if exported:
            raw = raw[EXPORTED_KEY]
        check_sections(raw, file)
        heads, config = read_roles(raw)
        weights = raw.get("weights")
        artifact = cls(
            base_model=raw["base_model"],
            config=config,
            heads=heads,
            stages=raw.get("stages", {}),
            indexer=_read_tensors(path, raw["indexer"]) if raw.get("indexer") else None,
            weights_kind="full" if exported else weights["kind"] if weights else None,
            weights_path=path if exported else _inside(path, weights["directory"]) if weights else None,
        )
        if artifact.weights_path is not None:
            _check_weights(artifact.weights_path, artifact.weights_kind)
            if artifact.weights_kind == "lora":
                check_digest(artifact.weights_path)
        return artifact

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write into `directory`: new files beside the old ones, then the config in one step, then old files away.

        Raises:
            ValueError: the directory holds something that is not an artefact.
            OSError: the disk is full or not writable; the old artefact is untouched.
        """
        path = Path(directory)
        check_output(path)
        if self.weights_path is not None:
            _check_weights(self.weights_path, self.weights_kind)
        path.mkdir(parents=True, exist_ok=True)
        raw = {**self.sections(), "stages": self.stages}
        try:
            if self.indexer is not None:
                raw["indexer"] = self.save_indexer(path)
            if self.weights_path is not None:
                digest = _directory_digest(self.weights_path)
                target = path / f"{self.weights_kind}.{digest[:8]}"
                if not target.is_dir() or not (target.samefile(self.weights_path) or _directory_digest(target) == digest):
                    _remove(target)
                    with atomic_path(target) as temporary:
                        shutil.copytree(self.weights_path, temporary)
                raw["weights"] = {"kind": self.weights_kind, "directory": target.name}
            write_json(path / CONFIG_FILE, raw)
        finally:
            sweep(path)

    def sections(self) -> dict[str, Any]:
        """What the config file says of the base model, the settings and the roles of heads."""
        return {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "sparse": self.config.to_dict(),
            "heads": self.heads.to_dict(),
        }

    def save_indexer(self, path: Path) -> dict[str, str]:
        """Write the index projections into the directory `path`; the config's `indexer` section."""
        assert self.indexer is not None
        content = _tensor_bytes(self.indexer)
        digest = hashlib.sha256(content).hexdigest()
        name = f"rtpurbo_indexer.{digest[:8]}.safetensors"
        with atomic_path(path / name) as temporary:
            temporary.write_bytes(content)
        return {"file": name, "sha256": digest}

    def with_stage(self, name: str, settings: Any, metrics: dict[str, Any], **changes: Any) -> Artifact:
        """A copy with stage `name` recorded and `changes` to other fields; what later stages made of the old one goes."""
        stages = {n: self.stages[n] for n in STAGES[: STAGES.index(name)] if n in self.stages}
        stages[name] = {"settings": dataclasses.asdict(settings), "metrics": metrics}
        fresh: dict[str, Any] = {"weights_kind": None, "weights_path": None, **changes}
        if name == "calibrate":
            fresh = {"indexer": None, **fresh}
        return dataclasses.replace(self, stages=stages, **fresh)

    def digest(self) -> str:
        """Hash of what the sparse model computes: base weights, settings, head map, index and distilled weights."""
        index = hashlib.sha256(_tensor_bytes(self.indexer)).hexdigest() if self.indexer is not None else None
        weights = _directory_digest(self.weights_path) if self.weights_path is not None else None
        parts = [self.base_model["fingerprint"], self.config.to_dict(), self.heads.to_dict(), index, weights]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        evaluation: dict[str, Any] | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload to a hub repository, with a model card that shows the measured table; returns its address.

        A base model in a local directory is named without the path to it.

        Args:
            evaluation: what `evaluate` returned, for the table.
        """
        import tempfile

        from huggingface_hub import HfApi

        from .model_card import model_card
        from .models import public_name

        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            card = model_card(self, evaluation)
            base = {**self.base_model, "name": public_name(self.base_model["name"])}
            dataclasses.replace(self, base_model=base).save(folder)
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload RTPurbo artefact")
        return str(url)


def is_artifact(path: Path) -> bool:
    """Whether a directory holds an artefact, or an exported model (`rtpurbo.export`)."""
    if (path / CONFIG_FILE).is_file():
        return True
    exported = path / EXPORTED_FILE
    try:
        return exported.is_file() and EXPORTED_KEY in json.loads(exported.read_text())
    except (ValueError, TypeError, RecursionError):
        return False


def check_sections(raw: Any, file: Path) -> None:
    """ValueError when the content of a config file has another format, an unknown key or a missing or unfit value."""
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is damaged: expected a JSON object, got {type(raw).__name__}.")
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"{file} is damaged: its format_version is {version!r}. Convert again.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{file.parent} has artefact format {version}; this version of rtpurbo reads up to {FORMAT_VERSION}. "
            "Upgrade rtpurbo."
        )
    _check_keys(raw, _KEYS, file)
    for key, keys in _SECTIONS.items():
        section = raw.get(key, {} if key == "stages" else None)
        if section is not None or key not in ("indexer", "weights"):
            _check_section(section, keys, key, file)
    for name, stage in raw.get("stages", {}).items():
        _check_section(stage, _STAGE, f"stages.{name}", file)


def read_roles(raw: dict[str, Any]) -> tuple[HeadMap, SparseConfig]:
    """Head map and settings out of the content of a config file; ValueError for unknown or impossible entries."""
    config = from_dict(SparseConfig, {"min_probability": 0.0} | raw["sparse"], where="the artefact's sparse section")
    return HeadMap.from_dict(raw["heads"]), config


def find_artifact(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Local directory of an artefact, fetched from the hub when `source` is a repository name."""
    path = Path(source)
    if is_artifact(path):
        return path
    if path.exists() or len(path.parts) != 2 or str(source).startswith((".", "/", "~")) or str(source).endswith("/"):
        what = "has no rtpurbo_config.json" if path.exists() else "does not exist"
        raise ValueError(f"{str(source)!r} is not an artefact: it {what}. Make one with `rtpurbo convert`.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(str(source), revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{str(source)!r} is neither a local artefact nor a hub repository that can be reached "
            f"({type(error).__name__}). Check the name and the network."
        ) from error
    if not is_artifact(found):
        raise ValueError(f"Hub repository {str(source)!r} is not an artefact: it has no {CONFIG_FILE}.")
    return found


def check_output(path: Path) -> None:
    """ValueError when `path` exists and is neither empty nor an artefact, nor left behind by a conversion."""
    if path.is_file():
        raise ValueError(f"Output {str(path)!r} is a file; expected a directory.")
    if not path.is_dir() or (path / CONFIG_FILE).is_file():
        return
    ours = {WORK_DIR} | ({METRICS_DIR} if (path / WORK_DIR).is_dir() else set())
    foreign = sorted(e.name for e in path.iterdir() if e.name not in ours and not _OURS.fullmatch(e.name))
    if foreign:
        raise ValueError(
            f"Output directory {str(path)!r} holds other files ({', '.join(foreign[:3])}); "
            "expected an empty directory or an artefact. Choose another --output."
        )


def check_fingerprint(model: PreTrainedModel, artifact: Artifact) -> None:
    """ValueError when `artifact` was made for other weights than `model`'s."""
    from .models import fingerprint

    got = fingerprint(model)
    if got != artifact.base_model["fingerprint"]:
        raise ValueError(
            f"This artefact was made for other weights: expected {artifact.base_model['name']} with fingerprint "
            f"{artifact.base_model['fingerprint'][:12]}, got a model with {got[:12]}. Load its own base model, or convert "
            "this one."
        )


def sweep(path: Path) -> None:
    """Remove what the config does not name: files of an earlier save, or of one that did not come to its end."""
    config = path / CONFIG_FILE
    text = config.read_text(errors="replace") if config.is_file() else ""
    for entry in [*path.iterdir(), *(path / METRICS_DIR).glob(".tmp-*")]:
        if _OURS.fullmatch(entry.name) and entry.name not in text:
            _remove(entry)


def _remove(path: Path) -> None:
    """Remove a file or directory that may not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when it does not."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    _remove(temporary)  # of a killed process with the same number
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def _sync(path: Path) -> None:
    for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What safetensors says of a file it cannot write, as the OSError that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def _tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def _check_keys(section: dict[str, Any], valid: Iterable[str], where: str | Path) -> None:
    for key in section:
        if key not in valid:
            raise ValueError(f"Unknown key {key!r} in {where}; valid keys: {', '.join(valid)}.")


def _check_section(section: Any, keys: dict[str, str], name: str, file: Path) -> None:
    """ValueError when a section is not an object, or has (where `keys` names any) an unknown key or an unfit value."""
    if not isinstance(section, dict):
        raise ValueError(f"{file} is damaged: {name!r} must be an object. Convert again.")
    if keys:
        _check_keys(section, keys, f"{name!r} of {file}")
    for key, expected in keys.items():
        optional, value = expected.endswith(" or null"), section.get(key)
        if not (optional and value is None) and not _IS[expected.removesuffix(" or null")](value):
            raise ValueError(f"{file} is damaged: '{name}.{key}' must be {expected}. Convert again.")


def _inside(path: Path, name: str) -> Path:
    """`path / name`, refusing names that lead out of the artefact."""
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise ValueError(f"{path / CONFIG_FILE} names a file outside the artefact: {name!r}.")
    return path / name


def _read_tensors(path: Path, entry: dict[str, str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = _inside(path, entry["file"])
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is not a safetensors file; only safetensors are ever loaded. Train the indexer again.")
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing; the artefact is incomplete. Train the indexer again.") from error
    try:
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise ValueError("its checksum differs")
        return load(content)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}). Fetch it again or train the indexer again.") from error


def _check_weights(path: Path, kind: str | None) -> None:
    """ValueError when a weights directory is incomplete, truncated, or holds or names pickled tensors."""
    from safetensors import SafetensorError, safe_open

    from .models import check_index

    if kind not in _FILES:
        raise ValueError(f"Weights of kind {kind!r} in {path.parent / CONFIG_FILE}; expected one of {', '.join(_FILES)}.")
    if not path.is_dir():
        raise ValueError(f"{path} is missing; the artefact is incomplete. Distil again.")
    pickled = sorted(file.name for file in path.rglob("*") if file.suffix in _PICKLED)
    if pickled:
        raise ValueError(f"{path} holds a pickled file, {pickled[0]}; only safetensors are ever loaded. Distil again.")
    for name in _FILES[kind]:
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing; the artefact is incomplete. Distil again.")
    for index in sorted(path.rglob("*.index.json")):
        check_index(index)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no safetensors file; the artefact is incomplete. Distil again.")
    for file in files:
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged ({error}). Fetch it again or distil again.") from error


def check_digest(path: Path) -> None:
    """ValueError when the content of a saved weights directory is not what its name says; reads all of it."""
    if _OURS.fullmatch(path.name) and not path.name.endswith(got := _directory_digest(path)[:8]):
        raise ValueError(f"{path} is damaged (its content has the checksum {got}). Fetch it again or distil again.")


def _directory_digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
