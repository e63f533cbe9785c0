"""Bad input, line by line, through the command line: one sentence and a hint, nothing else, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_check import registry
from lora_check.__main__ import main
from tests import corrupt

WEIGHTS, FACTORS, CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
SIDES = ("base", "adapter", "merged")


class Scene:
    """Copies of the files of one world, free to be spoilt; `say` runs the command line on them."""

    def __init__(self, root: Path, inputs: Any, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys
        for side, source in zip(SIDES, (inputs.base, inputs.adapters[0], inputs.merged), strict=True):
            shutil.copytree(source, root / side)

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def listing(self) -> dict[str, bytes | None]:
        """Every file and folder, with what is in it."""
        return {
            str(path.relative_to(self.root)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.root.rglob("*"))
        }

    def say(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; nothing may be left behind."""
        before = self.listing()
        code = main(["report", *words])
        out, err = self.capsys.readouterr()
        assert self.listing() == before
        assert "Traceback" not in out + err
        return code, out, err

    def report(self, *places: str) -> tuple[int, str, str]:
        return self.say(*(str(self / place) for place in places or SIDES))


@pytest.fixture
def scene(world, tmp_path, capsys) -> Scene:
    made = Scene(tmp_path, world("llama-qv"), capsys)
    assert made.report()[0] == 0
    return made


def demand_one_sentence(said: tuple[int, str, str], *names: str) -> str:
    """Exit 2, nothing on stdout, one `error:` line that names the file, one `hint:` line; the sentence."""
    code, out, err = said
    assert (code, out) == (2, "")
    error, hint = err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert hint.removeprefix("hint: ").strip()
    sentence = error.removeprefix("error: ")
    for name in names:
        assert name in sentence
    assert not sentence.endswith(".")
    assert len(sentence) < 600
    return sentence


def demand_told(scene: Scene, words: list[str], *names: str) -> str:
    """One sentence on stderr, the same in the file of --json."""
    sentence = demand_one_sentence(scene.say(*words), *names)
    file = scene.root.parent / f"{scene.root.name}-told.json"
    assert main(["report", *words, "--json", str(file)]) == 2
    scene.capsys.readouterr()
    told = json.loads(file.read_text())
    file.unlink()
    assert told["schema"] == 1
    assert set(told["error"]) == {"code", "message", "hint"}
    assert told["error"]["hint"]
    assert told["error"]["message"] == sentence
    assert told["error"]["code"] not in ("", "error")
    return sentence


def words_of(scene: Scene, **instead: str) -> list[str]:
    return [instead.get(side, str(scene / side)) for side in SIDES]


# --------------------------------------------------------------------------------------------------- locations


@pytest.mark.parametrize("side", SIDES)
def test_a_path_that_does_not_exist(scene, side) -> None:
    absent = str(scene / "absent")
    sentence = demand_told(scene, words_of(scene, **{side: absent}), absent)
    assert sentence.startswith(f"{side}: ")


@pytest.mark.parametrize("side", SIDES)
def test_a_folder_without_weights(scene, side) -> None:
    file = scene / side / (FACTORS if side == "adapter" else WEIGHTS)
    file.unlink()
    demand_told(scene, words_of(scene), str(scene / side))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["an empty folder", "a text file"])
def test_a_location_that_is_no_checkpoint(scene, side, kind) -> None:
    place = scene / "strange"
    if kind == "an empty folder":
        place.mkdir()
    else:
        place.write_text("notes\n")
    demand_told(scene, words_of(scene, **{side: str(place)}), str(place))


def test_an_empty_location(scene) -> None:
    sentence = demand_told(scene, words_of(scene, merged=""))
    assert "empty" in sentence


# ------------------------------------------------------------------------------------------------------- files


def weights(scene: Scene, side: str) -> Path:
    return scene / side / (FACTORS if side == "adapter" else WEIGHTS)


