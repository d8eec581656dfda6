"""The plans of the C++ kernels.

PyTorch makes the products, and passes of ours come around them (:mod:`lora_fast.backends.passes`). For sizes of whole
tiles there are products of ours with those passes in them, DoRA's norm too: of few tokens on every processor, and on
one with AMX of any number in bfloat16. Measured on Intel Xeons with AMX, also turned off, and on an AMD EPYC (Zen 5),
2 threads. What these products can keep is the product, not the base's part of it. On Zen 5 the product in float32 is
oneDNN's (:mod:`lora_fast.backends.cpu.onednn`).

Two things that GPUs do were tried around PyTorch's products, on an Intel Xeon with AMX, 2 threads. To keep base, a step
of 512 tokens took 1.07 to 1.10 times as long in float32 at 2048², one of 256 at 4096² 1.03 to 1.07. dx as one product
of [dv | dh] and [W; lora_A] took 0.97 to 1.04 times product and pass in float32, 0.9 in bfloat16, a third of a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_fast import calls
from lora_fast.backends.cpu import onednn
from lora_fast.backends.extension import amx_enabled, cpu_family, has_torchs_vectors
from lora_fast.backends.passes import LINEAR, MATMUL
from lora_fast.backends.plan import Linear, LinearGrad, Plan, Step, joined, may_keep_norm

SMALL_TOKENS = 32  # two AMX tiles; the time is that of reading W, which is read once and not repacked
# The same where the extension's compiler made vectors that are narrower than PyTorch's. AMD EPYC (Zen 5), 2048 × 2048,
# by generic vectors × PEFT's LoRA, step and inference: 1 token in bfloat16 0.93 and 1.02, in float32 0.95 and 0.82;
# 16 tokens 3.7 and 4.6, 1.4 and 1.2.
NARROW_TOKENS = 1
SMALL_RANK = 128  # the kernels for few tokens do the rank step on vectors, not in AMX tiles
FUSED_RANK = 128  # above, W lora_Aᵀ, from which the fused norm is made, is as much work as a product of many tokens
PRODUCT_TOKENS = 1024  # above, PyTorch's product is faster where there is no gain to apply
# Multiply-adds from which oneDNN's product in float32 is taken. AMD EPYC of family 26 (Zen 5), 2 threads, the forward's
# and the backward's product × MKL's: 384 × 384, 64 tokens 1.00 and 0.83; 512 × 512, 33 tokens 0.90 and 0.74; 768 × 768,
# 256 tokens 0.54 and 0.50; 4096 × 4096, 33 tokens 0.73 and 0.63, 256 tokens 0.59 and 0.57.
ONEDNN_WORK = 1 << 23
TILE = 32  # of W's rows and columns
FEW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_ONE_PASS = "one C++ pass over W, where torch makes several passes over each block of rows"
_TILES = "on AMX, for whole tiles: update, gain and bias in the product"
_FEW = f"up to {SMALL_TOKENS} tokens: W is read once and not repacked"
_COMPOSE = Step("lora_compose_fwd", "update, gain and bias in one C++ pass after the product")
_GAIN_BWD = Step("lora_gain_bwd", "dv and the sums of the gain and the bias in one C++ pass")
_TORCH = Step(LINEAR, "PyTorch's product")
_NORM = Plan({"norm": Step("weight_norm_fwd", _ONE_PASS)})
_NORM_KEPT = Plan({"norm": Step("weight_norm_kept", f"{_ONE_PASS}, if anything has changed")})
_CODES = "one C++ pass over the codes: W is made a strip at a time, in registers"
_PASSES = Plan({"h": _TORCH, "base": _TORCH, "y": _COMPOSE})
_MATMUL = Step(MATMUL, "PyTorch's product")
_ONEDNN = Step(onednn.KERNEL, "oneDNN's product, by vectors of 512 bits where MKL's has 256")
_PASSES_BY_ONEDNN = Plan({**_PASSES.steps, "base": _ONEDNN})
# by whether there is a gain or a bias, and whether the product is oneDNN's
_PASSES_GRAD = {
    (passes, by_onednn): Plan(({"grad_v": _GAIN_BWD} if passes else {}) | {"grad_x": _ONEDNN if by_onednn else _MATMUL})
    for passes in (False, True)
    for by_onednn in (False, True)
}
_FEW_FWD, _TILES_FWD = Plan({"y": Step("lora_linear_small_fwd", _FEW)}), Plan({"y": Step("lora_linear_fwd", _TILES)})
# a fresh adapter leaves nn.Linear's output as it is, to the bit: the product is PyTorch's then
_FEW_LORA, _TILES_LORA, _ONEDNN_LORA = (
    plan._replace(where_B_is_zero=_PASSES) for plan in (_FEW_FWD, _TILES_FWD, _PASSES_BY_ONEDNN)
)
_FEW_BWD = Plan({"gradients": Step("lora_linear_small_bwd", _FEW)})
_TILES_BWD = Plan({"gradients": Step("lora_linear_bwd", _TILES)})
_FEW_DORA = Plan({"y, norm": Step("dora_linear_small_fwd", f"{_FEW}, for the norm too")})
_TILES_DORA = Plan({"y, norm": Step("dora_linear_fwd", f"{_TILES}, and the norm from the same reading of W")})

quantised_norm_fwd = Plan({"norm": Step("quantised_norm_fwd", _CODES)})
weight_norm_bwd = Plan({"grad_V": Step("weight_norm_bwd", _ONE_PASS)})
lora_compose_fwd = Plan({"y": _COMPOSE})
lora_compose_bwd = Plan({"grad_v": _GAIN_BWD})
dropout = Plan({"y": Step("dropout", "one pass, the mask never in memory")})
merge_weight = Plan({"weight": Step("merge_weight", _ONE_PASS)})
group_rows = Plan({"order, starts": Step("group_rows", "one C++ pass over the ids counts, one places")})
_GROUPED_H = Step(
    "grouped_project", "C++: each adapter's lora_A is read once for 32 of its rows, from x where they lie"
)
_EACH_GROUP = "PyTorch's products, a group of rows after the other"
_GROUPED_H_BY_TORCH, _GROUPED_SUMS = Step(LINEAR, _EACH_GROUP), Step(MATMUL, _EACH_GROUP)
# AMD EPYC (Zen 4), 2 threads, float32, 64 tokens: 11008 × 4096 40 ms, MKL 65; 2048 × 2048 3.8 and 4.7.
_GROUPED_PARTS = Step("lora_linear_small_fwd", "W is read twice, by vectors of 512 bits where MKL's product has 256")
_GROUPED_Y = Step("grouped_compose", "update, gain and bias of all groups in one C++ pass after the product")
_GROUPED_GAIN_BWD = Step("grouped_gain_bwd", "dv and the sums of all gains and the bias in one C++ pass")
_GROUPED_FEW = Plan({"y": Step("grouped_linear_small_fwd", f"{_FEW}; all of it in one C++ call")})
grouped_weight_norm_fwd = Plan({"norm": Step("grouped_weight_norm_fwd", "one C++ pass over W for all adapters")})
grouped_weight_norm_bwd = Plan({"grad_V": Step("weight_norm_bwd", "one C++ pass over W for each adapter")})

_GLU = Step("lora_glu_fwd", "updates, gains, activation and product in one C++ pass")
_GLU_BWD = Step("lora_glu_bwd", "these again, and all their gradients, in one C++ pass")
lora_glu_fwd, lora_glu_bwd = Plan({"output": _GLU}), Plan({"grad_bases": _GLU_BWD})


def weight_norm_fwd(call: calls.WeightNorm | calls.DoraLinear) -> Plan:
    return _NORM_KEPT if may_keep_norm(call) else _NORM


def lora_linear_fwd(call: Linear) -> Plan:
    kernel = None if call.keep == "base" else _FEW_FWD if _is_few(call) else _TILES_FWD if _native(call) else None
    if kernel is not None and call.has_gain:
        return kernel
    if kernel is not None and call.x.shape[0] <= PRODUCT_TOKENS:
        return _FEW_LORA if kernel is _FEW_FWD else _TILES_LORA
    if _is_onednns(call.x, call.weight):
        return _PASSES_BY_ONEDNN if call.has_gain else _ONEDNN_LORA
    return _PASSES


def lora_linear_bwd(call: LinearGrad) -> Plan:
    if call.kept != "base" and _is_few(call):
        return _FEW_BWD
    if call.kept != "base" and _native(call):
        return _TILES_BWD
    return _PASSES_GRAD[call.has_gain or call.need_bias, _is_onednns(call.grad_y, call.weight)]


def dora_linear_fwd(call: calls.DoraLinear) -> Plan:
    if call.keep != "base" and call.lora_A.shape[0] <= FUSED_RANK:
        if _is_few(call):
            return _FEW_DORA
        if _native(call):
            return _TILES_DORA
    return joined(weight_norm_fwd(call), lora_linear_fwd(call))


def takes_quantised(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether the kernel for few tokens multiplies x [..., K] by a W that is quantised, whose rows it makes on the way.

    2048 × 2048 in nf4, AMD EPYC (Zen 5), 2 threads, beside bitsandbytes' own product: 1 token in bfloat16 0.14 ms and
    0.53, 32 tokens 0.57 and 0.82, in float32 0.24 and 1.2, 1.2 and 2.8.
    """
    return (
        x.dtype in FEW_DTYPES
        and 0 < math.prod(x.shape[:-1]) <= _few_tokens(x.dtype)
        and lora_A.shape[0] <= SMALL_RANK
        and lora_B.shape[0] % TILE == 0
        and x.shape[-1] % TILE == 0
        and {lora_A.dtype, lora_B.dtype} <= {x.dtype, torch.float32}
    )


