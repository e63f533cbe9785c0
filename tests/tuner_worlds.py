"""Build tiny models, adapters of every PEFT tuner that can merge, and PEFT's own merges on disk.

What `peft_worlds` does for LoRA, for every other tuner and for LoRA's variants and ways of starting.  An adapter is
trained by hand: every trained tensor moves away from what it started as, by as much as moves the merged weight by
DELTA_SHARE in Frobenius norm, where an amount can do that.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, EvaConfig, KasaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_worlds import DELTA_SHARE, Convs, Embedder, Kwargs, LinearStack, Recipe, World, _llama, _load_base, make
from peft_worlds import EXPECTED_WARNINGS as LORA_WARNINGS
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

NOISE = 0.1  # standard deviation of what is added to a trained tensor, times an amount that is fitted
AMOUNTS = (1e-4, 1e3)  # where no amount gives the share that is wanted
FITS = 12

# What starts at random numbers that leave the base changed: there, rest is zero.
ZERO_AT_REST = ("vblora_vector_bank", "unilora_theta_d", "delora_lambda", "fourierft_spectrum", "c3a_kernel")

# What PEFT says about these worlds by design; any other warning passes through to the caller.
EXPECTED_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    *LORA_WARNINGS,
    (UserWarning, r"Specified to not (save|load) [\w ]+ (within the|from) state dictionary"),
    (UserWarning, r"save_precomputed_indices=False: sparse-support indices will be recomputed"),
    (UserWarning, r"The symmetric initialization can NOT be performed when r is odd!"),
    (UserWarning, r"Failed to load the CUDA extension: "),  # BOFT, without a GPU; it then does this:
    (UserWarning, r"Setting boft_n_butterfly_factor to 1 to speed up the finetuning process."),
    (RuntimeWarning, r"The following rank_pattern keys did not match any targeted module"),  # AdaLoRA's end in .lora_E
    (UserWarning, r"Unsupported layer type '.*Norm'>' encountered, proceed at your own risk"),  # LN tuning, of its own
    (UserWarning, r"(PiSSA|OLoRA) changes the base weights of the model"),  # on conversion
    (UserWarning, r"lora with eva initialization used with low_cpu_mem_usage=False"),
    (UserWarning, r"Sparse invariant checks are implicitly disabled"),
)


@dataclass(frozen=True, kw_only=True)
class Tuned(Recipe):
    """Say how one world is made, and by which tuner."""

    config: type[PeftConfig]
    layers: tuple[str, ...]
    amount: float | None = None  # of noise, where it is not to be fitted
    before: Callable[[nn.Module], None] | None = None  # PEFT wraps the base
    after: Callable[[PeftModel], None] | None = None  # training
    converted: bool = False  # on save, to a LoRA that started at zero

    @property
    def tuner(self) -> str:
        """The peft_type that PEFT writes."""
        return next(str(kind.value) for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config is self.config)


@dataclass(frozen=True)
class Model:
    """Make a model, and say which kinds of layer it has, under which names."""

    make: Callable[[], nn.Module]
    layers: tuple[str, ...]
    targets: tuple[str, ...] = ("fc0", "fc1")


# --- models ---------------------------------------------------------------------------------------------


class Conv1DStack(nn.Module):
    """Hold two of transformers' Conv1D, as GPT-2 does."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.fc0 = Conv1D(widths[1], widths[0])
        self.act = nn.ReLU()
        self.fc1 = Conv1D(widths[2], widths[1])


