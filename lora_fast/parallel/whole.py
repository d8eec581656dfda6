"""Whether a parameter is whole, and the module's own, where it is read or written outside a forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fast.parallel import fsdp1, fsdp2, zero


def tensor_of(module: nn.Module, name: str) -> Any:
    """The parameter ``name`` of ``module``, or the plain tensor that stands in its place; None if there is neither.

    It gathers nothing, where ``module.weight`` would under ZeRO-3 in a forward.
    """
    own = module._parameters
    return own.get(name) if name in own else module.__dict__.get(name)


def is_put_together(module: nn.Module, tensor: Any) -> bool:
    """Whether ``tensor``, which ``module`` has in a forward, was put together of everybody's shards for it.

    Its address and version then say nothing of what is in it, and it is gone after backward.
    """
    if type(tensor) is not nn.Parameter:
        return fsdp1.is_view(tensor)
    return zero.is_partitioned(tensor) or fsdp2.manages(module)


def is_rounded(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether FSDP's mixed precision has rounded ``tensor``, which is ``module``'s ``name`` in a forward."""
    stored = fsdp1.stored_dtype(tensor) if fsdp1.is_view(tensor) else fsdp2.stored_dtype(module, name)
    return stored is not None and stored.itemsize > tensor.dtype.itemsize


def rounded_to(model: nn.Module) -> dict[int, torch.dtype]:
    """For each module within a unit of FSDP that rounds its parameters for a forward, by its id: to what."""
    found: dict[int, torch.dtype] = {}
    for module in model.modules():  # outer ones come first
        engine: Any = fsdp2 if fsdp2.is_unit(module) else fsdp1 if fsdp1.is_unit(module) else None
        if engine is None:
            continue
        dtype = engine.param_dtype(module)
        for inner in module.modules():
            found.pop(id(inner), None)
            if dtype is not None:
                found[id(inner)] = dtype
    return found


def sharded(module: nn.Module, name: str, shape: Sequence[int] | None = None, *, writes: bool = False) -> str | None:
    """Which way of sharding keeps ``name`` of ``module`` from being read now, or from being written; None if none does.

    What FSDP2 has gathered, and nobody sees that, may be read and not written; blocks in which others gather are the
    user's. ``shape``: that of the whole, where it is known.
    """
    module = fsdp1.owner(module)
    tensor = tensor_of(module, name)
    if tensor is None:
        return None
    if fsdp2.is_dtensor(tensor) or (writes and fsdp2.manages(module)):
        return "FSDP2 (or another user of DTensor)"
    if tensor.shape != zero.shape(tensor):
        return "DeepSpeed's ZeRO-3"
    if type(tensor) is Tensor and module._parameters.get(name) is None and fsdp1.is_view(tensor):
        return "FSDP1"
    if shape is not None and tuple(tensor.shape) != tuple(shape) and not zero.is_partitioned(tensor):
        return "FSDP1"
    if tensor.numel() and not tensor.is_meta and tensor.untyped_storage().nbytes() == 0:
        return "FSDP"
    return None


def error(action: str, name: str, sharded_by: str) -> RuntimeError:
    """That ``action`` needs the parameter ``name``, which :func:`sharded` says is not at hand."""
    return RuntimeError(
        f"{action}: {name} is sharded over processes by {sharded_by}, and this needs it whole in each; save the "
        "adapter, and do it with a model that is not sharded"
    )
