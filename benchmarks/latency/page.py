"""docs/latency.md and its plots from the stored results, and from nothing else.

python -m benchmarks.latency.page
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.latency import floors
from benchmarks.latency.answers import sentences
from benchmarks.latency.figures import overhead, spread, summary
from benchmarks.latency.nouns import Ceilings, Measured, Results, Row
from benchmarks.latency.results import FINISHED, stored
from benchmarks.latency.table import (
    CLOCKS,
    Judged,
    Notes,
    Table,
    block,
    blocks,
    clock_of,
    clocks_of,
    counted,
    figure,
    key,
    label,
    markdown,
    named,
    percent,
    untimed,
    wrapped,
    yardstick,
)
from benchmarks.latency.traffic import kernels, of
from benchmarks.latency.verdicts import judged
from lora_check.errors import InputError

OURS = "triton_fused"
"""The backend that this benchmark brings along itself."""
PLOTS = {
    "tokens": "Overhead over tokens: median with p20-p80, and the least that one fused kernel could have",
    "rank": "Overhead over rank at a fixed number of tokens",
    "roofline": "FLOP/s by FLOP/byte, beside both ceilings of the device",
}

HEAD = """# Latency: what an unmerged LoRA costs

A merged model runs at the speed of its base. Unmerged, every adapted layer does two small products more, and how much
that costs depends less on their arithmetic than on who runs them: kernels that are launched one by one, and activations
that are read and written again. Here it is measured, beside the least that it could cost.

Made by `python -m lora_check bench page` from the results under `benchmarks/results/`, which hold every sample.
"""

METHOD = """## How it is measured

- Every backend runs the same modules on the same inputs; all are measured once in a round, and each round has its own
  order. Overhead is the median of (backend / merged - 1) over the rounds.
- Merged is measured twice in each round, as if it were two backends: how far the two are apart in 60 % of the rounds is
  the A/A. An overhead within it is none that the run can see (marked ~).
- T is the tokens of one forward: `T = 128` is a prompt, `T = 8x1` one new token of each of 8 sequences.
- Clocks are never mixed: `graph_replay` is a replayed CUDA graph, `device_busy` the sum of the kernels alone (on a CPU:
  its CPU seconds), `eager_wall` the pace of a Python loop.
- Cold: calls go round copies that are more than five times the cache together, so that weights come from memory.
- Before it is timed, every output is held to a derived budget against float64. A wrong output gets no time.
- No time can be below the hard floor: weights and factors read once, every multiplication done once, at the rates that
  were measured in the same run. One that is, by more than the A/A, is invalid (marked !).
