"""The plans of the Triton kernels, with the reason beside each choice: measured on an H200, or counted in bytes and
FLOPs, and then called predicted. The constants are in :mod:`lora_fast.triton_kernels.constants`."""

from __future__ import annotations

import functools

import torch

from lora_fast.backends.passes import LINEAR, MATMUL
from lora_fast.backends.plan import (
    Linear,
    LinearGrad,
    Plan,
    Refusal,
    Step,
    dtype_refusal,
    joined,
    kept_refusal,
    may_keep_norm,
    weight_refusal,
)
from lora_fast.call import (
    DoraLinearCall,
    DoraLinearGradCall,
    DropoutCall,
    LoraComposeCall,
    LoraComposeGradCall,
    MergeWeightCall,
    WeightNormCall,
    WeightNormGradCall,
)
from lora_fast.triton_kernels import constants, lora_linear_fwd as fused
from lora_fast.triton_kernels.constants import FEW_TOKENS
from lora_fast.triton_kernels.target import current

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_ONE_READ = "one read of W, s BA on the tensor cores; dense B@A moves W's bytes seven times"
_NO_GAIN = "without a gain the product is PyTorch's: lora_B = 0 gives nn.Linear's output to the bit"
_FLOAT32 = "float32 products follow PyTorch's TF32 setting, in cuBLAS"
_FUSED = "the pass over the output that is saved outweighs cuBLAS's lead in the product"
_PRODUCTS = "cuBLAS's lead in a product of so many columns outweighs one pass over the output"
_DROPOUT = "dropout in the epilogue; apart it takes six passes over [T, K]"
_EPILOGUE = "update, gain and bias in one pass after the product"
_ALONG_RANK = "the activation is read once, dropout and an input's gain on the way"
_GEMM = "at this rank the tensor cores decide, which cuBLAS keeps busier"
_FEW = Plan({"y": Step("lora_linear_small_fwd", "W's bytes bound it: W is read once, by at most two launches")})
_NORM = Plan({"norm": Step("weight_norm_fwd", _ONE_READ)})
_NORM_KEPT = Plan({"norm": Step("weight_norm_kept", f"{_ONE_READ}; nothing where nothing has changed")})
_NORM_GRAD = Plan({"grad_V": Step("weight_norm_bwd", _ONE_READ)})
_GAIN_BWD = Step("lora_gain_bwd", "dv, dh, d lora_B and the sums of the gain and the bias in one pass over dy")
_COMPOSE = Plan({"y": Step("lora_compose_fwd", _EPILOGUE)})
_COMPOSE_GRAD = Plan({"grad_v": _GAIN_BWD})
_DROP = Plan({"y": Step("dropout", "one pass, the mask never in memory")})
_MERGE = Plan({"weight": Step("merge_weight", _ONE_READ)})


def weight_norm_fwd(call: WeightNormCall | DoraLinearCall) -> Plan | Refusal:
    return weight_refusal(call, DTYPES) or (_NORM_KEPT if may_keep_norm(call) else _NORM)


def weight_norm_bwd(call: WeightNormGradCall | DoraLinearGradCall) -> Plan | Refusal:
    return weight_refusal(call, DTYPES) or _NORM_GRAD


def lora_linear_fwd(call: Linear) -> Plan | Refusal:
    x = call.x
    if refusal := dtype_refusal(x.dtype, DTYPES):
        return refusal
    chosen = constants.of(current(x.device))
    rank_gemm = chosen.gemm_rank <= call.lora_A.shape[0]
    plain = call.axis == "output" or not call.has_gain
    project = rank_gemm and plain and call.dropout_p == 0.0
    if not call.has_gain:
        return forward(project, "addmm_" if rank_gemm else "lora_compose_fwd", _NO_GAIN)
    if x.shape[0] <= FEW_TOKENS:
        return _FEW
    if x.dtype == torch.float32:
        return forward(project, "lora_compose_fwd", _FLOAT32)
    if x.shape[1] <= fused.fused_contraction(x, call.weight, call.lora_B, call.axis == "input"):
        return forward(project, "lora_linear_fwd", _FUSED)
    return forward(project, "lora_compose_fwd", _PRODUCTS)


@functools.cache
def forward(project_by_gemm: bool, last: str, why: str) -> Plan:
    """h by cuBLAS or a kernel of ours; y by ``last``, after PyTorch's product or with the product in it."""
    steps = {"h": Step(LINEAR, _GEMM) if project_by_gemm else Step("lora_project", _ALONG_RANK)}
    if last != "lora_linear_fwd":
        steps["base"] = Step(LINEAR, why)
    steps["y"] = Step(last, _GEMM if last == "addmm_" else _EPILOGUE if "base" in steps else why)
    return Plan(steps)


def lora_linear_bwd(call: LinearGrad) -> Plan | Refusal:
    grad_y = call.grad_y
    if refusal := dtype_refusal(grad_y.dtype, DTYPES) or kept_refusal(call):
        return refusal
    chosen = constants.of(current(grad_y.device))
    rank_gemm = chosen.gemm_rank <= call.lora_A.shape[0]
    plain = call.dropout_p == 0.0 and (call.axis == "output" or not call.has_gain)
    grad_A_by_gemm = rank_gemm and plain and call.lora_A.dtype == grad_y.dtype
    if call.dropout_p > 0.0:
        return backward(grad_A_by_gemm, "lora_input_grad", _DROPOUT)
    last = "addmm_" if rank_gemm else "lora_compose_fwd"
    if grad_y.dtype == torch.float32:
        return backward(grad_A_by_gemm, last, _FLOAT32)
    if call.weight.shape[0] <= chosen.input_grad_contraction:
        return backward(grad_A_by_gemm, "lora_input_grad", _FUSED)
    return backward(grad_A_by_gemm, last, _PRODUCTS)


@functools.cache
def backward(grad_A_by_gemm: bool, last: str, why: str) -> Plan:
    """d lora_A by cuBLAS or a kernel of ours; dx by ``last``, after PyTorch's product or with the product in it."""
    steps = {"grad_v": _GAIN_BWD}
    steps["grad_A"] = Step(MATMUL, _GEMM) if grad_A_by_gemm else Step("lora_A_grad", _ALONG_RANK)
    if last != "lora_input_grad":
        steps["grad_base"] = Step(MATMUL, why)
    steps["grad_x"] = Step(last, _GEMM if last == "addmm_" else _EPILOGUE if "grad_base" in steps else why)
    return Plan(steps)


def dora_linear_fwd(call: DoraLinearCall) -> Plan | Refusal:
    return joined(weight_norm_fwd(call), lora_linear_fwd(call))


def dora_linear_bwd(call: DoraLinearGradCall) -> Plan | Refusal:
    linear = lora_linear_bwd(call)
    return joined(weight_norm_bwd(call), linear) if call.through_norm else linear


def lora_compose_fwd(call: LoraComposeCall) -> Plan | Refusal:
    return dtype_refusal(call.base.dtype, DTYPES) or _COMPOSE


def lora_compose_bwd(call: LoraComposeGradCall) -> Plan | Refusal:
    return dtype_refusal(call.grad_y.dtype, DTYPES) or kept_refusal(call) or _COMPOSE_GRAD


def dropout(call: DropoutCall) -> Plan | Refusal:
    return dtype_refusal(call.x.dtype, DTYPES) or _DROP


def merge_weight(call: MergeWeightCall) -> Plan | Refusal:
    return weight_refusal(call, DTYPES) or _MERGE
