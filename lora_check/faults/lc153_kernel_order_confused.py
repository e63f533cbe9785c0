"""LC153 kernel-order-confused

What it is
The kernel of a convolution has the right delta with its taps in another order.

How it happens
The script multiplied B by a flattened A and gave the product the shape (out, kh, kw, in), as TensorFlow and MLX keep
kernels, in place of (out, in, kh, kw); or exchanged height and width, or turned the kernel round, as a convolution does
and a layer called so does not. Seen in scripts for diffusion models.

How it is told
W' = W + s B A' reproduces every element, with the numbers of A in one of these orders.

Evidence
order: what was done to the kernel.

What to do
Flatten A as (r, in kh kw) in the order of the weight, multiply by B, and give the product the shape of the weight.

Seen in
huggingface/peft#637
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_check.faults._rows import refactored, said
from lora_check.types import Case, LoadedStep, ValueFault

if TYPE_CHECKING:
    from torch import Tensor


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s B A', A (r, in, k...) with its numbers in another order."""
    if not all(step.recipe.name == "lora-conv" for step in case.steps):
        return ()
    return tuple(
        changed
        for order, move in ORDERS.items()
        for changed in refactored(case, partial(_moved, move=move), order=order)
    )


def _moved(step: LoadedStep, move: Callable[[Tensor], Tensor]) -> Mapping[str, Tensor]:
    a = step.factors["A"]
    moved = move(a)
    return {"A": moved.reshape(a.shape)} if moved.numel() == a.numel() else {}


def _channels_last(a: Tensor) -> Tensor:
    return a.movedim(1, -1)


def _read_as_channels_last(a: Tensor) -> Tensor:
    return a.reshape(a.shape[0], *a.shape[2:], a.shape[1]).movedim(-1, 1)


def _exchanged(a: Tensor) -> Tensor:
    return a.transpose(-1, -2) if a.ndim > 3 and a.shape[-1] == a.shape[-2] else a


def _round(a: Tensor) -> Tensor:
    return a.flip(tuple(range(2, a.ndim)))


ORDERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "channels laid last": _channels_last,
    "taken for one with channels last": _read_as_channels_last,
    "height and width exchanged": _exchanged,
    "turned round": _round,
}


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """What was done to the kernel."""
    return f"delta of a convolution with its kernel in another order ({said(told, 'order')})"


FAULT = ValueFault(
    code="LC153",
    name="kernel-order-confused",
    severity="error",
    summary="delta of a convolution with its kernel in another order",
    help="flatten A in the order of the weight, multiply by B, and give the product the shape of the weight",
    inject=inject,
    tell=tell,
    causes=("M49",),
)
