"""Singular value and QR decompositions over Tensor and Ball alike, for recipes of tuners that take the base apart.

Two machines agree on no decomposition bit by bit, and on its vectors only but for signs, and for rotations among
vectors of near singular values. What is multiplied together again is better known than its factors, so it is bounded
as a product. Where the gap between singular values is too small the bounds grow as wide as the numbers themselves.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_check.ball import OWN, Ball
from lora_check.rounding import LAPACK_THREADS, UNDERFLOW, backward, gamma

Numbers = Any

_ROUNDINGS = 8
"""The most operations besides the sum that a term of U S V^T goes through: S / s, its roots, both products, s times."""

_KEPT = 4
"""Decompositions a thread remembers: of a base in float32 and in float64, as stored and as loaded."""

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(U, S, V^T) -> U S V^T, in the order of operations of a producer."""


def leading(x: Numbers, rank: int, product: Product, *, stored: tuple[float, float] = (0.0, 0.0)) -> Numbers:
    """U_k S_k V_k^T: the best approximation of rank k, multiplied out by `product`.

    stored   the error with which the producer keeps U_k, S_k and V_k before it multiplies them, from `storing_error`

    The producer's SVD is that of W + E, |E|_2 <= h = p(n) u s_1. By Wedin's theorem ("Perturbation bounds in connection
    with singular value decomposition", BIT 12, 1972) its subspaces are turned by sin <= t = h / (s_k - s_k+1 - h) at
    most, whatever rotation or sign it chose inside them. With P, Q the projections on U_k, V_k and T the result,

        |P (T~ - T) Q|   <= h + t^2 (s_k+1 + h)          |P' (T~ - T) Q'| <= t (t s_k+1 + h)
        |P (T~ - T) Q'|, |P' (T~ - T) Q| <= t s_k+1 + h

    and element (a, b) of each part is at most that times the lengths of row a and of row b of its projections.
    """
    if not isinstance(x, Ball):
        u, s, vt = _svd(x)
        return product(u[:, :rank], s[:rank], vt[:rank])
    parts = _parted(x, rank)
    h, t, lower = parts.shift, parts.turn, parts.lower
    own, across, rest = h + t * t * (lower + h), t * lower + h, t * (t * lower + h)
    return _multiplied(x, parts.leading, parts.trailing, (own, across, rest), parts, stored)


