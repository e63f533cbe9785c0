"""Mistaken merges for the confusion matrix, each a few lines of whole-tensor torch, written from what its page says.

No forward model of the package is used: the same function must not build a case and judge it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from confusion_worlds import DORA, PLAIN, Model, Piece, Scale, Target, delta_of, lengths, merge, step
from torch import Tensor

Write = Callable[[Model, Target, bool], Tensor | None]
TUNERS = ("loha", "lokr", "vera", "ia3", "oft")
ADDED = ("loha", "lokr")
SQUARE = ("linear", "in-out", "embedding", "mlp", "two", "dora-linear", "dora-in-out")


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A mistaken script.

    code      the true name          way      which of its ways, where it has several
    write     (model, target, safe) -> the tensor it writes; None: it writes the right one
    worlds    where it can happen    dtypes   of the files, where not all
    besides   what it does to bystanders
    swapped   the files are right, and are given in each other's place
    ranks     the seeds whose ranks allow it: remainders modulo 2
    """

    code: str
    way: str = ""
    write: Write
    worlds: Sequence[str] = PLAIN
    dtypes: Sequence[str] = ("bfloat16", "float16", "float32")
    besides: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)
    swapped: bool = False
    ranks: Sequence[int] = (0, 1)

    @property
    def name(self) -> str:
        return f"{self.code} {self.way}".strip()

    def merged(self, model: Model, safe: bool) -> dict[str, Tensor]:
        """The file that it leaves."""
        file = {one.name: self.write(model, one, safe) for one in model.targets}
        right = {one.name: merge(one, safe) for one in model.targets if file[one.name] is None}
        return {**file, **right, **{name: self.besides(tensor) for name, tensor in model.bystanders.items()}}


def folded(
    target: Target,
    safe: bool,
    s: Callable[[Piece], float] | None = None,
    delta: Callable[[Piece], Tensor] | None = None,
    base: Tensor | None = None,
    pieces: Sequence[Piece] | None = None,
) -> Tensor:
    """The merge with another scale, another unscaled delta, another base, or other pieces."""
    w = target.base if base is None else base
    for piece in target.pieces if pieces is None else pieces:
        w = step(w, target.kind, piece, safe, s and s(piece), delta and delta(piece))
    return w


def scaled(change: Callable[[Scale], float]) -> Write:
    """Every scale replaced; the right tensor where no scale moves."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        if all(change(one.scale) == one.scale.value for one in target.pieces):
            return None
        return folded(target, safe, s=lambda piece: change(piece.scale))

    return write


def times(factor: float) -> Write:
    return scaled(lambda scale: factor * scale.value)


# ------------------------------------------------------------------------------------------------ LC101 to LC120


def not_applied(model: Model, target: Target, safe: bool) -> Tensor | None:
    return target.base if target.pieces else None


def twice(model: Model, target: Target, safe: bool) -> Tensor | None:
    return folded(target, safe, pieces=(*target.pieces, *target.pieces)) if target.pieces else None


def transposed(model: Model, target: Target, safe: bool) -> Tensor | None:
    if target.base.ndim != 2 or target.base.shape[0] != target.base.shape[1] or not target.pieces:
        return None
    return folded(target, safe, delta=lambda piece: delta_of(target.kind, piece).T)


def delta_only(model: Model, target: Target, safe: bool) -> Tensor | None:
    return folded(target, safe, base=torch.zeros_like(target.base)) if target.pieces else None


def no_magnitude(model: Model, target: Target, safe: bool) -> Tensor | None:
    return folded(target, safe, pieces=[Piece(scale=one.scale, a=one.a, b=one.b) for one in target.pieces])


def of_another(key: str, which: int) -> Write:
    """The rank or the alpha that a pattern gives to other modules."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        found = list(dict.fromkeys(model.adapters[0][0][key].values()))[which:]
        if not found or len(target.pieces) != 1:
            return None
        change = {"rank_pattern": "rank", "alpha_pattern": "alpha"}[key]
        return scaled(lambda one: replace(one, **{change: found[0]}).value)(model, target, safe)

    return write


