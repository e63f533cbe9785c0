"""Functions of recipes over Tensor and Ball alike: on tensors the torch operation, on balls its error bound too.

A recipe that needs more than @ * + - / takes it from here, so that its formula is still written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_check.ball import OWN, Ball
from lora_check.rounding import ELEMENTARY, FORMATS, GATED, UNDERFLOW, backward, fourier, gamma, primes, store

Numbers = Any

_TINY, _FEW = 400, 64
"""Elements of a matrix below which a batch of it is worth a loop, and the longest batch that is."""


def moved(x: Numbers, move: Callable[[Tensor], Tensor]) -> Numbers:
    """`move` picks, repeats or rearranges elements and computes nothing: exact."""
    return x.moved(move) if isinstance(x, Ball) else move(x)


def joined(parts: Sequence[Numbers], join: Callable[[Sequence[Tensor]], Tensor]) -> Numbers:
    """`join` puts several tensors together (cat, stack, block_diag) and computes nothing: exact."""
    if isinstance(parts[0], Ball):
        first = parts[0]
        return Ball(join([one.mid for one in parts]), join([one.rad for one in parts]), first.u, first.rounds)
    return join(parts)


def stacked_rows(parts: Sequence[Numbers]) -> Numbers:
    """Matrices below one another."""
    return parts[0] if len(parts) == 1 else joined(parts, lambda blocks: torch.cat(list(blocks)))


def like(x: Numbers, value: Tensor | float) -> Numbers:
    """A constant, exact in float32, in the number kind and dtype of `x`."""
    if isinstance(x, Ball):
        return Ball.exactly(torch.as_tensor(value), x.u, x.rounds)
    return torch.as_tensor(value, dtype=x.dtype)


def identity(x: Numbers) -> Numbers:
    """I of the size of a square matrix, or of each of a batch."""
    batch = middle(x)
    return like(x, torch.eye(int(batch.shape[-1])).expand(batch.shape))


def total(x: Numbers, dim: int) -> Numbers:
    """The sum along one axis: k - 1 additions, gamma(k - 1, u) sum |x| in any order (Higham, ASNA, section 4.2)."""
    if not isinstance(x, Ball):
        return x.sum(dim)
    terms = int(x.mid.shape[dim])
    spread = x.rad.sum(dim) + gamma(terms - 1, x.u + OWN) * x.bound.sum(dim) + terms * UNDERFLOW
    return x.made(x.mid.sum(dim), spread)


def softmax(x: Numbers) -> Numbers:
    """exp(x) / sum exp(x) along the last axis.

    What is subtracted from all x before they are exponentiated cancels. So with d the largest of rad + u |x - max|, the
    quotient is off by a factor within exp(+-(2 d + gamma(2 e + k + 2, u))): two exponentials as good as e =
    `ELEMENTARY` says, a sum of k, a reciprocal and a product.
    """
    if not isinstance(x, Ball):
        return x.softmax(-1)
    u, terms, blur = x.u + OWN, int(x.mid.shape[-1]), x.rad.amax(-1, keepdim=True)
    below = x.mid.amax(-1, keepdim=True) - x.mid
    shift = (x.rad + u * (below + 2 * blur)).amax(-1, keepdim=True)
    mid = x.mid.softmax(-1)
    rad = mid * (2 * shift + gamma(2 * ELEMENTARY + terms + 2, u)).expm1()
    return x.made(mid, rad.clamp_max(1.0) + terms * UNDERFLOW)


def softmax_of_log(x: Numbers, stored_in: float = 0.0) -> Numbers:
    """softmax(log x) along the last axis, x > 0: x / sum x, with every rounding on that longer way.

    stored_in   unit roundoff of the dtype that the logarithms may be stored in before the softmax

    Each logarithm is off by (e u + stored_in) |log x|, e = `ELEMENTARY`, and its distance from the largest is rounded
    once more; the rest is as in `softmax`.
    """
    if not isinstance(x, Ball):
        return x.log().softmax(-1)
    u, terms = x.u + OWN, int(x.mid.shape[-1])
    size = (x.mid - x.rad).clamp_min(UNDERFLOW).log().abs().amax(-1, keepdim=True)
    quotient = x / moved(total(x, -1), lambda sums: sums[..., None])
    off = 2 * ((ELEMENTARY + 1) * u + stored_in) * size
    blur = (off + gamma(2 * ELEMENTARY + terms + 2, u)).expm1()
    return x.made(quotient.mid, quotient.rad + blur * quotient.bound)


def rounded_to(x: Ball) -> float:
    """Relative error with which these numbers may have been rounded already: what radii they have, or the unit roundoff
    of the narrowest format that holds them all."""
    fitting = [form.unit for name, form in FORMATS.items() if torch.equal(store(x.mid, name), x.mid)]
    return max([*fitting, (x.rad / x.mid.abs().clamp_min(UNDERFLOW)).max().item()])


def weighted(weights: Numbers, rows: Numbers) -> Numbers:
    """The sum over j of weights[..., j] rows[..., j, :]."""
    return total(moved(weights, lambda x: x[..., None]) * rows, -2)


def attended(scores: Numbers, table: Numbers, count: int) -> Numbers:
    """The rows of `table` with the `count` largest scores along the last axis, weighted by the softmax of those.

    Where the radii leave open which rows these are, anything between the least and the largest of all can come out.
    """
    index = middle(scores).topk(count).indices
    found = weighted(softmax(moved(scores, lambda x: x.gather(-1, index))), table[index])
    if not isinstance(scores, Ball):
        return found
    least = (scores.mid - scores.rad).gather(-1, index).amin(-1)
    rest = (scores.mid + scores.rad).scatter(-1, index, -torch.inf).amax(-1)
    low, high = (table.mid - table.rad).amin(0), (table.mid + table.rad).amax(0)
    whole = found.made(((low + high) / 2).expand(found.shape), ((high - low) / 2).expand(found.shape))
    return chosen((rest >= least)[..., None], whole, found)


def at_least(x: Numbers, low: float) -> Numbers:
    """max(x, low): no two numbers come to lie further apart; `low` is rounded to the compute dtype."""
    if not isinstance(x, Ball):
        return x.clamp_min(low)
    return x.made(x.mid.clamp_min(low), x.rad + (x.u + OWN) * low)


def multiplied(a: Numbers, b: Numbers) -> Numbers:
    """A_i B_i for each i of a batch.

    Torch multiplies a batch of tiny matrices in plain loops, which round each product before it is added; one matrix
    product does not. So a few of them are taken one by one, as PEFT's block-diagonal matrices are in effect.
    """
    count = max(int(a.shape[0]), int(b.shape[0]))
    if isinstance(a, Ball) or count > _FEW or max(a[0].numel(), b[0].numel()) >= _TINY:
        return a @ b
    pairs = zip(*(x.expand(count, -1, -1) for x in (a, b)), strict=True)
    return torch.stack([one @ other for one, other in pairs])


def plus_product(x: Numbers, a: Numbers, b: Numbers) -> Numbers:
    """x + a b, in one rounding where a tensor can have it, as a matrix product adds up its terms; balls allow two."""
    return x + a * b if isinstance(x, Ball) else torch.addcmul(x, a, b)


def mapped(x: Numbers, function: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Numbers:
    """An elementary function of each element, as good as `ELEMENTARY` says.

    slope   (|x| + rad) -> a bound of |f'| over the ball
    """
    if not isinstance(x, Ball):
        return function(x)
    mid = function(x.mid)
    return x.made(mid, slope(x.bound) * x.rad + ELEMENTARY * (x.u + OWN) * mid.abs() + UNDERFLOW)


def gated(x: Numbers, function: Callable[[Tensor], Tensor]) -> Numbers:
    """x g(x) with 0 <= g <= 1 and a slope of at most 1.13: silu and gelu, in every way of computing them.

    `rounding.GATED` says how far off the result is, relative to x.
    """
    if not isinstance(x, Ball):
        return function(x)
    return x.made(function(x.mid), 1.13 * x.rad + GATED * (x.u + OWN) * x.bound + UNDERFLOW)


def solved(a: Numbers, b: Numbers, *, left: bool = True) -> Numbers:
    """X with A X = B, or with X A = B where A is not on the left, for one matrix or a batch of them.

    Gaussian elimination in precision u solves (A + E) X = B with |E| <= gamma(3 n, u) P^T |L| |U| (Higham, ASNA,
    theorem 9.4). With the factors of a float64 elimination that gives, elementwise and with the radii of A and B,
    |error| <= |A^-1| (|E| + rad A) (|X| + |error|) + |A^-1| rad B, which is solved for the error by its norm.
    """
    if not isinstance(a, Ball):
        return _in_float(a, lambda x: torch.linalg.solve(x, b.to(x.dtype), left=left))
    if not left:
        return solved(a.mT, b.mT).mT
    n = int(a.mid.shape[-1])
    pivots, lower, upper = torch.linalg.lu(a.mid)
    grown = pivots @ (lower.abs() @ upper.abs())
    uncertain = a.rad + gamma(3 * n, a.u + OWN) * grown
    inverse, mid = torch.linalg.inv(a.mid).abs(), torch.linalg.solve(a.mid, b.mid)
    first = inverse @ (uncertain @ mid.abs() + b.rad)
    shrink = 1 - (inverse @ uncertain).sum(-1).amax(-1)[..., None, None]
    rest = (inverse @ uncertain).sum(-1, keepdim=True) * first.amax(-2, keepdim=True) / shrink
    error = torch.where(shrink > 0, first + rest, torch.inf)
    return a.made(mid, error + UNDERFLOW)


def orthonormal(x: Numbers) -> Numbers:
    """Q of X = Q R, X (m, n) with m >= n, by Householder's reflections, as LAPACK chooses the signs.

    The radius of an element is the length of the error of its whole column; `against` makes use of that. The computed
    R is that of X + E with |E e_j| <= f |x_j|, f = p(m) u, and the computed Q off by f from that factor Q' (Higham,
    ASNA, section 19.3, with the p of `backward`). With Y = E R^-1, Q' (I + F) = Q + Y and F upper triangular: F + F^T
    + F^T F = Q^T Y + Y^T Q + Y^T Y = H gives |F| <= (sqrt(2) - sqrt(2 - 4 |H|)) / 2 and |Q' - Q| <= (|Y| + |F|) / (1 -
    |F|), in Frobenius' norm. No column is off by more than 2. Where a reflection I - t v v^T starts from an element
    that may have either sign, so may the column.
    """
    if not isinstance(x, Ball):
        return _in_float(x, lambda wide: torch.linalg.qr(wide).Q)
    rows, count = (int(size) for size in x.mid.shape)
    packed, t = torch.geqrf(x.mid)
    mid, upper = torch.linalg.householder_product(packed, t), packed[:count].triu()
    own, lengths = backward(rows, x.u + 2 * OWN), x.bound.norm(dim=0)
    behind = own * lengths + x.rad.norm(dim=0)
    y = (behind @ torch.linalg.inv_ex(upper).inverse.abs()).norm()
    h = y * (2 + y)
    f = (2**0.5 - (2 - 4 * h).clamp_min(0).sqrt()) / 2
    error = torch.where(h <= 0.5, (y + f) / (1 - f), 2.0) + own
    flips = (t > 0) & ((t - 1) * upper.diagonal().abs() <= behind + error * lengths)
    return x.made(mid, torch.where(flips, 2.0, error).clamp_max(2.0).expand(mid.shape))


def against(q: Numbers, w: Numbers) -> Numbers:
    """Q^T W for a Q of `orthonormal`, whose radii are the lengths of errors: they meet the lengths of W's columns."""
    if not isinstance(q, Ball):
        return q.T @ w
    product = Ball(q.mid, torch.zeros_like(q.mid), q.u, q.rounds).T @ w
    return product.made(product.mid, product.rad + q.rad.amax(0)[:, None] * w.bound.norm(dim=0))


