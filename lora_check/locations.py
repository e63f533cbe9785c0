"""A location -> an opened checkpoint: a local file or folder, a URL, a hub id, an nn.Module or a state dict.

What lies on disk comes first; only then is a string read as a hub id, unless it is plainly a path. The hub's
cache is asked before the hub. What a URL leads to is read where it lies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lora_check import registry
from lora_check.errors import (
    AdapterConfigError,
    InputError,
    NotFoundError,
    UnknownFormatError,
    UsageError,
    WrongInputError,
)
from lora_check.formats import _folder
from lora_check.remote.place import FILE_SUFFIXES, is_url, local_path, place_of
from lora_check.sources import Lines, offered
from lora_check.types import Checkpoint, Format, RowSource, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["base", "adapter", "merged"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = (
    "adapter_model.safetensors",
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "adapter_model.pt",
    "pytorch_lora_weights.bin",
    "adapters.npz",
)
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LOOKED_FOR = (
    "model.safetensors, *.index.json with its shards, *.safetensors, pytorch_model.bin, consolidated.*.pth, *.gguf, "
    "*.npz, adapter_model.safetensors, adapter_model.bin"
)
PREFERRED = "safetensors"

HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^\s@]+))?", re.ASCII)
HUB_CONFIGS = ("config.json", ADAPTER_CONFIG, "*.safetensors.index.json", "*.bin.index.json")
HUB_WEIGHTS = (
    ("model*.safetensors", "adapter_model*.safetensors"),
    ("*.safetensors",),
    ("pytorch_model*.bin", "adapter_model*.bin"),
)
"""Tried in this order until a folder is whole."""

HUB_REASONS = {
    "GatedRepoError": "the repository is gated and you are not logged in, or have no access",
    "RepositoryNotFoundError": "the hub has no such repository, or it is private",
    "RevisionNotFoundError": "the hub has no such revision",
    "LocalEntryNotFoundError": "it is not in the cache, and the hub cannot be reached",
    "HFValidationError": "it is no possible name of a repository",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A checkpoint under the name and in the role that the user gave it; errors say both.

    files      what it was read from; empty in memory
    folder     the folder that was given; None: a file, or tensors in memory
    metadata   what the files say of themselves (`__metadata__` of safetensors)
    """

    location: str
    role: Role
    inner: Checkpoint
    folder: Path | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config.json, or nothing."""
        return self.inner.config

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(getattr(self.inner, "files", ()))

    @property
    def metadata(self) -> Mapping[str, str]:
        """The text that the files carry beside their tensors."""
        found: Mapping[str, str] = getattr(self.inner, "metadata", {})
        return found

    @property
    def adapter_config(self) -> Mapping[str, Any] | None:
        """The configuration of an adapter in memory; on disk it lies beside the files."""
        return getattr(self.inner, "adapter_config", None)

    def metas(self) -> Mapping[str, TensorMeta]:
        """Name -> what the header says of it, in file order."""
        return self.inner.metas()

    def read(self, name: str) -> Tensor:
        """The tensor as stored."""
        with _told_of(self.role):
            return self.inner.read(name)

    def rows(self, name: str) -> RowSource | None:
        """The tensor by rows, if that is how it is read."""
        source = offered(self.inner, name)
        if isinstance(source, Lines):
            return replace(source, make=partial(_made, self.role, source.make))
        return None if source is None else _InRole(source, self.role)

    def close(self) -> None:
        """Let go of the files."""
        self.inner.close()


@dataclass(frozen=True, slots=True)
class _InRole:
    """Rows whose errors say in which role they were read."""

    inner: RowSource
    role: Role

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> Any:
        return self.inner.dtype

    def __getitem__(self, span: slice) -> Tensor:
        with _told_of(self.role):
            return self.inner[span]


def _made(role: Role, make: Callable[[slice], Tensor], span: slice) -> Tensor:
    with _told_of(role):
        return make(span)


def open_checkpoint(location: object, *, role: Role, beside: Sequence[str] = ()) -> Located:
    """Open what lies at a location; headers only.

    location   a local file or folder, a hub id org/name[@revision], a URL, an nn.Module or a mapping of tensors
    beside     patterns of further files that are wanted from the hub
    raises     InputError: its message begins with the role and names the file
    """
    if not isinstance(location, str | PathLike):
        inner = _open(location, role)
        return Located(location=inner.location, role=role, inner=inner)
    place = resolve(location, role=role, beside=beside)
    with _told_of(role):
        folder = place if place.is_dir() else None
        shown = str(place) if is_url(location) else str(location)
        return Located(location=shown, role=role, inner=_open(_entry(place, role), role), folder=folder)


def resolve(location: str | PathLike[str], *, role: Role, beside: Sequence[str] = ()) -> Path:
    """Find the file or folder of a location; a hub id is taken from the cache, else downloaded, and a URL is not.

    beside   patterns of further files that are wanted from the hub, which is asked for them whatever is in the cache
    raises   NotFoundError: neither here nor on the hub, nor where a URL leads to
    """
    text = local_path(str(location))
    if not text.strip():
        raise UsageError(f"{role}: the location is empty", hint="give a folder, a file or a hub id org/name")
    if is_url(text):
        with _told_of(role):
            return cast("Path", place_of(text))  # it answers what is asked of one here
    path = _local(text)
    if path is not None:
        return path
    hub_id = HUB_ID.fullmatch(text) if isinstance(location, str) and not _is_path(text) else None
    if hub_id is None:
        hint = "check the spelling; a hub id is written org/name or org/name@revision"
        raise NotFoundError(f"{role}: nothing lies at {text!r}", hint=hint)
    return _from_hub(hub_id["name"], hub_id["revision"], role, beside)


def read_config(folder: Path) -> Mapping[str, Any]:
    """Read the config.json of a model folder; an absent one is an empty mapping.

    raises   CorruptCheckpointError: naming file, line and column
    """
    return _folder.read_config(folder)


def read_adapter_config(source: Checkpoint | PathLike[str] | str) -> Mapping[str, Any]:
    """Read the adapter_config.json in a folder, beside a file, or beside the files of a checkpoint.

    raises   AdapterConfigError: absent, not JSON (with line and column), not an object, or a key named twice
    """
    found, folder = find_adapter_config(source), _config_folder(source)
    if found is not None:
        return found
    if folder is None:
        message = f"adapter: {getattr(source, 'location', source)} has no {ADAPTER_CONFIG}"
        raise AdapterConfigError(message, hint="give the folder of the adapter, or a PeftModel")
    hint = "give the folder that PEFT's save_pretrained wrote"
    raise AdapterConfigError(f"adapter: {folder / ADAPTER_CONFIG} is not there", hint=hint)


def find_adapter_config(source: Checkpoint | PathLike[str] | str) -> Mapping[str, Any] | None:
    """The same; None where there is none, for not every tool writes one.

    raises   AdapterConfigError: not JSON (with line and column), not an object, or a key named twice
    """
    told: Mapping[str, Any] | None = getattr(source, "adapter_config", None)
    folder = _config_folder(source)
    if told is not None or folder is None or not (folder / ADAPTER_CONFIG).is_file():
        return told
    try:
        return _folder.read_object(folder / ADAPTER_CONFIG, AdapterConfigError)
    except InputError as error:
        raise _in_role(error, "adapter") from error


def _config_folder(source: Checkpoint | PathLike[str] | str) -> Path | None:
    """Where the configuration of an adapter would lie; None for one in memory."""
    if isinstance(source, str | PathLike):
        path = Path(source)
        return path if path.is_dir() else path.parent
    files: Sequence[Path] = getattr(source, "files", ())
    return files[0].parent if files else None


def _open(source: object, role: Role) -> Checkpoint:
    for form in _formats():
        if role in form.roles and form.recognises(source):
            try:
                return _of_role(form.open(source), role)
            except InputError as error:
                raise _in_role(error, role) from error
    raise _unknown(source, role)


def _of_role(checkpoint: Checkpoint, role: Role) -> Checkpoint:
    """The checkpoint, unless its own header says that it is an adapter and it is given as a model."""
    facts = checkpoint.config.get("gguf") or {}
    if role != "adapter" and facts.get("general.type") == "adapter":
        raise WrongInputError(
            f"{checkpoint.location} is a GGUF adapter, not a model",
            hint="the order is BASE ADAPTER [ADAPTER ...] MERGED",
        )
    return checkpoint


def _formats() -> Iterator[Format]:
    """Every format: those of one role first; safetensors next, which a folder may hold beside pickles."""
    yield from sorted(registry.load("formats").values(), key=lambda form: (len(form.roles), form.name != PREFERRED))


def _entry(path: Path, role: Role) -> Path:
    """The file or folder that a format is to open: a folder may hold both a model and an adapter."""
    names = _file_names(path, role) if path.is_dir() else {path.name}
    models = [name for name in names if _is_model(name)]
    if role != "adapter" and not models and (ADAPTER_CONFIG in names or path.name in ADAPTERS):
        what = "an adapter folder" if path.is_dir() else "an adapter file"
        message = f"{role}: {path} is {what}, not a model"
        raise WrongInputError(message, hint="the order is BASE ADAPTER MERGED")
    if not path.is_dir():
        return path
    if role == "adapter":
        wanted: Sequence[str] = ADAPTERS
    else:
        wanted = () if any(name.endswith(".safetensors") for name in models) else PICKLES
    return next((path / name for name in wanted if name in names), path)


def _file_names(folder: Path, role: Role) -> set[str]:
    try:
        return {child.name for child in folder.iterdir() if child.is_file()}
    except OSError as error:
        raise _in_role(_folder.unreadable(folder, error), role) from error


def _is_model(name: str) -> bool:
    """Whether a file name is that of a model's weights, and not of an adapter or of a trainer's state."""
    if name.endswith((".safetensors", ".gguf")):
        return name not in ADAPTERS and not name.endswith("_adapters.safetensors")
    return name.startswith("pytorch_model") or name.endswith(".safetensors.index.json")


def _local(text: str) -> Path | None:
    """The path if anything lies there."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _is_path(text: str) -> bool:
    """Whether a string is plainly a path, which must never reach the network."""
    name = text.partition("@")[0]
    return text.startswith(("/", ".", "~")) or "\\" in text or name.lower().endswith(FILE_SUFFIXES)