def bias_unscaled(model: Model, target: Target, safe: bool) -> Tensor | None:
    return folded(target, safe, s=lambda piece: 1.0) if target.kind == "bias" else None


def right(model: Model, target: Target, safe: bool) -> Tensor | None:
    return None


def narrowed(dtype: torch.dtype) -> dict[str, object]:
    """Merged as it should be and converted on the way."""

    def write(model: Model, target: Target, safe: bool) -> Tensor:
        return merge(target, safe).to(dtype).to(target.base.dtype)

    return {"write": write, "besides": lambda tensor: tensor.to(dtype).to(tensor.dtype)}


def held(dtype: torch.dtype) -> dict[str, object]:
    """Loaded in a narrower dtype and merged there."""

    def write(model: Model, target: Target, safe: bool) -> Tensor:
        whole = None if target.saved is None else target.saved.to(dtype)
        return (folded(target, safe, base=target.base.to(dtype)) if whole is None else whole).to(target.base.dtype)

    return {"write": write, "besides": lambda tensor: tensor.to(dtype).to(tensor.dtype)}


BASIC = (
    Mistake(code="LC101", write=not_applied, worlds=(*PLAIN, *DORA, *TUNERS, "saved")),
    Mistake(code="LC102", way="again", write=twice, worlds=(*PLAIN, *DORA, *TUNERS)),
    Mistake(code="LC102", way="at once", write=times(2), worlds=(*PLAIN, *ADDED)),
    Mistake(code="LC103", write=times(-1), worlds=(*PLAIN, *DORA, *ADDED)),
    Mistake(code="LC104", write=transposed, worlds=SQUARE),
    Mistake(code="LC105", write=delta_only, worlds=(*PLAIN, *ADDED)),
    Mistake(code="LC106", write=no_magnitude, worlds=DORA),
    Mistake(code="LC107", write=scaled(lambda one: one.alpha / one.rank), worlds=("rslora",)),
    Mistake(code="LC108", write=scaled(lambda one: one.alpha), worlds=(*PLAIN, *DORA, *ADDED)),
    Mistake(
        code="LC109",
        way="both",
        write=scaled(lambda one: one.usual_alpha / (math.sqrt(one.usual_rank) if one.rslora else one.usual_rank)),
        worlds=("linear", "patterns", "rslora", "in-out", "conv", "dora-linear"),
    ),
    Mistake(
        code="LC109",
        way="alpha",
        write=scaled(lambda one: one.usual_alpha / (math.sqrt(one.rank) if one.rslora else one.rank)),
        worlds=("patterns",),
    ),
    Mistake(
        code="LC109",
        way="rank",
        write=scaled(lambda one: one.alpha / (math.sqrt(one.usual_rank) if one.rslora else one.usual_rank)),
        worlds=("patterns", "linear"),
    ),
    *(
        Mistake(
            code="LC109",
            way=f"{key.removesuffix('_pattern')} of another, {which}",
            write=of_another(key, which),
            worlds=("patterns",),
        )
        for key in ("rank_pattern", "alpha_pattern")
        for which in (0, 1)
    ),
    *(Mistake(code="LC110", way=f"x {k}", write=times(k), worlds=(*PLAIN, *ADDED)) for k in (1.3, 0.7, -0.45)),
    Mistake(code="LC111", write=scaled(lambda one: 1.0), worlds=(*PLAIN, *DORA, *ADDED)),
    Mistake(
        code="LC112",
        write=scaled(lambda one: one.alpha / math.sqrt(one.rank)),
        worlds=[one for one in (*PLAIN, *DORA) if one != "rslora"],
    ),
    Mistake(code="LC113", write=right, worlds=(*PLAIN, *DORA), swapped=True),
    Mistake(code="LC114", write=bias_unscaled, worlds=("bias",)),
    *(
        Mistake(code="LC120", way=f"{way} {name}", worlds=(*PLAIN, *DORA, "saved"), dtypes=dtypes, **make(dtype))
        for way, make in (("through", narrowed), ("held in", held))
        for name, dtype, dtypes in (
            ("bf16", torch.bfloat16, ("float16", "float32")),
            ("fp16", torch.float16, ("float32",)),
        )
    ),
)

