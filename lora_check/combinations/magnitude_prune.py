"""As linear, with only the largest `density` of each factor kept.

Source: PEFT utils/merge_utils.py magnitude_prune.
"""

from lora_check.combinations._sums import pruned_sum
from lora_check.types import Combination

COMBINATION = Combination(name="magnitude_prune", mix=pruned_sum)
