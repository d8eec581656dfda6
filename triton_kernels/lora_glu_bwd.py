"""The backward of a = act(z_gate) ⊙ z_up, z_p = gain_p ⊙ v_p + bias_p, v_p = base_p + s_p h_p lora_B_pᵀ: all but the
products with the weights and the factors.

    dz_gate = da ⊙ z_up ⊙ act'(z_gate)        dz_up = da ⊙ act(z_gate)        for p = gate, up:
    dv_p = gain_p ⊙ dz_p        dgain_p = Σ_t dz_p ⊙ v_p        dbias_p = Σ_t dz_p

The operands are those of :mod:`lora_fast.triton_kernels.lora_glu_fwd`, and grad = da [M, N] -> dv_p [M, N] of grad's
dtype, in rows any distance apart; dgain_p and dbias_p float32 [N]; and a itself, where it is asked for. v and z are
made again as forward made them and are in no memory; all is float32 up to the rounding of each result.

A program of the first launch has one tile and writes its sums over rows; the second launch adds those of all blocks of
rows in a fixed order. Where no sum is asked for there is neither a second launch nor a buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.activations import activated_with_slope
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.grouped_gain_bwd import sum_of_blocks
from lora_fast.triton_kernels.launch import jit
from lora_fast.triton_kernels.lora_glu_fwd import adapted, in_rows, rank, row_stride, scaled, strides, tile
from lora_fast.triton_kernels.target import Target, cdiv, current, has_vectors, next_power_of_2, rank_block


@triton.jit
def _store_sum(ptrs, values, mask_m, mask_n):
    """Σ of the rows that are there: elsewhere a bias that is infinite would make NaN of 0."""
    tl.store(ptrs, tl.sum(tl.where(mask_m[:, None], values, 0.0), axis=0), mask=mask_n)


@jit
def lora_glu_bwd_kernel(
    grad_ptr, base_gate_ptr, base_up_ptr, h_gate_ptr, h_up_ptr, B_gate_ptr, B_up_ptr,
    gain_gate_ptr, gain_up_ptr, bias_gate_ptr, bias_up_ptr, grad_v_gate_ptr, grad_v_up_ptr, out_ptr,
    gain_gate_sums_ptr, gain_up_sums_ptr, bias_gate_sums_ptr, bias_up_sums_ptr,
    M, N, R_gate, R_up, scaling_gate, scaling_up,
    stride_grad_m, stride_base_gate_m, stride_base_up_m, stride_h_gate_m, stride_h_up_m,
    stride_B_gate_n, stride_B_gate_r, stride_B_up_n, stride_B_up_r, stride_grad_v_gate_m, stride_grad_v_up_m,
    ADAPT_GATE: tl.constexpr, ADAPT_UP: tl.constexpr, HAS_GAIN_GATE: tl.constexpr, HAS_GAIN_UP: tl.constexpr,
    HAS_BIAS_GATE: tl.constexpr, HAS_BIAS_UP: tl.constexpr, NEED_OUTPUT: tl.constexpr,
    NEED_GAIN_GATE: tl.constexpr, NEED_GAIN_UP: tl.constexpr, NEED_BIAS_GATE: tl.constexpr, NEED_BIAS_UP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sums over each block of rows: gain_sums and bias_sums [blocks, N]."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    block = (tl.program_id(0) // tiles_n).to(tl.int64)
    row, column = block * BLOCK_M, (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < (M - row).to(tl.int32), offs_n < (N - column).to(tl.int32)
    mask = mask_m[:, None] & mask_n[None, :]
    sums = block * N + column
    # asked for first, needed last: they come while the rank steps go on
    base_gate = tl.load(tile(base_gate_ptr, row, column, offs_m, offs_n, stride_base_gate_m), mask=mask, other=0.0)
    base_up = tl.load(tile(base_up_ptr, row, column, offs_m, offs_n, stride_base_up_m), mask=mask, other=0.0)
    grad = tl.load(tile(grad_ptr, row, column, offs_m, offs_n, stride_grad_m), mask=mask, other=0.0)

    v_gate = adapted(
        base_gate, h_gate_ptr, B_gate_ptr, row, column, offs_m, offs_n, mask_m, mask_n, R_gate, scaling_gate,
        stride_h_gate_m, stride_B_gate_n, stride_B_gate_r, ADAPT_GATE, BLOCK_R,
    )  # fmt: skip
    v_up = adapted(
        base_up, h_up_ptr, B_up_ptr, row, column, offs_m, offs_n, mask_m, mask_n, R_up, scaling_up,
        stride_h_up_m, stride_B_up_n, stride_B_up_r, ADAPT_UP, BLOCK_R,
    )  # fmt: skip
    z_gate = scaled(v_gate, gain_gate_ptr, bias_gate_ptr, column, offs_n, mask_n, HAS_GAIN_GATE, HAS_BIAS_GATE)
    z_up = scaled(v_up, gain_up_ptr, bias_up_ptr, column, offs_n, mask_n, HAS_GAIN_UP, HAS_BIAS_UP)
    gate, slope = activated_with_slope(z_gate, ACTIVATION)
    if NEED_OUTPUT:
        out = (gate * z_up).to(out_ptr.dtype.element_ty)
        tl.store(tile(out_ptr, row, column, offs_m, offs_n, N), out, mask=mask)
    grad = grad.to(tl.float32)
    grad_z = grad * gate
    if NEED_GAIN_UP:
        _store_sum(gain_up_sums_ptr + sums + offs_n, grad_z * v_up, mask_m, mask_n)
    if NEED_BIAS_UP:
        _store_sum(bias_up_sums_ptr + sums + offs_n, grad_z, mask_m, mask_n)
    grad_v = scaled(grad_z, gain_up_ptr, None, column, offs_n, mask_n, HAS_GAIN_UP, False)
    grad_v_ptrs = tile(grad_v_up_ptr, row, column, offs_m, offs_n, stride_grad_v_up_m)
    tl.store(grad_v_ptrs, grad_v.to(grad_v_up_ptr.dtype.element_ty), mask=mask)
    grad_z = grad * z_up * slope
    if NEED_GAIN_GATE:
        _store_sum(gain_gate_sums_ptr + sums + offs_n, grad_z * v_gate, mask_m, mask_n)
    if NEED_BIAS_GATE:
        _store_sum(bias_gate_sums_ptr + sums + offs_n, grad_z, mask_m, mask_n)
    grad_v = scaled(grad_z, gain_gate_ptr, None, column, offs_n, mask_n, HAS_GAIN_GATE, False)
    grad_v_ptrs = tile(grad_v_gate_ptr, row, column, offs_m, offs_n, stride_grad_v_gate_m)
    tl.store(grad_v_ptrs, grad_v.to(grad_v_gate_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish(sums_ptr, grad_ptr, offs_n, N, blocks, AT_ONCE: tl.constexpr):
    tl.store(grad_ptr + offs_n, sum_of_blocks(sums_ptr, 0, blocks, offs_n, N, AT_ONCE), mask=offs_n < N)


@jit
def lora_glu_bwd_finish_kernel(
    gain_gate_sums_ptr, gain_up_sums_ptr, bias_gate_sums_ptr, bias_up_sums_ptr,
    grad_gain_gate_ptr, grad_gain_up_ptr, grad_bias_gate_ptr, grad_bias_up_ptr,
    N, blocks,
    NEED_GAIN_GATE: tl.constexpr, NEED_GAIN_UP: tl.constexpr, NEED_BIAS_GATE: tl.constexpr, NEED_BIAS_UP: tl.constexpr,
    BLOCK_N: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A block of columns of one of the four; where that is not needed the program has nothing to do."""
    line = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if NEED_GAIN_GATE:  # noqa: SIM102 (known to the compiler)
        if line == 0:
            _finish(gain_gate_sums_ptr, grad_gain_gate_ptr, offs_n, N, blocks, AT_ONCE)
    if NEED_GAIN_UP:  # noqa: SIM102
        if line == 1:
            _finish(gain_up_sums_ptr, grad_gain_up_ptr, offs_n, N, blocks, AT_ONCE)
    if NEED_BIAS_GATE:  # noqa: SIM102
        if line == 2:
            _finish(bias_gate_sums_ptr, grad_bias_gate_ptr, offs_n, N, blocks, AT_ONCE)
    if NEED_BIAS_UP:  # noqa: SIM102
        if line == 3:
            _finish(bias_up_sums_ptr, grad_bias_up_ptr, offs_n, N, blocks, AT_ONCE)


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


