"""The modules of an adapter: their factors, ranks and scales, and where the base keeps the weights they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

from lora_check.adapters.methods import methods
from lora_check.adapters.scale import scale_of
from lora_check.types import FLOATS, Adapter, Part, Plan, Scale, View

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
PAIRS = (("B", "A"), ("embedding_B", "embedding_A"))
BESIDE = frozenset({"m", "bias"})
"""Roles that may stand beside two factors whose product is the update, or the matrix that DoRA then scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module that the adapter has factors for.

    parts   role -> the adapter tensor       shapes   role -> its shape, as the formula reads it
    scale   with the rank that lora_A has; None: the method has none
    plain   the update is s B A: a product of two factors of one rank      why   it is not
    """

    name: str
    parts: Mapping[str, Part]
    shapes: Mapping[str, Shape]
    scale: Scale | None
    parameters: int
    why: str = ""

    @property
    def family(self) -> str:
        """The last segment of its name."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def pair(self) -> tuple[str, str] | None:
        """The roles of B and A."""
        return next((one for one in PAIRS if set(one) <= self.shapes.keys()), None)

    @property
    def plain(self) -> bool:
        """Whether the update is s B A."""
        return not self.why

    @property
    def rank(self) -> int:
        """The rows of A; where the update is not s B A, what the configuration says, if it does."""
        rows = self.shapes[self.pair[1]] if self.pair else ()
        if rows and (self.plain or self.scale is None):
            return rows[0]
        return self.scale.rank if self.scale else 0

    @property
    def sides(self) -> tuple[int, int]:
        """How many outputs B has and how many inputs A has."""
        assert self.pair
        left, right = (self.shapes[role] for role in self.pair)
        return left[0], prod(right[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the base keeps the weight of a module: a tensor, or some of its rows; turned over, it is (in, out).

    views   role -> the part of a factor that goes there
    """

    tensor: str
    rows: tuple[int, int] | None = None
    turned: bool = False
    views: Mapping[str, View] = field(default_factory=dict)

    def holds(self, module: Module) -> bool:
        """Whether all of the module's update goes there, in the order in which its factors have it."""
        return all(self.views.get(role) == module.parts[role].view for role in module.pair or ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What an adapter holds for its modules: factors, and tensors carried whole."""

    modules: tuple[Module, ...]
    whole: tuple[Part, ...] = ()


def gather(adapter: Adapter) -> Gathered:
    """Group the parts of an adapter by module; headers only."""
    groups: dict[str, list[Part]] = {}
    for part in adapter.parts:
        if part.role not in ("S", "rows"):
            groups.setdefault(part.module, []).append(part)
    groups.pop("", None)  # what all modules share is no module
    return Gathered(
        modules=tuple(_module(adapter, name, parts) for name, parts in groups.items()),
        whole=tuple(part for part in adapter.parts if part.role in ("S", "rows")),
    )


def factors(adapter: Adapter, module: Module) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) as stored, of a plain module; a convolution's as matrices."""
    assert module.pair, module.name
    left, right = (_read(adapter, module.parts[role]) for role in module.pair)
    return left.reshape(left.shape[0], -1), right.reshape(right.shape[0], -1)


def places(plan: Plan) -> dict[str, list[Place]]:
    """Adapter tensor B -> where the base keeps what it changes."""
    found: dict[str, list[Place]] = {}
    for pairing in plan.pairings:
        for step in pairing.steps if pairing.base and not pairing.undecidable else ():
            role = next((left for left, _ in PAIRS if left in step.factors), None)
            if role and pairing.base and step.recipe.name not in ("lora-experts", "lora-bias"):
                turned = step.recipe.name.endswith("in-out") or "embedding" in step.recipe.name
                place = Place(tensor=pairing.base.name, rows=step.window, turned=turned, views=step.views)
                found.setdefault(step.factors[role], []).append(place)
    return found


def _read(adapter: Adapter, part: Part) -> Tensor:
    stored = adapter.checkpoint.read(part.tensor)
    return part.view.of(stored) if part.view else stored


def _module(adapter: Adapter, name: str, parts: Sequence[Part]) -> Module:
    metas = adapter.checkpoint.metas()
    stored = {part.role: metas[part.tensor].shape for part in parts}
    shapes = {part.role: part.view.shape(stored[part.role]) if part.view else stored[part.role] for part in parts}
    found = Module(
        name=name,
        parts={part.role: part for part in parts},
        shapes=shapes,
        scale=_scale(adapter, name),
        parameters=sum(prod(metas[part.tensor].shape) for part in parts),
        why=next(_no_product(adapter, name, shapes, {metas[part.tensor].dtype for part in parts}), ""),
    )
    scale = replace(found.scale, rank=found.rank) if found.scale and found.plain else found.scale
    return replace(found, scale=scale)


def _scale(adapter: Adapter, module: str) -> Scale | None:
    method = adapter.config.method
    known = method == "LORA" or (method in methods() and methods()[method].alpha)
    return scale_of(adapter, module) if known else None


def _no_product(adapter: Adapter, name: str, shapes: Mapping[str, Shape], dtypes: set[str]) -> Iterator[str]:
    """Why the update of a module is not a product of two factors that are at hand."""
    if name in adapter.refused:
        yield adapter.refused[name]
    if adapter.config.method != "LORA":
        yield f"the update of {adapter.config.method} is no product of two factors"
    if adapter.config.raw.get("target_parameters"):
        yield "the factors of raw parameters are those of several matrices"
    pair = next((one for one in PAIRS if set(one) <= shapes.keys()), None)
    if pair is None:
        yield f"it has {', '.join(sorted(shapes))} and no pair of factors"
        return
    left, right = (shapes[role] for role in pair)
    beside = sorted(shapes.keys() - {*pair, *BESIDE})
    if beside:
        yield f"its formula reads {', '.join(beside)} too"
    if len(left) < 2 or len(right) < 2 or left[1] != right[0] or 0 in (*left, *right):
        yield f"B {left} and A {right} have no product"
    if strange := sorted(dtypes.difference(FLOATS)):
        yield f"it is stored as {strange[0]}"
