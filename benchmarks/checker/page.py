"""docs/speed.md from the stored results, and from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import fill
from typing import Any

from tabulate import tabulate

from benchmarks.checker import arms as folder
from benchmarks.checker.merging import EXCESS
from benchmarks.checker.nouns import BROKEN, HONEST

Row = Mapping[str, Any]

FLOOR, OURS, START = "cat", "ours", "start"
WIDTH = 120
VARIANTS = {
    "right": "right, sum rounded once",
    "rounded": "right, delta rounded first",
    "skipped": "layer 1 left out",
    "scaled": f"one delta {100 * (EXCESS - 1):.0f} % too large",
}

HEAD = """# Speed

How long it takes to judge a merge, beside what people do today, and beside reading both files and nothing else. All
rows of a table were measured in one run on one machine, in an order that turns from repetition to repetition; each cell
is the median, with the least and the largest in brackets. Compare rows of one table with each other: seconds of
different machines say nothing.

Made by `python -m benchmarks.checker`; `python -m benchmarks.checker --render` makes this page again from the stored
figures, `benchmarks/results/checker/{name}.json`, which hold every single run.
"""

TERMS = """- **wall**: seconds from the start of the process to its answer; on a machine with other work it is noise
- **CPU**: user and system seconds of the process and its children
- **x ours**, **x floor**: CPU seconds over those of `ours` and of `cat`
- **GB/s**: merged bytes by CPU second
- **private**: the largest sample of resident memory that belongs to no file, over the process tree, every 10 ms; what
  is mapped from a file is the page cache's and not counted; in brackets, how much more that is than `start`'s
- **device**: bytes that had to be read from the disk; with a hot page cache none of the weights should be
- **says**: whether it takes the merge, which is right, to be right

