"""The contract met by the Triton kernels of lora_fast.triton_kernels, as :mod:`lora_fast.backends.triton.plan` chooses.

Here a gain moves to the side that its axis says: to the outputs, or to the inputs (``gain_in``).
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import calls, stacked
from lora_fast.backends import dora
from lora_fast.backends.grouped import Gradients as GroupedGradients
from lora_fast.backends.mlp import MlpGradients, Mlps
from lora_fast.backends.passes import LINEAR, MATMUL, STACKED, Gradients, results_beside
from lora_fast.backends.plan import Plan
from lora_fast.backends.torch.grouped import group_rows as group_rows
from lora_fast.backends.triton import glu, grouped
from lora_fast.content_key import host_key
from lora_fast.triton_kernels import (
    dropout as drop,
    lora_A_grad,
    lora_compose_fwd as compose,
    lora_gain_bwd,
    lora_input_grad,
    lora_linear_small as small,
    lora_project,
    merge_weight as merge,
    quantised_norm,
    weight_norm,
    weight_norm_bwd as norm_bwd,
)


def weight_norm_fwd(call: calls.WeightNorm, plan: Plan) -> Tensor:
    return norm_and_gain(call, plan, None)[0]


def norm_and_gain(call: calls.WeightNorm, plan: Plan, magnitude: Tensor | None) -> tuple[Tensor, Tensor]:
    """(norm, magnitude / norm); the latter is empty without a magnitude."""
    factors = call.weight, call.lora_A, call.lora_B, call.scaling, call.axis
    with _on_device_of(call.weight):
        if plan.kernel("norm") == "weight_norm_fwd":
            return weight_norm.weight_norm_fwd(*factors, magnitude)
        assert call.kept_norm is not None
        assert call.kept_key is not None
        host = host_key(*factors, call.weight._version)
        return weight_norm.weight_norm_kept(*factors, call.kept_norm, call.kept_key, host, magnitude)


def weight_norm_bwd(call: calls.WeightNormGrad, plan: Plan) -> tuple[Tensor, Tensor]:
    factors = call.weight, call.lora_A, call.lora_B, call.scaling, call.axis
    with _on_device_of(call.weight):
        return norm_bwd.weight_norm_bwd(call.grad, call.norm, *factors, need_A=call.need_A, need_B=call.need_B)


def quantised_norm_fwd(call: calls.QuantisedNorm, plan: Plan) -> Tensor:
    with _on_device_of(call.codes):
        if plan.kernel("norm") == "quantised_norm_fwd":
            return quantised_norm.quantised_norm_fwd(*call[:7])
        assert call.kept_norm is not None
        assert call.kept_key is not None
        factors = call.lora_A, call.lora_B, call.scaling
        host = host_key(call.codes, *factors, call.dtype, call.codes._version, *call.others)
        return quantised_norm.quantised_norm_kept(*call[:7], call.kept_norm, call.kept_key, host)


def merge_weight(call: calls.MergeWeight, plan: Plan) -> None:
    with _on_device_of(call.weight):
        merge.merge_weight(*call)


def lora_linear_fwd(call: calls.LoraLinear, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, lora_A, lora_B, scaling, _, _, dropout_p, seed, keep = call
    gain, gain_in = _sides(call)
    with _on_device_of(x):
        if plan.kernel("y") == "lora_linear_small_fwd":
            return small.lora_linear_small_fwd(
                x, weight, bias, lora_A, lora_B, scaling, gain, gain_in, dropout_p, seed, keep_base=keep == "base"
            )
        h = project(call, plan)
        if gain_in is not None:
            x = _scaled_input(x, gain_in)
        # under autocast W is cast as nn.Linear's is
        weight = weight.to(x.dtype)
        if gain is None:
            y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
            add_update(y, h, lora_B, scaling, plan.kernel("y"))
            return y, y.new_empty(0), h
        base = F.linear(x, weight)
        y, product, kept = results_beside(base, keep)
        compose.lora_compose_fwd(base, h, lora_B, scaling, gain, bias, y, product)
        return y, kept, h


def lora_linear_bwd(call: calls.LoraLinearGrad, plan: Plan) -> Gradients:
    grad_y = call.grad_y
    gain, gain_in = _sides(call)
    need_gain_in = gain_in is not None and call.need_gain
    need_input = call.need_x or need_gain_in
    need_h = need_input or call.need_A
    in_pass = plan.kernel("grad_h") == "lora_gain_bwd"
    with _on_device_of(grad_y):
        stack = stacked.find(call.weight) if plan.kernel("grad_x") == STACKED else None
        # dv, then dh and zeros
        both = None if stack is None else grad_y.new_empty(grad_y.shape[0], stack.shape[0])
        left, right = (None, None) if both is None else both.tensor_split((grad_y.shape[1],), dim=1)
        grad_v, grad_gain, grad_bias, grad_B, grad_h = lora_gain_bwd.lora_gain_bwd(
            grad_y,
            call.product,
            gain,
            call.h,
            call.lora_B,
            call.scaling,
            from_base=call.kept == "base",
            need_v=need_input or (need_h and plan.kernel("grad_h") == MATMUL),
            need_gain=gain is not None and call.need_gain,
            need_bias=call.need_bias,
            need_B=call.need_B,
            need_h=need_h and in_pass,
            grad_v=left,
            grad_h=right,
        )
        if gain is None:
            grad_v = grad_y
        grad_x, grad_A = grad_y.new_empty(0), call.lora_A.new_empty(0)
        if need_h and not in_pass:
            grad_h = h_grad(call, plan, grad_v, right)
        if call.need_A:
            grad_A = A_grad(call, plan, grad_h)
        if need_input:
            grad_x, grad_gain_in = input_grad(call, plan, grad_v, grad_h, stack, both)
            grad_gain = grad_gain_in if need_gain_in else grad_gain
            grad_x = grad_x if call.need_x else grad_y.new_empty(0)
    return grad_x, grad_A, grad_B, grad_gain, grad_bias


def lora_compose_fwd(call: calls.LoraCompose, plan: Plan) -> tuple[Tensor, Tensor]:
    base, h, lora_B, scaling, gain, bias, keep = call
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    product = torch.empty_like(y) if keep == "product" else None
    with _on_device_of(base):
        compose.lora_compose_fwd(base, h, lora_B, scaling, gain, bias, y, product)
    return y, y.new_empty(0) if product is None else product


def lora_compose_bwd(call: calls.LoraComposeGrad, plan: Plan) -> Gradients:
    grad_y, in_pass = call.grad_y, plan.kernel("grad_h") == "lora_gain_bwd"
    with _on_device_of(grad_y):
        grad_base, grad_gain, grad_bias, grad_B, grad_h = lora_gain_bwd.lora_gain_bwd(
            grad_y,
            call.product,
            call.gain,
            call.h,
            call.lora_B,
            call.scaling,
            from_base=call.kept == "base",
            need_v=call.need_base or (call.need_h and plan.kernel("grad_h") == MATMUL),
            need_gain=call.gain is not None and call.need_gain,
            need_bias=call.need_bias,
            need_B=call.need_B,
            need_h=call.need_h and in_pass,
        )
        if call.need_h and not in_pass:
            grad_h = h_grad(call, plan, grad_y if call.gain is None else grad_base)
    grad_base = grad_base if call.need_base else grad_y.new_empty(0)
    return grad_base, grad_h.to(call.h.dtype), grad_B, grad_gain, grad_bias


def dropout(call: calls.Dropout, plan: Plan) -> Tensor:
    with _on_device_of(call.x):
        return drop.dropout(*call)


def dora_linear_fwd(call: calls.DoraLinear, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm, gain = norm_and_gain(call.weight_norm(), plan, call.magnitude)
    return *lora_linear_fwd(call.lora_linear(gain), plan), norm


def dora_linear_bwd(call: calls.DoraLinearGrad, plan: Plan) -> Gradients:
    return dora.dora_linear_bwd(call, plan, weight_norm_bwd, lora_linear_bwd)


def grouped_lora_fwd(call: calls.GroupedLora, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    with _on_device_of(call.x):
        return grouped.grouped_lora_fwd(call, plan)


def grouped_lora_bwd(call: calls.GroupedLoraGrad, plan: Plan) -> GroupedGradients:
    with _on_device_of(call.grad_y):
        return grouped.grouped_lora_bwd(call, plan)


def grouped_weight_norm_fwd(call: calls.GroupedWeightNorm, plan: Plan) -> Tensor:
    with _on_device_of(call.weight):
        return grouped.grouped_weight_norm_fwd(call, plan)


def grouped_weight_norm_bwd(call: calls.GroupedWeightNormGrad, plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
    with _on_device_of(call.weight):
        return grouped.grouped_weight_norm_bwd(call, plan)


def lora_glu_fwd(call: calls.LoraGlu, plan: Plan) -> Tensor:
    with _on_device_of(call.base_gate):
        return glu.lora_glu_fwd(call, plan)


def lora_glu_bwd(call: calls.LoraGluGrad, plan: Plan) -> tuple[Tensor, ...]:
    with _on_device_of(call.grad):
        return glu.lora_glu_bwd(call, plan)


def _gain_bwd(
    grad: Tensor, product: Tensor | None, gain: Tensor | None, *, need_scaled: bool, need_gain: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return lora_gain_bwd.lora_gain_bwd(
        grad, product, gain, None, None, 1.0, need_v=need_scaled, need_gain=need_gain, need_bias=need_bias
    )[:3]


_mlps = Mlps(glu.lora_glu_fwd, glu.lora_glu_bwd, compose.lora_compose_fwd, _gain_bwd)


def adapted_mlp_fwd(call: calls.AdaptedMlp, plan: Plan) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    with _on_device_of(call.x):
        return _mlps.adapted_mlp_fwd(call, plan)


def adapted_mlp_bwd(call: calls.AdaptedMlpGrad, plan: Plan) -> MlpGradients:
    with _on_device_of(call.grad_y):
        return _mlps.adapted_mlp_bwd(call, plan)


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever the tensors'."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def _sides(call: calls.LoraLinear | calls.LoraLinearGrad) -> tuple[Tensor | None, Tensor | None]:
    """(the outputs' gain, the inputs'), of which one at most is there."""
    return (call.gain, None) if call.axis == "output" else (None, call.gain)


def _scaled_input(x: Tensor, gain_in: Tensor) -> Tensor:
    return lora_gain_bwd.lora_gain_bwd(x, None, gain_in, None, None, 1.0, need_v=True)[0]


def project(call: calls.LoraLinear, plan: Plan) -> Tensor:
    """h = drop(x ⊙ gain_in) lora_Aᵀ"""
    if plan.kernel("h") == LINEAR:
        return F.linear(call.x, call.lora_A.to(call.x.dtype))
    return lora_project.lora_project(call.x, call.lora_A, _sides(call)[1], call.dropout_p, call.seed)


def add_update(base: Tensor, h: Tensor, lora_B: Tensor, scaling: float, kernel: str) -> None:
    """base += s h lora_Bᵀ, in place"""
    if kernel == "addmm_":
        base.addmm_(h, lora_B.T.to(base.dtype), alpha=scaling)
    else:
        compose.lora_compose_fwd(base, h, lora_B, scaling, None, None, base, None)


def h_grad(
    call: calls.LoraLinearGrad | calls.LoraComposeGrad, plan: Plan, grad_v: Tensor, out: Tensor | None = None
) -> Tensor:
    """dh = s dv lora_B, in ``out`` if that is given; ``grad_v`` is empty where nothing else needs it, and the kernel
    scales grad_y as it reads it"""
    grad_y, R = call.grad_y, call.lora_B.shape[1]
    if plan.kernel("grad_h") == MATMUL:
        # PyTorch's products in 16 bits on a CPU read what lies in rows that are apart, also for beta = 0
        grad_h = grad_y.new_empty(grad_y.shape[0], R) if out is None else out.zero_()[:, :R]
        return grad_h.addmm_(grad_v, call.lora_B.to(grad_y.dtype), beta=0, alpha=call.scaling)
    source, gain = (grad_v, None) if grad_v.shape == grad_y.shape else (grad_y, call.gain)
    return lora_gain_bwd.lora_grad_h(source, call.lora_B, call.scaling, gain, out)[:, :R]


def A_grad(call: calls.LoraLinearGrad, plan: Plan, grad_h: Tensor) -> Tensor:
    """dhᵀ drop(x ⊙ gain_in), rounded once to lora_A's dtype"""
    assert call.x is not None
    if plan.kernel("grad_A") == MATMUL:
        return grad_h.T @ call.x
    gain_in = _sides(call)[1]
    return lora_A_grad.lora_A_grad(grad_h, call.x, gain_in, call.dropout_p, call.seed, call.lora_A.dtype)


