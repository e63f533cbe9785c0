"""npz: NumPy's archive, one member an array; what MLX and JAX scripts write. Nothing is ever unpickled.

A folder may hold weights.npz or adapters.npz with its configuration beside it, or parts weights.00.npz, weights.01.npz.
Headers alone are read at first. An array that is stored is mapped, its checksum left alone; one that is compressed is
unpacked and verified when it is read, and is whole in memory until the next one is.

NumPy has no bfloat16: an array of it is saved as raw items of two bytes, and every such array is read as bfloat16 here.
No number of NumPy's own is stored so.

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from lora_check.errors import CorruptCheckpointError, UnknownFormatError, UnsafePickleError
from lora_check.formats import _folder
from lora_check.types import Format, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX, MEMBER = ".npz", ".npy"
WHOLE = ("weights.npz", "model.npz", "adapters.npz")
PARTS = "weights.{}.npz"
ZIP = b"PK"
CHUNK = 1 << 20
"""Bytes that are unpacked at a time."""

LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a member, before its bytes: the lengths of its name and of its extra field come last."""

DTYPES = {
    "b1": "bool",
    "u1": "uint8",
    "i1": "int8",
    "u2": "uint16",
    "i2": "int16",
    "u4": "uint32",
    "i4": "int32",
    "u8": "uint64",
    "i8": "int64",
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
    "c16": "complex128",
    "V2": "bfloat16",
}
"""NumPy's kind and size -> torch's name. Anything else is listed under NumPy's name, and cannot be read."""

REFUSALS = (ValueError, TypeError, SyntaxError, LookupError, EOFError, OverflowError, MemoryError, RecursionError)
DAMAGES = (*REFUSALS, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, struct.error)
"""What zipfile and numpy raise for an archive or a header that contradicts itself, or for an encrypted one."""


class Array(NamedTuple):
    """One array: its member of the archive, where its numbers begin in the member, how they lie."""

    path: Path
    member: zipfile.ZipInfo
    begin: int
    meta: TensorMeta
    fortran: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NpzCheckpoint:
    """Arrays of NumPy archives; safe to read from several threads."""

    location: str
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    _metas: Mapping[str, TensorMeta]
    _arrays: Mapping[str, Array]
    _maps: dict[Path, mmap] = field(repr=False)
    _last: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def metas(self) -> Mapping[str, TensorMeta]:
        """Name -> shape and dtype, in the order of the archive."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The array as stored: mapped, or unpacked where it is compressed."""
        array = self._arrays.get(name)
        data = self._maps.get(array.path) if array else None
        if array is None or data is None:
            raise _folder.absent_tensor(name, self.location, closed=array is not None)
        if array.meta.dtype not in DTYPES.values():
            message = f"array {name!r} of {array.path} is of NumPy's type {array.meta.dtype}"
            raise UnknownFormatError(f"{message}, which cannot be read here", hint="save it as a plain array of floats")
        return self._kept(array) if array.meta.unmapped else _mapped(data, array)

    def _kept(self, array: Array) -> Tensor:
        """A compressed array, which stays until another is asked for: pieces of one are asked for in turn."""
        found = self._last.get(array.meta.name)
        if found is None:
            self._last.clear()
            self._last[array.meta.name] = found = _unpacked(array)
        return found

    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""
        self._maps.clear()
        self._last.clear()


def recognises(source: Any) -> bool:
    """A .npz file, or a folder that holds one under a name that says it is the model or the adapter."""
    if not isinstance(source, Path):
        return False
    if source.is_dir():
        return any((source / name).is_file() for name in (*WHOLE, PARTS.format("00")))
    return source.suffix == SUFFIX


def open_path(source: Path) -> NpzCheckpoint:
    """Read the header of every array; no numbers are read.

    raises   UnsafePickleError: an array of Python objects, which would have to be unpickled
             CorruptCheckpointError: an archive or a header that contradicts itself
             UnknownFormatError: no arrays, or a version of them that is not read here
    """
    files = _weights(source) if source.is_dir() else (source,)
    arrays = {name: array for name, (_, array) in _folder.join({path: _arrays(path) for path in files}).items()}
    if not arrays:
        raise UnknownFormatError(f"{source} holds no arrays", hint="save named arrays with numpy.savez")
    return NpzCheckpoint(
        location=str(source),
        files=files,
        config=_folder.read_config(source if source.is_dir() else source.parent),
        _metas=MappingProxyType({name: array.meta for name, array in arrays.items()}),
        _arrays=arrays,
        _maps={path: _map(path) for path in files},
    )


def _weights(folder: Path) -> tuple[Path, ...]:
    chosen = next((folder / name for name in WHOLE if (folder / name).is_file()), None)
    return (chosen,) if chosen else _folder.counted(folder, PARTS)


def _map(path: Path) -> mmap:
    """The file, private: what is written to a tensor stays in memory."""
    try:
        with path.open("rb") as file:
            return mmap(file.fileno(), 0, access=ACCESS_COPY)
    except OSError as error:
        raise _folder.unreadable(path, error) from error


