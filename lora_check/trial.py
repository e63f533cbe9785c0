"""One arithmetic against the rows of a merged tensor: its bits, and the interval of what it can honestly write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_check.replay import Replay, bits, bounds, interval, written
from lora_check.rounding import ANY, cell
from lora_check.same import same_bits
from lora_check.types import Arithmetic, Case


@dataclass(slots=True)
class Trial:
    """One arithmetic against the tiles seen so far; `width` is the sum of the squared half-widths of its intervals."""

    case: Case
    how: Arithmetic
    exact: bool = True
    total: int = 0
    width: float = 0.0
    producer: Replay | None = None
    balls: Replay | None = None
    last: tuple[slice, tuple[Tensor, Tensor]] | None = None

    def over(self, rows: Tensor, span: slice) -> int:
        """How many elements of a tile no honest merge of this arithmetic can have written."""
        if same_bits(self.bits(span), rows):
            return 0
        self.exact = False
        count = int((~self.allows(rows, span)).sum().item())
        self.width += self.reach(span).square().sum().nan_to_num(torch.inf).item()
        self.total += count
        return count

    def allows(self, rows: Tensor, span: slice) -> Tensor:
        """Which elements of stored rows this arithmetic can have written: its interval meets their cell."""
        low, high = self.honest(span)
        least, largest = cell(rows, self.case.storage)
        if self.how is ANY:  # a bound that could not be found excludes nothing
            return ~((low > largest) | (least > high))
        return (low <= largest) & (least <= high)

    def bits(self, span: slice) -> Tensor:
        """What this arithmetic writes in a tile."""
        self.producer = self.producer or written(self.case, self.how)
        return bits(self.producer.rows(span).total, self.case, self.how)

    def honest(self, span: slice) -> tuple[Tensor, Tensor]:
        """The interval of honest values of a tile before they are stored; kept until the next tile."""
        if self.last is None or self.last[0] != span:
            self.balls = self.balls or bounds(self.case, self.how)
            self.last = span, interval(self.balls.rows(span).total, self.case, self.how)
        return self.last[1]

    def reach(self, span: slice) -> Tensor:
        """Half the width of each of these intervals."""
        low, high = self.honest(span)
        return (high - low) / 2
