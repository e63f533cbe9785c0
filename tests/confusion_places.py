"""Mistaken merges that put the right delta in the wrong place, for the confusion matrix; whole-tensor torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from confusion_scripts import Mistake, Write, folded
from confusion_worlds import HEADS, Model, Piece, Target, by_expert, delta_of
from torch import Tensor

SIZE = HEADS["head_dim"]
QUERIES, PAIRS = HEADS["num_attention_heads"], HEADS["num_key_value_heads"]
SPLIT = ("linear", "rslora", "dora-linear")


def moved(change: Callable[[Tensor], Tensor], *families: str) -> Write:
    """The rows, or the columns, of each delta changed, in the targets of these families."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        if families and target.family not in families:
            return None
        return folded(target, safe, delta=lambda piece: change(delta_of(target.kind, piece)))

    return write


# ------------------------------------------------------------------------------------------------ rows of heads


def interleaved(d: Tensor) -> Tensor:
    """Halves of each head to neighbours."""
    return d.reshape(-1, 2, SIZE // 2, d.shape[1]).transpose(1, 2).reshape(d.shape)


def halved(d: Tensor) -> Tensor:
    """Neighbours of each head to halves."""
    return d.reshape(-1, SIZE // 2, 2, d.shape[1]).transpose(1, 2).reshape(d.shape)


def in_fused(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same in the rows of q and k of a fused projection."""
    rows = (QUERIES + PAIRS) * SIZE
    return lambda d: torch.cat([change(d[:rows]), d[rows:]])


# --------------------------------------------------------------------------------------------- fused projections


def parts(d: Tensor) -> list[Tensor]:
    """q, k and v, or gate and up."""
    if d.shape[0] == (QUERIES + 2 * PAIRS) * SIZE:
        return list(d.split([QUERIES * SIZE, PAIRS * SIZE, PAIRS * SIZE]))
    return list(d.chunk(2))


def group_by_group(d: Tensor) -> Tensor:
    """q|k|v as a group of heads after the other keeps them: its queries, its key, its value."""
    split = [part.reshape(PAIRS, -1, SIZE, d.shape[1]) for part in parts(d)]
    return torch.cat(split, dim=1).reshape(d.shape)


def in_turn(d: Tensor) -> Tensor:
    """gate|up as a row of each in turn."""
    return torch.stack(parts(d), dim=1).reshape(d.shape)


def ordered(*order: int) -> Callable[[Tensor], Tensor]:
    return lambda d: torch.cat([parts(d)[i] for i in order])


def placed(*sources: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Each part gets the sum of some."""

    def change(d: Tensor) -> Tensor:
        own = parts(d)
        pairs = zip(own, sources, strict=True)
        return torch.cat([sum((own[i] for i in chosen), torch.zeros_like(at)) for at, chosen in pairs])

    return change


def rank_shared(model: Model, target: Target, safe: bool) -> Tensor | None:
    """Part i has the i-th share of the rank alone."""
    if target.family not in ("qkv_proj", "gate_up_proj"):
        return None

    def delta(piece: Piece) -> Tensor:
        assert piece.a is not None
        assert piece.b is not None
        rows = parts(piece.b)
        shares = zip(rows, piece.a.chunk(len(rows)), torch.arange(piece.a.shape[0]).chunk(len(rows)), strict=True)
        return torch.cat([b[:, at] @ a for b, a, at in shares])

    return folded(target, safe, delta=delta)


def without(part: int) -> Write:
    """One part of a fused file left out."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        if target.family != "qkv_proj":
            return None
        return folded(target, safe, pieces=[one for index, one in enumerate(target.pieces) if index != part])

    return write


def in_window_of(part: int, into: int) -> Write:
    """The delta of one part of a fused file added to the rows of another of its size, which keeps its own."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        if target.family != "qkv_proj":
            return None
        pieces = list(target.pieces)
        pieces[part] = replace(pieces[part], window=pieces[into].window)
        return folded(target, safe, pieces=pieces)

    return write


def factor_in(families: Sequence[str], factor: float) -> Write:
    """The scale wrong by a factor in some families alone."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        if target.family not in families:
            return None
        return folded(target, safe, s=lambda piece: factor * piece.scale.value)

    return write


# ------------------------------------------------------------------------------------------- deltas of other targets


def delta_from(where: Callable[[str], str]) -> Write:
    """The delta of the target whose name `where` gives; the right one if there is none, or it is itself."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        other = model.target(where(target.name))
        if other is None or other.name == target.name or not other.pieces:
            return None
        return folded(target, safe, pieces=other.pieces)

    return write


def renamed(**names: str) -> Write:
    """Families taken for one another."""

    def where(name: str) -> str:
        family = name.split(".")[-2]
        return name.replace(family, names[family]) if family in names else name

    return delta_from(where)


def renumbered(before: str, number: Callable[[int], int]) -> Write:
    """The number after a path element replaced: 'layers', 'experts'."""

    def where(name: str) -> str:
        words = name.split(".")
        if before not in words[:-2]:
            return name
        at = words.index(before) + 1
        return ".".join([*words[:at], str(number(int(words[at]))), *words[at + 1 :]])

    return delta_from(where)


def experts(change: Callable[[Tensor, Tensor, int], Tensor]) -> Write:
    """A stack of experts with their factors taken in another way."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        count = target.base.shape[0]

        def delta(piece: Piece) -> Tensor:
            assert piece.a is not None
            assert piece.b is not None
            return change(piece.a, piece.b, count)

        return folded(target, safe, delta=delta)

    return write


def a_by_rank(a: Tensor, count: int) -> Tensor:
    return a.reshape(-1, count, a.shape[1]).transpose(0, 1).reshape(a.shape)


def b_by_expert(b: Tensor, count: int) -> Tensor:
    return b.reshape(b.shape[0], count, -1).transpose(1, 2).reshape(b.shape)


# -------------------------------------------------------------------------------------------------------- factors


def reread(of_a: Callable[[Tensor], Tensor], of_b: Callable[[Tensor], Tensor]) -> Write:
    """The product of factors that were read in another way."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        pieces = [replace(one, a=of_a(one.a), b=of_b(one.b)) for one in target.pieces if one.a is not None]
        return folded(target, safe, pieces=pieces)

    return write


def as_it_is(factor: Tensor) -> Tensor:
    return factor


def read_turned(factor: Tensor) -> Tensor:
    """The bytes of (r, in) read as (in, r), and turned."""
    return factor.contiguous().reshape(factor.shape[1], factor.shape[0]).T


def turned_read(factor: Tensor) -> Tensor:
    """Turned to (in, r), whose bytes are read as (r, in)."""
    return factor.T.contiguous().reshape(factor.shape)


def as_fp16(factor: Tensor) -> Tensor:
    return factor.to(torch.bfloat16).view(torch.float16).float()


def sliced(axis: int, ranks: int, which: int) -> Callable[[Tensor], Tensor]:
    """Zero outside one slice."""

    def change(d: Tensor) -> Tensor:
        width = d.shape[axis] // ranks
        kept = torch.zeros_like(d)
        kept.narrow(axis, which * width, width).copy_(d.narrow(axis, which * width, width))
        return kept

    return change


def kernel(change: Callable[[Tensor], Tensor]) -> Write:
    """A convolution's delta with its kernel in another order; kernels of one tap cannot show it."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        if target.base.shape[2:] == (1, 1):
            return None
        return folded(target, safe, delta=lambda piece: change(delta_of("conv", piece)))

    return write


def laid_channels_last(d: Tensor) -> Tensor:
    return d.movedim(1, -1).reshape(d.shape)


def read_channels_last(d: Tensor) -> Tensor:
    return d.reshape(d.shape[0], *d.shape[2:], d.shape[1]).movedim(-1, 1)


def transposed_taps(d: Tensor) -> Tensor:
    return d.transpose(2, 3) if d.shape[2] == d.shape[3] else d


ROW_PARALLEL: Mapping[str, Sequence[str]] = {
    "linear": ("o_proj",),
    "mlp": ("down_proj", "dense"),
    "in-out": ("c_proj",),
}
STACK = ("experts",)

PLACES = (
    *(
        Mistake(code="LC140", way=way, write=moved(change, "q_proj", "k_proj"), worlds=SPLIT)
        for way, change in (("interleaved", interleaved), ("halved", halved))
    ),
    Mistake(code="LC140", way="fused", write=moved(in_fused(interleaved), "qkv_proj"), worlds=("fused",)),
    Mistake(code="LC141", way="group by group", write=moved(group_by_group, "qkv_proj"), worlds=("fused",)),
    Mistake(code="LC141", way="k|v exchanged", write=moved(ordered(0, 2, 1), "qkv_proj"), worlds=("fused",)),
    Mistake(code="LC141", way="v|q|k", write=moved(ordered(2, 0, 1), "qkv_proj"), worlds=("fused",)),
    Mistake(code="LC141", way="up|gate", write=moved(ordered(1, 0), "gate_up_proj"), worlds=("fused",)),
    Mistake(code="LC141", way="in turn", write=moved(in_turn, "gate_up_proj"), worlds=("fused",)),
    Mistake(code="LC142", way="v left out", write=moved(placed([0], [1], []), "qkv_proj"), worlds=("fused",)),
    Mistake(code="LC142", way="v of a file left out", write=without(2), worlds=("fused-file",)),
    Mistake(code="LC142", way="q alone", write=moved(placed([0], [], []), "qkv_proj"), worlds=("fused",)),
    Mistake(code="LC142", way="k and v in k", write=moved(placed([0], [1, 2], []), "qkv_proj"), worlds=("fused",)),
    Mistake(code="LC142", way="gate alone", write=moved(placed([0], []), "gate_up_proj"), worlds=("fused",)),
    Mistake(code="LC142", way="one after the other", write=in_window_of(2, 1), worlds=("fused-file",)),
    Mistake(code="LC143", way="qkv / 3", write=factor_in(["qkv_proj"], 1 / 3), worlds=("fused",)),
    Mistake(code="LC143", way="gate_up / 2", write=factor_in(["gate_up_proj"], 1 / 2), worlds=("fused",)),
    Mistake(code="LC144", write=rank_shared, worlds=("fused",), ranks=(0,)),
    Mistake(code="LC145", way="k and v", write=renamed(k_proj="v_proj", v_proj="k_proj"), worlds=(*SPLIT, "patterns")),
    Mistake(code="LC145", way="q in o", write=renamed(o_proj="q_proj"), worlds=SPLIT),
    Mistake(code="LC145", way="gate and up", write=renamed(gate_proj="up_proj", up_proj="gate_proj"), worlds=("mlp",)),
    Mistake(code="LC146", way="next", write=renumbered("layers", lambda i: i + 1), worlds=("deep",)),
    Mistake(code="LC146", way="before", write=renumbered("layers", lambda i: i - 1), worlds=("deep",)),
    Mistake(code="LC146", way="reversed", write=renumbered("layers", lambda i: 3 - i), worlds=("deep",)),
    Mistake(code="LC147", way="next", write=renumbered("experts", lambda i: (i + 1) % 4), worlds=("mixture",)),
    Mistake(code="LC147", way="reversed", write=renumbered("experts", lambda i: 3 - i), worlds=("mixture",)),
    Mistake(
        code="LC147", way="stack reversed", write=experts(lambda a, b, n: by_expert(a, b, n).flip(0)), worlds=STACK
    ),
    Mistake(
        code="LC147", way="stack turned", write=experts(lambda a, b, n: by_expert(a, b, n).roll(1, 0)), worlds=STACK
    ),
    Mistake(code="LC148", way="A", write=experts(lambda a, b, n: by_expert(a_by_rank(a, n), b, n)), worlds=STACK),
    Mistake(code="LC148", way="B", write=experts(lambda a, b, n: by_expert(a, b_by_expert(b, n), n)), worlds=STACK),
    Mistake(
        code="LC148",
        way="A and B",
        write=experts(lambda a, b, n: by_expert(a_by_rank(a, n), b_by_expert(b, n), n)),
        worlds=STACK,
    ),
    *(
        Mistake(
            code="LC149",
            way=f"{roles} {read.__name__.replace('_', ' ')}",
            write=reread(read if "A" in roles else as_it_is, read if "B" in roles else as_it_is),
            worlds=("linear", "mlp", "in-out", "embedding", "dora-linear"),
        )
        for read in (read_turned, turned_read)
        for roles in ("A", "B", "AB")
    ),
    *(
        Mistake(
            code="LC150",
            way=roles,
            write=reread(as_fp16 if "A" in roles else as_it_is, as_fp16 if "B" in roles else as_it_is),
            worlds=("bf16-factors",),
            dtypes=("bfloat16", "float32"),
        )
        for roles in ("A", "B", "AB")
    ),
    *(
        Mistake(code="LC151", way=f"{world} x {k}", write=factor_in(families, k), worlds=(world,), ranks=(1,))
        for world, families in ROW_PARALLEL.items()
        for k in (2, 4)
    ),
    *(
        Mistake(
            code="LC152",
            way=f"{'columns' if axis else 'rows'} {which + 1} of {ranks}",
            write=moved(sliced(axis, ranks, which)),
            worlds=("linear", "mlp", "in-out", "embedding"),
        )
        for axis, ranks, which in ((0, 2, 0), (1, 2, 1), (0, 4, 2), (1, 8, 3))
    ),
    *(
        Mistake(code="LC153", way=change.__name__.replace("_", " "), write=kernel(change), worlds=("conv",))
        for change in (laid_channels_last, read_channels_last)
    ),
)
