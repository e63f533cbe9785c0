"""An error in words on stderr and, where --json asked for a file, as JSON in that file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

from lora_check.commands import _output as output
from lora_check.errors import LoraCheckError, UsageError
from lora_check.report import SCHEMA


def tell(error: LoraCheckError, argv: Sequence[str]) -> None:
    """`error: ...` and `hint: ...`; the --json file is written as any other, or not at all where it cannot be."""
    lines = [f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else [])]
    output.complain("".join(f"{output.printable(line)}\n" for line in lines))
    with suppress(UsageError):
        for file, others in _json_file(argv):
            output.demand_writable(file, others)
            output.write(file, _as_json(error))


def _as_json(error: LoraCheckError) -> str:
    outcome = {"code": error.code, "message": error.message, "hint": error.hint}
    return json.dumps({"schema": SCHEMA, "error": outcome}, indent=2) + "\n"


def _json_file(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The file and every other word, read from the words alone: the error may be that they could not be parsed."""
    apart = [
        (word, [*argv[: i + 1], *argv[i + 2 :]])
        for i, (option, word) in enumerate(pairwise(argv))
        if option == "--json"
    ]
    joined = [(word[7:], list(argv)) for word in argv if word.startswith("--json=")]
    return [*apart, *joined][-1:]
