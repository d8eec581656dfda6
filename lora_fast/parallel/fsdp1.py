"""What PyTorch's FSDP1, ``FullyShardedDataParallel``, makes of parameters.

It puts the parameters of a unit into one flat parameter. In a forward a module has, in the place of each, a view into
that: a plain tensor, which requires grad if anything in the unit does. With ``use_orig_params=True`` a frozen parameter
can be in one unit with trained ones, and its view requires grad like theirs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# for each flat parameter, the place in it of each parameter, by the id of its module and its name there
_places: Any = WeakIdKeyDictionary()


def is_view(tensor: Any) -> bool:
    """Whether it is a view into a unit's flat parameter, as modules have it in a forward."""
    return type(tensor) is Tensor and hasattr(tensor._base, "_param_infos")


def is_frozen(tensor: Tensor, module: nn.Module, name: str) -> bool:
    """Whether ``tensor``, which is ``module``'s ``name`` in a forward, is a view in the place of a frozen parameter."""
    flat: Any = tensor._base if is_view(tensor) else None
    if flat is None or flat._params is None:  # None without use_orig_params: then one flag is that of all
        return False
    if flat not in _places:
        infos = enumerate(flat._param_infos)
        _places[flat] = {(id(info.module), info.param_name): place for place, info in infos}
    place = _places[flat].get((id(module), name))
    return place is not None and not flat._params[place].requires_grad


def without_gradient(tensor: Any, module: nn.Module, name: str) -> Any:
    """``tensor``, detached where its gradient would be computed for a frozen parameter, and thrown away."""
    if type(tensor) is Tensor and tensor.requires_grad and is_frozen(tensor, module, name):
        return tensor.detach()
    return tensor
