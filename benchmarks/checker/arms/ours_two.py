"""lora_check with two workers."""

from __future__ import annotations

from benchmarks.checker.arms import _ours
from benchmarks.checker.nouns import Arm

ARM = Arm(
    name="ours-2",
    about="the same with `--jobs 2`",
    place=2,
    command=_ours.two_jobs,
    codes=_ours.CODES,
    said=_ours.said,
    judges=False,
)
