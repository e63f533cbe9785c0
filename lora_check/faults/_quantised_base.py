"""BASE as bitsandbytes makes it when it quantises and decodes it: what the faults of such bases share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from lora_check.faults._residuals import additive, delta_of
from lora_check.types import FLOATS, Case

if TYPE_CHECKING:
    from torch import Tensor

FIRST = 1 << 12
"""Elements of the first rows, over which the error of the quantiser is measured against the delta."""

UNTOUCHED = ("embedding", "conv")
"""Recipes of layers that bitsandbytes leaves as they are."""


def through(case: Case, scheme: str, held: Sequence[str]) -> tuple[Case, ...]:
    """The case over decode(quantise(W)), in each dtype that it may have been decoded to; () where W stays itself.

    scheme   a key of `dequantised.decoded`
    held     dtypes by name that the model was held in; for those of BASE and MERGED, the usual orders hold
    """
    import torch

    from lora_check.dequantised import decoded

    if not _may_be_quantised(case):
        return ()
    usual = (case.storage, str(case.base.dtype).removeprefix("torch."))
    changed = [(one, decoded(case.base, scheme, getattr(torch, one))) for one in dict.fromkeys((*usual, *held))]
    told = _told(case, scheme, changed[0][1][: _rows(case)])
    if told["error"] == 0:
        return ()
    return tuple(
        replace(case, base=cast("Tensor", base), held=None if one in usual else one, told=told) for one, base in changed
    )


def error_over_delta(told: Sequence[Mapping[str, Any]]) -> str:
    """'with an error of 3.1 times the delta', or of '2.0 to 3.1 times'; '' where there is no delta."""
    ratios = [one["error_over_delta"] for one in told if one.get("error_over_delta") is not None]
    if not ratios:
        return ""
    least, largest = f"{min(ratios):.2g}", f"{max(ratios):.2g}"
    return f"with an error of {least if least == largest else f'{least} to {largest}'} times the delta"


def _may_be_quantised(case: Case) -> bool:
    """Whether this is a matrix of numbers that somebody may have quantised before the merge."""
    modelled = {case.storage, str(case.base.dtype).removeprefix("torch.")} <= {*FLOATS}
    plain = case.codes is None and modelled and case.base.shape[1] > 1
    others = any(step.recipe.copies or name in step.recipe.name for step in case.steps for name in UNTOUCHED)
    return plain and not others and not any(step.recipe.reads == "whole" for step in case.steps)


def _rows(case: Case) -> int:
    return min(case.rows, max(1, FIRST // int(case.base.shape[1])))


def _told(case: Case, scheme: str, made: Tensor) -> dict[str, Any]:
    """The scheme, |decoded - W| / |W| of the first rows, and |decoded - W| / |s B A|."""
    import torch

    rows = slice(0, len(made))
    weight = case.base[rows].to(torch.float64)
    error, size = (made.to(torch.float64) - weight).norm().item(), weight.norm().item()
    told: dict[str, Any] = {"scheme": scheme, "error": error / size if size else 0.0}
    length = delta_of(case, rows)[0].norm().item() if case.steps and additive(case) else 0.0
    return told | ({"error_over_delta": error / length} if length else {})