# ----------------------------------------------------------------------------------------------------- headers


def _arrays(path: Path) -> dict[str, Array]:
    """Name -> array, in the order of the archive."""
    if _folder.read_head(path, len(ZIP)) != ZIP:
        raise _corrupt(f"{path} is no zip archive, which a .npz file is")
    found: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for member in archive.infolist():
                array = _array(path, archive, member)
                if array.meta.name in found:
                    raise _corrupt(f"archive {path} holds array {array.meta.name!r} twice")
                found[array.meta.name] = array
    except OSError as error:
        raise _folder.unreadable(path, error) from error
    except DAMAGES as error:
        raise _corrupt(f"archive {path} cannot be read: {_folder.one_line(error)}") from error
    return found


def _array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """One member, its header judged against its size."""
    name, what = member.filename.removesuffix(MEMBER), f"array {member.filename!r} of {path}"
    with archive.open(member) as file:
        shape, fortran, dtype = _header(file, what)
        begin = file.tell()
    if dtype.hasobject:
        message = f"{what} holds Python objects, which would have to be unpickled; it was not"
        raise UnsafePickleError(message, hint="where you trust it, load it and save its tensors as safetensors")
    if any(type(size) is not int or size < 0 for size in shape):
        raise _corrupt(f"{what} has the impossible shape {shape}")
    wanted = begin + math.prod(shape) * dtype.itemsize
    if member.file_size != wanted:
        said = f"a header of {begin} bytes and {dtype.str} {shape} take {wanted}"
        raise _corrupt(f"{what} has {member.file_size} bytes; {said}")
    if member.compress_type == zipfile.ZIP_STORED and member.compress_size != wanted:
        raise _corrupt(f"{what} is not compressed, and yet {member.compress_size} bytes are to hold {wanted}")
    plain = dtype.fields is None and dtype.subdtype is None and dtype.isnative
    torch_name = DTYPES.get(f"{dtype.kind}{dtype.itemsize}") if plain else None
    stored = member.compress_type == zipfile.ZIP_STORED
    meta = TensorMeta(name=name, shape=tuple(shape), dtype=torch_name or f"numpy {dtype}", unmapped=not stored)
    return Array(path, member, begin, meta, fortran)


def _header(file: IO[bytes], what: str) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, order and dtype of an array."""
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(file)
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in readers:
            raise UnknownFormatError(f"{what} is of .npy version {version}", hint="save it as a plain array of floats")
        shape, fortran, dtype = readers[version](file)
    except (*REFUSALS, tokenize.TokenError) as error:
        raise _corrupt(f"header of {what} cannot be read: {_folder.one_line(error)}") from error
    return shape, fortran, dtype


# ----------------------------------------------------------------------------------------------------- numbers


def _mapped(data: mmap, array: Array) -> Tensor:
    """The numbers in the mapped file, after the headers of the member and of the array."""
    start = array.member.header_offset
    lengths = LOCAL_HEADER.unpack_from(data, start) if start + LOCAL_HEADER.size <= len(data) else (0, 0)
    begin = start + LOCAL_HEADER.size + sum(lengths) + array.begin
    if start + LOCAL_HEADER.size + sum(lengths) + array.member.file_size > len(data):
        raise _corrupt(f"array {array.meta.name!r} of {array.path} ends beyond the end of the file")
    return _tensor(data, array, begin)


def _unpacked(array: Array) -> Tensor:
    """The numbers of a compressed member, its checksum verified."""
    try:
        data = bytearray(array.member.file_size)
        with zipfile.ZipFile(array.path) as archive, archive.open(array.member) as member:
            _fill(data, member)
        return _tensor(data, array, array.begin)
    except OSError as error:
        raise _folder.unreadable(array.path, error) from error
    except DAMAGES as error:
        message = f"array {array.meta.name!r} of {array.path} cannot be unpacked: {_folder.one_line(error)}"
        raise _corrupt(message) from error


def _fill(data: bytearray, member: IO[bytes]) -> None:
    """All bytes of a member, and the end after them, where its checksum is verified."""
    view = memoryview(data)
    while view and (count := member.readinto(view[:CHUNK])):  # type: ignore[attr-defined]
        view = view[count:]
    if view or member.read(1):
        raise EOFError(f"{len(view)} bytes short" if view else "longer than it says")


def _tensor(data: mmap | bytearray, array: Array, begin: int) -> Tensor:
    import torch

    dtype, shape, count = getattr(torch, array.meta.dtype), array.meta.shape, array.meta.numel
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    flat: Tensor = torch.frombuffer(data, dtype=dtype, count=count, offset=begin)
    return flat.reshape(shape[::-1]).permute(tuple(range(len(shape)))[::-1]) if array.fortran else flat.reshape(shape)


def _corrupt(message: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(message, hint=_folder.DAMAGED)


FORMAT = Format(name="npz", recognises=recognises, open=open_path)
