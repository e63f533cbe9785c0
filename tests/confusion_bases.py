"""Mistaken merges into another base, of another adapter, of whole tensors, of parts of a model; whole-tensor torch."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from confusion_scripts import Mistake, Write, folded, right
from confusion_worlds import DORA, PLAIN, Model, Piece, Scale, Target, merge, randn
from torch import Tensor

LINEAR = ("linear", "mlp", "rslora", "dora-linear", "fused")

# ------------------------------------------------------------------------------------------------------ quantised


def into(version: Callable[[Tensor], Tensor]) -> Write:
    """Merged into what a quantiser left of the base."""
    return lambda model, target, safe: folded(target, safe, base=version(target.base))


def four_bit(kind: str) -> Callable[[Tensor], Tensor]:
    """What bitsandbytes makes of a weight in 4 bits, and decodes."""

    def version(w: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(w.contiguous(), blocksize=64, quant_type=kind)
        return dequantize_4bit(codes, state).to(w.dtype)

    return version


def eight_bit(w: Tensor) -> Tensor:
    """LLM.int8(): each row in 255 steps of its largest modulus by 127."""
    half = w.half().float()
    largest = half.abs().amax(1, keepdim=True)
    return (torch.round(half * (127 / largest)) * (largest / 127)).to(w.dtype)


def levels(w: Tensor) -> Tensor:
    """Sixteen even steps between the ends of each block of 64, as quantisers of their own write."""
    blocks = w.float().reshape(-1, 64)
    low = blocks.amin(1, keepdim=True)
    step = (blocks.amax(1, keepdim=True) - low) / 15
    return (low + step * torch.round((blocks - low) / step)).reshape(w.shape).to(w.dtype)


def rounded_at_last(model: Model, target: Target, safe: bool) -> Tensor | None:
    return levels(merge(target, safe))


def drifted(times: int, then_merged: bool) -> Write:
    """Merged and unmerged so many times, stored in between."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        off = [replace(piece, scale=replace(piece.scale, alpha=-piece.scale.alpha)) for piece in target.pieces]
        once = [*target.pieces, *off[::-1]]
        return folded(target, safe, pieces=once * times + list(target.pieces) * then_merged)

    return write


# --------------------------------------------------------------------------------------------------- other adapters


def stranger(target: Target, rank: int, share: float = 1.0) -> Piece:
    """A piece of an adapter that nobody gave, as large as the right one."""
    rng = torch.Generator().manual_seed(zlib.crc32(target.name.encode()))
    own = (merge(target).float() - target.base.float()).norm()
    a, b = randn((rank, target.base.shape[1]), rng), randn((target.base.shape[0], rank), rng)
    scale = Scale(alpha=1, rank=1, usual_alpha=1, usual_rank=1)
    return Piece(scale=scale, a=a, b=b * (share * own / (b @ a).norm()))


def another_adapter(model: Model, target: Target, safe: bool) -> Tensor | None:
    return folded(target, safe, pieces=[stranger(target, 8)])


def one_more(model: Model, target: Target, safe: bool) -> Tensor | None:
    return folded(target, safe, pieces=[*target.pieces, stranger(target, 4)])


def more_than_the_cut(model: Model, target: Target, safe: bool) -> Tensor | None:
    """A change of every rank, of which the adapter is the part that a decomposition keeps."""
    rng = torch.Generator().manual_seed(zlib.crc32(target.name.encode()))
    own = folded(target, safe, base=torch.zeros_like(target.base, dtype=torch.float32))
    u, s, vt = torch.linalg.svd(own, full_matrices=False)
    rank = int((s > 1e-4 * s[0]).sum())
    rest = randn(target.base.shape, rng)
    rest -= u[:, :rank] @ (u[:, :rank].T @ rest)
    rest -= rest @ vt[:rank].T @ vt[:rank]
    rest *= 0.9 * s[rank - 1] / torch.linalg.matrix_norm(rest, 2)
    return (target.base.float() + own + rest).to(target.base.dtype)


def another_base(model: Model, target: Target, safe: bool) -> Tensor | None:
    rng = torch.Generator().manual_seed(zlib.crc32(target.name.encode()))
    return folded(target, safe, base=(target.base.float() + randn(target.base.shape, rng, 0.01)).to(target.base.dtype))


def one_number(value: float) -> Write:
    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        merged = merge(target, safe).clone()
        merged.view(-1)[17] = value
        return merged

    return write


def zeros(model: Model, target: Target, safe: bool) -> Tensor | None:
    return torch.zeros_like(target.base)


# ----------------------------------------------------------------------------------------------------- whole tensors


def not_replaced(model: Model, target: Target, safe: bool) -> Tensor | None:
    return target.base if target.saved is not None or target.rows is not None else None


