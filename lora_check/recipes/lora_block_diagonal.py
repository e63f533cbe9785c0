"""W' = W + s B A, where A or B is a diagonal of blocks and stored as these blocks alone.

W   base     (out, in)
A   factor   (r, in), or n blocks (r / n, in / n) below one another, (r, in / n)
B   factor   (out, r), or n blocks (out / n, r / n) below one another, (out, r / n)
s   scale    as for LoRA

use_bdlora has n as `nblocks` and says by pieces of module names which of the two is in blocks. PEFT stores the delta
in the weight's dtype before it adds it. Source: Wang et al., "Block-Diagonal LoRA for Eliminating Communication
Overhead in Tensor Parallel LoRA Serving" (2025), section 3; PEFT tuners/lora/variants.py
BdLoraLinearVariant._get_bdlora_delta_weight, BlockDiagonalLinear.weight_as_blockdiagonal_matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_check.recipes._low_rank import in_out, out_in
from lora_check.types import Factors, Hand, Numbers, Recipe, Site

if TYPE_CHECKING:
    from torch import Tensor


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """A and B at full size."""
    packed, count = _in_blocks(site), site.settings["use_bdlora"]["nblocks"]
    return {**factors, packed: _unpacked(factors[packed], count)}


def _unpacked(blocks: Numbers, count: int) -> Numbers:
    """The blocks, below one another, put on a diagonal."""
    from lora_check.functions import moved

    size, width = int(blocks.shape[0]) // count, int(blocks.shape[1])

    def unpack(x: Tensor) -> Tensor:
        full = x.new_zeros(size * count, width * count)
        for i in range(count):
            rows = slice(i * size, (i + 1) * size)
            full[rows, i * width : (i + 1) * width] = x[rows]
        return full

    return moved(blocks, unpack)


def _in_blocks(site: Site) -> str:
    """Which factor the configuration says to be in blocks, "A" or "B"; nothing, if it says neither or both."""
    said, module = site.settings.get("use_bdlora"), site.parameter.rpartition(".")[0]
    if not isinstance(said, Mapping):
        return ""
    pieces = {one: said.get(f"target_modules_bd_{one.lower()}") or () for one in "AB"}
    named = [one for one in "AB" if any(str(piece) in module for piece in pieces[one])]
    return named[0] if len(named) == 1 else ""


def fits(site: Site) -> bool:
    """A factor in blocks beside a whole one, over a weight stored (out, in)."""
    packed, roles, shape = _in_blocks(site), site.roles, site.shape
    if not packed or set(roles) != {"A", "B"} or len(shape) != 2 or site.in_out or site.multihead:
        return False
    count, rank = site.settings["use_bdlora"].get("nblocks"), roles["A"][0]
    if not isinstance(count, int) or count < 1 or rank % count:
        return False
    wanted = {"A": (rank, shape[1]), "B": (shape[0], rank)}
    wide, tall = wanted[packed][1], wanted[packed][0]
    wanted[packed] = (tall, wide // count)
    return wide % count == 0 and tall % count == 0 and dict(roles) == wanted


RECIPE = Recipe(
    name="lora-block-diagonal",
    formula="W' = W + s B A, one of them in blocks",
    fits=fits,
    prepare=prepare,
    product=out_in,
    flipped=in_out,
    stored=True,
)
