"""NAME[INDEX] -> chosen elements of both checkpoints, side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, NamedTuple

import torch

from lora_check.diffing.measure import NUMBERS, wide
from lora_check.diffing.nouns import Entry, Shown, Value
from lora_check.diffing.pairs import matches
from lora_check.errors import InputError, UsageError
from lora_check.sources import matrix
from lora_check.types import Checkpoint, TensorMeta

ASKED = re.compile(r"(?P<glob>.+?)(?:\[(?P<index>[\d\s:,.-]*)\])?")
AXIS = re.compile(r"-?\d+|(-?\d+)?:(-?\d+)?(:\d+)?")
SYNTAX = "write NAME, or NAME[0:3, :5] with a whole number or start:stop:step for each axis"

FIRST = 4
"""Elements that are shown where none are named, beside the one that changed most and the first NaN or infinity."""

MOST = 1000
"""Elements of one tensor that are shown at most."""

TENSORS = 10
"""Tensors that one pattern shows, unless all are asked for."""

Axis = int | slice


class Asked(NamedTuple):
    """A pattern, and the axes of its index; None: the first few elements, and the largest change."""

    glob: str
    text: str
    axes: tuple[Axis, ...] | None


def parse(text: str) -> Asked:
    """NAME or NAME[INDEX]; brackets at the end are an index where nothing but numbers and colons is in them.

    raises   UsageError: it is none
    """
    found = ASKED.fullmatch(text)
    if found is None:
        raise UsageError(f"{text!r} names no tensor", hint=SYNTAX)
    if found["index"] is None:
        return Asked(text, "", None)
    index = found["index"].strip()
    axes = tuple(_axis(one.strip(), text) for one in index.split(",")) if index else ()
    return Asked(found["glob"], f"[{index}]", axes)


def _axis(text: str, whole: str) -> Axis:
    if not AXIS.fullmatch(text) or text.endswith(":0"):
        raise UsageError(f"{text!r} in {whole!r} is no index", hint=SYNTAX)
    if ":" not in text:
        return int(text)
    return slice(*(int(part) if part else None for part in text.split(":")))


def chosen(asked: Asked, entries: Sequence[Entry]) -> list[Entry]:
    """The tensors that a pattern means.

    raises   UsageError: none, or one that has no such index
    """
    found = [one for one in entries if matches(one.names, asked.glob)]
    if not found:
        raise UsageError(
            f"--show {asked.glob}: neither A nor B has a tensor of such a name", hint="see --all for names"
        )
    for one in found:
        _demand(asked, one)
    return found


def _demand(asked: Asked, one: Entry) -> None:
    """Raise UsageError where the index names what the tensor does not have in either checkpoint."""
    shapes = dict.fromkeys(meta.shape for meta in (one.a, one.b) if meta is not None)
    if asked.axes is not None and all(_spans(asked.axes, shape) is None for shape in shapes):
        told = " and ".join(str(shape) for shape in shapes)
        raise UsageError(f"--show {one.name}{asked.text}: the shape is {told}", hint=SYNTAX)


def _spans(axes: Sequence[Axis], shape: tuple[int, ...]) -> list[range] | None:
    """The places along each axis; None: there are no such places in this shape."""
    if len(axes) > len(shape):
        return None
    spans = list[range]()
    for axis, size in zip((*axes, *[slice(None)] * (len(shape) - len(axes))), shape, strict=True):
        if isinstance(axis, int) and not -size <= axis < size:
            return None
        spans.append(range(size)[axis] if isinstance(axis, slice) else range(axis % size, axis % size + 1))
    return spans


# ------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, slots=True)
class _Reader:
    """One tensor, of which elements are read."""

    rows: Any
    meta: TensorMeta

    def value(self, place: tuple[int, ...]) -> complex | None:
        """The element there; None: it has none."""
        shape = self.meta.shape
        if len(place) != len(shape) or any(index >= size for index, size in zip(place, shape, strict=True)):
            return None
        flat, width = _flat(place, shape), int(self.rows.shape[1])
        row = flat // width
        element = self.rows[row : row + 1].reshape(-1)[flat % width : flat % width + 1]
        return _number(element)


def _number(element: torch.Tensor) -> complex:
    """Whole numbers stay what they are."""
    if element.is_floating_point() or element.is_complex():
        return wide(element).item()
    return int(element.item())


def _flat(place: Sequence[int], shape: Sequence[int]) -> int:
    """How many elements come before this one."""
    flat = 0
    for index, size in zip(place, shape, strict=True):
        flat = flat * size + index
    return flat


def show(asked: Asked, one: Entry, a: Checkpoint, b: Checkpoint) -> Shown:
    """The elements that are asked for of one tensor."""
    try:
        readers = _reader(a, one.a), _reader(b, one.b)
        strange = next((side.rows.dtype for side in readers if side and side.rows.dtype not in NUMBERS), None)
        if strange is not None:
            return Shown(
                name=one.name, index=asked.text, values=(), reason=f"{strange} holds no numbers that can be read"
            )
        places, more = _places(asked, one)
        values = tuple(Value(place=place, a=_at(readers[0], place), b=_at(readers[1], place)) for place in places)
    except InputError as error:
        return Shown(name=one.name, index=asked.text, values=(), reason=error.message)
    digits = tuple(_digits(side.rows.dtype) if side else 0 for side in readers)
    return Shown(name=one.name, index=asked.text, values=values, more=more, digits=(digits[0], digits[1]))


def _reader(checkpoint: Checkpoint, meta: TensorMeta | None) -> _Reader | None:
    return _Reader(matrix(checkpoint, meta.name, len(meta.shape) > 2), meta) if meta else None


def _at(reader: _Reader | None, place: tuple[int, ...]) -> complex | None:
    return reader.value(place) if reader else None


def _digits(dtype: torch.dtype) -> int:
    """Decimal digits that tell any two numbers of a dtype of p bits apart: 1 + p log10 2, rounded up."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return 20
    return math.ceil(1 + (1 - math.log2(torch.finfo(dtype).eps)) * math.log10(2))


def _places(asked: Asked, one: Entry) -> tuple[list[tuple[int, ...]], int]:
    """Which elements, and how many more were asked for."""
    shapes = list(dict.fromkeys(meta.shape for meta in (one.a, one.b) if meta is not None))
    axes = asked.axes if asked.axes is not None else ()
    spans = [found for shape in shapes if (found := _spans(axes, shape)) is not None]
    every = dict.fromkeys(place for found in spans for place in islice(product(*found), MOST))
    if asked.axes is None:
        marked = (one.sizes.place, one.sizes.odd) if one.sizes else ()
        return list(dict.fromkeys([*islice(every, FIRST), *(place for place in marked if place is not None)])), 0
    count = max(math.prod(map(len, found)) for found in spans)
    return list(every), max(0, count - len(every))
