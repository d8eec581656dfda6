"""h = drop(x ⊙ gain_in) lora_Aᵀ: the adapter's first product.

x [M, K] of any strides, lora_A [R, K], gain_in float32 [K] or None, h [M, R] in x's dtype. x ⊙ gain_in is rounded to
x's dtype, as the frozen product sees it; dropout's 1/(1-p) multiplies the float32 sum, and so rounds nothing twice.
Where there are too few tiles for the GPU, the K loop is split and a second launch adds the parts in a fixed order.
Source: LoRA, arXiv 2106.09685, eq. 3; DoRA with one norm per column for gain_in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels.dropout import dropout_arguments, dropout_keep, dropout_seed
from lora_fast.triton_kernels.target import AotCase, Target, current


@triton.jit(do_not_specialize=["threshold"])
def lora_project_kernel(
    x_ptr, A_ptr, gain_ptr, seed_ptr, out_ptr,
    M, K, R,
    stride_x_m, stride_x_k,
    split_k, threshold: tl.int64, keep_scale,
    HAS_GAIN: tl.constexpr, HAS_DROPOUT: tl.constexpr, LAUNCH_DEPENDENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[s] = Σ over the s-th ``split_k`` columns; out [splits, M, R], or h itself where there is one split."""
    if LAUNCH_DEPENDENTS:  # the next kernel may start; it waits for this one before it reads out
        tl.extra.cuda.gdc_launch_dependents()
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.program_id(2) * split_k
    offs_k = start + tl.arange(0, BLOCK_K)
    mask_m, mask_r = offs_m < M, offs_r < R
    x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_k.to(tl.int64)[None, :] * stride_x_k
    A_ptrs = A_ptr + offs_r[:, None] * K + offs_k[None, :]
    if HAS_DROPOUT:
        seed_lo, seed_hi = dropout_seed(seed_ptr)

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(start, start + split_k, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        A = tl.load(A_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
        if HAS_GAIN:
            gain = tl.load(gain_ptr + offs_k, mask=mask_k, other=0.0)
            x = (x.to(tl.float32) * gain[None, :]).to(x.dtype)
        if HAS_DROPOUT:
            x = tl.where(dropout_keep(seed_lo, seed_hi, offs_m[:, None], offs_k[None, :], threshold), x, 0.0)
        acc = tl.dot(x, tl.trans(A.to(x.dtype)), acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_x_k
        A_ptrs += BLOCK_K
    if HAS_DROPOUT:
        acc *= keep_scale
    out_ptrs = out_ptr + (tl.program_id(2).to(tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def lora_project_sum_kernel(parts_ptr, h_ptr, numel, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """h = Σ_s parts[s]."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts_ptr + split * numel.to(tl.int64) + offs, mask=mask, other=0.0)
    tl.store(h_ptr + offs, acc.to(h_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_R: int
    BLOCK_K: int
    split_k: int  # columns of x that one program sums, a multiple of BLOCK_K
    num_warps: int
    num_stages: int

    def grid(self, M: int, K: int, R: int) -> tuple[int, int, int]:
        return triton.cdiv(M, self.BLOCK_M), triton.cdiv(R, self.BLOCK_R), triton.cdiv(K, self.split_k)


def lora_project_config(M: int, K: int, R: int, x_bytes: int, A_bytes: int, target: Target) -> Config:
    """Bound by the bytes of x (predicted): 2 R FLOPs an element of x, against 400 a byte pair that an H200 can do.

    A tile of rows reads all of lora_A from L2, R / BLOCK_M times the bytes of x: BLOCK_M at least R/2 up to 64. Tiles
    of 16 rows keep a small M on many SMs; beyond that K is split, in parts of at least 256 columns. Ranks above 128
    take several programs, and x comes from L2 for all but the first.
    """
    rank = max(16, triton.next_power_of_2(R))
    if target.backend == "interpreter":
        BLOCK_K = max(16, min(triton.next_power_of_2(K), 128))
        return Config(
            max(16, min(triton.next_power_of_2(M), 128)),
            min(rank, 128),
            BLOCK_K,
            BLOCK_K * triton.cdiv(K, BLOCK_K),
            4,
            1,
        )
    if x_bytes == 4:  # no tensor cores: 2x4 sums a thread
        BLOCK_M, BLOCK_R, BLOCK_K, smallest = 32, min(rank, 32), 32, 16
    elif target.arch == 80:  # the sums in registers, beside the operands
        BLOCK_M, BLOCK_R, BLOCK_K, smallest = 64, min(rank, 64), 64, min(max(rank // 2, 16), 64)
    else:
        BLOCK_M, BLOCK_R = 64 if rank <= 64 else 128, min(rank, 128)
        BLOCK_K, smallest = 128 if rank <= 64 else 64, min(max(rank // 2, 16), 64)
    while smallest < BLOCK_M and 4 * triton.cdiv(M, BLOCK_M) * triton.cdiv(R, BLOCK_R) < 3 * target.sms:
        BLOCK_M //= 2
    tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(R, BLOCK_R)
    splits = max(1, min(target.sms // tiles, K // 256))
    stage = BLOCK_K * (BLOCK_M * x_bytes + BLOCK_R * A_bytes)
    converted = BLOCK_K * BLOCK_R * x_bytes if A_bytes != x_bytes else 0
    return Config(
        BLOCK_M=BLOCK_M,
        BLOCK_R=BLOCK_R,
        BLOCK_K=BLOCK_K,
        split_k=BLOCK_K * triton.cdiv(K, BLOCK_K * splits),
        num_warps=8 if BLOCK_M * BLOCK_R >= 128 * 128 else 4,
        num_stages=min(4, (target.shared_memory - converted) // stage),
    )


def launch_lora_project(
    x: Tensor,
    lora_A: Tensor,
    gain_in: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    out: Tensor,
    config: Config,
    early: bool = False,
) -> None:
    """out [splits, M, R] ← the sums of each split; ``early`` lets a kernel start before the end, and wait for it."""
    (M, K), R = x.shape, lora_A.shape[0]
    threshold, keep_scale = dropout_arguments(dropout_p)
    lora_project_kernel[config.grid(M, K, R)](
        x, lora_A, gain_in, seed if dropout_p > 0.0 else None, out, M, K, R, *x.stride(),
        config.split_k, threshold, keep_scale,
        HAS_GAIN=gain_in is not None, HAS_DROPOUT=dropout_p > 0.0, LAUNCH_DEPENDENTS=early,
        BLOCK_M=config.BLOCK_M, BLOCK_R=config.BLOCK_R, BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


SUM_BLOCK = 1024


def lora_project(x: Tensor, lora_A: Tensor, gain_in: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    """h [M, R] in x's dtype; x [M, K] of any strides, lora_A [R, K] of any floating dtype, gain_in float32 [K]."""
    (M, K), R = x.shape, lora_A.shape[0]
    h = x.new_empty(M, R)
    if h.numel() == 0:
        return h
    config = lora_project_config(M, K, R, x.element_size(), lora_A.element_size(), current(x.device))
    splits = triton.cdiv(K, config.split_k)
    parts = h if splits == 1 else x.new_empty(splits, M, R, dtype=torch.float32)
    launch_lora_project(x, lora_A.contiguous(), gain_in, dropout_p, seed, parts, config)
    if splits > 1:
        grid = (triton.cdiv(M * R, SUM_BLOCK),)
        lora_project_sum_kernel[grid](parts, h, M * R, SPLITS=splits, BLOCK=SUM_BLOCK)
    return h


def aot_cases(target: Target) -> Iterator[AotCase]:
    """Over tokens from a decoding batch to training, the ranks in use, one dtype and mixed ones; ragged where odd."""
    sizes = ((8192, 4096, 16), (8192, 4096, 384), (2048, 4096, 64), (100, 4099, 9), (512, 4096, 384))
    types = (("bf16", "bf16", sizes), ("bf16", "fp32", sizes[:3]), ("fp16", "fp16", sizes[:1]), ("fp32", "fp32", sizes))
    cases: dict[str, AotCase] = {}
    for x_type, A_type, some in types:
        for M, K, R in some:
            config = lora_project_config(M, K, R, 4 if x_type == "fp32" else 2, 4 if A_type == "fp32" else 2, target)
            for flags in (False, True):
                case = aot_case(config, x_type, A_type, K, flags, triton.cdiv(K, config.split_k) > 1)
                cases[case.name] = case
    yield from cases.values()
    for splits in (2, 16):
        yield AotCase(
            kernel=lora_project_sum_kernel,
            name=f"lora_project_sum-{splits}",
            signature={"parts_ptr": "*fp32", "h_ptr": "*bf16", "numel": "i32"},
            constexprs={"SPLITS": splits, "BLOCK": SUM_BLOCK},
            aligned=("parts_ptr", "h_ptr", "numel"),
        )


def aot_case(
    config: Config, x_type: str, A_type: str, K: int, flags: bool, split: bool, early: bool = False
) -> AotCase:
    """The kernel with gain and dropout or neither, for K columns, as split and started early as the launcher says."""
    tile = f"{config.BLOCK_M}x{config.BLOCK_R}x{config.BLOCK_K}{'-split' if split else ''}{'-early' if early else ''}"
    absent = {} if flags else {"gain_ptr": None, "seed_ptr": None}
    even = ("K", "R", "stride_x_m") if K % 16 == 0 else ()
    return AotCase(
        kernel=lora_project_kernel,
        name=f"lora_project-{x_type}-{A_type}-{tile}-K{K}-{'on' if flags else 'off'}",
        signature={
            "x_ptr": f"*{x_type}", "A_ptr": f"*{A_type}", "gain_ptr": "*fp32", "seed_ptr": "*i64",
            "out_ptr": "*fp32" if split else f"*{x_type}", "M": "i32", "K": "i32", "R": "i32", "stride_x_m": "i32",
            "split_k": "i32", "threshold": "i64", "keep_scale": "fp32",
        },
        constexprs={
            "stride_x_k": 1, "HAS_GAIN": flags, "HAS_DROPOUT": flags, "LAUNCH_DEPENDENTS": early,
            "BLOCK_M": config.BLOCK_M, "BLOCK_R": config.BLOCK_R, "BLOCK_K": config.BLOCK_K, **absent,
        },
        aligned=("x_ptr", "A_ptr", "out_ptr", "split_k", *even),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        dots=config.BLOCK_M >= 64 and x_type != "fp32",
    )  # fmt: skip
