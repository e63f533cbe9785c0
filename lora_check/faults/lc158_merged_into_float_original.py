"""LC158 merged-into-float-original

What it is
BASE is quantised, and the delta was added to the float model that BASE was made from.

How it happens
The adapter was trained over a 4-bit, int8 or fp8 checkpoint, and the exporter fetched the 16-bit one for the merge, as
most tools do. That is a convention and no slip of arithmetic; but the adapter was trained beside the quantisation error
of BASE, and MERGED does not have it.

How it is told
Every element of MERGED - s B A would be quantised to the very code that BASE has there, and lies in its cell as such
numbers do: their distance from the decoded BASE has the energy of a quantisation error. Layers that no adapter touches
show it too.

Evidence
scheme: what BASE lies in. error_over_delta: |MERGED - s B A - BASE| against |s B A|.

What to do
Decide which of the two the adapter is to be used with: give the float model as BASE, or merge into the decoded BASE.

Seen in
unslothai/unsloth-zoo#810, unslothai/unsloth#195, artidoro/qlora#28, huggingface/trl#1193
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_check.faults._cases import never
from lora_check.faults._findings import listed
from lora_check.faults._quantised_base import error_over_delta
from lora_check.faults._residuals import Residual, additive, residuals
from lora_check.types import Case, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

HALVES = ("nf4", "fp4")
"""The schemes that keep two codes in a byte, of which the first element has the upper half."""


def recognise(case: Case, actual: Tensor) -> dict[str, Any] | None:
    """The scheme under which what is left of the base has the codes of BASE."""
    if case.codes is None or case.grid is not None or not additive(case):
        return None
    return next((found for found in (_under(case, actual, *one) for one in _readings(case)) if found), None)


def _readings(case: Case) -> list[tuple[str, Tensor, Tensor]]:
    """Scheme, code of each element, and the levels by code, in each way that the stored codes may be read."""
    import torch

    from lora_check.dequantised import TABLES

    assert case.codes is not None
    stored, shape = case.codes().contiguous(), case.base.shape
    kind, bytes_ = str(stored.dtype).removeprefix("torch."), stored.view(torch.uint8).flatten()
    if kind == "int8" or kind.startswith("float8"):
        levels = torch.arange(256, dtype=torch.uint8).view(stored.dtype).double()
        return [(kind, bytes_.reshape(shape), levels)] if bytes_.numel() == shape.numel() else []
    if 2 * bytes_.numel() != shape.numel():
        return []
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).reshape(shape)
    return [(scheme, codes, torch.tensor(TABLES[scheme], dtype=torch.float64)) for scheme in HALVES]


def _under(case: Case, actual: Tensor, scheme: str, codes: Tensor, levels: Tensor) -> dict[str, Any] | None:
    from lora_check.rounding import FILLED, NESTED_GAP

    gap = NESTED_GAP if scheme in HALVES else 0.0
    error = filled = delta = 0.0
    for one in residuals(case, actual):
        inside, energy = _cells(one, codes[one.rows].long(), levels, gap)
        if not inside:
            return None
        error, filled = error + _square(one.error), filled + energy
        delta += _square(one.delta)
    if error < FILLED * filled:
        return None
    return {"scheme": scheme} | ({"error_over_delta": (error / delta) ** 0.5} if delta else {})


def _cells(one: Residual, codes: Tensor, levels: Tensor, gap: float) -> tuple[bool, float]:
    """Whether the rows lie in the cells of their codes, and the energy that a quantisation error has in these.

    gap   how far a scale may be off that was quantised in turn, in units of the largest
    """
    import torch

    from lora_check.grids import cells

    least, largest = (end[codes] for end in cells(levels, relative=0.0, absolute=0.0))
    level = levels[codes]
    known = level.isfinite() & (level != 0)
    scale = torch.where(known, one.base / level, torch.nan)
    if bool((scale < 0).any()):
        return False, 0.0
    # No end of a cell is further from zero than 3/2 of its level.
    slack = one.room + 1.5 * one.off + gap * one.base.abs().max()
    inside = (least * scale - slack <= one.left) & (one.left <= largest * scale + slack)
    widths = (largest - least) * scale
    return bool((inside | ~known).all()), float((widths.square() / 12).nan_to_num(0.0).sum().item())


def _square(x: Tensor) -> float:
    return float(x.square().sum().item())


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """What BASE lies in, and how far it is from the original."""
    schemes = listed(dict.fromkeys(str(one["scheme"]) for one in told))
    words = f"merged into the float original of BASE, which lies in {schemes}"
    return f"{words}, {error_over_delta(told)}".rstrip(", ")


FAULT = ValueFault(
    code="LC158",
    name="merged-into-float-original",
    severity="error",
    summary="merged into the float original of BASE",
    help="give the float model that was merged into as BASE, or merge into the decoded BASE",
    inject=never,
    recognise=recognise,
    tell=tell,
    kinds=("target", "bystander"),
    causes=("M09",),
)
