"""MergedLinear: one layer of several equal outputs, some of them with a LoRA of their own (query, key, value in one).

    enable_lora   one flag for each output
    A (n r, in)   the A of the n enabled outputs, one below the other
    B (n o, r)    the B of the n enabled outputs of o rows; PEFT keeps it as a convolution (n o, r, 1) of groups

As one pair of factors: A as it is, and B (outputs, n r) with each block on the diagonal and zeros elsewhere, the rows
of outputs without a LoRA all zero.

Source: microsoft/LoRA loralib/layers.py MergedLinear; PEFT 0.2 tuners/lora.py MergedLinear
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from lora_check.dialects._shared import Shape, modules_of, scales, shape_of
from lora_check.links import lookup
from lora_check.types import Adapter, Checkpoint, Part, View

if TYPE_CHECKING:
    from torch import Tensor


def flags(value: object) -> tuple[bool, ...]:
    """enable_lora as a configuration has it; nothing, where it is no list with something enabled."""
    known = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, bool) for one in value)
    return tuple(value) if known and isinstance(value, Sequence) and any(value) else ()


def spread(adapter: Adapter, base: Checkpoint, enabled: Sequence[bool], groups: int) -> Adapter:
    """The adapter with B as wide and as high as the layer, wherever its factors are of some outputs only.

    groups   of the convolution that multiplies with B
    """
    parts, told, refused = list(adapter.parts), dict(adapter.scales), dict(adapter.refused)
    for module, roles in modules_of(adapter).items():
        outputs = _outputs(adapter, roles, base, module)
        if not outputs:
            continue
        a, b = (shape_of(adapter, roles[role]) for role in "AB")
        if b == (outputs, a[0]):
            continue
        count, rank = sum(enabled), adapter.config.rank
        fits = a[0] == count * rank == groups * b[1] and prod(b[2:]) == 1
        if not fits or b[0] * len(enabled) != outputs * count or outputs % len(enabled) or b[0] % groups:
            refused[module] = (
                f"A {a} and B {b} are not the factors of {count} of {len(enabled)} outputs with r = {rank}"
            )
            continue
        moved = partial(_spread, ranks=a[0], enabled=tuple(enabled))
        parts[parts.index(roles["B"])] = replace(roles["B"], view=View(moved=moved, size=(outputs, a[0])))
        told |= scales({module: (float(adapter.config.alpha), rank)})
    return replace(adapter, parts=tuple(parts), scales=told, refused=refused)


def _outputs(adapter: Adapter, roles: Mapping[str, Part], base: Checkpoint, module: str) -> int:
    """How many outputs the layer has: the side of its weight that A does not have; 0 where that is not told."""
    name = lookup(f"{module}.weight", base.metas(), base.config)
    if name is None or not {"A", "B"} <= roles.keys():
        return 0
    a, b = (shape_of(adapter, roles[role]) for role in "AB")
    sides: Shape = base.metas()[name].shape
    if len(sides) != 2 or len(a) != 2 or len(b) < 2 or a[1] not in sides or not b[1]:
        return 0
    return sides[0] if sides[1] == a[1] else sides[1]


def _spread(stored: Tensor, ranks: int, enabled: Sequence[bool]) -> Tensor:
    """Each group of rows in the columns of its own A, each enabled output in its own rows."""
    matrix = stored.reshape(stored.shape[0], stored.shape[1])
    groups, rows = ranks // matrix.shape[1], matrix.shape[0] // sum(enabled)
    blocks = matrix.new_zeros((groups, matrix.shape[0] // groups, groups, matrix.shape[1]))
    for index, block in enumerate(matrix.reshape(groups, -1, matrix.shape[1])):
        blocks[index, :, index] = block
    found = matrix.new_zeros((len(enabled), rows, ranks))
    found[[place for place, flag in enumerate(enabled) if flag]] = blocks.reshape(sum(enabled), rows, ranks)
    return found.reshape(-1, ranks)