Every arm runs with one intra-op thread, in a fresh process, on files that were just read once (page cache hot) or that
the kernel was just asked to forget (cold).
"""

CONTROLS = """What each arm says of two merges that are right and of two that are not. The first right merge adds in
fp32 and rounds once, as `merge_and_unload()` does; the second rounds the delta before it is added, as
`merge_and_unload(safe_merge=True)` does. A judge is of use when it accepts both and refuses both of the others. An
answer in bold is the wrong one.
"""

PROFILE = """A stage is the difference between the CPU seconds of two command lines of which one does that much more,
each the least of several runs; ± is how far the runs were apart."""

ROOMS = """By file of the package, from a run of its own under cProfile (which costs time itself) after torch was
imported. What a C function takes counts for the file that called it."""


def page(results: Row, name: str, plot: str | None) -> str:
    """The whole page."""
    parts = [HEAD.format(name=name), "\n".join(header(results)), arms(results), TERMS]
    parts += ["## CPU seconds, and private MB", overview(results)] if results["sizes"] else []
    parts += [f"![CPU seconds and private memory by size]({plot})"] if plot else []
    parts += [part for size in results["sizes"] for part in section(size)]
    if results["controls"]:
        parts += ["## Does it catch a broken merge?", CONTROLS, controls(results["controls"])]
    if results["profile"]:
        parts += profile(results["profile"])
    return "\n\n".join(part.strip() for part in parts) + "\n"


def header(results: Row) -> list[str]:
    """The machine."""
    found = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    units = f" ({', '.join(found['units'])})" if found["units"] else ""
    return [
        f"- processor: {found['cpu']}{units}, {found['cores']} cores",
        f"- memory: {found['memory'] / 1e9:.0f} GB",
        f"- kernel: {found['kernel']}",
        f"- versions: {versions}",
    ]


def arms(results: Row) -> str:
    """What the names in the tables stand for."""
    seen = {row["arm"] for size in results["sizes"] for row in size["hot"]}
    seen |= {row["arm"] for row in (results["controls"] or {"rows": []})["rows"]}
    listed = [f"- **{arm.name}**: {arm.about}" for arm in folder.load().values() if arm.name in seen]
    return "\n".join(fill(line, WIDTH, subsequent_indent="  ", break_long_words=False) for line in listed)


def overview(results: Row) -> str:
    """Every arm over every size: the medians that the plot shows."""
    names = [
        name for name in folder.load() if any(name == row["arm"] for size in results["sizes"] for row in size["hot"])
    ]
    heads = ["", *(f"{size['name']}, {gigabytes(size)}" for size in results["sizes"])]
    rows = [[name, *(brief(size, name) for size in results["sizes"])] for name in names]
    return github(rows, heads)


def brief(size: Row, name: str) -> str:
    """CPU seconds and private MB of one arm at one size."""
    row = next((row for row in size["hot"] if row["arm"] == name), None)
    if row is None or not row["runs"]:
        return "" if row is None else "none"
    return f"{short(median(row, cpu_of))} s, {median(row, private_of) / 1e6:.0f} MB"


def gigabytes(size: Row) -> str:
    """The bytes of the merged checkpoint."""
    return f"{size['merged_bytes'] / 1e9:.2g} GB"


# ---------------------------------------------------------------------------------------------------------- sizes


def section(size: Row) -> list[str]:
    """One size: what was judged, and a table for each state of the page cache."""
    run = size["run"]
    times = f"{run['repeats']} repetitions" if run["repeats"] > 1 else "One run"
    facts = (
        f"{size['about']}. {gigabytes(size)} merged, {size['tensors']} tensors, "
        f"{size['targets']} targets, {size['files']} file{'s' if size['files'] > 1 else ''}, r = {size['rank']}, "
        f"alpha = {size['alpha']}. {times} at commit {run['commit']}, {run['date']}; "
        f"load of the machine when it began: {run['load']}."
    )
    parts = [f"## {gigabytes(size)}: {size['name']}", paragraph(facts), table(size, size["hot"])]
    return [*parts, "With a cold page cache:", table(size, size["cold"])] if size["cold"] else parts


def paragraph(text: str) -> str:
    """With a capital, in lines."""
    return fill(text[:1].upper() + text[1:], WIDTH)


def table(size: Row, rows: Sequence[Row]) -> str:
    """The arms of one size."""
    figures = {row["arm"]: (median(row, cpu_of), median(row, private_of)) for row in rows if row["runs"]}
    heads = ["", "wall s", "CPU s", "x ours", "x floor", "GB/s", "private MB", "device MB", "says"]
    return tabulate(
        [measured(size, row, figures) for row in places(rows)], heads, tablefmt="github", disable_numparse=True
    )


def places(rows: Sequence[Row]) -> list[Row]:
    """Rows in the order of the tables."""
    known = list(folder.load())
    return sorted(rows, key=lambda row: known.index(row["arm"]) if row["arm"] in known else len(known))


def measured(size: Row, row: Row, figures: Mapping[str, tuple[float, float]]) -> list[str]:
    """One arm's cells, or the reason why it has none."""
    if not row["runs"]:
        return [row["arm"], *[""] * 7, row["reason"] or "not run"]
    cpu, held = figures[row["arm"]]
    answers = ", ".join(dict.fromkeys(run["answer"] for run in row["runs"]))
    return [
        row["arm"],
        spread(row, lambda run: run["wall"]),
        spread(row, cpu_of),
        ratio(cpu, figures.get(OURS)),
        ratio(cpu, figures.get(FLOOR)),
        "" if row["arm"] == START else f"{size['merged_bytes'] / cpu / 1e9:.2f}",
        f"{held / 1e6:.0f}{beyond(held, figures.get(START))}",
        f"{median(row, lambda run: run['from_disk']) / 1e6:.0f}",
        ("" if answers == "none" else answers) + (f"; then {row['reason']}" if row["reason"] else ""),
    ]


def cpu_of(run: Row) -> float:
    """CPU seconds of a stored run."""
    return float(run["user"] + run["system"])


def median(row: Row, figure: Callable[[Row], float]) -> float:
    """The middle one of an arm's runs."""
    return statistics.median(figure(run) for run in row["runs"])


