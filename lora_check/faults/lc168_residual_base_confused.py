"""LC168 residual-base-confused

What it is
BASE and the model that was merged into differ by the start of the training: the one is the whole model, the other what
that start left of it.

How it happens
PiSSA, OLoRA and their like begin with s B0 A0, a part of W, and train beside the residual W - s B0 A0. The unconverted
factors belong to the residual model, the converted adapter (path_initial_model_for_weight_conversion) to W. Both models
lie about under similar names, and the one that is given as BASE is not the one that the adapter was merged into.

How it is told
A converted adapter holds the start, as the second half of its ranks, whose columns of B stand at right angles. BASE is
the residual: MERGED - s B' A' is BASE + s B0 A0 in every element, to within the rounding of both, and that start is
larger than the rounding; or BASE avoids the start, and W + s B A reproduces every element. MERGED was made over the
residual: W' = (W - s B0 A0) + s B A, stored in between, does. Of unconverted factors: MERGED - s B A - BASE is of low
rank, lies mostly in the columns of B, points the way of the start, and is larger than a mean direction of the residual,
which avoids it: it was cut out of the whole.

Evidence
residual: which of the two lost the start, BASE or the base that was merged into. ranks: of the start. converted: the
adapter takes the start off.

What to do
Run the check with the base that was merged into: the whole model for a converted adapter, the residual one for
unconverted factors.

Seen in
huggingface/peft#2184, huggingface/peft#2186, huggingface/peft#2270
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_check.faults._findings import listed
from lora_check.faults._residuals import delta_of, residuals
from lora_check.faults._said import each
from lora_check.faults._start import halves, has_lost, lost
from lora_check.types import Case, LoadedStep, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

IN_WORDS = {
    ("BASE", False): "BASE lacks the start of the training, and the model that was merged into has it",
    (
        "BASE",
        True,
    ): "BASE has lost what the converted adapter takes off; MERGED is right over the whole model",
    ("MERGED", False): "merged into what the start of the training left of BASE",
    ("MERGED", True): "merged into what the start of the training left of BASE, without the converted half",
}


def inject(case: Case) -> tuple[Case, ...]:
    """W' = (W - s B0 A0) + s B A, of a converted adapter; W + s B A, where W has lost the start."""
    if (found := halves(case)) is None:
        return ()
    trained, start = found
    over = "BASE" if has_lost(case, start) else "MERGED"
    return (replace(case, steps=(trained,) if over == "BASE" else (start, trained), told=_told(over, start)),)


def _told(residual: str, start: LoadedStep) -> dict[str, Any]:
    return {"residual": residual, "ranks": len(start.factors["A"]), "converted": True}


def recognise(case: Case, actual: Tensor) -> Mapping[str, Any] | None:
    """Which of BASE and MERGED lost the start, and its rank."""
    if (found := halves(case)) is None:
        return lost(case, actual)
    _, start = found
    return _told("BASE", start) if _is_put_back(case, actual, start) else None


def _is_put_back(case: Case, actual: Tensor, start: LoadedStep) -> bool:
    """Whether MERGED - s B' A' is BASE with the start put back, which is more than rounding."""
    alone, size, room = replace(case, steps=(start,)), 0.0, 0.0
    for one in residuals(case, actual):
        taken, reach = delta_of(alone, one.rows)[0], one.room + one.off
        if bool(((one.error + taken).abs() > reach).any()):
            return False
        size, room = size + float(taken.square().sum()), room + float(reach.square().sum())
    return size > room


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Which of the two is the residual model."""
    return listed(IN_WORDS[one] for one in each((one["residual"], one.get("converted", False)) for one in told)) + ","


FAULT = ValueFault(
    code="LC168",
    name="residual-base-confused",
    severity="error",
    summary="BASE and the model that was merged into differ by the start of the training",
    help="give the base that was merged into: the whole model for a converted adapter, else the residual one",
    inject=inject,
    recognise=recognise,
    tell=tell,
    causes=("M19",),
)
