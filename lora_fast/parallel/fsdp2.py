"""What PyTorch's FSDP2 does to the layers it is applied to, told from its public names and, where they do not tell,
from the record that it has of each parameter.

Between calls ``fully_shard`` keeps parameters as DTensors, in shards. For the call of a module it was applied to, it
puts plain parameters into that module and those within it, but for the modules within that it was applied to as well.
It makes that module an instance of a new class, derived from ``FSDPModule`` and the class before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
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


def modules_within(model: nn.Module) -> set[int]:
    """The ids of the modules of ``model`` that ``fully_shard`` was applied to, and of all within those."""
    return {id(inner) for module in model.modules() if is_unit(module) for inner in module.modules()}


def param_dtype(unit: Any) -> torch.dtype | None:
    """That to which the unit's mixed precision rounds its parameters for a forward; None if it rounds none."""
    dtype: torch.dtype | None = unit._get_fsdp_state()._mp_policy.param_dtype
    return dtype


def manages(module: nn.Module) -> bool:
    """Whether FSDP2 has parameters of the module itself, at any time of its life."""
    return next(_own_parameters(module), None) is not None or _shares(module)


def stored_dtype(module: nn.Module, name: str) -> torch.dtype | None:
    """Of the module's parameter ``name`` between forwards; None if FSDP2 has no such one, or has not run yet."""
    for parameter in _own_parameters(module):
        if parameter._module_info.param_name == name:
            return getattr(parameter, "orig_dtype", None)
    return None


def _own_parameters(module: nn.Module) -> Iterator[Any]:
    """FSDP2's records of the parameters that the module holds first, from the hooks that it leaves there."""
    for hook in module._load_state_dict_post_hooks.values():
        if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp."):
            cells: Any = hook.__closure__
            yield cells[0].cell_contents


def _shares(module: nn.Module) -> bool:
    """Whether a module of a unit has a parameter that ``module`` has too: it leaves no hook on the second."""
    if torch.compiler.is_compiling():
        return _has_units()  # it may be so: a trace cannot look through them
    states = (reference() for reference in _units())
    return any(
        module is other
        for state in states
        for group in _groups(state)
        for parameter in group.fsdp_params
        for other in parameter._module_info.shared_modules
    )


def _units() -> list[Any]:
    """References to the states of all units in this process."""
    module = sys.modules.get("torch.distributed._composable_state")
    return list(getattr(module, "_module_state_mapping", {}).values())


def _has_units() -> bool:
    return bool(_units())


# as torch.compiler.assume_constant_result does, which imports the compiler: it is asked when a trace is made
_has_units._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _groups(state: Any) -> Sequence[Any]:
    """The groups of parameters of a unit, of which earlier releases of PyTorch have one or none."""
    single = getattr(state, "_fsdp_param_group", None)
    found: Sequence[Any] = getattr(state, "_fsdp_param_groups", [single] if single is not None else [])
    return found


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
