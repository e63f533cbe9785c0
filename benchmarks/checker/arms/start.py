"""Starting Python and importing torch: what every arm in Python has to pay first."""

from __future__ import annotations

from benchmarks.checker.nouns import Arm, Case, Settings, python


def command(_: Case, __: Settings) -> list[str]:
    """Imports, and nothing read."""
    return python("-c", "import torch, safetensors.torch")


ARM = Arm(
    name="start",
    about="`python -c 'import torch, safetensors.torch'`: what the Python arms begin with",
    place=8,
    command=command,
    judges=False,
)
