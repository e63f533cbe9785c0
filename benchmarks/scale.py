"""Print docs/scale.md: what it takes to check models larger than memory, and how to divide the work.

python -m benchmarks.scale > docs/scale.md                from the stored results of `python -m benchmarks.checker`
python -m benchmarks.scale --rate 1.4 > docs/scale.md     from a rate in GB/s of merged bf16 bytes by CPU second
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.checker.results import load

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "checker" / "latest.json"
TEXT = Path(__file__).with_suffix(".md")

BF16_BYTES = 2
WORKERS_A_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint by its size: numbers, and bytes on disk."""

    name: str
    numbers: float
    size: float


MODELS = (
    Model(name="8 B, bf16", numbers=8.03e9, size=16.06e9),
    Model(name="70 B, bf16", numbers=70.55e9, size=141.1e9),
    Model(name="671 B, fp8", numbers=671e9, size=688.6e9),
    Model(name="1 T, bf16", numbers=1e12, size=2e12),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Where checkpoints lie, and the bytes a second that one node reads from there; `shared`: by all nodes at once."""

    name: str
    speed: float
    shared: bool


STORES = (
    Store(name="memory of one node, 100 GB/s", speed=100e9, shared=False),
    Store(name="NVMe of one node, 7 GB/s", speed=7e9, shared=False),
    Store(name="network, 100 Gbit/s a node", speed=12.5e9, shared=True),
    Store(name="object store, 5 GB/s a node", speed=5e9, shared=True),
)
WORKERS = (1, 8, 64)


def seconds(model: Model, store: Store, workers: int, rate: float) -> tuple[float, str]:
    """max(2 S / (B nodes), 2 N / (R workers)) and what binds.

    S   bytes of the merged checkpoint: as many are read of the base      B   bytes that a node reads in a second
    N   numbers of the merged checkpoint, 2 bytes each in bf16            R   merged bf16 bytes by CPU second
    """
    reading = 2 * model.size / (store.speed * nodes(workers))
    computing = BF16_BYTES * model.numbers / (rate * workers)
    return max((reading, "reads"), (computing, "computes"))


def nodes(workers: int) -> int:
    """How many nodes hold so many workers."""
    return -(-workers // WORKERS_A_NODE)


def table(store: Store, rate: float) -> str:
    """Models by workers, from one kind of store; files that lie in one node are read by its workers only."""
    counts = [count for count in WORKERS if store.shared or nodes(count) == 1]
    heads = [store.name, "read", *(told(count) for count in counts)]
    rows = [
        [model.name, amount(2 * model.size), *(cell(*seconds(model, store, count, rate)) for count in counts)]
        for model in MODELS
    ]
    return str(tabulate(rows, heads, tablefmt="github", disable_numparse=True))


def told(workers: int) -> str:
    """'64 workers, 8 nodes'."""
    return f"{workers} worker{'s' * (workers > 1)}, {nodes(workers)} node{'s' * (nodes(workers) > 1)}"


def cell(time: float, bound: str) -> str:
    """'3.3 min, reads'."""
    unit, size = next(one for one in (("h", 3600), ("min", 60), ("s", 1)) if time >= one[1] or one[0] == "s")
    return f"{time / size:.2g} {unit}, {bound}"


def amount(size: float) -> str:
    """'1.4 TB'."""
    return f"{size / 1e12:.2g} TB" if size >= 1e12 else f"{size / 1e9:.0f} GB"


def measured(results: Mapping[str, Any]) -> float:
    """Merged bytes by CPU second beyond starting, of the largest model that was measured."""
    found = [(one["merged_bytes"], one["merged_bytes"] / seen) for one in results["sizes"] if (seen := _cpu(one)) > 0]
    return max(found)[1]


def _cpu(size: Mapping[str, Any]) -> float:
    rows = {row["arm"]: [run["user"] + run["system"] for run in row["runs"]] for row in size["hot"] if row["runs"]}
    if not {"ours", "start"} <= rows.keys():
        return 0.0
    return statistics.median(rows["ours"]) - statistics.median(rows["start"])


def page(rate: float, made: str, source: str) -> str:
    """The whole page."""
    tables = "\n\n".join(table(store, rate) for store in STORES)
    return TEXT.read_text().format(
        tables=tables, rate=f"{rate / 1e9:.2g}", made=made, source=source, a_node=WORKERS_A_NODE
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page; 2 if there is no rate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--rate", type=float, help="merged bf16 bytes by CPU second, in GB/s")
    rate = parser.parse_args(argv).rate
    if rate is not None:
        sys.stdout.write(page(rate * 1e9, f"python -m benchmarks.scale --rate {rate:g}", "was given by hand"))
        return 0
    if not RESULTS.exists():
        print(f"{RESULTS} is not there: run python -m benchmarks.checker first, or give --rate", file=sys.stderr)
        return 2
    source = f"is that of the largest model in `{RESULTS.relative_to(ROOT)}`, beyond the seconds that a start takes"
    sys.stdout.write(page(measured(load(RESULTS)), "python -m benchmarks.scale", source))
    return 0


if __name__ == "__main__":
    sys.exit(main())
