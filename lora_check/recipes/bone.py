"""W'[o, i] = W[o, i] + D[i mod r, o].

W   base     (out, in)
D   factor   (r, out), stored as `bone_block`

The forerunner of MiSS, which PEFT had from 0.14 to 0.18. Source: PEFT tuners/bone/layer.py
BoneLinear.get_delta_weight_bone.
"""

from lora_check.recipes._miss import BONE, is_shared, repeated, shared
from lora_check.types import Recipe

RECIPE = Recipe(
    name="bone",
    formula="W' = W + [D^T D^T ...]",
    method=BONE,
    fits=is_shared,
    prepare=repeated,
    product=shared,
    elementwise=frozenset({"block"}),
)
