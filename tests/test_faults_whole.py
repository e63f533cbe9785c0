"""Whole tensors, rows, biases, ties and bystanders: mistakes made by a few lines of torch, named by the check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lora_check
from lora_check.fresh import drawn, related
from lora_check.overlap import beyond, like_mean

torch.set_num_threads(1)

V, H, OUT, R, ALPHA = 90, 20, 24, 6, 10
S = ALPHA / R
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EMBED, HEAD, Q, BIAS, NORM = "embed_tokens.weight", "lm_head.weight", "q_proj.weight", "q_proj.bias", "norm.weight"
PEFT = "base_model.model."
TOKENS = [50, 3, 7]
ROWS = {"trainable_token_indices": {"embed_tokens": TOKENS}}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}


def randn(*shape: int, seed: int, size: float = 0.05) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def uniform(rows: int, columns: int, seed: int) -> Tensor:
    """As torch draws a linear layer."""
    drawn_numbers = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (2 * drawn_numbers - 1) / columns**0.5


def model(dtype: torch.dtype = torch.bfloat16, **other: Tensor | None) -> dict[str, Tensor]:
    """A base: an embedding, a head, a projection with a bias, a norm."""
    names = {EMBED: (V, H), HEAD: (V, H), Q: (OUT, H), BIAS: (OUT,), NORM: (H,)}
    found = {name: randn(*shape, seed=seed).to(dtype) for seed, (name, shape) in enumerate(names.items())}
    return {name: one for name, one in {**found, **other}.items() if one is not None}


A, B = randn(R, H, seed=11), randn(OUT, R, seed=12)
FACTORS = {f"{PEFT}q_proj.lora_A.weight": A, f"{PEFT}q_proj.lora_B.weight": B * (0.05 * 5 / (S * (B @ A).norm()))}
DELTA = S * FACTORS[f"{PEFT}q_proj.lora_B.weight"] @ A


def added(w: Tensor, delta: Tensor) -> Tensor:
    return (w.float() + delta).to(w.dtype)


def merged(base: dict[str, Tensor], **other: Tensor) -> dict[str, Tensor]:
    """The right merge of the projection, with these tensors in the place of others."""
    return {**base, Q: added(base[Q], DELTA), **other}


class Files:
    """Base, adapter and merged as folders; what a report on them says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def report(self, base, adapter, made, config=None, base_config=None, merged_config=None):
        base_config = UNTIED if base_config is None else base_config
        settings = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj"], **(config or {})}
        merged_config = base_config if merged_config is None else merged_config
        sides = {
            "base": (base, base_config),
            "merged": (made, merged_config),
            "adapter": ({**FACTORS, **adapter}, None),
        }
        for name, (tensors, model_config) in sides.items():
            place = self.folder / name
            place.mkdir(exist_ok=True)
            file = "adapter_model.safetensors" if name == "adapter" else "model.safetensors"
            save_file({key: one.clone().contiguous() for key, one in tensors.items()}, place / file)
            named = "adapter_config.json" if name == "adapter" else "config.json"
            (place / named).write_text(json.dumps(settings if model_config is None else model_config))
        return lora_check.check(*(self.folder / one for one in ("base", "adapter", "merged")), jobs=1)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def told(report) -> dict[str, str]:
    """Code -> message of every finding that is no mere information."""
    return {one.code: one.message for one in report.findings if one.severity != "info"}


def said(report, code: str) -> str:
    (one,) = [one for one in report.findings if one.code == code]
    return one.message


dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@dtypes
def test_right_merges_of_all_these_are_verified(files, dtype):
    base, bias = model(dtype), randn(OUT, seed=40)
    rows, whole, longer = rows_written(base[EMBED], TOKENS), WHOLE.to(dtype), LONGER.to(dtype)
    for adapter, made, config in (
        (ROW_FILE, {EMBED: rows}, ROWS),
        ({PEFT + BIAS: bias}, {BIAS: bias.to(dtype)}, {"bias": "lora_only"}),
        ({PEFT + HEAD: WHOLE}, {HEAD: whole}, SAVED),
        ({PEFT + HEAD: LONGER}, {HEAD: longer}, SAVED),
    ):
        report = files.report(base, adapter, merged(base, **made), config)
        assert (report.verdict.value, report.findings) == ("verified", ())


