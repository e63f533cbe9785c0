"""Plots of a run, as SVG that is the same for the same figures: overhead over tokens, over rank, and the roofline.

Nothing lies behind the axes, and every colour stands out by 3 to 1 from a white page and from a black one; each backend
has a marker of its own besides, so that no colour has to be told from another.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.latency import floors, traffic
from benchmarks.latency.figures import overhead, summary
from benchmarks.latency.nouns import Ceilings, Cell, Measured, Results, Row
from benchmarks.latency.table import column, heading, untimed, yardstick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SALT = "lora_check"
INK = "#7a7a7a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c0669a", "#b07d00")
"""Okabe and Ito's, the last two darkened until they can be seen on white."""
STYLES = ("-", "--")
MARKERS = "osD^vP*X<>hd"
ACROSS = 3
"""Panels in a row."""
ENTRY = 2.1
"""Inches of the widest entry of a legend."""
TITLE = 44
"""Characters of a panel's title in one line."""
ABOVE = 1.3
"""Of the largest overhead: where the axis ends."""
LINEAR = 1.0
"""Percent up to which the axis of overheads is linear, through zero and below; beyond it is logarithmic."""

Point = tuple[float, float, float, float]
"""x, median, p20, p80; overheads in percent."""
Looks = Mapping[str, Mapping[str, Any]]


def draw(results: Results, clock: str, folder: Path, name: str) -> dict[str, Path]:
    """Write every plot that the results have points for: what it shows -> its file."""
    made = {
        "tokens": over_tokens(results, clock),
        "rank": over_rank(results, clock),
        "roofline": roofline(results, clock),
    }
    files = {kind: folder / f"{name}-{kind}.svg" for kind, figure in made.items() if figure is not None}
    for kind, file in files.items():
        save(made[kind], file)
    return files


def save(figure: Any, file: Path) -> None:
    """Write a figure without a date, its ids from its content alone, its words as words."""
    import matplotlib as mpl

    file.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": SALT, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


# ------------------------------------------------------------------------------------------------------ the plots


def over_tokens(results: Results, clock: str) -> Figure | None:
    """A panel for each shape, rank and kind: overhead over tokens with its p20-p80, and the least that it can be."""
    several = grouped(results, lambda cell: replace(cell, batch=1, length=1), clock)
    return panels(several, clock, results.ceilings, lambda one: one.cell.tokens, "tokens", heading)


def over_rank(results: Results, clock: str) -> Figure | None:
    """A panel for each shape and number of tokens: overhead over rank. Flat where activations cost, not factors."""
    several = grouped(results, lambda cell: replace(cell, rank=1), clock)
    return panels(several, clock, results.ceilings, lambda one: one.cell.rank, "rank", without_rank)


def roofline(results: Results, clock: str) -> Figure | None:
    """FLOP/s by FLOP/byte, of the work that no forward can go without; cold cells of single modules."""
    cells = [one for one in results if one.cell.cache == "cold" and one.cell.workload == "linear"]
    looks = looks_of(cells, clock, merged=True)
    if not looks:
        return None
    figure = blank(1, 1)
    axes = figure.add_subplot()
    dtypes = dict.fromkeys(one.cell.dtype for one in cells)
    points = {name: [achieved(one, name, clock, results.ceilings) for one in cells] for name in looks}
    for name, look in looks.items():
        found = [point for point in points[name] if point]
        axes.plot(*zip(*found, strict=True), **{**look, "linestyle": "", "markersize": 4})
    reach = sorted(point[0] for several in points.values() for point in several if point)
    for dtype in dtypes:
        ceiling(axes, results.ceilings, dtype, (reach[0] / 2, reach[-1] * 2))
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte of weights", ylabel=f"FLOP/s by {clock}")
    finish(figure, [axes])
    return figure