def trailing(x: Numbers, rank: int, product: Product, *, stored: tuple[float, float] = (0.0, 0.0)) -> Numbers:
    """W - U_k S_k V_k^T, as the product of the other singular vectors; the same argument, for E less what it moved."""
    if not isinstance(x, Ball):
        u, s, vt = _svd(x)
        return product(u[:, rank:], s[rank:], vt[rank:])
    parts = _parted(x, rank)
    h, t, lower = parts.shift, parts.turn, parts.lower
    own, across, rest = h + t * (t * lower + h), t * (lower + h), t * t * (lower + h)
    return _multiplied(x, parts.trailing, parts.leading, (own, across, rest), parts, stored)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some singular vectors of a matrix, and the lengths of the rows of the two projections on them, (m, 1), (1, n)."""

    u: Tensor
    s: Tensor
    vt: Tensor
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True, slots=True)
class _Parted:
    """A singular value decomposition cut in two; `shift` is h, `turn` t, `lower` the largest value that is cut off."""

    leading: _Part
    trailing: _Part
    shift: float
    turn: float
    lower: float


def _parted(x: Ball, rank: int) -> _Parted:
    u, s, vt = _svd(x.mid)
    rows, columns = torch.linalg.vector_norm(u[:, :rank], dim=1), torch.linalg.vector_norm(vt[:rank], dim=0)
    values = [*s.tolist(), 0.0]
    shift = _flaw(x) * values[0] + x.rad.norm().item()
    gap = values[rank - 1] - values[rank] - shift
    turn = min(1.0, shift / gap) if gap > 0 else 1.0
    return _Parted(
        _Part(u[:, :rank], s[:rank], vt[:rank], rows[:, None], columns[None]),
        _Part(u[:, rank:], s[rank:], vt[rank:], _beside(rows)[:, None], _beside(columns)[None]),
        shift,
        turn,
        values[rank],
    )


def _beside(lengths: Tensor) -> Tensor:
    """The lengths of the rows of I - P, from those of P."""
    return (1 - lengths.square()).clamp_min(0).sqrt()


def _flaw(x: Ball) -> float:
    """p(n) u, with as much for our own float64 decomposition and for the singular values read from it."""
    return backward(max(x.shape), x.u + 2 * OWN)


def _multiplied(
    x: Ball, part: _Part, other: _Part, bounds: tuple[float, float, float], parts: _Parted, stored: tuple[float, float]
) -> Ball:
    """The product of one part: what its subspaces may turn, then the producer's own vectors, stores and sums.

    The producer's U is a flaw f = p(n) u away from orthogonal vectors; so is V. |sum u s v| <= |u| |s v| for the
    relative errors of its stores and sums.
    """
    own, across, rest = bounds
    turned = own * part.rows * part.columns + rest * other.rows * other.columns
    turned = turned + across * (part.rows * other.columns + other.rows * part.columns)
    scaled = part.u * part.s
    mid, f, terms = scaled @ part.vt, _flaw(x), int(part.s.shape[0])
    largest = part.s.amax().item() + parts.shift
    more = 3 * (parts.shift + parts.turn * (parts.lower + parts.shift))
    heights = torch.linalg.vector_norm(scaled, dim=1)[:, None] + more + f * largest
    widths = torch.linalg.vector_norm(part.s[:, None] * part.vt, dim=0)[None] + more + f * largest
    lengths = part.rows + parts.turn * other.rows + f
    relative, absolute = stored
    roundings = (1 + relative) ** 3 * (1 + gamma(terms + _ROUNDINGS, x.u + OWN)) - 1
    made = f * (heights + widths) + roundings * lengths * widths
    return x.made(mid, turned + made + 2 * absolute * (terms**0.5 * (heights + widths) + 1) + terms * UNDERFLOW)


def singular(x: Numbers, rank: int) -> tuple[Numbers, Numbers, Numbers]:
    """U_k (m, k), S_k (k,) and V_k^T (k, n), each vector on its own.

    Each pair of vectors has a sign that no rule fixes; it is the one that float32 gives on this machine. With h as for
    `leading` and g the distance of s_i to its neighbours and to 0, both vectors turn by sin <= t = sqrt(2) h / (g - h)
    (Wedin), so an element v changes by t sqrt(1 - v^2) + t^2 |v| at most; nothing is known of a vector with t >= 1.
    """
    u, s, vt = _svd(x.mid if isinstance(x, Ball) else x)
    u, s, vt = u[:, : rank + 1], s[: rank + 1], vt[: rank + 1]
    if (x.mid if isinstance(x, Ball) else x).dtype == torch.float64:
        signs = _signs(x.mid if isinstance(x, Ball) else x, u, vt)
        u, vt = u * signs, signs[:, None] * vt
    if not isinstance(x, Ball):
        return u[:, :rank], s[:rank], vt[:rank]
    f = _flaw(x)
    shift = f * s[0] + x.rad.norm()
    steps = torch.cat([s.new_full((1,), torch.inf), s[:-1] - s[1:], s[-1:]])
    gaps = torch.minimum(steps[:-1], steps[1:])[:rank] - shift
    turns = torch.where(gaps > 0, 2**0.5 * shift / gaps, torch.inf)
    return (
        x.made(u[:, :rank], _turned(u[:, :rank], turns) + f),
        x.made(s[:rank], shift.expand(rank)),
        x.made(vt[:rank], _turned(vt[:rank], turns[:, None]) + f),
    )


def _turned(vectors: Tensor, sines: Tensor) -> Tensor:
    known = sines * (1 - vectors.square()).clamp_min(0).sqrt() + sines.square() * vectors.abs()
    return torch.where(sines < 1, known, 1 + vectors.abs())


def _signs(x: Tensor, u: Tensor, vt: Tensor) -> Tensor:
    """1 or -1 for each pair of vectors: which way the single-precision decomposition of the same matrix has it."""
    single_u, _, single_vt = _svd(x.to(torch.float32))
    count = int(u.shape[1])
    both = (u * single_u[:, :count]).sum(0) + (vt * single_vt[:count]).sum(1)
    return torch.where(both < 0, -1.0, 1.0).to(x.dtype)


def first_columns_span(x: Numbers, rank: int, scale: float) -> Numbers:
    """(s Q_k) R_k of W = Q R: s times W projected on the span of its first k columns.

    Householder's QR is that of W + E with |E e_j| <= f |w_j|, f = p(n) u (Higham, ASNA, theorem 19.4, with the p(n) of
    `backward`). The span turns by sin <= t = |E_k| / (s_k - |E_k|), s_k the least singular value of the first k
    columns; with P the projection on it,

        |P (T~ - T) e_j| <= |E e_j| + t |(W + E) e_j|          |P' (T~ - T) e_j| <= t |(W + E) e_j|
    """
    if not isinstance(x, Ball):
        q, r = _head(x, rank)
        return (q * scale) @ r
    q, r = _head(x.mid, rank)
    f, uncertain = _flaw(x), torch.linalg.vector_norm(x.rad, dim=0)[None]
    columns = torch.linalg.vector_norm(x.mid, dim=0)[None]
    shifts = f * columns + uncertain
    shift, least = shifts[:, :rank].norm().item(), torch.linalg.svdvals(x.mid[:, :rank])[-1].item()
    turn = min(1.0, shift / (least - shift)) if least > shift else 1.0
    lengths, columns = torch.linalg.vector_norm(q, dim=1), columns + shifts
    rows = lengths[:, None]
    moved_by = rows * (shifts + turn * columns) + turn * _beside(lengths)[:, None] * columns
    made = f * columns + gamma(rank + _ROUNDINGS, x.u + OWN) * (rows + turn + f) * columns
    return x.made(q @ r, moved_by + made + rank * UNDERFLOW) * scale


def _head(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q, r = _threaded(lambda: torch.linalg.qr(_wide(x)))
    return q[:, :rank].to(x.dtype), r[:rank].to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In a dtype that LAPACK has."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def seeded_low_rank(x: Tensor, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T of rank k as torch.svd_lowrank finds them on a CPU after torch.manual_seed(seed).

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and 5.1.
    """
    tall = x if x.shape[0] >= x.shape[1] else x.T
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(tall.shape[1], rank, generator=generator).to(x.dtype)

    def found() -> tuple[Tensor, Tensor, Tensor]:
        q = torch.linalg.qr(tall @ start).Q
        for _ in range(iterations):
            q = torch.linalg.qr(tall @ torch.linalg.qr(tall.mH @ q).Q).Q
        u, s, vt = torch.linalg.svd(q.mH @ tall, full_matrices=False)
        return q @ u, s, vt

    u, s, vt = _threaded(found)
    return (u, s, vt) if tall is x else (vt.mT, s, u.mT)


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD; each arithmetic asks for that of the same matrix anew, so a thread keeps its last few."""
    wide = _wide(x)
    key = (wide.dtype, wide.shape, hashlib.sha256(wide.contiguous().numpy().data).digest())
    if key not in _RECENT.found:
        _RECENT.found = dict([*_RECENT.found.items()][1 - _KEPT :])
        _RECENT.found[key] = tuple(_threaded(lambda: torch.linalg.svd(wide, full_matrices=False)))
    u, s, vt = (one.to(x.dtype) for one in _RECENT.found[key])
    return u, s, vt


def _threaded(decompose: Callable[[], Any]) -> Any:
    """One decomposition at a time, with the threads that a producer on this machine had."""
    with _ALONE:
        before = torch.get_num_threads()
        torch.set_num_threads(LAPACK_THREADS)
        try:
            return decompose()
        finally:
            torch.set_num_threads(before)


class _Recent(threading.local):
    """What the worker thread decomposed last, by dtype, shape and content."""

    def __init__(self) -> None:
        self.found: dict[Any, tuple[Tensor, ...]] = {}


_RECENT = _Recent()
_ALONE = threading.Lock()
