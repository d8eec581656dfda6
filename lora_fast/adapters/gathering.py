"""Values of parameters that are sharded, emptied or offloaded: gathered, or an error that says how."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_fast.nn.hooks import is_offloaded
from lora_fast.nn.names import wrapped_attribute


def check_summoned(model: nn.Module, function: str) -> None:
    """Raise ValueError if FSDP1 holds parameters of ``model`` in its flat ones."""
    for module in model.modules():
        is_fsdp1 = wrapped_attribute(module) == "_fsdp_wrapped_module"
        if is_fsdp1 and getattr(module.training_state, "name", None) != "SUMMON_FULL_PARAMS":
            raise ValueError(
                f"model: FullyShardedDataParallel holds its parameters in parts; call {function} inside "
                f"`with FullyShardedDataParallel.summon_full_params(model):`, on every process"
            )


def check_whole(name: str, module: nn.Module, key: str, function: str) -> None:
    """Raise ValueError if ``key`` of ``module``, called ``name``, has no values here, or not all of its own."""
    tensor = own_tensor(module, key)
    if is_lazy(tensor):
        raise ValueError(f"model: {name} is not initialised; call the model once before {function}")
    full_shape = getattr(tensor, "ds_shape", None)  # of DeepSpeed ZeRO-3
    if full_shape is not None and tuple(tensor.shape) != tuple(full_shape):
        rank = ", modifier_rank=0" if function == "load_adapter" else ""
        raise ValueError(
            f"model: {name} has shape {list(tensor.shape)} of {list(full_shape)}, since DeepSpeed ZeRO-3 has it in "
            f"parts; call {function} inside `with deepspeed.zero.GatheredParameters(list(model.parameters()){rank}):`, "
            "on every process"
        )
    if is_offloaded(module):
        return
    if tensor.is_meta:
        raise ValueError(
            f"model: {name} is on the meta device, without values; load the weights, or give it memory (to_empty), "
            f"before {function}"
        )
    if not is_distributed(tensor) and tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        raise ValueError(f"model: {name} has no memory behind it, as a sharded parameter between its uses; unshard it")


def value(module: nn.Module, key: str) -> Tensor:
    """A copy on the CPU of the parameter or buffer ``key`` of ``module``, all of it."""
    if not is_offloaded(module):
        return _copy(own_tensor(module, key))
    from accelerate.utils import align_module_device

    with align_module_device(module, "cpu"):
        return _copy(own_tensor(module, key))


def own_tensor(module: nn.Module, key: str) -> Tensor:
    tensor = module._parameters.get(key)
    found = module._buffers[key] if tensor is None else tensor
    assert found is not None, key
    return found


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of FSDP2 or of tensor parallelism."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_first_process(tensors: list[Tensor]) -> bool:
    """Whether this process is the one to write what all of them have gathered."""
    for tensor in tensors:
        if is_distributed(tensor):
            mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
            return not any(mesh.get_coordinate() or ())
    return True


def spread(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every process has, where ``like`` is: its device, or its mesh and placements."""
    if not is_distributed(like):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    where: Any = like
    return distribute_tensor(value.to(where.to_local().device), where.device_mesh, where.placements, src_data_rank=None)


def _copy(tensor: Tensor) -> Tensor:
    whole = tensor.detach()
    if is_distributed(whole):
        whole = whole.full_tensor()  # type: ignore[attr-defined]
    return whole.to("cpu", copy=True).contiguous()


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put away what it has gathered, and has not: what is written into a gathered copy is lost with it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()
