"""Check the oracle on numbers worked out on paper."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import oracle
import pytest

LORA = {"r": 1, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
P = "base_model.model."

# least subnormal, least normal, biggest finite
LIMITS = {
    "fp16": (2.0**-24, 2.0**-14, 65504.0),
    "bf16": (2.0**-133, 2.0**-126, 2.0**127 * (2 - 2.0**-7)),
    "fp32": (2.0**-149, 2.0**-126, 2.0**127 * (2 - 2.0**-23)),
}
HALF_BITS = {"fp16": np.arange(2**16, dtype=np.uint16), "bf16": np.arange(2**16, dtype=np.uint16)}


def row(*numbers: float) -> np.ndarray:
    return np.array([numbers], np.float64)


def column(*numbers: float) -> np.ndarray:
    return np.array([[number] for number in numbers], np.float64)


# --- rounding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bits"), [("fp16", 11), ("bf16", 8), ("fp32", 24)])
def test_ulp_doubles_at_each_power_of_two_and_not_before(dtype: str, bits: int) -> None:
    for exponent in (-10, -1, 0, 1, 9):
        power = 2.0**exponent
        assert oracle.ulp(power, dtype) == power * 2.0 ** (1 - bits)
        assert oracle.ulp(-power, dtype) == oracle.ulp(power, dtype)
        assert oracle.ulp(np.nextafter(power, 0), dtype) == power * 2.0**-bits


@pytest.mark.parametrize("dtype", LIMITS)
def test_ulp_is_constant_below_the_least_normal(dtype: str) -> None:
    tiny, normal, biggest = LIMITS[dtype]
    for x in (0.0, -0.0, tiny, 0.3 * tiny, normal / 2, normal):
        assert oracle.ulp(x, dtype) == tiny
    assert oracle.ulp(2 * normal, dtype) == 2 * tiny
    assert oracle.ulp(2 * biggest, dtype) == oracle.ulp(biggest, dtype)
    assert np.isnan(oracle.ulp([math.inf, -math.inf, math.nan], dtype)).all()


@pytest.mark.parametrize(("dtype", "width"), [("fp16", np.float16), ("fp32", np.float32)])
def test_ulp_is_numpy_spacing(dtype: str, width: type) -> None:
    x = np.random.default_rng(1).standard_normal(2000) * 10.0 ** np.random.default_rng(2).integers(-9, 4, 2000)
    stored = x.astype(width)
    assert np.array_equal(oracle.ulp(stored, dtype), np.abs(np.spacing(np.abs(stored))).astype(np.float64))


@pytest.mark.parametrize("dtype", HALF_BITS)
def test_every_stored_number_rounds_to_itself(dtype: str) -> None:
    stored = oracle.values((dtype, HALF_BITS[dtype]))
    rounded = oracle.round_to(stored, dtype)
    assert np.array_equal(rounded, stored, equal_nan=True)
    assert np.array_equal(np.signbit(rounded), np.signbit(stored))


@pytest.mark.parametrize("dtype", HALF_BITS)
def test_every_midpoint_goes_to_the_even_neighbour(dtype: str) -> None:
    positive = HALF_BITS[dtype][:-1]
    low, high = oracle.values((dtype, positive)), oracle.values((dtype, positive + np.uint16(1)))
    finite = np.isfinite(low) & np.isfinite(high) & (high > low)
    low, high, bits = low[finite], high[finite], positive[finite]
    middle = (low + high) / 2
    assert np.array_equal(oracle.round_to(middle, dtype), np.where(bits % 2 == 0, low, high))
    assert np.array_equal(oracle.round_to(np.nextafter(middle, -np.inf), dtype), low)
    assert np.array_equal(oracle.round_to(np.nextafter(middle, np.inf), dtype), high)


@pytest.mark.parametrize("dtype", LIMITS)
def test_overflow_starts_half_an_ulp_above_the_biggest(dtype: str) -> None:
    _, _, biggest = LIMITS[dtype]
    edge = biggest + oracle.ulp(biggest, dtype) / 2
    assert oracle.round_to(np.nextafter(edge, 0), dtype) == biggest
    assert oracle.round_to(edge, dtype) == math.inf
    assert oracle.round_to(-edge, dtype) == -math.inf
    assert oracle.round_to(math.inf, dtype) == math.inf
    assert np.isnan(oracle.round_to(math.nan, dtype))


@pytest.mark.parametrize("dtype", LIMITS)
def test_underflow_keeps_the_sign_and_half_the_tiniest_is_zero(dtype: str) -> None:
    tiny, _, _ = LIMITS[dtype]
    assert oracle.round_to(tiny / 2, dtype) == 0.0
    assert oracle.round_to(np.nextafter(tiny / 2, 1), dtype) == tiny
    assert oracle.round_to(1.5 * tiny, dtype) == 2 * tiny
    assert oracle.round_to(2.5 * tiny, dtype) == 2 * tiny
    assert math.copysign(1, oracle.round_to(-tiny / 4, dtype)) == -1
    assert math.copysign(1, oracle.round_to(-0.0, dtype)) == -1


def test_rounding_is_done_once() -> None:
    """Through fp32 first, 1 + 2^-8 + 2^-40 becomes the tie 1 + 2^-8 and then the even 1."""
    x = 1 + 2.0**-8 + 2.0**-40
    assert oracle.round_to(x, "bf16") == 1 + 2.0**-7
    assert oracle.round_to(oracle.round_to(x, "fp32"), "bf16") == 1.0


@pytest.mark.parametrize(("dtype", "width"), [("fp16", np.float16), ("fp32", np.float32)])
def test_rounding_is_numpy_s_own_cast(dtype: str, width: type) -> None:
    x = np.random.default_rng(3).standard_normal(4000) * 2.0 ** np.random.default_rng(4).integers(-30, 16, 4000)
    with np.errstate(over="ignore"):
        assert np.array_equal(oracle.round_to(x, dtype), x.astype(width).astype(np.float64))


# --- files ----------------------------------------------------------------------------------------------


def write(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Write a safetensors file byte by byte."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_reads_bit_patterns_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write(
        path,
        {
            "bf16": ("BF16", [2, 2], struct.pack("<4H", 0x3F80, 0xC000, 0x0001, 0x7F80)),
            "fp16": ("F16", [2], struct.pack("<2H", 0x3C00, 0x0001)),
            "fp32": ("F32", [1], struct.pack("<f", -1.5)),
            "count": ("I64", [], struct.pack("<q", -7)),
        },
    )
    found = oracle.read_safetensors(path)
    assert {name: stored[0] for name, stored in found.items()} == {
        "bf16": "bf16",
        "fp16": "fp16",
        "fp32": "fp32",
        "count": "I64",
    }
    assert oracle.values(found["bf16"]).tolist() == [[1.0, -2.0], [2.0**-133, math.inf]]
    assert oracle.values(found["fp16"]).tolist() == [1.0, 2.0**-24]
    assert oracle.values(found["fp32"]).tolist() == [-1.5]
    assert oracle.values(found["count"]).shape == ()
    assert oracle.values(found["count"]) == -7


def test_reads_shards_through_their_index(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"{number}.safetensors", {"x": ("F32", [1], struct.pack("<f", number))})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "2.safetensors"}}))
    assert oracle.values(oracle.read_index(index)["x"]).tolist() == [2.0]


# --- keys and scales ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "parsed"),
    [
        ("model.q_proj.lora_A.weight", ("model.q_proj", "A", False)),
        ("model.q_proj.lora_B.bias", ("model.q_proj", "B.bias", False)),
        ("emb.lora_embedding_B", ("emb", "B", False)),
        ("q.lora_magnitude_vector", ("q", "m", False)),
        ("q.lora_magnitude_vector.weight", ("q", "m", False)),
        ("mha.base_layer.out_proj.lora_A.weight", ("mha.out_proj", "A", True)),
        ("emb.token_adapter.trainable_tokens_delta", ("emb", "rows", False)),
        ("emb.trainable_tokens_delta", ("emb", "rows", False)),
        ("q.base_layer.bias", ("q", "bias", True)),
        ("model.base_model.model.norm.weight", ("model.base_model.model.norm", "weight", False)),
    ],
)
def test_keys(key: str, parsed: tuple[str, str, bool]) -> None:
    assert oracle.parse_key(P + key) == parsed


def test_a_key_without_the_prefix_raises() -> None:
    with pytest.raises(ValueError, match="not a PEFT key"):
        oracle.parse_key("model.q_proj.lora_A.weight")


@pytest.mark.parametrize(
    ("changes", "path", "rank", "scale"),
    [
        ({"r": 8, "lora_alpha": 12}, "a.q", 8, 1.5),
        ({"r": 4, "lora_alpha": 12, "use_rslora": True}, "a.q", 4, 6.0),
        ({"r": 8, "rank_pattern": {"q": 2}, "lora_alpha": 3}, "a.q", 2, 1.5),
        ({"r": 8, "rank_pattern": {"q": 16}, "use_rslora": True, "lora_alpha": 8}, "a.q", 16, 2.0),
        ({"alpha_pattern": {"q": 5, "a.q": 7}}, "a.q", 1, 5.0),  # the first, not the longest
        ({"alpha_pattern": {"a.q": 7, "q": 5}}, "a.q", 1, 7.0),
        ({"alpha_pattern": {"q": 5}}, "a.xq", 1, 1.0),  # the dot in front is needed
        ({"alpha_pattern": {"q": 5}}, "q", 1, 5.0),  # unless nothing is in front
        ({"alpha_pattern": {"^q": 5}}, "q", 1, 5.0),
        ({"alpha_pattern": {"^q": 5}}, "a.q", 1, 1.0),
        ({"alpha_pattern": {"q": 5}}, "a.q.deeper", 1, 1.0),
        ({"alpha_pattern": {r"a\.\d+\.q": 5}}, "m.a.12.q", 1, 5.0),
        ({"alpha_pattern": {"q|k": 5}}, "m.k", 1, 5.0),
    ],
)
def test_rank_and_scale(changes: dict, path: str, rank: int, scale: float) -> None:
    assert oracle.rank_and_scale({**LORA, **changes}, path) == (rank, scale)


# --- formulas -------------------------------------------------------------------------------------------


def test_linear_delta_is_out_by_in() -> None:
    delta = oracle.delta_linear(row(0, 5, 0), column(0, 2), 3.0)  # A picks input 1, B feeds output 1
    assert delta.tolist() == [[0, 0, 0], [0, 30, 0]]


def test_conv1d_t_delta_is_in_by_out() -> None:
    delta = oracle.delta_conv1d_t(row(0, 5, 0), column(0, 2), 3.0)
    assert delta.tolist() == [[0, 0], [0, 30], [0, 0]]


def test_embedding_delta_is_vocab_by_dim() -> None:
    delta = oracle.delta_embedding(row(0, 0, 0, 5), column(0, 2), 3.0)  # token 3, dimension 1
    assert delta.tolist() == [[0, 0], [0, 0], [0, 0], [0, 30]]


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 1), (2, 1, 3)])
def test_conv_delta_keeps_the_place_in_the_kernel(kernel: tuple[int, ...]) -> None:
    a = np.zeros((2, 4, *kernel))
    b = np.zeros((5, 2, *[1] * len(kernel)))
    last = tuple(size - 1 for size in kernel)
    a[(1, 3, *last)] = 7
    b[(4, 1, *[0] * len(kernel))] = 2
    delta = oracle.delta_conv(a, b, 0.5)
    assert delta.shape == (5, 4, *kernel)
    assert delta[(4, 3, *last)] == 7
    assert np.count_nonzero(delta) == 1


def test_dora_gives_each_output_its_magnitude() -> None:
    rows = oracle.dora(np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([10.0, 1.0]), "linear")
    assert rows.tolist() == [[6.0, 8.0], [0.0, 1.0]]
    columns = oracle.dora(np.array([[3.0, 0.0], [4.0, 2.0]]), np.array([10.0, 1.0]), "conv1d_t")
    assert columns.tolist() == [[6.0, 0.0], [8.0, 1.0]]
    assert oracle.dora(np.array([[3.0], [4.0]]), np.array([10.0]), "embedding").tolist() == [[6.0], [8.0]]
    kernel = np.array([[[[3.0, 4.0]]], [[[0.0, 2.0]]]])
    scaled = oracle.dora(kernel, np.array([10.0, 1.0]).reshape(1, 2, 1, 1), "conv")
    assert scaled.tolist() == [[[[6.0, 8.0]]], [[[0.0, 1.0]]]]


def test_dora_with_a_magnitude_for_each_input_raises() -> None:
    with pytest.raises(ValueError, match="3 magnitudes for 2 outputs"):
        oracle.dora(np.ones((2, 3)), np.ones(3), "linear")


# --- the whole checkpoint -------------------------------------------------------------------------------


def lora(path: str, a: np.ndarray, b: np.ndarray) -> oracle.Tensors:
    return {f"{P}{path}.lora_A.weight": a, f"{P}{path}.lora_B.weight": b}


def test_a_plain_tensor_of_a_wrapped_module_reaches_nobody() -> None:
    """A wrapped module's own weight is called base_layer.weight."""
    tensors = {**lora("q", row(2), column(3)), f"{P}q.weight": row(-1)}
    made = oracle.expected_checkpoint({"q.weight": row(0)}, [(LORA, tensors)], {"q": "linear"})
    assert made["q.weight"].tolist() == [[6]]


