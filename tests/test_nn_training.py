"""The modules in the ways people train: autocast, checkpointing, accumulation, scaling, function transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import (
    ALPHA,
    IN,
    KINDS,
    OUT,
    adapter_names,
    assert_same_function,
    expected,
    gradients,
    make_layer,
)
from support import few_roundings
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lora_fast


def adapter_gradients(layer: Any) -> list[Tensor]:
    found = [layer.get_parameter(name).grad for name in adapter_names(layer)]
    assert all(gradient is not None for gradient in found)
    return found


@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_training_follows_the_reference(kind: str, detach_norm: bool, backend: str) -> None:
    options = {} if kind == "lora" else {"detach_norm": detach_norm}
    ours = make_layer(kind, fresh=True, dtype=torch.float64, backend=backend, **options)
    theirs = copy.deepcopy(ours)
    x, target = torch.randn(20, IN, dtype=torch.float64), torch.randn(20, OUT, dtype=torch.float64)
    forwards: list[tuple[Any, Callable[[], Tensor]]] = [(ours, lambda: ours(x)), (theirs, lambda: expected(theirs, x))]
    losses: list[list[float]] = []
    for layer, forward in forwards:
        optimizer = torch.optim.AdamW(lora_fast.trainable_parameters(layer), lr=0.02)
        losses.append([])
        for _ in range(20):
            loss = F.mse_loss(forward(), target)
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients(kind: str, backend: str) -> None:
    layer = make_layer(kind, backend=backend)
    x = torch.randn(8, IN)
    for part in x.split(2):
        layer(part).square().sum().backward()
    parameters = [layer.get_parameter(name) for name in adapter_names(layer)]
    wanted = torch.autograd.grad(expected(layer, x).square().sum(), parameters)
    torch.testing.assert_close(adapter_gradients(layer), list(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", ["lora_A", "lora_B", "magnitude", "x", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_gradient_alone(kind: str, asked: str, backend: str) -> None:
    layer = make_layer(kind, backend=backend).requires_grad_(False)
    x = torch.randn(3, IN, requires_grad=asked == "x")
    if asked == "magnitude" and kind == "lora":
        return
    leaf = x if asked == "x" else layer.bias if asked == "bias" else layer.get_parameter(asked)
    leaf.requires_grad_(True)
    actual, wanted = (torch.autograd.grad(y.square().sum(), leaf)[0] for y in (layer(x), expected(layer, x)))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, dtype: torch.dtype, backend: str) -> None:
    layer = make_layer(kind, n_in=64, backend=backend)
    x = torch.randn(9, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        assert layer(x.to(dtype)).dtype == dtype
    assert y.dtype == dtype
    found = gradients(y, layer, x)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    wanted = expected(layer, x)
    torch.testing.assert_close(y.float(), wanted, **few_roundings(dtype))
    for actual, exact in zip(found, gradients(wanted, layer, x), strict=True):
        # some ten roundings on the way by an ulp / √12 each are 0.9 ulp; a small sum of large terms doubles that
        assert (actual - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_with_a_grad_scaler(kind: str, backend: str) -> None:
    layer = make_layer(kind, backend=backend)
    start = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.SGD(lora_fast.trainable_parameters(layer), lr=0.1)
    x, target = torch.randn(16, IN), torch.randn(16, OUT)

    def step(scaler: torch.amp.GradScaler) -> float:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.mse_loss(layer(x).float(), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    # a scale that overflows fp16 in backward: the step must be skipped
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    step(scaler)
    assert scaler.get_scale() < 2.0**40
    assert all(torch.equal(value, start[name]) for name, value in layer.state_dict().items())

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = [step(scaler) for _ in range(15)]
    assert scaler.get_scale() == 2.0**10
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_with_in_place_writes_on_the_output(
    kind: str, reentrant: bool, dropout: float, backend: str
) -> None:
    layer = make_layer(kind, dropout=dropout, backend=backend)
    x = torch.randn(6, IN, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return layer(x).mul_(3).sub_(0.1).relu_()

    def plain(x: Tensor) -> Tensor:
        return (layer(x) * 3 - 0.1).relu()

    results = []
    for run in (lambda: checkpoint(block, x, use_reentrant=reentrant), lambda: block(x), lambda: plain(x)):
        torch.manual_seed(1)
        y = run()
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *adapter_gradients(layer)])
        x.grad = None
        layer.zero_grad(set_to_none=True)
    assert (results[0][0] > 0).any()
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_bias_and_gain_zero(kind: str, backend: str) -> None:
    layer = make_layer(kind, dtype=torch.float64, backend=backend)
    with torch.no_grad():
        layer.bias.fill_(100 * layer(torch.randn(3, IN, dtype=torch.float64)).abs().max())
        if kind != "lora":
            layer.magnitude[:2] = 0
    assert_same_function(layer, torch.randn(3, IN, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_func_grad_over_functional_call(kind: str, backend: str) -> None:
    layer = make_layer(kind, backend=backend)
    x = torch.randn(3, IN)
    adapter = {name: layer.get_parameter(name).detach() for name in adapter_names(layer)}

    def loss(adapter: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, adapter, (x,)).square().sum()

    layer(x)
    for _ in range(2):
        found = torch.func.grad(loss)(adapter, x)
        wanted = torch.autograd.grad(expected(layer, x).square().sum(), list(lora_fast.trainable_parameters(layer)))
        torch.testing.assert_close(list(found.values()), list(wanted), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for name in ("lora_A", "lora_B"):
                layer.get_parameter(name).mul_(2)
                adapter[name] = layer.get_parameter(name).detach().clone()
    x.requires_grad_()
    torch.testing.assert_close(
        torch.func.vjp(layer, x)[1](torch.ones(3, OUT))[0], torch.autograd.grad(expected(layer, x).sum(), x)[0]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode(kind: str, backend: str) -> None:
    layer = make_layer(kind, backend=backend)
    with torch.inference_mode():
        x = torch.randn(3, IN)
        torch.testing.assert_close(layer(x), expected(layer, x))
        made_inside = make_layer(kind, backend=backend)
        torch.testing.assert_close(made_inside(x), expected(made_inside, x))
    assert_same_function(layer, torch.randn(3, IN))


# what is not supported says so


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_raises_clearly(kind: str) -> None:
    layer = make_layer(kind, backend="torch")  # PyTorch's operators, which "auto" may take for LoRA, could do it
    with pytest.raises(RuntimeError, match=f"vmap over {'Lora' if kind == 'lora' else 'Dora'}LinearFunction"):
        torch.func.vmap(layer)(torch.randn(2, 3, IN))


@pytest.mark.parametrize("kind", KINDS)
def test_jvp_raises_clearly(kind: str) -> None:
    layer = make_layer(kind, backend="torch")
    x = torch.randn(3, IN)
    with pytest.raises(RuntimeError, match="jvp function.*forward mode AD"):
        torch.func.jvp(layer, (x,), (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_raises_clearly(kind: str) -> None:
    layer = make_layer(kind, backend="torch")
    x = torch.randn(3, IN, requires_grad=True)
    gradient = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# torch.compile and torch.export


@pytest.fixture
def fresh_compiler() -> None:
    """All layers share one forward: what earlier tests compiled counts towards the limit of recompilations."""
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: str, backend: str) -> None:
    layer = make_layer(kind, backend=backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(3, IN, requires_grad=True)
    for _ in range(2):
        y = compiled(x)
        wanted = expected(layer, x)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(gradients(y, layer, x), gradients(wanted, layer, x))
        with torch.no_grad():
            layer.lora_B.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected(layer, x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_compile_with_dropout_and_autocast(kind: str, backend: str) -> None:
    layer = make_layer(kind, dropout=0.5, detach_norm=False, backend=backend) if kind != "lora" else None
    layer = layer or make_layer(kind, dropout=0.5, backend=backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, IN)
    assert not torch.equal(compiled(x), compiled(x))
    results = []
    for function in (compiled, layer):
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(x)
        results.append([y, *gradients(y, layer)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_export(kind: str, training: bool, backend: str) -> None:
    layer = make_layer(kind, backend=backend).train(training)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(layer, (torch.randn(3, IN),), dynamic_shapes=({0: tokens},))
    module = exported.module()
    for count in (3, 7):
        x = torch.randn(count, IN)
        torch.testing.assert_close(module(x), expected(layer, x))
    assert set(exported.state_dict) == set(layer.state_dict())
    with torch.no_grad():
        exported.state_dict["lora_B"].mul_(2)
    x = torch.randn(3, IN)
    torch.testing.assert_close(exported.module()(x), expected(layer, x))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_whole_model_compiles_and_exports(backend: str) -> None:
    model = nn.Sequential(nn.Linear(IN, 16), nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    lora_fast.apply(model, 2, ALPHA, backend=backend, targets=["0", "2"])
    x = torch.randn(2, 5, IN)
    wanted = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), wanted)
    torch.testing.assert_close(torch.export.export(model.eval(), (x,)).module()(x), wanted)
