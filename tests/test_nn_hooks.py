"""What is put on the linear inside an adapted layer is never called; so it is an error, not silence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nn_helpers import IN, KINDS, assert_same_function, make_layer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

ON_THE_LAYER = "without calling it.*on the adapted layer instead"


def swap_forward(linear: nn.Linear) -> None:
    linear.forward = lambda x: x  # type: ignore[method-assign]


def swap_class(linear: nn.Linear) -> None:
    linear.__class__ = type("Doubling", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})


CHANGES: dict[str, tuple[Callable[[nn.Linear], object], str]] = {
    "forward hook": (lambda linear: linear.register_forward_hook(lambda *_: None), "has hooks, .*" + ON_THE_LAYER),
    "pre-hook": (lambda linear: linear.register_forward_pre_hook(lambda *_: None), "has hooks, .*" + ON_THE_LAYER),
    "backward hook": (lambda linear: linear.register_full_backward_hook(lambda *_: None), "has hooks"),
    "backward pre-hook": (lambda linear: linear.register_full_backward_pre_hook(lambda *_: None), "has hooks"),
    "pruned": (lambda linear: prune.random_unstructured(linear, "weight", 0.5), "has hooks"),
    "instance forward": (swap_forward, "has a forward of its own, .*" + ON_THE_LAYER),
    "class forward": (swap_class, "has a forward of its own"),
    "parametrized": (parametrizations.weight_norm, "was parametrized .*remove_parametrizations"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_would_never_be_called_is_refused(kind: str, change: str) -> None:
    layer = make_layer(kind)
    put_on, message = CHANGES[change]
    put_on(layer.linear)
    with pytest.raises(RuntimeError, match=message):
        layer(torch.randn(3, IN))


@pytest.mark.parametrize("change", ["parametrized", "pruned"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_computed_weight_cannot_be_merged_into(kind: str, change: str) -> None:
    """The update would go into a tensor that is computed anew, and be lost."""
    layer = make_layer(kind)
    CHANGES[change][0](layer.linear)
    with pytest.raises(RuntimeError, match=f"^merge_: .*{CHANGES[change][1]}"):
        layer.merge_()
    assert not layer.is_merged


@pytest.mark.parametrize("kind", KINDS)
def test_right_again_once_it_is_removed(kind: str) -> None:
    layer, x = make_layer(kind), torch.randn(3, IN)
    handle = layer.linear.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError):
        layer(x)
    handle.remove()
    parametrize.register_parametrization(layer.linear, "weight", nn.Identity())
    with pytest.raises(RuntimeError):
        layer(x)
    parametrize.remove_parametrizations(layer.linear, "weight")
    layer.weight.requires_grad_(False)
    assert_same_function(layer, x)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_the_layer_are_called(kind: str) -> None:
    layer, x, seen = make_layer(kind), torch.randn(3, IN), []

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(args[0])
        return 2 * output

    expected = 2 * layer(x)
    layer.register_forward_hook(hook)
    assert torch.equal(layer(x), expected)
    assert seen[0] is x


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_that_gather_run_around_the_layers_computation(kind: str) -> None:
    """As DeepSpeed's: W is there between them only. Another's hook beside them would be passed over."""
    layer, x = make_layer(kind), torch.randn(3, IN)
    expected, weight, seen = layer(x), layer.linear.weight.detach().clone(), []

    def before(linear: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(args[0])
        linear.weight.data = weight
        return args

    def after(linear: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        seen.append(output)
        linear.weight.data = weight[:0]
        return output + 1

    before.__module__ = after.__module__ = "deepspeed.runtime.zero.parameter_offload"
    layer.linear.weight.data = weight[:0]
    layer.linear.register_forward_pre_hook(before)
    layer.linear.register_forward_hook(functools.partial(after))
    for _ in range(2):
        assert torch.equal(layer(x), expected + 1)
        assert seen.pop(0) is x
        assert torch.equal(seen.pop(0), expected)
        assert "forward" not in vars(layer.linear)
    layer.linear.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="has hooks, .*" + ON_THE_LAYER):
        layer(x)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_inside_the_call_leaves_the_linear_as_it_was(kind: str) -> None:
    layer, x = make_layer(kind), torch.randn(3, IN)
    expected = layer(x)

    def gather(*_: Any) -> None:
        if x.dtype == torch.float64:
            raise OverflowError("no memory")

    gather.__module__ = "deepspeed.runtime.zero.parameter_offload"
    layer.linear.register_forward_pre_hook(gather)
    for wrong, error in ((torch.randn(3, IN + 1), ValueError), (torch.randn(3, IN).bool(), TypeError)):
        with pytest.raises(error, match="x: got"):
            layer(wrong)
        assert "forward" not in vars(layer.linear)
        assert torch.equal(layer(x), expected)
    x = x.double()
    with pytest.raises(OverflowError, match="no memory"):
        layer(x)
    assert "forward" not in vars(layer.linear)


def test_fully_shard_of_the_linear_alone(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        x = torch.randn(3, IN)
        for shard in (lambda layer: fully_shard(layer.linear), fully_shard):
            layer = make_layer("dora-output")
            expected = layer(x)
            shard(layer)
            assert torch.equal(layer(x), expected)
            layer.linear.register_forward_hook(lambda *_: None)
            with pytest.raises(RuntimeError, match="has hooks, .*" + ON_THE_LAYER):
                layer(x)
    finally:
        dist.destroy_process_group()
