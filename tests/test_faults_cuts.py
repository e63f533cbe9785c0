"""What was cut out of a change, and what a training cut out of its base: made by plain decompositions, named alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_faults_provenance import ALPHA, DTYPES, FAULTS, IN, OUT, RECIPES, R, World, comparison, evidence, named
from torch import Tensor

from lora_check.compare import compare
from lora_check.faults._avoided import avoids, span
from lora_check.faults._levels import LEVELS
from lora_check.rounding import arithmetics
from lora_check.types import Case, Plan, Site

S = ALPHA / R


def decomposed(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B with s B A the nearest matrix of that rank, each with a root of the singular values."""
    u, s, vt = torch.linalg.svd(w.float(), full_matrices=False)
    root = (s[:rank] / S).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def turned(case: Case, actual: Tensor) -> tuple[Case, Tensor]:
    """The same of a weight that is stored (in, out)."""
    steps = tuple(replace(step, recipe=RECIPES["lora-linear-in-out"]) for step in case.steps)
    return replace(case, base=case.base.T.contiguous(), steps=steps), actual.T.contiguous()


def as_stored(layout: str, case: Case, actual: Tensor) -> tuple[Case, Tensor]:
    return turned(case, actual) if layout == "in-out" else (case, actual)


# ------------------------------------------------------------------------------------- a cut out of the change


def changed(world: World, change: Tensor) -> Tensor:
    """BASE with a change of which |D| is 5 % of |W|; the adapter becomes a cut of what is then stored."""
    actual = world.plus(change * (0.05 * world.base.float().norm() / change.norm()))
    world.a, world.b = decomposed(actual.float() - world.base.float(), R)
    return actual


