"""W' = S.

S   saved   the shape of the merged tensor

A tensor that the adapter carries whole: modules_to_save, biases trained with bias="all" or "lora_only", and the base
weight of a targeted embedding. It replaces the base's tensor before any delta is added. A copy has no budget.
Source: PEFT utils/other.py ModulesToSaveWrapper, utils/save_and_load.py set_peft_model_state_dict.
"""

from lora_check.types import Factors, Numbers, Recipe, Site


def replace(w: Numbers, factors: Factors, rows: slice, tokens: tuple[int, ...]) -> Numbers:
    """S[rows], flattened as the base is."""
    saved = factors["S"]
    return saved.reshape(int(saved.shape[0]) if len(saved.shape) else 1, -1)[rows]


def fits(site: Site) -> bool:
    """The adapter carries a tensor of exactly this name."""
    return set(site.roles) == {"S"}


RECIPE = Recipe(name="copy", formula="W' = S", fits=fits, replace=replace, carried=frozenset({"S"}))
