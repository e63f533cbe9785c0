"""A = [w_1 s_1 A_1; w_2 s_2 A_2; ...],   B = [B_1, B_2, ...]: the sum of the weighted deltas, exactly.

Source: PEFT tuners/lora/model.py LoraModel.add_weighted_adapter.
"""

from lora_check.types import Combination

COMBINATION = Combination(name="cat", of="ranks")
