"""Values of parameters that are sharded, emptied or offloaded: gathered, or an error that says how.

Every process of a model that is sharded has to make the calls here; they are collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_fast.nn.hooks import is_offloaded
from lora_fast.parallel import fsdp1, fsdp2, zero


@contextlib.contextmanager
def summoned(model: nn.Module, *, writes: bool = False) -> Iterator[bool]:
    """A block in which FSDP1, wherever it is in ``model``, has its parameters whole; and whether this process has them.

    To be read they are moved to the CPU of the first process, unit by unit. To be written, each process has all of them
    where it computes.
    """
    units: list[Any] = list(filter(fsdp1.is_unit, model.modules()))
    if not units or units[0].training_state.name == "SUMMON_FULL_PARAMS":  # by the user: every process goes on
        yield True
        return
    fsdp: Any = type(units[0])
    # from a CPU it moves them by freeing them, and without sharding not at all
    moves = not any(
        writes or unit.compute_device.type == "cpu" or unit.sharding_strategy.name == "NO_SHARD" for unit in units
    )
    with fsdp.summon_full_params(model, writeback=writes, rank0_only=not writes, offload_to_cpu=moves):
        yield writes or torch.distributed.get_rank() == 0


def check_not_in_parts(name: str, layer: Any, function: str) -> None:
    """Raise ValueError for a layer within a unit of FSDP1 that is not in the model: then nothing was gathered."""
    if len(zero.shape(layer.lora_A)) != 2:
        raise ValueError(
            f"model: FullyShardedDataParallel has the parameters of {name} in parts; call {function} on every process "
            "with the model that it returned, or inside `with FullyShardedDataParallel.summon_full_params(...)`"
        )


def check_whole(name: str, module: nn.Module, key: str, function: str) -> None:
    """Raise ValueError if ``key`` of ``module``, called ``name``, has no values here, or not all of its own."""
    tensor = own_tensor(module, key)
    if is_lazy(tensor):
        raise ValueError(f"model: {name} is not initialised; call the model once before {function}")
    if zero.is_partitioned(tensor) or is_offloaded(module):
        return
    if tensor.is_meta:
        raise ValueError(
            f"model: {name} is on the meta device, without values; load the weights, or give it memory (to_empty), "
            f"before {function}"
        )
    if not fsdp2.is_dtensor(tensor) and tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        raise ValueError(f"model: {name} has no memory behind it, as a sharded parameter between its uses; unshard it")


def value(module: nn.Module, key: str) -> Tensor:
    """A copy on the CPU of the parameter or buffer ``key`` of ``module``, all of it."""
    if not is_offloaded(module):
        return copy(own_tensor(module, key))
    from accelerate.utils import align_module_device

    with align_module_device(module, "cpu"):
        return copy(own_tensor(module, key))


def own_tensor(module: nn.Module, key: str) -> Tensor:
    tensor = module._parameters.get(key)
    found = module._buffers[key] if tensor is None else tensor
    assert found is not None, key
    return found


def is_first_process(tensors: list[Tensor]) -> bool:
    """Whether this process is the one to write what all of them have gathered."""
    for tensor in tensors:
        if fsdp2.is_dtensor(tensor):
            mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
            return not any(mesh.get_coordinate() or ())
        if zero.is_partitioned(tensor):
            return zero.is_first_process(tensor)
    return True


def spread(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every process has, where ``like`` is: its device, or its mesh and placements."""
    if not fsdp2.is_dtensor(like):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    where: Any = like
    return distribute_tensor(value.to(where.to_local().device), where.device_mesh, where.placements, src_data_rank=None)


def copy(tensor: Tensor) -> Tensor:
    """All of ``tensor``, on the CPU."""
    with zero.gathered([tensor]):
        whole = tensor.detach()
        if fsdp2.is_dtensor(whole):
            whole = whole.full_tensor()  # type: ignore[attr-defined]
        return whole.to("cpu", copy=True).contiguous()
