"""RandLoRA's names, and the random bases that all modules share, read or drawn again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

from lora_check.types import LoadedStep, Method

if TYPE_CHECKING:
    from torch import Tensor


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """r, and whether the bases are in the file; else their seed, how large all want them, and how they are drawn.

    Source: PEFT tuners/randlora/model.py RandLoraModel._find_dim, _pre_injection_hook.
    """
    matrices = [shape for shape in targets.values() if len(shape) == 2]
    sparse = "very_sparse" if raw.get("very_sparse") else "sparse" if raw.get("sparse") else ""
    return {
        "rank": raw.get("r"),
        "saved": bool(raw.get("save_projection", True)),
        "seed": int(raw.get("projection_prng_key") or 0),
        "largest": tuple(sorted(max(sizes) for sizes in zip(*matrices, strict=True))),
        "drawn": sparse or "bfloat16",
    }


def refuses(raw: Mapping[str, Any]) -> str:
    """Configurations that leave out what the scale is made of: PEFT always writes both."""
    missing = [key for key in ("r", "randlora_alpha") if raw.get(key) is None]
    return f"the configuration does not say {missing[0]}" if missing else ""


METHOD = Method(
    name="RANDLORA",
    roles={
        "randlora_lambda": "lambda",
        "randlora_gamma": "gamma",
        "randlora_A": "copy_A",
        "randlora_B": "copy_B",
    },
    shared={"randlora_A": "basis_A", "randlora_B": "basis_B"},
    keys=frozenset({"bias", "projection_prng_key", "randlora_dropout", "save_projection", "sparse", "very_sparse"}),
    alpha="randlora_alpha",
    settings=settings,
    refuses=refuses,
)


def in_half(step: LoadedStep) -> LoadedStep:
    """Bases that are drawn again are drawn in float16 where the machine has no bfloat16."""
    assert step.site is not None
    if step.site.settings["saved"] or step.site.settings["drawn"] != "bfloat16":
        return step
    return replace(step, site=replace(step.site, settings={**step.site.settings, "drawn": "float16"}))


@lru_cache(maxsize=2)
def bases(seed: int, rank: int, largest: tuple[int, int], drawn: str) -> tuple[Tensor, Tensor]:
    """A (r, 1, least) and B (most, n, r), float32, as PEFT draws them by torch's generator for CPUs.

    largest   (least, most): of the largest number of outputs and that of inputs the smaller and the larger
    drawn     "sparse" or "very_sparse": of -1, 0 and 1; else the dtype they are drawn in, uniform
    """
    import torch

    generator = torch.Generator(device="cpu").manual_seed(seed)
    least, most = largest
    shapes = (rank, 1, least), (most, ceil(least / rank), rank)
    if drawn.endswith("sparse"):
        chance = 1 / (2 * (sqrt(least) if drawn == "very_sparse" else 3))
        a, b = (_ternary(torch.rand(shape, dtype=torch.float32, generator=generator), chance) for shape in shapes)
    else:
        a = _uniform(shapes[0], drawn, generator)
        pieces = [_uniform((most, 1, rank), drawn, generator) for _ in range(shapes[1][1])]
        b = torch.cat(pieces, dim=1)
    return (a / a.std()).to(torch.float32), (b / b.std()).to(torch.float32)


def _uniform(shape: tuple[int, int, int], drawn: str, generator: Any) -> Tensor:
    import torch

    empty = torch.empty(shape, dtype=getattr(torch, drawn))
    return torch.nn.init.kaiming_uniform_(empty, a=sqrt(5), generator=generator)


def _ternary(x: Tensor, chance: float) -> Tensor:
    """-1 and 1 with that chance each, else 0."""
    return (x > 1 - chance).to(x.dtype) - (x < chance).to(x.dtype)
