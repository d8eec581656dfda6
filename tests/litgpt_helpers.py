"""Small models of litgpt's, and a checkpoint of one with data to train it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config as BaseConfig
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.model import GPT as BaseGPT  # noqa: N811
from litgpt.utils import save_config
from torch import nn

from lora_fast.benchmarks.trainers_child import tokenizer

VOCABULARY = 258  # every byte, and where a text begins and ends
SIZES: dict[str, Any] = {
    "name": "toy",
    "block_size": 256,
    "vocab_size": VOCABULARY,
    "padded_vocab_size": VOCABULARY,
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_query_groups": 2,
    "head_size": 12,  # so that q is wider than the model
    "intermediate_size": 44,
    "mlp_class_name": "LLaMAMLP",
    "norm_class_name": "RMSNorm",
    "bias": False,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
}
EVERYWHERE = {f"lora_{name}": True for name in ("query", "key", "value", "projection", "mlp", "head")}


def gpt(dtype: torch.dtype = torch.float64, **config: Any) -> GPT:
    """With an adapter of rank 3 that changes what it computes, everywhere if ``config`` does not say where."""
    model = GPT(Config(**{**SIZES, "lora_r": 3, "lora_alpha": 6, **EVERYWHERE, **config}))
    fill(model)
    mark_only_lora_as_trainable(model)
    return model.to(dtype)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.2, generator=generator)


def write_checkpoint(folder: Path) -> None:
    """A model, without adapters, and a tokenizer of bytes, as litgpt's commands want them."""
    folder.mkdir()
    tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = BaseConfig(**SIZES)
    model = BaseGPT(config)
    fill(model)
    torch.save(model.state_dict(), folder / "lit_model.pth")
    save_config(config, folder)


def write_data(file: Path) -> None:
    lines = [{"instruction": f"say {count}", "input": "", "output": f"number {7 * count}"} for count in range(24)]
    file.write_text(json.dumps(lines))
