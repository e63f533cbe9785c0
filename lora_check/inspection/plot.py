"""The spectra of an adapter as a drawing: what each rank keeps, and how large the updates are, layer by layer."""

from __future__ import annotations

import io
import re
from typing import Any

from lora_check.errors import UsageError
from lora_check.inspection.outcome import Inspection


def drawn(seen: Inspection) -> str:
    """The drawing as SVG, the same bytes for the same inspection.

    raises   UsageError: matplotlib is missing, or there is nothing to draw
    """
    if not any(one.energy for one in seen.families):
        raise UsageError("there is no spectrum to draw", hint="name an adapter whose updates are products of factors")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--plot needs matplotlib", hint="pip install lora_check[bench]") from error
    with mpl.rc_context({"svg.hashsalt": "lora_check", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        kept, sizes = figure.subplots(1, 2)
        _kept(kept, seen)
        _sizes(sizes, seen)
        figure.legend(*kept.get_legend_handles_labels(), loc="outside right upper", frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _kept(axes: Any, seen: Inspection) -> None:
    for one in seen.families:
        if one.energy:
            axes.plot(range(1, len(one.energy) + 1), [100 * share for share in one.energy], marker=".", label=one.name)
    axes.set(xlabel="rank", ylabel="% of |s B A|² kept", title="energy by rank", ylim=(0, 102))


def _sizes(axes: Any, seen: Inspection) -> None:
    """|s B A| / |W| of each module by its layer; without a base, |s B A|."""
    for one in seen.families:
        points = [
            (_layer(name, number), _size(seen, name))
            for number, name in enumerate(seen.spectra)
            if name.rsplit(".", 1)[-1] == one.name and _size(seen, name) is not None
        ]
        axes.plot(*zip(*sorted(points), strict=True) if points else ([], []), marker=".", label=one.name)
    what = "|s B A| / |W|" if seen.alignments else "|s B A|"
    axes.set(xlabel="layer", ylabel=what, title="size of the update")
    axes.set_ylim(bottom=0)


def _size(seen: Inspection, name: str) -> float | None:
    if not seen.alignments:
        return seen.spectra[name].norm
    return seen.alignments[name].relative if name in seen.alignments else None


def _layer(name: str, otherwise: int) -> int:
    """The first number in a module's path."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else otherwise
