"""DoRA, unmerged: PEFT's layer with `use_dora=True`, and what it computes in float64.

    y = c x W^T + bias + c s x A^T B^T        c = m / |W + s B A|, row by row        PEFT takes the norm in each forward

The magnitude m is not the norm, as it is not after training: a c of 1 would hide whether it is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from benchmarks.latency.backends._peft import lacking, peft_layer, still
from benchmarks.latency.budget import Units, strip
from benchmarks.latency.nouns import Backend
from lora_check.rounding import gamma

if TYPE_CHECKING:
    from torch import Tensor, nn

    from benchmarks.latency.nouns import Place, Site

LARGEST = 1 << 22
"""N K of the largest module that a processor is asked for: PEFT makes s B A from an identity of K x K in each forward,
which takes hundreds of milliseconds for 4096 x 4096."""
FACTORS = (1.25, 0.75)
"""m over the norm of W: of even rows, of odd rows."""


def build(site: Site) -> nn.Module:
    """A, B and m in float32, as PEFT loads them."""
    layer = peft_layer(site, torch.float32, use_dora=True)
    layer.lora_magnitude_vector["0"].weight = still(magnitude(site))
    module: nn.Module = layer
    return module


def unfit(modules: Sequence[tuple[int, int]], place: Place) -> str:
    """Modules on which one forward would take a processor longer than all other backends together."""
    large = next((f"{n} x {k}" for n, k in modules if n * k > LARGEST), "")
    if not large or place.kind != "cpu":
        return ""
    return f"PEFT multiplies an identity in each forward: too slow on a CPU at {large}"


def magnitude(site: Site) -> Tensor:
    """m (N,) in float32: the norms of the rows of W, larger and smaller in turn."""
    norm = torch.linalg.vector_norm(site.base.weight.detach(), dim=1, dtype=torch.float32)
    norm[0::2] *= FACTORS[0]
    norm[1::2] *= FACTORS[1]
    return norm


def reference(site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and its budget in float64, for some rows of W at a time; x (..., K) -> (..., N), twice."""
    rows, m = x.reshape(-1, x.shape[-1]), magnitude(site).double()
    each = strip(site)
    parts = [of_rows(site, rows, m[start : start + each], start) for start in range(0, len(m), each)]
    y, budget = (torch.cat(column, dim=-1).reshape(*x.shape[:-1], -1) for column in zip(*parts, strict=True))
    return y, budget


def of_rows(site: Site, x: Tensor, m: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """y and its budget (T, len(m)) for the rows of W from `start` on.

    With p = x W^T, z = p + bias, q = s x A^T B^T, u of a store and v of an addition as in `budget`, PEFT computes

        z'           the base's own output, stored; p' = z' - bias, stored once more where there is a bias
        q', c'       in float32: q' off by gamma(K + r + 2, v) |x| |A|^T |s B|^T, c' off as `factor_error` says
        y'           z' + ((c' - 1) p' + c' q'), no term of which sees more than 6 operations; then the store

    so y' - y is at most the errors of z', p' and q' by the factors 1, |c - 1| and |c|, that of c' by |p'| + |q'|, and
    gamma(6, v) of what is added: |z'| + (1 + |c'|) |p'| + |c'| |q'|.
    """
    rows, units = slice(start, start + len(m)), Units(x)
    wide, weight, a, b = (
        x.double(),
        site.base.weight[rows].double(),
        site.a[0].double(),
        site.s * site.b[0, rows].double(),
    )
    bias = None if site.base.bias is None else site.base.bias[rows].double()
    length, rank = weight.shape[1], a.shape[0]
    norm = torch.linalg.vector_norm(weight + b @ a, dim=1)
    c, off_c = m / norm, factor_error(weight, a, b, m, units.v)
    p, q = wide @ weight.T, wide @ a.T @ b.T
    z = p if bias is None else p + bias
    off_p = units.stored(gamma(length + 1, units.v) * (wide.abs() @ weight.abs().T), p)
    off_z = off_p if bias is None else units.stored(off_p, z)
    off_p = off_p if bias is None else units.stored(off_z, p)
    off_q = gamma(length + rank + 2, units.v) * (wide.abs() @ a.abs().T @ b.abs().T)
    all_p, all_q, all_c = p.abs() + off_p, q.abs() + off_q, c + off_c
    added = z.abs() + off_z + (1 + all_c) * all_p + all_c * all_q
    off = off_z + (c - 1).abs() * off_p + c * off_q + off_c * (all_p + all_q) + gamma(6, units.v) * added
    y = z + (c - 1) * p + c * q
    return y, units.stored(off, y)


def factor_error(weight: Tensor, a: Tensor, b: Tensor, m: Tensor, v: float) -> Tensor:
    """How far c' = m / n' of PEFT lies from c = m / n at most; weight (N, K), a (r, K), b = s B (N, r), m (N,).

    Each element of W + s B A is off by gamma(K + r + 2, v) (|W| + |s B| |A|), as PEFT sends an identity through A and
    B; the sum of K squares and its root by gamma(K + 2, v); m, where another device took its norm, by gamma(K + 3, v);
    the division by v. The norm of the bound, |W| + |s B| |A|, is at least n, so all of that is in e, relative to n:
    |c' - c| <= c e / (1 - e).
    """
    length, rank = a.shape[1], a.shape[0]
    bound = torch.linalg.vector_norm(weight.abs() + b.abs() @ a.abs(), dim=1)
    norm = torch.linalg.vector_norm(weight + b @ a, dim=1)
    e = gamma(3 * length + rank + 8, v) * bound / norm
    assert bool((e < 1).all()), "W + s B A has a row that cancels: its norm, and so DoRA's factor, says nothing"
    return m / norm * e / (1 - e)


BACKEND = Backend(
    name="dora",
    about="PEFT's layer with `use_dora=True`, fp32 adapters: another function than merged LoRA, by its own reference",
    place=60,
    build=build,
    adapter="float32",
    missing=lacking,
    unfit=unfit,
    traffic="dora",
    reference=reference,
)
