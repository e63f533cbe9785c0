"""Compares two checkpoints without an adapter: what changed, by how much, and whether it was expected to."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from lora_check.commands import _arguments as arguments
from lora_check.commands import _output as output
from lora_check.commands import _rendered as rendered
from lora_check.errors import UsageError
from lora_check.types import Command

A_B = "A B"
HOME = "lora_check.diffing"


def configure(parser: ArgumentParser) -> None:
    """A B, what is shown of them, and what is expected."""
    arguments.add_locations(parser, A_B)
    parser.add_argument(
        "--show",
        action="append",
        default=[],
        metavar="NAME",
        help="print values of both side by side: a name or a glob, maybe with an index: 'lm_head.weight[0:3, :5]';"
        " without one, the first few and the largest change; repeatable",
    )
    for kind in ("changed", "unchanged"):
        parser.add_argument(
            f"--expect-{kind}",
            action="append",
            default=[],
            metavar="GLOB",
            help=f"exit with 1 unless there are tensors of such names and all of them are {kind}; repeatable",
        )
    parser.add_argument("--include", action="append", default=[], metavar="GLOB", help="only these tensors")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="all but these tensors")
    arguments.add_jobs(parser)
    arguments.add_read(parser)
    rendered.add_options(parser, HOME)
    parser.add_argument("--all", action="store_true", help="every tensor, not one screen")


def run(args: Namespace) -> int:
    """Compare, tell, and answer whether all is as expected."""
    if len(args.locations) != len(A_B.split()):
        given = ", ".join(args.locations)
        raise UsageError(f"{A_B} are two locations, {len(args.locations)} given: {given}", hint="give two checkpoints")
    output.prepare(args)
    from lora_check.diffing.line import Asking, diff

    asking = Asking(
        show=tuple(args.show),
        changed=tuple(args.expect_changed),
        unchanged=tuple(args.expect_unchanged),
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        every=args.all,
    )
    found = diff(
        args.locations[0], args.locations[1], asking, jobs=args.jobs, read=args.read, progress=output.progress()
    )
    rendered.deliver(found, args, HOME)
    return found.exit_code


COMMAND = Command(
    name="diff",
    summary="what changed from checkpoint A to checkpoint B, with no adapter",
    configure=configure,
    run=run,
    exits="0 as expected, 1 not, 2 could not compare, 3 not decided",
)
