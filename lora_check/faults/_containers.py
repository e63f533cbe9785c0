"""Tensors that only a quantised module has: scales, tables and packed copies, known by their names."""

from __future__ import annotations

from lora_check.types import Plan

BESIDE = (
    "weight_scale_inv",
    "weight_scale",
    "weight_scale_2",
    "weight_scales",
    "weight_packed",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "weight_format",
    "input_scale",
    "activation_scale",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "SCB",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
)
"""Names that the schemes in use give to what lies beside X.weight, or in its place."""

HEADERS = "weight.quant_state.bitsandbytes__"
PACKED = ("_blocks", "_scales")
"""MXFP4: what lies in place of X."""


def left_over(plan: Plan) -> dict[str, str]:
    """Extra tensor of MERGED -> the tensor, there as numbers, whose codes or scales it belongs to."""
    numbers = {one.merged.name for one in plan.pairings if not one.merged.codes}
    owners = {name: _owner(name) for name in plan.extra}
    return {name: owner for name, owner in owners.items() if owner in numbers}


def _owner(name: str) -> str:
    """The weight that a tensor of such a name belongs to; '' for any other name."""
    for end in BESIDE:
        if name.endswith(f".{end}"):
            return f"{name.removesuffix(end)}weight"
    stem, header, _ = name.partition(f".{HEADERS}")
    if header:
        return f"{stem}.weight"
    return next((name.removesuffix(end) for end in PACKED if name.endswith(end)), "")
