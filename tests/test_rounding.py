"""Rounding to a storage format, its spacing and its cells: held against NumPy, torch and an oracle written apart."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_check import rounding, types
from lora_check.rounding import (
    FORMATS,
    any_rounding,
    arithmetics,
    cell,
    conversions,
    gamma,
    half_cell,
    store,
    ulp,
    unit,
)

torch.set_num_threads(1)

NARROW = ("float16", "bfloat16")
STORED = ("float32", *NARROW)
ALL = ("float64", *STORED)
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

MANY = settings(max_examples=200, deadline=None)

doubles = st.floats(width=64)  # every exponent, subnormals, both zeros, infinities, NaN
finite = st.floats(width=64, allow_nan=False, allow_infinity=False)
singles = st.floats(width=32)
lists = st.lists(doubles, min_size=1, max_size=40)


def dtype_of(storage: str) -> torch.dtype:
    return {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[
        storage
    ]


def same(one: torch.Tensor, other: torch.Tensor | np.ndarray) -> bool:
    """The same float64 numbers: signs of zeros count, all NaN are one."""
    a, b = one.numpy(), np.asarray(other)
    both = np.isnan(a) & np.isnan(b)
    return bool(np.all(both | ((a == b) & (np.signbit(a) == np.signbit(b)))))


def neighbourhood(storage: str) -> list[float]:
    """Numbers where rounding goes wrong first: powers of two, their neighbours, the midpoints and what lies beside."""
    bits, least, greatest = oracle.FORMATS[SHORT[storage]]
    found = [0.0, math.inf]
    # every binade of fp16; for the wider exponents the ends and a walk through the middle
    exponents = sorted({*range(least - bits, least + 3), *range(greatest - 2, greatest + 2), *range(-17, 17)})
    for exponent in exponents:
        one = math.ldexp(1.0, exponent)
        step = math.ldexp(1.0, max(exponent, least) - (bits - 1))
        for count in (-1, -0.75, -0.5, -0.25, 0, 0.5, 1, 1.5, 2.5):
            middle = one + count * step
            found += [middle, math.nextafter(middle, math.inf), math.nextafter(middle, -math.inf)]
    return [*found, *(-x for x in found)]


# ------------------------------------------------------------------------------------------------------- store


@pytest.mark.parametrize("storage", STORED)
@given(numbers=lists)
@MANY
def test_storing_any_double_gives_what_the_oracle_gives(storage, numbers):
    assert same(store(torch.tensor(numbers, dtype=torch.float64), storage), oracle.round_to(numbers, SHORT[storage]))


@pytest.mark.parametrize("storage", STORED)
def test_storing_gives_what_the_oracle_gives_at_powers_of_two_midpoints_and_limits(storage):
    numbers = neighbourhood(storage)
    assert same(store(torch.tensor(numbers, dtype=torch.float64), storage), oracle.round_to(numbers, SHORT[storage]))


@pytest.mark.parametrize("storage", NARROW)
@given(numbers=st.lists(singles, min_size=1, max_size=40))
@MANY
def test_storing_a_float32_is_the_cast_that_torch_does(storage, numbers):
    x = torch.tensor(numbers, dtype=torch.float32)
    assert same(store(x.to(torch.float64), storage), x.to(dtype_of(storage)).to(torch.float64))


@pytest.mark.parametrize("storage", NARROW)
def test_storing_is_the_cast_of_torch_for_a_float32_of_every_exponent(storage):
    exponents = torch.arange(256, dtype=torch.int64).repeat_interleave(1 << 10)
    # the upper seven and the lower seven mantissa bits: keeps ties, both neighbours of ties, and the carries
    upper = torch.arange(1 << 10, dtype=torch.int64).repeat(256)
    mantissa = ((upper >> 3) << 16) | torch.tensor([0, 1, 0x8000, 0x7FFF, 0x8001, 0x1000, 0x0FFF, 0xFFFF])[upper & 7]
    patterns = (exponents << 23) | mantissa
    for sign in (0, 1):
        x = (patterns | (sign << 31)).to(torch.int32).view(torch.float32)
        assert same(store(x.to(torch.float64), storage), x.to(dtype_of(storage)).to(torch.float64))


@pytest.mark.parametrize("storage", NARROW)
def test_every_value_of_a_16_bit_format_is_stored_as_itself(storage):
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype_of(storage)).to(torch.float64)
    assert same(store(x, storage), x)


@given(numbers=lists)
@MANY
def test_float64_is_stored_as_itself(numbers):
    x = torch.tensor(numbers, dtype=torch.float64)
    assert same(store(x, "float64"), x)


@pytest.mark.parametrize("storage", NARROW)
def test_a_double_just_beyond_a_midpoint_is_rounded_once_where_a_cast_of_torch_rounds_twice(storage):
    form = FORMATS[storage]
    above = 1 + form.unit + 2.0**-40  # beyond the midpoint of 1 and its upper neighbour, and not in float32
    x = torch.tensor([above, -above], dtype=torch.float64)
    once = [1 + 2 * form.unit, -1 - 2 * form.unit]
    assert store(x, storage).tolist() == once
    # the trap itself: through float32 the excess is lost, the tie is broken to even, and the result is 1
    assert x.to(torch.float32).to(dtype_of(storage)).tolist() == [1.0, -1.0]


@pytest.mark.parametrize("storage", STORED)
def test_ties_go_to_the_even_neighbour_and_zeros_keep_their_sign(storage):
    u = FORMATS[storage].unit
    x = torch.tensor([1 + u, 1 + 3 * u, -(1 + u), -(1 + 3 * u), 0.0, -0.0, -1e-300, 1e-300], dtype=torch.float64)
    wanted = [1.0, 1 + 4 * u, -1.0, -(1 + 4 * u), 0.0, -0.0, -0.0, 0.0]
    assert same(store(x, storage), np.array(wanted))


@pytest.mark.parametrize("storage", STORED)
def test_the_overflow_threshold_is_half_a_spacing_beyond_the_largest_value(storage):
    largest = FORMATS[storage].largest
    half = float(half_cell(torch.tensor([largest], dtype=torch.float64), storage)[0])
    below = math.nextafter(largest + half, 0)
    x = torch.tensor([largest, below, largest + half, -below, -largest - half], dtype=torch.float64)
    assert store(x, storage).tolist() == [largest, largest, math.inf, -largest, -math.inf]


@pytest.mark.parametrize("storage", STORED)
@given(pair=st.tuples(finite, finite))
@MANY
def test_storing_is_monotone(storage, pair):
    low, high = store(torch.tensor(sorted(pair), dtype=torch.float64), storage).tolist()
    assert low <= high


# --------------------------------------------------------------------------------------------------------- ulp


@pytest.mark.parametrize("storage", STORED)
@given(numbers=st.lists(finite, min_size=1, max_size=40))
@MANY
def test_the_spacing_of_any_double_in_range_is_the_oracles(storage, numbers):
    x = torch.tensor(numbers, dtype=torch.float64)
    x = x[x.abs() <= FORMATS[storage].largest]
    assert same(ulp(x, storage), oracle.ulp(x.numpy(), SHORT[storage]))


@pytest.mark.parametrize("storage", ["float64", "float32", "float16"])
def test_the_spacing_of_stored_values_is_numpys(storage):
    width = {"float64": np.float64, "float32": np.float32, "float16": np.float16}[storage]
    info = np.finfo(width)
    seeds = np.random.default_rng(0).standard_normal(4000) * 2.0 ** np.random.default_rng(1).integers(-30, 12, 4000)
    x = np.concatenate([seeds, [0, info.tiny, info.tiny / 2, info.smallest_subnormal, 1, 2, 0.5, 3]]).astype(width)
    spacing = np.spacing(np.abs(x)).astype(np.float64)
    assert same(ulp(torch.from_numpy(x.astype(np.float64)), storage), spacing)


@pytest.mark.parametrize("storage", NARROW)
def test_the_spacing_of_every_16_bit_value_is_the_way_to_the_next_bit_pattern(storage):
    patterns = torch.arange(0, 1 << 15, dtype=torch.int32).to(torch.int16)
    x = patterns.view(dtype_of(storage)).to(torch.float64)
    below_largest = x[1:].isfinite()
    gaps = (x[1:] - x[:-1])[below_largest]
    assert same(ulp(x[:-1][below_largest], storage), gaps)


@pytest.mark.parametrize("storage", ALL)
def test_the_unit_roundoff_is_half_the_spacing_of_one(storage):
    assert unit(storage) == torch.finfo(dtype_of(storage)).eps / 2
    assert float(ulp(torch.ones(1, dtype=torch.float64), storage)[0]) == 2 * unit(storage)


# -------------------------------------------------------------------------------------------------------- cell


def stored_values(storage: str) -> st.SearchStrategy[float]:
    widths = {"float32": 32, "float16": 16}
    if storage in widths:
        return st.floats(width=widths[storage], allow_nan=False, allow_infinity=False)
    patterns = st.integers(0, (1 << 16) - 1).map(lambda bits: np.uint32(bits << 16).view(np.float32).item())
    return patterns.filter(math.isfinite)


@pytest.mark.parametrize("storage", STORED)
@given(data=st.data())
@MANY
def test_a_number_lies_in_the_open_cell_of_a_value_exactly_when_it_is_stored_as_it(storage, data):
    y = data.draw(stored_values(storage))
    low, high = (float(end[0]) for end in cell(torch.tensor([y], dtype=dtype_of(storage)), storage))
    near = st.floats(-1.5, 1.5).map(lambda t: y + t * max(high - y, y - low))
    x = data.draw(near | st.sampled_from([low, high, math.nextafter(low, high), math.nextafter(high, low)]) | finite)
    kept = float(store(torch.tensor([x], dtype=torch.float64), storage)[0])
    if low < x < high:
        assert kept == y
    elif not low <= x <= high:
        assert kept != y


@pytest.mark.parametrize("storage", NARROW)
def test_the_cells_of_all_16_bit_values_meet_and_leave_no_gap(storage):
    patterns = torch.arange(0, 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype_of(storage))
    stored = patterns[patterns.isfinite()]
    for values, order in ((stored, 1), (-stored, -1)):
        low, high = cell(values, storage)
        upper, lower = (high[:-1], low[1:]) if order > 0 else (low[:-1], high[1:])
        assert torch.equal(upper, lower)
        assert torch.equal(2 * upper, values[:-1].to(torch.float64) + values[1:].to(torch.float64))


@pytest.mark.parametrize("storage", STORED)
def test_below_a_power_of_two_the_cell_is_half_as_wide_but_not_at_the_least_normal_number(storage):
    form = FORMATS[storage]
    for power, inward in ((0, 0.5), (3, 0.5), (form.least_exponent + 1, 0.5), (form.least_exponent, 1.0)):
        y = math.ldexp(1.0, power)
        outward = math.ldexp(form.unit, power)
        for sign in (1, -1):
            low, high = cell(torch.tensor([sign * y], dtype=dtype_of(storage)), storage)
            ends = sorted([sign * (y - inward * outward), sign * (y + outward)])
            assert [float(low[0]), float(high[0])] == ends


@pytest.mark.parametrize("storage", STORED)
def test_subnormals_and_zero_have_cells_of_the_smallest_spacing(storage):
    form = FORMATS[storage]
    least = math.ldexp(1.0, form.least_exponent - form.precision + 1)
    for count in (0, 1, 2, 3, 4, 7, 8, -1, -2, -4):
        low, high = cell(torch.tensor([count * least], dtype=dtype_of(storage)), storage)
        assert [float(low[0]), float(high[0])] == [(count - 0.5) * least, (count + 0.5) * least]


def test_the_cell_of_a_float64_is_the_value_itself():
    y = torch.tensor([1.0, -3.5, 0.0, 5e-324], dtype=torch.float64)
    low, high = cell(y, "float64")
    assert torch.equal(low, y)
    assert torch.equal(high, y)


@pytest.mark.parametrize("storage", STORED)
@given(numbers=st.lists(finite, min_size=1, max_size=40))
@MANY
def test_no_number_lies_farther_from_its_stored_value_than_half_a_cell(storage, numbers):
    x = torch.tensor(numbers, dtype=torch.float64)
    kept = store(x, storage)
    inside = kept.isfinite()
    assert bool(((x - kept).abs() <= half_cell(kept, storage))[inside].all())
    assert torch.equal(2 * half_cell(x, storage)[inside], ulp(x, storage)[inside])


# ------------------------------------------------------------------------------------------------------- gamma


@given(terms=st.integers(1, 1 << 20), bits=st.integers(24, 53))
def test_gamma_is_ku_over_one_less_ku(terms, bits):
    u = Fraction(1, 2**bits)
    assert gamma(terms, float(u)) == pytest.approx(float(terms * u / (1 - terms * u)), rel=1e-15)


@given(one=st.integers(1, 1000), other=st.integers(1, 1000))
def test_errors_of_two_sums_add_up_to_no_more_than_gamma_of_all_terms(one, other):
    u = unit("bfloat16") / 16
    g, h = gamma(one, u), gamma(other, u)
    assert g + h + g * h <= gamma(one + other, u) * (1 + 1e-12)


def test_gamma_knows_no_bound_once_the_terms_outweigh_the_format():
    assert gamma(2**24, 2.0**-24) == math.inf
    assert gamma(2**24 - 1, 2.0**-24) < math.inf
    assert gamma(0, 2.0**-24) == 0


# -------------------------------------------------------------------------------------------------- the orders

PAIRS = list(itertools.product(ALL, ALL))


@pytest.mark.parametrize(("storage", "base"), PAIRS)
def test_the_names_of_the_orders_are_unique_and_each_says_what_it_is(storage, base):
    orders = arithmetics(storage, base)
    assert len({one.name for one in orders}) == len(orders)
    assert len({one.says for one in orders}) == len(orders)
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize(("storage", "base"), PAIRS)
def test_an_order_runs_at_the_bases_dtype_only_where_that_is_another(storage, base):
    loads = {one.load for one in arithmetics(storage, base)}
    held = {"float16"} if storage == "bfloat16" else set()  # a bf16 checkpoint can have been an fp16 model
    assert loads - held == ({"merged"} if storage == base else {"merged", "base"})
    assert held <= loads


@pytest.mark.parametrize(("storage", "base"), PAIRS)
def test_wide_formats_have_no_orders_that_round_to_them_and_narrow_ones_have_all(storage, base):
    own = {one.name for one in arithmetics(storage, base) if one.load == "merged"}
    rounded = {"rounded-delta", "rounded-factors", "rounded-factors-and-delta", "storage-matmul"}
    rounded |= {"storage-product", "tf32-rounded-delta"}
    assert {"fp32-add", "fp64", "fp32-fused", "tf32"} <= own
    assert rounded & own == (rounded if storage in NARROW else set())
    assert ("through-fp16" in own) == (storage == "bfloat16")
    held = {one.name for one in arithmetics(storage, base) if one.load == "float16"}
    assert held == ({"held-in-fp16", "held-in-fp16-rounded-delta"} if storage == "bfloat16" else set())


@pytest.mark.parametrize(("storage", "base"), PAIRS)
def test_adapters_are_combined_in_the_storage_dtype_only_where_some_are_and_it_is_a_narrow_one(storage, base):
    plain, orders = arithmetics(storage, base), arithmetics(storage, base, combines=True)
    more = [one for one in orders if one not in plain]
    assert [one for one in orders if one in plain] == list(plain)
    assert all(one.combined == "kept" for one in plain)
    assert all(one.combined != "kept" and one.factors == "storage" for one in more)
    assert len(more) == 5 * len({storage, base} & set(NARROW))
    assert len({one.name for one in orders}) == len({one.says for one in orders}) == len(orders)


@pytest.mark.parametrize(("storage", "base"), PAIRS)
def test_a_copy_has_one_order_for_each_dtype_it_may_have_been_held_in(storage, base):
    names = ["fp32-add"] + ["held-in-fp16"] * (storage == "bfloat16") + [f"fp32-add-in-{base}"] * (storage != base)
    assert [one.name for one in conversions(storage, base)] == names
    assert len({one.load for one in conversions(storage, base)}) == len(names)


@pytest.mark.parametrize(("storage", "base"), PAIRS)
def test_the_plain_order_of_peft_comes_first(storage, base):
    assert arithmetics(storage, base)[0].name == "fp32-add"


@pytest.mark.parametrize("base", ["int8", "float8_e4m3fn", "uint8"])
@pytest.mark.parametrize("storage", ALL)
def test_a_base_of_a_dtype_whose_rounding_is_unknown_adds_no_order(storage, base):
    assert arithmetics(storage, base) == arithmetics(storage, storage)


def rounded_to(storage: str, base: str) -> set[str]:
    """The formats that some order of a merged tensor over a base rounds to."""
    orders = arithmetics(storage, base)
    named = {one.load for one in orders} - {"merged", "base"}
    return {one.through for one in orders if one.through} | named | {storage, base, "float32"}


@pytest.mark.parametrize(("storage", "base"), PAIRS)
@given(x=finite)
@settings(max_examples=60, deadline=None)
def test_no_rounding_of_any_order_exceeds_the_bound_for_all_of_them(storage, base, x):
    relative, absolute = any_rounding(storage, base)
    for form in rounded_to(storage, base) - {"float64"}:
        kept = float(oracle.round_to(x, SHORT[form]))
        assert math.isinf(kept) or abs(kept - x) <= relative * abs(x) + absolute


@pytest.mark.parametrize(("storage", "base"), PAIRS)
def test_the_bound_for_any_order_allows_for_tensor_cores_and_is_no_coarser_than_the_coarsest_rounding(storage, base):
    relative, absolute = any_rounding(storage, base)
    forms = [FORMATS[one] for one in (*rounded_to(storage, base), "float16")]
    assert rounding.TF32_UNIT <= relative <= max(rounding.TF32_UNIT, *(form.unit for form in forms))
    assert absolute <= max(2.0 ** (form.least_exponent - form.precision) for form in forms)


# -------------------------------------------------------------------------------------------- can these tests fail?


def test_control_a_store_that_rounds_twice_is_caught():
    numbers = torch.tensor([1 + unit("bfloat16") + 2.0**-40], dtype=torch.float64)
    twice = numbers.to(torch.float32).to(torch.bfloat16).to(torch.float64)
    assert not same(twice, oracle.round_to(numbers.numpy(), "bf16"))


def test_control_a_cell_that_forgets_the_narrow_side_of_a_power_of_two_is_caught():
    y = 2.0
    x = y - 0.75 * float(half_cell(torch.tensor([y], dtype=torch.float64), "bfloat16")[0])
    assert float(store(torch.tensor([x], dtype=torch.float64), "bfloat16")[0]) != y


def test_the_dtypes_that_a_plan_calls_modelled_are_those_whose_rounding_is() -> None:
    assert set(types.FLOATS) == set(FORMATS)
