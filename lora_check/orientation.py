"""Which way round a layer keeps its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lora_check.links import lookup
from lora_check.types import Adapter, Checkpoint, Part

IN_OUT_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose projections are transformers' Conv1D, stored (in, out): asked only when every target is square."""


class Orientation:
    """Whether a square weight is kept as (in, out): the non-square targets tell, else the model type, else the flag."""

    def __init__(
        self,
        shape: Callable[[Part], tuple[int, ...]],
        adapter: Adapter,
        modules: Mapping[str, Sequence[Part]],
        base: Checkpoint,
    ) -> None:
        self.flag, self.lora = adapter.config.in_out, adapter.config.method == "LORA"
        self.model = str(base.config.get("model_type") or "")
        seen = set()
        for module, parts in modules.items():
            pair = {part.role: shape(part) for part in parts}
            name = lookup(f"{module}.weight", base.metas(), base.config)
            if name and {"A", "B"} <= pair.keys():
                seen.add(_kept_as(base.metas()[name].shape, pair["A"], pair["B"]))
        self.seen = {one for one in seen if one is not None}

    def of(self, shape: tuple[int, ...]) -> bool:
        """True for (in, out)."""
        if not self.lora:
            return len(shape) == 2 and (self.model in IN_OUT_MODELS or bool(self.flag))
        if len(shape) != 2 or shape[0] != shape[1]:
            return False
        if len(self.seen) == 1:
            return next(iter(self.seen))
        return self.model in IN_OUT_MODELS if self.model else bool(self.flag)


def _kept_as(weight: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool | None:
    if len(weight) != 2 or weight[0] == weight[1] or len(a) != 2 or len(b) != 2:
        return None
    fits = {(b[0], a[1]): False, (a[1], b[0]): True}
    return fits.get(weight)
