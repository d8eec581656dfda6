"""Layers that an adapter's configuration leaves out, which PEFT drops without a word, are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
from file_helpers import read
from toy_folders import adapter_folder, lora

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
]


@pytest.mark.parametrize(("name", "config", "is_adapted"), CASES)
def test_layers_that_peft_leaves_out_are_refused(
    name: str, config: dict[str, Any], is_adapted: bool, tmp_path: Path
) -> None:
    path = adapter_folder(tmp_path / "adapter", lora(name), **config)
    if is_adapted:
        assert list(read(path).layers) == [name]
    else:
        with pytest.raises(ValueError, match=r"(leave out|exclude_modules names) .*, for which adapter_model"):
            read(path)


@pytest.mark.parametrize(("name", "config", "is_adapted"), CASES)
def test_the_cases_are_peft_s(name: str, config: dict[str, Any], is_adapted: bool) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    from peft.tuners.tuners_utils import check_target_module_exists

    config = {"target_modules": [name.rpartition(".")[2]], **config}
    found = check_target_module_exists(peft.LoraConfig(**config), name)
    assert bool(found) == is_adapted


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": "("}, "is no regular expression"),
        ({"target_modules": ["q_proj"], "exclude_modules": "["}, "is no regular expression"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": "(a*)*"},
            "layers_pattern .* repeats too much to be safe",
        ),
        ({"target_parameters": ["experts.up"]}, "target_parameters is set: LoRA of parameters .* is not supported"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = adapter_folder(tmp_path / "adapter", lora(NAME), **config)
    with pytest.raises(ValueError, match=message):
        read(path)
