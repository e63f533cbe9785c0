"""Headers -> Plan: pair every tensor of MERGED with the steps that must have made it. No tensor data is read.

`sites` has gathered what each adapter does to each base tensor; here the names of base and merged are matched, and
every name of base, adapters and merged is put in exactly one field of the Plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from lora_check import registry
from lora_check.folders import look
from lora_check.links import lookup
from lora_check.promises import is_target
from lora_check.sites import Work, gather
from lora_check.types import FLOATS, Adapter, Checkpoint, Mismatch, Pairing, Plan, Step, TensorMeta

HEADLESS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
}
"""task_type of an adapter -> how the classes end that it is trained for; none of them has a head over words."""


def make_plan(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    merged: Checkpoint,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Plan:
    """Pair every tensor of MERGED with the base tensor and the adapter parts that must have made it.

    include, exclude   glob patterns on merged names; what they leave out is listed in `Plan.skipped`
    """
    work = Work()
    for index, adapter in enumerate(adapters):
        gather(index, adapter, base, work)
    named = _Names(base, merged, work, headless=_headless(adapters, merged.config))
    pairings = [_pairing(name, meta, named, work) for name, meta in merged.metas().items() if name in named.sources]
    paired = {one.merged.name: one for one in pairings if _selected(one.merged.name, include, exclude)}
    chosen = [_overlapping(one, work) for one in paired.values()]
    unexplained = [name for name in merged.metas() if name not in named.sources]
    computed = [name for name in unexplained if _is_computed(merged.metas()[name], base.config)]
    extra = [name for name in unexplained if name not in computed]
    return Plan(
        pairings=tuple(one for one in chosen if one.wanted or not _reshaped(one, work)),
        missing=tuple(named.missing),
        extra=tuple(extra),
        missing_shapes={name: _shape_of(name, base, work) for name in named.missing},
        extra_shapes={name: merged.metas()[name].shape for name in extra},
        reshaped=tuple(mismatch for one in chosen if not one.wanted and (mismatch := _reshaped(one, work))),
        retyped=tuple(mismatch for one in chosen if (mismatch := _retyped(one))),
        orphans=tuple(work.orphans),
        contradictions=tuple(work.contradictions),
        idle=tuple(_idle(adapters, base)),
        pruned=tuple(one.merged.name for one in chosen if one.pruned),
        skipped=tuple(one.merged.name for one in pairings if one.merged.name not in paired),
        dropped=tuple(named.dropped),
        computed=tuple(computed),
        untied=tuple(named.untied()),
        doubled=tuple(sorted(named.heads)),
        renamed=dict(_renamed(named, base)),
        homes=_homes(merged),
        adapters=tuple(adapters),
        base_location=base.location,
        base_config=base.config,
        merged_config=merged.config,
        base_metas=base.metas(),
        merged_metas=merged.metas(),
        base_folder=look(base),
        merged_folder=look(merged),
    )


# ------------------------------------------------------------------------------ base names and merged names


class _Names:
    """Which base (or new) tensor each merged tensor comes from; which are missing, which were rightly dropped."""

    def __init__(self, base: Checkpoint, merged: Checkpoint, work: Work, *, headless: bool) -> None:
        self.base, self.metas, self.work = base.metas(), merged.metas(), work
        self.config, self.base_config, self.headless = merged.config or base.config, base.config, headless
        wanted = (*self.base, *work.new)
        self.sources = {name: name for name in wanted if name in self.metas}
        self.missing: list[str] = []
        self.dropped: list[str] = []
        self.heads: set[str] = set()
        for name in sorted((one for one in wanted if one not in self.sources), key=self._is_head):
            self._place(name)
        for name in self.metas:
            if name not in self.sources:
                self._explain(name)

    def _place(self, name: str) -> None:
        """A base name that MERGED lacks: renamed, tied to its embedding, rebuilt by the model class, or missing."""
        found = lookup(name, self.metas, self.config)
        touched = name in self.work.steps
        if found is not None and found not in self.sources:
            self.sources[found] = name
        elif not touched and self._has_no_place(name):
            self.dropped.append(name)
        else:
            self.missing.append(name)

    def _has_no_place(self, name: str) -> bool:
        """What the class of MERGED rebuilds, ties or lacks, and leaves out with nothing lost."""
        if self.headless and self._is_head(name):
            return True
        return _drops(self.base[name], self.config) and not self._unties(name)

    def untied(self) -> Iterator[str]:
        """Heads with numbers of their own: the adapter carries them whole, or BASE says that it keeps them apart."""
        own = [name for name in self.work.new if self._is_head(name)]
        kept = [name for name in self.base if self.base_config.get("tie_word_embeddings") is False]
        copied = [name for name in self.base if name in self.work.own_copy]
        yield from dict.fromkeys((*own, *(name for name in (*kept, *copied) if self._is_head(name))))

    def _is_head(self, name: str) -> bool:
        """Whether a configuration can tie this tensor to another one: it is placed after what has a name of its own."""
        meta = self.base.get(name) or self.work.new[name]
        return bool(registry.load("layouts")["tied-head"].drops(meta, {"tie_word_embeddings": True}))

    def _unties(self, name: str) -> bool:
        """A head that BASE keeps apart is lost where MERGED leaves it out, whatever MERGED's configuration says."""
        return self._is_head(name) and self.base_config.get("tie_word_embeddings") is False

    def _explain(self, name: str) -> None:
        """A merged name that the base lacks: a head written out beside the embedding it is tied to."""
        tied = registry.load("layouts")["tied-head"].resolve
        found = tied(name, self.base, self.base_config)
        placed = found is not None and found in self.sources.values()
        if found is not None and placed and self.base[found].shape == self.metas[name].shape:
            self.sources[name] = found
            self.heads.add(name)


