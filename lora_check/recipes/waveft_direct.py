"""W' = W + k C.

W   base          (out, in), or (in, out) in a Conv1D of transformers
c   coefficients  (n,), stored as `waveft_spectrum`
C   sparse        (out, in): c at the first n places of torch.randperm(out in) seeded with random_loc_seed, else zero
k   factor        the configuration's `scaling`

WaveFT without its wavelets (use_idwt off). Source: PEFT tuners/waveft/layer.py WaveFTLayer.get_delta_weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_check.recipes import _spectrum
from lora_check.recipes._waveft import METHOD
from lora_check.types import Factors, Hand, Numbers, Recipe, Site

if TYPE_CHECKING:
    from torch import Tensor


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The scaled coefficients with row and column in the weight as it is kept."""
    at = _spectrum.places(site)[:: -1 if site.in_out else 1]
    return {"c": factors["c"] * site.settings["scaling"], "row": at[0], "column": at[1], "columns": site.shape[1]}


def product(factors: Factors, rows: slice) -> Numbers:
    """The coefficients of those rows, each at its place."""
    from lora_check.functions import moved

    near = (factors["row"] >= rows.start) & (factors["row"] < rows.stop)
    at = factors["row"][near] - rows.start, factors["column"][near]

    def spread(c: Tensor) -> Tensor:
        full = c.new_zeros(rows.stop - rows.start, factors["columns"])
        full[at] = c[near]
        return full

    return moved(factors["c"], spread)


def fits(site: Site) -> bool:
    """Coefficients that are the delta themselves."""
    return _spectrum.fits(site) and "filters" not in site.settings


RECIPE = Recipe(
    name="waveft-direct",
    formula="W' = W + k C",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    elementwise=frozenset("c"),
)
