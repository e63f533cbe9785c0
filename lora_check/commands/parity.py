"""Compares what base and adapters say with what the installed PEFT's merge_and_unload makes of them, both ways."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_check.commands import _arguments as arguments
from lora_check.commands import _output as output
from lora_check.report import Report
from lora_check.types import Command, RunInfo


def configure(parser: ArgumentParser) -> None:
    """BASE ADAPTER [ADAPTER ...] and the options of a report."""
    arguments.add_locations(parser, arguments.BASE_ADAPTERS)
    arguments.add_filters(parser)
    output.add_options(parser)


def run(args: Namespace) -> int:
    """Merge live, unsafe and safe, check each, and answer with the worse verdict."""
    base, adapters = arguments.split_two(args.locations)
    output.prepare(args)
    options = arguments.filters(args)
    reports = [_named(_one(base, adapters, options, safe=safe), safe=safe) for safe in (False, True)]
    return output.deliver(joined(reports), args)


def _one(base: str, adapters: Sequence[str], options: dict[str, Any], *, safe: bool) -> Report:
    from lora_check.oracles import peft
    from lora_check.pipeline import check

    module = peft.merge(base, adapters, safe=safe)
    return check(base, adapters, module, command="parity", progress=output.progress(), **options)


def _named(report: Report, *, safe: bool) -> Report:
    """The report with its producer written on every comparison and finding."""
    variant = "safe" if safe else "unsafe"
    return replace(
        report,
        comparisons=tuple(replace(one, variant=variant) for one in report.comparisons),
        findings=tuple(replace(one, message=f"{variant} merge: {one.message}") for one in report.findings),
    )


def joined(reports: Sequence[Report]) -> Report:
    """One report that holds them all, with the worst of their verdicts."""
    return Report(
        run=_run(reports),
        comparisons=tuple(one for report in reports for one in report.comparisons),
        findings=tuple(one for report in reports for one in report.findings),
        verdict=max((report.verdict for report in reports), key=lambda verdict: verdict.rank),
        withheld=sum(report.withheld for report in reports),
    )


def _run(reports: Sequence[Report]) -> RunInfo:
    from lora_check.oracles import peft

    first = reports[0].run
    return replace(
        first,
        tool={**peft.versions(), **first.tool},
        bytes_read=sum(report.run.bytes_read for report in reports),
        seconds=sum(report.run.seconds for report in reports),
    )


COMMAND = Command(
    name="parity", summary="does the installed PEFT merge what base and adapters say?", configure=configure, run=run
)
