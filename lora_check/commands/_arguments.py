"""Arguments that several commands share, and what is wrong with them when they cannot be meant."""

from __future__ import annotations

import math
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import Any

from lora_check import registry
from lora_check.errors import UsageError
from lora_check.reading.plain import HOWS

BASE_ADAPTERS_MERGED = "BASE ADAPTER [ADAPTER ...] MERGED"
BASE_ADAPTERS = "BASE ADAPTER [ADAPTER ...]"


def add_locations(parser: ArgumentParser, form: str) -> None:
    """The positionals, under one name; `split` and `split_two` tell them apart."""
    parser.usage = f"%(prog)s {form} [options]"
    parser.add_argument("locations", nargs="+", metavar="LOCATION", help=f"{form}: a folder, a file or a hub id each")


def split(locations: Sequence[str]) -> tuple[str, tuple[str, ...], str]:
    """BASE ADAPTER [ADAPTER ...] MERGED -> (base, adapters, merged)."""
    _demand(locations, 3, BASE_ADAPTERS_MERGED)
    return locations[0], tuple(locations[1:-1]), locations[-1]


def split_two(locations: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """BASE ADAPTER [ADAPTER ...] -> (base, adapters)."""
    _demand(locations, 2, BASE_ADAPTERS)
    return locations[0], tuple(locations[1:])


def _demand(locations: Sequence[str], least: int, form: str) -> None:
    if len(locations) < least:
        given = ", ".join(locations)
        raise UsageError(f"{form} needs at least {least} locations, {len(locations)} given: {given}", hint=ORDER)


ORDER = "name the base first, then the adapters in the order of their merging, the merged checkpoint last"


def add_combination(parser: ArgumentParser) -> None:
    """--combination: a kind of add_weighted_adapter, with options after a colon."""
    parser.add_argument("--combination", metavar="KIND", help="how PEFT combined the adapters before it merged them")


def add_weights(parser: ArgumentParser) -> None:
    """--weights, which stands after the locations because it takes several numbers."""
    parser.add_argument(
        "--weights", nargs="+", type=_finite, metavar="W", help="a factor for each adapter; after the locations"
    )


def add_candidates(parser: ArgumentParser) -> None:
    """--candidate-base and --candidate-adapter, each as often as wanted."""
    for name in ("base", "adapter"):
        parser.add_argument(
            f"--candidate-{name}",
            action="append",
            default=[],
            metavar="LOCATION",
            help=f"unless verified, also try this in the place of {name.upper()}; the verdict stays; repeatable",
        )


def add_parts(parser: ArgumentParser) -> None:
    """--journal and --shard: a check in parts, one after the other or side by side."""
    parser.add_argument(
        "--journal", metavar="FILE", help="write finished work to FILE; run again, the check goes on from there"
    )
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="only part I of N; merge-reports joins the journals of all parts"
    )


def add_filters(parser: ArgumentParser) -> None:
    """How the check is run, what is compared, and what is listed."""
    engines = tuple(registry.load("engines"))
    add_jobs(parser)
    parser.add_argument("--engine", choices=engines, default="local", help="what runs the workers")
    add_read(parser)
    parser.add_argument("--include", action="append", default=[], metavar="GLOB", help="only these tensors")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="all but these tensors")
    add_lists(parser)


def add_read(parser: ArgumentParser) -> None:
    """--read."""
    parser.add_argument(
        "--read", choices=HOWS, default="auto", help="map files or read them plainly; auto: plainly on network mounts"
    )


def add_jobs(parser: ArgumentParser) -> None:
    """--jobs."""
    parser.add_argument("--jobs", type=_positive, metavar="N", help="workers; as many as usable cores by default")


def add_lists(parser: ArgumentParser) -> None:
    """--select and --ignore."""
    for name, deed in (("--select", "list only findings"), ("--ignore", "do not list findings")):
        parser.add_argument(
            name, action="extend", type=_codes, default=[], metavar="CODES", help=f"{deed} of these codes: LC102,LC4"
        )


def filters(args: Namespace) -> dict[str, Any]:
    """The keywords of `pipeline.check` that `add_filters` declared."""
    patterns = {name: tuple(getattr(args, name)) for name in ("include", "exclude", "select", "ignore")}
    return {"jobs": args.jobs, "engine": args.engine, "read": args.read, **patterns}


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash:
        raise ArgumentTypeError(f"{text!r} is not one of several, such as 2/4")
    return _positive(number), _positive(count)


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number (--weights stands after the locations)") from None
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _codes(text: str) -> list[str]:
    codes = [code.strip().upper() for code in text.split(",")]
    wrong = [code for code in codes if not re.fullmatch(r"LC[0-9]{0,3}", code)]
    if wrong:
        raise ArgumentTypeError(f"{wrong[0]!r} is no code and no beginning of one, such as LC102 or LC1")
    return codes
