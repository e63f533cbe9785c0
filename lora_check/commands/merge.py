"""Writes the merge that `report` expects of base and adapters: shard by shard, in BASE's own layout and dtypes.

What lies beside the tensors is BASE's: configuration, tokenizer, templates, processors, the code of its class. The
tokenizer is the adapter's where the adapter resized the vocabulary or trained tokens, and brings one.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from lora_check.commands import _arguments as arguments
from lora_check.commands import _output as output
from lora_check.report import SCHEMA
from lora_check.types import Command

if TYPE_CHECKING:
    from lora_check.merging import Merged

BASE_ADAPTERS_OUT = "BASE ADAPTER [ADAPTER ...] OUT"
DTYPES = ("bf16", "fp16", "fp32", "fp64", "bfloat16", "float16", "float32", "float64")
ARITHMETICS = (
    "fp32-add",
    "rounded-delta",
    "rounded-factors",
    "rounded-factors-and-delta",
    "storage-matmul",
    "prescaled-factor",
    "storage-product",
    "fp32-add-every-layer",
    "through-fp16",
    "held-in-fp16",
    "held-in-fp16-rounded-delta",
    "fp64",
    "storage-throughout",
)
"""Names of `rounding`, told here so that --help needs no tensor library."""


def configure(parser: ArgumentParser) -> None:
    """BASE ADAPTER [ADAPTER ...] OUT, and how OUT is to be written."""
    arguments.add_locations(parser, BASE_ADAPTERS_OUT)
    arguments.add_weights(parser)
    arguments.add_combination(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"store all floating tensors so, as if BASE had been loaded in it: {', '.join(DTYPES)}; BASE's own by "
        "default; a quantised BASE is decoded to it",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="bytes of a shard, such as 5GB; BASE's own files by default",
    )
    parser.add_argument(
        "--arithmetic",
        choices=ARITHMETICS,
        default=ARITHMETICS[0],
        metavar="NAME",
        help="the order of operations: fp32-add, PEFT's default; rounded-delta, PEFT's safe_merge; or one of "
        f"{', '.join(ARITHMETICS[2:])}",
    )
    arguments.add_jobs(parser)
    output.add_json(parser)


def run(args: Namespace) -> int:
    """Merge, and say in one line what was written."""
    base, adapters, out = arguments.split(args.locations)
    if args.json is not None:
        output.demand_writable(args.json, (base, *adapters, out))
    from lora_check.merging import merge

    merged = merge(
        base,
        adapters,
        out,
        weights=args.weights,
        combination=args.combination,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        arithmetic=args.arithmetic,
        jobs=args.jobs,
        progress=output.progress(),
    )
    if args.json is not None:
        output.write(args.json, json.dumps(_as_dict(merged), indent=2) + "\n")
    sys.stderr.write("".join(f"warning: {output.printable(one)}\n" for one in merged.warnings))
    output.say(_as_text(merged))
    return 0


def _as_text(merged: Merged) -> str:
    from tqdm import tqdm

    rate = f", {tqdm.format_sizeof(merged.written / merged.seconds, 'B')}/s" if merged.written else ""
    kept = f"; {len(merged.kept)} shards were there already" if merged.kept else ""
    files, what = len(merged.files), f"{merged.targets} of {merged.tensors} tensors changed, {merged.arithmetic}"
    size = f"{tqdm.format_sizeof(merged.bytes, 'B')}, {merged.seconds:.1f} s{rate}"
    return f"merged into {output.printable(merged.location)}: {files} files, {size}; {what}{kept}\n"


def _as_dict(merged: Merged) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "command": "merge",
        "exit_code": 0,
        "out": merged.location,
        "files": list(merged.files),
        "kept": list(merged.kept),
        "warnings": list(merged.warnings),
        "bytes": merged.bytes,
        "bytes_written": merged.written,
        "tensors": merged.tensors,
        "targets": merged.targets,
        "arithmetic": merged.arithmetic,
        "seconds": merged.seconds,
    }


COMMAND = Command(
    name="merge",
    summary="writes BASE + ADAPTER(S) to a new folder",
    configure=configure,
    run=run,
    exits="0 written, 2 could not merge",
)