@pytest.mark.parametrize("layout", ["linear", "in-out"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_cut_out_of_a_full_fine_tune_is_named(dtype, layout):
    world = World(dtype)
    actual = changed(world, world.randn(OUT, IN))
    values = torch.linalg.svdvals(actual.double() - world.base.double()).square()
    case, actual = as_stored(layout, world.case, actual)
    assert named(case, actual) == ("LC165",)
    told = evidence("LC165", case, actual)
    assert told["held"] == pytest.approx((values[:R].sum() / values.sum()).item(), abs=1e-3)
    assert told["rest"] == "full"
    assert "of no low rank, as of a full fine-tune" in FAULTS["LC165"].tell([told])


def test_a_cut_of_a_change_of_a_higher_rank_tells_the_rank_of_the_rest():
    world = World(torch.float32)
    actual = changed(world, world.randn(OUT, R + 3) @ world.randn(R + 3, IN))
    assert named(world.case, actual) == ("LC165",)
    told = evidence("LC165", world.case, actual)
    assert told["rest"] == 3
    words = FAULTS["LC165"].tell([told, {"held": 0.98, "rest": "rounding"}])
    assert f"it holds {100 * told['held']:.0f} to 98 % of it" in words
    assert "the rest is of rank 3, or no larger than rounding" in words


@pytest.mark.parametrize("how", ["factors in bf16", "change not rounded"])
def test_a_cut_may_be_made_of_other_roundings(how):
    world = World(torch.bfloat16)
    change = world.randn(OUT, IN) * (0.2 * world.base.float().std())
    actual = world.plus(change)
    world.a, world.b = decomposed(change, R)
    if how == "factors in bf16":
        world.a, world.b = world.a.bfloat16(), world.b.bfloat16()
    assert named(world.case, actual) == ("LC165",)


def beside(world: World, rest: Tensor) -> Tensor:
    """The merge with something more, of the size of the delta."""
    return world.plus(world.delta + rest * (world.delta.norm() / rest.norm()))


def outside(basis: Tensor) -> Tensor:
    q = torch.linalg.qr(basis).Q
    return torch.eye(len(basis)) - q @ q.T


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rest_that_avoids_one_side_only_is_no_cut(dtype):
    """Adapters of several tasks are trained at right angles to one another, in A alone."""
    world = World(dtype)
    for rank in (4, IN):
        rest = world.randn(OUT, rank) @ world.randn(rank, IN)
        assert named(world.case, beside(world, outside(world.b) @ rest @ outside(world.a.T))) == ("LC165",)
        for one in (outside(world.b) @ rest, rest @ outside(world.a.T)):
            assert "LC165" not in named(world.case, beside(world, one))


def test_the_bound_holds_for_directions_that_have_nothing_to_do_with_a_matrix():
    """Of 1000 of them the least share is seen about once in 1000 times, and never once in 2^40."""
    rng = torch.Generator().manual_seed(5)
    for rank in (1, 3, IN):
        rest = torch.randn(OUT, rank, generator=rng) @ torch.randn(rank, IN, generator=rng)
        bases = [torch.linalg.qr(torch.randn(OUT, R, generator=rng)).Q for _ in range(1000)]
        assert not any(avoids(rest, q) for q in bases)


def test_less_than_chance_leaves_is_seen_and_sooner_in_a_matrix_of_many_directions():
    world = World(torch.float32)
    basis = torch.linalg.qr(world.b).Q
    full, one = world.randn(OUT, IN), world.randn(OUT, 1) @ world.randn(1, IN)

    def leaving(rest: Tensor, share: float) -> Tensor:
        inside = basis @ (basis.T @ rest)
        return rest - (1 - math.sqrt(share)) * inside

    assert avoids(leaving(full, 0.4), basis)
    assert not avoids(leaving(full, 0.9), basis)
    assert not avoids(leaving(one, 0.4), basis)
    assert avoids(leaving(one, 1e-6), basis)
    assert not avoids(torch.zeros(OUT, IN), basis)


def test_directions_that_are_mere_noise_of_a_product_are_left_out():
    world = World(torch.float32)
    product = world.b[:, :2] @ world.a[:2]
    assert span(product, R).shape == (OUT, 2)
    assert torch.allclose(span(product, R) @ (span(product, R).T @ product), product, atol=1e-6)


def test_where_targets_changed_by_more_than_a_cut_the_base_is_not_called_another_one():
    witness, targets = comparison("norm", "bystander", None), [comparison(one, "target", "LC165") for one in "qkv"]
    other = comparison("o", "target", "LC199")
    assert FAULTS["LC404"].detect(Plan(pairings=()), [witness, *targets, other]) == ()
    assert FAULTS["LC401"].detect(Plan(pairings=()), [witness, *targets, other])
    assert FAULTS["LC404"].detect(Plan(pairings=()), [witness, *targets[:1], other])


# --------------------------------------------------------------------------------------- a start out of the base


class Trained(World):
    """A training that began with the largest part of W: the residual model, factors near their start, both forms."""

    def __init__(self, dtype: torch.dtype, start: str = "pissa") -> None:
        super().__init__(dtype)
        if start == "pissa":
            self.a0, self.b0 = decomposed(self.base, R)
        else:
            q, r = torch.linalg.qr(self.base.float())
            self.a0, self.b0 = r[:R], q[:, :R] / S
        self.a = self.a0 + 0.05 * self.a0.std() * self.randn(R, IN)
        self.b = self.b0 + 0.05 * self.b0.std() * self.randn(OUT, R)
        self.whole, self.residual = self.base, self.plus(-S * self.b0 @ self.a0)
        self.bases = {"whole": self.whole, "residual": self.residual}

    def case_of(self, base: Tensor, form: str) -> Case:
        case = replace(self.case, base=base)
        (step,) = case.steps
        if form == "plain":
            return case
        factors = {"A": torch.cat([self.a, self.a0]), "B": torch.cat([self.b, -self.b0], 1)}
        scale = replace(step.scale, alpha=2 * ALPHA, rank=2 * R)
        return replace(case, steps=(replace(step, factors=factors, scale=scale),))

    def merged(self, base: Tensor, form: str) -> Tensor:
        delta = self.delta - (S * self.b0 @ self.a0 if form == "converted" else 0)
        return (base.float() + delta).to(base.dtype)


MIXTURES = {
    # BASE, form of ADAPTER, the base that was merged into, in which form: the code, and what it says
    ("residual", "converted", "whole", "converted"): ("LC168", "MERGED is right over the whole model"),
    ("residual", "plain", "whole", "plain"): ("LC168", "BASE lacks the start"),
    ("whole", "plain", "residual", "plain"): ("LC168", "merged into what the start of the training left of BASE"),
    ("whole", "converted", "residual", "plain"): ("LC168", "merged into what the start of the training left of BASE"),
    ("whole", "converted", "residual", "converted"): ("LC167", "a base that had lost its start already"),
    ("whole", "converted", "whole", "plain"): ("LC166", "merged into the whole base"),
    ("residual", "converted", "residual", "plain"): ("LC168", "MERGED is right over the whole model"),
}


@pytest.mark.parametrize("layout", ["linear", "in-out"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixture", MIXTURES, ids="-".join)
def test_each_mixture_of_a_base_and_a_form_of_the_adapter_has_its_name(mixture, dtype, layout):
    given, form, used, how = mixture
    world, (code, words) = Trained(dtype), MIXTURES[mixture]
    case, actual = world.case_of(world.bases[given], form), world.merged(world.bases[used], how)
    case, actual = as_stored(layout, case, actual)
    if dtype == torch.float32 and mixture == ("whole", "converted", "residual", "plain"):
        assert compare(case, actual, arithmetics("float32", "float32")).fits  # one more rounding is none
        return
    assert named(case, actual) == (code,)
    recognise = FAULTS[code].recognise
    told = [(recognise and recognise(case, actual)) or FAULTS[code].inject(case)[0].told]
    assert code != "LC168" or told[0]["ranks"] == R
    tell = FAULTS[code].tell
    assert words in (tell(told) if tell else FAULTS[code].summary)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "converted"])
def test_each_form_over_its_own_base_is_right(form, dtype):
    world = Trained(dtype)
    base = world.bases["residual" if form == "plain" else "whole"]
    case = world.case_of(base, form)
    assert compare(case, world.merged(base, form), arithmetics(case.storage, case.storage)).fits


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_start_of_olora_avoids_the_residual_in_its_columns_alone(dtype):
    world = Trained(dtype, "olora")
    for given, used in (("residual", "whole"), ("whole", "residual")):
        case, actual = world.case_of(world.bases[given], "plain"), world.merged(world.bases[used], "plain")
        assert named(case, actual) == ("LC168",)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unconverted_factors_that_are_loaded_as_pissa_are_asked_as_they_lie(dtype):
    """PEFT would take the start off BASE, the residual, once more; MERGED was made over the whole model."""
    world = Trained(dtype)
    loaded = loaded_as_pissa(world.case_of(world.residual, "plain"))
    actual = world.merged(world.whole, "plain")
    assert evidence("LC168", loaded, actual) == {"residual": "BASE", "ranks": R}
    lost = [one.told.get("lost", False) for one in FAULTS["LC166"].inject(loaded)]
    kept = [one.told.get("lost", False) for one in FAULTS["LC166"].inject(replace(loaded, base=world.whole))]
    assert (lost, kept) == ([True], [False])


def loaded_as_pissa(case: Case) -> Case:
    """The case as PEFT has it, which takes the start off whatever is given as BASE."""
    (step,) = case.steps
    settings = {"init_lora_weights": "pissa", "scale": S}
    site = Site(parameter="m", shape=(OUT, IN), roles={"A": (R, IN), "B": (OUT, R)}, settings=settings, in_out=None)
    loads = replace(step, recipe=RECIPES["pissa-base"], scale=None, factors={}, site=site)
    return replace(case, steps=(loads, replace(step, site=site)))


class Flat(World):
    """Of R large singular values and equal ones: what is left when the R largest are taken off has no R largest."""

    def __init__(self) -> None:
        super().__init__(torch.bfloat16)
        u, s, vt = torch.linalg.svd(self.base.float(), full_matrices=False)
        self.base = (u * torch.cat([3 * s[:R], s[R:].mean().expand(len(s) - R)]) @ vt).bfloat16()


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_no_factor_is_fitted_within_the_budget_of_a_decomposition_that_is_not_known(share):
    """Near its start s B A is what BASE has lost, so that BASE + 2 s B A would do as well."""
    world = Flat()
    a0, b0 = decomposed(world.base, R)
    world.a = a0 + share * a0.std() * world.randn(R, IN)
    world.b = b0 + share * b0.std() * world.randn(OUT, R)
    case, actual = replace(world.case, base=world.plus(-S * b0 @ a0)), world.plus(world.delta)
    assert named(loaded_as_pissa(case), actual) == ("LC168",)
    assert named(world.case, world.plus(2 * world.delta)) == ("LC102",)
    assert named(world.case, world.plus(1.7 * world.delta)) == ("LC110",)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_start_of_the_training_is_another_update(dtype):
    world = Trained(dtype)
    twice = world.plus(-2 * S * world.b0 @ world.a0, world.delta)
    assert named(world.case_of(world.whole, "plain"), twice) in {("LC162",), ("LC163",)}
    a, b = world.adapter(4)
    strange = world.plus(ALPHA / 4 * b @ a, world.delta)
    assert named(world.case_of(world.whole, "plain"), strange) == ("LC163",)
    case = world.case_of(world.residual, "converted")
    more = (world.merged(world.whole, "converted").float() + ALPHA / 4 * b @ a).to(dtype)
    assert FAULTS["LC168"].recognise(case, more) is None


def test_a_small_update_in_directions_that_the_base_never_had_is_no_start():
    """Some methods train in the smallest directions of W: BASE avoids those, and nothing was cut out of it."""
    world = World(torch.float32)
    u = torch.linalg.svd(world.base, full_matrices=False).U
    world.base = world.base - u[:, -R:] @ (u[:, -R:].T @ world.base)
    mixed = u[:, -R:] @ world.randn(R, R)
    world.b = mixed * (0.05 * world.base.norm() / (S * mixed @ world.a).norm())
    actual = world.plus(world.delta, S / 2 * world.b[:, :3] @ world.a[:3])
    assert FAULTS["LC168"].recognise(world.case, actual) is None
    start = 40 * S * world.b[:, :3] @ world.a[:3]
    assert evidence("LC168", world.case, world.plus(world.delta, start)) == {"residual": "BASE", "ranks": 3}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_base_of_few_levels_a_low_rank_update_away_was_not_quantised(dtype):
    """The whole model was of few levels from the start; the residual one, given as BASE, is not."""
    world = Trained(dtype)
    columns = 64
    world.base = world.randn(OUT, columns)
    top = world.base.abs().amax(1, keepdim=True)
    world.base = (torch.round(world.base / top * (LEVELS // 2 - 1)) / (LEVELS // 2 - 1) * top).to(dtype)
    world.a, world.b = world.adapter(R)
    a, b = world.adapter(4)
    given = (world.base.float() + 20 * b @ a).to(dtype)
    actual = world.plus(world.delta)
    case = replace(world.case, base=given)
    assert FAULTS["LC157"].recognise(case, actual) is None
    noise = replace(case, base=(world.base.float() + 0.05 * world.randn(OUT, columns)).to(dtype))
    assert evidence("LC157", noise, actual)["block"] == columns
