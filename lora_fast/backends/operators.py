"""LoRA by PyTorch's operators, to which "auto" leaves the calls for which a GPU would wait for the host.

    y = x Wᵀ + bias + s (x lora_Aᵀ) lora_Bᵀ

An op that is written in Python and an autograd Function take the host twice the time of these operators and of the
gradients that PyTorch's own autograd has for them. On the device they take more: the update of the output is in memory
once, and so is that of x's gradient. For backward they keep x and h = x lora_Aᵀ.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import calls
from lora_fast.backends.plan import LinearGrad

DEVICES = ("cuda",)  # types of device that work behind the host's back
WHY = "the device would wait for the host, whom PyTorch's operators and their own gradients take half the time of an op"


def are_faster(device: torch.device, multiply_adds: int, backend: str) -> bool:
    """Whether ``backend`` would rather have the operators than an op for so many multiply-adds of x Wᵀ."""
    if torch.compiler.is_compiling():
        return False  # a traced graph moves between devices and sizes
    if backend != "auto" or device.type not in DEVICES:
        return False
    from lora_fast.backends.device import constants_of

    return multiply_adds <= constants_of(device).operators_bound


def keeps_x_alone(x: Tensor) -> bool:
    """Whether F.linear keeps x itself for the gradient of its weight: more dimensions than two it folds."""
    return x.dim() <= 2 or x.is_contiguous()


def take(call: calls.LoraLinear | LinearGrad, backend: str) -> bool:
    """Whether ``backend`` leaves the call to the operators; its activations are [..., features].

    All dtypes are to be one: gradients that are rounded to the activation's dtype on their way to wider factors would
    be less than ours. It may not be float16, in which the update without its scaling would overflow.
    """
    activation, weight = call[0], call.weight
    if backend != "auto" or activation.device.type not in DEVICES:
        return False  # as are_faster says, without the size that it is asked with
    dtype, bias = activation.dtype, getattr(call, "bias", None)
    return (
        are_faster(activation.device, math.prod(activation.shape[:-1]) * weight.numel(), backend)
        and not call.has_gain
        and call.dropout_p == 0.0
        and dtype == weight.dtype == call.lora_A.dtype == call.lora_B.dtype != torch.float16
        and (bias is None or bias.dtype == dtype)
        and keeps_x_alone(activation)
    )


def lora_linear(call: calls.LoraLinear) -> Tensor:
    """y [..., N], recorded by autograd."""
    update = F.linear(F.linear(call.x, call.lora_A), call.lora_B)
    return torch.add(F.linear(call.x, call.weight, call.bias), update, alpha=call.scaling)
