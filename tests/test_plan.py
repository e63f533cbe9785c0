"""Planning by names and shapes alone: what is paired with what, what is left over, what nobody can decide."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft_worlds
import pytest
import torch

import lora_check
from lora_check import registry
from lora_check.findings import best_verdict, structural
from lora_check.locations import open_checkpoint, read_adapter_config
from lora_check.plan import make_plan
from lora_check.types import Adapter, Pairing, Plan, TensorMeta

Shapes = Mapping[str, tuple[int, ...]]
PEFT = "base_model.model."
OUT, IN, R = 6, 4, 2


class Headers:
    """A checkpoint of which nothing but the headers may be asked."""

    def __init__(self, shapes: Shapes, config: Mapping[str, Any] | None = None, dtype: str = "float32") -> None:
        self.location = "headers only"
        self.config = config or {}
        self._metas = {name: TensorMeta(name=name, shape=tuple(shape), dtype=dtype) for name, shape in shapes.items()}

    def metas(self) -> Mapping[str, TensorMeta]:
        return self._metas

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(f"planning read {name}")

    def close(self) -> None:
        """Nothing is open."""


def adapter_of(shapes: Shapes, **config: Any) -> Adapter:
    raw = {"peft_type": "LORA", "r": R, "lora_alpha": 6, **config}
    return registry.load("dialects")["peft"].read(raw, Headers(shapes))


def pair(module: str, out: int = OUT, wide: int = IN, r: int = R, prefix: str = PEFT) -> dict[str, tuple[int, ...]]:
    """The two factors of one linear module."""
    return {f"{prefix}{module}.lora_A.weight": (r, wide), f"{prefix}{module}.lora_B.weight": (out, r)}


def planned(base: Shapes, adapters: Adapter | Sequence[Adapter], merged: Shapes | None = None, **options: Any) -> Plan:
    """A plan whose merged file has the base's names unless others are given."""
    config = {key: options.pop(key, {}) for key in ("base_config", "merged_config")}
    given = [adapters] if isinstance(adapters, Adapter) else list(adapters)
    others = Headers(base if merged is None else merged, config["merged_config"])
    return make_plan(Headers(base, config["base_config"]), given, others, **options)


def codes(plan: Plan) -> set[str]:
    return {one.code for one in structural(plan)}


def word(plan: Plan) -> str:
    """The best verdict that a check of this plan can come to."""
    doubt = any(one.undecidable for one in plan.pairings)
    best = best_verdict(structural(plan)).value
    return "inconclusive" if doubt and best == "verified" else best


def kinds(plan: Plan) -> dict[str, str]:
    return {one.merged.name: one.kind for one in plan.pairings}


def one(plan: Plan, name: str) -> Pairing:
    (found,) = [pairing for pairing in plan.pairings if pairing.merged.name == name]
    return found


LAYERS = {f"model.layers.{n}.{leaf}.weight": (OUT, IN) for n in (0, 1) for leaf in ("q_proj", "v_proj")}
EVERYTHING = {**LAYERS, "model.embed_tokens.weight": (9, IN), "lm_head.weight": (9, IN), "model.norm.weight": (IN,)}
Q0 = "model.layers.0.q_proj"


# ---------------------------------------------------------------------------- every name, in exactly one place


def demand_every_name_once(plan: Plan, base: Shapes, adapters: Sequence[Shapes], merged: Shapes) -> None:
    """MERGED: each name once. BASE: paired, missing or dropped. Adapter: used, an orphan, or of a tensor in doubt."""
    apart = [
        [one.merged.name for one in plan.pairings],
        plan.extra,
        [one.name for one in plan.reshaped],
        plan.skipped,
    ]
    assert Counter(name for names in apart for name in names) == Counter(list(merged))
    judged = {one.base.name for one in plan.pairings if one.base}
    unpaired = {one.name for one in plan.reshaped} | set(plan.skipped)
    gone = Counter([*plan.missing, *plan.dropped])
    assert not [name for name, count in gone.items() if count > 1]
    assert not judged & gone.keys()
    for name in base:
        hidden = not judged & {name} and not gone.keys() & {name}
        assert not hidden or name in unpaired or any(one.endswith(name) or name.endswith(one) for one in unpaired), name
    for index, shapes in enumerate(adapters):
        steps = [step for one in plan.pairings for step in one.steps if step.adapter == index]
        used = {tensor for step in steps for tensor in step.factors.values()}
        orphans = Counter(name for number, name in plan.orphans if number == index)
        assert not [name for name, count in orphans.items() if count > 1]
        assert not used & orphans.keys()
        in_doubt = [one.module for one in plan.pairings if one.undecidable]
        lost = [*in_doubt, *unpaired, *plan.missing, *plan.dropped]
        for name in shapes:
            if name not in used and name not in orphans:
                assert any(stem(place) in name for place in lost), name


def stem(name: str) -> str:
    """What a module has in common with the tensors of its adapter, whatever stands before both."""
    module = re.sub(r"\.(weight|bias|in_proj_weight|in_proj_bias)$", "", name)
    return re.sub(r"^(model|bert|transformer)\.", "", module)


