"""The worked examples of LoRA: the numbers that notes on it print, and the page that is made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fixtures.account import examples as ex
from fixtures.account.page import page, verdict
from lora_check import Verdict

ROOT = Path(__file__).parents[1]

DELTA = """0.41 0.44 0.47 0.50; 0.93 1.00 1.07 1.14; 1.45 1.56 1.67 1.78; 1.97 2.12 2.27 2.42; 2.49 2.68 2.87 3.06"""
MERGED = """1.41 2.44 3.47 4.50; 5.93 7.00 8.07 9.14; 10.45 11.56 12.67 13.78; 14.97 16.12 17.27 18.42;
19.49 20.68 21.87 23.06"""
REBUILT = """0.93 -0.01 0 2.03 0; 0.02 2 0 0.99 0; 0 0 3 0 0; 2.05 1.01 0 4.98 0; 0.95 1.99 0 3.02 0"""
LEFT = """-0.30 0 0.34; -0.22 0 -0.76; 0 -1 0; -0.77 0 0.36; -0.52 0 -0.42"""
RIGHT = """-0.34 -0.32 0 -0.89 0; 0 0 -1 0 0; 0.30 -0.93 0 0.22 0"""
"""Of the first three directions; where the numbers are printed, the two first ones are without their minus signs, and
then the product is not the matrix."""


def matrix(text: str) -> np.ndarray:
    return np.array([[float(number) for number in row.split()] for row in text.split(";")])


def printed(numbers: np.ndarray, digits: int = 2) -> np.ndarray:
    return np.round(numbers, digits) + 0.0


def test_the_worked_merge() -> None:
    change = ex.delta(ex.B, ex.A)
    assert np.array_equal(printed(change), matrix(DELTA))
    assert np.array_equal(printed(ex.BASE + change), matrix(MERGED))
    assert not np.array_equal(printed(ex.delta(ex.B, ex.A, 1.01)), matrix(DELTA))


@pytest.mark.parametrize("s", [1.0, 0.5, 3.0])
def test_the_worked_merge_is_judged(s: float) -> None:
    merged = ex.BASE + s * matrix(DELTA)
    assert verdict(ex.BASE, ex.B, ex.A, merged, "bfloat16", s).verdict is Verdict.VERIFIED
    wrong = verdict(ex.BASE, ex.B, ex.A, ex.BASE + 2 * s * matrix(DELTA), "bfloat16", s)
    assert wrong.verdict is Verdict.REFUTED
    assert verdict(ex.BASE, ex.B, ex.A, ex.BASE, "bfloat16", s).verdict is Verdict.REFUTED


def test_the_numbers_that_are_trained() -> None:
    assert (ex.factors(5, 4, 2), ex.BASE.size) == (18, 20)
    assert (ex.factors(512, 512, 8), 512 * 512) == (8192, 262_144)
    assert ex.factors(512, 512, round(ex.break_even(512, 512))) == 512 * 512


def test_a_factor_of_zeros_changes_nothing_and_only_one_may_be_zero() -> None:
    zero_b, zero_a, x, target = np.zeros_like(ex.B), np.zeros_like(ex.A), np.eye(4), np.zeros((5, 4))
    assert not ex.delta(zero_b, ex.A).any()
    assert not ex.delta(ex.B, zero_a).any()
    found = verdict(ex.BASE, zero_b, ex.A, ex.BASE, "float32")
    assert (found.verdict, [one.code for one in found.findings]) == (Verdict.INCONCLUSIVE, ["LC004"])
    moves = [ex.first_step(b, a, x, target) for b, a in ((zero_b, ex.A), (ex.B, zero_a), (zero_b, zero_a))]
    assert [(b > 0, a > 0) for b, a in moves] == [(True, False), (False, True), (False, False)]


def test_the_gradients_are_those_that_torch_finds() -> None:
    import torch

    b, a = (torch.tensor(one, requires_grad=True) for one in (ex.B, ex.A))
    loss = ((torch.tensor(ex.BASE) + b @ a) @ torch.eye(4).double()).square().sum() / 2
    loss.backward()
    assert ex.first_step(ex.B, ex.A, np.eye(4), np.zeros((5, 4))) == pytest.approx(
        (b.grad.norm().item(), a.grad.norm().item())
    )


def test_the_worked_decomposition() -> None:
    u, values, v = np.linalg.svd(ex.LOW)
    assert list(printed(values)) == [7.03, 3.0, 2.15, 0.11, 0.0]
    assert np.linalg.matrix_rank(ex.LOW) == 4
    assert np.array_equal(ex.LOW[4], ex.LOW[0] + ex.LOW[1])
    signs = np.sign((u[:, :3] * matrix(LEFT)).sum(0))
    assert np.array_equal(printed(u[:, :3] * signs), matrix(LEFT))
    assert np.array_equal(printed(v[:3] * signs[:, None]), matrix(RIGHT))
    assert np.allclose(matrix(LEFT) * [7.03, 3, 2.15] @ matrix(RIGHT), ex.LOW, atol=0.1)


def test_the_worked_decomposition_rebuilt_from_its_three_largest_values() -> None:
    rebuilt = ex.truncated(ex.LOW, 3)
    assert np.array_equal(printed(rebuilt), matrix(REBUILT))
    assert np.linalg.matrix_rank(rebuilt) == 3
    values = [7.03, 3, 2.15, 0.11]
    kept = sum(value**2 for value in values[:3]) / sum(value**2 for value in values)
    assert ex.energy(ex.LOW, 3) == pytest.approx(kept, abs=2e-5)
    assert ex.energy(ex.LOW, 2) < kept - 0.05
    assert np.linalg.norm(ex.LOW - rebuilt, 2) == pytest.approx(0.1146, abs=1e-4)


def test_the_page_is_the_one_that_is_printed() -> None:
    assert (ROOT / "docs" / "lora.md").read_text() == page(), "python -m fixtures.account > docs/lora.md"
