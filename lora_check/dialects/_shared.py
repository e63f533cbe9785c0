"""What several dialects share: the scale of each module, names as in BASE, factors laid out as the recipes read them.

Nothing here computes: numbers change places, or zeros come between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from lora_check.errors import AdapterConfigError
from lora_check.types import Adapter, Checkpoint, Part, Scale, View

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
EMBEDDINGS = ("embed_in", "embed_tokens", "shared", "tok_embeddings", "token_embd", "word_embeddings", "wpe", "wte")
"""What models call the layers that look rows up."""

CARRY_ON = "write it into adapter_config.json beside the file"


def number(raw: Mapping[str, Any], key: str, where: str, hint: str = CARRY_ON) -> float:
    """A number that the configuration must tell, for the tensors do not.

    raises   AdapterConfigError: it is not there, or not a finite number
    """
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        said = f"{key} = {value!r}, not a finite number" if key in raw else f"no {key}, and the scale cannot be known"
        raise AdapterConfigError(f"adapter: the configuration of {where} has {said}", hint=hint)
    return float(value)


def single(checkpoint: Checkpoint, name: str) -> float:
    """The one number that a tensor such as `alpha` holds.

    raises   AdapterConfigError: it holds none, several, or one that is not finite
    """
    meta = checkpoint.metas()[name]
    value = float(checkpoint.read(name)) if meta.numel == 1 else float("nan")
    if not isfinite(value):
        held = f"is {value}" if meta.numel == 1 else f"has the shape {meta.shape}"
        message = f"adapter: tensor {name!r} of {checkpoint.location} is to be one finite number and {held}"
        raise AdapterConfigError(message, hint="write the file again with the tool that trained it")
    return value


def scales(told: Mapping[str, tuple[float, int]]) -> dict[str, Scale]:
    """alpha / r of each module; the general alpha and r are those of the first.

    told   module -> its alpha and its r
    """
    first = next(iter(told.values()), (1.0, 1))
    return {
        module: Scale(alpha=alpha, rank=rank, default_alpha=first[0], default_rank=first[1])
        for module, (alpha, rank) in told.items()
    }


def renamed(adapter: Adapter, found: Callable[[str], Sequence[str]]) -> Adapter:
    """The adapter with its modules under the names of BASE.

    found   module -> its names in BASE: several leave them all undecided, none leaves it as it is
    """
    modules = dict.fromkeys(part.module for part in adapter.parts)
    names = {module: tuple(found(module)) or (module,) for module in modules}
    several = {
        name: f"{module} may be any of {', '.join(candidates)}"
        for module, candidates in names.items()
        for name in candidates
        if len(candidates) > 1
    }
    return replace(
        adapter,
        parts=tuple(replace(part, module=name) for part in adapter.parts for name in names[part.module]),
        scales={name: scale for module, scale in adapter.scales.items() for name in names.get(module, ())},
        refused={name: why for module, why in adapter.refused.items() for name in names.get(module, ())} | several,
    )


def reordered(adapter: Adapter, heads: Callable[[str], int | str]) -> Adapter:
    """The adapter with the rows of B and magnitude as transformers has them, where its tool rotates neighbours.

    heads   module -> over how many heads its rows are reordered; 0: they are not; text: why nobody can know
    """
    refused, parts = dict(adapter.refused), []
    for part in adapter.parts:
        count, size = heads(part.module), shape_of(adapter, part)
        if isinstance(count, int) and count and part.role != "A" and size[0] % (2 * count):
            count = f"its {size[0]} rows are not {count} heads of an even size"
        if isinstance(count, str):
            refused[part.module] = count
        moves = isinstance(count, int) and count > 0 and part.role != "A"
        parts.append(replace(part, view=halves(int(count), size)) if moves else part)
    return replace(adapter, parts=tuple(parts), refused=refused)


def shape_of(adapter: Adapter, part: Part) -> Shape:
    """The shape in which a formula reads a part."""
    stored = adapter.checkpoint.metas()[part.tensor].shape
    return part.view.shape(stored) if part.view else stored


def laid_over(adapter: Adapter, shapes: Mapping[str, Shape]) -> Adapter:
    """A and B in as many dimensions as the weight has: a 1x1 convolution is a matrix, and the other way round.

    shapes   module -> the shape of its weight
    """
    parts = tuple(_laid(part, shape_of(adapter, part), shapes.get(part.module, ())) for part in adapter.parts)
    return replace(adapter, parts=parts)


def _laid(part: Part, stored: Shape, weight: Shape) -> Part:
    if part.view or part.role not in ("A", "B") or len(stored) < 2 or len(stored) == len(weight) or len(weight) < 2:
        return part
    rows = stored[0]
    wanted = (rows, *weight[1:]) if part.role == "A" else (rows, stored[1], *(1 for _ in weight[2:]))
    return replace(part, view=reshaped(wanted)) if prod(wanted) == prod(stored) else part


def embedded(adapter: Adapter, is_embedding: Callable[[str], bool]) -> Adapter:
    """The adapter with the factors of its embeddings called so: they are no witness to how its layers keep a weight."""
    roles = {"A": "embedding_A", "B": "embedding_B"}
    parts = (
        replace(part, role=roles.get(part.role, part.role)) if is_embedding(part.module) else part
        for part in adapter.parts
    )
    return replace(adapter, parts=tuple(parts))


def rows(shape: Shape) -> int:
    """The length of the first axis; 0 for a single number."""
    return shape[0] if shape else 0


def modules_of(adapter: Adapter) -> dict[str, dict[str, Part]]:
    """Module -> role -> part."""
    found: dict[str, dict[str, Part]] = {}
    for part in adapter.parts:
        found.setdefault(part.module, {})[part.role] = part
    return found


def whole(names: Iterable[str]) -> tuple[Part, ...]:
    """Tensors of the base that a file carries in place of the base's own, as they lie in the model that it loads."""
    return tuple(Part(tensor=name, module=name, role="S", wrapped=True) for name in names)


# ------------------------------------------------------------------------------------------------------- views


def reshaped(size: Shape) -> View:
    """The same numbers in another shape."""
    return View(moved=partial(_reshape, size=size), size=size)


def halves(heads: int, size: Shape) -> View:
    """Rows in the order of transformers, of a tensor whose heads are rotated by neighbours.

    Row h d + 2 i + j of the file is row h d + j d/2 + i of the model: h the head, d its size, j 0 or 1.
    """
    return View(moved=partial(_halves, heads=heads), size=size)


def _reshape(stored: Tensor, size: Shape) -> Tensor:
    return stored.reshape(size)


def _halves(stored: Tensor, heads: int) -> Tensor:
    pairs = stored.reshape(heads, stored.shape[0] // heads // 2, 2, *stored.shape[1:])
    return pairs.transpose(1, 2).reshape(stored.shape)
