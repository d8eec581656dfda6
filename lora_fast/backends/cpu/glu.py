"""What a gated MLP hands to its down linear, and its gradients, by the C++ kernels."""

from __future__ import annotations

from torch import Tensor

from lora_fast import calls
from lora_fast.backends import extension
from lora_fast.backends.plan import Plan

_c = extension.operators()
_NUMBERS: dict[calls.Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # csrc/cpu/activation.h


def lora_glu_fwd(call: calls.LoraGlu, plan: Plan) -> Tensor:
    *fields, activation = call
    return _c.lora_glu_fwd(*fields, _NUMBERS[activation])


def lora_glu_bwd(call: calls.LoraGluGrad, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, *glu, activation = call[:14]
    return _c.lora_glu_bwd(grad.contiguous(), *glu, _NUMBERS[activation], *call[14:])
