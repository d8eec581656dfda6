"""What PyTorch's FSDP2 does to the layers it is applied to, told from its public names.

Between calls ``fully_shard`` keeps parameters as DTensors, in shards. For the call of a module it was applied to, it
puts plain parameters into that module and those within it, but for the modules within that it was applied to as well.
It makes that module an instance of a new class, derived from ``FSDPModule`` and the class before.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_derived: dict[tuple[type, type], type] = {}  # (a class that FSDP derived, another base): the same over that base


def _unit_class() -> type | None:
    """FSDPModule; None where nobody has imported it yet, so that nothing can be one, as it is slow to import."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def is_unit(module: Any) -> bool:
    """Whether ``fully_shard`` was applied to the module itself."""
    unit = _unit_class()
    return unit is not None and isinstance(module, unit)


def modules_within(model: nn.Module) -> set[int]:
    """The ids of the modules of ``model`` that ``fully_shard`` was applied to, and of all within those."""
    return {id(inner) for module in model.modules() if is_unit(module) for inner in module.modules()}


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor as FSDP keeps it: sharded over the last dimension of its mesh alone.

    The dimension before is HSDP's, which replicates. Tensor parallelism adds dimensions, and stays after the gathering.
    """
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor) and all(placement.is_replicate() for placement in tensor.placements[:-1])


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
