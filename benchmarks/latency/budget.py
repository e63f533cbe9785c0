"""The reference of an adapted module in float64, and the farthest that an honest forward may lie from it.

    y = x W^T + bias + s x A^T B^T                                     from W, A, B, x as they are stored, in dtype d

The budget of an element is the worst case of every honest order of operations, so none is accused; it is not chosen but
follows from four numbers:

    u       unit roundoff of d: a number that is stored is off by u of itself                    FORMATS
    v       of one addition in a sum of products, which is kept in float32                       `sum_unit`
    gamma(n, v) = n v / (1 - n v)    a sum of n products, in any order                           Higham, ASNA, lemma 3.1
    eta     what storing a number in the subnormal range of d may lose                           `lost`

Honest is whoever goes one of two ways. `merged` stores W + s B A and multiplies once; `unmerged` multiplies x by W, and
by A and then B, may store each intermediate in d or keep it in float32, and applies s to x A^T, to B or to the product.
The budget is the larger of the two, element by element. What float64 itself loses is below v by 2^29 for each addition:
each gamma counts one term more than its sum has, for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.latency.nouns import Site
from lora_check.errors import UsageError
from lora_check.rounding import FORMATS, gamma

STRIP = 1 << 25
"""Elements of W for which everything is worked out at a time: some ten arrays of 256 MiB."""
FLUSHED = 2.0 ** FORMATS["float32"].least_exponent
"""What a float32 product may lose where the hardware takes subnormal numbers for zero."""


def lora(site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and its budget in float64, for the adapter of each sequence.

    x        (..., K) in the dtype of the base; with several adapters its first dimension is the batch
    returns  two tensors (..., N)
    raises   UsageError: a dtype without a reference
    """
    flat = x.reshape(-1, x.shape[-1])
    y, budget = (torch.empty(len(flat), len(site.base.weight), dtype=torch.float64, device=x.device) for _ in range(2))
    for adapter, rows in shares(site, len(flat)):
        y[rows], budget[rows] = of_adapter(site, adapter, flat[rows])
    return y.reshape(*x.shape[:-1], -1), budget.reshape(*x.shape[:-1], -1)


def alone(site: Site, x: Tensor) -> Tensor:
    """x W^T + bias in float64: what a forward gives that forgets the adapter."""
    y = torch.cat([x.double() @ weight.double().T for weight in site.base.weight.split(strip(site))], dim=-1)
    return y if site.base.bias is None else y + site.base.bias.double()


