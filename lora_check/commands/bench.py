"""Measures what an unmerged LoRA costs in forward latency beside the same weights merged, and compares such results.

The benchmark is no part of the package: it lies in the folder benchmarks/ of the repository and is run from a clone.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from importlib import import_module

from lora_check.errors import UsageError
from lora_check.types import Command

HOME = "benchmarks.latency.cli"
ACTIONS = ("run", "show", "compare", "page")


def configure(parser: ArgumentParser) -> None:
    """[run | show A | compare A B | page] and what is to be measured."""
    parser.add_argument("action", nargs="?", choices=ACTIONS, default="run", help="what to do (default run)")
    parser.add_argument("files", nargs="*", metavar="RESULTS", help="show: a file; compare: two files")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the GPU by default, if there is one")
    parser.add_argument("--suite", help="tiny, control or full; full on a GPU and control on a CPU by default")
    parser.add_argument("--workload", type=_names, metavar="A,B", help="only these workloads")
    parser.add_argument("--backend", type=_names, metavar="A,B", help="only these backends, beside merged")
    parser.add_argument("--shape", type=_names, metavar="A,B", help="these shapes in place of those of the suite")
    parser.add_argument(
        "--tokens", type=_numbers, metavar="N,N", help="up to 64 decode so many sequences, more prefill one"
    )
    parser.add_argument("--rank", type=_numbers, metavar="N,N", help="these ranks in place of those of the suite")
    parser.add_argument("--dtype", help="of base and activations: bfloat16, float16 or float32")
    parser.add_argument("--seconds", type=float, help="about how long measuring may take in all")
    parser.add_argument("--rounds", type=int, help="rounds of each cell, at most (default 25)")
    parser.add_argument("--commit", help="of this code, where its repository is not at hand")
    parser.add_argument("--clock", help="the clock of the main table")
    parser.add_argument("--all", action="store_true", help="every cell with all its clocks")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of what is printed (default text)")
    parser.add_argument("--output", metavar="FILE", help="keep the results in FILE, cell by cell")


def run(args: Namespace) -> int:
    """What the benchmark answers."""
    code: int = _benchmark()(args)
    return code


def _benchmark() -> Callable[[Namespace], int]:
    try:
        entry: Callable[[Namespace], int] = import_module(HOME).main
    except ModuleNotFoundError as error:
        if not HOME.startswith(f"{error.name}"):
            raise UsageError(f"bench needs {error.name}", hint="pip install '.[bench,parity]'") from error
        hint = "run `python -m lora_check bench` in a clone of the repository"
        raise UsageError("bench needs the folder benchmarks/ of the repository", hint=hint) from error
    return entry


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(number) for number in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ArgumentTypeError(f"{text!r} is no list of whole numbers above 0")
    return found


COMMAND = Command(
    name="bench",
    summary="what an unmerged LoRA costs in forward latency",
    configure=configure,
    run=run,
    exits="0 measured, or nothing slower; 1 invalid, or something slower; 2 could not measure; 3 not all, or ambiguous",
)
