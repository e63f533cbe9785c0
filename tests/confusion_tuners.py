"""Models of tuners other than LoRA for the confusion matrix, merged by whole-tensor formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from confusion_worlds import PREFIX, Model, Piece, Scale, Target, World, fitted, randn
from torch import Tensor

R, ALPHA = 6, 15
BLOCK = 8


def tuned(name: str, world: World, dtype: torch.dtype, size: float, rng: torch.Generator) -> Model:
    """A model with one adapter of that tuner; each delta is `size` times as long as its weight."""
    weights = {module: randn(shape, rng, 0.02).to(dtype) for module, shape in world.shapes.items()}
    shared = _vera_projections(rng) if world.tuner == "VERA" else {}
    targets, factors = [], {f"base_model.{key}": tensor for key, tensor in shared.items()}
    for module, weight in weights.items():
        piece, own = MAKERS[world.tuner](weight, size, rng, shared)
        targets.append(Target(name=f"{module}.weight", kind="linear", base=weight, pieces=(piece,)))
        factors |= {f"{PREFIX}{module}.{key}": tensor for key, tensor in own.items()}
    families = sorted({module.rpartition(".")[2] for module in world.shapes})
    return Model(
        world=name,
        targets=tuple(targets),
        bystanders={"model.norm.weight": (1 + randn((320,), rng, 0.1)).to(dtype)},
        adapters=(({"peft_type": world.tuner, "target_modules": families, **CONFIGS[world.tuner]}, factors),),
        config=world.config,
    )


def _loha(weight: Tensor, size: float, rng: torch.Generator, shared: Mapping[str, Tensor]) -> tuple[Piece, Any]:
    (out, inputs), scale = weight.shape, _scale()
    a1, b1, a2, b2 = (randn(shape, rng, 0.3) for shape in ((out, R), (R, inputs), (out, R), (R, inputs)))
    a1 = fitted(a1, (a1 @ b1) * (a2 @ b2), weight, size, scale.value)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    made = (a1 @ b1) * (a2 @ b2)
    return Piece(scale=scale, made=made), dict(zip(names, (a1, b1, a2, b2), strict=True))


def _lokr(weight: Tensor, size: float, rng: torch.Generator, shared: Mapping[str, Tensor]) -> tuple[Piece, Any]:
    (out, inputs), scale = weight.shape, _scale()
    first, a, b = randn((8, 8), rng), randn((out // 8, R), rng), randn((R, inputs // 8), rng)
    first = fitted(first, torch.kron(first, a @ b), weight, size, scale.value)
    factors = {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b}
    return Piece(scale=scale, made=torch.kron(first, a @ b)), factors


def _vera_projections(rng: torch.Generator) -> dict[str, Tensor]:
    return {"vera_A": randn((32, 320), rng, 0.1), "vera_B": randn((320, 32), rng, 0.1)}


def _vera(weight: Tensor, size: float, rng: torch.Generator, shared: Mapping[str, Tensor]) -> tuple[Piece, Any]:
    (out, inputs), d = weight.shape, randn((32,), rng)
    a, b = d[:, None] * shared["vera_A"][:, :inputs], shared["vera_B"][:out]
    lengths = randn((out,), rng)
    lengths = fitted(lengths, (lengths[:, None] * b) @ a, weight, size, 1.0)
    piece = Piece(scale=Scale(alpha=1, rank=1, usual_alpha=1, usual_rank=1), made=(lengths[:, None] * b) @ a)
    return piece, {"vera_lambda_b": lengths, "vera_lambda_d": d}


def _ia3(weight: Tensor, size: float, rng: torch.Generator, shared: Mapping[str, Tensor]) -> tuple[Piece, Any]:
    vector = 1 + size * randn((weight.shape[0], 1), rng)
    return _turning(lambda w: torch.mul(w.float(), vector).to(w.dtype)), {"ia3_l": vector}


def _oft(weight: Tensor, size: float, rng: torch.Generator, shared: Mapping[str, Tensor]) -> tuple[Piece, Any]:
    blocks = weight.shape[1] // BLOCK
    triangles = randn((blocks, BLOCK * (BLOCK - 1) // 2), rng, size / (2 * (BLOCK - 1) ** 0.5))
    skew = torch.zeros(blocks, BLOCK, BLOCK)
    rows, columns = torch.triu_indices(BLOCK, BLOCK, 1)
    skew[:, rows, columns] = triangles
    skew = skew - skew.mT
    turn = torch.linalg.solve(torch.eye(BLOCK) + skew, torch.eye(BLOCK) - skew, left=False)

    def turned(w: Tensor) -> Tensor:
        return (w.float() @ torch.block_diag(*turn).T).to(w.dtype)

    return _turning(turned), {"oft_R.weight": triangles}


def _turning(turn: Callable[[Tensor], Tensor]) -> Piece:
    return Piece(scale=Scale(alpha=1, rank=1, usual_alpha=1, usual_rank=1), turn=turn)


def _scale() -> Scale:
    return Scale(alpha=ALPHA, rank=R, usual_alpha=ALPHA, usual_rank=R)


MAKERS: Mapping[str, Callable[..., tuple[Piece, Any]]] = {
    "LOHA": _loha,
    "LOKR": _lokr,
    "VERA": _vera,
    "IA3": _ia3,
    "OFT": _oft,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "LOHA": {"r": R, "alpha": ALPHA},
    "LOKR": {"r": R, "alpha": ALPHA, "decompose_factor": 8},
    "VERA": {"r": 32, "save_projection": True, "projection_prng_key": 0},
    "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": BLOCK, "r": 0, "use_cayley_neumann": False},
}
