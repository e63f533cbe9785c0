"""The first pass verifies what an honest merge writes, on whatever a processor has, and nothing else.

The merges are whole-tensor torch, as scripts write them; the figures are NumPy float64.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_check import first_pass, reference, registry
from lora_check.compare import compare, compare_copy
from lora_check.first_pass import Part, copy_part, part, whole
from lora_check.plain import plain
from lora_check.rounding import ADD, FORMATS, ROUNDED_DELTA, arithmetics, gamma, matrix_unit_error, store, unit
from lora_check.same import Chunk, apart, differing, least_size, same_bits, suspicious
from lora_check.types import Arithmetic, Case, LoadedStep, Scale

torch.set_num_threads(1)

RECIPES = registry.load("recipes")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HOWS = {"added": ADD, "rounded": ROUNDED_DELTA}
UNITS = {"units": "amx_bf16", "no-units": ""}
R, SHAPE = 12, (520, 300)


@pytest.fixture(params=UNITS)
def units(request, monkeypatch) -> str:
    """With matrix units, and as a processor without them."""
    monkeypatch.setattr(reference, "units", lambda: UNITS[request.param])
    return str(request.param)


@dataclass(frozen=True)
class World:
    """A base and two factors, s not one."""

    base: Tensor
    a: Tensor
    b: Tensor
    s: float = 2.0
    recipe: str = "lora-linear"

    @property
    def case(self) -> Case:
        rank = int(self.a.shape[0])
        scale = Scale(alpha=self.s * rank, rank=rank, default_alpha=self.s * rank, default_rank=rank)
        step = LoadedStep(recipe=RECIPES[self.recipe], factors={"A": self.a, "B": self.b}, scale=scale)
        return Case(base=self.base, steps=(step,), storage=str(self.base.dtype).removeprefix("torch."))

    @property
    def product(self) -> Tensor:
        product = self.b.float() @ self.a.float()
        return product.T if self.recipe == "lora-linear-in-out" else product

    def merged(self, how: Arithmetic = ADD) -> Tensor:
        delta = self.product * self.s
        if how is ROUNDED_DELTA:
            return self.base + delta.to(self.base.dtype)
        return (self.base.float() + delta).to(self.base.dtype)

    def truth(self) -> Tensor:
        product = self.b.double() @ self.a.double()
        return self.base.double() + self.s * product


def make(
    storage: str = "bfloat16", factors: str = "float32", shape=SHAPE, s: float = 2.0, rank: int = R, seed: int = 0
) -> World:
    rng = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=rng) * 0.02).to(DTYPES[storage])
    a = (torch.randn(rank, shape[1], generator=rng) * 0.05).to(DTYPES[factors])
    b = (torch.randn(shape[0], rank, generator=rng) * 0.01).to(DTYPES[factors])
    return World(base, a, b, s)


def seen(world: World, actual: Tensor, how: Arithmetic = ADD) -> Part | None:
    return part(world.case, actual, how, slice(0, world.case.rows))


def is_narrow(world: World, how: Arithmetic = ADD) -> bool:
    found = plain(world.case, how)
    return found is not None and reference.narrow(found, slice(0, world.case.rows)) is not None


def next_to(x: Tensor) -> Tensor:
    """The next larger number of its dtype."""
    return torch.nextafter(x, torch.full_like(x, torch.inf))


# ------------------------------------------------------------------------------------------- what is verified


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("s", [2.0, 2.5])
@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
@pytest.mark.parametrize("storage", DTYPES)
def test_an_honest_merge_is_exact_and_one_element_beyond_its_budget_is_seen(storage, factors, s, how, units):
    world = make(storage, factors, s=s)
    actual = world.merged(HOWS[how])
    found = seen(world, actual, HOWS[how])
    assert found is not None
    assert found.exact
    assert not found.unmoved
    for place in ((0, 0), (SHAPE[0] - 1, SHAPE[1] - 1), (277, 3)):
        wrong = actual.clone()
        wrong[place] = wrong[place] * 1.02
        assert seen(world, wrong, HOWS[how]) is None, place


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
def test_matrix_units_are_used_where_they_keep_within_the_budget(rank, factors, monkeypatch):
    world = make(factors=factors, rank=rank)
    for units, used in (("amx_bf16", True), ("avx512_bf16", factors == "bfloat16"), ("", False)):
        monkeypatch.setattr(reference, "units", lambda units=units: units)
        assert is_narrow(world) is used, units
    assert not is_narrow(replace(world, base=world.base.half()))
    monkeypatch.setattr(reference, "units", lambda: "amx_bf16")
    assert not is_narrow(make(factors="float32", rank=4)), "its own error is above that of so few products"
    assert not is_narrow(make(factors="float32", rank=200)), "float32 is as fast"
    assert not is_narrow(replace(world, a=world.a * 2.0**-60, b=world.b * 2.0**-60)), "its products may be flushed"


@pytest.mark.parametrize("recipe", ["lora-linear", "lora-linear-in-out"])
def test_a_factor_may_lie_either_way(recipe, units):
    world = make(shape=(300, 520) if recipe == "lora-linear-in-out" else SHAPE)
    if recipe == "lora-linear-in-out":
        world = World(world.base, world.b.T.contiguous(), world.a.T.contiguous(), 2.0, recipe)
    found = seen(world, world.merged())
    assert found is not None
    assert found.exact
    assert seen(world, world.base + (world.product.roll(1, 0) * 2.0).to(world.base.dtype)) is None


def near_ties(world: World) -> tuple[Tensor, Tensor]:
    """An honest merge, and the same with the elements of some tiles that float32 may round either way rounded so."""
    actual, truth = world.merged(), world.truth()
    up, down = next_to(actual), torch.nextafter(actual, torch.full_like(actual, -torch.inf))
    other = torch.where(truth > actual.double(), up, down)
    middle = (actual.double() + other.double()) / 2
    reach = gamma(2, unit("float32")) * world.s * (world.b.double().abs() @ world.a.double().abs())
    either = (truth - middle).abs() < reach
    return actual, torch.where(either, other, actual)


def test_other_roundings_are_within_the_budget_and_not_exact(units):
    world = make(shape=(1300, 700))
    actual, otherwise = near_ties(world)
    assert 2 <= differing(actual, otherwise) <= 200
    found = seen(world, otherwise)
    assert found is not None
    assert not found.exact
    assert 0 < found.width < found.signal
    measure = whole([found], ADD)
    assert measure is not None
    assert measure.fits
    assert not measure.exact
    wrong = otherwise.clone()
    wrong[1299, 699] = next_to(next_to(wrong[1299, 699]))
    assert seen(world, wrong) is None, "control: what differs after an element that is not exact is still asked about"


def test_many_other_roundings_are_asked_about_as_rows(units, monkeypatch):
    world = make(shape=(1300, 700))
    _, otherwise = near_ties(world)
    few = seen(world, otherwise)
    monkeypatch.setattr(first_pass, "FEW", 10**9)
    many = seen(world, otherwise)
    assert few is not None
    assert many is not None
    assert not many.exact
    assert many.width < few.width, "the widest of those that were asked stands for all of them"


def test_what_this_arithmetic_has_not_written_wants_a_closer_look_and_finds_its_own(units):
    world = make()
    actual = world.merged(ROUNDED_DELTA)
    assert seen(world, actual) is None
    measure = compare(world.case, actual, arithmetics("bfloat16", "bfloat16"), ADD)
    assert measure.fits
    assert measure.arithmetic == "rounded-delta"


# ------------------------------------------------------------------------------------------ what is no number


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("what", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_never_verified_even_if_base_has_it(storage, what, units):
    world = make(storage)
    world.base[13, 7] = what
    actual = world.merged()
    assert seen(world, actual) is None
    finite = actual.clone()
    finite[13, 7] = 1.0
    assert seen(world, finite) is None


@pytest.mark.parametrize("what", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_where_no_figures_are_taken(what, units):
    world = make(shape=(2100, 700))
    world.base[100, 7] = what
    assert seen(world, world.merged()) is None


def test_what_overflows_is_never_verified(units):
    world = make()
    world.base[5, 5] = torch.finfo(torch.bfloat16).max
    world.b[5], world.a[:, 5] = 1e18, 1e18
    actual = world.merged()
    assert bool(actual[5, 5].isinf())
    assert seen(world, actual) is None


@pytest.mark.parametrize("tiny", [2.0**-130, -(2.0**-127), 2.0**-133])
def test_a_subnormal_number_is_kept_and_one_that_was_flushed_is_not_verified(tiny, units):
    world = make(factors="bfloat16")
    world.b[40:42] = 0.0
    world.base[40, 9] = tiny
    actual = world.merged()
    assert float(actual[40, 9]) == tiny
    found = seen(world, actual)
    assert found is not None
    assert found.exact
    flushed = actual.clone()
    flushed[40, 9] = tiny * 0.0
    assert seen(world, flushed) is None


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_of_either_sign_are_what_the_arithmetic_makes_of_them(zero, units):
    world = make()
    world.b[3:5] = 0.0
    world.base[3:5] = zero
    found = seen(world, world.merged())
    assert found is not None
    assert found.exact
    other = world.merged()
    other[4, 4] = 2.0**-60
    assert seen(world, other) is None


# --------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1), (2, 70000), (1, 70000), (70000, 1)], ids=str)
@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_a_tensor_of_one_row_or_column(storage, shape, units):
    world = make(storage, shape=shape)
    found = seen(world, world.merged())
    assert found is not None
    assert found.exact
    wrong = world.merged()
    wrong[-1, -1] = wrong[-1, -1] * 1.02
    assert seen(world, wrong) is None


def test_an_empty_tensor_wants_a_closer_look():
    world = make(shape=(0, 5))
    assert whole([seen(world, world.base)], ADD) is None
    assert compare(world.case, world.base, (ADD,), ADD).fits


def test_tensors_with_strides_and_from_any_place_of_a_file(tmp_path: Path, units):
    world = make()
    actual = world.merged()
    strided = [torch.stack([x, x], 2)[:, :, 0] for x in (world.base, actual)]
    assert not strided[0].is_contiguous()
    assert seen(replace(world, base=strided[0]), strided[1]) == seen(world, actual)
    for name, base in (("a", torch.zeros(1, dtype=torch.uint8)), ("b", torch.zeros(2, dtype=torch.bfloat16))):
        save_file({"0": base, "base": world.base, "merged": actual}, tmp_path / name)
        held = load_file(tmp_path / name)
        assert seen(replace(world, base=held["base"]), held["merged"]) == seen(world, actual)
    raw = torch.zeros(actual.numel() + 1, dtype=torch.bfloat16)
    odd = raw[1:].view(actual.shape).copy_(actual)
    assert odd.data_ptr() % 4 == 2
    assert seen(world, odd) == seen(world, actual)


@dataclass(frozen=True)
class Source:
    """Rows that are read when they are asked for, and nothing else of a tensor."""

    held: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.held.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    def __getitem__(self, span: slice) -> Tensor:
        assert isinstance(span, slice)
        assert span.step is None
        return self.held[span].clone()


@pytest.mark.parametrize("adapters", [1, 2])
def test_sources_of_rows_are_as_good_as_tensors(adapters, units):
    world = make()
    actual, steps = world.merged(), world.case.steps * adapters
    if adapters == 2:
        actual = replace(world, base=actual).merged()
    held = replace(world.case, steps=steps)
    read = replace(held, base=Source(world.base))
    spans = [slice(0, 100), slice(100, 101), slice(101, SHAPE[0])]
    found = [part(read, Source(actual), ADD, span) for span in spans]
    assert found == [part(held, actual, ADD, span) for span in spans]
    assert None not in found
    actual[100, 3] = 1.0
    assert [one is None for one in (part(read, Source(actual), ADD, span) for span in spans)] == [False, True, False]


# --------------------------------------------------------------------------------------------- parts and wholes


def test_parts_come_to_the_whole(units):
    world = make(shape=(1000, 300))
    actual = world.merged()
    parts = [part(world.case, actual, ADD, slice(start, start + 250)) for start in (0, 250, 500, 750)]
    measure, at_once = whole(parts, ADD), compare(world.case, actual, (ADD,), ADD)
    assert measure is not None
    assert measure == whole(parts[::-1], ADD)
    assert (measure.fits, measure.exact, measure.arithmetic) == (True, True, "fp32-add")
    for name in ("signal", "overlap", "noise"):
        assert getattr(measure, name) == pytest.approx(getattr(at_once, name), rel=1e-5)
    assert whole([*parts[:3], None], ADD) is None


def test_a_whole_is_nothing_that_its_parts_do_not_say():
    good = Part(exact=True, unmoved=False, signal=1.0, cross=0.0, noise=0.0, width=0.0)
    assert whole([good], ADD) is not None
    assert whole([replace(good, unmoved=True)], ADD) is None, "the base itself"
    assert whole([good, replace(good, unmoved=True)], ADD) is not None
    assert whole([replace(good, exact=False, width=1.0)], ADD) is None, "a budget as wide as the delta"
    assert whole([replace(good, exact=False, width=0.5)], ADD) is not None
    assert whole([], ADD) is None, "nothing was looked at"


def test_the_base_itself_is_told_apart_from_a_merge(units):
    world = make()
    found = seen(replace(world, b=world.b * 1e-9), world.base)
    assert found is not None
    assert found.unmoved
    assert whole([found], ADD) is None


@pytest.mark.parametrize("uneven", [False, True])
def test_figures_of_a_sample_are_those_of_all_elements(uneven, units):
    world = make(shape=(2100, 700))
    if uneven:
        world.b[:] = 0.0
        world.b[93 + 7 :: 93 * 11] = 0.05  # rows that no sample has
    actual = world.merged()
    measure = compare(world.case, actual, (ADD,), ADD)
    delta = world.s * (world.b.double().numpy() @ world.a.double().numpy())
    residual = actual.double().numpy() - world.base.double().numpy() - delta
    assert measure.fits
    assert measure.exact
    assert measure.signal == pytest.approx(np.square(delta).sum(), rel=1e-5)
    assert measure.noise == pytest.approx(np.square(residual).sum(), rel=1e-5 if uneven else 0.02)
    assert measure.overlap == pytest.approx(((residual + delta) * delta).sum(), rel=1e-5 if uneven else 0.01)


def test_control_a_sample_without_its_share_would_tell_other_figures(monkeypatch):
    world = make(shape=(2100, 700))
    world.b[:] *= 1e-3
    world.b[93 + 7 :: 93 * 11] = 0.05
    monkeypatch.setattr("lora_check.sampled.SHARE", 0.0)
    actual = world.merged()
    delta = world.s * (world.b.double().numpy() @ world.a.double().numpy())
    residual = actual.double().numpy() - world.base.double().numpy() - delta
    noise = compare(world.case, actual, (ADD,), ADD).noise
    assert noise != pytest.approx(np.square(residual).sum(), rel=0.1)


def test_two_threads_do_not_get_in_each_others_way(units):
    worlds = [make(shape=(600, 400), seed=seed) for seed in range(4)]
    actuals = [world.merged() for world in worlds]
    alone = [seen(world, actual) for world, actual in zip(worlds, actuals, strict=True)]
    barrier = threading.Barrier(4)

    def again(index: int) -> list[Part | None]:
        barrier.wait()
        return [seen(worlds[index], actuals[index]) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(again, range(4))) == [[one] * 5 for one in alone]


def test_a_worker_holds_24_mib_of_its_own_at_most(units):
    def held() -> int:
        for rank, how in ((16, ADD), (16, ROUNDED_DELTA)):
            world = make(shape=(3000, 1500), rank=rank)
            assert seen(world, world.merged(how), how) is not None
        return sum(one.numel() * one.element_size() for one in vars(reference._HELD).values())

    with ThreadPoolExecutor(1) as pool:
        assert 0 < pool.submit(held).result() <= 24 << 20


# -------------------------------------------------------------------------------------------- bystanders, rules


def test_a_bystander_is_the_same_bytes_or_not():
    base = make(shape=(900, 700)).base
    case = Case(base=base, steps=(), storage="bfloat16")
    assert copy_part(case, base.clone(), slice(0, 900))
    assert copy_part(case, Source(base), slice(3, 70))
    for row, column in ((0, 0), (450, 3), (899, 699)):
        other = base.clone()
        other[row, column] = -other[row, column]
        assert not copy_part(case, other, slice(0, 900))
        assert copy_part(case, other, slice(row + 1, 900))
        assert copy_part(case, other, slice(0, row))
        assert compare_copy(case, other, (ADD,)).over_budget == 1
    assert not copy_part(case, base.half(), slice(0, 900)), "another dtype is no copy"
    assert not copy_part(case, base.view(torch.int16), slice(0, 900))


def test_bits_are_looked_at_as_they_lie():
    x = torch.tensor([[1.0, -2.0, 3.0], [0.5, 7.0, -1.0]], dtype=torch.bfloat16)
    assert not [*suspicious(x, x.clone(), 2, zeros=True)]
    assert same_bits(x, x.clone())
    assert not len(apart(x, x.clone()))
    for place, what in ((0, -0.0), (1, float("nan")), (4, -float("inf")), (5, 0.0)):
        y = x.clone()
        y.reshape(-1)[place] = what
        assert apart(x, y).tolist() == [place]
        assert not same_bits(x, y)
        start = place // 2 * 2
        assert [*suspicious(x, y, 2, zeros=True)] == [Chunk(start, start + 2, False, what == 0, what == 0)]
        assert [*suspicious(y, y, 4, zeros=True)] == [
            Chunk(place // 4 * 4, min(place // 4 * 4 + 4, 6), True, what == 0, what == 0)
        ]
        assert bool([*suspicious(y, y, 4, zeros=False)]) is (what != 0)
    assert not same_bits(torch.zeros(3), -torch.zeros(3))
    assert least_size(torch.tensor([0.0, -0.0, 3.0, -0.25])) == 0.25
    assert least_size(torch.zeros(2)) == 1.0


# ---------------------------------------------------------------------------------------- the bound of the units


@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rank", "s"), [(8, 2.0), (16, 2.5), (64, 0.5), (80, 2.0)])
def test_matrix_units_err_by_no_more_than_was_derived(rank, s, factors):
    if not reference.units():
        factors = "bfloat16"
    world = make(shape=(256, 300), rank=rank, s=s, factors=factors)
    world.b[:, rank // 2 :] = -world.b[:, : rank // 2]  # sums that cancel but for a little
    world.a[: rank // 2] = world.a[rank // 2 :] * (1 + 2.0**-6)
    found = plain(world.case, ADD)
    assert found is not None
    maker = reference.narrow(found, slice(0, 256))
    if maker is None:
        pytest.fail("the bound does not allow for this one")
    for how in (found, replace(found, rounded=True)):
        made = replace(maker, case=how).made(torch.zeros_like(world.base), slice(0, 256)).double()
        assert not outside(made, world, maker.pieces)
    cut = replace(maker, pieces=(1, 1), right=found.rights().bfloat16())
    if factors == "float32":
        assert outside(cut.made(torch.zeros_like(world.base), slice(0, 256)).double(), world, maker.pieces)


def outside(made: Tensor, world: World, pieces: tuple[int, int]) -> bool:
    """Whether a product over a base of zeros is no rounding of a number within the bound."""
    truth = world.s * (world.b.double() @ world.a.double())
    size = world.s * (world.b.double().abs() @ world.a.double().abs())
    error = matrix_unit_error(world.a.shape[0], pieces, world.s != 2.0 ** round(np.log2(world.s))) * size
    low, high = (store(truth + sign * error, "bfloat16") for sign in (-1, 1))
    return bool(((made < low) | (made > high)).any())


def test_the_bound_is_never_above_the_budget_where_units_are_used():
    for rank in (8, 9, 16, 33, 64, 200, 512):
        assert matrix_unit_error(rank, (3, 3), False) <= gamma(rank + 1, unit("float32"))
    assert matrix_unit_error(4, (3, 3), False) > gamma(5, unit("float32"))
    assert matrix_unit_error(4, (1, 1), False) <= gamma(5, unit("float32"))
    assert FORMATS["bfloat16"].precision * 3 == FORMATS["float32"].precision, "three pieces hold every bit"
