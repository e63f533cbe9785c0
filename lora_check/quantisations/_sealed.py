"""Schemes whose tensors are recognised and not decoded: whether they were copied is told, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lora_check.types import Checkpoint, Coded, TensorMeta

OPAQUE = "whose codes are not decoded here"
REFUSED = "which PEFT refuses to merge into, and whose codes are not decoded here"


def modules(checkpoint: Checkpoint, leaf: str, beside: Sequence[str], dtypes: Sequence[str] = ()) -> list[str]:
    """The modules that have a tensor of that last name, of one of these dtypes, and all those beside it."""
    metas = checkpoint.metas()
    stems = [
        name.removesuffix(leaf)
        for name, meta in metas.items()
        if name.endswith(f".{leaf}") and (not dtypes or meta.dtype in dtypes)
    ]
    return [stem for stem in stems if all(f"{stem}{one}" in metas for one in beside)]


def sealed(
    checkpoint: Checkpoint,
    stem: str,
    leaves: Iterable[str],
    *,
    codes: str,
    shape: tuple[int, ...],
    reason: str,
    facts: Mapping[str, object] | None = None,
) -> Coded:
    """The weight of one module, of which `leaves` are those tensors that may belong to it."""
    metas = checkpoint.metas()
    parts = {leaf: f"{stem}{leaf}" for leaf in leaves if f"{stem}{leaf}" in metas}
    packed = sum(metas[name].nbytes for name in parts.values())
    meta = TensorMeta(name=f"{stem}weight", shape=shape, dtype=codes, codes=codes, sealed=reason, packed=packed)
    return Coded(meta=meta, parts=parts, facts=facts or {})


def told_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The shape that a file keeps in a small tensor; () where it keeps none."""
    meta = checkpoint.metas().get(name)
    if meta is None or meta.numel > 8:
        return ()
    return tuple(int(size) for size in checkpoint.read(name).flatten().tolist())
