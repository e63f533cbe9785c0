"""What one arithmetic writes in some rows of a plain case, as fast as this processor makes it.

Wide     in float32, tile by tile: the literal arithmetic
Narrow   on bfloat16 matrix units, which sum the products up in float32 and round once

Both are performances of one formula in float32 that differ in the order of its sums. No arithmetic names that order,
for every library has its own: bits that either of them gives are bits that the arithmetic gives. Narrow stands in only
where its error, derived in `rounding`, is within the budget that the arithmetic has for its products in any case.

Which of them is used follows from the shapes, the dtypes and the processor, never from the clock: another choice could
call another bit exact, and a report must not depend on how busy a machine was.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from lora_check.plain import Plain
from lora_check.rounding import flushes, gamma, matrix_unit_error, products, unit
from lora_check.same import least_size, same_bits

STRIP_ELEMENTS = 1 << 18
"""Elements that are read and made in one go: half a MiB in 16 bits, which a core's second cache holds."""

NARROW_STRIP_ELEMENTS = 1 << 22
"""The same for matrix units, which are the faster the more rows they are given: 8 MiB."""

TILE_ELEMENTS = 1 << 17
"""Elements that are computed in float32 in one go: half a MiB."""

ELEMENTS = 1 << 8
"""Single elements that are made in one go."""

MOST_PRODUCTS = 1 << 10
"""Products of pieces for each element, above which float32 is as fast."""

NARROW_ELEMENTS = 1 << 16
"""Elements from which on it pays to make matrix units ready."""

_HELD = threading.local()


