"""HQQ: X.W_q with scale and zero, and a tensor for each setting, X.shape among them.

PEFT decodes, adds and quantises again, by a search whose outcome no file tells.

Source: Badri and Shaji 2023, "Half-Quadratic Quantization"; hqq.core.quantize.HQQLinear.state_dict
"""

from __future__ import annotations

from lora_check.quantisations import _sealed
from lora_check.types import Checkpoint, Coded, Quantisation

SETTINGS = (
    "axis",
    "channel_wise",
    "compute_dtype",
    "encoded_state_dict",
    "group_size",
    "nbits",
    "offload_meta",
    "optimize",
    "packing",
    "quant_scale",
    "quant_zero",
    "round_zero",
    "shape",
    "stores_quant_config",
    "unpack_view_dtype",
    "view_as_float",
)


def find(checkpoint: Checkpoint) -> list[Coded]:
    """Every module with a W_q."""
    return [_coded(stem, checkpoint) for stem in _sealed.modules(checkpoint, "W_q", ("scale", "zero"))]


def _coded(stem: str, checkpoint: Checkpoint) -> Coded:
    shape = _sealed.told_shape(checkpoint, f"{stem}shape")
    leaves = ("W_q", "scale", "zero", *SETTINGS)
    return _sealed.sealed(checkpoint, stem, leaves, codes="HQQ", shape=shape, reason=_sealed.OPAQUE)


QUANTISATION = Quantisation(name="hqq", find=find)
