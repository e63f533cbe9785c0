"""From a delta of a tenth of the weight to one that no file can show: the verdict holds, and what is lost is told.

Weights of 768 x 640 and rank 6, as a small model has them. The expected survival and signal-to-noise ratio are computed
here, in NumPy float64, from the definitions alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from lora_check import diagnose, registry
from lora_check import rounding as rounding_module
from lora_check.compare import Measure, compare
from lora_check.rounding import arithmetics
from lora_check.types import Case, Comparison, LoadedStep, Scale, Verdict

torch.set_num_threads(1)

RECIPES = registry.load("recipes")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"bfloat16": "bf16", "float16": "fp16"}
SIZES = {"10%": 1e-1, "1%": 1e-2, "0.1%": 1e-3, "0.01%": 1e-4, "0.002%": 2e-5}
SCALE = Scale(alpha=15.0, rank=6, default_alpha=15.0, default_rank=6)
S = 2.5

every_size = pytest.mark.parametrize("size", SIZES)
every_dtype = pytest.mark.parametrize("storage", DTYPES)


@dataclass(frozen=True)
class World:
    """A base, two factors, and the case that asks about them."""

    base: Tensor
    a: Tensor
    b: Tensor

    @property
    def storage(self) -> str:
        return str(self.base.dtype).removeprefix("torch.")

    @property
    def case(self) -> Case:
        step = LoadedStep(recipe=RECIPES["lora-linear"], factors={"A": self.a, "B": self.b}, scale=SCALE)
        return Case(base=self.base, steps=(step,), storage=self.storage)

    def merged(self, factor: float = 1.0, *, safe: bool = False, transposed: bool = False) -> Tensor:
        """What a script writes: once rounded, or with the delta rounded before."""
        product = self.b @ self.a
        delta = (product.T if transposed else product) * (S * factor)
        if safe:
            return self.base + delta.to(self.base.dtype)
        return (self.base.float() + delta).to(self.base.dtype)


def make(storage: str, size: float, shape: tuple[int, int] = (768, 640), seed: int = 0) -> World:
    rng = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=rng) * 0.02).to(DTYPES[storage])
    a = torch.randn(6, shape[1], generator=rng) * 0.05
    b = torch.randn(shape[0], 6, generator=rng)
    return World(base, a, b * (size * base.float().norm() / (S * (b @ a)).norm()))


def measured(world: World, actual: Tensor, *, first: bool = False) -> Measure:
    orders = arithmetics(world.storage, world.storage)
    return compare(world.case, actual, orders, orders[0] if first else None)


def comparison(world: World, seen: Measure) -> Comparison:
    """The measure as a report holds it, whose properties are the figures that are printed."""
    return Comparison(
        tensor="some.weight",
        kind="target",
        recipe="lora-linear",
        module="some",
        adapters=(0,),
        shape=tuple(world.base.shape),
        dtype=world.storage,
        verdict=Verdict.VERIFIED if seen.fits else Verdict.REFUTED,
        exact=seen.exact,
        signal=seen.signal,
        overlap=seen.overlap,
        noise=seen.noise,
    )


def figures(world: World, actual: Tensor) -> tuple[float, float]:
    """Survival and signal-to-noise ratio in dB, in NumPy float64, from their definitions."""
    w, seen = world.base.double().numpy(), actual.double().numpy()
    delta = oracle.delta_linear(world.a.double().numpy(), world.b.double().numpy(), S)
    survival = float(np.sum((seen - w) * delta) / np.sum(delta * delta))
    noise = float(np.sum((seen - (w + delta)) ** 2))
    return survival, 10 * math.log10(float(np.sum(delta * delta)) / noise)


def codes(world: World, actual: Tensor) -> tuple[str, ...]:
    """How a tensor that must be refuted, whatever is tried first, is named."""
    orders = arithmetics(world.storage, world.storage)
    seen = compare(world.case, actual, orders)
    assert not seen.fits
    assert not compare(world.case, actual, orders, orders[0]).fits
    found = diagnose.name_tensor("some.weight", "target", world.case, actual, orders, seen)
    assert found is not None
    return found.codes


# ---------------------------------------------------------------------------------------------- the right merge


@every_size
@every_dtype
@pytest.mark.parametrize("safe", [False, True], ids=["unsafe", "safe"])
@pytest.mark.parametrize("first", [False, True], ids=["all-orders", "first-pass"])
def test_a_right_merge_is_verified_however_small_its_delta(storage, size, safe, first):
    world = make(storage, SIZES[size])
    seen = measured(world, world.merged(safe=safe), first=first)
    assert seen.fits
    # some elements of so large a tensor are small enough to move: the file is told from the base
    assert not seen.vanished


@every_size
@every_dtype
@pytest.mark.parametrize("first", [False, True], ids=["all-orders", "first-pass"])
def test_survival_and_signal_to_noise_are_those_of_an_independent_computation(storage, size, first):
    world = make(storage, SIZES[size])
    actual = world.merged()
    survival, snr = figures(world, actual)
    told = comparison(world, measured(world, actual, first=first))
    # the first pass may compute in float32, where W + delta is off by 2^-24 of W
    room = 1e-9 if not first else 1e-6 + 2.0**-24 / SIZES[size]
    assert told.survival == pytest.approx(survival, rel=room, abs=room)
    assert told.snr_db == pytest.approx(snr, abs=0.01)
    assert told.residual == pytest.approx(10 ** (-snr / 20), rel=2e-3)


@every_dtype
def test_survival_falls_with_the_delta_and_lies_between_nothing_and_all(storage):
    told = []
    for size in SIZES.values():
        world = make(storage, size)
        told.append(comparison(world, measured(world, world.merged())))
    survivals = [one.survival for one in told]
    ratios = [one.snr_db for one in told]
    assert survivals[0] == pytest.approx(1, abs=1e-3)
    assert all(0 < one < 1.01 for one in survivals if one is not None)
    assert survivals[2:] == sorted(survivals[2:], reverse=True)  # type: ignore[type-var]
    assert ratios == sorted(ratios, reverse=True)  # type: ignore[type-var]
    assert ratios[0] is not None
    assert ratios[-1] is not None
    assert ratios[0] > rounding_module.LOST_SNR_DB + 20
    assert ratios[-1] < 1


@every_dtype
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_the_survival_of_a_scaled_delta_is_its_scale_where_storage_is_fine_enough(storage, factor):
    world = make(storage, 1e-1)
    told = comparison(world, measured(world, world.merged(factor)))
    assert told.survival == pytest.approx(factor, abs=2e-3)


# ---------------------------------------------------------------------------------------------- the wrong merges

MISTAKES = {
    "not-applied": (0.0, "LC101"),
    "twice": (2.0, "LC102"),
    "half": (0.5, "LC110"),
    "subtracted": (-1.0, "LC103"),
}


# below that, storage keeps too little of a delta to tell one mistake from another
NAMED = ("10%", "1%", "0.1%")


@every_size
@every_dtype
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_merge_is_refuted_and_named_rightly_or_if_its_delta_is_tiny_not_at_all(storage, size, mistake):
    factor, code = MISTAKES[mistake]
    world = make(storage, SIZES[size], seed=1)
    safe = bool(list(SIZES).index(size) % 2) ^ (storage == "float16")  # both, over the sizes and dtypes
    found = codes(world, world.merged(factor, safe=safe))
    assert found == (code,) or (size not in NAMED and found == ("LC199",))


@every_size
@every_dtype
def test_a_transposed_delta_is_refuted_and_named_rightly_or_if_it_is_tiny_not_at_all(storage, size):
    world = make(storage, SIZES[size], shape=(640, 640))
    for safe in (False, True):
        found = codes(world, world.merged(transposed=True, safe=safe))
        assert found == ("LC104",) or (size not in NAMED and found == ("LC199",))


# -------------------------------------------------------------------------------------------- nothing is left of it


def robust(storage: str, size: float) -> World:
    """A base whose every weight is far from zero, so that a small delta is too small for all of them."""
    world = make(storage, size, shape=(128, 96))
    return World(torch.where(world.base >= 0, world.base + 1, world.base - 1), world.a, world.b)


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7, 1e-10])
@every_dtype
@pytest.mark.parametrize("first", [False, True], ids=["all-orders", "first-pass"])
def test_a_delta_that_no_stored_bit_can_show_has_vanished(storage, size, first):
    world = robust(storage, size)
    actual = world.merged()
    assert torch.equal(actual, world.base)
    seen = measured(world, actual, first=first)
    assert seen.fits
    assert seen.vanished
    assert seen.signal > 0


@every_dtype
@pytest.mark.parametrize("first", [False, True], ids=["all-orders", "first-pass"])
def test_a_delta_that_moves_a_single_element_has_not_vanished(storage, first):
    world = robust(storage, 1e-5)
    world.base[7, 5] = 0.0
    actual = world.merged()
    assert int((actual != world.base).sum()) == 1
    seen = measured(world, actual, first=first)
    assert seen.fits
    assert not seen.vanished
    assert not measured(world, world.base, first=first).fits


@every_dtype
def test_a_zero_adapter_has_no_signal_and_has_not_vanished(storage):
    world = make(storage, 1e-2, shape=(128, 96))
    world = World(world.base, world.a, world.b * 0)
    for first in (False, True):
        seen = measured(world, world.base, first=first)
        assert seen.fits
        assert seen.signal == 0
        assert not seen.vanished
        assert comparison(world, seen).survival is None


# -------------------------------------------------------------------------------------------- can these tests fail?


def test_control_the_figures_of_another_merge_are_others():
    world = make("bfloat16", 1e-2)
    right, wrong = figures(world, world.merged()), figures(world, world.merged(0.9))
    told = comparison(world, measured(world, world.merged(0.9)))
    assert told.survival == pytest.approx(wrong[0], rel=1e-6)
    assert told.survival != pytest.approx(right[0], rel=1e-3)
    assert told.snr_db != pytest.approx(right[1], abs=0.1)


def test_control_a_cell_far_too_wide_hides_that_a_small_adapter_was_not_applied(monkeypatch):
    world = make("bfloat16", 2e-5)
    assert not measured(world, world.base).fits
    true = rounding_module.cell

    def wide(stored: Tensor, storage: str) -> tuple[Tensor, Tensor]:
        low, high = true(stored, storage)
        return low - (high - low) - 1e-3, high + (high - low) + 1e-3

    monkeypatch.setattr("lora_check.trial.cell", wide)
    assert measured(world, world.base).fits
