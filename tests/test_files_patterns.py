"""Patterns in PEFT's configurations that would take much time or memory: matched, or an error, at once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
pytest.importorskip("re2", reason="the adapters extra is not installed")
import torch
from file_helpers import read, refused
from safetensors.torch import save_file

# Patterns that Python's engine takes for ever over, or much memory, and whether they are taken here; none matches.
ENDLESS = {
    "a?" * 30 + "a" * 30 + "b": True, "(a|aa)+b": True, ".*.*.*.*b": True, ".*" * 9 + "d": True, "(?:a*)*b": True,
    "((a|aa)(a|aa)?)+b": True, "(aa|aa)" * 40: True, r"(\w+\s?)*b": True, "(a{100}){10}b": True,
    "((a{100}){100}){100}": False, "(a{0,1000}){0,1000}b": False, "(?=(a+)+b).*": False, r"(a+)\1+b": False,
    "(?#[)(a+)+(?#])b": False, "(?x)(a+)#c\n+b": False, "(?i)" + "[\x00-\U0010ffff]" * 200: False, "a*" * 5000: False,
    "[^a]" * 2000 + "?": True, "[\ud800]": False, "\\\ud800": True, "[z-\x1b](a*)*": False, r"[\d-z]*": False,
    "[z-a]": False, r"[\w-]*b": True, "{,3}" * 9: False, "(" * 5000: False,
}  # fmt: skip


@pytest.mark.parametrize(("pattern", "is_taken"), ENDLESS.items(), ids=range(len(ENDLESS)))
@pytest.mark.parametrize("where", ["folder", "header"])
def test_patterns_that_never_end(where: str, pattern: str, is_taken: bool, tmp_path: Path) -> None:
    config: dict[str, Any] = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "alpha_pattern": {pattern: 2}}
    config |= {"target_modules": [pattern, "c"], "exclude_modules": pattern, "modules_to_save": [pattern]}
    name = "a" * 90 + ".c"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 4), f"{name}.lora_B.weight": torch.ones(6, 1)}
    path = tmp_path
    if where == "folder":
        tensors = {f"base_model.model.{key}": value for key, value in tensors.items()}
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))
    else:
        path = tmp_path / "a.safetensors"
        save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config)})
    before = time.monotonic()
    if is_taken:
        assert read(path).layers[name].scaling == 1.0
    else:
        refused("which is not supported|which is no regular expression", path)
    assert time.monotonic() - before < 5


def test_expressions_that_are_too_many(tmp_path: Path) -> None:
    """Each of these takes 90 KB to be matched."""
    save_file(
        {"base_model.model.q.lora_A.weight": torch.ones(1, 4), "base_model.model.q.lora_B.weight": torch.ones(4, 1)},
        tmp_path / "adapter_model.safetensors",
    )
    patterns = [f"(.{{33}}.?){{30}}{index}" for index in range(8000)]
    for more in ({"alpha_pattern": dict.fromkeys(patterns, 1)}, {"modules_to_save": patterns}):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **more})
        )
        refused("has 8000 regular expressions, expected at most 1000", tmp_path)


def test_patterns_for_layers_that_are_too_many(tmp_path: Path) -> None:
    names = ["a." * 480 + f"q{index}" for index in range(100)]
    shapes = {"lora_A": (1, 4), "lora_B": (4, 1)}
    tensors = {
        f"base_model.model.{name}.{part}.weight": torch.ones(shape) for name in names for part, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    patterns = ["." * 480 + f"{index}" for index in range(2000)]
    own = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": names}
    indexed = {"target_modules": ["q"], "layers_to_transform": [0]}
    for more, message in (
        (
            {"alpha_pattern": dict.fromkeys(patterns, 1)},
            "alpha_pattern has 2000 patterns, too many for 100 layers",
        ),
        ({"modules_to_save": patterns}, "modules_to_save has 2000 patterns, too many for 100 layers"),
        ({**indexed, "layers_pattern": patterns}, "layers_pattern has 2000 patterns, too many for 100 layers"),
        ({"modules_to_save": ["a"] * 200_000}, "modules_to_save has 200000 patterns, too many"),
        (
            {"rank_pattern": {f"a{index}": 1 for index in range(200_000)}},
            "rank_pattern has 200000 entries, expected at",
        ),
        ({**indexed, "layers_to_transform": [9] * 2_000_000}, "does not name a.a.a"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**own, **more}))
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


def test_short_patterns_that_are_too_many(tmp_path: Path) -> None:
    names = [f"l{index}" for index in range(2000)]
    shapes = {"lora_A": (1, 4), "lora_B": (4, 1)}
    tensors = {
        f"base_model.model.{name}.{part}.weight": torch.ones(shape) for name in names for part, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": {f"a{index}": 1 for index in range(90_000)}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refused("rank_pattern has 90000 patterns, too many for 2000 layers", tmp_path)
