"""The passes over sorted rows by the C++ kernels, and x Wᵀ of few tokens by the one that reads W once."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fast import calls
from lora_fast.backends import extension
from lora_fast.backends.grouped import Factors, Forward, norm_factors
from lora_fast.backends.plan import Plan
from lora_fast.backends.torch import grouped
from lora_fast.calls import RowGroups

_c = extension.operators()
PART = 32  # tokens


def group_rows(call: calls.GroupRows, plan: Plan) -> tuple[Tensor, Tensor]:
    adapter = call.adapter.to(torch.int64).contiguous()
    try:
        return _c.group_rows(adapter, call.adapters)
    except RuntimeError:
        if not bool(((adapter < -1) | (adapter >= call.adapters)).any()):
            raise  # of the memory for so many adapters
        raise grouped.unknown_id(adapter, call.adapters) from None


class Passes(grouped.Passes):
    """Those of PyTorch's calls where the plan or the pass says so: gradients of factors, and sums in float64."""

    def project(self, x: Tensor, factors: Factors, scaling: Tensor | None, groups: RowGroups, kernel: str) -> Tensor:
        if kernel != "grouped_project":
            return super().project(x, factors, scaling, groups, kernel)
        return _c.grouped_project(x, factors.tensors, *groups, factors.ranks)

    def compose(
        self,
        base: Tensor,
        h: Tensor,
        factors: Factors,
        scaling: Tensor | None,
        gain: Tensor | None,
        bias: Tensor | None,
        groups: RowGroups,
        out: Tensor,
        product: Tensor | None,
    ) -> None:
        given = base, h, factors.tensors, factors.transposed, scaling, gain, bias
        _c.grouped_compose(*given, *groups, factors.ranks, out, product)

    def gain_bwd(
        self,
        grad: Tensor,
        product: Tensor | None,
        gain: Tensor | None,
        groups: RowGroups,
        *,
        need_scaled: bool,
        need_gain: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _c.grouped_gain_bwd(grad, product, gain, *groups, need_scaled, need_gain, need_bias)


def few_tokens_fwd(call: calls.GroupedLora) -> Forward:
    """All of it in one C++ call."""
    x, weight, _, bias, *factors, scaling, gain, order, starts, ranks, keep = call
    assert weight is not None
    y = x.new_empty(x.shape[0], weight.shape[0])
    product = torch.empty_like(y) if keep else None
    bias = None if bias is None else bias.float()
    h = _c.grouped_linear_small_fwd(
        x.contiguous(), weight, *factors, scaling, gain, bias, order, starts, ranks, y, product
    )
    return y, y.new_empty(0) if product is None else product, h


def in_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias by the kernel for few tokens, of rank 0, which reads W once for each part."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    A, B = x.new_empty(0, weight.shape[1]), x.new_empty(weight.shape[0], 0)
    wide = None if bias is None else bias.float()
    for rows, out in zip(x.split(PART), y.split(PART), strict=True):
        _c.lora_linear_small_fwd(rows, weight, A, B, 1.0, None, wide, out, None)
    return y


def grouped_weight_norm_fwd(call: calls.GroupedWeightNorm, plan: Plan) -> Tensor:
    lora_A, lora_B = norm_factors(call)
    return _c.grouped_weight_norm_fwd(call.weight, lora_A, lora_B, call.scaling.tolist())
