"""Adapter parts -> the steps of each base tensor.

Parts are gathered by the base tensor they name; each such site is given the recipe that fits its shapes; what fits
nothing is kept as an orphan, a contradiction or a doubt, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_check import registry
from lora_check.types import Adapter, Checkpoint, Part, Recipe, Scale, Site, Step, TensorMeta

IN_OUT_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose projections are transformers' Conv1D, stored (in, out): asked only when every target is square."""

Metas = Mapping[str, TensorMeta]


@dataclass(slots=True)
class Work:
    """Steps and doubts gathered so far, by base tensor (or new tensor) name.

    new        tensors that the base lacks and an adapter brings whole
    own_copy   tensors replaced by a copy of their own module: what was tied to them stays with the base
    """

    steps: dict[str, list[tuple[int, bool, int, Step]]] = field(default_factory=dict)
    module: dict[str, str] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    new: dict[str, TensorMeta] = field(default_factory=dict)
    own_copy: set[str] = field(default_factory=set)
    orphans: list[tuple[int, str]] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)


def lookup(name: str, names: Metas, config: Mapping[str, Any]) -> str | None:
    """The name under which a tensor lies: its own, or the one that the first layout that knows it gives."""
    if name in names:
        return name
    for layout in registry.load("layouts").values():
        if layout.resolve and (found := layout.resolve(name, names, config)):
            return str(found)
    return None


def gather(index: int, adapter: Adapter, base: Checkpoint, work: Work) -> None:
    """Add the steps of one adapter: first what it replaces, then its deltas, an embedding's before its tied head's."""
    metas = base.metas()
    work.orphans += [(index, name) for name in adapter.orphans]
    modules: dict[str, list[Part]] = {}
    for part in adapter.parts:
        modules.setdefault(part.module, []).append(part)
    multihead = {module for module in modules if f"{module}.in_proj_weight" in metas}
    in_out = Orientation(adapter, modules, base)
    for name, part in _unused(modules):
        work.orphans.append((index, part.tensor))
        modules[name].remove(part)
    for module, parts in modules.items():
        if adapter.config.unsupported and any(part.role != "S" for part in parts):
            _doubt(index, adapter, module, parts, base, work)
            continue
        for parameter, chosen in _by_parameter(module, parts, multihead, metas):
            doubled = module.endswith(".out_proj") and module.removesuffix(".out_proj") in multihead
            _place(index, adapter, module, parameter, chosen, base, in_out, doubled, work)


def _unused(modules: Mapping[str, Sequence[Part]]) -> list[tuple[str, Part]]:
    """Weights carried under the plain name of a module with factors: PEFT reads those as `base_layer.weight` only."""
    return [
        (module, part)
        for module, parts in modules.items()
        for part in parts
        if part.role == "S" and not part.wrapped and module.endswith(".weight")
        if any(one.role in ("A", "embedding_A") for one in modules.get(module.removesuffix(".weight"), ()))
    ]


def _by_parameter(
    module: str, parts: Sequence[Part], multihead: set[str], metas: Metas
) -> Iterator[tuple[str, list[Part]]]:
    """The parameters that a module's parts are about: the part itself, the weight, the bias."""
    weight = "in_proj_weight" if module in multihead else "weight"
    saved = [part for part in parts if part.role == "S"]
    bias = [part for part in parts if part.role == "bias"]
    factors = [part for part in parts if part.role not in ("S", "bias")]
    yield from ((part.module, [part]) for part in saved)
    if factors:
        yield f"{module}.{weight}", factors
    if bias:
        yield f"{module}.bias", bias


def _place(
    index: int,
    adapter: Adapter,
    module: str,
    parameter: str,
    parts: Sequence[Part],
    base: Checkpoint,
    in_out: Orientation,
    doubled: bool,
    work: Work,
) -> None:
    """Find the base tensor of one parameter and the recipe that fits it, or say why there is none."""
    source = lookup(parameter, base.metas(), base.config)
    roles = {part.role: adapter.checkpoint.metas()[part.tensor].shape for part in parts}
    if source is None or (roles.keys() == {"S"} and not parts[0].wrapped and _unties(parameter, source)):
        _place_new(index, adapter, parameter, parts, roles, work)
        return
    shape = work.shapes.get(source, base.metas()[source].shape)
    site = Site(
        parameter=parameter, shape=shape, roles=roles, in_out=in_out.of(module, shape, roles), multihead=doubled
    )
    recipes = _recipes(site)
    work.module.setdefault(source, module if "S" not in roles else parameter.rpartition(".")[0])
    if not recipes:
        _doubt_site(site, source, adapter, work)
        return
    order = 0 if source == parameter else 1
    # PEFT makes the two layers of a MultiheadAttention as one target: both have the scale of the whole.
    target = module.removesuffix(".out_proj") if doubled else module
    for recipe in recipes:
        step = _step(index, adapter, target, recipe, parts, roles, work)
        work.steps.setdefault(source, []).append((index, not recipe.copies, order, step))
    if roles.keys() == {"S"}:
        work.shapes[source] = roles["S"]
        if not parts[0].wrapped:
            work.own_copy.add(source)


def _unties(parameter: str, source: str) -> bool:
    """A head saved whole where the file holds only its embedding: the head becomes a tensor of its own."""
    return parameter.rsplit(".", 2)[-2:] != source.rsplit(".", 2)[-2:]