# ------------------------------------------------------------------------------------------------ LC121 to LC132

WEIGHTED = ("one-weighted", "two-weighted")
SEVERAL = ("two", "two-weighted", "two-alike")


def by_adapter(scales: Callable[[Sequence[Scale]], Sequence[float]]) -> Write:
    """Each adapter with another scale, made of those of all."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        chosen = scales([piece.scale for piece in target.pieces])
        w = target.base
        for piece, s in zip(target.pieces, chosen, strict=True):
            w = step(w, target.kind, piece, safe, s)
        return w

    return write


def ranks(start: Fraction, stop: Fraction, own: bool) -> Write:
    """Only a part of the rank, with the scale of the whole or its own; a rank that cannot be so divided is whole."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        w = target.base
        if any(piece.scale.rank % start.denominator or piece.scale.rank % stop.denominator for piece in target.pieces):
            return None
        for piece in target.pieces:
            assert piece.a is not None
            assert piece.b is not None
            r = piece.scale.rank
            part = slice(int(start * r), int(stop * r))
            count = part.stop - part.start
            grown = (r / count) ** (0.5 if piece.scale.rslora else 1) if own else 1.0
            cut = Piece(scale=piece.scale, a=piece.a[part], b=piece.b[:, part], m=piece.m)
            w = step(w, target.kind, cut, safe, piece.scale.value * grown)
        return w

    return write


def only(*adapters: int) -> Write:
    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        return folded(target, safe, pieces=[one for one in target.pieces if one.adapter in adapters])

    return write


def crossed(on_a: Callable[[Scale], float], on_b: Callable[[Scale], float]) -> Write:
    """(sum of b_i B_i) (sum of a_i A_i)."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        a = sum(on_a(one.scale) * one.a for one in target.pieces if one.a is not None)
        b = sum(on_b(one.scale) * one.b for one in target.pieces if one.b is not None)
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        return folded(target, safe, pieces=[Piece(scale=ONE, a=a, b=b)])

    return write


HALF = Fraction(1, 2)
ONE = Scale(alpha=1, rank=1, usual_alpha=1, usual_rank=1)


def root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def norms_of(v: Tensor, kind: str, turned: bool) -> Tensor:
    """The norms of the outputs, or along the other axis."""
    return lengths(v, {"linear": "in-out"}.get(kind, "linear") if turned else kind)


def magnitude(how: str) -> Write:
    """DoRA with another formula, as its page lists them."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        (piece,) = target.pieces
        w = target.base
        if how == "square" and w.shape[0] != w.shape[1]:
            return None
        assert piece.m is not None
        d = delta_of(target.kind, piece) * piece.scale.value
        v = w + d.to(w.dtype) if safe else w.float() + d
        norms = norms_of(w.to(v.dtype) if how == "base" else v, target.kind, how in ("axis", "square"))
        m = piece.m.float().reshape(norms_of(v, target.kind, how == "square").shape)
        ratio = m if how == "undivided" else (m / norms).to(v.dtype)
        if how == "delta alone":
            return (w.to(v.dtype) + ratio * d.to(v.dtype)).to(w.dtype)
        return (ratio * w.to(v.dtype) + d.to(v.dtype) if how == "base alone" else ratio * v).to(w.dtype)

    return write


def bias_left_out(model: Model, target: Target, safe: bool) -> Tensor | None:
    return target.base if target.kind == "bias" else None


