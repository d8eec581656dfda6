"""Portable backend: PyTorch calls only, any device and dtype, no [N, K] temporary.

Work on W goes in chunks of rows, V_chunk = W_chunk + s B_chunk A, so the direct sum is used throughout and nothing
cancels. Work on activations goes in chunks of tokens, in float32 (float64 for float64).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lora_fast import calls, norm_cache
from lora_fast.backends import dora, grouped
from lora_fast.backends.mlp import Mlps
from lora_fast.backends.passes import Gradients, Passes, token_chunks
from lora_fast.backends.plan import Plan, may_keep_norm
from lora_fast.backends.torch import glu, grouped as grouped_passes
from lora_fast.backends.torch.rows import chunk_rows, norm_product_dtype, scaled_norm
from lora_fast.content_key import content_key
from lora_fast.dtypes import accumulate_dtype

_UINT32 = 0xFFFFFFFF


def _adapted_rows(
    call: calls.WeightNorm | calls.QuantisedNorm | calls.WeightNormGrad | calls.MergeWeight, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, V[rows]) with V = W + s lora_B lora_A in ``dtype``; each V[rows] takes the place of the one before.

    Two buffers and no mixed operands, whose casts allocate: aligned blocks that are freed and asked for anew pile up
    in glibc's heap, to the size of V.
    """
    lora_A = call.lora_A.to(norm_product_dtype(dtype))
    N, K = call.lora_B.shape[0], lora_A.shape[1]
    step = chunk_rows(N, K)
    weight_rows = _dequantised(call, step) if isinstance(call, calls.QuantisedNorm) else call.weight.__getitem__
    delta = lora_A.new_empty(step, K)
    chunk = lora_A.new_empty(delta.shape, dtype=dtype)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        count = rows.stop - start
        torch.mm(call.lora_B[rows].to(lora_A.dtype), lora_A, out=delta[:count]).mul_(call.scaling)
        yield rows, chunk[:count].copy_(weight_rows(rows)).add_(delta[:count])


def _dequantised(call: calls.QuantisedNorm, step: int) -> Callable[[slice], Tensor]:
    """What gives W[rows], ``step`` rows at most, in a buffer that the next rows take over."""
    codes, scale, levels = call.codes, call.scale, call.levels
    values = scale.new_empty(step, call.lora_A.shape[1])
    rounded = values if call.dtype == torch.float32 else values.new_empty(values.shape, dtype=call.dtype)
    if levels is not None:
        pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)  # [256, 2]: the values of a byte
        index = codes.new_empty(step, codes.shape[1], dtype=torch.int32)

    def weight_rows(rows: slice) -> Tensor:
        count = rows.stop - rows.start
        own = values[:count]
        if levels is None:
            own.copy_(codes[rows])
        else:
            torch.index_select(pairs, 0, index[:count].copy_(codes[rows]).view(-1), out=own.view(-1, 2))
        own.view(count, scale.shape[1], -1).mul_(scale[rows, :, None])
        return own if rounded is values else rounded[:count].copy_(own)

    return weight_rows


def weight_norm_fwd(call: calls.WeightNorm, plan: Plan) -> Tensor:
    weight, kept_norm, kept_key = call.weight, call.kept_norm, call.kept_key
    # on another device the comparison would make the host wait, and a tensor without a version can't be trusted
    if kept_norm is None or kept_key is None or weight.device.type != "cpu" or weight.is_inference():
        return _norm(call)
    key = content_key(weight, call.lora_A, call.lora_B, call.scaling, call.axis)
    return norm_cache.reuse(kept_norm, kept_key, key, lambda: _norm(call))


def quantised_norm_fwd(call: calls.QuantisedNorm, plan: Plan) -> Tensor:
    kept_norm, kept_key = call.kept_norm, call.kept_key
    if kept_norm is None or kept_key is None or call.codes.device.type != "cpu" or not may_keep_norm(call):
        return _quantised_norm(call)
    key = content_key(call.codes, call.lora_A, call.lora_B, call.scaling, call.dtype, *call.others)
    return norm_cache.reuse(kept_norm, kept_key, key, lambda: _quantised_norm(call))


