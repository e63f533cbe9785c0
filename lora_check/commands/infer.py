"""What kind of change MERGED is of BASE, with no adapter at hand: which modules changed, and of what rank."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_check.commands import _arguments as arguments
from lora_check.commands import _output as output
from lora_check.commands import _rendered as rendered
from lora_check.errors import UsageError
from lora_check.types import Command

if TYPE_CHECKING:
    from lora_check.inferring.extracting import Told

BASE_MERGED = "BASE MERGED"
HOME = "lora_check.inferring"
EXITS = "0 told, 2 could not look, 3 something could not be told"


def configure(parser: ArgumentParser) -> None:
    """BASE MERGED."""
    arguments.add_locations(parser, BASE_MERGED)
    parser.add_argument("--extract", metavar="OUT", help="also write the change as an adapter into the folder OUT")
    parser.add_argument(
        "--rank", type=int, metavar="R", help="of that adapter, in every changed matrix; as inferred by default"
    )
    arguments.add_jobs(parser)
    rendered.add_options(parser, HOME)
    parser.add_argument("--all", action="store_true", help="every tensor that changed, not one line for each family")


def run(args: Namespace) -> int:
    """Look, tell, and write an adapter if one is wanted."""
    base, merged = _two(args.locations)
    if args.rank is not None and args.extract is None:
        raise UsageError("--rank goes with --extract", hint="name a folder for the adapter: --extract OUT")
    if args.rank is not None and args.rank < 1:
        raise UsageError(f"--rank {args.rank} is no rank", hint="give a whole number above zero")
    output.prepare(args)
    told = _told(base, merged, args)
    rendered.deliver(told, args, HOME)
    return told.inference.exit_code


def _told(base: str, merged: str, args: Namespace) -> Told:
    from lora_check.inferring.extracting import Told, extract
    from lora_check.inferring.line import infer

    settings: dict[str, Any] = {"jobs": args.jobs, "progress": output.progress()}
    if args.extract is None:
        return Told(inference=infer(base, merged, **settings))
    found, extracted = extract(base, merged, args.extract, rank=args.rank, **settings)
    return Told(inference=found, extracted=extracted)


def _two(locations: Sequence[str]) -> tuple[str, str]:
    if len(locations) != 2:
        given = ", ".join(locations)
        raise UsageError(
            f"{BASE_MERGED} needs two locations, {len(locations)} given: {given}",
            hint="name the base first, then the merged checkpoint; `report` takes adapters",
        )
    return locations[0], locations[1]


COMMAND = Command(
    name="infer",
    summary="what kind of change MERGED is of BASE, and of what rank, with no adapter",
    configure=configure,
    run=run,
    exits=EXITS,
)
