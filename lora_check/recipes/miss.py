"""W'[o, i] = W[o, i] + D[i mod r, o].

W   base     (out, in)
D   factor   (r, out), stored as `miss_block`; with init_weights="mini" (r, mini_r), repeated over the outputs

Source: Kang et al., "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing" (2024); PEFT
tuners/miss/layer.py MissLinear.get_delta_weight_miss.
"""

from lora_check.recipes._miss import MISS, is_shared, repeated, shared
from lora_check.types import Recipe

RECIPE = Recipe(
    name="miss",
    formula="W' = W + [D^T D^T ...]",
    method=MISS,
    fits=is_shared,
    prepare=repeated,
    product=shared,
    elementwise=frozenset({"block"}),
)