class Normed(nn.Module):
    """Hold two layer norms, the second without bias, around a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(14)
        self.fc = nn.Linear(14, 20)
        self.norm1 = nn.LayerNorm(20, bias=False)


def _linear(*widths: int) -> Model:
    return Model(lambda: LinearStack(*widths), ("linear",))


def _no_bias(*widths: int) -> Model:
    return Model(lambda: _without_bias(LinearStack(*widths)), ("linear",))


def _without_bias(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_parameter("bias", None)
    return model


def _gpt(*widths: int) -> Model:
    return Model(lambda: Conv1DStack(*widths), ("conv1d_t",))


def _conv1d() -> nn.Module:
    return Convs(fc0=nn.Conv1d(5, 7, 3), fc1=nn.Conv1d(7, 6, 1))


def _conv2d() -> nn.Module:
    return Convs(fc0=nn.Conv2d(5, 7, 3), fc1=nn.Conv2d(7, 6, (3, 2), bias=False), fc2=nn.Conv2d(6, 9, 1))


def _conv2d_blocks() -> nn.Module:
    return Convs(fc0=nn.Conv2d(6, 8, 3), fc1=nn.Conv2d(8, 6, 3, bias=False), fc2=nn.Conv2d(6, 9, 1))


def _conv2d_wide() -> nn.Module:
    return Convs(fc0=nn.Conv2d(12, 20, 3), fc1=nn.Conv2d(20, 14, (3, 2), bias=False), fc2=nn.Conv2d(14, 20, 1))


def _conv3d() -> nn.Module:
    return Convs(fc0=nn.Conv3d(3, 5, (2, 3, 2)), fc1=nn.Conv3d(5, 4, (2, 1, 1)))


CONV1D = Model(_conv1d, ("conv",))
CONV2D = Model(_conv2d, ("conv",), ("fc0", "fc1", "fc2"))
CONV2D_BLOCKS = Model(_conv2d_blocks, ("conv",), ("fc0", "fc1", "fc2"))
CONV2D_WIDE = Model(_conv2d_wide, ("conv",), ("fc0", "fc1", "fc2"))  # so that LoKr splits both factors
CONV3D = Model(_conv3d, ("conv",))
EMBEDDER = Model(Embedder, ("embedding", "linear"), ("emb", "head"))
LLAMA = Model(_llama(), ("linear",), ("q_proj", "v_proj", "down_proj"))
NORMS = Model(Normed, ("norm",), ("norm0", "norm1"))
LLAMA_NORMS = Model(_llama(), ("norm",), ("input_layernorm", "model.norm"))


# --- what is done besides training ----------------------------------------------------------------------


def _prune(tuned: PeftModel) -> None:
    """Leave AdaLoRA with the ranks its allocator kept, another number in each layer."""
    layers = [(name, m) for name, m in tuned.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)]
    pattern = {}
    for i, (name, layer) in enumerate(layers):
        kept = [True, i == 0, False, True]
        layer.lora_E["default"].data.mul_(torch.tensor(kept)[:, None])
        pattern[f"{name}.lora_E"] = kept
    tuned.peft_config["default"].rank_pattern = pattern


def _project(tuned: PeftModel) -> None:
    """Give VeLoRA's projections, which a forward pass fills, numbers of their own."""
    for name, buffer in tuned.named_buffers():
        if "velora_embed" in name:
            buffer.copy_(torch.randn_like(buffer))


