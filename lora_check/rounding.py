"""Storage formats, rounding to them, the arithmetics worth replaying, and where every budget starts.

This file is the only home of a number that decides something. There is no atol: an element is over budget when no
honest order of operations can have written it. The budget of an element follows from three sources, and only three:

    the final store        1/2 ulp_d(W')                    `store`
    each rounded delta     1/2 ulp_d(delta)                 `store` again, at the place where the producer rounds
    products and sums      gamma(k, u) |s| (|B| |A|) + u |W + delta|      `Ball`, radius by radius

The first two are not added up as bounds: they are replayed, monotone function by monotone function, on both ends of
the interval that the third leaves open. So the set of honest values is an interval of a few storage neighbours, most
often one, and not a radius that a wrong merge could hide in. docs/adr/0004-budget-is-an-interval.md has the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_check.types import Arithmetic


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A binary floating-point format: significand bits (with the hidden one), least exponent, largest value."""

    precision: int
    least_exponent: int
    largest: float

    @property
    def unit(self) -> float:
        """u = 2^-p: the largest relative error of one rounding to nearest."""
        return float(2.0**-self.precision)


FORMATS = {
    "float64": FloatFormat(precision=53, least_exponent=-1022, largest=torch.finfo(torch.float64).max),
    "float32": FloatFormat(precision=24, least_exponent=-126, largest=torch.finfo(torch.float32).max),
    "bfloat16": FloatFormat(precision=8, least_exponent=-126, largest=torch.finfo(torch.bfloat16).max),
    "float16": FloatFormat(precision=11, least_exponent=-14, largest=torch.finfo(torch.float16).max),
}
"""The storage formats whose rounding is modelled; a target stored in any other is inconclusive."""

DECOMPOSITION = 10
"""p(n) = 10 n, of the larger side n: an SVD or QR in precision u is that of A + E with |E|_2 <= p(n) u |A|_2, and its
singular vectors are orthogonal but for p(n) u (LAPACK Users' Guide, 3rd ed., sections 4.9.1 and, for p, 4.3.1)."""

LAPACK_THREADS = torch.get_num_threads()
"""Threads of this process before its workers were held to one each: the last bits of a decomposition depend on them,
and a producer that set nothing had as many."""

TF32_UNIT = 2.0**-10
"""Relative error of a factor on tensor cores: 10 explicit bits are kept, by rounding or by plain truncation."""

UNDERFLOW = 2.0**-149
"""Largest absolute error of one float32 operation whose result is subnormal."""

ELEMENTARY = 4
"""Units of roundoff that exp, tanh, sin, cos, log may be off by: CUDA's single-precision functions err by up to 2 ulp
(CUDA C++ Programming Guide, table of maximum errors), the SLEEF ones of torch on CPUs by 1; one ulp is 2 u."""

GATED = 8
"""Units of roundoff, relative to x, that x g(x) may be off by: x / (1 + exp(-x)) by 6, x Phi(x) by 5, and its
approximation by tanh(a (x + b x^3)) by 8: 9 on the argument z, of which |z tanh'(z)| < 0.45 is left, `ELEMENTARY` for
tanh, 2 for 1 + tanh, 4 for the products, all of them halved."""

DIRECT = 13
"""The largest prime size for which every library writes a Fourier transform out, as a sum of p products; larger ones
may go through a convolution."""

LOST_SNR_DB = 0.0
"""LC302 is told where storage noise is as strong as the delta itself: |residual|^2 = |delta|^2, which is 0 dB."""

FREE_NUMBERS = 1
"""A mistake with one fitted number explains any one element: a single element over budget is no evidence for it."""

_EXPONENT_BITS = 0x7FF0000000000000
_MANTISSA_BITS = 0x000FFFFFFFFFFFFF


def unit(compute: str) -> float:
    """u of a compute dtype."""
    return FORMATS[compute].unit


def gamma(terms: int, u: float) -> float:
    """k u / (1 - k u): largest relative error of a sum of k products in any order (Higham, ASNA, lemma 3.1)."""
    return terms * u / (1 - terms * u) if terms * u < 1 else float("inf")