def test_touched_names_what_takes_a_delta_and_not_what_is_replaced() -> None:
    tensors = {
        **lora("q", row(2), column(3)),
        f"{P}q.lora_B.bias": np.array([1.0]),
        **lora("head", row(2), column(3)),
        f"{P}k.bias": np.array([6.0]),
        f"{P}emb.token_adapter.trainable_tokens_delta": column(1),
    }
    kinds = {"q": "linear", "head": "linear", "emb": "embedding"}
    tied = {"head.weight": "emb.weight"}
    assert oracle.touched([(LORA, tensors)], kinds, tied) == {"q.weight", "q.bias", "emb.weight"}
    assert oracle.touched([(LORA, tensors)], kinds) == {"q.weight", "q.bias", "head.weight"}


def test_only_the_target_moves_and_the_base_is_left_alone() -> None:
    base = {"q.weight": np.ones((2, 3)), "k.weight": np.ones((2, 3)), "n": np.array(7)}
    config = {**LORA, "lora_alpha": 3}
    made = oracle.expected_checkpoint(base, [(config, lora("q", row(0, 5, 0), column(0, 2)))], {"q": "linear"})
    assert made["q.weight"].tolist() == [[1, 1, 1], [1, 31, 1]]
    assert made["k.weight"].tolist() == np.ones((2, 3)).tolist()
    assert made["n"] == 7
    assert base["q.weight"].tolist() == np.ones((2, 3)).tolist()


