"""A small fixed sample of the confusion matrix: no mistake is taken for another; and the matrix itself can see one."""

from __future__ import annotations

from dataclasses import replace

import confusion
import confusion_worlds as worlds
import pytest

from lora_check import findings

SAMPLE = (
    # every recipe once, each with another mistake
    "LC101/linear/bfloat16/0.001/0",
    "LC102 again/dora-linear/bfloat16/0.01/0",
    "LC102 at once/in-out/float16/0.01/1",
    "LC103/mlp/bfloat16/0.01/0",
    "LC104/embedding/bfloat16/0.01/0",
    "LC105/conv/float16/0.1/0",
    "LC106/dora-in-out/bfloat16/0.01/0",
    "LC107/rslora/bfloat16/0.001/0",
    "LC108/experts/bfloat16/0.01/0",
    "LC109 both/patterns/bfloat16/0.01/0",
    "LC110 x 1.3/mlp/bfloat16/0.1/0",
    "LC111/loha/bfloat16/0.01/0",
    "LC112/two/bfloat16/0.01/0",
    "LC113/linear/bfloat16/0.01/0",
    "LC114/bias/bfloat16/0.01/0",
    "LC120 through bf16/saved/float32/0.01/0",
    "LC403/saved/bfloat16/0.001/0",
)
COINCIDING = ("LC109 both/linear/bfloat16/0.01/0",)  # rank 12 where the pattern is ignored for 6: twice the scale


def cell(line: str) -> confusion.Cell:
    """The cell that a line of the matrix names."""
    mistake, world, dtype, size, seed = line.rsplit("/", 4)
    return confusion.Cell(mistake, world, dtype, float(size), int(seed))


def words(lines: tuple[str, ...]) -> dict[str, str]:
    return {str(one.cell): f"{one.word} {one.told}".split()[0] for one in confusion.run(map(cell, lines))}


def test_every_mistake_of_the_sample_is_named() -> None:
    assert words(SAMPLE) == dict.fromkeys(map(str, map(cell, SAMPLE)), "named")


def test_mistakes_that_write_the_same_bits_are_listed() -> None:
    assert words(COINCIDING) == dict.fromkeys(map(str, map(cell, COINCIDING)), "listed")


def test_the_right_merge_of_every_model_is_not_refuted(tmp_path) -> None:
    for index, name in enumerate(worlds.WORLDS):
        model = worlds.make(name, ("bfloat16", "float16", "float32")[index % 3], 1e-2, seed=1)
        base, adapters = model.save(tmp_path / name)
        merged = {one.name: worlds.merge(one) for one in model.targets} | dict(model.bystanders)
        report = confusion.lora_check.check(base, adapters, merged, jobs=1, weights=model.weights)
        assert report.exit_code == 0, (name, report.findings)


def test_every_line_of_the_matrix_names_a_case_of_its_own() -> None:
    lines = [str(one) for one in confusion.cells(most=2)]
    assert len(set(lines)) == len(lines)
    assert {confusion.MISTAKES[cell(line).mistake].code for line in lines} == {
        one.code for one in confusion.MISTAKES.values()
    }


# -------------------------------------------------------------------------------------------- can these tests fail?


@pytest.fixture
def lying(monkeypatch):
    """(code, forward model) -> from now on the fault of that code claims what another one writes."""

    def register(code: str, of: str) -> None:
        known = dict(findings.faults())
        lie = replace(known[code], inject=known[of].inject, tell=None)
        kept = {one: fault for one, fault in known.items() if one != of}
        monkeypatch.setattr("lora_check.diagnose.faults", lambda: kept | {code: lie})

    return register


def test_control_a_fault_that_claims_the_bits_of_another_mistake_is_seen_as_a_misnaming(lying) -> None:
    line = "LC103/mlp/bfloat16/0.01/0"
    lying("LC108", of="LC103")
    assert set(words((line,)).values()) == {"MISNAMED"}


def test_control_a_mistake_that_nobody_knows_is_unexplained(monkeypatch) -> None:
    known = {code: fault for code, fault in findings.faults().items() if code not in ("LC103", "LC110", "LC113")}
    monkeypatch.setattr("lora_check.diagnose.faults", lambda: known)
    assert set(words(("LC103/mlp/bfloat16/0.01/0",)).values()) == {"unexplained"}


def test_control_a_check_that_breaks_off_is_told(monkeypatch) -> None:
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("lora_check.check", broken)
    assert set(words(("LC103/mlp/bfloat16/0.01/0",)).values()) == {"BROKEN"}
