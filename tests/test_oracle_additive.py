"""Hold the oracle of every tuner that adds to W against live PEFT in fp32.

PEFT makes the adapter, every trained tensor is moved, PEFT merges in memory; the oracle gets the tensors under the
names PEFT would save them by, the saved configuration, and the base as it was before PEFT touched it.
"""

from __future__ import annotations

import ast
import json
import math
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import oracle_tuners
import peft
import pytest
import torch
from oracle_tuners import Array, Pair, Site
from oracle_tuners.additive import block_diagonal
from oracle_tuners.seeded import frod_category, frod_directions, low_pass, mirror, osf_rank, psoft_rotation, synthesis
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.waveft.wavelet import Wavelet
from torch import nn
from transformers.pytorch_utils import Conv1D

torch.set_num_threads(1)

U = 2.0**-24  # unit roundoff of the fp32 that PEFT computes in on a CPU


# --- live PEFT ------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Give the adapted layer a path with a number in it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer


class Toy(nn.Module):
    """Hold layers to be adapted, all called proj."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(layer) for layer in layers])


Maker = Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """Say what PEFT is asked to do."""

    name: str
    tuner: str  # the name of PEFT's configuration class without 'Config'
    settings: Mapping[str, object]
    layers: tuple[Maker, ...]
    wrong: Mapping[str, object] = field(default_factory=dict)  # a setting that would scale the delta otherwise
    reload: bool = False  # save and load before merging
    kept: tuple[bool, ...] = ()  # AdaLoRA: the ranks that pruning keeps
    faint: str = ""  # a trained tensor whose first row is made all but zero


@dataclass(frozen=True)
class Merge:
    """Hold one adapted module as the oracle gets it, and what PEFT made of it."""

    site: Site  # weight as the model has it
    in_out: bool
    actual: Pair

    @property
    def logical(self) -> Site:
        """Turn the weight to (out, in)."""
        return replace(self.site, weight=self.site.weight.T) if self.in_out else self.site

    @property
    def expected(self) -> Pair:
        """Ask the oracle."""
        site = self.site
        return oracle_tuners.merged(
            site.config["peft_type"],
            site.name,
            site.parts,
            site.shared,
            site.config,
            site.weight,
            site.bias,
            in_out=self.in_out,
            targets=site.targets,
            given=site.given,
        )


def live(case: Case, folder: Path) -> list[Merge]:
    """Adapt, move every trained tensor, save, merge."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    base = Toy([make() for make in case.layers])
    for block in base.layers:  # a Conv1D starts with a bias of zeros
        if getattr(block.proj, "bias", None) is not None:
            nn.init.normal_(block.proj.bias)
    before = {name: tensor.double().numpy().copy() for name, tensor in base.state_dict().items()}
    fresh = Toy([make() for make in case.layers])
    fresh.load_state_dict(base.state_dict())
    kinds = {f"layers.{i}.proj": type(block.proj) for i, block in enumerate(base.layers)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says about these settings is not under test
        config = getattr(peft, f"{case.tuner}Config")(target_modules=["proj"], **case.settings)
        model = peft.get_peft_model(base, config)
        _train(model, case.faint)
        if case.kept:
            config.rank_pattern = {f"{name}.lora_E.default": list(case.kept) for name in kinds}
        model.save_pretrained(folder)
        stored = peft.get_peft_model_state_dict(model)
        if case.reload:
            model = peft.PeftModel.from_pretrained(fresh, folder)
        given = {name: _given(model.base_model.model.get_submodule(name), before[f"{name}.weight"]) for name in kinds}
        merged = model.merge_and_unload().state_dict()
    written = json.loads((folder / "adapter_config.json").read_text())
    return _merges(written, stored, before, merged, kinds, given)


def _train(model: nn.Module, faint: str = "") -> None:
    """Move every trained number."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.4 * torch.randn_like(parameter)
            if faint and faint in name:
                parameter[0] *= 1e-6


def _given(layer: nn.Module, weight: Array) -> dict[str, object]:
    """Read from the live layer what no file holds."""
    if hasattr(layer, "waveft_indices"):
        family = layer.waveft_wavelet_family["default"]
        taps = {"low_pass": TAPS[family]} if family in TAPS else {}
        return {"positions": _flat(layer.waveft_indices["default"], layer.in_features)} | taps
    if hasattr(layer, "fourierft_spectrum"):
        return {"positions": _flat(layer.indices["default"], layer.in_features)}
    if hasattr(layer, "seg_result"):
        order = layer.train_subspace_index["default"]
        return {"rows": [layer.seg_result["default"][i].numpy() for i in order]}
    if hasattr(layer, "_psoft_A_cache"):
        right = np.linalg.svd(weight, full_matrices=False)[2]
        theirs = layer._psoft_A_cache["default"].double().numpy()
        return {"signs": np.sign(np.sum(theirs * right[: len(theirs)], axis=1))}
    return {}


# Daubechies, Ten Lectures on Wavelets: coiflets in closed form (section 8.2), least asymmetric ones in table 6.3
TAPS = {
    "coif1": np.array([1, 5, 14, 14, 1, -3]) / math.sqrt(512) + np.array([-1, 1, 2, -2, -1, 1]) * math.sqrt(7 / 512),
    "sym4": np.array(Wavelet("sym4").rec_lo),
}


def _flat(positions: torch.Tensor, width: int) -> Array:
    return (positions[0] * width + positions[1]).numpy()


def _merges(
    config: Mapping,
    stored: Mapping[str, torch.Tensor],
    before: Mapping[str, Array],
    merged: Mapping[str, torch.Tensor],
    kinds: Mapping[str, type],
    given: Mapping[str, Mapping[str, object]],
) -> list[Merge]:
    """Sort what was saved by module."""
    tensors = {name: _array(tensor) for name, tensor in stored.items()}
    prefix = "base_model.model."
    shared = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    shapes = {name: before[f"{name}.weight"].shape[:2] for name in kinds}
    targets = {name: shape[::-1] if kinds[name] is Conv1D else shape for name, shape in shapes.items()}
    made = []
    for name, kind in kinds.items():
        start = f"{prefix}{name}."
        parts = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        parts.pop("base_layer.weight", None)  # an embedding's base comes along whole, and unchanged
        weight, bias = before[f"{name}.weight"], before.get(f"{name}.bias")
        site = Site(name, parts, shared, config, weight, bias, targets, given[name])
        after = merged.get(f"{name}.bias")
        actual = _array(merged[f"{name}.weight"]), None if after is None else _array(after)
        made.append(Merge(site, kind is Conv1D, actual))
    return made


def _array(tensor: torch.Tensor) -> Array:
    found = tensor.detach().numpy()
    return found.astype(np.float64) if found.dtype.kind == "f" else found


# --- the cases ------------------------------------------------------------------------------------------


def linear() -> nn.Module:
    return nn.Linear(16, 8)


def upward() -> nn.Module:
    return nn.Linear(12, 20, bias=False)


def conv1d_t() -> nn.Module:
    return Conv1D(12, 20)  # 20 in, 12 out


def conv1d_t_wide() -> nn.Module:
    return Conv1D(16, 8)


def embedding() -> nn.Module:
    return nn.Embedding(11, 6)


def conv2d() -> nn.Module:
    return nn.Conv2d(6, 8, (3, 2))


def conv2d_tall() -> nn.Module:
    return nn.Conv2d(6, 64, (3, 2))


def conv1d_tall() -> nn.Module:
    return nn.Conv1d(6, 64, 3)


def conv2d_1x1() -> nn.Module:
    return nn.Conv2d(6, 8, 1)


def conv1d() -> nn.Module:
    return nn.Conv1d(6, 8, 3)


def conv3d() -> nn.Module:
    return nn.Conv3d(3, 4, (2, 3, 2))


def _cases() -> list[Case]:
    """Name every form of every tuner."""
    turned = {"fan_in_fan_out": True}
    pruned = {"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 4}
    loha, lokr = {"r": 3, "alpha": 5}, {"r": 2, "alpha": 5}
    tall, effective = {"r": 3, "alpha": 5, "decompose_factor": 8}, {"use_effective_conv2d": True}
    patterns = {"rank_pattern": {"layers.0.proj": 5}, "alpha_pattern": {"1.proj": 7}}
    bank = {"r": 3, "num_vectors": 10, "vector_length": 4, "topk": 2}
    grains = {"r": 4, "gralora_k": 2, "alpha": 6}
    glora = {"r": 3, "config_D_E": "vector"}
    frod = {"sparse_rate": 0.1, "progressbar": False}
    dealt = {"r": 3, "theta_d_length": 23}
    psoft = {"r": 4, "psoft_alpha": 6}
    variant = {"r": 4, "lora_alpha": 6}
    rows = [
        ("adalora", "AdaLora", pruned, (linear, upward), {"lora_alpha": 8}),
        ("adalora-conv1d_t", "AdaLora", pruned | turned, (conv1d_t,), {"lora_alpha": 8}),
        ("adalora-conv2d", "AdaLora", pruned, (conv2d,), {"init_r": 3}),
        ("loha", "LoHa", loha | patterns, (linear, upward), {"alpha_pattern": {}}),
        ("loha-conv2d", "LoHa", loha, (conv2d, conv2d_1x1), {"alpha": 10}),
        ("loha-conv2d-effective", "LoHa", loha | effective, (conv2d, conv2d_1x1), {"alpha": 10}),
        ("loha-conv1d", "LoHa", loha, (conv1d,), {"alpha": 10}),
        ("loha-conv1d-effective", "LoHa", loha | effective, (conv1d,), {"r": 6}),
        ("lokr", "LoKr", lokr | patterns, (linear, upward), {"rank_pattern": {}}),
        ("lokr-whole", "LoKr", {"r": 20, "alpha": 5}, (linear, upward), {"alpha": 10}),
        ("lokr-both", "LoKr", tall | {"decompose_both": True}, (lambda: nn.Linear(12, 64),), {"alpha": 10}),
        ("lokr-factor", "LoKr", lokr | {"decompose_factor": 2}, (linear, upward), {"alpha": 10}),
        ("lokr-conv2d", "LoKr", tall, (conv2d_tall, lambda: nn.Conv2d(6, 64, 1)), {"alpha": 10}),
        ("lokr-conv2d-effective", "LoKr", tall | effective, (conv2d_tall,), {"alpha": 10}),
        ("lokr-conv2d-both", "LoKr", tall | effective | {"decompose_both": True}, (conv2d_tall,), {"alpha": 10}),
        ("lokr-conv2d-whole", "LoKr", {"r": 8, "alpha": 5}, (conv2d,), {"alpha": 10}),
        ("lokr-conv1d", "LoKr", tall, (conv1d_tall,), {"alpha": 10}),
        ("lokr-conv1d-effective", "LoKr", tall | effective, (conv1d_tall,), {"r": 2}),
        ("lokr-conv1d-whole", "LoKr", {"r": 8, "alpha": 5}, (conv1d,), {"alpha": 10}),
        ("vblora", "VBLoRA", bank, (linear, upward), {"topk": 3}),
        ("vblora-conv1d_t", "VBLoRA", bank | turned, (conv1d_t,), {"topk": 1}),
        ("shira", "Shira", {"r": 2, "random_seed": 3}, (linear, upward), {}),
        ("delora", "Delora", {"r": 3, "rank_pattern": {"1.proj": 2}}, (linear, upward), {}),
        ("gralora", "Gralora", grains, (linear, upward), {"alpha": 12}),
        ("gralora-hybrid", "Gralora", grains | {"hybrid_r": 3}, (linear,), {"alpha": 12}),
        ("gralora-conv1d_t", "Gralora", {"r": 8, "gralora_k": 4, "alpha": 6} | turned, (conv1d_t,), {"alpha": 12}),
        ("peanut", "Peanut", {"r": 4, "scaling": 1.5}, (linear,), {"scaling": 3}),
        ("peanut-deep", "Peanut", {"r": 4, "depth": 2, "act_fn": "tanh"}, (linear, upward), {"act_fn": "relu"}),
        ("peanut-gelu", "Peanut", {"r": 4, "depth": 1, "act_fn": "gelu"}, (linear,), {"act_fn": "silu"}),
        ("peanut-silu", "Peanut", {"r": 3, "depth": 1, "act_fn": "silu"}, (linear,), {"depth": 0}),
        ("tinylora", "TinyLora", {"r": 3, "u": 5}, (linear, upward, embedding), {"weight_tying": 1.0}),
        ("tinylora-tied", "TinyLora", {"r": 2, "u": 4, "weight_tying": 0.5}, (linear, upward, linear, upward), {}),
        ("tinylora-conv1d_t", "TinyLora", {"r": 3, "u": 5} | turned, (conv1d_t,), {}),
        ("hira", "Hira", {"r": 3}, (linear, embedding, conv2d, conv2d_1x1, conv1d, conv3d), {}),
        ("hira-conv1d_t", "Hira", {"r": 3} | turned, (conv1d_t,), {}),
        ("glora", "Glora", glora, (linear, upward), {}),
        ("glora-vector", "Glora", glora | {"config_A_B": "vector", "config_C": "vector"}, (linear,), {}),
        ("glora-constant", "Glora", {"r": 3, "config_A_B": "constant", "config_C": "none"}, (linear,), {}),
        ("glora-none", "Glora", glora | {"config_A_B": "none", "config_D_E": "none"}, (linear,), {}),
        ("supertuning", "Supertuning", {"sparsity": 0.7}, (linear, upward), {}),
        ("supertuning-smallest", "Supertuning", {"sparsity": 0.7, "select_top": False}, (linear,), {}),
        (
            "supertuning-unsaved",
            "Supertuning",
            {"sparsity": 0.7, "save_precomputed_indices": False},
            (linear, upward),
            {"select_top": False},
        ),
        ("supra", "Supertuning", {"sparsity": 0.8, "r": 3, "lora_alpha": 5.0}, (linear,), {"lora_alpha": 10}),
        ("beft", "Beft", {}, (linear,), {}),
        ("deft", "Deft", {"r": 3, "alpha": 5}, (linear, upward), {"alpha": 10}),
        ("deft-conv1d_t", "Deft", {"r": 3} | turned, (conv1d_t,), {"alpha": 6}),
        ("deft-qr", "Deft", {"r": 3, "decomposition_method": "qr", "alpha": 5}, (linear, upward), {"alpha": 10}),
        ("deft-para", "Deft", {"r": 3, "para": True}, (linear,), {"decomposition_method": "qr"}),
        ("deft-para-qr", "Deft", {"r": 3, "para": True, "decomposition_method": "qr"}, (linear,), {}),
        ("c3a", "C3A", {"block_size": 4}, (linear, lambda: nn.Linear(12, 20)), {}),
        ("lora-bias", "Lora", variant | {"lora_bias": True, "use_rslora": True}, (linear,), {"use_rslora": False}),
        ("lora", "Lora", variant | patterns, (linear, upward, embedding, conv2d, conv3d), {"lora_alpha": 12}),
        ("lora-conv1d_t", "Lora", variant | turned, (conv1d_t,), {"lora_alpha": 12}),
        ("bdlora-a", "Lora", variant | {"use_bdlora": _blocks("a")}, (linear, upward), {"lora_alpha": 12}),
        ("bdlora-b", "Lora", variant | {"use_bdlora": _blocks("b")}, (linear,), {"lora_alpha": 12}),
        ("kasa", "Lora", variant | {"kasa_config": KasaConfig()}, (linear, upward), {"lora_alpha": 12}),
        ("mica", "Lora", variant | {"init_lora_weights": "mica"}, (linear, embedding), {"lora_alpha": 12}),
        ("monteclora", "Lora", variant | {"monteclora_config": MontecloraConfig()}, (linear,), {"lora_alpha": 12}),
        ("velora", "Lora", variant | {"velora_config": VeloraConfig()}, (linear,), {"lora_alpha": 12}),
        ("vera", "Vera", {"r": 3}, (linear, upward), {}),
        ("vera-conv1d_t", "Vera", {"r": 3} | turned, (conv1d_t,), {}),
        ("pvera", "Pvera", {"r": 3}, (linear, upward), {}),
        ("pvera-conv1d_t", "Pvera", {"r": 3} | turned, (conv1d_t,), {}),
        ("randlora", "RandLora", {"r": 3, "randlora_alpha": 20}, (linear, upward), {"randlora_alpha": 40}),
        (
            "randlora-sparse",
            "RandLora",
            {"r": 6, "randlora_alpha": 20, "sparse": True, "projection_prng_key": 4},
            (upward,),
            {"randlora_alpha": 40},
        ),
        ("randlora-conv1d_t", "RandLora", {"r": 5, "randlora_alpha": 20} | turned, (conv1d_t,), {"randlora_alpha": 40}),
        ("unilora", "UniLora", dealt, (linear, upward), {"proj_seed": 43}),
        ("unilora-saved", "UniLora", dealt | {"save_indices": True}, (linear, upward), {}),
        ("unilora-conv1d_t", "UniLora", dealt | turned, (conv1d_t,), {"proj_seed": 43}),
        ("fourierft", "FourierFT", {"n_frequency": 30, "scaling": 90.0}, (linear,), {"scaling": 180}),
        ("fourierft-conv1d_t", "FourierFT", {"n_frequency": 30} | turned, (conv1d_t_wide,), {"scaling": 300}),
        ("waveft", "WaveFT", {"n_frequency": 30}, (linear, upward), {"scaling": 50}),
        ("waveft-db3", "WaveFT", {"n_frequency": 30, "wavelet_family": "db3"}, (linear,), {"wavelet_family": "db2"}),
        ("waveft-db10", "WaveFT", {"n_frequency": 30, "wavelet_family": "db10"}, (lambda: nn.Linear(11, 7),), {}),
        ("waveft-coif1", "WaveFT", {"n_frequency": 30, "wavelet_family": "coif1"}, (upward,), {"scaling": 50}),
        ("waveft-sym4", "WaveFT", {"n_frequency": 30, "wavelet_family": "sym4"}, (linear,), {"scaling": 50}),
        ("waveft-plain", "WaveFT", {"n_frequency": 30, "use_idwt": False}, (linear,), {"use_idwt": True}),
        (
            "waveft-conv1d_t",
            "WaveFT",
            {"n_frequency": 30, "wavelet_family": "db2"} | turned,
            (conv1d_t,),
            {"scaling": 50},
        ),
        ("psoft", "Psoft", psoft, (linear, upward), {"ab_svd_init": "pissa_init"}),
        ("psoft-pissa", "Psoft", psoft | {"ab_svd_init": "pissa_init"}, (linear,), {"ab_svd_init": "psoft_init"}),
        ("psoft-free", "Psoft", psoft | {"psoft_orth": False, "psoft_mag_a": False}, (linear,), {}),
        ("psoft-neumann", "Psoft", psoft | {"use_cayley_neumann": True}, (linear,), {"num_cayley_neumann_terms": 4}),
        (
            "psoft-neumann-bounded",
            "Psoft",
            psoft | {"use_cayley_neumann": True, "cayley_neumann_eps": 0.5, "num_cayley_neumann_terms": 3},
            (linear,),
            {"cayley_neumann_eps": 0.9},
        ),
        ("osf", "OSF", {}, (linear, upward), {"effective_rank": 3}),
        ("osf-share", "OSF", {"effective_rank": 0.3, "rank_pattern": {"layers.1": 5}}, (linear, upward), {}),
        ("frod", "Frod", frod, (linear, lambda: nn.Linear(16, 24)), {}),
        ("frod-conv1d_t", "Frod", frod | turned, (conv1d_t,), {}),
    ]
    cases = [Case(*row) for row in rows]
    cases.append(Case("adalora-pruned", "AdaLora", pruned, (linear,), {"init_r": 3}, True, (True, False) * 3))
    saved = bank | {"topk": 3, "save_only_topk_weights": True}
    cases.append(Case("vblora-topk", "VBLoRA", saved, (linear, upward), {}, reload=True))
    cases.append(Case("delora-faint", "Delora", {"r": 3}, (linear, upward), faint="delora_A"))
    cases.append(Case("adamss", "Adamss", {"r": 6, "num_subspaces": 3, "subspace_rank": 2}, (linear, upward)))
    return cases


def _blocks(side: str) -> BdLoraConfig:
    return BdLoraConfig(nblocks=2, **{f"target_modules_bd_{side}": ["proj"]})


CASES = {case.name: case for case in _cases()}


# --- the budget -----------------------------------------------------------------------------------------
#
# Lemma 3.1 of Higham, Accuracy and Stability of Numerical Algorithms: a sum of products whose every term goes
# through at most k roundings is within gamma_k = k u / (1 - k u) times the sum of the terms' sizes, in whatever
# order it is added.  ROUNDS counts the longest way of any term; the sizes are the oracle itself on absolute values.
# Where something else than sums and products is computed, EXTRA bounds what that adds, in norm.


def gamma(rounds: float) -> float:
    return rounds * U / (1 - rounds * U)


def _rank(site: Site) -> int:
    """Find the length of the inner product B A."""
    names = ("lora_A", "lora_A.weight", "lora_embedding_A", "hira_A", "hira_embedding_A", "delora_A", "tinylora_A")
    return next(site.parts[name].shape[0] for name in names if name in site.parts)


def _lora_rounds(site: Site) -> int:
    """r in B A, the scale, its product, KaSA's diagonal; or what is left of the short side in U S V, + 1; the sum."""
    return max(_rank(site) + 3, min(site.weight.shape) + 1 if "lora_diag" in site.parts else 0) + 1


def _lokr_rounds(site: Site) -> int:
    """Each factor a product over r, with a core two of them; their product, alpha / r and its product, the sum."""
    return 3 * max((tensor.shape[0] for key, tensor in site.parts.items() if key.endswith("_b")), default=1) + 4


def _vblora_rounds(site: Site) -> float:
    """Softmax of k logits that span D: a difference (D u), an exponential (1 ulp, so 2 u), k - 1 sums of such, a
    quotient; then k in the weighted sum; for A and for B; r in B A; the sum.

    From saved weights PEFT takes the last as 1 - sum (k roundings of things below 1) and logs of all (2 u each).
    """
    k, span, saved = site.config["topk"], 0.0, 0.0
    for name, tensor in site.parts.items():
        if name.endswith("weights"):
            last = 1 - tensor.sum(-1)
            logs = max(np.abs(np.log(last)).max(), np.abs(np.log(tensor)).max())
            span, saved = max(span, logs), max(saved, k / last.min() + 2 * 2 * logs)
        elif not name.endswith("indices"):
            span = max(span, np.ptp(tensor, axis=-1).max())
    return 2 * (2 * (span + 2) + k + k + saved) + site.config["r"] + 1


def _delora_rounds(site: Site) -> float:
    """|A_i| sums in squares and takes a root (in / 2 + 2), |B_i| likewise; λ / r, |A_i| |B_i|, their quotient; B D A
    as two matrix products over r; the norm of the column; the sum.
    """
    return sum(site.weight.shape) / 2 + 4 + 3 + 2 * _rank(site) + 2


def _gralora_rounds(site: Site) -> int:
    """The longer product, the sum of the two, alpha / r and its product, the sum."""
    return max(site.config["r"], site.config["hybrid_r"]) + 4


LIPSCHITZ = {"relu": 1.0, "tanh": 1.0, "silu": 1.1, "gelu": 1.13}  # of the activations; each is also below |x|


def _peanut_rounds(site: Site) -> float:
    """out in Wᵀ Aᵀ, r in every product after it, at most 8 in an activation, one at each residual, scale and sum.

    An activation may also stretch the error it is given.
    """
    rank, depth = site.config["r"], site.config["depth"]
    rounds = site.weight.shape[0] + 8 + depth * (2 * rank + 17) + rank + 3
    return rounds * LIPSCHITZ[site.config["act_fn"]] ** (1 + 2 * depth)


def _waveft_rounds(site: Site) -> int:
    """Scale, its product, the sum; before them L² terms in two roundings of taps, one of each and their product."""
    return 3 + (_taps(site).size ** 2 + 6 if site.config["use_idwt"] else 0)


ROUNDS: dict[str, Callable[[Site], float]] = {
    "LORA": _lora_rounds,
    # A E, r, the product with a whole alpha, 1e-5, its sum with the rank, the quotient, the sum
    "ADALORA": lambda site: _rank(site) + 6,
    # two products over r, with cores two more; their product, alpha / r and its product, the sum
    "LOHA": lambda site: 4 * site.parts["hada_w1_b"].shape[0] + 4,
    "LOKR": _lokr_rounds,
    "VBLORA": _vblora_rounds,
    "SHIRA": lambda site: 1,  # the sum
    "DELORA": _delora_rounds,
    "GRALORA": _gralora_rounds,
    "PEANUT": _peanut_rounds,
    # u in sum v P, r twice, the sum
    "TINYLORA": lambda site: site.config["u"] + 2 * _rank(site) + 1,
    "HIRA": lambda site: _rank(site) + 2,  # r, times W, the sum
    # W: r, times W, two sums; b: r, in, three sums
    "GLORA": lambda site: site.config["r"] + site.weight.shape[1] + 3,
    # the sum; for Supra r, the scale, its product, another sum
    "SUPERTUNING": lambda site: 1 if site.config["r"] is None else site.config["r"] + 4,
    "BEFT": lambda site: 1,
    # out in Mᵀ W, or k and k R; the difference; r; the sum
    "DEFT": lambda site: site.weight.shape[0] + 2 + 1 + site.parts["deft_P"].shape[1] + 1,
    "C3A": lambda site: 2,  # / in, the sum
    "VERA": lambda site: site.config["r"] + 3,  # λb B, λd A, r, the sum
    "PVERA": lambda site: site.config["r"] + 3,
    # two vectors on A, the r n terms, the scale and its product, the sum
    "RANDLORA": lambda site: site.parts["randlora_lambda"].size + 5,
    # θ times its scale, that a reciprocal root of 1 ulp, on both sides; r; the sum
    "UNILORA": lambda site: 2 * 3 + site.config["r"] + 1,
    "FOURIERFT": lambda site: 3,  # the scale and its product, the sum
    "WAVEFT": _waveft_rounds,
    # s, S / s, its root and product on both sides: 8; two vectors on R; R - I; twice r; the scale, its product, the sum
    "PSOFT": lambda site: 8 + 3 + 2 * site.config["r"] + 3,
    # U S, the product over what is left, the difference, the sum
    "OSF": lambda site: min(site.weight.shape) - osf_rank(site) + 3,
    # U as fp32, S + L, two products over in, the difference, the sum
    "FROD": lambda site: 2 * site.weight.shape[1] + 4,
    # three factors, the sum
    "ADAMSS": lambda site: site.config["subspace_rank"] + site.config["r"] + 1,
}


def _absolute(site: Site) -> Site:
    """Take the size of every number but logits, whose weights are positive already."""
    sizes = {key: tensor if "logits" in key else np.abs(tensor) for key, tensor in site.parts.items()}
    shared = {key: np.abs(tensor) for key, tensor in site.shared.items()}
    bias = None if site.bias is None else np.abs(site.bias)
    return replace(site, parts=sizes, shared=shared, weight=np.abs(site.weight), bias=bias)


def _merged(site: Site) -> Pair:
    """Ask the oracle about a site laid out (out, in)."""
    return Merge(site, False, (site.weight, site.bias)).expected


def _sizes_of_lora(site: Site) -> Pair:
    """|W| + s |B| |A|, in KaSA with |U| S |V| for |W|."""
    small = _absolute(site)
    if "lora_diag" not in site.parts:
        return _merged(small)
    left, values, right = np.linalg.svd(site.weight, full_matrices=False)
    b = small.parts["lora_B.weight"] * small.parts["lora_diag"]
    plain = replace(
        small,
        config={**site.config, "kasa_config": None},
        parts={"lora_A.weight": small.parts["lora_A.weight"], "lora_B.weight": b},
    )
    return _merged(plain)[0] + (np.abs(left) * values) @ np.abs(right), small.bias


def _sizes_of_deft(site: Site) -> Pair:
    """|W| + |Q| (k |R| + |M|ᵀ |W|)."""
    p = site.parts["deft_P"]
    q = np.abs(np.linalg.qr(p)[0] if site.config["decomposition_method"] == "qr" else p)
    low = q.T @ np.abs(site.weight)
    if not site.config["para"]:
        scale = site.config["alpha"] / p.shape[1] if site.config["alpha"] else 1
        low = low + scale * np.abs(site.parts["deft_R"])
    return np.abs(site.weight) + q @ low, site.bias


def _sizes_of_peanut(site: Site) -> Pair:
    """The net on sizes, without activations: each is below |x|."""
    return _merged(replace(_absolute(site), config={**site.config, "act_fn": "linear"}))


def _sizes_as_made(site: Site) -> Pair:
    """|W| + |delta|, where only what comes after the delta is counted in roundings."""
    made, bias = _merged(site)
    return np.abs(site.weight) + np.abs(made - site.weight), bias


def _sizes_of_waveft(site: Site) -> Pair:
    """|W| + scaling times the transform of sizes with the sizes of the taps."""
    if not site.config["use_idwt"]:
        return _merged(_absolute(site))
    dense = _merged(replace(_absolute(site), config={**site.config, "use_idwt": False, "scaling": 1}))[0]
    low = np.abs(_taps(site))
    whole = synthesis(dense - np.abs(site.weight), low, low[::-1])
    return np.abs(site.weight) + site.config["scaling"] * whole, site.bias


def _taps(site: Site) -> Array:
    return site.given["low_pass"] if "low_pass" in site.given else low_pass(site.config["wavelet_family"])


def _sizes_of_psoft(site: Site) -> Pair:
    """|W| + |U| S (|R| + I) |V|: s cancels against what B was divided by."""
    rank = site.config["r"]
    left, values, right = (np.abs(part) for part in np.linalg.svd(site.weight, full_matrices=False))
    turn = np.abs(psoft_rotation(site)) + np.eye(rank)
    share = values[:rank] if site.config["ab_svd_init"] == "psoft_init" else np.sqrt(values[:rank])
    middle = share[:, None] * turn * (values[:rank] / share)
    return np.abs(site.weight) + left[:, :rank] @ middle @ right[:rank], site.bias


def _sizes_of_osf(site: Site) -> Pair:
    """|W| + |U| |S| |V| of the file and of the base."""
    leading = osf_rank(site)
    left, values, right = (np.abs(part) for part in np.linalg.svd(site.weight, full_matrices=False))
    before = (left[:, leading:] * values[leading:]) @ right[leading:]
    return _merged(_absolute(site))[0] + 2 * before, site.bias


def _sizes_of_frod(site: Site) -> Pair:
    """2 |W| + |U| |S + L| |V|ᵀ: W is taken away and added again."""
    category, small = frod_category(site.name), _absolute(site)
    v = site.shared[f"base_model.frod_V.{category}"]
    spread = np.diag(small.parts["frod_lambda_l"]).copy()
    spread[tuple(site.shared[f"base_model.frod_s_indices.{category}"])] = small.parts["frod_lambda_s_values"]
    return 2 * small.weight + np.abs(frod_directions(site.weight, v)) @ spread @ np.abs(v).T, site.bias


SIZES: dict[str, Callable[[Site], Pair]] = {
    "LORA": _sizes_of_lora,
    "DEFT": _sizes_of_deft,
    "PEANUT": _sizes_of_peanut,
    "C3A": _sizes_as_made,
    "FOURIERFT": _sizes_as_made,
    "WAVEFT": _sizes_of_waveft,
    "PSOFT": _sizes_of_psoft,
    "OSF": _sizes_of_osf,
    "FROD": _sizes_of_frod,
}


# Higham, theorem 24.2: a transform of n = 2ᵗ numbers errs by t η of its length, twiddles being rounded once
ETA = U + gamma(4) * (math.sqrt(2) + U)


def _fourier_error(site: Site) -> float:
    """(t_out + t_in) η |delta|: the inverse transform goes along both axes."""
    turns = sum(math.log2(size) for size in site.weight.shape)
    return turns * ETA / (1 - turns * ETA) * float(np.linalg.norm(_merged(site)[0] - site.weight))


def _circulant_error(site: Site) -> Array:
    """((√b + 2) t η + 3 u) |w| / in for each block w of b = 2ᵗ numbers.

    x = ifft(e) has entries of size 1/b and errs by t η / √b in length; y = fft(w) errs by t η √b |w|; their product
    rounds by √2 γ₂ < 3 u; fft stretches what it is given by √b and adds t η of its result, which is |w| long.
    """
    kernel = site.parts["c3a_kernel"]
    block = kernel.shape[2]
    turns = math.log2(block)
    share = (math.sqrt(block) + 2) * turns * ETA / (1 - turns * ETA) + 3 * U
    lengths = share * np.linalg.norm(kernel, axis=2) / site.weight.shape[1]
    return np.kron(lengths, np.ones((block, block)))


def _loss(factor: Array) -> float:
    """Measure how far columns are from orthonormal."""
    return float(np.linalg.norm(factor.T @ factor - np.eye(factor.shape[1])))


def _svd_error(weight: Array) -> float:
    """Measure E of U S V = W + E, as LAPACK leaves it in fp32: no constant of a backward error is assumed."""
    factors = torch.linalg.svd(torch.from_numpy(weight).float(), full_matrices=False)
    left, values, right = (factor.double().numpy() for factor in factors)
    residual = float(np.linalg.norm((left * values) @ right - weight))
    return residual + float(values[0]) * (_loss(left) + _loss(right.T))


def _truncation_error(site: Site, kept: int) -> float:
    """(σ_k / (σ_k - σ_k+1) + 2) E: the derivative of the best rank-k approximation stretches E by no more.

    In U and V it acts on each pair i <= k < j as [[σ_i², σ_i σ_j], [σ_i σ_j, σ_i²]] / (σ_i² - σ_j²), whose greater
    eigenvalue is σ_i / (σ_i - σ_j).  On the way from W to W + E each σ moves by E at most; 2 E more for the rest of
    W and for factors that are not quite orthonormal.
    """
    values, error = np.linalg.svd(site.weight, compute_uv=False), _svd_error(site.weight)
    gap = values[kept - 1] - values[kept] - 2 * error
    assert gap > 0
    return float(((values[kept - 1] + error) / gap + 2) * error)


def _kasa_error(site: Site) -> float:
    return _truncation_error(site, min(site.weight.shape) - _rank(site)) if "lora_diag" in site.parts else 0.0


def _osf_error(site: Site) -> float:
    return _truncation_error(site, osf_rank(site))


def _psoft_error(site: Site) -> float:
    """|K| E (2 √2 σ_1 / δ + √(σ_1 / σ_r) + 1) + σ_1 |R - R'|, K = R - I.

    Singular vectors turn by at most √2 E / δ, δ being the least distance of σ_1..σ_r from another singular value and
    from zero; a σ moves by E, its root by E / 2 √σ_r; and factors are not quite orthonormal.  R solves R (I - Q) =
    I + Q with Q skew, so (I - Q)⁻¹ is no longer than one and the residual of fp32's R bounds its error.
    """
    rank = site.config["r"]
    values, error = np.linalg.svd(site.weight, compute_uv=False), _svd_error(site.weight)
    distances = [abs(values[i] - values[j]) for i in range(rank) for j in range(len(values)) if i != j]
    delta = min(*distances, values[rank - 1]) - 2 * error
    assert delta > 0
    turn = psoft_rotation(site)
    stretch = 2 * math.sqrt(2) * values[0] / delta + math.sqrt(values[0] / values[rank - 1]) + 1
    return float(np.linalg.norm(turn - np.eye(rank), 2) * error * stretch + values[0] * _cayley_error(site))


def _cayley_error(site: Site) -> float:
    """Bound the error of R before its two vectors, times the greatest of both; a sum of powers rounds each product."""
    if not site.config["psoft_orth"]:
        return 0.0
    rank = site.config["r"]
    ends = [np.abs(site.parts.get(f"psoft_R.vector_{name}", np.ones(1))).max() for name in "ab"]
    upper = torch.zeros(rank, rank)
    upper[tuple(torch.triu_indices(rank, rank, 1))] = torch.from_numpy(site.parts["psoft_R.weight"]).float()
    q, eye = upper - upper.T, torch.eye(rank)
    if site.config["use_cayley_neumann"]:
        # each power is a product over r more, each term is doubled and added; a shortened Q: norm, quotient, product
        terms = max(int(site.config["num_cayley_neumann_terms"]), 4)
        size = np.abs(q.double().numpy())
        powers = sum(2 * np.linalg.matrix_power(size, i) for i in range(terms))
        return float(gamma(terms * (rank + 1 + rank * rank / 2 + 4)) * np.linalg.norm(powers) * ends[0] * ends[1])
    solved = torch.linalg.solve(eye - q, eye + q, left=False).double()
    return float(torch.linalg.norm(solved @ (eye - q).double() - (eye + q).double()) * ends[0] * ends[1])


def _deft_error(site: Site) -> float:
    """|Q - Q'| (|k R - Qᵀ W| + |W|) of P = QR, with |Q - Q'| <= (1 + √2) |P⁺| E / (1 - |P⁺| E) and E measured.

    G. W. Stewart, Perturbation bounds for the QR factorization of a matrix (1977).
    """
    if site.config["decomposition_method"] != "qr":
        return 0.0
    p = site.parts["deft_P"]
    q, upper = (factor.double().numpy() for factor in torch.linalg.qr(torch.from_numpy(p).float()))
    error = float(np.linalg.norm(q @ upper - p)) + float(np.linalg.norm(p, 2)) * _loss(q)
    relative = float(np.linalg.norm(np.linalg.pinv(p), 2)) * error
    turned = (1 + math.sqrt(2)) * relative / (1 - relative) + _loss(q)
    exact = np.linalg.qr(p)[0]
    low = exact.T @ (_merged(site)[0] - site.weight)  # Qᵀ delta = k R - Qᵀ W
    return turned * (1 + turned) * float(np.linalg.norm(low, 2) + np.linalg.norm(site.weight, 2))


def _frod_error(site: Site) -> float:
    """Twice |V⁻¹| times the residuals of both float64 solutions over the shortest column, times |S + L| |V|."""
    category = frod_category(site.name)
    v = site.shared[f"base_model.frod_V.{category}"]
    ours = np.linalg.solve(v, site.weight.T)
    theirs = torch.linalg.solve(torch.from_numpy(v), torch.from_numpy(site.weight.T.copy())).numpy()
    residual = sum(np.linalg.norm(v @ solved - site.weight.T) for solved in (ours, theirs))
    shortest = np.linalg.norm(ours, axis=1).min()
    spread = site.parts["frod_lambda_l"].max() + np.abs(site.parts["frod_lambda_s_values"]).sum()
    inverse = np.linalg.norm(np.linalg.inv(v), 2)
    return float(2 * inverse * residual / shortest * spread * np.linalg.norm(v, 2))


EXTRA: dict[str, Callable[[Site], float | Array]] = {
    "LORA": _kasa_error,
    "FOURIERFT": _fourier_error,
    "C3A": _circulant_error,
    "PSOFT": _psoft_error,
    "OSF": _osf_error,
    "DEFT": _deft_error,
    "FROD": _frod_error,
}


def bounds(merge: Merge) -> Pair:
    """Give the largest honest distance of each element of W' and b'; none of what the oracle hands back untouched."""
    site, expected = merge.logical, merge.expected
    tuner = site.config["peft_type"]
    unit = gamma(ROUNDS[tuner](site))
    weight, bias = SIZES.get(tuner, lambda one: _merged(_absolute(one)))(site)
    bound = unit * weight + (1 + unit) * EXTRA.get(tuner, lambda one: 0.0)(site)
    bound = bound.T if merge.in_out else bound
    untouched = [expected[0] is merge.site.weight, expected[1] is merge.site.bias]
    return 0 * bound if untouched[0] else bound, None if bias is None else (0 if untouched[1] else unit) * np.abs(bias)


# --- the comparison -------------------------------------------------------------------------------------


def agrees(merge: Merge, claimed: Site) -> bool:
    """Compare what PEFT made of a site with what the oracle makes of the claimed one."""
    expected = replace(merge, site=claimed).expected
    pairs = zip(expected, merge.actual, bounds(merge), strict=True)
    return all(
        actual is None if wanted is None else actual.shape == wanted.shape and np.all(np.abs(actual - wanted) <= bound)
        for wanted, actual, bound in pairs
    )


Get = Callable[[str], list[Merge]]


@pytest.fixture(scope="module")
def get(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Let PEFT merge each case once."""
    known: dict[str, list[Merge]] = {}

    def merges(name: str) -> list[Merge]:
        if CASES[name].tuner == "Adamss":
            pytest.importorskip("sklearn", reason="PEFT clusters AdaMSS's rows with scikit-learn")
        if name not in known:
            known[name] = live(CASES[name], tmp_path_factory.mktemp("adapter"))
        return known[name]

    return merges


@pytest.mark.parametrize("name", CASES)
def test_oracle_agrees_with_peft(get: Get, name: str) -> None:
    assert all(agrees(merge, merge.site) for merge in get(name))


@pytest.mark.parametrize("name", CASES)
def test_the_budget_is_far_below_the_delta(get: Get, name: str) -> None:
    """Guard against a bound that forgives anything: 1/64 of the delta at its widest, and mostly far less."""
    for merge in get(name):
        moved = [
            (np.max(bound), np.sqrt(np.mean((actual - base) ** 2)))
            for bound, actual, base in zip(
                bounds(merge), merge.actual, (merge.site.weight, merge.site.bias), strict=True
            )
            if base is not None and np.any(actual != base)
        ]
        assert moved
        assert all(bound < size / 64 for bound, size in moved), moved


# --- negative controls ----------------------------------------------------------------------------------

# what PEFT stores and does not merge with: state of the training, copies, a size that is known
UNUSED = ("lora_monteclora_sampler", "lora_velora_embed", "frod_s_size")
WITH_BIAS = tuple(f"glora_{letter}.zeros" for letter in "CDE")
COPIES = ("randlora_A", "randlora_B")  # of the shared ones, beside every layer


def _altered(name: str, tensor: Array) -> Array:
    """Change the largest number by half of it, or move every index one place on."""
    if tensor.dtype.kind != "f":
        return np.roll(tensor, 1, axis=-1)
    changed = tensor.copy()
    # of PVeRA's the second half is not merged, of RandLoRA's what no layer is large enough for
    cut = name.endswith(("pvera_lambda_d", "pvera_A", "randlora_A", "randlora_B"))
    where = 0 if cut else int(np.argmax(np.abs(tensor)))
    changed.flat[where] = 1.5 * changed.flat[where] if changed.flat[where] else 1.0
    return changed


def _all_agree(merges: Sequence[Merge], change: Callable[[Site], Site]) -> bool:
    return all(agrees(merge, change(merge.site)) for merge in merges)


@pytest.mark.parametrize("name", CASES)
def test_one_changed_number_is_seen(get: Get, name: str) -> None:
    merges = get(name)
    for key in sorted({key for merge in merges for key in merge.site.parts}):

        def change(site: Site, key: str = key) -> Site:
            known = {key: _altered(key, site.parts[key])} if key in site.parts else {}
            return replace(site, parts={**site.parts, **known})

        biased = any(merge.site.bias is not None for merge in merges if key in merge.site.parts)
        unused = key.startswith(UNUSED + COPIES) or (key in WITH_BIAS and not biased)
        assert _all_agree(merges, change) == unused, key
    for key in merges[0].site.shared:

        def change_shared(site: Site, key: str = key) -> Site:
            return replace(site, shared={**site.shared, key: _altered(key, site.shared[key])})

        assert _all_agree(merges, change_shared) == any(unused in key for unused in UNUSED), key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.wrong])
def test_another_setting_is_seen(get: Get, name: str) -> None:
    wrong = CASES[name].wrong
    assert not _all_agree(get(name), lambda site: replace(site, config={**site.config, **wrong}))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("fourierft", "waveft", "adamss"))])
def test_what_no_file_holds_matters(get: Get, name: str) -> None:
    """Another position, another row set: another merge."""

    def change(site: Site) -> Site:
        moved = {key: value[::-1] for key, value in site.given.items() if key in ("positions", "rows")}
        if "rows" in moved:
            moved = {"rows": [np.roll(np.concatenate(moved["rows"]), 1)[: len(rows)] for rows in site.given["rows"]]}
        return replace(site, given={**site.given, **moved})

    assert not _all_agree(get(name), change)


def test_psoft_changes_with_the_signs_of_singular_vectors(get: Get) -> None:
    """No file says how LAPACK turned them, and off the diagonal of R - I they do not cancel."""
    merges = get("psoft")
    flip = np.array([-1.0, 1.0, 1.0, 1.0])
    assert not _all_agree(merges, lambda site: replace(site, given={"signs": site.given["signs"] * flip}))
    assert _all_agree(merges, lambda site: replace(site, given={"signs": -site.given["signs"]}))


# --- raw parameters -------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Hold stacks of matrices, and one that is no stack."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 10, 6))
        self.router = nn.Parameter(torch.randn(3, 7))
        self.down = nn.Parameter(torch.randn(3, 6, 5))
        self.is_transposed = transposed


PARAMETERS = {"one": ("gate_up",), "two": ("down", "gate_up"), "three": ("router", "down", "gate_up")}


def _live_parameters(names: Sequence[str], transposed: bool, folder: Path) -> tuple[dict, dict, dict, dict]:
    """Give parts, config, the targeted parameters as registered, and what PEFT made of them."""
    torch.manual_seed(len(names))
    base = Toy([Experts(transposed=transposed)])
    before = {name: _array(tensor).copy() for name, tensor in base.layers[0].proj.named_parameters()}
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        rank_pattern={"down": 4},
        alpha_pattern={"proj.gate_up": 5},
        target_modules=[],
        target_parameters=[f"proj.{name}" for name in names],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
        _train(model)
        model.save_pretrained(folder)
        stored = peft.get_peft_model_state_dict(model)
        merged = model.merge_and_unload()
    parts = {key.removeprefix("base_model.model.layers.0.proj."): _array(tensor) for key, tensor in stored.items()}
    after = {name: _array(tensor) for name, tensor in merged.layers[0].proj.named_parameters()}
    written = json.loads((folder / "adapter_config.json").read_text())
    return parts, written, {name: tensor for name, tensor in before.items() if name in names}, after


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("names", PARAMETERS.values(), ids=PARAMETERS)
def test_raw_parameters_agree_with_peft(names: Sequence[str], transposed: bool, tmp_path: Path) -> None:
    """gamma_(r + 3): r in B_e A_e, the scale, its product, the sum."""
    parts, config, before, after = _live_parameters(names, transposed, tmp_path)

    def expected(tensors: Mapping[str, Array], base: Mapping[str, Array]) -> dict[str, Array]:
        return oracle_tuners.merged_parameters(tensors, config, "layers.0.proj", base, in_out=transposed)

    sizes = expected({key: np.abs(t) for key, t in parts.items()}, {key: np.abs(t) for key, t in before.items()})

    def seen(tensors: Mapping[str, Array]) -> bool:
        made = expected(tensors, before)
        return any(np.any(np.abs(after[name] - made[name]) > gamma(4 + 3) * sizes[name]) for name in before)

    assert not seen(parts)
    assert all(seen({**parts, key: _altered(key, tensor)}) for key, tensor in parts.items())
    assert seen({key: np.roll(tensor, 1, axis=-1) for key, tensor in parts.items()})


# --- the oracle itself ----------------------------------------------------------------------------------


def test_every_tuner_of_the_oracle_is_held_against_peft() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = {getattr(peft, f"{case.tuner}Config")(**case.settings).peft_type.value for case in CASES.values()}
    assert configs == set(oracle_tuners.DELTAS) | set(oracle_tuners.PAIRS) == set(ROUNDS)


def test_the_oracle_imports_numpy_alone() -> None:
    allowed = sys.stdlib_module_names | {"numpy", "oracle"}
    for path in Path(oracle_tuners.__file__).parent.glob("*.py"):
        tree = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in tree if isinstance(node, ast.ImportFrom) and not node.level]
        assert {name.partition(".")[0] for name in names} <= allowed, path


@pytest.mark.parametrize("moments", range(1, 11))
def test_derived_taps_are_the_published_ones(moments: int) -> None:
    """To less than the rounding that PEFT gives them."""
    published = np.array(Wavelet(f"db{moments}").rec_lo)
    derived = low_pass(f"db{moments}")
    assert np.all(np.abs(derived - published) < U * np.abs(published))
    assert np.allclose(derived @ mirror(derived), 0, atol=1e-12)


def test_blocks_lie_on_the_diagonal() -> None:
    assert block_diagonal(np.array([[1.0, 2], [3, 4]]), 2).tolist() == [[1, 2, 0, 0], [0, 0, 3, 4]]


REFUSED = {
    "dora": ("lora", {"use_dora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
    "random decomposition": ("psoft", {"psoft_svd": "lowrank"}),
    "unknown taps": ("waveft", {"wavelet_family": "coif4"}),
}


@pytest.mark.parametrize(("name", "config"), REFUSED.values(), ids=REFUSED)
def test_what_the_oracle_cannot_say_it_refuses(get: Get, name: str, config: Mapping[str, object]) -> None:
    merge = get(name)[0]
    with pytest.raises(ValueError, match=r"not told here|cannot be foretold|must be given"):
        _ = replace(merge, site=replace(merge.site, config={**merge.site.config, **config})).expected


@pytest.mark.parametrize("name", ["vera", "pvera", "randlora", "frod"])
def test_projections_that_were_not_saved_are_missed(get: Get, name: str) -> None:
    merge = get(name)[0]
    with pytest.raises(KeyError, match="base_model"):
        _ = replace(merge, site=replace(merge.site, shared={})).expected
