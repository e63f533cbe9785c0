"""As linear, with the mean of the elements that agree with the elected sign in place of the sum.

Source: Yadav et al., "TIES-Merging" (2023), algorithm 1; PEFT utils/merge_utils.py ties.
"""

from lora_check.combinations._sums import elected_mean
from lora_check.types import Combination

COMBINATION = Combination(name="ties", mix=elected_mean)
