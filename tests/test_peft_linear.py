"""PEFT's linear layers run by lora_fast: the same function as PEFT's own, in float64 and within the budget below."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="the peft extra is not installed")

from peft import LoraConfig
from peft_helpers import (
    EXACT,
    accelerated,
    adapted,
    assert_same,
    drawn,
    move,
    perceptron,
    results,
    same_masks,
    tokens,
    uses_lora_fast,
)
from support import Draw, hold_to_budget
from transformers.pytorch_utils import Conv1D

import lora_fast
from lora_fast import testing

__all__ = ["same_masks"]
FORMS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


class Conv1Ds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(20, 12)
        self.down = Conv1D(9, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def conv1ds(**config: Any) -> Any:
    return adapted(Conv1Ds(), torch.float64, target_modules=["up", "down"], fan_in_fan_out=True, **config)


@FORMS
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (0, 12)], ids=str)
def test_output_and_gradients(dora: bool, train: bool, shape: tuple[int, ...]) -> None:
    peft = perceptron(use_dora=dora).train(train)
    fast = accelerated(peft)
    assert_same(fast, peft, tokens(*shape))
    used = uses_lora_fast(fast, tokens(*shape))
    assert used == {"dora_linear_fwd" if dora else "lora_linear_fwd"}
    assert uses_lora_fast(peft, tokens(*shape)) == set()


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"up": 2}, "alpha_pattern": {"down": 3}},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["head"]},
        {"r": 30},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
@FORMS
def test_configurations(dora: bool, config: dict) -> None:
    peft = perceptron(use_dora=dora, **config)
    fast = accelerated(peft)
    assert_same(fast, peft, tokens(5, 12))
    assert ("dora_linear_fwd" if dora else "lora_linear_fwd") in uses_lora_fast(fast, tokens(5, 12))


@pytest.mark.parametrize("bias", [False, True])
def test_bias_of_lora_B(bias: bool) -> None:
    """PEFT refuses it for DoRA."""
    base = nn.Sequential(nn.Linear(12, 9, bias=bias))
    peft = adapted(base, torch.float64, adapters=("p", "q"), target_modules=["0"], lora_bias=True)
    peft.base_model.set_adapter(["p", "q"])
    fast = accelerated(peft)
    assert_same(fast, peft, tokens(5, 12))
    assert "lora_linear_fwd" in uses_lora_fast(fast, tokens(5, 12))


@FORMS
@pytest.mark.parametrize("first", ["change", "accelerate"])
def test_bias_of_lora_A_is_left_to_peft(dora: bool, first: str) -> None:
    peft = perceptron(use_dora=dora)
    fast = accelerated(peft)
    for model in (peft, fast):
        lora_A = model.base_model.model.up.lora_A["default"]
        lora_A.bias = nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64))
    if first == "change":
        fast = accelerated(peft)
    assert_same(fast, peft, tokens(5, 12))
    assert "its lora_A has a bias" in lora_fast.accelerate(fast).layers[0].runs


@FORMS
def test_conv1d_of_transformers(dora: bool) -> None:
    peft = conv1ds(use_dora=dora)
    fast = accelerated(peft)
    assert_same(fast, peft, tokens(2, 5, 12))
    assert ("dora_linear_fwd" if dora else "lora_linear_fwd") in uses_lora_fast(fast, tokens(5, 12))


@FORMS
@pytest.mark.parametrize("make", [perceptron, conv1ds])
def test_dropout_with_the_same_mask(dora: bool, make: Callable[..., Any], same_masks: Any) -> None:
    peft = make(use_dora=dora, lora_dropout=0.4).train()
    fast = accelerated(peft)
    assert_same(fast, peft, tokens(2, 4, 12), around=same_masks)
    assert not torch.equal(fast(tokens(4, 12)), fast(tokens(4, 12)))
    assert_same(fast.eval(), peft.eval(), tokens(4, 12))


@FORMS
def test_everything_may_be_dropped(dora: bool, same_masks: Any) -> None:
    peft = perceptron(use_dora=dora, lora_dropout=0.5).train()
    fast = accelerated(peft)
    for model in (peft, fast):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 1.0
    y = fast(tokens(4, 12))
    assert y.isfinite().all()


def several(kinds: str, **config: Any) -> Any:
    """Adapters p, q, … of kinds "l" (LoRA) and "d" (DoRA), all active, in this order."""
    model = perceptron(adapters=("p",), use_dora=kinds[0] == "d", **config)
    for name, kind in zip("qst", kinds[1:], strict=False):
        extra = LoraConfig(r=3, lora_alpha=5, use_dora=kind == "d", target_modules=["up", "down"], **config)
        model.add_adapter(name, extra)
    move(model.double(), seed=5)
    model.base_model.set_adapter(list("pqst"[: len(kinds)]))
    return model


@pytest.mark.parametrize("kinds", ["ll", "dd", "ld", "dl", "dldd"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_active_adapters_nest(kinds: str, dropout: float, same_masks: Any) -> None:
    peft = several(kinds, lora_dropout=dropout).train()
    fast = accelerated(peft)
    assert_same(fast, peft, tokens(5, 12), around=same_masks)
    assert "lora_compose_fwd" in uses_lora_fast(fast, tokens(5, 12))


@pytest.mark.parametrize("kinds", ["d", "dd", "ld"])
@pytest.mark.parametrize("hooked", [False, True])
def test_dropouts_that_alone_are_in_evaluation(kinds: str, hooked: bool) -> None:
    """Nothing is dropped, and PEFT's DoRA still takes x Wᵀ and not the result so far."""
    peft = several(kinds, lora_dropout=0.4).train()
    for module in peft.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
        elif isinstance(module, nn.Linear) and module.in_features == 12 and module.out_features == 20 and hooked:
            module.register_forward_hook(lambda _module, _args, y: y * 2)
    assert_same(accelerated(peft), peft, tokens(5, 12))


