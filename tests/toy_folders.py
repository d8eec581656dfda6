"""Small checkpoint and adapter folders made of tensors, for tests of what merging and loading make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_fast.adapters.formats.peft import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from lora_fast.merge_checkpoint import merge_checkpoint

W = torch.eye(4)
A, B = torch.ones(1, 4), torch.arange(4.0)[:, None]  # rank 1, and alpha 1
MERGED = W + B @ A


def lora(name: str) -> dict[str, Tensor]:
    """The update B @ A of a linear [4, 4]."""
    return {f"{name}.lora_A.weight": A.clone(), f"{name}.lora_B.weight": B.clone()}


def embedding_lora(name: str, words: int = 9) -> dict[str, Tensor]:
    """An update of ones for an embedding [words, 4]."""
    return {f"{name}.lora_embedding_A": torch.ones(1, words), f"{name}.lora_embedding_B": torch.ones(4, 1)}


def adapter_folder(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)
    own = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "fan_in_fan_out": False, **config}
    (folder / CONFIG_NAME).write_text(json.dumps(own))
    return folder


def base_folder(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def merge(
    tmp_path: Path,
    adapter: dict[str, Tensor],
    base: dict[str, Tensor],
    config: dict[str, Any] | None = None,
    base_config: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, config.json) of the merged folder; on an error nothing is there but what was."""
    adapter_path = adapter_folder(tmp_path / "adapter", adapter, **(config or {}))
    base_path = base_folder(tmp_path / "base", base, **(base_config or {}))
    out = tmp_path / "out"
    try:
        done = merge_checkpoint(base_path, adapter_path, out, **options)
    except BaseException:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
        raise
    tensors = load_file(out / "model.safetensors")
    assert done.merged + done.replaced + done.kept == len(tensors)
    return tensors, json.loads((out / "config.json").read_text())


def small_llama(folder: Path, **config: Any) -> Any:
    """A model of transformers, saved in ``folder``."""
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    sizes = {
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **config}))
    model.save_pretrained(folder)
    return model
