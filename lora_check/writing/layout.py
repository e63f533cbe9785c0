"""Names, shapes and dtypes -> the safetensors files that are to hold them: BASE's own, or transformers' shards.

A file is a length, a header in JSON, and the tensors one after the other. Wider elements come first, as the library of
the format has it, so that every tensor begins at a multiple of its width.

Source: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_check.errors import UnknownFormatError, UsageError
from lora_check.formats import _folder
from lora_check.formats._safetensors_files import DTYPES, SUFFIX, Entry, read_header
from lora_check.types import TensorMeta

INDEX = f"model{SUFFIX}{_folder.INDEX}"
PATTERN = f"model{{suffix}}{SUFFIX}"
LARGEST = "5GB"
"""Bytes of a shard where BASE has none of its own, so that no loader has to map more at once."""

ALIGNMENT = 8
METADATA = {"format": "pt"}
HEADER_NAMES = {name: (header, bits) for header, (name, bits) in DTYPES.items() if name}
"""Torch name -> (header name, bits)."""

Metas = Mapping[str, TensorMeta]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file to be written; offsets of its entries count from the end of the header, which is `head`."""

    name: str
    entries: tuple[Entry, ...]
    head: bytes

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + self.data

    @property
    def data(self) -> int:
        """Bytes of its tensors."""
        return self.entries[-1].end if self.entries else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The files of a checkpoint; `index` names the one that says which tensor lies in which, if there is one."""

    shards: tuple[Shard, ...]
    index: str = ""
    map: Mapping[str, Any] | None = None

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


def like_base(metas: Metas, files: Sequence[Path]) -> Layout:
    """BASE's own safetensors files, in their order; what BASE does not have comes last, in the last of them.

    metas   of what is to be written; what is not among them is left out
    """
    headers = {path: read_header(path) for path in files}
    homes = {entry.name: path for path, header in headers.items() for entry in header.entries}
    held: dict[Path, list[TensorMeta]] = {path: [] for path in files}
    for name, meta in metas.items():
        held[homes.get(name, files[-1])].append(meta)
    stored = {entry.name: entry.dtype for header in headers.values() for entry in header.entries}
    shards = tuple(_shard(path.name, held[path], stored, headers[path].metadata) for path in files)
    known = _index_of(files)
    if known is None and len(files) == 1:
        return Layout(shards=shards)
    return _indexed(shards, known.name if known else INDEX, _folder.read_object(known) if known else {}, metas)


def in_shards(metas: Metas, limit: str | int | None) -> Layout:
    """One model.safetensors, or as many shards as a limit asks for, named and filled as transformers does.

    limit    bytes, or text such as "5GB"; None: `LARGEST`
    raises   UsageError: it is no size
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        split = split_state_dict_into_shards_factory(
            dict(metas),
            get_storage_size=lambda meta: meta.nbytes,
            filename_pattern=PATTERN,
            max_shard_size=_size(limit),
        )
    except ValueError:
        raise _no_size(limit) from None
    shards = tuple(
        _shard(file, [metas[name] for name in names], {}, {}) for file, names in split.filename_to_tensors.items()
    )
    return _indexed(shards, INDEX, {}, metas) if split.is_sharded else Layout(shards=shards)


def _size(limit: str | int | None) -> str | int:
    if limit is None:
        return LARGEST
    number = limit if isinstance(limit, int) else limit.strip().upper()
    whole = int(number) if isinstance(number, str) and number.isascii() and number.isdigit() else number
    if isinstance(whole, int) and whole <= 0:
        raise _no_size(limit)
    return whole


def _no_size(limit: object) -> UsageError:
    return UsageError(f"{limit!r} is no size of a shard", hint="give bytes, or a number with KB, MB, GB or TB: 5GB")


def _indexed(shards: tuple[Shard, ...], name: str, before: Mapping[str, Any], metas: Metas) -> Layout:
    """With an index: what BASE's says beside the map is kept, sizes are counted anew."""
    homes = {entry.name: shard.name for shard in shards for entry in shard.entries}
    order = [*(one for one in before.get("weight_map", {}) if one in homes), *homes]
    said = before.get("metadata")
    told: dict[str, Any] = dict(said) if isinstance(said, dict) else {}
    told["total_size"] = sum(shard.data for shard in shards)
    if "total_parameters" in told:
        told["total_parameters"] = sum(meta.numel for meta in metas.values())
    index = {**before, "metadata": told, "weight_map": {one: homes[one] for one in dict.fromkeys(order)}}
    return Layout(shards=shards, index=name, map=index)


def _index_of(files: Sequence[Path]) -> Path | None:
    """The index that names these files and no others."""
    names = {path.name for path in files}
    for path in sorted(files[0].parent.glob(f"*{SUFFIX}{_folder.INDEX}")):
        weights = _folder.read_object(path).get("weight_map")
        if isinstance(weights, dict) and set(map(str, weights.values())) == names:
            return path
    return None


def _shard(name: str, metas: Iterable[TensorMeta], stored: Mapping[str, str], metadata: Mapping[str, str]) -> Shard:
    """A file of these tensors.

    stored   tensor -> the dtype that a header gave it, for those which torch has no name for
    """
    lines = [_line(meta, stored.get(meta.name, "")) for meta in metas]
    lines.sort(key=lambda line: -line[1])
    entries, end = [], 0
    for meta, bits, dtype, shape in lines:
        begin, end = end, end + math.prod(shape) * bits // 8
        entries.append(Entry(meta.name, dtype, shape, begin, end))
    return Shard(name=name, entries=tuple(entries), head=_head(entries, METADATA | dict(metadata)))


def _line(meta: TensorMeta, stored: str) -> tuple[TensorMeta, int, str, tuple[int, ...]]:
    """A tensor, the bits of an element, the header's name of its dtype, and its shape in units of that."""
    if meta.dtype not in HEADER_NAMES:
        raise UnknownFormatError(
            f"tensor {meta.name!r} is stored as {meta.stored_as}, which cannot be written here",
            hint="give --dtype to have a quantised model decoded, or a base in a dtype that torch knows",
        )
    header, bits = HEADER_NAMES[meta.dtype]
    packed = bits < ALIGNMENT and bool(meta.shape)
    shape = (*meta.shape[:-1], meta.shape[-1] * 2) if packed else meta.shape
    return meta, bits, stored if DTYPES.get(stored, ("", 0))[0] == meta.dtype else header, shape


def _head(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and header, filled up with spaces so that the tensors begin at a multiple of 8 bytes."""
    lines = {
        entry.name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]}
        for entry in entries
    }
    text = json.dumps({"__metadata__": dict(metadata), **lines}, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text + b" " * (-len(text) % ALIGNMENT)
    return len(padded).to_bytes(8, "little") + padded
