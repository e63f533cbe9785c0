"""Print docs/tuners.md: every tuner, layer, dtype and safe_merge against live PEFT, as seen in this run.

PYTHONPATH=. python tests/tuner_table.py > docs/tuners.md
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import tuner_worlds
from tabulate import tabulate

import lora_check
from lora_check.types import Verdict

REGIMES = [(dtype, safe) for dtype in ("fp32", "bf16") for safe in (False, True)]
HEAD = """# Tuners

Each row is one way of using a tuner: PEFT {peft} (transformers {transformers}, torch {torch}, on a CPU) trained it by
hand, saved it, loaded it afresh, merged it and saved the merge; lora_check compared that with what it expects.

- **exact**: every target bit for bit
- **budget**: every target within its derived budget, and not all of them bit for bit; the page of the recipe says why
- **named**: not decided, with the reason below

Made by `PYTHONPATH=. python tests/tuner_table.py`.
"""


def cell(report: lora_check.Report) -> str:
    """What one case came to."""
    targets = [one for one in report.comparisons if one.kind != "bystander"]
    if report.verdict is Verdict.VERIFIED:
        return "exact" if all(one.exact for one in targets) else "budget"
    return "named" if report.verdict is Verdict.INCONCLUSIVE else "REFUTED"


def rows(root: Path, reasons: dict[str, str]) -> Iterator[list[str]]:
    for name in tuner_worlds.names():
        cells, recipe = [], tuner_worlds.RECIPES[name]
        for dtype, safe in REGIMES:
            world = tuner_worlds.build(name, root, dtype, safe)
            report = lora_check.check(world.base_dir, list(world.adapter_dirs), world.merged[dtype, safe], jobs=1)
            cells.append(cell(report))
            for one in report.findings if cells[-1] in ("named", "REFUTED") else ():
                reasons.setdefault(f"{recipe.tuner} {name}", f"{one.code} {one.message}")
        yield [recipe.tuner, name, " ".join(recipe.layers), *cells]


def main() -> None:
    torch.set_num_threads(1)
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        table = sorted(rows(Path(folder), reasons))
    headers = ["tuner", "world", "layers", *(f"{dtype} {'safe' if safe else 'plain'}" for dtype, safe in REGIMES)]
    count = Counter(one for row in table for one in row[3:])
    print(HEAD.format(**{name: version(name) for name in ("peft", "transformers", "torch")}))
    print(", ".join(f"{count[word]} {word}" for word in sorted(count)), f"of {sum(count.values())} cases.\n")
    print(tabulate(table, headers, tablefmt="github"))
    if reasons:
        print("\n## Named\n")
        print("\n".join(f"- {name}: {reason}" for name, reason in sorted(reasons.items())))
    sys.exit(1 if count["REFUTED"] else 0)


if __name__ == "__main__":
    main()
