"""n = ‖W + s lora_B lora_A‖ along the lines of an axis, by the direct sum: W is read once, in its own dtype.

    n[i] = sqrt(Σ_k V[i, k]²),  V = W + s lora_B lora_A         axis "output": rows, [N];  "input": columns, [K]

W [N, K], lora_A [R, K], lora_B [N, R] of any strides, in bfloat16, float16 or float32, mixed as you like; n float32.
Two launches: sums of squares of each line over a share of the columns, [splits, N] float32 (at most 1 MB, or 4 bytes
a line), then their sums and roots, with DoRA's gain m / n, for which PyTorch would launch two more. A line whose sum is
out of float32's range is looked at again there, scaled by its largest element, so norms are right from 1e-38 to 3e38; a
NaN or Inf comes out.

Direct or factored, counted for N = K = 8192 in bfloat16 on an H200 (memory 4.8 TB/s, L2 to the multiprocessors 7 TB/s,
600 TFLOPS kept up); µs for each of them, predicted:
    direct     2NKR FLOP; 2NK bytes of W; from L2 W and (BLOCK_N + BLOCK_K) · R · 2 bytes of factors a tile
    factored   n² = ‖W‖² + 2s Σ_r B ⊙ (W Aᵀ) + s² Σ_r (B A Aᵀ) ⊙ B: the same 2NKR FLOP and 2NK bytes of W for W Aᵀ,
               2NR² FLOP and [N, R] float32 out and in besides; from L2 (128 + 256) · K · 2 bytes for 128 × 256 of W Aᵀ
    rank                         16              64             384             768
    memory | FLOP | L2
    direct               28 |  4 |  26   28 | 14 |  48   28 | 86 | 105   28 | 172 | 192
    factored             28 |  4 |  20   29 | 15 |  29   33 | 90 |  90   38 | 188 | 180
Where W's bytes do not decide, the factored form saves a sixth at rank 384 and nothing at 768; for that it would keep
‖W‖² too, write [N, R] and do lines that cancel again. The direct sum alone, then, for every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.adapted_weight import (
    Tile,
    adapted_tile,
    arguments,
    can_describe,
    described_step,
    exact_products,
    float32_precision,
    has_long_strides,
    interpreted_tile,
    oriented,
)
from lora_fast.triton_kernels.constants import remembered
from lora_fast.triton_kernels.content_key import content_hashes, content_key_config, is_changed, keep_key
from lora_fast.triton_kernels.launch import Tiles, jit
from lora_fast.triton_kernels.target import Target, cdiv, current, has_lines, has_vectors


@jit(do_not_specialize=["host_key"])
def weight_norm_fwd_kernel(
    sums_ptr, w_ptr, a_ref, b_ref,
    hashes_ptr, state_ptr, host_key: tl.int64,
    N, K, R, scaling,
    stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    tiles_per_split,
    KEPT: tl.constexpr, PROGRAMS: tl.constexpr, NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """sums [splits, N] = Σ V² over each split's columns. On KEPT: nothing, if the key is the kept one."""
    row_block = tl.program_id(0)
    split = tl.program_id(1)
    if KEPT:
        first = (row_block == 0) & (split == 0)
        if not is_changed(hashes_ptr, state_ptr, host_key, first, PROGRAMS):
            return
    tiles = tl.cdiv(K, BLOCK_K)
    start = split * tiles_per_split
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    for tile in tl.range(start, tl.minimum(start + tiles_per_split, tiles), num_stages=NUM_STAGES if ONE_STEP else 1):
        v = adapted_tile(
            w_ptr, a_ref, b_ref, row_block * BLOCK_N, tile * BLOCK_K, N, K, R, scaling,
            stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
            PRECISION, DESCRIPTORS, TRANSPOSED, WIDE, ONE_STEP, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        sums += tl.sum(v * v, axis=1)
    offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(sums_ptr + tl.cast(split, tl.int64) * N + offs_n, sums, mask=offs_n < N)


@triton.jit
def _described_weight(w_desc, row, column, TRANSPOSED: tl.constexpr):
    w = w_desc.load([column, row]).T if TRANSPOSED else w_desc.load([row, column])
    return w.to(tl.float32)


@jit(do_not_specialize=["host_key"])
def weight_norm_fwd_tma_kernel(
    sums_ptr, w_desc, a_desc, b_desc,
    hashes_ptr, state_ptr, host_key: tl.int64,
    N, K, R, scaling,
    tiles_per_split,
    KEPT: tl.constexpr, PROGRAMS: tl.constexpr, TRANSPOSED: tl.constexpr, W_TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The same where several blocks of the rank make a tile, and descriptors bring W too, in ``PARTS`` of a tile.

    One loop goes over the rank blocks of all tiles: the next tile's are on their way while W is added and squared.
    """
    row_block = tl.program_id(0)
    split = tl.program_id(1)
    if KEPT:
        first = (row_block == 0) & (split == 0)
        if not is_changed(hashes_ptr, state_ptr, host_key, first, PROGRAMS):
            return
    row = row_block * BLOCK_N
    start = split * tiles_per_split
    COLUMNS: tl.constexpr = BLOCK_K // PARTS
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    for tile in tl.range(start, tl.minimum(start + tiles_per_split, tl.cdiv(K, BLOCK_K)), flatten=True):
        column = tile * BLOCK_K
        acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for r in tl.range(0, R, BLOCK_R):
            acc = described_step(a_desc, b_desc, row, column, r, acc, TRANSPOSED)
        # W comes last: asked for at the start it would fill registers all the while
        if PARTS == 1:
            v = _described_weight(w_desc, row, column, W_TRANSPOSED) + scaling * acc
            sums += tl.sum(v * v, axis=1)
        else:
            halves = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, COLUMNS)), (0, 2, 1)))
            for i in tl.static_range(2):
                v = _described_weight(w_desc, row, column + i * COLUMNS, W_TRANSPOSED) + scaling * halves[i]
                sums += tl.sum(v * v, axis=1)
    offs_n = row + tl.arange(0, BLOCK_N)
    tl.store(sums_ptr + tl.cast(split, tl.int64) * N + offs_n, sums, mask=offs_n < N)


@triton.jit
def _power_of_two(field):
    """2^(field - 127), exactly: field is the exponent of a float32."""
    return (field << 23).to(tl.float32, bitcast=True)


@triton.jit
def sum_of_splits(sums_ptr, splits, n0, N, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """(Σ_splits sums, which of them are out of float32's range), [BLOCK_N] of the lines from n0 on."""
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        ptrs = sums_ptr + offs_s.to(tl.int64)[:, None] * N + offs_n[None, :]
        sums += tl.sum(tl.load(ptrs, mask=(offs_s < splits)[:, None] & mask_n[None, :], other=0.0), axis=0)
    # under 2^-96 squares may have lost bits below float32's smallest normal number; a NaN stays as it is
    return sums, mask_n & ((sums < 1.2621774e-29) | (sums == float("inf")))


@triton.jit
def add_scaled(total, field, v):
    """(total, field) with the squares of v [lines, columns] in it: norm² is total · 4^(field - 127).

    ``field``, 1 and more, is of the exponent of the power of two under the largest element.
    """
    before = _power_of_two(field)
    largest = tl.max(tl.abs(v), axis=1).to(tl.int32, bitcast=True) >> 23
    field = tl.maximum(field, tl.minimum(largest, 253))  # so that 1 / unit is a normal number too
    inverse = _power_of_two(254 - field)
    shrink = before * inverse
    v *= inverse[:, None]
    return total * shrink * shrink + tl.sum(v * v, axis=1), field


@triton.jit
def scaled_root(total, field):
    return _power_of_two(field) * tl.sqrt_rn(total)


@triton.jit
def norm_of_sums(
    sums_ptr, w_ptr, a_ref, b_ref,
    splits, n0,
    N, K, R, scaling,
    stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """sqrt(Σ_splits sums) [BLOCK_N] of the lines from n0 on, by a scaled look where the sum is out of range."""
    sums, unsure = sum_of_splits(sums_ptr, splits, n0, N, BLOCK_S, BLOCK_N)
    norm = tl.sqrt_rn(sums)
    if tl.max(unsure.to(tl.int32), axis=0) > 0:
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        field = tl.full([BLOCK_N], 1, dtype=tl.int32)
        for k0 in range(0, K, BLOCK_K):
            v = adapted_tile(
                w_ptr, a_ref, b_ref, n0, k0, N, K, R, scaling,
                stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
                PRECISION, DESCRIPTORS, TRANSPOSED, WIDE, ONE_STEP, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            total, field = add_scaled(total, field, v)
        norm = tl.where(unsure, scaled_root(total, field), norm)
    return norm


@triton.jit
def _store_with_gain(norm_ptr, gain_ptr, magnitude_ptr, norm, offs_n, mask_n, HAS_GAIN: tl.constexpr):
    """norm, and on HAS_GAIN magnitude / norm, rounded as lora_fast/gain.py rounds it: 0 where the norm is 0."""
    tl.store(norm_ptr + offs_n, norm, mask=mask_n)
    if HAS_GAIN:
        magnitude = tl.load(magnitude_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        divisor = tl.where(norm == 0.0, float("inf"), norm)
        tl.store(gain_ptr + offs_n, tl.div_rn(magnitude, divisor), mask=mask_n)


@jit
def weight_norm_finish_kernel(
    norm_ptr, gain_ptr, sums_ptr, magnitude_ptr, kept_norm_ptr, kept_key_ptr, state_ptr, w_ptr, a_ref, b_ref,
    splits,
    N, K, R, scaling,
    stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    HAS_GAIN: tl.constexpr, KEPT: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    ONE_STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """norm of sums [splits, N] and its gain; on KEPT the norm comes from kept_norm or goes there, its key after it."""
    n0 = tl.program_id(0) * BLOCK_N
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if KEPT:  # noqa: SIM102 (known to the compiler: without it there is no state_ptr)
        if tl.load(state_ptr + 3) == 0:  # unchanged
            kept = tl.load(kept_norm_ptr + offs_n, mask=mask_n, other=0.0)
            _store_with_gain(norm_ptr, gain_ptr, magnitude_ptr, kept, offs_n, mask_n, HAS_GAIN)
            return
    norm = norm_of_sums(
        sums_ptr, w_ptr, a_ref, b_ref, splits, n0, N, K, R, scaling,
        stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
        BLOCK_S, PRECISION, DESCRIPTORS, TRANSPOSED, WIDE, ONE_STEP, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    _store_with_gain(norm_ptr, gain_ptr, magnitude_ptr, norm, offs_n, mask_n, HAS_GAIN)
    if KEPT:
        tl.store(kept_norm_ptr + offs_n, norm, mask=mask_n)
        keep_key(kept_key_ptr, state_ptr, tl.cdiv(N, BLOCK_N))


@dataclass(frozen=True)
class Config:
    tile: Tile
    finish: Tile
    tiles_per_split: int
    splits: int
    weight_parts: int = 0


def weight_norm_tile(
    N: int, K: int, R: int, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], access: str, target: Target
) -> Tile:
    """Bytes from L2 to the multiprocessors (about 31 a clock on each) decide at high rank, bytes of W at low rank.

    At rank 384 a tile of 128 × 256 reads 352 KB, W included: 11,600 clocks, in which the tensor cores work for 6,100.
    An H200 takes 11,800 for each further tile (126 µs for 16 of them, 395 for 56, at 1.755 GHz).
    Holding lora_B's 96 KB would leave 256 KB a tile of that size, but not with Triton's pipeline (3.6 and 3.9): beside
    them lora_A's columns have room for two buffers of 64, and the next columns are asked for when the last product of
    these has ended, so that the whole transfer is exposed; with the sums taken one tile later ptxas serializes wgmma,
    as it does for 192 rows in two products, 288 KB. So lora_B is read again, and nothing waits between tiles.

    Each product of 2 · BLOCK_N · BLOCK_K · R FLOP reads (BLOCK_N + BLOCK_K) · R · 2 bytes: at the tensor cores' full
    rate 64 bytes a clock for 128 × 128 and 48 for 128 × 256, whose sums fill half the registers, W's tile a quarter.
    What is left is too little for the factors' addresses: they come through descriptors, which need none.
    At rank 64 and less three programs of 64 × 128 on a multiprocessor hide each other's waits for W.

    ``access``: "descriptors" where the factors have what those take and W its vectors; "vectors" where W has them; else
    "elements", whose addresses and masks leave registers for small tiles only (:func:`has_vectors`).
    """
    if target.backend == "interpreter":
        return interpreted_tile(N, K, R)
    chosen, low = constants.of(target), 16 if R <= 16 else 32
    if not exact_products(*dtypes[1:]):
        if target.operands_in_registers or access == "elements":  # the thirds of both factors lie in registers
            return Tile(64, 32, 16, num_warps=4, num_stages=2, PRECISION=float32_precision(target))
        return Tile(64, 64, low, num_warps=4, num_stages=2, PRECISION=float32_precision(target))
    if target.backend == "hip":
        return Tile(64, 64, low, num_warps=4, num_stages=2)
    if access == "elements":
        return Tile(64, 64, low, num_warps=8, num_stages=2)
    if not target.operands_in_registers and access == "descriptors" and R > 32:
        if R <= 64 or dtypes[0].itemsize == 4 or N * K < 1 << 22:
            return _tile(chosen.norm_middle, chosen.norm_middle.rank, descriptors=True)
        if target.arch != 90:
            return Tile(128, 128, 64, num_warps=8, num_stages=3, DESCRIPTORS=True)
        return _tile(chosen.norm_high, chosen.norm_high.rank, descriptors=True)
    if R <= 32 or not target.operands_in_registers:
        if target.operands_in_registers and dtypes[0].itemsize == 4:  # W's tile in too many of a thread's registers
            return Tile(64, 128, low, num_warps=8, num_stages=2)
        return _tile(chosen.norm_low, min(low, chosen.norm_low.rank))
    return Tile(64 if dtypes[0].itemsize == 4 else 128, 128, 32, num_warps=8, num_stages=3)


def _tile(block: constants.Block, BLOCK_R: int, descriptors: bool = False) -> Tile:
    return Tile(block.rows, block.columns, BLOCK_R, block.num_warps, block.num_stages, DESCRIPTORS=descriptors)


def weight_parts(tile: Tile, R: int, weight_bytes: int, target: Target) -> int:
    """In how many parts a descriptor brings a tile of W, 0 where pointers bring it.

    One where it fits beside the factors' stages, else two. Compiled for sm_90, 128 × 256 of 16 bits take 208 registers
    with 3 stages and one part, 157 with 4 and two, neither spilling; W by pointers takes 254.
    """
    if not (tile.DESCRIPTORS and R > tile.BLOCK_R and constants.of(target).norm_flattened):
        return 0
    stages = (tile.BLOCK_N + tile.BLOCK_K) * tile.BLOCK_R * 2 * tile.num_stages
    whole = stages + tile.BLOCK_N * tile.BLOCK_K * weight_bytes
    return 1 if whole + 1024 <= target.shared_memory else 2


def finish_tile(tile: Tile, target: Target) -> Tile:
    """Sums are all that is read, 4 bytes a line and split, unless a line is out of range: few lines a program, so that
    one such line makes few others be looked at again."""
    if target.backend == "interpreter":
        return tile
    return Tile(16, 32, 16, num_warps=4, num_stages=2)


def column_splits(N: int, K: int, tile: Tile, target: Target) -> int:
    """How many programs share a row block: the least time in tiles, counting one for a program's start and end.

    Two programs of 4 warps, or one of 8, run on a multiprocessor at once. The sums stay under 1 MB.
    """
    row_blocks, tiles = cdiv(N, tile.BLOCK_N), cdiv(K, tile.BLOCK_K)
    if target.backend == "interpreter":
        return min(tiles, 2)
    at_once = target.sms * 8 // tile.num_warps
    most = min(tiles, 64, max(1, (1 << 18) // N))
    return min(
        range(1, most + 1),
        key=lambda splits: cdiv(row_blocks * splits, at_once) * (cdiv(tiles, splits) + 1),
    )


@remembered
def weight_norm_config(
    N: int, K: int, R: int, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], access: str, target: Target
) -> Config:
    """For dtypes of weight, lora_A, lora_B; ``access`` as :func:`weight_norm_tile` takes it."""
    tile = weight_norm_tile(N, K, R, dtypes, access, target)
    tiles_per_split = cdiv(cdiv(K, tile.BLOCK_K), column_splits(N, K, tile, target))
    return Config(
        tile=tile,
        finish=finish_tile(tile, target),
        tiles_per_split=tiles_per_split,
        splits=cdiv(cdiv(K, tile.BLOCK_K), tiles_per_split),
        weight_parts=weight_parts(tile, R, dtypes[0].itemsize, target),
    )


@dataclass(frozen=True)
class Kept:
    """What is kept, and the key of now: its hashes on the device, what the host knows, and where it is compared."""

    norm: Tensor
    key: Tensor
    hashes: Tensor
    host_key: int
    state: Tensor  # int64 [STATE_LENGTH]


def _access(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> str:
    if not (has_vectors(weight) or has_vectors(weight.T)):
        return "elements"
    long = has_long_strides(weight, lora_A, lora_B)
    return "descriptors" if can_describe(lora_A, lora_B) and not long else "vectors"


def _launch_sums(
    sums: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, config: Config, kept: Kept | None, target: Target
) -> None:
    (N, K), tile = w.shape, config.tile
    grid = (cdiv(N, tile.BLOCK_N), config.splits)
    (_, *factors), numbers, constexprs = arguments(tile, w, a, b, scaling)
    key = (None, None, 0) if kept is None else (kept.hashes, kept.state, kept.host_key)
    settings = {
        "KEPT": kept is not None, "PROGRAMS": content_key_config(target).PROGRAMS,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    if config.weight_parts and (has_lines(w) or has_lines(w, 0)):
        lines, block = (w, [tile.BLOCK_N, tile.BLOCK_K // config.weight_parts])
        if transposed := not has_lines(w):
            lines, block = w.T, block[::-1]
        weight_norm_fwd_tma_kernel[grid](
            sums, Tiles.of(lines, block), *factors, *key, N, K, a.shape[0], scaling,
            config.tiles_per_split, TRANSPOSED=constexprs["TRANSPOSED"], W_TRANSPOSED=transposed,
            PARTS=config.weight_parts, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, BLOCK_R=tile.BLOCK_R, **settings,
        )  # fmt: skip
        return
    weight_norm_fwd_kernel[grid](
        sums, w, *factors, *key, *numbers, config.tiles_per_split, NUM_STAGES=tile.num_stages, **constexprs, **settings
    )


def _launch(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    axis: str,
    magnitude: Tensor | None,
    kept: Kept | None,
) -> tuple[Tensor, Tensor]:
    target = current(weight.device)
    w, a, b = oriented(weight, lora_A, lora_B, axis)
    N, K = w.shape
    config = weight_norm_config(N, K, a.shape[0], (w.dtype, a.dtype, b.dtype), _access(w, a, b), target)
    sums = torch.empty(config.splits, N, dtype=torch.float32, device=weight.device)
    norm = torch.empty(N, dtype=torch.float32, device=weight.device)
    gain = norm.new_empty(0 if magnitude is None else N)
    _launch_sums(sums, w, a, b, scaling, config, kept, target)
    finish = config.finish
    tensors, numbers, constexprs = arguments(finish, w, a, b, scaling)
    keeps = (None, None, None) if kept is None else (kept.norm, kept.key, kept.state)
    weight_norm_finish_kernel[(cdiv(N, finish.BLOCK_N),)](
        norm, gain, sums, None if magnitude is None else magnitude.contiguous(), *keeps, *tensors,
        config.splits, *numbers,
        HAS_GAIN=magnitude is not None, KEPT=kept is not None, BLOCK_S=BLOCK_S, **constexprs,
        num_warps=finish.num_warps, num_stages=finish.num_stages,
    )  # fmt: skip
    return norm, gain


BLOCK_S = 8  # splits added at once


def weight_norm_fwd(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, axis: str, magnitude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(norm, gain = magnitude / norm) float32, [N] for axis "output", [K] for "input"; gain is empty without a
    magnitude, which may be of any float dtype."""
    return _launch(weight, lora_A, lora_B, scaling, axis, magnitude, None)


def weight_norm_kept(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    axis: str,
    kept_norm: Tensor,
    kept_key: Tensor,
    host_key: int,
    magnitude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with a fresh norm: a copy of ``kept_norm`` [N] or [K] where ``kept_key`` int64 [KEY_LENGTH] says that
    nothing changed, else computed and kept, the norm first, the key after it. The host does not wait; in a CUDA graph
    every replay looks. ``host_key``: what the host knows of the inputs, a signed 64-bit number."""
    hashes, state = content_hashes(weight, lora_A, lora_B, kept_key)
    kept = Kept(kept_norm, kept_key, hashes, host_key, state)
    return _launch(weight, lora_A, lora_B, scaling, axis, magnitude, kept)