# --------------------------------------------------------------------------------------------- filled with zeros


@dtypes
@pytest.mark.parametrize("name", [Q, HEAD, NORM, BIAS])
def test_a_tensor_of_zeros_is_named_whatever_kind_it_is(files, dtype, name):
    base, saved = model(dtype), randn(V, H, seed=20)
    right = merged(base, **{HEAD: saved.to(dtype)})
    assert told(files.report(base, {PEFT + HEAD: saved}, right)) == {}
    found = told(files.report(base, {PEFT + HEAD: saved}, {**right, name: torch.zeros_like(right[name])}))
    assert list(found) == ["LC170"]
    assert "filled with zeros" in found["LC170"]


def test_zeros_of_the_base_are_no_filling(files):
    base = model(**{Q: torch.zeros(OUT, H, dtype=torch.bfloat16), BIAS: torch.zeros(OUT, dtype=torch.bfloat16)})
    saved = {PEFT + BIAS: randn(OUT, seed=21)}
    right = merged(base, **{BIAS: saved[PEFT + BIAS].bfloat16()})
    assert set(told(files.report(base, saved, {**right, Q: base[Q]}, {"bias": "all"}))) == {"LC101"}
    assert set(told(files.report(base, saved, {**right, BIAS: base[BIAS]}, {"bias": "all"}))) == {"LC403"}


def test_a_new_head_of_zeros_is_no_head_that_the_base_has(files):
    base, saved = model(**{HEAD: None}), {f"{PEFT}score.weight": randn(30, H, seed=22)}
    right = merged(base, **{"score.weight": saved[f"{PEFT}score.weight"].bfloat16()})
    assert told(files.report(base, saved, right)) == {}
    zeros = {"score.weight": torch.zeros_like(right["score.weight"])}
    assert set(told(files.report(base, saved, {**right, **zeros}))) == {"LC170"}


# -------------------------------------------------------------------------------------------- trained token rows

TRAINED = randn(3, H, seed=30)
ROW_FILE = {f"{PEFT}embed_tokens.token_adapter.trainable_tokens_delta": TRAINED}


def rows_written(w: Tensor, tokens: list[int], rows: Tensor = TRAINED) -> Tensor:
    made = w.clone()
    made[tokens] = rows.to(w.dtype)
    return made


def rows_added(w: Tensor) -> Tensor:
    made = w.clone()
    made[TOKENS] += TRAINED.to(w.dtype)
    return made


@dtypes
@pytest.mark.parametrize(
    ("write", "code", "phrase"),
    [
        (lambda w: w, "LC403", "trained token rows left as they are in BASE"),
        (rows_added, "LC410", "trained token rows (3, 7 and 50) added to those of BASE"),
        (lambda w: rows_written(w, [51, 4, 8]), "LC411", "written to rows 51, 4 and 8, not to 50, 3 and 7"),
        (lambda w: rows_written(w, [49, 2, 6]), "LC411", "written to rows 49, 2 and 6"),
        (lambda w: rows_written(w, [53, 6, 10]), "LC411", "written to rows 53, 6 and 10"),
        (lambda w: rows_written(w, [0, 1, 2]), "LC411", "written to rows 0, 1 and 2"),
        (lambda w: rows_written(w, [87, 88, 89]), "LC411", "written to rows 87, 88 and 89"),
        (lambda w: rows_written(w, [3, 7, 50]), "LC411", "written to rows 3, 7 and 50, not to 50, 3 and 7"),
        (lambda w: rows_written(w, [50, 7], TRAINED[[0, 2]]), "LC416", "rows 3 as in BASE, 7 and 50 right"),
        (
            lambda w: rows_written(w, TOKENS, TRAINED * torch.tensor([[1], [0], [1]])),
            "LC416",
            "rows 3 zero, 7 and 50 right",
        ),
        (lambda w: rows_written(w, TOKENS, randn(3, H, seed=31)), "LC199", ""),
        (lambda w: rows_written(w, [20, 30, 40]), "LC199", ""),
    ],
)
def test_what_became_of_trained_rows_is_named(files, dtype, write, code, phrase):
    base = model(dtype)
    found = told(files.report(base, ROW_FILE, merged(base, **{EMBED: write(base[EMBED])}), ROWS))
    assert list(found) == [code]
    assert phrase in found[code]


