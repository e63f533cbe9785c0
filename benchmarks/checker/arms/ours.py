"""lora_check with one worker."""

from __future__ import annotations

from benchmarks.checker.arms import _ours
from benchmarks.checker.nouns import Arm

ARM = Arm(
    name="ours",
    about="`python -m lora_check report BASE ADAPTER MERGED --jobs 1`",
    place=1,
    command=_ours.one_job,
    codes=_ours.CODES,
    said=_ours.said,
)