def spans(rows: slice, columns: int, elements: int) -> Iterator[slice]:
    """The row ranges of about `elements` elements each that `rows` falls into."""
    step = max(1, elements // max(1, columns))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def scratch(name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Memory of this thread's own, used again at each call of that name; what is in it is left over from the last."""
    held, size, key = _HELD.__dict__, shape[0] * shape[1], f"{name} {dtype}"
    flat: Tensor | None = held.get(key)
    if flat is None or flat.numel() < size:
        flat = held[key] = torch.empty(size, dtype=dtype)
    return flat[:size].view(shape)


class Wide:
    """W + s L R in float32."""

    strip: ClassVar[int] = STRIP_ELEMENTS

    def __init__(self, case: Plain, rows: int) -> None:
        self.case, self.right = case, case.rights()
        self.folds = math.frexp(abs(case.s))[0] == 0.5
        self.lone = rows == 1

    def made(self, base: Tensor, rows: slice) -> Tensor:
        """What the arithmetic writes over these rows of the base; kept until the next call in this thread."""
        out, left = scratch("wide", (base.shape[0], base.shape[1]), base.dtype), self.case.lefts(rows)
        scaled = left * self.case.s if self.folds else left
        folded = self.folds and same_bits(scaled / self.case.s, left)
        for span in spans(slice(0, base.shape[0]), base.shape[1], TILE_ELEMENTS):
            if folded and not self.case.rounded and base.dtype != torch.float32:
                self._added(base[span], scaled[span], out[span])
            else:
                self._summed(base[span], self._delta(scaled[span] if folded else left[span], folded), out[span])
        return out

    def elements(self, base: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The same of single elements, as the product and the sum of whole tensors give them; all (n,).

        Each is a place on the diagonal of a product of its own rows and columns, for libraries sum up every place of a
        product alike, if it has more than one row.
        """
        out = torch.empty_like(base)
        for start in range(0, len(rows), ELEMENTS):
            some = slice(start, start + ELEMENTS)
            left, right = self.case.lefts(rows[some]), self.right[:, columns[some]]
            height = left.shape[0] if self.lone else max(2, left.shape[0])
            square = left.expand(height, -1) @ right.expand(-1, max(height, right.shape[1]))
            delta = square.diagonal()[: left.shape[0]].reshape(-1, 1) * self.case.s
            self._summed(base[some].reshape(-1, 1), delta, out[some].reshape(-1, 1))
        return out

    def _added(self, base: Tensor, scaled: Tensor, out: Tensor) -> None:
        """Products and base in one go: as `_summed` but for a few last bits of float32, at four fifths of the cost."""
        total = scratch("total", (base.shape[0], base.shape[1]), torch.float32)
        out.copy_(total.copy_(base).addmm_(scaled, self.right))

    def _delta(self, left: Tensor, scaled: bool) -> Tensor:
        """s L R: the product, then the scale. Libraries sum a single row in an order of its own: it is made twice."""
        height = left.shape[0] if self.lone else max(2, left.shape[0])
        delta = scratch("delta", (height, self.right.shape[1]), torch.float32)
        torch.mm(left.expand(height, -1), self.right, out=delta)
        return (delta if scaled else delta.mul_(self.case.s))[: left.shape[0]]

    def _summed(self, base: Tensor, delta: Tensor, out: Tensor) -> None:
        shape = base.shape[0], base.shape[1]
        if self.case.rounded:
            torch.add(base, scratch("rounded", shape, base.dtype).copy_(delta), out=out)
        elif base.dtype == torch.float32:
            torch.add(base, delta, out=out)
        else:
            out.copy_(scratch("total", shape, torch.float32).copy_(base).add_(delta))


@dataclass(frozen=True, slots=True)
class Narrow:
    """W + s L R in bfloat16 with sums in float32, both factors taken to so many pieces."""

    strip: ClassVar[int] = NARROW_STRIP_ELEMENTS

    case: Plain
    pieces: tuple[int, int]
    right: Tensor

    @property
    def may_flush(self) -> bool:
        """Whether a zero may stand for a subnormal number, which matrix units do not store; their products are none."""
        return not self.case.rounded

    def made(self, base: Tensor, rows: slice) -> Tensor:
        """What the arithmetic writes over these rows of the base; kept until the next call in this thread."""
        found = _pieces(self.case.lefts(rows) * self.case.s, self.pieces[0])
        left = found[0] if self.pieces == (1, 1) else torch.cat([found[i] for i, _ in _order(self.pieces)], 1)
        out = scratch("narrow", (base.shape[0], base.shape[1]), base.dtype)
        if not self.case.rounded:
            return torch.addmm(base, left, self.right, out=out)
        delta = scratch("narrow delta", (base.shape[0], base.shape[1]), base.dtype)
        return torch.add(base, torch.mm(left, self.right, out=delta), out=out)


def narrow(case: Plain, rows: slice) -> Narrow | None:
    """Matrix units for these rows, where there are some, and where they keep within the budget of the arithmetic."""
    shape = case.left.shape[0], case.right.shape[1]
    if case.dtype != torch.bfloat16 or shape[0] * shape[1] < NARROW_ELEMENTS or 1 in shape or not units():
        return None
    folds = math.frexp(abs(case.s))[0] == 0.5
    left, right = case.stored(case.left[rows]) if folds else case.lefts(rows) * case.s, case.stored(case.right)
    if torch.float64 in (left.dtype, right.dtype):
        return None
    pieces = _count(left), _count(right)
    if not (all(pieces) and matrix_unit_error(case.rank, pieces, not folds) <= gamma(case.rank + 1, unit("float32"))):
        return None
    exact, least = pieces == (1, 1), least_size(left) * (abs(case.s) if folds else 1.0)
    if not exact and case.rank * products(*pieces) > MOST_PRODUCTS:
        return None
    if not (exact or units() == "amx_bf16") or flushes(least, least_size(right), exact):
        return None
    found = _pieces(right, pieces[1])
    return Narrow(case, pieces, torch.cat([found[j] for _, j in _order(pieces)]))


@cache
def units() -> str:
    """The bfloat16 matrix units of this processor that torch makes use of, if any."""
    asked = getattr(torch.cpu, "get_capabilities", None)
    if asked is None or not torch._C._has_mkldnn or not torch.backends.mkldnn.enabled:
        return ""
    known = asked()
    return next((name for name in ("amx_bf16", "avx512_bf16") if known.get(name)), "")


def _pieces(x: Tensor, count: int) -> list[Tensor]:
    """A factor as a sum of bfloat16, the largest first; three have as many bits as float32."""
    found = [x.to(torch.bfloat16)]
    for _ in range(count - 1):
        x = x.to(torch.float32) - found[-1].to(torch.float32)
        found.append(x.to(torch.bfloat16))
    return found


def _count(x: Tensor) -> int:
    """How many pieces a factor falls into; 0: it is not the sum of three. A power of two as a scale changes nothing."""
    if x.dtype == torch.bfloat16:
        return 1
    for count in (1, 2, 3):
        x = x.to(torch.float32) - x.to(torch.bfloat16).to(torch.float32)
        if not x.numpy().any():
            return count
    return 0


def _order(pieces: tuple[int, int]) -> list[tuple[int, int]]:
    """Which pieces are multiplied, from the smallest products to the largest."""
    pairs = [(i, j) for i in range(pieces[0]) for j in range(pieces[1]) if i + j <= 2]
    return sorted(pairs, key=lambda pair: -sum(pair))