def input_grad(
    call: calls.LoraLinearGrad,
    plan: Plan,
    grad_v: Tensor,
    grad_h: Tensor,
    stack: stacked.Stack | None = None,
    both: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx, d gain_in), of dv W + drop(dh lora_A); with a ``stack``, of ``both``, which is [dv | dh]"""
    weight, lora_A, x, gain_in = call.weight, call.lora_A, call.x, _sides(call)[1]
    if stack is not None and both is not None:
        with stack.holding(lora_A) as rows:
            if rows is not None:
                product = both @ rows
                return product, product.new_empty(0)
    need_gain = gain_in is not None and call.need_gain
    if plan.kernel("grad_x") == "lora_input_grad":
        return lora_input_grad.lora_input_grad(
            grad_v, weight, grad_h, lora_A, call.dropout_p, call.seed, gain_in, x, need_gain_in=need_gain
        )
    grad_x = grad_v @ weight.to(grad_v.dtype)
    update = plan.kernel("grad_x")
    add_update(grad_x, grad_h, lora_A.T, 1.0, "lora_compose_fwd" if update == STACKED else update)
    if gain_in is None:
        return grad_x, grad_x.new_empty(0)
    return lora_gain_bwd.lora_gain_bwd(grad_x, x, gain_in, None, None, 1.0, need_v=True, need_gain=need_gain)[:2]
