"""Compares a saved merged checkpoint with what its base and adapters say it must be."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from lora_check.commands import _arguments as arguments
from lora_check.commands import _manifest as manifest
from lora_check.commands import _output as output
from lora_check.errors import UsageError
from lora_check.types import Command


def configure(parser: ArgumentParser) -> None:
    """BASE ADAPTER [ADAPTER ...] MERGED, or a manifest of many such, and every option."""
    form = arguments.BASE_ADAPTERS_MERGED
    parser.usage = f"%(prog)s {form} [options]\n       %(prog)s --manifest FILE [options]"
    parser.add_argument("locations", nargs="*", metavar="LOCATION", help=f"{form}: a folder, a file or a hub id each")
    parser.add_argument(
        "--manifest",
        metavar="FILE",
        help='check many merges, {"base": ..., "adapter": ..., "merged": ...} on each line of FILE; one line of JSON '
        "each goes to stdout, or to --output FILE, which a batch that was stopped goes on with",
    )
    arguments.add_weights(parser)
    arguments.add_combination(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the check is computed")
    arguments.add_candidates(parser)
    arguments.add_parts(parser)
    arguments.add_filters(parser)
    output.add_options(parser)


def run(args: Namespace) -> int:
    """Check, render, and answer with the verdict's exit code; of a manifest, with that of its worst line."""
    if args.manifest is not None:
        return manifest.run(args)
    if not args.locations:
        raise UsageError("no location is given", hint=f"give {arguments.BASE_ADAPTERS_MERGED}, or --manifest FILE")
    base, adapters, merged = arguments.split(args.locations)
    output.prepare(args)
    if args.journal is not None:
        output.demand_writable(args.journal, args.locations)
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
