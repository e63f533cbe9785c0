"""MiSS and its predecessor Bone: the same two formulas over a shared block, under other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_check.types import Factors, Hand, Method, Numbers, Site

KINDS = ("bat", "mini")
"""Values of `init_weights` that choose a formula; true and false choose the plain one."""


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """Which formula `init_weights` chooses, and over how many outputs a "mini" block is repeated.

    raises   ValueError: a value that no release has
    """
    kind = raw.get("init_weights")
    if isinstance(kind, str) and kind not in KINDS:
        raise ValueError(f"init_weights={kind!r} is not known to this version")
    return {"kind": kind if kind in KINDS else "plain", "mini": raw.get("mini_r") or 1}


MISS = Method(
    name="MISS",
    roles={"miss_block": "block"},
    keys=frozenset({"bias", "mini_r", "miss_dropout"}),
    settings=settings,
)
BONE = Method(name="BONE", roles={"bone_block": "block"}, keys=frozenset({"bias"}), settings=settings)


def is_shared(site: Site) -> bool:
    """A block (r, out), or (r, mini_r) with mini_r a divisor of out, over a weight (out, in) with in >= r."""
    if not _over_matrix(site) or len(site.roles["block"]) != 2 or site.settings["kind"] == "bat":
        return False
    (rank, outputs), (rows, columns) = site.roles["block"], site.shape
    repeats = site.settings["kind"] == "mini"
    width = site.settings["mini"] if repeats else rows
    return outputs == width and rows % width == 0 and rank <= columns


def is_tiled(site: Site) -> bool:
    """A square block for each band of r outputs, (out / r, r, r), and in a multiple of r."""
    if not _over_matrix(site) or len(site.roles["block"]) != 3 or site.settings["kind"] != "bat":
        return False
    (bands, *square), (rows, columns) = site.roles["block"], site.shape
    return square == [square[0]] * 2 and bands * square[0] == rows and columns % square[0] == 0


def _over_matrix(site: Site) -> bool:
    return site.leaf == "weight" and len(site.shape) == 2 and set(site.roles) == {"block"}


def repeated(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The block turned over, (out, r), a "mini" one repeated; and the width it has to cover."""
    from lora_check.functions import moved

    times = site.shape[0] // site.roles["block"][1]
    return {"shared": moved(factors["block"], lambda x: x.T.repeat(times, 1)), "columns": site.shape[1]}


def shared(factors: Factors, rows: slice) -> Numbers:
    """D[i mod r, o] of those rows o."""
    from lora_check.functions import moved

    block, columns = factors["shared"][rows], factors["columns"]
    times = -(-columns // int(block.shape[1]))
    return moved(block, lambda x: x.repeat(1, times)[:, :columns])


def tiled(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """W + T D + D for each r x r tile T, D being the block of the tile's outputs."""
    import torch

    from lora_check.functions import moved

    blocks = factors["block"]
    size = int(blocks.shape[-1])
    outputs = torch.arange(rows.start, rows.start + int(w.shape[0]))
    band = moved(blocks, lambda x: x[outputs // size])
    added = moved(blocks, lambda x: x[outputs // size, outputs % size].unsqueeze(1))
    pieces = moved(w, lambda x: x.reshape(x.shape[0], -1, size))
    return w + hand.keep(moved(pieces @ band + added, lambda x: x.reshape(x.shape[0], -1)))
