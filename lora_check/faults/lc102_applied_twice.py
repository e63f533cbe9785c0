"""LC102 applied-twice

What it is
The delta is in the target two times, or more often; of several adapters, all are or one is.

How it happens
merge() was called, and then merge_and_unload() or an exporter merged again (PEFT 0.6 and 0.7 did not
notice).
A second export took the folder of the first one, already merged, for its base; a third one makes it three.
An engine was given merged weights and the adapter on top.

How it is told
W' = (W + s B A) + s B A, stored in between or not, reproduces every element; so do three rounds, or four.
rsLoRA's scale at r = 4, alpha not divided at r = 2 and a scale of 2 multiplied in twice can write the same
numbers: what explains most targets is named, the rest told beside it.

Evidence
times: how often it is in. adapter: which of several. survival: about 2, or as many times as it is in.

What to do
Start again from the untouched base, in an empty folder, and merge once.

Seen in
huggingface/peft#1355, unslothai/unsloth#3633, radixark/miles#1087, huggingface/diffusers#5003
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.faults._cases import deltas, rescaled, tied
from lora_check.faults._findings import listed
from lora_check.faults._said import each
from lora_check.types import Case, ValueFault

ROUNDS = (2, 3, 4)
AT_ONCE = (2, 3)
"""Rounds that are added up before they are stored. Four at once are what rsLoRA's scale makes of the usual r = 16,
and LC110 tells the factor of what has no name."""


def inject(case: Case) -> tuple[Case, ...]:
    """W' = (W + s B A) + s B A, stored in between; or W + 2 s B A, stored once; more rounds; one adapter's alone."""
    again = deltas(case)
    if not again or tied(case):
        return ()
    rounds = [replace(case, steps=case.steps + again * (n - 1), told={"times": n}) for n in ROUNDS]
    plain = not any(step.recipe.apply for step in again)
    at_once = [_at_once(case, n) for n in AT_ONCE] if plain else []
    return (rounds[0], *(one for found in at_once for one in found), *rounds[1:], *_one_of_several(case))


def _at_once(case: Case, times: int) -> tuple[Case, ...]:
    return rescaled(case, lambda scale: replace(scale, weight=times * scale.weight), times=times)


def _one_of_several(case: Case) -> Iterator[Case]:
    """One adapter again behind all of them, or right behind itself."""
    again = deltas(case)
    adapters = list(dict.fromkeys(step.adapter for step in again))
    for one in adapters if len(adapters) > 1 else ():
        own = tuple(step for step in again if step.adapter == one)
        behind = max(i for i, step in enumerate(case.steps) if step is own[-1]) + 1
        for place in dict.fromkeys([behind, len(case.steps)]):
            yield replace(
                case, steps=case.steps[:place] + own + case.steps[place:], told={"times": 2, "adapter": one + 1}
            )


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """'merged twice', 'merged 3 times', 'adapter 2 merged twice'."""
    times = listed("twice" if n == min(ROUNDS) else f"{n} times" for n in each(one.get("times", 2) for one in told))
    adapters = {one.get("adapter") for one in told}
    whose = f"adapter {adapters.pop()} " if len(adapters) == 1 and None not in adapters else ""
    return f"{whose}merged {times}"


FAULT = ValueFault(
    code="LC102",
    name="applied-twice",
    severity="error",
    summary="merged twice",
    help="start again from the untouched base, in an empty folder, and merge once",
    inject=inject,
    tell=tell,
    causes=("M12",),
)
