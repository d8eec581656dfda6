"""PEFT models over quantised linears of every format, and their accelerated twins."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from quantised_helpers import Format, plain_linear, tokens
from torch import Tensor, nn

import lora_fast

RANK, ALPHA = 8, 12
WIDTH, HIDDEN = 128, 256
# what float32 rounds, in other orders of its sums
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}


class Perceptron(nn.Module):
    """Two quantised linears, and a plain one to be tuned beside them."""

    def __init__(self, form: Format, bias: bool, seed: int) -> None:
        super().__init__()
        self.up = form.linear(HIDDEN, WIDTH, bias=bias, seed=seed)
        self.down = form.linear(WIDTH, HIDDEN, bias=bias, seed=seed + 1)
        self.head = plain_linear(7, WIDTH, dtype=form.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def model_of(
    form: Format, adapters: tuple[str, ...] = ("default",), bias: bool = True, seed: int = 0, **config: Any
) -> Any:
    """A PeftModel, as PEFT makes it where transformers has loaded the base quantised."""
    base = Perceptron(form, bias, seed)
    kind = type(base.up).__name__
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = kind == "Linear4bit", kind == "Linear8bitLt"
    torch.manual_seed(seed)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["up", "down"], **config}
    autocast = settings.pop("autocast_adapter_dtype", True)
    model = get_peft_model(base, LoraConfig(**settings), adapters[0], autocast_adapter_dtype=autocast)
    for name in adapters[1:]:
        model.add_adapter(name, LoraConfig(**settings))
    move_a_little(model)
    return model


def move_a_little(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(0.6 + torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def fast_of(form: Format, *arguments: Any, compute_dtype: str = "activation", **config: Any) -> Any:
    """The same again, accelerated; made anew, since some libraries' layers cannot be copied."""
    model = model_of(form, *arguments, **config)
    report = lora_fast.accelerate(model, compute_dtype=compute_dtype)
    assert report.left_alone == [], str(report)
    assert len(report.accelerated) == 2
    return model


def x_of(form: Format, *shape: int, seed: int = 7) -> Tensor:
    return tokens(*(shape or (2, 5)), WIDTH, dtype=form.dtype, seed=seed)


def up(model: Any) -> Any:
    return model.base_model.model.up


def assert_close(actual: dict[str, Tensor], wanted: dict[str, Tensor], **tolerances: float) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = value.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(
            actual[name] / scale,
            value / scale,
            **(tolerances or FLOAT32),
            msg=lambda text, name=name: f"{name}: {text}",
        )
