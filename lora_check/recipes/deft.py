"""W' = W + P (k R - relu(P)^T W).

W   base     (out, in), or (in, out) in a Conv1D of transformers
P   factor   (out, r), stored as `deft_P`
R   factor   (r, in), stored as `deft_R`; zero under `para`, where the file has none
k   factor   alpha / r, or 1 without alpha

Every adapter sees the base, not what others made of it. PEFT stores the delta in the weight's dtype before adding it.
Source: "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models" (2025); PEFT tuners/deft/layer.py
DeftLinear._project, _merge_factor, _delta_from_factor.
"""

from lora_check.recipes._deft import EXACT, METHOD, fits, logical, pair, product
from lora_check.types import Factors, Hand, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """`left` and `right`, whose product is the delta as the weight is kept."""
    import torch

    from lora_check.functions import moved

    return pair(factors["P"], moved(factors["P"], torch.relu).T @ logical(factors["W"], site), factors, site)


RECIPE = Recipe(
    name="deft",
    formula="W' = W + P (k R - relu(P)^T W)",
    method=METHOD,
    fits=lambda site: fits(site, "relu"),
    prepare=prepare,
    product=product,
    stored=True,
    reads="whole",
    elementwise=EXACT,
)
