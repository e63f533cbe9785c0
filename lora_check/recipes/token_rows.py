"""W'[i, :] = S[j, :] for the j-th listed token i; every other row is W's.

W   base    (vocab, dim)
S   saved   (tokens, dim), stored as `trainable_tokens_delta`; despite that name its rows replace, they do not add

Source: PEFT tuners/trainable_tokens/layer.py TrainableTokensLayer.get_merged_weights (index_copy).
"""

from lora_check.types import Factors, Numbers, Recipe, Site


def replace(w: Numbers, factors: Factors, rows: slice, tokens: tuple[int, ...]) -> Numbers:
    """W[rows] with the listed rows exchanged."""
    merged = w.clone()
    for index, token in enumerate(tokens):
        if rows.start <= token < rows.stop:
            merged[token - rows.start] = factors["rows"][index]
    return merged


def fits(site: Site) -> bool:
    """The adapter carries trained rows of this embedding."""
    rows = site.roles.get("rows", ())
    return set(site.roles) == {"rows"} and len(rows) == len(site.shape) == 2 and rows[1] == site.shape[1]


RECIPE = Recipe(name="token-rows", formula="W'[i] = S[j]", fits=fits, replace=replace)