def _in_float(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function that torch has for float32 and float64 only: a 16-bit tensor is widened for it and stored again."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    return function(wide).to(x.dtype)


def constants(x: Numbers, values: Sequence[float]) -> Numbers:
    """Real numbers that the producer writes down to the last digit of float32 at least, in the number kind of `x`."""
    numbers = torch.tensor(values, dtype=torch.float64)
    if isinstance(x, Ball):
        return Ball.exactly(numbers, x.u, x.rounds).widened(max(x.u, FORMATS["float32"].unit))
    return numbers.to(x.dtype)


def inverse_fourier(x: Numbers) -> Numbers:
    """The real part of the inverse discrete Fourier transform of a matrix: the mean of x times roots of unity.

    Each output takes in every input with a modulus of 1, so radii add up; what the computation adds, `rounding.fourier`
    says for both axes, and two products for the division.
    """
    if not isinstance(x, Ball):
        return _in_float(x, lambda wide: torch.fft.ifft2(wide).real)
    rows, columns = (int(size) for size in x.mid.shape)
    own = fourier(rows, x.u + OWN) + fourier(columns, x.u + OWN) + gamma(2, x.u + OWN)
    spread = (x.rad.sum() + own * x.bound.sum()) / (rows * columns) + UNDERFLOW
    mid = torch.fft.ifft2(x.mid).real
    return x.made(mid, spread.expand(mid.shape))


def through_spectra(x: Numbers) -> Numbers:
    """x along its last axis, as three Fourier transforms in float32 give it when it is convolved with unit vectors.

    The spectrum of a unit vector is off by a = fourier(b) + gamma(2) in each number, for all have one modulus; that of
    x by e = sqrt(p) fourier(b) in norm, p the largest prime of b, since p sums with one error each are sqrt(p) times as
    much together. With c = gamma(5) for rounding x and a complex product, and f = fourier(b) for the way back, over
    moduli that sum up to |x|_2 at most, each number is off by ((1 + a) (1 + e) (1 + c) (1 + f) - 1) |x|_2. Tensors stay
    as they are.
    """
    if not isinstance(x, Ball):
        return x
    u, size = max(x.u, FORMATS["float32"].unit) + OWN, int(x.mid.shape[-1])
    own = fourier(size, u)
    growth = (1 + own + gamma(2, u)) * (1 + max(primes(size), default=1) ** 0.5 * own) * (1 + gamma(5, u)) * (1 + own)
    length = x.bound.square().sum(-1, keepdim=True).sqrt()
    return x.made(x.mid, x.rad + (growth - 1) * length + UNDERFLOW)


def synthesised(x: Numbers, filters: Numbers) -> Numbers:
    """Sum over c, h, w of x[c, h, w] filters[c, i - 2 h, j - 2 w]: one step up of a wavelet's synthesis.

    x (4, rows, columns), filters (4, l, l) -> (2 rows + l - 2, 2 columns + l - 2). Each output is a sum of 4 ceil(l /
    2)^2 products: gamma(k + 1, u) |x| |filters|, and each radius through the other's bound, as in a matrix product. A
    device that cuts x short before it multiplies cuts the filters too, so the radius of x counts twice.
    """
    if not isinstance(x, Ball):
        return _raised(x, filters)
    terms = int(x.mid.shape[0]) * ((int(filters.mid.shape[-1]) + 1) // 2) ** 2
    spread = gamma(terms + 1, x.u + OWN) * _raised(x.bound, filters.bound) + terms * UNDERFLOW
    spread = spread + _raised(x.mid.abs(), filters.rad) + 2 * _raised(x.rad, filters.bound)
    return x.made(_raised(x.mid, filters.mid), spread)


def _raised(x: Tensor, filters: Tensor) -> Tensor:
    return torch.nn.functional.conv_transpose2d(x[None], filters[:, None], stride=2)[0, 0]


def chosen(mask: Tensor, yes: Numbers, no: Numbers) -> Numbers:
    """`yes` where the mask is true, else `no`: exact."""
    return joined([yes, no], lambda pair: torch.where(mask, pair[0], pair[1]))


def either(x: Numbers, other: Numbers) -> Numbers:
    """`x`; a producer may have had `other` instead, so a ball reaches to both."""
    if not isinstance(x, Ball):
        return x
    low = torch.minimum(x.mid - x.rad, other.mid - other.rad)
    high = torch.maximum(x.mid + x.rad, other.mid + other.rad)
    return Ball((low + high) / 2, (high - low) / 2 * (1 + 4 * OWN), x.u, x.rounds)


def anything(x: Numbers) -> Numbers:
    """`x`, where a producer may as well have had any other numbers."""
    return Ball(x.mid, torch.full_like(x.rad, torch.inf), x.u, x.rounds) if isinstance(x, Ball) else x


def middle(x: Numbers) -> Tensor:
    """The numbers themselves, or the middles of balls: to decide by, never to compute with."""
    return x.mid if isinstance(x, Ball) else x


def square_root(x: Numbers) -> Numbers:
    """sqrt(x) for x >= 0: |sqrt(x + e) - sqrt(x)| <= min(|e| / sqrt(x), sqrt(|e|))."""
    if not isinstance(x, Ball):
        return x.sqrt()
    mid = x.mid.sqrt()
    moved_by = torch.minimum(x.rad / mid.clamp_min(UNDERFLOW), x.rad.sqrt())
    return x.made(mid, moved_by + (x.u + OWN) * (mid + moved_by) + UNDERFLOW)


def in_double(x: Numbers) -> Numbers:
    """The same numbers, to be computed with in float64 by every producer."""
    return Ball(x.mid, x.rad, OWN) if isinstance(x, Ball) else x.to(torch.float64)


def in_single(x: Numbers, after: Numbers) -> Numbers:
    """What `in_double` began, rounded to float32 and computed with as `after` is; exact numbers stay exact."""
    if isinstance(x, Ball):
        return Ball(x.mid, x.rad, after.u, after.rounds).stored("float32")
    return x if after.dtype == torch.float64 else x.to(torch.float32).to(after.dtype)


def within(x: Numbers, size: Callable[[], Numbers]) -> Numbers:
    """Whatever lies within |size| of x: room for an order of operations that tensors do not follow here."""
    return Ball(x.mid, x.rad + size().bound, x.u, x.rounds) if isinstance(x, Ball) else x


def resummed(x: Numbers, terms: int, size: Callable[[], Numbers]) -> Numbers:
    """x, as sums of that many more terms give it: gamma(k, u) |size| further off, for tensors the same."""
    return Ball(x.mid, x.rad + gamma(terms, x.u + OWN) * size().bound, x.u, x.rounds) if isinstance(x, Ball) else x


def magnitude(x: Numbers) -> Numbers:
    """|x|: no two numbers come to lie further apart."""
    return x.moved(Tensor.abs) if isinstance(x, Ball) else x.abs()


def storing_error(store: Callable[[Numbers], Numbers], x: Numbers) -> tuple[float, float]:
    """The relative and the absolute error of `store`, which rounds to one of the storage formats or to none.

    Rounding errs most, relatively, half-way between 1 and its neighbour, and among subnormals half-way between 0 and
    the smallest. It is asked at those points of every format.
    """
    if not isinstance(x, Ball):
        return 0.0, 0.0
    units = [1 + form.unit for form in FORMATS.values()]
    halves = [2.0 ** (form.least_exponent - form.precision) for form in FORMATS.values()]
    probe = torch.tensor([units, halves], dtype=torch.float64)
    kept = store(Ball.exactly(probe, x.u))
    worst = ((kept.mid - probe).abs() + kept.rad).amax(1)
    return worst[0].item(), worst[1].item()
