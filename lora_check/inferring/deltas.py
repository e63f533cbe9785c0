"""MERGED - BASE by rows: no more than a tile of either is in memory, however large they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_check.inferring.floors import APART, Noise, Origin, origins
from lora_check.inferring.spectrum import Sketch
from lora_check.rounding import FORMATS

TILE = 1 << 18
"""Elements of a tile: two MiB in float64, and a few of them at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """a, b: D[i, j] a[i] b[j] has the rank of D, and noise of about one variance everywhere."""

    rows: Tensor
    columns: Tensor

    def to(self, dtype: torch.dtype) -> Weights:
        """The same in that dtype."""
        return Weights(rows=self.rows.to(dtype), columns=self.columns.to(dtype))

    def on(self, tile: Tensor, rows: slice) -> Tensor:
        """Those rows, weighed; in place."""
        return tile.mul_(self.rows[rows, None]).mul_(self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """D = M - W of two matrices of one shape, or M - (1 + g) W, weighed where `weights` says so.

    scale          g, for each row
    merged, base   sources of rows        first   the row of both where this matrix begins, of a stack
    formats        what the numbers of merged and base were rounded to: the dtype, or a narrower one that all fit
    """

    merged: Any
    base: Any
    shape: tuple[int, int]
    first: int = 0
    formats: tuple[str, str]
    weights: Weights | None = None
    scale: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of D: float32 holds the difference of 16-bit numbers but for 2^-24 of it; anything wider needs float64."""
        narrow = all(FORMATS[one].precision < FORMATS["float32"].precision for one in self.formats)
        return torch.float32 if narrow else torch.float64

    def spans(self) -> Iterator[slice]:
        """The rows of the matrix, tile by tile."""
        rows, columns = self.shape
        height = max(1, TILE // max(1, columns))
        for start in range(0, rows, height):
            yield slice(start, min(start + height, rows))

    def both(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those rows of M and of W."""
        there = slice(self.first + rows.start, self.first + rows.stop)
        return self.merged[there].to(dtype), self.base[there].to(dtype)

    def tile(self, rows: slice) -> Tensor:
        """Those rows of D."""
        merged, base = self.both(rows, self.dtype)
        delta = self.between(rows, merged, base)
        return self.weights.on(delta, rows) if self.weights else delta

    def between(self, rows: slice, merged: Tensor, base: Tensor) -> Tensor:
        """What lies between those rows, without weights."""
        return merged - base if self.scale is None else merged - base * (1 + self.scale[rows, None].to(base.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """left diag(values) right.T, with orthonormal columns: (m, r), (r,), (n, r)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def rows(self, rows: slice) -> Tensor:
        """Those rows of the product."""
        return (self.left[rows] * self.values) @ self.right.T


def unweighed(found: Sketch, rank: int, delta: Delta) -> Factors:
    """The leading directions of a sketch of weighed numbers, as they are without the weights."""
    left, right = found.left[:, :rank] * found.values[:rank].to(found.left.dtype), found.right[:, :rank]
    if delta.weights:
        left, right = left / delta.weights.rows[:, None], right / delta.weights.columns[:, None]
    return orthogonal(left, right)


def orthogonal(left: Tensor, right: Tensor) -> Factors:
    """left @ right.T by its singular values and vectors."""
    (turned, upper), (other, lower) = torch.linalg.qr(left), torch.linalg.qr(right)
    first, values, second = torch.linalg.svd(upper @ lower.T)
    return Factors(left=turned @ first, values=values, right=other @ second.T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one pass over D tells.

    changed   elements that are not those of BASE       rows, columns   that hold such
    energy    |D|^2           by_row, by_column    what of it a factor on each row, on each column of W explains
    noises    of each history that the files can have
    """

    changed: int
    rows: int
    columns: int
    energy: float
    by_row: float
    by_column: float
    noises: tuple[Noise, ...]
    weights: Weights
    finite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """D in weights, its energy there, and each history that the files can have, with its noise there."""

    delta: Delta
    energy: float
    histories: tuple[History, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Which roundings stand between the delta and the files, how often sums were stored, and the noise of it all."""

    origin: Origin
    noise: Noise
    stores: int = 1

    def stored(self, times: int) -> History:
        """The same where the change came in so many parts, each sum being stored."""
        return replace(self, noise=self.noise.stored(times), stores=times)


def is_copy(delta: Delta) -> bool:
    """Whether every number is that of BASE, or BASE's in the dtype of MERGED."""
    for rows in delta.spans():
        there = slice(delta.first + rows.start, delta.first + rows.stop)
        merged, base = delta.merged[there], delta.base[there]
        if not (torch.equal(merged, base.to(merged.dtype)) or torch.equal(merged.to(base.dtype), base)):
            return False
    return True


def look(delta: Delta) -> Look:
    """One pass in float64: what changed, how much of it, and how much of that is noise."""
    sums = [_Sums(origin, delta.shape) for origin in origins(*delta.formats)]
    ways = _Ways(delta.shape)
    for rows in delta.spans():
        merged, base = delta.both(rows, torch.float64)
        difference = merged - base
        ways.add(rows, base, difference)
        for one in sums:
            one.add(rows, one.origin.variance(merged, base, difference))
    return ways.as_look(tuple(one.noise() for one in sums), sums[0].weights())


def weighed(delta: Delta, weights: Weights) -> Weighed:
    """A second pass: the rows and columns of large noise hide no direction any more that shows in the others."""
    sums = [_Sums(origin, delta.shape, APART) for origin in origins(*delta.formats)]
    squared = Weights(rows=weights.rows.square(), columns=weights.columns.square())
    energy = 0.0
    for rows in delta.spans():
        merged, base = delta.both(rows, torch.float64)
        difference = merged - base
        for one in sums:
            variance = squared.on(one.origin.variance(merged, base, difference), rows)
            one.add(rows, variance)
            one.add_apart(rows, variance)
        energy += weights.on(delta.between(rows, merged, base), rows).square().sum().item()
    histories = tuple(History(origin=one.origin, noise=one.noise()) for one in sums)
    return Weighed(delta=replace(delta, weights=weights.to(delta.dtype)), energy=energy, histories=histories)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFit:
    """A factor for each row of W, fitted to what of M - W lies outside the row space of L.

    scale      g, (m,), float64        explained, energy   of what lies there: what g explains, and all of it
    """

    scale: Tensor
    explained: float
    energy: float


def row_factors(delta: Delta, factors: Factors) -> RowFit:
    """g_i = <D_i P, W_i P> / <W_i P, W_i P>: the best factor for each row, beside any L of the row space of `factors`.

    P takes that space away, so what L has there need not be known.
    """
    right = factors.right.double()
    scale = torch.zeros(delta.shape[0], dtype=torch.float64)
    explained = energy = 0.0
    for rows in delta.spans():
        merged, base = delta.both(rows, torch.float64)
        rest, outside = (one - (one @ right) @ right.T for one in (merged - base, base))
        along = (rest * outside).sum(1)
        scale[rows] = along / outside.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        explained += (along * scale[rows]).sum().item()
        energy += rest.square().sum().item()
    return RowFit(scale=scale, explained=explained, energy=energy)


class _Sums:
    """Variances of the noise, added up along both sides."""

    def __init__(self, origin: Origin, shape: tuple[int, int], apart: Sequence[float] = ()) -> None:
        self.origin, self.shape = origin, shape
        self.rows, self.columns = torch.zeros(shape[0]).double(), torch.zeros(shape[1]).double()
        self.apart = {limit: (torch.zeros_like(self.rows), torch.zeros_like(self.columns)) for limit in apart}
        self.top = self.squares = 0.0

    def add(self, rows: slice, variance: Tensor) -> None:
        """The variances of those rows, to all sums but the largest errors."""
        self.rows[rows] = variance.sum(1)
        self.columns += variance.sum(0)
        self.top = max(self.top, variance.max().item())
        self.squares += variance.square().sum().item()

    def add_apart(self, rows: slice, variance: Tensor) -> None:
        """The largest errors, sqrt(3 v), of the few elements of a large variance, by rows and by columns."""
        row, column = (variance > APART[0]).nonzero(as_tuple=True)
        found = variance[row, column]
        for limit, (down, across) in self.apart.items():
            largest = torch.where(found > limit, (3 * found).sqrt(), 0.0)
            down.index_add_(0, row + rows.start, largest)
            across.index_add_(0, column, largest)

    def weights(self) -> Weights:
        """sqrt(T / (r c)) of the sums r, c of rows and columns and T of all: v ~ r c / T.

        Any weights are as right, so lines of hardly any noise are held within 2^20 of the others, for float32.
        """
        rows, columns = (one.clamp_min(one.max() * 2.0**-40) for one in (self.rows, self.columns))
        return Weights(rows=(self.rows.sum() / rows).sqrt(), columns=columns.rsqrt())

    def _schur(self) -> Iterator[tuple[float, float]]:
        """|E|^2 <= largest row sum of |E| times largest column sum of |E| (Schur's test)."""
        for limit, (down, across) in self.apart.items():
            yield limit, (down.max() * across.max()).sqrt().item()

    def noise(self) -> Noise:
        """All that was added, as far as the bounds on the noise need it."""
        return Noise(
            rows=self.rows.max().item(),
            columns=self.columns.max().item(),
            apart=(*self._schur(), (self.top, 0.0)),
            total=self.rows.sum().item(),
            squares=self.squares,
            shape=self.shape,
        )


class _Ways:
    """<D, D>, <D, W> and <W, W> of each row and column, and where D is not zero."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.by_row = torch.zeros(4, shape[0], dtype=torch.float64)
        self.by_column = torch.zeros(4, shape[1], dtype=torch.float64)

    def add(self, rows: slice, base: Tensor, delta: Tensor) -> None:
        """Those rows of W and of D."""
        for place, one in enumerate((delta.square(), delta * base, base.square(), (delta != 0).double())):
            self.by_row[place, rows] = one.sum(1)
            self.by_column[place] += one.sum(0)

    def as_look(self, noises: tuple[Noise, ...], weights: Weights) -> Look:
        """What changed and what factors on rows or on columns explain of it, beside the noise of each history."""
        energy = self.by_row[0].sum().item()
        return Look(
            changed=int(self.by_row[3].sum().item()),
            rows=int(self.by_row[3].count_nonzero()),
            columns=int(self.by_column[3].count_nonzero()),
            energy=energy,
            by_row=_explained(self.by_row),
            by_column=_explained(self.by_column),
            noises=noises,
            weights=weights,
            finite=bool(torch.isfinite(self.by_row).all()),
        )


def _explained(sums: Tensor) -> float:
    """sum <D_i, W_i>^2 / <W_i, W_i>: what the best factor on each line of W explains."""
    return torch.where(sums[2] > 0, sums[1].square() / sums[2], 0.0).sum().item()


def grain(rows: Any, dtype: str, spans: Iterator[slice]) -> str:
    """The narrowest format that all numbers fit: a model merged in bfloat16 and saved in float32 is bfloat16."""
    if dtype not in ("float32", "float64"):
        return dtype
    fits = ["bfloat16", "float16", *(["float32"] if dtype == "float64" else [])]
    for span in spans:
        tile = rows[span]
        fits = [one for one in fits if torch.equal(tile.to(getattr(torch, one)).to(tile.dtype), tile)]
        if not fits:
            return dtype
    return fits[0] if fits else dtype
