"""The gated linear unit of two adapted products by Triton kernels, one pass each way."""

from __future__ import annotations

from torch import Tensor

from lora_fast import calls
from lora_fast.backends.plan import Plan
from lora_fast.triton_kernels import lora_glu_bwd as bwd, lora_glu_fwd as fwd


def lora_glu_fwd(call: calls.LoraGlu, plan: Plan) -> Tensor:
    return fwd.lora_glu_fwd(*call._replace(base_gate=_in_rows(call.base_gate), base_up=_in_rows(call.base_up)))


def lora_glu_bwd(call: calls.LoraGluGrad, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dv, a, d gain_gate, d gain_up, d bias_gate, d bias_up), empty where not needed; both dv are in one tensor."""
    T, width = call.grad.shape
    if call.joined:
        grad_v = call.grad.new_empty(T, 2 * width)
        grad_v_gate, grad_v_up = grad_v[:, :width], grad_v[:, width:]
    else:
        grad_v = call.grad.new_empty(2, T, width)
        grad_v_gate, grad_v_up = grad_v[0], grad_v[1]
    grad, base_gate, base_up = (_in_rows(matrix) for matrix in call[:3])
    results = bwd.lora_glu_bwd(
        *call._replace(grad=grad, base_gate=base_gate, base_up=base_up)[:14],
        grad_v_gate=grad_v_gate,
        grad_v_up=grad_v_up,
        need_output=call.need_output,
        need_gain_gate=call.need_gain_gate,
        need_gain_up=call.need_gain_up,
        need_bias_gate=call.need_bias_gate,
        need_bias_up=call.need_bias_up,
    )
    return grad_v, *results


def _in_rows(matrix: Tensor) -> Tensor:
    """With adjacent columns, as the kernels read; a gradient may have any strides."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
