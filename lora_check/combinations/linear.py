"""A = sum_i c_i A_i,   B = sum_i |c_i| B_i,   c_i = sign(w_i s_i) sqrt(|w_i s_i|).

Not a sum of deltas: the product has cross terms B_i A_j. Releases before 0.9 weighted otherwise; 0.18 lost the sign.
Source: PEFT tuners/lora/model.py _generalized_task_arithmetic_weighted_adapter.
"""

from lora_check.combinations._sums import weighted_sum
from lora_check.types import Combination

COMBINATION = Combination(name="linear", mix=weighted_sum)