def _headless(adapters: Sequence[Adapter], config: Mapping[str, Any]) -> bool:
    """Whether MERGED is of a class without an output head over words, and an adapter was trained for such a class."""
    classes = tuple(str(one) for one in config.get("architectures") or ())
    tasks = [HEADLESS.get(str(adapter.config.raw.get("task_type"))) for adapter in adapters]
    return any(one.endswith(ending) for ending in tasks if ending for one in classes)


def _renamed(named: _Names, base: Checkpoint) -> Iterator[tuple[str, str]]:
    """What BASE and MERGED call differently: whole tensors, and those that one of them fuses, splits or stacks."""
    pieces: Mapping[str, Sequence[Any]] = getattr(base, "pieces", {})
    for name, source in named.sources.items():
        if name != source and name not in named.heads:
            yield name, source
        elif name in pieces:
            yield name, pieces[name][0].source


def _homes(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor -> the file that holds it, of a checkpoint that lies in several; of what wraps one, that one's."""
    found, inner = getattr(checkpoint, "homes", None), getattr(checkpoint, "inner", None)
    if found is None:
        return _homes(inner) if inner is not None else {}
    return dict(found) if len(set(found.values())) > 1 else {}


def _shape_of(name: str, base: Checkpoint, work: Work) -> tuple[int, ...]:
    return (work.new.get(name) or base.metas()[name]).shape


def _is_computed(meta: TensorMeta, config: Mapping[str, Any]) -> bool:
    """What a model of that configuration leaves out of its file, and is no head that it ties."""
    layouts = (layout for name, layout in registry.load("layouts").items() if name != "tied-head")
    return any(layout.drops and layout.drops(meta, config) for layout in layouts)


def _drops(meta: TensorMeta, config: Mapping[str, Any]) -> bool:
    return any(layout.drops and layout.drops(meta, config) for layout in registry.load("layouts").values())


def _pairing(name: str, meta: TensorMeta, named: _Names, work: Work) -> Pairing:
    source = named.sources[name]
    gathered = sorted(work.steps.get(source, ()), key=lambda item: item[:3])
    follows = name not in named.heads or source not in work.own_copy or source in work.shared
    steps = tuple(step for *_, step in gathered if follows or step.recipe.name != "copy")
    doubt = work.doubts.get(source, "") or _storage_doubt(meta, named.base.get(source), steps) or _dora_doubt(steps)
    return Pairing(
        merged=meta,
        base=named.base.get(source),
        steps=steps,
        module=name.rpartition(".")[0] if name in named.heads else _module(source, work),
        undecidable=doubt,
        pruned=source in work.pruned,
    )


def _module(source: str, work: Work) -> str:
    return work.module.get(source) or source.rpartition(".")[0] or source


def _storage_doubt(meta: TensorMeta, base: TensorMeta | None, steps: Sequence[Step]) -> str:
    metas = [one for one in (meta, base) if one is not None]
    deltas = [step for step in steps if not step.recipe.copies]
    if not steps and base and base.codes and base.codes == meta.codes:
        return ""
    if len(deltas) > 1 and meta.codes:
        return f"several adapters in {meta.codes}: each merge may have been rounded to it before the next"
    computed = deltas or (steps and meta.codes) or len({one.dtype for one in metas}) > 1
    strange = [one for one in metas if one.dtype not in FLOATS]
    if not computed or not strange:
        return ""
    if strange[0].sealed:
        return f"{strange[0].stored_as}, {strange[0].sealed}"
    return f"rounding to {strange[0].dtype} is not modelled"


def _dora_doubt(steps: Sequence[Step]) -> str:
    deltas = [step for step in steps if not step.recipe.copies]
    if len(deltas) > 1 and any(step.recipe.apply and not step.recipe.method for step in deltas):
        return (
            "several adapters with a DoRA one among them: PEFT 0.12 to 0.20 divide by the norm of the merged weight, "
            "0.21 by that of the unmerged one, and neither is what the adapters compute unmerged"
        )
    return ""


def _wanted(pairing: Pairing, work: Work) -> tuple[int, ...]:
    """The shape that base and adapters give a merged tensor."""
    source = pairing.base.name if pairing.base else pairing.merged.name
    return work.shapes.get(source) or (pairing.base.shape if pairing.base else pairing.merged.shape)


def _overlapping(pairing: Pairing, work: Work) -> Pairing:
    """The pairing, with the shape that it should have where it has rows to compare though it has more or fewer."""
    wanted, shape = _wanted(pairing, work), pairing.merged.shape
    metas = [one for one in (pairing.merged, pairing.base) if one]
    alike = len(shape) > 1 and wanted[1:] == shape[1:] and 0 not in (*wanted, *shape)
    if wanted == shape or not alike or pairing.undecidable or any(one.codes for one in metas):
        return pairing
    return replace(pairing, wanted=wanted) if all(map(_goes_by_rows, pairing.steps)) else pairing


def _goes_by_rows(step: Step) -> bool:
    """Whether the first rows after a step follow from the first rows before it."""
    recipe = step.recipe
    whole = recipe.prepare or recipe.columns or recipe.reads or recipe.settled or recipe.stacked or recipe.loads
    return not whole and step.window is None


def _reshaped(pairing: Pairing, work: Work) -> Mismatch | None:
    wanted = _wanted(pairing, work)
    if wanted == pairing.merged.shape:
        return None
    return Mismatch(name=pairing.merged.name, expected=str(wanted), actual=str(pairing.merged.shape))


def _retyped(pairing: Pairing) -> Mismatch | None:
    if pairing.base is None or pairing.base.stored_as == pairing.merged.stored_as:
        return None
    return Mismatch(name=pairing.merged.name, expected=pairing.base.stored_as, actual=pairing.merged.stored_as)


def _selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    wanted = not include or any(fnmatchcase(name, glob) for glob in include)
    return wanted and not any(fnmatchcase(name, glob) for glob in exclude)


# ------------------------------------------------------------------------------ targets without factors


def _idle(adapters: Iterable[Adapter], base: Checkpoint) -> Iterator[str]:
    """Modules of the base that an adapter's target_modules name and its file has no factors for."""
    for adapter in adapters:
        if (adapter.config.method != "LORA" and adapter.config.unsupported) or not adapter.config.targets:
            continue
        adapted = {part.module for part in adapter.parts if part.role not in ("S", "bias")}
        leaves = {module.rsplit(".", 1)[-1] for module in adapted}
        endings = {ending for module in adapted for ending in _endings(module)}
        for name, meta in base.metas().items():
            module = name.removesuffix(".weight")
            named = module != name and len(meta.shape) > 1 and is_target(module, adapter.config.targets)
            alike = named and module.rsplit(".", 1)[-1] in leaves
            if alike and module not in endings and adapted.isdisjoint(_endings(module)):
                yield module


def _endings(module: str) -> Iterator[str]:
    """'a.b.c', 'b.c', 'c': one of two names of a module may have more in front than the other."""
    while module:
        yield module
        module = module.partition(".")[2]