def shapes_of(location: Path, role: str) -> dict[str, tuple[int, ...]]:
    return {name: meta.shape for name, meta in open_checkpoint(location, role=role).metas().items()}


@pytest.mark.parametrize("name", peft_worlds.names())
def test_every_name_of_a_world_occurs_once(world, name: str) -> None:
    inputs = world(name, peft_worlds.RECIPES[name].dtypes[0])
    opened = [open_checkpoint(path, role="adapter") for path in inputs.adapters]
    dialect = registry.load("dialects")["peft"]
    adapters = [dialect.read(read_adapter_config(one), one) for one in opened]
    base, merged = (
        open_checkpoint(path, role=role) for path, role in ((inputs.base, "base"), (inputs.merged, "merged"))
    )
    plan = make_plan(base, adapters, merged)
    names = [shapes_of(path, "adapter") for path in inputs.adapters]
    demand_every_name_once(plan, shapes_of(inputs.base, "base"), names, shapes_of(inputs.merged, "merged"))
    assert not plan.missing
    assert not plan.extra
    assert not plan.reshaped
    assert plan.targets


def mutilated(shapes: Shapes, draw: random.Random) -> dict[str, tuple[int, ...]]:
    """Some names lost, some renamed, some shapes changed, some names added, the order shaken."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        fate = draw.random()
        if fate < 0.1:
            continue
        if fate < 0.15:
            name = draw.choice(["extra.", "model.", "base_model.model.", "module."]) + name
        elif fate < 0.2:
            name = name.partition(".")[2] or name
        elif fate < 0.25:
            name = name.replace("weight", "bias")
        elif fate < 0.3:
            shape = shape[::-1]
        elif fate < 0.35:
            shape = (*shape, 1)
        found[name] = shape
    for _ in range(draw.randrange(3)):
        found[f"{draw.choice(['lm_head', 'x.y', 'model.embed_tokens', 'score'])}.weight"] = (draw.randrange(4), 3)
    return dict(sorted(found.items(), key=lambda _: draw.random()))


WORLDS_TO_MUTILATE = ("llama-all-seven", "llama-tied-both", "llama-bias-all", "gpt2", "mha", "llama-two-adapters")


@pytest.mark.parametrize("name", WORLDS_TO_MUTILATE)
def test_every_name_of_mutilated_headers_occurs_once(world, name: str) -> None:
    inputs = world(name)
    whole = [shapes_of(inputs.base, "base"), shapes_of(inputs.merged, "merged")]
    factors = [shapes_of(path, "adapter") for path in inputs.adapters]
    config = json.loads((inputs.adapters[0] / "adapter_config.json").read_text())
    model = json.loads((inputs.base / "config.json").read_text())
    draw = random.Random(name)
    seen: set[str] = set()
    for _ in range(60):
        base, merged = (mutilated(one, draw) for one in whole)
        files = [mutilated(one, draw) for one in factors]
        adapters = [adapter_of(one, **config) for one in files]
        plan = planned(base, adapters, merged, base_config=model, merged_config=draw.choice([model, {}]))
        apart = [[one.merged.name for one in plan.pairings], plan.extra, [one.name for one in plan.reshaped]]
        assert Counter(name for names in apart for name in names) == Counter(list(merged))
        judged = {one.base.name for one in plan.pairings if one.base}
        assert not judged & {*plan.missing, *plan.dropped}
        for index, file in enumerate(files):
            used = {t for one in plan.pairings for s in one.steps if s.adapter == index for t in s.factors.values()}
            assert used <= file.keys()
            assert not used & {name for number, name in plan.orphans if number == index}
        seen |= codes(plan)
        assert word(plan) != "verified" or not (plan.missing or plan.extra or plan.reshaped or plan.orphans)
    assert {"LC201", "LC202", "LC203", "LC205"} <= seen


def test_the_count_of_names_notices_one_that_is_lost_or_twice(world) -> None:
    plan = planned(EVERYTHING, adapter_of(pair(Q0)))
    demand_every_name_once(plan, EVERYTHING, [pair(Q0)], EVERYTHING)
    for merged in ({**EVERYTHING, "more": (1,)}, {"model.norm.weight": (IN,)}):
        with pytest.raises(AssertionError):
            demand_every_name_once(plan, EVERYTHING, [pair(Q0)], merged)
    with pytest.raises(AssertionError, match="lost"):
        demand_every_name_once(plan, {**EVERYTHING, "lost": (1,)}, [pair(Q0)], EVERYTHING)
    with pytest.raises(AssertionError, match="unheard"):
        demand_every_name_once(plan, EVERYTHING, [{**pair(Q0), "unheard": (1,)}], EVERYTHING)


def test_planning_reads_no_tensor() -> None:
    plan = planned(EVERYTHING, [adapter_of(pair(Q0)), adapter_of(pair("lm_head", 9))])
    assert len(plan.targets) == 2
    with pytest.raises(AssertionError, match="planning read w"):
        Headers({"w": (1,)}).read("w")


def test_planning_from_files_touches_headers_only(world, load, save, tmp_path) -> None:
    inputs = world("llama-qv")
    whole = save(load(inputs.merged), inputs.merged) / "model.safetensors"
    raw = bytearray(whole.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start:] = b"\xff" * (len(raw) - start)
    whole.write_bytes(raw)
    from lora_check.pipeline import plan

    kept = plan(*inputs.args)
    noise = plan(*inputs.but(merged=whole.parent).args)
    assert noise.pairings == kept.pairings
    assert lora_check.check(*inputs.but(merged=whole.parent).args).verdict.value == "refuted"


# ------------------------------------------------------------------------------------------------------ pairing


@pytest.mark.parametrize("shift", ["", "model.", "transformer.", "bert."])
@pytest.mark.parametrize("side", ["base", "merged", "adapter"])
def test_one_leading_segment_more_or_less_is_the_same_name(shift: str, side: str) -> None:
    inner = {f"layers.{n}.q_proj.weight": (OUT, IN) for n in (0, 1)} | {"norm.weight": (IN,)}
    prefixed = {f"{shift}{name}": shape for name, shape in inner.items()}
    base, merged = (prefixed if side == one else inner for one in ("base", "merged"))
    module = f"{shift if side == 'adapter' else ''}layers.1.q_proj"
    plan = planned(base, adapter_of(pair(module)), merged)
    assert (plan.missing, plan.extra, plan.orphans) == ((), (), ())
    target = next(iter(plan.targets))
    assert (len(plan.targets), target.merged.name) == (1, next(name for name in merged if "layers.1" in name))
    assert target.base is not None
    assert target.base.name == next(name for name in base if "layers.1" in name)


def test_two_leading_segments_are_another_name() -> None:
    plan = planned({"a.b.fc.weight": (OUT, IN)}, adapter_of(pair("a.b.fc")), {"fc.weight": (OUT, IN)})
    assert (plan.missing, plan.extra) == (("a.b.fc.weight",), ("fc.weight",))
    assert word(plan) == "inconclusive"


def test_a_name_that_two_prefixes_could_have_is_not_guessed() -> None:
    base = {"a.fc.weight": (OUT, IN), "b.fc.weight": (OUT, IN)}
    plan = planned(base, adapter_of(pair("fc")))
    assert {name for _, name in plan.orphans} == set(pair("fc"))
    assert word(plan) == "inconclusive"


TIED = {name: shape for name, shape in EVERYTHING.items() if name != "lm_head.weight"}
EMBED = "model.embed_tokens.weight"


def test_a_delta_on_a_tied_head_changes_the_embedding() -> None:
    plan = planned(TIED, adapter_of(pair("lm_head", 9)), base_config={"tie_word_embeddings": True})
    assert [one.merged.name for one in plan.targets] == [EMBED]
    assert not plan.orphans


def test_an_embedding_s_delta_comes_before_its_tied_head_s() -> None:
    embedding = {
        f"{PEFT}model.embed_tokens.lora_embedding_{side}": shape for side, shape in (("A", (R, 9)), ("B", (IN, R)))
    }
    for shapes in (pair("lm_head", 9) | embedding, embedding | pair("lm_head", 9)):
        plan = planned(TIED, adapter_of(shapes))
        assert [step.recipe.name for step in one(plan, EMBED).steps] == ["lora-embedding", "lora-linear"]


def test_a_head_written_out_beside_its_tied_embedding_follows_it() -> None:
    plan = planned(TIED, adapter_of(pair("lm_head", 9)), EVERYTHING)
    assert not plan.extra
    assert one(plan, "lm_head.weight").base == one(plan, EMBED).base
    assert one(plan, "lm_head.weight").steps == one(plan, EMBED).steps


def test_a_tied_head_that_is_left_out_is_dropped_and_one_that_was_trained_is_missing() -> None:
    config = {"base_config": {"tie_word_embeddings": True}, "merged_config": {"tie_word_embeddings": True}}
    plan = planned(EVERYTHING, adapter_of(pair(Q0)), TIED, **config)
    assert (plan.missing, plan.dropped) == ((), ("lm_head.weight",))
    plan = planned(EVERYTHING, adapter_of(pair("lm_head", 9)), TIED, **config)
    assert (plan.missing, plan.dropped) == (("lm_head.weight",), ())


def test_a_tied_matrix_that_lies_under_the_name_of_its_head_alone_is_paired_once() -> None:
    """As safetensors' save_model writes it: the alphabetically first name is kept."""
    merged = {("lm_head.weight" if name == EMBED else name): shape for name, shape in TIED.items()}
    config = {"base_config": {"tie_word_embeddings": True}, "merged_config": {"tie_word_embeddings": True}}
    plan = planned(TIED, adapter_of(pair(Q0)), merged, **config)
    assert (plan.missing, plan.extra) == ((), ())
    assert one(plan, "lm_head.weight").base.name == EMBED


