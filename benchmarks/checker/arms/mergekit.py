"""Merging again with mergekit, and comparing.

`PYTHON -m benchmarks.checker.arms.mergekit BASE ADAPTER MERGED`, with the interpreter of an environment that has it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.checker.arms import _answers as answers
from benchmarks.checker.nouns import Arm, Case, Settings, python


def main(base: str, adapter: str, merged: str) -> None:
    """Merge with `mergekit-yaml` (passthrough of BASE+ADAPTER) beside the inputs, and compare what it wrote."""
    import torch

    from benchmarks.checker.arms._script import load

    work = Path(tempfile.mkdtemp(dir=Path(base).parent))
    try:
        recipe = {"merge_method": "passthrough", "dtype": "bfloat16", "models": [{"model": f"{base}+{adapter}"}]}
        (work / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        tool = Path(sys.executable).with_name("mergekit-yaml")
        options = ["--no-copy-tokenizer", "--lora-merge-cache", str(work / "cache"), "--quiet"]
        subprocess.run([tool, work / "recipe.yaml", work / "out", *options], check=True, stdout=sys.stderr)  # noqa: S603
        made, found = load(work / "out"), load(Path(merged))
        differing = sum(name not in made or not torch.equal(made[name], actual) for name, actual in found.items())
        answers.tell(differing, len(found))
    finally:
        shutil.rmtree(work)


def command(case: Case, settings: Settings) -> list[str]:
    """This file on three folders, in mergekit's environment."""
    interpreter = settings.mergekit or sys.executable
    folders = case.base, case.adapter, case.merged
    return python("-m", "benchmarks.checker.arms.mergekit", *folders, interpreter=interpreter)


def missing(settings: Settings) -> str:
    """An environment with mergekit."""
    tool = Path(settings.mergekit or sys.executable).with_name("mergekit-yaml")
    return (
        "" if tool.exists() else "mergekit is not installed; --mergekit names the interpreter of an environment with it"
    )


ARM = Arm(
    name="mergekit",
    about="`mergekit-yaml` with a passthrough of `BASE+ADAPTER`, then `torch.equal` with the merged files",
    place=6,
    command=command,
    said=answers.read,
    missing=missing,
)

if __name__ == "__main__":
    main(*sys.argv[1:])
