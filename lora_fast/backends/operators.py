"""LoRA by PyTorch's operators, to which "auto" leaves the calls whose time is the host's.

    y = x Wᵀ + bias + s (x lora_Aᵀ) lora_Bᵀ

An op that is written in Python and an autograd Function take the host twice the time of these operators and of the
gradients that PyTorch's own autograd has for them. On a GPU they take more of the device's time: the update of the
output is in memory once, and so is that of x's gradient. On a CPU they are for little work, and for one token on
Intel's, where PyTorch's product reads a float32 matrix as fast as the memory gives it. For backward they keep x and
h = x lora_Aᵀ.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import calls
from lora_fast.backends import extension
from lora_fast.backends.plan import LinearGrad

DEVICES = ("cuda",)  # types of device that work behind the host's back
# Multiply-adds of x Wᵀ in float32, on Intel's processors and on others, where MKL, PyTorch's library for the product,
# is slower. Step and inference × the op's, 2 threads, on an Intel Xeon without AMX: 512 × 512, 4 tokens 0.85 and 0.76,
# 16 tokens 0.94 and 1.08; 2048 × 2048, 1 token 0.85 and 0.85, 4 tokens 1.19 and 1.30. On an AMD EPYC of family 26
# (Zen 5): 256 × 256, 1 token 0.74 and 0.67, 4 tokens 1.02 and 1.06; 512 × 512, 1 token 0.86 and 0.91, 4 tokens 1.50 and
# 1.66; 2048 × 2048, 1 token 1.50 and 1.77.
INTEL_BOUND, CPU_BOUND = 1 << 22, 1 << 18
WHY = "the time is the host's, whom PyTorch's operators and their own gradients take half the time of an op"


def may_be_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`are_faster` for some size."""
    return device.type in DEVICES or (device.type == "cpu" and dtype == torch.float32)


def are_faster(x: Tensor, multiply_adds: int) -> bool:
    """Whether "auto" would rather have the operators than an op for x [..., K] and so many of x Wᵀ."""
    if torch.compiler.is_compiling() or not may_be_faster(x.device, x.dtype):  # a graph moves between devices and sizes
        return False
    if x.device.type not in DEVICES:
        if _counts_as_intel():
            return multiply_adds <= INTEL_BOUND or math.prod(x.shape[:-1]) == 1
        return multiply_adds <= CPU_BOUND
    from lora_fast.backends.device import constants_of

    return multiply_adds <= constants_of(x.device).operators_bound


@functools.cache
def _counts_as_intel() -> bool:
    """Whether the processor is Intel's, or nothing tells: without the extension, beside which they were measured."""
    return extension.missing() is not None or extension.cpu_family()[0] == "GenuineIntel"


def keeps_x_alone(x: Tensor) -> bool:
    """Whether F.linear keeps x itself for the gradient of its weight: more dimensions than two it folds."""
    return x.dim() <= 2 or x.is_contiguous()


def take(call: calls.LoraLinear | LinearGrad, backend: str) -> bool:
    """Whether ``backend`` leaves the call to the operators; its activations are [..., features].

    All dtypes are to be one: gradients that are rounded to the activation's dtype on their way to wider factors would
    be less than ours. It may not be float16, in which the update without its scaling would overflow.
    """
    activation, weight = call[0], call.weight
    dtype, bias = activation.dtype, getattr(call, "bias", None)
    return (
        backend == "auto"
        and are_faster(activation, math.prod(activation.shape[:-1]) * weight.numel())
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