def spread(row: Row, figure: Callable[[Row], float]) -> str:
    """Median (least-largest)."""
    found = [figure(run) for run in row["runs"]]
    middle = short(statistics.median(found))
    return middle if len(found) == 1 else f"{middle} ({short(min(found))}-{short(max(found))})"


def short(seconds: float) -> str:
    """Three digits or so."""
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"


def ratio(cpu: float, other: tuple[float, float] | None) -> str:
    """CPU seconds over those of another arm, if it has any."""
    return short(cpu / other[0]) if other and other[0] else ""


def beyond(held: float, start: tuple[float, float] | None) -> str:
    """How much more memory than after the imports, of an arm that makes them."""
    return f" (+{(held - start[1]) / 1e6:.0f})" if start and held > start[1] else ""


def private_of(run: Row) -> float:
    """Private bytes of a stored run."""
    return float(run["private"])


# ------------------------------------------------------------------------------------------------------- controls


def controls(found: Row) -> str:
    """What each arm said of each variant, and whether that tells right from wrong."""
    heads = [f"{found['size']} model", *(VARIANTS[one] for one in (*HONEST, *BROKEN)), "of use?"]
    rows = [
        [row["arm"], *(told(row[one], good=one in HONEST) for one in (*HONEST, *BROKEN)), useful(row)]
        for row in places(found["rows"])
    ]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def told(said: Row, *, good: bool) -> str:
    """An answer, in bold where it is the wrong one, and what was named."""
    if said["reason"]:
        return f"no answer: {said['reason']}"
    word = said["answer"] if said["answer"] == ("right" if good else "wrong") else f"**{said['answer']}**"
    return f"{word}: {said['named']}" if said["named"] else word


def useful(row: Row) -> str:
    """Whether the arm accepts what is right and refuses what is not."""
    accepted = sum(row[one]["answer"] == "right" for one in HONEST)
    caught = sum(row[one]["answer"] == "wrong" for one in BROKEN)
    if accepted == len(HONEST) and caught == len(BROKEN):
        return "yes"
    return f"no: accepts {accepted} of {len(HONEST)} right, catches {caught} of {len(BROKEN)} broken"


# -------------------------------------------------------------------------------------------------------- profile


def profile(found: Row) -> list[str]:
    """Where lora_check's own time goes."""
    if found["reason"]:
        return ["## Where the time goes", f"Not known: {found['reason']}."]
    total = sum(row["cpu"] for row in found["stages"])
    stages = [
        stage(row, total) for row in [*found["stages"], {"stage": "all", "cpu": total, "apart": 0, "merged_bytes": 0}]
    ]
    whole = sum(row["cpu"] for row in found["rooms"])
    run = found["run"]
    title = f"The {found['size']} model with one worker, at commit {run['commit']}, {run['date']}."
    rooms = [[row["room"], f"{row['cpu']:.3f}", percent(row["cpu"], whole), row["calls"]] for row in found["rooms"]]
    return [
        "## Where the time goes",
        paragraph(f"{title} {PROFILE}".replace("\n", " ")),
        github(stages, ["stage", "CPU s", "±", "share", "merged GB/s"]),
        ROOMS,
        github(rooms, ["file", "CPU s", "share", "calls"]),
    ]


def stage(row: Row, total: float) -> list[str]:
    """A stage's cells; a rate only where bytes were read in a time that can be told from nothing."""
    known = row["merged_bytes"] and row["cpu"] > row["apart"]
    rate = f"{row['merged_bytes'] / row['cpu'] / 1e9:.2f}" if known else ""
    apart = f"{row['apart']:.2f}" if row["apart"] else ""
    return [row["stage"], f"{row['cpu']:.2f}", apart, percent(row["cpu"], total), rate]


def percent(part: float, whole: float) -> str:
    """A share of the whole."""
    return f"{100 * part / whole:.0f} %" if whole else ""


def github(rows: Iterable[Sequence[Any]], heads: Sequence[str]) -> str:
    """A table."""
    right = ("left", *["right"] * (len(heads) - 1))
    return tabulate(list(rows), heads, tablefmt="github", disable_numparse=True, colalign=right)
