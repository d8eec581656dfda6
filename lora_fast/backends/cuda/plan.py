"""The plans of the CUDA kernels, which yield where Triton's were measured to be faster, or are predicted to be.

``constants`` says which of the two takes few tokens and the norm (:mod:`lora_fast.triton_kernels.constants`).
"""

from __future__ import annotations

import functools

import torch

from lora_fast import calls
from lora_fast.backends.passes import LINEAR, MATMUL
from lora_fast.backends.plan import Linear, LinearGrad, Plan, Step, joined, may_keep_norm
from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.constants import FEW_TOKENS

SMALL_RANK = 1024  # h lies in shared memory

_EPILOGUE = "native kernels: update, gain and bias in one pass after cuBLAS's product"
_FEW = "W is read once; predicted to take less of the host's time: one C++ call makes the launches"
_ONE_READ = "one native pass over W"
_BLOCKS = "PyTorch's products over blocks of rows: no native kernel was made for it"
_NORM = Plan({"norm": Step("weight_norm_fwd", _ONE_READ)})
_NORM_KEPT = Plan({"norm": Step("weight_norm_kept", f"{_ONE_READ}; nothing where nothing has changed")})
weight_norm_bwd = Plan({"grad_V": Step("chunks of rows", _BLOCKS)}, yields=True)
_SMALL = Plan({"y": Step("lora_linear_small_fwd", _FEW)})
_LINEAR = Plan(
    {"h": Step(LINEAR, _EPILOGUE), "base": Step(LINEAR, _EPILOGUE), "y": Step("lora_compose_fwd", _EPILOGUE)}
)
_LINEAR_GRAD = Plan({"grad_v": Step("lora_gain_bwd", _EPILOGUE), "grad_x": Step(MATMUL, _EPILOGUE)})
lora_compose_fwd = Plan({"y": Step("lora_compose_fwd", _EPILOGUE)}, yields=True)
lora_compose_bwd = Plan({"grad_v": Step("lora_gain_bwd", _EPILOGUE)}, yields=True)
dropout = Plan({"y": Step("dropout", "one pass, the mask never in memory")}, yields=True)
merge_weight = Plan({"weight": Step("merge_weight", _ONE_READ)}, yields=True)


def weight_norm_fwd(call: calls.WeightNorm | calls.DoraLinear) -> Plan:
    yields = _constants(call.weight.device).norm_backend != "cuda"
    return _yielding(_NORM_KEPT if may_keep_norm(call) else _NORM, yields=yields)


def lora_linear_fwd(call: Linear) -> Plan:
    # without a gain the product stays PyTorch's, so that lora_B = 0 gives nn.Linear's output to the bit
    small = call.has_gain and call.axis == "output" and call.dropout_p == 0.0 and call.keep == "nothing"
    small = small and _in_lines(call)
    return _yielding(_SMALL if small else _LINEAR, yields=not _takes_few(call.x))


def lora_linear_bwd(call: LinearGrad) -> Plan:
    return _yielding(_LINEAR_GRAD, yields=not _takes_few(call.grad_y))


def dora_linear_fwd(call: calls.DoraLinear) -> Plan:
    return joined(weight_norm_fwd(call), lora_linear_fwd(call))


def dora_linear_bwd(call: calls.DoraLinearGrad) -> Plan:
    linear = lora_linear_bwd(call)
    return joined(weight_norm_bwd, linear) if call.through_norm else linear


def _yielding(plan: Plan, *, yields: bool) -> Plan:
    return plan._replace(yields=True) if yields else plan


def _takes_few(activation: torch.Tensor) -> bool:
    """Whether these are few tokens, forward and backward alike, and the kernel for them is faster than Triton's."""
    return activation.shape[0] <= FEW_TOKENS and _constants(activation.device).few_tokens_backend == "cuda"


def _in_lines(call: Linear) -> bool:
    """Whether two launches take the linear: 1 to 16 tokens, 16-bit x and W, rows in whole 16-byte words."""
    x, weight, lora_A, lora_B = call.x, call.weight, call.lora_A, call.lora_B
    return (
        0 < x.shape[0] <= FEW_TOKENS
        and weight.numel() > 0
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and lora_A.dtype == lora_B.dtype
        and lora_A.dtype in (x.dtype, torch.float32)
        and lora_A.shape[0] <= SMALL_RANK
        and x.shape[1] % 8 == 0
        and weight.stride(1) == 1
        and weight.stride(0) % 8 == 0
        and all(tensor.data_ptr() % 16 == 0 for tensor in (x, weight, lora_A, lora_B))
    )


def _constants(device: torch.device) -> constants.Constants:
    return constants.of_capability(_capability(device))


@functools.cache
def _capability(device: torch.device) -> int | None:
    """Ten times the compute capability; None for a GPU that is not NVIDIA's, and where there is none."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
