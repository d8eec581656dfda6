"""y = gain ⊙ (base + s h lora_Bᵀ) + bias, for a base product that was computed elsewhere.

base, out [M, N] of any strides, out may be base; h [M, R], lora_B [N, R], gain float32 [N], bias [N], or None. product
[M, N], contiguous, takes the sum before gain and bias. All sums in float32, each element of base read once.
Source: LoRA, arXiv 2106.09685, eq. 3; DoRA, arXiv 2402.09353, eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.dot_add import dot_add
from lora_fast.triton_kernels.launch import Tiles, jit
from lora_fast.triton_kernels.target import (
    Target,
    cdiv,
    current,
    has_lines,
    has_vectors,
    next_power_of_2,
    rank_block,
)


@triton.jit
def _gain_and_bias(v, gain_ptr, bias_ptr, offs_n, N, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr):
    mask_n = offs_n < N
    if HAS_GAIN:
        v *= tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if HAS_BIAS:
        v += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return v


@jit
def lora_compose_fwd_kernel(
    base_ptr, h_ptr, B_ptr, gain_ptr, bias_ptr, out_ptr, product_ptr,
    M, N, R, scaling,
    stride_base_m, stride_base_n, stride_out_m, stride_out_n,
    HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # tiles of one row block lie side by side in time too: h stays in the first-level caches, lora_B in L2
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_m = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    # asked for first, needed last: it comes while the rank step goes on
    base_ptrs = base_ptr + offs_m[:, None] * stride_base_m + offs_n[None, :] * stride_base_n
    base = tl.load(base_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_r = tl.arange(0, BLOCK_R)
    h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
    B_ptrs = B_ptr + offs_n[:, None] * R + offs_r[None, :]
    for r in range(0, R, BLOCK_R):
        mask_r = r + offs_r < R
        h = tl.load(h_ptrs + r, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        B = tl.load(B_ptrs + r, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
        acc = dot_add(h, tl.trans(B.to(h.dtype)), acc)

    v = base.to(tl.float32) + acc * scaling
    if KEEP_PRODUCT:
        tl.store(product_ptr + offs_m[:, None] * N + offs_n[None, :], v.to(product_ptr.dtype.element_ty), mask=mask)
    v = _gain_and_bias(v, gain_ptr, bias_ptr, offs_n, N, HAS_GAIN, HAS_BIAS)
    out_ptrs = out_ptr + offs_m[:, None] * stride_out_m + offs_n[None, :] * stride_out_n
    tl.store(out_ptrs, v.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def lora_compose_fwd_tma_kernel(
    base_desc, h_desc, B_desc, gain_ptr, bias_ptr, out_desc, product_desc,
    M, N, R, scaling,
    HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP_PRODUCT: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The same through tensor descriptors, for 16-bit operands: float32 tiles would be multiplied in TF32.

    A program goes from tile to tile, in one loop over the rank blocks of all: the next tile's h and lora_B are on their
    way while base is read and out written. On B_TRANSPOSED the descriptor is of lora_Bᵀ [R, N].
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, tl.num_programs(0), flatten=True):
        m, n = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r in tl.range(0, R, BLOCK_R):
            h = h_desc.load([m, r])  # [BLOCK_M, BLOCK_R]
            B = B_desc.load([r, n]) if B_TRANSPOSED else B_desc.load([n, r]).T  # [BLOCK_R, BLOCK_N]
            acc = tl.dot(h, B, acc)
        # half of the columns at a time, of which base takes registers that the sums leave
        halves = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        for i in tl.static_range(2):
            column = n + i * HALF
            v = base_desc.load([m, column]).to(tl.float32) + scaling * halves[i]  # [BLOCK_M, HALF]
            if KEEP_PRODUCT:
                product_desc.store([m, column], v.to(product_desc.dtype))
            v = _gain_and_bias(v, gain_ptr, bias_ptr, column + tl.arange(0, HALF), N, HAS_GAIN, HAS_BIAS)
            out_desc.store([m, column], v.to(out_desc.dtype))


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@remembered
def lora_compose_fwd_config(M: int, N: int, R: int, bytes_each: int, vectors: bool, target: Target) -> Config:
    """Bound by base in and out, 4 bytes an element in bfloat16 (predicted), while h and lora_B from L2 stay below it.

    They are 2R/BLOCK_M + 2R/BLOCK_N bytes an element: 0.75 at rank 16 with 64x128. Above rank 64 that passes 3, so
    tiles grow to 128x128. 32 sums a thread, or less, leave registers for several programs on an SM. ``vectors``: see
    :func:`has_vectors`.
    """
    BLOCK_R = rank_block(R)
    if target.backend == "interpreter":
        BLOCK_M, BLOCK_N = (max(16, min(next_power_of_2(size), 256)) for size in (M, N))
        return Config(BLOCK_M, BLOCK_N, BLOCK_R, 4, 1)
    if bytes_each == 4:  # no tensor cores: 4x4 sums a thread
        return Config(64, 64, 16, 8, 2)
    if M <= 32:
        return Config(16, 64, BLOCK_R, 4, 2)
    if not vectors:
        return Config(64, 64, min(BLOCK_R, 32), 8, 2)
    chosen = constants.of(target)
    block = chosen.compose_low if R <= 64 else chosen.compose_high
    return Config(block.rows, block.columns, rank_block(R, block.rank), block.num_warps, block.num_stages)


@dataclass(frozen=True)
class DescribedConfig:
    programs: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@remembered
def described_config(M: int, N: int, R: int, target: Target) -> DescribedConfig | None:
    """For operands that descriptors take; None where pointers are predicted to be as fast, or the tiles are too few.

    Bytes from L2 to the multiprocessors, about 31 a clock on each, are the time above rank 64: 2R/BLOCK_M + 2R/BLOCK_N
    and 2 of base for an element. At 8192² and rank 384 that is 131 µs with 128 × 128 and 103 with 256 × 128 or
    128 × 256 (predicted), where a copy takes 63; by pointers, one program of 128 × 128 on a multiprocessor, an H200
    takes 219. cuBLAS's product onto base and a pass for the gain are two copies and the product's own time, some 160
    (predicted); `make gpu-tune` times them beside this.
    Compiled for sm_90, 256 × 128 takes 157 to 242 registers, 128 × 256 up to 255, and neither spills. With one tile a
    program and no loop over tiles, 128 × 256 makes ptxas serialize wgmma.
    """
    chosen = constants.of(target)
    block = chosen.compose_described
    tiles = cdiv(M, block.rows) * cdiv(N, block.columns)
    has_descriptors = target.backend == "cuda" and not target.operands_in_registers
    if not has_descriptors or chosen.compose_pointer_rank >= R or tiles < target.sms:
        return None
    # the stages of h and lora_B, base's half and out's, and what each program takes besides
    rows_and_columns = block.rows + block.columns
    shared = 2 * (rows_and_columns * block.rank * block.num_stages + block.rows * block.columns) + 2048
    programs = target.sms * max(1, target.shared_memory // shared)
    return DescribedConfig(
        min(tiles, programs), block.rows, block.columns, block.rank, block.num_warps, block.num_stages
    )


def lora_compose_fwd(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    product: Tensor | None,
) -> None:
    """out [M, N] ← gain ⊙ v + bias with v = base + s h lora_Bᵀ, and product ← v where it is given; out may be base."""
    (M, N), R = base.shape, lora_B.shape[1]
    if base.numel() == 0:
        return
    target = current(base.device)
    h = h.to(base.dtype).contiguous()
    flags = {"HAS_GAIN": gain is not None, "HAS_BIAS": bias is not None, "KEEP_PRODUCT": product is not None}
    described = described_config(M, N, R, target)
    if described is not None:
        lora_B = lora_B.to(base.dtype)
        if takes_descriptors(base, h, lora_B, out, product):
            _by_descriptors(described, base, h, lora_B, scaling, gain, bias, out, product, flags)
            return
    vectors = has_vectors(base, out) and R % 16 == 0
    c = lora_compose_fwd_config(M, N, R, base.element_size(), vectors, target)
    lora_compose_fwd_kernel[(cdiv(M, c.BLOCK_M) * cdiv(N, c.BLOCK_N),)](
        base, h, lora_B.contiguous(), gain, bias, out, product,
        M, N, R, scaling, *base.stride(), *out.stride(), **flags,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_R=c.BLOCK_R, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def takes_descriptors(base: Tensor, h: Tensor, lora_B: Tensor, out: Tensor, product: Tensor | None) -> bool:
    """Whether the tensor memory accelerator brings 16-bit operands and takes the results."""
    matrices = (base, h, out) if product is None else (base, h, out, product)
    lined = all(matrix.element_size() == 2 and has_lines(matrix) for matrix in matrices)
    return lined and (has_lines(lora_B) or has_lines(lora_B, 0))


def _by_descriptors(
    c: DescribedConfig,
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    product: Tensor | None,
    flags: dict[str, bool],
) -> None:
    (M, N), R = base.shape, lora_B.shape[1]
    transposed = not has_lines(lora_B)
    lines, block = (lora_B.T, [c.BLOCK_R, c.BLOCK_N]) if transposed else (lora_B, [c.BLOCK_N, c.BLOCK_R])

    def halves(tensor: Tensor) -> Tiles:
        return Tiles.of(tensor, [c.BLOCK_M, c.BLOCK_N // 2])

    lora_compose_fwd_tma_kernel[(c.programs,)](
        halves(base), Tiles.of(h, [c.BLOCK_M, c.BLOCK_R]),
        Tiles.of(lines, block), gain, bias, halves(out),
        None if product is None else halves(product), M, N, R, scaling, **flags, B_TRANSPOSED=transposed,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, BLOCK_R=c.BLOCK_R, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
