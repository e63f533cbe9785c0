"""What safetensors files say of themselves, wherever they lie: the files of a checkpoint, their headers, judged.

Source: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lora_check.errors import CorruptCheckpointError, UnknownFormatError
from lora_check.formats import _folder
from lora_check.types import TensorMeta

SUFFIX = ".safetensors"
WHOLE = ("model.safetensors", "model.safetensors.index.json")
ADAPTERS = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors")
OTHERS = (".bin", ".h5", ".msgpack")
"""Before `.index.json`: the index of another format."""

LONGEST_HEADER = 100_000_000
FIRST_READ = 1 << 16
"""Bytes that are read of a file at first: most headers lie whole in them, and a remote file is asked once."""

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
    """What one file says of its tensors, in file order, and of itself; their data begins at byte `begin`."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    begin: int

    @property
    def by_name(self) -> Mapping[str, Entry]:
        """Name -> its line."""
        return {entry.name: entry for entry in self.entries}


class Listed(NamedTuple):
    """The files of one checkpoint, and what their headers say; nothing but headers and JSON was read."""

    headers: Mapping[Path, Header]
    homes: Mapping[str, tuple[Path, Entry]]
    config: Mapping[str, Any]

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Name -> what the header says of it, in file order."""
        return MappingProxyType({name: entry.meta for name, (_, entry) in self.homes.items()})

    @property
    def metadata(self) -> Mapping[str, str]:
        """The `__metadata__` of all headers."""
        return MappingProxyType(dict(ChainMap(*(dict(header.metadata) for header in self.headers.values()))))


def listed(source: Path, each: Callable[[Callable[[Path], Header], Iterable[Path]], Iterable[Header]] = map) -> Listed:
    """The checkpoint of a folder, an index or a file.

    each     reads the headers of several files: one after the other, or at once
    raises   CorruptCheckpointError: header, offsets, index or shards contradict themselves, or a shard is not there
             WrongInputError: the shards of two checkpoints, and no index that says which is meant
    """
    folder = source.is_dir()
    paths = weights(source) if folder else (source,)
    index = _folder.read_index(paths[0]) if is_index(paths[0]) else None
    if folder and index is None:
        _folder.whole_set(source, paths)
    files = paths if index is None else tuple(sorted(set(index.values())))
    headers = dict(zip(files, each(read_header, files), strict=True))
    homes = _folder.join({path: header.by_name for path, header in headers.items()})
    if index is not None:
        _folder.match_index(paths[0], index, {name: path for name, (path, _) in homes.items()})
    return Listed(headers, homes, _folder.read_config(source if folder else source.parent))


def read_header(path: Path) -> Header:
    """Read and judge the header of one file.

    raises   CorruptCheckpointError naming file and tensor
    """
    size, what = path.stat().st_size, f"header of {path}"
    head = _folder.read_head(path, FIRST_READ)
    end = 8 + int.from_bytes(head[:8], "little")
    if size < 8:
        raise corrupt(f"{path} is {size} bytes long, too short for a safetensors header")
    if end - 8 > LONGEST_HEADER:
        raise corrupt(f"{what} claims {end - 8} bytes; this is no safetensors file")
    if end > size:
        raise corrupt(f"{what} would end at byte {end}, but the file ends at byte {size}")
    raw = (head if end <= len(head) else _folder.read_head(path, end))[8:end]
    fields = _folder.parse_object(raw, what, CorruptCheckpointError)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt(f"{what} has a __metadata__ that does not map text to text")
    entries = [_entry(name, value, size - end, what) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _no_gaps(entries, size - end, what)
    return Header(tuple(entries), metadata, end)


def _entry(name: str, fields: Any, room: int, what: str) -> Entry:
    fields = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise corrupt(f"{what} lacks dtype, shape or offsets of tensor {name!r}")
    begin, end = offsets
    if begin > end:
        raise corrupt(f"{what} lets tensor {name!r} end at byte {end}, before its begin at {begin}")
    if end > room:
        raise corrupt(f"{what} lets tensor {name!r} end at data byte {end}, but the file has only {room}")
    bits = math.prod(shape) * DTYPES[dtype][1] if dtype in DTYPES else 8 * (end - begin)
    if bits != 8 * (end - begin):
        raise corrupt(f"{what} gives tensor {name!r} {end - begin} bytes; {dtype} {shape} takes {bits // 8}")
    return Entry(name, dtype, tuple(shape), begin, end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _no_gaps(entries: Sequence[Entry], room: int, what: str) -> None:
    done, before = 0, ""
    for entry in entries:
        if entry.begin < done:
            raise corrupt(f"{what} lets tensor {entry.name!r} overlap {before!r} at data byte {entry.begin}")
        if entry.begin > done:
            raise corrupt(f"{what} leaves a gap at data byte {done}, before tensor {entry.name!r}")
        done, before = entry.end, entry.name
    if done < room:
        raise corrupt(f"{what} leaves the last {room - done} bytes to no tensor, after {before!r}")


def weights(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that make up the checkpoint, or its index; transformers' order of preference."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    chosen = next((name for name in WHOLE if name in names), None)
    if chosen is not None:
        return (folder / chosen,)
    indexes = [name for name in names if is_index(folder / name)]
    if len(indexes) == 1:
        return (folder / indexes[0],)
    shards = [name for name in names if name.endswith(SUFFIX)]
    models = [name for name in shards if name not in ADAPTERS]
    return tuple(folder / name for name in models or [name for name in ADAPTERS if name in shards][:1])


def is_index(path: Path) -> bool:
    """Whether a file is the index of shards in this format."""
    return path.name.endswith(_folder.INDEX) and not path.name.removesuffix(_folder.INDEX).endswith(OTHERS)


def corrupt(message: str) -> CorruptCheckpointError:
    """The error of a file that contradicts itself."""
    return CorruptCheckpointError(message, hint=_folder.DAMAGED)


def unreadable(name: str, path: Path, dtype: str) -> UnknownFormatError:
    """The error of a tensor whose dtype is newer than the libraries here."""
    message = f"tensor {name!r} of {path} is stored as {dtype}, which cannot be read here"
    return UnknownFormatError(message, hint="install a torch and a safetensors that know this dtype")
