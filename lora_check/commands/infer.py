"""What kind of change MERGED is of BASE, with no adapter at hand: which modules changed, and of what rank."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from lora_check.commands import _arguments as arguments
from lora_check.commands import _output as output
from lora_check.errors import UsageError
from lora_check.report import SCHEMA
from lora_check.types import Command
from lora_check.versions import versions

if TYPE_CHECKING:
    from lora_check.inferring.extracting import Extracted
    from lora_check.inferring.outcome import Change, Inference

BASE_MERGED = "BASE MERGED"
EXITS = "0 told, 2 could not look, 3 something could not be told"


def configure(parser: ArgumentParser) -> None:
    """BASE MERGED."""
    arguments.add_locations(parser, BASE_MERGED)
    parser.add_argument("--extract", metavar="OUT", help="also write the change as an adapter into the folder OUT")
    parser.add_argument(
        "--rank", type=int, metavar="R", help="of that adapter, in every changed matrix; as inferred by default"
    )
    arguments.add_jobs(parser)
    parser.add_argument("--format", choices=("text", "json"), default="text", help="what goes to stdout")
    parser.add_argument("--all", action="store_true", help="every tensor that changed, not one line for each family")
    output.add_json(parser)


def run(args: Namespace) -> int:
    """Look, tell, and write an adapter if one is wanted."""
    base, merged = _two(args.locations)
    if args.rank is not None and args.extract is None:
        raise UsageError("--rank goes with --extract", hint="name a folder for the adapter: --extract OUT")
    if args.rank is not None and args.rank < 1:
        raise UsageError(f"--rank {args.rank} is no rank", hint="give a whole number above zero")
    if args.json is not None:
        output.demand_writable(args.json, args.locations)
    from lora_check.inferring.line import infer

    extracted: Extracted | None = None
    if args.extract is None:
        found = infer(base, merged, jobs=args.jobs, progress=output.progress())
    else:
        from lora_check.inferring.extracting import extract

        found, extracted = extract(
            base, merged, args.extract, rank=args.rank, jobs=args.jobs, progress=output.progress()
        )
    if args.json is not None:
        output.write(args.json, _as_json(found, extracted))
    output.say(_as_json(found, extracted) if args.format == "json" else _as_text(found, extracted, every=args.all))
    return found.exit_code


def _two(locations: Sequence[str]) -> tuple[str, str]:
    if len(locations) != 2:
        given = ", ".join(locations)
        raise UsageError(
            f"{BASE_MERGED} needs two locations, {len(locations)} given: {given}",
            hint="name the base first, then the merged checkpoint; `report` takes adapters",
        )
    return locations[0], locations[1]


# --------------------------------------------------------------------------------------------------------- text


def _as_text(found: Inference, extracted: Extracted | None, *, every: bool) -> str:
    from lora_check.inferring.words import remarks, says

    changed = [one for one in found.changes if one.kind.value != "copy"]
    rows = [_row(name, members) for name, members in found.families.items() if any(one in changed for one in members)]
    blocks = [output.printable(says(found)), _inputs(found)]
    if rows:
        blocks.append(tabulate(rows, headers="keys", disable_numparse=True, colalign=("left", "left")))
    if every and changed:
        blocks.append(tabulate([_line(one) for one in changed], headers="keys", disable_numparse=True))
    blocks += [output.printable(f"note: {one}") for one in remarks(found)]
    blocks += [_block(one) for one in found.untold[:3]]
    blocks += [output.printable(line) for line in (extracted.lines if extracted else ())]
    copies = len(found.changes) - len(changed)
    blocks.append(f"{len(found.changes)} matrices and vectors, {copies} unchanged, {found.seconds:.1f} s")
    return "\n\n".join(blocks) + "\n"


def _inputs(found: Inference) -> str:
    lines = [
        f"{role:8}{one['location']}\n        tensors {one['tensors']}  dtypes {', '.join(one['dtypes'])}"
        for role, one in (("base", found.base), ("merged", found.merged))
    ]
    return "\n".join(output.printable(line) for text in lines for line in text.split("\n"))


def _row(name: str, members: Sequence[Change]) -> dict[str, str]:
    """One family: how many changed, of which kind and rank, and how far above the noise."""
    kinds = Counter(one.kind.value for one in members if one.kind.value != "copy")
    low = [one for one in members if one.kind.value == "low-rank"]
    ranks = Counter(one.rank for one in low)
    told = [one.margin for one in low if one.margin is not None]
    signals = [one.snr_db for one in low if one.snr_db is not None]
    return {
        "family": output.printable(name),
        "change": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "unchanged": str(len(members) - sum(kinds.values())),
        "rank": ", ".join(f"{rank} ({count})" if len(ranks) > 1 else f"{rank}" for rank, count in ranks.most_common()),
        "certain": str(sum(one.confidence == "certain" for one in low)) if low else "",
        "x floor": f"{min(told):.3g}" if told else "",
        "SNR dB": f"{median(signals):.1f}" if signals else "",
        "energy per rank %": _shares(low),
    }


def _shares(low: Sequence[Change]) -> str:
    """Of the family's median matrix, the first few."""
    if not low:
        return ""
    columns = [[one.shares[place] for one in low if place < len(one.shares)] for place in range(4)]
    return " ".join(f"{100 * median(column):.3g}" for column in columns if column)


def _line(one: Change) -> dict[str, str]:
    return {
        "tensor": output.printable(one.tensor),
        "change": one.kind.value,
        "rank": str(one.rank or ""),
        "confidence": one.confidence,
        "x floor": f"{one.margin:.3g}" if one.margin is not None else "",
        "gap": f"{one.gap:.3g}" if one.gap is not None else "",
        "SNR dB": f"{one.snr_db:.1f}" if one.snr_db is not None else "",
    }


def _block(one: Change) -> str:
    return output.printable(f"{one.tensor}: {one.because}")


# --------------------------------------------------------------------------------------------------------- json


def _as_json(found: Inference, extracted: Extracted | None) -> str:
    from lora_check.inferring.words import remarks, says

    kinds = Counter(one.kind.value for one in found.changes)
    outcome: dict[str, Any] = {
        "schema": SCHEMA,
        "tool": versions(),
        "command": "infer",
        "inputs": {"base": dict(found.base), "merged": dict(found.merged)},
        "says": says(found),
        "remarks": remarks(found),
        "exit_code": found.exit_code,
        "summary": {"tensors": len(found.changes), "seconds": found.seconds, **dict(kinds)},
        "families": [_family(name, members) for name, members in found.families.items()],
        "missing": list(found.missing),
        "extra": list(found.extra),
        "tensors": [one.as_dict() for one in found.changes],
    }
    if extracted is not None:
        outcome["extracted"] = extracted.as_dict()
    return json.dumps(outcome, indent=2, allow_nan=False) + "\n"


def _family(name: str, members: Sequence[Change]) -> dict[str, Any]:
    return {
        "family": name,
        "tensors": len(members),
        "kinds": dict(Counter(one.kind.value for one in members)),
        "ranks": dict(Counter(str(one.rank) for one in members if one.kind.value == "low-rank")),
    }


COMMAND = Command(
    name="infer",
    summary="what kind of change MERGED is of BASE, and of what rank, with no adapter",
    configure=configure,
    run=run,
    exits=EXITS,
)
