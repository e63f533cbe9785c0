"""`python -m benchmarks.checker`: makes the models, measures every arm, stores the figures, writes docs/speed.md.

All models: half an hour on two quiet cores, 40 GB on disk for the largest, removed size by size. `--quick` takes a
minute and writes into build/checker.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.checker import arms as folder
from benchmarks.checker import results as stored
from benchmarks.checker.machine import circumstances, machine
from benchmarks.checker.nouns import ROOT, Case, Settings, Shape
from benchmarks.checker.rotation import controls
from benchmarks.checker.shapes import PROFILED, QUICK, SHAPES, USUAL
from benchmarks.checker.size import UnmadeModelError, entry, make
from benchmarks.checker.stages import profile

PARTS = ("arms", "controls", "profile")
SHARE = 0.8
"""Of the memory that is free when the benchmark begins, what one run may take."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.checker", description=__doc__)
    made.add_argument("--sizes", type=names(SHAPES), metavar="A,B", help=f"of {', '.join(SHAPES)}")
    made.add_argument("--arms", type=names(folder.load()), metavar="A,B", help=f"of {', '.join(folder.load())}")
    made.add_argument("--parts", type=names(PARTS), default=PARTS, metavar="A,B", help=f"of {', '.join(PARTS)}")
    made.add_argument("--repeats", type=int, help="runs of each arm (default 3)")
    made.add_argument("--cold", action="store_true", help="measure with a cold page cache too")
    made.add_argument("--quick", action="store_true", help="one tiny model, once, results under build/checker")
    made.add_argument("--seconds", type=float, default=1200, help="limit of one run (default 1200)")
    made.add_argument("--work", type=Path, metavar="DIR", help="where models are made (default: a temporary folder)")
    made.add_argument("--mergekit", type=Path, metavar="PYTHON", help="interpreter of an environment with mergekit")
    made.add_argument("--name", default="latest", help="name of the file of results (default latest)")
    made.add_argument("--results", type=Path, metavar="DIR", help="default benchmarks/results/checker")
    made.add_argument("--docs", type=Path, metavar="DIR", help="where speed.md and speed.svg go (default docs)")
    made.add_argument("--render", action="store_true", help="only write the page and the plot from the stored results")
    return made


def names(known: Any) -> Any:
    """An argument type: names after one another with commas between them, in the order of `known`."""

    def several(text: str) -> tuple[str, ...]:
        wanted = {name.strip() for name in text.split(",")}
        if unknown := sorted(wanted - set(known)):
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return tuple(name for name in known if name in wanted)

    return several


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and render, or only render; 1 if a size could not be measured."""
    args = parser().parse_args(argv)
    aside = ROOT / "build" / "checker" if args.quick else None
    file = (args.results or aside or ROOT / "benchmarks" / "results" / "checker") / f"{args.name}.json"
    docs = args.docs or aside or ROOT / "docs"
    if args.render:
        if not file.exists():
            print(f"{file} is not there: run without --render first", file=sys.stderr)
            return 2
        render(stored.load(file), args.name, docs)
        return 0
    failed = measure_all(args, file)
    render(stored.load(file), args.name, docs)
    tell(f"wrote {file} and {docs / 'speed.md'}")
    return 1 if failed else 0


def render(results: Any, name: str, docs: Path) -> None:
    """The page and its plot."""
    from benchmarks.checker.page import page
    from benchmarks.checker.plot import draw

    draw(results, docs / "speed.svg")
    (docs / "speed.md").write_text(page(results, name, "speed.svg"))


def measure_all(args: argparse.Namespace, file: Path) -> list[str]:
    """Every size after the other, stored as soon as it is measured; those that could not be made."""
    settings = Settings(
        seconds=args.seconds,
        memory=int(SHARE * psutil.virtual_memory().available),
        mergekit=args.mergekit.absolute() if args.mergekit else None,
    )
    sizes = args.sizes or (QUICK if args.quick else USUAL)
    wanted = set(args.parts)
    profiled = PROFILED if PROFILED in sizes else sizes[-1]
    results = stored.begin(file, machine(settings))
    stored.save(results, file)
    failed = []
    for name in sizes:
        parts = wanted if name == profiled else wanted - {"profile"}
        try:
            with made(SHAPES[name], args, settings, controls="controls" in parts) as case:
                measure_one(args, SHAPES[name], case, settings, parts, results)
            wanted = wanted - {"controls"}
        except UnmadeModelError as error:
            tell(f"{name}: {error}")
            failed.append(name)
        finally:
            stored.save(results, file)
    return failed


@contextmanager
def made(shape: Shape, args: argparse.Namespace, settings: Settings, *, controls: bool) -> Iterator[Case]:
    """A model on disk for as long as it is needed."""
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"checker-{shape.name}-", dir=args.work))
    try:
        tell(f"{shape.name}: making the model")
        case = Case(folder=work, merged=work / "merged")
        make(shape, case, settings, controls=controls, again=not args.arms or "mergekit" in args.arms)
        yield case
    finally:
        shutil.rmtree(work)


def measure_one(
    args: argparse.Namespace, shape: Shape, case: Case, settings: Settings, parts: set[str], results: dict[str, Any]
) -> None:
    """Put what is wanted of one model into the results."""
    arms = [arm for arm in folder.load().values() if not args.arms or arm.name in args.arms]
    repeats = args.repeats or (1 if args.quick else 3)
    run = {"run": circumstances(repeats)}
    if "arms" in parts:
        timed = [arm for arm in arms if arm.timed]
        found = entry(shape, case, timed, settings, repeats=repeats, cold=args.cold, tell=tell)
        stored.put(results, found | run)
    if "controls" in parts:
        results["controls"] = {"size": shape.name, "rows": controls(case, arms, settings, tell)} | run
    if "profile" in parts:
        results["profile"] = {"size": shape.name} | profile(case, settings, repeats) | run


def tell(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
