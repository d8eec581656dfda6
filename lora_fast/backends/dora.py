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
from lora_fast.backends.passes import Gradients
from lora_fast.backends.plan import Plan
from lora_fast.gain import divided, divisor, dora_gain, to_gain_dtype

Op = Callable[[Any, Plan], Any]  # one of a backend's


def dora_linear_fwd(
    call: calls.DoraLinear, plan: Plan, weight_norm_fwd: Op, lora_linear_fwd: Op
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, product, h, norm), for a plan with the steps of both ops."""
    norm = weight_norm_fwd(call.weight_norm(), plan)
    gain = to_gain_dtype(dora_gain(call.magnitude, norm), call.x.dtype)
    return *lora_linear_fwd(call.lora_linear(gain), plan), norm


def dora_linear_bwd(call: calls.DoraLinearGrad, plan: Plan, weight_norm_bwd: Op, lora_linear_bwd: Op) -> Gradients:
    """The gradients to x, lora_A, lora_B, magnitude and bias, for a plan with the steps of both ops."""
    divides = divisor(call.norm)
    gain = to_gain_dtype(divided(call.magnitude, divides), call.grad_y.dtype)
    grad_x, grad_A, grad_B, grad_gain, grad_bias = lora_linear_bwd(call.lora_linear(gain), plan)
    if not (call.need_magnitude or call.through_norm):
        return grad_x, grad_A, grad_B, grad_gain, grad_bias
    gradients = grad_x, grad_A, grad_B, grad_gain / divides, grad_bias
    if call.through_norm:
        gradients = add_through_norm(call, plan, gain, gradients, weight_norm_bwd)
    # the norm may be float64 where the sums over tokens are not
    grad_magnitude = gradients[3].to(grad_gain.dtype) if call.need_magnitude else grad_gain.new_empty(0)
    return *gradients[:3], grad_magnitude, grad_bias


def add_through_norm(
    call: calls.DoraLinearGrad, plan: Plan, gain: Tensor, gradients: Gradients, weight_norm_bwd: Op
) -> Gradients:
    """``gradients`` with the parts of lora_A's and lora_B's that come through the norm, from the magnitude's."""
    grad_x, grad_A, grad_B, grad_magnitude, grad_bias = gradients
    grad_norm = (-gain * grad_magnitude).to(call.norm.dtype)
    through_A, through_B = weight_norm_bwd(call.weight_norm(grad_norm), plan)
    grad_A = grad_A + through_A if call.need_A else grad_A
    grad_B = grad_B + through_B if call.need_B else grad_B
    return grad_x, grad_A, grad_B, grad_magnitude, grad_bias
