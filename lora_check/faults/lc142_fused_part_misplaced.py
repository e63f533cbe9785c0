"""LC142 fused-part-misplaced

What it is
In a fused projection the delta of a part is missing, lies in the rows of another part, or lies in those of several.

How it happens
The exporter counts the slots of q, k and v, or of gate and up, after it renamed them, so that each is the first; it
writes one part over another; or it knows the name of one part alone and leaves the others out.

How it is told
W' = W + s B' A reproduces every element, with B' the rows of B moved whole from part to part, added up in one of them,
copied to all, or zero. Parts that lie in files of their own are told by LC101 and LC145.

Evidence
how: what became of the parts.

What to do
Write the delta of each part into the rows of that part, and no other, and merge again.

Seen in
thinking-machines-lab/tinker-cookbook#457, thinking-machines-lab/tinker-cookbook#459,
NVIDIA-NeMo/Megatron-Bridge#5376, microsoft/LoRA#69
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any

from lora_check.faults._rows import family_of, layouts, refactored, said, whole
from lora_check.types import Case, LoadedStep, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, "Tensor"]


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s B' A, B' with rows of its parts zero, moved or added up; and the parts added one after the other."""
    found, steps = layouts(case), whole(case)
    if not found or not steps:
        return ()
    whole_case = replace(case, steps=steps)
    made: list[Case] = []
    for ways in found:
        for parts in list(ways.values())[:2]:
            for how, sources in _ways(parts).items():
                made += refactored(whole_case, partial(_placed, parts=parts, sources=sources), how=how)
    return (*made, *_one_by_one(case))


Sources = Mapping[str, Sequence[str]]
"""Part -> the parts whose deltas its rows get."""


def _ways(parts: Parts) -> dict[str, Sources]:
    """What may become of the parts: a part lost or kept alone; of those of one size, all in one, one in another."""
    own = {part: (part,) for part in parts}
    found: dict[str, Sources] = {}
    if len(parts) > 2:
        found |= {f"{part} left out": {**own, part: ()} for part in parts}
    found |= {f"{part} alone": {**dict.fromkeys(parts, ()), part: (part,)} for part in parts}
    for group in _of_one_size(parts):
        none = {**own, **dict.fromkeys(group, ())}
        found |= {f"{' and '.join(group)} both in {slot}": {**none, slot: group} for slot in group}
        found |= {f"{one} in the rows of {slot}": {**none, slot: (one,)} for one, slot in permutations(group, 2)}
        found |= {f"{' and '.join(group)} in each other as well": {**own, **dict.fromkeys(group, group)}}
    return found


def _of_one_size(parts: Parts) -> Iterator[tuple[str, ...]]:
    """The parts that can be taken for one another."""
    sizes: dict[int, list[str]] = {}
    for part, rows in parts.items():
        sizes.setdefault(len(rows), []).append(part)
    return (tuple(group) for group in sizes.values() if len(group) > 1)


def _placed(step: LoadedStep, parts: Parts, sources: Sources) -> Mapping[str, Tensor]:
    """B with the rows of each part those of its sources, added up."""
    b = step.factors["B"]
    placed = b.clone()
    for part, rows in parts.items():
        placed[rows] = sum((b[parts[source]] for source in sources[part]), b.new_zeros(len(rows), b.shape[1]))
    return {"B": placed}


def _one_by_one(case: Case) -> tuple[Case, ...]:
    """The deltas of parts of one size added to one slot, one after the other, with the sum stored in between."""
    found = []
    for slot in case.steps:
        steps = tuple(_into(step, slot.window) for step in case.steps)
        if any(new.window != old.window for new, old in zip(steps, case.steps, strict=True)):
            how = f"parts of one size one after the other in {family_of(slot, case)}"
            found.append(replace(case, steps=steps, told={"how": how}))
    return tuple(found)


def _into(step: LoadedStep, window: tuple[int, int] | None) -> LoadedStep:
    own = step.window
    fits = own is not None and window is not None and own[1] - own[0] == window[1] - window[0]
    return replace(step, window=window) if fits else step


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """What became of the parts."""
    return f"deltas of the parts of a fused projection in the wrong rows ({said(told, 'how')})"


FAULT = ValueFault(
    code="LC142",
    name="fused-part-misplaced",
    severity="error",
    summary="deltas of the parts of a fused projection in the wrong rows",
    help="write the delta of each part into the rows of that part and merge again",
    inject=inject,
    tell=tell,
    causes=("M14", "M20"),
)