FINISH_COLUMNS = 64  # of float32, 16 bytes a thread for each of the blocks that are added at once
FINISH_AT_ONCE = 32


@remembered
def lora_glu_bwd_config(M: int, N: int, R: int, bytes_each: int, vectors: bool, target: Target) -> Config:
    """As :func:`~lora_fast.triton_kernels.lora_glu_fwd.lora_glu_fwd_config` has its arguments.

    Bound by grad and both bases in and both dv out, 10 bytes an element in 16 bits, and 12 with a (predicted). A thread
    has v of both sides, the gate and its slope at once: compiled for sm_90, 64 × 64 takes 128 registers in 8 warps, and
    two programs share a multiprocessor; with factors in float32 it takes up to 176, and one runs alone. So it would for
    sm_80 and sm_100, with 142 to 172: there 16 warps have half of the elements each, in 84 to 101 registers. Larger
    tiles spill, and so does a loop over blocks of rows that keeps the sums in registers. So the sums of each block are
    written: with 64 rows each of the four has 1/32 of the bytes of grad in 16 bits, all have 1/8; in float32, with 32
    rows, as much, and twice as much where rows in 16 bits are few or come one element at a time.
    """
    BLOCK_R = rank_block(max(R, 1))
    if target.backend == "interpreter":
        return Config(64, max(16, min(next_power_of_2(N), 256)), BLOCK_R, 4, 1)
    if bytes_each == 4:  # no tensor cores: 2x4 sums a thread
        return Config(32, 64, 16, 8, 2)
    if M <= 32 or not vectors:
        return Config(32, 32, min(BLOCK_R, 32), 8, 2)
    return Config(64, 64, BLOCK_R, 8 if target.arch == 90 else 16, 2)


