"""Real shapes by name, from one table: the sizes of a decoder, and everything that follows from them.

The sizes are the fields of the models' published configurations (config.json of the repositories named in `source`),
written out, so that nothing is fetched. A name alone is a model, or one layer of it ("llama-3-8b"); with a slash and a
projection it is that module ("llama-3-8b/q"). "small" is for processors, "tiny-..." for tests. Imports no torch.

Letters: N outputs and K inputs of a linear layer, as in the shape (N, K) of its weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_check.errors import UsageError

Kind = Literal["llama", "qwen2", "mistral"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + MLP
"""The linear layers of one decoder layer, which are what LoRA adapts."""
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder-only model by its sizes.

    kind        the class of transformers          heads, kv_heads   of queries, and of keys and values
    vocabulary  rows of the embedding              theta             base of the rotary angles
    eps         of the norms                       positions         the longest context it was made for
    tied        the head is the embedding          real              its weights are those of `fixtures`, not random
    """

    name: str
    source: str
    kind: Kind = "llama"
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    theta: float
    eps: float = 1e-5
    positions: int
    tied: bool = False
    real: bool = False

    @property
    def head(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Path within a layer -> (N, K) of its linear layers."""
        wide, narrow, mlp = self.hidden, self.kv_heads * self.head, self.mlp
        outputs = dict(zip(PROJECTIONS, (wide, narrow, narrow, wide, mlp, mlp, wide), strict=True))
        return {path(name): (rows, mlp if name == "down_proj" else wide) for name, rows in outputs.items()}

    @property
    def layer_parameters(self) -> int:
        """Of one layer: its linear layers, their biases, two norms."""
        weights = sum(rows * columns for rows, columns in self.linears.values())
        biases = sum(rows for name, (rows, _) in self.linears.items() if biased(self, name))
        return weights + biases + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model; a tied head counts once."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * self.layer_parameters + embeddings + self.hidden

    @property
    def read(self) -> int:
        """Parameters that one forward reads: all but an embedding of which it looks up a few rows."""
        return self.layers * self.layer_parameters + self.hidden + self.vocabulary * self.hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One linear layer: `name` is the last of its path, N rows, K columns."""

    name: str
    rows: int
    columns: int
    bias: bool


def path(name: str) -> str:
    """Where a projection lies in a decoder layer."""
    return f"self_attn.{name}" if name in ATTENTION else f"mlp.{name}"


def biased(decoder: Decoder, name: str) -> bool:
    """Whether a linear layer has a bias: q, k and v of Qwen2 do."""
    return decoder.kind == "qwen2" and name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")


TINY: Mapping[Kind, bool] = {"llama": False, "qwen2": True, "mistral": False}
"""The kinds, and whether the tiny one of a kind is tied."""
DECODERS = {
    decoder.name: decoder
    for decoder in (
        Decoder(
            name="llama-3-8b",
            source="meta-llama/Meta-Llama-3-8B",
            hidden=4096,
            mlp=14336,
            layers=32,
            heads=32,
            kv_heads=8,
            vocabulary=128256,
            theta=500000.0,
            positions=8192,
        ),
        Decoder(
            name="llama-3-70b",
            source="meta-llama/Meta-Llama-3-70B",
            hidden=8192,
            mlp=28672,
            layers=80,
            heads=64,
            kv_heads=8,
            vocabulary=128256,
            theta=500000.0,
            positions=8192,
        ),
        Decoder(
            name="qwen2.5-0.5b",
            source="Qwen/Qwen2.5-0.5B",
            kind="qwen2",
            hidden=896,
            mlp=4864,
            layers=24,
            heads=14,
            kv_heads=2,
            vocabulary=151936,
            theta=1000000.0,
            eps=1e-6,
            positions=32768,
            tied=True,
        ),
        Decoder(
            name="qwen2.5-7b",
            source="Qwen/Qwen2.5-7B",
            kind="qwen2",
            hidden=3584,
            mlp=18944,
            layers=28,
            heads=28,
            kv_heads=4,
            vocabulary=152064,
            theta=1000000.0,
            eps=1e-6,
            positions=131072,
        ),
        Decoder(
            name="mistral-7b",
            source="mistralai/Mistral-7B-v0.3",
            kind="mistral",
            hidden=4096,
            mlp=14336,
            layers=32,
            heads=32,
            kv_heads=8,
            vocabulary=32768,
            theta=1000000.0,
            positions=32768,
        ),
        *(
            Decoder(
                name=name,
                source="HuggingFaceTB/SmolLM2-135M",
                hidden=576,
                mlp=1536,
                layers=30,
                heads=9,
                kv_heads=3,
                vocabulary=49152,
                theta=100000.0,
                positions=8192,
                tied=True,
                real=real,
            )
            for name, real in (("smollm2-135m", False), ("smollm2-135m-real", True))
        ),
        Decoder(
            name="small",
            source="no model: what a processor runs in milliseconds",
            hidden=1024,
            mlp=2816,
            layers=2,
            heads=16,
            kv_heads=4,
            vocabulary=8192,
            theta=10000.0,
            positions=4096,
        ),
        *(
            Decoder(
                name=f"tiny-{kind}",
                source="no model: for tests",
                kind=kind,
                hidden=48,
                mlp=112,
                layers=2,
                heads=6,
                kv_heads=2,
                vocabulary=97,
                theta=10000.0,
                positions=256,
                tied=tied,
            )
            for kind, tied in TINY.items()
        ),
    )
}


def decoder(name: str) -> Decoder:
    """The model of a name. Raises UsageError for one that is not in the table."""
    if name not in DECODERS:
        raise UsageError(f"no model or layer has the shape {name!r}", hint=f"one of: {', '.join(DECODERS)}")
    return DECODERS[name]


def module(name: str) -> Module:
    """The linear layer of a name such as "llama-3-8b/q". Raises UsageError for one that is not in the table."""
    model, _, short = name.partition("/")
    if f"{short}_proj" not in PROJECTIONS:
        shorts = ", ".join(known.removesuffix("_proj") for known in PROJECTIONS)
        raise UsageError(f"no module has the shape {name!r}", hint=f"MODEL/PROJECTION, the projection one of: {shorts}")
    last = f"{short}_proj"
    of = decoder(model)
    rows, columns = of.linears[path(last)]
    return Module(name=last, rows=rows, columns=columns, bias=biased(of, last))


def is_module(name: str) -> bool:
    """Whether a shape is one module and not a layer or a model."""
    return "/" in name


def targets(names: Sequence[str]) -> tuple[str, ...]:
    """Paths within a layer of the adapted modules, in the order of the layer; no name means all seven.

    Raises UsageError for a name that is no projection.
    """
    if unknown := [name for name in names if name not in PROJECTIONS]:
        raise UsageError(f"a decoder layer has no {unknown[0]!r}", hint=f"targets: {', '.join(PROJECTIONS)}")
    return tuple(path(name) for name in PROJECTIONS if not names or name in names)


def model_targets(of: Decoder, names: Sequence[str]) -> tuple[str, ...]:
    """Paths within a model of the adapted modules, layer by layer."""
    return tuple(f"model.layers.{layer}.{target}" for layer in range(of.layers) for target in targets(names))
