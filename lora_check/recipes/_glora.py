"""GLoRA's names, and what its five paths may look like: a product, one tensor, or one number."""

from __future__ import annotations

from lora_check.types import Factors, Hand, Method, Numbers, Site

LEAVES = {"Xd": "down", "Xu": "up", "X": "whole", "zeros": "whole"}
"""Ends of the names of a path's tensors; `zeros` is what a path that the configuration leaves out is saved as."""

METHOD = Method(
    name="GLORA",
    roles={f"glora_{path}.{leaf}": f"{path}_{role}" for path in "ABCDE" for leaf, role in LEAVES.items()},
    keys=frozenset({"bias", "config_A_B", "config_C", "config_D_E"}),
)


def is_product(site: Site, path: str, shape: tuple[int, int]) -> bool:
    """Whether a path is Xd (rows, r) times Xu (r, columns)."""
    roles = {leaf: site.roles[f"{path}_{leaf}"] for leaf in ("down", "up", "whole") if f"{path}_{leaf}" in site.roles}
    return (
        roles.keys() == {"down", "up"}
        and roles["down"] == (shape[0], *roles["up"][:1])
        and roles["up"][1:] == shape[1:]
    )


def is_whole(site: Site, path: str, *shapes: tuple[int, ...]) -> bool:
    """Whether a path is one tensor of one of these shapes."""
    return site.roles.get(f"{path}_whole") in shapes and not {f"{path}_down", f"{path}_up"} & site.roles.keys()


def value(factors: Factors, path: str, rows: slice, hand: Hand) -> Numbers:
    """The rows of a path as PEFT has them, in the model's dtype; a path that is one number has it alone."""
    if f"{path}_down" in factors:
        return hand.settle(factors[f"{path}_down"][rows] @ factors[f"{path}_up"])
    whole = factors[f"{path}_whole"]
    table = whole.reshape(int(whole.shape[0]), -1)
    return hand.settle(table if int(table.shape[0]) == 1 else table[rows])
