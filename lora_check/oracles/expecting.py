"""What an adapted module has to answer, in fp32, and how far an honest merge of it may lie from that.

expect   (Record) -> written into it; forwarding/bounds.py has the derivation
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_check.forwarding.bounds import Noise, of_sums, sureness
from lora_check.oracles.recording import Call, Record
from lora_check.rounding import unit


def expect(record: Record, noise: Noise, *, derived: bool = True) -> None:
    """Write into the record what each adapted module computes in fp32, and what an honest merge may make of it.

    derived   the factors are those of the files; of factors that PEFT computes, their rounding is not reckoned with
    """
    for name, layer in record.adapted.items():
        if matrix(layer) is not None and hasattr(layer, "merge"):
            _expect(record, name, layer, noise)
            record.sure[name] &= derived


def matrix(layer: Any) -> Any:
    """The module under an adapter, where a merge changes a matrix that it only multiplies with; else None."""
    from transformers.pytorch_utils import Conv1D

    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return base if type(base) in (nn.Linear, nn.Embedding, Conv1D, nn.Conv1d, nn.Conv2d) else None


def _expect(record: Record, name: str, layer: Any, noise: Noise) -> None:
    whole, calls = copy.deepcopy(layer).float(), record.of(name)
    given = [_fp32(call.given[0]) for call in calls]
    record.sure[name] = _is_plain_lora(whole)
    base = whole.get_base_layer()
    weight, bias = base.weight.detach().clone(), _copied(getattr(base, "bias", None))
    factors = [_of_factors(whole, x, noise) for x in given]
    for call, x in zip(calls, given, strict=True):
        call.true = whole(x)
        call.effect = call.true - base(x)
    shares = _of_all_factors(whole, calls, given, noise)
    whole.merge(safe_merge=True, adapter_names=list(layer.active_adapters))
    if bias is not None:  # what an adapter adds to the bias is no product with x
        for call in calls:
            call.effect = call.effect - (base.bias - bias)
    b = noise.of(base.weight.detach(), weight)
    for call, x, extra in zip(calls, given, factors, strict=True):
        shares.append(_allow(call, base, b, x, extra))
    if b.ndim == 2 and all(x.is_floating_point() for x in given):
        shares.append(
            (b * _crossed(calls, given, turned=type(base).__name__ == "Conv1D")).double().square().sum().item()
        )
        record.linear[name] = math.sqrt(math.fsum(shares))


def _allow(call: Call, base: Any, b: Tensor, x: Tensor, factors: Tensor | float) -> float:
    """Write how far the answer may lie from the true one, before it is stored; `base` holds W*.

    returns   sum (effect e)^2 for the e of the sums: what they add to the square of Record.linear
    """
    assert call.true is not None
    assert call.effect is not None
    numbers = x.is_floating_point()
    lam = sureness(call.true.numel(), terms_of(base))
    spread = through(base, b.square(), x.square() if numbers else x).sqrt()
    size = through(base, base.weight.detach().abs(), x.abs() if numbers else x)
    sums = of_sums(terms_of(base), lam) * size
    call.allowed = lam * (spread + factors) + sums
    return (call.effect * sums).double().square().sum().item()


def _copied(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()


def _fp32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _crossed(calls: Sequence[Call], given: Sequence[Tensor], *, turned: bool) -> Tensor:
    """sum_t effect_ti x_tj over all calls, in the shape of the weight."""
    found: Any = 0
    for call, x in zip(calls, given, strict=True):
        g, rows = _rows(call.effect), _rows(x)
        found = found + (rows.T @ g if turned else g.T @ rows)
    return torch.as_tensor(found)


def _rows(x: Any) -> Tensor:
    return torch.as_tensor(x).reshape(-1, x.shape[-1])


def through(base: Any, weight: Tensor, x: Tensor) -> Tensor:
    """The base module with another weight, without a bias and without its hooks."""
    base = copy.copy(base)
    base._forward_hooks, base._forward_pre_hooks = OrderedDict(), OrderedDict()
    bias = {"bias": torch.zeros_like(base.bias)} if getattr(base, "bias", None) is not None else {}
    found: Tensor = functional_call(base, {"weight": weight, **bias}, (x,))
    return found


def terms_of(base: Any) -> int:
    """k: products in a sum."""
    if isinstance(base, nn.Embedding):
        return 1
    weight = base.weight
    return int(weight.shape[0] if type(base).__name__ == "Conv1D" else weight[0].numel())


def _is_plain_lora(layer: Any) -> bool:
    """Whether delta = s B A and nothing else, the formula that `bounds` reckons with; AdaLoRA's A is no module."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or not isinstance(layer.lora_A, nn.ModuleDict):
        return False
    return not (getattr(layer, "lora_variant", None) or any(getattr(layer, "use_dora", {}).values()))


def _of_factors(layer: Any, x: Tensor, noise: Noise) -> Tensor | float:
    """u |s| (sqrt(B^2 (A x)^2) + sqrt(B^2 (A^2 x^2))) over the adapters: factors that were stored in 16 bits.

    Each element of A and B is then off by u of itself at most, and independently.
    """
    if not _is_plain_lora(layer) or not x.is_floating_point():
        return _of_token_factors(layer, x, noise) if _is_plain_lora(layer) else 0.0
    found: Tensor | float = 0.0
    for one in (name for name in layer.active_adapters if name in layer.lora_A):
        a, b = layer.lora_A[one], layer.lora_B[one]
        after = through(b, b.weight.square(), a(x).square()).sqrt()
        before = through(b, b.weight.square(), through(a, a.weight.square(), x.square())).sqrt()
        found = found + unit(noise.storage) * abs(layer.scaling[one]) * (after + before)
    return found


def _of_all_factors(layer: Any, calls: Sequence[Call], given: Sequence[Tensor], noise: Noise) -> list[float]:
    """(u s)^2 sum_ir B_ir^2 (sum_t g_ti h_tr)^2, h = A x, and the same of A: what they can make of <answer, effect>."""
    if not _is_plain_lora(layer) or not all(x.is_floating_point() for x in given):
        return []
    found = []
    for one in (name for name in layer.active_adapters if name in layer.lora_A):
        a, b = layer.lora_A[one].weight, layer.lora_B[one].weight
        if a.ndim != 2:
            continue
        pairs = [(_rows(call.effect), _rows(x)) for call, x in zip(calls, given, strict=True)]
        of_b = b * torch.as_tensor(sum(g.T @ (x @ a.T) for g, x in pairs))
        of_a = a * torch.as_tensor(sum((g @ b).T @ x for g, x in pairs))
        scale = (unit(noise.storage) * layer.scaling[one]) ** 2
        found += [scale * part.double().square().sum().item() for part in (of_a, of_b)]
    return found


def _of_token_factors(layer: Any, ids: Tensor, noise: Noise) -> Tensor | float:
    """The same of an embedding: u |s| 2 sqrt(A^2 B^2) of the rows that are read."""
    found: Tensor | float = 0.0
    for one in (name for name in layer.active_adapters if name in layer.lora_embedding_A):
        a, b = layer.lora_embedding_A[one].T[ids], layer.lora_embedding_B[one]
        found = found + 2 * unit(noise.storage) * abs(layer.scaling[one]) * (a.square() @ b.square().T).sqrt()
    return found
