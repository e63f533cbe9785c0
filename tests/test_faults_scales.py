"""Wrong scales, wrong weights, several adapters, misapplied magnitudes: each made by a script, and named alone.

Every mistaken tensor is made here, whole, by torch, from what the page of the fault says; no fault makes its own test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lora_check
from lora_check import diagnose, registry
from lora_check.compare import compare
from lora_check.rounding import arithmetics
from lora_check.types import Case, Combination, Comparison, LoadedStep, Options, Plan, Scale, Site, Verdict

RECIPES = registry.load("recipes")
FAULTS = registry.load("faults")
COMBINATIONS: Mapping[str, Combination] = registry.load("combinations")
MINE = {f"LC{n}" for n in (*range(121, 130), 131)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
OUT, IN = 26, 40
SIZE = 0.05


@dataclass(frozen=True)
class Lora:
    """Factors in float32, what their scale is made of, and a magnitude for each output."""

    a: Tensor
    b: Tensor
    alpha: float
    weight: float = 1.0
    m: Tensor | None = None

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def bare(self) -> float:
        return self.alpha / self.r

    @property
    def s(self) -> float:
        return self.weight * self.bare

    @property
    def delta(self) -> Tensor:
        return self.s * (self.b @ self.a)

    @property
    def scale(self) -> Scale:
        return Scale(alpha=self.alpha, rank=self.r, default_alpha=self.alpha, default_rank=self.r, weight=self.weight)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base(storage: str, shape: tuple[int, int] = (OUT, IN)) -> Tensor:
    return (0.02 * numbers(*shape, seed=0)).to(DTYPES[storage])


def lora(w: Tensor, *, r: int = 6, alpha: float = 15.0, seed: int = 1, weight: float = 1.0, dora: bool = False) -> Lora:
    """Factors whose scaled product is a twentieth as long as the weight."""
    a, b = 0.05 * numbers(r, w.shape[1], seed=seed), numbers(w.shape[0], r, seed=seed + 50)
    b = b * (SIZE * w.float().norm() / (weight * alpha / r * b @ a).norm())
    m = w.float().norm(dim=1) * (1 + SIZE * numbers(w.shape[0], seed=seed + 90).abs()) if dora else None
    return Lora(a, b, alpha, weight, m)


def case_of(w: Tensor, *loras: Lora) -> Case:
    steps = [
        LoadedStep(
            recipe=RECIPES["lora-linear" if one.m is None else "dora-linear"],
            factors={"A": one.a, "B": one.b} | ({} if one.m is None else {"m": one.m}),
            scale=one.scale,
            adapter=number,
        )
        for number, one in enumerate(loras)
    ]
    return Case(base=w, steps=tuple(steps), storage=str(w.dtype).removeprefix("torch."))


def summed(w: Tensor, *deltas: Tensor) -> Tensor:
    """Each delta added in float32 and the sum stored, one after the other."""
    for delta in deltas:
        w = (w.float() + delta).to(w.dtype)
    return w


def diagnosed(case: Case, actual: Tensor) -> diagnose.Diagnosis:
    """What a refuted tensor is told to be; it must be refuted first."""
    orders = arithmetics(case.storage, case.storage)
    seen = compare(case, actual, orders)
    assert not seen.fits, "the mistake was not even refuted"
    found = diagnose.name_tensor("some.weight", "target", case, actual, orders, seen)
    assert found is not None
    return found


def is_named(code: str, case: Case, actual: Tensor, **told: Any) -> Mapping[str, Any]:
    """Its evidence: it is named so and not otherwise, and told with at least that."""
    found = diagnosed(case, actual)
    assert found.codes == (code,)
    evidence = found.evidence[code]
    assert {key: evidence.get(key) for key in told} == told
    return evidence


both_dtypes = pytest.mark.parametrize("storage", DTYPES)

# ---------------------------------------------------------------------------------------------- one adapter's scale

SINGLE: dict[str, tuple[str, Callable[[Lora], float], dict[str, Any]]] = {
    "squared": ("LC121", lambda x: x.bare**2, {}),
    "turned-over": ("LC125", lambda x: x.r / x.alpha, {"formula": "r / alpha"}),
    "multiplied": ("LC125", lambda x: x.alpha * x.r, {"formula": "alpha * r"}),
    "without-alpha": ("LC125", lambda x: 1 / x.r, {"formula": "1 / r"}),
    "divided-twice": ("LC125", lambda x: x.alpha / x.r**2, {"formula": "alpha / r^2"}),
    "three-times-at-once": ("LC102", lambda x: 3 * x.s, {"times": 3}),
}


@both_dtypes
@pytest.mark.parametrize("ident", SINGLE)
def test_a_scale_by_a_wrong_formula_is_named(ident, storage):
    code, used, told = SINGLE[ident]
    w = base(storage)
    one = lora(w)
    actual = summed(w, used(one) * (one.b @ one.a))
    is_named(code, case_of(w, one), actual, scale=pytest.approx(used(one)), right=pytest.approx(2.5), **told)


@both_dtypes
@pytest.mark.parametrize("rounds", [3, 4])
def test_more_rounds_than_two_are_counted(rounds, storage):
    w = base(storage)
    one = lora(w)
    is_named("LC102", case_of(w, one), summed(w, *[one.delta] * rounds), times=rounds)
    assert FAULTS["LC102"].tell([{"times": rounds}, {"times": rounds}]) == f"merged {rounds} times"
    assert FAULTS["LC102"].tell([{"times": 2}]) == "merged twice"


WEIGHTED: dict[str, tuple[str, Callable[[Lora], float], dict[str, Any]]] = {
    "on-both-factors": ("LC122", lambda x: x.weight**2 * x.bare, {"power": 2.0}),
    "by-its-root": ("LC122", lambda x: x.weight**0.5 * x.bare, {"power": 0.5}),
    "ignored": ("LC123", lambda x: x.bare, {"weights": [1.0]}),
    "scale-squared-too": ("LC121", lambda x: x.s**2, {}),
    "scale-squared": ("LC121", lambda x: x.weight * x.bare**2, {}),
}


@both_dtypes
@pytest.mark.parametrize("ident", WEIGHTED)
def test_a_weight_that_was_misapplied_is_named(ident, storage):
    code, used, told = WEIGHTED[ident]
    w = base(storage)
    one = lora(w, weight=0.7)
    is_named(code, case_of(w, one), summed(w, used(one) * (one.b @ one.a)), **told)


@both_dtypes
def test_scales_that_are_no_known_formula_are_fitted_and_nobodys(storage):
    w = base(storage)
    one = lora(w, weight=0.7)
    for factor in (one.s**2 * 1.1, 0.7**3, 5.0):
        assert diagnosed(case_of(w, one), summed(w, factor * one.delta)).codes == ("LC110",)


def test_the_fitted_scale_is_told_with_the_right_one():
    w = base("bfloat16")
    one = lora(w)
    fault = FAULTS["LC110"]
    told = fault.fit(case_of(w, one), 0.8).told
    assert told == {"scale": pytest.approx(2.0), "right": pytest.approx(2.5)}

    def fitted(right: float, used: float, width: float = 1e-4) -> dict[str, float]:
        k = used / right
        return {"factor": k, "factor_low": k - width, "factor_high": k + width, "right": right, "scale": used}

    say = fault.tell
    assert say([fitted(5 / 3, 2.0)] * 3) == "scale 2 in place of 1.667, 1.2 times too large"
    assert say([fitted(5 / 3, 2.0), fitted(1.25, 2.0)]) == "scale 2 in place of 1.667 and 1.25"
    assert say([fitted(2.0, 1.6), fitted(1.0, 0.8)]) == "wrong scale, 0.8 times the right one"
    assert say([fitted(2.0, 1.6, 0.0), fitted(1.0, 0.8, 0.0)]) == "wrong scale, 0.8 times the right one"
    assert say([fitted(2.0, 1.6), fitted(1.0, 0.9), fitted(3.0, 9.0)]) == "scales 0.8, 0.9 and 3 times the right ones"
    assert say([{"factor": 1.2, "factor_low": 1.19, "factor_high": 1.21}]) == "wrong scale, 1.2 times too large"


# ------------------------------------------------------------------------------------------------- part of the rank


@pytest.mark.parametrize("own", [False, True], ids=["whole-scale", "own-scale"])
@pytest.mark.parametrize(("r", "part"), [(6, (0, 3)), (6, (3, 6)), (6, (2, 4)), (8, (6, 8))])
def test_a_part_of_the_rank_is_named(r, part, own):
    w = base("bfloat16" if own else "float32")
    one = lora(w, r=r)
    cut = slice(*part)
    scale = one.alpha / (part[1] - part[0]) if own else one.s
    actual = summed(w, scale * (one.b[:, cut] @ one.a[cut]))
    is_named("LC126", case_of(w, one), actual, ranks=f"{part[0]}-{part[1] - 1}", of=r)


@both_dtypes
def test_other_parts_of_the_delta_are_no_part_of_the_rank(storage):
    w = base(storage)
    one = lora(w)
    delta, crossed = one.delta.clone(), one.s * (one.b[:, :3] @ one.a[3:])
    delta[: OUT // 2] = 0
    uneven = one.s * (one.b[:, 1:4] @ one.a[1:4])
    for other in (delta, crossed, uneven):
        assert "LC126" not in diagnosed(case_of(w, one), summed(w, other)).codes


# ------------------------------------------------------------------------------------------------- several adapters


def two(w: Tensor, *, weights: tuple[float, float] = (1.0, 1.0), r: int = 6) -> tuple[Lora, Lora]:
    return lora(w, weight=weights[0], r=r), lora(w, alpha=9.0, seed=2, weight=weights[1], r=r)


@both_dtypes
def test_an_adapter_that_was_left_out_or_merged_twice_is_numbered(storage):
    w = base(storage)
    one, other = two(w)
    third = lora(w, r=4, alpha=7.0, seed=3)
    case = case_of(w, one, other)
    found = diagnosed(case, summed(w, one.delta))
    assert found.codes[0] == "LC127"
    assert found.evidence["LC127"]["missing"] == [2]
    assert FAULTS["LC127"].tell([found.evidence["LC127"]]) == "adapter 2 left out"
    three = diagnosed(case_of(w, one, other, third), summed(w, other.delta))
    assert three.codes[0] == "LC127"
    assert three.evidence["LC127"]["missing"] == [1, 3]
    is_named("LC102", case, summed(w, one.delta, other.delta, other.delta), times=2, adapter=2)
    is_named("LC102", case, summed(w, one.delta, one.delta, other.delta), times=2, adapter=1)
    assert FAULTS["LC102"].tell([{"times": 2, "adapter": 2}] * 2) == "adapter 2 merged twice"
    assert not {"LC102", "LC127"} & set(diagnosed(case, summed(w, one.delta, third.delta)).codes)


EXCHANGED: dict[str, tuple[Callable[[Lora, Lora], tuple[float, float]], str]] = {
    "weights": (lambda x, y: (y.weight * x.bare, x.weight * y.bare), "weights of adapters 1 and 2 exchanged"),
    "scales": (lambda x, y: (x.weight * y.bare, y.weight * x.bare), "scales of adapters 1 and 2 exchanged"),
    "first-scale": (lambda x, y: (x.s, y.weight * x.bare), "scale of adapter 1 used for all"),
    "last-scale": (lambda x, y: (x.weight * y.bare, y.s), "scale of adapter 2 used for all"),
    "last-weight": (lambda x, y: (y.weight * x.bare, y.s), "weight of adapter 2 used for all"),
}


@both_dtypes
@pytest.mark.parametrize("ident", EXCHANGED)
def test_scales_and_weights_of_another_adapter_are_named(ident, storage):
    used, said = EXCHANGED[ident]
    w = base(storage)
    one, other = two(w, weights=(0.7, 0.4))
    scales = used(one, other)
    actual = summed(w, *(s * (x.b @ x.a) for s, x in zip(scales, (one, other), strict=True)))
    evidence = is_named("LC124", case_of(w, one, other), actual)
    assert FAULTS["LC124"].tell([evidence]) == said


@both_dtypes
def test_weights_of_several_that_were_ignored_are_named(storage):
    w = base(storage)
    one, other = two(w, weights=(0.7, 0.4))
    case = case_of(w, one, other)

    def merged(first: float, second: float) -> Tensor:
        return summed(w, first * one.bare * (one.b @ one.a), second * other.bare * (other.b @ other.a))

    is_named("LC123", case, merged(1, 1), weights=[1.0, 1.0])
    is_named("LC123", case, merged(0.5, 0.5), weights=[0.5, 0.5])
    is_named("LC123", case, merged(0.7, 1), adapter=2)
    is_named("LC122", case, merged(0.49, 0.16), power=2.0)
    assert not MINE & set(diagnosed(case, merged(0.7, 0.9)).codes)


def product(x: Lora, y: Lora, a: tuple[float, float], b: tuple[float, float]) -> Tensor:
    """(b1 B1 + b2 B2)(a1 A1 + a2 A2)."""
    return (b[0] * x.b + b[1] * y.b) @ (a[0] * x.a + a[1] * y.a)


CROSSED: dict[str, Callable[[Lora, Lora], Tensor]] = {
    "roots": lambda x, y: product(x, y, (x.s**0.5, y.s**0.5), (x.s**0.5, y.s**0.5)),
    "on-a": lambda x, y: product(x, y, (x.s, y.s), (1, 1)),
    "on-b": lambda x, y: product(x, y, (1, 1), (x.s, y.s)),
    "on-both": lambda x, y: product(x, y, (x.s, y.s), (x.weight, y.weight)),
    "averaged": lambda x, y: product(x, y, (x.bare / 2, y.bare / 2), (0.5, 0.5)),
}


@both_dtypes
@pytest.mark.parametrize("ident", CROSSED)
def test_factors_added_before_they_were_multiplied_are_named(ident, storage):
    w = base(storage)
    one, other = two(w, weights=(0.7, 0.4))
    case = case_of(w, one, other)
    is_named("LC128", case, summed(w, CROSSED[ident](one, other)))
    right = summed(w, one.delta, other.delta)
    assert compare(case, right, arithmetics(storage, storage)).fits
    half = product(one, other, (one.s, 0.0), (1, 1)) + product(one, other, (0.0, other.s), (0, 1))
    assert "LC128" not in diagnosed(case, summed(w, half)).codes


def test_factors_of_different_ranks_cannot_be_added():
    w = base("float32")
    assert FAULTS["LC128"].inject(case_of(w, lora(w), lora(w, r=4, seed=2))) == ()


# --------------------------------------------------------------------------------------------- combined by PEFT's rules


def combined(w: Tensor, kind: str, *loras: Lora) -> Case:
    """One step that combines them, as a report with --combination has it."""
    factors = {f"{role}{i}": factor for i, x in enumerate(loras) for role, factor in (("A", x.a), ("B", x.b))}
    site = Site(
        parameter="some.weight",
        shape=tuple(w.shape),
        roles={role: tuple(factor.shape) for role, factor in factors.items()},
        settings={
            "combination": COMBINATIONS[kind],
            "options": Options(),
            "weights": tuple(x.weight for x in loras),
            "scales": tuple(x.bare for x in loras),
        },
    )
    one = Scale(alpha=1.0, rank=1, default_alpha=1.0, default_rank=1)
    step = LoadedStep(recipe=RECIPES["lora-combined"], factors=factors, scale=one, site=site)
    return Case(base=w, steps=(step,), storage=str(w.dtype).removeprefix("torch."))


def linear(x: Lora, y: Lora) -> Tensor:
    return product(x, y, (x.s**0.5, y.s**0.5), (x.s**0.5, y.s**0.5))


def side_by_side(w: Tensor, *loras: Lora) -> Tensor:
    """PEFT copies the factors into those of a new adapter, in the dtype of the model."""
    return sum((x.b.to(w.dtype).float() @ (x.s * x.a).to(w.dtype).float() for x in loras), torch.zeros(w.shape))


@both_dtypes
def test_a_combination_of_another_kind_or_with_other_weights_is_named(storage):
    w = base(storage)
    one, other = two(w, weights=(0.7, 0.4))
    plain = replace(one, weight=1.0), replace(other, weight=1.0)
    turned = replace(one, weight=0.4), replace(other, weight=0.7)
    by_sum, by_factors = combined(w, "cat", one, other), combined(w, "linear", one, other)
    orders = arithmetics(storage, storage)
    assert compare(by_factors, summed(w, linear(one, other)), orders).fits
    assert compare(by_sum, summed(w, side_by_side(w, one, other)), orders).fits
    is_named("LC129", by_sum, summed(w, linear(one, other)), combination="linear")
    is_named("LC129", by_factors, summed(w, side_by_side(w, one, other)), combination="cat")
    is_named("LC123", by_factors, summed(w, linear(*plain)), weights=[1.0, 1.0])
    is_named("LC124", by_factors, summed(w, linear(*turned)), weights_of=[2, 1])
    is_named("LC124", by_sum, summed(w, side_by_side(w, *turned)), weights_of=[2, 1])
    is_named("LC127", by_sum, summed(w, side_by_side(w, one)), missing=[2])
    roots = one.bare**0.5, other.bare**0.5
    shares = tuple(x.weight * root for x, root in zip((one, other), roots, strict=True))
    is_named("LC122", by_factors, summed(w, product(one, other, shares, shares)), power=2.0)


# ------------------------------------------------------------------------------------------------------- magnitudes


def columns(v: Tensor) -> Tensor:
    return v.norm(dim=0, keepdim=True)


def rows(v: Tensor) -> Tensor:
    return v.norm(dim=1, keepdim=True)


MAGNITUDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "the norm of W in place of that of W + s B A": lambda w, d, m: m[:, None] / rows(w) * (w + d),
    "not divided by the norm": lambda w, d, m: m[:, None] * (w + d),
    "the norm along the other axis": lambda w, d, m: m[:, None] / columns(w + d) * (w + d),
    "magnitudes and norms along the other axis": lambda w, d, m: m / columns(w + d) * (w + d),
    "the delta alone multiplied": lambda w, d, m: w + m[:, None] / rows(w + d) * d,
    "the base alone multiplied": lambda w, d, m: m[:, None] / rows(w + d) * w + d,
}


@both_dtypes
@pytest.mark.parametrize("how", MAGNITUDES)
def test_a_magnitude_that_was_misapplied_is_named(how, storage):
    w = base(storage, (28, 28))
    one = lora(w, dora=True)
    assert one.m is not None
    case = case_of(w, one)
    actual = MAGNITUDES[how](w.float(), one.delta, one.m).to(w.dtype)
    assert how in FAULTS["LC131"].tell([is_named("LC131", case, actual, how=how)])
    turned = replace(
        case,
        base=w.T.contiguous(),
        steps=tuple(replace(step, recipe=RECIPES["dora-linear-in-out"]) for step in case.steps),
    )
    is_named("LC131", turned, actual.T.contiguous(), how=how)


@both_dtypes
def test_a_right_magnitude_and_its_neighbours_are_not_told_misapplied(storage):
    w = base(storage)
    one = lora(w, dora=True)
    assert one.m is not None
    case, v = case_of(w, one), w.float() + one.delta
    assert compare(case, (one.m[:, None] / rows(v) * v).to(w.dtype), arithmetics(storage, storage)).fits
    assert diagnosed(case, v.to(w.dtype)).codes == ("LC106",)
    assert "LC131" not in diagnosed(case, (one.m.flip(0)[:, None] / rows(v) * v).to(w.dtype)).codes
    square_only = "magnitudes and norms along the other axis"
    assert {one.told["how"] for one in FAULTS["LC131"].inject(case)} == MAGNITUDES.keys() - {square_only}


# ----------------------------------------------------------------------------------------------- the bias of lora_B


def seen(tensor: str, recipe: str, code: str | None) -> Comparison:
    return Comparison(
        tensor=tensor,
        kind="target",
        recipe=recipe,
        module=tensor.rpartition(".")[0],
        adapters=(0,),
        shape=(4,),
        dtype="float32",
        verdict=Verdict.REFUTED if code else Verdict.VERIFIED,
        exact=not code,
        code=code,
    )


def test_a_bias_of_lora_b_that_was_left_out_is_told_apart_from_an_adapter_that_was_not_applied():
    plan = Plan(pairings=())
    bias, weight = ("a.bias", "lora-bias"), ("a.weight", "lora-linear")
    (one,) = FAULTS["LC132"].detect(plan, [seen(*bias, "LC101"), seen(*weight, None)])
    assert (one.code, one.tensors) == ("LC132", ("a.bias",))
    assert FAULTS["LC132"].detect(plan, [seen(*bias, "LC101"), seen(*weight, "LC101")]) == ()
    assert FAULTS["LC132"].detect(plan, [seen(*bias, "LC101")]) == ()
    assert FAULTS["LC132"].detect(plan, [seen(*bias, "LC111"), seen(*weight, None)]) == ()


# ---------------------------------------------------------------------------- mistakes that are one number, by chance


def model(
    folder: Path, ranks: Mapping[str, int], alpha: float, used: Callable[[float, int], float], **config: Any
) -> tuple[Path, Path, Path]:
    """A base of a few matrices, an adapter of these ranks, and what `used`(alpha, r) as the scale makes of them."""
    common = next(iter(ranks.values()))
    said = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": alpha,
        "target_modules": list(ranks),
        "rank_pattern": {name: r for name, r in ranks.items() if r != common},
        **config,
    }
    weights, factors, merged = {}, {}, {}
    for seed, (name, r) in enumerate(ranks.items()):
        w = (0.02 * numbers(OUT, IN, seed=seed)).to(torch.bfloat16)
        one = lora(w, r=r, alpha=alpha, seed=seed + 7)
        stem = f"base_model.model.{name}"
        weights[f"{name}.weight"] = w
        factors |= {f"{stem}.lora_A.weight": one.a, f"{stem}.lora_B.weight": one.b}
        merged[f"{name}.weight"] = summed(w, used(alpha, r) * (one.b @ one.a))
    for part, tensors in {"base": weights, "adapter": factors, "merged": merged}.items():
        (folder / part).mkdir(parents=True)
        file = "adapter_model.safetensors" if part == "adapter" else "model.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / part / file)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    return folder / "base", folder / "adapter", folder / "merged"


@dataclass(frozen=True)
class Chance:
    """A scale that two mistakes give at this rank and alpha, and which of them gives it at any rank."""

    r: int
    alpha: float
    used: Callable[[float, int], float]
    true: str
    other: str
    rslora: bool = False


CHANCES = {
    "root-of-4-is-2": Chance(4, 14.0, lambda alpha, r: alpha / math.sqrt(r), "LC112", "LC102"),
    "square-of-2-is-twice-2": Chance(6, 12.0, lambda alpha, r: (alpha / r) ** 2, "LC121", "LC102"),
    "half-of-alpha-twice": Chance(2, 14.0, lambda alpha, r: alpha, "LC108", "LC102"),
    "alpha-is-r": Chance(6, 6.0, lambda alpha, r: alpha / r, "LC107", "LC111", rslora=True),
    "alpha-is-r-squared": Chance(6, 36.0, lambda alpha, r: alpha / r**2, "LC125", "LC111"),
    "alpha-is-2-and-r-4": Chance(4, 2.0, lambda alpha, r: 1 / r, "LC125", "LC121"),
}


@pytest.mark.parametrize("ident", CHANCES)
def test_two_mistakes_that_are_one_number_are_both_listed_and_another_rank_tells_them_apart(ident, tmp_path):
    one = CHANCES[ident]
    same = {f"layers.{i}.q_proj": one.r for i in range(3)}
    (found,) = told(model(tmp_path / "same", same, one.alpha, one.used, use_rslora=one.rslora))
    assert {found.code, *found.evidence["also"]} == {one.true, one.other}
    assert "one of" in found.message
    mixed = same | {"layers.3.q_proj": one.r + 3}
    (found,) = told(model(tmp_path / "mixed", mixed, one.alpha, one.used, use_rslora=one.rslora))
    assert found.code == one.true
    assert "also" not in found.evidence
    assert len(found.tensors) == 4


def told(files: tuple[Path, Path, Path]) -> list[lora_check.Finding]:
    base, adapter, merged = files
    report = lora_check.check(base, adapter, merged, jobs=1)
    return [one for one in report.findings if one.severity == "error"]


@pytest.mark.parametrize("rslora", [False, True])
def test_a_right_merge_of_modules_of_two_ranks_is_verified(rslora, tmp_path):
    ranks = {"layers.0.q_proj": 4, "layers.1.q_proj": 9}
    right = (lambda alpha, r: alpha / math.sqrt(r)) if rslora else (lambda alpha, r: alpha / r)
    files = model(tmp_path, ranks, 14.0, right, use_rslora=rslora)
    assert lora_check.check(*files, jobs=1).verdict is Verdict.VERIFIED


def test_a_number_of_another_modules_pattern_is_named(tmp_path):
    ranks = {f"layers.{i}.{name}": 6 for i in range(2) for name in ("k_proj", "q_proj")}
    files = model(tmp_path, ranks, 10.0, lambda alpha, r: 17 / r, alpha_pattern={"k_proj": 17})
    (found,) = told(files)
    assert found.code == "LC109"
    assert found.message.startswith("alpha_pattern mistaken")
    assert len(found.tensors) == 2
