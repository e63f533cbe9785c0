"""The line: open, plan, expect and compare, diagnose, report. Readable aloud; only this module knows the order."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_check import diagnose, registry
from lora_check.compare import Measure, compare, compare_copy, likely
from lora_check.errors import AdapterConfigError, UsageError, WrongInputError
from lora_check.locations import open_checkpoint, read_adapter_config
from lora_check.plan import make_plan
from lora_check.report import Report
from lora_check.rounding import ADD, FORMATS, arithmetics
from lora_check.types import (
    Adapter,
    Arithmetic,
    Case,
    Checkpoint,
    Comparison,
    Finding,
    LoadedStep,
    Pairing,
    Plan,
    RunInfo,
    Step,
    Verdict,
)

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
SAMPLES = 3
"""Targets whose first rows are asked which arithmetic made the model, before the pass begins."""


def check(
    base: Any,
    adapters: Any,
    merged: Any,
    *,
    command: str = "report",
    weights: Sequence[float] | None = None,
    combination: str | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    engine: str = "local",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Recompute what every tensor of MERGED must be, compare, and name the mistakes.

    base, merged      a location, a state dict or an nn.Module
    adapters          one of these, or several to be merged one after the other
    weights           a factor on each adapter's scale
    include, exclude  glob patterns on tensor names; what they leave out makes the verdict inconclusive
    select, ignore    codes or their beginnings; they filter the list of findings, never the verdict
    raises            LoraCheckError: an input that cannot be read, or a request that cannot be met
    """
    _refuse_what_is_missing(combination, device)
    began = time.monotonic()
    with _opened(base, adapters, merged, weights) as (base_file, adapter_files, merged_file), _one_thread():
        plan = make_plan(base_file, adapter_files, merged_file, include=include, exclude=exclude)
        job = _Job(base_file, adapter_files, merged_file, _hints(plan, base_file, adapter_files, merged_file))
        outcomes = _run(job, plan, registry.load("engines")[engine].run, jobs or _cores(), progress)
        diagnoses = [one.diagnosis for one in outcomes if one.diagnosis]
        comparisons = diagnose.assign([one.comparison for one in outcomes], diagnoses)
        findings = diagnose.conclude(plan, comparisons, diagnoses)
        listed = tuple(one for one in findings if _listed(one, select, ignore))
        return Report(
            run=_run_info(command, job, plan, time.monotonic() - began),
            comparisons=comparisons,
            findings=listed,
            verdict=_verdict(comparisons, findings),
            withheld=len(findings) - len(listed),
        )


def plan(base: Any, adapters: Any, merged: Any, *, weights: Sequence[float] | None = None) -> Plan:
    """What `check` would compare with what: headers only, no tensor data is read."""
    with _opened(base, adapters, merged, weights) as (base_file, adapter_files, merged_file):
        return make_plan(base_file, adapter_files, merged_file)


# --------------------------------------------------------------------------------------------------------- open


@contextmanager
def _opened(
    base: Any, adapters: Any, merged: Any, weights: Sequence[float] | None
) -> Iterator[tuple[Checkpoint, tuple[Adapter, ...], Checkpoint]]:
    """Open the inputs, headers only, and close them again."""
    given = list(adapters) if isinstance(adapters, (list, tuple)) else [adapters]
    factors = list(weights) if weights is not None else [1.0] * len(given)
    if len(factors) != len(given):
        raise UsageError(
            f"{len(factors)} weights for {len(given)} adapters", hint="give one weight for each adapter, in their order"
        )
    _refuse_same(base, merged)
    opened: list[Checkpoint] = []
    try:
        opened.append(open_checkpoint(base, role="base"))
        opened += [open_checkpoint(one, role="adapter") for one in given]
        opened.append(open_checkpoint(merged, role="merged"))
        read = [_read_adapter(one, factor) for one, factor in zip(opened[1:-1], factors, strict=True)]
        yield opened[0], tuple(read), opened[-1]
    finally:
        for checkpoint in opened:
            checkpoint.close()


def _read_adapter(checkpoint: Checkpoint, weight: float) -> Adapter:
    raw = read_adapter_config(checkpoint)
    for dialect in registry.load("dialects").values():
        if dialect.recognises(raw, tuple(checkpoint.metas())):
            adapter: Adapter = dialect.read(raw, checkpoint)
            return replace(adapter, weight=weight)
    known = ", ".join(registry.load("dialects"))
    raise AdapterConfigError(
        f"the tensor names and adapter_config.json of {checkpoint.location} are of no known adapter dialect",
        hint=f"known dialects: {known}",
    )


