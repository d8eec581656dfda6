"""What tests of trainers share: a small Llama with an adapter to begin with, and what ran in a training."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_helpers import move
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_fast import functional

VOCABULARY = 258  # every byte, and where a text begins and ends
LAYERS = 14  # two blocks of seven linears
OPS = ("lora_linear", "dora_linear", "adapted_mlp")
# Trainings in float32. With Adam's own epsilon a gradient near zero moves its parameter by the learning rate, in the
# direction of its rounding error.
OPTIMIZER = {"learning_rate": 1e-2, "adam_epsilon": 1e-2, "lr_scheduler_type": "constant"}
EXACT = {"rtol": 1e-5, "atol": 1e-6}


def write_base(folder: Path, width: int = 32, inner: int = 48) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,  # enough for adapters to change the losses
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def base(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def config(**options: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **options})


def adapted(folder: Path, **options: Any) -> PeftModel:
    """With an adapter that changes what the model computes, the same at each call."""
    torch.manual_seed(1)
    model = get_peft_model(base(folder), config(**options))
    move(model)
    return model


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each function of lora_fast was called that runs a linear, or an MLP, with its adapter."""
    counts: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    with mock.patch.multiple(functional, **{name: counting(name, getattr(functional, name)) for name in OPS}):
        yield counts


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    """Of a trainer's arguments: a step is logged, and nothing saved if ``options`` does not say so."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **OPTIMIZER,
        **options,
    }


def losses(trainer: Any, *names: str) -> list[float]:
    """What the trainer logged, step by step."""
    return [entry[name] for entry in trainer.state.log_history for name in names or ("loss",) if name in entry]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
