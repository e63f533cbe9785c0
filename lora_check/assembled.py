"""Tensors put together from parts of others, of which lines are put together when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_check.sources import Lines

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Rows of a matrix, or of one matrix of a stack.

    expert      which matrix of the stack; None: there is one, or all of them
    rows        start and stop; None: all
    transposed  the tensor keeps that matrix turned over
    """

    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The region as a view, outputs along the rows."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        turned = matrix.mT if self.transposed else matrix
        if self.rows is None:
            return turned
        rows = slice(*self.rows)
        return turned[rows] if turned.ndim == 1 else turned[..., rows, :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a tensor, which is seen as a stack of matrices.

    expert         which matrix it lies in; None: in each of them
    rows, columns  start and stop within the matrix
    read           (matrix of the part, first and last row of the part) -> (rows, columns)
    """

    expert: int | None
    rows: tuple[int, int]
    columns: tuple[int, int]
    read: Callable[[int, int, int], Tensor]


def part(placed: Region, shape: Shape, taken: Region, source: Any) -> Part | None:
    """What lies in one region of a tensor of that shape, taken from a region of another; None: not by lines.

    source   the other tensor, or `Lines` of it, of which no columns can be made
    """
    sides, read = _sides(shape), _reader(placed, taken, source)
    if sides is None or read is None:
        return None
    _, *ends = sides
    spans = [(0, end) for end in ends]
    if placed.rows:
        spans[placed.transposed] = placed.rows
    return Part(expert=placed.expert, rows=spans[0], columns=spans[1], read=read)


def assembled(shape: Shape, dtype: Any, parts: Sequence[Part]) -> Lines:
    """The tensor that these parts cover."""
    import torch

    _, height, width = _sides(shape) or (0, 0, 0)

    def make(lines: slice) -> Tensor:
        found = torch.empty((lines.stop - lines.start, width), dtype=dtype)
        for expert in range(lines.start // height, -(-lines.stop // height)):
            first = expert * height
            span = max(lines.start, first) - first, min(lines.stop, first + height) - first
            for begin, columns, rows in _met(parts, expert, span):
                begin += first - lines.start
                found[begin : begin + len(rows), slice(*columns)] = rows
        return found

    return Lines(shape=shape, dtype=dtype, make=make)


def _met(parts: Sequence[Part], expert: int, span: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int], Tensor]]:
    """What the parts have of some rows of one matrix: the first of these rows, the columns, and the numbers."""
    for one in parts:
        low, high = max(span[0], one.rows[0]), min(span[1], one.rows[1])
        if one.expert in (None, expert) and low < high:
            matrix = expert if one.expert is None else 0
            yield low, one.columns, one.read(matrix, low - one.rows[0], high - one.rows[0])


def _reader(placed: Region, taken: Region, source: Any) -> Callable[[int, int, int], Tensor] | None:
    if isinstance(source, Lines):
        return None if placed.transposed != taken.transposed else _of_lines(taken, source)
    view = taken.of(source)
    turned = view.mT if placed.transposed else view
    matrix = turned[:, None] if turned.ndim == 1 else turned
    stack = matrix[None] if matrix.ndim == 2 else matrix
    return (lambda expert, low, high: stack[expert, low:high]) if stack.ndim == 3 else None


def _of_lines(taken: Region, source: Lines) -> Callable[[int, int, int], Tensor] | None:
    sides = _sides(source.shape)
    if sides is None:
        return None
    _, height, width = sides
    top, left, right = 0, 0, width
    if taken.rows and taken.transposed:
        left, right = taken.rows
    elif taken.rows:
        top = taken.rows[0]

    def read(expert: int, low: int, high: int) -> Tensor:
        first = (expert if taken.expert is None else taken.expert) * height + top
        return source.lines(slice(first + low, first + high))[:, left:right]

    return read


def _sides(shape: Shape) -> tuple[int, int, int] | None:
    """Matrices, rows, columns; a vector is a column."""
    if len(shape) == 1:
        return 1, shape[0], 1
    return (1, *shape) if len(shape) == 2 else shape if len(shape) == 3 else None
