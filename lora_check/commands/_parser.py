"""The argument parser: one sub-command for each COMMAND of this folder."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any, NoReturn

from lora_check import registry
from lora_check.commands import _output as output
from lora_check.errors import UsageError

ABOUT = "Proves or refutes, from the files alone, that a merged checkpoint is base + LoRA adapter(s)."
EXIT_CODES = "exit codes: 0 verified, 1 refuted, 2 could not check, 3 inconclusive"


class Parser(ArgumentParser):
    """Says what is wrong by a UsageError, so that there is one way out for every error."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **{"epilog": EXIT_CODES, **options})

    def error(self, message: str) -> NoReturn:
        """Instead of printing the usage and leaving."""
        raise UsageError(message, hint=f"{self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        """Notice a closed pipe now, not at exit."""
        del file
        output.say(self.format_help())


def build() -> Parser:
    """Every command with its arguments."""
    parser = Parser(prog="lora_check", description=ABOUT)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in registry.load("commands").items():
        about = {"help": command.summary, "description": command.summary}
        exits = f"exit codes: {command.exits}" if command.exits else EXIT_CODES
        command.configure(commands.add_parser(name, epilog=exits, **about))
    return parser
