"""Every arm several times, in an order that turns, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.checker.measure import cool, measured, warm
from benchmarks.checker.nouns import BROKEN, HONEST, Arm, Case, Run, Said, Settings

Tell = Callable[[str], None]
KEPT = ("wall", "user", "system", "private", "from_disk")


def rotated(
    case: Case, arms: Sequence[Arm], settings: Settings, *, repeats: int, cold: bool, tell: Tell
) -> list[dict[str, Any]]:
    """Rows of the results: an arm, its runs, or the reason why there are none."""
    rows = {arm.name: {"arm": arm.name, "runs": [], "reason": arm.missing(settings)} for arm in arms}
    for turn in range(repeats):
        start = turn * max(1, len(arms) // repeats) % max(1, len(arms))
        for arm in [*arms[start:], *arms[:start]]:
            if not rows[arm.name]["reason"]:
                once(case, arm, settings, rows[arm.name], cold=cold, tell=tell)
    return list(rows.values())


def once(case: Case, arm: Arm, settings: Settings, row: dict[str, Any], *, cold: bool, tell: Tell) -> None:
    """One run more in a row; an arm that fails once is not tried again."""
    (cool if cold else warm)(case.weights)
    run = measured(arm.command(case, settings), settings, arm.codes)
    said, row["reason"] = answer(arm, run)
    if not row["reason"]:
        row["runs"].append({name: asdict(run)[name] for name in KEPT} | asdict(said))
    tell(f"{arm.name:12} {row['reason'] or f'{run.cpu:8.2f} s CPU  {said.answer}'}")


def answer(arm: Arm, run: Run) -> tuple[Said, str]:
    """What an arm said, and why it said nothing."""
    if run.failed:
        return Said(answer="none"), run.failed
    try:
        return arm.said(run), ""
    except (ValueError, KeyError, IndexError) as error:
        return Said(answer="none"), f"its answer cannot be read: {error!r}"


def controls(case: Case, arms: Sequence[Arm], settings: Settings, tell: Tell) -> list[dict[str, Any]]:
    """What each arm that judges says of the right merges and of the broken ones."""
    rows = []
    for arm in arms:
        if not arm.judges or arm.missing(settings):
            continue
        row: dict[str, Any] = {"arm": arm.name}
        for variant in (*HONEST, *BROKEN):
            found = Case(folder=case.folder, merged=case.merged if variant == "right" else case.folder / variant)
            said, reason = answer(arm, measured(arm.command(found, settings), settings, arm.codes))
            row[variant] = asdict(said) | {"reason": reason}
            tell(f"{arm.name:12} {variant:8} {reason or f'{said.answer}  {said.named}'}")
        rows.append(row)
    return rows
