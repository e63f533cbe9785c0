"""What a quantiser can have turned into stored codes: the cells of its codes, the blocks that share a scale, scales.

A quantiser divides each element by the divisor of its block, and stores the code whose level lies nearest. So a code
says in which cell, between two levels, the quotient lay. A scale is a statistic of its block, its largest modulus, and
is judged as one: it must be what the honest values of that block can come to.

All of it is in float64; `U` is the unit roundoff of float32, in which all these quantisers compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_check.rounding import FORMATS, gamma, store, unit

U = unit("float32")
SMALLEST = 1e-38
"""bitsandbytes divides by no less, and stores it as the scale of a last, incomplete block of zeros."""

LOOKED_UP = 1 / 65535
"""On CPUs bitsandbytes looks the level of a quotient up in a table of 65536 steps from -1 to 1: off by half a step."""

CHAIN = 1 << 12
"""No library adds more numbers than this one after the other; it adds up partial sums in a tree."""


def cells(levels: Tensor, *, relative: float, absolute: float, top: float | None = None) -> tuple[Tensor, Tensor]:
    """code -> the least and the largest number for which its level is the nearest.

    levels    float64; several codes may have one level; NaN and infinity are the nearest of nothing
    relative, absolute   what the quantiser's quotient, or its comparison, may be off by
    top       the largest modulus a quotient can have; without it the outer cells are as wide outwards as inwards
    """
    known = torch.tensor(sorted(set(levels[levels.isfinite()].tolist())), dtype=torch.float64)
    middles = (known[1:] + known[:-1]) / 2
    outer = torch.stack([1.5 * known[0] - 0.5 * known[1], 1.5 * known[-1] - 0.5 * known[-2]])
    if top is not None:
        outer = torch.tensor([-top, top], dtype=torch.float64)
    low, high = torch.cat([outer[:1], middles]), torch.cat([middles, outer[1:]])
    place = torch.searchsorted(known, levels.nan_to_num(0.0, 0.0, 0.0))
    least, largest = low - relative * low.abs() - absolute, high + relative * high.abs() + absolute
    none = levels.new_tensor(torch.nan)
    return torch.where(levels.isfinite(), least[place], none), torch.where(levels.isfinite(), largest[place], none)


def nearest(levels: Tensor, x: Tensor) -> Tensor:
    """The level, of an ascending row of them, that lies nearest to each number."""
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


# ------------------------------------------------------------------------------------------------------ blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Blocks of `size` elements, counted through all rows; the last may be shorter."""

    rows: int
    columns: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.rows * self.columns // self.size)

    def of(self, rows: slice) -> Tensor:
        """The number of the block of each element of these rows."""
        places = torch.arange(rows.start * self.columns, rows.stop * self.columns)
        return (places // self.size).reshape(-1, self.columns)

    def whole(self, rows: int) -> int:
        """How many blocks lie wholly in the first rows."""
        return self.count if rows >= self.rows else rows * self.columns // self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangles:
    """Blocks of height x width elements; those at the lower and the right edge may be smaller."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def across(self) -> int:
        """How many blocks lie side by side."""
        return -(-self.columns // self.width)

    @property
    def count(self) -> int:
        return -(-self.rows // self.height) * self.across

    def of(self, rows: slice) -> Tensor:
        """The number of the block of each element of these rows."""
        down = torch.arange(rows.start, rows.stop) // self.height
        return down[:, None] * self.across + torch.arange(self.columns) // self.width

    def whole(self, rows: int) -> int:
        """How many blocks lie wholly in the first rows."""
        return self.count if rows >= self.rows else rows // self.height * self.across


# ------------------------------------------------------------------------------------------------------ scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Maxima:
    """Scales that are the largest moduli themselves, stored in float32.

    stored   (blocks,) float64
    """

    stored: Tensor

    def divisors(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The stored scales, or NaN where no honest block has that maximum."""
        zeros = (high <= self.stored) & (self.stored <= SMALLEST)
        honest = (low <= self.stored) & (self.stored <= high) | zeros
        divisor = torch.where(honest, self.stored, low.new_tensor(torch.nan))
        return divisor, divisor

    def wrong(self, low: Tensor, high: Tensor) -> Tensor:
        """None: each has been judged by itself."""
        return torch.zeros_like(low, dtype=torch.bool)

    strange = wrong

    def anew(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The maxima themselves."""
        return low, high

    remade = anew


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedMaxima:
    """Largest moduli that are quantised in turn: their mean is taken off, groups of `size` share a scale.

    codes    (blocks,) integers        levels    code -> number, ascending float64
    groups   (groups,) float64: the largest modulus of each group, the mean taken off
    mean     of all largest moduli

    An honest block's maximum lies where its own honest values and the cell of its code both let it lie.
    """

    codes: Tensor
    levels: Tensor
    groups: Tensor
    mean: float
    size: int

    def divisors(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Where the unquantised maximum of each block can lie; NaN where it can lie nowhere."""
        codes, scale = self.codes.long(), self._spread(self.groups)
        least, largest = (end[codes] * scale + self.mean for end in self._cells())
        off = U * torch.maximum(least.abs(), largest.abs())
        least, largest = torch.maximum(low, least - off), torch.minimum(high, largest + off)
        none = low.new_tensor(torch.nan)
        return torch.where(least <= largest, least, none), torch.where(least <= largest, largest, none)

    def wrong(self, low: Tensor, high: Tensor) -> Tensor:
        """Blocks of a group whose scale, or all blocks where the mean, is not what the maxima come to."""
        mean_low, mean_high = self._mean(low, high)
        if not mean_low <= self.mean <= mean_high:
            return torch.ones_like(low, dtype=torch.bool)
        least, largest = self._groups(low - self.mean, high - self.mean)
        return self._spread((least > self.groups) | (self.groups > largest))

    def strange(self, low: Tensor, high: Tensor) -> Tensor:
        """None: there is one rule."""
        return torch.zeros_like(low, dtype=torch.bool)

    def anew(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The maxima, before they are quantised in turn."""
        return low, high

    def remade(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """What these maxima are once they are quantised and decoded again."""
        mean_low, mean_high = self._mean(low, high)
        low, high = low - mean_high, high - mean_low
        scales = [self._spread(end) for end in self._groups(low, high)]
        least = torch.minimum(low / scales[0], low / scales[1]) - LOOKED_UP - gamma(6, U)
        largest = torch.maximum(high / scales[0], high / scales[1]) + LOOKED_UP + gamma(6, U)
        ends = [nearest(self.levels, end) * scale for end in (least, largest) for scale in scales]
        bound = torch.stack(ends).abs().amax(0) + mean_high
        low, high = torch.stack(ends).amin(0) + mean_low, torch.stack(ends).amax(0) + mean_high
        return low - gamma(3, U) * bound, high + gamma(3, U) * bound

    def _cells(self) -> tuple[Tensor, Tensor]:
        return cells(self.levels, relative=0.0, absolute=LOOKED_UP + gamma(6, U), top=1.0)

    def _mean(self, low: Tensor, high: Tensor) -> tuple[float, float]:
        """The mean in float32: chains of sums, and a tree over them."""
        off = gamma(min(len(low), CHAIN) + len(low).bit_length() + 1, U)
        return low.mean().item() * (1 - off), high.mean().item() * (1 + off)

    def _groups(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest that the largest modulus of each group can be, float32 differences."""
        least = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
        return self._largest(least) * (1 - gamma(2, U)), self._largest(torch.maximum(low.abs(), high.abs())) * (
            1 + gamma(2, U)
        )

    def _largest(self, x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, len(self.groups) * self.size - len(x)))
        return padded.reshape(-1, self.size).amax(1)

    def _spread(self, groups: Tensor) -> Tensor:
        """One entry for each block, of what there is one of for each group."""
        return groups.repeat_interleave(self.size)[: len(self.codes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """Scales that follow one of several rules: max / top, the power of two above it, or the scale of the base.

    stored   (blocks,) float64       base   the scales of the base, where it lies in the same blocks
    top      the largest level       storage   the dtype that scales are stored in; "" for powers of two
    """

    stored: Tensor
    top: float
    storage: str
    base: Tensor | None = None

    def divisors(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The stored scales, whatever their rule."""
        return self.stored, self.stored

    def wrong(self, low: Tensor, high: Tensor) -> Tensor:
        """None is known to be wrong: a calibrated scale follows no rule that a file could tell."""
        return torch.zeros_like(low, dtype=torch.bool)

    def strange(self, low: Tensor, high: Tensor) -> Tensor:
        """Scales that follow none of the rules; a block of zeros may have any."""
        fresh_low, fresh_high = self.remade(low, high)
        known = (fresh_low <= self.stored) & (self.stored <= fresh_high) | (high == 0)
        power = torch.frexp(self.stored).mantissa == 0.5
        known |= power & (_power_above(fresh_low) <= self.stored) & (self.stored <= _power_above(fresh_high))
        if self.base is not None:
            known |= self.stored == self.base
        return ~known

    def remade(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """max / top, as it is stored; a merge that was decoded again keeps no trace of another rule."""
        least, largest = low / self.top * (1 - gamma(4, U)), high / self.top * (1 + gamma(4, U))
        if self.storage in FORMATS:
            return store(least, self.storage), store(largest, self.storage)
        return _power_above(least), _power_above(largest)

    anew = remade


def _power_above(x: Tensor) -> Tensor:
    """The least power of two that is no less than x > 0."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))
