"""AdaLoRA whose budget left a module no rank: live PEFT merges it as the base, and so does everything here."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_check
from lora_check.__main__ import main
from lora_check.pipeline import plan as make_plan
from lora_check.types import Verdict

CONFIG, FACTORS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
PRUNED, KEPT = "fc1.weight", ("fc0.weight", "fc2.weight")
NEGATIVE_ZERO, TINY = (0, 0), (0, 1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAME_SIZE = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Stack(nn.Module):
    """Three linear layers; the middle one holds a -0, and a number that is -0 in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.fc1, self.fc2 = nn.Linear(14, 20), nn.Linear(20, 11), nn.Linear(11, 13)
        with torch.no_grad():
            self.fc1.weight[NEGATIVE_ZERO], self.fc1.weight[TINY] = -0.0, -1e-9


@dataclass(frozen=True)
class Case:
    """Where base, adapter and PEFT's merge of them lie."""

    base: Path
    adapter: Path
    merged: Path

    @property
    def argv(self) -> list[str]:
        return [str(self.base), str(self.adapter), str(self.merged)]

    def report(self, adapter: Path | None = None, merged: Path | None = None) -> lora_check.Report:
        return lora_check.check(self.base, [adapter or self.adapter], merged or self.merged, jobs=1)


@contextmanager
def expected_warnings() -> Iterator[None]:
    """PEFT frowns upon factors without elements, and mistakes AdaLoRA's patterns for LoRA's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape")
        yield


def store(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, folder / WEIGHTS)
    return folder


def loaded(folder: Path, dtype: torch.dtype) -> nn.Module:
    model = Stack().to(dtype)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model


def train(model: nn.Module, none_of: tuple[str, ...]) -> PeftModel:
    """Numbers in every factor, and a list of ranks as PEFT's allocator leaves it: another number in each layer."""
    config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=7, total_step=10, target_modules=["fc0", "fc1", "fc2"])
    tuned = get_peft_model(model, config)
    kept = {"fc0": [True, False, False, True], "fc1": [False, True, True, True], "fc2": [True] * 4}
    kept |= {name: [False] * 4 for name in none_of}
    for name, ranks in kept.items():
        values = getattr(tuned.base_model.model, name).lora_E["default"].data
        values.copy_(torch.randn_like(values) * torch.tensor(ranks)[:, None])
    tuned.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": ranks for name, ranks in kept.items()}
    return tuned


