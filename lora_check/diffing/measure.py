"""How far two tensors are apart: bit by bit at the speed of memory, and in numbers only where the bits differ.

Both are matrices, or sources of rows. Nothing of a tensor is held but its tile. Sums are in float64, of numbers that
float64 holds exactly but for whole numbers beyond 2^53.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_check.diffing.nouns import Side, Sizes, pooled
from lora_check.reference import spans
from lora_check.same import same_bits, suspicious

STRIP_ELEMENTS = 1 << 18
"""Elements that are read together: 1 MiB of each side in float32."""

TILE_ELEMENTS = 1 << 15
"""Elements that are computed with together: 256 KiB in float64, so that a, b and b - a stay in a core's L2 cache."""

QUICK = (torch.bfloat16, torch.float16, torch.float32)
"""What `suspicious` can read as integers."""

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LONG = (torch.int64, torch.uint64)
NUMBERS = tuple(
    getattr(torch, name)
    for name in (
        *("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
        *("float8_e5m2fnuz", "float8_e8m0fnu", "complex64", "complex128", "bool", "uint8", "int8", "uint16", "int16"),
        *("uint32", "int32", "uint64", "int64"),
    )
    if hasattr(torch, name)
)
"""The dtypes that float64, or complex128, is made of."""


def compare(a: Any, b: Any, rows: int, shape: tuple[int, ...]) -> Sizes:
    """The sizes of b - a over the first rows of two matrices.

    a, b    (rows, columns) each, as stored; the tensors may lie on disk, only the touched rows are read
    shape   of the tensor that the matrices are, for the place of the largest change
    """
    if a.dtype == b.dtype and (same := _identical(a, b, rows)) is not None:
        return same
    if a.dtype in NUMBERS and b.dtype in NUMBERS:
        return _numbers(a, b, rows, shape)
    differing = sum(_apart(x, y) for _, x, y in _strips(a, b, rows)) if a.dtype == b.dtype else 0
    return Sizes(elements=rows * int(a.shape[1]), differing=differing, counted=False)


def _strips(a: Any, b: Any, rows: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Strip by strip where it begins, and the elements of both, flat."""
    columns = int(a.shape[1])
    for span in spans(slice(0, rows), columns, STRIP_ELEMENTS):
        yield span.start * columns, a[span].contiguous().reshape(-1), b[span].contiguous().reshape(-1)


def _identical(a: Any, b: Any, rows: int) -> Sizes | None:
    """The sizes of two matrices with the same bits; None at the first that differ."""
    found = Side()
    for _, x, y in _strips(a, b, rows):
        if x.dtype not in QUICK:
            if not same_bits(x, y):
                return None
            found += not_finite(x)
            continue
        for chunk in suspicious(x, y, STRIP_ELEMENTS, zeros=False):
            if not chunk.same:
                return None
            found += not_finite(x[chunk.start : chunk.stop])
    return Sizes(elements=rows * int(a.shape[1]), left_out=found.count, a=found, b=found, counted=a.dtype in NUMBERS)


def not_finite(x: Tensor) -> Side:
    """How many of some elements are NaN, and how many are infinite."""
    if x.dtype not in NUMBERS or not (x.is_floating_point() or x.is_complex()):
        return Side()
    numbers = wide(x)
    return Side(nan=int(numbers.isnan().sum()), infinite=int((numbers.isinf() & ~numbers.isnan()).sum()))


def wide(x: Tensor) -> Tensor:
    """The numbers in float64, or in complex128."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _apart(x: Tensor, y: Tensor) -> int:
    """In how many elements two flat tensors of one dtype differ, bit by bit."""
    return int(_unlike(x, y).sum())


def _unlike(x: Tensor, y: Tensor) -> Tensor:
    size = x.element_size()
    if size in WORDS:
        return x.view(WORDS[size]) != y.view(WORDS[size])
    return (x.view(torch.uint8).reshape(-1, size) != y.view(torch.uint8).reshape(-1, size)).any(dim=1)


# ------------------------------------------------------------------------------------------------------ numbers


def _numbers(a: Any, b: Any, rows: int, shape: tuple[int, ...]) -> Sizes:
    """The sizes of two matrices that differ."""
    tiles, largest, flat, odd = list[Sizes](), 0.0, -1, -1
    for start, x, y in _strips(a, b, rows):
        for begin in range(0, x.numel(), TILE_ELEMENTS):
            tile = slice(begin, begin + TILE_ELEMENTS)
            seen, change, first = _tile(x[tile], y[tile])
            tiles.append(seen)
            if odd < 0 <= first:
                odd = start + begin + first
            if seen.largest > largest:
                largest, flat = seen.largest, start + begin + int(change.abs().argmax())
        if len(tiles) > STRIP_ELEMENTS // TILE_ELEMENTS:
            tiles = [_sum(tiles)]
    places = [at(one, shape) if one >= 0 else None for one in (flat, odd)]
    return replace(_sum(tiles), place=places[0], odd=places[1])


def _sum(tiles: list[Sizes]) -> Sizes:
    """Tiles of one tensor, together; no tile at all is exactly what it is converted to."""
    return replace(pooled(tiles), to_b=all(one.to_b for one in tiles), to_a=all(one.to_a for one in tiles))


def _tile(x: Tensor, y: Tensor) -> tuple[Sizes, Tensor, int]:
    """The sizes of two flat tensors, b - a, and where the first that is not finite differs; -1: nowhere."""
    one, other = wide(x), wide(y)
    if one.dtype != other.dtype:
        one, other = one.to(torch.complex128), other.to(torch.complex128)
    change = _change(x, y, one, other)
    seen = _sizes(x, y, one, other, change)
    if math.isfinite(seen.square_a) and math.isfinite(seen.square_b):
        return seen, change, -1
    return _with_gaps(x, y, one, other, change)


def _with_gaps(x: Tensor, y: Tensor, one: Tensor, other: Tensor, change: Tensor) -> tuple[Sizes, Tensor, int]:
    """The same where some are not finite: these are counted, and zeros stand for them in the sums."""
    gaps = ~(one.isfinite() & other.isfinite())
    filled = [some.masked_fill(gaps, 0) for some in (one, other, change)]
    apart = _numbers_differ(x, y, one, other)
    numbers, odd = int(apart.sum()), apart & gaps
    differing = _apart(x, y) if x.dtype == y.dtype else numbers
    seen = replace(
        _sizes(x, y, *filled),
        differing=differing,
        in_bits=differing - numbers,
        left_out=int(gaps.sum()),
        a=not_finite(x),
        b=not_finite(y),
    )
    return seen, filled[-1], int(odd.to(torch.uint8).argmax()) if bool(odd.any()) else -1


def _sizes(x: Tensor, y: Tensor, one: Tensor, other: Tensor, change: Tensor) -> Sizes:
    """The sizes of x and y, the numbers of which are `one` and `other`, all of them finite."""
    alike, numbers = x.dtype == y.dtype, int(torch.count_nonzero(change))
    if not alike and (x.dtype in LONG or y.dtype in LONG):
        numbers = int(_numbers_differ(x, y, one, other).sum())
    differing = _apart(x, y) if alike else numbers
    return Sizes(
        elements=x.numel(),
        differing=differing,
        in_bits=differing - numbers,
        largest=_largest(change),
        change=_dot(change, change),
        square_a=_dot(one, one),
        square_b=_dot(other, other),
        dot=_dot(one, other),
        to_b=not alike and _is_rounded(x, y),
        to_a=not alike and _is_rounded(y, x),
    )


def _change(x: Tensor, y: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """b - a; of whole numbers that float64 may not hold, exactly as long as it is below 2^62."""
    change = other - one
    if x.dtype != y.dtype or x.dtype not in LONG:
        return change
    exact = (y.view(torch.int64) - x.view(torch.int64)).to(torch.float64)
    return torch.where(change.abs() < 2.0**62, exact, change)


def _numbers_differ(x: Tensor, y: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Where the numbers are not the same; two NaNs are."""
    apart = (one != other) & ~(one.isnan() & other.isnan())
    for stored, number in ((x, one), (y, other)):
        if stored.dtype in LONG and x.dtype != y.dtype:  # float64 may have rounded it
            apart |= number.to(stored.dtype) != stored
    return apart if x.dtype != y.dtype or x.dtype not in LONG else _unlike(x, y)


def _is_rounded(x: Tensor, y: Tensor) -> bool:
    """Whether y is x as torch converts it; all NaNs are one, and zeros have no sign."""
    if x.is_complex() or y.is_complex():
        return False
    made, stored = wide(x.to(y.dtype)), wide(y)
    return bool(((made == stored) | (made.isnan() & stored.isnan())).all())


def _dot(x: Tensor, y: Tensor) -> float:
    """The sum of x y; of complex numbers, the real part with x conjugated."""
    return float(torch.vdot(x, y).real)


def _largest(change: Tensor) -> float:
    """max |x|."""
    if not change.numel():
        return 0.0
    if change.is_complex():
        return float(change.abs().max())
    low, high = torch.aminmax(change)
    return max(-float(low), float(high)) + 0.0  # of no change, not -0


def at(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of an element that is counted through a tensor of that shape."""
    place = list[int]()
    for size in reversed(shape):
        flat, index = divmod(flat, size)
        place.append(index)
    return tuple(reversed(place))
