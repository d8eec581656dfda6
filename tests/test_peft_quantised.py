"""PEFT's layers over quantised linears, accelerated, beside PEFT's own forward and the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft", reason="the peft extra is not installed")

from peft import LoraConfig, get_peft_model
from peft_helpers import drawn, results, same_masks, uses_lora_fast
from peft_quantised_helpers import (
    ALPHA,
    FLOAT32,
    RANK,
    Perceptron,
    assert_close,
    fast_of,
    model_of,
    up,
    x_of,
)
from quantised_helpers import (
    BY_NAME,
    EXACT,
    USUAL,
    Format,
    allocations,
    formats,
    library_weight,
    plain_linear,
    tokens,
)
from support import hold_to_budget

import lora_fast
from lora_fast import bases, reference

__all__ = ["same_masks"]
FORMS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
NF4 = BY_NAME["nf4"]


# ---- the same function


@formats(EXACT)
@FORMS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("compute_dtype", ["activation", "adapter"])
def test_it_is_pefts_function(
    form: Format, dora: bool, bias: bool, compute_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where roundings hide nothing. PEFT's DoRA on int8 fails in its second forward: one is made here."""
    peft = model_of(form, bias=bias, use_dora=dora)
    fast = fast_of(form, bias=bias, use_dora=dora, compute_dtype=compute_dtype)
    assert_close(results(fast, x_of(form)), results(peft, x_of(form)))
    assert_close(results(fast, x_of(form)), results(fast, x_of(form)))  # the norm is a kept one


