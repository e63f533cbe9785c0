"""LC402 constant-added

What it is
A vector that no adapter touches is the base's with 1 added to every element, or taken off.

How it happens
Gemma's norms compute with 1 + w. A patch that keeps the sum in memory, to save an addition, leaks into the save
(unsloth); an exporter adds the 1 for a format that wants it and saves that for one that does not (mlx-vlm, GGUF
converters). Each merge of the result adds another 1.

How it is told
W' = W + c, c one of 1, 2, 3 and -1, stored once, reproduces every element.

Evidence
added: the constant.

What to do
Copy these tensors from BASE into MERGED.

Seen in
unslothai/unsloth#219, Blaizzy/mlx-vlm#2181
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.faults._findings import listed
from lora_check.types import FLOATS, Case, Factors, LoadedStep, Numbers, Recipe, Site, ValueFault

CONSTANTS = (1, 2, 3, -1)


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + c, of vectors."""
    if case.storage not in FLOATS or case.grid is not None or case.base.shape[1] != 1:
        return ()
    ones = case.base.new_ones((1, 1)).expand(case.rows, 1)  # one number: costs no memory
    return tuple(
        replace(case, steps=(*case.steps, LoadedStep(recipe=CONSTANT, factors={"c": one * ones})), told={"added": one})
        for one in CONSTANTS
    )


def _product(factors: Factors, rows: slice) -> Numbers:
    return factors["c"][rows]


def _nowhere(site: Site) -> bool:
    return False


CONSTANT = Recipe(name="constant", formula="W' = W + c", fits=_nowhere, product=_product)


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """'1 added to every element'."""
    constants = sorted({int(one["added"]) for one in told if "added" in one}) or [1]
    return f"{listed(map(str, constants))} added to every element"


FAULT = ValueFault(
    code="LC402",
    name="constant-added",
    severity="error",
    summary="a constant added to every element",
    help="copy these tensors from BASE into MERGED",
    inject=inject,
    tell=tell,
    kinds=("bystander",),
    causes=("M44",),
)
