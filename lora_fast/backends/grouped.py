"""grouped_lora as products with W, x and the adapters, with a backend's passes over rows that are sorted by adapter.

    forward   base = x Wᵀ           h[t] = A[a] x[t]          v[t] = base[t] + s[a] B[a] h[t]     y = g[a] ⊙ v + bias
    backward  dv[t] = g[a] ⊙ dy[t]  dg[a] = Σ dy[t] ⊙ v[t]    dbias = Σ_t dy[t]
              dh[t] = s[a] B[a]ᵀ dv[t]   dB[a] = s[a] Σ dv[t] h[t]ᵀ   dA[a] = Σ dh[t] x[t]ᵀ
              dx[t] = Wᵀ dv[t] + A[a]ᵀ dh[t]

with a the adapter of row t, and sums over t in a group, but for dbias. Activations are [T, features], in the order of
the batch; only a pass looks at the order of the groups. The products with W are PyTorch's or a backend's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import calls
from lora_fast.backends.plan import Plan
from lora_fast.calls import RowGroups

Forward = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor, Tensor]


class Factors:
    """The matrices of one side of L adapters, lora_A's [R_a, K] or lora_B's [N, R_a], in a stack or apart.

    Attributes:
        tensors: one [L, …] or L matrices. ranks: int64 [L], or None where the shapes say them.
        rank_dim: of a matrix, the dimension that is the rank: 0 for lora_A, 1 for lora_B.
        transposed: whether the passes are to take the matrices the other way round.
    """

    def __init__(
        self, tensors: Sequence[Tensor], ranks: Tensor | None, rank_dim: int, *, transposed: bool = False
    ) -> None:
        self.tensors, self.ranks, self.rank_dim, self.transposed = tensors, ranks, rank_dim, transposed

    @property
    def T(self) -> Factors:
        """Each matrix transposed."""
        return Factors(self.tensors, self.ranks, self.rank_dim, transposed=not self.transposed)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Factors:
        """The same of other tensors in their place."""
        return Factors(tensors, self.ranks, self.rank_dim, transposed=self.transposed)

    def of_adapter(self, values: Sequence[bool], adapter: int) -> bool:
        """What ``values``, one for each of the tensors, say of an adapter."""
        return values[0] if self.tensors[0].dim() == 3 else values[adapter]

    @property
    def rank(self) -> int:
        """The largest that the shapes allow."""
        return max(tensor.shape[self.rank_dim - 2] for tensor in self.tensors)

    def matrix(self, adapter: int) -> Tensor:
        """That of one adapter, as of :meth:`matrices`."""
        tensor = self.tensors[0][adapter] if self.tensors[0].dim() == 3 else self.tensors[adapter]
        if self.ranks is not None:
            tensor = tensor.narrow(self.rank_dim, 0, int(self.ranks[adapter]))
        return tensor.T if self.transposed else tensor

    def matrices(self) -> list[Tensor]:
        """One of each adapter, of its own rank; ``ranks`` on another device than the CPU make the host wait."""
        tensors = self.tensors[0].unbind(0) if self.tensors[0].dim() == 3 else self.tensors
        if self.ranks is not None:
            ranks = self.ranks.tolist()
            tensors = [tensor.narrow(self.rank_dim, 0, rank) for tensor, rank in zip(tensors, ranks, strict=True)]
        return [tensor.T for tensor in tensors] if self.transposed else list(tensors)


Grouped = calls.GroupedLora | calls.GroupedLoraGrad | calls.GroupedWeightNorm | calls.GroupedWeightNormGrad


def lora_A_of(call: Grouped) -> Factors:
    return Factors(call.lora_A, call.ranks, 0)


def lora_B_of(call: Grouped) -> Factors:
    return Factors(call.lora_B, call.ranks, 1)


def not_needed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In the place of gradients that nobody asked for."""
    return [tensor.new_empty(0) for tensor in tensors]


