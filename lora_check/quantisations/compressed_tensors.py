"""compressed-tensors, packed: X.weight_packed with weight_scale, and weight_shape where the packing hides it.

Source: https://github.com/neuralmagic/compressed-tensors (pack-quantized, nvfp4-pack-quantized)
"""

from __future__ import annotations

from lora_check.quantisations import _sealed
from lora_check.types import Checkpoint, Coded, Quantisation

LEAVES = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "input_global_scale",
)


def find(checkpoint: Checkpoint) -> list[Coded]:
    """Every module with packed weights."""
    return [_coded(stem, checkpoint) for stem in _sealed.modules(checkpoint, "weight_packed", ("weight_scale",))]


def _coded(stem: str, checkpoint: Checkpoint) -> Coded:
    packed = checkpoint.metas()[f"{stem}weight_packed"]
    shape = _sealed.told_shape(checkpoint, f"{stem}weight_shape")
    if not shape and packed.dtype == "uint8":
        shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    codes = "compressed-tensors packed codes"
    return _sealed.sealed(checkpoint, stem, LEAVES, codes=codes, shape=shape, reason=_sealed.OPAQUE)


QUANTISATION = Quantisation(name="compressed-tensors", find=find)
