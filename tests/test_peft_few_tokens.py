"""Accelerated LoRA linears run PEFT's own forward where a GPU would wait for the host; here on any device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft", reason="the peft extra is not installed")

from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft_helpers import perceptron

import lora_fast
from lora_fast.triton_kernels import constants

TOKENS, UP, DOWN = 7, 12 * 20, 20 * 9  # the weights' elements


pytestmark = pytest.mark.usefixtures("operators_here")


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
    model, x = perceptron(dtype=dtype, autocast_adapter_dtype=False), torch.randn(TOKENS, 12, dtype=dtype)
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
    model, x = perceptron(dtype=dtype).eval(), torch.randn(TOKENS, 12, dtype=dtype)
    lora_fast.accelerate(model)
    bounds = {TOKENS * DOWN * work - 1: 0, TOKENS * DOWN * work: 1, TOKENS * UP * work - 1: 1, TOKENS * UP * work: 2}
    for bound, count in bounds.items():
        theirs.clear()
        with constants.instead(replace(constants.PREDICTED, operators_bound=bound)):
            model(x)
        assert len(theirs) == count


@pytest.mark.parametrize(
    ("dtype", "config", "training"),
    [
        (torch.bfloat16, {}, True),  # float32 adapters, of which PEFT keeps a copy of x
        (torch.float32, {"lora_dropout": 0.1}, True),
        (torch.float16, {"autocast_adapter_dtype": False}, False),  # the update overflows before it is scaled
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_not_left_to_peft(
    dtype: torch.dtype, config: dict[str, Any], training: bool, grad: bool, theirs: list[Tensor]
) -> None:
    """Whether autograd records or not, for reentrant checkpointing runs a forward both ways."""
    model = perceptron(dtype=dtype, **config).train(training)
    lora_fast.accelerate(model)
    with torch.set_grad_enabled(grad):
        model(torch.randn(TOKENS, 12, dtype=dtype))
    assert theirs == []


def test_a_layer_in_training_keeps_no_activation_but_x() -> None:
    """Law 2 holds, whoever runs the layer."""
    for dtype, dropout in ((torch.float32, 0.0), (torch.float32, 0.1), (torch.bfloat16, 0.1)):
        model = perceptron(dtype=dtype, lora_dropout=dropout).train()
        lora_fast.accelerate(model)
        layer = model.base_model.model.up
        x = torch.randn(200, 12, dtype=dtype).requires_grad_()
        given = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, given: set[int] = given, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        assert sum(kept.values()) <= 200 * 4 * x.element_size() + 64  # h, and a seed


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_recomputation_runs_what_its_forward_ran(reentrant: bool, dropout: float, theirs: list[Tensor]) -> None:
    """Under the default of its forward, wherever the block of that ended or another one begins."""
    model = perceptron(dtype=torch.float32, lora_dropout=dropout)
    lora_fast.accelerate(model)
    x = torch.randn(TOKENS, 12).requires_grad_()

    def gradients(forward: str, backward: str, *, checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(3)
        with lora_fast.use_backend(forward):  # type: ignore[arg-type]
            y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        with lora_fast.use_backend(backward):  # type: ignore[arg-type]
            y.square().sum().backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad(set_to_none=True)
        return found

    for forward, backward in (("torch", "auto"), ("auto", "torch")):
        expected = gradients(forward, backward, checkpointed=False)
        theirs.clear()
        for ours, plain in zip(gradients(forward, backward, checkpointed=True), expected, strict=True):
            torch.testing.assert_close(ours, plain)
        assert len(theirs) == (4 if forward == "auto" and dropout == 0.0 else 0)


def test_a_compiled_layer_is_ours(theirs: list[Tensor]) -> None:
    model = perceptron(dtype=torch.float32)
    lora_fast.accelerate(model)
    layer = model.base_model.model.up
    torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(TOKENS, 12))
    assert theirs == []
