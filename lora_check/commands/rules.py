"""Lists every mistake that has a code, by range."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from tabulate import tabulate

from lora_check import registry
from lora_check.commands import _output as output
from lora_check.types import Command

RANGES = {
    "LC0": "inputs and provenance",
    "LC1": "a target holds the wrong numbers",
    "LC2": "names, shapes, dtypes",
    "LC3": "could not decide, or decided with something lost",
    "LC4": "a bystander or a copied tensor moved",
    "LC5": "patterns over many tensors",
}


def configure(parser: ArgumentParser) -> None:
    """No arguments."""
    del parser


def run(args: Namespace) -> int:
    """One table for each range that has a code."""
    del args
    faults = registry.load("faults")
    ranges = sorted({code[:3] for code in faults})
    output.say("\n\n".join(_range(start, faults) for start in ranges) + "\n")
    return 0


def _range(start: str, faults: Any) -> str:
    rows = [(code, one.name, one.severity, one.summary) for code, one in sorted(faults.items()) if code[:3] == start]
    table = tabulate(rows, headers=("code", "name", "severity", "this merge has ..."), disable_numparse=True)
    return f"{start}xx  {RANGES.get(start, '')}\n\n{table}"


COMMAND = Command(name="rules", summary="list every mistake that has a code", configure=configure, run=run)
