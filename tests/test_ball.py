"""Balls enclose what float32 computes, in whatever order, and are no wider than they must be.

The producers here are plain NumPy and torch in float32: left to right, backwards, shuffled, in blocks, with fused
multiply-add, with factors cut to TF32. What they give must lie in the ball that was computed without them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_check import ball as ball_module
from lora_check.ball import Ball, norm, root, squares
from lora_check.rounding import TF32_UNIT

torch.set_num_threads(1)

U = 2.0**-24
U64 = 2.0**-53
F32 = np.float32
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
MANY = settings(max_examples=150, deadline=None)

INNER = (1, 2, 3, 6, 17, 64)
RELATIVE = (0.0, U, TF32_UNIT, 0.1)

seeds = st.integers(0, 2**32 - 1)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)
radii = st.sampled_from((0.0, 2.0**-30, U, TF32_UNIT, 0.25, 2.0))
places = st.sampled_from((-1.0, 1.0)) | st.floats(-1, 1)


def tensor(x: np.ndarray | float) -> torch.Tensor:
    return torch.from_numpy(np.atleast_1d(np.asarray(x, np.float64)))


def around(mid: np.ndarray, rad: np.ndarray) -> Ball:
    return Ball(tensor(mid), tensor(rad), U)


def inside(mid: np.ndarray, rad: np.ndarray, place: np.ndarray | float) -> np.ndarray:
    """A float32 in the ball, as far from the middle as `place` says if float32 has one there; mid is a float32."""
    x = (mid.astype(np.float64) + place * rad).astype(F32)
    return np.where(np.abs(x.astype(np.float64) - mid) <= rad, x, mid).astype(F32)


def encloses(ball: Ball, x: np.ndarray | torch.Tensor) -> bool:
    seen = torch.as_tensor(np.asarray(x), dtype=torch.float64).reshape(ball.mid.shape)
    return bool(((seen - ball.mid).abs() <= ball.rad).all())


# ------------------------------------------------------------------------------------------- float32 in many orders


def sums(terms: list[np.ndarray], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Add float32 arrays left to right, backwards, shuffled, pairwise, and in two blocks."""
    for order in (range(len(terms)), range(len(terms))[::-1], rng.permutation(len(terms))):
        total = np.zeros_like(terms[0])
        for index in order:
            total = (total + terms[index]).astype(F32)
        yield total
    level = list(terms)
    while len(level) > 1:
        level = [(a + b).astype(F32) for a, b in zip(level[::2], level[1::2], strict=False)] + level[len(level) & ~1 :]
    yield level[0]
    half = len(terms) // 2
    if half:
        one, other = np.zeros_like(terms[0]), np.zeros_like(terms[0])
        for term in terms[:half]:
            one = (one + term).astype(F32)
        for term in terms[half:]:
            other = (other + term).astype(F32)
        yield (one + other).astype(F32)


def products(b: np.ndarray, a: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """B A of float32 matrices as a BLAS, a loop, a tree and a machine with fused multiply-add would give it."""
    yield (torch.from_numpy(b) @ torch.from_numpy(a)).numpy()
    yield from sums([(b[:, [k]] * a[[k]]).astype(F32) for k in range(b.shape[1])], rng)
    fused = np.zeros((b.shape[0], a.shape[1]), F32)
    for k in rng.permutation(b.shape[1]):
        fused = (fused.astype(np.float64) + b[:, [k]].astype(np.float64) * a[[k]]).astype(F32)
    yield fused


def drawn(rng: np.random.Generator, shape: tuple[int, ...], spread: int) -> np.ndarray:
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread + 1, shape)).astype(F32)