@pytest.mark.parametrize("name", ["model.norm.weight", f"{Q0}.weight"])
def test_a_second_copy_under_another_prefix_is_an_extra_tensor(name: str) -> None:
    for copy in (f"copy.{name}", name.partition(".")[2]):
        plan = planned(EVERYTHING, adapter_of(pair(Q0)), {**EVERYTHING, copy: EVERYTHING[name]})
        assert plan.extra == (copy,)
        assert word(plan) == "refuted"


def test_a_tied_head_saved_whole_becomes_a_tensor_of_its_own() -> None:
    tie = {"base_config": {"tie_word_embeddings": True}}
    plan = planned(TIED, adapter_of({f"{PEFT}lm_head.weight": (9, IN)}), EVERYTHING, **tie)
    assert (plan.missing, plan.extra) == ((), ())
    assert kinds(plan)["lm_head.weight"] == "copy"
    assert kinds(plan)[EMBED] == "bystander"
    tied = planned(TIED, adapter_of({f"{PEFT}lm_head.weight": (9, IN)}), TIED, **tie)
    assert tied.missing == ("lm_head.weight",)
    assert word(tied) == "refuted"


@pytest.mark.parametrize("rows", [5, 11])
def test_a_resized_vocabulary_replaces_the_embedding_at_its_own_size(rows: int) -> None:
    names = (EMBED, "lm_head.weight")
    shapes = {f"{PEFT}{name}": (rows, IN) for name in names} | pair(Q0)
    plan = planned(EVERYTHING, adapter_of(shapes), {**EVERYTHING, **dict.fromkeys(names, (rows, IN))})
    assert not plan.reshaped
    assert {kinds(plan)[name] for name in names} == {"copy"}
    unresized = planned(EVERYTHING, adapter_of(shapes))
    assert {one.merged.name for one in unresized.pairings if one.wanted == (rows, IN)} == set(names)
    assert {one.rows for one in unresized.pairings} == {None, min(rows, 9)}
    assert codes(unresized) == {"LC203"}
    assert word(unresized) == "refuted"