def panels(
    several: Sequence[Sequence[Measured]],
    clock: str,
    ceilings: Ceilings,
    place: Callable[[Measured], float],
    across: str,
    title: Callable[[Cell], str],
) -> Figure | None:
    """One panel for each sequence of cells, all with the same looks and the same axes of overheads."""
    looks = looks_of([one for cells in several for one in cells], clock)
    if not looks:
        return None
    rows = -(-len(several) // ACROSS)
    figure = blank(min(ACROSS, len(several)), rows)
    shown: list[Axes] = []
    for at, cells in enumerate(several):
        axes = figure.add_subplot(rows, min(ACROSS, len(several)), at + 1, sharey=shown[0] if shown else None)
        shown.append(axes)
        lines(axes, cells, clock, place, looks)
        least = [
            (place(one), 100 * floors.least_overhead(traffic.of(one.cell, one.modules), ceilings)) for one in cells
        ]
        axes.plot(*zip(*least, strict=True), color=INK, linestyle=":", linewidth=1.5, label="least possible")
        axes.set(xscale="log", xlabel=across)
        axes.set_title(textwrap.fill(title(cells[0].cell), TITLE), fontsize=7)
        axes.set_xticks([place(one) for one in cells], [f"{place(one):g}" for one in cells])
        axes.minorticks_off()
        axes.set_yscale("symlog", linthresh=LINEAR)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if at % ACROSS == 0:
            axes.set_ylabel(f"% over merged\nby {clock}")
    lowest, highest = min(axes.dataLim.y0 for axes in shown), max(axes.dataLim.y1 for axes in shown)
    shown[0].set_ylim(min(0.0, lowest), max(LINEAR, ABOVE * highest))
    finish(figure, shown)
    return figure


def lines(axes: Axes, cells: Sequence[Measured], clock: str, place: Callable[[Measured], float], looks: Looks) -> None:
    """Every backend of some cells: its medians as a line, p20-p80 as a band."""
    for name, look in looks.items():
        found = series(cells, name, clock, place)
        if not found:
            continue
        x, middle, low, high = zip(*found, strict=True)
        axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        axes.plot(x, middle, **look)


def ceiling(axes: Axes, ceilings: Ceilings, dtype: str, reach: tuple[float, float]) -> None:
    """Both ceilings of a dtype, as they were measured in the same run: min(FLOP/byte x bytes/s, FLOP/s)."""
    top, slope = floors.rate(dtype, ceilings), floors.bandwidth(ceilings)
    x = sorted({reach[0], min(max(top / slope, reach[0]), reach[1]), reach[1]})
    told = f"{top / 1e12:.3g} TFLOP/s {dtype}, {slope / 1e12:.3g} TB/s"
    axes.plot(x, [min(top, slope * one) for one in x], color=INK, linestyle=":", linewidth=1.5, label=told)


# ------------------------------------------------------------------------------------------------------ the points


def grouped(results: Results, alike: Callable[[Cell], Cell], clock: str) -> list[list[Measured]]:
    """Cells that are alike but for what the axis shows, where there are at least two that were timed."""
    found: dict[Cell, list[Measured]] = {}
    for one in results:
        if timed(one, clock):
            found.setdefault(alike(one.cell), []).append(one)
    ordered = (sorted(cells, key=lambda one: (one.cell.tokens, one.cell.rank)) for cells in found.values())
    return [cells for cells in ordered if len(cells) > 1]


def timed(measured: Measured, clock: str, *, merged: bool = False) -> list[str]:
    """Backends that have a time in a cell beside merged, which has one too."""
    base = yardstick(measured)
    if base is None or untimed(base, clock):
        return []
    rows = [row for row in measured.rows if not row.again and (merged or not row.merged)]
    return [row.backend for row in rows if not untimed(row, clock)]


def series(cells: Iterable[Measured], name: str, clock: str, place: Callable[[Measured], float]) -> list[Point]:
    """The overheads of a backend, in percent."""
    found = []
    for one in cells:
        row = row_of(one, name)
        over = overhead(row, yardstick(one), clock) if row and not untimed(row, clock) else None
        if over:
            found.append((place(one), 100 * over.median, 100 * over.p20, 100 * over.p80))
    return found


def achieved(measured: Measured, name: str, clock: str, ceilings: Ceilings) -> tuple[float, float] | None:
    """(FLOP / byte, FLOP / s) of a backend in a cell; None where it has no time."""
    row = row_of(measured, name)
    if row is None or untimed(row, clock):
        return None
    work = floors.needed(traffic.of(measured.cell, measured.modules, row.adapter), adapted=not row.merged)
    return work.flops / work.weights, work.flops / summary(row.clocks[clock]).median


def row_of(measured: Measured, name: str) -> Row | None:
    """The row of a backend."""
    return next((row for row in measured.rows if row.backend == name and not row.again), None)


def without_rank(cell: Cell) -> str:
    """The title of a panel over rank."""
    return f"{heading(cell).replace(f', r = {cell.rank}', '')}, T = {column(cell)}"


# -------------------------------------------------------------------------------------------------------- the looks


def looks_of(cells: Iterable[Measured], clock: str, *, merged: bool = False) -> dict[str, dict[str, Any]]:
    """Each backend's colour, line and marker, in the order in which they are met."""
    names = dict.fromkeys(name for one in cells for name in timed(one, clock, merged=merged))
    return {
        name: {
            "color": COLOURS[at % len(COLOURS)],
            "linestyle": STYLES[at // len(COLOURS) % len(STYLES)],
            "marker": MARKERS[at % len(MARKERS)],
            "markersize": 3.5,
            "linewidth": 1.2,
            "label": name,
        }
        for at, name in enumerate(names)
    }


def blank(columns: int, rows: int) -> Figure:
    """An empty figure with room for so many panels; no window, nothing shared with other figures."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.5, 3.3 * columns + 0.5), 2.7 * rows + 0.9), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def finish(figure: Figure, shown: Sequence[Axes]) -> None:
    """Axes in a grey that shows on any page, a light grid, one legend below."""
    named: dict[str, Any] = {}
    for axes in shown:
        for spine in ("top", "right"):
            axes.spines[spine].set_visible(False)
        for spine in ("left", "bottom"):
            axes.spines[spine].set_color(INK)
        axes.tick_params(colors=INK, labelsize=7, which="both")
        axes.grid(visible=True, which="major", alpha=0.25, color=INK, linewidth=0.5)
        axes.set_title(axes.get_title(), fontsize=7, color=INK)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=INK, fontsize=8)
        named |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = int(figure.get_figwidth() // ENTRY)
    figure.legend(
        named.values(),
        named.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )
