"""How the scripts among the arms tell their answer, and how it is read again."""

from __future__ import annotations

import json

from benchmarks.checker.nouns import Run, Said


def tell(differing: int, compared: int) -> None:
    """Print the last line of a script: right if nothing differs, and something was compared."""
    answer = "undecided" if not compared else "wrong" if differing else "right"
    print(json.dumps({"answer": answer, "named": f"{differing} of {compared} differ" if differing else ""}))


def read(run: Run) -> Said:
    """The last line of a script."""
    found = json.loads(run.stdout.strip().rsplit("\n", 1)[-1])
    return Said(answer=found["answer"], named=found["named"])