def fourier(size: int, u: float) -> float:
    """Largest error of a discrete Fourier transform of that many numbers, in units of the sum of their moduli.

    A transform of size p q is made of transforms of sizes p and q, with a root of unity in between. One of prime size
    p takes p - 1 additions, and each number is multiplied by two roots on its way: sqrt(2) gamma(2, u) for a complex
    product (Higham, ASNA, lemma 3.5), `ELEMENTARY` for a root. There is one way, of modulus 1, from each input to each
    output, so the errors of all stages add up, whatever their order. A prime above `DIRECT` may go through a
    convolution of length below 4 p: three transforms, and two products with numbers whose squares sum up to 2 p times
    as much (Bluestein, Rader).
    """
    roots = 2 * (2 * 2.0**0.5 + ELEMENTARY)
    terms = 0.0
    for prime in primes(size):
        long = (4 * prime).bit_length() * (1 + roots) * 4 * (2 * prime) ** 0.5
        terms += prime - 1 + roots if prime <= DIRECT else long
    return terms * u / (1 - terms * u) if terms * u < 1 else float("inf")


def primes(size: int) -> list[int]:
    """The prime factors, with their multiplicity."""
    found, prime = [], 2
    while size > 1:
        if prime * prime > size:
            prime = size
        while size % prime == 0:
            found.append(prime)
            size //= prime
        prime += 1
    return found


def backward(n: int, u: float) -> float:
    """p(n) u: the backward error of a decomposition of a matrix whose larger side is n, relative to its norm."""
    return DECOMPOSITION * n * u


def ulp(x: Tensor, storage: str) -> Tensor:
    """2^(max(floor(log2|x|), e_min) - (p - 1)): the spacing of `storage` at x.

    x        float64, any shape; zero and subnormals give the smallest subnormal of `storage`
    returns  float64
    """
    form = FORMATS[storage]
    power = (x.view(torch.int64) & _EXPONENT_BITS).view(torch.float64)
    return power.clamp_min(2.0**form.least_exponent) * 2.0 ** (1 - form.precision)


def store(x: Tensor, storage: str) -> Tensor:
    """Round float64 to the nearest value of `storage`, ties to even, once; beyond the largest value: infinity.

    `Tensor.to` cannot serve here: from float64 to a 16-bit format it rounds twice, through float32.
    """
    if storage == "float64":
        return x
    if storage == "float32":
        return x.to(torch.float32).to(torch.float64)
    spacing = ulp(x, storage)
    rounded = torch.where(x.isfinite(), torch.round(x / spacing) * spacing, x)
    return torch.where(
        rounded.abs() > FORMATS[storage].largest, torch.copysign(rounded.new_tensor(torch.inf), x), rounded
    )


