"""Named tensors in memory, whatever they were taken from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lora_check.errors import WrongInputError
from lora_check.formats import _folder
from lora_check.types import TensorMeta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCheckpoint:
    """Named tensors in memory; `adapter_config` where they are an adapter's."""

    location: str
    config: Mapping[str, Any]
    files: tuple[Path, ...] = ()
    adapter_config: Mapping[str, Any] | None = None
    _metas: Mapping[str, TensorMeta]
    _tensors: dict[str, Tensor] = field(repr=False)

    def metas(self) -> Mapping[str, TensorMeta]:
        """Name -> shape and dtype, in the order of the state dict."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The tensor itself; one that lies on another device is copied to the CPU."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise _folder.absent_tensor(name, self.location, closed=name in self._metas)
        if tensor.is_meta:
            message = f"tensor {name!r} of {self.location} has no data: it lies on the meta device"
            raise WrongInputError(message, hint="load the model without offloading")
        if str(tensor.layout) != "torch.strided":
            message = f"tensor {name!r} of {self.location} is sparse"
            raise WrongInputError(message, hint="give it as a dense tensor")
        return tensor.detach().cpu()

    def close(self) -> None:
        """Let go of the tensors."""
        self._tensors.clear()


def in_memory(location: str, tensors: dict[str, Tensor], config: Mapping[str, Any], **more: Any) -> MemoryCheckpoint:
    """A checkpoint of these tensors."""
    return MemoryCheckpoint(
        location=location,
        config=MappingProxyType(dict(config)),
        _metas=MappingProxyType({name: _meta(name, tensor) for name, tensor in tensors.items()}),
        _tensors=tensors,
        **more,
    )


def _meta(name: str, tensor: Tensor) -> TensorMeta:
    return TensorMeta(name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
