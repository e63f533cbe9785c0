"""Candidates: other checkpoints in the place of BASE or of an adapter, by the API and by the command line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

import lora_check
from fixtures.faults.tools import adapted, factors, model_of, save, save_adapter, tensors, write
from lora_check.__main__ import main

SMALL = {"num_hidden_layers": 1, "vocab_size": 40, "intermediate_size": 56}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base-1 and base-2, adapter-1 and adapter-2, and each pair that is asked about, merged by PEFT."""
    root = tmp_path_factory.mktemp("candidates")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in (1, 2):
            save(model_of(seed=number, **SMALL), root / f"base-{number}")
            save_adapter(adapted(model_of(seed=1, **SMALL), seed=number), root / f"adapter-{number}")
        save(adapted(model_of(seed=1, **SMALL), seed=1).merge_and_unload(), root / "merged")
        save(model_of("qwen2", seed=3, **SMALL), root / "other-model")
        model = adapted(model_of(seed=1, **SMALL), seed=1)
        model.load_adapter(str(root / "adapter-2"), "second")
        save(model.merge_and_unload(adapter_names=["default", "second"]), root / "two")
    return root


def told(report: lora_check.Report, code: str) -> lora_check.Finding:
    found = [one for one in report.findings if one.code == code]
    assert len(found) == 1
    assert found[0].severity == "info"
    return found[0]


def test_the_base_that_fits_is_named_and_the_verdict_stays(world):
    candidates = [world / "base-2", world / "base-1"]
    plain = lora_check.check(world / "base-2", world / "adapter-1", world / "merged", jobs=1)
    seen = lora_check.check(world / "base-2", world / "adapter-1", world / "merged", jobs=1, candidate_bases=candidates)
    assert seen.verdict is plain.verdict is lora_check.Verdict.REFUTED
    assert [one for one in seen.findings if one.code != "LC406"] == list(plain.findings)
    found = told(seen, "LC406")
    assert found.message == f"{world / 'base-1'} fits: verified, 12 of 12 tensors"
    assert [one["fits"] for one in found.evidence["candidates"]] == [False, True]


def test_the_adapter_that_fits_is_named(world):
    seen = lora_check.check(
        world / "base-1", world / "adapter-2", world / "merged", jobs=1, candidate_adapters=(world / "adapter-1",)
    )
    assert seen.verdict is lora_check.Verdict.REFUTED
    assert told(seen, "LC407").message == f"{world / 'adapter-1'} fits: verified, 12 of 12 tensors"


def test_a_state_dict_can_be_a_candidate(world):
    seen = lora_check.check(
        world / "base-2", world / "adapter-1", world / "merged", jobs=1, candidate_bases=(tensors(world / "base-1"),)
    )
    assert told(seen, "LC406").message.startswith("a dict in memory fits: verified")


def test_of_several_adapters_each_place_is_tried(world):
    given = [world / "adapter-1", world / "adapter-1"]
    seen = lora_check.check(world / "base-1", given, world / "two", jobs=1, candidate_adapters=[world / "adapter-2"])
    assert seen.verdict is lora_check.Verdict.REFUTED
    assert f"in the place of {world / 'adapter-1'} fits: verified" in told(seen, "LC407").message


def test_where_none_fits_each_is_told(world):
    candidates = [world / "base-2", world / "nowhere", world / "other-model", world / "merged"]
    seen = lora_check.check(world / "base-2", world / "adapter-1", world / "merged", jobs=1, candidate_bases=candidates)
    found = told(seen, "LC406")
    assert found.message.startswith("no candidate fits: ")
    assert f"{world / 'base-2'}: refuted, " in found.message
    assert f"{world / 'nowhere'} cannot be tried: " in found.message
    assert f"{world / 'merged'} cannot be tried: BASE and MERGED are the same checkpoint" in found.message
    assert not any(one["fits"] for one in found.evidence["candidates"])
    assert seen.verdict is lora_check.Verdict.REFUTED


def test_an_undecided_candidate_is_no_fit(world):
    """An adapter without a delta fits everything and proves nothing."""
    empty = {name: tensor * ("lora_A" in name) for name, tensor in tensors(world / "adapter-1").items()}
    folder = write(empty, world / "empty", like=world / "adapter-1")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert all(not bool(b.any()) for _, b in factors(folder).values())
    untouched = save(model_of(seed=1, **SMALL), world / "untouched")
    seen = lora_check.check(world / "base-1", world / "adapter-1", untouched, jobs=1, candidate_adapters=[folder])
    assert "no candidate fits" in told(seen, "LC407").message
    assert told(seen, "LC407").evidence["candidates"][0]["verdict"] == "inconclusive"


def test_a_verified_report_asks_no_candidate(world):
    seen = lora_check.check(
        world / "base-1", world / "adapter-1", world / "merged", jobs=1, candidate_bases=[world / "nowhere"]
    )
    assert seen.verdict is lora_check.Verdict.VERIFIED
    assert not [one for one in seen.findings if one.code in ("LC406", "LC407")]


def test_nothing_is_told_without_candidates(world):
    seen = lora_check.check(world / "base-2", world / "adapter-1", world / "merged", jobs=1)
    assert not [one for one in seen.findings if one.code in ("LC406", "LC407")]


def test_the_command_line_takes_several(world, tmp_path, capsys):
    words = ["report", str(world / "base-2"), str(world / "adapter-2"), str(world / "merged")]
    words += ["--candidate-base", str(world / "base-1"), "--candidate-base", str(world / "nowhere")]
    words += ["--candidate-adapter", str(world / "adapter-1"), "--json", str(tmp_path / "out.json")]
    assert main(words) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "no candidate fits" in text
    codes = [one["code"] for one in json.loads((tmp_path / "out.json").read_text())["findings"]]
    assert codes.count("LC406") == codes.count("LC407") == 1


def test_the_command_line_names_the_fit(world, capsys):
    words = ["report", str(world / "base-2"), str(world / "adapter-1"), str(world / "merged")]
    assert main([*words, "--candidate-base", str(world / "base-1")]) == 1
    assert "fits: verified, 12 of 12 tensors" in " ".join(capsys.readouterr().out.split())


def test_select_and_ignore_filter_candidates_too(world, tmp_path, capsys):
    words = ["report", str(world / "base-2"), str(world / "adapter-1"), str(world / "merged")]
    words += ["--candidate-base", str(world / "base-1"), "--ignore", "LC406", "--json", str(tmp_path / "out.json")]
    assert main(words) == 1
    capsys.readouterr()
    told = json.loads((tmp_path / "out.json").read_text())
    assert "LC406" not in [one["code"] for one in told["findings"]]
    assert told["findings_withheld"] == 1


def test_help_tells_of_candidates(capsys):
    assert main(["report", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--candidate-base LOCATION" in text
    assert "--candidate-adapter LOCATION" in text
