"""LinearWithLoRA, LinearWithDoRA and apply on quantised linears."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantised_helpers import BY_NAME, EXACT, FORMATS, USUAL, Format, formats, library_weight, plain_linear, tokens
from torch import Tensor, nn

import lora_fast
from lora_fast import LinearWithDoRA, LinearWithLoRA, reference
from lora_fast.testing import scaled_dropout_mask

KINDS = pytest.mark.parametrize("kind", ["lora", "dora-output", "dora-input", "dora-output-full", "dora-input-full"])
RANK, ALPHA = 4, 1.5
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}
NF4 = BY_NAME["nf4"]


def layer_of(form: Format, kind: str, *, bias: bool = True, **options: Any) -> Any:
    """An adapted layer that has been trained a while, as it were."""
    linear = form.linear(96, 128, bias=bias)
    if kind == "lora":
        layer: Any = LinearWithLoRA(linear, RANK, ALPHA, **options)
    else:
        _, axis, *full = kind.split("-")
        layer = LinearWithDoRA(linear, RANK, ALPHA, norm_axis=axis, detach_norm=not full, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(96, RANK, generator=generator) * 0.2)
        if hasattr(layer, "magnitude"):
            layer.magnitude.mul_(0.5 + torch.rand(layer.magnitude.shape, generator=generator))
    return layer


def wanted_of(layer: Any, x: Tensor, kind: str, dropout_mask: Tensor | None = None) -> Tensor:
    """The reference on the dequantised W, differentiable in the layer's parameters."""
    weight, bias = library_weight(layer.linear).double(), layer.linear.bias
    bias = None if bias is None else bias.double()
    factors = x, weight, bias, layer.lora_A.double(), layer.lora_B.double()
    if kind == "lora":
        return reference.lora_linear(*factors, ALPHA, dropout_mask=dropout_mask)
    _, axis, *full = kind.split("-")
    magnitude = layer.magnitude.double()
    return reference.dora_linear(*factors, magnitude, ALPHA, axis=axis, detach_norm=not full, dropout_mask=dropout_mask)


def results(layer: Any, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    x.grad = None
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype))
    found = {name: p.grad.double() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach().double(), "x": x.grad.double(), **found}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@formats(EXACT)
@KINDS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_in_float32_it_is_the_reference(form: Format, kind: str, bias: bool) -> None:
    layer, x = layer_of(form, kind, bias=bias), tokens(2, 5, 128, dtype=torch.float32).requires_grad_()
    for _ in range(2):  # the norm is computed in the first and kept in the second
        found = results(layer, layer(x), x)
        wide = x.detach().double().requires_grad_()
        assert_close(found, results(layer, wanted_of(layer, wide, kind), wide), 2e-5)


