"""y = gain ⊙ (x Wᵀ + s h lora_Bᵀ) + bias in one product, so that y is written once.

x [M, K] and weight [N, K] of any strides, h [M, R] in x's dtype, lora_B [N, R], gain float32 [N], bias [N], or None;
with gain_in float32 [K], x ⊙ gain_in takes the place of x, rounded to its dtype. y and product [M, N] in x's dtype;
product is the sum before gain and bias. Operands of another dtype are cast to x's tile by tile.
The rank step comes first: s then multiplies it in float32 where the K loop's sums begin, with no second accumulator.
Source: LoRA, arXiv 2106.09685, eq. 3; DoRA, arXiv 2402.09353, eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.dot_add import dot_add
from lora_fast.triton_kernels.target import Target, cdiv, current, has_lines, next_power_of_2, rank_block


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of this program's tile; GROUP_M rows of tiles go together, so that what they read stays in L2."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    rows = min(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return group * GROUP_M + within % rows, within // rows


@triton.jit
def gain_and_bias(acc, gain_ptr, bias_ptr, offs_n, N, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr):
    mask_n = offs_n < N
    if HAS_GAIN:
        acc *= tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _scaled_input(x, gain_in_ptr, offs_k, K):
    gain_in = tl.load(gain_in_ptr + offs_k, mask=offs_k < K, other=0.0)
    return (x.to(tl.float32) * gain_in[None, :]).to(x.dtype)


@triton.jit
def lora_linear_fwd_kernel(
    x_ptr, W_ptr, h_ptr, B_ptr, gain_ptr, gain_in_ptr, bias_ptr, y_ptr, product_ptr,
    M, N, K, R, scaling,
    stride_x_m, stride_x_k, stride_w_n, stride_w_k,
    HAS_GAIN: tl.constexpr, HAS_GAIN_IN: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_r = tl.arange(0, BLOCK_R)
    h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
    B_ptrs = B_ptr + offs_n[:, None] * R + offs_r[None, :]
    for r in tl.range(0, R, BLOCK_R, num_stages=2):
        mask_r = r + offs_r < R
        h = tl.load(h_ptrs + r, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        B = tl.load(B_ptrs + r, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
        acc = dot_add(h, tl.trans(B.to(h.dtype)), acc)
    acc *= scaling

    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_k.to(tl.int64)[None, :] * stride_x_k
    W_ptrs = W_ptr + offs_n[:, None] * stride_w_n + offs_k.to(tl.int64)[None, :] * stride_w_k
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        W = tl.load(W_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        if HAS_GAIN_IN:
            x = _scaled_input(x, gain_in_ptr, k + offs_k, K)
        acc = dot_add(x, tl.trans(W.to(x.dtype)), acc)
        x_ptrs += BLOCK_K * stride_x_k
        W_ptrs += BLOCK_K * stride_w_k

    offs_y = offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if KEEP_PRODUCT:
        tl.store(product_ptr + offs_y, acc.to(product_ptr.dtype.element_ty), mask=mask)
    acc = gain_and_bias(acc, gain_ptr, bias_ptr, offs_n, N, HAS_GAIN, HAS_BIAS)
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lora_linear_fwd_tma_kernel(
    x_desc, W_desc, h_desc, B_desc, gain_ptr, gain_in_ptr, bias_ptr, y_desc, product_desc,
    M, N, K, R, scaling,
    HAS_GAIN: tl.constexpr, HAS_GAIN_IN: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP_PRODUCT: tl.constexpr,
    W_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """The same through tensor descriptors, which fill with zeros past the edges and need no register for an address.

    For 16-bit operands: float32 tiles would be multiplied in TF32. On W_TRANSPOSED the descriptor is of Wᵀ [K, N], on
    B_TRANSPOSED of lora_Bᵀ [R, N].
    """
    pid_m, pid_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = pid_m * BLOCK_M, pid_n * BLOCK_N

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in tl.range(0, R, BLOCK_R, num_stages=2):
        h = h_desc.load([m, r])  # [BLOCK_M, BLOCK_R]
        B = B_desc.load([r, n]) if B_TRANSPOSED else B_desc.load([n, r]).T  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(h, B.to(h.dtype), acc)
    acc *= scaling

    for k in range(0, K, BLOCK_K):
        x = x_desc.load([m, k])  # [BLOCK_M, BLOCK_K]
        W = W_desc.load([k, n]) if W_TRANSPOSED else W_desc.load([n, k]).T  # [BLOCK_K, BLOCK_N]
        if HAS_GAIN_IN:
            x = _scaled_input(x, gain_in_ptr, k + tl.arange(0, BLOCK_K), K)
        acc = tl.dot(x, W.to(x.dtype), acc)

    # half of the columns at a time: the sums, scaled and not, beside what is stored would not fit into the registers
    HALF: tl.constexpr = BLOCK_N // 2
    halves = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    for i in tl.static_range(2):
        half = halves[i]  # [BLOCK_M, HALF]
        if KEEP_PRODUCT:
            product_desc.store([m, n + i * HALF], half.to(product_desc.dtype))
        half = gain_and_bias(half, gain_ptr, bias_ptr, n + i * HALF + tl.arange(0, HALF), N, HAS_GAIN, HAS_BIAS)
        y_desc.store([m, n + i * HALF], half.to(y_desc.dtype))


@dataclass(frozen=True)
class Config:
    descriptors: bool
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8  # rows of tiles that go together


# (BLOCK_M, BLOCK_N, num_warps); pointers need registers for addresses and masks, most where elements come one by one
_SMALLER_DESCRIPTOR_TILES = ((128, 128, 8), (64, 128, 4), (64, 64, 4))
_POINTER_TILES = ((128, 128, 8), (64, 64, 8))
_UNALIGNED_TILES = ((64, 64, 8),)


@remembered
def lora_linear_fwd_config(
    M: int, N: int, K: int, R: int, x_bytes: int, W_bytes: int, aligned: bool, target: Target
) -> Config:
    """The tile that is predicted to take the least time, and descriptors where the operands are ``aligned`` for them.

    A tile takes BLOCK_M·BLOCK_N (1 + 64/BLOCK_M + 64/BLOCK_N) of time: its FLOPs and, beside them, the operands that
    it brings from L2; the whole takes as many turns as there are tiles for the SMs. Predicted, not measured.
    """
    BLOCK_R = rank_block(R)
    if target.backend == "interpreter":
        BLOCK_K = max(16, min(next_power_of_2(K), 64))
        return Config(aligned, 64, 128, BLOCK_K, BLOCK_R, 4, 1)
    descriptors = aligned and target.backend == "cuda" and not target.operands_in_registers
    if x_bytes == 4:  # no tensor cores: 4x4 sums a thread
        return Config(False, 64, 64, 32, min(BLOCK_R, 32), 8, 3)
    chosen = constants.of(target)
    largest = (chosen.described.rows, chosen.described.columns, chosen.described.num_warps)
    described = (largest, *_SMALLER_DESCRIPTOR_TILES)
    tiles = described if descriptors else _POINTER_TILES if aligned else _UNALIGNED_TILES

    def time(tile: tuple[int, int, int]) -> float:
        BLOCK_M, BLOCK_N, _ = tile
        turns = cdiv(cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N), target.sms)
        return turns * BLOCK_M * BLOCK_N * (1 + 64 / BLOCK_M + 64 / BLOCK_N)

    BLOCK_M, BLOCK_N, num_warps = min(tiles, key=time)
    BLOCK_K, most_stages = (chosen.described.rank, chosen.described.num_stages) if descriptors else (32, 4)
    BLOCK_R = BLOCK_R if aligned else min(BLOCK_R, 32)
    stage = BLOCK_K * (BLOCK_M * x_bytes + BLOCK_N * W_bytes)
    converted = BLOCK_K * BLOCK_N * x_bytes if W_bytes != x_bytes else 0
    num_stages = min(most_stages, (target.shared_memory - converted - 1024) // stage)
    return Config(descriptors, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, num_warps, num_stages, chosen.described_group)


def takes_descriptors(x: Tensor, weight: Tensor, lora_B: Tensor, target: Target) -> bool:
    """Whether the tensor memory accelerator brings all operands; of W and of lora_B one orientation is enough."""
    return (
        target.backend in ("cuda", "interpreter")
        and not target.operands_in_registers
        and x.element_size() == 2
        and weight.shape[0] * x.element_size() % 16 == 0  # a row of y
        and lora_B.shape[1] * x.element_size() % 16 == 0  # of h
        and has_lines(x)
        and (has_lines(weight) or has_lines(weight, 0))
        and (has_lines(lora_B) or has_lines(lora_B, 0))
    )


POINTER_CONTRACTION = 1024  # (predicted)


def fused_contraction(x: Tensor, weight: Tensor, lora_B: Tensor, *, has_gain_in: bool) -> int:
    """The most columns of x for which this kernel is predicted, or was measured, to take no longer than cuBLAS and a
    pass. They are few without descriptors, and where it has more to do tile by tile, as to convert W under autocast."""
    target = current(x.device)
    if weight.dtype == x.dtype and not has_gain_in and takes_descriptors(x, weight, lora_B, target):
        return constants.of(target).described_contraction
    return POINTER_CONTRACTION


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    gain_in: Tensor | None,
    *,
    keep_product: bool,
) -> tuple[Tensor, Tensor]:
    """(y, product) [M, N] in x's dtype; product is empty unless it is kept."""
    (M, K), (N, R) = x.shape, lora_B.shape
    y = x.new_empty(M, N)
    product = x.new_empty((M, N) if keep_product else 0)
    if y.numel() == 0:
        return y, product
    target = current(x.device)
    h = h.contiguous()
    described = takes_descriptors(x, weight, lora_B, target)
    if not described:
        lora_B = lora_B.contiguous()
    aligned = described or all(map(has_lines, (x, weight, h, lora_B, y)))
    c = lora_linear_fwd_config(M, N, K, R, x.element_size(), weight.element_size(), aligned, target)
    flags = {
        "HAS_GAIN": gain is not None, "HAS_GAIN_IN": gain_in is not None, "HAS_BIAS": bias is not None,
        "KEEP_PRODUCT": keep_product, "BLOCK_M": c.BLOCK_M, "BLOCK_N": c.BLOCK_N, "BLOCK_K": c.BLOCK_K,
        "BLOCK_R": c.BLOCK_R, "GROUP_M": c.GROUP_M, "num_warps": c.num_warps, "num_stages": c.num_stages,
    }  # fmt: skip
    grid = (cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N),)
    kept = product if keep_product else None
    if c.descriptors:
        w_transposed, b_transposed = not has_lines(weight), not has_lines(lora_B)

        def tiles(tensor: Tensor, rows: int, columns: int, transposed: bool = False) -> TensorDescriptor:
            if transposed:
                return TensorDescriptor.from_tensor(tensor.T, [columns, rows])
            return TensorDescriptor.from_tensor(tensor, [rows, columns])

        lora_linear_fwd_tma_kernel[grid](
            tiles(x, c.BLOCK_M, c.BLOCK_K), tiles(weight, c.BLOCK_N, c.BLOCK_K, w_transposed),
            tiles(h, c.BLOCK_M, c.BLOCK_R), tiles(lora_B, c.BLOCK_N, c.BLOCK_R, b_transposed), gain, gain_in, bias,
            tiles(y, c.BLOCK_M, c.BLOCK_N // 2), None if kept is None else tiles(kept, c.BLOCK_M, c.BLOCK_N // 2),
            M, N, K, R, scaling, W_TRANSPOSED=w_transposed, B_TRANSPOSED=b_transposed, **flags,
        )  # fmt: skip
    else:
        lora_linear_fwd_kernel[grid](
            x, weight, h, lora_B, gain, gain_in, bias, y, kept, M, N, K, R, scaling, *x.stride(), *weight.stride(),
            **flags,
        )  # fmt: skip
    return y, product
