"""dora_linear from a backend's weight_norm and lora_linear: what a backend has that makes no kernel for it.

    gain        = magnitude / norm
    d magnitude = d gain / norm        d norm = -gain ⊙ d magnitude, and from there to lora_A and lora_B

Source: DoRA, arXiv 2402.09353, eq. 5; the norm is a constant in section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lora_fast import calls
from lora_fast.backends.plan import Plan
from lora_fast.gain import divisor, dora_gain, to_gain_dtype

Op = Callable[[Any, Plan], Any]  # one of a backend's


def dora_linear_fwd(
    call: calls.DoraLinear, plan: Plan, weight_norm_fwd: Op, lora_linear_fwd: Op
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, product, h, norm), for a plan with the steps of both ops."""
    norm = weight_norm_fwd(call.weight_norm(), plan)
    gain = to_gain_dtype(dora_gain(call.magnitude, norm), call.x.dtype)
    return *lora_linear_fwd(call.lora_linear(gain), plan), norm


def dora_linear_bwd(
    call: calls.DoraLinearGrad, plan: Plan, weight_norm_bwd: Op, lora_linear_bwd: Op
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients to x, lora_A, lora_B, magnitude and bias, for a plan with the steps of both ops."""
    gain = to_gain_dtype(dora_gain(call.magnitude, call.norm), call.grad_y.dtype)
    grad_x, grad_A, grad_B, grad_gain, grad_bias = lora_linear_bwd(call.lora_linear(gain), plan)
    if not (call.need_magnitude or call.through_norm):
        return grad_x, grad_A, grad_B, grad_gain, grad_bias
    wide = grad_gain / divisor(call.norm)
    grad_magnitude = wide.to(grad_gain.dtype)  # the norm may be float64 where the sums over tokens are not
    if call.through_norm:
        grad_norm = (-gain * wide).to(call.norm.dtype)
        through_A, through_B = weight_norm_bwd(call.weight_norm(grad_norm), plan)
        grad_A = grad_A + through_A if call.need_A else grad_A
        grad_B = grad_B + through_B if call.need_B else grad_B
    if not call.need_magnitude:
        grad_magnitude = grad_magnitude.new_empty(0)
    return grad_x, grad_A, grad_B, grad_magnitude, grad_bias
