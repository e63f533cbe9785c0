"""The script that people write, with allclose as it comes."""

from __future__ import annotations

from benchmarks.checker.arms import _answers as answers
from benchmarks.checker.nouns import Arm, Case, Settings, python


def command(case: Case, _: Settings) -> list[str]:
    """The script on three folders."""
    return python("-m", "benchmarks.checker.arms._script", case.base, case.adapter, case.merged)


ARM = Arm(
    name="script",
    about="`load_file` of both, `W + (alpha/r) * B @ A` in fp32, stored, `torch.allclose` with its default tolerances; "
    "`torch.equal` for all other tensors",
    place=3,
    command=command,
    said=answers.read,
)
