"""Patterns over tensors, the words for where they lie, and mistakes that cannot be told apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from lora_check import registry
from lora_check.extent import Place, extent, layers_of, place
from lora_check.faults._keys import rewriting, said
from lora_check.findings import Diagnosis, assign, conclude, rivals
from lora_check.types import Adapter, AdapterConfig, Comparison, Finding, Plan, TensorMeta, Verdict

FAULTS = registry.load("faults")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
DENSE = [f"model.layers.{n}.self_attn.{name}.weight" for n in range(24) for name in ATTENTION]
DENSE += [f"model.layers.{n}.mlp.{name}.weight" for n in range(24) for name in MLP]
MIXTURE = [f"model.layers.{n}.self_attn.{name}.weight" for n in range(4) for name in ATTENTION]
MIXTURE += [f"model.layers.{n}.mlp.experts.{e}.{name}.weight" for n in range(4) for e in range(8) for name in MLP]
TOWERS = [f"visual.blocks.{n}.attn.{name}.weight" for n in range(6) for name in ("qkv", "proj")]
CROSS = [
    f"decoder.layers.{n}.{kind}.{name}" for n in range(3) for kind in ("self_attn", "cross_attn") for name in ATTENTION
]

Choice = Callable[[Place], bool]


@pytest.mark.parametrize(
    ("everything", "chosen", "words"),
    [
        (DENSE, lambda p: True, "all 168 targets"),
        (["head.weight"], lambda p: True, "the only target"),
        (DENSE, lambda p: p.family == "k_proj", "all 24 k_proj"),
        (DENSE, lambda p: p.family == "k_proj" and p.layer > 11, "k_proj of layers 12-23 (12 of 168 targets)"),
        (DENSE, lambda p: p.family == "k_proj" and p.layer == 3, "k_proj of layer 3 (1 of 168 targets)"),
        (DENSE, lambda p: p.layer > 11, "layers 12-23 (84 of 168 targets)"),
        (
            DENSE,
            lambda p: p.family in ("v_proj", "q_proj") and p.layer in (0, 5, 7, 8, 9),
            "q_proj and v_proj of layers 0, 5 and 7-9 (10 of 168 targets)",
        ),
        (DENSE, lambda p: p.family in ATTENTION, "all q_proj, k_proj, v_proj and o_proj (96 of 168 targets)"),
        (DENSE, lambda p: p.family != "o_proj", "all families but o_proj (144 of 168 targets)"),
        (DENSE, lambda p: p.layer % 2, "every 2nd layer from 1 to 23 (84 of 168 targets)"),
        (
            DENSE,
            lambda p: p.layer == 3 or (p.family == "k_proj" and p.layer == 7),
            "layer 3 and k_proj of layer 7 (8 of 168 targets)",
        ),
        ([*DENSE, "lm_head.weight"], lambda p: p.layer is None, "lm_head (1 of 169 targets)"),
        ([*DENSE, "lm_head.weight"], lambda p: p.layer is not None, "all layers (168 of 169 targets)"),
        ([*DENSE, "lm_head.weight"], lambda p: p.layer in (None, 23), "layer 23 and lm_head (8 of 169 targets)"),
        (MIXTURE, lambda p: p.expert is not None, "all experts (96 of 112 targets)"),
        (MIXTURE, lambda p: p.expert in (4, 5, 6, 7) and p.layer == 3, "experts 4-7 of layer 3 (12 of 112 targets)"),
        (MIXTURE, lambda p: p.expert in (1, 3), "experts 1 and 3 in all layers (24 of 112 targets)"),
        (
            MIXTURE,
            lambda p: p.family == "gate_proj" and p.expert < 4,
            "gate_proj of experts 0-3 in all layers (16 of 112 targets)",
        ),
        (MIXTURE, lambda p: p.expert is not None and p.layer == 1, "all experts of layer 1 (24 of 112 targets)"),
        (MIXTURE, lambda p: p.layer > 1, "layers 2-3 (56 of 112 targets)"),
        ([*DENSE, *TOWERS], lambda p: p.stack == "visual.blocks", "all layers of visual.blocks (12 of 180 targets)"),
        (
            [*DENSE, *TOWERS],
            lambda p: p.family == "qkv" and p.layer < 2,
            "qkv of layers 0-1 of visual.blocks (2 of 180 targets)",
        ),
        (CROSS, lambda p: p.path == "cross_attn.q_proj", "all cross_attn.q_proj (3 of 24 targets)"),
        (
            DENSE,
            lambda p: p.layer in (3, 4) and p.family in ATTENTION[: p.layer - 1],
            "q_proj and k_proj of layers 3-4 and v_proj of layer 4 (5 of 168 targets)",
        ),
    ],
)  # fmt: skip
def test_where_a_finding_lies_in_words(everything: Sequence[str], chosen: Choice, words: str) -> None:
    members = [name for name in everything if chosen(place(name))]
    told = extent(members, everything)
    assert told == words
    assert extent(members[::-1], everything) == words


def test_what_cannot_be_said_is_counted_and_other_marks_are_asked() -> None:
    odd = DENSE[::5]
    assert extent(odd, DENSE) == "34 of 168 targets"
    marks = {name: "rank 16" if name in odd else "rank 8" for name in DENSE}
    assert extent(odd, DENSE, marks=marks) == "all 34 targets of rank 16"
    assert extent(odd[1:], DENSE, marks=marks) == "33 of 168 targets"
    assert extent(["b.weight"], ["a.weight", "b.weight"], "tensor") == "b (1 of 2 tensors)"


def test_the_place_of_a_tensor() -> None:
    one = place("model.layers.12.mlp.experts.3.up_proj.weight")
    assert (one.stack, one.layer, one.expert, one.family, one.path) == ("model.layers", 12, 3, "up_proj", "up_proj")
    assert place("h.0.attn.c_attn.bias").family == "c_attn.bias"
    assert place("classifier.3.weight").layer is None
    assert place(f"h.{'9' * 5000}.c_attn.weight").layer is None
    assert layers_of([*DENSE[:4], *DENSE[12:20], "lm_head.weight"]) == {"model.layers": "0, 3-4"}


# ----------------------------------------------------------------------------------------------- the patterns


def seen(tensor: str, code: str | None = None, **changes: object) -> Comparison:
    given = {
        "kind": "target",
        "recipe": "lora-linear",
        "module": tensor.removesuffix(".weight"),
        "adapters": (0,),
        "shape": (5, 5),
        "dtype": "bfloat16",
        "verdict": Verdict.REFUTED if code else Verdict.VERIFIED,
        "exact": not code,
        "signal": 1.0,
    }
    return Comparison(tensor=tensor, code=code, **{**given, **changes})


def named(comparisons: Sequence[Comparison], plan: Plan | None = None) -> dict[str, Finding]:
    """Code -> finding, of all that is about targets."""
    diagnoses = [Diagnosis(tensor=one.tensor, codes=(one.code,)) for one in comparisons if one.code]
    found = conclude(plan or Plan(pairings=()), comparisons, diagnoses)
    return {one.code: one for one in found if one.code.startswith(("LC1", "LC5"))}


def left(names: Sequence[str], chosen: Choice, code: str = "LC101") -> list[Comparison]:
    return [seen(name, code if chosen(place(name)) else None) for name in names]


PATTERNS = {
    "LC501": (DENSE, lambda p: p.family in ("k_proj", "up_proj")),
    "LC502": (DENSE, lambda p: p.layer in (3, 9)),
    "LC503": (MIXTURE, lambda p: p.expert is not None),
    "LC505": ([*DENSE, *TOWERS], lambda p: p.stack == "visual.blocks"),
    "LC506": (DENSE, lambda p: p.layer > 11),
}


@pytest.mark.parametrize("code", PATTERNS)
def test_a_pattern_is_one_finding_and_the_same_with_another_mistake_is_none(code: str) -> None:
    names, chosen = PATTERNS[code]
    found = named(left(names, chosen))
    assert found.keys() == {code}
    assert set(found[code].tensors) == {name for name in names if chosen(place(name))}
    assert extent(found[code].tensors, names) in found[code].message
    assert named(left(names, chosen, "LC102")).keys() == {"LC102"}
    assert named(left(names, lambda p: True)).keys() == {"LC101"}
    assert not named(left(names, lambda p: False))


def test_some_experts_of_some_layers() -> None:
    found = named(left(MIXTURE, lambda p: p.layer == 2 and p.expert in (4, 5, 6, 7)))
    assert found.keys() == {"LC503"}
    assert "experts 4-7 of layer 2" in found["LC503"].message
    half = named(left(MIXTURE, lambda p: p.expert == 4 and p.family != "up_proj"))
    assert half.keys() == {"LC101"}
    assert named(left(MIXTURE, lambda p: p.layer == 2)).keys() == {"LC502"}


def test_one_file_of_several() -> None:
    def homes(of: Callable[[Place], str]) -> Plan:
        return Plan(pairings=(), homes={name: of(place(name)) for name in DENSE})

    thirds = homes(lambda p: f"model-{p.layer // 8}.safetensors")
    found = named(left(DENSE, lambda p: 8 <= p.layer < 16), thirds)
    assert found.keys() == {"LC504"}
    assert found["LC504"].message.startswith("nothing in model-1.safetensors was merged: layers 8-15 (56 of")
    # a layer more or less is no file; nor are files with one target each
    assert named(left(DENSE, lambda p: 8 <= p.layer < 17), thirds).keys() == {"LC502"}
    assert named(left(DENSE, lambda p: 8 <= p.layer < 15), thirds).keys() == {"LC502"}
    assert named(left(DENSE, lambda p: p.layer == 7), homes(lambda p: p.tensor)).keys() == {"LC502"}


def adapters(count: int) -> tuple[Adapter, ...]:
    class Nowhere:
        location = "somewhere"

        def metas(self) -> dict[str, TensorMeta]:
            return {}

    config = AdapterConfig(method="LORA", rank=4, alpha=8)
    return tuple(Adapter(config=config, checkpoint=Nowhere(), dialect="peft", parts=()) for _ in range(count))


def test_an_adapter_of_several_that_is_nowhere() -> None:
    plan = Plan(pairings=(), adapters=adapters(2))
    first = [seen(f"model.layers.{n}.q_proj.weight") for n in range(3)]
    second = [seen(f"model.layers.{n}.{f}.weight", "LC101", adapters=(1,)) for n in range(3) for f in ("k", "v")]
    both = [seen(f"model.layers.{n}.o.weight", "LC127", adapters=(0, 1), told={"missing": [2]}) for n in range(3)]
    found = named([*first, *second, *both], plan)
    assert found.keys() == {"LC507"}
    assert found["LC507"].message.startswith("adapter 2 not merged anywhere: ")
    assert len(found["LC507"].tensors) == 9
    # where one target shows that it was merged, it was
    shown = seen("model.layers.0.up.weight", adapters=(0, 1))
    assert named([*first, *second, shown], plan).keys() == {"LC501"}


def test_one_raw_parameter_of_two() -> None:
    raw = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    config = AdapterConfig(method="LORA", rank=4, alpha=8, raw=raw)
    (one,) = adapters(1)
    plan = Plan(pairings=(), adapters=(Adapter(config=config, checkpoint=one.checkpoint, dialect="peft", parts=()),))
    names = [f"model.layers.{n}.mlp.experts.{leaf}" for n in range(3) for leaf in ("gate_up_proj", "down_proj")]
    attention = [seen(f"model.layers.{n}.self_attn.q_proj.weight") for n in range(3)]
    inner = [seen(name, "LC101" if name.endswith("gate_up_proj") else None) for name in names]
    found = named([*attention, *inner], plan)
    assert found.keys() == {"LC508"}
    assert found["LC508"].evidence["merged"] == ["down_proj"]
    assert named([*attention, *(seen(name, "LC101") for name in names)], plan).keys() == {"LC503"}
    assert named([*attention, *inner]).keys() == {"LC501"}


# ---------------------------------------------------------------------------- mistakes that write the same numbers


def concluded(*codes: tuple[str, ...]) -> list[tuple[str, tuple[str, ...], int]]:
    """(code, the others listed beside it, how many tensors) of each finding, of one tensor for each entry."""
    diagnoses = [Diagnosis(tensor=f"h.{n}.q.weight", codes=one) for n, one in enumerate(codes)]
    comparisons = assign([seen(one.tensor, "LC199") for one in diagnoses], diagnoses)
    found = conclude(Plan(pairings=()), comparisons, diagnoses)
    for one in found:
        assert one.message.startswith("one of: ") == bool(one.evidence.get("also"))
    return sorted((one.code, tuple(one.evidence.get("also", ())), len(one.tensors)) for one in found)


A, B, C = "LC102", "LC108", "LC111"


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        ([(A, B)] * 3, [(A, (B,), 3)]),
        ([(B, A)] * 3, [(B, (A,), 3)]),
        ([(A, B)] * 3 + [(A,)], [(A, (), 4)]),
        ([(A, B)] * 3 + [(B,)], [(B, (), 4)]),
        ([(A, B), (B, C)], [(B, (), 2)]),
        ([(A, B)] * 2 + [(A,), (B,)], [(A, (), 1), (A, (B,), 2), (B, (), 1)]),
        ([(A, B, C)] * 2, [(A, (B, C), 2)]),
        ([(A, B, C), (A, B)], [(A, (B,), 2)]),
        ([(A,), (B,)], [(A, (), 1), (B, (), 1)]),
    ],
)
def test_which_of_several_mistakes_is_named(
    codes: list[tuple[str, ...]], told: list[tuple[str, tuple[str, ...], int]]
) -> None:
    assert concluded(*codes) == told


def test_rivals_explain_as_many_tensors() -> None:
    diagnoses = [Diagnosis(tensor=name, codes=codes) for name, codes in (("x", (A, B)), ("y", (A, B, C)))]
    assert rivals(diagnoses) == {"x": frozenset({A, B}), "y": frozenset({A, B})}


# ------------------------------------------------------------------------------------------ keys that do not match

BASE = {f"model.language_model.layers.{n}.self_attn.{f}" for n in range(4) for f in ("q_proj", "v_proj")}
BASE |= {f"model.visual.layers.{n}.self_attn.{f}" for n in range(2) for f in ("q_proj", "v_proj")}


@pytest.mark.parametrize(
    ("path", "layers", "rewrite"),
    [
        ("language_model.model.layers.{}.self_attn.q_proj", 4, ("language_model.model.", "model.language_model.")),
        ("language_model.model.layers.{}.self_attn.q_proj", 2, None),
        ("thinker.model.language_model.layers.{}.self_attn.v_proj", 4, ("thinker.", "")),
        ("language_model.layers.{}.self_attn.q_proj", 4, ("", "model.")),
        ("model.language_model.layers.{}.attention.q_proj", 4, (".attention.", ".self_attn.")),
        ("model.language_model.layers.{}.self_attn.k_proj", 4, None),
        ("model.language_model.layers.{}.attention.q_proj", 5, None),
    ],
)
def test_the_rewriting_after_which_all_keys_match(path: str, layers: int, rewrite: tuple[str, str] | None) -> None:
    assert rewriting([path.format(n) for n in range(layers)], BASE) == rewrite


def test_a_rewriting_in_words() -> None:
    assert said(("", "model.")) == "'model.' put in front"
    assert said(("thinker.", "")) == "'thinker.' taken off"
    assert said(("a.", "b.")) == "'b.' in place of 'a.'"


def test_unused_tensors_are_told_with_the_rewriting_that_would_place_them() -> None:
    keys = [f"base_model.model.x.y.layers.{n}.self_attn.q_proj.lora_{s}.weight" for n in range(4) for s in "AB"]
    metas = {
        f"{name}.weight": TensorMeta(name=name, shape=(4, 4), dtype="bfloat16") for name in BASE if "visual" not in name
    }
    plan = Plan(pairings=(), orphans=tuple((0, key) for key in keys), base_metas=metas)
    (one,) = FAULTS["LC205"].detect(plan)
    assert one.message.endswith("; all of them would with 'model.language_model.' in place of 'x.y.'")
    assert one.evidence["rewrite"] == {"x.y.": "model.language_model."}
    (other,) = FAULTS["LC205"].detect(
        Plan(pairings=(), orphans=(*plan.orphans, (0, "strange.lora_A.weight")), base_metas=metas)
    )
    assert "would with" not in other.message


def test_foreign_keys_that_were_merged_all_the_same_are_no_mistake(tmp_path) -> None:
    import lora_check

    rng = torch.Generator().manual_seed(0)
    base = {f"model.layers.{n}.q_proj.weight": torch.randn(8, 6, generator=rng) for n in range(2)}
    pairs = {name: (torch.randn(2, 6, generator=rng), torch.randn(8, 2, generator=rng)) for name in base}
    merged = {name: base[name] + 2.0 * (b @ a) for name, (a, b) in pairs.items()}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}'
    )
    from safetensors.torch import save_file

    front = "base_model.model._orig_mod."
    save_file(
        {
            f"{front}{name.removesuffix('.weight')}.lora_{side}.weight": one.contiguous()
            for name, pair in pairs.items()
            for side, one in zip("AB", pair, strict=True)
        },
        adapter / "adapter_model.safetensors",
    )
    codes = {one.code for one in lora_check.check(base, adapter, merged).findings if one.severity != "info"}
    assert codes == {"LC005"}
    codes = {one.code for one in lora_check.check(base, adapter, dict(base)).findings if one.severity != "info"}
    assert codes == {"LC509"}
    half = merged | dict(list(base.items())[:1])
    codes = {one.code for one in lora_check.check(base, adapter, half).findings if one.severity != "info"}
    assert codes == {"LC005", "LC502"}
