"""Small PEFT models, moved off their initial state, and what it means that two of them are one function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import Draw, Results
from torch import Tensor, nn

import lora_fast
from lora_fast import functional, testing

EXACT = {"rtol": 1e-10, "atol": 1e-10}
PEFT_0_18 = peft.__version__.startswith("0.18.")  # make peft-oldest


class Perceptron(nn.Module):
    """Two linears, with a bias and without, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 9, bias=False)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def perceptron(*, dtype: torch.dtype = torch.float64, adapters: tuple[str, ...] = ("default",), **config: Any) -> Any:
    """A PeftModel over :class:`Perceptron`; the first adapter is active."""
    return adapted(Perceptron(), dtype, adapters, target_modules=["up", "down"], **config)


def adapted(
    base: nn.Module, dtype: torch.dtype, adapters: tuple[str, ...] = ("default",), *, seed: int = 0, **config: Any
) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)
    config = {"r": 4, "lora_alpha": 6, **config}
    autocast = config.pop("autocast_adapter_dtype", True)
    model = get_peft_model(base.to(dtype), LoraConfig(**config), adapters[0], autocast_adapter_dtype=autocast)
    for name in adapters[1:]:
        model.add_adapter(name, LoraConfig(**config))
    move(model, seed=1 + seed)
    return model.double() if dtype == torch.float64 else model


def move(model: nn.Module, seed: int = 1) -> None:
    """As if the adapters had been trained a while: lora_B and the magnitudes leave their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(0.6 + torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3)


def accelerated(model: nn.Module, **options: Any) -> Any:
    """A copy that lora_fast runs."""
    copied = copy.deepcopy(model)
    lora_fast.accelerate(copied, **options)
    return copied


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def results(
    model: nn.Module, x: Tensor, around: Callable[[], AbstractContextManager] = nullcontext, **kwargs: Any
) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter and of x, for one fixed gradient of the output."""
    model.zero_grad(set_to_none=True)
    x = x.clone()
    if x.is_floating_point():
        x.requires_grad_()
    with around():
        y = model(x, **kwargs)
    y = y if isinstance(y, Tensor) else y[0]
    found = {"y": y.detach()}
    if y.requires_grad:
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype))
    if x.grad is not None:
        found["x"] = x.grad
    found.update({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


def drawn(actual: Results, eager: Results, truth: Results) -> Draw:
    """What :func:`support.hold_to_budget` takes; PEFT's own results in the dtypes of ours."""
    assert actual.keys() == truth.keys()
    return actual, [{name: eager[name].to(value.dtype) for name, value in actual.items()}], truth


def assert_same(fast: nn.Module, peft: nn.Module, x: Tensor, **kwargs: Any) -> None:
    """Outputs and all gradients agree, and the same parameters get one."""
    tolerances = kwargs.pop("tolerances", EXACT)
    actual, wanted = results(fast, x, **kwargs), results(peft, x, **kwargs)
    assert actual.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            actual[name], wanted[name], **tolerances, msg=lambda text, name=name: f"{name}: {text}"
        )


def uses_lora_fast(model: nn.Module, x: Tensor, **kwargs: Any) -> set[str]:
    """Which of lora_fast's ops one call runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        model(x, **kwargs)
    return {event.key.removeprefix("lora_fast::") for event in profiler.key_averages() if "lora_fast::" in event.key}


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager]:
    """PEFT's dropout with lora_fast's masks; the context that it returns gives every call the same seeds, in turn."""

    def drop(self: nn.Dropout, x: Tensor) -> Tensor:
        if not self.training:
            return x
        seed = functional.draw_seed(x.device)
        return x * testing.scaled_dropout_mask(seed, tuple(x.shape), self.p).to(x.dtype)

    @contextmanager
    def seeded() -> Iterator[None]:
        torch.manual_seed(3)
        yield

    monkeypatch.setattr(nn.Dropout, "forward", drop)
    return seeded
