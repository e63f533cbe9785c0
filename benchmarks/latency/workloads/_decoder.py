"""Decoder layers and whole causal models of transformers, with numbers of ours and a cache of a fixed length.

Nothing in these forwards waits for the device or looks at its data, so that a CUDA graph can hold them:

* Decoding writes its keys and values into the last place of the cache, each time again, and attends to the whole of it:
  no mask is needed, none is made, and two calls on the same inputs are the same.
* Prefill has no cache and no padding: attention is causal by a flag. The masks that transformers would make for the
  same end, by looking whether the positions are those of packed sequences, are never asked for: an attention function
  that is registered without a mask function gets none.

Written for transformers 5.17 and later; of its classes only forwards and configurations are used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.latency import problem, shapes
from benchmarks.latency.nouns import Cell, Place, Subject

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}
ATTENTION = "sdpa_unmasked"
"""torch's scaled_dot_product_attention as transformers calls it, registered once more without a mask."""


class FixedCache:
    """Keys and values of `context` tokens in each layer, and one place that the newest token takes, again and again.

    keys, values   of each layer, (batch, kv_heads, context + 1, head)
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.keys, self.values = tuple(keys), tuple(values)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the newest token's, give all."""
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, -1:].copy_(key)
        values[:, :, -1:].copy_(value)
        return keys, values


@torch.inference_mode(False)
@torch.no_grad()
def layer_subject(cell: Cell, place: Place) -> Subject:
    """Copies of one decoder layer, each with x (batch, length, hidden), its rotary angles and its cache.

    The angles are inputs: a model computes them once for all its layers.
    """
    shape, dtype = shapes.decoder(cell.shape), getattr(torch, cell.dtype)
    count = problem.copies(cell, place, shape.layer_parameters * shapes.BYTES[cell.dtype])
    layers = problem.kept(
        ("layer", shape, cell.dtype, place.device, count),
        lambda: tuple(layer(shape, dtype, place, number) for number in range(count)),
    )
    angles = classes(shape, "RotaryEmbedding")(config=configuration(shape)).to(place.device)
    wide = torch.empty(cell.batch, cell.length, shape.hidden, dtype=dtype, device=place.device)
    inputs = tuple(
        (torch.empty_like(wide), *angles(wide, positions(cell, place)), cache(shape, cell, place, 1, number))
        for number in range(count)
    )

    def refill(seed: int) -> None:
        for number, (x, *_) in enumerate(inputs):
            x.normal_(generator=problem.generator(place.device, "x", seed, number))

    return subject(layers, shapes.targets(cell.targets), cell, place, inputs, refill, call_layer)


@torch.inference_mode(False)
@torch.no_grad()
def model_subject(cell: Cell, place: Place) -> Subject:
    """Copies of a whole causal model, each with ids (batch, length), their positions and its cache."""
    shape, dtype = shapes.decoder(cell.shape), getattr(torch, cell.dtype)
    count = problem.copies(cell, place, shape.read * shapes.BYTES[cell.dtype])
    models = problem.kept(
        ("model", shape, cell.dtype, place.device, count),
        lambda: tuple(causal_models(shape, dtype, place, count)),
    )
    at = positions(cell, place)
    inputs = tuple(
        (
            torch.empty(cell.batch, cell.length, dtype=torch.long, device=place.device),
            at.clone(),
            cache(shape, cell, place, shape.layers, number),
        )
        for number in range(count)
    )

    def refill(seed: int) -> None:
        for number, (ids, *_) in enumerate(inputs):
            ids.random_(0, shape.vocabulary, generator=problem.generator(place.device, "ids", seed, number))

    return subject(models, shapes.model_targets(shape, cell.targets), cell, place, inputs, refill, call_model)


def subject(
    modules: Sequence[nn.Module],
    targets: tuple[str, ...],
    cell: Cell,
    place: Place,
    inputs: tuple[tuple[Any, ...], ...],
    refill: Callable[[int], None],
    call: Callable[[nn.Module, tuple[Any, ...]], Tensor],
) -> Subject:
    """The Subject, its inputs filled for the first time."""
    refill(0)
    return Subject(
        copies=tuple(modules),
        targets=targets,
        sites=tuple(problem.sites(module, targets, cell, place, number) for number, module in enumerate(modules)),
        inputs=inputs,
        refill=refill,
        call=call,
    )


