"""LC126 part-of-the-rank

What it is
Only a part of the r columns of B, and of the r rows of A, is in the delta: a half, a third or a quarter of them.

How it happens
The factors are sharded by rank over devices, and one device's part was taken for the whole.
A down matrix that several projections share was cut by rank, one part for each, when it was split.

How it is told
W' = W + s B[:, part] A[part] reproduces every element, with s as it is or made of the rank of the part. The first half
of a converted adapter, whose second half is the start of its training, is told as LC166.

Evidence
ranks: which of them are in, counted from 0, of how many. scale_of: "part", if r was taken from the part.

What to do
Gather the factors before merging: all r rows of A and columns of B belong to each module.

Seen in
mflux-community/mflux#459, radixark/miles#3232, NVIDIA-NeMo/Megatron-Bridge#2194
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import sqrt

from lora_check.faults._cases import deltas
from lora_check.faults._said import Told, each, ways
from lora_check.faults._start import halves
from lora_check.types import Case, LoadedStep, ValueFault

PARTS = (2, 3, 4)
PAIRS = (("A", "B"), ("embedding_A", "embedding_B"))


def inject(case: Case) -> tuple[Case, ...]:
    """Each half, third and quarter of the rank, with the scale of the whole and with its own."""
    steps = deltas(case)
    ranks = {rank for step in steps if (rank := _rank(step))}
    if len(ranks) != 1 or not all(_rank(step) for step in steps):
        return ()
    first = slice(0, max(ranks) // 2) if halves(case) else None
    parts = [(part, rank) for rank in ranks for part in _parts(rank) if part != first]
    return tuple(_cut(case, part, rank, own) for part, rank in parts for own in (False, True))


def _rank(step: LoadedStep) -> int:
    """r of a step whose delta is one product of two factors as stored; else 0."""
    pair = next((one for one in PAIRS if set(one) <= step.factors.keys() <= {*one, "m"}), None)
    recipe = step.recipe
    if pair is None or recipe.prepare or recipe.stacked or recipe.product is None or recipe.method is not None:
        return 0
    a, b = (step.factors[role] for role in pair)
    return int(a.shape[0]) if a.ndim > 1 and b.ndim > 1 and a.shape[0] == b.shape[1] else 0


def _parts(rank: int) -> Iterator[slice]:
    for count in PARTS:
        size = rank // count
        for start in range(0, rank, size) if rank % count == 0 else ():
            yield slice(start, start + size)


def _cut(case: Case, part: slice, rank: int, own: bool) -> Case:
    told = {"ranks": f"{part.start}-{part.stop - 1}", "of": rank} | ({"scale_of": "part"} if own else {})
    cut = tuple(step if step.recipe.copies else _narrowed(step, part, own) for step in case.steps)
    return replace(case, steps=cut, told=told)


def _narrowed(step: LoadedStep, part: slice, own: bool) -> LoadedStep:
    factors = {
        role: factor[part] if role.endswith("A") else factor[:, part] if role.endswith("B") else factor
        for role, factor in step.factors.items()
    }
    scale = step.scale
    if own and scale is not None:
        share = (part.stop - part.start) / scale.rank
        scale = replace(scale, weight=scale.weight / (share if scale.rule == "alpha/r" else sqrt(share)))
    return replace(step, factors=factors, scale=scale)


def tell(told: Told) -> str:
    """'only ranks 0-2 of 6 merged'."""
    parts = each(f"{one['ranks']} of {one['of']}" for one in told if "of" in one)
    return f"only ranks {parts[0]} merged" if len(parts) == 1 else f"{FAULT.summary}: ranks {ways(told, 'ranks')}"


FAULT = ValueFault(
    code="LC126",
    name="part-of-the-rank",
    severity="error",
    summary="only a part of the rank merged",
    help="gather the factors before merging: all r rows of A and columns of B belong to each module",
    inject=inject,
    tell=tell,
    causes=("M14", "M39"),
)
