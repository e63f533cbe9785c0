"""Pairs the tensors of base, adapters and merged from their headers: coverage, structural faults, bytes to read."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from tabulate import tabulate

from lora_check.commands import _arguments as arguments
from lora_check.commands import _output as output
from lora_check.items import numbers_of, whole_because
from lora_check.report import SCHEMA, finding_as_dict
from lora_check.types import Command, Finding, Pairing, Plan, Verdict

SHOWN = 3


def configure(parser: ArgumentParser) -> None:
    """BASE ADAPTER [ADAPTER ...] MERGED."""
    arguments.add_locations(parser, arguments.BASE_ADAPTERS_MERGED)
    arguments.add_weights(parser)
    arguments.add_combination(parser)
    output.add_json(parser)


def run(args: Namespace) -> int:
    """Plan, look for structural faults, tell both; 0 when nothing structural is wrong."""
    base, adapters, merged = arguments.split(args.locations)
    output.prepare(args)
    from lora_check.findings import best_verdict, structural
    from lora_check.pipeline import plan as make_plan

    plan = make_plan(base, adapters, merged, weights=args.weights, combination=args.combination)
    findings = structural(plan)
    code = _worst(plan, best_verdict(findings)).exit_code
    if args.json is not None:
        output.write(args.json, _as_json(plan, findings, code))
    output.say(_as_text(plan, findings))
    return code


def _worst(plan: Plan, best: Verdict) -> Verdict:
    """The best verdict that a report over this plan can have; what cannot be recomputed leaves it inconclusive."""
    undecidable = any(pairing.undecidable for pairing in plan.pairings)
    return Verdict.INCONCLUSIVE if undecidable and best is Verdict.VERIFIED else best


# ------------------------------------------------------------------------------------------------------ numbers


def _coverage(plan: Plan) -> list[dict[str, Any]]:
    """How many tensors each recipe makes in each family; bystanders are one group."""
    groups: dict[tuple[str, str, str], list[Pairing]] = {}
    for one in plan.pairings:
        family = "" if one.kind == "bystander" else one.family
        groups.setdefault((one.kind, one.recipe, family), []).append(one)
    order = {"target": 0, "copy": 1, "bystander": 2}
    return [
        {
            "kind": kind,
            "recipe": recipe,
            "family": family,
            "tensors": len(members),
            "undecidable": sum(bool(one.undecidable) for one in members),
        }
        for (kind, recipe, family), members in sorted(groups.items(), key=lambda item: order[item[0][0]])
    ]


def _bytes_to_read(plan: Plan) -> int:
    metas = [meta for one in plan.pairings for meta in (one.merged, one.base) if meta is not None]
    factors = [meta for adapter in plan.adapters for meta in adapter.checkpoint.metas().values()]
    return sum(meta.nbytes for meta in [*metas, *factors])


def _held_whole(plan: Plan) -> list[dict[str, Any]]:
    """Tensors that have to be whole in memory when they are compared; of all others a few rows are."""
    pairs = [(one, whole_because(one)) for one in plan.pairings]
    return [{"name": one.merged.name, "bytes": numbers_of(one), "because": why} for one, why in pairs if why]


def _lists(plan: Plan) -> dict[str, tuple[Any, ...]]:
    """Whatever a plan lists beside its pairings: missing, extra, reshaped, ..."""
    entries = {one.name: getattr(plan, one.name) for one in fields(plan)}
    return {key: one for key, one in entries.items() if isinstance(one, tuple) and key not in ("pairings", "adapters")}


# --------------------------------------------------------------------------------------------------------- text


def _as_text(plan: Plan, findings: Sequence[Finding]) -> str:
    to_read = f"{_bytes_to_read(plan) / 1e9:.3f} GB of tensors to read, none read yet"
    told = f"{_outcome(findings)}; {to_read}"
    blocks = [_table(_coverage(plan)), *_unpaired(plan), *map(_block, findings), *_held(plan), told]
    return "\n\n".join(blocks) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "no tensor of MERGED is paired"
    return tabulate([{key: str(value) for key, value in row.items()} for row in rows], headers="keys")


def _unpaired(plan: Plan) -> list[str]:
    told = {key: [_told(one) for one in entries] for key, entries in _lists(plan).items() if entries}
    lines = [f"{key}: {len(names)}  {_first(names)}" for key, names in told.items()]
    return ["\n".join(lines)] if lines else []


def _held(plan: Plan) -> list[str]:
    """What has to be whole in memory, and why."""
    held = _held_whole(plan)
    if not held:
        return []
    reasons = Counter(one["because"] for one in held)
    why = ", ".join(f"{count} because {reason}" for reason, count in reasons.items())
    largest, tensors = max(one["bytes"] for one in held) / 1e6, "tensor" if len(held) == 1 else "tensors"
    return [f"held whole in memory: {len(held)} {tensors}, the largest {largest:.3g} MB ({why})"]


def _told(one: Any) -> str:
    """A name; a mismatch with what was expected and what is there; an adapter's number with its tensor."""
    if isinstance(one, str):
        return output.printable(one)
    if isinstance(one, tuple):
        return output.printable(f"{one[1]} of adapter {one[0] + 1}")
    return output.printable(f"{one.name} ({one.expected} expected, {one.actual} there)")


def _first(names: Sequence[str]) -> str:
    rest = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join([*names[:SHOWN], *rest])


def _block(one: Finding) -> str:
    where = [_first([output.printable(name) for name in one.tensors])] if one.tensors else []
    advice = [f"help: {output.printable(one.help)}"] if one.help else []
    lines = [*where, *advice, f"explain {one.code}"]
    return "\n  ".join([f"{one.severity}[{one.code}] {one.name}: {output.printable(one.message)}", *lines])


def _outcome(findings: Iterable[Finding]) -> str:
    counts = Counter(one.severity for one in findings)
    told = [f"{count} {severity}" for severity, count in counts.items()]
    return f"structural findings: {', '.join(told)}" if told else "nothing structural is wrong"


# --------------------------------------------------------------------------------------------------------- json


def _as_json(plan: Plan, findings: Sequence[Finding], code: int) -> str:
    """No verdict: headers alone prove nothing."""
    outcome = {
        "schema": SCHEMA,
        "command": "plan",
        "exit_code": code,
        "coverage": _coverage(plan),
        **{key: [_entry(one) for one in entries] for key, entries in _lists(plan).items()},
        "bytes_to_read": _bytes_to_read(plan),
        "held_whole": _held_whole(plan),
        "findings": [finding_as_dict(one) for one in findings],
    }
    return json.dumps(outcome, indent=2, allow_nan=False, default=str) + "\n"


def _entry(one: Any) -> Any:
    if isinstance(one, tuple):
        return {"adapter": one[0], "name": one[1]}
    return one if isinstance(one, str) else asdict(one)


COMMAND = Command(
    name="plan", summary="headers only: coverage, structural faults, bytes to read", configure=configure, run=run
)