def _refuse_same(base: Any, merged: Any) -> None:
    if isinstance(base, (str, os.PathLike)) and isinstance(merged, (str, os.PathLike)):
        one, other = Path(base), Path(merged)
        same = one.samefile(other) if one.exists() and other.exists() else str(base) == str(merged)
    else:
        same = base is merged
    if same:
        raise WrongInputError(
            f"BASE and MERGED are the same checkpoint: {base if isinstance(base, (str, os.PathLike)) else type(base)}",
            hint="give the untouched base model first and the merged one last: BASE ADAPTER [ADAPTER ...] MERGED",
        )


def _refuse_what_is_missing(combination: str | None, device: str) -> None:
    if combination is not None:
        raise UsageError(
            f"the combination {combination!r} is not recomputed by this version",
            hint="without --combination the adapters are merged one after the other, each with its own scale",
        )
    if device != "cpu":
        raise UsageError(f"this version checks on the CPU, not on {device!r}", hint="leave --device out")


# ------------------------------------------------------------------------------------------- expect and compare


@dataclass(frozen=True, slots=True)
class Outcome:
    """One tensor, compared and, if refuted, diagnosed."""

    comparison: Comparison
    diagnosis: diagnose.Diagnosis | None


@dataclass(frozen=True, slots=True)
class _Job:
    """The opened inputs, and for each pair of dtypes the arithmetic to try first."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    merged: Checkpoint
    hints: Mapping[tuple[str, str], Arithmetic]

    def outcome(self, pairing: Pairing) -> Outcome:
        """Compare one tensor; diagnose it if it is refuted."""
        if pairing.undecidable:
            return Outcome(_undecided(pairing), None)
        case, actual = self.load(pairing)
        orders = orders_for(pairing)
        measure = self.measure(pairing, case, actual, orders)
        return Outcome(_comparison(pairing, measure), _diagnosis(pairing, measure, case, actual, orders))

    def measure(self, pairing: Pairing, case: Case, actual: Tensor, orders: Sequence[Arithmetic]) -> Measure:
        """Numbers for one tensor."""
        if pairing.kind != "target":
            return compare_copy(case, actual, orders)
        return compare(case, actual, orders, self.hints.get(_dtypes(pairing)))

    def load(self, pairing: Pairing) -> tuple[Case, Tensor]:
        """The case of a pairing and the merged tensor, both as matrices whose rows are the first dimension."""
        steps = tuple(self._step(step) for step in pairing.steps)
        actual = rows_of(self.merged.read(pairing.merged.name))
        base = rows_of(self.base.read(pairing.base.name)) if pairing.base else torch.zeros_like(actual)
        if base.shape != actual.shape:
            base = torch.zeros((1, 1), dtype=base.dtype).expand(actual.shape)
        return Case(base=base, steps=steps, storage=pairing.merged.dtype), actual

    def _step(self, step: Step) -> LoadedStep:
        checkpoint = self.adapters[step.adapter].checkpoint
        factors = {role: checkpoint.read(name) for role, name in step.factors.items()}
        return LoadedStep(recipe=step.recipe, factors=factors, scale=step.scale, tokens=step.tokens)


def orders_for(pairing: Pairing) -> tuple[Arithmetic, ...]:
    """The arithmetics an honest producer of this tensor may have used."""
    storage, base = _dtypes(pairing)
    if storage not in FORMATS:
        return (ADD,)
    return arithmetics(storage, base)


def rows_of(tensor: Tensor) -> Tensor:
    """A tensor as a matrix: its first dimension, and all the others in one."""
    if tensor.ndim == 0:
        return tensor.reshape(1, 1)
    return tensor.reshape(tensor.shape[0], -1) if tensor.numel() else tensor.reshape(0, 1)


def _dtypes(pairing: Pairing) -> tuple[str, str]:
    return pairing.merged.dtype, (pairing.base or pairing.merged).dtype


def _hints(
    plan: Plan, base: Checkpoint, adapters: tuple[Adapter, ...], merged: Checkpoint
) -> dict[tuple[str, str], Arithmetic]:
    """For each pair of dtypes, the arithmetic that the first rows of its first targets were made with."""
    groups: dict[tuple[str, str], list[Pairing]] = {}
    for pairing in plan.targets:
        if not pairing.undecidable:
            groups.setdefault(_dtypes(pairing), []).append(pairing)
    job = _Job(base, adapters, merged, {})
    return {
        dtypes: likely([job.load(one) for one in members[:SAMPLES]], orders_for(members[0]))
        for dtypes, members in groups.items()
    }


def _run(job: _Job, plan: Plan, run: Callable[..., list[Any]], jobs: int, progress: Progress | None) -> list[Outcome]:
    total = sum(_bytes(one) for one in plan.pairings)
    with progress(total) if progress else nullcontext(_silent) as advance:
        by_name = {one.merged.name: one for one in plan.pairings}
        return run(
            job.outcome, plan.pairings, jobs, lambda outcome: advance(_bytes(by_name[outcome.comparison.tensor]))
        )


def _silent(_: int) -> None:
    """No one watches."""


def _comparison(pairing: Pairing, measure: Measure) -> Comparison:
    verdict = Verdict.VERIFIED if measure.fits else Verdict.REFUTED
    return Comparison(
        tensor=pairing.merged.name,
        kind=pairing.kind,
        recipe=pairing.recipe,
        module=pairing.module,
        adapters=pairing.adapters,
        shape=pairing.merged.shape,
        dtype=pairing.merged.dtype,
        verdict=Verdict.INCONCLUSIVE if measure.fits and measure.vanished else verdict,
        exact=measure.exact,
        arithmetic=measure.arithmetic if measure.fits and pairing.kind == "target" else None,
        over_budget=measure.over_budget,
        worst=measure.worst,
        signal=measure.signal,
        overlap=measure.overlap,
        noise=measure.noise,
        vanished=measure.vanished,
        nonfinite=measure.nonfinite,
    )


def _undecided(pairing: Pairing) -> Comparison:
    return Comparison(
        tensor=pairing.merged.name,
        kind=pairing.kind,
        recipe=pairing.recipe,
        module=pairing.module,
        adapters=pairing.adapters,
        shape=pairing.merged.shape,
        dtype=pairing.merged.dtype,
        verdict=Verdict.INCONCLUSIVE,
        exact=False,
    )


def _diagnosis(
    pairing: Pairing, measure: Measure, case: Case, actual: Tensor, orders: Sequence[Arithmetic]
) -> diagnose.Diagnosis | None:
    if measure.fits:
        return None
    if measure.nonfinite:
        return diagnose.not_finite(pairing.merged.name, measure.nonfinite)
    return diagnose.name_tensor(pairing.merged.name, pairing.kind, case, actual, orders)


# ------------------------------------------------------------------------------------------------------- report


def _verdict(comparisons: Sequence[Comparison], findings: Sequence[Finding]) -> Verdict:
    """The worst of the tensors and of what the findings allow; nothing compared is nothing proved."""
    seen = [one.verdict for one in comparisons] or [Verdict.INCONCLUSIVE]
    return max([*seen, diagnose.best_verdict(findings)], key=lambda verdict: verdict.rank)


def _listed(finding: Finding, select: Sequence[str], ignore: Sequence[str]) -> bool:
    wanted = not select or finding.code.startswith(tuple(select))
    return wanted and not (ignore and finding.code.startswith(tuple(ignore)))


def _run_info(command: str, job: _Job, plan: Plan, seconds: float) -> RunInfo:
    return RunInfo(
        command=command,
        tool=versions(),
        base=_describe(job.base),
        adapters=tuple(_describe_adapter(one) for one in job.adapters),
        merged=_describe(job.merged),
        bytes_read=sum(_bytes(one) for one in plan.pairings),
        seconds=seconds,
    )


def versions() -> dict[str, str]:
    """The versions of this package, of Python, and of the libraries a check rests on."""
    libraries = {name: _version(name) for name in ("torch", "safetensors", "numpy")}
    return {"lora_check": _version("lora_check"), "python": sys.version.split()[0], **libraries}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    metas = checkpoint.metas().values()
    dtypes = sorted({meta.dtype for meta in metas})
    return {
        "location": checkpoint.location,
        "tensors": len(metas),
        "bytes": sum(_size(meta.numel, meta.dtype) for meta in metas),
        "dtypes": dtypes,
    }


def _describe_adapter(adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    return _describe(adapter.checkpoint) | {
        "dialect": adapter.dialect,
        "method": config.method,
        "rank": config.rank,
        "alpha": config.alpha,
        "rslora": config.rslora,
        "dora": config.dora,
        "base": config.base_name,
        "producer": config.producer,
        "weight": adapter.weight,
    }


def _bytes(pairing: Pairing) -> int:
    """Bytes of the merged and the base tensor of a pairing."""
    metas = [pairing.merged, *([pairing.base] if pairing.base else [])]
    return sum(_size(meta.numel, meta.dtype) for meta in metas)


def _size(numel: int, dtype: str) -> int:
    known = getattr(torch, dtype, None)
    return numel * known.itemsize if isinstance(known, torch.dtype) else numel


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """One intra-op thread for each worker: a parallel region inside the tile loop stalls on shared cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
