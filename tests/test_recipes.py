"""Every recipe, walked in float64, is the formula that the oracle writes down and that a hand can follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import oracle
import pytest
import torch

from lora_check import registry
from lora_check import replay as replay_module
from lora_check.ball import Ball, norm
from lora_check.number_kinds import Bounds, dtype_of, load_dtype
from lora_check.replay import expected, replay, stops, tiles
from lora_check.rounding import ADD, HELD_IN_FP16, TF32, TF32_UNIT, THROUGH_FP16
from lora_check.types import Case, LoadedStep, Recipe, Scale, Site

torch.set_num_threads(1)

RECIPES = {
    name: one
    for name, one in registry.load("recipes").items()
    if not one.method and not one.prepare and not name.startswith("kasa")
}
"""LoRA's own formulas; those of other tuners, and of bases that a start decomposes, are held against live PEFT."""

DTYPES = ("float32", "float16", "bfloat16", "float64")
U64 = 2.0**-53
R, ALPHA = 6, 15.0  # no square, and another number than alpha
SCALE = Scale(alpha=ALPHA, rank=R, default_alpha=ALPHA, default_rank=R)
S = 2.5
TOKENS = (9, 0, 4)

Tensors = dict[str, torch.Tensor]
Array = np.ndarray


@dataclass(frozen=True)
class World:
    """One recipe at one shape: what its tensors measure and, in the oracle's words, what it computes."""

    recipe: str
    shape: tuple[int, ...]
    roles: dict[str, tuple[int, ...]]
    kind: str = ""
    multihead: bool = False
    in_out: bool = False
    also: tuple[str, ...] = ()  # recipes that follow it with the same factors

    @property
    def dora(self) -> bool:
        return "m" in self.roles

    @property
    def deltas(self) -> bool:
        return RECIPES[self.recipe].product is not None


def world(recipe: str, shape: tuple[int, ...], kind: str, **more: object) -> World:
    """Give the factors of `kind` the shapes that fit a weight of that shape."""
    prefix = "embedding_" if kind == "embedding" else ""
    if kind == "conv":
        a, b, m = (R, *shape[1:]), (shape[0], R, *(1 for _ in shape[2:])), (1, shape[0], *(1 for _ in shape[2:]))
    elif kind == "linear":
        a, b, m = (R, shape[1]), (shape[0], R), (shape[0],)
    else:
        a, b, m = (R, shape[0]), (shape[1], R), (shape[1],)
    roles = {f"{prefix}A": a, f"{prefix}B": b} | ({"m": m} if recipe.startswith("dora") else {})
    return World(recipe, shape, roles, kind, **more)  # type: ignore[arg-type]


WORLDS = {
    "lora-linear": world("lora-linear", (10, 14), "linear"),
    "lora-linear-in-out": world("lora-linear-in-out", (14, 10), "conv1d_t"),
    "lora-embedding": world("lora-embedding", (14, 10), "embedding"),
    "lora-conv-1d": world("lora-conv", (10, 4, 3), "conv"),
    "lora-conv-2d": world("lora-conv", (10, 4, 3, 2), "conv"),
    "lora-conv-3d": world("lora-conv", (5, 4, 3, 2, 2), "conv"),
    "lora-bias": World("lora-bias", (10,), {"bias": (10,)}),
    "lora-mha-out": world("lora-mha-out", (12, 12), "linear", multihead=True, also=("lora-linear",)),
    "dora-linear": world("dora-linear", (10, 14), "linear"),
    "dora-linear-in-out": world("dora-linear-in-out", (14, 10), "conv1d_t"),
    "dora-embedding": world("dora-embedding", (14, 10), "embedding"),
    "dora-conv-1d": world("dora-conv", (10, 4, 3), "conv"),
    "dora-conv-2d": world("dora-conv", (10, 4, 3, 2), "conv"),
    "dora-conv-3d": world("dora-conv", (5, 4, 3, 2, 2), "conv"),
    "copy": World("copy", (10, 14), {"S": (10, 14)}),
    "copy-of-a-kernel": World("copy", (10, 4, 3), {"S": (10, 4, 3)}),
    "copy-of-a-bias": World("copy", (10,), {"S": (10,)}),
    "token-rows": World("token-rows", (14, 10), {"rows": (3, 10)}),
    "identity": World("identity", (10, 14), {}),
}
ADDING = [name for name, one in WORLDS.items() if one.deltas]
DORA = [name for name, one in WORLDS.items() if one.dora]
FLIPPING = [name for name, one in RECIPES.items() if one.flipped]

