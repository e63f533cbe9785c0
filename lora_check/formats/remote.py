"""remote: safetensors that lie elsewhere, read by ranges of bytes. Only what is asked for is fetched.

The headers are judged by the code that judges local ones. What has to be read whole, or unpickled, is not read from
afar: it has to be downloaded first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, cast

from lora_check.errors import InputError, UnknownFormatError, UnsafePickleError
from lora_check.formats import _folder
from lora_check.formats import _safetensors_files as _files
from lora_check.remote.place import Place
from lora_check.remote.small import SMALL, Small
from lora_check.remote.store import all_of
from lora_check.sources import Lines
from lora_check.types import Format, TensorMeta

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_check.remote.rows import Read

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".bin.index.json")
OTHERS = (".gguf", ".npz")
DOWNLOAD = "download it, and give its local path"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteCheckpoint:
    """Tensors of remote safetensors files; safe to read from several threads.

    metadata   the `__metadata__` of all headers
    """

    location: str
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    _metas: Mapping[str, TensorMeta]
    _homes: Mapping[str, tuple[Path, int]]
    _small: Small = field(default_factory=Small, repr=False)
    _closed: Event = field(default_factory=Event, repr=False)

    @property
    def homes(self) -> Mapping[str, str]:
        """Tensor -> the name of the file that holds it."""
        return {name: path.name for name, (path, _) in self._homes.items()}

    def metas(self) -> Mapping[str, TensorMeta]:
        """Name -> what the header says of it, in file order."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """Fetch the bytes of the tensor, and no others."""
        from lora_check.remote.rows import whole

        read, dtype = self._source(name)
        fetch = partial(whole, read, self._metas[name].shape, dtype)
        if self._metas[name].nbytes > SMALL:
            return fetch()
        return self._small.get(name, fetch)

    def rows(self, name: str) -> Lines | None:
        """The tensor, of which rows are fetched when they are asked for; None of one that is small."""
        from lora_check.remote.rows import Rows

        (read, dtype), meta = self._source(name), self._metas[name]
        if meta.nbytes <= SMALL:
            return None
        columns = meta.shape[-1] if len(meta.shape) > 1 else 1
        return Lines(
            shape=meta.shape, dtype=dtype, make=Rows(read, (meta.numel // columns, columns), dtype).__getitem__
        )

    def close(self) -> None:
        """Ask for nothing more; tensors that were read stay valid."""
        self._closed.set()

    def _source(self, name: str) -> tuple[Read, torch.dtype]:
        """What reads bytes of a tensor, and its dtype."""
        import torch

        if name not in self._homes or self._closed.is_set():
            raise _folder.absent_tensor(name, self.location, closed=name in self._homes)
        (home, begin), dtype = self._homes[name], getattr(torch, self._metas[name].dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise _files.unreadable(name, home, self._metas[name].dtype)
        return partial(self._bytes, name, cast("Place", home), begin), dtype

    def _bytes(self, name: str, home: Place, begin: int, at: int, into: memoryview) -> None:
        if self._closed.is_set():
            raise _folder.absent_tensor(name, self.location, closed=True)
        home.read(begin + at, into, f"tensor {name!r}", self._closed)


def recognises(source: Any) -> bool:
    """Whatever a URL leads to."""
    return isinstance(source, Place)


def open_place(source: Place) -> RemoteCheckpoint:
    """Fetch every header, and judge it.

    raises   UnsafePickleError, UnknownFormatError: it is in a format that is not read from afar
             CorruptCheckpointError: header, offsets, index or shards contradict themselves, or a shard is not there
             WrongInputError: the shards of two checkpoints, and no index that says which is meant
    """
    path = cast("Path", source)  # it answers what is asked of one here
    _demand_safetensors(path)
    found = _files.listed(path, each=all_of)
    return RemoteCheckpoint(
        location=str(source),
        files=tuple(found.headers),
        config=found.config,
        metadata=found.metadata,
        _metas=found.metas,
        _homes={name: (home, found.headers[home].begin + entry.begin) for name, (home, entry) in found.homes.items()},
    )


def _demand_safetensors(source: Path) -> None:
    folder = source.is_dir()
    if _files.weights(source) if folder else _files.is_index(source) or source.suffix == _files.SUFFIX:
        return
    names = [path.name for path in source.iterdir()] if folder else [source.name]
    raise next((error for name in names if (error := _refusal(source, name))), _unknown(source))


def _refusal(source: Path, name: str) -> InputError | None:
    """Why a file is not read from afar, if it holds weights."""
    what = f"{source}" if source.name == name else f"{source / name}"
    if name.endswith(PICKLES):
        return UnsafePickleError(f"{what} is a pickle, which is not opened from afar", hint=DOWNLOAD)
    if name.endswith(OTHERS):
        return UnknownFormatError(f"{what} is no safetensors file, and no other is read from afar", hint=DOWNLOAD)
    return None


def _unknown(source: Path) -> UnknownFormatError:
    problem = "is a folder without *.safetensors" if source.is_dir() else "is no safetensors file"
    return UnknownFormatError(f"{source} {problem}", hint="give the address of a folder that save_pretrained wrote")


FORMAT = Format(name="remote", recognises=recognises, open=open_place)