@pytest.mark.parametrize("kinds", ["ll", "dd", "ld"])
@pytest.mark.parametrize("hooked", [False, True])
def test_mixed_batches(kinds: str, hooked: bool) -> None:
    """PEFT refuses DoRA here: each sample must be what PEFT gives for it with its adapter alone."""
    peft = several(kinds).eval()
    fast = accelerated(peft)
    if hooked:
        for layer in (fast.base_model.model.up, fast.base_model.model.down):
            layer.base_layer.register_forward_hook(lambda *_: None)
    names, x = ["q", "__base__", "p", "q", "p"], tokens(5, 3, 12)
    wanted = []
    for sample, name in zip(x, names, strict=True):
        if name == "__base__":
            with peft.disable_adapter():
                wanted.append(peft(sample[None]))
        else:
            peft.base_model.set_adapter(name)
            wanted.append(peft(sample[None]))
    y = fast(x, adapter_names=names)
    torch.testing.assert_close(y, torch.cat(wanted), **EXACT)
    y.sum().backward()
    for unknown in (["p", "zzz", "p", "p", "p"], ["p"]):
        with pytest.raises(ValueError, match="adapter"):
            fast(x, adapter_names=unknown)


def test_mixed_batch_of_a_merged_model_is_refused() -> None:
    fast = accelerated(several("dd").eval())
    fast.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        fast(tokens(2, 12), adapter_names=["p", "q"])


