"""gguf: the files of llama.cpp, one or in parts (name-00001-of-00003.gguf), and a folder that holds one model.

Floats are mapped in their own dtype. A quantised tensor has a dtype of its own, such as "gguf-q4_1": its rounding is
not modelled, so a target in it is never verified or refuted. `read` gives its blocks as they are stored, bytes in
rows, and so two quantised bystanders are compared byte for byte; `dequantised` gives the numbers that they stand for.

llama.cpp's converter changes some tensors on the way from transformers: the rows of q and k are put in another order,
1 is added to the norms of Gemma. Such a tensor has the dtype "float32-permuted" or "float32-shifted": it is compared
with one of the same kind and with no other.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; numbers of types and blocks are the gguf library's
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_check.errors import CorruptCheckpointError, UnknownFormatError, WrongInputError
from lora_check.formats import _folder, _gguf_header, _gguf_model
from lora_check.formats._gguf_header import Entry, Header
from lora_check.types import Format, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".gguf"
DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
"""ggml's name -> torch's; any other type is stored in blocks."""


class Kind(NamedTuple):
    """A ggml type: `block` elements of a row take `size` bytes."""

    name: str
    block: int
    size: int

    @property
    def dtype(self) -> str:
        """The dtype of torch, or a name that no arithmetic is modelled for."""
        return DTYPES.get(self.name, f"gguf-{self.name.lower()}")


class Place(NamedTuple):
    """Where a tensor lies; `kind` is None for a type that the gguf library does not know."""

    path: Path
    entry: Entry
    kind: Kind | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufCheckpoint:
    """Tensors of mapped GGUF files; safe to read from several threads."""

    location: str
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    _metas: Mapping[str, TensorMeta]
    _places: Mapping[str, Place]
    _maps: dict[Path, mmap] = field(repr=False)

    def metas(self) -> Mapping[str, TensorMeta]:
        """Name -> shape (out, in) in elements, and dtype, in file order."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """Map the tensor as stored; of a quantised one the blocks, (..., bytes of a row) uint8."""
        place = self._places.get(name)
        data = self._maps.get(place.path) if place else None
        if place is None or data is None:
            raise _folder.absent_tensor(name, self.location, closed=place is not None)
        if place.kind is None:
            message = f"tensor {name!r} of {place.path} is stored as ggml type {place.entry.kind}"
            raise UnknownFormatError(f"{message}, which the gguf library does not know", hint="pip install -U gguf")
        return _mapped(data, place.entry, place.kind)

    def dequantised(self, name: str, lines: slice | None = None) -> Tensor:
        """The numbers that a quantised tensor stands for, shaped as `metas` says, float32; others as `read` gives them.

        lines    some of its rows, counted through all its matrices: (lines, columns); elements, where it is a vector
                 of numbers
        raises   UnknownFormatError: the gguf library cannot undo this type
        """
        stored, coded = self.read(name), self._metas[name].dtype.startswith("gguf-")
        if lines is None:
            return _dequantised(stored, self._places[name]).reshape(self._metas[name].shape) if coded else stored
        if not coded:
            return stored.reshape(-1, stored.shape[-1])[lines] if stored.ndim > 1 else stored[lines]
        rows = stored.reshape(-1, stored.shape[-1])
        return _dequantised(rows if stored.ndim == 1 else rows[lines], self._places[name])

    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""
        self._maps.clear()


def recognises(source: Any) -> bool:
    """A .gguf file, or a folder that holds one."""
    if not isinstance(source, Path):
        return False
    return any(source.glob(f"*{SUFFIX}")) if source.is_dir() else source.suffix == SUFFIX


def open_path(source: Path) -> GgufCheckpoint:
    """Read every header and map every file; no tensor data is read.

    raises   CorruptCheckpointError: a header that contradicts itself or the file, or a part that is not there
             UnknownFormatError: no gguf library; WrongInputError: several models in one folder, or no model
    """
    files = _folder.all_parts(_folder.first_part(source, f"*{SUFFIX}") if source.is_dir() else source)
    kinds = _kinds(source)
    maps = {path: _map(path) for path in files}
    headers = {path: _gguf_header.read_header(data, path) for path, data in maps.items()}
    _judge_parts(headers)
    for path, header in headers.items():
        _judge(path, header, kinds, len(maps[path]))
    entries = _folder.join({path: {one.name: one for one in header.entries} for path, header in headers.items()})
    places = {name: Place(path, entry, kinds.get(entry.kind)) for name, (path, entry) in entries.items()}
    config = _gguf_model.as_config(headers[files[0]].metadata, places)
    return GgufCheckpoint(
        location=str(source),
        files=files,
        config=config,
        _metas=MappingProxyType({name: _meta(place, config["gguf_changed"]) for name, place in places.items()}),
        _places=places,
        _maps=maps,
    )


# ------------------------------------------------------------------------------------------------------- files


def _map(path: Path) -> mmap:
    """The file, private: what is written to a tensor stays in memory."""
    if _folder.read_head(path, len(_gguf_header.MAGIC)) != _gguf_header.MAGIC:
        raise _corrupt(f"{path} does not begin as a GGUF file does")
    try:
        with path.open("rb") as file:
            return mmap(file.fileno(), 0, access=ACCESS_COPY)
    except OSError as error:
        raise _folder.unreadable(path, error) from error


def _kinds(source: Path) -> dict[int, Kind]:
    """ggml's number -> type."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        message = f"{source} can only be read with the gguf library, which is not installed"
        raise UnknownFormatError(message, hint="pip install gguf") from error
    return {int(kind): Kind(kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def _meta(place: Place, changed: Mapping[str, str]) -> TensorMeta:
    name, shape = place.entry.name, place.entry.shape
    dtype = place.kind.dtype if place.kind else f"gguf-type-{place.entry.kind}"
    if name in changed and not dtype.startswith("gguf-"):
        dtype = f"{dtype}-{changed[name]}"
    return TensorMeta(name=name, shape=shape, dtype=dtype)


# ----------------------------------------------------------------------------------------------------- tensors


def _mapped(data: mmap, entry: Entry, kind: Kind) -> Tensor:
    import torch

    dtype = getattr(torch, DTYPES.get(kind.name, "uint8"))
    shape = entry.shape if kind.name in DTYPES else (*entry.shape[:-1], entry.shape[-1] // kind.block * kind.size)
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=entry.begin).reshape(shape)


def _dequantised(blocks: Tensor, place: Place) -> Tensor:
    import torch
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        numbers = dequantize(blocks.numpy(), GGMLQuantizationType(place.entry.kind))
    except NotImplementedError as error:
        message = f"tensor {place.entry.name!r} of {place.path} cannot be dequantised: {_folder.one_line(error)}"
        raise UnknownFormatError(message, hint="pip install -U gguf") from error
    return torch.from_numpy(numbers)


# ----------------------------------------------------------------------------------------------------- judging


def _judge_parts(headers: Mapping[Path, Header]) -> None:
    """Check that the files are what they say they are: a model, and as many parts of it as there are."""
    first = next(iter(headers))
    kind = headers[first].metadata.get("general.type", "model")
    if kind not in ("model", "adapter"):
        message = f"{first} is a GGUF file of type {kind!r}, and only models and adapters are read"
        raise WrongInputError(message, hint="give the model, and an adapter as PEFT's save_pretrained writes it")
    for number, (path, header) in enumerate(headers.items()):
        place = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1) or 1
        if place != (number, len(headers)):
            message = f"header of {path} calls it part {place[0]} of {place[1]}, but it is part {number}"
            raise CorruptCheckpointError(f"{message} of {len(headers)}", hint=_folder.MIXED)
    told, found = headers[first].metadata.get("split.tensors.count"), sum(len(one.entries) for one in headers.values())
    if told not in (None, found):
        message = f"header of {first} promises {told} tensors, its parts hold {found}"
        raise CorruptCheckpointError(message, hint=_folder.MIXED)


def _judge(path: Path, header: Header, kinds: Mapping[int, Kind], size: int) -> None:
    """Check that every tensor lies within the file, aligned, and on no other."""
    done, before = 0, ""
    for entry, kind in ((one, kinds.get(one.kind)) for one in header.entries):
        named = f"header of {path} lets tensor {entry.name!r}"
        if entry.begin % header.alignment or entry.begin > size:
            raise _corrupt(f"{named} begin at byte {entry.begin}, which is not aligned or not in the file")
        if entry.begin < done:
            raise _corrupt(f"{named} overlap {before!r} at byte {entry.begin}")
        if kind is None:
            continue
        if kind.block > 1 and (not entry.shape or entry.shape[-1] % kind.block):
            raise _corrupt(f"{named} have the shape {entry.shape}, which {kind.name} cannot store in its blocks")
        done, before = entry.begin + math.prod(entry.shape) // kind.block * kind.size, entry.name
        if done > size:
            raise _corrupt(f"{named} end at byte {done}, but the file ends at byte {size}")


def _corrupt(message: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(message, hint=_folder.DAMAGED)


FORMAT = Format(name="gguf", recognises=recognises, open=open_path)
