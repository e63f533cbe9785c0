"""Elements of each delta are dropped at random and the others divided by the density, then combined as ties.

The global random state decides which, so the merge cannot be recomputed from the files.
Source: Yu et al., "Language Models are Super Mario" (2024); PEFT utils/merge_utils.py dare_ties.
"""

from lora_check.combinations._dare import RANDOM
from lora_check.types import Combination

COMBINATION = Combination(name="dare_ties_svd", refuses=RANDOM)
