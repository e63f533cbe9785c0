"""Real models, trained and merged by PEFT, then broken on disk: the report must verify the first and name the second.

The weights come out of pip packages (requirements-real.txt). Where one is not installed these tests fail with the
command that installs it; they never skip. Nothing here builds a case with lora_check: merges are PEFT's, breakages
plain torch.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_check
from fixtures.real.merge import merge_adapter
from fixtures.real.models import Case, make_case
from lora_check.types import Verdict

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
RANK, ALPHA = 6, 10  # those of fixtures.real


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """A real model, how PEFT merges into it, and what the report has to find in the result.

    layer, family   what a broken merge leaves out; a model that shares one layer has none to leave out
    """

    model: str
    dtype: str
    safe: bool = False
    shards: str | None = None
    arithmetic: str = "fp32-add"
    targets: int
    family: str
    layer: str | None = None


LLAMA = {"targets": 28, "family": "k_proj", "layer": "model.layers.1."}
REAL = {
    "slice-bf16": Real(model="smollm2-slice", dtype="bf16", **LLAMA),
    "slice-bf16-safe": Real(model="smollm2-slice", dtype="bf16", safe=True, arithmetic="rounded-delta", **LLAMA),
    "slice-fp32": Real(model="smollm2-slice", dtype="fp32", **LLAMA),
    "slice-sharded": Real(model="smollm2-slice", dtype="bf16", shards="20MB", **LLAMA),
    "whole-bf16": Real(model="smollm2", dtype="bf16", **LLAMA | {"targets": 210}),
    "minilm-fp32": Real(model="minilm", dtype="fp32", targets=36, family="key", layer="encoder.layer.1."),
    "minilm-bf16": Real(model="minilm", dtype="bf16", targets=36, family="key", layer="encoder.layer.1."),
    "rxnmapper-fp32": Real(model="rxnmapper", dtype="fp32", targets=5, family="ffn"),
    "rxnmapper-bf16": Real(model="rxnmapper", dtype="bf16", targets=5, family="ffn"),
}


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for some GB of models, removed at the end; one thread, for more stall on shared cores."""
    from transformers.utils import logging

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("real")
    yield root
    shutil.rmtree(root)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cases(workshop: Path) -> Callable[[str], Case]:
    """Makes the case of a name when it is first asked for."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            real = REAL[name]
            made[name] = make_case(
                real.model,
                workshop / name,
                dtype=real.dtype,
                safe=real.safe,
                max_shard_size=real.shards,
                cache=workshop / "cache",
            )
        return made[name]

    return case


@pytest.fixture
def out(workshop: Path) -> Iterator[Path]:
    """A folder for a broken merge, removed with its test."""
    folder = workshop / "broken"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


# -------------------------------------------------------------------------------------------------- whole merges


@pytest.mark.parametrize("name", REAL)
def test_what_peft_merged_is_verified_in_the_arithmetic_it_used(name: str, cases: Callable[[str], Case]) -> None:
    case = cases(name)
    assert (len([*case.merged.glob("*.safetensors")]) > 1) == bool(REAL[name].shards)

    report = lora_check.check(case.base, case.adapter, case.merged)

    summary = report.as_dict()["summary"]
    assert report.verdict is Verdict.VERIFIED, report.findings
    assert not [one for one in report.findings if one.severity != "info"]
    assert summary["targets"] == REAL[name].targets
    assert summary["verified"] == summary["tensors"] == summary["targets"] + summary["bystanders"]
    assert summary["arithmetic"] == REAL[name].arithmetic
    assert summary["survival"] == pytest.approx(1, abs=0.01)


# ------------------------------------------------------------------------------------------------- broken merges


def broken(name: str, case: Case, out: Path, fault: str) -> None:
    """Write to `out` what a merge with this fault leaves on disk."""
    real, base = REAL[name], tensors(case.base)
    how = {"dtype": real.dtype, "safe": real.safe, "max_shard_size": real.shards}
    touched = targets(case)
    if fault == "merged-twice":
        merge_adapter(case.merged, case.adapter, out, **how)
    elif fault == "alpha-not-divided":
        louder = shutil.copytree(case.adapter, out / "adapter")
        config = json.loads((louder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
        (louder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": ALPHA * RANK}))
        merge_adapter(case.base, louder, out, **how)
    elif fault == "layer-left-out":
        rewrite(case.merged, out, lambda key, one: base[key] if key.startswith(str(real.layer)) else one)
    elif fault == "family-left-out":
        left = {key for key in touched if key.endswith(f".{real.family}.weight")}
        assert 0 < len(left) < len(touched)
        rewrite(case.merged, out, lambda key, one: base[key] if key in left else one)
    elif fault == "another-base":
        torch.manual_seed(0)
        rewrite(case.merged, out, lambda _, one: shaken(one, by=0.01))
    else:
        spot = next(key for key in sorted(base) if key not in touched and base[key].is_floating_point())
        rewrite(case.merged, out, lambda key, one: flipped(one) if key == spot else one)


CODES = {
    "merged-twice": "LC102",
    "alpha-not-divided": "LC108",
    "layer-left-out": "LC502",
    "family-left-out": "LC501",
    "another-base": "LC404",
    "one-bit-of-a-bystander": "LC401",
}
SLOW = {("whole-bf16", fault) for fault in ("merged-twice", "family-left-out", "another-base")}  # the slices show these
BROKEN = [
    (name, fault)
    for name in REAL
    for fault in CODES
    if (name, fault) not in SLOW and (fault != "layer-left-out" or REAL[name].layer)
]


@pytest.mark.parametrize(("name", "fault"), BROKEN)
def test_a_broken_merge_is_refuted_and_named(name: str, fault: str, cases: Callable[[str], Case], out: Path) -> None:
    case = cases(name)
    broken(name, case, out, fault)

    report = lora_check.check(case.base, case.adapter, out)

    assert report.verdict is Verdict.REFUTED
    assert [one.code for one in report.findings if one.severity == "error"] == [CODES[fault]]
    refuted = {one.tensor: one for one in report.comparisons if one.verdict is Verdict.REFUTED}
    touched = targets(case)
    if fault in ("merged-twice", "alpha-not-divided"):
        assert set(refuted) == touched
    elif fault == "layer-left-out":
        assert set(refuted) == {key for key in touched if key.startswith(str(REAL[name].layer))}
    elif fault == "family-left-out":
        assert set(refuted) == {key for key in touched if key.endswith(f".{REAL[name].family}.weight")}
    elif fault == "one-bit-of-a-bystander":
        assert [one.over_budget for one in refuted.values()] == [1]
        assert not touched.intersection(refuted)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder, whichever way it is stored."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    for file in folder.glob("pytorch_model*.bin"):
        found |= torch.load(file, map_location="cpu", weights_only=True)
    assert found
    return found


def targets(case: Case) -> set[str]:
    """The weights that the adapter has factors for, by the names of its own file."""
    factors = load_file(case.adapter / "adapter_model.safetensors")
    modules = {key.removesuffix(".lora_A.weight") for key in factors if key.endswith(".lora_A.weight")}
    return {f"{module.removeprefix('base_model.model.')}.weight" for module in modules}


def rewrite(source: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Copy a model folder, each tensor changed; shards stay shards."""
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        changed = {key: change(key, one).clone() for key, one in load_file(source / file.name).items()}
        save_file(changed, file, metadata={"format": "pt"})