def test_the_kind_decides_in_a_square_layer() -> None:
    base = {"q.weight": np.zeros((2, 2))}
    adapters = [(LORA, lora("q", row(1, 0), column(0, 1)))]
    assert oracle.expected_checkpoint(base, adapters, {"q": "linear"})["q.weight"].tolist() == [
        [0, 0],
        [1, 0],
    ]
    assert oracle.expected_checkpoint(base, adapters, {"q": "conv1d_t"})["q.weight"].tolist() == [
        [0, 1],
        [0, 0],
    ]


def test_attention_adds_once_to_in_proj_and_twice_to_out_proj() -> None:
    base = {"m.in_proj_weight": np.zeros((6, 2)), "m.out_proj.weight": np.zeros((2, 2))}
    tensors = {
        **lora("m", row(0, 1), column(0, 0, 0, 0, 0, 4)),
        **lora("m.base_layer.out_proj", row(1, 0), column(0, 4)),
    }
    config = {**LORA, "alpha_pattern": {"m": 3}}  # both halves follow the attention's name
    made = oracle.expected_checkpoint(base, [(config, tensors)], {"m": "mha"})
    assert made["m.in_proj_weight"][5].tolist() == [0, 12]
    assert np.count_nonzero(made["m.in_proj_weight"]) == 1
    assert made["m.out_proj.weight"].tolist() == [[0, 0], [24, 0]]


