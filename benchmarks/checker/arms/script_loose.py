"""The script that people write, loosened until it accepts both right merges."""

from __future__ import annotations

from benchmarks.checker.arms import _answers as answers
from benchmarks.checker.nouns import Arm, Case, Settings, python

RTOL, ATOL = 1e-5, 1e-2
"""allclose's own rtol; and the least power of ten that covers one step of bfloat16 below 2."""


def command(case: Case, _: Settings) -> list[str]:
    """The script on three folders, and two tolerances."""
    return python("-m", "benchmarks.checker.arms._script", case.base, case.adapter, case.merged, RTOL, ATOL)


ARM = Arm(
    name="script-loose",
    about=f"the same with `atol={ATOL}`, as people loosen it until right merges pass",
    place=4,
    command=command,
    said=answers.read,
    timed=False,
)