def test_a_tensor_of_another_shape_is_neither_paired_nor_forgotten() -> None:
    plan = planned(EVERYTHING, adapter_of(pair(Q0)), {**EVERYTHING, f"{Q0}.weight": (IN, OUT)})
    (found,) = plan.reshaped
    assert (found.name, found.expected, found.actual) == (f"{Q0}.weight", str((OUT, IN)), str((IN, OUT)))
    assert codes(plan) == {"LC203"}


def test_factors_of_a_module_that_the_base_lacks_are_orphans() -> None:
    plan = planned(EVERYTHING, adapter_of(pair(Q0) | pair("model.layers.7.q_proj")))
    assert {name for _, name in plan.orphans} == set(pair("model.layers.7.q_proj"))
    assert len(plan.targets) == 1
    assert (codes(plan), word(plan)) == ({"LC205"}, "inconclusive")


def test_a_name_that_is_no_part_of_an_adapter_is_an_orphan() -> None:
    shapes = {f"{PEFT}{Q0}.lora_C.weight": (R, R), **pair(Q0)}
    plan = planned(EVERYTHING, adapter_of(shapes))
    assert plan.orphans == ((0, f"{PEFT}{Q0}.lora_C.weight"),)


def test_targets_of_the_configuration_without_factors_are_told_and_stay_the_base_s() -> None:
    plan = planned(EVERYTHING, adapter_of(pair(Q0), target_modules=["q_proj"]))
    assert plan.idle == ("model.layers.1.q_proj",)
    assert kinds(plan)["model.layers.1.q_proj.weight"] == "bystander"
    assert (codes(plan), word(plan)) == ({"LC006"}, "verified")
    both = pair(Q0) | pair("model.layers.1.q_proj")
    assert planned(EVERYTHING, adapter_of(both, target_modules=["q_proj"])).idle == ()


@pytest.mark.parametrize("narrowing", [{"layers_to_transform": [0]}, {"exclude_modules": ["layers.1.q_proj"]}])
def test_a_configuration_that_narrows_its_targets_makes_none_idle(narrowing: dict[str, Any]) -> None:
    assert planned(EVERYTHING, adapter_of(pair(Q0), target_modules=["q_proj"], **narrowing)).idle == ()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_rank_that_is_not_that_of_the_factors_is_a_contradiction_and_the_factors_are_believed(rank: int) -> None:
    plan = planned(EVERYTHING, adapter_of(pair(Q0), r=rank))
    assert len(plan.contradictions) == 1
    assert f"r = {rank}" in plan.contradictions[0]
    assert (codes(plan), word(plan)) == ({"LC002"}, "inconclusive")
    assert plan.targets[0].steps[0].scale.value == 6 / R
    assert planned(EVERYTHING, adapter_of(pair(Q0))).contradictions == ()


HALVES = {
    "A without B": {f"{PEFT}{Q0}.lora_A.weight": (R, IN)},
    "B without A": {f"{PEFT}{Q0}.lora_B.weight": (OUT, R)},
    "a magnitude without factors": {f"{PEFT}{Q0}.lora_magnitude_vector": (OUT,)},
    "embedding A without B": {f"{PEFT}model.embed_tokens.lora_embedding_A": (R, 9)},
    "ranks that differ": {f"{PEFT}{Q0}.lora_A.weight": (R, IN), f"{PEFT}{Q0}.lora_B.weight": (OUT, R + 1)},
    "factors of another width": pair(Q0, wide=IN + 1),
    "factors of another height": pair(Q0, out=OUT + 1),
    "a magnitude of another length": {**pair(Q0), f"{PEFT}{Q0}.lora_magnitude_vector": (OUT + 1,)},
    "factors over a norm": pair("model.norm"),
}


