"""What a difference between two matrices shows of its rank: is it a low-rank update, and is it this adapter's?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_check.types import FLOATS, Case, LoadedStep

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 384
"""Rows and columns that are looked at, evenly spread: any part of a low-rank matrix has no higher rank."""
OTHERS = 64
"""Ranks beyond twice the adapter's own up to which an update is looked for."""
LONG, FEW = 4096, 128
"""Where the order of all rows is in question: as many of them as are looked at, and of how many columns at least."""
INPUTS_FIRST = ("lora-linear-in-out", "lora-embedding")
"""Recipes of weights stored (in, out): their rows lie in the space of A, and not of B."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What MERGED has over BASE, and what it should have: a sample of rows and columns.

    base    as it is stored        seen    merged - base          asked   s B A
    bound   how far rounding may have moved each element of `seen`
    ranks   of the adapters together      shape   of the whole matrices
    """

    base: Tensor
    seen: Tensor
    asked: Tensor
    bound: Tensor
    ranks: int
    shape: tuple[int, int]

    @property
    def beside(self) -> Difference:
        """The same with what `asked` does not explain as `seen`."""
        return replace(self, seen=self.seen - self.asked)

    @property
    def turned(self) -> Difference:
        """The same with rows for columns."""
        base, seen, asked, bound = self.base.T, self.seen.T, self.asked.T, self.bound.T
        return Difference(base, seen, asked, bound, self.ranks, (self.shape[1], self.shape[0]))

    @property
    def rank(self) -> int | None:
        """The rank of `seen`, if it is that of a low-rank matrix."""
        return rank_of(self.seen, self.bound, self.ranks)