def zeros_where(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """Zeros like the tensors, contiguous; empty for what is not needed."""
    return [
        torch.zeros_like(tensor, memory_format=torch.contiguous_format) if need else tensor.new_empty(0)
        for tensor, need in zip(tensors, needed, strict=True)
    ]


def segments(groups: RowGroups) -> Iterator[tuple[int, Tensor]]:
    """(adapter, its rows) of each that has any, −1 for the base alone, in ascending order; on a GPU the host waits."""
    starts = groups.starts.tolist()
    for group in range(len(starts) - 1):
        begin, end = starts[group], starts[group + 1]
        if begin < end:
            yield group - 1, groups.order[begin:end]


class Passes(Protocol):
    """What a backend computes beside the products with W. Activations are contiguous; rows of no adapter included."""

    def project(self, x: Tensor, factors: Factors, scaling: Tensor | None, groups: RowGroups, kernel: str) -> Tensor:
        """h [T, R] of x's dtype, h[t] = s[a] F[a] x[t] for F [R_a, K]; 0 past an adapter's rank and for the base."""

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
        """out ← gain[a] ⊙ v + bias, product ← v, v[t] = base[t] + s[a] F[a] h[t] for F [N, R_a]; out may be base."""

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
        """(gain[a] ⊙ grad, Σ grad ⊙ product of each adapter [L, N], Σ_t grad), each only if asked for."""

    def outer(
        self,
        left: Tensor,
        right: Tensor,
        like: Factors,
        scaling: Tensor | None,
        groups: RowGroups,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        """s[a] Σ left[t] right[t]ᵀ of each adapter, as the tensors of ``like``; 0 past an adapter's rank.

        Those that are not ``needed`` are empty.
        """


class Linears:
    """The two ops from a backend's passes; ``products``: those with W by the kernels that its plans name."""

    def __init__(self, passes: Passes, products: Mapping = MappingProxyType({})) -> None:
        self.passes, self.products = passes, products

    def grouped_lora_fwd(self, call: calls.GroupedLora, plan: Plan) -> Forward:
        x, gain, bias, groups = call.x.contiguous(), call.gain, call.bias, call.groups
        h = self.passes.project(x, lora_A_of(call), None, groups, plan.kernel("h"))
        if call.base is None:
            assert call.weight is not None
            # without a gain the rows of no adapter are nn.Linear's to the bit
            in_product = None if gain is not None or bias is None else bias.to(x.dtype)
            bias = bias if gain is not None else None
            base = self._linear(x, call.weight, in_product, plan.kernel("base"))
            y = base
        else:
            base = call.base.contiguous()
            y = torch.empty_like(base)
        product = torch.empty_like(y) if call.keep else None
        self.passes.compose(base, h, lora_B_of(call), call.scaling, gain, bias, groups, y, product)
        return y, y.new_empty(0) if product is None else product, h

    def grouped_lora_bwd(self, call: calls.GroupedLoraGrad, plan: Plan) -> Gradients:
        grad_y, gain, groups, scaling = call.grad_y.contiguous(), call.gain, call.groups, call.scaling
        need_A, need_B = any(call.need_A), any(call.need_B)
        need_h = call.need_x or need_A
        grad_v, grad_gain, grad_bias = self.passes.gain_bwd(
            grad_y,
            call.product,
            gain,
            groups,
            need_scaled=gain is not None and (need_h or need_B or call.need_base),
            need_gain=call.need_gain,
            need_bias=call.need_bias,
        )
        grad_base = grad_v if call.need_base else grad_y.new_empty(0)
        if gain is None:
            grad_v = grad_y
        grad_x, grad_h = grad_y.new_empty(0), grad_y
        grad_A, grad_B = not_needed(call.lora_A), not_needed(call.lora_B)
        lora_A, lora_B = lora_A_of(call), lora_B_of(call)
        if need_B:
            assert call.h is not None
            grad_B = self.passes.outer(grad_v, call.h.to(grad_v.dtype), lora_B, scaling, groups, call.need_B)
        if need_h:
            grad_h = self.passes.project(grad_v, lora_B.T, scaling, groups, plan.kernel("grad_h"))
        if need_A:
            assert call.x is not None
            grad_A = self.passes.outer(grad_h, call.x.contiguous().to(grad_h.dtype), lora_A, None, groups, call.need_A)
        if call.need_x:
            if call.weight is None:
                grad_x = grad_y.new_zeros(grad_y.shape[0], call.lora_A[0].shape[-1])
            else:
                grad_x = self._linear(grad_v, call.weight.T, None, plan.kernel("grad_x"))
            self.passes.compose(grad_x, grad_h, lora_A.T, None, None, None, groups, grad_x, None)
        return grad_x, grad_base, grad_A, grad_B, grad_gain, grad_bias

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, kernel: str) -> Tensor:
        product = self.products.get(kernel)
        if product is not None:
            return product(x, weight, bias)
        return F.linear(x, weight.to(x.dtype), bias).contiguous()


def norm_factors(call: calls.GroupedWeightNorm) -> tuple[list[Tensor], list[Tensor]]:
    """lora_A's and lora_B's matrix of each adapter, of its own rank; in the place of none one of rank 1, of zeros."""
    lora_A, lora_B = lora_A_of(call).matrices(), lora_B_of(call).matrices()
    for a, A in enumerate(lora_A):
        if A.shape[0] == 0:
            lora_A[a], lora_B[a] = A.new_zeros(1, A.shape[1]), A.new_zeros(lora_B[a].shape[0], 1)
    return lora_A, lora_B


def norm_gradients(
    call: calls.GroupedWeightNormGrad,
    plan: Plan,
    weight_norm_bwd: Callable[[calls.WeightNormGrad, Plan], tuple[Tensor, Tensor]],
) -> tuple[list[Tensor], list[Tensor]]:
    """grouped_weight_norm_bwd by a backend's ``weight_norm_bwd``, an adapter after the other."""
    lora_A, lora_B = lora_A_of(call), lora_B_of(call)
    grad_A, grad_B = zeros_where(call.lora_A, call.need_A), zeros_where(call.lora_B, call.need_B)
    into_A, into_B = lora_A.with_tensors(grad_A), lora_B.with_tensors(grad_B)
    pairs = zip(lora_A.matrices(), lora_B.matrices(), call.scaling.tolist(), strict=True)
    for adapter, (A, B, scale) in enumerate(pairs):
        if A.shape[0] == 0:
            continue
        given = call.grad[adapter], call.norm[adapter], call.weight, A, B, scale
        need_A, need_B = lora_A.of_adapter(call.need_A, adapter), lora_B.of_adapter(call.need_B, adapter)
        own_A, own_B = weight_norm_bwd(calls.WeightNormGrad(*given, "output", need_A, need_B), plan)
        if need_A:
            into_A.matrix(adapter).copy_(own_A)
        if need_B:
            into_B.matrix(adapter).copy_(own_B)
    return grad_A, grad_B
