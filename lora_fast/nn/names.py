"""Names of modules as the user's model has them, whatever wrappers stand around it or around parts of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

from torch import nn

# Each wrapper, by the module and the name of its class, and the attribute with what it wraps. By name, because most of
# them are expensive to import, and a model that holds one has imported it.
WRAPPERS = {
    ("deepspeed.runtime.engine", "DeepSpeedEngine"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): "_checkpoint_wrapped_module",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.optim.swa_utils", "AveragedModel"): "module",
}


class Place(NamedTuple):
    """Where a module stands: ``holder._modules[attribute] is module``; the holder may be a wrapper, or none."""

    name: str
    module: nn.Module
    holder: nn.Module | None
    attribute: str


def wrapped_attribute(module: nn.Module) -> str | None:
    """The attribute under which ``module``, if it is a wrapper, holds what it wraps."""
    for kind in type(module).__mro__:
        attribute = WRAPPERS.get((kind.__module__, kind.__name__))
        if attribute is not None and attribute in module._modules:
            return attribute
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers around it."""
    return _inside(model, None, "").module


def places(model: nn.Module) -> Iterator[Place]:
    """Every place of every module, wrappers left out: as ``named_modules(remove_duplicate=False)`` names them."""
    yield from _places(_inside(model, None, ""))


def _places(place: Place) -> Iterator[Place]:
    yield place
    for attribute, child in place.module._modules.items():
        if child is not None:
            name = f"{place.name}.{attribute}" if place.name else attribute
            yield from _places(_inside(child, place.module, attribute)._replace(name=name))


def _inside(module: nn.Module, holder: nn.Module | None, attribute: str) -> Place:
    while (inner := wrapped_attribute(module)) is not None:
        holder, attribute, module = module, inner, cast(nn.Module, module._modules[inner])
    return Place("", module, holder, attribute)
