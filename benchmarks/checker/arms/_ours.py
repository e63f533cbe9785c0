"""`python -m lora_check report`, and its JSON."""

from __future__ import annotations

import json

from benchmarks.checker.nouns import Case, Run, Said, Settings, python

CODES = (0, 1, 3)
"""Verified, refuted, inconclusive."""
ANSWERS = {"verified": "right", "refuted": "wrong", "inconclusive": "undecided"}


def command(case: Case, jobs: int) -> list[str]:
    """The command line that a user types, with the machine's report in place of the text."""
    return python(
        "-m", "lora_check", "report", case.base, case.adapter, case.merged, "--jobs", jobs, "--format", "json"
    )


def one_job(case: Case, _: Settings) -> list[str]:
    """With one worker."""
    return command(case, 1)


def two_jobs(case: Case, _: Settings) -> list[str]:
    """With two."""
    return command(case, 2)


def said(run: Run) -> Said:
    """The verdict, and the codes of what was found wrong."""
    report = json.loads(run.stdout)
    named = [
        f"{one['code']} {one['name']} ({one['count']})" for one in report["findings"] if one["severity"] == "error"
    ]
    return Said(answer=ANSWERS[report["verdict"]], named=", ".join(named))
