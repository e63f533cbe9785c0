"""Our Triton kernels without a GPU; prints JSON. A script: the interpreter is chosen before triton is imported.

`python tests/run_kernels.py interpret`  through Triton's interpreter (TRITON_INTERPRET=1), against float64
`python tests/run_kernels.py compile`    every configuration, down to the machine code of an H100 or H200
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import triton
from torch import nn

from benchmarks.latency.backends import triton_expand, triton_fused
from benchmarks.latency.budget import lora
from benchmarks.latency.nouns import Site

SHAPES = (
    # leading dimensions of x, K, N, r, bias
    ((2, 3), 333, 70, 5, True),
    ((1,), 512, 64, 16, False),
    ((70,), 128, 150, 20, False),
    ((33,), 100, 90, 100, True),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRIED: list[float] = []


def mended() -> None:
    """What the interpreter lacks: bfloat16 in products, rounding to it, and scalars as NumPy gives them since 2.4."""
    from triton.runtime import interpreter

    handle, bf16, fp32 = interpreter.TensorHandle, interpreter.tl.bfloat16, interpreter.tl.float32
    builder, patch = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    cast = builder.cast_impl

    def wide(given: Any) -> np.ndarray:
        return (given.data.astype(np.uint32) << 16).view(np.float32) if given.dtype.scalar == bf16 else given.data

    def narrow(data: np.ndarray) -> np.ndarray:
        rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16)
        return rounded.numpy().view(np.uint16)

    def cast_impl(self: Any, src: Any, to: Any) -> Any:
        if (src.dtype.scalar, to.scalar) == (bf16, fp32):
            return handle(wide(src), fp32)
        if (src.dtype.scalar, to.scalar) == (fp32, bf16):
            return handle(narrow(src.data), bf16)
        return cast(self, src, to)

    def dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        return handle(np.matmul(wide(a), wide(b), dtype=np.float32) + d.data, d.dtype.scalar)

    def tensors(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    builder.cast_impl, builder.create_dot, interpreter._patch_lang_tensor = cast_impl, dot, tensors


def tried(call: Any, **_: Any) -> list[float]:
    """In place of a clock: runs each configuration once, and likes the later ones better."""
    call()
    TRIED.append(-float(len(TRIED)))
    return [TRIED[-1]] * 3


def interpret() -> list[dict[str, Any]]:
    """The largest error over the budget of each case; `without`: how far an output without the adapter is off."""
    mended()
    triton.testing.do_bench = tried
    found = []
    for backend in (triton_fused.BACKEND, triton_expand.BACKEND):
        for dtype in DTYPES:
            for lead, inputs, outputs, rank, bias in SHAPES:
                torch.manual_seed(rank)
                site = made(inputs, outputs, rank, dtype, bias)
                x, before = torch.randn(*lead, inputs).to(dtype), len(TRIED)
                module = backend.build(site)
                first, other, again = module(x), module(-x), module(x)
                y, budget = lora(site, x)
                found.append(
                    {
                        "case": f"{backend.name} {dtype} {lead} {inputs} {outputs} {rank}",
                        "share": ((first.double() - y).abs() / budget).max().item(),
                        "without": ((site.base(x).double() - y).abs() / budget).max().item(),
                        "shape": first.shape == y.shape and first.dtype == dtype,
                        "same": torch.equal(first, again) and not torch.equal(first, other),
                        "tried": len(TRIED) - before,
                    }
                )
    return found


def made(inputs: int, outputs: int, rank: int, dtype: torch.dtype, bias: bool) -> Site:
    """Numbers of the usual sizes."""
    base = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    a = (torch.randn(1, rank, inputs) / inputs**0.5).to(dtype)
    b = (torch.randn(1, outputs, rank) / rank**0.5).to(dtype)
    return Site(base=base, a=a, b=b, s=3 / rank**0.5)


def compiled() -> list[dict[str, Any]]:
    """Shared memory of each configuration, of bfloat16 at rank 16 and K in whole steps; an error ends the script."""
    from benchmarks.latency.backends import _kernels as kernels

    tiles = [
        (
            kernels.product,
            {"GROUP": 8, "PARTS": kernels.PARTS[one.kwargs["BT"] == 16], "BIASED": True, **whole(one)},
            one,
        )
        for one in kernels.PRODUCTS
    ]
    tiles += [(kernels.addition, whole(one), one) for one in kernels.ADDITIONS]
    first = triton.Config({"BT": 16, "BK": 128}, num_warps=4, num_stages=3)
    tiles += [(kernels.shrink, first.kwargs, first)]
    return [machine_code(plain(kernel), constants, config) for kernel, constants, config in tiles]


def whole(config: triton.Config) -> dict[str, Any]:
    """Its tile, with K in whole steps."""
    return {"WHOLE": True, **config.kwargs}


def plain(kernel: Any) -> Any:
    """The kernel without its tuning."""
    return kernel if isinstance(kernel, triton.JITFunction) else plain(kernel.fn)


def machine_code(kernel: Any, constants: dict[str, Any], config: triton.Config) -> dict[str, Any]:
    """Compile for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"RANK": 16, "R": 16, **constants}
    types = {"h": "*fp32", "scale": "fp32"} | dict.fromkeys(("T", "K", "N", "span"), "i32")
    named = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if named[name].startswith("*") or name in ("K", "N")
    }
    made = triton.compile(
        ASTSource(kernel, named, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    matrix = any(one in made.asm["ptx"] for one in ("wgmma", "mma.sync"))
    return {"case": f"{kernel.__name__} {config}", "shared": made.metadata.shared, "matrix": matrix}


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compiled}[sys.argv[1]]()))
