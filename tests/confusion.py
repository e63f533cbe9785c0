"""Print docs/confusion.md: which name each mistake is given, over recipes, dtypes and sizes of the delta.

PYTHONPATH=. python tests/confusion.py > docs/confusion.md
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import confusion_worlds as worlds
import torch
from confusion_bases import BASES
from confusion_places import PLACES
from confusion_scripts import BASIC, SCALES, Mistake, folded
from tabulate import tabulate
from torch import Tensor

import lora_check
from lora_check import registry
from lora_check.types import Finding, Verdict

LETTERS = {
    "named": "",
    "listed": "l",
    "same": "s",
    "within": "w",
    "unexplained": "u",
    "in doubt": "d",
    "alone": "a",
    "MISNAMED": "M",
    "BROKEN": "B",
}
OUTCOMES = tuple(LETTERS)
"""From the best to the worst."""

GOOD, HIDDEN = ("named", "listed"), ("same", "within")
LAST_PLACES = 2
TITLES = {code: fault.name for code, fault in registry.load("faults").items()}
MISTAKES = {one.name: one for one in (*BASIC, *SCALES, *PLACES, *BASES)}


@dataclass(frozen=True)
class Cell:
    """One model with one mistake."""

    mistake: str
    world: str
    dtype: str
    size: float
    seed: int

    def __str__(self) -> str:
        return f"{self.mistake}/{self.world}/{self.dtype}/{self.size:g}/{self.seed}"

    @property
    def safe(self) -> bool:
        """Whether the script stores each delta before it adds it."""
        return bool(zlib.crc32(str(self).encode()) & 1)


@dataclass(frozen=True)
class Outcome:
    """What a mistake was called.

    named        by its code, alone
    listed       'one of', its code among them, all of which write the same bits
    same         not refuted, and rightly so: the bits are those of the right merge
    within       not refuted: other bits, each within what honest merges may write
    unexplained  refuted, and some tensor is given no name
    in doubt     'one of', its code among them, some of which write other bits
    alone        by the code of another mistake that writes the same bits, its own code not told
    MISNAMED     by the code of a mistake that writes other bits
    BROKEN       the check ended with an exception
    """

    cell: Cell
    word: str
    told: str
    seconds: float


# --------------------------------------------------------------------------------------------------------- judge


def judged(cell: Cell, model: worlds.Model, folders: tuple[Path, list[Path]]) -> Outcome:
    """Make the mistake, check the files, and compare the name with the truth."""
    mistake, (base, adapters) = MISTAKES[cell.mistake], folders
    merged = mistake.merged(model, cell.safe)
    given = (base, adapters, merged)
    if mistake.swapped:
        model, merged = exchanged(model, merged)
        given = ({one.name: one.base for one in model.targets} | dict(model.bystanders), adapters, merged)
    began = time.monotonic()
    try:
        report = lora_check.check(*given, jobs=1, weights=model.weights)
    except Exception as problem:  # noqa: BLE001 - whichever it is, it is told as one
        return Outcome(cell, "BROKEN", f"{type(problem).__name__}: {problem}", time.monotonic() - began)
    seconds = time.monotonic() - began
    errors = [one for one in report.findings if one.severity == "error"]
    told = "; ".join(f"{one.code} {one.message}" for one in errors)
    if report.verdict is not Verdict.REFUTED:
        honest = all(alike(merged[one.name], worlds.merge(one, cell.safe)) for one in model.targets)
        return Outcome(cell, "same" if honest else "within", told, seconds)
    words = {called(one, cell, model, merged) for one in errors} or {"unexplained"}
    return Outcome(cell, max(words, key=OUTCOMES.index), told, seconds)


def exchanged(model: worlds.Model, merged: dict[str, Tensor]) -> tuple[worlds.Model, dict[str, Tensor]]:
    """The model over its own merge, and its base as what was merged."""
    targets = tuple(replace(one, base=merged[one.name]) for one in model.targets)
    return replace(model, targets=targets), {one.name: one.base for one in model.targets} | dict(model.bystanders)


def called(finding: Finding, cell: Cell, model: worlds.Model, merged: dict[str, Tensor]) -> str:
    """How one finding calls the mistake."""
    truth = MISTAKES[cell.mistake].code
    codes = {finding.code, *finding.evidence.get("also", ())}
    if finding.code == "LC199":
        return "unexplained"
    others = [code for code in codes if code != truth and not writes_the_same(code, finding, model, merged)]
    if truth in codes:
        return "named" if codes == {truth} else "in doubt" if others else "listed"
    return "MISNAMED" if others else "alone"


def writes_the_same(code: str, finding: Finding, model: worlds.Model, merged: dict[str, Tensor]) -> bool:
    """Whether a script of that mistake, in one of its ways, writes the very tensors that the finding is about."""
    targets = {one.name: one for one in model.targets if one.name in finding.tensors}
    if len(targets) < len(finding.tensors):
        return False
    return any(
        all(_same(mistake, model, target, safe, merged[name]) for name, target in targets.items())
        for mistake in MISTAKES.values()
        if mistake.code == code
        for safe in (False, True)
    )


def _same(mistake: Mistake, model: worlds.Model, target: worlds.Target, safe: bool, actual: Tensor) -> bool:
    if mistake.swapped:
        return alike(folded(target, safe, base=actual), target.base)
    try:
        written = mistake.write(model, target, safe)
    except (AttributeError, TypeError, RuntimeError):  # a script that needs what this target lacks
        return False
    return written is not None and alike(written, actual)


def alike(one: Tensor, other: Tensor) -> bool:
    """The same bits; in float32 but for the last places, which any other order of the same sums changes too."""
    if one.dtype != torch.float32:
        return torch.equal(one, other)
    return bool(((one - other).abs() <= LAST_PLACES * torch.finfo(torch.float32).eps * one.abs().max()).all())


# --------------------------------------------------------------------------------------------------------- cells


def cells(most: int, seeds: int = 1, only: str = "") -> Iterator[Cell]:
    """Every mistake at every dtype and size of the delta, in so many of its worlds, which take turns."""
    for turn, (name, mistake) in enumerate(MISTAKES.items()):
        for index, (dtype, size) in enumerate(itertools.product(mistake.dtypes, worlds.SIZES)):
            every = list(mistake.worlds)
            start = (turn + most * index) % len(every)
            for world, seed in itertools.product((every[start:] + every[:start])[:most], range(seeds)):
                cell = Cell(name, world, dtype, size, mistake.ranks[(seed + index) % len(mistake.ranks)] + 2 * seed)
                if re.search(only, str(cell)):
                    yield cell


def run(chosen: Iterable[Cell], progress: bool = False) -> list[Outcome]:
    """Judge every cell; a model and its folders are made once for all the mistakes made with it."""
    groups: dict[tuple[str, str, float, int], list[Cell]] = defaultdict(list)
    for cell in chosen:
        groups[cell.world, cell.dtype, cell.size, cell.seed].append(cell)
    found: list[Outcome] = []
    for index, (key, members) in enumerate(groups.items()):
        model = worlds.make(*key)
        with tempfile.TemporaryDirectory() as folder:
            folders = model.save(Path(folder))
            found += [judged(cell, model, folders) for cell in members]
        if progress:
            tell(found[-len(members) :], f"{index + 1} of {len(groups)} models, {len(found)} cases: {key}")
    return found


def tell(news: Sequence[Outcome], where: str) -> None:
    """Progress, and each case that went wrong as `--only` takes it."""
    for one in news:
        if one.word not in (*GOOD, *HIDDEN):
            print(f"{one.word}: {one.cell} {one.told}", file=sys.stderr)
    print(where, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------- page

HEAD = """# Confusion

