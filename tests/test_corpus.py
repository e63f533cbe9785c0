"""The corpus of broken merges: each is made by the tool that breaks it, and both faces of the package name the mistake.

Nothing of the package had a hand in the files: what is said of them is said by somebody who did not make them.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import pytest

import lora_check
from lora_check import registry
from lora_check.__main__ import main

CORPUS = Path(__file__).parents[1] / "fixtures" / "faults"
CASES = sorted(file.parent for file in CORPUS.glob("*/*/expected.json"))
KEYS = {"causes", "verdict", "codes", "says", "arguments"}


def made(case: Path, folder: Path) -> list[str]:
    """Run the case's make.py; the positional arguments of a report on what it made."""
    spec = importlib.util.spec_from_file_location(f"corpus_{case.parent.name}_{case.name}", case / "make.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the tools say of their misuse is not under test
        module.make(folder)
    return [str(folder / "base"), *map(str, sorted(folder.glob("adapter*"))), str(folder / "merged")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_a_broken_merge_is_named_by_both_faces(case, tmp_path, capsys):
    expected = json.loads((case / "expected.json").read_text())
    base, *adapters, merged = made(case, tmp_path)
    options = [word.format(folder=tmp_path) for word in expected.get("arguments", [])]
    capsys.readouterr()
    code = main(["report", base, *adapters, merged, *options, "--json", str(tmp_path / "report.json")])
    text = " ".join(capsys.readouterr().out.split())
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["verdict"] == expected["verdict"]
    assert code == told["exit_code"]
    named = [one["code"] for one in told["findings"] if one["severity"] != "info"]
    assert sorted(named) == sorted(expected["codes"]), text
    for phrase in expected["says"]:
        assert phrase in text
    if not options:
        seen = lora_check.check(base, adapters, merged, jobs=1).as_dict()
        assert [(one["code"], one["message"]) for one in seen["findings"]] == [
            (one["code"], one["message"]) for one in told["findings"]
        ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_a_case_is_well_described(case):
    expected = json.loads((case / "expected.json").read_text())
    faults = registry.load("faults")
    assert expected.keys() <= KEYS
    assert expected["causes"]
    assert expected["says"]
    assert case.parent.name in faults
    assert set(expected["codes"]) <= set(faults)
    assert set(expected["causes"]) <= set(faults[case.parent.name].causes)
    assert (case / "make.py").is_file()