def cell(stored: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """The numbers that round to a stored value: from midway to its lower neighbour to midway to its upper one.

    stored   in its own dtype, finite; below a power of two the neighbours are twice as near
    returns  float64, float64; both ends included, for which way a tie goes is within the slack of any computation
    """
    if storage == "float64":
        return stored, stored
    x = stored.to(torch.float64)
    form = FORMATS[storage]
    spacing = ulp(x, storage)
    power = (x.view(torch.int64) & _MANTISSA_BITS == 0) & (spacing > 2.0 ** (form.least_exponent + 1 - form.precision))
    inward = torch.where(power, 0.25 * spacing, 0.5 * spacing)
    outward = 0.5 * spacing
    negative = x < 0
    return x - torch.where(negative, outward, inward), x + torch.where(negative, inward, outward)


def half_cell(stored: Tensor, storage: str) -> Tensor:
    """1/2 ulp_d(x): how far a number may lie from the stored value it was rounded to."""
    return 0.5 * ulp(stored, storage)


ADD = Arithmetic(name="fp32-add", says="delta and sum in fp32, stored once (PEFT's default)")
ROUNDED_DELTA = Arithmetic(
    name="rounded-delta", says="delta rounded to the storage dtype before the sum (PEFT safe_merge)", delta="always"
)
ROUNDED_FACTORS = Arithmetic(
    name="rounded-factors",
    says="A and B rounded to the storage dtype, sum in fp32 (low_cpu_mem_usage)",
    factors="storage",
)
ROUNDED_BOTH = Arithmetic(
    name="rounded-factors-and-delta",
    says="A, B and the delta rounded to the storage dtype (autocast_adapter_dtype=False)",
    factors="storage",
    delta="always",
)
STORAGE_MATMUL = Arithmetic(
    name="storage-matmul",
    says="factors, product and sum in the storage dtype (PEFT 0.7 to 0.11)",
    factors="storage",
    product=True,
    delta="always",
)
NEVER_ROUNDED = Arithmetic(
    name="fp32-add-every-layer", says="delta and sum in fp32, stored once, embeddings too", delta="never"
)
THROUGH_FP16 = Arithmetic(
    name="through-fp16", says="sum in fp32, rounded to fp16, then to the storage dtype", through="float16"
)
HELD_IN_FP16 = replace(
    ADD, name="held-in-fp16", says="a model loaded in fp16, merged there and then converted", load="float16"
)
HELD_IN_FP16_SAFE = replace(
    ROUNDED_DELTA, name="held-in-fp16-rounded-delta", says="the same with the delta rounded to fp16", load="float16"
)
FP64 = Arithmetic(name="fp64", says="fp64 throughout, stored once", compute="float64", delta="never")
FUSED = Arithmetic(
    name="fp32-fused", says="base and products in one fp32 accumulation, stored once", delta="never", fused=True
)
TF32 = Arithmetic(name="tf32", says="products on TF32 tensor cores, sum in fp32", factors="tf32")
TF32_SAFE = replace(
    TF32, name="tf32-rounded-delta", says="products on TF32 tensor cores, delta rounded", delta="always"
)
PRESCALED = Arithmetic(
    name="prescaled-factor",
    says="the scale multiplied into B and stored, product and sum in the storage dtype (torchtune, mlx-lm)",
    factors="storage",
    product=True,
    delta="always",
    prescaled=True,
)
STORAGE_PRODUCT = Arithmetic(
    name="storage-product",
    says="factors and product in the storage dtype, scale and sum in fp32",
    factors="storage",
    product=True,
    delta="never",
)
STORAGE_THROUGHOUT = Arithmetic(
    name="storage-throughout",
    says="every operation in the storage dtype (autocast_adapter_dtype=False, or PEFT 0.7 to 0.11)",
    factors="storage",
    delta="always",
    compute="storage",
)

ANY = Arithmetic(name="any", says="any of the orders above")
"""Never a verdict: a bound that holds for every order at once, by which a wrong hypothesis is dropped at one look."""

_COPYING = replace(ADD, name="", says="", load="")
_WIDE = (ADD, FP64, FUSED, TF32)
_NARROW = (
    ADD,
    ROUNDED_DELTA,
    ROUNDED_FACTORS,
    ROUNDED_BOTH,
    STORAGE_MATMUL,
    PRESCALED,
    STORAGE_PRODUCT,
    NEVER_ROUNDED,
    THROUGH_FP16,
    HELD_IN_FP16,
    HELD_IN_FP16_SAFE,
    FP64,
    FUSED,
    TF32,
    TF32_SAFE,
)


def arithmetics(storage: str, base: str, others: bool = False) -> tuple[Arithmetic, ...]:
    """The honest orders of operations for a merged tensor of dtype `storage` over a base of dtype `base`.

    others   a recipe of another method than LoRA is among the steps: its producer may have worked in the storage dtype
             throughout, which for LoRA is `storage-matmul`

    In a 32- or 64-bit format the delta and the factors lose nothing by being stored, so the rounded regimes coincide
    with the plain one. Where MERGED is stored in another dtype than BASE, each order may also have run at the
    base's dtype, the result being converted afterwards.
    """
    plain = _orders(storage, others)
    if base == storage or base not in FORMATS:
        return plain
    return plain + tuple(
        replace(one, name=f"{one.name}-in-{base}", says=f"{one.says}, in {base} and then converted", load="base")
        for one in _orders(base, others)
        if one.load == "merged"
    )


def any_rounding(storage: str, base: str) -> tuple[float, float]:
    """The relative and the absolute error that no single rounding of any honest order exceeds.

    Relative: the unit roundoff of the coarsest format involved, or of TF32. Absolute: half the spacing of its
    subnormals, 2^(e_min - p), which counts for a 16-bit delta far smaller than its weight. A bfloat16 model may have
    passed through float16.
    """
    forms = [FORMATS[one] for one in (storage, base, "float32")]
    if min(form.precision for form in forms) < FORMATS["float32"].precision:
        forms.append(FORMATS["float16"])
    relative = max(TF32_UNIT, *(form.unit for form in forms))
    return relative, max(2.0 ** (form.least_exponent - form.precision) for form in forms)


def _orders(storage: str, others: bool) -> tuple[Arithmetic, ...]:
    if FORMATS[storage].precision >= FORMATS["float32"].precision:
        return _WIDE
    known = (*_NARROW, STORAGE_THROUGHOUT) if others else _NARROW
    return tuple(one for one in known if storage not in (one.through, one.load))


def conversions(storage: str, base: str) -> tuple[Arithmetic, ...]:
    """The orders that a copied tensor can tell apart: the dtypes it may have been held in, and no arithmetic at all."""
    return tuple(one for one in arithmetics(storage, base) if replace(one, name="", says="", load="") == _COPYING)
