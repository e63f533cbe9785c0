"""Checks the small model that ships with the package, then breaks its merge in two ways and checks each."""

from __future__ import annotations

import re
import shutil
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_check.commands import _output as output
from lora_check.errors import NotFoundError
from lora_check.report import Report
from lora_check.types import Command, Verdict

if TYPE_CHECKING:
    from torch import Tensor

DATA = Path(__file__).parents[1] / "data" / "demo"
FOLDERS = ("base", "adapter", "merged")
WEIGHTS = "model.safetensors"
FACTORS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One merge to check: how it is broken, and what the check has to say; any one of the codes will do."""

    title: str
    verdict: Verdict
    codes: tuple[str, ...] = ()
    spoil: Callable[[Path], None] | None = None


def configure(parser: ArgumentParser) -> None:
    """No arguments."""
    del parser


def run(args: Namespace) -> int:
    """Play the acts in a temporary folder; 0 when each came out as it must."""
    del args
    if not all((DATA / folder).is_dir() for folder in FOLDERS):
        raise NotFoundError(f"the demo model is not at {DATA}", hint="install the package again, with its data")
    surprises = [surprise for act in ACTS if (surprise := _play(act))]
    output.say("".join(f"{surprise}\n" for surprise in surprises))
    return 1 if surprises else 0


def _play(act: Act) -> str:
    """Print the title and the report; what was not as it must be, or nothing."""
    from lora_check.pipeline import check

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(DATA, root, dirs_exist_ok=True)
        if act.spoil:
            act.spoil(root)
        base, adapter, merged = (str(root / name) for name in FOLDERS)
        report = check(base, (adapter,), merged, command="demo")
    text = output.render(report, "text", output.terminal_style())
    output.say(f"== {act.title}\n\n{text}\n")
    return surprise(act, report)


def surprise(act: Act, report: Report) -> str:
    """What a report says that the act does not allow; nothing where it is as it must be."""
    if report.verdict is not act.verdict:
        return f"{act.title}: expected {act.verdict.value}, came out {report.verdict.value}"
    found = {one.code for one in report.findings}
    if act.codes and not found.intersection(act.codes):
        return f"{act.title}: expected {' or '.join(act.codes)}, found {', '.join(sorted(found)) or 'no code'}"
    return ""


# ------------------------------------------------------------------------------- the mistakes, in plain torch


def forget_a_layer(root: Path) -> None:
    """Put every target of the last adapted layer back to the base."""
    base, merged = _tensors(root / "base"), _tensors(root / "merged")
    layers = {name: int(match.group(1)) for name in _targets(root) if (match := re.search(r"\.(\d+)\.", name))}
    last = max(layers.values())
    _save(root, merged | {name: base[name] for name, layer in layers.items() if layer == last})


def forget_to_divide(root: Path) -> None:
    """Merge again with alpha where alpha / r belongs."""
    import json

    from safetensors.torch import load_file

    factors = load_file(root / "adapter" / FACTORS)
    alpha = float(json.loads((root / "adapter" / "adapter_config.json").read_text())["lora_alpha"])
    base, merged = _tensors(root / "base"), _tensors(root / "merged")
    wrong = {
        name: (base[name].float() + alpha * (_factor(factors, name, "B") @ _factor(factors, name, "A"))).to(base[name])
        for name in _targets(root)
    }
    _save(root, merged | wrong)


def _factor(factors: dict[str, Tensor], target: str, letter: str) -> Tensor:
    module = target.removesuffix(".weight")
    return factors[f"base_model.model.{module}.lora_{letter}.weight"].float()


def _targets(root: Path) -> Iterable[str]:
    """The weights that the adapter of the demo has factors for."""
    from safetensors import safe_open

    with safe_open(root / "adapter" / FACTORS, framework="pt") as file:
        names = list(file.keys())
    found = (re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", name) for name in names)
    return [f"{match.group(1)}.weight" for match in found if match]


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    return tensors


def _save(root: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: one.contiguous() for name, one in tensors.items()}, root / "merged" / WEIGHTS, {"format": "pt"})


ACTS = (
    Act(title="the merge that PEFT made", verdict=Verdict.VERIFIED),
    Act(
        title="one layer put back to the base",
        verdict=Verdict.REFUTED,
        codes=("LC502", "LC501", "LC101"),
        spoil=forget_a_layer,
    ),
    Act(
        title="alpha not divided by r",
        verdict=Verdict.REFUTED,
        codes=("LC108",),
        spoil=forget_to_divide,
    ),
)
COMMAND = Command(name="demo", summary="check a small model, whole and broken", configure=configure, run=run)
