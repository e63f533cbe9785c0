"""Runs base, base with its adapters unmerged, and merged, and tells which module of the merged one departs first."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace

from lora_check.commands import _arguments as arguments
from lora_check.commands import _output as output
from lora_check.commands import _rendered as rendered
from lora_check.types import Command

HOME = "lora_check.forwarding"
EXITS = (
    "0 the weights are verified and the merged model computes what base and adapters compute, "
    "1 either is refuted, 2 could not run, 3 something could not be decided"
)


def configure(parser: ArgumentParser) -> None:
    """BASE ADAPTER [ADAPTER ...] MERGED, and what the models are asked."""
    arguments.add_locations(parser, arguments.BASE_ADAPTERS_MERGED)
    arguments.add_weights(parser)
    arguments.add_combination(parser)
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line, or a JSON list; a few of ours by default")
    parser.add_argument("--text", metavar="FILE", help="what the perplexity is of; a short text of ours by default")
    parser.add_argument("--ids", metavar="FILE", help="token ids in the place of both: one sequence a line")
    parser.add_argument("--tokens", type=_whole, default=24, metavar="N", help="new tokens after a prompt; 24")
    parser.add_argument(
        "--dtype", choices=("stored", "float32"), default="stored", help="what all are computed in; as MERGED is stored"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the models are run")
    arguments.add_jobs(parser)
    rendered.add_options(parser, HOME)
    parser.add_argument("--all", action="store_true", help="every module and every prompt, not one screen")


def run(args: Namespace) -> int:
    """Check, run, tell, and answer with the worse of what the weights and the runs say."""
    base, adapters, merged = arguments.split(args.locations)
    output.prepare(args)
    from lora_check.forwarding.line import forward
    from lora_check.forwarding.prompts import questions

    found = forward(
        base,
        adapters,
        merged,
        questions(args.prompts, args.text, args.ids),
        weights=args.weights,
        combination=args.combination,
        tokens=args.tokens,
        dtype=args.dtype,
        device=args.device,
        jobs=args.jobs,
        progress=output.progress(),
    )
    rendered.deliver(found, args, HOME)
    return found.verdict.exit_code


def _whole(word: str) -> int:
    if not word.isascii() or not word.isdigit():
        raise ArgumentTypeError(f"{word!r} is not a whole number")
    return int(word)


COMMAND = Command(
    name="forward",
    summary="logits and generations of base, unmerged and merged: does MERGED compute what BASE + ADAPTER(S) compute?",
    configure=configure,
    run=run,
    exits=EXITS,
)