def test_lora_bias_is_scaled() -> None:
    base = {"q.weight": np.zeros((2, 1)), "q.bias": np.array([1.0, 1.0])}
    tensors = {**lora("q", row(1), column(1, 0)), f"{P}q.lora_B.bias": np.array([0.0, 2.0])}
    made = oracle.expected_checkpoint(base, [({**LORA, "lora_alpha": 3}, tensors)], {"q": "linear"})
    assert made["q.weight"].tolist() == [[3], [0]]
    assert made["q.bias"].tolist() == [1, 7]


def test_what_the_adapter_carries_replaces_before_anything_is_added() -> None:
    base = {
        "q.weight": np.zeros((1, 1)),
        "q.bias": np.zeros(1),
        "k.bias": np.zeros(1),
        "head.weight": np.zeros(2),
    }
    tensors = {
        **lora("q", row(2), column(3)),
        f"{P}q.base_layer.weight": row(100),
        f"{P}q.weight": row(-1),
        f"{P}q.base_layer.bias": np.array([5.0]),
        f"{P}k.bias": np.array([6.0]),
        f"{P}head.weight": np.array([7.0, 8.0]),
        f"{P}score.weight": np.array([9.0]),  # not in the base at all
    }
    made = oracle.expected_checkpoint(base, [(LORA, tensors)], {"q": "linear"})
    assert {name: tensor.ravel().tolist() for name, tensor in made.items()} == {
        "q.weight": [106],
        "q.bias": [5],
        "k.bias": [6],
        "head.weight": [7, 8],
        "score.weight": [9],
    }


