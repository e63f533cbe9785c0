"""LC141 fused-rows-permuted

What it is
A fused projection (q, k and v in one tensor, or gate and up) has the right delta with its rows in another order.

How it happens
Some models keep q|k|v below one another, others head by head or group by group; gate|up or in turn, row by row. A
converter, or an exporter that fuses adapters of the parts, took one order for another, or exchanged two parts: seen in
diffusion trainers, GPT-NeoX and GPT-OSS exports and engines that fuse for themselves.

How it is told
W' = W + s Q B A reproduces every element, with Q the permutation from one order into another, or the exchange of two
parts. The sizes of the parts are those that config.json tells.

Evidence
order: the order that was taken, and the one that was written.

What to do
Fuse the factors in the order of rows that the base has, as its modelling code splits them, and merge again.

Seen in
thinking-machines-lab/tinker-cookbook#527, thinking-machines-lab/tinker-cookbook#459, sgl-project/sglang#34940,
whittle-org/whittle#259, hiyouga/LlamaFactory#3376
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any

from lora_check.faults._rows import different, layouts, refactored, said, whole
from lora_check.types import Case, LoadedStep, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, "Tensor"]


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s Q B A, Q between two orders of the rows of the parts."""
    found = layouts(case)
    if not found:
        return ()
    steps = case.steps if _stacked(case) else whole(case)
    if not steps:
        return ()
    made: list[Case] = []
    for ways in found:
        for name, order in different(_orders(ways)):
            made += refactored(replace(case, steps=steps), partial(_moved, order=order), order=name)
    return tuple(made)


def _stacked(case: Case) -> bool:
    return all(step.recipe.stacked and step.factors.keys() == {"A", "B"} for step in case.steps)


def _moved(step: LoadedStep, order: Tensor) -> Mapping[str, Tensor]:
    """The factor of the outputs in that order: B, or A where a stack has its outputs there."""
    a, b = step.factors["A"], step.factors["B"]
    if b.shape[0] == len(order):
        return {"B": b[order]}
    return {"A": a[:, order]} if a.shape[-1] == len(order) and step.recipe.stacked else {}


def _orders(ways: Mapping[str, Parts]) -> dict[str, Tensor]:
    """Each order of one way taken for each of another, and the parts of one way in each order of theirs."""
    found: dict[str, Tensor] = {}
    for name, way in ways.items():
        for other, there in ways.items():
            if other != name:
                found[f"{name} taken for {other}"] = _from(way, there, list(way))
    for name, way in ways.items():
        for order in permutations(way):
            found[f"{'|'.join(order)}, {name}" if name not in ("q|k|v", "gate|up") else "|".join(order)] = _slots(
                way, list(order)
            )
    if "gate" in next(iter(ways.values())):
        contiguous, turned = ways["gate|up"], ways["in turn"]
        found["gate|up taken for up and gate in turn"] = _from(contiguous, turned, ["up", "gate"])
        found["up and gate in turn taken for gate|up"] = _from(turned, contiguous, ["up", "gate"])
    return found


def _from(way: Parts, there: Parts, order: Sequence[str]) -> Tensor:
    """Where each row comes from, if rows that lie as in `way` are moved as if they had to come to lie as in `there`."""
    moved = next(iter(way.values())).new_zeros(sum(len(rows) for rows in way.values()))
    for part, source in zip(way, order, strict=True):
        moved[there[part]] = way[source]
    return moved


def _slots(way: Parts, order: Sequence[str]) -> Tensor:
    """Where each row comes from, if the parts follow one another in another order in the rows of the tensor."""
    import torch

    rows = torch.cat([way[part] for part in way]).sort().values
    if rows.equal(torch.cat([way[part] for part in way])):
        return torch.cat([way[part] for part in order])
    moved = rows.clone()
    for part, source in zip(way, order, strict=True):
        if len(way[part]) == len(way[source]):
            moved[way[part]] = way[source]
    return moved if moved.sort().values.equal(rows) else rows


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Which order was taken for which."""
    return f"rows of the delta of a fused projection in another order ({said(told, 'order')})"


FAULT = ValueFault(
    code="LC141",
    name="fused-rows-permuted",
    severity="error",
    summary="rows of the delta of a fused projection in another order",
    help="fuse the factors in the order of rows that the base has and merge again",
    inject=inject,
    tell=tell,
    causes=("M14", "M20"),
)
