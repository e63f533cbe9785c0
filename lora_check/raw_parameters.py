"""target_parameters: which pair of factors belongs to which raw parameter of a module.

PEFT wraps each parameter of a module in turn: the one that the module registered first is innermost, and one more
`.base_layer` stands in its keys for each wrapper around it. The parameter's own name is not in the key; shapes tell it,
and where shapes do not, the order in which mixtures register theirs.

Source: PEFT tuners/lora/layer.py ParamWrapper, tuners/tuners_utils.py BaseTuner._inject_parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

from lora_check.types import Link, Part, View

Shape = tuple[int, ...]

REGISTERED = ("gate_up_proj", "down_proj")
"""The order in which transformers' mixtures of experts register their stacked weights."""

IN_OUT_EXPERTS = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")
"""Model types whose modules say `is_transposed`: their experts are kept (in, out). Asked only for square experts."""


def leaves(module: str, named: Sequence[str]) -> list[str]:
    """The parameters of a module that target_parameters names: the whole path, or a dotted end of it."""
    found = [target.rpartition(".") for target in named]
    return list(dict.fromkeys(leaf for path, _, leaf in found if module == path or module.endswith(f".{path}")))


def pairs(
    parts: Sequence[Part], shapes: Mapping[str, Shape], stored: Mapping[str, Shape]
) -> dict[str, tuple[Part, ...]]:
    """Parameter -> the parts that are its factors; nothing, where shapes and order do not settle it.

    shapes   of the parameters, by leaf          stored   of the adapter tensors, by name
    """
    depths = sorted({part.depth for part in parts}, reverse=True)
    groups = [tuple(part for part in parts if part.depth == depth) for depth in depths]
    registered = sorted(shapes, key=lambda leaf: REGISTERED.index(leaf) if leaf in REGISTERED else -1)
    fitting = [
        dict(zip(order, groups, strict=False))
        for order in permutations(registered, len(groups))
        if all(_fits(group, shapes[leaf], stored) for leaf, group in zip(order, groups, strict=True))
    ]
    if len(fitting) > 1 and not all(leaf in REGISTERED for leaf in shapes):
        return {}
    return fitting[0] if fitting else {}


def _fits(parts: Sequence[Part], shape: Shape, stored: Mapping[str, Shape]) -> bool:
    """A (r E, x) and B (y, r E) over (E, y, x) or (E, x, y)."""
    roles = {part.role: stored[part.tensor] for part in parts}
    if roles.keys() != {"A", "B"} or len(roles["A"]) != 2 or len(roles["B"]) != 2:
        return False
    experts, *matrix = shape if len(shape) == 3 else (1, *shape)
    rows, inputs, outputs = roles["A"][0], roles["A"][1], roles["B"][0]
    return rows == roles["B"][1] and rows % experts == 0 and matrix in ([outputs, inputs], [inputs, outputs])


def expert_views(link: Link, experts: int, ranks: int, in_out: bool) -> dict[str, View]:
    """The factors of one expert, and of the rows of it that a file holds.

    A is expert-major: its rows e r to e r + r. B is expert-fastest: its columns e, e + E, e + 2 E ...
    """
    expert = link.expert if link.expert is not None else 0
    size = ranks // experts
    rows = (*link.rows, 1) if link.rows else None
    a = View(rows=(expert * size, (expert + 1) * size, 1), columns=rows if in_out else None)
    return {"A": a, "B": View(rows=None if in_out else rows, columns=(expert, ranks, experts))}


def row_views(link: Link, roles: Sequence[str]) -> dict[str, View]:
    """The rows of B, of a magnitude or of a bias that belong to the rows of a parameter which a file holds."""
    if link.rows is None:
        return {}
    return {role: View(rows=(*link.rows, 1)) for role in roles if role in ("B", "m", "bias")}
