"""`python -m lora_check bench`: run, show, compare, page."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.latency import answers, compare, results, suite, table, verdicts
from benchmarks.latency.nouns import Cell, Results
from lora_check.commands import _output as output
from lora_check.errors import UsageError

ROOT = Path(__file__).parents[2]
SECONDS = {"tiny": 60.0, "control": 420.0, "full": 420.0}
"""What a suite takes by default; a GPU that is lent for ten minutes has time for `full`."""
ROUNDS = 25


def main(args: Namespace) -> int:
    """What was asked for; the exit code."""
    actions: Mapping[str, Callable[[Namespace], int]] = {
        "run": measured,
        "show": shown,
        "compare": compared,
        "page": paged,
    }
    return actions[args.action](args)


# ------------------------------------------------------------------------------------------------------------ run


def measured(args: Namespace) -> int:
    """Measure and print; 1 if a time is invalid or an output wrong, 2 if nothing was measured, 3 if not every cell."""
    from benchmarks.latency.place import place_of
    from benchmarks.latency.run import chosen, run

    if args.files:
        raise UsageError(f"run takes no files, and {args.files[0]!r} is one", hint="bench compare A B, or bench page")
    if args.output is not None:
        output.demand_writable(args.output, ())
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it says what it cannot compile
    place = place_of(args.device or _device())
    name = args.suite or suite.default(place.kind)
    cells = suite.asked(
        name,
        workloads=args.workload or (),
        shapes=args.shape or (),
        tokens=args.tokens or (),
        ranks=args.rank or (),
        dtype=args.dtype or "",
    )
    with tqdm(total=len(cells), disable=None, leave=False, unit="cell") as bar:
        found = run(
            dict.fromkeys(cells, ()) if args.backend else cells,
            chosen(args.backend or ()),
            place,
            seconds=args.seconds or SECONDS[name],
            rounds=args.rounds or ROUNDS,
            command=_command(args, name),
            commit=args.commit or "",
            file=Path(args.output) if args.output is not None else None,
            tell=partial(_tell, bar),
        )
    text = _json(results.as_dict(found)) if args.format == "json" else told(found, clock=args.clock, every=args.all)
    output.say(text)
    return _code(found)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _command(args: Namespace, name: str) -> list[str]:
    """The command that does the same again, without what it was printed as."""
    lists = {"workload": args.workload, "backend": args.backend, "shape": args.shape, "tokens": args.tokens}
    lists["rank"] = args.rank
    single = {"device": args.device, "suite": name, "dtype": args.dtype, "seconds": args.seconds, "rounds": args.rounds}
    given = {**{key: ",".join(map(str, value)) for key, value in lists.items() if value}, **single}
    options = [word for key, value in given.items() if value for word in (f"--{key}", str(value))]
    return ["python", "-m", "lora_check", "bench", *options]


def _tell(bar: Any, cell: Cell) -> None:
    bar.set_description_str(table.label(cell), refresh=False)
    bar.update(1)


def told(found: Results, *, clock: str | None = None, every: bool = False) -> str:
    """The main table, every cell if asked for, and the answers in words."""
    judge = partial(verdicts.judged, ceilings=found.ceilings)
    shown = clock or table.clock_of(found)
    parts = [table.text(one) for one in table.overview(found, shown, judge)]
    if every:
        parts += [table.text(one) for cell in found for one in table.detail(cell, judge(cell))]
    return "\n\n".join([*parts, "\n".join(table.wrapped(answers.sentences(found)))]) + "\n"


def shown(args: Namespace) -> int:
    """Print stored results as `run` printed them; the same exit code."""
    (found,) = _read(args.files, 1, "show")
    output.say(told(found, clock=args.clock, every=args.all))
    return _code(found)


def _code(found: Results) -> int:
    timed = [any(timing.samples for row in one.rows for timing in row.clocks.values()) for one in found]
    if not any(timed):
        return 2
    wrong = any(row.gate and row.gate.wrong for one in found for row in one.rows)
    invalid = verdicts.invalid(verdicts.judged(one, found.ceilings) for one in found)
    if wrong or invalid:
        return 1
    return 0 if all(timed) else 3


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False, indent=1) + "\n"


def _read(files: list[str], count: int, action: str) -> list[Results]:
    if len(files) != count:
        hint = "bench compare A B, or bench show A"
        raise UsageError(f"{action} takes {count} files of results, not {len(files)}", hint=hint)
    return [results.load(Path(file)) for file in files]


# -------------------------------------------------------------------------------------------------- compare, page


def compared(args: Namespace) -> int:
    """B beside A; 1 if anything is slower or lost, 3 if nothing can be said, else 0."""
    found = compare.compared(*_read(args.files, 2, "compare"))
    text = _json(compare.as_dict(found)) if args.format == "json" else compare.page(found, everything=args.all)
    if args.output is not None:
        output.write(args.output, text)
    else:
        output.say(text)
    if found.slower or found.lost:
        return 1
    return 0 if found.comparable and not found.ambiguous else 3


def paged(args: Namespace) -> int:
    """Write docs/latency.md and its plots from all stored results."""
    from benchmarks.latency.page import build

    if args.files:
        raise UsageError("page takes no files", hint="it reads benchmarks/results/*/*.json")
    output.say(f"wrote {build(ROOT / 'benchmarks' / 'results', ROOT / 'docs').relative_to(ROOT)}\n")
    return 0
