"""Gated MLPs over quantised linears, of which only the products are known, as one: PEFT's models and applied ones."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from peft_quantised_helpers import assert_close, move_a_little
from quantised_helpers import BY_NAME, EXACT, USUAL, Format, formats, tokens
from torch import Tensor, nn

import lora_fast
from lora_fast import functional

pytest.importorskip("peft", reason="the peft extra is not installed")

from peft import LoraConfig, get_peft_model
from peft_helpers import results

WIDTH, HIDDEN = 128, 256
X = (3, 20)  # more tokens than those for which the linears run apart
FORMS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


class Mlp(nn.Module):
    def __init__(self, form: Format) -> None:
        super().__init__()
        self.gate = form.linear(HIDDEN, WIDTH, bias=True, seed=0)
        self.up = form.linear(HIDDEN, WIDTH, bias=False, seed=1)
        self.down = form.linear(WIDTH, HIDDEN, bias=True, seed=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self, form: Format) -> None:
        super().__init__()
        self.mlp = Mlp(form)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def peft_model(form: Format, dora: bool, targets: list[str] | None = None) -> Any:
    base = Model(form)
    kind = type(base.mlp.up).__name__
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = kind == "Linear4bit", kind == "Linear8bitLt"
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=12, target_modules=targets or ["gate", "up", "down"], use_dora=dora)
    model = get_peft_model(base, config)
    move_a_little(model)
    return model.train()


def calls(model: nn.Module, x: Tensor) -> int:
    with mock.patch.object(functional, "mlp_of_products", wraps=functional.mlp_of_products) as function:
        model(x)
    return function.call_count


@formats(EXACT)
@FORMS
@pytest.mark.parametrize("recompute", ["outputs", "all"])
def test_it_is_pefts_function(form: Format, dora: bool, recompute: Any) -> None:
    """In float32, where roundings hide nothing. PEFT's DoRA on int8 fails in its second forward: one is made here."""
    peft, fast = peft_model(form, dora), peft_model(form, dora)
    (report,) = lora_fast.accelerate(fast, recompute=recompute).mlps
    assert report.as_one
    x = tokens(*X, WIDTH, dtype=form.dtype)
    wanted = results(peft, x)
    assert calls(fast, x) == 1
    assert_close(results(fast, x), wanted, rtol=1e-4, atol=1e-4)


@formats(USUAL)
@FORMS
def test_it_is_the_linears_one_after_the_other(form: Format, dora: bool) -> None:
    """In 16 bits, where each output is rounded apart and not as one."""
    fast, apart = peft_model(form, dora), peft_model(form, dora)
    lora_fast.accelerate(fast)
    lora_fast.accelerate(apart, recompute=None)
    x = tokens(*X, WIDTH, dtype=form.dtype)
    assert (calls(fast, x), calls(apart, x)) == (1, 0)
    assert_close(results(fast, x), results(apart, x), rtol=0, atol=0.06)


@formats((BY_NAME["nf4-float32"], BY_NAME["int8-weight-only-float32"]))
def test_an_mlp_of_which_one_linear_is_adapted(form: Format) -> None:
    for targets in (["gate"], ["down"]):
        peft, fast = peft_model(form, True, targets), peft_model(form, True, targets)
        lora_fast.accelerate(fast)
        x = tokens(*X, WIDTH, dtype=form.dtype)
        assert calls(fast, x) == 1
        assert_close(results(fast, x), results(peft, x), rtol=1e-4, atol=1e-4)


@formats(EXACT)
@pytest.mark.parametrize("options", [{}, {"detach_norm": False}, {"dora": False}], ids=str)
def test_applied_models(form: Format, options: dict[str, Any]) -> None:
    found = []
    for recompute in ("outputs", "all", None):
        torch.manual_seed(0)
        model = lora_fast.apply(Model(form), 8, 1.5, recompute=recompute, **options)
        move_a_little(model)
        x = tokens(*X, WIDTH, dtype=form.dtype)
        assert calls(model, x) == (recompute is not None)
        found.append(results(model, x))
    assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
    assert_close(found[1], found[2], rtol=1e-4, atol=1e-4)


@formats((BY_NAME["nf4-float32"],))
@pytest.mark.parametrize("recompute", ["outputs", "all"])
def test_an_adapter_that_changes_before_backward_is_seen(form: Format, recompute: Any) -> None:
    """As by autograd where the linears run apart."""
    model = peft_model(form, False)
    lora_fast.accelerate(model, recompute=recompute)
    y = model(tokens(*X, WIDTH, dtype=form.dtype))
    with torch.no_grad():
        model.base_model.model.mlp.gate.lora_B["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def kept(model: nn.Module, x: Tensor) -> int:
    """Elements of the activations that one forward keeps for backward, each once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel() and tensor.dim() and tensor.shape[0] in (x.shape[0], T):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    T = x.shape[0] * x.shape[1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(sizes.values())


@formats(USUAL)
def test_what_is_kept(form: Format) -> None:
    """The products of gate and up, down's, and h, of 8 for each linear, beside x; and much less than by the linears."""
    x = tokens(3, 37, WIDTH, dtype=form.dtype).requires_grad_()
    elements = {}
    for recompute in ("outputs", "all", None):
        model = peft_model(form, True)
        lora_fast.accelerate(model, recompute=recompute)
        model(x).sum().backward()
        elements[recompute] = kept(model, x) / (3 * 37)
    most = 2 * HIDDEN + 2 * WIDTH + 3 * 8 + 8
    most += 2 * WIDTH if form.rounds_x else 0  # x in the library's own form
    assert elements["outputs"] <= most
    assert elements["all"] <= elements["outputs"] - 2 * HIDDEN + 16
    assert elements[None] > 1.8 * elements["outputs"]