@formats(FORMATS)
@KINDS
def test_in_its_own_dtype(form: Format, kind: str) -> None:
    layer, x = layer_of(form, kind), tokens(7, 128, dtype=form.dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == form.dtype
    wide = x.detach().double().requires_grad_()
    assert_close(results(layer, y, x), results(layer, wanted_of(layer, wide, kind), wide), 0.03)


@formats(EXACT)
@KINDS
def test_dropout(form: Format, kind: str) -> None:
    layer, x = layer_of(form, kind, dropout=0.4).train(), tokens(6, 128, dtype=torch.float32).requires_grad_()
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    mask = scaled_dropout_mask(lora_fast.functional.draw_seed("cpu"), (6, 128), 0.4)
    wide = x.detach().double().requires_grad_()
    assert_close(results(layer, y, x), results(layer, wanted_of(layer, wide, kind, mask.double()), wide), 2e-5)


@formats(USUAL)
def test_a_fresh_layer_is_the_linear(form: Format) -> None:
    linear = form.linear().train()
    x = tokens(5, 128, dtype=form.dtype)
    wanted = linear(x)
    for layer in (LinearWithLoRA(linear, RANK, ALPHA), LinearWithDoRA(form.linear(), RANK, ALPHA)):
        torch.testing.assert_close(layer.train()(x), wanted, rtol=0.02, atol=0.02)
    assert not any(parameter.requires_grad for parameter in linear.parameters())


@formats(USUAL)
@pytest.mark.parametrize("kind", ["lora", "dora-output"])
def test_autocast(form: Format, kind: str) -> None:
    layer, x = layer_of(form, kind), tokens(5, 128, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    wanted = wanted_of(layer, x.double(), kind)
    assert (y.double() - wanted).norm() < 0.03 * wanted.norm()


@formats(USUAL)
@KINDS
def test_compiled_without_a_break(form: Format, kind: str) -> None:
    layer, x = layer_of(form, kind), tokens(5, 128, dtype=form.dtype).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = results(layer, layer(x), x)
    for _ in range(2):
        assert_close(results(layer, compiled(x), x), wanted, 0.01)


@formats(tuple(form for form in USUAL if form.library != "torchao"))
@pytest.mark.parametrize("kind", ["lora", "dora-output", "dora-input"])
def test_state_dicts_go_round(form: Format, kind: str) -> None:
    """Into a layer of another base: bitsandbytes' layer alone would keep its statistics. torchao's tensors cannot."""
    layer = layer_of(form, kind)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.lora_A.add_(1.0)
    linear = form.quantise(plain_linear(96, 128, seed=5, dtype=form.dtype))
    other.linear = linear
    x = tokens(5, 128, dtype=form.dtype)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(library_weight(other.linear), library_weight(layer.linear))


@pytest.mark.bitsandbytes
def test_another_quantisation_is_not_loaded() -> None:
    layer, other = layer_of(NF4, "lora"), layer_of(BY_NAME["fp4"], "lora")
    before = {name: value.clone() for name, value in layer.named_parameters()}
    statistics = layer.linear.weight.quant_state.absmax.clone()
    with pytest.raises(RuntimeError, match="its quant_type is fp4, expected nf4"):
        layer.load_state_dict(other.state_dict())
    for name, value in layer.named_parameters():
        assert torch.equal(value, before[name]), name
    assert torch.equal(layer.linear.weight.quant_state.absmax, statistics)


@formats(USUAL)
@pytest.mark.parametrize("kind", ["lora", "dora-output", "dora-input"])
def test_merged_is_a_plain_linear(form: Format, kind: str) -> None:
    layer, x = layer_of(form, kind), tokens(5, 128, dtype=torch.float32)
    merged = layer.merged()
    assert type(merged) is nn.Linear
    assert type(merged.weight) is nn.Parameter
    wanted = wanted_of(layer, x.double(), kind)
    assert (merged.float()(x).double() - wanted).norm() < 0.01 * wanted.norm()
    with pytest.raises(RuntimeError, match=r"merge_: the linear is .*; use merged\(\)"):
        layer.merge_()
    assert not layer.is_merged


@formats(USUAL)
def test_frozen_norms_and_modes(form: Format) -> None:
    layer, x = layer_of(form, "dora-output").eval(), tokens(5, 128, dtype=form.dtype)
    with torch.no_grad():
        wanted = layer(x)
        lora_fast.freeze_norms(layer)
        assert torch.equal(layer(x), wanted)
        lora_fast.unfreeze_norms(layer)
        layer.lora_B.mul_(2)
        assert not torch.equal(layer(x), wanted)
    assert layer.train()(x).requires_grad


@formats(USUAL)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_apply_takes_the_model(form: Format, dora: bool) -> None:
    model = nn.Sequential(form.linear(256, 128), nn.Tanh(), form.linear(128, 256), plain_linear(5, 128))
    lora_fast.apply(model, RANK, ALPHA, dora=dora)
    kinds = [type(module).__name__ for module in model]
    adapted = "LinearWithDoRA" if dora else "LinearWithLoRA"
    assert kinds == [adapted, "Tanh", adapted, adapted]
    trained = list(lora_fast.trainable_parameters(model))
    assert len(trained) == 3 * (3 if dora else 2)
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(tokens(16, 128)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.bitsandbytes
def test_refusals_come_before_anything_is_changed() -> None:
    bad = NF4.quantise(plain_linear(64, 96))
    with pytest.raises(TypeError, match="linear: bitsandbytes computes wrongly on a CPU"):
        LinearWithDoRA(bad, RANK, ALPHA)
    model = nn.Sequential(plain_linear(96, 64), bad)
    with pytest.raises(TypeError, match="1: bitsandbytes computes wrongly on a CPU"):
        lora_fast.apply(model, RANK, ALPHA)
    assert type(model[0]) is nn.Linear
    hooked = NF4.linear()
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="it has hooks"):
        LinearWithLoRA(hooked, RANK, ALPHA)
    layer = layer_of(NF4, "lora")
    layer.linear.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="put on after it was adapted"):
        layer(tokens(3, 128))


@formats(USUAL)
def test_its_text_names_the_linear(form: Format) -> None:
    text = repr(layer_of(form, "dora-output"))
    assert "rank=4, alpha=1.5" in text
    assert type(form.linear()).__name__ in text
