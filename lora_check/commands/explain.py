"""Prints the page of a code: what the mistake is, how it happens, how it is told, what to do."""

from __future__ import annotations

import difflib
from argparse import ArgumentParser, Namespace

from lora_check import registry
from lora_check.commands import _output as output
from lora_check.errors import UsageError
from lora_check.types import Command


def configure(parser: ArgumentParser) -> None:
    """CODE ..."""
    parser.add_argument("codes", nargs="+", metavar="CODE", help="a code or its name: LC102, lc102, applied-twice")


def run(args: Namespace) -> int:
    """Every page, in the order asked for."""
    output.say("\n\n".join(_page(code) for code in map(_known, args.codes)) + "\n")
    return 0


def _known(asked: str) -> str:
    """The code that is meant by a code in any case, or by a name."""
    faults = registry.load("faults")
    meant = {code.lower(): code for code in faults} | {fault.name: code for code, fault in faults.items()}
    if asked.lower() not in meant:
        near = difflib.get_close_matches(asked.lower(), meant, n=4, cutoff=0.5)
        hint = f"near it: {', '.join(_told(meant[one]) for one in near)}" if near else "`rules` lists the codes"
        raise UsageError(f"no code or name is {asked!r}", hint=hint)
    return str(meant[asked.lower()])


def _told(code: str) -> str:
    return f"{code} {registry.load('faults')[code].name}"


def _page(code: str) -> str:
    page = registry.page("faults", code)
    return page if page.startswith(code) else f"{_told(code)}\n\n{page}"


COMMAND = Command(
    name="explain",
    summary="print the page of a code",
    configure=configure,
    run=run,
    exits="0 printed, 2 no such code",
)
