"""The plans of the torch backend: one way for every call. It yields to every backend that has kernels."""

from __future__ import annotations

from lora_fast import calls
from lora_fast.backends.passes import LINEAR, MATMUL
from lora_fast.backends.plan import Plan, Step, joined

_ROWS = Step("chunks of rows", "W + s BA by blocks of rows that a core's cache holds, never whole")
_PASSES = "update, gain and bias in blocks of tokens, after PyTorch's product"
_COMPOSE, _GAIN_BWD, _PRODUCT = Step("compose", _PASSES), Step("gain_bwd", _PASSES), Step(LINEAR, "PyTorch's product")

weight_norm_fwd = Plan({"norm": _ROWS}, yields=True)
quantised_norm_fwd = Plan({"norm": Step(_ROWS.kernel, f"codes to W, then {_ROWS.why}")}, yields=True)
weight_norm_bwd = Plan({"grad_V": _ROWS}, yields=True)
lora_linear_fwd = Plan({"h": _PRODUCT, "base": _PRODUCT, "y": _COMPOSE}, yields=True)
lora_linear_bwd = Plan({"grad_v": _GAIN_BWD, "grad_x": Step(MATMUL, "PyTorch's product")}, yields=True)
dora_linear_fwd = joined(weight_norm_fwd, lora_linear_fwd)
lora_compose_fwd = Plan({"y": _COMPOSE}, yields=True)
lora_compose_bwd = Plan({"grad_v": _GAIN_BWD}, yields=True)
dropout = Plan({"y": Step("dropout", "the mask as a tensor")}, yields=True)
merge_weight = Plan({"weight": _ROWS}, yields=True)
group_rows = Plan({"order, starts": Step("torch.sort", "a stable sort of the ids")}, yields=True)
_GROUPS = "PyTorch's products, a group of rows after the other"
grouped_lora_fwd = Plan({"h": Step(LINEAR, _GROUPS), "base": _PRODUCT, "y": Step("compose", _GROUPS)}, yields=True)
grouped_lora_bwd = Plan(
    {
        "grad_v": Step("gain_bwd", _GROUPS),
        "grad_h": Step(LINEAR, _GROUPS),
        "grad_A, grad_B": Step(MATMUL, _GROUPS),
        "grad_x": Step(MATMUL, "PyTorch's product"),
    },
    yields=True,
)
grouped_weight_norm_fwd = Plan({"norm": Step(_ROWS.kernel, f"{_ROWS.why}, of all adapters in turn")}, yields=True)
grouped_weight_norm_bwd = Plan({"grad_V": Step(_ROWS.kernel, "an adapter after the other")}, yields=True)

_TOKENS = "gains, activation and their gradients in blocks of tokens"
lora_glu_fwd = Plan({"output": Step("lora_glu_fwd", _TOKENS)}, yields=True)
lora_glu_bwd = Plan({"grad_bases": Step("lora_glu_bwd", _TOKENS)}, yields=True)
adapted_mlp_fwd = joined(Plan({"base": _PRODUCT, "output": lora_glu_fwd.steps["output"]}), lora_compose_fwd)
adapted_mlp_bwd = Plan(
    {"base": _PRODUCT, "grad_v": _GAIN_BWD, "grad_bases": lora_glu_bwd.steps["grad_bases"], "grad_x": _COMPOSE},
    yields=True,
)


def dora_linear_bwd(call: calls.DoraLinearGrad) -> Plan:
    return joined(weight_norm_bwd, lora_linear_bwd) if call.through_norm else lora_linear_bwd