@pytest.mark.parametrize("side", SIDES)
def test_a_git_lfs_pointer(scene, side) -> None:
    file = weights(scene, side)
    file.write_text(corrupt.POINTER)
    assert "git-lfs pointer" in demand_told(scene, words_of(scene), str(file))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("left", [0, 7, 8, 300, -1])
def test_a_truncated_safetensors_file(scene, side, left) -> None:
    file = weights(scene, side)
    file.write_bytes(file.read_bytes()[:left])
    demand_told(scene, words_of(scene), str(file))


@pytest.mark.parametrize("lie", corrupt.HEADERS)
def test_a_header_that_lies(scene, lie) -> None:
    header, data, _ = corrupt.HEADERS[lie]
    file = corrupt.write_safetensors(scene / "merged" / WEIGHTS, header, data)
    demand_told(scene, words_of(scene), str(file))


@pytest.mark.parametrize("change", [{"dtype": "F16"}, {"dtype": "Q4"}, {"shape": [1]}, {"data_offsets": [0, 10**9]}])
def test_one_line_of_a_true_header_that_lies(scene, change) -> None:
    file = scene / "merged" / WEIGHTS
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name] |= change
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    demand_told(scene, words_of(scene), str(file), name)


def sharded(scene: Scene, listed: Callable[[dict[str, str]], str] = json.dumps) -> tuple[Path, dict[str, str]]:
    """Replace the merged file by two shards, and an index that says of its weight_map what `listed` makes of it."""
    from safetensors.torch import load_file

    folder = scene / "merged"
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[:9]}, {name: tensors[name] for name in names[9:]}]
    index = corrupt.shard(folder, WEIGHTS, parts)
    true = json.loads(index.read_text())["weight_map"]
    index.write_text('{"metadata": {}, "weight_map": ' + listed(true) + "}")
    return index, true


def test_shards_with_a_true_index_are_no_error(scene) -> None:
    sharded(scene)
    assert scene.report()[0] == 0


def test_an_index_that_names_an_absent_shard(scene) -> None:
    index, true = sharded(scene)
    shard = index.parent / max(true.values())
    shard.unlink()
    demand_told(scene, words_of(scene), shard.name, str(index))


def test_an_index_with_a_key_twice(scene) -> None:
    def twice(true: dict[str, str]) -> str:
        first, place = next(iter(true.items()))
        return json.dumps(true)[:-1] + f', "{first}": "{place}"}}'

    index, true = sharded(scene, twice)
    demand_told(scene, words_of(scene), str(index), next(iter(true)), "twice")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"weight_map": []}', '{"weight_map": {"x": 3}}', '{"weight_map": {"x": "../y"}}']
)
def test_an_index_that_is_none(scene, text) -> None:
    index, _ = sharded(scene)
    index.write_text(text)
    demand_told(scene, words_of(scene), str(index))


def test_an_index_that_gives_a_tensor_to_the_other_shard(scene) -> None:
    def moved(true: dict[str, str]) -> str:
        return json.dumps(true | {min(true): max(true.values())})

    index, true = sharded(scene, moved)
    demand_told(scene, words_of(scene), str(index), min(true))


@pytest.mark.parametrize("kind", corrupt.PICKLERS)
@pytest.mark.parametrize("side", SIDES)
def test_a_pickle_with_code_is_refused_and_not_run(scene, side, kind) -> None:
    sentinel = scene.root.parent / f"{scene.root.name}-sentinel"
    folder = scene / side
    weights(scene, side).unlink()
    file = folder / ("adapter_model.bin" if side == "adapter" else "pytorch_model.bin")
    corrupt.PICKLERS[kind](file, {"a.weight": torch.ones(2), "b.weight": corrupt.RunsCode(sentinel)})
    demand_told(scene, words_of(scene), str(file))
    assert not sentinel.exists()


def test_that_pickle_would_have_run(scene) -> None:
    sentinel = scene / "sentinel"
    file = scene / "code.bin"
    torch.save({"b.weight": corrupt.RunsCode(sentinel)}, file)
    torch.load(file, weights_only=False)
    assert sentinel.exists()