def dora_linear_bwd(call: calls.DoraLinearGrad) -> Plan:
    linear = lora_linear_bwd(call)
    return joined(weight_norm_bwd, linear) if call.through_norm else linear


def _is_few(call: Linear | LinearGrad) -> bool:
    """Whether the kernels for few tokens take the linear, on whatever processor."""
    return (
        0 < call[0].shape[0] <= _few_tokens(call.weight.dtype)
        and call.lora_A.shape[0] <= SMALL_RANK
        and call.weight.dtype in FEW_DTYPES
        and call[0].dtype == call.weight.dtype
        and _is_plain(call)
        and _whole_tiles(call.weight)
    )


def _few_tokens(dtype: torch.dtype) -> int:
    """How many tokens the kernels for few take, whose products are made by AMX or by the compiler's vectors."""
    is_fast = has_torchs_vectors() or (dtype == torch.bfloat16 and amx_enabled())
    return SMALL_TOKENS if is_fast else NARROW_TOKENS


def _native(call: Linear | LinearGrad) -> bool:
    """Whether the kernels on AMX take the linear: both operands of the product in bfloat16."""
    return (
        call[0].dtype == call.weight.dtype == torch.bfloat16
        and call[0].shape[0] > 0
        and _is_plain(call)
        and _whole_tiles(call.weight)
        and amx_enabled()
    )


