"""W' = W + k IDWT(C).

W   base          (out, in), or (in, out) in a Conv1D of transformers
c   coefficients  (n,), stored as `waveft_spectrum`
C   spectrum      (out, in) with a margin all around, its four quarters the bands of one level of a wavelet transform; c
                  lies at the first n places of torch.randperm(out in) seeded with random_loc_seed, margin not counted
k   factor        the configuration's `scaling`

The margin is what the synthesis with filters of length l cuts off, l - 2 for each axis, made even with the weight's
own size. Filters come from PyWavelets. Source: Bilican et al., "Exploring Sparsity for Parameter Efficient Fine Tuning
Using Wavelets" (2025); PEFT tuners/waveft/layer.py WaveFTLayer.get_delta_weight, tuners/waveft/waverec2d.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_check.recipes import _spectrum
from lora_check.recipes._spectrum import oriented, places
from lora_check.recipes._waveft import METHOD
from lora_check.types import Factors, Hand, Numbers, Recipe, Site

if TYPE_CHECKING:
    from torch import Tensor


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """Coefficients with band, row and column in it, and the filter of each band.

    size   rows and columns of a band      axis   of the spectrum that the rows of the weight lie along
    """
    length, shape = len(site.settings["filters"][0]), oriented(site)
    halves = [(size + length - 1) // 2 for size in shape]
    found = [place + (2 * half - size) // 2 for place, half, size in zip(places(site), halves, shape, strict=True)]
    return {
        "c": factors["c"],
        "filters": _bands(factors["c"], site),
        "k": site.settings["scaling"],
        "band": 2 * (found[0] // halves[0]) + found[1] // halves[1],
        "at": [place % half for place, half in zip(found, halves, strict=True)],
        "size": halves,
        "shape": shape,
        "axis": 1 if site.in_out else 0,
    }


def _bands(c: Numbers, site: Site) -> Numbers:
    """The filter of each quarter (4, l, l), a product of two: that of the upper right one is high down the rows."""
    from lora_check.functions import constants, joined

    low, high = (constants(c, values) for values in site.settings["filters"])
    pairs = ((low, low), (high, low), (low, high), (high, high))
    products = [down.reshape(-1, 1) * across.reshape(1, -1) for down, across in pairs]
    return joined(products, _stack)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(parts))


def product(factors: Factors, rows: slice) -> Numbers:
    """The synthesis of those rows of the weight, from the part of the bands that reaches them."""
    from lora_check.functions import moved, synthesised

    axis, cut = factors["axis"], int(factors["filters"].shape[-1]) - 2
    first, last = rows.start // 2, (rows.stop + cut - 1) // 2
    near = (factors["at"][axis] >= first) & (factors["at"][axis] <= last)
    at, size = [place[near] for place in factors["at"]], list(factors["size"])
    at[axis], size[axis] = at[axis] - first, last - first + 1

    def spread(c: Tensor) -> Tensor:
        bands = c.new_zeros(4, *size)
        bands[factors["band"][near], at[0], at[1]] = c[near]
        return bands

    found = synthesised(moved(factors["c"], spread), factors["filters"]) * factors["k"]
    within = [slice(cut, cut + count) for count in factors["shape"]]
    top = rows.start + cut - 2 * first
    within[axis] = slice(top, top + rows.stop - rows.start)
    cropped = found[within[0], within[1]]
    return cropped.T if axis else cropped


def fits(site: Site) -> bool:
    """Coefficients, and filters to make a delta of them."""
    return _spectrum.fits(site) and "filters" in site.settings


RECIPE = Recipe(name="waveft", formula="W' = W + k IDWT(C)", method=METHOD, fits=fits, prepare=prepare, product=product)
