"""Two mistakes in one merge are both named, each where it lies, and nothing else is.

Whole models are written to files by scripts in plain torch and checked as a user checks them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lora_check
from lora_check.report import Report
from lora_check.types import Verdict

Tensors = dict[str, Tensor]
R, ALPHA, LAYERS, EXPERTS = 6, 10, 4, 4
ATTENTION = {"q_proj": (48, 40), "k_proj": (24, 40), "v_proj": (24, 40), "o_proj": (40, 48)}
MLP = {"gate_proj": (72, 40), "up_proj": (72, 40), "down_proj": (40, 72)}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 40,
    "head_dim": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": 50,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Model:
    """A base, its factors, and the folder that they lie in."""

    folder: Path
    base: Tensors
    factors: Mapping[str, tuple[Tensor, Tensor]]

    def scale(self, name: str) -> float:
        return ALPHA / self.factors[name][0].shape[0]

    def added(self, name: str, scale: float) -> Tensor:
        a, b = self.factors[name]
        return (self.base[name].float() + scale * (b @ a)).to(self.base[name].dtype)

    def merged(self) -> Tensors:
        return {
            name: self.added(name, self.scale(name)) if name in self.factors else one for name, one in self.base.items()
        }

    def report(self, merged: Tensors) -> Report:
        place = self.folder / "merged"
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(CONFIG))
        save_file({name: one.contiguous() for name, one in merged.items()}, place / "model.safetensors")
        return lora_check.check(self.folder / "base", self.folder / "adapter", place, jobs=1)


def shapes(experts: bool) -> dict[str, tuple[int, int]]:
    found = {}
    for layer in range(LAYERS):
        found |= {f"model.layers.{layer}.self_attn.{name}.weight": shape for name, shape in ATTENTION.items()}
        homes = [f"experts.{number}." for number in range(EXPERTS)] if experts else [""]
        found |= {
            f"model.layers.{layer}.mlp.{home}{name}.weight": shape for home in homes for name, shape in MLP.items()
        }
    return found


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Model]:
    """(dtype, experts, rank_pattern) -> a model of four layers, written to files, and its factors."""

    def make(dtype: torch.dtype, experts: bool = False, ranks: Mapping[str, int] | None = None) -> Model:
        rng = torch.Generator().manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return 0.05 * torch.randn(*shape, generator=rng)

        base = {name: numbers(*shape).to(dtype) for name, shape in shapes(experts).items()}
        pairs = {}
        for name, weight in base.items():
            rank = next((r for end, r in (ranks or {}).items() if end in name), R)
            a, b = numbers(rank, weight.shape[1]), numbers(weight.shape[0], rank)
            pairs[name] = (a, b * (0.05 * weight.float().norm() / (ALPHA / rank * (b @ a)).norm()))
        base |= {f"model.layers.{n}.input_layernorm.weight": (1 + numbers(40)).to(dtype) for n in range(LAYERS)}
        base |= {"model.embed_tokens.weight": numbers(50, 40).to(dtype), "lm_head.weight": numbers(50, 40).to(dtype)}
        settings = {
            "peft_type": "LORA",
            "r": R,
            "lora_alpha": ALPHA,
            "target_modules": [*ATTENTION, *MLP],
            "rank_pattern": dict(ranks or {}),
        }
        written(tmp_path / "base", "model.safetensors", base, {"config.json": CONFIG})
        keys = {
            f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight": one
            for name, pair in pairs.items()
            for side, one in zip("AB", pair, strict=True)
        }
        written(tmp_path / "adapter", "adapter_model.safetensors", keys, {"adapter_config.json": settings})
        return Model(tmp_path, base, pairs)

    return make


def written(folder: Path, file: str, tensors: Tensors, texts: Mapping[str, object]) -> None:
    folder.mkdir()
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / file)
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value))


# ------------------------------------------------------------------------------------- mistakes: model -> changes

Mistake = Callable[[Model], Tensors]


def where(model: Model, *words: str, without: tuple[str, ...] = ()) -> list[str]:
    """The targets with one of these words and none of the others in their names."""
    return [n for n in model.factors if any(w in n for w in words) and not any(w in n for w in without)]


def scaled(factor: Callable[[float], float], *words: str, without: tuple[str, ...] = ()) -> Mistake:
    return lambda model: {
        name: model.added(name, factor(model.scale(name))) for name in where(model, *words, without=without)
    }


def skipped(*words: str, without: tuple[str, ...] = ()) -> Mistake:
    return lambda model: {name: model.base[name] for name in where(model, *words, without=without)}


def unmerged(*words: str) -> Mistake:
    def change(model: Model) -> Tensors:
        found = {}
        for name in where(model, *words):
            a, b = model.factors[name]
            once = model.added(name, model.scale(name))
            found[name] = (once.float() - model.scale(name) * (b @ a)).to(once.dtype)
        return found

    return change


def not_a_number(*words: str) -> Mistake:
    def change(model: Model) -> Tensors:
        name = where(model, *words)[0]
        spoilt = model.merged()[name].clone()
        spoilt[1, 2] = torch.nan
        return {name: spoilt}

    return change


def bystander_moved(model: Model) -> Tensors:
    moved = model.base["lm_head.weight"].clone()
    moved[3] = moved[3] * 1.5
    return {"lm_head.weight": moved}


def rotary_rows(model: Model) -> Tensors:
    """q and k with halves interleaved, the delta kept in the halves' order."""
    found = {}
    for name in where(model, "q_proj", "k_proj"):
        a, b = model.factors[name]
        heads = b.shape[0] // CONFIG["head_dim"]
        turned = b.reshape(heads, 2, CONFIG["head_dim"] // 2, -1).transpose(1, 2).reshape(b.shape)
        found[name] = (model.base[name].float() + model.scale(name) * (turned @ a)).to(model.base[name].dtype)
    return found


def alpha(_: float) -> float:
    return ALPHA


def one(_: float) -> float:
    return 1.0


def twice(scale: float) -> float:
    return 2 * scale


def nine_tenths(scale: float) -> float:
    return 0.9 * scale


def negative(scale: float) -> float:
    return -scale


PAIRS: Mapping[str, tuple[bool, dict[str, Mistake]]] = {
    "alpha-in-v-and-a-layer": (
        False,
        {"LC108": scaled(alpha, "v_proj", without=(".1.",)), "LC502": skipped("layers.1.")},
    ),
    "twice-in-q-and-experts": (True, {"LC102": scaled(twice, "q_proj"), "LC503": skipped("experts")}),
    "rotary-and-a-bystander": (False, {"LC140": rotary_rows, "LC401": bystander_moved}),
    "scale-one-in-gate-and-k": (False, {"LC111": scaled(one, "gate_proj"), "LC501": skipped("k_proj")}),
    "minus-in-o-and-the-end": (
        False,
        {"LC103": scaled(negative, "o_proj", without=(".2.", ".3.")), "LC506": skipped("layers.2.", "layers.3.")},
    ),
    "a-family-and-a-layer": (False, {"LC501": skipped("k_proj"), "LC502": skipped("layers.0.", without=("k_proj",))}),
    "nan-and-a-family": (False, {"LC130": not_a_number("layers.1.self_attn.q_proj"), "LC501": skipped("v_proj")}),
    "twice-in-up-and-alpha-in-down": (False, {"LC102": scaled(twice, "up_proj"), "LC108": scaled(alpha, "down_proj")}),
    "fitted-in-q-and-some-experts": (
        True,
        {"LC110": scaled(nine_tenths, "q_proj"), "LC503": skipped("experts.2.", "experts.3.")},
    ),
    "a-bystander-and-a-layer": (False, {"LC401": bystander_moved, "LC502": skipped("layers.2.")}),
    "experts-and-a-family": (True, {"LC503": skipped("experts"), "LC501": skipped("o_proj")}),
    "unmerged-q-and-twice-in-v": (False, {"LC501": unmerged("q_proj"), "LC102": scaled(twice, "v_proj")}),
    "one-tensor-and-a-layer": (False, {"LC101": skipped("layers.3.mlp.up_proj"), "LC502": skipped("layers.1.")}),
}


DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("ident", "dtype"), [(ident, DTYPES[number % 2]) for number, ident in enumerate(PAIRS)], ids=str
)
def test_two_mistakes_are_both_named_each_where_it_lies(model, ident, dtype) -> None:
    experts, mistakes = PAIRS[ident]
    made = model(dtype, experts)
    changes = {code: mistake(made) for code, mistake in mistakes.items()}
    report = made.report(made.merged() | {name: one for changed in changes.values() for name, one in changed.items()})
    assert report.verdict is Verdict.REFUTED
    found = {one.code: set(one.tensors) for one in report.findings if one.severity != "info"}
    assert found == {code: set(changed) for code, changed in changes.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", [False, True])
def test_the_healthy_merge_of_these_models_is_verified(model, experts, dtype) -> None:
    made = model(dtype, experts)
    report = made.report(made.merged())
    assert report.verdict is Verdict.VERIFIED
    assert not [one for one in report.findings if one.severity != "info"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mistake_in_all_modules_of_one_rank_says_so(model, dtype) -> None:
    made = model(dtype, ranks={"q_proj": 15, "up_proj": 15})
    wrong = scaled(lambda _: ALPHA / R, "q_proj", "up_proj")(made)
    layer = skipped("layers.1.", without=("q_proj", "up_proj"))(made)
    both = made.report(made.merged() | wrong | layer)
    found = {one.code: one for one in both.findings if one.severity != "info"}
    assert {code: set(one.tensors) for code, one in found.items()} == {"LC109": set(wrong), "LC101": set(layer)}
    assert found["LC109"].evidence["just_the_targets_of"] == "rank 15"
    assert "all q_proj and up_proj (8 of 28 targets)" in found["LC109"].message


def test_two_mistakes_that_write_the_same_numbers_are_both_listed(model) -> None:
    made = model(torch.float32, ranks={"q_proj": 12})
    wrong = scaled(lambda _: ALPHA / R, "q_proj")(made)
    (one,) = (one for one in made.report(made.merged() | wrong).findings if one.severity != "info")
    assert one.message.startswith("one of: ")
    assert {one.code, *one.evidence["also"]} == {"LC102", "LC109"}
    assert all(code in one.message and code in one.help for code in ("LC102", "LC109"))
    assert one.evidence["would_tell"] == "targets that are not of rank 12, or the script that merged"


def test_modules_of_another_rank_tell_two_such_mistakes_apart(model) -> None:
    made = model(torch.float32, ranks={"q_proj": 12, "up_proj": 15})
    wrong = scaled(lambda _: ALPHA / R, "q_proj", "up_proj")(made)
    (found,) = (one for one in made.report(made.merged() | wrong).findings if one.severity != "info")
    assert (found.code, set(found.tensors)) == ("LC109", set(wrong))
    assert "one of" not in found.message
    assert "also" not in found.evidence
