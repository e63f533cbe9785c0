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

import math
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

LOST_SURVIVAL = 0.5
"""LC302 is told too where less of the delta is in the file than is missing from it. A delta that is added to a base of
the same dtype, and rounded to the nearest, never loses more than itself: such a merge stays above 0 dB, however little
is left."""

NEW_ROWS = 1e-9
"""Variance of a new token's row around the mean of the old rows, in units of theirs, as transformers draws it
(PreTrainedModel._init_added_embeddings_weights_with_mean)."""

DEVIATIONS = 7
"""Standard deviations within which a normal number is taken to lie: it lies beyond once in 4e11 times, so among the
numbers of the largest embedding, 1e10 of them, most likely never."""

FEWEST = 8 * DEVIATIONS**2
"""Numbers from which a draw's mean square, off by sqrt(2 / n) of itself, is known to one half within `DEVIATIONS`."""

FREE_NUMBERS = 1
"""A mistake with one fitted number explains any one element: a single element over budget is no evidence for it."""

CHANCE = 2.0**-40
"""How likely a bound on random roundings may be exceeded: never seen in a million models of a million tensors each."""

SURE = 4
"""Standard errors by which a number has to differ from another one to be told apart: by chance once in 15 000 times."""

MOST = 0.5
"""An update lies mostly in a space if more than half of its energy does; unrelated ones share r / n of it, far less."""

CUT_ROUNDINGS = 8
"""The most operations besides the sum of k products that a term of s U S V^T goes through on its way to the sum with W:
U S, which multiplies by a matrix with zeros in it, s, and two to spare for each."""

CUT_FACTORS = 4
"""How many factors tensor cores round: U and S, and then U S and V^T."""

NESTED_GAP = 0.45 / 64 + 1 / 131070
"""Largest error of a scale of bitsandbytes that is itself in 8-bit codes, in units of the largest scale of its group:
half the widest gap of its levels, of which 64 lie between 0.1 and 1, and half a step of the table that finds them."""

FILLED = 0.5
"""Share of the energy of a quantisation error, width^2 / 12 of each cell, that a residual within all cells has to have
to be one. Normal noise of that energy leaves its cell in one element of 70: it would be seen."""

UNLIKE = 0.5
"""Share of the blocks in which BASE itself has to need more levels than a grid has, before a grid says anything."""

_EXPONENT_BITS = 0x7FF0000000000000
_MANTISSA_BITS = 0x000FFFFFFFFFFFFF


def unit(compute: str) -> float:
    """u of a compute dtype."""
    return FORMATS[compute].unit


def gamma(terms: int, u: float) -> float:
    """k u / (1 - k u): largest relative error of a sum of k products in any order (Higham, ASNA, lemma 3.1)."""
    return terms * u / (1 - terms * u) if terms * u < 1 else float("inf")


def between_orders(terms: int) -> float:
    """2 gamma(k + 5, u): how far two fp32 evaluations of W + s B A may lie apart, relative to |W| + |s| |B| |A|.

    Each passes k products and k - 1 sums, the scale, the rounding of s itself, and the last sum: no path from an input
    to the result has more than k + 4 roundings (Higham, ASNA, section 3.1), and either may err by that much. One more
    is for the lengths that bound |B| |A|: gamma(k, u) of this bound is less than u for every k below 4000.
    """
    return 2 * gamma(terms + 5, unit("float32"))


def any_path(steps: int, relative: float, absolute: float) -> tuple[float, float]:
    """(1 + e)^n - 1 and n (1 + e)^n a, n = 12 + 2 (steps - 1): what the roundings on any way to W + sum s B A come to.

    One element passes, at most: both factors stored, their product stored, the scale, the scaled delta stored, the
    sum, then the stores of the model, of a dtype in between, and of the file: nine. Each further step adds its sum and
    its store to what was there; three more are to spare, for sums of k products in fp32 and for the comparison itself.

    relative, absolute   of one rounding, as `any_rounding` has them
    """
    count = 12 + 2 * max(0, steps - 1)
    grown = float((1 + relative) ** count)
    return grown - 1, count * grown * absolute


MATRIX_UNIT_PAIRS = 16
"""Pairs of bfloat16 that one AMX instruction multiplies: TDPBF16PS sums the products of their first members, and those
of their second ones, in chains of float32 additions apart, adds the two sums, and that to what was there; each rounds
to nearest (Intel SDM, vol. 2, TDPBF16PS)."""