def _place_new(
    index: int, adapter: Adapter, parameter: str, parts: Sequence[Part], roles: Mapping[str, Any], work: Work
) -> None:
    """A tensor that the base lacks: a head the adapter brings whole, or parts that name nothing."""
    if roles.keys() != {"S"}:
        work.orphans += [(index, part.tensor) for part in parts]
        return
    meta = adapter.checkpoint.metas()[parts[0].tensor]
    work.new[parameter] = TensorMeta(name=parameter, shape=meta.shape, dtype=meta.dtype)
    work.module[parameter] = parameter.rpartition(".")[0]
    recipe = registry.load("recipes")["copy"]
    work.steps[parameter] = [(index, False, 0, Step(recipe=recipe, adapter=index, factors={"S": parts[0].tensor}))]


def _recipes(site: Site) -> list[Recipe]:
    """The recipe that fits, or for MultiheadAttention's output projection the two that PEFT applies in turn."""
    found = [recipe for recipe in registry.load("recipes").values() if recipe.fits(site)]
    if site.multihead and found:
        plain = Site(parameter=site.parameter, shape=site.shape, roles=site.roles, in_out=site.in_out)
        return found[:1] + _recipes(plain)
    return found[:1]


def _step(
    index: int,
    adapter: Adapter,
    module: str,
    recipe: Recipe,
    parts: Sequence[Part],
    roles: Mapping[str, tuple[int, ...]],
    work: Work,
) -> Step:
    return Step(
        recipe=recipe,
        adapter=index,
        factors={part.role: part.tensor for part in parts},
        scale=None if recipe.copies else _scale(adapter, module, roles, work),
        tokens=_tokens(adapter, module) if "rows" in roles else (),
    )


def _scale(adapter: Adapter, module: str, roles: Mapping[str, tuple[int, ...]], work: Work) -> Scale:
    """alpha and r of one module: the first pattern that matches, in the file's order; r from A where it is there."""
    config = adapter.config
    rank = int(_first_match(config.rank_pattern, module, config.rank))
    stored = roles.get("A") or roles.get("embedding_A")
    if stored and stored[0] != rank:
        work.contradictions.append(f"{module}: the configuration says r = {rank}, lora_A has {stored[0]} rows")
        rank = stored[0]
    return Scale(
        alpha=float(_first_match(config.alpha_pattern, module, config.alpha)),
        rank=rank,
        rule="alpha/sqrt(r)" if config.rslora else "alpha/r",
        default_alpha=float(config.alpha),
        default_rank=config.rank,
        weight=adapter.weight,
    )


def _first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first key that matches the module or a dotted end of it, as PEFT's get_pattern_key does from 0.15 on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _tokens(adapter: Adapter, module: str) -> tuple[int, ...]:
    rows = adapter.config.token_rows
    named = [indices for key, indices in rows.items() if key and (module == key or module.endswith(f".{key}"))]
    return named[0] if named else rows.get("", ())


class Orientation:
    """Whether a square weight is kept as (in, out): the non-square targets tell, else the model type, else the flag."""

    def __init__(self, adapter: Adapter, modules: Mapping[str, Sequence[Part]], base: Checkpoint) -> None:
        self.flag = adapter.config.in_out
        self.model = str(base.config.get("model_type") or "")
        seen = set()
        for module, parts in modules.items():
            pair = {part.role: adapter.checkpoint.metas()[part.tensor].shape for part in parts}
            name = lookup(f"{module}.weight", base.metas(), base.config)
            if name and {"A", "B"} <= pair.keys():
                seen.add(_kept_as(base.metas()[name].shape, pair["A"], pair["B"]))
        self.seen = {one for one in seen if one is not None}

    def of(self, module: str, shape: tuple[int, ...], roles: Mapping[str, tuple[int, ...]]) -> bool:
        """True for (in, out)."""
        if len(shape) != 2 or shape[0] != shape[1]:
            return False
        if len(self.seen) == 1:
            return next(iter(self.seen))
        return self.model in IN_OUT_MODELS if self.model else bool(self.flag)


def _kept_as(weight: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool | None:
    if len(weight) != 2 or weight[0] == weight[1] or len(a) != 2 or len(b) != 2:
        return None
    fits = {(b[0], a[1]): False, (a[1], b[0]): True}
    return fits.get(weight)


# ------------------------------------------------------------------------------ what cannot be decided


def _doubt(index: int, adapter: Adapter, module: str, parts: Sequence[Part], base: Checkpoint, work: Work) -> None:
    """Mark every base tensor that an adapter nobody here can recompute may have changed."""
    found = [name for name in _named_by(module, base) if name]
    if not found:
        work.orphans += [(index, part.tensor) for part in parts]
    for name in found:
        work.doubts[name] = adapter.config.unsupported[0]


def _named_by(path: str, base: Checkpoint) -> list[str]:
    """The weight and bias of the longest leading part of `path` that is a module of the base."""
    segments = path.split(".")
    for end in range(len(segments), 0, -1):
        module = ".".join(segments[:end])
        leaves = ("weight", "bias", "in_proj_weight", "in_proj_bias")
        found = [lookup(f"{module}.{leaf}", base.metas(), base.config) for leaf in leaves]
        if any(found):
            return [name for name in found if name]
    return []


def _doubt_site(site: Site, source: str, adapter: Adapter, work: Work) -> None:
    shapes = ", ".join(f"{role} {shape}" for role, shape in sorted(site.roles.items()))
    work.contradictions.append(f"{site.parameter}: no recipe fits {shapes} over a weight {site.shape}")
    work.doubts[source] = f"no recipe fits {shapes} over a weight {site.shape}"
