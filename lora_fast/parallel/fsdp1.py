"""What PyTorch's FSDP1, ``FullyShardedDataParallel``, makes of parameters.

It puts the parameters of a unit into one flat parameter. In a forward a module has, in the place of each, a view into
that: a plain tensor, which requires grad if anything in the unit does. With ``use_orig_params=True`` a frozen parameter
can be in one unit with trained ones, and its view requires grad like theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

WRAPPED = "_fsdp_wrapped_module"  # under which a wrapper holds its module
# for each flat parameter, the place in it of each parameter, by the id of its module and its name there
_places: Any = WeakIdKeyDictionary()


def is_unit(module: nn.Module) -> bool:
    """Whether it is FSDP1's wrapper around a module."""
    return WRAPPED in module._modules


def owner(module: Any) -> Any:
    """``module``, or what FSDP1's wrapper around it holds."""
    while WRAPPED in module._modules:
        module = module._modules[WRAPPED]
    return module


def is_view(tensor: Any) -> bool:
    """Whether it is a view into a unit's flat parameter, as modules have it in a forward."""
    return type(tensor) is Tensor and hasattr(tensor._base, "_param_infos")


def stored_dtype(view: Tensor) -> torch.dtype:
    """Of a view between forwards."""
    flat: Any = view._base
    return getattr(flat, "_local_shard", flat).dtype


def param_dtype(unit: Any) -> torch.dtype | None:
    """That to which the unit's mixed precision rounds its parameters for a forward; None if it rounds none."""
    dtype: torch.dtype | None = unit.mixed_precision.param_dtype
    return dtype


def is_in_parts(module: nn.Module, name: str, tensor: Any) -> bool:
    """Whether it is what ``module`` has of a parameter between forwards, outside a block that puts the whole there."""
    if not hasattr(tensor, "_fsdp_flattened"):
        return is_view(tensor)
    is_matrix = name == "weight" and isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd))
    return tensor.numel() == 0 or (is_matrix and tensor.dim() < 2)


def is_frozen(tensor: Tensor, module: nn.Module, name: str) -> bool:
    """Whether ``tensor``, which is ``module``'s ``name`` in a forward, is a view in the place of a frozen parameter."""
    flat: Any = tensor._base if is_view(tensor) else None
    if flat is None or flat._params is None:  # None without use_orig_params: then one flag is that of all
        return False
    if flat not in _places:
        places = {(id(info.module), info.param_name): place for place, info in enumerate(flat._param_infos)}
        for info in flat._shared_param_infos:  # of what a second module has too
            places[id(info.module), info.param_name] = places[id(info.prim_module), info.prim_param_name]
        _places[flat] = places
    place = _places[flat].get((id(module), name))
    return place is not None and not flat._params[place].requires_grad


def without_gradient(tensor: Any, module: nn.Module, name: str) -> Any:
    """``tensor``, detached where its gradient would be computed for a frozen parameter, and thrown away."""
    if type(tensor) is Tensor and tensor.requires_grad and is_frozen(tensor, module, name):
        return tensor.detach()
    return tensor
