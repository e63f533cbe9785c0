"""T' = T + T D_j + D_j for each r x r tile T in the j-th band of r outputs.

W   base     (out, in), cut in tiles
D   factor   (out / r, r, r), stored as `bone_block`, with init_weights="bat"

Without safe_merge PEFT stored T D + D in the model's dtype before it added it. Source: PEFT tuners/bone/layer.py
BoneLinear.get_delta_weight.
"""

from lora_check.recipes._miss import BONE, is_tiled, tiled
from lora_check.types import Recipe

RECIPE = Recipe(name="bone-bat", formula="T' = T + T D + D", method=BONE, fits=is_tiled, apply=tiled)