@pytest.mark.parametrize(
    "config",
    [
        {**LORA, "trainable_token_indices": [2, 0]},
        {**LORA, "trainable_token_indices": {"emb": [2, 0]}},
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": [2, 0]},
    ],
)
def test_token_rows_are_put_in_place_of_the_old(config: dict) -> None:
    base = {"a.emb.weight": column(1, 2, 3)}
    tensors = {f"{P}a.emb.token_adapter.trainable_tokens_delta": column(30, 10)}
    made = oracle.expected_checkpoint(base, [(config, tensors)], {"a.emb": "embedding"})
    assert made["a.emb.weight"].tolist() == [[10], [2], [30]]
    assert base["a.emb.weight"].tolist() == [[1], [2], [3]]


def test_both_names_of_a_tied_tensor_move_it() -> None:
    base = {"emb.weight": np.zeros((2, 2))}
    tensors = {
        **lora("head", row(1, 0), column(0, 3)),
        f"{P}emb.lora_embedding_A": row(0, 1),
        f"{P}emb.lora_embedding_B": column(0, 4),
    }
    kinds = {"emb": "embedding", "head": "linear"}
    made = oracle.expected_checkpoint(base, [(LORA, tensors)], kinds, tied={"head.weight": "emb.weight"})
    assert set(made) == {"emb.weight"}
    assert made["emb.weight"].tolist() == [[0, 0], [3, 4]]


def test_of_two_carried_copies_of_a_tied_tensor_the_alias_wins() -> None:
    base = {"emb.weight": row(0)}
    tensors = {f"{P}head.weight": row(1), f"{P}emb.weight": row(2)}
    made = oracle.expected_checkpoint(base, [(LORA, tensors)], {}, tied={"head.weight": "emb.weight"})
    assert made["emb.weight"].tolist() == [[1]]


def test_two_adapters_add_up_and_rounding_in_between_loses_the_first() -> None:
    base = {"q.weight": row(1)}
    half_ulp = [(LORA, lora("q", row(2.0**-8), column(1)))] * 2  # each half an ulp of bf16 at 1
    kinds = {"q": "linear"}
    assert oracle.expected_checkpoint(base, half_ulp, kinds)["q.weight"] == 1 + 2.0**-7
    # 1 + 2^-8 is a tie and goes to 1; the second is left as it is
    rounded = oracle.expected_checkpoint(base, half_ulp, kinds, round_between="bf16")
    assert rounded["q.weight"] == 1 + 2.0**-8


def test_factors_are_rounded_when_asked() -> None:
    adapters = [(LORA, lora("q", row(1 + 2.0**-9), column(3)))]
    kinds, base = {"q": "linear"}, {"q.weight": row(0)}
    assert oracle.expected_checkpoint(base, adapters, kinds)["q.weight"] == 3 + 3 * 2.0**-9
    assert oracle.expected_checkpoint(base, adapters, kinds, round_factors="bf16")["q.weight"] == 3


def test_dora_measures_what_it_has_moved() -> None:
    tensors = {**lora("q", row(1, 0), column(3)), f"{P}q.lora_magnitude_vector": np.array([10.0])}
    made = oracle.expected_checkpoint({"q.weight": row(0, 4)}, [(LORA, tensors)], {"q": "linear"})
    assert made["q.weight"].tolist() == [[6, 8]]
    with pytest.raises(ValueError, match="two DoRA adapters"):
        oracle.expected_checkpoint({"q.weight": row(0, 4)}, [(LORA, tensors)] * 2, {"q": "linear"})


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (lora("q", row(1, 0), column(1)), {**LORA, "r": 2}, "config says r=2"),
        (lora("q", row(1, 0, 0), column(1)), LORA, r"delta is \(1, 3\), weight is \(1, 2\)"),
    ],
)
def test_contradictions_raise(tensors: oracle.Tensors, config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oracle.expected_checkpoint({"q.weight": row(0, 0)}, [(config, tensors)], {"q": "linear"})


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_half_an_adapter_raises(missing: str) -> None:
    tensors = {key: t for key, t in lora("q", row(1), column(1)).items() if missing not in key}
    with pytest.raises(KeyError):
        oracle.expected_checkpoint({"q.weight": row(0)}, [(LORA, tensors)], {"q": "linear"})


def test_a_module_of_no_known_kind_raises() -> None:
    with pytest.raises(KeyError):
        oracle.expected_checkpoint({"q.weight": row(0)}, [(LORA, lora("q", row(1), column(1)))], {})


def test_the_oracle_imports_nothing_of_ours() -> None:
    lines = Path(oracle.__file__).read_text(encoding="utf-8").splitlines()
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"__future__", "json", "math", "re", "struct", "numpy"}
