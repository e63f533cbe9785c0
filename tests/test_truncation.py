"""What is cut to a rank is refuted by the product with what was cut off, where its elements alone do not say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft_worlds
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_check
from lora_check import compare, replay, truncation
from lora_check.ball import Ball
from lora_check.replay import Replay, bounds
from lora_check.rounding import ADD, ROUNDED_DELTA, TF32, arithmetics, unit
from lora_check.truncation import excess
from lora_check.types import Arithmetic, Case, LoadedStep, Options, Recipe, Site, Verdict

WEIGHTS = (0.7, 1.3)
OUT, WIDE, RANK = 34, 51, 6
ADD_UNIT = unit(ADD.compute)
OTHERS = {"plain": {}, "held in bf16": {"autocast_adapter_dtype": False}}


class Layers(nn.Module):
    """One layer that is large enough for near singular values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(90, 70, bias=False)


def model() -> Layers:
    torch.manual_seed(1)
    layers = Layers()
    layers.layer.weight.data.copy_(0.05 * torch.randn(70, 90))
    return layers


@pytest.mark.parametrize("loading", OTHERS)
def test_wrong_weights_of_a_cut_are_refuted_though_no_element_tells(tmp_path: Path, monkeypatch, loading) -> None:
    folders = [tmp_path / f"adapter{index}" for index in range(2)]
    for index, folder in enumerate(folders):
        config = LoraConfig(r=8, lora_alpha=(14, 20)[index], target_modules=["layer"])
        tuned = get_peft_model(model(), config)
        torch.manual_seed(index)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(0.1 * torch.randn_like(parameter))
        tuned.save_pretrained(folder)
    base = model().to(torch.bfloat16)
    peft_worlds._save_plain(base, tmp_path / "base")
    tuned = PeftModel.from_pretrained(base, folders[0], adapter_name="one", **OTHERS[loading])
    tuned.load_adapter(folders[1], adapter_name="two", **OTHERS[loading])
    tuned.add_weighted_adapter(["one", "two"], list(WEIGHTS), "both", combination_type="svd")
    tuned.set_adapter("both")
    peft_worlds._save_plain(tuned.merge_and_unload(), tmp_path / "merged")

    def verdict(weights: tuple[float, ...]) -> Verdict:
        places = tmp_path / "base", folders, tmp_path / "merged"
        return lora_check.check(*places, weights=weights, combination="svd", jobs=1).verdict

    assert verdict(WEIGHTS) is Verdict.VERIFIED
    assert verdict(WEIGHTS[::-1]) is Verdict.REFUTED
    monkeypatch.setattr(compare, "excess", lambda *_: 0.0)
    assert verdict(WEIGHTS[::-1]) is Verdict.INCONCLUSIVE


def cut(x: torch.Tensor, rank: int = RANK) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(x)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def flat_spectrum() -> torch.Tensor:
    """A matrix whose 2 r singular values all lie within one per cent."""
    torch.manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(size, 2 * RANK, dtype=torch.float64))[0] for size in (OUT, WIDE))
    return (left * torch.linspace(1.01, 1.0, 2 * RANK, dtype=torch.float64)) @ right.T


def asked(x: torch.Tensor, radius: float, how: Arithmetic, storage: str) -> tuple[Case, Replay]:
    """A case whose delta is x cut to a rank, x known but for `radius`, and its balls."""
    torch.manual_seed(4)
    recipe = Recipe(
        name="cut", formula="", fits=lambda site: True, product=lambda factors, rows: factors["whole"][rows]
    )
    site = Site(parameter="layer.weight", settings={"options": Options(svd_rank=RANK)}, shape=(OUT, WIDE), roles={})
    base = (0.1 * torch.randn(OUT, WIDE)).to(getattr(torch, storage))
    case = Case(base=base, steps=(LoadedStep(recipe=recipe, site=site),), storage=storage)
    found = bounds(case, how)
    mixed = Ball(x, torch.full_like(x, radius), found.numbers.u)
    return case, Replay(case, found.numbers, ({"mixed": mixed},), (None,))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("how", [ADD, ROUNDED_DELTA, TF32], ids=lambda how: how.name)
@pytest.mark.parametrize("radius", [0.0, 1e-3, 1e-2, 1.0])
def test_no_honest_cut_exceeds_its_bound_and_a_wrong_one_does(storage, how, radius) -> None:
    x = flat_spectrum()
    case, balls = asked(x, radius, how, storage)
    dtype = case.base.dtype
    for seed in range(5):
        torch.manual_seed(seed)
        shift = radius * (torch.randint(0, 2, x.shape) * 2 - 1)
        delta = cut(x + shift)
        delta = delta.to(dtype).double() if how is ROUNDED_DELTA else delta
        assert excess(case, (case.base.double() + delta).to(dtype), how, balls) <= 1
    wrong = (case.base.double() + 1.5 * cut(x)).to(dtype)
    assert (excess(case, wrong, how, balls) > 1) == (radius < 1.0)


def test_no_error_within_the_radii_exceeds_the_bound_even_where_both_terms_point_one_way(monkeypatch) -> None:
    """N = -q v^T + u p^T, with D = ... u v^T and X - D = ... q p^T: N D^T and (X - D) N^T add up."""
    x = flat_spectrum()
    case, balls = asked(x, 0.0, ADD, "float32")
    u, _, vt = torch.linalg.svd(x)
    error = 1e-3 * (u[:, :1] @ vt[RANK : RANK + 1] - u[:, RANK : RANK + 1] @ vt[:1])
    found = {share: Ball(cut(x) + error, share * error.abs(), ADD_UNIT) for share in (1.0, 0.25)}
    for share, ratio in ((1.0, (0.5, 1.0)), (0.25, (1.0, 4.0))):
        monkeypatch.setattr(truncation, "_delta", lambda *_, share=share: found[share])
        assert ratio[0] < excess(case, case.base, ADD, balls) < ratio[1]


@pytest.mark.parametrize("how", arithmetics("bfloat16", "bfloat16", combines=True), ids=lambda how: how.name)
def test_the_delta_that_is_seen_holds_what_its_producer_added(how) -> None:
    case, _ = asked(flat_spectrum(), 0.0, how, "bfloat16")
    case = replace(case, base=case.base / 64)
    how = replace(how, factors="kept")
    delta = cut(flat_spectrum()).float()
    producer, balls = replay.written(case, how), bounds(case, how)
    made = replace(producer, factors=({"whole": delta},)).rows(slice(0, OUT)).total
    seen = truncation._delta(case, replay.bits(made, case, how), how, balls, slice(0, OUT))
    assert bool(((seen.mid - delta.double()).abs() <= seen.rad).all())
    assert seen.rad.norm() < 0.1 * delta.norm()


def test_what_was_not_cut_is_not_asked() -> None:
    case, balls = asked(flat_spectrum(), 0.0, ADD, "float32")
    assert excess(case, 2 * case.base, ADD, balls) > 1
    assert excess(case, 2 * case.base, ADD, Replay(case, balls.numbers, ({},), (None,))) == 0
