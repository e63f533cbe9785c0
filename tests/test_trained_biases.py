"""Biases that a configuration says were trained, and the adapter does not carry."""

from __future__ import annotations

import argparse

import pytest
import torch

import lora_check


class Tuned(torch.nn.Module):
    """What a live adapter on one layer shows: its configuration and two factors."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, config: dict[str, object]) -> None:
        super().__init__()
        self.peft_config = {"default": argparse.Namespace(to_dict=lambda: config)}
        self.active_adapters = ["default"]
        self.factors = {"lora_A": a, "lora_B": b}

    def state_dict(self, *_: object, **__: object) -> dict[str, torch.Tensor]:
        return {f"base_model.model.fc.{name}.default.weight": one for name, one in self.factors.items()}


@pytest.mark.parametrize("biases", ["all", "lora_only"])
def test_trained_biases_that_the_file_lacks_are_never_verified(biases: str) -> None:
    base = {"fc.weight": torch.randn(8, 5), "fc.bias": torch.randn(8)}
    a, b = torch.randn(3, 5), torch.randn(8, 3)
    merged = base | {"fc.weight": base["fc.weight"] + b @ a * (7 / 3)}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "bias": biases}
    report = lora_check.check(base, Tuned(a, b, config), merged, jobs=1)
    assert report.verdict is lora_check.Verdict.INCONCLUSIVE
    assert [one.code for one in report.findings] == ["LC002"]
    honest = lora_check.check(base, Tuned(a, b, config | {"bias": "none"}), merged, jobs=1)
    assert honest.verdict is lora_check.Verdict.VERIFIED