def test_trained_rows_in_the_embedding_and_not_in_the_tied_head(files):
    base = model(**{HEAD: None})
    right = rows_written(base[EMBED], TOKENS)
    assert told(files.report(base, ROW_FILE, merged(base, **{EMBED: right, HEAD: right}), ROWS, TIED)) == {}
    found = files.report(base, ROW_FILE, merged(base, **{EMBED: right, HEAD: base[EMBED]}), ROWS, TIED)
    assert set(told(found)) == {"LC403"}
    assert [one.tensor for one in found.comparisons if one.code] == [HEAD]


# ------------------------------------------------------------------------------------------------------- biases


@dtypes
@pytest.mark.parametrize(
    ("write", "code", "phrase"),
    [
        (lambda w, s: w, "LC403", "trained biases left as they are in BASE"),
        (lambda w, s: added(w, s), "LC410", "trained tensor added to that of BASE"),
        (lambda w, s: (s / 2).to(w.dtype), "LC199", ""),
    ],
)
def test_what_became_of_trained_biases_is_named(files, dtype, write, code, phrase):
    base, saved = model(dtype), randn(OUT, seed=40)
    adapter, config = {PEFT + BIAS: saved}, {"bias": "lora_only"}
    found = told(files.report(base, adapter, merged(base, **{BIAS: write(base[BIAS], saved)}), config))
    assert list(found) == [code]
    assert phrase in found[code]


# ------------------------------------------------------------------------------------------------ saved modules

WHOLE = randn(V, H, seed=50)
SAVED = {"modules_to_save": ["lm_head"]}


@dtypes
@pytest.mark.parametrize(
    ("write", "code"),
    [
        (lambda w: w, "LC403"),
        (lambda w: added(w, WHOLE), "LC410"),
        (lambda w: randn(V, H, seed=51, size=0.02).to(w.dtype), "LC412"),
        (
            lambda w: ((torch.rand(V, H, generator=torch.Generator().manual_seed(5)) * 2 - 1) / H**0.5).to(w.dtype),
            "LC412",
        ),
        (lambda w: (w.float() + 0.6 * (WHOLE - w.float()) + randn(V, H, seed=52, size=0.01)).to(w.dtype), "LC413"),
        (lambda w: torch.cat([WHOLE[:80].to(w.dtype), w[80:]]), "LC416"),
        (lambda w: randn(V, H, seed=53, size=0.03).to(w.dtype), "LC199"),
        (lambda w: WHOLE.roll(1, 0).to(w.dtype), "LC199"),
    ],
)
def test_what_became_of_a_saved_module_is_named(files, dtype, write, code):
    base, adapter = model(dtype), {PEFT + HEAD: WHOLE}
    assert list(told(files.report(base, adapter, merged(base, **{HEAD: write(base[HEAD])}), SAVED))) == [code]


def test_few_numbers_are_not_called_drawn_anew_nor_of_another_step(files):
    base, saved = model(**{HEAD: None}), {f"{PEFT}score.weight": randn(4, H, seed=54)}
    for made in (randn(4, H, seed=55, size=0.02), 0.6 * saved[f"{PEFT}score.weight"]):
        found = told(files.report(base, saved, merged(base, **{"score.weight": made.bfloat16()})))
        assert list(found) == ["LC199"]


@dtypes
def test_a_draw_is_known_by_its_mean_and_spread(dtype):
    normal = randn(50, 20, seed=1, size=0.02)
    assert drawn(normal.to(dtype), 0.02) == "normal with a deviation of 0.02"
    assert drawn(uniform(50, 25, seed=1).to(dtype), 0.02) == "uniform within 1/sqrt(25)"
    assert not drawn((normal * 1.5).to(dtype), 0.02)
    assert not drawn((normal + 0.01).to(dtype), 0.02)
    assert not drawn(normal[:10].to(dtype), 0.02)
    assert related(normal, normal + randn(50, 20, seed=2, size=0.02))
    assert not related(normal, randn(50, 20, seed=2, size=0.02))
    assert not related(normal, -normal)


