"""Base and adapters -> what is to be written: every tensor and the steps that make it, the files, the configuration.

The plan is that of a check whose merged side is what the base and the adapters ask for. What keeps a report over it
from being verified is told here, before a byte is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_check import registry
from lora_check.errors import InputError, UnknownFormatError, UsageError
from lora_check.findings import best_verdict, structural
from lora_check.formats._safetensors_files import SUFFIX
from lora_check.inputs import Opened
from lora_check.plan import make_plan
from lora_check.sites import Work, gather
from lora_check.types import FLOATS, Checkpoint, Finding, Plan, TensorMeta, Verdict
from lora_check.writing.companions import Changes, configured
from lora_check.writing.layout import Layout, in_shards, like_base

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"} | {one: one for one in FLOATS}
"""What a dtype may be called -> its torch name."""

Metas = Mapping[str, TensorMeta]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """A checkpoint before it is written: names, shapes and dtypes, and no numbers."""

    tensors: Metas
    location: str = ""
    config: Mapping[str, Any]

    def metas(self) -> Metas:
        """Name -> what its header is to say."""
        return self.tensors

    def read(self, name: str) -> Tensor:
        """A tensor of that shape and dtype without data."""
        import torch

        meta = self.tensors[name]
        return torch.empty(meta.shape, dtype=getattr(torch, meta.dtype), device="meta")

    def close(self) -> None:
        """There is nothing to let go of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """All that is known before a tensor is read; `warnings` are what headers and configurations give rise to."""

    plan: Plan
    sketch: Sketch
    changes: Changes
    layout: Layout
    warnings: tuple[str, ...] = ()


def proposed(sources: Opened, dtype: str | None, limit: str | int | None, place: str) -> Proposal:
    """What is to be written at a place, in which files; headers only.

    dtype    of every floating tensor; None: its own          limit   bytes of a shard; None: BASE's files
    raises   InputError: something that nobody here can recompute; UsageError: a dtype or a limit that is none
    """
    wanted = _dtype(dtype)
    _refuse_codes(sources.base, wanted)
    work = Work()
    for index, adapter in enumerate(sources.adapters):
        gather(index, adapter, sources.base, work)
    changes = _changes(sources.base, work, wanted)
    config = configured(sources.base.config, changes)
    sketch = Sketch(location=place, config=config, tensors=_metas(sources.base, work, wanted))
    plan = make_plan(sources.base, sources.adapters, sketch)
    found = structural(plan)
    if problem := _problem(plan, found):
        raise InputError(f"adapter: {problem}; nothing was written", hint="mend the adapter, or give its own base")
    told = tuple(_told(one) for one in found if one.severity == "warning")
    layout = _layout(sources.base, sketch.metas(), limit)
    return Proposal(plan=plan, sketch=sketch, changes=changes, layout=layout, warnings=told)


def _dtype(name: str | None) -> str:
    if name is not None and name not in DTYPES:
        raise UsageError(f"{name!r} is no dtype to merge in", hint=f"one of {', '.join(DTYPES)}")
    return DTYPES[name] if name is not None else ""


def _refuse_codes(base: Checkpoint, dtype: str) -> None:
    coded = [meta for meta in base.metas().values() if meta.codes]
    sealed = [meta for meta in coded if meta.sealed]
    if sealed:
        raise UnknownFormatError(
            f"base: {sealed[0].name} is stored as {sealed[0].codes}, {sealed[0].sealed}",
            hint="decode the model with the library that made it, and merge into the result",
        )
    if coded and not dtype:
        raise UsageError(
            f"base: {len(coded)} tensors are stored as {coded[0].codes}, and a merge rounded to codes loses much of it",
            hint="give --dtype bfloat16 to have BASE decoded and the merge stored so, or give the original",
        )


# ------------------------------------------------------------------------------ tensors