@pytest.mark.parametrize("case", HALVES)
def test_factors_that_fit_no_recipe_leave_their_target_undecided(case: str) -> None:
    plan = planned(EVERYTHING, adapter_of(pair("model.layers.1.v_proj") | HALVES[case]))
    assert [name for name in kinds(plan) if one(plan, name).undecidable]
    assert "LC002" in codes(plan)
    assert word(plan) == "inconclusive"
    assert len([target for target in plan.targets if not target.undecidable]) == 1


TWICE = {
    "with and without the adapter's name": ({f"{PEFT}{Q0}.lora_A.default.weight": (R, IN)}, pair(Q0)),
    "two adapter names": (
        {f"{PEFT}{Q0}.lora_{side}.one.weight": shape for side, shape in (("A", (R, IN)), ("B", (OUT, R)))},
        {f"{PEFT}{Q0}.lora_{side}.two.weight": shape for side, shape in (("A", (R, IN)), ("B", (OUT, R)))},
    ),
    "with and without the prefix": (pair(Q0), pair(Q0, prefix="")),
    "wrapped and not": (pair(Q0), pair(Q0, prefix=f"module.{PEFT}")),
    "a module saved twice": (
        {f"{PEFT}lm_head.modules_to_save.one.weight": (9, IN)},
        {f"{PEFT}lm_head.modules_to_save.two.weight": (9, IN)} | pair(Q0),
    ),
}


@pytest.mark.parametrize("case", TWICE)
def test_two_adapter_tensors_for_one_place_are_never_silently_one(case: str) -> None:
    first, second = TWICE[case]
    plan = planned(EVERYTHING, adapter_of(first | second))
    used = {tensor for pairing in plan.pairings for step in pairing.steps for tensor in step.factors.values()}
    told = {name for _, name in plan.orphans}
    assert (first | second).keys() <= used | told or word(plan) != "verified"
    copies = [step for step in one(plan, "lm_head.weight").steps if step.factors]
    assert len(copies) < 2 or word(plan) != "verified"


PROMISES = {
    "a magnitude": {"use_dora": True},
    "a saved module": {"modules_to_save": ["lm_head"]},
    "token rows": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    "a bias of lora_B": {"lora_bias": True},
}


@pytest.mark.parametrize("case", PROMISES)
def test_what_the_configuration_promises_and_the_file_lacks_is_told(case: str) -> None:
    """PEFT starts a missing magnitude at the norm of the base, which is no plain LoRA, and refuses a missing module."""
    plan = planned(EVERYTHING, adapter_of(pair(Q0), **PROMISES[case]))
    assert codes(plan), "nothing is told"
    assert case != "a magnitude" or word(plan) == "inconclusive"


ROWS = {
    "no indices": {},
    "the indices of another module": {"trainable_token_indices": {"wte": [1, 2]}},
    "fewer indices than rows": {"trainable_token_indices": {"embed_tokens": [1]}},
    "more indices than rows": {"trainable_token_indices": {"embed_tokens": [1, 2, 3]}},
    "an index beyond the vocabulary": {"trainable_token_indices": {"embed_tokens": [1, 9]}},
    "a negative index": {"trainable_token_indices": {"embed_tokens": [1, -1]}},
}
TOKENS = {f"{PEFT}model.embed_tokens.token_adapter.trainable_tokens_delta": (2, IN)}


@pytest.mark.parametrize("case", ROWS)
def test_trained_rows_without_their_places_leave_the_embedding_undecided(case: str) -> None:
    try:
        outcome = word(planned(EVERYTHING, adapter_of(pair(Q0) | TOKENS, **ROWS[case])))
    except lora_check.LoraCheckError as refusal:
        outcome = f"refused: {refusal.message}"
    assert outcome == "inconclusive" or "token" in outcome


def test_trained_rows_with_their_places_are_decided() -> None:
    config = {"trainable_token_indices": {"embed_tokens": [0, 8]}}
    plan = planned(EVERYTHING, adapter_of(pair(Q0) | TOKENS, **config))
    assert (one(plan, EMBED).steps[0].tokens, word(plan)) == ((0, 8), "verified")


