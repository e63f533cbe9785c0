"""README.md must be true: its commands and options exist, its outputs are what is printed, its Python runs.

`python tests/test_readme.py` writes the outputs into it anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_check
from lora_check import registry
from lora_check.commands import _parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
OUTPUT = re.compile(
    r"<!-- output of: (?P<argv>.+?)(?:; from: (?P<start>.+?))? -->\n```\n(?P<shown>.*?)```\n", re.DOTALL
)
FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"<!-- command: (?P<name>\w+) -->\n```sh\n(?P<line>.+)\n```\n")
LINE = re.compile(r"(?:^| )lora_check +(?P<words>.+)$", re.MULTILINE)
VARIES = re.compile(r"in [\d.]+ s( \([^)]*\))?(, [\d.]+ s in all)?|times budget \S+")
PLACEHOLDERS = re.compile(r"BASE|ADAPTER|MERGED|CODE|\[|\.\.\.")


def blocks(language: str) -> list[str]:
    return [one["body"] for one in FENCED.finditer(TEXT) if one["language"] == language]


def subparsers() -> dict[str, ArgumentParser]:
    [action] = [one for one in _parser.build()._actions if one.dest == "command"]
    return dict(action.choices or {})


def options(parser: ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def printed(argv: str, start: str | None) -> str:
    """What a command writes to stdout at 80 columns, from the last line that begins with `start`."""
    command = [sys.executable, "-m", "lora_check", *argv.split()]
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert not done.stderr, done.stderr
    return done.stdout[done.stdout.rindex(f"\n{start}") + 1 :] if start else done.stdout


def example_lines() -> Iterator[str]:
    """What follows `lora_check` in the shell blocks."""
    for text in blocks("sh"):
        yield from (one["words"] for one in LINE.finditer(text))


def test_every_example_is_a_command_line_that_parses() -> None:
    lines = [*example_lines()]
    assert len(lines) > 15
    for words in lines:
        name, *rest = words.split()
        assert name in subparsers(), words
        if not PLACEHOLDERS.search(words):
            _parser.build().parse_args([name, *(one.strip("'") for one in rest)])


def test_every_command_has_its_line_and_an_example() -> None:
    shown = [words.split()[0] for words in example_lines()]
    assert {name: shown.count(name) > 1 for name in registry.load("commands")} == dict.fromkeys(subparsers(), True)


def test_every_option_named_in_the_prose_exists() -> None:
    known = {option for parser in subparsers().values() for option in options(parser)}
    named = set(re.findall(r"`(--[a-z-]+)", FENCED.sub("", TEXT)))
    assert named
    assert named <= known


@pytest.mark.parametrize("block", [*OUTPUT.finditer(TEXT)], ids=lambda one: one["argv"].split()[0])
def test_every_output_is_what_is_printed(block: re.Match[str]) -> None:
    now = printed(block["argv"], block["start"])
    assert VARIES.sub("", now).rstrip() == VARIES.sub("", block["shown"]).rstrip(), (
        "python tests/test_readme.py mends it"
    )


def test_there_are_outputs_to_compare() -> None:
    assert {one["argv"].split()[0] for one in OUTPUT.finditer(TEXT)} >= {"demo", "plan", "report"}


def test_the_python_examples_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for body in blocks("python"):
        exec(compile(body, str(README), "exec"), names)
    assert capsys.readouterr().out.startswith("fp32-add\nrefuted: 1 of 38 tensors")


def test_the_json_table_lists_every_key_in_order() -> None:
    demo = ROOT / "lora_check" / "data" / "demo"
    written = lora_check.check(demo / "base", demo / "adapter", demo / "merged").as_dict()
    [section] = re.findall(r"^## JSON\n(.*?)^## ", TEXT, re.DOTALL | re.MULTILINE)
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [*written]


def test_the_table_of_plug_ins_lists_every_folder() -> None:
    listed = set(re.findall(r"`lora_check/(\w+)/\w+\.py` \| `([A-Z]+)`", TEXT))
    assert listed == set(registry.CONSTANTS.items())


def test_the_codes_that_are_mentioned_exist() -> None:
    assert set(re.findall(r"\bLC\d{3}\b", TEXT)) <= set(registry.load("faults"))


def test_the_two_commands_install_what_was_tested() -> None:
    commands = {one["name"]: one["line"] for one in COMMAND.finditer(TEXT)}
    assert commands.keys() == {"demo", "tests"}
    for line in commands.values():
        installs = re.findall(r"pip install (.+?) &&", line)
        assert installs[0] == "-c constraints.txt torch"
        assert all(one.startswith(("-c constraints.txt ", "--no-deps -r requirements-real.txt")) for one in installs)
    assert commands["demo"].endswith(" && .venv/bin/python -m lora_check demo")
    assert commands["tests"].endswith(" && .venv/bin/python -m pytest tests/")


def rewritten(block: re.Match[str]) -> str:
    head, _, _ = block[0].partition("```\n")
    return f"{head}```\n{printed(block['argv'], block['start']).rstrip()}\n```\n"


if __name__ == "__main__":
    README.write_text(OUTPUT.sub(rewritten, TEXT), encoding="utf-8")
