"""LC167 start-taken-off-twice

What it is
A converted adapter, which takes its own start off the base, was merged into a base that had lost it already.

How it happens
PiSSA and OLoRA train beside W - s B0 A0. save_pretrained with path_initial_model_for_weight_conversion writes the
plain LoRA [B, -B0] [A; A0] for W itself. It was merged into the model of the training session, or into the residual
model that was saved for the unconverted adapter.

How it is told
The second half of the ranks was added twice: W' = W + s B' A' - s B0 A0 reproduces every element. It is tried
where the columns of that half of B stand at right angles, as a start of these methods has them.

Evidence
over_budget: elements of the worst target that no honest merge can have written. ranks: of the start.

What to do
Merge the converted adapter into the untouched base.

Seen in
huggingface/peft#2184, huggingface/peft#2186, huggingface/peft#2270
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_check.types import Case, LoadedStep, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

RECIPES = ("lora-linear", "lora-linear-in-out")


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s B' A' - s B0 A0, B' = [B, -B0] and A' = [A; A0]."""
    if len(case.steps) != 1 or case.steps[0].recipe.name not in RECIPES or not _converted(case.steps[0]):
        return ()
    step = case.steps[0]
    half = step.factors["A"].shape[0] // 2
    start = {"A": step.factors["A"][half:], "B": step.factors["B"][:, half:]}
    return (replace(case, steps=(replace(step, factors=start), step), told={"ranks": half}),)


def _converted(step: LoadedStep) -> bool:
    """Whether the second half of the factors may be the start of PiSSA or OLoRA, whose B0 has orthogonal columns."""
    a, b = step.factors["A"], step.factors["B"]
    half, odd = divmod(int(a.shape[0]), 2)
    return half > 1 and not odd and _orthogonal(b[:, half:])


def _orthogonal(columns: Tensor) -> bool:
    """Whether columns stand at right angles, as a decomposition in float32 leaves them and storage rounds them."""
    import torch

    from lora_check.rounding import FORMATS, backward, unit

    dtype = str(columns.dtype).removeprefix("torch.")
    wide = columns.to(torch.float64)
    lengths = torch.linalg.vector_norm(wide, dim=0)
    if dtype not in FORMATS or not bool((lengths > 0).all()):
        return False
    angles = (wide / lengths).T @ (wide / lengths)
    reach = backward(max(columns.shape), unit("float32")) + 2 * unit(dtype)
    return bool((angles - torch.eye(len(lengths), dtype=torch.float64)).abs().max() <= reach)


FAULT = ValueFault(
    code="LC167",
    name="start-taken-off-twice",
    severity="error",
    summary="converted adapter merged into a base that had lost its start already",
    help="merge the converted adapter into the untouched base",
    inject=inject,
    causes=("M19",),
)