def difference(case: Case, actual: Tensor, rows: int = SAMPLE, columns: int = SAMPLE) -> Difference | None:
    """A sample of what the merge changed; None where the formula does more than add plain products."""
    if case.grid is not None or case.storage not in FLOATS or not case.steps or not all(map(_plain, case.steps)):
        return None
    import torch

    from lora_check.rounding import any_rounding, half_cell

    down, across = (slice(0, size, -(-size // most)) for size, most in zip(actual.shape, (rows, columns), strict=True))
    base, merged = (one[down, across].to(torch.float64) for one in (case.base, actual))
    parts = [_delta(step, down, across) for step in case.steps]
    seen, asked = merged - base, sum(parts)
    dtype = str(case.base.dtype).removeprefix("torch.")
    relative, absolute = any_rounding(case.storage, dtype)
    bound = half_cell(merged, case.storage) + relative * seen.abs() + absolute
    bound = bound if dtype == case.storage else bound + half_cell(base, case.storage)
    if len(parts) > 1:  # the sum is stored after each adapter
        bound = bound + (len(parts) - 1) * half_cell(base.abs() + sum(part.abs() for part in parts), case.storage)
    if not bool(seen.isfinite().all()):
        return None
    ranks = sum(step.scale.rank for step in case.steps if step.scale)
    base, seen, bound = (one.to(torch.float32) for one in (base, seen, bound))
    return Difference(base, seen, asked, bound, ranks, (case.rows, int(actual.shape[1])))


def _plain(step: LoadedStep) -> bool:
    """Whether a step adds s times a product of its factors, to every row, and nothing of the base comes into it."""
    recipe = step.recipe
    special = recipe.prepare or recipe.scaled or recipe.reads or recipe.stacked or step.window or step.flipped
    return recipe.adds and not special and step.scale is not None and "A" in _letters(step)


def _letters(step: LoadedStep) -> set[str]:
    return {role.removeprefix("embedding_") for role in step.factors}


def _delta(step: LoadedStep, rows: slice, columns: slice) -> Any:
    import torch

    assert step.recipe.product is not None
    factors = {role: factor.to(torch.float32) for role, factor in step.factors.items()}
    for role, factor in factors.items():  # only the columns that are looked at are multiplied out
        if role.endswith("B") and step.recipe.name in INPUTS_FIRST:
            return step.s * step.recipe.product({**factors, role: factor[columns]}, rows)
        if role == "A" and step.recipe.name == "lora-linear":
            return step.s * step.recipe.product({**factors, role: factor[:, columns]}, rows)
    return step.s * step.recipe.product(factors, rows)[:, columns]


def rank_of(matrix: Tensor, bound: Tensor, ranks: int) -> int | None:
    """The rank of a low-rank matrix that was then rounded, each element by no more than its bound; None: it is none.

    ranks   of this adapter

    Singular values above the norm that rounding can have are those of the matrix itself (Weyl). Without them no more
    may be left than rounding leaves. A matrix is of low rank if factors store it in fewer numbers than all of it,
    r (m + n) < m n, and in fewer than the elements that are clearly not zero.
    """
    import torch

    from lora_check.rounding import rounding_norm

    m, n = matrix.shape
    most = min((m * n - 1) // (m + n), 2 * ranks + OTHERS)
    basis = leading(matrix, min(most + 1, m, n))
    core = (basis.T @ matrix).to(torch.float64)
    values, turn = torch.linalg.eigh(core @ core.T)
    found = turn[:, values.clamp_min(0).sqrt() > rounding_norm(bound)].to(basis.dtype)
    rank = int(found.shape[1])
    if not 0 < rank <= most:
        return None
    if is_sparse(matrix, bound, rank):
        return None
    rest = outside(matrix, basis @ found)
    return rank if rest <= energy(bound) else None


def is_sparse(matrix: Tensor, bound: Tensor, rank: int) -> bool:
    """Whether no more elements are clearly not zero than factors of that rank have numbers: r (m + n)."""
    return int((matrix.abs() > bound).sum()) <= rank * sum(matrix.shape)


def leading(matrix: Tensor, count: int) -> Tensor:
    """Orthonormal columns that span the strongest directions of the rows' axis: a random sketch, sharpened once."""
    import torch

    probes = torch.randn(matrix.shape[1], count, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    sketch: Tensor = torch.linalg.qr(matrix @ (matrix.T @ torch.linalg.qr(matrix @ probes).Q)).Q
    return sketch


def energy(matrix: Tensor) -> float:
    """The sum of squares."""
    import torch

    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64).item() ** 2)


def outside(matrix: Tensor, basis: Tensor) -> float:
    """The energy of the columns of a matrix outside the space that orthonormal columns span."""
    return energy(matrix - basis @ (basis.T @ matrix))


@dataclass(frozen=True, slots=True)
class Spaces:
    """Which share of an update lies in the column space and in the row space of the adapter's own.

    columns, rows   shares of its energy, 0 to 1          all_columns, all_rows   nothing but rounding lies outside
    """

    columns: float
    rows: float
    all_columns: bool
    all_rows: bool


def spaces(one: Difference) -> Spaces:
    """Where `seen` lies, looked at from the adapter that was given."""
    count = min(one.ranks, *one.asked.shape)
    whole, noise = energy(one.seen), energy(one.bound)
    pairs = ((one.seen, one.asked), (one.seen.T, one.asked.T))
    rests = [outside(update, leading(own, count)) for update, own in pairs]
    return Spaces(
        columns=1 - rests[0] / whole,
        rows=1 - rests[1] / whole,
        all_columns=rests[0] <= noise,
        all_rows=rests[1] <= noise,
    )


def holds_own(one: Difference, rank: int) -> bool:
    """Whether `seen` is of a higher rank than this adapter, and mostly in its spaces on both sides.

    Then it is neither another step of this run, which has no higher rank, nor an adapter that has nothing to do with
    this one: it holds this adapter, and an update beside it that went the same ways.
    """
    from lora_check.rounding import MOST

    if rank <= one.ranks:
        return False
    found = spaces(one)
    return min(found.columns, found.rows) > MOST


def partly_applied(one: Difference) -> bool:
    """Whether rows or columns are the base's own where the adapter would have moved them."""
    return any(bool(((m.seen == 0).all(1) & (m.asked.abs() > 2 * m.bound).any(1)).any()) for m in (one, one.turned))


def is_own(one: Difference, found: Spaces, again: Callable[[int, int], Difference | None]) -> bool:
    """Whether `seen` may be made of this adapter's own factors: cut, weighted anew, or with rows or columns moved.

    again   (rows, columns) -> the same of so many of them
    """
    if found.all_columns and found.all_rows:
        return True
    columns = max(FEW, 2 * one.ranks, min(SAMPLE, LONG * FEW // max(one.shape)))
    if found.all_rows:
        return one.shape[0] > LONG or _rearranged(again(LONG, columns))
    if found.all_columns:
        whole = None if one.shape[1] > LONG else again(columns, LONG)
        return whole is None or _rearranged(whole.turned)
    return False


def _rearranged(one: Difference | None) -> bool:
    """Whether D^T D = c^2 P^T P to within rounding: the rows are those of the delta in another order, or mixed.

    D = c Q P + E with orthonormal Q gives |D^T D - c^2 P^T P| <= 2 |D| |E| + |E|^2.
    """
    import torch

    from lora_check.rounding import rounding_norm

    if one is None:
        return True
    basis = leading(one.asked.T, min(one.ranks, *one.asked.shape))
    seen, asked = ((matrix @ basis).to(torch.float64) for matrix in (one.seen, one.asked))
    noise, norm = rounding_norm(one.bound), float(torch.linalg.matrix_norm(seen, 2))
    gap = seen.T @ seen - asked.T @ asked * (energy(seen) / energy(asked))
    return float(torch.linalg.matrix_norm(gap, 2)) <= 2 * norm * noise + noise * noise


def shares(case: Case, found: Spaces) -> dict[str, float]:
    """The shares of an update in the spaces of B and of A."""
    turned = case.steps[0].recipe.name in INPUTS_FIRST
    of_b, of_a = (found.rows, found.columns) if turned else (found.columns, found.rows)
    return {"inside_b": round(of_b, 4), "inside_a": round(of_a, 4)}


def ranks_told(told: Sequence[Mapping[str, Any]]) -> str:
    """'of rank 16', 'of rank 8 to 16', or nothing where it is not known."""
    ranks = [int(one["rank"]) for one in told if "rank" in one]
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    return f" of rank {low}" if low == high else f" of rank {low} to {high}"
