"""Joins the journals of all shards of a check into the one report that the whole check would have given."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from lora_check.commands import _arguments as arguments
from lora_check.commands import _output as output
from lora_check.types import Command


def configure(parser: ArgumentParser) -> None:
    """JOURNAL [JOURNAL ...] and the options of a report."""
    parser.add_argument("locations", nargs="+", metavar="JOURNAL", help="what report --shard I/N --journal FILE wrote")
    arguments.add_jobs(parser)
    arguments.add_lists(parser)
    output.add_options(parser)


def run(args: Namespace) -> int:
    """Join, render, and answer with the verdict's exit code."""
    output.prepare(args)
    from lora_check.pipeline import joined, listed

    report = joined(args.locations, jobs=args.jobs, progress=output.progress())
    return output.deliver(listed(report, args.select, args.ignore), args)


COMMAND = Command(
    name="merge-reports", summary="one report from the journals of all shards", configure=configure, run=run
)
