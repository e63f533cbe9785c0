"""The models that are judged, by name; all in bf16, with fp32 factors as PEFT saves them."""

from __future__ import annotations

from benchmarks.checker.nouns import Shape

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="tiny",
            about="8 layers of random weights, to try the benchmark itself",
            hidden=320,
            layers=8,
            mlp=896,
            heads=10,
            kv_heads=2,
            vocabulary=4096,
            shards=2,
            rank=6,
            alpha=10,
        ),
        Shape(
            name="smollm2",
            about="SmolLM2-135M: real weights, a trained adapter, PEFT's merge",
            real="smollm2",
            tied=True,
        ),
        Shape(
            name="1gb",
            about="the shapes of Qwen2.5-0.5B",
            hidden=896,
            layers=24,
            mlp=4864,
            heads=14,
            kv_heads=2,
            vocabulary=151936,
            tied=True,
        ),
        Shape(
            name="2gb",
            about="the shapes of TinyLlama-1.1B",
            hidden=2048,
            layers=22,
            mlp=5632,
            heads=32,
            kv_heads=4,
            vocabulary=32000,
            shards=5,
        ),
        Shape(
            name="8gb",
            about="a Llama of 4 billion parameters",
            hidden=3072,
            layers=34,
            mlp=8960,
            heads=24,
            kv_heads=8,
            vocabulary=64000,
            shards=16,
        ),
    )
}
USUAL = ("smollm2", "1gb", "2gb", "8gb")
QUICK = ("tiny",)
PROFILED = "2gb"


def bytes_of(shape: Shape) -> int:
    """About how many bytes the base has; the merged checkpoint has as many."""
    if shape.real:
        return 270_000_000
    kv = shape.hidden // shape.heads * shape.kv_heads
    layer = shape.hidden * (2 * shape.hidden + 2 * kv + 3 * shape.mlp)
    return 2 * (shape.layers * layer + (1 if shape.tied else 2) * shape.vocabulary * shape.hidden)
