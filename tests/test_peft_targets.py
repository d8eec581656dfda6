"""Layers that an adapter's configuration leaves out, which PEFT drops without a word, are refused."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import torch
from file_helpers import read
from toy_folders import adapter_folder, embedding_lora, lora

from lora_fast import cli
from lora_fast.adapters.formats import peft_targets
from lora_fast.adapters.formats.peft_targets import Patterns

NAME = "model.layers.3.attn.q_proj"
EXPERT = "model.layers.3.experts.7.up"
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn).*?(?:k_proj|v_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:attn)\.(?:(?:q_proj|v_proj)))"
)
# Whether PEFT adapts the layer: its name, and the configuration.
CASES: list[tuple[str, dict[str, Any], bool]] = [
    (NAME, {"target_modules": ["q_proj"]}, True),
    (NAME, {"target_modules": ["proj"]}, False),
    (NAME, {"target_modules": r".*\.(q_proj|v_proj)"}, True),
    (NAME, {"target_modules": r".*\.v_proj"}, False),
    (NAME, {"target_modules": "q_proj"}, False),
    (NAME, {"target_modules": UNSLOTH}, True),
    (NAME, {"target_modules": ["q_proj"], "layers_to_transform": [3, 5]}, True),
    (NAME, {"target_modules": ["q_proj"], "layers_to_transform": 3}, True),
    (NAME, {"target_modules": ["q_proj"], "layers_to_transform": [5]}, False),
    (NAME, {"target_modules": ["q_proj"], "layers_to_transform": []}, True),
    (NAME, {"target_modules": [NAME], "layers_to_transform": [5]}, True),
    (NAME, {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": "layers"}, True),
    (NAME, {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": ["h", "layers"]}, True),
    (NAME, {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": ["h"]}, False),
    (EXPERT, {"target_modules": ["up"], "layers_to_transform": [3]}, True),
    (EXPERT, {"target_modules": ["up"], "layers_to_transform": [7]}, False),
    (NAME, {"target_modules": ["q_proj"], "exclude_modules": ["attn.q_proj"]}, False),
    (NAME, {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.3\..*"}, False),
    (NAME, {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.4\..*"}, True),
    (NAME, {"rank_pattern": {r"(model\.)?layers\.3\.attn\.q_proj": 1}, "r": 4}, True),
    (NAME, {"target_modules": r"(?!.*visual).*q_proj"}, True),
    (NAME, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
    (NAME, {"target_modules": ["q_proj"], "modules_to_save": ["attn"]}, False),
    (NAME, {"target_modules": ["q_proj"], "modules_to_save": ["layers.3"]}, False),
    (NAME, {"target_modules": ["q_proj"], "modules_to_save": ["q_pro", "ttn", "del"]}, True),
    (NAME, {"target_modules": ["q_proj"], "modules_to_save": ["q_pro|lm_head"]}, False),
    (NAME, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head|q_pro"]}, True),
    (NAME, {"target_modules": r"(?:.*\.)?(\w+_proj){1,2}"}, True),
    (NAME, {"target_modules": r".*\.[q-v]_proj$"}, True),
    (NAME, {"target_modules": r".*\.[^q]_proj"}, False),
    (NAME, {"target_modules": r"model\.layers\.(1?[0-3])\..*"}, True),
    (NAME, {"target_modules": r"model\.layers\.(1?[4-9])\..*"}, False),
    (NAME, {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": "[lm]ayers"}, True),
    (NAME, {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": "model|layers"}, False),
]


@pytest.mark.parametrize(("name", "config", "is_adapted"), CASES)
def test_layers_that_peft_leaves_out_are_refused(
    name: str, config: dict[str, Any], is_adapted: bool, tmp_path: Path
) -> None:
    path = adapter_folder(tmp_path / "adapter", lora(name), **config)
    if is_adapted:
        assert list(read(path).layers) == [name]
    else:
        with pytest.raises(
            ValueError, match=r"(does not name|exclude_modules names|modules_to_save names) .*, for which adapter_model"
        ):
            read(path)


@pytest.mark.parametrize(("name", "config", "is_adapted"), CASES)
def test_the_cases_are_peft_s(name: str, config: dict[str, Any], is_adapted: bool) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft_helpers import PEFT_0_18

    if name == EXPERT and PEFT_0_18:
        is_adapted = not is_adapted  # of two numbers it took the last for the layer's
    config = {"target_modules": [name.rpartition(".")[2]], **config}
    found = check_target_module_exists(peft.LoraConfig(**config), name)
    assert bool(found) == is_adapted


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": "("}, "is no regular expression"),
        ({"target_modules": ["q_proj"], "exclude_modules": "(a"}, "exclude_modules .* is no regular expression"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": "(?!a)"},
            "layers_pattern .* is not supported",
        ),
        ({"rank_pattern": {"(?<=a)b": 1}}, "rank_pattern .* is not supported"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is a dict, expected a list of names"),
        ({"target_modules": [1]}, "target_modules has 1, expected names"),
        ({"exclude_modules": 3}, "exclude_modules is 3, expected a list of names"),
        ({"layers_pattern": [3]}, "layers_pattern has 3, expected names"),
        ({"target_modules": ["q_proj"], "layers_to_transform": ["3"]}, "layers_to_transform has '3', expected num"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": 3}, "layers_pattern is 3, expec"),
        ({"target_parameters": ["experts.up"]}, "target_parameters is set: LoRA of parameters .* is not supported"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = adapter_folder(tmp_path / "adapter", lora(NAME), **config)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_an_adapter_of_a_tied_layer_need_not_be_named(tmp_path: Path) -> None:
    head = {"lm_head.lora_A.weight": torch.ones(1, 4), "lm_head.lora_B.weight": torch.ones(9, 1)}
    layers = {**lora(NAME), **embedding_lora("words", 9), **embedding_lora("decoder.words", 9), **head}
    config: dict[str, Any] = {"target_modules": ["q_proj", "words"], "ensure_weight_tying": True}
    assert "lm_head" in read(adapter_folder(tmp_path / "a", layers, **config)).layers
    config["target_modules"] = ["q_proj", "decoder.words"]
    assert "lm_head" in read(adapter_folder(tmp_path / "b", layers, **config)).layers
    for name, other in (("v_proj", lora("v_proj")), ("lm_head", lora("lm_head"))):
        with pytest.raises(ValueError, match=f"target_modules does not name {name}, for which"):
            read(adapter_folder(tmp_path / name, layers | other, **config))
    with pytest.raises(ValueError, match="exclude_modules names lm_head"):
        read(adapter_folder(tmp_path / "c", layers, exclude_modules=["lm_head"], **config))


PATTERNS = [
    {"q_proj": 2, "attn.q_proj": 4},
    {"attn.q_proj": 4, "q_proj": 2},
    {r"^model\.layers\.3\.attn\.q_proj": 8, "q_proj": 2},
    {"q_proj": 2, r"^model\.layers\.3\.attn\.q_proj": 8},
    {r"^layers\.3\.attn\.q_proj": 8, "proj": 2},
    {"model.layers.3.attn.q_proj": 8},
    {"layers.?3.attn.q_proj": 8, ".*": 3},
    {r"(model\.)?layers\.[0-3]\..*": 5, "q_proj": 2},
    {r"layers\.\d+\.attn\.(q|v)_proj": 5},
    {"k_proj|q_proj": 5},
    {"k_proj|attn": 5, "q_proj$": 6},
    {r"model\.layers\.3\.attn\.q_proj$": 1, "^model-layers": 2},
    {"^a\\.b$": 1, "^a\\.b": 1, "q_proj": 5},
    {"layers)|(b": 1},
    {"proj$|model": 1, "(q_proj)": 3},
    {"größe": 1, "^größe$": 2, r"a\ b": 3},
    {"a[0]": 1, "a+b": 2},
]


@pytest.mark.parametrize("patterns", PATTERNS)
def test_the_first_pattern_that_peft_takes_decides(patterns: dict[str, int]) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    from peft.utils.other import get_pattern_key

    assert peft.__version__
    own = Patterns({"alpha_pattern": patterns}, "alpha_pattern", [], Path("config"))
    others = [] if any("\\d" in pattern for pattern in patterns) else ["größe", "x.größe"]
    for name in (
        *others,
        NAME,
        EXPERT,
        "q_proj",
        "model.layers.13.attn.q_proj",
        "a.model.layers.3.attn.q_proj",
        "a b",
        "a+b",
    ):
        assert own.of(name, 0) == patterns.get(get_pattern_key(patterns.keys(), name), 0)


def test_many_modules_with_a_pattern_each_are_looked_up() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(100) for expert in range(100)]
    patterns = {f"^{re.escape(name)}": number for number, name in enumerate(names)}
    own = Patterns({"rank_pattern": {**patterns, "up_proj": -1}}, "rank_pattern", names, Path("config"))
    before = time.monotonic()
    assert [own.of(name, None) for name in names] == list(range(len(names)))
    assert own.of("up_proj", None) == -1
    assert time.monotonic() - before < 2  # one after another they are 5 · 10⁷ patterns


def test_names_in_other_letters_are_not_given_to_patterns_that_read_them_otherwise(tmp_path: Path) -> None:
    name = "modèle.q_proj"
    assert list(read(adapter_folder(tmp_path / "a", lora(name), target_modules=["q_proj"])).layers) == [name]
    for index, key in enumerate(("target_modules", "exclude_modules")):  # which say only whether there is an adapter
        assert list(read(adapter_folder(tmp_path / str(index), lora(name), **{key: r"\w+\.(q|v)_proj"})).layers) == [
            name
        ]
    with pytest.raises(ValueError, match="patterns that cannot be read as PEFT does for the module 'modèle.q_proj'"):
        read(adapter_folder(tmp_path / "b", lora(name), alpha_pattern={r"\w+\.(q|v)_proj": 3}))


def test_without_re2_only_what_needs_it_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "re2", None)
    peft_targets._re2.cache_clear()
    plain = adapter_folder(tmp_path / "a", lora(NAME), target_modules=["q_proj"], alpha_pattern={"attn.q_proj": 3})
    assert read(plain).layers[NAME].scaling == 3.0
    path = adapter_folder(tmp_path / "b", lora(NAME), target_modules=r".*q_proj")
    with pytest.raises(ModuleNotFoundError, match=r"need google-re2: pip install 'lora_fast\[adapters\]'"):
        read(path)
    assert cli.main(["inspect", str(path)]) == 2
    assert "inspect needs the package google-re2: pip install 'lora_fast[adapters]'" in capsys.readouterr().err
