"""torch_pickle: what torch.save writes, as one file, in parts, or as Meta's model-parallel shards; never code.

A pickle that asks for anything but tensors is refused, and never run. The file is mapped, not read; only the
format from before torch 1.6 has to be read at once, and is whole in memory until it is closed.

Source: https://pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from lora_check.errors import CorruptCheckpointError, InputError, UnknownFormatError, UnsafePickleError
from lora_check.formats import _folder, _model_parallel
from lora_check.types import Format, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".bin", ".pt", ".pth")
WHOLE = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
PARTS = "pytorch_model-*-of-*.bin"
NESTED = ("state_dict", "model")
ZIP = b"PK\x03\x04"
LEGACY_PICKLES = 5
"""Magic number, protocol, system, the object and its storage keys: the pickles of a legacy file."""

HARMLESS = (
    "torch._utils._rebuild_",
    "torch._tensor._rebuild_",
    "torch.nn.parameter.",
    "torch.serialization._get_layout",
    "torch.Size",
    "torch.device",
    "collections.OrderedDict",
)
REFUSALS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)
"""What torch.load raises for bytes that are no pickle, or a pickle that it does not allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PickleCheckpoint:
    """Tensors of mapped torch files; names that share storage are kept as they are."""

    location: str
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    _metas: Mapping[str, TensorMeta]
    _tensors: dict[str, Tensor] = field(repr=False)

    def metas(self) -> Mapping[str, TensorMeta]:
        """Name -> shape and dtype, in the order of the pickle."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The tensor as stored, mapped."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise _folder.absent_tensor(name, self.location, closed=name in self._metas)
        if str(tensor.layout) != "torch.strided":
            raise UnknownFormatError(f"tensor {name!r} of {self.location} is {tensor.layout}, not dense")
        return tensor

    def close(self) -> None:
        """Let go of the tensors; those that were read stay valid."""
        self._tensors.clear()


def recognises(source: Any) -> bool:
    """A .bin, .pt or .pth file, its index, or a folder that holds such a file under the name of a model or adapter."""
    if not isinstance(source, Path):
        return False
    return _weights(source) is not None if source.is_dir() else _is_index(source) or source.suffix in SUFFIXES


def open_path(source: Path) -> PickleCheckpoint | _model_parallel.JoinedCheckpoint:
    """Read the pickles of names and shapes and map the tensors.

    raises   UnsafePickleError: a pickle that would have to run code
             CorruptCheckpointError: bytes that are no pickle, or an index that contradicts its shards
             WrongInputError: model-parallel shards of which it cannot be known how they were cut
    """
    path = (_weights(source) or source) if source.is_dir() else source
    shards = _model_parallel.siblings(path)
    if len(shards) > 1:
        return _model_parallel.join(str(source), {shard: load(shard) for shard in shards})
    index = _folder.read_index(path) if _is_index(path) else None
    files = _parts(source, path) if index is None else tuple(sorted(set(index.values())))
    tensors = _folder.join({file: load(file) for file in files})
    if index is not None:
        _folder.match_index(path, index, {name: home for name, (home, _) in tensors.items()})
    return PickleCheckpoint(
        location=str(source),
        files=files,
        config=_folder.read_config(path.parent),
        _metas=MappingProxyType({name: _meta(name, tensor, home) for name, (home, tensor) in tensors.items()}),
        _tensors={name: tensor for name, (_, tensor) in tensors.items()},
    )


def load(path: Path) -> dict[str, Tensor]:
    """Load the state dict of one file, mapped where the file is a zip archive.

    raises   UnsafePickleError, CorruptCheckpointError; UnknownFormatError: a pickle without named tensors
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = _state_dict(_unpickle(path))
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise UnknownFormatError(f"{path} holds no named tensors", hint="save a state dict with torch.save")
    return tensors


def _unpickle(path: Path) -> Any:
    import torch

    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except OSError as error:
        raise _folder.unreadable(path, error) from error
    except REFUSALS as error:
        raise _refusal(path, error) from error


def _is_zip(path: Path) -> bool:
    """Whether this is the format since torch 1.6, whose tensors can be mapped."""
    return _folder.read_head(path, len(ZIP)) == ZIP


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    """The named tensors of a state dict, and of the one that lies a level below; other values are left out."""
    from torch import Tensor

    if not isinstance(loaded, Mapping):
        return {}
    inner: Mapping[Any, Any] = next((loaded[key] for key in NESTED if isinstance(loaded.get(key), Mapping)), {})
    named = {**loaded, **inner}.items()
    return {name: value.detach() for name, value in named if isinstance(value, Tensor)}


def _meta(name: str, tensor: Tensor, home: Path) -> TensorMeta:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorMeta(name=name, shape=tuple(tensor.shape), dtype=dtype, unmapped=not _is_zip(home))


def _refusal(path: Path, error: Exception) -> InputError:
    """Tell a pickle that would run code from bytes that are no pickle."""
    wanted = next(_foreign(path), None)
    if wanted is None:
        told = _folder.one_line(error).partition(". ")[0] if isinstance(error, RuntimeError) else ""
        reason = told or "it is damaged, or of a kind that torch does not read"
        return CorruptCheckpointError(f"pickle {path} cannot be read: {reason}", hint=_folder.DAMAGED)
    message = f"pickle {path} asks for {wanted!r}, which would run code; it was not run"
    return UnsafePickleError(message, hint="where you trust it, load it and save its tensors as safetensors")


def _foreign(path: Path) -> Iterator[str]:
    """Everything but the makers of tensors that the pickles of a file ask for; nothing is run."""
    try:
        if not _is_zip(path):
            with path.open("rb") as file:
                for _ in range(LEGACY_PICKLES):
                    yield from _globals(file)
            return
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                yield "TorchScript"
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    with archive.open(name) as member:
                        yield from _globals(member)
    except (OSError, zipfile.BadZipFile, NotImplementedError, *REFUSALS):
        return


def _globals(file: IO[bytes]) -> Iterator[str]:
    texts = ["?", "?"]
    for opcode, argument, _ in pickletools.genops(file):
        if "UNICODE" in opcode.name or "STRING" in opcode.name:
            texts = [texts[1], str(argument)]
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            name = ".".join(texts) if opcode.name == "STACK_GLOBAL" else str(argument).replace(" ", ".")
            if not _harmless(name):
                yield name


def _harmless(name: str) -> bool:
    """Whether a pickle of tensors may ask for this: makers of tensors, storages, dtypes."""
    import torch

    kind = name.removeprefix("torch.")
    if kind != name and (kind.endswith("Storage") or isinstance(vars(torch).get(kind), torch.dtype)):
        return True
    return name.startswith(HARMLESS)


def _weights(folder: Path) -> Path | None:
    whole = (folder / name for name in WHOLE if (folder / name).is_file())
    shards = _model_parallel.SHARDS.format("[0-9][0-9]")
    parts = (path for pattern in (PARTS, shards) for path in sorted(folder.glob(pattern)))
    return next(chain(whole, parts), None)


def _parts(source: Path, path: Path) -> tuple[Path, ...]:
    """The files of a checkpoint without an index: one, or all that a folder holds of it."""
    numbered = source.is_dir() and _folder.PART.fullmatch(path.name)
    return _folder.all_parts(_folder.first_part(source, PARTS)) if numbered else (path,)


def _is_index(path: Path) -> bool:
    return path.name.endswith(f".bin{_folder.INDEX}")


FORMAT = Format(name="torch_pickle", recognises=recognises, open=open_path)
