"""The line: open, plan, expect and compare, diagnose, report. Readable aloud; only this module knows the order."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lora_check import candidates, registry
from lora_check.errors import UsageError
from lora_check.findings import assign, best_verdict, conclude
from lora_check.inputs import Opened, opened_inputs
from lora_check.plan import make_plan
from lora_check.report import Report
from lora_check.types import Adapter, Checkpoint, Comparison, Finding, Pairing, Plan, RunInfo, Verdict

if TYPE_CHECKING:
    from lora_check import work

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


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
    candidate_bases: Any = (),
    candidate_adapters: Any = (),
    progress: Progress | None = None,
) -> Report:
    """Recompute what every tensor of MERGED must be, compare, and name the mistakes.

    base, merged      a location, a state dict or an nn.Module
    adapters          one of these, or several to be merged one after the other
    weights           a factor on each adapter's scale
    combination       the combination_type of add_weighted_adapter, with its options after a colon
    include, exclude  glob patterns on tensor names; what they leave out makes the verdict inconclusive
    select, ignore    codes or their beginnings; they filter the list of findings, never the verdict
    candidate_bases, candidate_adapters  what to try in their places where the report is not verified; the verdict stays
    raises            LoraCheckError: an input that cannot be read, or a request that cannot be met
    """
    from lora_check import work

    _refuse_what_is_missing(device, jobs)
    began = time.monotonic()
    with opened_inputs(base, adapters, merged, weights, combination) as opened, work.one_thread():
        plan = make_plan(*opened, include=include, exclude=exclude)
        run = partial(registry.load("engines")[engine].run, jobs=jobs or _cores())
        comparisons, findings = _judged(opened, plan, run, progress)
        verdict = _verdict(comparisons, findings)
        if verdict is not Verdict.VERIFIED:
            again = partial(
                _again,
                merged,
                command=command,
                weights=weights,
                combination=combination,
                device=device,
                jobs=jobs,
                engine=engine,
                include=include,
                exclude=exclude,
                progress=progress,
            )
            findings += candidates.tried(again, base, adapters, candidate_bases, candidate_adapters)
        listed = tuple(one for one in findings if _listed(one, select, ignore))
        return Report(
            run=_run_info(command, opened, plan, time.monotonic() - began),
            comparisons=comparisons,
            findings=listed,
            verdict=verdict,
            withheld=len(findings) - len(listed),
        )


def _judged(
    opened: Opened, plan: Plan, run: Callable[..., list[Any]], progress: Progress | None
) -> tuple[tuple[Comparison, ...], tuple[Finding, ...]]:
    """Compare every tensor, name the mistakes in those that are refuted, and pool what was seen."""
    from lora_check import work
    from lora_check.naming import name_all

    job = work.Job(*opened, work.hints(plan, *opened), work.alike(plan))
    outcomes = _run(job.outcome, plan, run, progress)
    refuted = [one.refuted for one in outcomes if one.refuted]
    diagnoses = name_all(refuted, job.diagnosis, partial(run, done=_silent))
    comparisons = assign([one.comparison for one in outcomes], diagnoses)
    return comparisons, conclude(plan, comparisons, diagnoses)


def _again(merged: Any, base: Any, adapters: Any, **options: Any) -> Report:
    """The same check with a candidate among its inputs."""
    return check(base, adapters, merged, **options)


def plan(
    base: Any, adapters: Any, merged: Any, *, weights: Sequence[float] | None = None, combination: str | None = None
) -> Plan:
    """What `check` would compare with what: headers only, no tensor data is read."""
    with opened_inputs(base, adapters, merged, weights, combination) as opened:
        return make_plan(*opened)


def _refuse_what_is_missing(device: str, jobs: int | None) -> None:
    if jobs is not None and jobs < 1:
        raise UsageError(f"{jobs} jobs cannot do anything", hint="give one or more, or leave it out")
    if device != "cpu":
        raise UsageError(f"this version checks on the CPU, not on {device!r}", hint="leave --device out")


def _run(
    outcome: Callable[[Pairing], work.Outcome],
    plan: Plan,
    run: Callable[..., list[work.Outcome]],
    progress: Progress | None,
) -> list[work.Outcome]:
    sizes = {one.merged.name: _bytes(one) for one in plan.pairings}
    with progress(sum(sizes.values())) if progress else nullcontext(_silent) as advance:
        return run(outcome, plan.pairings, done=lambda done: advance(sizes[done.comparison.tensor]))


def _silent(_: Any) -> None:
    """No one watches."""


# ------------------------------------------------------------------------------------------------------- report


def _verdict(comparisons: Sequence[Comparison], findings: Sequence[Finding]) -> Verdict:
    """The worst of the tensors and of what the findings allow; nothing compared is nothing proved."""
    seen = [one.verdict for one in comparisons] or [Verdict.INCONCLUSIVE]
    return max([*seen, best_verdict(findings)], key=lambda verdict: verdict.rank)


def _listed(finding: Finding, select: Sequence[str], ignore: Sequence[str]) -> bool:
    wanted = not select or finding.code.startswith(tuple(select))
    return wanted and not (ignore and finding.code.startswith(tuple(ignore)))


def _run_info(command: str, opened: Opened, plan: Plan, seconds: float) -> RunInfo:
    return RunInfo(
        command=command,
        tool=versions(),
        base=_describe(opened.base),
        adapters=tuple(_describe_adapter(one) for one in opened.adapters),
        merged=_describe(opened.merged),
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
    dtypes = sorted({meta.stored_as for meta in metas})
    return {
        "location": checkpoint.location,
        "tensors": len(metas),
        "bytes": sum(meta.nbytes for meta in metas),
        "dtypes": dtypes,
    }


def _describe_adapter(adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    combined = {"combination": config.raw["combination"].name} if adapter.members else {}
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
        **combined,
    }


def _bytes(pairing: Pairing) -> int:
    """Bytes of the merged and the base tensor of a pairing."""
    return pairing.merged.nbytes + (pairing.base.nbytes if pairing.base else 0)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