UNSUPPORTED: Mapping[str, Mapping[str, Any]] = {
    "LOHA with LoRA's factors": {"peft_type": "LOHA"},
    "IA3 with LoRA's factors": {"peft_type": "IA3"},
    "XLORA": {"peft_type": "XLORA"},
    "a type of tomorrow": {"peft_type": "TOMORROW"},
    "pissa_niter_16": {"init_lora_weights": "pissa_niter_16"},
    "loftq": {"init_lora_weights": "loftq"},
    "corda": {"init_lora_weights": "corda"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "arrow_config": {"arrow_config": {"top_k": 3}},
    "corda_config": {"corda_config": {"rank": 3}},
    "kasa_config": {"kasa_config": {"x": 1}},
    "layer_replication": {"layer_replication": [[0, 1]]},
    "use_qalora": {"use_qalora": True},
    "unknown key": {"use_a_formula_of_tomorrow": True},
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_feature_nobody_here_recomputes_leaves_its_targets_undecided(case: str) -> None:
    plan = planned(EVERYTHING, adapter_of(pair(Q0), **UNSUPPORTED[case]))
    doubtful = [name for name in kinds(plan) if one(plan, name).undecidable]
    assert doubtful == [f"{Q0}.weight"]
    assert "LC301" in codes(plan)
    assert word(plan) == "inconclusive"


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_check_with_such_a_feature_is_inconclusive_whatever_merged_holds(case: str, tmp_path: Path, save) -> None:
    base = {name: torch.randn(shape) for name, shape in EVERYTHING.items()}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": 6, **UNSUPPORTED[case]})
    )
    factors = {name: torch.randn(shape) for name, shape in pair(Q0).items()}
    adapter = save(factors, tmp_path, "adapter_model.safetensors")
    for merged in (base, {**base, f"{Q0}.weight": torch.randn(OUT, IN)}):
        report = lora_check.check(base, adapter, dict(merged))
        assert (report.verdict.value, report.exit_code) == ("inconclusive", 3)
        assert "LC301" in {found.code for found in report.findings}
    report = lora_check.check(base, adapter, {**base, "model.norm.weight": torch.randn(IN)})
    assert report.verdict.value == "refuted"


FALSY = (False, None, {}, [], "")


@pytest.mark.parametrize("value", FALSY, ids=repr)
def test_such_a_key_that_is_switched_off_changes_nothing(value: Any) -> None:
    # An empty kasa_config is one with PEFT's defaults: only null switches it off.
    kept = ("peft_type", "init_lora_weights", "kasa_config")
    off = {key: value for case in UNSUPPORTED.values() for key in case if key not in kept}
    plan = planned(EVERYTHING, adapter_of(pair(Q0), **off))
    assert (codes(plan), word(plan)) == (set(), "verified")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", None])
def test_an_initialisation_that_leaves_the_base_alone_is_no_doubt(init: Any) -> None:
    plan = planned(EVERYTHING, adapter_of(pair(Q0), init_lora_weights=init))
    assert word(plan) == "verified"


@pytest.mark.parametrize("key", ["use_a_formula_of_tomorrow", "use_qalora"])
def test_one_unsupported_adapter_of_two_leaves_the_other_s_targets_alone(key: str) -> None:
    plan = planned(EVERYTHING, [adapter_of(pair(Q0)), adapter_of(pair("model.layers.1.q_proj"), **{key: True})])
    assert [name for name in kinds(plan) if one(plan, name).undecidable] == ["model.layers.1.q_proj.weight"]


def test_two_dora_adapters_on_one_target_are_not_decided() -> None:
    shapes = {**pair(Q0), f"{PEFT}{Q0}.lora_magnitude_vector": (OUT,)}
    dora = adapter_of(shapes, use_dora=True)
    assert "DoRA" in one(planned(EVERYTHING, [dora, dora]), f"{Q0}.weight").undecidable
    assert one(planned(EVERYTHING, [dora]), f"{Q0}.weight").undecidable == ""
    apart = planned(EVERYTHING, [dora, adapter_of(pair("model.layers.1.q_proj"))])
    assert not [name for name in kinds(apart) if one(apart, name).undecidable]


def test_include_and_exclude_leave_tensors_out_and_say_so() -> None:
    plan = planned(EVERYTHING, adapter_of(pair(Q0)), include=["model.layers.*"], exclude=["*v_proj*"])
    assert sorted(kinds(plan)) == [f"model.layers.{n}.q_proj.weight" for n in (0, 1)]
    assert len(plan.skipped) == len(EVERYTHING) - 2
    demand_every_name_once(plan, EVERYTHING, [pair(Q0)], EVERYTHING)
    assert (codes(plan), word(plan)) == ({"LC305"}, "inconclusive")
    assert planned(EVERYTHING, adapter_of(pair(Q0)), include=["*"]).skipped == ()


# ------------------------------------------------------------------------------------------- ranks and scales


PATTERNS = [
    # (rank_pattern, alpha_pattern, module, r, alpha): worked out by hand, first match of the file wins
    ({}, {}, "model.layers.0.q_proj", 2, 6),
    ({"q_proj": 4}, {}, "model.layers.0.q_proj", 4, 6),
    ({"q_proj": 4}, {}, "model.layers.0.v_proj", 2, 6),
    ({}, {"q_proj": 9}, "model.layers.0.q_proj", 2, 9),
    ({"q_proj": 4, "layers.0.q_proj": 3}, {}, "model.layers.0.q_proj", 4, 6),
    ({"layers.0.q_proj": 3, "q_proj": 4}, {}, "model.layers.0.q_proj", 3, 6),
    ({"layers.0.q_proj": 3, "q_proj": 4}, {}, "model.layers.1.q_proj", 4, 6),
    ({"proj": 4}, {}, "model.layers.0.q_proj", 2, 6),  # a whole last segment, not its end
    ({"_proj": 4}, {}, "model.layers.0.q_proj", 2, 6),
    ({r".*_proj": 4}, {}, "model.layers.0.q_proj", 4, 6),
    ({r"layers\.0\..*": 4}, {}, "model.layers.0.q_proj", 4, 6),
    ({"layers.0": 4}, {}, "model.layers.0.q_proj", 2, 6),  # the module itself, not what is inside
    ({"^q_proj": 4}, {}, "model.layers.0.q_proj", 2, 6),  # anchored: the whole path, or nothing
    ({r"^model\.layers\.0\.q_proj": 4}, {}, "model.layers.0.q_proj", 4, 6),
    ({"q_proj$": 4}, {}, "model.layers.0.q_proj", 4, 6),
    ({"Q_PROJ": 4}, {}, "model.layers.0.q_proj", 2, 6),
    ({"q_proj": 4}, {"v_proj": 9, "q_proj": 10, "layers.0.q_proj": 11}, "model.layers.0.q_proj", 4, 10),
    ({"q_proj|v_proj": 4}, {}, "model.layers.0.v_proj", 4, 6),
    ({}, {"model.layers.0.q_proj": 9, "q_proj": 5}, "model.layers.1.q_proj", 2, 5),
]


@pytest.mark.parametrize("row", PATTERNS, ids=lambda row: f"{row[0]} {row[1]} {row[2][-8:]}")
@pytest.mark.parametrize("rslora", [False, True])
def test_the_first_pattern_of_the_file_gives_rank_and_alpha(row: tuple[Any, ...], rslora: bool) -> None:
    ranks, alphas, module, r, alpha = row
    shapes = pair(module, r=r)
    plan = planned(EVERYTHING, adapter_of(shapes, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora))
    assert plan.contradictions == ()
    scale = plan.targets[0].steps[0].scale
    assert (scale.rank, scale.alpha, scale.default_rank, scale.default_alpha) == (r, alpha, R, 6)
    assert scale.value == pytest.approx(alpha / (r**0.5 if rslora else r), rel=1e-15)
    assert codes(plan) == set()


def test_a_rank_pattern_that_the_factors_deny_is_a_contradiction() -> None:
    plan = planned(EVERYTHING, adapter_of(pair(Q0, r=2), rank_pattern={"q_proj": 4}))
    assert len(plan.contradictions) == 1


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda row: f"{row[0]} {row[1]} {row[2][-8:]}")
def test_peft_chooses_the_same_pattern(pattern: tuple[Any, ...]) -> None:
    from peft.utils.other import get_pattern_key

    ranks, alphas, module, r, alpha = pattern
    assert ranks.get(get_pattern_key(ranks.keys(), module), R) == r
    assert alphas.get(get_pattern_key(alphas.keys(), module), 6) == alpha