# ------------------------------------------------------------------------------------------------ the vocabulary

LONGER = randn(V + 5, H, seed=60)


@dtypes
@pytest.mark.parametrize(
    ("tail", "phrase"),
    [
        (lambda w: w.new_zeros(5, H), "rows 0-89 as in BASE, 90-94 zero"),
        (lambda w: w.float().mean(0).repeat(5, 1).to(w.dtype), "rows 0-89 as in BASE, 90-94 the mean of BASE's rows"),
        (lambda w: randn(5, H, seed=61).to(w.dtype), "rows 0-89 as in BASE, 90-94 neither of these"),
        (lambda w: LONGER[V:].to(w.dtype), "rows 0-89 as in BASE, 90-94 right"),
    ],
)
def test_a_base_that_was_resized_and_did_not_get_the_trained_rows(files, dtype, tail, phrase):
    base, adapter = model(dtype), {PEFT + HEAD: LONGER}
    made = torch.cat([base[HEAD], tail(base[HEAD])])
    found = told(files.report(base, adapter, merged(base, **{HEAD: made}), SAVED))
    assert list(found) == ["LC416"]
    assert phrase in found["LC416"]


@dtypes
@pytest.mark.parametrize(
    ("tail", "phrase"),
    [
        (lambda w: w.new_zeros(38, H), "rows 90-127 are zero"),
        (lambda w: w.float().mean(0).repeat(38, 1).to(w.dtype), "rows 90-127 are the mean of the rows before"),
        (lambda w: randn(38, H, seed=62).to(w.dtype), "rows 90-127 are neither zero nor the mean of the rows before"),
    ],
)
@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_rows_beyond_the_vocabulary_are_told_and_never_verified(files, dtype, tail, phrase, name):
    base, adapter = model(dtype), {PEFT + HEAD: WHOLE}
    right = merged(base, **{HEAD: WHOLE.to(dtype)})
    report = files.report(base, adapter, {**right, name: torch.cat([right[name], tail(right[name])])}, SAVED)
    assert set(told(report)) == {"LC203"}
    assert said(report, "LC220") == f"{name}: the first 90 rows are right, {phrase}"
    assert [one.verdict.value for one in report.comparisons if one.tensor == name] == ["inconclusive"]
    assert report.verdict.value == "refuted"


@dtypes
def test_rows_that_are_absent_and_rows_that_are_wrong_before_them(files, dtype):
    base, adapter = model(dtype), {PEFT + HEAD: LONGER}
    short = files.report(base, adapter, merged(base, **{HEAD: LONGER[:V].to(dtype)}), SAVED)
    assert set(told(short)) == {"LC203"}
    assert said(short, "LC220") == f"{HEAD}: the first 90 rows are right, rows 90-94 are absent"
    wrong = files.report(base, adapter, merged(base, **{HEAD: base[HEAD]}), SAVED)
    assert set(told(wrong)) == {"LC203", "LC403"}
    assert said(wrong, "LC220") == f"{HEAD}: the first 90 rows are not all right, rows 90-94 are absent"


