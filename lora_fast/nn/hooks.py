"""What others put on the linear inside an adapted layer after the layer was made.

The layer reads the linear's parameters and never calls it, so a hook or a forward put there would be lost without a
word. Two kinds are served, by computing inside the linear's call: accelerate's hooks, which bring an offloaded weight
for that time, and those of FSDP and ZeRO-3, which gather a sharded one (:mod:`lora_fast.parallel`). The rest is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from lora_fast import bases
from lora_fast.parallel import calling, fsdp1, whole


def is_plain(linear: nn.Module) -> bool:
    """Whether nothing was put on ``linear``. Asked in every forward, so it takes lookups in dicts and no more."""
    own = vars(linear)
    return not (
        "forward" in own
        or own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_modules"]  # of a parametrization
        or (type(linear).forward is not nn.Linear.forward and not bases.is_quantised(linear))
    )


def parameter(module: Any, name: str) -> Any:
    """``getattr(module, name)``, in half of the microsecond that the host takes to look up an attribute of a module."""
    own = module._parameters
    # by item, which gathers a parameter of ZeRO-3; FSDP and pruning make ordinary attributes of parameters
    return own[name] if name in own else getattr(module, name)


def has_hooks(linear: nn.Module) -> bool:
    return any(getattr(linear, registry) for registry in calling.REGISTRIES)


def has_own_forward(linear: nn.Module) -> bool:
    """Whether calling ``linear`` runs another forward than torch.nn.Linear's, or its quantised class's."""
    # accelerate leaves the bound method of the class on the instance when it removes its hook
    own, known = vars(linear).get("forward"), nn.Linear.forward
    if bases.is_quantised(linear):
        known = type(linear).forward
    replaced = own is not None and getattr(own, "__func__", None) is not known
    return replaced or type(linear).forward is not known


def frozen_parameter(linear: Any, name: str) -> Any:
    """``parameter(linear, name)`` of a linear whose parameters are frozen, whatever wraps it."""
    own = linear._parameters
    if name in own and type(own[name]) is not Tensor:
        return own[name]
    linear = fsdp1.owner(linear)
    return fsdp1.without_gradient(parameter(linear, name), linear, name)


def call_inside(linear: nn.Module, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``compute(x)`` while the hooks of ``linear``, if it has any, hold the weight where it computes.

    They see x and the result too: accelerate's move x, FSDP's may cast both. As these hooks themselves, it is for one
    thread at a time in one layer.

    Raises RuntimeError for what ``linear`` carries that would not be called.
    """
    if calling.gathers(linear):
        return calling.call_inside([linear], compute, x, casting=linear)
    if obstacle := _obstacle(linear):
        raise RuntimeError(obstacle)
    if not has_accelerate_hook(linear):
        return compute(x)
    own = vars(linear)
    original = own["_old_forward"]
    own["_old_forward"] = compute
    try:
        return linear(x)
    finally:
        own["_old_forward"] = original


def check_weight(layer: Any, action: str, *, writes: bool = False) -> None:
    """RuntimeError where the weight that ``layer`` reads outside a forward is not the one that a forward uses, or where
    a write into its parameters would be lost."""
    if not calling.gathers(layer.linear) and (obstacle := _obstacle(layer.linear)):
        raise RuntimeError(f"{action}: {obstacle}")
    check_not_sharded(layer, action, writes=writes)
    if may_reload(layer) and any(parameter.is_meta for parameter in layer.parameters()):
        raise RuntimeError(
            f"{action}: the layer is offloaded, and its weight is there in a forward only; call "
            "accelerate.hooks.remove_hook_from_submodules(model) first, and offload again afterwards"
        )


def check_not_sharded(layer: Any, action: str, *, writes: bool) -> None:
    for name, kept_by in _sharded(layer, writes):
        raise whole.error(action, name, kept_by)


def is_sharded(layer: Any) -> bool:
    """Whether a parameter that ``layer`` reads is not whole now."""
    return any(_sharded(layer, writes=False))


def _sharded(layer: Any, writes: bool) -> Iterator[tuple[str, str]]:
    """Each parameter that is not whole, or must not be written, and what has it in parts."""
    shape = layer.out_features, layer.in_features
    places = [(layer.linear, "weight", shape), *((layer, name, None) for name in ("lora_A", "lora_B", "magnitude"))]
    for module, name, whole_shape in places:
        if name == "weight" and bases.is_quantised(fsdp1.owner(module)):
            continue
        if kept_by := whole.sharded(module, name, whole_shape, writes=writes):
            yield name, kept_by


def may_reload(layer: Any) -> bool:
    """Whether accelerate may bring the layer's weight anew at each call."""
    return has_accelerate_hook(layer) or has_accelerate_hook(layer.linear)


def _obstacle(linear: nn.Module) -> str | None:
    """What ``linear`` carries that the layer would pass over."""
    if "parametrizations" in linear._modules:
        return (
            "linear: it was parametrized after it was adapted; call "
            "torch.nn.utils.parametrize.remove_parametrizations on it"
        )
    if has_hooks(linear):
        found = "hooks"
    elif has_own_forward(linear) and not has_accelerate_hook(linear):
        found = "a forward of its own"
    else:
        return None
    return (
        f"linear: it has {found}, put on after it was adapted, but the adapted layer reads its parameters without "
        "calling it; take that off, and put it on the adapted layer instead"
    )


def has_accelerate_hook(module: nn.Module) -> bool:
    """Of accelerate's own hooks, which move weights and activations; another's may do anything."""
    hook = vars(module).get("_hf_hook")
    return hook is not None and all(
        type(part).__module__ == "accelerate.hooks" for part in (hook, *getattr(hook, "hooks", ()))
    )


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate keeps the values of the module's own parameters."""
    hook = vars(module).get("_hf_hook")
    return any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ())))
