"""How far the output of a merged module may lie from what base and adapter compute, given the same input.

y = W* x + b is computed in fp32 from the base's weight, the factors and x; W* = W + delta. The merged module has
W' = W* + E, and E is what honest orders of operations round off. Their roundings are to nearest, so to the values of W
and delta each is taken as an independent error of mean zero and of at most half a spacing (Higham and Mary, A new
approach to probabilistic rounding error analysis, SIAM J. Sci. Comput. 41, 2019, model 2.1):

    |E_ij| <= b_ij = n/2 ulp(W*) + 3 u |delta|

n stores of the sum: one for each adapter and one of a base that was rounded first, each maybe through fp16 too; and
three roundings of the delta: of the product, of the scaled product, of what is added. By Hoeffding's inequality,
|sum_j E_ij x_j| exceeds lambda |b x|_2 with probability 2 exp(-lambda^2 / 2) at most; `sureness` gives the lambda that
makes it `CHANCE` over all elements together. The same lambda bounds the sums of k products in fp32, by
lambda sqrt(k) u |W| |x| each (the same, theorem 3.1), of which there are two, the true one and the merged module's. The
last store adds u |y|, and one more where a bias is added; these are bounds, for one value is rounded once.

One number for a whole matrix sees more than each of its outputs: <y - W x, g> / <g, g>, g = delta x, is the share of
the adapter's effect that arrives, 1 but for <E x, g> / <g, g>. That is linear in E, with the coefficients
c_ij = sum_t g_ti x_tj, so that it keeps within lambda |b c|_2 / <g, g>.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_check.rounding import CHANCE, FORMATS, ulp, unit

if TYPE_CHECKING:
    from torch import Tensor

DELTA_ROUNDINGS = 3
"""The product, the scaled product, and what is added."""


def sureness(elements: int, terms: int) -> float:
    """lambda = sqrt(2 ln(2 N (k + 2) / p)): N elements of k products, each within lambda but for p = `CHANCE`.

    Theorem 3.1 needs each of the k roundings of a sum to keep within it; one more is for E, one for what is beside.
    """
    return math.sqrt(2 * math.log(2 * max(elements, 1) * (terms + 2) / CHANCE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What may be lost on the way into a file of weights of this dtype, in so many stores of the sum."""

    storage: str
    stores: int

    def of(self, whole: Tensor, base: Tensor) -> Tensor:
        """b of each element of W*, fp32; the spacing of fp32 weights is that of fp32.

        whole   W*, fp32          base   W, fp32
        """
        spacing = ulp(whole.double(), self.storage).to(whole.dtype)
        stores = self.stores * (1 + self._beside())
        return stores / 2 * spacing + DELTA_ROUNDINGS * unit(self.storage) * (whole - base).abs()

    def _beside(self) -> float:
        """A bf16 model may have passed through fp16, the spacing of which is 1/8 of its own."""
        return FORMATS["float16"].unit / unit("bfloat16") if self.storage == "bfloat16" else 0.0


def of_sums(terms: int, lam: float) -> float:
    """2 lambda sqrt(k) u of fp32: how far two evaluations of a sum of k products lie apart, relative to |W| |x|."""
    return 2 * lam * math.sqrt(terms) * unit("float32")


def of_store(output: Tensor, bias: Tensor | None, dtype: str) -> Tensor:
    """u |y|, twice with a bias: what the stores of an output round off, to the next order in u.

    Below the normal numbers it is half the spacing there, which only fp16 has numbers for.
    """
    form, once = FORMATS[dtype], output.float().abs()
    biased = once if bias is None else 2 * once + bias.float().abs()
    least = 2.0 ** (form.least_exponent - form.precision) * (1 if bias is None else 2)
    return biased * (unit(dtype) / (1 - unit(dtype))) + least
