"""Accelerated LoRA linears run PEFT's own forward where a GPU would wait for the host; here on any device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="the peft extra is not installed")

from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft_helpers import perceptron

import lora_fast
from lora_fast.backends import operators
from lora_fast.triton_kernels import constants

TOKENS, UP, DOWN = 7, 12 * 20, 20 * 9  # the weights' elements


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "DEVICES", (torch.get_default_device().type,))
    monkeypatch.delenv("LORA_FAST_BACKEND", raising=False)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The x of each call of PEFT's own forward."""
    called, original = [], Linear.forward

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        called.append(x)
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", forward)
    return called


def outputs(model: Any, x: Tensor) -> list[Tensor]:
    y = model(x)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), trained)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_peft_to_the_bit(dtype: torch.dtype, theirs: list[Tensor]) -> None:
    model, x = perceptron(dtype=dtype, lora_dropout=0.0), torch.randn(TOKENS, 12, dtype=dtype)
    expected = outputs(model, x)
    report = lora_fast.accelerate(model)
    assert len(report.accelerated) == 2
    assert "PEFT's own forward for few tokens" in str(report)
    theirs.clear()
    for ours, plain in zip(outputs(model, x), expected, strict=True):
        assert torch.equal(ours, plain)
    assert len(theirs) == 2


def test_dora_is_not(theirs: list[Tensor]) -> None:
    model = perceptron(use_dora=True)
    assert "few tokens" not in str(lora_fast.accelerate(model))
    outputs(model, torch.randn(TOKENS, 12, dtype=torch.float64))
    assert theirs == []


def test_lora_beside_a_dora_adapter_is_not(theirs: list[Tensor]) -> None:
    model = perceptron()
    model.add_adapter("dora", LoraConfig(r=4, target_modules=["up", "down"], use_dora=True))
    lora_fast.accelerate(model)
    model.double()(torch.randn(TOKENS, 12, dtype=torch.float64))
    assert theirs == []


def test_a_backend_that_is_named_runs(theirs: list[Tensor]) -> None:
    model, x = perceptron(), torch.randn(TOKENS, 12, dtype=torch.float64)
    lora_fast.accelerate(model)
    with lora_fast.use_backend("torch"):
        outputs(model, x)
    assert theirs == []
    outputs(model, x)
    assert len(theirs) == 2


@pytest.mark.parametrize(("dtype", "work"), [(torch.float32, 1), (torch.bfloat16, 4)])
def test_up_to_the_constant(dtype: torch.dtype, work: int, theirs: list[Tensor]) -> None:
    """Float32 adapters beside 16-bit activations count four times."""
    model, x = perceptron(dtype=dtype), torch.randn(TOKENS, 12, dtype=dtype)
    lora_fast.accelerate(model)
    bounds = {TOKENS * DOWN * work - 1: 0, TOKENS * DOWN * work: 1, TOKENS * UP * work - 1: 1, TOKENS * UP * work: 2}
    for bound, count in bounds.items():
        theirs.clear()
        with constants.instead(replace(constants.PREDICTED, operators_bound=bound)):
            model(x)
        assert len(theirs) == count


def test_a_compiled_layer_is_ours(theirs: list[Tensor]) -> None:
    model = perceptron(dtype=torch.float32)
    lora_fast.accelerate(model)
    layer = model.base_model.model.up
    torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(TOKENS, 12))
    assert theirs == []