@dtypes
def test_a_slice_of_a_target_is_compared_too(files, dtype):
    base = model(dtype)
    right = merged(base)
    half = files.report(base, {}, {**right, Q: right[Q][: OUT // 2]})
    assert said(half, "LC220") == f"{Q}: the first 12 rows are right, rows 12-23 are absent"
    skipped = files.report(base, {}, {**right, Q: base[Q][: OUT // 2]})
    assert {"LC203", "LC101"} <= set(told(skipped))
    columns = files.report(base, {}, {**right, Q: right[Q][:, :10]})
    assert [one.code for one in columns.findings] == ["LC203"]
    assert Q not in [one.tensor for one in columns.comparisons]


@dtypes
def test_the_mean_of_rows_is_known_as_transformers_draws_it(dtype):
    old = randn(400, H, seed=63).to(dtype)
    mean = old.float().mean(0)
    drawn_rows = mean + (1e-9**0.5) * randn(3, H, seed=64, size=0.05)
    assert bool(like_mean(drawn_rows.to(dtype), old).all())
    assert not bool(like_mean((mean + 0.01).repeat(3, 1).to(dtype), old).any())
    assert not bool(like_mean(old[:3], old).any())
    assert beyond(torch.cat([old, old[:1] * 0]), 400, 400) == "row 400 is zero"


# ---------------------------------------------------------------------------------------------- head and embedding

HEAD_A, HEAD_B = randn(R, H, seed=70), randn(V, R, seed=71)
HEAD_FILE = {f"{PEFT}lm_head.lora_A.weight": HEAD_A, f"{PEFT}lm_head.lora_B.weight": HEAD_B}
HEAD_DELTA = S * HEAD_B @ HEAD_A
EMBED_A, EMBED_B = randn(R, V, seed=72), randn(H, R, seed=73)
EMBED_FILE = {f"{PEFT}embed_tokens.lora_embedding_A": EMBED_A, f"{PEFT}embed_tokens.lora_embedding_B": EMBED_B}
EMBED_DELTA = S * (EMBED_B @ EMBED_A).T
TARGETS = {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}


def stored(w: Tensor, delta: Tensor) -> Tensor:
    """An embedding's delta is stored before it is added."""
    return w + delta.to(w.dtype)


@dtypes
def test_the_delta_of_the_head_in_the_embedding_and_the_other_way_round(files, dtype):
    base = model(dtype)
    right = merged(base, **{HEAD: added(base[HEAD], HEAD_DELTA)})
    assert told(files.report(base, HEAD_FILE, right, TARGETS)) == {}
    leaked = files.report(base, HEAD_FILE, {**right, EMBED: added(base[EMBED], HEAD_DELTA)}, TARGETS)
    assert list(told(leaked)) == ["LC414"]
    assert "the delta of lm_head.weight added here too" in told(leaked)["LC414"]
    right = merged(base, **{EMBED: stored(base[EMBED], EMBED_DELTA)})
    assert told(files.report(base, EMBED_FILE, right, TARGETS)) == {}
    leaked = files.report(base, EMBED_FILE, {**right, HEAD: stored(base[HEAD], EMBED_DELTA)}, TARGETS)
    assert list(told(leaked)) == ["LC414"]


@dtypes
def test_head_and_embedding_made_one_are_named(files, dtype):
    base = model(dtype)
    right = merged(base, **{HEAD: WHOLE.to(dtype)})
    adapter = {PEFT + HEAD: WHOLE}
    lost = files.report(base, adapter, {**right, HEAD: base[EMBED]}, SAVED)
    assert list(told(lost)) == ["LC415"]
    assert "overwritten with embed_tokens.weight" in told(lost)["LC415"]
    other = files.report(base, adapter, {**right, EMBED: right[HEAD]}, SAVED)
    assert list(told(other)) == ["LC415"]
    assert "overwritten with lm_head.weight" in told(other)["LC415"]
    right = merged(base, **{HEAD: added(base[HEAD], HEAD_DELTA)})
    lost = files.report(base, HEAD_FILE, {**right, HEAD: base[EMBED]}, TARGETS)
    assert list(told(lost)) == ["LC415"]


@dtypes
def test_a_tied_head_written_apart_may_have_its_own_delta_or_share_it(files, dtype):
    base = model(dtype, **{HEAD: None})
    both, apart = added(base[EMBED], HEAD_DELTA), base[EMBED]
    for embedding in (both, apart):
        made = merged(base, **{HEAD: both, EMBED: embedding})
        assert files.report(base, HEAD_FILE, made, TARGETS, TIED, UNTIED).verdict.value == "verified"
    lost = files.report(base, HEAD_FILE, merged(base, **{HEAD: apart, EMBED: apart}), TARGETS, TIED, UNTIED)
    assert lost.verdict.value == "refuted"
    shared = files.report(base, HEAD_FILE, merged(base, **{EMBED: both}), TARGETS, TIED)
    assert shared.verdict.value == "verified"
    assert told(shared) == {}
    assert "trained for lm_head alone" in said(shared, "LC223")
    pair = {**HEAD_FILE, **EMBED_FILE}
    twice = added(stored(base[EMBED], EMBED_DELTA), HEAD_DELTA)
    assert told(files.report(base, pair, merged(base, **{EMBED: twice}), TARGETS, TIED)) == {}


@dtypes
def test_a_saved_pair_that_the_configuration_ties_is_one_tensor(files, dtype):
    base = model(dtype, **{HEAD: None})
    pair = {PEFT + HEAD: WHOLE, PEFT + EMBED: WHOLE}
    config = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    for made in ({EMBED: WHOLE.to(dtype)}, {EMBED: WHOLE.to(dtype), HEAD: WHOLE.to(dtype)}):
        assert told(files.report(base, pair, merged(base, **made), config, TIED)) == {}
    assert list(told(files.report(base, pair, merged(base), config, TIED))) == ["LC403"]
    half = merged(base, **{EMBED: WHOLE.to(dtype), HEAD: base[EMBED]})
    assert set(told(files.report(base, pair, half, config, TIED))) == {"LC403"}


# --------------------------------------------------------------------------------------------- NaN and infinity


def spoiled(w: Tensor, value: float) -> Tensor:
    made = w.clone()
    made[1, 2] = value
    return made


def test_the_source_of_what_is_no_number_is_told(files):
    base = model()
    right = merged(base)
    source = {
        "neither BASE nor the adapter accounts for them": (base, {}, {**right, Q: spoiled(right[Q], torch.nan)}),
        "BASE has them": ({**base, Q: spoiled(base[Q], torch.inf)}, {}, {**right, Q: spoiled(right[Q], torch.inf)}),
        "the adapter has them": (
            base,
            {f"{PEFT}q_proj.lora_B.weight": spoiled(FACTORS[f"{PEFT}q_proj.lora_B.weight"], torch.nan)},
            {**right, Q: torch.cat([right[Q][:1], right[Q][1:2] * torch.nan, right[Q][2:]])},
        ),
        "merged numbers went through float16 and are beyond it": (
            {**base, Q: spoiled(base[Q], 1e5)},
            {},
            {**right, Q: spoiled(right[Q], torch.inf)},
        ),
    }
    for phrase, inputs in source.items():
        found = told(files.report(*inputs))
        assert list(found) == ["LC130"], phrase
        assert phrase in found["LC130"]


@pytest.mark.parametrize("name", [Q, EMBED, HEAD])
def test_a_cast_to_a_lesser_range_is_never_verified(files, name):
    base, saved = model(), spoiled(WHOLE, 1e6) if name == HEAD else WHOLE
    base = base if name == HEAD else {**base, name: spoiled(base[name], -1e5)}
    right = merged(base, **{HEAD: saved.bfloat16()})
    assert told(files.report(base, {PEFT + HEAD: saved}, right, SAVED)) == {}
    cast = files.report(base, {PEFT + HEAD: saved}, {key: one.half() for key, one in right.items()}, SAVED)
    assert list(told(cast)) == ["LC130"]
    assert "beyond float16" in told(cast)["LC130"]
    assert [one.tensor for one in cast.comparisons if one.code] == [name]


# ------------------------------------------------------------------------------------------------ what is not there


def test_a_head_that_only_the_adapter_has_is_told_when_it_is_missing(files):
    base, saved = model(**{HEAD: None}), {f"{PEFT}score.weight": randn(30, H, seed=80)}
    found = told(files.report(base, saved, merged(base)))
    brought = "the adapter brings score.weight, which a loader will make anew"
    assert found == {"LC201": f"1 tensor missing from MERGED: score.weight; {brought}"}
    plain = model()
    found = told(files.report(plain, {}, {key: one for key, one in merged(plain).items() if key != NORM}))
    assert found == {"LC201": "1 tensor missing from MERGED: norm.weight"}


def test_trained_tensors_beside_the_adapter_leave_it_undecided(files):
    base = model()
    assert files.report(base, {}, merged(base)).verdict.value == "verified"
    (files.folder / "adapter" / "non_lora_trainables.bin").write_bytes(b"never opened")
    found = files.report(base, {}, merged(base))
    assert found.verdict.value == "inconclusive"
    assert list(told(found)) == ["LC221"]
