"""An op's kernel is called at once where nobody would see the op, and by PyTorch's dispatch where somebody does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fast import calls, functional, ops
from lora_fast.testing import Case, make_inputs


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Wrapped(Tensor):
    pass


@pytest.fixture
def call() -> calls.LoraLinear:
    inputs = make_inputs(Case((5,), 48, 56, 8))
    factors = inputs.weight, inputs.bias, inputs.lora_A, inputs.lora_B
    return calls.LoraLinear(inputs.x, *factors, 0.7, None, "output", 0.0, None, "nothing")


def test_nobody_sees_the_op_of_a_plain_call(call: calls.LoraLinear) -> None:
    assert not ops._is_seen(call)
    assert not ops._is_seen(call._replace(lora_A=torch.nn.Parameter(call.lora_A), bias=None))


def test_who_sees_the_op(call: calls.LoraLinear) -> None:
    with Dispatched():
        assert ops._is_seen(call)
    with Functions():
        assert ops._is_seen(call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert ops._is_seen(call)
    assert ops._is_seen(call._replace(x=call.x.as_subclass(Wrapped)))
    assert ops._is_seen(call._replace(x=call.x.to("meta")))
    seen = torch.func.grad(lambda x: x.sum() * ops._is_seen(call._replace(x=x)))(call.x)
    assert torch.equal(seen, torch.ones_like(call.x))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_either_way_gives_the_same(call: calls.LoraLinear, leading: tuple[int, ...]) -> None:
    x = torch.randn(*leading, 56)
    arguments = x, call.weight, call.bias, call.lora_A, call.lora_B, 0.7
    with torch.no_grad():
        at_once = functional.lora_linear(*arguments, backend="torch")
        with Dispatched() as seen:
            dispatched = functional.lora_linear(*arguments, backend="torch")
    assert "lora_fast.lora_linear_fwd.default" in seen.names
    assert at_once.shape == dispatched.shape == (*leading, 48)
    assert torch.equal(at_once, dispatched)
