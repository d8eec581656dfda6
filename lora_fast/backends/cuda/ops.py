"""The contract met by the CUDA kernels, for float32, bfloat16 and float16: a linear is one call of the extension.

What that does not take goes through its passes one by one, whose schemas are the CPU's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fast import calls, stacked
from lora_fast.backends import dora
from lora_fast.backends.cpu.ops import merge_weight, weight_norm_fwd
from lora_fast.backends.passes import Gradients, Passes
from lora_fast.backends.plan import Plan
from lora_fast.backends.torch.ops import quantised_norm_fwd, weight_norm_bwd
from lora_fast.gain import dora_gain

_c = torch.ops.lora_fast_c
# an overload takes the host 1.5 µs less than the name that may stand for several
_FORWARDS = {"linear_fwd": _c.linear_fwd.default, "linear_small_fwd": _c.linear_small_fwd.default}


def lora_linear_fwd(call: calls.LoraLinear, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    native = _FORWARDS.get(plan.kernel("y"))
    if native is None:
        return _passes.lora_linear_fwd(call, plan)
    x, weight, bias, lora_A, lora_B, scaling, gain, *_ = call
    if gain is None and bias is not None:
        bias = bias.to(x.dtype)
    keeps = call.keep == "base"
    y, base, h, _ = native(x, weight, bias, lora_A, lora_B, scaling, gain, None, keeps, None, None, 0)
    return y, base, h


def lora_linear_bwd(call: calls.LoraLinearGrad, plan: Plan) -> Gradients:
    if "gradients" not in plan.steps:
        return _passes.lora_linear_bwd(call, plan)
    return _gradients(call, plan, call.gain, None, None, need_gain=call.need_gain)


def _compose(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    product: Tensor | None,
) -> None:
    """In base's dtype, whose products the tensor cores sum in float32."""
    _c.lora_compose_fwd(base, h.to(base.dtype), lora_B.to(base.dtype), scaling, gain, bias, out, product)


_passes = Passes(_compose, _c.lora_gain_bwd, _c.dropout)
lora_compose_fwd = _passes.lora_compose_fwd
lora_compose_bwd = _passes.lora_compose_bwd
dropout = _passes.dropout


def dora_linear_fwd(call: calls.DoraLinear, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    native = _FORWARDS.get(plan.kernel("y"))
    if native is None:
        return dora.dora_linear_fwd(call, plan, weight_norm_fwd, lora_linear_fwd)
    magnitude = call.magnitude.float().contiguous()
    kept_norm, kept_key, version = None, None, 0
    if plan.kernel("norm") == "weight_norm_kept":
        kept_norm, kept_key, version = call.kept_norm, call.kept_key, call.weight._version
    return native(*call[:6], None, magnitude, call.keep == "base", kept_norm, kept_key, version)


def dora_linear_bwd(call: calls.DoraLinearGrad, plan: Plan) -> Gradients:
    if "gradients" not in plan.steps:
        return dora.dora_linear_bwd(call, plan, weight_norm_bwd, lora_linear_bwd)
    magnitude = call.magnitude.float().contiguous()
    need_gain = call.need_magnitude or call.through_norm
    gradients = _gradients(call, plan, None, magnitude, call.norm, need_gain=need_gain)
    if not call.through_norm:
        return gradients
    gain = dora_gain(magnitude, call.norm)
    grad_x, grad_A, grad_B, grad_magnitude, grad_bias = dora.add_through_norm(
        call, plan, gain, gradients, weight_norm_bwd
    )
    return grad_x, grad_A, grad_B, grad_magnitude if call.need_magnitude else magnitude.new_empty(0), grad_bias


def _gradients(
    call: calls.LoraLinearGrad | calls.DoraLinearGrad,
    plan: Plan,
    gain: Tensor | None,
    magnitude: Tensor | None,
    norm: Tensor | None,
    *,
    need_gain: bool,
) -> Gradients:
    kept = call.product, call.h, call.kept == "base"
    needs = call.need_x, call.need_A, call.need_B, need_gain, call.need_bias
    arguments = (*call[:6], gain, magnitude, norm, *kept, *needs)
    if "grad_x" in plan.steps and (stack := stacked.find(call.weight)) is not None:
        with stack.holding(call.lora_A) as rows:
            return _c.linear_bwd.default(*arguments, rows)
    return _c.linear_bwd.default(*arguments)


__all__ = [
    "dora_linear_bwd",
    "dora_linear_fwd",
    "dropout",
    "lora_compose_bwd",
    "lora_compose_fwd",
    "lora_linear_bwd",
    "lora_linear_fwd",
    "merge_weight",
    "quantised_norm_fwd",
    "weight_norm_bwd",
    "weight_norm_fwd",
]