def anew(model: Model, target: Target, safe: bool) -> Tensor | None:
    """A new layer's numbers in place of the saved ones."""
    if target.saved is None:
        return None
    rng = torch.Generator().manual_seed(zlib.crc32(target.name.encode()))
    return randn(target.base.shape, rng, 0.02).to(target.base.dtype)


def another_step(model: Model, target: Target, safe: bool) -> Tensor | None:
    """Part of the way to the saved numbers, and somewhat aside."""
    if target.saved is None:
        return None
    rng = torch.Generator().manual_seed(zlib.crc32(target.name.encode()))
    moved = target.saved.float() - target.base.float()
    aside = randn(moved.shape, rng) * moved.std()
    return (target.base.float() + 0.7 * moved + 0.3 * aside).to(target.base.dtype)


def some_rows(model: Model, target: Target, safe: bool) -> Tensor | None:
    """The first two of the trained rows alone."""
    if target.rows is None:
        return None
    merged = target.base.clone()
    merged[list(target.tokens[:2])] = target.rows[:2]
    return merged


def added(model: Model, target: Target, safe: bool) -> Tensor | None:
    if target.saved is not None:
        return target.base + target.saved
    if target.rows is None:
        return None
    merged = target.base.clone()
    merged[list(target.tokens)] += target.rows
    return merged


def rows_at(where: Callable[[Target], list[int]]) -> Write:
    """The trained rows written elsewhere."""

    def write(model: Model, target: Target, safe: bool) -> Tensor | None:
        if target.rows is None:
            return None
        merged = target.base.clone()
        merged[where(target)] = target.rows
        return merged

    return write


# ----------------------------------------------------------------------------------------------------------- patterns


def base_where(pattern: str) -> Write:
    """The base in every target of that name."""
    return lambda model, target, safe: target.base if re.search(pattern, target.name) else None


CARRIED = ("saved", "tokens", "biases")
EVERY: dict[str, Any] = {"besides": lambda tensor: tensor * 1.01}

BASES = (
    *(
        Mistake(code="LC155", way=kind, write=into(four_bit(kind)), worlds=LINEAR, dtypes=("bfloat16", "float16"))
        for kind in ("nf4", "fp4")
    ),
    Mistake(code="LC156", write=into(eight_bit), worlds=LINEAR, dtypes=("bfloat16", "float16")),
    Mistake(code="LC157", write=into(levels), worlds=("linear", "mlp", "rslora", "fused")),
    Mistake(code="LC160", write=rounded_at_last, worlds=LINEAR),
    *(
        Mistake(
            code="LC164",
            way=f"{times}{' and merged' * merged}",
            write=drifted(times, merged),
            worlds=("linear", "mlp", "in-out", "conv"),
            dtypes=("bfloat16", "float16"),
        )
        for times, merged in ((2, False), (1, True))
    ),
    Mistake(code="LC162", write=another_adapter, worlds=("linear", "mlp", "rslora", "patterns")),
    Mistake(code="LC163", write=one_more, worlds=("linear", "mlp", "rslora", "patterns")),
    Mistake(code="LC165", write=more_than_the_cut, worlds=("linear", "mlp", "rslora", "patterns")),
    Mistake(code="LC130", way="nan", write=one_number(float("nan")), worlds=(*PLAIN[:4], "saved")),
    Mistake(code="LC170", write=zeros, worlds=(*PLAIN, *DORA, *CARRIED)),
    Mistake(code="LC403", write=not_replaced, worlds=CARRIED),
    Mistake(code="LC402", write=right, worlds=PLAIN, besides=lambda tensor: tensor + 1),
    Mistake(code="LC404", write=another_base, worlds=(*PLAIN[:4], *DORA[:1]), **EVERY),
    Mistake(code="LC410", write=added, worlds=CARRIED),
    Mistake(code="LC411", way="at the start", write=rows_at(lambda one: [0, 1, 2, 3]), worlds=("tokens",)),
    Mistake(
        code="LC411", way="by one", write=rows_at(lambda one: [token + 1 for token in one.tokens]), worlds=("tokens",)
    ),
    Mistake(code="LC411", way="sorted", write=rows_at(lambda one: sorted(one.tokens)), worlds=("tokens",)),
    Mistake(code="LC412", write=anew, worlds=("saved",)),
    Mistake(code="LC413", write=another_step, worlds=("saved",)),
    Mistake(code="LC416", write=some_rows, worlds=("tokens",)),
    Mistake(code="LC501", write=base_where("k_proj|gate_proj|c_fc"), worlds=("linear", "mlp", "in-out", "two")),
    Mistake(code="LC502", write=base_where(r"(layers|h)\.0\."), worlds=("linear", "mlp", "in-out", "deep")),
    Mistake(code="LC503", write=base_where(r"experts\.[23]\."), worlds=("mixture",)),
    Mistake(code="LC506", write=base_where(r"layers\.[23]\."), worlds=("deep",)),
)