def _quantised_norm(call: calls.QuantisedNorm) -> Tensor:
    dtype = accumulate_dtype(call.lora_A, call.lora_B)
    return torch.cat([scaled_norm(chunk, 1) for _, chunk in _adapted_rows(call, dtype)])


def _norm(call: calls.WeightNorm) -> Tensor:
    dtype = accumulate_dtype(call.weight, call.lora_A, call.lora_B)
    dim = 1 if call.axis == "output" else 0
    norms = (scaled_norm(chunk, dim) for _, chunk in _adapted_rows(call, dtype))
    return torch.cat(list(norms)) if call.axis == "output" else _norm_of_parts(norms)


def _norm_of_parts(norms: Iterator[Tensor]) -> Tensor:
    """√(Σ n²) of the norms of parts, by twos: in a chain the rounding errors would grow with the number of parts."""
    waiting: list[Tensor | None] = []  # at i the norm of 2^i parts
    for norm in norms:
        level = 0
        while level < len(waiting) and (other := waiting[level]) is not None:
            norm = scaled_norm(torch.stack((other, norm)), 0)
            waiting[level] = None
            level += 1
        waiting[level : level + 1] = [norm]
    return functools.reduce(
        lambda total, part: scaled_norm(torch.stack((total, part)), 0), (part for part in waiting if part is not None)
    )


def weight_norm_bwd(call: calls.WeightNormGrad, plan: Plan) -> tuple[Tensor, Tensor]:
    lora_A, lora_B, norm = call.lora_A, call.lora_B, call.norm
    dtype = accumulate_dtype(call.weight, lora_A, lora_B)
    product = norm_product_dtype(dtype)
    # c = grad / n, and 0 for a zero row
    c = torch.where(norm == 0, 0.0, call.grad / torch.where(norm == 0, 1.0, norm)).to(dtype)
    wide_A = lora_A.to(product)
    grad_A = torch.zeros(lora_A.shape, dtype=product, device=lora_A.device) if call.need_A else lora_A.new_empty(0)
    grad_B = lora_B.new_empty(lora_B.shape if call.need_B else 0)
    for rows, chunk in _adapted_rows(call, dtype):
        grad_V = chunk.mul_(c[rows, None] if call.axis == "output" else c).to(product)
        if call.need_A:
            grad_A.addmm_(lora_B[rows].to(product).T, grad_V, alpha=call.scaling)
        if call.need_B:
            grad_B[rows] = (grad_V @ wide_A.T).mul_(call.scaling).to(lora_B.dtype)
    return grad_A.to(lora_A.dtype), grad_B


def merge_weight(call: calls.MergeWeight, plan: Plan) -> None:
    gain = call.gain
    for rows, chunk in _adapted_rows(call, accumulate_dtype(call.weight, call.lora_A, call.lora_B)):
        if gain is not None:
            chunk.mul_(gain[rows, None] if call.axis == "output" else gain)
        call.weight[rows] = chunk


def compose(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    product: Tensor | None,
) -> None:
    """out ← gain ⊙ v + bias with v = base + s h lora_Bᵀ, and product ← v where it is given; out may be base.

    A chunk is one buffer, in which everything happens: a small layer's activations are of its weight's size.
    """
    dtype = accumulate_dtype(base)
    lora_B = lora_B.to(dtype)
    gain, bias = (None if vector is None else vector.to(dtype) for vector in (gain, bias))
    for tokens in token_chunks(*base.shape):
        v = base[tokens].to(dtype, copy=True).addmm_(h[tokens].to(dtype), lora_B.T, alpha=scaling)
        if product is not None:
            product[tokens] = v
        if gain is not None:
            v *= gain
        if bias is not None:
            v += bias
        out[tokens] = v


