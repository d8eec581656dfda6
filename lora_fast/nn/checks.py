"""What the modules and :func:`lora_fast.apply` accept. Every check is made before anything is changed."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any, TypeGuard

from torch import nn
from torch.nn.utils import parametrize

from lora_fast import bases
from lora_fast.dtypes import FLOATS
from lora_fast.nn import hooks
from lora_fast.nn.names import Place, wrapped_attribute
from lora_fast.parallel import zero

_DTYPE_NAMES = "float64, float32, bfloat16 or float16"


def is_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Whether it is a torch.nn.Linear, or a quantised linear, taken or not, which has the same sizes and bias."""
    return isinstance(module, nn.Linear) or bases.is_quantised(module)


def check_linear(linear: Any, name: str = "linear") -> None:
    """Raise TypeError unless ``linear`` computes F.linear(x, weight, bias) of plain parameters, and nothing else; or is
    quantised in a format of :mod:`lora_fast.bases`.

    The adapter reads the parameters and never calls the module, so whatever a subclass, a parametrization or a hook
    would add to that equation would be lost without a word.
    """
    kind = type(linear).__module__ + "." + type(linear).__qualname__
    is_quantised = bases.is_quantised(linear)
    if not (isinstance(linear, nn.Linear) or is_quantised):
        raise TypeError(
            f"{name}: got {kind}, expected torch.nn.Linear, or a quantised one of those in docs/quantised.md"
        )
    if reason := bases.refusal(linear):
        raise TypeError(f"{name}: {reason}")
    if parametrize.is_parametrized(linear):
        raise TypeError(f"{name}: it is parametrized; remove the parametrization first")
    if hooks.has_accelerate_hook(linear):
        raise TypeError(
            f"{name}: it is offloaded or dispatched by accelerate; call "
            "accelerate.hooks.remove_hook_from_submodules(model) first, and offload again afterwards"
        )
    if hooks.has_own_forward(linear):
        raise TypeError(f"{name}: {kind} has a forward of its own; only torch.nn.Linear's forward can be replaced")
    for parameter_name in () if is_quantised else ("weight", "bias"):
        parameter: Any = linear._parameters.get(parameter_name, ...)
        if parameter_name == "bias" and parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            found = type(getattr(linear, parameter_name, None)).__name__
            raise TypeError(
                f"{name}.{parameter_name}: got {found}, expected a plain torch.nn.Parameter; "
                "distributed (DTensor) and computed (weight_norm, pruning) weights are not supported"
            )
        if parameter.dtype not in FLOATS:
            raise TypeError(f"{name}.{parameter_name}: got {parameter.dtype}, expected {_DTYPE_NAMES}")
    if not is_quantised and zero.shape(linear.weight) != (linear.out_features, linear.in_features):
        raise TypeError(
            f"{name}.weight: got shape {list(zero.shape(linear.weight))}, expected [out, in] = "
            f"{[linear.out_features, linear.in_features]}; a part of a weight cannot be adapted"
        )
    if hooks.has_hooks(linear):
        raise TypeError(f"{name}: it has hooks, which would no longer be called; remove them and register them anew")


def check_not_distributed(model: nn.Module) -> None:
    """Raise ValueError for a model whose parameters another one has already arranged to synchronise or to shard."""
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in (
                "DistributedDataParallel",
                "FullyShardedDataParallel",
                "FSDPModule",
                "DeepSpeedEngine",
            ):
                raise ValueError(
                    f"model: it holds a {kind.__name__}, which would not synchronise parameters that come after it; "
                    "put the adapters in first, and wrap the model afterwards"
                )


def check_replaceable(place: Place) -> None:
    """Raise TypeError for a linear that torch.compile holds by itself: the compiled code would go on calling it."""
    if place.holder is not None and wrapped_attribute(place.holder) == "_orig_mod":
        raise TypeError(f"{place.name}: it is compiled by itself; call torch.compile after the layer was adapted")


def check_rank(rank: Any) -> int:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral):
        raise TypeError(f"rank: got {rank!r}, expected a positive int")
    if rank < 1:
        raise ValueError(f"rank: got {rank}, expected at least 1")
    return int(rank)


def warn_of_large_rank(rank: int, linear: nn.Linear, stacklevel: int) -> None:
    smaller = min(linear.in_features, linear.out_features)
    if rank > smaller:
        warnings.warn(
            f"rank {rank} is above min(in_features, out_features) = {smaller}: the update cannot have that rank",
            stacklevel=stacklevel + 1,
        )


def check_alpha(alpha: Any) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"alpha: got {alpha!r}, expected a number")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: got {alpha}, expected a finite number")
    return float(alpha)


def check_dropout(dropout: Any) -> float:
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real):
        raise TypeError(f"dropout: got {dropout!r}, expected a number in [0, 1)")
    probability = float(dropout)
    if not 0 <= probability < 1:
        raise ValueError(f"dropout: got {dropout}, expected a number in [0, 1)")
    return probability


def check_adapter_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"adapter_dtype: got {dtype!r}, expected {_DTYPE_NAMES}, or None for the linear's")