def lora_glu_bwd(
    grad: Tensor,
    base_gate: Tensor,
    base_up: Tensor,
    h_gate: Tensor | None,
    h_up: Tensor | None,
    lora_B_gate: Tensor | None,
    lora_B_up: Tensor | None,
    scaling_gate: float,
    scaling_up: float,
    gain_gate: Tensor | None,
    gain_up: Tensor | None,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    activation: str,
    *,
    grad_v_gate: Tensor,
    grad_v_up: Tensor,
    need_output: bool,
    need_gain_gate: bool,
    need_gain_up: bool,
    need_bias_gate: bool,
    need_bias_up: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(a, dgain_gate, dgain_up, dbias_gate, dbias_up), empty where not needed; dv goes into ``grad_v_gate`` and
    ``grad_v_up``. grad [M, N] has adjacent columns, in rows any distance apart, as those two have."""
    M, N = base_gate.shape
    out = base_gate.new_empty((M, N) if need_output else 0)
    needs = {
        "NEED_GAIN_GATE": need_gain_gate,
        "NEED_GAIN_UP": need_gain_up,
        "NEED_BIAS_GATE": need_bias_gate,
        "NEED_BIAS_UP": need_bias_up,
    }
    grads = [base_gate.new_empty(N if need else 0, dtype=torch.float32) for need in needs.values()]
    grad_gain_gate, grad_gain_up, grad_bias_gate, grad_bias_up = grads
    if base_gate.numel() == 0:
        for total in grads:
            total.zero_()
        return out, grad_gain_gate, grad_gain_up, grad_bias_gate, grad_bias_up
    h_gate, h_up = in_rows(h_gate, base_gate.dtype), in_rows(h_up, base_gate.dtype)
    R_gate, R_up = rank(lora_B_gate), rank(lora_B_up)
    if config is None:
        matrices = grad, base_gate, base_up, grad_v_gate, grad_v_up
        vectors = has_vectors(*matrices) and R_gate % 16 == R_up % 16 == 0
        target = current(grad.device)
        config = lora_glu_bwd_config(M, N, max(R_gate, R_up), grad.element_size(), vectors, target)
    blocks = cdiv(M, config.BLOCK_M)
    sums = [base_gate.new_empty(blocks, N, dtype=torch.float32) if need else None for need in needs.values()]
    lora_glu_bwd_kernel[(blocks * cdiv(N, config.BLOCK_N),)](
        grad, base_gate, base_up, h_gate, h_up, lora_B_gate, lora_B_up, gain_gate, gain_up, bias_gate, bias_up,
        grad_v_gate, grad_v_up, out if need_output else None, *sums,
        M, N, R_gate, R_up, scaling_gate, scaling_up,
        grad.stride(0), base_gate.stride(0), base_up.stride(0), row_stride(h_gate), row_stride(h_up),
        *strides(lora_B_gate), *strides(lora_B_up), grad_v_gate.stride(0), grad_v_up.stride(0),
        ADAPT_GATE=h_gate is not None, ADAPT_UP=h_up is not None,
        HAS_GAIN_GATE=gain_gate is not None, HAS_GAIN_UP=gain_up is not None,
        HAS_BIAS_GATE=bias_gate is not None, HAS_BIAS_UP=bias_up is not None,
        NEED_OUTPUT=need_output, **needs, ACTIVATION=activation,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_R=config.BLOCK_R,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if any(needs.values()):
        lora_glu_bwd_finish_kernel[(cdiv(N, FINISH_COLUMNS), len(sums))](
            *sums, *(total if total.numel() > 0 else None for total in grads),
            N, blocks, **needs, BLOCK_N=FINISH_COLUMNS, AT_ONCE=FINISH_AT_ONCE, num_warps=4,
        )  # fmt: skip
    return out, grad_gain_gate, grad_gain_up, grad_bias_gate, grad_bias_up
