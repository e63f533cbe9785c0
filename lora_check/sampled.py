"""How much of a delta the stored bits keep: evidence, never the verdict. Measured on a sample of a large tensor.

|delta|^2 = s^2 sum_i l_i (R R^T) l_i^T is that of all rows, from products of r x r: it costs little beside the check.
<residual, delta> and |residual|^2 take a pass of their own. On tensors of up to `SMALL_ELEMENTS` elements they are
measured everywhere; on larger ones in one block of rows of so many, always the same ones, that `SAMPLE_ELEMENTS` are,
and told of all rows: the first in proportion to |delta|^2, the second to the number of elements. Where the sample
does not hold about its share of |delta|^2, all rows are measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_check.measure import Sums
from lora_check.plain import Plain
from lora_check.reference import scratch, spans
from lora_check.replay import TILE_ELEMENTS

SMALL_ELEMENTS = 1 << 19
"""Elements up to which a tensor is measured everywhere."""

SAMPLE_ELEMENTS = 1 << 17
"""Elements of a sample, at least: |residual|^2 of so many independent ones is known to 0.4 per cent."""

SHARE = 0.8
"""Of its share of |delta|^2, a sample that stands for all rows has at least so much, and at most one over it: nearly
all samples of 32 rows of random factors of rank 8 have."""

CANCELLED = 2.0**-4
"""|s L R|^2 of unrelated factors is 1 / r of |s|^2 |L|^2 |R|^2; where it is so much less, float32 does not tell it."""


@dataclass(slots=True)
class Sampled:
    """Sums over those rows of a plain case that are in the sample.

    right   R, float32          rows   of which the sums are told
    """

    plain: Plain
    right: Tensor
    rows: slice
    sums: Sums = field(default_factory=Sums)
    elements: int = 0

    @property
    def every(self) -> int:
        """One block of rows in so many is measured."""
        elements = int(self.plain.left.shape[0] * self.right.shape[1])
        return 1 if elements <= SMALL_ELEMENTS else elements // SAMPLE_ELEMENTS

    def add(self, base: Tensor, stored: Tensor, span: slice) -> None:
        """Add what the sample has of a strip."""
        for block in self._blocks(span, self.every):
            self._add(base, stored, span.start, block)

    def told(self, base: Any, actual: Any) -> tuple[float, float, float]:
        """|delta|^2, <residual, delta> and |residual|^2 of all rows."""
        total = (self.rows.stop - self.rows.start) * self.right.shape[1]
        if self.elements == total:
            return self.sums.signal, self.sums.cross, self.sums.noise
        signal, largest = self._signal()
        here, due = self.sums.signal * total, signal * self.elements
        uneven = here < SHARE * due or SHARE * here > due
        if uneven or not self.elements or signal < CANCELLED * largest / self.plain.rank:
            return self._everywhere(base, actual)
        cross = self.sums.cross * signal / self.sums.signal if self.sums.signal else 0.0
        return signal, cross, self.sums.noise * total / self.elements

    def _everywhere(self, base: Any, actual: Any) -> tuple[float, float, float]:
        self.sums = Sums()
        for block in self._blocks(self.rows, 1):
            self._add(base[block], actual[block], block.start, block)
        return self.sums.signal, self.sums.cross, self.sums.noise

    def _blocks(self, span: slice, every: int) -> Iterator[slice]:
        """The blocks of rows of a span that are measured, counted from the first row of the tensor."""
        height = max(1, TILE_ELEMENTS // max(1, self.right.shape[1]))
        for index in range(span.start // height, -(-span.stop // height)):
            if index % every == 0:
                yield slice(max(span.start, index * height), min(span.stop, (index + 1) * height))

    def _add(self, base: Tensor, stored: Tensor, start: int, block: slice) -> None:
        here, shape = slice(block.start - start, block.stop - start), (block.stop - block.start, self.right.shape[1])
        delta, rest = scratch("sample delta", shape, torch.float32), scratch("sample rest", shape, torch.float32)
        torch.mm(self.plain.lefts(block), self.right, out=delta)
        rest.copy_(stored[here]).sub_(base[here]).sub_(delta.mul_(self.plain.s))
        self.sums.add(delta, rest)
        self.elements += delta.numel()

    def _signal(self) -> tuple[float, float]:
        """s^2 sum_i l_i (R R^T) l_i^T, and s^2 |L|^2 |R|^2, which it can be at most."""
        inner, total, length = self.right @ self.right.T, 0.0, 0.0
        for rows in spans(self.rows, self.plain.rank, TILE_ELEMENTS):
            left = self.plain.lefts(rows)
            total += torch.dot((left @ inner).reshape(-1), left.reshape(-1)).item()
            length += torch.dot(left.reshape(-1), left.reshape(-1)).item()
        return self.plain.s**2 * total, self.plain.s**2 * length * torch.trace(inner).item()