def merge(base: Path, adapter: Path, dtype: torch.dtype, out: Path, *, safe: bool = False) -> Path:
    merged = PeftModel.from_pretrained(loaded(base, dtype), adapter).merge_and_unload(safe_merge=safe)
    return store(merged, out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    root = tmp_path_factory.mktemp("adalora-pruned")

    def get(dtype: str = "fp32", *, safe: bool = False, none_of: tuple[str, ...] = ("fc1",)) -> Case:
        home = root / f"{dtype}-{safe}-{'-'.join(none_of)}"
        case = Case(home / "base", home / "adapter", home / "merged")
        if not home.exists():
            home.mkdir()
            torch.manual_seed(7)
            store(Stack().to(DTYPES[dtype]), case.base)
            with expected_warnings():
                train(loaded(case.base, DTYPES[dtype]), none_of).save_pretrained(case.adapter)
                merge(case.base, case.adapter, DTYPES[dtype], case.merged, safe=safe)
        return case

    return get


def changed(case: Case, out: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the merge with its tensors edited."""
    tensors = load_file(case.merged / WEIGHTS)
    edit(tensors)
    out.mkdir()
    save_file(tensors, out / WEIGHTS)
    return out


def edited(case: Case, out: Path, key: str, edit: Callable[[Any], object]) -> Path:
    """A copy of the adapter with one entry of its configuration edited in place."""
    shutil.copytree(case.adapter, out)
    config = json.loads((out / CONFIG).read_text())
    edit(config[key])
    (out / CONFIG).write_text(json.dumps(config))
    return out


def told(report: lora_check.Report) -> dict[str, list[str]]:
    return {one.code: sorted(one.tensors) for one in report.findings}


REGIMES = [("fp32", False), ("bf16", False), ("bf16", True)]


@pytest.mark.parametrize(("dtype", "safe"), REGIMES)
def test_a_merge_by_peft_is_verified(made, dtype, safe) -> None:
    case = made(dtype, safe=safe)
    assert {x.numel() for name, x in load_file(case.adapter / FACTORS).items() if ".fc1." in name} == {0}
    before, after = (load_file(folder / WEIGHTS)[PRUNED] for folder in (case.base, case.merged))
    assert before[NEGATIVE_ZERO].signbit(), "the base holds a -0"
    assert not after[NEGATIVE_ZERO].signbit(), "PEFT adds 0 to it"
    assert torch.equal(before, after)
    report = case.report()
    assert (report.verdict, told(report)) == (Verdict.VERIFIED, {})
    assert {one.tensor for one in report.comparisons if one.kind == "target"} == set(KEPT)
    assert all(one.exact for one in report.comparisons)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("step", [1, -1])
def test_one_step_of_one_number_is_refuted(made, tmp_path, dtype, step) -> None:
    """W + 0 is exact in every arithmetic, so there is no budget: not even half an ulp."""
    case = made(dtype)
    words = SAME_SIZE[DTYPES[dtype]]
    spoiled = changed(case, tmp_path / "merged", lambda x: x[PRUNED].view(words)[3, 4:5].add_(step))
    report = case.report(merged=spoiled)
    assert (report.verdict, told(report)) == (Verdict.REFUTED, {"LC401": [PRUNED]})


def test_a_delta_of_its_own_is_refuted(made, tmp_path) -> None:
    """As a session does that merges before PEFT has masked what it then does not save."""
    case = made("bf16")
    spoiled = changed(case, tmp_path / "merged", lambda x: x[PRUNED].add_(torch.randn(11, 1) @ torch.randn(1, 20)))
    report = case.report(merged=spoiled)
    assert (report.verdict, told(report)) == (Verdict.REFUTED, {"LC401": [PRUNED]})


def test_the_sign_of_a_zero_may_stay_where_it_was(made, tmp_path) -> None:
    """A tool that leaves the module alone writes the bytes of the base."""
    case = made("bf16")
    base = load_file(case.base / WEIGHTS)
    left = case.report(merged=changed(case, tmp_path / "left", lambda x: x.update({PRUNED: base[PRUNED]})))
    assert (left.verdict, told(left)) == (Verdict.VERIFIED, {})


def test_of_what_no_adapter_names_the_sign_counts(made, tmp_path) -> None:
    case = made("bf16")
    before = changed(case, tmp_path / "before", lambda x: x["fc1.bias"][3:4].fill_(0.0))
    after = changed(case, tmp_path / "after", lambda x: x["fc1.bias"][3:4].fill_(-0.0))
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    save_file({**load_file(base / WEIGHTS), "fc1.bias": load_file(before / WEIGHTS)["fc1.bias"]}, base / WEIGHTS)
    right, wrong = (lora_check.check(base, [case.adapter], one, jobs=1) for one in (before, after))
    assert (right.verdict, wrong.verdict) == (Verdict.VERIFIED, Verdict.REFUTED)
    assert told(wrong) == {"LC401": ["fc1.bias"]}


def test_a_base_converted_on_the_way_is_verified(made, tmp_path) -> None:
    """A number that float16 cannot hold is -0 there; it is +0 if it was converted before the merge."""
    case = made("bf16")
    half = {name: x.to(torch.float16) for name, x in load_file(case.base / WEIGHTS).items()}
    for word, zero in (("before", 0.0), ("after", -0.0)):
        own = half[PRUNED].clone()
        own[TINY] = zero
        merged = changed(case, tmp_path / word, lambda x, own=own: x.update({**half, PRUNED: own}))
        states = {one.tensor: one.verdict for one in case.report(merged=merged).comparisons}
        assert states[PRUNED] is Verdict.VERIFIED, word
    own = half[PRUNED].clone()
    own[TINY] = 6e-8
    spoiled = changed(case, tmp_path / "spoiled", lambda x: x.update({**half, PRUNED: own}))
    states = {one.tensor: one.verdict for one in case.report(merged=spoiled).comparisons}
    assert states[PRUNED] is Verdict.REFUTED


def test_after_another_adapter_the_delta_of_that_one_is_there(made, tmp_path) -> None:
    first, second = made(none_of=("fc0",)), made()
    with expected_warnings():
        merged = merge(first.merged, second.adapter, torch.float32, tmp_path / "merged")
    right = lora_check.check(first.base, [first.adapter, second.adapter], merged, jobs=1)
    assert (right.verdict, told(right)) == (Verdict.VERIFIED, {})
    lost = changed(Case(first.base, first.adapter, merged), tmp_path / "lost", lambda x: x.update(base_of(first)))
    wrong = lora_check.check(first.base, [first.adapter, second.adapter], lost, jobs=1)
    assert wrong.verdict is Verdict.REFUTED


def base_of(case: Case) -> dict[str, Tensor]:
    return {PRUNED: load_file(case.base / WEIGHTS)[PRUNED]}


# --- what is not settled is not verified ----------------------------------------------------------------


PATTERNS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no list": lambda pattern: pattern.pop("fc1.lora_E"),
    "one rank kept": lambda pattern: pattern["fc1.lora_E"].__setitem__(2, True),
    "one rank too few": lambda pattern: pattern["fc1.lora_E"].pop(),
    "no rank at all": lambda pattern: pattern["fc1.lora_E"].clear(),
    "numbers": lambda pattern: pattern.update({"fc1.lora_E": [0, 0, 0, 0]}),
    "no list but a number": lambda pattern: pattern.update({"fc1.lora_E": 0}),
    "another module's list": lambda pattern: pattern.update({"fc0.lora_E": pattern.pop("fc1.lora_E")}),
}


@pytest.mark.parametrize("edit", PATTERNS.values(), ids=list(PATTERNS))
def test_without_the_list_that_drops_every_rank_nothing_is_settled(made, tmp_path, edit) -> None:
    case = made()
    report = case.report(adapter=edited(case, tmp_path / "adapter", "rank_pattern", edit))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert {"LC002", "LC301"} <= told(report).keys()


KEPT_OTHERWISE: dict[str, Callable[[dict[str, Any]], object]] = {
    "one more": lambda pattern: pattern["fc0.lora_E"].__setitem__(1, True),
    "one less": lambda pattern: pattern["fc0.lora_E"].__setitem__(0, False),
    "none": lambda pattern: pattern.update({"fc0.lora_E": [False] * 4}),
    "no list, which keeps all": lambda pattern: pattern.pop("fc0.lora_E"),
    "as many, of fewer": lambda pattern: pattern.update({"fc0.lora_E": [True, True]}),
    "as many, in numbers": lambda pattern: pattern.update({"fc0.lora_E": [1, 0, 0, 1]}),
}


def loads(case: Case, adapter: Path) -> bool:
    """Whether PEFT does, with the numbers of the file in all of its factors."""
    try:
        tuned = PeftModel.from_pretrained(loaded(case.base, torch.float32), adapter)
    except (RuntimeError, IndexError, TypeError):
        return False
    held = load_file(adapter / FACTORS)
    found = {name.replace(".default", ""): x for name, x in tuned.state_dict().items() if "lora_" in name}
    return all(torch.equal(found[name], x) for name, x in held.items())


@pytest.mark.parametrize("edit", KEPT_OTHERWISE.values(), ids=list(KEPT_OTHERWISE))
def test_another_number_of_ranks_than_the_list_keeps_is_loaded_by_nobody(made, tmp_path, edit) -> None:
    case = made()
    adapter = edited(case, tmp_path / "adapter", "rank_pattern", edit)
    with expected_warnings():
        assert loads(case, case.adapter)
        assert not loads(case, adapter)
    report = case.report(adapter=adapter)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert {"LC002", "LC301"} <= told(report).keys()
    (one,) = (one for one in report.findings if one.code == "LC002")
    assert one.message.startswith("fc0.weight: ")
    assert case.report().verdict is Verdict.VERIFIED


def test_which_of_the_ranks_are_kept_changes_nothing(made, tmp_path) -> None:
    """The file holds those that were kept, and their places among the others are in no formula."""
    case = made()
    turned = edited(case, tmp_path / "adapter", "rank_pattern", lambda pattern: pattern["fc0.lora_E"].sort())
    with expected_warnings():
        assert loads(case, turned)
    assert case.report(adapter=turned).verdict is Verdict.VERIFIED


def test_without_any_list_every_rank_is_kept(made, tmp_path) -> None:
    case = made(none_of=())
    adapter = edited(case, tmp_path / "adapter", "rank_pattern", dict.clear)
    report = case.report(adapter=adapter)
    assert {"fc2.weight"} == {one.tensor for one in report.comparisons if one.kind == "target"}
    assert told(report)["LC301"]


SHAPES = {"lora_A": (3, 20), "lora_B": (11, 3), "lora_E": (3, 1)}


@pytest.mark.parametrize("factor", SHAPES)
def test_one_factor_with_elements_settles_nothing(made, tmp_path, factor) -> None:
    case, adapter = made(), tmp_path / "adapter"
    shutil.copytree(case.adapter, adapter)
    factors = load_file(adapter / FACTORS)
    (key,) = (name for name in factors if f".fc1.{factor}" in name)
    save_file({**factors, key: torch.randn(SHAPES[factor])}, adapter / FACTORS)
    report = case.report(adapter=adapter)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "LC002" in told(report)


def test_of_plain_lora_factors_without_elements_settle_nothing(made, tmp_path) -> None:
    """PEFT makes no LoRA of rank 0: nobody knows what such a file was meant to be."""
    with pytest.raises(ValueError, match="positive integer"):
        get_peft_model(Stack(), LoraConfig(r=4, rank_pattern={"fc1": 0}, target_modules=["fc0", "fc1"]))
    case, adapter = made(), tmp_path / "adapter"
    adapter.mkdir()
    a, b = torch.randn(4, 14), torch.randn(20, 4)
    pairs = {"fc0": (a, b), "fc1": (torch.zeros(0, 20), torch.zeros(11, 0))}
    factors = {
        f"base_model.model.{module}.lora_{letter}.weight": x
        for module, pair in pairs.items()
        for letter, x in zip("AB", pair, strict=True)
    }
    save_file(factors, adapter / FACTORS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["fc0", "fc1"]}
    (adapter / CONFIG).write_text(json.dumps(config))
    base = load_file(case.base / WEIGHTS)
    merged = changed(
        case, tmp_path / "merged", lambda x: x.update({**base, "fc0.weight": base["fc0.weight"] + 2 * b @ a})
    )
    report = case.report(adapter=adapter, merged=merged)
    assert (report.verdict, set(told(report))) == (Verdict.INCONCLUSIVE, {"LC002", "LC301"})
    (adapter / CONFIG).write_text(json.dumps({**config, "rank_pattern": {"fc1": 0}}))
    with pytest.raises(lora_check.LoraCheckError, match=r"has rank_pattern.* = 0, not a whole number of at least 1"):
        case.report(adapter=adapter, merged=merged)


def test_an_adapter_that_was_left_no_rank_at_all_proves_nothing(made) -> None:
    case = made(none_of=("fc0", "fc1", "fc2"))
    report = case.report()
    assert (report.verdict, list(told(report))) == (Verdict.INCONCLUSIVE, ["LC003"])


# --- the other commands ---------------------------------------------------------------------------------


def test_plan_names_what_has_no_rank(made, capsys) -> None:
    case = made("bf16")
    assert main(["plan", *case.argv]) == 0
    assert f"pruned: 1  {PRUNED}" in capsys.readouterr().out
    assert main(["plan", *made(none_of=()).argv]) == 0
    assert "pruned" not in capsys.readouterr().out


def test_a_plan_counts_its_tensors_once(made) -> None:
    case = made()
    plan = make_plan(case.base, [case.adapter], case.merged)
    assert plan.pruned == (PRUNED,)
    assert (plan.orphans, plan.idle, plan.contradictions) == ((), (), ())
    assert [one.merged.name for one in plan.pairings].count(PRUNED) == 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merge_writes_what_peft_writes(made, tmp_path, dtype) -> None:
    case, out = made(dtype), tmp_path / "out"
    assert main(["merge", str(case.base), str(case.adapter), str(out)]) == 0
    ours, theirs = load_file(out / WEIGHTS), load_file(case.merged / WEIGHTS)
    assert torch.equal(ours[PRUNED], theirs[PRUNED])
    assert not torch.equal(ours["fc0.weight"], load_file(case.base / WEIGHTS)["fc0.weight"])
    assert case.report(merged=out).verdict is Verdict.VERIFIED