def shares(site: Site, tokens: int) -> list[tuple[int, Tensor | slice]]:
    """The adapters in use, each with the rows of x that are its own; tokens of one sequence follow each other."""
    if site.chosen is None:
        return [(0, slice(None))]
    each = site.chosen.repeat_interleave(tokens // len(site.chosen))
    return [(adapter, each == adapter) for adapter in site.chosen.unique().tolist()]


def of_adapter(site: Site, adapter: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and budget (T, N) under one adapter, worked out for some rows of W at a time."""
    units, wide, each = Units(x), x.double(), strip(site)
    a, b, bias = site.a[adapter].double(), site.b[adapter], site.base.bias
    parts = []
    for start in range(0, len(b), each):
        rows = slice(start, start + each)
        shift = None if bias is None else bias[rows].double()
        part = Part(wide, site.base.weight[rows].double(), a, b[rows].double(), site.s, shift, units)
        parts.append((part.y, torch.maximum(part.merged(), part.unmerged())))
    return torch.cat([y for y, _ in parts], dim=-1), torch.cat([budget for _, budget in parts], dim=-1)


def strip(site: Site) -> int:
    """Rows of W that make STRIP elements."""
    return max(1, STRIP // site.base.weight.shape[1])


class Units:
    """The roundoff of a tensor's dtype and of sums of its products on its device.

    raises   UsageError: a dtype without a reference
    """

    def __init__(self, x: Tensor) -> None:
        name = str(x.dtype).removeprefix("torch.")
        if name not in ("float32", "bfloat16", "float16"):
            raise UsageError(f"no reference for {name}", hint="float32, bfloat16 or float16")
        self.dtype, self.u, self.eta, self.v = x.dtype, FORMATS[name].unit, lost(name), sum_unit(x.device)
        self.step = (1 + self.u) * (1 + FORMATS["float32"].unit) - 1
        """One operation in float32 whose result is stored."""

    def stored(self, error: Tensor, value: Tensor) -> Tensor:
        """The error after one more operation and store: e -> (1 + step) e + step |value| + eta."""
        return (1 + self.step) * error + self.step * value.abs() + self.eta


def lost(name: str) -> float:
    """eta: half a step of subnormal numbers of float16, which all hardware keeps; of the others, which some takes for
    zero, the least normal number.
    """
    known = FORMATS[name]
    shift = known.precision if name == "float16" else 0
    return float(2.0 ** (known.least_exponent - shift))


def sum_unit(device: torch.device) -> float:
    """v: what one addition in a float32 sum of products may lose, relative to the sum of their sizes.

    CPUs and the scalar units of GPUs round to nearest: 2^-24. Matrix units add b products and what was there at once,
    each cut at e bits behind the last one of the largest, and cut the sum: (b + 1) 2^-(23 + e) + 2^-23 for b products.
    Of one product that is 0.66 2^-24 on Hopper (b = 16, e = 2), 1.4 on Ampere (8, 1) and 3 on Volta (4, 0), as was
    measured by Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021, and for Hopper by
    others after them. So 2^-24 from Hopper on, and four times as much for all that came before.
    """
    u = FORMATS["float32"].unit
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    return 4 * u if old else u


class Part:
    """One adapter on some rows of W; everything is float64.

    x (T, K)    weight (N, K)    a (r, K)    b (N, r)    shift: bias (N,) or None
    """

    def __init__(
        self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: float, shift: Tensor | None, units: Units
    ) -> None:
        self.x, self.weight, self.a, self.scaled, self.shift, self.units = x, weight, a, s * b, shift, units
        self.h = x @ a.T
        self.product, self.delta = x @ weight.T, self.h @ self.scaled.T
        self.base = self.product if shift is None else self.product + shift
        self.y = self.base + self.delta
        self.length, self.rank = weight.shape[1], a.shape[0]

    def summed(self, left: Tensor, right: Tensor, terms: int) -> Tensor:
        """gamma(n + 1, v) |left| |right|^T + n FLUSHED: a sum of n products in float32, in any order."""
        return gamma(terms + 1, self.units.v) * (left.abs() @ right.abs().T) + terms * FLUSHED

    def with_bias(self, error: Tensor, value: Tensor, biased: Tensor) -> Tensor:
        """The product stored, then the bias added and the sum stored; without a bias, only the first."""
        error = self.units.stored(error, value)
        return error if self.shift is None else self.units.stored(error, biased)

    def merged(self) -> Tensor:
        """|x| |W' - W - s B A|^T, the sum over K, the store.

        W' = fl(V'), where V' is V = W + s B A but for e: the r products in float32, the scale and s itself, the sum. As
        fl(V') is the nearest to V' of all numbers of d, and fl(V) one of them,

            |fl(V') - V| <= |fl(V') - V'| + e <= |fl(V) - V'| + e <= |fl(V) - V| + 2 e
        """
        units = self.units
        v = self.weight + self.scaled @ self.a
        e = (1 + units.v) * self.summed(self.scaled, self.a.T, self.rank + 2) + units.v * v.abs()
        off = (v.to(units.dtype).double() - v).abs() + 2 * e + units.eta
        each = off + gamma(self.length + 1, units.v) * (v.abs() + off)
        error = self.x.abs() @ each.T + self.length * FLUSHED
        return self.with_bias(error, self.product + self.delta, self.y)

    def unmerged(self) -> Tensor:
        """The errors of x W^T and of s x A^T B^T, and the store of their sum.

        h = x A^T is a sum of K products, stored; the scale is one more operation, stored: on h, on B, or on the product
        with B. It is counted on h: there it is relative to |h| |s B|^T, which is at least |s h B^T|. So what is
        multiplied by B lies within (1 + step)^2 (|h| + e) - |h| of h, and r products in float32 follow, with two terms
        more for s, which is itself rounded, and for its product; then a store, and the store of the sum. Only what a
        subnormal s B loses is relative to no number that is there already: eta for each |h|.
        """
        units = self.units
        base = self.with_bias(self.summed(self.x, self.weight, self.length), self.product, self.base)
        size = self.h.abs()
        e = self.summed(self.x, self.a, self.length) + 2 * units.eta
        most = (1 + units.step) ** 2 * (1 + gamma(self.rank + 3, units.v)) * (size + e)
        subnormal = units.eta * most.sum(dim=-1, keepdim=True)
        branch = (most - size) @ self.scaled.abs().T + subnormal + self.rank * FLUSHED
        return units.stored(base + units.stored(branch, self.delta), self.y)
