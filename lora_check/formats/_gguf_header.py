"""The header of a GGUF file, read and judged here before a tensor is touched.

    magic "GGUF" · version · counts · key, type, value ... · name, sizes, type, offset ... · padding · data

The gguf library reads a header value by value into arrays, seconds for one vocabulary, and a lie about a count keeps it
busy for ever. Here a long array is stepped over and its length kept.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lora_check.errors import CorruptCheckpointError, UnknownFormatError
from lora_check.formats import _folder

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MOST_DIMENSIONS = 4
LONG = 1024
"""An array of more values is stepped over: the vocabulary, its scores and its merges."""

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
TEXT, ARRAY = 8, 9


class Entry(NamedTuple):
    """One tensor of a header: `kind` is ggml's number of its type, `begin` counts from the start of the file."""

    name: str
    kind: int
    shape: tuple[int, ...]
    begin: int


class Header(NamedTuple):
    """What one file says of itself and of its tensors, in file order."""

    metadata: Mapping[str, Any]
    entries: tuple[Entry, ...]
    alignment: int


def read_header(data: mmap, path: Path) -> Header:
    """Read the header of a mapped file that begins with MAGIC.

    returns  shapes as torch has them: ggml counts from the innermost dimension
    raises   CorruptCheckpointError: it contradicts itself; UnknownFormatError: a version that is not read here
    """
    cursor = _Cursor(data, f"header of {path}")
    version = cursor.take("<I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
        told = "big-endian" if swapped else f"of GGUF version {version}"
        raise UnknownFormatError(f"{path} is {told}, which is not read here", hint="convert the model again")
    tensors, keys = cursor.take("<Q"), cursor.take("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in metadata:
            raise cursor.corrupt(f"names {key!r} twice")
        metadata[key] = cursor.value(cursor.take("<I"))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.corrupt(f"has the alignment {alignment!r}, which is no power of two")
    entries = [_entry(cursor) for _ in range(tensors)]
    name, count = Counter(entry.name for entry in entries).most_common(1)[0] if entries else ("", 0)
    if count > 1:
        raise cursor.corrupt(f"names tensor {name!r} twice")
    start = -(-cursor.at // alignment) * alignment
    placed = (entry._replace(begin=start + entry.begin) for entry in entries)
    return Header(MappingProxyType(metadata), tuple(sorted(placed, key=lambda entry: entry.begin)), alignment)


def _entry(cursor: _Cursor) -> Entry:
    name = cursor.text()
    count = cursor.take("<I")
    if count > MOST_DIMENSIONS:
        raise cursor.corrupt(f"gives tensor {name!r} {count} dimensions")
    sizes = [cursor.take("<Q") for _ in range(count)]
    return Entry(name, kind=cursor.take("<I"), shape=tuple(reversed(sizes)), begin=cursor.take("<Q"))


class _Cursor:
    """A place in a mapped header; nothing is read beyond the end of the file."""

    def __init__(self, data: mmap, what: str) -> None:
        self.data, self.what, self.at = data, what, len(MAGIC)

    def corrupt(self, told: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self.what} {told}", hint=_folder.DAMAGED)

    def skip(self, count: int) -> int:
        """Step over this many bytes; where they began."""
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise self.corrupt(f"would reach byte {self.at}, but the file ends at byte {len(self.data)}")
        return begin

    def take(self, form: str) -> Any:
        """The next number."""
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))[0]

    def text(self) -> str:
        """The next text: its length, then UTF-8."""
        begin = self.skip(self.take("<Q"))
        try:
            return self.data[begin : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"holds a text that is no UTF-8, at byte {begin}") from error

    def value(self, kind: int) -> Any:
        """The next value of this kind."""
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            return self.array(self.take("<I"), self.take("<Q"))
        if kind not in SCALARS:
            raise self.corrupt(f"has a value of the unknown kind {kind} at byte {self.at}")
        return self.take(SCALARS[kind])

    def array(self, kind: int, count: int) -> Any:
        """The next array as a tuple; a long one as a phrase that says its length."""
        if kind == ARRAY:
            raise self.corrupt(f"has an array of arrays at byte {self.at}")
        if count <= LONG:
            return tuple(self.value(kind) for _ in range(count))
        if kind in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[kind]))
        else:
            self.skip_texts(count)
        return f"{count} values"

    def skip_texts(self, count: int) -> None:
        """Step over texts; a vocabulary has hundreds of thousands."""
        size_of, at, end = struct.Struct("<Q").unpack_from, self.at, len(self.data) - 8
        for _ in range(count):
            if at > end:
                break
            at += 8 + size_of(self.data, at)[0]
        else:
            self.skip(at - self.at)
            return
        self.skip(len(self.data))
