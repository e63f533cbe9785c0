"""The best approximation, of the new adapter's rank, of the deltas combined by `elected_mean`.

PEFT 0.9 to 0.20 scaled each delta twice.
Source: PEFT tuners/lora/model.py _svd_generalized_task_arithmetic_weighted_adapter.
"""

from lora_check.combinations._sums import elected_mean
from lora_check.types import Combination

COMBINATION = Combination(name="ties_svd", mix=elected_mean, of="deltas")
