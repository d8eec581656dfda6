"""What PyTorch's FSDP2 does to the layers it is applied to, told from its public names.

Between calls ``fully_shard`` keeps parameters as DTensors, in shards. For the call of a module it was applied to, it
puts plain parameters into that module and those within it, but for the modules within that it was applied to as well.
It makes that module an instance of a new class, derived from ``FSDPModule`` and the class before.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

_derived: dict[tuple[type, type], type] = {}  # (a class that FSDP derived, another base): the same over that base


def _unit_class() -> type | None:
    """FSDPModule; None where nobody has imported it yet, so that nothing can be one, as it is slow to import."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def is_unit(module: Any) -> bool:
    """Whether ``fully_shard`` was applied to the module itself."""
    unit = _unit_class()
    return unit is not None and isinstance(module, unit)


def units_around(model: nn.Module) -> dict[int, nn.Module]:
    """For each module of ``model`` that lies in one, by its id: the innermost that ``fully_shard`` was applied to."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():  # outer ones come first
        if is_unit(module):
            found.update(dict.fromkeys(map(id, module.modules()), module))
    return found


def param_dtype(unit: Any) -> torch.dtype | None:
    """That to which the unit's policy of mixed precision casts its parameters for a forward; None if it casts none."""
    state = unit._get_fsdp_state()
    dtype: torch.dtype | None = state._mp_policy.param_dtype
    return dtype


def manages(module: nn.Module) -> bool:
    """Whether FSDP2 has parameters of the module itself, at any time of its life: told from a hook that it leaves."""
    hooks = module._load_state_dict_post_hooks
    return bool(hooks) and any(
        getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.") for hook in hooks.values()
    )


def reshard(model: nn.Module) -> None:
    """Put away what is still gathered: outside a forward a gathered copy is neither what is kept nor to be written."""
    for module in model.modules():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, of FSDP2 or of tensor parallelism."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and isinstance(tensor, dtensor)


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor as FSDP keeps it: sharded over the last dimension of its mesh alone.

    The dimension before is HSDP's, which replicates. Tensor parallelism adds dimensions, and stays after the gathering.
    """
    return is_dtensor(tensor) and all(placement.is_replicate() for placement in tensor.placements[:-1])


def base_class(kind: type) -> type:
    """The class that ``fully_shard`` derived ``kind`` from; ``kind`` itself where it did not."""
    unit = _unit_class()
    bases = kind.__bases__
    return bases[1] if unit is not None and len(bases) == 2 and issubclass(bases[0], unit) else kind


def derive(kind: type, base: type) -> type:
    """``kind``, which ``fully_shard`` derived, over ``base`` in place of its own; and back to ``kind`` itself."""
    if (kind, base) not in _derived:
        unit, before = kind.__bases__
        name = kind.__name__.removesuffix(before.__name__) + base.__name__
        made: type = type(name, (unit, base), {"__deepcopy__": vars(kind)["__deepcopy__"]})
        _derived[kind, base], _derived[made, before] = made, kind
    return _derived[kind, base]
