"""The contract met by the CUDA kernels, for float32, bfloat16 and float16; they share the CPU's schemas."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fast import calls
from lora_fast.backends import dora
from lora_fast.backends.cpu.ops import merge_weight, native_fwd, weight_norm_fwd
from lora_fast.backends.passes import Gradients, Passes
from lora_fast.backends.plan import Plan
from lora_fast.backends.torch.ops import weight_norm_bwd

_c = torch.ops.lora_fast_c


def lora_linear_fwd(call: calls.LoraLinear, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    if plan.kernel("y") != "lora_linear_small_fwd":
        return _passes.lora_linear_fwd(call, plan)
    assert call.gain is not None
    return native_fwd(_c.lora_linear_small_fwd, call, call.gain, None if call.bias is None else call.bias.contiguous())


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
lora_linear_bwd = _passes.lora_linear_bwd
lora_compose_fwd = _passes.lora_compose_fwd
lora_compose_bwd = _passes.lora_compose_bwd
dropout = _passes.dropout


def dora_linear_fwd(call: calls.DoraLinear, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return dora.dora_linear_fwd(call, plan, weight_norm_fwd, lora_linear_fwd)


def dora_linear_bwd(call: calls.DoraLinearGrad, plan: Plan) -> Gradients:
    return dora.dora_linear_bwd(call, plan, weight_norm_bwd, lora_linear_bwd)


__all__ = [
    "dora_linear_bwd",
    "dora_linear_fwd",
    "dropout",
    "lora_compose_bwd",
    "lora_compose_fwd",
    "lora_linear_bwd",
    "lora_linear_fwd",
    "merge_weight",
    "weight_norm_bwd",
    "weight_norm_fwd",
]