def formula(layer: Any, x: Tensor, product: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """What the layer computes by the definition, in ``dtype``, but for the base's ``product`` without the bias."""
    name = "default"
    A, B = (getattr(layer, part)[name].weight.to(dtype) for part in ("lora_A", "lora_B"))
    scaling = layer.scaling[name]
    v = product(x) + scaling * (x.to(dtype) @ A.T @ B.T)
    if name in layer.lora_variant:
        weight = library_weight(layer.base_layer).double()
        wide = (getattr(layer, part)[name].weight.detach().double() for part in ("lora_A", "lora_B"))
        norm = reference.weight_norm(weight, *wide, scaling)
        v = (layer.lora_magnitude_vector[name].weight / norm.to(dtype)).to(dtype) * v
    bias = layer.base_layer.bias
    return v if bias is None else v + bias.to(dtype)


@formats(USUAL)
@FORMS
def test_errors_are_the_layers_own(form: Format, dora: bool) -> None:
    """Beside the formula in float64 on the dequantised rows, by the error budget.

    Eager is the formula in plain PyTorch on the layer's own product, and so has the error of that.
    """

    def draw(seed: int) -> Any:
        layer = up(fast_of(form, seed=seed, use_dora=dora)).train()
        base, x = bases.of(layer.base_layer), x_of(form, 12, seed=seed)
        assert base is not None
        wide = library_weight(layer.base_layer).double()
        truth = results(_Function(layer, lambda x: formula(layer, x, lambda x: x @ wide.T, torch.float64)), x.double())
        eager = results(_Function(layer, lambda x: formula(layer, x, base.product, form.dtype)), x)
        return drawn(results(_Function(layer, layer), x), eager, truth)

    hold_to_budget(form.dtype, draw)


class _Function(nn.Module):
    """A function of x and of the layer's parameters."""

    def __init__(self, layer: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, [function]

    def forward(self, x: Tensor) -> Tensor:
        return self.function[0](x)


@formats(USUAL)
def test_a_large_bias_costs_no_digits(form: Format) -> None:
    """PEFT takes it off the finished product, and loses what it covers."""
    small, large = (up(fast_of(form, use_dora=True)) for _ in range(2))
    for layer, size in ((small, 0.0), (large, 100.0)):
        layer.base_layer.bias = nn.Parameter(torch.full_like(layer.base_layer.bias, size), requires_grad=False)
    gradients = [results(layer, x_of(form)) for layer in (small, large)]
    for name in gradients[0]:
        if name != "y":
            assert torch.equal(gradients[0][name], gradients[1][name]), name


@pytest.mark.torchao
@FORMS
def test_integer_products_let_both_of_two_layers_learn(dora: bool) -> None:
    """Under PEFT the first gets no gradient but through the second's adapter, without a word."""
    form = BY_NAME["int8-dynamic"]
    model = model_of(form, use_dora=dora)
    report = lora_fast.accelerate(model)
    assert all("dy W is passed, straight through" in layer.runs for layer in report.layers)
    found = results(model, x_of(form))
    exact = Perceptron(form, True, 0)  # the same function of unrounded activations
    for name in ("up", "down"):
        weight = library_weight(getattr(exact, name)).double()
        plain = nn.Linear(weight.shape[1], weight.shape[0])
        plain.weight, plain.bias = nn.Parameter(weight, False), nn.Parameter(getattr(exact, name).bias.double(), False)
        setattr(exact, name, plain)
    truth = get_peft_model(
        exact.double(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["up", "down"], use_dora=dora)
    )
    truth.load_state_dict(adapters_of(model), strict=False)
    wanted = results(truth, x_of(form).double())
    for name in (name for name in wanted if "lora" in name or name == "x"):
        error = (found[name].double() - wanted[name]).norm() / wanted[name].norm()
        assert error < 0.05, name  # int8 activations: 1 to 2 % each time


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if "lora_" in name}


# ---- modes, adapters, hooks


@formats(EXACT)
@FORMS
def test_dropout_has_pefts_form(form: Format, dora: bool, same_masks: Any) -> None:
    peft = model_of(form, use_dora=dora, lora_dropout=0.4).train()
    fast = fast_of(form, use_dora=dora, lora_dropout=0.4).train()
    assert_close(results(fast, x_of(form), same_masks), results(peft, x_of(form), same_masks))


@formats(EXACT)
@FORMS
def test_several_adapters_nest_as_pefts_do(form: Format, dora: bool) -> None:
    if form.library == "bitsandbytes" and form.name.startswith("int8") and dora:
        names = ("p",)  # PEFT's DoRA on int8 fails where it reads the weight a second time
    else:
        names = ("p", "q")
    peft, fast = model_of(form, names, use_dora=dora), fast_of(form, names, use_dora=dora)
    for model in (peft, fast):
        model.base_model.set_adapter(list(names))
    assert_close(results(fast, x_of(form)), results(peft, x_of(form)))


@formats(EXACT)
@FORMS
def test_mixed_batches(form: Format, dora: bool) -> None:
    """Each sample as if it came alone; PEFT refuses DoRA in them, or computes it as LoRA."""
    fast = fast_of(form, ("p", "q"), use_dora=dora).eval()
    x, names = x_of(form, 5), ["p", "__base__", "q", "p", "q"]
    with torch.no_grad():
        mixed = fast(x, adapter_names=names)
        for sample, name in enumerate(names):
            if name == "__base__":
                with fast.disable_adapter():
                    alone = fast(x)
            else:
                fast.set_adapter(name)
                alone = fast(x)
            torch.testing.assert_close(mixed[sample], alone[sample], **FLOAT32)


@formats(USUAL)
@FORMS
def test_disabled_adapters_leave_the_base(form: Format, dora: bool) -> None:
    fast = fast_of(form, use_dora=dora).eval()
    with torch.no_grad(), fast.disable_adapter():
        found = fast(x_of(form))
    plain = Perceptron(form, True, 0).eval()
    for layer in (plain.up, plain.down):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        assert torch.equal(found, plain(x_of(form)))


@formats(EXACT)
@FORMS
def test_hooks_on_the_base_are_called(form: Format, dora: bool) -> None:
    fast, beside = fast_of(form, use_dora=dora), fast_of(form, use_dora=dora)
    seen: list[Tensor] = []
    handle = up(fast).base_layer.register_forward_hook(lambda module, given, y: seen.append(y) or 1.5 * y)
    wanted, found = results(beside, x_of(form)), results(fast, x_of(form))
    assert len(seen) == 1
    assert not torch.allclose(found["y"], wanted["y"], rtol=1e-3)
    peft = model_of(form, use_dora=dora)
    up(peft).base_layer.register_forward_hook(lambda module, given, y: 1.5 * y)
    assert_close(results(fast, x_of(form)), results(peft, x_of(form)))
    handle.remove()
    assert_close(results(fast, x_of(form)), wanted)


@formats(USUAL)
@FORMS
def test_evaluation_changes_nothing_for_training(form: Format, dora: bool) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes packs its weight in evaluation, and PEFT trains on without a gradient."""
    fast = fast_of(form, use_dora=dora)
    before = results(fast.train(), x_of(form))
    saved = {name: value.clone() for name, value in base_state(fast).items()}
    fast.eval()
    with torch.no_grad():
        evaluated = fast(x_of(form))
    with torch.inference_mode():
        assert torch.equal(fast(x_of(form)), evaluated)
    assert (evaluated - before["y"]).norm() < 0.05 * before["y"].norm()
    after = results(fast.train(), x_of(form))
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    for name, value in base_state(fast).items():
        assert torch.equal(value, saved[name]), name


def base_state(model: Any) -> dict[str, Tensor]:
    """The tensors that the base's weight is made of."""
    base = bases.of(up(model).base_layer)
    assert base is not None
    return {str(i): tensor.view(torch.uint8) if tensor.dim() else tensor for i, tensor in enumerate(base.content())}


@pytest.mark.bitsandbytes
@FORMS
def test_a_weight_that_was_packed_before(dora: bool) -> None:
    """PEFT's evaluation has packed it, by bitsandbytes' function; acceleration undoes that."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = model_of(NF4, use_dora=dora)
    layer = up(model).base_layer
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    lora_fast.accelerate(model)
    found, wanted = results(model, x_of(NF4)), results(fast_of(NF4, use_dora=dora), x_of(NF4))
    for name, value in wanted.items():  # the statistics have been rounded to bfloat16
        assert (found[name] - value).norm() < 0.02 * value.norm(), name


# ---- memory


@formats(USUAL)
@FORMS
def test_a_step_allocates_W_as_often_as_the_layer_alone(form: Format, dora: bool) -> None:
    """Of bytes as many as W in 16 bits; PEFT's DoRA is seen."""
    N = K = 512
    x = tokens(8, K, dtype=form.dtype)

    def one(adapted: bool, fast: bool = True) -> Callable[[], None]:
        layer: Any = nn.Sequential(form.linear(N, K))
        if adapted:
            kind = type(layer[0]).__name__
            layer.is_loaded_in_4bit, layer.is_loaded_in_8bit = kind == "Linear4bit", kind == "Linear8bitLt"
            layer = get_peft_model(layer, LoraConfig(r=RANK, target_modules=["0"], use_dora=dora))
            if fast:
                lora_fast.accelerate(layer)

        def step() -> None:
            y = layer(x.clone().requires_grad_())
            if y.requires_grad:
                y.float().square().sum().backward()

        return step

    of_W = 2 * N * K
    alone = allocations(one(adapted=False), of_W)
    ours = allocations(one(adapted=True), of_W)
    # the layer of integer products makes nothing for a gradient that it does not pass
    assert ours <= alone + (1 if not form.passes_gradient else 0)
    if dora and form.name != "int8":  # on which PEFT's DoRA fails
        assert allocations(one(adapted=True, fast=False), of_W) > ours + 2


# ---- what is left alone


@pytest.mark.bitsandbytes
def test_refused_layers_run_pefts_forward_with_the_reason() -> None:
    base = nn.Sequential(NF4.quantise(plain_linear(64, 96)))
    base.is_loaded_in_4bit = True
    model = get_peft_model(base, LoraConfig(target_modules=["0"]))
    report = lora_fast.accelerate(model)
    assert report.accelerated == []
    assert "bitsandbytes computes wrongly on a CPU" in report.layers[0].runs
    assert uses_lora_fast(model, tokens(3, 96)) == set()


@pytest.mark.bitsandbytes
def test_bitsandbytes_layers_under_pefts_plain_one() -> None:
    """What PEFT makes where the model does not say that it was loaded quantised."""
    model = get_peft_model(nn.Sequential(NF4.linear(64, 128)), LoraConfig(target_modules=["0"], use_dora=True))
    assert type(model.base_model.model[0]).__name__ == "Linear"
    report = lora_fast.accelerate(model)
    assert "bitsandbytes' Linear4bit" in report.layers[0].runs
    assert uses_lora_fast(model, tokens(3, 128))