def shaken(one: torch.Tensor, *, by: float) -> torch.Tensor:
    """The tensor with relative noise on every element, as another revision of the base would have."""
    return (one.float() * (1 + by * torch.randn(one.shape))).to(one) if one.is_floating_point() else one


def flipped(one: torch.Tensor) -> torch.Tensor:
    """The tensor with the last bit of its last element flipped."""
    changed = one.clone()
    words = changed.view(torch.int16 if one.element_size() == 2 else torch.int32).reshape(-1)
    words[-1] ^= 1
    return changed


# -------------------------------------------------------------------------------------------------------- memory

PROBE = """
import json, sys, threading, time
from lora_check import registry
from lora_check.__main__ import main
from lora_check import pipeline

def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

for folder in registry.CONSTANTS:
    registry.load(folder)
before, peak, done = private(), [0], threading.Event()

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], private())

watcher = threading.Thread(target=watch)
watcher.start()
code = main(["report", *sys.argv[1:]])
done.set()
watcher.join()
sys.stderr.write(json.dumps({"code": code, "before": before, "peak": peak[0]}))
"""


def test_a_report_of_a_whole_model_holds_no_tensor(cases: Callable[[str], Case]) -> None:
    case = cases("whole-bf16")
    command = [sys.executable, "-c", PROBE, *map(str, (case.base, case.adapter, case.merged))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    seen = json.loads(done.stderr.splitlines()[-1])
    size = sum(file.stat().st_size for file in case.merged.glob("*.safetensors"))
    assert seen["code"] == 0
    assert size > 250 * MIB
    assert 0 < seen["peak"] - seen["before"] < 200 * MIB, f"{(seen['peak'] - seen['before']) / MIB:.0f} MiB"
