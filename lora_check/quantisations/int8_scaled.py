"""int8 with scales as compressed-tensors and EETQ keep it: X.weight int8 with X.weight_scale or X.weight_scales.

Source: https://github.com/neuralmagic/compressed-tensors (int-quantized); https://github.com/NetEase-FuXi/EETQ
"""

from __future__ import annotations

from lora_check.quantisations import _sealed
from lora_check.types import Checkpoint, Coded, Quantisation

SCALES = ("weight_scale", "weight_scales")
LEAVES = ("weight", *SCALES, "weight_zero_point", "input_scale", "input_zero_point")


def find(checkpoint: Checkpoint) -> list[Coded]:
    """Every int8 weight with scales of that name beside it."""
    return [
        _sealed.sealed(
            checkpoint,
            stem,
            LEAVES,
            codes="int8 with scales",
            shape=checkpoint.metas()[f"{stem}weight"].shape,
            reason=_sealed.OPAQUE,
        )
        for scale in SCALES
        for stem in _sealed.modules(checkpoint, "weight", (scale,), ("int8",))
    ]


QUANTISATION = Quantisation(name="int8-scaled", find=find)
