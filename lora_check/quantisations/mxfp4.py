"""MXFP4 as gpt-oss keeps its experts.

X_blocks, uint8 (experts, out, groups, 16), holds two codes to a byte, the first in the lower half; X_scales, uint8
(experts, out, groups), a power of two for each group of 32. A number is level times 2^(scale - 127), which bfloat16
holds exactly. transformers keeps the parameter the other way round, (experts, in, out).

Source: OCP Microscaling Formats v1.0, sections 5.3.3 and 5.4; transformers.integrations.mxfp4
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_check.sources import Lines
from lora_check.types import Checkpoint, Coded, Quantisation, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 without its sign, which is the highest of the four bits."""


def find(checkpoint: Checkpoint) -> list[Coded]:
    """Every pair of blocks and scales that fit together, where no tensor has the name that they decode to."""
    metas = checkpoint.metas()
    stems = [name.removesuffix(BLOCKS) for name in metas if name.endswith(BLOCKS)]
    return [_coded(stem, checkpoint) for stem in stems if stem not in metas and _fits(stem, checkpoint)]


def decode(coded: Coded, checkpoint: Checkpoint) -> Lines:
    """level times 2^(scale - 127), (experts, in, out), bfloat16; a group of 32 is a column of as many lines."""
    import torch

    blocks, scales = (checkpoint.read(coded.parts[role]) for role in ("codes", "scale"))
    levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)], dtype=torch.float32)
    # Twice the level times half the factor: the largest factor would be infinite, and its product with 0 no number.
    pairs = 2 * torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=1)
    factors = torch.ldexp(torch.ones(256), torch.arange(256) - 128)
    inner = coded.meta.shape[1]

    def numbers(expert: int, groups: slice) -> Tensor:
        """Some groups of one expert, (groups times 32, out)."""
        codes, powers = blocks[expert, :, groups], scales[expert, :, groups]
        found = pairs.index_select(0, codes.flatten().int()).view(*powers.shape, GROUP)
        found.mul_(factors[powers.long()][..., None])
        return found.to(torch.bfloat16).flatten(-2).mT

    def make(lines: slice) -> Tensor:
        experts = range(lines.start // inner, -(-lines.stop // inner))
        spans = [(max(lines.start, one * inner), min(lines.stop, (one + 1) * inner)) for one in experts]
        found = [
            numbers(expert, slice((start - expert * inner) // GROUP, (stop - expert * inner) // GROUP))
            for expert, (start, stop) in zip(experts, spans, strict=True)
        ]
        return torch.cat(found) if len(found) > 1 else found[0].contiguous()

    return Lines(shape=coded.meta.shape, dtype=torch.bfloat16, make=make, unit=GROUP)


def _fits(stem: str, checkpoint: Checkpoint) -> bool:
    blocks, scales = (checkpoint.metas().get(f"{stem}{end}") for end in (BLOCKS, SCALES))
    if blocks is None or scales is None or {blocks.dtype, scales.dtype} != {"uint8"}:
        return False
    return len(blocks.shape) == 4 and blocks.shape == (*scales.shape, GROUP // 2)


def _coded(stem: str, checkpoint: Checkpoint) -> Coded:
    *outer, groups, _ = checkpoint.metas()[f"{stem}{BLOCKS}"].shape
    shape = (*outer[:-1], groups * GROUP, outer[-1])
    meta = TensorMeta(name=stem, shape=shape, dtype="bfloat16", codes="mxfp4")
    return Coded(meta=meta, parts={"codes": f"{stem}{BLOCKS}", "scale": f"{stem}{SCALES}"})


QUANTISATION = Quantisation(name="mxfp4", find=find, decode=decode)
