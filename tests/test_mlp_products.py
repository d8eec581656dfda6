"""mlp_of_products on every backend: the gated MLP where the products with the weights are someone else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mlp_cases import ACTIVATIONS, FORMS, RECOMPUTE, Mlp, composed, fast, kept_bytes, make_mlp
from support import check_each_alone, run
from torch import Tensor

from lora_fast import functional
from lora_fast.mlp import Product, mlp_of_products
from lora_fast.testing import Case, poisoned_memory

SMALL = Case((2, 5), 24, 17, 3, torch.float64)
each_recompute = pytest.mark.parametrize("recompute", RECOMPUTE)
every_form = pytest.mark.parametrize("form", FORMS)


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ that keeps nothing of x, as the products of quantised layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.to(grad.dtype), None


def of_products(mlp: Mlp, backend: str, activation: str = "silu", **options: Any) -> Callable[..., Tensor]:
    """mlp_of_products as a function of what trains."""

    def product_of(part: dict[str, Any]) -> Product:
        weight, lora_A, lora_B, magnitude = (part.get(n) for n in ("weight", "lora_A", "lora_B", "magnitude"))
        gain = None
        if magnitude is not None:
            factors = (lora_A.detach(), lora_B.detach()) if part["detach_norm"] else (lora_A, lora_B)
            norm = functional.weight_norm(weight, *factors, part["scaling"], backend=backend)
            gain = functional.dora_gain(magnitude, norm)
        given = part["bias"], lora_A, lora_B, part["scaling"], gain
        return Product(lambda x: FrozenProduct.apply(x, weight), *given)

    def function(x: Tensor, **tensors: Tensor | None) -> Tensor:
        parts = {name: product_of(part) for name, part in mlp.parts(tensors).items()}
        linears = parts["gate"], parts.get("up"), parts["down"]
        return mlp_of_products(x, *linears, activation, backend=backend, **options)

    return function


def results(mlp: Mlp, function: Callable[..., Tensor]) -> dict[str, Tensor]:
    tensors = mlp.tensors()
    with poisoned_memory():
        return run(function, tensors, mlp.grad_y, {name for name, tensor in tensors.items() if tensor is not None})


@each_recompute
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_form
def test_is_adapted_mlp(form: str, activation: str, recompute: str, backend64: str) -> None:
    mlp = make_mlp(SMALL, form)
    ours = results(mlp, of_products(mlp, backend64, activation, recompute=recompute))
    theirs = results(mlp, fast(mlp, backend64, activation))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_form
def test_in_other_dtypes_within_some_roundings(form: str, dtype: torch.dtype, backend: str) -> None:
    """Of three products and of sums over tokens, whose terms are of the order of the largest."""
    mlp = make_mlp(Case((33,), 40, 48, 8, dtype), form)
    ours, theirs = results(mlp, of_products(mlp, backend)), results(mlp, fast(mlp, backend))
    for name, value in ours.items():
        other, bound = theirs[name].double(), (16 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
        assert value.dtype == theirs[name].dtype
        assert float((value.double() - other).norm() / other.norm()) < bound, name


@pytest.mark.parametrize("form", ["dora-full", "mixed", "joined"])
def test_each_gradient_alone(form: str, backend: str) -> None:
    mlp = make_mlp(Case((13,), 31, 37, 5), form)
    check_each_alone(of_products(mlp, backend), mlp.tensors(), mlp.grad_y)


@each_recompute
def test_no_tokens(recompute: str, backend: str) -> None:
    mlp = make_mlp(Case((0,), 16, 24, 4), "dora")
    found = results(mlp, of_products(mlp, backend, recompute=recompute))
    assert found["y"].shape == (0, 16)
    assert not any(value.any() for value in found.values())


def test_autocast(backend: str, device: torch.device) -> None:
    mlp = make_mlp(Case((6, 5), 40, 48, 8), "dora")
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in mlp.tensors().items()}

    def forward(function: Callable[..., Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return function(**{**tensors, "x": tensors["x"].bfloat16()})

    y, expected = forward(of_products(mlp, backend)), forward(fast(mlp, backend))
    assert y.dtype == torch.bfloat16
    for one, other in zip(
        torch.autograd.grad(y, list(tensors.values()), mlp.grad_y.bfloat16()),
        torch.autograd.grad(expected, list(tensors.values()), mlp.grad_y.bfloat16()),
        strict=True,
    ):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() / other.norm() < 4 * torch.finfo(torch.bfloat16).eps


WIDE = Case((512,), 32, 48, 4)


@pytest.mark.parametrize("form", ["dora", "lora", "joined"])
def test_what_is_kept_for_backward(form: str, backend: str) -> None:
    """The two base products, down's where its gain trains, and [T, R]; with "all" not these two; a composition more."""
    width, rest = 256, 3 * WIDE.R + 2
    mlp = make_mlp(WIDE, form, width=width)
    element = WIDE.leading[0] * mlp.x.element_size()
    of_down = WIDE.N if FORMS[form]["down"].startswith("dora") else 0
    small = 16 * 1024  # gains and the like
    bounds = {"outputs": (2 * width + of_down + rest) * element + small, "all": (of_down + rest) * element + small}
    for recompute, bound in bounds.items():
        assert kept_bytes(mlp, of_products(mlp, backend, recompute=recompute)) <= bound, recompute
    assert kept_bytes(mlp, composed(mlp, backend)) > bounds["outputs"]


def test_compiles_without_a_break(backend: str) -> None:
    mlp = make_mlp(Case((6, 5), 20, 24, 4), "joined")
    function = of_products(mlp, backend)
    compiled = torch.compile(lambda **tensors: function(**tensors) * 2, fullgraph=True, backend="aot_eager")
    ours, expected = results(mlp, compiled), results(mlp, lambda **tensors: function(**tensors) * 2)
    torch.testing.assert_close(ours, expected)


@each_recompute
def test_twice_backward_is_the_same_to_the_bit(recompute: str, backend: str) -> None:
    """Nothing that is kept is written."""
    mlp = make_mlp(Case((40,), 20, 24, 4), "dora-full")
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in mlp.tensors().items()}
    y = of_products(mlp, backend, recompute=recompute)(**leaves)
    once = torch.autograd.grad(y, list(leaves.values()), mlp.grad_y, retain_graph=True)
    with torch.no_grad():
        y.mul_(0)
    for one, again in zip(once, torch.autograd.grad(y, list(leaves.values()), mlp.grad_y), strict=True):
        assert torch.equal(one, again)
