"""What is seen of one module in one call, and how far it lies from the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.latency import budget
from benchmarks.latency.nouns import Site
from lora_check.errors import LoraCheckError

TOKENS = 64
"""Tokens of a sequence at which a module among others is looked at: 4 in each tile of 128 of a prompt of 2048."""
VISIBLE = 2
"""Budgets by which an adapter has to move at least one output. An honest output without it is within one budget of what
it should be itself, so it is then more than one away from y."""

Reference = Callable[[Site, Tensor], tuple[Tensor, Tensor]]


class BlindError(LoraCheckError):
    """The adapter of a problem is too weak for the gate to miss it."""

    code = "blind"


def same_bits(left: Tensor, right: Tensor) -> Tensor:
    """Whether two tensors hold the same bytes; still on the device, so that nobody waits for it."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return torch.tensor(False)
    return (left.contiguous().view(torch.uint8) == right.contiguous().view(torch.uint8)).all()


@dataclass(slots=True, kw_only=True, eq=False)
class Look:
    """What was seen of one module in one call: some tokens of x and y, and whether its input was left as it was.

    share     largest |y - y64| / budget           visible   largest |y64 - x W^T - bias| / budget
    """

    where: str
    wrong: str
    x: Tensor
    y: Tensor
    kept: Tensor
    share: float = 0.0
    visible: float = 0.0

    def finding(self) -> str:
        """What is wrong with the output, else empty.

        raises   BlindError: the adapter could be missing unseen
        """
        if not self.visible > VISIBLE:
            raise BlindError(
                f"{self.where}: the adapter moves no output by more than {self.visible:.2g} budgets, and could be left "
                f"out unseen; {VISIBLE} are needed",
                hint="a stronger adapter, a lower rank or more tokens",
            )
        if not bool(self.kept):
            return f"{self.where}: it changes its input"
        return "" if self.share <= 1 else f"{self.where}: off by {self.share:.3g} times the budget"


class Watch(nn.Module):
    """Stands around a module and notes every call; it waits for nothing.

    tokens   so many of each sequence are kept; 0: all
    """

    def __init__(self, module: nn.Module, path: str, outputs: int, tokens: int, looks: list[Look]) -> None:
        super().__init__()
        self.module, self.path, self.outputs, self.tokens, self.looks = module, path, outputs, tokens, looks

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output, unchanged."""
        before = x.clone()
        y = self.module(x, *args, **kwargs)
        wrong = misfit(x, y, self.outputs)
        after = before if wrong else y
        x_, y_ = (some(tensor, self.tokens) for tensor in (before, after))
        self.looks.append(Look(where=self.path, wrong=wrong, x=x_, y=y_, kept=same_bits(x, before)))
        return y


def some(tensor: Tensor, tokens: int) -> Tensor:
    """A copy of (..., T, features), of so many tokens from the first to the last; 0: of all."""
    length = tensor.shape[-2] if tensor.dim() > 1 else 1
    if not 0 < tokens < length:
        return tensor.clone()
    at = [number * (length - 1) // max(1, tokens - 1) for number in range(tokens)]
    return torch.stack([tensor.select(-2, number) for number in at], dim=-2)


def misfit(x: Tensor, y: object, outputs: int) -> str:
    """Why an output cannot even be compared, else empty."""
    if not isinstance(y, Tensor):
        return f"the output is a {type(y).__name__}"
    expected = (*x.shape[:-1], outputs)
    if tuple(y.shape) != expected or y.dtype != x.dtype or y.device != x.device:
        return f"the output is {tuple(y.shape)} {y.dtype} on {y.device}, not {expected} {x.dtype} on {x.device}"
    return "the output is the memory of the input" if start(y) == start(x) else ""


def start(tensor: Tensor) -> int:
    """Where the memory of a tensor begins."""
    return tensor.untyped_storage().data_ptr()


def weigh(site: Site, reference: Reference, looks: Sequence[Look]) -> None:
    """Write share and visible of looks at one site; inputs that are the same are worked out once, and all together."""
    inputs: list[Tensor] = []
    which: list[int] = []
    for one in looks:
        same = (number for number, known in enumerate(inputs) if bool(same_bits(one.x, known)))
        which.append(next(same, len(inputs)))
        if which[-1] == len(inputs):
            inputs.append(one.x)
    chosen = None if site.chosen is None else site.chosen.repeat(len(inputs))
    many, stacked = replace(site, chosen=chosen), torch.cat(inputs)
    truth, allowed = reference(many, stacked)
    moved = (truth - budget.alone(site, stacked)).abs() / allowed
    truths, allowances, moves = (tensor.chunk(len(inputs)) for tensor in (truth, allowed, moved))
    for one, at in zip(looks, which, strict=True):
        one.share = float(((one.y.double() - truths[at]).abs() / allowances[at]).max())
        one.visible = float(moves[at].max())