def _give_gradients(model: nn.Module) -> None:
    """Give each linear layer the gradient that LoRA-GA starts from."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module._peft_loraga_grad = torch.randn_like(module.weight)


# --- the table ------------------------------------------------------------------------------------------


def _by(config: type[PeftConfig], **common: Any) -> Callable[..., Tuned]:
    """Take (model, one tuner's arguments) to a recipe with one adapter."""

    def recipe(model: Model, **kwargs: Any) -> Tuned:
        configs = ({"target_modules": list(model.targets), **common, **kwargs},)
        return Tuned(model=model.make, layers=model.layers, config=config, configs=configs)

    return recipe


def _two(first: Tuned, second: Tuned) -> Tuned:
    """Put the second recipe's adapter on top of the first one's."""
    return replace(first, configs=(*first.configs, *second.configs))


_SMALL = LoraGAConfig(stable_gamma=100_000)
_TRANSPOSED: Kwargs = {"fan_in_fan_out": True}
_adalora = _by(peft.AdaLoraConfig, init_r=4, target_r=2, lora_alpha=7, total_step=10)
_adamss = _by(peft.AdamssConfig, r=5, num_subspaces=3, subspace_rank=2)
_beft = _by(peft.BeftConfig)
_boft = _by(peft.BOFTConfig)
_c3a = _by(peft.C3AConfig)
_deft = _by(peft.DeftConfig, r=3)
_delora = _by(peft.DeloraConfig)
_fourierft = _by(peft.FourierFTConfig, n_frequency=30, scaling=20.0)
_frod = _by(peft.FrodConfig, sparse_rate=0.1, progressbar=False)
_glora = _by(peft.GloraConfig, r=3)
_gralora = _by(peft.GraloraConfig, r=4, alpha=7)
_hira = _by(peft.HiraConfig)
_hra = _by(peft.HRAConfig)
_ia3 = _by(peft.IA3Config)
_ln = _by(peft.LNTuningConfig)
_loha = _by(peft.LoHaConfig, alpha=7)
_lokr = _by(peft.LoKrConfig, alpha=7)
_lora = _by(peft.LoraConfig, lora_alpha=7)
_miss = _by(peft.MissConfig)
_oft = _by(peft.OFTConfig)
_osf = _by(peft.OSFConfig)
_peanut = _by(peft.PeanutConfig, r=3)
_psoft = _by(peft.PsoftConfig, r=4, psoft_alpha=7)
_pvera = _by(peft.PveraConfig, r=5)
_randlora = _by(peft.RandLoraConfig, r=3, randlora_alpha=7)
_road = _by(peft.RoadConfig, group_size=4)
_shira = _by(peft.ShiraConfig, r=2, random_seed=3)
_super = _by(peft.SupertuningConfig, sparsity=0.8)
_tiny = _by(peft.TinyLoraConfig, r=2, u=5)
_tokens = _by(peft.TrainableTokensConfig, token_indices=[2, 7, 21])
_unilora = _by(peft.UniLoraConfig, r=3, theta_d_length=50)
_vblora = _by(peft.VBLoRAConfig, r=3, num_vectors=9, vector_length=4)
_vera = _by(peft.VeraConfig)
_waveft = _by(peft.WaveFTConfig, n_frequency=30)

RECIPES: Mapping[str, Tuned] = {
    "adalora": _adalora(_linear(14, 20, 11)),
    "adalora-pruned": replace(_adalora(_linear(15, 22, 13)), after=_prune),
    "adalora-no-alpha": _adalora(_linear(13, 21, 10), lora_alpha=-1),
    "adalora-square": _adalora(_linear(16, 16, 16)),
    "adalora-conv1d-t": _adalora(_gpt(14, 20, 11), **_TRANSPOSED),
    "adalora-conv2d": _adalora(CONV2D),
    "adalora-llama": _adalora(LLAMA),
    "adamss": _adamss(_linear(14, 20, 12)),
    "adamss-dynamic-rank": _adamss(_linear(15, 24, 11), use_dynamic_rank=True, random_seed=4),
    "adamss-no-bias": _adamss(_no_bias(14, 20, 12)),
    "adamss-square": _adamss(_linear(16, 16, 16)),
    "beft": _beft(_linear(14, 20, 11)),
    "boft": _boft(_linear(12, 20, 11), boft_block_size=4),
    "boft-by-blocks": _boft(_linear(15, 20, 11), boft_block_size=0, boft_block_num=5),
    "boft-butterfly": _boft(_linear(16, 24, 11), boft_block_size=4, boft_n_butterfly_factor=2),
    "boft-square": _boft(_linear(16, 16, 16), boft_block_size=8),
    "boft-conv2d": _boft(CONV2D_BLOCKS, boft_block_size=6),
    "c3a": _c3a(_linear(12, 20, 8), block_size=4),
    "c3a-pattern": _c3a(_linear(12, 18, 9), block_size=6, block_size_pattern={"fc1": 3}),
    "c3a-square": _c3a(_linear(16, 16, 16), block_size=8),
    "deft": _deft(_linear(14, 20, 11)),
    "deft-alpha": _deft(_linear(13, 20, 11), alpha=5),
    "deft-qr": _deft(_linear(14, 19, 11), decomposition_method="qr"),
    "deft-para": _deft(_linear(14, 20, 10), para=True),
    "deft-para-qr": _deft(_linear(14, 21, 11), para=True, decomposition_method="qr"),
    "deft-square": _deft(_linear(16, 16, 16)),
    "deft-conv1d-t": _deft(_gpt(14, 20, 11), **_TRANSPOSED),
    "delora": _delora(_linear(14, 20, 11), r=3, rank_pattern={"fc1": 5}),
    "delora-bias-only": _delora(_linear(14, 20, 12), r=4, bias="delora_only", target_modules=["fc1"]),
    "delora-square": _delora(_linear(16, 16, 16), r=4, lambda_pattern={"fc0": 3}),
    "fourierft": _fourierft(_linear(14, 20, 11), n_frequency_pattern={"fc1": 41}),
    "fourierft-square": _fourierft(_linear(16, 16, 16), random_loc_seed=5),
    "fourierft-conv1d-t": _fourierft(_gpt(14, 20, 11), **_TRANSPOSED),
    "frod": _frod(_linear(14, 20, 11)),
    "frod-seeded": _frod(_linear(13, 20, 11), save_projection=False, projection_prng_key=3),
    "frod-square": _frod(_linear(16, 16, 16)),
    "frod-conv1d-t": _frod(_gpt(14, 20, 11), **_TRANSPOSED),
    "glora": _glora(_linear(14, 20, 11)),
    "glora-vector": _glora(_linear(13, 20, 11), config_A_B="vector", config_C="vector", config_D_E="vector"),
    "glora-constant": _glora(_linear(14, 19, 11), config_A_B="constant", config_C="none"),
    "glora-none": _glora(_linear(14, 19, 12), config_A_B="none", config_C="lora", config_D_E="none"),
    "glora-no-bias": _glora(_no_bias(14, 20, 11)),
    "glora-square": _glora(_linear(16, 16, 16)),
    "gralora": _gralora(_linear(14, 20, 12)),
    "gralora-hybrid": _gralora(_linear(12, 20, 8), r=8, hybrid_r=3, gralora_k=4),
    "gralora-square": _gralora(_linear(16, 16, 16), r=6, gralora_k=2),
    "gralora-conv1d-t": _gralora(_gpt(14, 20, 12), hybrid_r=3, **_TRANSPOSED),
    "hira": _hira(_linear(14, 20, 11), r=3, rank_pattern={"fc1": 5}),
    "hira-square": _hira(_linear(16, 16, 16), r=4),
    "hira-conv1d-t": _hira(_gpt(14, 20, 11), r=4, **_TRANSPOSED),
    "hira-embedding": _hira(EMBEDDER, r=3),
    "hira-conv1d": _hira(CONV1D, r=3),
    "hira-conv2d": _hira(CONV2D, r=3),
    "hira-conv3d": _hira(CONV3D, r=3),
    "hra": _hra(_linear(14, 20, 11), r=4),
    "hra-odd": replace(_hra(_linear(14, 20, 11), r=3), amount=1.0),
    "hra-gs": replace(_hra(_linear(14, 20, 11), r=4, apply_GS=True), amount=1.0),
    "hra-gs-odd": replace(_hra(_linear(14, 20, 11), r=5, apply_GS=True), amount=1.0),
    "hra-square": _hra(_linear(16, 16, 16), r=2),
    "hra-conv2d": _hra(CONV2D_BLOCKS, r=4),
    "hra-conv2d-gs": replace(_hra(CONV2D_BLOCKS, r=2, apply_GS=True), amount=1.0),
    "ia3": _ia3(_linear(14, 20, 11), feedforward_modules=[]),
    "ia3-feedforward": _ia3(_linear(13, 20, 11), feedforward_modules=["fc1"]),
    "ia3-no-bias": _ia3(_no_bias(14, 20, 11), feedforward_modules=["fc0"]),
    "ia3-square": _ia3(_linear(16, 16, 16), feedforward_modules=["fc0"]),
    "ia3-conv1d-t": _ia3(_gpt(14, 20, 11), feedforward_modules=["fc1"], **_TRANSPOSED),
    "ia3-conv2d": _ia3(CONV2D, feedforward_modules=["fc0"]),
    "ia3-conv3d": _ia3(CONV3D, feedforward_modules=["fc1"]),
    "ia3-llama": _ia3(LLAMA, feedforward_modules=["down_proj"]),
    "ln": _ln(NORMS),
    "ln-llama": _ln(LLAMA_NORMS),
    "loha": _loha(_linear(14, 20, 11), r=3, rank_pattern={"fc1": 5}, alpha_pattern={"fc0": 4}),
    "loha-square": _loha(_linear(17, 17, 17), r=4),
    "loha-conv1d": _loha(CONV1D, r=3),
    "loha-conv2d": _loha(CONV2D, r=3),
    "loha-conv2d-effective": _loha(CONV2D, r=3, use_effective_conv2d=True),
    "loha-llama": _loha(LLAMA, r=5),
    "loha-llama-saved-head": _loha(LLAMA, r=5, modules_to_save=["lm_head"]),
    "lokr": _lokr(_linear(14, 20, 12), r=3, rank_pattern={"fc1": 2}),
    "lokr-full": _lokr(_linear(14, 20, 12), r=30),
    "lokr-both": _lokr(_linear(36, 48, 30), r=2, decompose_both=True, decompose_factor=6),
    "lokr-square": _lokr(_linear(16, 16, 16), r=2, decompose_factor=2),
    "lokr-conv1d": _lokr(CONV1D, r=2),
    "lokr-conv2d": _lokr(CONV2D_WIDE, r=2),
    "lokr-conv2d-effective": _lokr(CONV2D_WIDE, r=2, use_effective_conv2d=True),
    "lokr-conv2d-both": _lokr(CONV2D_WIDE, r=1, use_effective_conv2d=True, decompose_both=True, decompose_factor=4),
    "lokr-llama": _lokr(LLAMA, r=3),
    "lora-bd": _lora(_linear(14, 20, 12), r=4, use_bdlora=BdLoraConfig(["fc0"], ["fc1"], nblocks=2)),
    "lora-bd-square": _lora(_linear(16, 16, 16), r=4, use_bdlora=BdLoraConfig(["fc0"], ["fc1"], nblocks=4)),
    "lora-kasa": _lora(_linear(14, 20, 11), r=3, kasa_config=KasaConfig()),
    "lora-kasa-square": _lora(_linear(16, 16, 16), r=4, kasa_config=KasaConfig()),
    "lora-mica": _lora(_linear(14, 20, 11), r=3, init_lora_weights="mica"),
    "lora-monte": _lora(_linear(14, 20, 11), r=4, monteclora_config=MontecloraConfig(num_samples=3)),
    "lora-velora": replace(_lora(_linear(14, 20, 12), r=3, velora_config=VeloraConfig(num_groups=2)), after=_project),
    "lora-pissa": _lora(_linear(14, 20, 11), r=3, init_lora_weights="pissa"),
    "lora-pissa-converted": replace(_lora(_linear(14, 21, 11), r=3, init_lora_weights="pissa"), converted=True),
    "lora-pissa-converted-rslora": replace(
        _lora(_linear(14, 21, 11), r=3, init_lora_weights="pissa", use_rslora=True), converted=True
    ),
    "lora-olora": _lora(_linear(14, 20, 12), r=3, init_lora_weights="olora"),
    "lora-olora-converted": replace(_lora(_linear(14, 22, 12), r=3, init_lora_weights="olora"), converted=True),
    "lora-eva": _lora(
        _linear(14, 20, 11), r=3, init_lora_weights="eva", eva_config=EvaConfig(), rank_pattern={"fc0": 2}
    ),
    "lora-orthogonal": _lora(_linear(14, 20, 11), r=4, init_lora_weights="orthogonal"),
    "lora-ga": replace(
        _lora(_linear(14, 20, 11), r=3, init_lora_weights="lora_ga", lora_ga_config=_SMALL), before=_give_gradients
    ),
    "lora-ga-converted": replace(
        _lora(_linear(14, 23, 11), r=3, init_lora_weights="lora_ga", lora_ga_config=_SMALL),
        before=_give_gradients,
        converted=True,
    ),
    "miss": _miss(_linear(14, 20, 11), r=3),
    "miss-mini": _miss(_linear(14, 20, 12), r=3, mini_r=4, init_weights="mini"),
    "miss-bat": _miss(_linear(12, 20, 8), r=4, init_weights="bat"),
    "miss-square": _miss(_linear(16, 16, 16), r=5),
    "miss-bat-square": _miss(_linear(16, 16, 16), r=4, init_weights="bat"),
    "oft": _oft(_linear(12, 20, 11), oft_block_size=4),
    "oft-by-r": _oft(_linear(15, 20, 11), r=5, oft_block_size=0, num_cayley_neumann_terms=3),
    "oft-exact": _oft(_linear(12, 18, 7), oft_block_size=6, use_cayley_neumann=False),
    "oft-shared": _oft(_linear(12, 20, 9), oft_block_size=4, block_share=True),
    "oft-coft": _oft(_linear(12, 20, 10), oft_block_size=4, coft=True, eps=0.1),
    "oft-coft-exact": _oft(_linear(12, 16, 10), oft_block_size=4, coft=True, eps=0.1, use_cayley_neumann=False),
    "oft-bias-all": _oft(_linear(12, 20, 13), oft_block_size=4, bias="all", target_modules=["fc0"]),
    "oft-square": _oft(_linear(16, 16, 16), oft_block_size=8),
    "oft-conv2d": _oft(CONV2D_BLOCKS, oft_block_size=6),
    "oft-embedding": _oft(EMBEDDER, oft_block_size=5),
    "oft-llama": _oft(LLAMA, oft_block_size=8),
    "osf": _osf(_linear(14, 20, 11)),
    "osf-rank": _osf(_linear(14, 19, 11), effective_rank=5, rank_pattern={"fc1": 0.25}),
    "osf-square": _osf(_linear(16, 16, 16)),
    "peanut": _peanut(_linear(14, 20, 11)),
    "peanut-deep": _peanut(_linear(14, 19, 11), depth=2, act_fn="tanh", scaling=0.5),
    "peanut-square": _peanut(_linear(16, 16, 16), depth=1),
    "psoft": _psoft(_linear(14, 20, 11)),
    "psoft-pissa": _psoft(_linear(14, 20, 12), ab_svd_init="pissa_init"),
    "psoft-lowrank": _psoft(_linear(14, 21, 11), psoft_svd="lowrank", random_seed=3),
    "psoft-free": _psoft(_linear(13, 20, 11), psoft_orth=False, psoft_mag_a=False),
    "psoft-neumann": _psoft(
        _linear(15, 20, 11), use_cayley_neumann=True, num_cayley_neumann_terms=4, psoft_mag_b=False
    ),
    "psoft-neumann-eps": _psoft(_linear(15, 20, 12), use_cayley_neumann=True, cayley_neumann_eps=0.02),
    "psoft-square": _psoft(_linear(16, 16, 16)),
    "pvera": _pvera(_linear(14, 20, 11)),
    "pvera-seeded": _pvera(_linear(14, 21, 11), save_projection=False, projection_prng_key=3),
    "pvera-square": _pvera(_linear(16, 16, 16)),
    "pvera-conv1d-t": _pvera(_gpt(14, 20, 11), **_TRANSPOSED),
    "randlora": _randlora(_linear(14, 20, 11)),
    "randlora-seeded": _randlora(_linear(14, 21, 11), save_projection=False, projection_prng_key=3),
    "randlora-sparse": _randlora(_linear(14, 22, 11), sparse=True),
    "randlora-very-sparse": _randlora(_linear(14, 23, 11), very_sparse=True),
    "randlora-square": _randlora(_linear(16, 16, 16)),
    "randlora-conv1d-t": _randlora(_gpt(14, 20, 11), **_TRANSPOSED),
    "road-1": _road(_linear(14, 20, 12)),
    "road-2": _road(_linear(13, 20, 12), variant="road_2"),
    "road-4": _road(_linear(15, 20, 12), variant="road_4"),
    "road-no-bias": _road(_no_bias(14, 20, 12)),
    "road-square": _road(_linear(16, 16, 16), group_size=8),
    "shira": _shira(_linear(14, 20, 11)),
    "shira-square": _shira(_linear(16, 16, 16)),
    "supertuning": _super(_linear(14, 20, 11)),
    "supertuning-smallest": _super(_linear(14, 20, 12), select_top=False),
    "supertuning-recomputed": _super(_linear(14, 21, 11), save_precomputed_indices=False),
    "supertuning-supra": _super(_linear(13, 20, 11), r=3, lora_alpha=7),
    "supertuning-square": _super(_linear(16, 16, 16)),
    "tinylora": _tiny(_linear(14, 20, 11)),
    "tinylora-seeded": _tiny(_linear(14, 21, 11), save_projection=False, projection_seed=3),
    "tinylora-tied": _tiny(_linear(14, 22, 11), weight_tying=1.0),
    "tinylora-square": _tiny(_linear(16, 16, 16)),
    "tinylora-conv1d-t": _tiny(_gpt(14, 20, 11), **_TRANSPOSED),
    "tinylora-embedding": _tiny(EMBEDDER),
    "tokens": _tokens(replace(EMBEDDER, layers=("embedding",), targets=("emb",))),
    "tokens-tied": replace(
        _tokens(Model(_llama(tie_word_embeddings=True), ("embedding", "linear"), ("embed_tokens",))),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    ),
    "unilora": _unilora(_linear(14, 20, 11)),
    "unilora-indices": _unilora(_linear(14, 21, 11), save_indices=True, proj_seed=3),
    "unilora-square": _unilora(_linear(16, 16, 16)),
    "unilora-conv1d-t": _unilora(_gpt(14, 20, 11), **_TRANSPOSED),
    "vblora": _vblora(_linear(12, 20, 8)),
    "vblora-topk": _vblora(_linear(12, 16, 8), save_only_topk_weights=True, topk=3),
    "vblora-square": _vblora(_linear(16, 16, 16)),
    "vblora-conv1d-t": _vblora(_gpt(12, 20, 8), **_TRANSPOSED),
    "vera": _vera(_linear(14, 20, 11), r=5),
    "vera-seeded": _vera(_linear(14, 21, 11), r=5, save_projection=False, projection_prng_key=3),
    "vera-square": _vera(_linear(16, 16, 16), r=6),
    "vera-conv1d-t": _vera(_gpt(14, 20, 11), r=5, **_TRANSPOSED),
    "vera-llama": _vera(LLAMA, r=7),
    "waveft": _waveft(_linear(14, 20, 11), n_frequency_pattern={"fc1": 41}),
    "waveft-db4": _waveft(_linear(14, 21, 11), wavelet_family="db4", random_loc_seed=5),
    "waveft-plain": _waveft(_linear(14, 22, 11), use_idwt=False),
    "waveft-square": _waveft(_linear(16, 16, 16)),
    "waveft-conv1d-t": _waveft(_gpt(14, 20, 11), **_TRANSPOSED),
    "two-loha": _two(_loha(_linear(14, 20, 11), r=3), _loha(_linear(), r=5, target_modules=["fc1"])),
    "two-ia3": _two(
        _ia3(_linear(14, 20, 11), feedforward_modules=["fc1"]), _ia3(_linear(), feedforward_modules=["fc1"])
    ),
    "two-oft": _two(_oft(_linear(12, 20, 11), oft_block_size=4), _oft(_linear(), oft_block_size=2)),
    "two-vera": _two(_vera(_linear(14, 20, 11), r=7), _vera(_linear(), r=7)),
    "two-hira": _two(_hira(_linear(14, 20, 11), r=3), _hira(_linear(), r=5)),
    "two-deft": _two(_deft(_linear(14, 20, 11)), _deft(_linear(), r=5, decomposition_method="qr")),
    "two-psoft": _two(_psoft(_linear(14, 20, 11)), _psoft(_linear(), r=3)),
    "two-dora": _two(
        _lora(_linear(14, 20, 11), r=3, use_dora=True), _lora(_linear(), r=5, use_dora=True, target_modules=["fc1"])
    ),
}


def names() -> list[str]:
    """List every world."""
    return list(RECIPES)


def cases() -> list[tuple[str, str, bool]]:
    """List every (world, dtype, safe) there is."""
    return [
        (name, dtype, safe) for name, recipe in RECIPES.items() for dtype in recipe.dtypes for safe in (False, True)
    ]


# --- building -------------------------------------------------------------------------------------------


def build(name: str, root: Path, dtype: str, safe: bool) -> World:
    """Build one world below root, keeping the base and adapter that an earlier call left there."""
    recipe = RECIPES[name]
    with warnings.catch_warnings():
        for category, message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        made = make(name, recipe, root, dtype, safe, _save_adapter)
        return replace(made, tuner=recipe.tuner, layers=recipe.layers)


def _save_adapter(recipe: Tuned, number: int, base_dir: Path, folder: Path, dtype: str, seed: int) -> None:
    """Train an adapter by hand, every tensor of it, and let PEFT write it."""
    model = _load_base(recipe, base_dir, dtype)
    torch.manual_seed(seed)
    if recipe.before:
        recipe.before(model)
    config = recipe.config(**copy.deepcopy(recipe.configs[number]))
    tuned = get_peft_model(model, config)
    start = folder.with_name(f"{folder.name}-start")
    if recipe.converted:
        tuned.save_pretrained(start)
    train(tuned, recipe.amount)
    if recipe.after:
        recipe.after(tuned)
    tuned.save_pretrained(folder, path_initial_model_for_weight_conversion=start if recipe.converted else None)


# --- training by hand -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Hold trained parameters, where each rests and which way each moves, and the layers they change."""

    layers: tuple[BaseTunerLayer, ...]
    moves: tuple[tuple[nn.Parameter, Tensor, Tensor], ...]

    def move(self, amount: float) -> None:
        """Put each parameter at rest + amount * direction."""
        for parameter, rest, direction in self.moves:
            parameter.data.copy_(rest + amount * direction)

    def merged(self) -> list[Tensor]:
        """List the tensors of the merged layers in fp32."""
        return [tensor for layer in self.layers for tensor in _merged(layer)]


def train(tuned: PeftModel, amount: float | None = None) -> None:
    """Move every trained tensor by an amount; without one, by what changes the merged layers by the wanted share."""
    for group in _groups(tuned):
        if amount is None:
            _fit(group)
        else:
            group.move(amount)


def _fit(group: Group) -> None:
    """Find the amount; the square root of the step settles deltas that grow as its square or cube, too."""
    group.move(0.0)
    rest = group.merged()
    amount = 1.0
    for _ in range(FITS):
        group.move(amount)
        share = _share(rest, group.merged())
        amount = min(max(amount * (DELTA_SHARE / max(share, 1e-9)) ** 0.5, AMOUNTS[0]), AMOUNTS[1])
    group.move(amount)


def _share(before: list[Tensor], after: list[Tensor]) -> float:
    """Norm of all changes over the norm of what changed; biases count where no weight changes."""
    changed = [(old, new) for old, new in zip(before, after, strict=True) if not torch.equal(old, new)]
    counted = [pair for pair in changed if pair[0].ndim > 1] or changed
    added = sum(float((new - old).square().sum()) for old, new in counted)
    return float((added / max(sum(float(old.square().sum()) for old, _ in counted), 1e-9)) ** 0.5)


def _merged(layer: BaseTunerLayer) -> list[Tensor]:
    """Merge a copy of a layer."""
    merged = copy.deepcopy(layer)
    merged.merge()
    return [value.detach().float().clone() for value in merged.get_base_layer().parameters()]


def _groups(tuned: PeftModel) -> list[Group]:
    """Group trained parameters by the layer that owns them; all in one where layers share any."""
    moves = {
        id(parameter): (parameter, _rest(name, parameter), NOISE * torch.randn(parameter.shape))
        for name, parameter in tuned.named_parameters()
        if parameter.requires_grad
    }
    layers = [module for module in tuned.modules() if isinstance(module, BaseTunerLayer)]
    owned = [[id(p) for p in layer.parameters() if id(p) in moves] for layer in layers]
    once = {key for keys in owned for key in keys}
    if len(once) < sum(map(len, owned)) or len(once) < len(moves):
        return [Group(tuple(layers), tuple(moves.values()))]
    return [Group((layer,), tuple(moves[key] for key in keys)) for layer, keys in zip(layers, owned, strict=True)]


def _rest(name: str, parameter: nn.Parameter) -> Tensor:
    """What a parameter is before training."""
    return torch.zeros_like(parameter) if any(part in name for part in ZERO_AT_REST) else parameter.data.clone()