# ------------------------------------------------------------------------------------------ adapter_config.json

CONFIGS: Mapping[str, str] = {
    "nothing": "",
    "no JSON": "{'r': 8}",
    "half of it": '{"peft_type": "LORA", "r": ',
    "a list": "[1, 2]",
    "a number": "8",
    "null": "null",
    "a key twice": '{"peft_type": "LORA", "r": 3, "r": 4}',
    "not text": "\x00\x01",
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_is_no_json_object(scene, case) -> None:
    file = scene / "adapter" / CONFIG
    file.write_text(CONFIGS[case])
    demand_told(scene, words_of(scene), str(file))


def test_an_adapter_without_a_configuration(scene) -> None:
    (scene / "adapter" / CONFIG).unlink()
    demand_told(scene, words_of(scene), str(scene / "adapter" / CONFIG))


VALUES: Mapping[str, Mapping[str, Any]] = {
    "r is zero": {"r": 0},
    "r is negative": {"r": -3},
    "r is text": {"r": "8"},
    "r is true": {"r": True},
    "r is a fraction": {"r": 2.5},
    "r is not a number": {"r": float("nan")},
    "r is endless": {"r": float("inf")},
    "alpha is text": {"lora_alpha": "16"},
    "alpha is a list": {"lora_alpha": [16]},
    "alpha is not a number": {"lora_alpha": float("nan")},
    "alpha is endless": {"lora_alpha": float("inf")},
    "rank_pattern is a list": {"rank_pattern": [4]},
    "rank_pattern is text": {"rank_pattern": "q_proj"},
    "a rank of a pattern is text": {"rank_pattern": {"q_proj": "4"}},
    "a rank of a pattern is zero": {"rank_pattern": {"q_proj": 0}},
    "alpha_pattern is a list": {"alpha_pattern": ["q_proj"]},
    "a pattern is no regular expression": {"alpha_pattern": {"q_proj(": 4}},
    "token indices are text": {"trainable_token_indices": {"embed_tokens": "17"}},
    "token indices are a number": {"trainable_token_indices": 17},
    "targets are a number": {"target_modules": 17},
    "targets are no regular expression": {"target_modules": "(q_proj"},
}


@pytest.mark.parametrize("case", VALUES)
def test_a_configuration_with_an_impossible_value(scene, case) -> None:
    file = scene / "adapter" / CONFIG
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | VALUES[case]))
    key = next(iter(VALUES[case]))
    demand_told(scene, words_of(scene), str(scene / "adapter"), key)


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "OFT", "VERA", "PROMPT_TUNING", "TYPE_OF_TOMORROW"])
def test_an_adapter_of_a_type_that_is_not_supported_yet_is_inconclusive_and_named(scene, kind) -> None:
    file = scene / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": kind}))
    code, out, err = scene.report()
    assert (code, err) == (3, "")
    assert out.startswith("inconclusive: ")
    assert kind in out
    assert "LC301" in out


# ------------------------------------------------------------------------------------ sound, in the wrong place


def test_the_same_checkpoint_as_base_and_merged(scene) -> None:
    base, merged = str(scene / "base"), str(scene / "merged")
    demand_told(scene, words_of(scene, merged=base), base)
    demand_told(scene, words_of(scene, base=merged), merged)
    demand_told(scene, words_of(scene, merged=f"{base}/../base"))


def test_the_file_inside_the_base_folder_as_merged(scene) -> None:
    demand_told(scene, words_of(scene, merged=str(scene / "base" / WEIGHTS)), WEIGHTS)


def test_a_link_to_the_base_as_merged(scene) -> None:
    (scene / "link").symlink_to(scene / "base")
    demand_told(scene, words_of(scene, merged=str(scene / "link")))


