"""What the public functions have in common: casts under autocast, and whether autograd takes a call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_fast import checks


def as_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As every backend takes it: contiguous, in float64 for an op in float64 alone."""
    if bias is None:
        return None
    return (bias.float() if bias.dtype == torch.float64 != dtype else bias).contiguous()


def cast(x: Tensor, weight: Tensor) -> Tensor:
    """x in autocast's dtype; elsewhere it must be of the weight's.

    The weight is cast inside the op, so that backward keeps the weight itself and no copy.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    checks.check_dtype("x", x, weight.dtype, "weight")
    return x


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd is on and any of the tensors, which may be None, wants a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd takes the call: in eager mode wherever it is on, and for forward-mode differentiation, so that
    jvp and vmap raise instead of losing their derivative; traced, where an input wants a gradient: torch.compile fails
    on a Function none of whose does."""
    if not torch.compiler.is_compiling():
        return torch.is_grad_enabled() or forward_ad._current_level >= 0
    if torch._C._are_functorch_transforms_active():  # the op alone would have no derivative, and nobody would know
        raise RuntimeError("torch.compile cannot trace lora_fast inside a transform of torch.func, such as grad")
    return wants_grad(*tensors)
