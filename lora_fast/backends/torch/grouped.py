"""The passes over sorted rows and the norms of many adapters in PyTorch calls, a group after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import calls
from lora_fast.backends.grouped import Factors, norm_factors, segments, zeros_where
from lora_fast.backends.passes import token_chunks
from lora_fast.backends.plan import Plan
from lora_fast.backends.torch.rows import chunk_rows, norm_product_dtype, scaled_norm
from lora_fast.calls import RowGroups
from lora_fast.dtypes import accumulate_dtype


def group_rows(call: calls.GroupRows, plan: Plan) -> tuple[Tensor, Tensor]:
    adapter, count = call.adapter.long(), call.adapters
    unknown = (adapter < -1) | (adapter >= count)
    if adapter.device.type == "cpu" and bool(unknown.any()):
        raise unknown_id(adapter, count)
    group = torch.where(unknown, count, adapter) + 1
    ordered, order = torch.sort(group, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count + 3, device=adapter.device))


def unknown_id(adapter: Tensor, count: int) -> ValueError:
    """The error for ids of which some are not in [-1, count)."""
    least, largest = (int(value) for value in adapter.aminmax())
    return ValueError(f"adapter: got ids from {least} to {largest}, expected them in [-1, {count - 1}] (-1: the base)")


class Passes:
    """See :class:`lora_fast.backends.grouped.Passes`."""

    def project(self, x: Tensor, factors: Factors, scaling: Tensor | None, groups: RowGroups, kernel: str) -> Tensor:
        h = x.new_zeros(x.shape[0], factors.rank)
        matrices, scales = factors.matrices(), _numbers(scaling)
        for adapter, rows in segments(groups):
            if 0 <= adapter < len(matrices):
                part = F.linear(_rows(x, rows), matrices[adapter].to(x.dtype))
                h[rows, : part.shape[1]] = part if scales is None else part.mul_(scales[adapter])
        return h

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
        dtype = accumulate_dtype(base)
        matrices, scales = factors.matrices(), _numbers(scaling)
        bias = None if bias is None else bias.to(dtype)
        for adapter, members in segments(groups):
            is_adapted = 0 <= adapter < len(matrices)
            if not is_adapted and adapter < 0 and bias is None and product is None and out is base:
                continue
            for tokens in token_chunks(len(members), base.shape[1]):
                rows = members[tokens]
                v = base[rows].to(dtype)
                if is_adapted:
                    matrix = matrices[adapter].to(dtype)
                    alpha = 1.0 if scales is None else scales[adapter]
                    v.addmm_(h[rows, : matrix.shape[1]].to(dtype), matrix.T, alpha=alpha)
                elif adapter >= 0:
                    v.fill_(torch.nan)  # an id of no adapter
                if product is not None:
                    product[rows] = v.to(product.dtype)
                if gain is not None and is_adapted:
                    v *= gain[adapter].to(dtype)
                if bias is not None:
                    v += bias
                out[rows] = v.to(out.dtype)

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
        dtype, width = accumulate_dtype(grad), grad.shape[1]
        count = groups.starts.shape[0] - 3
        scaled = torch.empty_like(grad) if need_scaled else grad.new_empty(0)
        grad_gain = grad.new_zeros((count, width) if need_gain else 0, dtype=dtype)
        for adapter, members in segments(groups) if need_scaled or need_gain else ():
            is_adapted = 0 <= adapter < count
            for tokens in token_chunks(len(members), width):
                rows = members[tokens]
                part = grad[rows].to(dtype)
                if need_gain and is_adapted:
                    assert product is not None
                    grad_gain[adapter] += (part * product[rows].to(dtype)).sum(0)
                if need_scaled:
                    assert gain is not None
                    scaled[rows] = (part.mul_(gain[adapter].to(dtype)) if is_adapted else part).to(scaled.dtype)
        grad_bias = grad.new_zeros(width if need_bias else 0, dtype=dtype)
        for tokens in token_chunks(*grad.shape) if need_bias else ():
            grad_bias += grad[tokens].sum(0, dtype=dtype)
        return scaled, grad_gain, grad_bias

    def outer(
        self,
        left: Tensor,
        right: Tensor,
        like: Factors,
        scaling: Tensor | None,
        groups: RowGroups,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        gradients, scales = zeros_where(like.tensors, needed), _numbers(scaling)
        into_tensors = like.with_tensors(gradients)
        for adapter, rows in segments(groups):
            if not 0 <= adapter < groups.starts.shape[0] - 3 or not like.of_adapter(needed, adapter):
                continue
            into = into_tensors.matrix(adapter)
            rows_left, rows_right = _rows(left, rows)[:, : into.shape[0]], _rows(right, rows)[:, : into.shape[1]]
            product = left.new_empty(into.shape)
            alpha = 1.0 if scales is None else scales[adapter]
            into.copy_(product.addmm_(rows_left.T, rows_right, beta=0, alpha=alpha))
        return gradients


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """``tensor[rows]`` of ascending rows, without a copy where they are adjacent."""
    first, last = int(rows[0]), int(rows[-1])
    return tensor[first : last + 1] if last - first + 1 == len(rows) else tensor[rows]


def _numbers(scaling: Tensor | None) -> list[float] | None:
    return None if scaling is None else scaling.tolist()


def grouped_weight_norm_fwd(call: calls.GroupedWeightNorm, plan: Plan) -> Tensor:
    """A block of W's rows meets all adapters while a core's cache holds it."""
    weight, scales = call.weight, call.scaling.tolist()
    lora_A, lora_B = norm_factors(call)
    dtype = accumulate_dtype(weight, *lora_A, *lora_B)
    product_dtype = norm_product_dtype(dtype)
    N, K = weight.shape
    norm = weight.new_empty(len(scales), N, dtype=dtype)
    step = chunk_rows(N, K)
    delta = weight.new_empty(step, K, dtype=product_dtype)
    chunk = weight.new_empty(step, K, dtype=dtype)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        count = rows.stop - start
        for adapter, scale in enumerate(scales):
            A, B = lora_A[adapter].to(product_dtype), lora_B[adapter][rows].to(product_dtype)
            torch.mm(B, A, out=delta[:count]).mul_(scale)
            norm[adapter, rows] = scaled_norm(chunk[:count].copy_(weight[rows]).add_(delta[:count]), 1)
    return norm
