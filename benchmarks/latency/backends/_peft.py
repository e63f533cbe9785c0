"""PEFT's own layer around a base, with the numbers of a site in it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.latency.nouns import Place, Site


def peft_layer(site: Site, dtype: torch.dtype, **options: Any) -> Any:
    """The `peft.tuners.lora.layer.Linear` that PEFT puts in the place of the base, in eval mode, without dropout.

    Adapter i of the site is its adapter "i", and the first one is active. A and B are held in `dtype`, the scale is the
    site's, `options` are those of LoraConfig.
    """
    from peft import LoraConfig, get_peft_model

    rank, adapters = site.a.shape[1], [str(i) for i in range(len(site.a))]
    config = LoraConfig(r=rank, target_modules=["target"], lora_dropout=0.0, inference_mode=True, **options)
    model = nn.ModuleDict({"target": twin(site.base)})
    wrapped = get_peft_model(model, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        wrapped.add_adapter(name, config)
    layer: Any = model["target"]
    layer.set_adapter(adapters[0])
    for i, name in enumerate(adapters):
        layer.lora_A[name].weight = still(site.a[i].to(dtype))
        layer.lora_B[name].weight = still(site.b[i].to(dtype))
        layer.scaling[name] = site.s
    return layer.eval()


def twin(base: nn.Linear) -> nn.Linear:
    """Another module on the same tensors: what PEFT settles (gradients, modes) leaves the shared one alone."""
    other = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    other.weight = still(base.weight)
    if base.bias is not None:
        other.bias = still(base.bias)
    return other


def still(tensor: Tensor) -> nn.Parameter:
    """A parameter on these numbers that does not learn."""
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def lacking(_: Place) -> str:
    """Why there is no PEFT, with the remedy."""
    if find_spec("peft") is None:
        return "peft is not installed; pip install peft"
    try:
        import peft  # noqa: F401
    except ImportError as error:
        return f"peft cannot be imported ({error}); pip install peft"
    return ""