every_world = pytest.mark.parametrize("name", WORLDS)
every_dtype = pytest.mark.parametrize("storage", DTYPES)


def drawn(one: World, storage: str, seed: int = 0) -> tuple[torch.Tensor, Tensors]:
    """A base and factors, all held in `storage`."""
    rng = torch.Generator().manual_seed(seed)
    dtype = dtype_of(storage)
    base = torch.randn(one.shape, generator=rng).to(dtype)
    factors = {role: torch.randn(shape, generator=rng).mul(0.3).to(dtype) for role, shape in one.roles.items()}
    if one.dora:
        factors["m"] = factors["m"].abs() + 2
    return base, factors


def case_of(one: World, base: torch.Tensor, factors: Tensors, storage: str, scale: Scale = SCALE) -> Case:
    step = LoadedStep(
        recipe=RECIPES[one.recipe],
        factors=factors,
        scale=scale if one.deltas else None,
        tokens=TOKENS if "rows" in factors else (),
    )
    after = tuple(replace(step, recipe=RECIPES[name]) for name in one.also)
    return Case(base=base.reshape(base.shape[0], -1), steps=(step, *after), storage=storage)


def walked(case: Case, step: int | None = None) -> Array:
    """All rows of what is expected, in tiles of `step` rows."""
    walk, size = expected(case), step or case.rows
    parts = [walk.rows(slice(start, min(start + size, case.rows))).total for start in range(0, case.rows, size)]
    return torch.cat(parts).numpy()


def told(one: World, base: torch.Tensor, factors: Tensors, s: float = S) -> tuple[Array, Array]:
    """What the oracle says of the same tensors, and how far two float64 evaluations of it may lie apart."""
    w = base.double().numpy()
    f = {role.removeprefix("embedding_"): tensor.double().numpy() for role, tensor in factors.items()}
    if not one.deltas:
        merged = f.get("S", w)
        if "rows" in f:
            merged = w.copy()
            merged[list(TOKENS)] = f["rows"]
        return merged.reshape(len(w), -1), np.zeros_like(w).reshape(len(w), -1)
    if "bias" in f:
        merged, room = w + s * f["bias"], 4 * U64 * (np.abs(w) + abs(s * f["bias"]))
        return merged.reshape(len(w), -1), room.reshape(len(w), -1)
    kind = {True: "mha_out", False: one.kind}[one.multihead]
    moved = w + oracle.DELTAS[kind](f["A"], f["B"], s)
    size = np.abs(w) + oracle.DELTAS[kind](np.abs(f["A"]), np.abs(f["B"]), abs(s))
    # r products and their sums, the scale, the addition: each side rounds no more than r + 3 times
    room = 2 * (R + 3) * U64 * size
    if "m" in f:
        # n squares and their sum, a root, a quotient, a product; and every error of V, in V and in its length
        ratio = f["m"].reshape(oracle.lengths(moved, one.kind).shape) / oracle.lengths(moved, one.kind)
        terms = moved.size // f["m"].size
        spread = ratio * oracle.lengths(room, one.kind) / oracle.lengths(moved, one.kind)
        merged = oracle.dora(moved, f["m"], one.kind)
        room = ratio * room + (spread + 2 * (terms + 4) * U64 * ratio) * np.abs(moved)
        return merged.reshape(len(w), -1), room.reshape(len(w), -1)
    return moved.reshape(len(w), -1), room.reshape(len(w), -1)


# --------------------------------------------------------------------------------------------------- the formula


def test_every_recipe_of_the_registry_is_tried_here():
    assert {one.recipe for one in WORLDS.values()} == set(RECIPES)


@every_world
@every_dtype
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_expected_is_what_the_oracle_says(name, storage, seed):
    one = WORLDS[name]
    base, factors = drawn(one, storage, seed)
    wanted, room = told(one, base, factors)
    assert (np.abs(walked(case_of(one, base, factors, storage)) - wanted) <= room).all()


