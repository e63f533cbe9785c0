"""Other checkpoints in the place of BASE or of an adapter: which of them does MERGED verify against?

A candidate is checked as an input is, by the same line. What cannot be read or does not verify never counts as a fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_check.errors import LoraCheckError
from lora_check.findings import faults
from lora_check.remote.place import shown_as
from lora_check.report import Report
from lora_check.types import Finding, Verdict

BASE_FITS, ADAPTER_FITS = "LC406", "LC407"
Check = Callable[[Any, Any], Report]
"""(base, adapters) -> the report with these in place of the inputs."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one candidate: the report it led to, or why there is none."""

    location: str
    report: Report | None = None
    error: str = ""

    @property
    def fits(self) -> bool:
        return self.report is not None and self.report.verdict is Verdict.VERIFIED

    @property
    def says(self) -> str:
        """'LOCATION fits: verified, 272 of 272 tensors', 'LOCATION: refuted, 160 of 272 tensors verified', or why."""
        if self.report is None:
            return f"{self.location} cannot be tried: {self.error}"
        verified, tensors = self.report.count(Verdict.VERIFIED), len(self.report.comparisons)
        if self.fits:
            return f"{self.location} fits: verified, {verified} of {tensors} tensors"
        return f"{self.location}: {self.report.verdict.value}, {verified} of {tensors} tensors verified"

    @property
    def evidence(self) -> dict[str, Any]:
        if self.report is None:
            return {"location": self.location, "fits": False, "error": self.error}
        return {
            "location": self.location,
            "fits": self.fits,
            "verdict": self.report.verdict.value,
            "verified": self.report.count(Verdict.VERIFIED),
            "tensors": len(self.report.comparisons),
        }


def tried(check: Check, base: Any, adapters: Any, bases: Any, others: Any) -> tuple[Finding, ...]:
    """One finding for the candidates of BASE and one for those of ADAPTER(S), where there are any."""
    given = _several(adapters)
    in_base = [_trial(_name(one), check, one, adapters) for one in _several(bases)]
    in_adapters = [trial for one in _several(others) for trial in _in_turn(check, base, given, one)]
    return tuple(
        _finding(code, trials) for code, trials in ((BASE_FITS, in_base), (ADAPTER_FITS, in_adapters)) if trials
    )


def _in_turn(check: Check, base: Any, given: Sequence[Any], candidate: Any) -> Iterator[Trial]:
    """The candidate in the place of each adapter, the others left as they are; no further than to the first fit."""
    for index, replaced in enumerate(given):
        changed = [*given[:index], candidate, *given[index + 1 :]]
        beside = f" in the place of {_name(replaced)}" if len(given) > 1 else ""
        trial = _trial(f"{_name(candidate)}{beside}", check, base, changed)
        yield trial
        if trial.fits:
            return


def _trial(location: str, check: Check, base: Any, adapters: Any) -> Trial:
    try:
        return Trial(location, report=check(base, adapters))
    except LoraCheckError as error:
        return Trial(location, error=error.message)


def _finding(code: str, trials: Sequence[Trial]) -> Finding:
    fault, fits = faults()[code], [one for one in trials if one.fits]
    told = "; ".join(one.says for one in fits or trials)
    return Finding(
        code=code,
        name=fault.name,
        severity=fault.severity,
        message=told if fits else f"no candidate fits: {told}",
        help=fault.help if fits else "look for another one, and read the findings above",
        evidence={"candidates": [one.evidence for one in trials]},
    )


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _name(given: Any) -> str:
    located = isinstance(given, (str, os.PathLike))
    return shown_as(os.fspath(given)) if located else f"a {type(given).__name__} in memory"
