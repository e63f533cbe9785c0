"""safetensors: one file, an index and its shards, or a folder of shards without an index.

The header is read and judged here, so that a lie in it is told with the name of the tensor, and by the library. A
tensor is a view of the mapped file: no byte is read before it is touched, none is copied. A file on a network mount is
not mapped but read, whole tensors at once and rows as they are asked for.

Source: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lora_check.formats import _folder
from lora_check.formats import _safetensors_files as _files
from lora_check.reading.plain import PlainFile, Stretch, is_plain
from lora_check.reading.ranges import Range
from lora_check.reading.stamps import changed, stamp
from lora_check.sources import Lines
from lora_check.types import Format, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsCheckpoint:
    """Tensors of safetensors files, mapped or read plainly; safe to read from several threads.

    metadata   the `__metadata__` of all headers
    """

    location: str
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    _metas: Mapping[str, TensorMeta]
    _homes: Mapping[str, Path]
    _places: Mapping[str, Range]
    _handles: dict[Path, _Mapped | PlainFile | None] = field(repr=False)

    @property
    def homes(self) -> Mapping[str, str]:
        """Tensor -> the name of the file that holds it."""
        return {name: path.name for name, path in self._homes.items()}

    def metas(self) -> Mapping[str, TensorMeta]:
        """Name -> what the header says of it, in file order."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The tensor as stored; writing to it changes neither the file nor what others read."""
        home, handle = self._handle(name)
        try:
            tensor: Tensor = handle.get_tensor(name)
        except OSError as error:
            raise _folder.unreadable(home, error) from error
        except AttributeError as error:
            raise _files.unreadable(name, home, self._metas[name].dtype) from error
        return tensor

    def rows(self, name: str) -> Lines | None:
        """The tensor by rows, if it is large and its file is read plainly; a mapped one needs no such thing."""
        home, handle = self._handle(name)
        try:
            return handle.rows(name) if isinstance(handle, PlainFile) else None
        except AttributeError as error:
            raise _files.unreadable(name, home, self._metas[name].dtype) from error

    def place(self, name: str) -> Range | None:
        """Where the tensor lies."""
        return self._places.get(name)

    def _handle(self, name: str) -> tuple[Path, _Mapped | PlainFile]:
        home = self._homes.get(name)
        if home is None or home not in self._handles:
            raise _folder.absent_tensor(name, self.location, closed=home is not None)
        handle = self._handles[home]
        if handle is None:
            raise _files.unreadable(*self._strange(home))
        return home, handle

    def _strange(self, home: Path) -> tuple[str, Path, str]:
        """The tensor for whose dtype the library refuses a whole file."""
        known = {dtype for dtype, _ in _files.DTYPES.values()}
        names = [name for name, path in self._homes.items() if path == home]
        culprit = next(name for name in names if self._metas[name].dtype not in known)
        return culprit, home, self._metas[culprit].dtype

    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""
        while self._handles:
            handle = self._handles.popitem()[1]
            if handle is not None:
                handle.close()


def recognises(source: Any) -> bool:
    """A .safetensors file, its index, or a folder that holds either."""
    if not isinstance(source, Path):
        return False
    if source.is_dir():
        return bool(_files.weights(source))
    return _files.is_index(source) or source.suffix == _files.SUFFIX


def open_path(source: Path) -> SafetensorsCheckpoint:
    """Read every header and open every file; no tensor data is read.

    raises   CorruptCheckpointError: header, offsets, index or shards contradict themselves, or a shard is not there
             WrongInputError: the shards of two checkpoints, and no index that says which is meant
    """
    found = _files.listed(source)
    return SafetensorsCheckpoint(
        location=str(source),
        files=tuple(found.headers),
        config=found.config,
        metadata=found.metadata,
        _metas=found.metas,
        _homes={name: path for name, (path, _) in found.homes.items()},
        _places={name: place for path, header in found.headers.items() for name, place in _places(path, header)},
        _handles={path: _open(path, header) for path, header in found.headers.items()},
    )


def _places(path: Path, header: _files.Header) -> Iterator[tuple[str, Range]]:
    """Where each tensor of a file lies; the tensors fill it to its end."""
    before = path.stat().st_size - max((entry.end for entry in header.entries), default=0)
    return ((entry.name, Range(path, before + entry.begin, entry.end - entry.begin)) for entry in header.entries)


class _Mapped:
    """A file that is mapped when the first tensor is asked for: only then is torch needed.

    The tensors are views of one mapping: a handle of the library keeps some bytes for each that it ever gave. To touch
    what a file has lost since ends the process, so every tensor is preceded by a look at the file.
    """

    def __init__(self, path: Path, stretches: Iterable[Stretch]) -> None:
        self._path, self._lock, self._stamp = path, Lock(), stamp(path)
        self._stretches = {one.name: one for one in stretches}
        self._bytes: Tensor | None = None

    def get_tensor(self, name: str) -> Tensor:
        """The tensor, mapped; where its numbers do not lie on a multiple of their size, as old files have it, a copy.

        raises   InputError: the file changed since it was opened
                 AttributeError: torch has no such dtype
        """
        import torch

        if (now := stamp(self._path)) != self._stamp:
            raise changed(self._path, self._stamp, now)
        stretch = self._stretches[name]
        dtype = getattr(torch, stretch.dtype)
        raw = self._mapped()[stretch.offset : stretch.offset + stretch.length]
        if stretch.offset % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(stretch.shape)

    def _mapped(self) -> Tensor:
        import torch

        with self._lock:
            if self._bytes is None:
                size = self._path.stat().st_size
                try:
                    self._bytes = torch.from_file(str(self._path), shared=False, size=size, dtype=torch.uint8)
                except RuntimeError as error:
                    raise OSError(str(error)) from error
            return self._bytes

    def close(self) -> None:
        """Let go of the file; it stays mapped as long as a tensor of it is used."""
        self._bytes = None


def _open(path: Path, header: _files.Header) -> _Mapped | PlainFile | None:
    return PlainFile(path, _stretches(path, header)) if is_plain(path) else _map(path, header)


def _stretches(path: Path, header: _files.Header) -> Iterator[Stretch]:
    """Each tensor as torch is to see its bytes; a dtype that nobody here knows is none of torch's, whatever it is."""
    places = dict(_places(path, header))
    for entry in header.entries:
        (_, offset, length), meta = places[entry.name], entry.meta
        dtype = meta.dtype if entry.dtype in _files.DTYPES else ""
        yield Stretch(name=entry.name, offset=offset, length=length, shape=meta.shape, dtype=dtype)


def _map(path: Path, header: _files.Header) -> _Mapped | None:
    """The file, if the library would open it too; None where it refuses a dtype that is newer than itself."""
    try:
        with safe_open(path, framework="np"):
            return _Mapped(path, _stretches(path, header))
    except OSError as error:
        raise _folder.unreadable(path, error) from error
    except SafetensorError as error:
        if all(entry.dtype in _files.DTYPES for entry in header.entries):
            raise _files.corrupt(f"header of {path} is refused: {_folder.one_line(error)}") from error
        return None


FORMAT = Format(name="safetensors", recognises=recognises, open=open_path)
