"""LC164 base-blurred-by-merging

What it is
The delta was added and taken off again, and each time the weight was rounded: W + P - P is not W.

How it happens
merge_adapter() and unmerge_adapter() around each rollout or evaluation of a long run (TRL), PEFT's merge(), then
unmerge() and save. In 16 bits some elements come back one step off, more with each turn.

How it is told
W' = ((W + s B A) - s B A), stored in between, one to three times, reproduces every element: the adapter is not in
MERGED and the base is blurred. Or the same with one more + s B A: it is in, over a blurred base. In 32 bits the
drift is no larger than honest rounding, and this is not tried. Once, with nothing rounded before it is taken off, is
told as LC101.

Evidence
cycles: how often it was added and taken off. merged: whether it was added once more at the end.

What to do
Reload the untouched base from its file and merge once.

Seen in
huggingface/trl#6688, huggingface/trl#3466, huggingface/peft#3412, huggingface/peft#3531, huggingface/peft#3532,
huggingface/peft#3656
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.faults._cases import copies, deltas
from lora_check.types import Case, LoadedStep, ValueFault

CYCLES = 3
"""Times of adding and taking off that are tried."""


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + n (P - P), and the same + P; of what only adds, in 16 bits, where each sum is rounded visibly."""
    added = deltas(case)
    narrow = case.storage in ("bfloat16", "float16")
    if not narrow or case.grid is not None or not added or any(one.recipe.apply or not one.scale for one in added):
        return ()
    turn = (*added, *(_taken_off(step) for step in reversed(added)))
    return tuple(
        replace(case, steps=(*copies(case), *turn * count, *last), told={"cycles": count, "merged": bool(last)})
        for count in range(1, CYCLES + 1)
        for last in ((), added)
    )


def _taken_off(step: LoadedStep) -> LoadedStep:
    """The step with its sign turned; PEFT rounds what it takes off, and not what it adds."""
    assert step.scale is not None
    return replace(step, recipe=replace(step.recipe, stored=True), scale=replace(step.scale, alpha=-step.scale.alpha))


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """'added and taken off again, which blurs the base', and whether the adapter is in."""
    merged = [one.get("merged") for one in told]
    end = "then merged" if all(merged) else "not merged" if not any(merged) else "and in part merged"
    turns = sorted({int(one.get("cycles", 1)) for one in told})
    times = f"{turns[0]} to {turns[-1]} times" if len(turns) > 1 else "once" if turns == [1] else f"{turns[0]} times"
    return f"{FAULT.summary} {times}, {end},"


FAULT = ValueFault(
    code="LC164",
    name="base-blurred-by-merging",
    severity="error",
    summary="delta added and taken off again, which rounds the base,",
    help="reload the untouched base from its file, and merge once",
    inject=inject,
    tell=tell,
    causes=("M32",),
)
