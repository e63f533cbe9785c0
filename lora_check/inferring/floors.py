"""The numbers that decide what rises above the noise of storing, with their derivations.

An honest merge stores W + delta: what lies in the file is M = W + delta + e, each e uniform within half a last place
of M, independent of the others as soon as delta moves by about one last place (Widrow and Kollar, Quantization Noise,
2008, chapter 4). So the variance of each element of the noise E is known, and with it what its singular values can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from lora_check.rounding import CHANCE, DEVIATIONS, FORMATS, ulp

LARGEST_RANK = 256
"""The largest rank that is looked for: the largest that adapters are commonly trained with. More of it is as large as
the matrix itself in most models of which one layer fits on one device."""

LARGEST_BESIDE = 64
"""The same beside row factors, which are fitted in several rounds: larger ranks are told as a full change."""

ROUNDS = 6
"""Fits of row factors and of the row space of the low rank in turn: each leaves about r / n of the error, so six leave
1e-6 of it for r = n / 10. What is left is measured: too few of them end in 'not told', and never in a wrong rank."""

SPARE = 8
"""Columns of a sketch beyond the rank that it is to show: the expected error of the sketch falls with their number p as
sqrt(k / (p - 1)) (Halko, Martinsson, Tropp, 2011, theorem 10.5), and 5 to 10 of them are enough (section 1.3.3)."""

FIRST_SKETCH = 16
"""Columns of the first sketch; each next one has twice as many."""

POWERS = 2
"""Power iterations q: what a sketch of 2 k columns leaves out of a matrix has a norm of (1 + 4 sqrt(2 n / (k - 1))) to
the power of 1 / (2 q + 1) times the next singular value in the mean, which is 2.2 for 16 columns of 576 (Halko,
Martinsson, Tropp, theorem 1.2); what stands above the others is found far better. A sketch only makes singular values
smaller: it invents none."""

SEED = 20110101
"""Of the Gaussian sketch: two runs say the same."""

ACCUMULATED = 256
"""Sums in float32 that make up one element of a delta, one for each of its ranks."""

STORED_DELTAS = 2
"""Times that a delta may have been rounded to the storage dtype before it was added: product, and scaled product."""

STORES = 4
"""Times that a sum may have been stored before it was added to again: a model that is merged into, saved and merged
into once more has been rounded twice, and PEFT merges the adapters of a list one after the other, each sum being
stored. More than four adapters are hardly ever merged into one model."""

PARTS = (2**0.5, 3**0.5, 5**0.5, 7**0.5)
"""Sizes of the parts of a change that is stored in as many: of two equal ones each would lose the same in an element,
and numbers without a common measure leave errors that have nothing to do with each other."""

ROUNDING_VARIANCE = 1 / 12
"""Of a number that is uniform between -1/2 and 1/2, in units of the last place."""

LIPSCHITZ = math.sqrt(6 / math.pi)
"""A uniform variable of variance v is h (2 Phi(g) - 1) of a normal g, h = sqrt(3 v): its slope is at most
2 h / sqrt(2 pi) = sqrt(6 v / pi)."""

DEVIATION = LIPSCHITZ * math.sqrt(2 * math.log(1 / CHANCE))
"""How far the norm of noise may exceed its mean but for `CHANCE`, in units of the largest sigma: it is a function of
independent normal numbers of slope `LIPSCHITZ` sigma at most, hence exp(-t^2 / (2 slope^2)): Gaussian concentration."""

TRACY_WIDOM: float = (1.5 * math.log(1 / CHANCE)) ** (2 / 3)
"""t with exp(-2/3 t^(3/2)) = `CHANCE`."""

APART = (16.0, 64.0, 256.0)
"""Variances above which elements may be bounded apart, in units of the mean of all: any choice gives a bound, and the
least of them is taken. The first is that of a weight of 4 standard deviations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Which roundings stand between the delta and the files.

    merged   the format that MERGED was rounded to
    base     the one that BASE was rounded to beside the merge, if any
    """

    merged: str
    base: str | None = None

    def variance(self, merged: Tensor, base: Tensor, delta: Tensor) -> Tensor:
        """v: of the noise in each element; float64 in, float64 out.

        ulp(M)^2 / 12 for the store, ulp(W)^2 / 12 where BASE was rounded apart from the merge, and what the delta may
        have lost before it was added.
        """
        square = ulp(merged, self.merged).square_()
        if self.base is not None:
            square += ulp(base, self.base).square_()
        square.add_(ulp(delta, self.merged).square_(), alpha=STORED_DELTAS)
        square.add_(ulp(delta, "float32").square_(), alpha=ACCUMULATED)
        return square.mul_(ROUNDING_VARIANCE)


def origins(merged: str, base: str) -> tuple[Origin, ...]:
    """The histories that two files of these formats can have, the one with the least noise first.

    Of one format, MERGED is BASE plus the delta, stored once. Of two, either that as well, or one of both was rounded
    to the coarser format on its own: a model loaded in bfloat16, merged and saved wider, or a base rounded later.
    """
    if merged == base:
        return (Origin(merged=merged),)
    coarser = min(merged, base, key=lambda name: FORMATS[name].precision)
    return Origin(merged=merged), Origin(merged=coarser, base=coarser)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Variances of one matrix of noise, summed up.

    rows, columns   the largest sum over a row, over a column
    apart           (t, s): of the elements whose variance exceeds t, s bounds the norm whatever their numbers are; the
                    last pair has the largest variance of all for its t, and nothing apart
    total, squares  sum of variances, and of their squares
    """

    rows: float
    columns: float
    apart: tuple[tuple[float, float], ...]
    total: float
    squares: float
    shape: tuple[int, int]

    @property
    def edge(self) -> float:
        """s_1 + s_2: sqrt of the largest sum of variances over a row and over a column.

        The leading term of the mean of the norm (Bandeira and van Handel, Annals of Probability 44 (2016), theorem
        3.1); for equal variances (sqrt(m) + sqrt(n)) sigma, the edge of the noise (Gavish and Donoho, 2014, section 1).
        """
        return math.sqrt(self.rows) + math.sqrt(self.columns)

    @property
    def floor(self) -> float:
        """s_1 + s_2, with what chance adds to it: what the largest singular value of the noise stays below.

        Its square is mu + sigma T, mu = (sqrt(m) + sqrt(n))^2, sigma = sqrt(mu) (1 / sqrt(m) + 1 / sqrt(n))^(1/3), T of
        Tracy and Widom's law (Johnstone, Annals of Statistics 29 (2001), theorem 1.1; for other than normal numbers
        Pillai and Yin, Annals of Applied Probability 24 (2014)), which exceeds t but for exp(-2/3 t^(3/2)). The law is
        that of many numbers of about one size: those of a far larger variance are added as they are.
        """
        return min(self.edge * math.sqrt(self.wobble) + self.large, self.bound)

    @property
    def wobble(self) -> float:
        """1 + sigma t / mu: the square of the largest singular value in units of its mean, at most.

        It is less than its mean by as much even more rarely, so two draws of one noise differ by this factor at most:
        the one is larger by its square root, the other smaller.
        """
        first, second = (math.sqrt(side) for side in self.shape)
        return 1 + TRACY_WIDOM * math.cbrt(1 / first + 1 / second) / (first + second)

    @property
    def bound(self) -> float:
        """What the norm of the noise exceeds with probability `CHANCE` at most, with no term left out.

        The smaller of (3 / 2) (s_1 + s_2 + 5 / sqrt(ln(3 / 2)) sigma sqrt(ln min(m, n))) + t (Bandeira and van Handel,
        theorem 3.1 with epsilon 1/2; even moments of a uniform variable are below those of a normal one) and
        sqrt(2 max(s_1, s_2)^2 ln((m + n) / p)) (Tropp, 2012, theorem 1.5).
        """
        local = 5 / math.sqrt(math.log(1.5)) * math.sqrt(math.log(max(2, min(self.shape))))
        tropp = math.sqrt(2 * max(self.rows, self.columns) * math.log(sum(self.shape) / CHANCE))
        return min(1.5 * self.edge + self._widest(1.5 * local + DEVIATION), tropp)

    @property
    def large(self) -> float:
        """|E| at most, of the elements whose variance is far above the others'."""
        return self.apart[0][1]

    def stored(self, times: int) -> Noise:
        """Of so many stores one after the other: variances add up, and so do the largest errors."""
        return replace(
            self,
            rows=times * self.rows,
            columns=times * self.columns,
            apart=tuple((times * variance, times * norm) for variance, norm in self.apart),
            total=times * self.total,
            squares=times**2 * self.squares,
        )

    def _widest(self, times: float) -> float:
        """So many times the largest sigma, those apart being added as they are: |E| <= |E below t| + |E above t|."""
        return min(times * math.sqrt(variance) + norm for variance, norm in self.apart)

    @property
    def most(self) -> float:
        """|E|^2 at most: its mean, and so many `DEVIATIONS` of a sum of squares whose variances are below 2 v^2."""
        return self.total + DEVIATIONS * math.sqrt(2 * self.squares)


def largest_low_rank(rows: int, columns: int) -> int:
    """The largest r with r (m + n) < m n: factors of a higher rank hold more numbers than the matrix itself."""
    return max(0, (rows * columns - 1) // (rows + columns)) if rows and columns else 0