def matrix_unit_error(rank: int, pieces: tuple[int, int], scaled: bool) -> float:
    """How far s L R by bfloat16 matrix units lies from the truth, relative to |s| |L| |R|; before it is stored.

    Each factor is the sum of 1, 2 or 3 bfloat16 pieces, of which each but the first is below 2^-8 of the one before;
    the products of pieces i and j with i + j <= 4 are summed up, each of them exact, from the smallest to the largest.

    One piece each   r exact products in float32, in any order: gamma(r, u).
    More             on AMX, whose sums run through the pieces in ascending order. The products of two first pieces
                     pass the additions of their chain, that of two chains, and one for each instruction from theirs on.
                     All others are less than 2^-7 of |L| |R| together, so their own roundings, one for each place of a
                     chain, its sum, and each instruction, count as much less. Left out are 2 products of 2^-24 each
                     and one of 2^-32. 2^-6 is for terms of second order.
    scaled           one more for s L, rounded to float32 before it is taken to pieces.
    """
    u = unit("float32")
    if pieces == (1, 1):
        return gamma(rank, u) + scaled * u
    terms, each = rank * products(*pieces), 2 * MATRIX_UNIT_PAIRS
    instructions = -(-terms // each)
    large = min(MATRIX_UNIT_PAIRS, -(-rank // 2)) + 1 + instructions - (terms - rank) // each
    small = (MATRIX_UNIT_PAIRS + 1 + instructions) * 2.0**-7
    left_out = 2 if sum(pieces) > 4 else 0
    return (large + small + left_out + scaled) * (1 + 2.0**-6) * u


def products(left: int, right: int) -> int:
    """How many products of pieces i of one factor and j of the other there are with i + j <= 4."""
    return sum(i + j <= 4 for i in range(1, left + 1) for j in range(1, right + 1))


def flushes(least_left: float, least_right: float, exact: bool) -> bool:
    """Whether matrix units may lose a number of a product of two factors: they take subnormals for zero.

    least_left, least_right   the smallest |x| of either factor that is not zero
    exact                     both are bfloat16; else float32, taken to pieces

    Every piece is a multiple of the last place of its number: 2^-7 of it in bfloat16 and 2^-23 in float32, at least.
    So every product, and every sum of products, is a multiple of the product of two such places, or is zero; where
    that is not subnormal, nothing is.
    """
    last = 2.0 ** (1 - FORMATS["bfloat16" if exact else "float32"].precision)
    smallest = 2.0 ** FORMATS["float32"].least_exponent
    return min(least_left * last, least_right * last, least_left * last * least_right * last) < smallest


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


def rounding_norm(bound: Tensor) -> float:
    """sqrt(2 v ln((m + n) / p)): the spectral norm that a matrix of roundings exceeds with probability p = `CHANCE`.

    bound    (m, n), float32: each rounding is uniform between its bounds, independent, of variance bound^2 / 3
    v        the largest sum of these variances over a row or a column
    source   Tropp, "User-friendly tail bounds for sums of random matrices" (2012), theorem 1.5; the even moments of a
             uniform variable are below those of a normal one of its variance, and its proof needs no more
    """
    variance = bound.to(torch.float64).square() / 3
    largest = max(variance.sum(0).max().item(), variance.sum(1).max().item())
    return math.sqrt(2 * largest * math.log(sum(bound.shape) / CHANCE))


def core_error(out: int, wide: int, rank: int) -> float:
    """(1 + p(m) u)(1 + p(n) u)(1 + r gamma(r, u))(1 + p(r) u) - 1, u of float64: how far a computed singular value of
    B A may lie from the true one, relative to |B|_2 |A|_2.

    out, wide, rank   m, n, r of B (m, r) and A (r, n), as they are stored

    They are those of the core R_B R_A^T, where B = Q_B R_B and A^T = Q_A R_A. Each QR is that of a factor that is off
    by p u of its norm; the product of two r x r matrices errs by gamma(r, u) |R_B| |R_A^T|, whose norm is at most
    r |R_B|_2 |R_A|_2 (Higham, ASNA, section 3.5); its SVD by p(r) u of its norm. What is computed are the singular
    values of a matrix that lies so far from B A, and each of them moves by no more than that (Weyl).
    """
    u = unit("float64")
    steps = (backward(out, u), backward(wide, u), rank * gamma(rank, u), backward(rank, u))
    return math.prod(1 + one for one in steps) - 1


def factors_noise(left: Tensor, right: Tensor, norms: tuple[float, float]) -> float:
    """|E_B| |A| + |B| |E_A| + |E_B| |E_A|: the norm of what storing both factors can have added to their product.

    left, right   B (m, r) and A (r, n), as stored      norms   |B|_2, |A|_2

    E_B and E_A are the roundings of the stores, half a spacing at most, whose norms `rounding_norm` exceeds by chance
    once in 1 / `CHANCE`. A singular value of B A below it may be such noise of a product of lower rank (Weyl).
    """
    noise = [_stored_noise(one) for one in (left, right)]
    return noise[0] * norms[1] + norms[0] * noise[1] + noise[0] * noise[1]


def _stored_noise(factor: Tensor) -> float:
    dtype = str(factor.dtype).removeprefix("torch.")
    return rounding_norm(half_cell(factor.to(torch.float64), dtype))


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


def mean_reach(new: Tensor, variance: Tensor, size: Tensor, count: int) -> Tensor:
    """How far a new row may lie from the mean of the old ones: so many `DEVIATIONS`, the sum's error, and its storage.

    new        (rows, columns), as stored     variance, size   of the old rows, and mean |x|, by columns, float64
    count      of the old rows; their mean is taken in float32, which is off by gamma(count, u) mean |x| at most
    """
    storage = str(new.dtype).removeprefix("torch.")
    stored = half_cell(new.to(torch.float64), storage)
    return DEVIATIONS * (NEW_ROWS * variance).sqrt() + gamma(count, unit("float32")) * size + stored


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
COMBINED = Arithmetic(
    name="combined-in-storage",
    says="adapters combined in the storage dtype, their delta rounded to it (autocast_adapter_dtype=False)",
    factors="storage",
    delta="always",
    combined="storage",
)
COMBINED_ADD = replace(
    COMBINED,
    name="combined-in-storage-add",
    says="adapters combined in the storage dtype, delta and sum in fp32 (the same, where an SVD comes last)",
    delta="layer",
)
COMBINED_MATMUL = replace(
    COMBINED,
    name="combined-in-storage-matmul",
    says="adapters combined in the storage dtype, products and sum in it too (a GPU, or PEFT 0.7 to 0.12)",
    product=True,
    combined="products",
)
COMBINED_PRODUCTS = replace(
    COMBINED_ADD,
    name="combined-products",
    says="each adapter's product in the storage dtype, combined there, delta and sum in fp32 (a GPU and an SVD)",
    combined="products",
)
COMBINED_PRODUCTS_SAFE = replace(
    COMBINED,
    name="combined-products-rounded-delta",
    says="each adapter's product in the storage dtype, combined there, the delta of all rounded to it",
    combined="products",
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
_COMBINED = (COMBINED, COMBINED_ADD, COMBINED_MATMUL, COMBINED_PRODUCTS, COMBINED_PRODUCTS_SAFE)


def arithmetics(storage: str, base: str, others: bool = False, combines: bool = False) -> tuple[Arithmetic, ...]:
    """The honest orders of operations for a merged tensor of dtype `storage` over a base of dtype `base`.

    others     a recipe of another method than LoRA is among the steps: its producer may have worked in the storage
               dtype throughout, which for LoRA is `storage-matmul`
    combines   a recipe that makes one adapter of several is among the steps

    In a 32- or 64-bit format the delta and the factors lose nothing by being stored, so the rounded regimes coincide
    with the plain one. Where MERGED is stored in another dtype than BASE, each order may also have run at the
    base's dtype, the result being converted afterwards.
    """
    plain = _orders(storage, others, combines)
    if base == storage or base not in FORMATS:
        return plain
    return plain + tuple(
        replace(one, name=f"{one.name}-in-{base}", says=f"{one.says}, in {base} and then converted", load="base")
        for one in _orders(base, others, combines)
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


def carried(merged: Tensor, size: Tensor, storage: str, base: str) -> Tensor:
    """How far merged - s B A may lie from the numbers that an honest merge of any order added s B A to.

    merged   float64        size   |s| |B| |A|, float64        storage, base   dtypes, as in `any_rounding`

    A, B, their product, the scaled one and the sums of the product each err by no more than one rounding of the
    coarsest format there is: gamma(5, u) of `size`. The sum may be stored twice, in the dtype of the model and in that
    of the file: 2 u of `merged`. Each of the seven may be subnormal.
    """
    relative, absolute = any_rounding(storage, base)
    return 2 * relative * merged.abs() + gamma(5, relative) * size + 7 * absolute


def _orders(storage: str, others: bool, combines: bool) -> tuple[Arithmetic, ...]:
    if FORMATS[storage].precision >= FORMATS["float32"].precision:
        return _WIDE
    known = (*_NARROW, *(STORAGE_THROUGHOUT,) * others, *_COMBINED * combines)
    return tuple(one for one in known if storage not in (one.through, one.load))


def conversions(storage: str, base: str) -> tuple[Arithmetic, ...]:
    """The orders that a copied tensor can tell apart: the dtypes it may have been held in, and no arithmetic at all."""
    return tuple(one for one in arithmetics(storage, base) if replace(one, name="", says="", load="") == _COPYING)
