"""The line: open, plan, expect and compare, diagnose, report. Readable aloud; only this module knows the order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lora_check import candidates, registry
from lora_check.findings import best_verdict
from lora_check.inputs import Opened, opened_inputs
from lora_check.items import Request, size_of
from lora_check.means import Means, Progress, refuse_what_cannot_be
from lora_check.plan import make_plan
from lora_check.reading.plain import How, reading
from lora_check.reading.stamps import refuse_changed, stamps
from lora_check.reading.throughput import Throughput
from lora_check.report import Report
from lora_check.types import Adapter, Checkpoint, Comparison, Finding, Plan, RunInfo, Verdict
from lora_check.versions import versions


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
    journal: str | None = None,
    shard: tuple[int, int] | None = None,
    read: How = "auto",
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
    journal           a file that remembers what is done: a check that was stopped goes on from there
    shard             (number, count): only this part of the work, counted from 1; the rest makes it inconclusive
    read              "map" files, read them "plain", or "auto": plainly where they lie on a network mount
    raises            LoraCheckError: an input that cannot be read, or a request that cannot be met
    """
    request = Request(
        base=base,
        adapters=_several(adapters),
        merged=merged,
        weights=None if weights is None else tuple(weights),
        combination=combination,
        include=tuple(include),
        exclude=tuple(exclude),
        device=device,
    )
    means = Means(jobs=jobs, engine=engine, journal=journal, shard=shard, progress=progress, read=read)
    report = checked(request, means, command=command)
    if report.verdict is not Verdict.VERIFIED:
        again = partial(_again, request, means, command)
        report = replace(
            report,
            findings=report.findings + candidates.tried(again, base, adapters, candidate_bases, candidate_adapters),
        )
    return listed(report, select, ignore)


def checked(request: Request, means: Means, *, command: str = "report") -> Report:
    """Open, plan, compare, diagnose; every finding is listed."""
    refuse_what_cannot_be(request, means)
    began = time.monotonic()
    given = request.base, request.adapters, request.merged, request.weights, request.combination
    with reading(means.read), opened_inputs(*given) as opened:
        return checked_open(request, means, opened, began, command=command)


def checked_open(request: Request, means: Means, opened: Opened, began: float, *, command: str = "report") -> Report:
    """The same from inputs that are open; `began`: what time.monotonic() said before they were."""
    files = stamps(opened.base, *(one.checkpoint for one in opened.adapters), opened.merged)
    plan = make_plan(*opened, include=request.include, exclude=request.exclude)
    comparisons, findings, throughput = _judged(request, means, opened, plan)
    refuse_changed(files)
    return Report(
        run=_run_info(command, opened, _bytes(plan, comparisons), time.monotonic() - began),
        comparisons=comparisons,
        findings=findings,
        verdict=_verdict(comparisons, findings),
        throughput=throughput,
    )


def _judged(
    request: Request, means: Means, opened: Opened, plan: Plan
) -> tuple[tuple[Comparison, ...], tuple[Finding, ...], Throughput | None]:
    """What the tensors say; only here tensor data is read."""
    from lora_check import stages, work

    remote = registry.load("engines")[means.engine].remote  # then the device is there, and not here
    with work.one_thread():
        return stages.judged(request, means, work.job(*opened, plan, device="cpu" if remote else request.device))


def listed(report: Report, select: Sequence[str] = (), ignore: Sequence[str] = ()) -> Report:
    """The report with the findings that were asked for; the verdict stays."""
    kept = tuple(one for one in report.findings if _listed(one, select, ignore))
    return replace(report, findings=kept, withheld=report.withheld + len(report.findings) - len(kept))


def _again(request: Request, means: Means, command: str, base: Any, adapters: Any) -> Report:
    """The same check with a candidate among its inputs."""
    other = replace(request, base=base, adapters=_several(adapters))
    return checked(other, replace(means, journal=None, shard=None), command=command)


def _several(adapters: Any) -> tuple[Any, ...]:
    return tuple(adapters) if isinstance(adapters, (list, tuple)) else (adapters,)


def joined(journals: Sequence[str], *, jobs: int | None = None, progress: Progress | None = None) -> Report:
    """The report of a check from the journals of all its shards; only refuted tensors are read again, for their names.

    raises   LoraCheckError: a journal is of another check, or some tensors are in none of them
    """
    from lora_check import journal

    return checked(journal.request_of(journals), Means(jobs=jobs, progress=progress, parts=tuple(journals)))


def plan(
    base: Any, adapters: Any, merged: Any, *, weights: Sequence[float] | None = None, combination: str | None = None
) -> Plan:
    """What `check` would compare with what: headers only, no tensor data is read."""
    with opened_inputs(base, adapters, merged, weights, combination) as opened:
        return make_plan(*opened)


# ------------------------------------------------------------------------------------------------------- report


def _verdict(comparisons: Sequence[Comparison], findings: Sequence[Finding]) -> Verdict:
    """The worst of the tensors and of what the findings allow; nothing compared is nothing proved."""
    seen = [one.verdict for one in comparisons] or [Verdict.INCONCLUSIVE]
    return max([*seen, best_verdict(findings)], key=lambda verdict: verdict.rank)


def _listed(finding: Finding, select: Sequence[str], ignore: Sequence[str]) -> bool:
    wanted = not select or finding.code.startswith(tuple(select))
    return wanted and not (ignore and finding.code.startswith(tuple(ignore)))


def _bytes(plan: Plan, comparisons: Sequence[Comparison]) -> int:
    """Bytes of both models that these comparisons are about."""
    seen = {one.tensor for one in comparisons}
    return sum(size_of(one) for one in plan.pairings if one.merged.name in seen)


def _run_info(command: str, opened: Opened, size: int, seconds: float) -> RunInfo:
    return RunInfo(
        command=command,
        tool=versions(),
        base=_describe(opened.base),
        adapters=tuple(_describe_adapter(one) for one in opened.adapters),
        merged=_describe(opened.merged),
        bytes_read=size,
        seconds=seconds,
    )


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