@pytest.mark.parametrize("name", ADDING)
@pytest.mark.parametrize(
    ("scale", "s"),
    [
        (Scale(alpha=15.0, rank=6, default_alpha=15.0, default_rank=6), 2.5),
        (Scale(alpha=15.0, rank=6, rule="alpha/sqrt(r)", default_alpha=15.0, default_rank=6), 15 / math.sqrt(6)),
        (Scale(alpha=9.0, rank=6, default_alpha=15.0, default_rank=5), 1.5),
        (Scale(alpha=15.0, rank=6, default_alpha=15.0, default_rank=6, weight=-0.7), -1.75),
        (
            Scale(alpha=9.0, rank=5, rule="alpha/sqrt(r)", default_alpha=1.0, default_rank=2, weight=2),
            18 / math.sqrt(5),
        ),
    ],
    ids=["plain", "rslora", "pattern", "weighted", "weighted-rslora"],
)
def test_the_scale_of_a_step_is_the_one_its_ingredients_give(name, scale, s):
    one = WORLDS[name]
    base, factors = drawn(one, "float32")
    wanted, room = told(one, base, factors, s)
    assert scale.value == pytest.approx(s, rel=4 * U64)
    assert (np.abs(walked(case_of(one, base, factors, "float32", scale)) - wanted) <= 2 * room).all()


def test_a_step_without_a_scale_adds_its_product_as_it_is():
    one = WORLDS["lora-linear"]
    base, factors = drawn(one, "float32")
    case = case_of(one, base, factors, "float32")
    bare = replace(case, steps=(replace(case.steps[0], scale=None),))
    wanted, room = told(one, base, factors, 1.0)
    assert (np.abs(walked(bare) - wanted) <= room).all()


@every_dtype
def test_steps_of_two_adapters_and_a_copy_follow_one_another(storage):
    one, token = WORLDS["lora-embedding"], WORLDS["token-rows"]
    base, first = drawn(one, storage, 3)
    _, second = drawn(one, storage, 4)
    _, rows = drawn(token, storage, 5)
    _, saved = drawn(WORLDS["copy"], storage, 6)
    whole = {"S": saved["S"].T.contiguous()}
    steps = (
        case_of(WORLDS["copy"], base, whole, storage).steps[0],
        case_of(token, base, rows, storage).steps[0],
        case_of(one, base, first, storage).steps[0],
        case_of(one, base, second, storage, replace(SCALE, alpha=3.0)).steps[0],
    )
    replaced, _ = told(token, whole["S"], rows)
    moved, room = told(one, torch.from_numpy(replaced), first)
    wanted, more = told(one, torch.from_numpy(moved), second, 0.5)
    seen = walked(Case(base=base, steps=steps, storage=storage))
    assert (np.abs(seen - wanted) <= room + more).all()


@every_world
def test_the_shapes_of_a_recipe_fit_it_and_no_other(name):
    one = WORLDS[name]
    site = Site(parameter="some.weight", shape=one.shape, roles=one.roles, in_out=one.in_out, multihead=one.multihead)
    assert [recipe.name for recipe in RECIPES.values() if recipe.fits(site)] == [one.recipe]


@pytest.mark.parametrize(
    ("shape", "roles"),
    [
        ((10, 14), {"A": (6, 10), "B": (14, 5)}),
        ((10, 14), {"A": (6, 13), "B": (10, 6)}),
        ((10, 4, 3), {"A": (6, 4, 5), "B": (10, 6, 1)}),
        ((10, 4, 3), {"A": (6, 2, 3), "B": (10, 6, 1)}),
        ((10, 4, 3), {"A": (6, 4, 3), "B": (10, 6, 1), "m": (10, 1, 1, 1, 4)}),
        ((10, 4, 3), {"A": (6, 4), "B": (10, 6)}),
        ((10, 14), {"A": (6, 14, 1), "B": (10, 6, 1)}),
        ((14, 10), {"A": (6, 14, 1), "B": (10, 6, 1)}),
        ((10, 14), {"A": (6, 14), "B": (10, 6, 1)}),
        ((14, 10), {"embedding_A": (6, 13), "embedding_B": (10, 6)}),
        ((10,), {"bias": (9,)}),
        ((14, 10), {"rows": (3, 9)}),
    ],
    ids=[
        "rank",
        "input",
        "kernel",
        "groups",
        "magnitude",
        "matrices-for-a-kernel",
        "kernels-for-a-matrix",
        "kernels-for-in-out",
        "a-matrix-and-a-kernel",
        "vocabulary",
        "bias",
        "rows",
    ],
)
def test_factors_that_cannot_make_the_weight_fit_no_recipe(shape, roles):
    site = Site(parameter="some.weight", shape=shape, roles=roles)
    assert [recipe.name for recipe in RECIPES.values() if recipe.fits(site)] == []


