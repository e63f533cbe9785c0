"""MXFP4 as gpt-oss keeps its experts.

X_blocks, uint8 (experts, out, groups, 16), holds two codes to a byte, the first in the lower half; X_scales, uint8
(experts, out, groups), a power of two for each group of 32. A number is level times 2^(scale - 127), which bfloat16
holds exactly. transformers keeps the parameter the other way round, (experts, in, out).

Source: OCP Microscaling Formats v1.0, sections 5.3.3 and 5.4; transformers.integrations.mxfp4
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def decode(coded: Coded, checkpoint: Checkpoint) -> Tensor:
    """level times 2^(scale - 127), (experts, in, out), bfloat16."""
    import torch

    blocks, scales = (checkpoint.read(coded.parts[role]) for role in ("codes", "scale"))
    levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)], dtype=torch.float32)
    numbers = levels[torch.stack([blocks & 15, blocks >> 4], dim=-1).long()].flatten(-2)
    spread = torch.ldexp(numbers, scales.int()[..., None] - 127).to(torch.bfloat16)
    return spread.flatten(-2).mT.contiguous()


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
