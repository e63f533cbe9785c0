"""W' = W.

A bystander: a tensor that no adapter touches. It has no budget; it is the base bit for bit, after the conversion to the
merged file's dtype if that differs.
"""

from lora_check.types import Factors, Numbers, Recipe, Site


def replace(w: Numbers, factors: Factors, rows: slice, tokens: tuple[int, ...]) -> Numbers:
    """W."""
    return w


def fits(site: Site) -> bool:
    """No adapter names this tensor."""
    return not site.roles


RECIPE = Recipe(name="identity", formula="W' = W", fits=fits, replace=replace)