# ------------------------------------------------------------------------------------------------------ by hand

HOT_A = torch.tensor([[0.0, 0, 0], [0, 0, 4]])  # A[1, 2] = 4
HOT_B = torch.tensor([[0.0, 0], [0, 3]])  # B[1, 1] = 3, so B A is 12 at output 1, input 2
HALVES = Scale(alpha=3.0, rank=2, default_alpha=3.0, default_rank=2)  # s = 1.5, so the delta there is 18
KERNEL = torch.zeros(2, 2, 2).index_put((torch.tensor(1), torch.tensor(0), torch.tensor(1)), torch.tensor(4.0))

BY_HAND = {
    "lora-linear": ([[1, 2, 3], [4, 5, 6]], {"A": HOT_A, "B": HOT_B}, [[1, 2, 3], [4, 5, 24]]),
    "lora-linear-in-out": ([[1, 2], [3, 4], [5, 6]], {"A": HOT_A, "B": HOT_B}, [[1, 2], [3, 4], [5, 24]]),
    "lora-embedding": (
        [[1, 2], [3, 4], [5, 6]],
        {"embedding_A": HOT_A, "embedding_B": HOT_B},
        [[1, 2], [3, 4], [5, 24]],
    ),
    "lora-conv": (
        [[1, 2, 3, 4], [5, 6, 7, 8]],
        {"A": KERNEL, "B": HOT_B[:, :, None]},
        [[1, 2, 3, 4], [5, 24, 7, 8]],
    ),
    "lora-bias": ([[1], [2]], {"bias": torch.tensor([0.0, 4])}, [[1], [8]]),
    "lora-mha-out": ([[1, 2], [3, 4]], {"A": HOT_A[:, 1:], "B": HOT_B}, [[1, 2], [3, 40]]),
    # V = (0, 2, 0) and (3, 0, 4), as long as 2 and 5, to be made 7 and 10 long
    "dora-linear": (
        [[0, 2, 0], [3, 0, -14]],
        {"A": HOT_A, "B": HOT_B, "m": torch.tensor([7.0, 10])},
        [[0, 7, 0], [6, 0, 8]],
    ),
    "dora-linear-in-out": (
        [[0, 3], [2, 0], [0, -14]],
        {"A": HOT_A, "B": HOT_B, "m": torch.tensor([7.0, 10])},
        [[0, 6], [7, 0], [0, 8]],
    ),
    "dora-embedding": (
        [[0, 3], [2, 0], [0, -14]],
        {"embedding_A": HOT_A, "embedding_B": HOT_B, "m": torch.tensor([7.0, 10])},
        [[0, 6], [7, 0], [0, 8]],
    ),
    "dora-conv": (
        [[0, 0, 2, 0], [0, -14, 3, 0]],
        {"A": KERNEL, "B": HOT_B[:, :, None], "m": torch.tensor([7.0, 10]).reshape(1, 2, 1)},
        [[0, 0, 7, 0], [0, 8, 6, 0]],
    ),
    "copy": ([[1, 2], [3, 4]], {"S": torch.tensor([[5.0, 6], [7, 8]])}, [[5, 6], [7, 8]]),
    "token-rows": (
        [[1, 2], [3, 4], [5, 6]],
        {"rows": torch.tensor([[70.0, 80], [10, 20]])},
        [[10, 20], [3, 4], [70, 80]],
    ),
    "identity": ([[1, 2], [3, 4]], {}, [[1, 2], [3, 4]]),
}


