"""LC131 magnitude-misapplied

What it is
A DoRA adapter was merged with its magnitudes, but not as m / |W + s B A| times W + s B A.

How it happens
A re-implementation takes the norm of W, as m was at the start of training, or leaves the division out.
It takes the norm along the other axis: over the outputs where each output has a magnitude (kohya and LyCORIS
files have both).
It multiplies the delta alone, or the base alone.

How it is told
One of these formulas reproduces every element, where the right one does not.

Evidence
how: the formula, in words.

What to do
Merge with a PEFT release that knows DoRA, or take the norm of W + s B A for each output and divide by it.

Seen in
huggingface/peft#3609, hako-mikan/sd-webui-supermerger#373, invoke-ai/InvokeAI#9517
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lora_check.faults._said import Told, ways
from lora_check.types import Case, Factors, Hand, LoadedStep, Numbers, Recipe, ValueFault

SQUARE_ONLY = "magnitudes and norms along the other axis"


@dataclass(frozen=True, slots=True)
class Way:
    """Whose norm is divided by, whether along the other axis and the magnitudes with it, and what is multiplied."""

    norm_of: Literal["sum", "base", "nothing"] = "sum"
    norm_turned: bool = False
    magnitude_turned: bool = False
    on: Literal["sum", "delta", "base"] = "sum"


WAYS = {
    "the norm of W in place of that of W + s B A": Way(norm_of="base"),
    "not divided by the norm": Way(norm_of="nothing"),
    "the norm along the other axis": Way(norm_turned=True),
    SQUARE_ONLY: Way(norm_turned=True, magnitude_turned=True),
    "the delta alone multiplied": Way(on="delta"),
    "the base alone multiplied": Way(on="base"),
}


def inject(case: Case) -> tuple[Case, ...]:
    """Each way to misapply the magnitudes; those of the other axis need a square weight to fit."""
    if not any(_is_dora(step) for step in case.steps):
        return ()
    square = case.base.shape[0] == case.base.shape[1]
    return tuple(
        replace(case, steps=tuple(_taken(step, way) for step in case.steps), told={"how": how})
        for how, way in WAYS.items()
        if square or how != SQUARE_ONLY
    )


def _is_dora(step: LoadedStep) -> bool:
    return "m" in step.factors and step.recipe.apply is not None and step.recipe.method is None


def _taken(step: LoadedStep, way: Way) -> LoadedStep:
    return replace(step, recipe=_by(step.recipe, way)) if _is_dora(step) else step


def _by(recipe: Recipe, way: Way) -> Recipe:
    """The recipe with that formula; its own tells by `columns` whether a magnitude belongs to a column or to a row."""
    by_rows = recipe.columns is None
    magnitudes_by_rows, norms_by_rows = by_rows != way.magnitude_turned, by_rows != way.norm_turned

    def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
        from lora_check.ball import norm

        v = hand.keep(w + delta)
        ratio = factors["m"].reshape(-1)[rows].reshape(-1, 1) if magnitudes_by_rows else factors["m"].reshape(1, -1)
        if way.norm_of != "nothing":
            lengths = norm(w if way.norm_of == "base" else v) if norms_by_rows else norms
            ratio = hand.keep(ratio / hand.keep(lengths))
        if way.on == "sum":
            return ratio * v
        return w + hand.keep(ratio * delta) if way.on == "delta" else hand.keep(ratio * w) + delta

    def gathered(w: Numbers, delta: Numbers, hand: Hand) -> Numbers:
        return w if way.norm_of == "base" else hand.keep(w + delta)

    return replace(recipe, apply=apply, columns=None if norms_by_rows or way.norm_of == "nothing" else gathered)


def tell(told: Told) -> str:
    """'DoRA magnitude misapplied: the norm of W in place of that of W + s B A'."""
    return ": ".join(part for part in (FAULT.summary, ways(told, "how")) if part)


FAULT = ValueFault(
    code="LC131",
    name="magnitude-misapplied",
    severity="error",
    summary="DoRA magnitude misapplied",
    help="merge with a PEFT release that knows DoRA, or divide by the norm of W + s B A of each output",
    inject=inject,
    tell=tell,
    causes=("M22",),
)