def _from_hub(name: str, revision: str | None, role: Role, beside: Sequence[str]) -> Path:
    """The snapshot folder of a hub id: the cached one if it is whole, else a download of what is needed."""
    shown = f"{name}@{revision}" if revision else name
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        message = f"{role}: nothing lies at {shown!r}, and huggingface_hub is not installed"
        raise NotFoundError(message, hint="pip install huggingface_hub, or give a local folder") from error
    failures = (OSError, ValueError, *HfHubHTTPError.__bases__)
    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
        enough = _whole(cached)
        if enough and not beside:
            return cached
    except failures:
        enough = False
    folder = Path()
    for weights in ((),) if enough else HUB_WEIGHTS:
        try:
            found = snapshot_download(
                name, revision=revision, allow_patterns=[*HUB_CONFIGS, *weights, *beside], ignore_patterns=["*/*"]
            )
        except failures as error:
            raise _not_on_hub(shown, role, error) from error
        folder = Path(found)
        if _whole(folder):
            break
    return folder


def _whole(folder: Path) -> bool:
    """Whether a folder holds weights, and every shard that an index names."""
    try:
        return any(form.recognises(folder) for form in _formats()) and not _folder.absent_shards(folder)
    except InputError:
        return True


def _not_on_hub(shown: str, role: Role, error: BaseException) -> NotFoundError:
    names = [base.__name__ for base in type(error).__mro__]
    reason = next((HUB_REASONS[name] for name in names if name in HUB_REASONS), None)
    reason = reason or f"the download failed: {_folder.one_line(error)}"
    hint = "check the spelling; for a private or gated repository run `hf auth login`"
    return NotFoundError(f"{role}: no file or folder {shown!r} here, and as a hub id {reason}", hint=hint)


def _unknown(source: object, role: Role) -> InputError:
    if not isinstance(source, Path):
        message = f"{role}: a {type(source).__name__} is no location, module or state dict"
        return UnknownFormatError(message, hint="give a path, a hub id, an nn.Module or a mapping of tensors")
    problem = "is a folder without weights" if source.is_dir() else "is a file of no known format"
    message = f"{role}: {source} {problem}; looked for {LOOKED_FOR}"
    return UnknownFormatError(message, hint="give the folder that save_pretrained wrote, or one weight file")


@contextmanager
def _told_of(role: Role) -> Iterator[None]:
    """Let an error say in which role something was being read, if it does not."""
    try:
        yield
    except InputError as error:
        if error.message.startswith(f"{role}: "):
            raise
        raise _in_role(error, role) from error


def _in_role(error: InputError, role: Role) -> InputError:
    """The same error, its message led by the role."""
    return type(error)(f"{role}: {error.message}", hint=error.hint)