def _is_onednns(x: Tensor, weight: Tensor) -> bool:
    """Whether the product with W is oneDNN's: in float32, and large enough for its calls."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.shape[0] > SMALL_TOKENS
        and x.shape[0] * weight.numel() >= ONEDNN_WORK
        and onednn.is_faster()
        and onednn.takes(weight)
    )


def _is_plain(call: Linear | LinearGrad) -> bool:
    """An output gain or none, no dropout, adapters that native products read."""
    dtypes = call.weight.dtype, torch.float32
    return (
        (call.axis == "output" or not call.has_gain)
        and call.dropout_p == 0.0
        and call.lora_A.dtype in dtypes
        and call.lora_B.dtype in dtypes
    )


def _whole_tiles(weight: Tensor) -> bool:
    return weight.stride(1) == 1 and weight.shape[0] % TILE == 0 and weight.shape[1] % TILE == 0


def adapted_mlp_fwd(call: calls.AdaptedMlp) -> Plan:
    base = _ONEDNN if _is_onednns(call.x, call.weight[0]) else _TORCH
    return Plan({"base": base, "output": _GLU, "y": _COMPOSE})


def adapted_mlp_bwd(call: calls.AdaptedMlpGrad) -> Plan:
    base = _ONEDNN if _is_onednns(call.grad_y, call.weight[0]) else _MATMUL
    return Plan({"base": base, "grad_v": _GAIN_BWD, "grad_bases": _GLU_BWD, "grad_x": _COMPOSE})


def grouped_lora_fwd(call: calls.GroupedLora) -> Plan:
    x, weight = call.x, call.weight
    project = _GROUPED_H if _projects(call) else _GROUPED_H_BY_TORCH
    if weight is None:
        return Plan({"h": project, "y": _GROUPED_Y})
    is_whole = x.dtype == weight.dtype and _whole_tiles(weight)
    if is_whole and project is _GROUPED_H and 0 < x.shape[0] <= _few_tokens(x.dtype):
        return _GROUPED_FEW
    base = _ONEDNN if _is_onednns(x, weight) else _TORCH
    if is_whole and base is _TORCH and x.dtype == torch.float32 and _takes_parts(x.shape[0]):
        base = _GROUPED_PARTS
    return Plan({"h": project, "base": base, "y": _GROUPED_Y})


def _takes_parts(tokens: int) -> bool:
    """Whether so many tokens of float32 are multiplied in two parts: where MKL takes narrow vectors."""
    return SMALL_TOKENS < tokens <= 2 * SMALL_TOKENS and cpu_family()[0] == "AuthenticAMD" and has_torchs_vectors()


def grouped_lora_bwd(call: calls.GroupedLoraGrad) -> Plan:
    steps = {"grad_v": _GROUPED_GAIN_BWD, "grad_h": _GROUPED_H_BY_TORCH, "grad_A, grad_B": _GROUPED_SUMS}
    if call.need_x and call.weight is not None:
        steps["grad_x"] = _ONEDNN if _is_onednns(call.grad_y, call.weight) else _MATMUL
    return Plan(steps)


def _projects(call: calls.GroupedLora) -> bool:
    """Whether the C++ kernel makes h, whose sums are float32."""
    return call.x.dtype in FEW_DTYPES and call.lora_A[0].dtype in FEW_DTYPES