# -------------------------------------------------------------------------------------- orientation and layers


def recipe_of(shape: tuple[int, int], others: Shapes | None = None, **options: Any) -> str:
    """The recipe of module `fc` of that shape (out, in), beside the targets of `others`."""
    config, flag = options.pop("config", {}), options.pop("flag", None)
    base = {"fc.weight": shape, **{f"{name}.weight": kept for name, kept in (others or {}).items()}}
    shapes = pair("fc", *shape)
    for name, kept in (others or {}).items():
        shapes |= pair(name, OUT, IN) if set(kept) == {OUT, IN} else pair(name, *kept)
    plan = planned(base, adapter_of(shapes, fan_in_fan_out=flag), base_config=config)
    return one(plan, "fc.weight").recipe


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("model", ["gpt2", "llama", ""])
def test_the_shape_decides_where_a_weight_is_not_square(flag: bool | None, model: str) -> None:
    config = {"model_type": model} if model else {}
    for shape, recipe in (((OUT, IN), "lora-linear"), ((IN, OUT), "lora-linear-in-out")):
        plan = planned({"fc.weight": shape}, adapter_of(pair("fc"), fan_in_fan_out=flag), base_config=config)
        assert plan.targets[0].recipe == recipe


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("model", ["gpt2", "llama", ""])
def test_the_other_targets_decide_for_a_square_weight(flag: bool | None, model: str) -> None:
    config = {"model_type": model} if model else {}
    assert recipe_of((4, 4), {"other": (OUT, IN)}, flag=flag, config=config) == "lora-linear"
    assert recipe_of((4, 4), {"other": (IN, OUT)}, flag=flag, config=config) == "lora-linear-in-out"


@pytest.mark.parametrize("flag", [True, False, None])
def test_the_model_type_decides_where_every_target_is_square(flag: bool | None) -> None:
    assert recipe_of((4, 4), config={"model_type": "gpt2"}, flag=flag) == "lora-linear-in-out"
    assert recipe_of((4, 4), config={"model_type": "llama"}, flag=flag) == "lora-linear"


@pytest.mark.parametrize("flag", [True, False, None])
def test_the_flag_decides_where_nothing_else_is_known(flag: bool | None) -> None:
    assert recipe_of((4, 4), flag=flag) == ("lora-linear-in-out" if flag else "lora-linear")


