"""The plans of the torch backend: one way for everything. It yields to every backend that has kernels."""

from __future__ import annotations

from lora_fast.backends.passes import LINEAR, MATMUL
from lora_fast.backends.plan import (
    LinearGrad,
    Plan,
    Refusal,
    Step,
    joined,
    kept_refusal,
)
from lora_fast.call import (
    Call,
    DoraLinearCall,
    DoraLinearGradCall,
    LoraComposeGradCall,
    LoraLinearCall,
)

_ROWS = "W + s BA by blocks of rows that a core's cache holds, never whole"
_PASSES = "update, gain and bias in blocks of tokens, after PyTorch's product"
_NORM = Plan({"norm": Step("chunks of rows", _ROWS)}, yields=True)
_NORM_GRAD = Plan({"grad_V": Step("chunks of rows", _ROWS)}, yields=True)
_LINEAR = Plan({"h": Step(LINEAR, _PASSES), "base": Step(LINEAR, _PASSES), "y": Step("compose", _PASSES)}, yields=True)
_LINEAR_GRAD = Plan(
    {"grad_v": Step("gain_bwd", _PASSES), "grad_x": Step(MATMUL, "PyTorch's product and the update after it")},
    yields=True,
)
_COMPOSE = Plan({"y": Step("compose", _PASSES)}, yields=True)
_COMPOSE_GRAD = Plan({"grad_v": Step("gain_bwd", _PASSES)}, yields=True)
_DROPOUT = Plan({"y": Step("dropout", "the mask as a tensor")}, yields=True)
_MERGE = Plan({"weight": Step("chunks of rows", _ROWS)}, yields=True)


def weight_norm_fwd(call: Call) -> Plan:
    return _NORM


def weight_norm_bwd(call: Call) -> Plan:
    return _NORM_GRAD


def lora_linear_fwd(call: LoraLinearCall | DoraLinearCall) -> Plan:
    return _LINEAR


def lora_linear_bwd(call: LinearGrad) -> Plan | Refusal:
    return kept_refusal(call) or _LINEAR_GRAD


def dora_linear_fwd(call: DoraLinearCall) -> Plan | Refusal:
    return joined(weight_norm_fwd(call), lora_linear_fwd(call))


def dora_linear_bwd(call: DoraLinearGradCall) -> Plan | Refusal:
    linear = lora_linear_bwd(call)
    return joined(weight_norm_bwd(call), linear) if call.through_norm else linear


def lora_compose_fwd(call: Call) -> Plan:
    return _COMPOSE


def lora_compose_bwd(call: LoraComposeGradCall) -> Plan | Refusal:
    return kept_refusal(call) or _COMPOSE_GRAD


def dropout(call: Call) -> Plan:
    return _DROPOUT


def merge_weight(call: Call) -> Plan:
    return _MERGE
