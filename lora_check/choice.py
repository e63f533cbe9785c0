"""Which recipe serves a site."""

from __future__ import annotations

from dataclasses import replace

from lora_check import registry
from lora_check.adapters.config import changes_base
from lora_check.types import Recipe, Site


def recipes_for(site: Site) -> list[Recipe]:
    """The recipe that fits, after what is done on loading; for MultiheadAttention's output projection two in turn."""
    found = [one for one in registry.load("recipes").values() if _may_serve(one, site) and _fits(one, site)]
    if site.multihead and found and not _changed_on_load(site):
        return found[:1] + recipes_for(replace(site, multihead=False))
    first, then = [one for one in found if one.loads][:1], [one for one in found if not one.loads][:1]
    return first + then if bool(first) == _changed_on_load(site) else []


def _fits(recipe: Recipe, site: Site) -> bool:
    """Whether a recipe fits; shapes with too few or too many axes for it to look at do not."""
    try:
        return recipe.fits(site)
    except (IndexError, TypeError, ValueError, ZeroDivisionError):
        return False


def _changed_on_load(site: Site) -> bool:
    """Whether PEFT has changed the base of these factors before it merges them."""
    return site.method == "LORA" and bool(site.roles.keys() & {"A", "embedding_A"}) and changes_base(site.settings)


def _may_serve(recipe: Recipe, site: Site) -> bool:
    """A recipe serves the method it belongs to; a tensor carried whole and trained rows are alike in all methods."""
    if recipe.method is not None:
        return recipe.method.name == site.method
    return site.method == "LORA" or site.roles.keys() <= {"S", "rows"}


def no_recipe(site: Site) -> str:
    shapes = ", ".join(f"{role} {shape}" for role, shape in sorted(site.roles.items()))
    return f"no recipe fits {shapes} over a weight {site.shape}"
