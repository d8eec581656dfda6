"""The plans of the C++ kernels.

PyTorch makes the products, and passes of ours come around them (:mod:`lora_fast.backends.passes`). On a processor with
AMX, for sizes of whole tiles, bfloat16 products are made here with those passes in them, DoRA's norm too, and float32
products of three bfloat16 parts. Measured on Intel Xeons with AMX, 2 threads.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lora_fast import _C
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
)
from lora_fast.call import (
    DoraLinearCall,
    DoraLinearGradCall,
    DropoutCall,
    LoraComposeCall,
    LoraComposeGradCall,
    LoraLinearCall,
    LoraLinearGradCall,
    MergeWeightCall,
    WeightNormCall,
    WeightNormGradCall,
)

SMALL_TOKENS = 32  # two AMX tiles: W is read once and not repacked
SMALL_RANK = 128  # the kernels for few tokens do the rank step on vectors, not in AMX tiles
FUSED_RANK = 128  # above, W lora_Aᵀ, from which the fused norm is made, is as much work as a product of many tokens
PRODUCT_TOKENS = 1024  # above, PyTorch's product is faster where there is no gain to apply
FLOAT_TOKENS = 64  # below, the time is that of reading W, which PyTorch's product does without repacking it
FLOAT_WEIGHT = 1 << 19  # elements; a smaller W is split for too few products with each part, csrc/cpu/float_product.cpp
TILE = 32  # of W's rows and columns
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ADAPTER_DTYPES = (torch.bfloat16, torch.float32)  # that kernels with AMX read

_ONE_PASS = "one C++ pass over W, where torch makes several passes over each block of rows"
_PASS = "update, gain and bias in one C++ pass after the product"
_TILES = "on AMX, for whole tiles: update, gain and bias in the product"
_FEW = f"on AMX, up to {SMALL_TOKENS} tokens: W is read once and not repacked"
_TORCH = Step(LINEAR, "PyTorch's product")
_PROJECT = Step("project_small", _FEW)
_PARTS = Step("float_product", "on AMX: a float32 product of three bfloat16 parts, as exact as PyTorch's")
_NORM = Plan({"norm": Step("weight_norm_fwd", _ONE_PASS)})
_NORM_KEPT = Plan({"norm": Step("weight_norm_kept", f"{_ONE_PASS}, if anything has changed")})
_NORM_GRAD = Plan({"grad_V": Step("weight_norm_bwd", _ONE_PASS)})
_FEW_FWD, _TILES_FWD = Plan({"y": Step("lora_linear_small_fwd", _FEW)}), Plan({"y": Step("lora_linear_fwd", _TILES)})
_FEW_BWD = Plan({"gradients": Step("lora_linear_small_bwd", _FEW)})
_TILES_BWD = Plan({"gradients": Step("lora_linear_bwd", _TILES)})
_FEW_DORA = Plan({"y, norm": Step("dora_linear_small_fwd", f"{_FEW}, for the norm too")})
_TILES_DORA = Plan({"y, norm": Step("dora_linear_fwd", f"{_TILES}, and the norm from the same reading of W")})
_COMPOSE = Plan({"y": Step("lora_compose_fwd", _PASS)})
_COMPOSE_GRAD = Plan({"grad_v": Step("lora_gain_bwd", _PASS)})
_DROPOUT = Plan({"y": Step("dropout", "one pass, the mask never in memory")})
_MERGE = Plan({"weight": Step("merge_weight", _ONE_PASS)})


@functools.cache
def _passes(base: Step, h: Step) -> Plan:
    plan = Plan({"h": h, "base": base, "y": Step("lora_compose_fwd", _PASS)})
    # a fresh adapter leaves nn.Linear's output as it is, to the bit: the product is PyTorch's then
    return plan if base is _TORCH else plan._replace(where_B_is_zero=_passes(_TORCH, h))


@functools.cache
def _passes_grad(product: Step) -> Plan:
    return Plan({"grad_v": Step("lora_gain_bwd", _PASS), "grad_x": product})


_PRODUCT_GRADS = (
    _passes_grad(Step(MATMUL, "PyTorch's product")),
    _passes_grad(_PARTS),
    _passes_grad(Step("input_grad_small", _FEW)),
)


@functools.cache
def _without_gain(native: str, h: Step) -> Plan:
    plan = _FEW_FWD if native == "small" else _TILES_FWD
    return plan._replace(where_B_is_zero=_passes(_TORCH, h))


def weight_norm_fwd(call: WeightNormCall | DoraLinearCall) -> Plan | Refusal:
    return dtype_refusal(call.weight.dtype, DTYPES) or (_NORM_KEPT if may_keep_norm(call) else _NORM)


def weight_norm_bwd(call: WeightNormGradCall | DoraLinearGradCall) -> Plan | Refusal:
    return dtype_refusal(call.weight.dtype, DTYPES) or _NORM_GRAD


def lora_linear_fwd(call: LoraLinearCall | DoraLinearCall) -> Plan | Refusal:
    if refusal := dtype_refusal(call.x.dtype, DTYPES):
        return refusal
    count = call.x.shape[0]
    h = _project(call, count)
    if not _native(call, call.x, count):
        return _passes(_PARTS if _splits(call, call.x, count) and call.lora_B.dtype != torch.float64 else _TORCH, h)
    small = count <= SMALL_TOKENS and call.lora_A.shape[0] <= SMALL_RANK
    if call.has_gain:
        return _FEW_FWD if small else _TILES_FWD
    if count > PRODUCT_TOKENS:
        return _passes(_TORCH, h)
    return _without_gain("small" if small else "tiles", h)


def lora_linear_bwd(call: LoraLinearGradCall | DoraLinearGradCall) -> Plan | Refusal:
    if refusal := dtype_refusal(call.grad_y.dtype, DTYPES) or kept_refusal(call):
        return refusal
    count = call.grad_y.shape[0]
    if _native(call, call.grad_y, count):
        return _FEW_BWD if count <= SMALL_TOKENS and call.lora_A.shape[0] <= SMALL_RANK else _TILES_BWD
    by_matmul, by_parts, by_small = _PRODUCT_GRADS
    if count <= SMALL_TOKENS and call.dropout_p == 0.0 and _in_tiles(call.grad_y, call.weight, count):
        return by_small
    return by_parts if _splits(call, call.grad_y, count) else by_matmul


def dora_linear_fwd(call: DoraLinearCall) -> Plan | Refusal:
    tokens = call.x.shape[0]
    if call.lora_A.shape[0] <= FUSED_RANK and _native(call, call.x, tokens):
        return _FEW_DORA if tokens <= SMALL_TOKENS else _TILES_DORA
    return joined(weight_norm_fwd(call), lora_linear_fwd(call))


def dora_linear_bwd(call: DoraLinearGradCall) -> Plan | Refusal:
    linear = lora_linear_bwd(call)
    return joined(weight_norm_bwd(call), linear) if call.through_norm else linear


def lora_compose_fwd(call: LoraComposeCall) -> Plan | Refusal:
    return dtype_refusal(call.base.dtype, DTYPES) or _COMPOSE


def lora_compose_bwd(call: LoraComposeGradCall) -> Plan | Refusal:
    return dtype_refusal(call.grad_y.dtype, DTYPES) or kept_refusal(call) or _COMPOSE_GRAD


def dropout(call: DropoutCall) -> Plan | Refusal:
    return dtype_refusal(call.x.dtype, DTYPES) or _DROPOUT


def merge_weight(call: MergeWeightCall) -> Plan | Refusal:
    return dtype_refusal(call.weight.dtype, DTYPES) or _MERGE


def _native(call: Linear | LinearGrad, activation: Tensor, count: int) -> bool:
    """Whether a native product takes the linear: an output gain or none, no dropout, adapters that it reads."""
    return (
        (call.axis == "output" or not call.has_gain)
        and call.dropout_p == 0.0
        and call.lora_A.dtype in ADAPTER_DTYPES
        and call.lora_B.dtype in ADAPTER_DTYPES
        and _in_tiles(activation, call.weight, count)
    )


def _in_tiles(activation: Tensor, weight: Tensor, count: int) -> bool:
    """Whether bfloat16 operands come in whole tiles of W, on a processor with AMX."""
    return (
        count > 0
        and activation.dtype == weight.dtype == torch.bfloat16
        and weight.stride(1) == 1
        and weight.shape[0] % TILE == 0
        and weight.shape[1] % TILE == 0
        and _C.amx_enabled()
    )


def _project(call: Linear, count: int) -> Step:
    """The kernel of h = x lora_Aᵀ."""
    small = (
        0 < count <= SMALL_TOKENS
        and call.x.dtype == torch.bfloat16
        and call.lora_A.dtype in ADAPTER_DTYPES
        and call.lora_A.shape[1] % TILE == 0
        and _C.amx_enabled()
    )
    return _PROJECT if small else _TORCH


def _splits(call: Linear | LinearGrad, activation: Tensor, count: int) -> bool:
    """Whether a product in float32 is made of bfloat16's: many tokens, a large weight of whole tiles, AMX.

    Not where PyTorch's matmul setting allows less than float32: its own product is quicker then.
    """
    weight = call.weight
    return (
        count >= FLOAT_TOKENS
        and weight.numel() >= FLOAT_WEIGHT
        and activation.dtype == weight.dtype == torch.float32
        and weight.stride(1) == 1
        and weight.shape[0] % TILE == 0
        and weight.shape[1] % TILE == 0
        and torch.get_float32_matmul_precision() == "highest"
        and _C.amx_enabled()
    )
