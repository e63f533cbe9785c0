"""Who is asked about which mistakes, and what is counted at once: the short ways give what the long ones would."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import test_fault_matrix as matrix
import torch

from lora_check import compare as comparing
from lora_check import naming
from lora_check.compare import compare
from lora_check.exclusion import excluded
from lora_check.findings import Diagnosis
from lora_check.replay import bits, written
from lora_check.rounding import arithmetics
from lora_check.types import Pairing, Step, TensorMeta
from lora_check.work import Refuted

torch.set_num_threads(1)

FITTED, UNEXPLAINED = "LC110", "LC199"


def refuted(count, kind="target"):
    """So many tensors of one group."""
    recipe = matrix.RECIPES["lora-linear" if kind == "target" else "identity"]
    found = []
    for number in range(count):
        meta = TensorMeta(name=f"layers.{number}.weight", shape=(4, 6), dtype="float32")
        steps = (Step(recipe=recipe, adapter=0, factors={"A": "a", "B": "b"}),) if kind == "target" else ()
        pairing = Pairing(merged=meta, base=meta, steps=steps, module=meta.name)
        found.append(Refuted(pairing, comparing.Measure(fits=False, exact=False, arithmetic="fp32-add")))
    return found


@dataclass
class Answers:
    """What is true of each tensor: {code: evidence}; `asked` remembers the questions."""

    truth: dict[str, dict[str, dict[str, object]]]
    asked: list[tuple[str, frozenset[str] | None]]

    def __call__(self, one, known):
        name = one.pairing.merged.name
        self.asked.append((name, None if known is None else frozenset(known)))
        true = self.truth[name]
        if known is not None:
            factors = {evidence.get("factor") for evidence in known.get(FITTED, ())}
            true = {c: e for c, e in true.items() if c in known and (c != FITTED or e["factor"] in factors)}
        if true:
            return Diagnosis(tensor=name, codes=tuple(true), evidence=true)
        return Diagnosis(tensor=name, codes=(UNEXPLAINED,)) if known is None else None

    @property
    def in_full(self):
        return sum(known is None for _, known in self.asked)


def named(truth):
    tensors = refuted(len(truth))
    ask = Answers({one.pairing.merged.name: true for one, true in zip(tensors, truth, strict=True)}, [])
    told = naming.name_all(tensors, lambda several, known: [ask(one, known) for one in several])
    assert [one.tensor for one in told] == [one.pairing.merged.name for one in tensors]
    return told, ask


# ------------------------------------------------------------------------------------------------- who is asked


def test_one_mistake_everywhere_is_asked_about_in_full_once():
    told, ask = named([{"LC108": {"arithmetic": "fp32-add"}}] * 50)
    assert {one.codes for one in told} == {("LC108",)}
    assert ask.in_full == 1
    assert len(ask.asked) == 50


def test_every_mistake_of_a_mixture_is_found_and_each_tensor_gets_all_of_its_own():
    kinds = [{"LC101": {}}, {"LC102": {}, "LC107": {}}, {"LC107": {}}]
    truth = [kinds[number % 3] for number in range(60)]
    told, ask = named(truth)
    assert [set(one.codes) for one in told] == [set(true) for true in truth]
    assert ask.in_full <= 4


def test_a_factor_found_elsewhere_is_tried_and_another_one_is_fitted():
    truth = [{FITTED: {"factor": 1.5 if number % 2 else 0.5, "arithmetic": "fp32-add"}} for number in range(40)]
    told, ask = named(truth)
    assert [one.evidence[FITTED]["factor"] for one in told] == [true[FITTED]["factor"] for true in truth]
    assert ask.in_full == 2


def test_what_is_different_in_every_tensor_is_found_in_every_tensor():
    told, ask = named([{FITTED: {"factor": 1.0 + number, "arithmetic": "fp32-add"}} for number in range(40)])
    assert {one.codes for one in told} == {(FITTED,)}
    assert ask.in_full == 40


def test_what_nothing_explains_says_whether_it_was_asked_in_full():
    told, ask = named([{}] * 100)
    assert {one.codes for one in told} == {(UNEXPLAINED,)}
    assert ask.in_full == naming.IN_VAIN
    assert sum("in_full" in one.evidence.get(UNEXPLAINED, {}) for one in told) == 100 - naming.IN_VAIN


def test_few_unexplained_tensors_are_all_asked_in_full():
    told, ask = named([{}] * naming.IN_VAIN)
    assert ask.in_full == naming.IN_VAIN
    assert all(not one.evidence for one in told)


def test_a_rare_mistake_among_unexplained_tensors_is_found_if_a_choice_falls_on_it():
    truth = [{"LC104": {}} if number % 4 == 0 else {} for number in range(80)]
    told, _ = named(truth)
    assert [one.codes == ("LC104",) for one in told] == [bool(true) for true in truth]


def test_a_bystander_that_nothing_explains_has_no_diagnosis():
    tensors = refuted(3, kind="bystander")
    assert naming.name_all(tensors, lambda several, known: [None for _ in several]) == []


# ------------------------------------------------------------------------------------------ what is counted at once


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["linear", "in-out", "conv", "two-linear", "dora-linear", "bias"])
@pytest.mark.parametrize("size", [0.05, 0.002])
def test_a_count_at_once_is_that_of_the_balls_or_a_little_less(name, storage, size, monkeypatch):
    monkeypatch.setattr(matrix, "SIZE", size)
    layer = replace(matrix.LAYERS[name], shape={"conv": (40, 16, 3, 2), "bias": (4000,)}.get(name, (120, 96)))
    monkeypatch.setitem(matrix.LAYERS, name, layer)
    world = matrix.make(name, storage)
    actual = matrix.Script(scale=lambda scale: 1.3 * scale.value)(world)
    orders = arithmetics(storage, storage)
    at_once = compare(world.case, actual, orders)
    monkeypatch.setattr(comparing, "tally", lambda *_: None)
    by_balls = compare(world.case, actual, orders)
    assert not at_once.fits
    assert not by_balls.fits
    assert 0 < at_once.over_budget <= by_balls.over_budget
    assert at_once.over_budget >= 0.98 * by_balls.over_budget
    for one in ("signal", "overlap", "noise"):
        assert getattr(at_once, one) == pytest.approx(getattr(by_balls, one), rel=1e-4)
    assert at_once.vanished == by_balls.vanished
    assert at_once.worst <= by_balls.worst * (1 + 1e-9)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32", "float64"])
def test_no_honest_order_is_ever_excluded(storage, monkeypatch):
    for size in (3.0, 0.1, 1e-3, 1e-5):
        monkeypatch.setattr(matrix, "SIZE", size)
        for name in matrix.LAYERS:
            case = matrix.make(name, storage).case
            for how in arithmetics(storage, storage):
                rows = slice(0, case.rows)
                assert not excluded(case, bits(written(case, how).rows(rows).total, case, how), rows), (name, how.name)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["linear", "in-out", "conv", "two-linear"])
def test_a_wrong_scale_is_excluded(name, storage):
    world = matrix.make(name, storage)
    actual = matrix.Script(scale=lambda scale: -scale.value)(world)
    assert excluded(world.case, actual, slice(0, world.case.rows))


def test_control_a_bound_of_nothing_excludes_an_honest_order(monkeypatch):
    from lora_check import exclusion

    monkeypatch.setattr(exclusion, "any_path", lambda *_: (0.0, 0.0))
    world = matrix.make("linear", "bfloat16")
    assert excluded(world.case, matrix.Script()(world), slice(0, world.case.rows))
