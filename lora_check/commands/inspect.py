"""Tells what an adapter or a checkpoint is: parameters, scales, ranks, health, sizes to come, spectra."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import replace

from lora_check.commands import _output as output
from lora_check.commands import _rendered as rendered
from lora_check.errors import UsageError
from lora_check.types import Command

HOME = "lora_check.inspection"
ONE = "ADAPTER|CHECKPOINT"


def configure(parser: ArgumentParser) -> None:
    """ADAPTER or CHECKPOINT, what it belongs to, and what is to be told of it."""
    parser.usage = f"%(prog)s {ONE} [--base BASE] [options]\n       %(prog)s --shapes FILE [options]"
    parser.add_argument("locations", nargs="*", metavar=ONE, help="a folder, a file or a hub id")
    parser.add_argument("--base", metavar="BASE", help="the model that ADAPTER belongs to; config.json alone will do")
    parser.add_argument(
        "--shapes", metavar="FILE", help='in place of a model, a JSON file {"name": [rows, columns]}, or chatglm-6b'
    )
    parser.add_argument("--parameters", action="store_true", help="list every parameter, named as PEFT names them")
    parser.add_argument(
        "--ranks", type=_ranks, default=(), metavar="R,R", help="predict the sizes of adapters of these ranks"
    )
    parser.add_argument(
        "--targets", type=_targets, metavar="NAME,NAME", help="their targets: names of modules, or all-linear"
    )
    parser.add_argument(
        "--extra-tokens", type=_count, default=0, metavar="N", help="rows added to the embedding, and to its own head"
    )
    parser.add_argument(
        "--spectra", action="store_true", help="singular values of s B A; beside W, where --base is given"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the spectra as SVG into FILE")
    rendered.add_options(parser, HOME)


def run(args: Namespace) -> int:
    """Look, tell, write; 0 where nothing is wrong in what was looked at."""
    location = _location(args)
    _prepare(args)
    from lora_check.inspection.line import Wanted, inspect

    wanted = Wanted(
        base=args.base,
        shapes=args.shapes,
        targets=args.targets,
        ranks=args.ranks,
        extra=args.extra_tokens,
        beside=args.spectra or args.plot is not None,
    )
    seen = inspect(location, wanted, output.progress())
    if args.plot is not None:
        from lora_check.inspection.plot import drawn

        output.write(args.plot, drawn(seen))
    listed = frozenset(name for name in ("parameters", "spectra") if getattr(args, name))
    rendered.deliver(replace(seen, listed=listed), args, HOME)
    return seen.exit_code


def _location(args: Namespace) -> str | None:
    """The one thing to look at; None: the table of shapes."""
    if len(args.locations) > 1 or not (args.locations or args.shapes):
        raise UsageError(f"{len(args.locations)} locations are given", hint=f"give one {ONE}, or --shapes FILE")
    if args.base and args.shapes:
        raise UsageError("--base and --shapes both tell the shapes", hint="give one of them")
    if args.base and not args.locations:
        raise UsageError("--base without ADAPTER", hint=f"give one {ONE}")
    return str(args.locations[0]) if args.locations else None


def _prepare(args: Namespace) -> None:
    """Refuse, before anything is read, what could not be written or would replace an input."""
    inputs = [one for one in (*args.locations, args.base, args.shapes) if one is not None]
    output.prepare(Namespace(**{**vars(args), "locations": inputs}))
    if args.plot is None:
        return
    if not args.plot.endswith(".svg"):
        raise UsageError(f"could not draw into {args.plot}: only SVG is drawn", hint="--plot FILE.svg")
    others = (args.json, args.markdown, args.output)
    output.demand_writable(args.plot, [*inputs, *(one for one in others if one is not None)])


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(_positive(one.strip()) for one in text.split(","))


def _targets(text: str) -> str | tuple[str, ...]:
    names = tuple(one.strip() for one in text.split(","))
    if not all(names):
        raise ArgumentTypeError(f"{text!r} names no module in one place")
    return "all-linear" if names == ("all-linear",) else names


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


COMMAND = Command(
    name="inspect",
    summary="an adapter or a checkpoint: parameters, scales, health, sizes, spectra",
    configure=configure,
    run=run,
    exits="0 nothing wrong, 1 something wrong, 2 unreadable, 3 not all seen",
)
