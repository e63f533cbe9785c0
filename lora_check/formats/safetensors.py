"""safetensors: one file, an index and its shards, or a folder of shards without an index.

The header is read and judged here before the library maps the file, so that a lie in it is told with the name
of the tensor. A tensor is a view of the mapped file: no byte is read before it is touched, none is copied.

Source: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lora_check.formats import _folder
from lora_check.formats import _safetensors_files as _files
from lora_check.types import Format, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsCheckpoint:
    """Tensors of mapped safetensors files; safe to read from several threads.

    metadata   the `__metadata__` of all headers
    """

    location: str
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    _metas: Mapping[str, TensorMeta]
    _homes: Mapping[str, Path]
    _handles: dict[Path, _Mapped | None] = field(repr=False)

    @property
    def homes(self) -> Mapping[str, str]:
        """Tensor -> the name of the file that holds it."""
        return {name: path.name for name, path in self._homes.items()}

    def metas(self) -> Mapping[str, TensorMeta]:
        """Name -> what the header says of it, in file order."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """Map the tensor, as stored; writing to it changes neither the file nor what others read."""
        home = self._homes.get(name)
        if home is None or home not in self._handles:
            raise _folder.absent_tensor(name, self.location, closed=home is not None)
        handle = self._handles[home]
        if handle is None:
            raise _files.unreadable(*self._strange(home))
        try:
            tensor: Tensor = handle.get_tensor(name)
        except OSError as error:
            raise _folder.unreadable(home, error) from error
        except (SafetensorError, AttributeError) as error:
            raise _files.unreadable(name, home, self._metas[name].dtype) from error
        return tensor

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
    """Read every header and map every file; no tensor data is read.

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
        _handles={path: _map(path, header) for path, header in found.headers.items()},
    )


class _Mapped:
    """A file that the library maps when the first tensor is asked for: only then is torch needed."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._handle: Any = None

    def get_tensor(self, name: str) -> Any:
        """The tensor, mapped."""
        with self._lock:
            if self._handle is None:
                self._handle = safe_open(self._path, framework="pt")
        return self._handle.get_tensor(name)

    def close(self) -> None:
        """Let go of the file."""
        if self._handle is not None:
            self._handle.__exit__(None, None, None)


def _map(path: Path, header: _files.Header) -> _Mapped | None:
    """The file as the library will map it; None where it refuses a dtype that is newer than itself."""
    try:
        with safe_open(path, framework="np"):
            return _Mapped(path)
    except OSError as error:
        raise _folder.unreadable(path, error) from error
    except SafetensorError as error:
        if all(entry.dtype in _files.DTYPES for entry in header.entries):
            raise _files.corrupt(f"header of {path} is refused: {_folder.one_line(error)}") from error
        return None


FORMAT = Format(name="safetensors", recognises=recognises, open=open_path)
