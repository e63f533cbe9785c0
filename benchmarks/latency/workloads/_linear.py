"""One linear layer on its own, cold or hot."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.latency import problem, shapes
from benchmarks.latency.nouns import Cell, Place, Subject

if TYPE_CHECKING:
    from torch import Tensor


@torch.inference_mode(False)
@torch.no_grad()
def subject(cell: Cell, place: Place) -> Subject:
    """Copies of the module, each with x (batch, length, K).

    x has the three dimensions that a model hands to its layers, and the batch is one of them: adapters are chosen by
    sequence.
    """
    shape, dtype = shapes.module(cell.shape), getattr(torch, cell.dtype)
    count = problem.copies(cell, place, shape.rows * shape.columns * shapes.BYTES[cell.dtype])
    bases = problem.kept(
        ("linear", cell.shape, cell.dtype, place.device, count),
        lambda: tuple(base(shape, dtype, place, number) for number in range(count)),
    )
    modules = tuple(nn.Sequential(OrderedDict({shape.name: linear})).eval() for linear in bases)
    inputs = tuple(
        (torch.empty(cell.batch, cell.length, shape.columns, dtype=dtype, device=place.device),) for _ in range(count)
    )

    def refill(seed: int) -> None:
        for number, (x,) in enumerate(inputs):
            x.normal_(generator=problem.generator(place.device, "x", seed, number))

    refill(0)
    return Subject(
        copies=modules,
        targets=(shape.name,),
        sites=tuple(problem.sites(module, (shape.name,), cell, place, number) for number, module in enumerate(modules)),
        inputs=inputs,
        refill=refill,
        call=call,
    )


def base(shape: shapes.Module, dtype: torch.dtype, place: Place, number: int) -> nn.Linear:
    """The `number`-th copy of a module, with numbers of its own."""
    made = nn.Linear(shape.columns, shape.rows, bias=shape.bias, dtype=dtype, device="meta").to_empty(
        device=place.device
    )
    problem.fill(made.eval().requires_grad_(False), problem.generator(place.device, "linear", shape, number))
    return made


def call(module: nn.Module, inputs: tuple[object, ...]) -> Tensor:
    """y (batch, length, N)."""
    output: Tensor = module(*inputs)
    return output
