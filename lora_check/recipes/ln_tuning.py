"""W' = S.

S   saved   the shape of the weight or bias of a module, stored as `ln_tuning_layers.weight` and `ln_tuning_layers.bias`

The trained copy of a module takes the place of the module. With modules_to_save beside it, PEFT's merge_and_unload
leaves the wrappers of those modules in the model, and so in its file (LC207). Source: Zhao et al., "Tuning LayerNorm in
Attention" (2023); PEFT tuners/ln_tuning/layer.py LNTuningLayer.merge.
"""

from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site

METHOD = Method(name="LN_TUNING", roles={"ln_tuning_layers.*": "copy_*"})


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The copy of this parameter, flattened as the base is."""
    return {"S": factors[f"copy_{site.leaf}"].reshape(site.shape[0], -1)}


def replace(w: Numbers, factors: Factors, rows: slice, tokens: tuple[int, ...]) -> Numbers:
    """S[rows]."""
    return factors["S"][rows]


def fits(site: Site) -> bool:
    """A copy of this parameter; a module with others than a weight and a bias is not understood."""
    known = site.roles.keys() <= {"copy_weight", "copy_bias"}
    return known and site.roles.get(f"copy_{site.leaf}") == site.shape


RECIPE = Recipe(name="ln-tuning", formula="W' = S", method=METHOD, fits=fits, prepare=prepare, replace=replace)