def call_layer(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """Hidden states (batch, length, hidden)."""
    x, cosine, sine, past = inputs
    output: Tensor = module(x, position_embeddings=(cosine, sine), past_key_values=past)
    return output


def call_model(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """Logits of the last position (batch, 1, vocabulary), as a server asks for them."""
    ids, at, past = inputs
    output: Tensor = module(
        input_ids=ids, position_ids=at, past_key_values=past, use_cache=False, logits_to_keep=1
    ).logits
    return output


# ---------------------------------------------------------------------------------------------- inputs besides x


def positions(cell: Cell, place: Place) -> Tensor:
    """(1, length), those that follow the context; the same for every sequence."""
    return torch.arange(cell.context, cell.context + cell.length, device=place.device)[None]


def cache(shape: shapes.Decoder, cell: Cell, place: Place, layers: int, number: int) -> FixedCache | None:
    """Normal keys and values of the context, those of the newest token not yet written; None without a context."""
    if not cell.context:
        return None
    drawn = problem.generator(place.device, "cache", cell.shape, number)
    size = (cell.batch, shape.kv_heads, cell.context + 1, shape.head)
    keys, values = (
        [
            torch.empty(size, dtype=getattr(torch, cell.dtype), device=place.device).normal_(generator=drawn)
            for _ in range(layers)
        ]
        for _ in range(2)
    )
    return FixedCache(keys, values)


# ------------------------------------------------------------------------------------------------------- modules


def classes(shape: shapes.Decoder, name: str) -> Any:
    """A class of transformers for this kind of decoder, as LlamaDecoderLayer."""
    found = import_module(f"transformers.models.{shape.kind}.modeling_{shape.kind}")
    return getattr(found, f"{PREFIX[shape.kind]}{name}")


def configuration(shape: shapes.Decoder) -> Any:
    """The configuration of transformers for these sizes."""
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    transformers.AttentionInterface.register(ATTENTION, sdpa_attention_forward)
    whole = {"sliding_window": None} if shape.kind == "mistral" else {}
    made = getattr(transformers, f"{PREFIX[shape.kind]}Config")(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        tie_word_embeddings=shape.tied,
        **whole,
    )
    made._attn_implementation = ATTENTION
    return made


def layer(shape: shapes.Decoder, dtype: torch.dtype, place: Place, number: int) -> nn.Module:
    """The `number`-th copy of a decoder layer, with numbers of its own."""
    with torch.device("meta"):
        made: nn.Module = classes(shape, "DecoderLayer")(configuration(shape), 0)
    made = made.to(dtype).to_empty(device=place.device).eval().requires_grad_(False)
    problem.fill(made, problem.generator(place.device, "layer", shape, number))
    return made


def causal_models(shape: shapes.Decoder, dtype: torch.dtype, place: Place, count: int) -> list[nn.Module]:
    """Copies of a model: random ones differ; real ones lie apart but hold the same weights, for there is one set."""
    made = [empty_model(shape, dtype, place) for _ in range(count)]
    if shape.real:
        load(made)
    else:
        for number, model in enumerate(made):
            problem.fill(model, problem.generator(place.device, "model", shape, number))
    return made


def empty_model(shape: shapes.Decoder, dtype: torch.dtype, place: Place) -> nn.Module:
    """A causal model whose parameters lie on the device in their dtype, not yet written. None exists in float32 before.

    The rotary frequencies are no parameters and are made anew: on the meta device they have no values to be moved.
    """
    with torch.device("meta"):
        made = classes(shape, "ForCausalLM")(configuration(shape))
    made = made.to(dtype).to_empty(device=place.device)
    made.model.rotary_emb = classes(shape, "RotaryEmbedding")(config=made.config).to(place.device)
    made.tie_weights()
    found: nn.Module = made.eval().requires_grad_(False)
    return found


def load(models: Sequence[nn.Module]) -> None:
    """Write SmolLM2's weights into models of its shape, rounded to their dtype."""
    from safetensors.torch import load_file

    from fixtures.real import smollm2

    with tempfile.TemporaryDirectory() as folder:
        smollm2.make(folder, dtype="fp32")
        weights = load_file(Path(folder) / "model.safetensors")
        for model in models:
            found = model.load_state_dict(weights, strict=False)
            if found.unexpected_keys or set(found.missing_keys) - {"lm_head.weight"}:
                raise RuntimeError(f"SmolLM2's weights do not fit its shape: {found}")
