"""Compares a saved merged checkpoint with what its base and adapters say it must be."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from lora_check.commands import _arguments as arguments
from lora_check.commands import _output as output
from lora_check.types import Command


def configure(parser: ArgumentParser) -> None:
    """BASE ADAPTER [ADAPTER ...] MERGED and every option."""
    arguments.add_locations(parser, arguments.BASE_ADAPTERS_MERGED)
    arguments.add_weights(parser)
    arguments.add_combination(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the check is computed")
    arguments.add_candidates(parser)
    arguments.add_parts(parser)
    arguments.add_filters(parser)
    output.add_options(parser)


def run(args: Namespace) -> int:
    """Check, render, and answer with the verdict's exit code."""
    base, adapters, merged = arguments.split(args.locations)
    output.prepare(args)
    from lora_check.pipeline import check

    report = check(
        base,
        adapters,
        merged,
        weights=args.weights,
        combination=args.combination,
        device=args.device,
        candidate_bases=args.candidate_base,
        candidate_adapters=args.candidate_adapter,
        journal=args.journal,
        shard=args.shard,
        progress=output.progress(),
        **arguments.filters(args),
    )
    return output.deliver(report, args)


COMMAND = Command(name="report", summary="does MERGED equal BASE + ADAPTER(S)?", configure=configure, run=run)