@FORMS
def test_disabled_merged_and_unmerged(dora: bool) -> None:
    peft = perceptron(use_dora=dora).eval()
    fast = accelerated(peft)
    x = tokens(5, 12)
    with fast.disable_adapter(), peft.disable_adapter():
        torch.testing.assert_close(fast(x), peft(x), rtol=0, atol=0)
        assert uses_lora_fast(fast, x) == set()
    before = fast(x)
    for safe in (False, True):
        fast.merge_adapter(safe_merge=safe)
        peft.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(fast.state_dict(), peft.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(fast(x), before, **EXACT)
        with fast.disable_adapter(), peft.disable_adapter():  # unmerges
            torch.testing.assert_close(fast(x), peft(x), rtol=0, atol=0)
        torch.testing.assert_close(fast(x), before, **EXACT)
    assert_same(fast, peft, x)
    torch.testing.assert_close(fast.merge_and_unload(safe_merge=True)(x), before, **EXACT)


@FORMS
def test_adapters_added_deleted_and_switched_after_acceleration(dora: bool) -> None:
    peft = perceptron(use_dora=dora)
    fast = accelerated(peft)
    x = tokens(5, 12)
    for model in (peft, fast):
        torch.manual_seed(11)
        model.add_adapter("other", LoraConfig(r=2, use_dora=True, target_modules=["up"]))
        move(model.double(), seed=3)
    assert_same(fast, peft, x)
    for model in (peft, fast):
        model.set_adapter("other")
    assert_same(fast, peft, x)
    assert "dora_linear_fwd" in uses_lora_fast(fast, x)
    for model in (peft, fast):
        model.delete_adapter("default")
    assert_same(fast, peft, x)
    for model in (peft, fast):
        model.base_model.model.up.set_scale("other", 0.5)
    assert_same(fast, peft, x)
    torch.testing.assert_close(fast.unload()(x), peft.unload()(x), rtol=0, atol=0)


@FORMS
def test_layers_of_adapters_added_later_are_taken_by_a_second_call(dora: bool) -> None:
    fast = accelerated(adapted(nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 9)), torch.float64, target_modules=["0"]))
    fast.add_adapter("other", LoraConfig(r=2, use_dora=dora, target_modules=["0", "1"]))
    assert lora_fast.accelerate(fast).left_alone == []
    fast.set_adapter("other")
    peft = copy.deepcopy(fast)
    lora_fast.restore(peft)
    assert_same(fast, peft, tokens(3, 12))


def wide_function(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_adapters", [False, True])
@pytest.mark.parametrize("compute_dtype", ["activation", "adapter"])
def test_within_the_budget(dora: bool, dtype: torch.dtype, wide_adapters: bool, compute_dtype: str) -> None:
    """The truth is PEFT in float64; the yardstick PEFT in the activation's dtype, or as it is for "adapter"."""
    config = {"target_modules": ["0"], "use_dora": dora, "r": 8, "autocast_adapter_dtype": wide_adapters}

    def draw(seed: int) -> Draw:
        peft = adapted(nn.Sequential(nn.Linear(96, 64)), dtype, seed=seed, **config)
        fast = accelerated(peft, compute_dtype=compute_dtype)
        yardstick = copy.deepcopy(peft)
        if compute_dtype == "activation":
            yardstick.to(dtype)
        x = tokens(64, 96, dtype=dtype, seed=seed)
        actual = results(fast, x)
        for name, value in actual.items():
            parameter = dict(fast.named_parameters()).get(name)
            assert value.dtype == (dtype if parameter is None else parameter.dtype)
        return drawn(actual, results(yardstick, x), results(wide_function(peft), x.double()))

    hold_to_budget(dtype, draw)


@FORMS
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast(dora: bool, base_dtype: torch.dtype) -> None:
    config = {"target_modules": ["0"], "use_dora": dora, "r": 8}

    def around() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    def draw(seed: int) -> Draw:
        peft = adapted(nn.Sequential(nn.Linear(96, 64)), base_dtype, seed=seed, **config)
        x = tokens(64, 96, dtype=torch.float32, seed=seed)
        actual, eager = results(accelerated(peft), x, around), results(peft, x, around)
        assert actual["y"].dtype == torch.bfloat16
        assert [value.dtype for value in actual.values()] == [eager[name].dtype for name in actual]
        return drawn(actual, eager, results(wide_function(peft), x.double()))

    hold_to_budget(torch.bfloat16, draw)


def test_a_zero_row_stays_finite() -> None:
    peft = perceptron(use_dora=True)
    with torch.no_grad():
        peft.base_model.model.up.base_layer.weight[3] = 0
        peft.base_model.model.up.lora_B["default"].weight[3] = 0
    assert all(value.isfinite().all() for value in results(accelerated(peft), tokens(4, 12)).values())


def test_no_wide_copy_of_x_or_w() -> None:
    size = 1024
    peft = adapted(nn.Sequential(nn.Linear(size, size)), torch.bfloat16, target_modules=["0"], use_dora=True)
    fast = accelerated(peft)
    x = tokens(16, size, dtype=torch.bfloat16).requires_grad_()
    saved: list[torch.Tensor] = []

    def step() -> None:
        fast(x).sum().backward()

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        step()
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved if tensor.numel() >= x.numel())
    assert testing.peak_bytes(step) < size * size * 2
