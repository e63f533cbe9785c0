"""CPU seconds and private memory over the size of the model, as an SVG that is the same for the same figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.checker import arms as folder
from benchmarks.checker.page import FLOOR, cpu_of, median, private_of

Row = Mapping[str, Any]

SALT = "lora_check"


def draw(results: Row, file: Path) -> None:
    """Two panels with logarithmic axes, a line for each arm that was measured."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": SALT, "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name in folder.load():
        line(left, results, name, cpu_of)
        if name != FLOOR:
            line(right, results, name, lambda run: private_of(run) / 1e9)
    for axes, title in ((left, "CPU seconds"), (right, "private memory, GB")):
        axes.set(xscale="log", yscale="log", xlabel="merged checkpoint, GB", title=title)
        axes.grid(visible=True, which="major", alpha=0.3)
    if handles := left.get_legend_handles_labels()[0]:
        figure.legend(handles=handles, loc="outside right center", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def line(axes: Any, results: Row, name: str, figure: Callable[[Row], float]) -> None:
    """One arm over all sizes where it has runs."""
    points = [
        (size["merged_bytes"] / 1e9, median(row, figure))
        for size in results["sizes"]
        for row in size["hot"]
        if row["arm"] == name and row["runs"]
    ]
    seen = [point for point in points if point[1] > 0]
    if seen:
        width = 2.5 if name.startswith("ours") else 1.2
        axes.plot(*zip(*seen, strict=True), marker="o", markersize=4, linewidth=width, label=name)
