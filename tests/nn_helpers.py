"""Layers for the tests of lora_fast.nn, and what they must compute according to the reference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lora_fast import LinearWithDoRA, LinearWithLoRA, reference

KINDS = ("lora", "dora-output", "dora-input")
DORA_KINDS = KINDS[1:]
IN, OUT, RANK, ALPHA = 12, 7, 4, 1.5


def make_layer(
    kind: str,
    *,
    n_in: int = IN,
    n_out: int = OUT,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    fresh: bool = False,
    **options: Any,
) -> Any:
    """An adapted layer that has been trained a while, as it were: lora_B and the magnitude have moved."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / n_in**0.5)
    if kind == "lora":
        layer: nn.Module = LinearWithLoRA(linear, RANK, ALPHA, **options)
    else:
        layer = LinearWithDoRA(linear, RANK, ALPHA, norm_axis=kind.removeprefix("dora-"), **options)
    if not fresh:
        move_adapter(layer, generator)
    return layer


@torch.no_grad()
def move_adapter(layer: Any, generator: torch.Generator | None = None) -> None:
    layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator) / layer.in_features**0.5)
    layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) / layer.rank**0.5)
    if hasattr(layer, "magnitude"):
        layer.magnitude.mul_(0.5 + torch.rand(layer.magnitude.shape, generator=generator))


def expected(layer: Any, x: Tensor, dropout_mask: Tensor | None = None, **parameters: Tensor) -> Tensor:
    """The reference's output for the layer's parameters (or for ``parameters``), differentiable in them."""
    given = {**dict(layer.named_parameters()), **parameters}
    common = (x, given["linear.weight"], given.get("linear.bias"), given["lora_A"], given["lora_B"])
    if not hasattr(layer, "magnitude"):
        return reference.lora_linear(*common, layer.alpha, dropout_mask=dropout_mask)
    return reference.dora_linear(
        *common,
        given["magnitude"],
        layer.alpha,
        axis=layer.norm_axis,
        detach_norm=layer.detach_norm,
        dropout_mask=dropout_mask,
    )


def adapter_names(layer: Any) -> list[str]:
    return [name for name, parameter in layer.named_parameters() if parameter.requires_grad]


def gradients(output: Tensor, layer: Any, *others: Tensor) -> list[Tensor]:
    """d(Σ output ⊙ c) / d(adapter, others), with fixed c so that all elements count differently."""
    c = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)
    wanted = [dict(layer.named_parameters())[name] for name in adapter_names(layer)]
    return list(torch.autograd.grad((output * c).sum(), [*wanted, *others]))


def assert_same_function(layer: Any, x: Tensor, **tolerances: float) -> None:
    """Output and all gradients equal the reference's."""
    x = x.clone().requires_grad_()
    actual, wanted = layer(x), expected(layer, x)
    torch.testing.assert_close(actual, wanted, **tolerances)
    torch.testing.assert_close(gradients(actual, layer, x), gradients(wanted, layer, x), **tolerances)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: copy.deepcopy(parameter.detach()) for name, parameter in module.named_parameters()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = dict(module.named_parameters())
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), name
