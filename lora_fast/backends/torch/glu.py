"""What a gated MLP hands to its down linear, and its gradients, in PyTorch calls over blocks of tokens.

v_p = base_p + s_p h_p lora_B_pᵀ        z_p = gain_p ⊙ v_p + bias_p        a = act(z_gate) ⊙ z_up
dz_gate = da ⊙ z_up ⊙ act'(z_gate)      dz_up = da ⊙ act(z_gate)
dbase_p = gain_p ⊙ dz_p                 dgain_p = Σ_t dz_p ⊙ v_p           dbias_p = Σ_t dz_p
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import calls
from lora_fast.backends.passes import token_chunks
from lora_fast.backends.plan import Plan
from lora_fast.calls import Activation
from lora_fast.dtypes import accumulate_dtype

GluGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def lora_glu_fwd(call: calls.LoraGlu, plan: Plan) -> Tensor:
    output = torch.empty_like(call.base_gate, memory_format=torch.contiguous_format)
    for some in token_chunks(*output.shape):
        (_, gate), (_, up) = _outputs(call, some)
        output[some] = activated(gate, call.activation).mul_(up)
    return output


def lora_glu_bwd(call: calls.LoraGluGrad, plan: Plan) -> GluGradients:
    grad, sums = call.grad, accumulate_dtype(call.grad)
    tokens, width = grad.shape
    grad_bases = grad.new_empty((tokens, 2 * width) if call.joined else (2, tokens, width))
    halves = grad_bases.chunk(2, 1) if call.joined else grad_bases.unbind()
    output = grad.new_empty((tokens, width) if call.need_output else 0)
    needs = (call.need_gain_gate, call.need_gain_up), (call.need_bias_gate, call.need_bias_up)
    grad_gain, grad_bias = ([grad.new_zeros(width if need else 0, dtype=sums) for need in pair] for pair in needs)
    for some in token_chunks(tokens, width):
        (v_gate, gate), (v_up, up) = _outputs(call, some)
        act, slope = activated(gate, call.activation), slope_of(gate, call.activation)
        wide = grad[some].to(sums)
        if call.need_output:
            output[some] = act * up
        parts = slope.mul_(up).mul_(wide), act.mul_(wide)
        for i, (part, v, gain) in enumerate(zip(parts, (v_gate, v_up), (call.gain_gate, call.gain_up), strict=True)):
            if needs[0][i]:
                grad_gain[i] += v.mul_(part).sum(0)
            if needs[1][i]:
                grad_bias[i] += part.sum(0)
            halves[i][some] = part if gain is None else part.mul_(gain)
    return grad_bases, output, grad_gain[0], grad_gain[1], grad_bias[0], grad_bias[1]


def _outputs(call: calls.LoraGlu | calls.LoraGluGrad, some: slice) -> list[tuple[Tensor, Tensor]]:
    """(v, z) of gate and of up, in the dtype of sums."""
    return [
        _output(call.base_gate, call.h_gate, call.lora_B_gate, call.scaling_gate, call.gain_gate, call.bias_gate, some),
        _output(call.base_up, call.h_up, call.lora_B_up, call.scaling_up, call.gain_up, call.bias_up, some),
    ]


def _output(
    base: Tensor,
    h: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    gain: Tensor | None,
    bias: Tensor | None,
    some: slice,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(base)
    v = base[some].to(dtype, copy=True)
    if h is not None and lora_B is not None:
        v.addmm_(h[some].to(dtype), lora_B.to(dtype).T, alpha=scaling)
    z = v if gain is None else v * gain
    return v, z if bias is None else z + bias.to(dtype)


def activated(z: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="none" if activation == "gelu" else "tanh")


def slope_of(z: Tensor, activation: Activation) -> Tensor:
    """The activation's derivative. Where it is 0 or 1 but for a rounding, nothing overflows on the way."""
    if activation == "gelu":
        density = torch.exp(z.square().mul_(-0.5)).mul_((2 * math.pi) ** -0.5)
        return torch.special.erfc(z * -(0.5**0.5)).mul_(0.5).add_(density.mul_(z))
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        return (1 - sigmoid).mul_(z).add_(1).mul_(sigmoid)
    scale, near = 2 * math.sqrt(2 / math.pi), z.clamp(-30, 30)
    squares = near.square()
    argument = near * squares.mul(0.044715).add_(1).mul_(scale)
    rest = torch.sigmoid(-argument)  # 1 - σ, whose rounding would grow with the factor behind it
    factor = near.mul_(squares.mul_(3 * 0.044715).add_(1).mul_(scale))
    return rest.mul_(factor).add_(1).mul_(torch.sigmoid(argument))
