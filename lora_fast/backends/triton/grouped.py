"""The passes over rows of many adapters by Triton kernels, and the norms of many adapters on one weight.

Everything here is launches of sizes that the shapes say, whatever the ids, ranks and scalings hold, so that a captured
graph serves any of them. Factors that lie in separate matrices are first copied into one stack, with zeros where a
matrix has less than the largest rank; a kernel has no list of pointers to read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import calls
from lora_fast.backends.grouped import Factors, Forward, Gradients, Grouped, Linears, lora_A_of, lora_B_of, not_needed
from lora_fast.backends.plan import Plan
from lora_fast.calls import RowGroups
from lora_fast.triton_kernels.grouped_compose import grouped_compose
from lora_fast.triton_kernels.grouped_gain_bwd import grouped_gain_bwd
from lora_fast.triton_kernels.grouped_linear_small import grouped_linear_small_fwd
from lora_fast.triton_kernels.grouped_outer import grouped_outer
from lora_fast.triton_kernels.grouped_project import grouped_project
from lora_fast.triton_kernels.grouped_rows import Groups, Stack
from lora_fast.triton_kernels.grouped_weight_norm import grouped_weight_norm_fwd as norm_fwd
from lora_fast.triton_kernels.weight_norm_bwd import weight_norm_bwd


def _stack(factors: Factors) -> Stack:
    """Features by rank, whichever way the passes ask for them."""
    tensors, by_features = factors.tensors, factors.rank_dim == 1
    if tensors[0].dim() == 3:
        (tensor,) = tensors
    else:
        tensor = torch.stack([_padded(matrix, factors.rank, factors.rank_dim) for matrix in tensors])
    return Stack(tensor if by_features else tensor.transpose(1, 2), factors.ranks)


def _padded(matrix: Tensor, rank: int, rank_dim: int) -> Tensor:
    """With zeros up to ``rank``."""
    more = rank - matrix.shape[rank_dim]
    return F.pad(matrix, (0, more) if rank_dim == 1 else (0, 0, 0, more)) if more else matrix


class Passes:
    """See :class:`lora_fast.backends.grouped.Passes`."""

    def project(self, x: Tensor, factors: Factors, scaling: Tensor | None, groups: RowGroups, kernel: str) -> Tensor:
        return grouped_project(x, _stack(factors), scaling, Groups(*groups))

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
        grouped_compose(base, h, _stack(factors), scaling, gain, bias, Groups(*groups), out, product)

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
        needs = {"need_v": need_scaled, "need_gain": need_gain, "need_bias": need_bias}
        return grouped_gain_bwd(grad, product, gain, Groups(*groups), **needs)

    def outer(
        self,
        left: Tensor,
        right: Tensor,
        like: Factors,
        scaling: Tensor | None,
        groups: RowGroups,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        by_features = like.rank_dim == 1
        wide, narrow = (left, right) if by_features else (right, left)
        dtype = like.tensors[0].dtype
        stack = grouped_outer(wide, narrow, like.ranks, scaling, Groups(*groups), dtype, transposed=not by_features)
        return _like(like.tensors, stack, needed)


_LINEARS = Linears(Passes())


def grouped_lora_fwd(call: calls.GroupedLora, plan: Plan) -> Forward:
    if plan.kernel("y") == "grouped_linear_small_fwd":
        assert call.weight is not None
        assert call.gain is not None
        stacks = _stacks(call)
        given = call.x.contiguous(), call.weight, call.bias, *stacks, call.scaling, call.gain, Groups(*call.groups)
        return grouped_linear_small_fwd(*given, keep_product=call.keep)
    return _LINEARS.grouped_lora_fwd(call, plan)


def grouped_lora_bwd(call: calls.GroupedLoraGrad, plan: Plan) -> Gradients:
    return _LINEARS.grouped_lora_bwd(call, plan)


def grouped_weight_norm_fwd(call: calls.GroupedWeightNorm, plan: Plan) -> Tensor:
    A, B = _stacks(call)
    return norm_fwd(call.weight, A.tensor.transpose(1, 2), B.tensor, call.scaling, call.ranks)


def grouped_weight_norm_bwd(call: calls.GroupedWeightNormGrad, plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
    """An adapter after the other. The host does not know s, nor the ranks: s lora_B, made on the device in float32,
    stands for lora_B, and what is past a rank is made 0 in copies of the factors."""
    A, B = _stacks(call)
    weight, scaling = call.weight, call.scaling[:, None, None]
    by_features_A, by_features_B = A.tensor, B.tensor
    inside = None
    if call.ranks is not None:
        inside = torch.arange(A.rank, device=weight.device) < call.ranks[:, None, None]
        by_features_A, by_features_B = (torch.where(inside, tensor, 0) for tensor in (by_features_A, by_features_B))
    scaled_B = by_features_B.float() * scaling
    need_A, need_B = any(call.need_A), any(call.need_B)
    needs = {"need_A": need_A, "need_B": need_B}
    grads = [
        weight_norm_bwd(grad, norm, weight, own_A.T, own_B, 1.0, "output", **needs)
        for grad, norm, own_A, own_B in zip(call.grad, call.norm, by_features_A, scaled_B, strict=True)
    ]
    grad_A, grad_B = not_needed(call.lora_A), not_needed(call.lora_B)
    if need_A:
        own = torch.stack([pair[0] for pair in grads])
        grad_A = _like(call.lora_A, own if inside is None else torch.where(inside.transpose(1, 2), own, 0), call.need_A)
    if need_B:
        own = torch.stack([pair[1] for pair in grads]) * scaling
        grad_B = _like(call.lora_B, own if inside is None else torch.where(inside, own, 0), call.need_B)
    return grad_A, grad_B


def _stacks(call: Grouped) -> tuple[Stack, Stack]:
    return _stack(lora_A_of(call)), _stack(lora_B_of(call))


def _like(tensors: Sequence[Tensor], stack: Tensor, needed: Sequence[bool]) -> list[Tensor]:
    """The stack as one tensor, or as matrices of the shapes of ``tensors``; an op's outputs may not share memory."""
    if tensors[0].dim() == 3:
        return [stack.to(tensors[0].dtype)]
    return [
        own[: tensor.shape[0], : tensor.shape[1]].to(tensor.dtype, memory_format=torch.contiguous_format, copy=True)
        if need
        else tensor.new_empty(0)
        for own, tensor, need in zip(stack.unbind(0), tensors, needed, strict=True)
    ]