Each mistake was made by a script that shares nothing with the code that judges it, in models of about eight targets of
two ranks, square ones and others, and the name that `lora_check` gives it was compared with the truth. Columns are the
dtype of the files and the size of the delta, as a share of the weight's norm.

- a plain number: so many were **named**, by their own code and no other
- `l`: **listed**, as one of several mistakes that write the same bits
- `s`: not refuted, for the bits are the **same** as those of the right merge
- `w`: not refuted; other bits, each of them **within** what honest merges may write
- `u`: refuted, and some tensor left **unexplained** (LC199)
- `d`: listed, and not all that is listed writes these bits, to the last place: **doubt**
- `a`: named **alone** after another mistake that writes the same bits
- `M`: **misnamed**: by the name of a mistake that writes other bits
- `B`: the check **broke** off

Made by `PYTHONPATH=. python tests/confusion.py > docs/confusion.md`, with torch {torch} on one core of a CPU. Each
mistake meets {most} of the recipes it can happen to at each dtype and size, in turn; `--worlds 99` takes all of them.
"""


def page(outcomes: Sequence[Outcome], most: int, seconds: float) -> Iterator[str]:
    """The whole document."""
    yield HEAD.format(torch=version("torch"), most=most)
    words = Counter(one.word for one in outcomes)
    yield f"{len(outcomes)} cases in {seconds:.0f} s: {', '.join(f'{words[word]} {word}' for word in OUTCOMES)}.\n"
    yield "## Named or listed, of those that are refuted\n"
    yield from table(outcomes, lambda one: "all mistakes", share)
    yield "\n## By mistake\n"
    yield from table(
        outcomes, lambda one: f"{MISTAKES[one.cell.mistake].code} {TITLES[MISTAKES[one.cell.mistake].code]}", counts
    )
    yield "\n## By recipe and layout\n"
    yield from table(outcomes, lambda one: one.cell.world, counts)
    wrong = [one for one in outcomes if one.word not in (*GOOD, *HIDDEN)]
    if wrong:
        yield "\n## What went wrong\n"
        yield "Each line is a case again, with `--only` before it.\n"
        yield from (f"- {one.word}: `{one.cell}` {one.told}" for one in wrong)


def table(
    outcomes: Sequence[Outcome], row: Callable[[Outcome], str], show: Callable[[Counter[str]], str]
) -> Iterator[str]:
    """One line for each row, one column for each dtype and size."""
    found: dict[str, dict[tuple[str, float], Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for one in outcomes:
        found[row(one)][one.cell.dtype, one.cell.size][one.word] += 1
    columns = list(itertools.product(worlds.DTYPES, worlds.SIZES))
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    headers = ["", *(f"{short[dtype]} {100 * size:g} %" for dtype, size in columns)]
    lines = [[name, *(show(cells[column]) for column in columns)] for name, cells in sorted(found.items())]
    yield tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def counts(words: Counter[str]) -> str:
    return " ".join(f"{words[word]}{letter}" for word, letter in LETTERS.items() if words[word])


def share(words: Counter[str]) -> str:
    refuted = sum(count for word, count in words.items() if word not in HIDDEN)
    return f"{100 * sum(words[word] for word in GOOD) / refuted:.1f} %" if refuted else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--worlds", type=int, default=1, help="how many worlds each mistake meets at each dtype and size"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="a regular expression on MISTAKE/WORLD/DTYPE/SIZE/SEED")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    most = max(len(one.worlds) for one in MISTAKES.values()) if options.only else options.worlds
    outcomes = run(cells(most, options.seeds, options.only), progress=True)
    print("\n".join(page(outcomes, most, time.monotonic() - began)))
    sys.exit(any(one.word in ("MISNAMED", "BROKEN") for one in outcomes))


if __name__ == "__main__":
    main()
