"""Blocks of few levels: the trace of a quantiser whose rule nobody knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 16
"""Those of four bits; a quantiser of fewer bits has fewer."""

BLOCKS = (64, 128, 32)
"""Elements that share a scale, in the 4-bit schemes in use; a grid of blocks of 128 is one of blocks of 64 too."""


def few(low: Tensor, high: Tensor, levels: int = LEVELS) -> Tensor:
    """Blocks in which so many numbers are enough for one of them to lie in each element's interval.

    low, high   (blocks, elements)

    The least upper end has to be met by some number, and no number meets more intervals than that end itself.
    """
    import torch

    left = torch.ones_like(low, dtype=torch.bool)
    for _ in range(levels):
        least = torch.where(left, high, torch.inf).amin(1, keepdim=True)
        left &= low > least
        if not bool(left.any()):
            break
    return ~left.any(1)


def on_levels(numbers: Tensor, room: Tensor, base: Tensor, size: int) -> tuple[int, int, int]:
    """Blocks of `size` in the rows; those where BASE needs more than LEVELS; those of these where the numbers do not.

    numbers, room, base   (rows, columns); the same room is given to both
    """
    blocks = [one.reshape(-1, size) for one in (numbers, base, room)]
    plain = few(blocks[1] - blocks[2], blocks[1] + blocks[2])
    found = few(blocks[0] - blocks[2], blocks[0] + blocks[2])
    return len(plain), int((~plain).sum().item()), int((found & ~plain).sum().item())
