"""Every known cause has a code and a case that shows it, and docs/diagnosis.md is what the code says today."""

from __future__ import annotations

from pathlib import Path

import diagnosis_table as table
import pytest

from lora_check import registry

PAGE = Path(__file__).parents[1] / "docs" / "diagnosis.md"


@pytest.mark.parametrize("cause", table.CAUSES)
def test_a_cause_has_a_code_and_a_case(cause):
    assert table.codes_of(cause)
    assert table.cases_of(cause)


def test_no_fault_claims_a_cause_that_is_not_listed():
    claimed = {cause for fault in registry.load("faults").values() for cause in fault.causes}
    assert claimed == set(table.CAUSES)


def test_the_page_is_up_to_date(capsys):
    table.main()
    assert PAGE.read_text() == capsys.readouterr().out