def cancelling(rng: np.random.Generator, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors whose terms come in pairs that all but annihilate each other."""
    b, a = drawn(rng, (3, k), 3), drawn(rng, (k, 4), 3)
    half = k // 2
    b[:, half : 2 * half] = -b[:, :half]
    a[half : 2 * half] = np.nextafter(a[:half], F32(np.inf)) if rng.random() < 0.5 else a[:half]
    return b, a


def factors(rng: np.random.Generator, k: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    if kind == "cancelling":
        return cancelling(rng, k)
    spread = {"even": 0, "spread": 12}[kind]
    return drawn(rng, (3, k), spread), drawn(rng, (k, 4), spread)


KINDS = ("even", "spread", "cancelling")

# ----------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", INNER)
@given(seed=seeds, relative=st.sampled_from(RELATIVE), place=st.sampled_from((-1.0, 0.0, 1.0, None)))
@settings(max_examples=15, deadline=None)
def test_a_matrix_product_encloses_every_order_of_its_sums(k, kind, seed, relative, place):
    rng = np.random.default_rng(seed)
    b, a = factors(rng, k, kind)
    rb, ra = relative * np.abs(b), relative * np.abs(a)
    enclosed = around(b, rb) @ around(a, ra)
    at = place if place is not None else rng.uniform(-1, 1, b.shape)
    b, a = inside(b, rb, at), inside(a, ra, at if place is not None else rng.uniform(-1, 1, a.shape))
    assert all(encloses(enclosed, x) for x in products(b, a, rng))


def cut_to_tf32(x: np.ndarray, how: str) -> np.ndarray:
    """Ten explicit mantissa bits are kept; the other thirteen are dropped, or rounded to nearest."""
    bits = x.view(np.uint32)
    if how == "rounded":
        bits = bits + np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return (bits & np.uint32(0xFFFFE000)).view(F32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["rounded", "truncated"])
@given(seed=seeds, k=st.sampled_from(INNER))
@settings(max_examples=30, deadline=None)
def test_factors_widened_for_tf32_enclose_products_of_tensor_cores(how, kind, seed, k):
    rng = np.random.default_rng(seed)
    b, a = factors(rng, k, kind)
    wide = [Ball.exactly(torch.from_numpy(x), U).widened(TF32_UNIT) for x in (b, a)]
    assert all(encloses(wide[0] @ wide[1], x) for x in products(cut_to_tf32(b, how), cut_to_tf32(a, how), rng))


@given(seed=seeds, k=st.sampled_from(INNER))
@settings(max_examples=50, deadline=None)
def test_a_product_of_float64_balls_encloses_float64_products(seed, k):
    rng = np.random.default_rng(seed)
    b, a = (x.astype(np.float64) for x in cancelling(rng, k))
    b, a = b * (1 + U64 * rng.integers(-8, 8, b.shape)), a * (1 + 0.1 * rng.standard_normal(a.shape))
    enclosed = Ball.exactly(tensor(b), U64) @ Ball.exactly(tensor(a), U64)
    for order in (range(k), range(k)[::-1], rng.permutation(k)):
        total = np.zeros((3, 4))
        for index in order:
            total = total + b[:, [index]] * a[[index]]
        assert encloses(enclosed, total)


def test_a_product_whose_terms_underflow_is_enclosed():
    # every term is 0.49 of the smallest subnormal: each product is stored as 0, the true sum is almost three of it
    tiny = F32(0.7 * 2.0**-75)
    b, a = np.full((1, 6), tiny), np.full((6, 1), F32(0.7) * F32(2.0**-74))
    enclosed = Ball.exactly(torch.from_numpy(b), U) @ Ball.exactly(torch.from_numpy(a), U)
    assert all(encloses(enclosed, x) for x in products(b, a, np.random.default_rng(0)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", INNER)
@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_the_radius_of_a_product_is_below_four_times_k_plus_2_roundings(k, kind, seed):
    b, a = factors(np.random.default_rng(seed), k, kind)
    radius = (Ball.exactly(torch.from_numpy(b), U) @ Ball.exactly(torch.from_numpy(a), U)).rad.numpy()
    assert (radius <= 4 * (k + 2) * U * (np.abs(b).astype(np.float64) @ np.abs(a)) + 2.0**-140).all()


@pytest.mark.parametrize("k", INNER)
def test_some_order_uses_a_fair_share_of_the_radius_of_a_product(k):
    rng = np.random.default_rng(k)
    shares = []
    for _ in range(60):
        b, a = factors(rng, k, "even")
        ball = Ball.exactly(torch.from_numpy(b), U) @ Ball.exactly(torch.from_numpy(a), U)
        shares += [((torch.from_numpy(x).double() - ball.mid).abs() / ball.rad).max() for x in products(b, a, rng)]
    # rounding errors add up like a random walk, the radius like its longest path: a factor of about sqrt(k) is lost
    assert max(shares) > 0.3 / math.sqrt(k)


# ------------------------------------------------------------------------------------- sums, products, quotients


@given(x=floats, y=floats, rx=radii, ry=radii, tx=places, ty=places)
@MANY
def test_a_sum_encloses_float32_sums_of_all_its_members(x, y, rx, ry, tx, ty):
    a, b = F32(x), F32(y)
    ra, rb = rx * abs(float(a)), ry * abs(float(b))
    assert encloses(around(a, ra) + around(b, rb), np.add(inside(a, ra, tx), inside(b, rb, ty), dtype=F32))


@given(x=floats, y=floats, rx=radii, ry=radii, tx=places, ty=places)
@MANY
def test_an_elementwise_product_encloses_float32_products_of_all_its_members(x, y, rx, ry, tx, ty):
    a, b = F32(x), F32(y)
    ra, rb = rx * abs(float(a)), ry * abs(float(b))
    assert encloses(around(a, ra) * around(b, rb), np.multiply(inside(a, ra, tx), inside(b, rb, ty), dtype=F32))


@given(x=floats, s=st.sampled_from((2.5, 15 / math.sqrt(6), 1 / 3, 0.1, 1.3, -0.7)) | st.floats(0.001, 1000))
@MANY
def test_a_scaled_ball_encloses_what_torch_gives_for_a_tensor_times_a_python_number(x, s):
    # torch rounds the number to float32 before it multiplies: two roundings, not one
    value = torch.tensor([x], dtype=torch.float32)
    assert encloses(Ball.exactly(value, U) * s, value * s)


@given(x=floats, y=st.floats(2.0**-20, 2.0**20, width=32), rx=radii, ry=st.sampled_from((0.0, U, 0.1)), t=places)
@MANY
def test_a_quotient_encloses_float32_quotients_of_all_its_members(x, y, rx, ry, t):
    a, b = F32(x), F32(y)
    ra, rb = rx * abs(float(a)), ry * float(b)
    for other in (t, -t):
        seen = np.divide(inside(a, ra, t), inside(b, rb, other), dtype=F32)
        assert encloses(around(a, ra) / around(b, rb), seen)


@given(x=floats, y=floats)
@MANY
def test_sums_and_products_of_exact_balls_are_wide_by_no_more_than_two_roundings(x, y):
    a, b = (Ball.exactly(torch.tensor([value], dtype=torch.float32), U) for value in (x, y))
    for ball in (a + b, a * b):
        assert float(ball.rad[0]) <= 2 * U * abs(float(ball.mid[0])) + 2.0**-148


# ----------------------------------------------------------------------------------------------- stored, widened


@pytest.mark.parametrize("storage", SHORT)
@given(x=floats, relative=radii, place=places)
@MANY
def test_a_stored_ball_encloses_every_stored_member(storage, x, relative, place):
    a = F32(x)
    rad = relative * abs(float(a))
    member = inside(a, np.float64(rad), place)
    kept = oracle.round_to(member, SHORT[storage])
    assume(np.isfinite(oracle.round_to(abs(float(a)) + rad, SHORT[storage])))
    ball = around(a, rad).stored(storage)
    slack = 2 * U64 * float(ball.bound[0])  # the middle of two numbers of very different size is itself rounded
    assert abs(float(kept) - float(ball.mid[0])) <= float(ball.rad[0]) + slack


@pytest.mark.parametrize("storage", SHORT)
@given(x=floats, relative=radii)
@MANY
def test_both_ends_of_a_stored_ball_are_stored_members(storage, x, relative):
    rad = relative * abs(x)
    assume(np.isfinite(oracle.round_to(abs(x) + rad, SHORT[storage])))
    low, high = around(F32(x), rad).ends(storage)
    mid = float(F32(x))
    assert float(low[0]) == float(oracle.round_to(mid - rad, SHORT[storage]))
    assert float(high[0]) == float(oracle.round_to(mid + rad, SHORT[storage]))
    ball = around(F32(x), rad).stored(storage)
    assert float(ball.rad[0]) <= (float(high[0]) - float(low[0])) / 2 * (1 + U64)


@pytest.mark.parametrize("storage", SHORT)
def test_an_exact_ball_that_is_stored_stays_exact(storage):
    x = torch.tensor([1.0, 1.3, -2.7e-3, 0.0, 65504.0], dtype=torch.float32)
    ball = Ball.exactly(x, U).stored(storage)
    assert ball.is_exact
    assert ball.mid.tolist() == oracle.round_to(x.numpy(), SHORT[storage]).tolist()


@given(x=floats, relative=st.sampled_from((U, TF32_UNIT, 0.1)), place=places)
@MANY
def test_a_widened_ball_encloses_relative_errors_of_that_size(x, relative, place):
    ball = Ball.exactly(torch.tensor([x], dtype=torch.float32), U).widened(relative)
    assert encloses(ball, np.float64(F32(x)) * (1 + 0.99 * relative * place))


def test_slices_reshapes_and_transposes_move_middle_and_radius_together():
    mid = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    ball = Ball(mid, mid / 8, U)
    for changed in (ball[1:3], ball.T, ball.reshape(6, 4), ball.reshape(-1, 1), ball[:, 2]):
        assert torch.equal(changed.rad, changed.mid / 8)
        assert changed.u == U
    assert torch.equal(ball.T.mid, mid.T)
    assert torch.equal(ball[1:3].mid, mid[1:3])


def test_a_clone_is_a_ball_of_its_own_and_rows_put_into_it_bring_their_radius():
    mid = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    ball = Ball(mid.clone(), mid / 8, U)
    copy = ball.clone()
    copy[2] = Ball(mid[0] + 100, mid[0] + 3, U)
    copy[0:1] = ball[3:4]
    assert copy.u == U
    assert torch.equal(copy.mid, torch.stack([mid[3], mid[1], mid[0] + 100, mid[3]]))
    assert torch.equal(copy.rad, torch.stack([mid[3] / 8, mid[1] / 8, mid[0] + 3, mid[3] / 8]))
    assert torch.equal(ball.mid, mid)
    assert torch.equal(ball.rad, mid / 8)


# -------------------------------------------------------------------------------------------------------- norms


def norms32(x: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The float32 norm of each row, its squares added in many orders."""
    yield torch.linalg.vector_norm(torch.from_numpy(x), dim=1).numpy()
    yield torch.linalg.norm(torch.from_numpy(x), dim=1).numpy()
    yield torch.from_numpy(x).pow(2).sum(1).sqrt().numpy()
    for total in sums([np.square(x[:, i]).astype(F32) for i in range(x.shape[1])], rng):
        yield np.sqrt(total).astype(F32)


def moved(seed: int, shape: tuple[int, int], relative: float) -> tuple[Ball, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    mid = drawn(rng, shape, int(rng.integers(0, 9)))
    rad = relative * np.abs(mid)
    return around(mid, rad), inside(mid, rad, rng.uniform(-1, 1, shape)), rng


@given(seed=seeds, columns=st.integers(1, 70), relative=st.sampled_from(RELATIVE))
@settings(max_examples=100, deadline=None)
def test_a_norm_encloses_float32_norms_in_every_order(seed, columns, relative):
    ball, x, rng = moved(seed, (3, columns), relative)
    assert all(encloses(norm(ball), seen) for seen in norms32(x, rng))


@given(seed=seeds, rows=st.integers(1, 70), tile=st.integers(1, 70), relative=st.sampled_from(RELATIVE))
@settings(max_examples=100, deadline=None)
def test_column_norms_gathered_over_tiles_enclose_float32_norms_in_every_order(seed, rows, tile, relative):
    ball, x, rng = moved(seed, (rows, 3), relative)
    gathered = sum(squares(ball[start : start + tile]) for start in range(0, rows, tile))
    enclosed = root(gathered, rows, ball)
    assert all(encloses(enclosed, seen) for seen in norms32(np.ascontiguousarray(x.T), rng))


@given(seed=seeds, columns=st.integers(1, 70))
@settings(max_examples=50, deadline=None)
def test_the_radius_of_a_norm_of_exact_numbers_is_below_k_plus_4_roundings(seed, columns):
    ball = norm(moved(seed, (3, columns), 0.0)[0])
    assert bool((ball.rad <= (columns + 4) * U * ball.mid + 2.0**-148).all())


def test_norms_of_tensors_are_numpys():
    x = torch.from_numpy(drawn(np.random.default_rng(5), (7, 11), 3)).double()
    assert norm(x).numpy() == pytest.approx(np.linalg.norm(x.numpy(), axis=1, keepdims=True), rel=1e-14)
    gathered = squares(x[:3]) + squares(x[3:])
    assert root(gathered, 7, x).numpy() == pytest.approx(np.linalg.norm(x.numpy(), axis=0, keepdims=True), rel=1e-14)


@given(seed=seeds, columns=st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_a_whole_formula_with_a_norm_encloses_its_float32_evaluations(seed, columns):
    rng = np.random.default_rng(seed)
    w, b, a = drawn(rng, (3, columns), 1), drawn(rng, (3, 5), 1), drawn(rng, (5, columns), 1)
    m = np.abs(drawn(rng, (3, 1), 1)) + F32(0.1)
    balls = [Ball.exactly(torch.from_numpy(x), U) for x in (w, b, a, m)]
    v = balls[0] + balls[1] @ balls[2]
    enclosed = balls[3] / norm(v) * v
    for product in products(b, a, rng):
        moved_weight = (w + product).astype(F32)
        for length in norms32(moved_weight, rng):
            ratio = (m / length.reshape(-1, 1)).astype(F32)
            assert encloses(enclosed, (ratio * moved_weight).astype(F32))


# -------------------------------------------------------------------------------------------- can these tests fail?


def test_control_a_python_number_taken_for_exact_is_found_out(monkeypatch):
    x = torch.from_numpy(drawn(np.random.default_rng(2), (400,), 3))
    s = 15 / math.sqrt(6)  # 0.4 roundings from the nearest float32
    assert encloses(Ball.exactly(x, U) * s, x * s)
    monkeypatch.setattr(Ball, "__mul__", lambda self, other: self._rounded(self.mid * other, self.rad * abs(other)))
    assert not encloses(Ball.exactly(x, U) * s, x * s)


def test_control_without_the_bound_on_sums_a_product_does_not_enclose(monkeypatch):
    monkeypatch.setattr(ball_module, "gamma", lambda terms, u: 0.0)
    rng = np.random.default_rng(1)
    b, a = factors(rng, 17, "even")
    enclosed = Ball.exactly(torch.from_numpy(b), U) @ Ball.exactly(torch.from_numpy(a), U)
    assert not all(encloses(enclosed, x) for x in products(b, a, rng))


def test_control_half_a_rounding_is_found_out_to_be_too_little_for_two_terms(monkeypatch):
    monkeypatch.setattr(ball_module, "gamma", lambda terms, u: 0.5 * u)
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(40):
        b, a = factors(rng, 2, "cancelling")
        enclosed = Ball.exactly(torch.from_numpy(b), U) @ Ball.exactly(torch.from_numpy(a), U)
        found += not all(encloses(enclosed, x) for x in products(b, a, rng))
    assert found


def test_control_a_radius_a_thousand_times_too_wide_is_found_out(monkeypatch):
    true = ball_module.gamma
    monkeypatch.setattr(ball_module, "gamma", lambda terms, u: 1000 * true(terms, u))
    b, a = factors(np.random.default_rng(1), 6, "even")
    radius = (Ball.exactly(torch.from_numpy(b), U) @ Ball.exactly(torch.from_numpy(a), U)).rad.numpy()
    assert (radius > 4 * (6 + 2) * U * (np.abs(b) @ np.abs(a))).all()