@pytest.mark.parametrize("name", RECIPES)
@every_dtype
def test_a_case_small_enough_for_pencil_and_paper(name, storage):
    base, factors, wanted = BY_HAND[name]
    recipe: Recipe = RECIPES[name]
    step = LoadedStep(
        recipe=recipe,
        factors={role: tensor.to(dtype_of(storage)) for role, tensor in factors.items()},
        scale=None if recipe.copies else HALVES,
        tokens=(2, 0) if name == "token-rows" else (),
    )
    steps = (step, replace(step, recipe=RECIPES["lora-linear"])) if name == "lora-mha-out" else (step,)
    case = Case(base=torch.tensor(base, dtype=dtype_of(storage)), steps=steps, storage=storage)
    assert walked(case).tolist() == wanted


# --------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("name", [name for name in ADDING if name not in DORA])
@every_dtype
def test_where_b_is_zero_the_base_is_expected_exactly(name, storage):
    one = WORLDS[name]
    base, factors = drawn(one, storage)
    zeroed = {role: tensor * 0 if role[-1] == "B" or role == "bias" else tensor for role, tensor in factors.items()}
    seen = walked(case_of(one, base, zeroed, storage))
    assert np.array_equal(seen, base.reshape(base.shape[0], -1).double().numpy())


@pytest.mark.parametrize("name", DORA)
@every_dtype
def test_where_b_is_zero_dora_still_gives_each_output_the_length_of_its_magnitude(name, storage):
    one = WORLDS[name]
    base, factors = drawn(one, storage)
    zeroed = {role: tensor * 0 if role[-1] == "B" else tensor for role, tensor in factors.items()}
    seen = walked(case_of(one, base, zeroed, storage))
    w = base.double().numpy()
    ratio = factors["m"].double().numpy().reshape(oracle.lengths(w, one.kind).shape) / oracle.lengths(w, one.kind)
    assert seen == pytest.approx((w * ratio).reshape(len(w), -1), rel=1e-14)
    lengths = np.sqrt((seen.reshape(w.shape) ** 2).sum(_others(one, w)))
    assert lengths.ravel() == pytest.approx(factors["m"].double().numpy().ravel(), rel=1e-13)


def _others(one: World, w: Array) -> tuple[int, ...]:
    """Every axis but the one that counts outputs."""
    return tuple(axis for axis in range(w.ndim) if axis != oracle.OUTPUT_AXIS[one.kind])


@pytest.mark.parametrize("name", DORA)
def test_a_magnitude_of_the_moved_weights_own_length_changes_nothing(name):
    one = WORLDS[name]
    base, factors = drawn(one, "float64")
    f = {role.removeprefix("embedding_"): tensor.double().numpy() for role, tensor in factors.items()}
    moved = base.numpy() + oracle.DELTAS[one.kind](f["A"], f["B"], S)
    own = torch.from_numpy(oracle.lengths(moved, one.kind)).reshape(factors["m"].shape)
    seen = walked(case_of(one, base, factors | {"m": own}, "float64"))
    assert seen == pytest.approx(moved.reshape(len(moved), -1), rel=1e-13)


@every_world
@pytest.mark.parametrize("step", [1, 2, 3, 7, 9, 100])
def test_tiles_of_any_height_give_the_same_rows(name, step, monkeypatch):
    one = WORLDS[name]
    base, factors = drawn(one, "float32")
    case = case_of(one, base, factors, "float32")
    whole = walked(case)
    # the pass that gathers column norms goes over tiles of its own
    monkeypatch.setattr(replay_module, "tiles", lambda case: tiles(case, step * case.base.shape[1]))
    _, room = told(one, base, factors)
    assert (np.abs(walked(case, step) - whole) <= room).all()


@pytest.mark.parametrize("name", DORA)
@pytest.mark.parametrize("step", [1, 3, 9])
def test_balls_over_tiles_of_any_height_hold_what_is_expected(name, step, monkeypatch):
    one = WORLDS[name]
    base, factors = drawn(one, "float32")
    case = case_of(one, base, factors, "float32")
    whole = walked(case)
    monkeypatch.setattr(replay_module, "tiles", lambda case: tiles(case, step * case.base.shape[1]))
    walk = replay(case, Bounds(case, ADD))
    balls = [walk.rows(slice(start, min(start + step, case.rows))).total for start in range(0, case.rows, step)]
    mid, rad = (torch.cat([getattr(ball, part) for ball in balls]).numpy() for part in ("mid", "rad"))
    assert (np.abs(mid - whole) <= rad).all()
    assert rad.max() < 1e-4 * np.abs(whole).max()


