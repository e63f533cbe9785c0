"""`python -m lora_check`: arguments in, exit code out; 0 verified, 1 refuted, 2 could not check, 3 inconclusive."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from lora_check import registry
from lora_check.commands import _failure as failure
from lora_check.commands import _output as output
from lora_check.commands import _parser as parser
from lora_check.errors import LoraCheckError

CANNOT, INTERRUPTED, CLOSED_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the only place where a LoraCheckError becomes words."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parser.build().parse_args(argv)
        return int(registry.load("commands")[args.command].run(args))
    except LoraCheckError as error:
        failure.tell(error, argv)
        return CANNOT
    except SystemExit as left:  # --help
        return int(left.code or 0)
    except KeyboardInterrupt:
        output.complain("interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        output.silence(sys.stdout)
        return CLOSED_PIPE


def entry() -> None:
    """The console script. A crash is no refutation: it shows its traceback and exits with 2, not with Python's 1."""
    sys.stdout, sys.stderr = _open(sys.stdout), _open(sys.stderr)
    try:
        sys.exit(main())
    except Exception:  # noqa: BLE001
        output.complain(traceback.format_exc())
        sys.exit(CANNOT)


def _open(stream: Any) -> Any:
    """The stream, which writes what it cannot encode as escapes; one that is closed from the start swallows it all."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    stream.reconfigure(errors="backslashreplace")
    return stream


if __name__ == "__main__":
    entry()