"""

NO_GPU = """No GPU was at hand when this was written: what follows is the control on a CPU, which runs the same code on
smaller shapes. It shows that the harness works and in which order the backends come; it says nothing of a GPU.
"""
CONTROL = "A control: the same code on a CPU, on smaller shapes. Its figures say nothing of a GPU."

PREDICTED = """Computed from the traffic of each backend and the measured ceilings, before anything was timed: the
seconds that its kernels add to those of merged, over the measured merged. The lower figure leaves in a cache what
passes between kernels, the higher one sends it through memory; launches are added where their cost is known. Each entry
is predicted / measured / miss, in percent of merged; a measurement between the two predictions has no miss.
"""

SHOWN = 12
"""Lines of a list; how many more there are is told."""


def build(folder: Path, docs: Path) -> Path:
    """Write latency.md and its plots into `docs` from the results in the folders of `folder`.

    raises   InputError: there are no results, or a file of them cannot be read
    """
    from benchmarks.latency.plot import draw

    found = stored(folder)
    if not found:
        raise InputError(f"{folder}: no results of the latency benchmark in its folders", hint="keep a run there first")
    plots = {
        file: draw(one, clock_of(one), docs, "-".join(dict.fromkeys(("latency", file.parent.name, file.stem))))
        for file, one in chosen(found)[0].items()
    }
    written = docs / "latency.md"
    written.write_text(
        page(found, {file: {kind: one.name for kind, one in made.items()} for file, made in plots.items()})
    )
    return written


def page(found: Mapping[Path, Results], plots: Mapping[Path, Mapping[str, str]]) -> str:
    """The whole page: a chapter for each device, those with a GPU first."""
    newest, older = chosen(found)
    gpu = any(is_gpu(one) for one in newest.values())
    parts = [HEAD, METHOD, *([] if gpu else [NO_GPU])]
    for file, one in sorted(newest.items(), key=lambda item: not is_gpu(item[1])):
        parts += chapter(one, name_of(file), plots.get(file, {}), [name_of(other) for other in older.get(file, [])])
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def chosen(found: Mapping[Path, Results]) -> tuple[dict[Path, Results], dict[Path, list[Path]]]:
    """The newest results of each device, and what older ones there are of it."""
    devices: dict[str, list[Path]] = {}
    for file, one in sorted(found.items(), key=lambda item: str(item[1].environment.get("date", ""))):
        devices.setdefault(device_of(one), []).append(file)
    last = [files[-1] for files in devices.values()]
    return {file: found[file] for file in last}, {files[-1]: files[:-1] for files in devices.values()}


def name_of(file: Path) -> str:
    """A file of results as the page names it."""
    return f"{file.parent.name}/{file.name}"


def is_gpu(results: Results) -> bool:
    """Whether it was measured on one."""
    return part(results, "device").get("kind") == "cuda"


def device_of(results: Results) -> str:
    """What it was measured on."""
    return str(part(results, "device").get("name", "a device without a name"))


def part(results: Results, name: str) -> Mapping[str, Any]:
    """A part of the environment that holds several entries."""
    found = results.environment.get(name)
    return found if isinstance(found, Mapping) else {}


# ---------------------------------------------------------------------------------------------------- one chapter


def chapter(results: Results, name: str, plots: Mapping[str, str], older: Sequence[str]) -> list[str]:
    """One device."""
    said = {one.cell: judged(one, results.ceilings) for one in results}

    def judge(measured: Measured) -> Judged:
        return said[measured.cell]

    clock = clock_of(results)
    others = [one for one in clocks_of(row for cell in results for row in cell.rows) if one != clock]
    return [
        f"## {device_of(results)}",
        "" if is_gpu(results) else CONTROL,
        "\n".join(wrapped(header(results, name, older), "  ")),
        f"### Overhead by `{clock}`" if clock else "### Nothing was timed",
        *tables(results, clock, judge),
        *(folded(f"by {one}", tables(results, one, judge)) for one in others if one in timed(results)),
        "### What can be trusted",
        "\n".join(wrapped(trust(results, judge), "  ")),
        "### In words",
        "\n".join(wrapped((f"- {one}" for one in sentences(results)), "  ")),
        *(f"![{PLOTS[kind]}]({file})" for kind, file in plots.items()),
        "### Prediction and measurement",
        PREDICTED,
        *predictions(results, clock),
        "### Where the obvious does not win",
        "\n".join(wrapped(losses(results, clock), "  ")),
    ]


def header(results: Results, name: str, older: Sequence[str]) -> Iterator[str]:
    """The environment, a line for each part."""
    found = results.environment
    yield f"- results: {name}, {len(results.cells)} cells, commit {found.get('commit')}, {found.get('date')}"
    yield f"- command: `{found.get('command')}`, seed {found.get('seed')}"
    for title in ("device", "processor", "precision", "threads"):
        yield f"- {title}: {listed(part(results, title))}"
    yield f"- versions: {listed(part(results, 'versions'), absent='none')}"
    clocks = part(results, "clocks")
    yield f"- clocks before: {listed(clocks.get('before'))}; after: {listed(clocks.get('after'))}"
    yield f"- ceilings, measured in the same run: {rates(results.ceilings)}"
    if older:
        yield f"- older results of this device, not shown: {', '.join(older)}"
    if found.get(FINISHED) is not True:
        yield "- **cut short**: the run ended before its last cell; what is not here was not measured"


def listed(entries: Any, absent: str = "unknown") -> str:
    """`name value, name value`; `absent` is what None means."""
    if not isinstance(entries, Mapping) or not entries:
        return "not known"
    told = {name: absent if value is None else spoken(name, value) for name, value in entries.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in told.items())


def spoken(name: str, value: Any) -> str:
    """One entry of the environment."""
    if name in ("memory", "cache") and isinstance(value, (int, float)):
        return f"{value / 1e9:.0f} GB" if value >= 1e9 else f"{value / 2**20:.0f} MiB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def rates(ceilings: Ceilings) -> str:
    """Bytes and FLOP a second, and what a launch costs."""
    products = [f"{figure(rate / 1e12)} TFLOP/s {dtype}" for dtype, rate in ceilings.matmul.items()]
    launches = [f"{figure(one * 1e6)} us a launch by {clock}" for clock, one in ceilings.launch.items()]
    reading = [f"read {figure(ceilings.read / 1e9)} GB/s", f"copy {figure(ceilings.copy / 1e9)} GB/s"]
    return ", ".join([*reading, *products, *launches])


def tables(results: Results, clock: str, judge: Callable[[Measured], Judged]) -> list[str]:
    """The main table by a clock, block by block."""
    made = [block(several, clock, judge) for several in blocks(results)] if clock else []
    return [f"**{one.title}**\n\n{markdown(one)}" for one in made]


def folded(title: str, parts: Sequence[str]) -> str:
    """Parts that open on demand."""
    return "\n\n".join([f"<details><summary>{title}</summary>", *parts, "</details>"])


def timed(results: Results) -> set[str]:
    """Clocks with samples."""
    return {clock for cell in results for row in cell.rows for clock, one in row.clocks.items() if one.samples}


def trust(results: Results, judge: Callable[[Measured], Judged]) -> Iterator[str]:
    """How many times are invalid, and how far apart merged and merged again are."""
    words = counted(results, judge)
    yield f"- invalid: {words.get('invalid', 0)} of {sum(words.values())} times; all: {listed(words)}"
    for clock in (one for one in (*CLOCKS, *sorted(timed(results) - set(CLOCKS))) if one in timed(results)):
        known = [one for cell in results if (one := spread(cell, clock)) is not None]
        unknown = f"; {len(results.cells) - len(known)} cells have none" if len(known) < len(results.cells) else ""
        middle = f"median ±{100 * median(known):.1f} %, largest ±{100 * max(known):.1f} %" if known else "none"
        yield f"- A/A by {clock}: {middle}{unknown}"


# ------------------------------------------------------------------------------------- prediction and measurement


def predictions(results: Results, clock: str) -> list[str]:
    """Predicted / measured / miss, in the blocks of the main table."""
    return [
        f"**{one.title}**\n\n{markdown(one)}"
        for one in (miss_table(cells, clock, results) for cells in blocks(results))
    ]


def miss_table(several: Sequence[Measured], clock: str, results: Results) -> Table:
    """One block, a row for each backend but merged."""
    shown = block(several, clock, lambda _: {})
    names = list(dict.fromkeys(key(row) for one in several for row in one.rows if not row.merged))
    notes = Notes()
    rows = [(named(name), *(missed(one, name, clock, results.ceilings, notes) for one in several)) for name in names]
    heads = ("predicted / measured / miss", *shown.heads[1:])
    return Table(title=shown.title, heads=heads, rows=tuple(rows), notes=notes.lines())


def missed(measured: Measured, name: tuple[str, bool], clock: str, ceilings: Ceilings, notes: Notes) -> str:
    """One entry."""
    row = next((row for row in measured.rows if key(row) == name), None)
    merged = yardstick(measured)
    if row is None or untimed(row, clock) or merged is None or untimed(merged, clock):
        return notes.mark("no time to hold a prediction against")
    over = overhead(row, merged, clock)
    low, high = (one / summary(merged.clocks[clock]).median for one in added(measured, row, clock, ceilings))
    seen = over.median if over else float("nan")
    miss = max(seen - high, 0.0) + min(seen - low, 0.0)
    return f"{percent(low)} to {percent(high)} / {percent(seen)} / {percent(miss) if miss else 'none'}"


def added(measured: Measured, row: Row, clock: str, ceilings: Ceilings) -> tuple[float, float]:
    """Seconds that the kernels of a backend take beyond those of merged: with activations in a cache, and in memory."""
    modules = of(measured.cell, measured.modules, row.adapter)
    own, plain = kernels(row.traffic, modules), kernels("merged", modules)
    cold = measured.cell.cache == "cold"
    launching = (len(own) - len(plain)) * ceilings.launch.get(clock, 0.0)
    ends = zip(floors.expected(own, ceilings, cold=cold), floors.expected(plain, ceilings, cold=cold), strict=True)
    low, high = (mine - other + launching for mine, other in ends)
    return min(low, high), max(low, high)


# --------------------------------------------------------------------------------------------- where it does not win


def losses(results: Results, clock: str) -> list[str]:
    """Cells in which merging gains nothing, and those in which another unmerged backend beats our own kernel."""
    level = [told for one in results for told in level_with_merged(one, clock)]
    beaten = [told for one in results for told in ours_beaten(one, clock)]
    asked = any(row.backend == OURS and not untimed(row, clock) for one in results for row in one.rows)
    ours = capped(f"`{OURS}`, the kernel of this benchmark, is not the fastest unmerged backend", beaten)
    return [
        *capped("An unmerged backend is as fast as merged, as far as the run can tell, or faster", level),
        *(ours if asked else [f"- `{OURS}`, the kernel of this benchmark: not measured by {clock} here"]),
    ]


def capped(title: str, lines: Sequence[str]) -> list[str]:
    """A list with its length, SHOWN lines of it at most."""
    rest = [f"- ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"- {title}: {f'in {len(lines)} cases' if lines else 'nowhere'}", *lines[:SHOWN], *rest]


def level_with_merged(measured: Measured, clock: str) -> Iterator[str]:
    """Backends whose overhead is within the A/A, or below nought."""
    margin = spread(measured, clock)
    for row, over in overheads(measured, clock):
        if margin is not None and over <= margin:
            yield f"- {row.backend} {percent(over)} % (A/A ±{100 * margin:.1f} %): {label(measured.cell)}"


def ours_beaten(measured: Measured, clock: str) -> Iterator[str]:
    """The fastest unmerged backend, where it is another than ours by more than the A/A."""
    found = {row.backend: over for row, over in overheads(measured, clock)}
    margin = spread(measured, clock)
    if OURS not in found or margin is None:
        return
    best = min(found, key=lambda name: found[name])
    if found[best] < found[OURS] - margin:
        yield f"- {best} {percent(found[best])} %, {OURS} {percent(found[OURS])} %: {label(measured.cell)}"


def overheads(measured: Measured, clock: str) -> Iterable[tuple[Row, float]]:
    """Each unmerged row that was timed, with its overhead."""
    for row in measured.rows:
        over = None if row.merged or untimed(row, clock) else overhead(row, yardstick(measured), clock)
        if over:
            yield row, over.median
