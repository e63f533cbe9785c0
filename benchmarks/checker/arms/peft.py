"""Merging again with PEFT, and comparing.

`python -m benchmarks.checker.arms.peft BASE ADAPTER MERGED`
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.checker.arms import _answers as answers
from benchmarks.checker.nouns import Arm, Case, Settings, python


def main(base: str, adapter: str, merged: str) -> None:
    """Load the model, merge, and compare its state dict with the merged files."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from benchmarks.checker.arms._script import load

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    made = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    found = load(Path(merged))
    differing = sum(name not in made or not torch.equal(made[name], actual) for name, actual in found.items())
    answers.tell(differing, len(found))


def command(case: Case, _: Settings) -> list[str]:
    """This file on three folders."""
    return python("-m", "benchmarks.checker.arms.peft", case.base, case.adapter, case.merged)


def missing(_: Settings) -> str:
    """PEFT and transformers."""
    lacking = [name for name in ("peft", "transformers") if find_spec(name) is None]
    return f"{' and '.join(lacking)} not installed" if lacking else ""


ARM = Arm(
    name="peft",
    about="`from_pretrained`, `merge_and_unload`, then `torch.equal` with the merged files",
    place=5,
    command=command,
    said=answers.read,
    missing=missing,
)

if __name__ == "__main__":
    main(*sys.argv[1:])
