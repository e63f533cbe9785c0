"""T' = T + T D_j + D_j for each r x r tile T in the j-th band of r outputs.

W   base     (out, in), cut in tiles
D   factor   (out / r, r, r), stored as `miss_block`, with init_weights="bat"

Up to 0.19 PEFT stored T D + D in the model's dtype before it added it, unless safe_merge was set. Source: PEFT
tuners/miss/layer.py MissLinear.get_delta_weight.
"""

from lora_check.recipes._miss import MISS, is_tiled, tiled
from lora_check.types import Recipe

RECIPE = Recipe(name="miss-bat", formula="T' = T + T D + D", method=MISS, fits=is_tiled, apply=tiled)