def gain_bwd(
    grad: Tensor, product: Tensor | None, gain: Tensor | None, *, need_scaled: bool, need_gain: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(gain ⊙ grad, Σ_t grad ⊙ product, Σ_t grad), each only if asked for; without a gain the first is empty."""
    dtype = accumulate_dtype(grad)
    width = grad.shape[1]
    need_scaled = need_scaled and gain is not None
    scaled = torch.empty_like(grad, memory_format=torch.contiguous_format) if need_scaled else grad.new_empty(0)
    grad_gain = grad.new_zeros(width if need_gain else 0, dtype=dtype)
    grad_bias = grad.new_zeros(width if need_bias else 0, dtype=dtype)
    for tokens in token_chunks(*grad.shape):
        if need_scaled:
            assert gain is not None
            scaled[tokens] = grad[tokens].to(dtype, copy=True).mul_(gain.to(dtype))
        if need_gain:
            assert product is not None
            grad_gain += grad[tokens].to(dtype, copy=True).mul_(product[tokens].to(dtype)).sum(0)
        if need_bias:
            grad_bias += grad[tokens].sum(0, dtype=dtype)
    return scaled, grad_gain, grad_bias


def dropout_mask(seed: Tensor, shape: tuple[int, int], p: float) -> Tensor:
    """bool [T, K], True where kept: the counter-based mask that every backend draws from ``seed``.

    All arithmetic is modulo 2^32, held in int64.
    """
    tokens, width = shape
    lo, hi = seed & _UINT32, (seed >> 32) & _UINT32
    t = torch.arange(tokens, device=seed.device)
    r1 = _mix(lo + (t & _UINT32) * 0x9E3779B9)
    r2 = _mix(hi ^ _mix(r1 + (t >> 32)))
    z = (torch.arange(width, device=seed.device) + r1[:, None]) & _UINT32
    z = _times(z ^ (z >> 16), 0x85EBCA6B) ^ r2[:, None]
    z = _times(z ^ (z >> 13), 0xC2B2AE35)
    return (z ^ (z >> 16)) >= int(p * 2**32)


def _times(z: Tensor, multiplier: int) -> Tensor:
    return (z * multiplier) & _UINT32


def _mix(z: Tensor) -> Tensor:
    """murmur3's 32-bit finalizer."""
    z = z & _UINT32
    z = _times(z ^ (z >> 16), 0x85EBCA6B)
    z = _times(z ^ (z >> 13), 0xC2B2AE35)
    return z ^ (z >> 16)


def drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x / (1 - p) where the mask keeps, else 0; x [T, K]."""
    if p == 1.0:
        return x.new_zeros(x.shape)
    return torch.where(dropout_mask(seed, (x.shape[0], x.shape[1]), p), x / (1.0 - p), 0.0)


_linear = Passes(compose, gain_bwd, drop)
lora_linear_fwd = _linear.lora_linear_fwd
lora_linear_bwd = _linear.lora_linear_bwd
lora_compose_fwd = _linear.lora_compose_fwd
lora_compose_bwd = _linear.lora_compose_bwd
dropout = _linear.dropout


def dora_linear_fwd(call: calls.DoraLinear, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return dora.dora_linear_fwd(call, plan, weight_norm_fwd, lora_linear_fwd)


def dora_linear_bwd(call: calls.DoraLinearGrad, plan: Plan) -> Gradients:
    return dora.dora_linear_bwd(call, plan, weight_norm_bwd, lora_linear_bwd)


lora_glu_fwd = glu.lora_glu_fwd
lora_glu_bwd = glu.lora_glu_bwd
_mlps = Mlps(lora_glu_fwd, lora_glu_bwd, compose, gain_bwd)
adapted_mlp_fwd = _mlps.adapted_mlp_fwd
adapted_mlp_bwd = _mlps.adapted_mlp_bwd

_grouped = grouped.Linears(grouped_passes.Passes())
group_rows = grouped_passes.group_rows
grouped_lora_fwd = _grouped.grouped_lora_fwd
grouped_lora_bwd = _grouped.grouped_lora_bwd
grouped_weight_norm_fwd = grouped_passes.grouped_weight_norm_fwd


def grouped_weight_norm_bwd(call: calls.GroupedWeightNormGrad, plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
    return grouped.norm_gradients(call, plan, weight_norm_bwd)
