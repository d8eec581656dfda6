"""The plans of the CUDA kernels: they take what the host's time would bind, and yield the rest to Triton's.

``constants`` says up to which size that is, and which of the two takes the norm alone
(:mod:`lora_fast.triton_kernels.constants`).
"""

from __future__ import annotations

import functools

import torch

from lora_fast import calls
from lora_fast.backends.device import constants_of
from lora_fast.backends.passes import LINEAR, MATMUL, STACKED
from lora_fast.backends.plan import Linear, LinearGrad, Plan, Refusal, Step, is_stacked, joined, may_keep_norm
from lora_fast.triton_kernels.constants import FEW_TOKENS

SMALL_RANK = 1024  # which the tests reach
# Up to this rank the norm costs little more than Triton's, and in training to make it anew costs less than to look
# whether a kept one holds, which no optimizer's step leaves. On an H200 it took 34 µs at 4096² and rank 64, Triton's
# 24; at 8192² and rank 384 they took 389 and 126.
NORM_RANK = 64

_EPILOGUE = "native kernels: update, gain and bias in one pass after cuBLAS's product"
_ONE_CALL = "one C++ call makes all launches, cuBLAS's products among them"
_FEW = "W is read once, by two launches, in one C++ call with the norm's"
_ONE_READ = "one native pass over W"
_BLOCKS = "PyTorch's products over blocks of rows: no native kernel was made for it"
_NORM = Plan({"norm": Step("weight_norm_fwd", _ONE_READ)})
_NORM_KEPT = Plan({"norm": Step("weight_norm_kept", f"{_ONE_READ}; nothing where nothing has changed")})
weight_norm_bwd = Plan({"grad_V": Step("chunks of rows", _BLOCKS)}, yields=True)
_SMALL = Plan({"y": Step("linear_small_fwd", _FEW)})
_LINEAR = Plan({"y": Step("linear_fwd", _ONE_CALL)})
_LINEAR_GRAD = Plan({"gradients": Step("linear_bwd", _ONE_CALL)})
_STACKED_GRAD = Plan(
    {**_LINEAR_GRAD.steps, "grad_x": Step(STACKED, "in that call, or as without room while it is taken")}
)
_PASSES = Plan(
    {"h": Step(LINEAR, _EPILOGUE), "base": Step(LINEAR, _EPILOGUE), "y": Step("lora_compose_fwd", _EPILOGUE)},
    yields=True,
)
_LINEARS = {plan.kernel("y"): plan for plan in (_SMALL, _LINEAR, _PASSES)}
_PASSES_GRAD = Plan({"grad_v": Step("lora_gain_bwd", _EPILOGUE), "grad_x": Step(MATMUL, _EPILOGUE)}, yields=True)
lora_compose_fwd = Plan({"y": Step("lora_compose_fwd", _EPILOGUE)}, yields=True)
lora_compose_bwd = Plan({"grad_v": Step("lora_gain_bwd", _EPILOGUE)}, yields=True)
dropout = Plan({"y": Step("dropout", "one pass, the mask never in memory")}, yields=True)
# A batch of many adapters is few launches on Triton as well, and under a captured graph the host's time is nothing.
group_rows = grouped_lora_fwd = grouped_lora_bwd = grouped_weight_norm_fwd = grouped_weight_norm_bwd = Refusal(
    "it has no kernels for rows of many adapters"
)
lora_glu_fwd = lora_glu_bwd = adapted_mlp_fwd = adapted_mlp_bwd = Refusal("it has no kernels for a gated MLP")
quantised_norm_fwd = Refusal("it has no kernel for a quantised weight's norm")
merge_weight = Plan({"weight": Step("merge_weight", _ONE_READ)}, yields=True)


def weight_norm_fwd(call: calls.WeightNorm) -> Plan:
    yields = constants_of(call.weight.device).norm_backend != "cuda"
    return _yielding(_NORM_KEPT if may_keep_norm(call) else _NORM, yields=yields)


def lora_linear_fwd(call: Linear) -> Plan:
    if call.keep == "product" or not _in_one_call(call, call.x):
        return _PASSES
    # without a gain the product stays PyTorch's, so that lora_B = 0 gives nn.Linear's output to the bit
    plan = _SMALL if call.has_gain and _in_lines(call) else _LINEAR
    return _yielding(plan, yields=not _is_host_bound(call, call.x))


def lora_linear_bwd(call: LinearGrad) -> Plan:
    if not _in_one_call(call, call.grad_y):
        return _PASSES_GRAD
    linear = _STACKED_GRAD if is_stacked(call, constants_of(call.grad_y.device).stacked_tokens) else _LINEAR_GRAD
    return _yielding(linear, yields=not _is_host_bound(call, call.grad_y))


def dora_linear_fwd(call: calls.DoraLinear) -> Plan:
    linear, low = lora_linear_fwd(call), call.lora_A.shape[0] <= NORM_RANK
    trains = call.keep != "nothing"
    is_kept = may_keep_norm(call) and not (trains and low)
    anew = trains or not is_kept
    return _yielding(_with_norm(linear.kernel("y"), is_kept), yields=linear.yields or (anew and not low))


@functools.cache
def _with_norm(y: str, is_kept: bool) -> Plan:
    """dora_linear's plan around the kernel for y."""
    return joined(_NORM_KEPT if is_kept else _NORM, _LINEARS[y])


def dora_linear_bwd(call: calls.DoraLinearGrad) -> Plan:
    linear = lora_linear_bwd(call)
    if call.through_norm:
        return _yielding(joined(weight_norm_bwd, linear), yields=True)
    return _yielding(linear, yields=call.kept != "nothing" and call.lora_A.shape[0] > NORM_RANK)


def _yielding(plan: Plan, *, yields: bool) -> Plan:
    return plan._replace(yields=True) if yields else plan


def _in_one_call(call: Linear | LinearGrad, activation: torch.Tensor) -> bool:
    """Whether linear_fwd and linear_bwd take the call: the same answer for a forward and its backward."""
    dtype = activation.dtype
    return (
        (call.axis == "output" or not call.has_gain)
        and call.dropout_p == 0.0
        and activation.shape[0] > 0
        and call.weight.numel() > 0
        and call.weight.dtype == dtype
        and call.lora_A.dtype in (dtype, torch.float32)
        and call.lora_B.dtype in (dtype, torch.float32)
    )


def _is_host_bound(call: Linear | LinearGrad, activation: torch.Tensor) -> bool:
    """Whether the device is expected to wait for the host: then fewer calls count for more than faster kernels.

    In the capture of a graph too, whose replays take none of the host's time, and where Triton's kernels would be
    faster: their first launch loads them, which may not be done in a capture, and what ran before it took these.
    """
    multiply_adds = activation.shape[0] * call.weight.numel()
    return multiply_adds <= constants_of(activation.device).host_bound


def _in_lines(call: Linear) -> bool:
    """Whether two launches take a linear of one call: up to 16 tokens in 16 bits, rows in whole 16-byte words."""
    x, weight, lora_A, lora_B = call.x, call.weight, call.lora_A, call.lora_B
    return (
        x.shape[0] <= FEW_TOKENS
        and x.dtype in (torch.bfloat16, torch.float16)
        and lora_A.dtype == lora_B.dtype
        and lora_A.shape[0] <= SMALL_RANK
        and x.shape[1] % 8 == 0
        and weight.stride(1) == 1
        and weight.stride(0) % 8 == 0
        and all(tensor.data_ptr() % 16 == 0 for tensor in (x, weight, lora_A, lora_B))
    )
