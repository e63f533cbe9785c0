"""Trained rows of an embedding, which LoRA may have beside its factors and which are a tuner of their own, too."""

from __future__ import annotations

from lora_check.types import Factors, Numbers, Site


def replace(w: Numbers, factors: Factors, rows: slice, tokens: tuple[int, ...]) -> Numbers:
    """W[rows] with the listed rows exchanged."""
    merged = w.clone()
    for index, token in enumerate(tokens):
        if rows.start <= token < rows.stop:
            merged[token - rows.start] = factors["rows"][index]
    return merged


def are_rows(site: Site) -> bool:
    """The adapter carries trained rows of this embedding."""
    rows = site.roles.get("rows", ())
    return set(site.roles) == {"rows"} and len(rows) == len(site.shape) == 2 and rows[1] == site.shape[1]
