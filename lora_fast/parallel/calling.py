"""Computations inside the calls of modules, for parameters that these calls alone bring.

FSDP2, FSDP1 and ZeRO-3 gather the parameters of a module for the time of its call, around which they put hooks or a
wrapper; they cast its inputs, and in backward gather again and reduce the gradients. An adapter's products are fused
over the parameters of several modules, none of which is called then. So each that gathers is called, one inside the
other, with the fused computation as the forward of the innermost: their hooks run as if PEFT had called them, nothing
of them stays gathered, and what they prefetch comes in time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lora_fast.parallel import fsdp1

REGISTRIES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GATHERING = ("torch.distributed.fsdp.", "deepspeed.")  # what the modules of hooks that gather begin with


def gathers(module: nn.Module) -> bool:
    """Whether a call of ``module`` gathers its parameters, and does nothing else beside its forward."""
    own = vars(module)  # asked in every forward: what gathers has one of these
    if not own["_forward_pre_hooks"] and fsdp1.WRAPPED not in own["_modules"]:
        return False
    held = fsdp1.owner(module)
    if "forward" in vars(held):
        return False
    hooks = _hooks(module) if held is module else [*_hooks(module), *_hooks(held)]
    return (held is not module or bool(hooks)) and all(map(_is_gathering, hooks))


def call_inside(
    modules: Sequence[nn.Module], compute: Callable[[Tensor], Tensor], x: Tensor, casting: nn.Module
) -> Tensor:
    """``compute(x)`` inside the calls of ``modules``, which all gather; x and the result pass through their hooks.

    Mixed precision casts both for a module's own product. Only what the hooks of ``casting`` make of their dtypes is
    kept. ``compute`` must not call the modules again: :func:`forward_of` is what they compute themselves. As FSDP's own
    calls, it is for one thread at a time in one module.
    """
    if not modules:
        return compute(x)
    module, held, casts = modules[0], vars(fsdp1.owner(modules[0])), modules[0] is casting
    dtypes = []  # of the result, before the module's hooks have it

    def forward(given: Tensor) -> Tensor:
        del held["forward"]
        result = call_inside(modules[1:], compute, given if casts or given.dtype == x.dtype else x, casting)
        dtypes.append(result.dtype)
        return result

    held["forward"] = forward
    try:
        y: Tensor = module(x)
        return y if casts else y.to(dtypes[0])
    finally:
        held.pop("forward", None)


def forward_of(module: nn.Module) -> Callable[..., Tensor]:
    """The module's own computation, without the hooks around it, inside :func:`call_inside`."""
    forward: Callable[..., Tensor] = fsdp1.owner(module).forward
    return forward


def _hooks(module: nn.Module) -> list[Any]:
    return [hook for registry in REGISTRIES for hook in getattr(module, registry).values()]


def _is_gathering(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith(GATHERING)
