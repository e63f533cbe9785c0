"""NVFP4 as ModelOpt keeps it: X.weight uint8, two codes to a byte, X.weight_scale fp8, X.weight_scale_2.

Source: https://github.com/NVIDIA/Model-Optimizer (NVFP4)
"""

from __future__ import annotations

from lora_check.quantisations import _sealed
from lora_check.types import Checkpoint, Coded, Quantisation

LEAVES = ("weight", "weight_scale", "weight_scale_2", "input_scale")


def find(checkpoint: Checkpoint) -> list[Coded]:
    """Every packed weight with scales of two levels beside it."""
    stems = _sealed.modules(checkpoint, "weight", ("weight_scale", "weight_scale_2"), ("uint8",))
    return [_coded(stem, checkpoint) for stem in stems]


def _coded(stem: str, checkpoint: Checkpoint) -> Coded:
    packed = checkpoint.metas()[f"{stem}weight"].shape
    shape = (*packed[:-1], 2 * packed[-1])
    return _sealed.sealed(checkpoint, stem, LEAVES, codes="NVFP4", shape=shape, reason=_sealed.OPAQUE)


QUANTISATION = Quantisation(name="nvfp4", find=find)
