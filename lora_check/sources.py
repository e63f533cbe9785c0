"""Tensors of a checkpoint as matrices of which rows can be read when they are asked for.

A mapped file does so by itself. Where a checkpoint has to fetch, to decode or to put together, it may offer
`rows(name)`; what it offers is seen here as a matrix, like the tensors of all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from lora_check.types import Checkpoint, RowSource

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_ELEMENTS = 1 << 18
"""Elements that are made together where some have to be: a MiB in float32, and so a few of them while it is made."""


@dataclass(slots=True, kw_only=True)
class Lines:
    """A tensor of which any lines can be made: its rows, counted through all its matrices; of a vector, its elements.

    shape, dtype   of the tensor, a torch dtype
    make           a range of lines, one or more -> those lines, (lines, columns), of that dtype
    unit           how many lines can only be made together; what was made last is kept
    """

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[slice], Tensor]
    unit: int = 1
    _kept: tuple[int, Tensor] | None = None

    @property
    def columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def count(self) -> int:
        """How many lines there are."""
        return prod(self.shape) // max(1, self.columns)

    def __getitem__(self, span: slice) -> Tensor:
        start, stop, _ = span.indices(self.shape[0])
        height = self.count // max(1, self.shape[0])
        found = self.lines(slice(start * height, max(start, stop) * height))
        return found.reshape(max(0, stop - start), *self.shape[1:])

    def lines(self, span: slice) -> Tensor:
        """These lines, (lines, columns); beside them, nothing but a chunk is held."""
        import torch

        if span.start < span.stop <= self._end(span.start):
            return self._within(span)
        found = torch.empty((max(0, span.stop - span.start), self.columns), dtype=self.dtype)
        start = span.start
        while start < span.stop:
            stop = min(span.stop, self._end(start))
            found[start - span.start : stop - span.start] = self._within(slice(start, stop))
            start = stop
        return found

    def matrix(self, stacked: bool) -> Lines:
        """The same as `rows_of` sees it."""
        if stacked and len(self.shape) > 1:
            return replace(self, shape=(self.count, self.columns), _kept=None)
        first = 1 if stacked else self.shape[0]
        height, shape = self.count // first, (first, prod(self.shape) // first)

        def rows(span: slice) -> Tensor:
            return self.lines(slice(span.start * height, span.stop * height)).reshape(-1, shape[1])

        return Lines(shape=shape, dtype=self.dtype, make=rows)

    @property
    def _size(self) -> int:
        """Lines of a chunk."""
        return self.unit * max(1, CHUNK_ELEMENTS // max(1, self.columns * self.unit))

    def _end(self, line: int) -> int:
        """Of the chunk that a line lies in, or that begins with it."""
        first = line if self.unit == 1 else line // self._size * self._size
        return min(self.count, first + self._size)

    def _within(self, span: slice) -> Tensor:
        """Lines of one chunk."""
        if self.unit == 1:
            return self.make(span)
        first = span.start // self._size * self._size
        if self._kept is None or self._kept[0] != first:
            self._kept = None
            self._kept = first, self.make(slice(first, self._end(first)))
        return self._kept[1][span.start - first : span.stop - first]


def rows_of(tensor: Tensor, stacked: bool = False) -> Tensor:
    """A tensor as a matrix: its first dimension, and all others in one; of a stack, the rows of all its matrices."""
    if tensor.ndim == 0:
        return tensor.reshape(1, 1)
    if stacked:
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.reshape(tensor.shape[0], -1) if tensor.numel() else tensor.reshape(0, 1)


def offered(checkpoint: Checkpoint, name: str) -> RowSource | None:
    """The tensor by rows, if this checkpoint reads it so."""
    offers = getattr(checkpoint, "rows", None)
    source: RowSource | None = offers(name) if offers else None
    return source


def source_of(checkpoint: Checkpoint, name: str) -> Tensor | RowSource:
    """The tensor by rows where this checkpoint reads it so, else the tensor."""
    source = offered(checkpoint, name)
    return checkpoint.read(name) if source is None else source


def matrix(checkpoint: Checkpoint, name: str, stacked: bool = False) -> Tensor | Matrix:
    """A tensor as `rows_of` sees it, read by rows where the checkpoint offers that."""
    source = offered(checkpoint, name)
    if source is None or not source.shape or 0 in source.shape:
        return rows_of(checkpoint.read(name), stacked)
    if isinstance(source, Lines):
        return Matrix(source=source.matrix(stacked))
    return Matrix(source=source, height=prod(source.shape[1:-1]) if stacked else 1)


def unsigned_zeros(rows: Tensor | Matrix) -> Matrix:
    """The same with +0 for -0: libraries differ in the sign of a decoded zero."""
    if isinstance(rows, Matrix):
        return replace(rows, unsigned=True)
    return Matrix(source=rows, unsigned=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Rows of a source, of which each holds `height` rows of the matrix; for all else that a tensor can do, the whole.

    unsigned   +0 stands for -0
    """

    source: RowSource | Tensor
    height: int = 1
    unsigned: bool = False

    ndim = 2

    @property
    def shape(self) -> tuple[int, ...]:
        import torch

        rows = int(self.source.shape[0]) * self.height
        return torch.Size((rows, prod(self.source.shape) // rows))

    @property
    def dtype(self) -> Any:
        return self.source.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, slice):
            return self._rows(*index.indices(self.shape[0]))
        if isinstance(index, tuple) and isinstance(index[0], slice):
            return self[index[0]][(slice(None), *index[1:])]
        return self.whole()[index]

    def _rows(self, start: int, stop: int, step: int) -> Tensor:
        first = start // self.height
        found = self.source[slice(first, max(first, -(-stop // self.height)))]
        rows: Tensor = found.reshape(-1, self.shape[1])[start - first * self.height : stop - first * self.height : step]
        return rows + 0 if self.unsigned else rows

    def whole(self) -> Tensor:
        """All rows at once, in memory."""
        return self[:]

    def numel(self) -> int:
        return prod(self.shape)

    def stride(self) -> tuple[int, ...]:
        return self.shape[1], 1

    def is_floating_point(self) -> bool:
        return bool(self.dtype.is_floating_point)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self[:0] if name.startswith("new_") else self.whole(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*map(_whole, args), **{name: _whole(one) for name, one in (kwargs or {}).items()})


def _whole(given: Any) -> Any:
    """An argument of a function of torch, with tensors in the places of matrices."""
    if isinstance(given, (list, tuple)):
        return [_whole(one) for one in given]
    return given.whole() if isinstance(given, Matrix) else given