def test_a_dora_magnitude_lies_along_the_outputs() -> None:
    for shape, recipe in (((OUT, IN), "dora-linear"), ((IN, OUT), "dora-linear-in-out")):
        for length, fits in ((OUT, True), (IN, False)):
            shapes = {**pair("fc"), f"{PEFT}fc.lora_magnitude_vector": (length,)}
            plan = planned({"fc.weight": shape}, adapter_of(shapes, use_dora=True))
            pairing = one(plan, "fc.weight")
            assert (pairing.recipe == recipe, bool(pairing.undecidable)) == (fits, not fits)


MHA = {
    "mha.in_proj_weight": (12, 4),
    "mha.in_proj_bias": (12,),
    "mha.out_proj.weight": (4, 4),
    "mha.out_proj.bias": (4,),
}


def test_multihead_attention_is_two_targets_of_one_scale_and_the_second_gets_its_delta_twice() -> None:
    shapes = pair("mha", 12, 4) | pair("mha.base_layer.out_proj", 4, 4)
    plan = planned(MHA, adapter_of(shapes, alpha_pattern={"mha": 11}))
    assert kinds(plan) == {
        "mha.in_proj_weight": "target",
        "mha.in_proj_bias": "bystander",
        "mha.out_proj.weight": "target",
        "mha.out_proj.bias": "bystander",
    }
    assert [step.recipe.name for step in one(plan, "mha.in_proj_weight").steps] == ["lora-linear"]
    assert [step.recipe.name for step in one(plan, "mha.out_proj.weight").steps] == ["lora-mha-out", "lora-linear"]
    assert {step.scale.value for target in plan.targets for step in target.steps} == {11 / R}


def test_an_out_proj_outside_multihead_attention_gets_its_delta_once() -> None:
    plan = planned({"attn.out_proj.weight": (4, 4)}, adapter_of(pair("attn.out_proj", 4, 4)))
    assert [step.recipe.name for step in plan.targets[0].steps] == ["lora-linear"]


def test_several_adapters_are_stepped_in_their_order() -> None:
    first, second = adapter_of(pair(Q0, r=2)), adapter_of(pair(Q0, r=3), r=3)
    for given, ranks in (([first, second], [2, 3]), ([second, first], [3, 2])):
        steps = one(planned(EVERYTHING, given), f"{Q0}.weight").steps
        assert [(step.adapter, step.scale.rank) for step in steps] == list(enumerate(ranks))


def test_what_replaces_comes_before_what_adds() -> None:
    whole = {f"{PEFT}{Q0}.base_layer.weight": (OUT, IN)}
    for shapes in (pair(Q0) | whole, whole | pair(Q0)):
        assert [step.recipe.name for step in one(planned(EVERYTHING, adapter_of(shapes)), f"{Q0}.weight").steps] == [
            "copy",
            "lora-linear",
        ]


def test_the_plain_weight_of_an_adapted_module_is_an_orphan_as_for_peft() -> None:
    plan = planned(EVERYTHING, adapter_of(pair(Q0) | {f"{PEFT}{Q0}.weight": (OUT, IN)}))
    assert plan.orphans == ((0, f"{PEFT}{Q0}.weight"),)
    assert [step.recipe.name for step in one(plan, f"{Q0}.weight").steps] == ["lora-linear"]
    alone = planned(EVERYTHING, adapter_of({f"{PEFT}{Q0}.weight": (OUT, IN)}))
    assert one(alone, f"{Q0}.weight").kind == "copy"


# ------------------------------------------------------------------------------------------------ foreign keys


FOREIGN = {
    "no prefix": lambda name: name,
    "DDP": lambda name: f"module.{PEFT}{name}",
    "torch.compile": lambda name: f"_orig_mod.{PEFT}{name}",
    "both": lambda name: f"module._orig_mod.{PEFT}{name}",
    "torch.compile inside": lambda name: f"{PEFT}_orig_mod.{name}",
    "torch.compile of a layer": lambda name: PEFT + name.replace("layers.0.", "layers.0._orig_mod."),
    "FSDP": lambda name: PEFT + name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "adapter name": lambda name: PEFT + re.sub(r"(lora_[AB])\.", r"\1.default.", name),
    "another adapter name": lambda name: PEFT + re.sub(r"(lora_[AB])\.", r"\1.my-style.", name),
    "adapter name and DDP": lambda name: f"module.{PEFT}" + re.sub(r"(lora_[AB])\.", r"\1.default.", name),
}


@pytest.mark.parametrize("form", FOREIGN)
def test_foreign_keys_are_paired_and_told(form: str) -> None:
    shapes = {FOREIGN[form](name): shape for name, shape in pair(Q0, prefix="").items()}
    plan = planned(EVERYTHING, adapter_of(shapes))
    assert plan.orphans == ()
    assert [target.merged.name for target in plan.targets] == [f"{Q0}.weight"]
    assert (codes(plan), word(plan)) == ({"LC005"}, "verified")


def test_peft_s_own_keys_are_not_told() -> None:
    assert codes(planned(EVERYTHING, adapter_of(pair(Q0)))) == set()


def test_a_module_called_module_is_no_wrapper() -> None:
    plan = planned({"net.module.fc.weight": (OUT, IN)}, adapter_of(pair("net.module.fc")))
    assert plan.orphans == ()
    assert len(plan.targets) == 1
