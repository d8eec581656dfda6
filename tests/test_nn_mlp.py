"""Gated MLPs of applied models that run as one; how a module is recognised is tested in test_peft_mlp.py."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fast
from lora_fast import functional
from lora_fast.nn import mlp

EXACT = {"rtol": 1e-10, "atol": 1e-10}
X = (3, 20, 16)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 28), nn.Linear(16, 28, bias=False)
        self.dropout, self.down = nn.Dropout(0.3), nn.Linear(28, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.gelu(self.gate(x)) * self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mlp = nn.Linear(16, 16), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(torch.tanh(self.first(x)))


def applied(**options: Any) -> nn.Module:
    """The same weights at every call, with adapters that have been trained a while, as it were."""
    torch.manual_seed(0)
    model = lora_fast.apply(Model().double(), 4, 1.5, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(0.6 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
            elif "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """From one state of the generator, which draws the dropout between the linears."""
    torch.manual_seed(3)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape))
    assert x.grad is not None
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def calls(model: nn.Module, x: Tensor) -> int:
    with mock.patch.object(functional, "adapted_mlp", wraps=functional.adapted_mlp) as adapted_mlp:
        model(x)
    return adapted_mlp.call_count


@pytest.mark.parametrize("recompute", ["outputs", "all"])
@pytest.mark.parametrize(
    "options", [{}, {"dora": False}, {"detach_norm": False}, {"targets": ["gate", "down"]}], ids=str
)
def test_it_is_the_linears_one_after_the_other(options: dict[str, Any], recompute: Any) -> None:
    as_one, apart = applied(recompute=recompute, **options), applied(recompute=None, **options)
    assert calls(as_one, tokens(*X)) == 1
    assert calls(apart, tokens(*X)) == 0
    assert list(as_one.state_dict()) == list(apart.state_dict())
    for mode in (True, False):
        torch.testing.assert_close(
            results(as_one.train(mode), tokens(*X)), results(apart.train(mode), tokens(*X)), **EXACT
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda model: lora_fast.freeze_norms(model.eval()),
        lambda model: [layer.merge_() for layer in model.eval().modules() if hasattr(layer, "merge_")],
        lambda model: model.mlp.down.register_forward_hook(lambda *_: None),
        lambda model: model.mlp.gate.linear.register_buffer("seen", None) or setattr(model.mlp.gate, "dropout", 0.5),
        lambda model: setattr(model.mlp.up, "backend", "torch"),
    ],
    ids=["frozen", "merged", "hooked", "with a dropout of an adapter", "of two backends"],
)
def test_calls_of_other_kinds_run_the_linears_apart(change: Any) -> None:
    model = applied()
    assert calls(model, tokens(*X)) == 1
    change(model)
    assert calls(model, tokens(*X)) == 0


def test_linears_of_two_dtypes_run_apart() -> None:
    """As T5's wo, which transformers keeps in float32; its forward casts between them."""

    class Mixed(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.dropout(F.gelu(self.gate(x)) * self.up(x))
            if isinstance(self.down.weight, Tensor) and hidden.dtype != self.down.weight.dtype:
                hidden = hidden.to(self.down.weight.dtype)
            return self.down(hidden)

    model = Mixed().float()
    model.down.double()
    lora_fast.apply(model, 4, 1.5)
    assert type(model) is not Mixed
    assert calls(model, tokens(*X).float()) == 0
    assert model(tokens(*X).float()).dtype == torch.float64


def test_the_other_axis_runs_the_linears_apart() -> None:
    assert calls(applied(norm_axis="input"), tokens(*X)) == 0


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies(how: Any) -> None:
    model = applied()
    copied = how(model)
    assert calls(copied, tokens(*X)) == 1
    torch.testing.assert_close(results(copied, tokens(*X)), results(model, tokens(*X)), **EXACT)


def test_compiled_without_a_break() -> None:
    model = applied().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = {name.removeprefix("_orig_mod."): value for name, value in results(compiled, tokens(*X)).items()}
    torch.testing.assert_close(actual, results(model, tokens(*X)), **EXACT)


def test_arguments_are_checked_before_anything_is_changed() -> None:
    model = Model()
    with pytest.raises(ValueError, match="recompute: got 'none', expected 'outputs', 'all' or None"):
        lora_fast.apply(model, 4, 1.0, recompute="none")  # type: ignore[arg-type]
    assert type(model.first) is nn.Linear


def test_taking_off_gives_the_class_back() -> None:
    model = applied()
    assert type(model.mlp) is not Mlp
    assert isinstance(model.mlp, Mlp)
    mlp.take_off(model)
    assert type(model.mlp) is Mlp
    assert calls(model, tokens(*X)) == 0