FACTORED = ("linear", "mlp", "rslora", "patterns", "in-out", "embedding", "dora-linear")
SCALES = (
    Mistake(code="LC121", write=scaled(lambda one: one.value**2), worlds=(*PLAIN, *DORA, *ADDED, *WEIGHTED)),
    Mistake(code="LC122", way="squared", write=scaled(lambda one: one.weight * one.value), worlds=WEIGHTED),
    Mistake(code="LC122", way="root", write=scaled(lambda one: root(one.weight) * one.bare), worlds=WEIGHTED),
    Mistake(code="LC123", way="all 1", write=scaled(lambda one: one.bare), worlds=WEIGHTED),
    Mistake(code="LC123", way="halves", write=scaled(lambda one: one.bare / 2), worlds=("two-weighted",)),
    Mistake(
        code="LC123",
        way="of one",
        write=by_adapter(lambda all_: [all_[0].value, all_[1].bare]),
        worlds=("two-weighted",),
    ),
    Mistake(
        code="LC124",
        way="scale of the first for all",
        write=by_adapter(lambda all_: [all_[0].bare * one.weight for one in all_]),
        worlds=SEVERAL,
    ),
    Mistake(
        code="LC124",
        way="scales exchanged",
        write=by_adapter(lambda all_: [other.bare * one.weight for one, other in zip(all_, all_[::-1], strict=True)]),
        worlds=SEVERAL,
    ),
    Mistake(
        code="LC124",
        way="weights exchanged",
        write=by_adapter(lambda all_: [one.bare * other.weight for one, other in zip(all_, all_[::-1], strict=True)]),
        worlds=("two-weighted",),
    ),
    *(
        Mistake(code="LC125", way=name, write=scaled(formula), worlds=(*PLAIN, "dora-linear", *ADDED))
        for name, formula in {
            "alpha r": lambda one: one.alpha * (math.sqrt(one.rank) if one.rslora else one.rank),
            "r / alpha": lambda one: (math.sqrt(one.rank) if one.rslora else one.rank) / one.alpha,
            "1 / r": lambda one: 1 / (math.sqrt(one.rank) if one.rslora else one.rank),
        }.items()
    ),
    Mistake(
        code="LC125",
        way="alpha / r^2",
        write=scaled(lambda one: one.alpha / one.rank**2),
        worlds=[one for one in PLAIN if one != "rslora"],
    ),
    *(
        Mistake(code="LC126", way=f"{way}{' own scale' * own}", write=ranks(*part, own), worlds=FACTORED)
        for way, part in {"first half": (Fraction(0), HALF), "last half": (HALF, Fraction(1))}.items()
        for own in (False, True)
    ),
    Mistake(
        code="LC126",
        way="middle third",
        write=ranks(Fraction(1, 3), Fraction(2, 3), False),
        worlds=("mlp", "linear"),
        ranks=(0,),
    ),
    Mistake(code="LC127", way="first alone", write=only(0), worlds=SEVERAL),
    Mistake(code="LC127", way="last alone", write=only(1), worlds=SEVERAL),
    Mistake(
        code="LC128",
        way="roots",
        write=crossed(lambda one: root(one.value), lambda one: root(abs(one.value))),
        worlds=("two-alike",),
    ),
    Mistake(
        code="LC128", way="scale on A", write=crossed(lambda one: one.value, lambda one: 1.0), worlds=("two-alike",)
    ),
    Mistake(
        code="LC128",
        way="halves on both",
        write=crossed(lambda one: one.bare / 2, lambda one: 0.5),
        worlds=("two-alike",),
    ),
    *(
        Mistake(code="LC131", way=how, write=magnitude(how), worlds=[one for one in DORA if one != "dora-conv"])
        for how in ("base", "undivided", "axis", "square", "delta alone", "base alone")
    ),
    Mistake(code="LC132", write=bias_left_out, worlds=("bias",)),
)