@pytest.mark.parametrize("name", WORLDS)
def test_the_rows_of_the_base_come_back_beside_the_merged_ones(name):
    one = WORLDS[name]
    base, factors = drawn(one, "bfloat16")
    case = case_of(one, base, factors, "bfloat16")
    assert torch.equal(expected(case).rows(slice(2, 5)).base, case.base[2:5].double())


@pytest.mark.parametrize("name", WORLDS)
@every_dtype
def test_the_delta_of_some_rows_is_what_the_merge_adds_to_them(name, storage):
    one = WORLDS[name]
    base, factors = drawn(one, storage)
    case, span = case_of(one, base, factors, storage), slice(2, 5)
    rows = expected(case).rows(span)
    wanted, room = told(one, base, factors)
    w = base.reshape(base.shape[0], -1).double().numpy()
    assert (
        np.abs(rows.delta.numpy() - (wanted - w)[span]) <= room[span] + 2 * U64 * (np.abs(wanted) + np.abs(w))[span]
    ).all()
    # only a formula that adds, and nothing else, knows its delta without the difference
    assert (rows.added is None) == (not one.deltas or one.dora)


@pytest.mark.parametrize("name", [name for name in ADDING if name not in DORA])
def test_a_delta_too_small_for_the_sum_is_still_measured(name):
    one = WORLDS[name]
    base, factors = drawn(one, "float64")
    base, tiny = base + 4, {role: f * 1e-20 if role[-1] == "B" or role == "bias" else f for role, f in factors.items()}
    case = case_of(one, base, tiny, "float64")
    rows = expected(case).rows(slice(0, case.rows))
    assert torch.equal(rows.total, rows.base)
    wanted, _ = told(one, torch.zeros_like(base), tiny)
    assert rows.delta.numpy() == pytest.approx(wanted, rel=1e-12, abs=1e-34)
    twice = replace(case, steps=case.steps * 2)
    assert expected(twice).rows(slice(0, 3)).delta.numpy() == pytest.approx(2 * wanted[:3], rel=1e-12, abs=1e-34)


def square(name: str) -> World:
    kind = {"lora-linear": "linear", "dora-linear": "linear", "lora-mha-out": "linear"}.get(name)
    kind = kind or ("embedding" if "embedding" in name else "conv1d_t")
    return world(name, (8, 8), kind)


@pytest.mark.parametrize("name", FLIPPING)
def test_the_flipped_product_of_a_square_weight_is_the_transpose_of_the_product(name):
    recipe: Recipe = RECIPES[name]
    _, factors = drawn(square(name), "float64")
    assert recipe.product is not None
    assert recipe.flipped is not None
    straight = recipe.product(factors, slice(0, 8))
    assert torch.allclose(recipe.flipped(factors, slice(0, 8)), straight.T, rtol=1e-14, atol=0)
    assert torch.allclose(recipe.flipped(factors, slice(3, 6)), straight.T[3:6], rtol=1e-14, atol=0)
    assert not torch.allclose(straight, straight.T)


@pytest.mark.parametrize("name", FLIPPING)
def test_a_flipped_step_expects_the_base_and_the_transposed_delta(name):
    one = square(name)
    base, factors = drawn(one, "float64")
    case = case_of(one, base, factors, "float64")
    flipped = replace(case, steps=(replace(case.steps[0], flipped=True),))
    f = {role.removeprefix("embedding_"): tensor.numpy() for role, tensor in factors.items()}
    moved = base.numpy() + oracle.DELTAS[one.kind](f["A"], f["B"], S).T
    wanted = oracle.dora(moved, f["m"], one.kind) if one.dora else moved
    assert walked(flipped) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    "name", ["lora-linear", "lora-embedding", "lora-conv-2d", "dora-linear", "dora-conv-2d", "lora-bias"]
)
def test_tensor_cores_round_what_a_matrix_product_reads_and_nothing_else(name):
    one = WORLDS[name]
    base, factors = drawn(one, "float32")
    walk = replay(case_of(one, base, factors, "float32"), Bounds(case_of(one, base, factors, "float32"), TF32))
    for role, ball in walk.factors[0].items():
        assert ball.is_exact == (role in ("m", "bias"))
        assert ball.is_exact or bool((ball.rad >= TF32_UNIT * ball.mid.abs()).all())


