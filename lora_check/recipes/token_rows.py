"""W'[i, :] = S[j, :] for the j-th listed token i; every other row is W's.

W   base    (vocab, dim)
S   saved   (tokens, dim), stored as `trainable_tokens_delta`; despite that name its rows replace, they do not add

Source: PEFT tuners/trainable_tokens/layer.py TrainableTokensLayer.get_merged_weights (index_copy).
"""

from lora_check.recipes._token_rows import are_rows, replace
from lora_check.types import Recipe, Site


def fits(site: Site) -> bool:
    """Rows that trainable_token_indices lists, beside LoRA."""
    return site.method == "LORA" and are_rows(site)


RECIPE = Recipe(name="token-rows", formula="W'[i] = S[j]", fits=fits, replace=replace)
