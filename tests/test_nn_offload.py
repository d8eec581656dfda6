"""accelerate's offloading around a model that was adapted before: the weight is there only inside the linear's hook."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nn_helpers import DORA_KINDS, IN, KINDS, OUT, gradients, make_layer, move_adapter, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fast

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


def to_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model)


def to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder))


def only_the_linear(model: nn.Module, folder: Path) -> nn.Module:
    """The adapter stays, and trains."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            accelerate.disk_offload(module, str(folder / str(id(module))))
    return model


def by_device_map(model: nn.Module, folder: Path) -> nn.Module:
    outer = nn.Sequential(model, nn.Linear(1, 1))
    device_map = {"0": "disk", "1": "cpu"}
    return accelerate.dispatch_model(outer, device_map, main_device="cpu", offload_dir=str(folder))[0]


def whole_layers(model: nn.Module, folder: Path) -> nn.Module:
    """One hook loads a layer with the linear inside, which has none of its own."""
    return accelerate.cpu_offload(model, preload_module_classes=["LinearWithLoRA", "LinearWithDoRA"])


def whole_model(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload_with_hook(model, "cpu")[0]


OFFLOADS = (to_cpu, to_disk, only_the_linear, by_device_map, whole_layers, whole_model)
Offload = Callable[[nn.Module, Path], nn.Module]


def offloaded(layer: nn.Module, offload: Offload, folder: Path) -> Any:
    return offload(copy.deepcopy(layer), folder)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_same_output_and_gradient(kind: str, bias: bool, offload: Offload, backend: str, tmp_path: Path) -> None:
    layer = make_layer(kind, bias=bias, backend=backend)
    other = offloaded(layer, offload, tmp_path)
    for train in (True, False):
        x = torch.randn(5, IN, requires_grad=True)
        y, wanted = other.train(train)(x), layer.train(train)(x)
        assert torch.equal(y, wanted)
        gradient, wanted_gradient = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, wanted))
        assert torch.equal(gradient, wanted_gradient)
        with torch.no_grad():
            assert torch.equal(other(x), layer(x))
    if offload is not whole_model:
        assert other.weight.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_trains_over_an_offloaded_linear(kind: str, backend: str, tmp_path: Path) -> None:
    layer = make_layer(kind, backend=backend, dropout=0.5)
    other = offloaded(layer, only_the_linear, tmp_path)
    optimizers = [torch.optim.SGD(lora_fast.trainable_parameters(model), lr=0.1) for model in (layer, other)]
    for _ in range(3):
        x = torch.randn(5, IN)
        for model, optimizer in zip((layer, other), optimizers, strict=True):
            torch.manual_seed(1)  # of dropout's mask
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in ("lora_A", "lora_B", "magnitude"):
        if hasattr(layer, name):
            assert torch.equal(getattr(other, name), getattr(layer, name))


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_full_norm_gradient_and_checkpointing(kind: str, backend: str, tmp_path: Path) -> None:
    layer = make_layer(kind, backend=backend, detach_norm=False)
    other = offloaded(layer, only_the_linear, tmp_path)
    x = torch.randn(5, IN, requires_grad=True)
    wanted = gradients(layer(x), layer, x)
    torch.testing.assert_close(gradients(checkpoint(other, x, use_reentrant=False), other, x), wanted)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_model_of_layers(offload: Offload, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(IN, 9), nn.ReLU(), nn.Sequential(nn.Linear(9, OUT), nn.Linear(OUT, 2)))
    lora_fast.apply(model, 2, 1.0, exclude=["2.1"])
    for layer in (model[0], model[2][0]):
        move_adapter(layer)
    other = offloaded(model, offload, tmp_path)
    x = torch.randn(3, IN)
    assert torch.equal(other(x), model(x))
    assert torch.equal(torch.compile(other, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("kind", DORA_KINDS)
def test_frozen_norm(kind: str, offload: Offload, tmp_path: Path) -> None:
    layer = make_layer(kind).eval()
    lora_fast.freeze_norms(layer)
    x = torch.randn(3, IN)
    assert torch.equal(offloaded(layer, offload, tmp_path)(x), layer(x))


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_the_frozen_gain_follows_the_input(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the device that the hooks compute on, here meta: the gain is no parameter that they would move."""
    layer = make_layer(kind).eval()
    lora_fast.freeze_norms(layer)
    monkeypatch.setattr(lora_fast.functional, "lora_linear", lambda x, *others, **_: (x, others[-1]))
    x, last = layer(torch.randn(3, IN, device="meta"))
    assert x.is_meta
    assert last.is_meta if kind == "dora-output" else last is None


@pytest.mark.parametrize("kind", KINDS)
def test_merged_layer(kind: str, tmp_path: Path) -> None:
    layer = make_layer(kind).eval()
    layer.merge_()
    x = torch.randn(3, IN)
    for offload in (only_the_linear, whole_model):
        other = offloaded(layer, offload, tmp_path)
        assert torch.equal(other(x), layer(x))
        with pytest.raises(RuntimeError, match=r"unmerge_\(\) to train"):
            other.train()(x)
    for offload in (to_cpu, to_disk, by_device_map, whole_layers):  # these go by the state dict
        with pytest.raises(RuntimeError, match=r"is merged.*unmerge_\(\) first, or save merged\(\)"):
            offloaded(layer, offload, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_needs_the_weight(kind: str, tmp_path: Path) -> None:
    layer = make_layer(kind).eval()
    layer.merge_()
    other = offloaded(layer, only_the_linear, tmp_path)
    with pytest.raises(RuntimeError, match="^unmerge_: .*offloaded"):
        other.unmerge_()
    assert other.is_merged
    accelerate.hooks.remove_hook_from_submodules(other)
    for merged in (other, layer):
        merged.unmerge_()
    x = torch.randn(3, IN)
    assert torch.equal(other(x), layer(x))


# what needs the weight outside a forward

USES: dict[str, Callable[[Any], object]] = {
    "merge_": lambda layer: layer.merge_(),
    "merged": lambda layer: layer.merged(),
    "reset_parameters": lambda layer: layer.reset_parameters(),
}
DORA_USES = {
    **USES,
    "freeze_norm": lambda layer: layer.freeze_norm(),
    "freeze_norms": lambda layer: lora_fast.freeze_norms(nn.ModuleList([make_layer("dora-output").eval(), layer])),
}


@pytest.mark.parametrize("offload", [to_cpu, to_disk, only_the_linear, by_device_map, whole_layers])
@pytest.mark.parametrize(
    ("kind", "use"), [*(("lora", use) for use in USES), *((kind, use) for kind in DORA_KINDS for use in DORA_USES)]
)
def test_what_needs_the_weight_names_the_step_that_helps(kind: str, use: str, offload: Offload, tmp_path: Path) -> None:
    layer = make_layer(kind).eval()
    other, x = offloaded(layer, offload, tmp_path), torch.randn(3, IN)
    before = {name: parameter for name, parameter in snapshot(other).items() if not parameter.is_meta}
    with pytest.raises(RuntimeError, match=rf"^{use}: .*offloaded.*accelerate\.hooks\.remove_hook_from_submodules"):
        DORA_USES[use](other)
    assert all(torch.equal(other.get_parameter(name), value) for name, value in before.items())
    assert not other.is_merged
    assert torch.equal(other(x), layer(x))

    accelerate.hooks.remove_hook_from_submodules(other)
    DORA_USES[use](other)
    DORA_USES[use](layer)
    if use != "reset_parameters":  # which draws lora_A
        assert torch.equal(other(x), layer(x))


def test_a_linear_whose_hooks_were_removed_can_be_adapted(tmp_path: Path) -> None:
    """accelerate leaves the bound forward of nn.Linear on the instance."""
    linear = to_disk(nn.Linear(IN, OUT), tmp_path)
    with pytest.raises(
        TypeError, match="offloaded or dispatched by accelerate; call accelerate.hooks.remove_hook_from"
    ):
        lora_fast.LinearWithDoRA(linear, 2, 1.0)
    accelerate.hooks.remove_hook_from_submodules(linear)
    layer = lora_fast.LinearWithDoRA(linear, 2, 1.0)
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer(x), linear(x))


def test_a_hook_of_another_kind_is_refused() -> None:
    """It may change x or the output, which accelerate's own hooks do not."""

    class Doubling(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    for hook in (Doubling(), accelerate.hooks.SequentialHook(accelerate.hooks.AlignDevicesHook("cpu"), Doubling())):
        layer = make_layer("lora")
        accelerate.hooks.add_hook_to_module(layer.linear, hook)
        with pytest.raises(RuntimeError, match="has a forward of its own, .*on the adapted layer instead"):
            layer(torch.randn(3, IN))


# law 3: what was computed from a weight that is gone


class Reloading(accelerate.hooks.AlignDevicesHook):
    """Loads the weight into the same memory each time, as an allocator may, with version 0."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(execution_device="cpu", offload=True)
        self.weights_map = {name: parameter.detach() for name, parameter in linear.named_parameters()}
        self.memory = torch.empty_like(self.weights_map["weight"]).numpy()

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple:
        self.memory[:] = self.weights_map["weight"].numpy()
        arguments = super().pre_forward(module, *args, **kwargs)
        module._parameters["weight"] = nn.Parameter(torch.from_numpy(self.memory), requires_grad=False)
        return arguments


Reloading.__module__ = "accelerate.hooks"  # where the forward looks


@pytest.mark.parametrize("on", ["linear", "layer", "compiled linear"])
@pytest.mark.parametrize("kind", DORA_KINDS)
def test_a_weight_that_is_loaded_anew_has_its_own_norm(kind: str, on: str, backend: str) -> None:
    n = 256  # so that the sample of W misses most elements
    layer = make_layer(kind, n_in=n, n_out=n, backend=backend)
    stored, x = layer.linear.weight.detach(), torch.randn(64, n)
    hook = Reloading(layer.linear)
    forward = torch.compile(layer, backend="aot_eager") if on.startswith("compiled") else layer
    if on != "layer":
        accelerate.hooks.add_hook_to_module(layer.linear, hook)
    else:  # by what stands around the layer, which shows on no module that it knows
        layer.register_forward_pre_hook(lambda *_: hook.pre_forward(layer.linear) and None)
    with torch.no_grad():
        for row in range(0, n, 16):
            before: Tensor = forward(x)
            stored[row, row + 1] += 100.0
            reference = copy.deepcopy(layer.lora_A), copy.deepcopy(layer.lora_B)
            wanted = lora_fast.functional.dora_linear(
                x, stored.clone(), layer.bias if on == "layer" else hook.weights_map["bias"],
                *reference, layer.magnitude, layer.alpha, axis=layer.norm_axis, backend=backend,
            )  # fmt: skip
            after = forward(x)
            assert not torch.allclose(after, before)
            torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4)