def test_a_true_copy_of_the_base_as_merged_is_refuted(scene) -> None:
    shutil.copytree(scene / "base", scene / "copy")
    code, out, _ = scene.report("base", "adapter", "copy")
    assert code == 1
    assert "LC101" in out


@pytest.mark.parametrize("side", ["base", "merged"])
@pytest.mark.parametrize("inside", ["", f"/{FACTORS}"])
def test_an_adapter_given_as_a_model(scene, side, inside) -> None:
    place = str(scene / "adapter") + inside
    sentence = demand_told(scene, words_of(scene, **{side: place}), place)
    assert sentence.startswith(f"{side}: ")


@pytest.mark.parametrize("inside", ["", f"/{WEIGHTS}"])
def test_a_model_given_as_adapter(scene, inside) -> None:
    place = str(scene / "base") + inside
    sentence = demand_told(scene, words_of(scene, adapter=place), str(scene / "base"))
    assert sentence.startswith("adapter: ")


def test_base_and_merged_swapped_are_refuted_and_named(world, tmp_path, capsys) -> None:
    for dtype in ("bf16", "fp32"):
        made = Scene(tmp_path / dtype, world("llama-qv", dtype), capsys)
        code, out, err = made.report("merged", "adapter", "base")
        assert (code, err) == (1, "")
        assert "LC113" in out, dtype


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_locations(scene, count) -> None:
    words = words_of(scene)[:count]
    demand_told(scene, words)


@pytest.mark.parametrize("weights", [["1", "2"], ["1", "2", "3"]])
def test_another_number_of_weights_than_of_adapters(scene, weights) -> None:
    sentence = demand_told(scene, [*words_of(scene), "--weights", *weights])
    assert f"{len(weights)} weights" in sentence


@pytest.mark.parametrize("option", ["output", *(name for name in registry.load("renderers") if name != "text")])
def test_an_output_into_a_folder_that_is_not_there(scene, option) -> None:
    file = str(scene / "absent" / "report.txt")
    demand_one_sentence(scene.say(*words_of(scene), f"--{option}", file), file)


def test_an_output_that_would_replace_an_input(scene) -> None:
    file = str(scene / "merged" / WEIGHTS)
    demand_one_sentence(scene.say(*words_of(scene), "--output", file), file)


def test_an_old_report_does_not_outlive_an_error(scene) -> None:
    file = scene.root.parent / f"{scene.root.name}-old.json"
    assert main(["report", *words_of(scene), "--json", str(file)]) == 0
    assert json.loads(file.read_text())["verdict"] == "verified"
    assert main(["report", *words_of(scene, base=str(scene / "absent")), "--json", str(file)]) == 2
    assert set(json.loads(file.read_text())) == {"schema", "error"}
    file.unlink()


# --------------------------------------------------------------------- sound files that contradict one another


def test_an_adapter_of_another_model_is_inconclusive_and_says_what_it_names(scene) -> None:
    factors = {
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(3, 4),
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight": torch.ones(12, 3),
    }
    save_file(factors, scene / "adapter" / FACTORS)
    shutil.copytree(scene / "base", scene / "copy")
    code, out, err = scene.report("base", "adapter", "copy")
    assert (code, err) == (3, "")
    assert "LC205" in out
    assert "c_attn" in out


def test_a_merged_file_of_another_model_is_refuted(scene, world) -> None:
    code, out, err = scene.say(str(scene / "base"), str(scene / "adapter"), str(world("gpt2").merged))
    assert (code, err) == (1, "")
    assert "LC211" in out


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nverified: b", "\u202e", "\ud7ff"])
def test_a_name_in_a_file_cannot_move_the_cursor(scene, name) -> None:
    from safetensors.torch import load_file

    file = scene / "merged" / WEIGHTS
    save_file(load_file(file) | {name: torch.ones(1)}, file)
    code, out, err = scene.report()
    assert (code, err) == (1, "")
    assert name not in out or name.isprintable()
    assert "LC202" in out
