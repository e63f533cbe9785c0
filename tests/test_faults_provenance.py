"""Whose base and whose adapter: each mistake made by whole-tensor scripts, named alone, and its neighbours not so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_check import diagnose, registry
from lora_check.compare import compare, compare_copy
from lora_check.faults._low_rank import rank_of
from lora_check.rounding import arithmetics, rounding_norm
from lora_check.types import Adapter, AdapterConfig, Case, Comparison, LoadedStep, Part, Plan, Scale, Site, Verdict

torch.set_num_threads(1)
FAULTS, RECIPES = registry.load("faults"), registry.load("recipes")
OUT, IN, R, ALPHA = 96, 60, 6, 10
DTYPES = (torch.bfloat16, torch.float32)
MINE = ("LC162", "LC163", "LC164", "LC166", "LC167", "LC402")


class World:
    """A base, and adapters as (A, B) of which |s B A| is 5 % of |W|."""

    def __init__(self, dtype: torch.dtype, seed: int = 0, out: int = OUT, columns: int = IN) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.base = (0.02 * self.randn(out, columns)).to(dtype)
        self.a, self.b = self.adapter(R)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng)

    def adapter(self, rank: int, a: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a = self.randn(rank, self.base.shape[1]) if a is None else a
        b = self.randn(self.base.shape[0], rank)
        return a, b * (0.05 * self.base.float().norm() / (ALPHA / rank * b @ a).norm())

    @property
    def case(self) -> Case:
        scale = Scale(alpha=ALPHA, rank=R, default_alpha=ALPHA, default_rank=R)
        step = LoadedStep(recipe=RECIPES["lora-linear"], factors={"A": self.a, "B": self.b}, scale=scale)
        return Case(base=self.base, steps=(step,), storage=str(self.base.dtype).removeprefix("torch."))

    @property
    def delta(self) -> Tensor:
        return ALPHA / R * self.b @ self.a

    def plus(self, *deltas: Tensor) -> Tensor:
        """Each delta added in float32 and stored."""
        w = self.base
        for one in deltas:
            w = (w.float() + one).to(w.dtype)
        return w


def named(case: Case, actual: Tensor) -> tuple[str, ...]:
    dtype = str(case.base.dtype).removeprefix("torch.")
    orders = arithmetics(case.storage, dtype)
    seen = compare(case, actual, orders)
    assert not seen.fits
    found = diagnose.name_tensor("some.weight", "target", case, actual, orders, seen)
    assert found
    return found.codes


def evidence(code: str, case: Case, actual: Tensor) -> dict[str, object]:
    found = FAULTS[code].recognise(case, actual)
    assert found is not None
    return dict(found)


# ---------------------------------------------------------------------------------------------- another adapter


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_adapter_is_named_with_its_rank(dtype):
    world = World(dtype)
    a, b = world.adapter(9)
    actual = world.plus(ALPHA / 9 * b @ a)
    assert named(world.case, actual) == ("LC162",)
    told = evidence("LC162", world.case, actual)
    assert told["rank"] == 9
    assert told["inside_a"] < 0.5 > told["inside_b"]
    assert "of rank 9" in FAULTS["LC162"].tell([told])
    assert "same run" not in FAULTS["LC162"].tell([told])


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_step_of_the_run_lies_in_the_space_of_its_a(dtype):
    world = World(dtype)
    moved = world.a + 0.2 * world.randn(*world.a.shape)
    a, b = world.adapter(R, moved)
    actual = world.plus(ALPHA / R * (b + world.b) @ a)
    assert named(world.case, actual) == ("LC162",)
    told = evidence("LC162", world.case, actual)
    assert told["inside_a"] > 0.9
    assert "another step of the same run" in FAULTS["LC162"].tell([told])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_update_beside_the_adapter_is_named_with_its_rank(dtype, sign):
    world = World(dtype)
    a, b = world.adapter(4)
    actual = world.plus(sign * ALPHA / 4 * b @ a, world.delta)
    assert named(world.case, actual) == ("LC163",)
    assert evidence("LC163", world.case, actual)["rank"] == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_base_that_moved_along_with_the_adapter_is_no_other_step_of_the_run(dtype):
    """Delta-LoRA: W goes half of the way of s B A from an early step on, and s B A comes on top of it."""
    world = World(dtype)
    early_a = world.a + 0.6 * world.randn(*world.a.shape)
    early_b = 0.5 * world.b + 0.5 * world.b.std() * world.randn(*world.b.shape)
    moved = 0.5 * (world.delta - ALPHA / R * early_b @ early_a)
    actual = world.plus(moved, world.delta)
    assert named(world.case, actual) == ("LC163",)
    assert FAULTS["LC162"].recognise(world.case, actual) is None
    other_a, other_b = world.adapter(2 * R)
    unrelated = world.plus(2 * ALPHA / R * other_b @ other_a)
    assert named(world.case, unrelated) == ("LC162",)


def own_rows_permuted(world: World) -> Tensor:
    return world.plus(world.delta[torch.randperm(OUT, generator=world.rng)])


def own_columns_permuted(world: World) -> Tensor:
    return world.plus(world.delta[:, torch.randperm(IN, generator=world.rng)])


def own_half_of_the_rows(world: World) -> Tensor:
    return world.plus(torch.cat([world.delta[: OUT // 2], torch.zeros(OUT - OUT // 2, IN)]))


def own_ranks_weighted_anew(world: World) -> Tensor:
    weights = torch.tensor([0.5, 1.5, 1.0, 2.0, 0.1, 1.0])
    return world.plus(ALPHA / R * (world.b * weights) @ world.a)


def another_base(world: World) -> Tensor:
    return (world.plus(world.delta).float() * (1 + 0.05 * world.randn(OUT, IN))).to(world.base.dtype)


def one_element(world: World) -> Tensor:
    actual = world.plus(world.delta)
    actual[3, 4] *= 3
    return actual


OWN = (own_rows_permuted, own_columns_permuted, own_half_of_the_rows, own_ranks_weighted_anew, another_base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", OWN)
def test_what_is_made_of_this_adapter_or_of_no_adapter_is_none_of_these(mistake: Callable[[World], Tensor], dtype):
    world = World(dtype)
    assert not set(named(world.case, mistake(world))) & set(MINE)


def test_a_long_matrix_with_rows_that_cannot_all_be_looked_at_is_not_named():
    world = World(torch.bfloat16, out=4300, columns=80)
    assert FAULTS["LC162"].recognise(world.case, world.plus(world.delta.roll(7, 0))) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_within_its_rounding_is_not_seen(dtype):
    """A delta far below one step of the storage leaves no trace that could be told from rounding."""
    world = World(dtype)
    a, b = world.adapter(R)
    for code in ("LC162", "LC163"):
        assert FAULTS[code].recognise(world.case, world.plus(1e-7 * b @ a)) is None


def test_rounding_stays_below_its_norm_and_counts_as_no_rank():
    rng = torch.Generator().manual_seed(3)
    for shape in ((200, 200), (30, 300), (8, 8)):
        bound = torch.rand(shape, generator=rng) + 0.1
        noise = bound * (2 * torch.rand(shape, generator=rng) - 1)
        assert float(torch.linalg.matrix_norm(noise, 2)) < rounding_norm(bound)
        assert rank_of(noise, bound, 4) is None
        strong = 50 * torch.randn(shape[0], 2, generator=rng) @ torch.randn(2, shape[1], generator=rng)
        assert rank_of(strong + noise, bound, 4) == 2


# ------------------------------------------------------------------------------------------------ discrete ones


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_merging_and_unmerging_blurs_the_base(cycles, dtype):
    """PEFT adds in float32 and takes off what it rounded."""
    world = World(dtype)
    w = world.base
    for _ in range(cycles):
        w = (w.float() + world.delta).to(w.dtype)
        w = w - world.delta.to(w.dtype)
    assert not torch.equal(w, world.base)
    assert named(world.case, w)[0] == "LC164"


def test_a_merge_over_a_blurred_base_is_told_as_merged():
    world = World(torch.float16)
    w = world.plus(world.delta)
    w = w - world.delta.to(w.dtype)
    actual = (w.float() + world.delta).to(w.dtype)
    assert named(world.case, actual) == ("LC164",)


def test_a_base_left_alone_is_not_blurred():
    world = World(torch.bfloat16)
    assert named(world.case, world.base) == ("LC101",)


def test_in_32_bits_nothing_is_claimed():
    assert FAULTS["LC164"].inject(World(torch.float32).case) == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_start_that_was_left_in_the_base_is_named(dtype):
    world = World(dtype, out=32, columns=20)
    (step,) = world.case.steps
    settings = {"init_lora_weights": "pissa", "scale": ALPHA / R}
    site = Site(
        parameter="m.weight", shape=(32, 20), roles={"A": (R, 20), "B": (32, R)}, settings=settings, in_out=None
    )
    step = replace(step, site=site)
    loads = replace(step, recipe=RECIPES["pissa-base"], scale=None, factors={})
    case = replace(world.case, steps=(loads, step))
    (wrong,) = FAULTS["LC166"].inject(case)
    orders, actual = arithmetics(case.storage, case.storage), world.plus(world.delta)
    assert compare(wrong, actual, orders).fits
    assert not compare(case, actual, orders).fits
    if dtype == torch.float32:  # many more orders in 16 bits, each with a decomposition of its own
        assert named(case, actual) == ("LC166",)
    u, s, vt = torch.linalg.svd(world.base.float(), full_matrices=False)
    rest = (world.base.float() - (u[:, :R] * s[:R]) @ vt[:R]).to(dtype)
    right = (rest.float() + world.delta).to(dtype)
    assert compare(case, right, orders).fits


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_start_that_was_taken_off_twice_is_named(dtype):
    world = World(dtype)
    half = R // 2
    u, s, vt = torch.linalg.svd(world.base.float(), full_matrices=False)
    start_b = u[:, :half] * (s[:half] * R / ALPHA).sqrt()
    start_a = (s[:half] * R / ALPHA).sqrt()[:, None] * vt[:half]
    a, b = start_a + 0.01 * world.randn(half, IN), start_b + 0.01 * world.randn(OUT, half)
    world.a, world.b = torch.cat([a, start_a]), torch.cat([b, -start_b], 1)
    taken = (world.base.float() - ALPHA / R * start_b @ start_a).to(dtype)
    actual = (taken.float() + world.delta).to(dtype)
    assert named(world.case, actual) == ("LC167",)
    assert compare(world.case, world.plus(world.delta), arithmetics(world.case.storage, world.case.storage)).fits


def test_factors_without_right_angles_are_no_conversion():
    assert FAULTS["LC167"].inject(World(torch.float32).case) == ()


# ------------------------------------------------------------------------------------------------- bystanders


def bystander(dtype: torch.dtype) -> Case:
    base = (0.3 * torch.randn(64, 1, generator=torch.Generator().manual_seed(1))).to(dtype)
    return Case(base=base, steps=(), storage=str(dtype).removeprefix("torch."))


def seen_as(case: Case, actual: Tensor) -> tuple[str, ...]:
    orders = arithmetics(case.storage, case.storage)
    seen = compare_copy(case, actual, orders)
    assert not seen.fits
    found = diagnose.name_tensor("some.norm.weight", "bystander", case, actual, orders, seen)
    return found.codes if found else ()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [1, 2, 3, -1])
def test_a_constant_on_a_norm_is_named(dtype, constant):
    case = bystander(dtype)
    actual = (case.base.float() + constant).to(dtype)
    assert seen_as(case, actual) == ("LC402",)
    told = [one.told for one in FAULTS["LC402"].inject(case)]
    assert FAULTS["LC402"].tell([one for one in told if one["added"] == constant]) == (
        f"{constant} added to every element"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_constant_on_a_norm_is_not_named(dtype):
    case = bystander(dtype)
    assert seen_as(case, (case.base.float() * 1.5).to(dtype)) == ()
    assert seen_as(case, (case.base.float() + 0.5).to(dtype)) == ()
    matrix = replace(case, base=case.base.reshape(8, 8))
    assert FAULTS["LC402"].inject(matrix) == ()


# ------------------------------------------------------------------------------------- what pools over tensors


def comparison(name: str, kind: str, code: str | None, moved: float = 1.0, noise: float = 4.0) -> Comparison:
    return Comparison(
        tensor=name,
        kind=kind,
        recipe="lora-linear",
        module=name,
        adapters=(0,),
        shape=(100, 100),
        dtype="bfloat16",
        verdict=Verdict.REFUTED,
        exact=False,
        over_budget=9000,
        signal=1.0,
        overlap=moved,
        noise=noise,
        code=code,
    )


@pytest.mark.parametrize(
    ("moved", "noise", "words"),
    [
        (0.98, 4.0, "the targets hold this adapter"),
        (0.03, 4.0, "the targets do not hold this adapter either"),
        (0.98, 1e6, None),
        (3.0, 4.0, None),
    ],
)
def test_another_base_tells_whether_the_adapter_is_in(moved, noise, words):
    seen = [comparison("norm", "bystander", None), comparison("q", "target", "LC199", moved, noise)]
    (found,) = FAULTS["LC404"].detect(Plan(pairings=()), seen)
    assert (words is None and "adapter" not in found.message) or (words and words in found.message)
    assert found.evidence["moved"] == moved
    assert found.evidence["most"] == ["norm"]


@pytest.mark.parametrize(
    ("record", "merged", "told"),
    [
        ("/home/me/my-model", "org/Original", True),
        ("./runs/my-model", "org/Original", True),
        ("/home/me/original", "org/Original", False),
        ("org/other", "org/Original", False),
        ("/home/me/my-model", None, False),
    ],
)
def test_another_base_tells_of_a_local_record_and_a_hub_name(record, merged, told):
    adapter = Adapter(
        config=AdapterConfig(method="LORA", rank=4, alpha=4, base_name=record),
        checkpoint=None,
        dialect="peft",
        parts=(),
    )
    plan = Plan(pairings=(), adapters=(adapter,), merged_config={"_name_or_path": merged} if merged else {})
    (found,) = FAULTS["LC404"].detect(plan, [comparison("norm", "bystander", None)])
    assert (f"the adapter records {record}, MERGED calls itself" in found.message) is told


class Held:
    """A checkpoint in memory."""

    location = "somewhere"

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def metas(self) -> dict[str, object]:
        from lora_check.types import TensorMeta

        return {
            name: TensorMeta(name=name, shape=tuple(one.shape), dtype=str(one.dtype).removeprefix("torch."))
            for name, one in self.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.mark.parametrize(
    ("size", "dtype", "told"),
    [
        (1e-6, torch.float16, True),
        (1e-2, torch.float16, False),
        (1e-6, torch.bfloat16, False),
        (0.0, torch.float16, False),
    ],
)
def test_factors_too_small_for_fp16_are_told(size, dtype, told):
    b = (size * torch.randn(40, 6, generator=torch.Generator().manual_seed(2))).to(dtype)
    adapter = Adapter(
        config=AdapterConfig(method="LORA", rank=6, alpha=4),
        checkpoint=Held({"m.lora_B.weight": b}),
        dialect="peft",
        parts=(Part(tensor="m.lora_B.weight", module="m", role="B"),),
    )
    found = FAULTS["LC169"].detect(Plan(pairings=(), adapters=(adapter,)), [])
    assert bool(found) is told
    if told:
        assert found[0].evidence["numbers"] == 240
        assert found[0].evidence["zeros"] + found[0].evidence["subnormals"] == 240
