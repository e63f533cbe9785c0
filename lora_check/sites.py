"""Adapter parts -> the steps of each base tensor.

Parts are gathered by the base tensor they name; each such site is given the recipe that fits its shapes; what fits
nothing is kept as an orphan, a contradiction or a doubt, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lora_check import registry
from lora_check.adapters.combine import shares
from lora_check.adapters.config import changes_base
from lora_check.adapters.methods import methods
from lora_check.adapters.read import bind
from lora_check.adapters.scale import scale_of, tokens_of
from lora_check.choice import no_recipe, recipes_for
from lora_check.errors import AdapterConfigError
from lora_check.links import by_memory, loaded_as, lookup
from lora_check.orientation import Orientation
from lora_check.promises import is_target, promises, unused
from lora_check.raw_parameters import IN_OUT_EXPERTS, expert_views, leaves, pairs, row_views
from lora_check.types import Adapter, Checkpoint, Link, Method, Part, Recipe, Scale, Site, Step, TensorMeta

LOADED = -1
"""The turn of what is done when adapters are loaded, before the first of them is merged."""

SEVERAL = "replaced more than once, and which copy PEFT takes depends on the adapter that is active"

Metas = Mapping[str, TensorMeta]


@dataclass(slots=True)
class Work:
    """Steps and doubts gathered so far, by base tensor (or new tensor) name.

    new        tensors that the base lacks and an adapter brings whole
    pruned     tensors for which an adapter has factors of no rank
    own_copy   tensors replaced by a copy of their own module: what was tied to them stays with the base
    shared     those of them whose copy the tied tensor shares
    """

    steps: dict[str, list[tuple[int, bool, int, Step]]] = field(default_factory=dict)
    module: dict[str, str] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    new: dict[str, TensorMeta] = field(default_factory=dict)
    pruned: set[str] = field(default_factory=set)
    own_copy: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)
    orphans: list[tuple[int, str]] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)


def gather(index: int, adapter: Adapter, base: Checkpoint, work: Work) -> None:
    """Add the steps of one adapter: first what it replaces, then its deltas, an embedding's before its tied head's."""
    bound = bind(adapter, base)
    work.orphans += [(index, name) for name in bound.orphans]
    _Gatherer(index, bound, base, work).run()


class _Gatherer:
    """One adapter, laid over the base."""

    def __init__(self, index: int, adapter: Adapter, base: Checkpoint, work: Work) -> None:
        self.index, self.adapter, self.base, self.work = index, adapter, base, work
        self.metas, self.config = base.metas(), base.config
        self.modules: dict[str, list[Part]] = {}
        for part in adapter.parts:
            self.modules.setdefault(part.module, []).append(part)
        self.shared = self.modules.pop("", [])
        self.multihead = {module for module in self.modules if f"{module}.in_proj_weight" in self.metas}
        self.in_out = Orientation(self.shape, adapter, self.modules, base)

    def run(self) -> None:
        """Give every part of the adapter its place: a step, an orphan, or a doubt."""
        for module, part in unused(self.modules):
            self.orphan(part)
            self.modules[module].remove(part)
        unsupported = self.adapter.config.unsupported
        for module, parts in self.modules.items():
            if module in self.adapter.refused:
                self.leave_undecided(module, parts, self.adapter.refused[module])
            elif unsupported and any(part.role != "S" for part in parts):
                self.leave_undecided(module, parts, unsupported[0])
            else:
                self.place_module(module, parts)
        if self.shared and not any(part.role != "S" for parts in self.modules.values() for part in parts):
            self.leave_targets(next(iter(unsupported), "the adapter holds nothing for any module of its own"))
        self.work.contradictions += [] if unsupported else promises(self.adapter, self.modules, self.base)

    def orphan(self, *parts: Part) -> None:
        self.work.orphans += [(self.index, part.tensor) for part in parts]

    def shape(self, part: Part) -> tuple[int, ...]:
        stored = self.adapter.checkpoint.metas()[part.tensor].shape
        return part.view.shape(stored) if part.view else stored

    def place_module(self, module: str, parts: Sequence[Part]) -> None:
        """The parameters that a module's parts are about: the part itself, the weight, the bias."""
        saved = [part for part in parts if part.role == "S"]
        if saved:
            self.place(module, module, saved)
        factors = [part for part in parts if part.role not in ("S", "bias")]
        bias = [part for part in parts if part.role == "bias"]
        if named := self.raw_parameters(module, factors):
            self.place_raw(module, factors, named)
        elif self.adapter.config.method == "LORA":
            weight = "in_proj_weight" if module in self.multihead else "weight"
            for leaf, chosen in ((weight, factors), ("bias", bias)):
                if chosen:
                    self.place(module, f"{module}.{leaf}", chosen)
        elif factors:
            self.place_method(module, factors)

    def place_method(self, module: str, parts: Sequence[Part]) -> None:
        """The factors of a method other than LoRA, over the weight and the bias of their module."""
        method, everything = methods()[self.adapter.config.method], [*parts, *self.shared]
        roles = {part.role: self.shape(part) for part in everything}
        changed = {leaf for leaf in ("weight", "bias") if self.place_leaf(module, leaf, everything, roles)}
        if changed >= set(method.changes):
            return
        found = _named_by(module, self.base)
        if not found and not self.lies_otherwise(module, method):
            self.orphan(*parts)
        for source in found:
            site = Site(parameter=f"{module}.weight", shape=self.metas[source].shape, roles=roles)
            self.leave(source, f"{module}: {no_recipe(site)}")

    def lies_otherwise(self, module: str, method: Method) -> bool:
        """Mark the tensors that a file keeps a module's parameters in with others, as no other method is cut."""
        files = {link.file for leaf in method.changes for link in self.linked(f"{module}.{leaf}")}
        self.work.doubts |= {
            file: f"{module} lies in {file} with other rows, and {method.name} is not cut so" for file in files
        }
        return bool(files)

    def place_leaf(self, module: str, leaf: str, parts: Sequence[Part], roles: Mapping[str, tuple[int, ...]]) -> bool:
        """Give one parameter of a module its step; whether anything was said of it."""
        parameter = f"{module}.{leaf}"
        source = lookup(parameter, self.metas, self.config)
        if source is None:
            return False
        try:
            site = self.site(module, parameter, source, roles, leaf)
        except ValueError as reason:
            self.work.doubts[source] = str(reason)
            return True
        site = replace(site, dtypes={part.role: self.adapter.checkpoint.metas()[part.tensor].dtype for part in parts})
        recipes, doubts = recipes_for(site), methods()[site.method].doubts
        if recipes and (doubt := self.doubt(module, source, site, parts)):
            self.leave(source, f"{parameter}: {doubt}")
        elif recipes and doubts and (unknown := doubts(site)):
            self.work.doubts[source] = unknown
        elif recipes and _is_pruned(site):
            self.work.pruned.add(source)
        elif recipes:
            self.work.module.setdefault(source, module)
            for recipe in recipes:
                self.add(source, parameter, recipe, self.step(site, module, recipe, parts), self.index)
        return bool(recipes)

    def leave(self, source: str, doubt: str) -> None:
        """Say why a base tensor that the adapter names cannot be recomputed."""
        if doubt not in self.work.contradictions:
            self.work.contradictions.append(doubt)
        self.work.doubts[source] = doubt

    def add(self, source: str, parameter: str, recipe: Recipe, step: Step, turn: int) -> None:
        """One more step of a base tensor: what loading does first, then by adapter, copies before deltas."""
        order = 0 if source == parameter else 1
        turn = LOADED if recipe.loads else turn
        self.work.steps.setdefault(source, []).append((turn, not recipe.copies, order, step))

    def place(self, module: str, parameter: str, parts: Sequence[Part]) -> None:
        """Find the base tensor of one parameter and the recipe that fits it, or say why there is none."""
        source = lookup(parameter, self.metas, self.config)
        if source not in (None, parameter) and self.mirrors(source, parts):
            return
        whole = {part.role for part in parts} == {"S"}
        if source is None and (links := self.linked(parameter)):
            for link in links:
                self.place_link(module, parameter, parts, link)
        elif source is None or (whole and not parts[0].wrapped and self.unties(parameter, source)):
            self.place_new(parameter, parts, whole)
        else:
            self.place_at(source, module, parameter, parts)

    def unties(self, parameter: str, source: str) -> bool:
        """A head saved whole where the file holds only its embedding: the head becomes a tensor of its own."""
        tied = registry.load("layouts")["tied-head"].resolve(parameter, self.metas, self.config)
        return source != parameter and source == tied

    def mirrors(self, source: str, parts: Sequence[Part]) -> bool:
        """Whether a tied head's factors are the embedding's own, turned over, as ensure_weight_tying writes them; or
        its whole tensor the embedding's.

        PEFT ties the two when it loads them, so the shared tensor has one delta, or one copy.
        """
        if not self.adapter.config.raw.get("ensure_weight_tying"):
            return False
        if {part.role for part in parts} == {"S"}:
            return [self.shape(part) for part in self.modules.get(source, ())] == [self.shape(part) for part in parts]
        twins = [module for module in self.modules if lookup(f"{module}.weight", self.metas, self.config) == source]
        embedded = {part.role: self.shape(part) for module in twins for part in self.modules[module]}
        own = {part.role: self.shape(part) for part in parts}
        turned = {"A": embedded.get("embedding_B", ())[::-1], "B": embedded.get("embedding_A", ())[::-1]}
        return own == turned

    def place_link(self, module: str, parameter: str, parts: Sequence[Part], link: Link) -> None:
        """The same, where a file holds the parameter under another name, or holds some rows of it, or more."""
        whole = link.rows is None and link.file_rows is None and link.expert is None and not link.transposed
        roles = [part.role for part in parts]
        if any(part.view for part in parts) or not (whole or {"A", "B", "bias"} >= set(roles)):
            self.work.doubts[link.file] = (
                f"{parameter} lies in {link.file} with other rows, and {roles[0]!r} is not cut so"
            )
            return
        views = row_views(link, roles)
        cut = [replace(part, view=views.get(part.role)) for part in parts]
        self.place_at(link.file, module, parameter, cut, window=link.file_rows, turned=link.transposed)

    def place_at(
        self,
        source: str,
        module: str,
        parameter: str,
        parts: Sequence[Part],
        *,
        window: tuple[int, int] | None = None,
        turned: bool | None = None,
    ) -> None:
        """Give a base tensor the step of these parts, or a doubt.

        window   the rows of the base tensor that are the parameter      turned   it is kept the other way round
        """
        roles = {part.role: self.shape(part) for part in parts}
        whole = roles.keys() == {"S"}
        self.work.module.setdefault(source, parameter.rpartition(".")[0] if whole else module)
        site = self.site(module, parameter, source, roles)
        if window:
            site = replace(site, shape=(window[1] - window[0], *site.shape[1:]))
        if turned is not None:
            site = replace(site, in_out=turned != bool(site.in_out))
        recipes = recipes_for(site)
        doubt = self.doubt(module, source, site, parts) or ("" if recipes else no_recipe(site))
        if (window or turned) and any(recipe.loads for recipe in recipes):
            doubt = f"PEFT decomposes it as it is loaded, and {source} holds it otherwise"
        if any(changes_base(one.config.raw) for one in self.adapter.members):
            doubt = "PEFT decomposes the base for an adapter that is combined, and once more for the combination"
        if doubt:
            self.leave(source, f"{parameter}: {doubt}")
            return
        # A base tensor carried under `base_layer` is put in place as the adapter is loaded, before anything is merged.
        turn = LOADED if whole and parts[0].wrapped else self.index
        for recipe in recipes:
            step = replace(self.step(site, module, recipe, parts), window=window)
            self.add(source, parameter, recipe, step, turn)
        if whole:
            self.work.shapes[source] = roles["S"]
            self.work.own_copy |= set() if parts[0].wrapped else {source}
            self.work.shared |= {source} if self.adapter.config.raw.get("ensure_weight_tying") else set()

    @cached_property
    def memory(self) -> Mapping[str, Sequence[Link]]:
        """The parameters of the loaded model, where layouts know that the file holds them otherwise."""
        return by_memory(self.metas, self.config)

    def linked(self, parameter: str) -> Sequence[Link]:
        """Where the file holds a parameter that is not in it by name."""
        return self.memory.get(parameter) or self.memory.get(loaded_as(parameter, self.config), ())

    def raw_parameters(self, module: str, parts: Sequence[Part]) -> list[str]:
        """The raw parameters of a module that the configuration targets, if these parts are their factors."""
        named = self.adapter.config.raw.get("target_parameters")
        if self.adapter.config.method != "LORA" or not named or not parts:
            return []
        return leaves(module, named) if lookup(f"{module}.weight", self.metas, self.config) is None else []

    def place_raw(self, module: str, parts: Sequence[Part], named: Sequence[str]) -> None:
        """LoRA on raw parameters: find out which pair of factors is whose, then place each."""
        shapes = {leaf: shape for leaf in named if (shape := self.raw_shape(f"{module}.{leaf}"))}
        stored = {part.tensor: self.shape(part) for part in parts}
        chosen = pairs(parts, shapes, stored)
        for leaf, pair in chosen.items():
            self.place_parameter(f"{module}.{leaf}", pair, shapes[leaf])
        if not chosen:
            files = [link.file for leaf in shapes for link in self.links(f"{module}.{leaf}")]
            for source in files:
                self.leave(source, f"{module}: which factors belong to which of {', '.join(named)} cannot be told")
            self.orphan(*(() if files else parts))

    def links(self, parameter: str) -> Sequence[Link]:
        """Where the file holds a parameter, under its own name or otherwise."""
        found = lookup(parameter, self.metas, self.config)
        return [Link(file=found, memory=parameter)] if found else self.linked(parameter)

    def raw_shape(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of a parameter as it is loaded, put together from its parts."""
        found = self.links(parameter)
        if not found:
            return None
        shape = self.metas[found[0].file].shape
        experts = {link.expert for link in found}
        if experts == {None}:
            return shape
        rows = max(link.rows[1] if link.rows else shape[0] for link in found)
        return (len(experts), rows, *shape[1:])

    def place_parameter(self, parameter: str, parts: Sequence[Part], shape: tuple[int, ...]) -> None:
        """One pair of factors over the tensor, or the tensors, that hold a raw parameter."""
        a, b = (next(self.shape(part) for part in parts if part.role == role) for role in "AB")
        square = a[1] == b[0]
        in_out = self.in_out.model in IN_OUT_EXPERTS if square else shape[-2:] == (a[1], b[0])
        for link in self.links(parameter):
            if link.expert is None:
                self.place_at(link.file, parameter, parameter, parts, turned=square and in_out)
                continue
            views = expert_views(link, shape[0], a[0], in_out)
            cut = [replace(part, view=views[part.role]) for part in parts]
            self.place_at(link.file, parameter, parameter, cut, turned=link.transposed != (square and in_out))

    def site(
        self, module: str, parameter: str, source: str, roles: Mapping[str, tuple[int, ...]], leaf: str = "weight"
    ) -> Site:
        """What is known of one base tensor and its adapter parts.

        raises   ValueError: the files do not tell what the method's formula needs
        """
        shape = self.work.shapes.get(source, self.metas[source].shape)
        return Site(
            parameter=parameter,
            shape=shape,
            roles=roles,
            in_out=self.in_out.of(shape),
            multihead=module.endswith(".out_proj") and module.removesuffix(".out_proj") in self.multihead,
            method=self.adapter.config.method,
            leaf=leaf,
            settings={} if roles.keys() == {"S"} else self.settings(module),
            dtype=self.metas[source].dtype,
        )

    def settings(self, module: str) -> Mapping[str, Any]:
        """What the configuration says of one module: for LoRA all of it, for other methods what their formulas need.

        Where PEFT decomposes the base of a LoRA adapter, it divides by the scale that the adapter was loaded with.
        """
        config = self.adapter.config
        if self.adapter.members:
            return shares(self.adapter, module)
        if config.method == "LORA":
            if not changes_base(config.raw):
                return config.raw
            return {**config.raw, "scale": replace(scale_of(self.adapter, module), weight=1.0).value}
        choose = methods()[config.method].settings
        try:
            return choose(config.raw, module, self.targets) if choose else {}
        except TypeError as problem:
            raise AdapterConfigError(
                f"adapter_config.json of {self.adapter.location} has a value that no {config.method} has: {problem}",
                hint="mend the configuration, or save the adapter again with save_pretrained",
            ) from None

    @cached_property
    def targets(self) -> Mapping[str, tuple[int, ...]]:
        """The modules with factors, and the shapes of their weights."""
        found = {}
        for module, parts in self.modules.items():
            name = lookup(f"{module}.weight", self.metas, self.config)
            if name and any(part.role not in ("S", "bias") for part in parts):
                found[module] = self.metas[name].shape
        return found

    def place_new(self, parameter: str, parts: Sequence[Part], whole: bool) -> None:
        """A tensor that the base lacks: a head the adapter brings whole, or parts that name nothing."""
        if not whole or len(parts) > 1:
            self.orphan(*parts)
            return
        if parameter in self.work.new:
            self.work.doubts[parameter] = SEVERAL
        meta = self.adapter.checkpoint.metas()[parts[0].tensor]
        self.work.new[parameter] = TensorMeta(name=parameter, shape=meta.shape, dtype=meta.dtype)
        self.work.module[parameter] = parameter.rpartition(".")[0]
        step = Step(recipe=registry.load("recipes")["copy"], adapter=self.index, factors={"S": parts[0].tensor})
        self.work.steps[parameter] = [(self.index, False, 0, step)]

    def doubt(self, module: str, source: str, site: Site, parts: Sequence[Part]) -> str:
        """Why these parts, though they name a base tensor, do not say what it becomes; nothing, if they do."""
        if len({part.role for part in parts}) < len(parts):
            return f"several adapter tensors for one place: {', '.join(part.tensor for part in parts)}"
        if "S" in site.roles and not parts[0].wrapped and source in self.work.own_copy:
            return SEVERAL
        if any(0 in shape for shape in site.roles.values()) and not _is_pruned(site):
            return "an adapter tensor without elements"
        if "rows" in site.roles:
            return _rows_doubt(tokens_of(self.adapter, module), site)
        if site.method != "LORA":
            contradicts = methods()[site.method].contradicts
            return contradicts(site) if contradicts else ""
        if "bias" in site.roles and not self.adapter.config.lora_bias:
            return "the configuration does not say lora_bias, and there is a bias of lora_B"
        factors = site.roles.keys() & {"A", "embedding_A"}
        if factors and self.adapter.config.dora != ("m" in site.roles):
            said = "says DoRA, and there is no magnitude" if self.adapter.config.dora else "does not say DoRA"
            return f"the configuration {said}" + ("" if self.adapter.config.dora else ", and there is a magnitude")
        return ""

    def step(self, site: Site, module: str, recipe: Recipe, parts: Sequence[Part]) -> Step:
        """One recipe with the names of its factors and the scale of its module."""
        # PEFT makes the two layers of a MultiheadAttention as one target: both have the scale of the whole.
        target = module.removesuffix(".out_proj") if site.multihead else module
        named = {role: lookup(f"{module}.{leaf}", self.metas, self.config) for role, leaf in recipe.companions.items()}
        return Step(
            recipe=recipe,
            adapter=self.index,
            factors={part.role: part.tensor for part in parts},
            scale=None if recipe.copies else self.scale(target, site),
            tokens=tokens_of(self.adapter, module) if "rows" in site.roles else (),
            site=site,
            views={part.role: part.view for part in parts if part.view},
            companions={role: name for role, name in named.items() if name},
        )

    def scale(self, module: str, site: Site) -> Scale | None:
        """The scale of a module; r is what lora_A has, and the configuration is told where it says another."""
        if site.method != "LORA" and not methods()[site.method].alpha:
            return None
        said = scale_of(self.adapter, module)
        if site.method != "LORA" or module in self.adapter.scales:
            return said
        factor = site.roles.get("A") or site.roles.get("embedding_A")
        if not factor or factor[0] == said.rank:
            return said
        if len(site.shape) == 3 and factor[0] == said.rank * site.shape[0]:
            return said
        told = f"{module}: the configuration says r = {said.rank}, lora_A has {factor[0]} rows"
        self.work.contradictions.append(told)
        return replace(said, rank=factor[0])

    def leave_targets(self, reason: str) -> None:
        """Mark every weight that the configuration targets, or all where it does not tell: only shared tensors came."""
        targets = self.adapter.config.targets
        known = [name for name in self.metas if name.endswith(".weight")]
        named = [name for name in known if is_target(name.removesuffix(".weight"), targets)]
        for source in named or known:
            self.work.doubts[source] = reason

    def leave_undecided(self, module: str, parts: Sequence[Part], reason: str) -> None:
        """Mark every base tensor that an adapter nobody here can recompute may have changed."""
        found = _named_by(module, self.base)
        if not found:
            self.orphan(*parts)
        self.work.doubts |= dict.fromkeys(found, reason)


def _is_pruned(site: Site) -> bool:
    """Whether the method says of these factors that training left them no rank."""
    method = methods().get(site.method)
    return bool(method and method.pruned and method.pruned(site))


def _rows_doubt(tokens: Sequence[int], site: Site) -> str:
    count, vocabulary = site.roles["rows"][0], site.shape[0]
    if len(tokens) != count:
        return f"{count} trained rows, and the configuration names {len(tokens)} for them"
    beyond = [token for token in tokens if not 0 <= token < vocabulary]
    return f"row {beyond[0]} is trained, and there are {vocabulary}" if beyond else ""


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