def _metas(base: Checkpoint, work: Work, dtype: str) -> dict[str, TensorMeta]:
    """Every tensor that is to be written, in the order of BASE; what an adapter adds comes last, in BASE's dtype."""
    stored = {
        name: TensorMeta(name=name, shape=work.shapes.get(name, meta.shape), dtype=_stored(meta.dtype, dtype))
        for name, meta in base.metas().items()
    }
    common = max(FLOATS, key=lambda one: sum(meta.nbytes for meta in stored.values() if meta.dtype == one))
    return stored | {
        name: replace(meta, dtype=common if meta.dtype in FLOATS else meta.dtype) for name, meta in work.new.items()
    }


def _stored(found: str, wanted: str) -> str:
    return wanted if wanted and found in FLOATS else found


def _layout(base: Checkpoint, metas: Metas, limit: str | int | None) -> Layout:
    files: Sequence[Path] = getattr(base, "files", ())
    lies = files and all(path.suffix == SUFFIX for path in files) and not any(m.codes for m in base.metas().values())
    return like_base(metas, files) if lies and limit is None else in_shards(metas, limit)


# ------------------------------------------------------------------------------ configuration


def _changes(base: Checkpoint, work: Work, dtype: str) -> Changes:
    """What the adapters do to what a configuration says."""
    metas, config = base.metas(), base.config
    trained = any(step.recipe.name.endswith("-rows") for steps in work.steps.values() for *_, step in steps)
    return Changes(
        dtype=dtype,
        vocabulary=next(_resized(metas, config, work), None),
        decoded=any(meta.codes for meta in metas.values()),
        untied=bool(config.get("tie_word_embeddings")) and _own_head(metas, config, work),
        retold=trained,
    )


def _resized(metas: Metas, config: Mapping[str, Any], work: Work) -> Iterator[tuple[int, int]]:
    """Rows before and after, of matrices with a row for each word."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    words = {part["vocab_size"] for part in parts if part.get("vocab_size") is not None}
    for name, shape in work.shapes.items():
        before = metas[name].shape
        if len(before) == len(shape) == 2 and before[0] != shape[0] and before[0] in words:
            yield before[0], shape[0]


def _own_head(metas: Metas, config: Mapping[str, Any], work: Work) -> bool:
    """Whether a head is written that is not its embedding: an adapter brings one, or changes one of two in the file."""
    layout = registry.load("layouts")["tied-head"]
    heads = [meta for meta in {**metas, **work.new}.values() if layout.drops(meta, {"tie_word_embeddings": True})]
    pairs = {head.name: layout.resolve(head.name, metas, config) for head in heads}
    return any(head in work.new or head in work.steps or other in work.steps for head, other in pairs.items() if other)


# ------------------------------------------------------------------------------ what keeps it from being verified


def _problem(plan: Plan, findings: Sequence[Finding]) -> str:
    """The first thing that keeps a report over this merge from being verified; nothing, if there is none."""
    doubts = [one for one in plan.pairings if one.undecidable]
    if doubts:
        return f"{doubts[0].merged.name} cannot be recomputed: {doubts[0].undecidable}{_and_more(doubts)}"
    if plan.contradictions:
        return f"configuration and tensors disagree: {plan.contradictions[0]}{_and_more(plan.contradictions)}"
    if plan.orphans:
        index, name = plan.orphans[0]
        return f"{name} of {plan.adapters[index].location} names nothing in BASE{_and_more(plan.orphans)}"
    if all(one.kind == "bystander" for one in plan.pairings):
        return "it changes no tensor of BASE"
    found = [one for one in findings if best_verdict([one]) is not Verdict.VERIFIED]
    return f"{_told(found[0])}{_and_more(found)}" if found else ""


def _told(finding: Finding) -> str:
    return f"{finding.message} ({finding.code})"


def _and_more(found: Sequence[Any]) -> str:
    return f", and {len(found) - 1} more" if len(found) > 1 else ""
