"""safetensors: one file, an index and its shards, or a folder of shards without an index.

The header is read and judged here before the library maps the file, so that a lie in it is told with the name
of the tensor. A tensor is a view of the mapped file: no byte is read before it is touched, none is copied.

Source: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lora_check.errors import CorruptCheckpointError, UnknownFormatError
from lora_check.formats import _folder
from lora_check.types import Format, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
WHOLE = ("model.safetensors", "model.safetensors.index.json")
ADAPTERS = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors")
OTHERS = (".bin", ".h5", ".msgpack")
"""Before `.index.json`: the index of another format."""

LONGEST_HEADER = 100_000_000

DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "U16": ("uint16", 16),
    "I16": ("int16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "U32": ("uint32", 32),
    "I32": ("int32", 32),
    "F32": ("float32", 32),
    "U64": ("uint64", 64),
    "I64": ("int64", 64),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("", 6),
    "F6_E3M2": ("", 6),
    "F4": ("float4_e2m1fn_x2", 4),
}
"""Header name -> (torch name, bits). What torch does not have keeps its header name in lower case."""


class Entry(NamedTuple):
    """One line of a header; offsets count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def meta(self) -> TensorMeta:
        """The tensor as torch sees it: two 4-bit numbers are one element of the last axis."""
        dtype = DTYPES[self.dtype][0] if self.dtype in DTYPES else ""
        if not dtype:
            return TensorMeta(name=self.name, shape=self.shape, dtype=self.dtype.lower())
        packed = self.dtype == "F4" and bool(self.shape)
        shape = (*self.shape[:-1], self.shape[-1] // 2) if packed else self.shape
        return TensorMeta(name=self.name, shape=shape, dtype=dtype)


class Header(NamedTuple):
    """What one file says of its tensors, in file order, and of itself."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]

    @property
    def by_name(self) -> Mapping[str, Entry]:
        """Name -> its line."""
        return {entry.name: entry for entry in self.entries}


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
            raise _unreadable(*self._strange(home))
        try:
            tensor: Tensor = handle.get_tensor(name)
        except OSError as error:
            raise _folder.unreadable(home, error) from error
        except (SafetensorError, AttributeError) as error:
            raise _unreadable(name, home, self._metas[name].dtype) from error
        return tensor

    def _strange(self, home: Path) -> tuple[str, Path, str]:
        """The tensor for whose dtype the library refuses a whole file."""
        known = {dtype for dtype, _ in DTYPES.values()}
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
    return bool(_weights(source)) if source.is_dir() else _is_index(source) or source.suffix == SUFFIX


def open_path(source: Path) -> SafetensorsCheckpoint:
    """Read every header and map every file; no tensor data is read.

    raises   CorruptCheckpointError: header, offsets, index or shards contradict themselves, or a shard is not there
             WrongInputError: the shards of two checkpoints, and no index that says which is meant
    """
    paths = _weights(source) if source.is_dir() else (source,)
    index = _folder.read_index(paths[0]) if _is_index(paths[0]) else None
    if source.is_dir() and index is None:
        _folder.whole_set(source, paths)
    files = paths if index is None else tuple(sorted(set(index.values())))
    headers = {path: read_header(path) for path in files}
    entries = _folder.join({path: header.by_name for path, header in headers.items()})
    homes = {name: path for name, (path, _) in entries.items()}
    if index is not None:
        _folder.match_index(paths[0], index, homes)
    return SafetensorsCheckpoint(
        location=str(source),
        files=files,
        config=_folder.read_config(source if source.is_dir() else source.parent),
        metadata=MappingProxyType(dict(ChainMap(*(dict(header.metadata) for header in headers.values())))),
        _metas=MappingProxyType({name: entry.meta for name, (_, entry) in entries.items()}),
        _homes=homes,
        _handles={path: _map(path, header) for path, header in headers.items()},
    )


def read_header(path: Path) -> Header:
    """Read and judge the header of one file.

    raises   CorruptCheckpointError naming file and tensor
    """
    size, what = path.stat().st_size, f"header of {path}"
    end = 8 + int.from_bytes(_folder.read_head(path, 8), "little")
    if size < 8:
        raise _corrupt(f"{path} is {size} bytes long, too short for a safetensors header")
    if end - 8 > LONGEST_HEADER:
        raise _corrupt(f"{what} claims {end - 8} bytes; this is no safetensors file")
    if end > size:
        raise _corrupt(f"{what} would end at byte {end}, but the file ends at byte {size}")
    fields = _folder.parse_object(_folder.read_head(path, end)[8:], what, CorruptCheckpointError)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(f"{what} has a __metadata__ that does not map text to text")
    entries = [_entry(name, value, size - end, what) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _no_gaps(entries, size - end, what)
    return Header(tuple(entries), metadata)


def _entry(name: str, fields: Any, room: int, what: str) -> Entry:
    fields = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise _corrupt(f"{what} lacks dtype, shape or offsets of tensor {name!r}")
    begin, end = offsets
    if begin > end:
        raise _corrupt(f"{what} lets tensor {name!r} end at byte {end}, before its begin at {begin}")
    if end > room:
        raise _corrupt(f"{what} lets tensor {name!r} end at data byte {end}, but the file has only {room}")
    bits = math.prod(shape) * DTYPES[dtype][1] if dtype in DTYPES else 8 * (end - begin)
    if bits != 8 * (end - begin):
        raise _corrupt(f"{what} gives tensor {name!r} {end - begin} bytes; {dtype} {shape} takes {bits // 8}")
    return Entry(name, dtype, tuple(shape), begin, end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _no_gaps(entries: Sequence[Entry], room: int, what: str) -> None:
    done, before = 0, ""
    for entry in entries:
        if entry.begin < done:
            raise _corrupt(f"{what} lets tensor {entry.name!r} overlap {before!r} at data byte {entry.begin}")
        if entry.begin > done:
            raise _corrupt(f"{what} leaves a gap at data byte {done}, before tensor {entry.name!r}")
        done, before = entry.end, entry.name
    if done < room:
        raise _corrupt(f"{what} leaves the last {room - done} bytes to no tensor, after {before!r}")


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


def _map(path: Path, header: Header) -> _Mapped | None:
    """The file as the library will map it; None where it refuses a dtype that is newer than itself."""
    try:
        with safe_open(path, framework="np"):
            return _Mapped(path)
    except OSError as error:
        raise _folder.unreadable(path, error) from error
    except SafetensorError as error:
        if all(entry.dtype in DTYPES for entry in header.entries):
            raise _corrupt(f"header of {path} is refused: {_folder.one_line(error)}") from error
        return None


def _weights(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that make up the checkpoint, or its index; transformers' order of preference."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    chosen = next((name for name in WHOLE if name in names), None)
    if chosen is not None:
        return (folder / chosen,)
    indexes = [name for name in names if _is_index(folder / name)]
    if len(indexes) == 1:
        return (folder / indexes[0],)
    shards = [name for name in names if name.endswith(SUFFIX)]
    models = [name for name in shards if name not in ADAPTERS]
    return tuple(folder / name for name in models or [name for name in ADAPTERS if name in shards][:1])


def _is_index(path: Path) -> bool:
    return path.name.endswith(_folder.INDEX) and not path.name.removesuffix(_folder.INDEX).endswith(OTHERS)


def _corrupt(message: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(message, hint=_folder.DAMAGED)


def _unreadable(name: str, path: Path, dtype: str) -> UnknownFormatError:
    message = f"tensor {name!r} of {path} is stored as {dtype}, which cannot be read here"
    return UnknownFormatError(message, hint="install a torch and a safetensors that know this dtype")


FORMAT = Format(name="safetensors", recognises=recognises, open=open_path)