# storage, dtype of BASE, order, what a mistake changed -> the dtypes that the finished tensor goes through
WAYS = [
    ("bfloat16", "bfloat16", ADD, {}, ("bfloat16",)),
    ("bfloat16", "bfloat16", THROUGH_FP16, {}, ("float16", "bfloat16")),
    ("bfloat16", "bfloat16", HELD_IN_FP16, {}, ("float16", "bfloat16")),
    ("float32", "bfloat16", replace(ADD, load="base"), {}, ("bfloat16", "float32")),
    ("float32", "bfloat16", replace(THROUGH_FP16, load="base"), {}, ("float16", "bfloat16", "float32")),
    ("float32", "float32", ADD, {"through": "bfloat16"}, ("float32", "bfloat16", "float32")),
    ("float32", "float32", ADD, {"held": "bfloat16"}, ("bfloat16", "float32")),
    ("float32", "bfloat16", replace(ADD, load="base"), {"held": "float16"}, ("float16", "float32")),
    ("float16", "bfloat16", replace(THROUGH_FP16, load="base"), {}, ("float16", "bfloat16", "float16")),
]


@pytest.mark.parametrize(("storage", "base", "how", "changed", "wanted"), WAYS)
def test_a_finished_tensor_is_stored_in_one_dtype_after_the_other(storage, base, how, changed, wanted):
    case = replace(Case(base=torch.ones(2, 2, dtype=dtype_of(base)), steps=(), storage=storage), **changed)
    assert stops(case, how) == wanted
    assert load_dtype(case, how) in wanted


def test_every_recipe_that_needs_column_norms_says_how_its_rows_are_made():
    for recipe in RECIPES.values():
        assert recipe.columns is None or recipe.apply is not None
        assert (recipe.product is None) == (recipe.replace is not None)


# -------------------------------------------------------------------------------------------- can these tests fail?

Change = Callable[[Recipe], Recipe]


def halved(recipe: Recipe) -> Recipe:
    product = recipe.product
    assert product is not None
    return replace(recipe, product=lambda factors, rows: product(factors, rows) * 0.5)


def next_row(recipe: Recipe) -> Recipe:
    product = recipe.product
    assert product is not None
    return replace(recipe, product=lambda factors, rows: product(factors, slice(0, rows.stop - rows.start)))


def unscaled(case: Case) -> Case:
    return replace(case, steps=tuple(replace(step, scale=None) for step in case.steps))


def differs(one: World, case: Case, step: int | None = None) -> bool:
    base, factors = drawn(one, "float32")
    wanted, room = told(one, base, factors)
    return not (np.abs(walked(case, step) - wanted) <= room).all()


@pytest.mark.parametrize("name", ADDING)
def test_control_a_recipe_without_its_scale_is_caught(name):
    one = WORLDS[name]
    assert differs(one, unscaled(case_of(one, *drawn(one, "float32"), "float32")))


@pytest.mark.parametrize("change", [halved, next_row], ids=["halved-product", "first-rows-every-time"])
@pytest.mark.parametrize("name", ADDING)
def test_control_a_changed_product_is_caught(name, change: Change):
    one = WORLDS[name]
    case = case_of(one, *drawn(one, "float32"), "float32")
    assert not differs(one, case, 3)
    changed = replace(case, steps=tuple(replace(step, recipe=change(step.recipe)) for step in case.steps))
    assert differs(one, changed, 3)


@pytest.mark.parametrize("name", ["dora-linear", "dora-linear-in-out"])
def test_control_a_norm_along_the_wrong_axis_is_caught(name):
    one = square(name)
    other = RECIPES[{"dora-linear": "dora-linear-in-out", "dora-linear-in-out": "dora-linear"}[name]]
    case = case_of(one, *drawn(one, "float32"), "float32")
    recipe = replace(case.steps[0].recipe, apply=other.apply, columns=other.columns)
    assert differs(one, replace(case, steps=(replace(case.steps[0], recipe=recipe),)))


def test_control_a_norm_of_a_ball_is_a_ball():
    ball = Ball.exactly(torch.tensor([[3.0, 4.0]]), 2.0**-24)
    assert abs(float(norm(ball).mid) - 5) <= float(norm(ball).rad) < 1e-5
