"""An outcome that is no report, in every form that a report has: its renderers lie in a folder of its own package.

A form is a plug-in as a report's is: one file of `renderers/` with one RENDERER, whose `render` takes the outcome.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from lora_check import registry
from lora_check.commands import _output as output
from lora_check.report import Style


def add_options(parser: ArgumentParser, home: str) -> None:
    """--format, --output, and a file option for every form but text.

    home   the package in which the renderers of the outcome lie: "lora_check.diffing"
    """
    forms = tuple(registry.load("renderers", home))
    parser.add_argument("--format", choices=forms, default="text", help="what goes to stdout; text by default")
    parser.add_argument("--output", metavar="FILE", help="write that to FILE and nothing to stdout")
    for name in forms:
        if name != "text":
            parser.add_argument(f"--{name}", metavar="FILE", help=f"also write the outcome as {name} to FILE")


def deliver(outcome: Any, args: Namespace, home: str) -> None:
    """Write the files, then stdout; a file holds every tensor or one screen as stdout does, where there is --all."""
    every = bool(getattr(args, "all", False))
    for name in registry.load("renderers", home):
        if name != "text" and (file := getattr(args, name)) is not None:
            output.write(file, _rendered(outcome, name, home, Style(all=every)))
    if args.output is not None:
        output.write(args.output, _rendered(outcome, args.format, home, Style(all=every)))
    else:
        output.say(_rendered(outcome, args.format, home, output.terminal_style(every=every)))


def _rendered(outcome: Any, name: str, home: str, style: Style) -> str:
    text: str = registry.load("renderers", home)[name].render(outcome, style)
    return text
