"""Rows of one adapter for a program: what the grouped kernels share.

Rows of group g are ``order[starts[g] : starts[g + 1]]``: group 0 is the base alone, 1 … L the adapters, L + 1 ids of no
adapter. A launch has as many programs as T rows in L + 2 groups can have blocks, whatever the ids: a program finds its
block by itself, from the running sum of the groups' blocks, and leaves where there is none for it. So nothing waits for
the device, and a CUDA graph that was captured with one adapter replays with all.

Activations stay in the order of the batch: kernels gather rows as they read and scatter them as they write.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

BLOCK_G = 128  # groups that a program looks at in one step


@triton.jit
def rows_of_program(starts_ptr, program, groups, rows_per_block, BLOCK_G: tl.constexpr):
    """(group, begin, end) in ``order`` of the program's rows: of its block, up to the end of its group.

    A program without rows gets (0, 0, 0).
    """
    group = tl.zeros((), tl.int32)
    begin = tl.zeros((), tl.int64)
    end = tl.zeros((), tl.int64)
    before = tl.zeros((), tl.int32)  # blocks of the groups in front of these
    for first in range(0, groups, BLOCK_G):
        offs_g = first + tl.arange(0, BLOCK_G)
        mask_g = offs_g < groups
        starts = tl.load(starts_ptr + offs_g, mask=mask_g, other=0)
        ends = tl.load(starts_ptr + offs_g + 1, mask=mask_g, other=0)
        blocks = ((ends - starts + rows_per_block - 1) // rows_per_block).to(tl.int32)
        block = program - (before + tl.cumsum(blocks, axis=0) - blocks)
        is_own = (block >= 0) & (block < blocks)  # in one group at most
        group += tl.sum(tl.where(is_own, offs_g, 0), axis=0)
        begin += tl.sum(tl.where(is_own, starts + block.to(tl.int64) * rows_per_block, 0), axis=0)
        end += tl.sum(tl.where(is_own, ends, 0), axis=0)
        before += tl.sum(blocks, axis=0)
    return group, begin, end


@triton.jit
def blocks_of_group(starts_ptr, group, groups, rows_per_block, BLOCK_G: tl.constexpr):
    """(first, end) of the programs that have the group's rows; of all programs for the group ``groups``."""
    first_block = tl.zeros((), tl.int32)
    end_block = tl.zeros((), tl.int32)
    for first in range(0, groups, BLOCK_G):
        offs_g = first + tl.arange(0, BLOCK_G)
        mask_g = offs_g < groups
        starts = tl.load(starts_ptr + offs_g, mask=mask_g, other=0)
        ends = tl.load(starts_ptr + offs_g + 1, mask=mask_g, other=0)
        blocks = ((ends - starts + rows_per_block - 1) // rows_per_block).to(tl.int32)
        first_block += tl.sum(tl.where((offs_g < group) & (group < groups), blocks, 0), axis=0)
        end_block += tl.sum(tl.where((offs_g <= group), blocks, 0), axis=0)
    return first_block, end_block


@triton.jit
def rank_of(ranks_ptr, adapter, L, R, HAS_RANKS: tl.constexpr):
    """The adapter's own rank in [0, R]; 0 for what is no adapter."""
    is_adapter = (adapter >= 0) & (adapter < L)
    if HAS_RANKS:
        own = tl.load(ranks_ptr + adapter, mask=is_adapter, other=0)
        return tl.minimum(tl.maximum(own, 0), R).to(tl.int32)
    return tl.where(is_adapter, R, 0)


@dataclass(frozen=True)
class Groups:
    """Rows by group, on the device: ``order`` int64 [T], ``starts`` int64 [L + 3]."""

    order: Tensor
    starts: Tensor

    @property
    def rows(self) -> int:
        return self.order.shape[0]

    @property
    def adapters(self) -> int:
        return self.starts.shape[0] - 3

    def blocks(self, rows_per_block: int) -> int:
        """How many blocks the rows can have at most: each group that there can be leaves one incomplete."""
        return most_blocks(self.rows, self.adapters, rows_per_block)


def most_blocks(rows: int, adapters: int, rows_per_block: int) -> int:
    """⌊(T + G (block − 1)) / block⌋ of T rows in up to G groups; a group has a row or more."""
    return (rows + min(adapters + 2, rows) * (rows_per_block - 1)) // rows_per_block


def are_few(rows: int, adapters: int) -> bool:
    """Whether a group has less than 32 rows on average, where each has some: blocks of more than 16 would be masked for
    the most part, and with few sizes of blocks few kernels are compiled."""
    return rows < 32 * (adapters + 2)


@dataclass(frozen=True)
class Stack:
    """The matrices of one side of L adapters, features by rank: lora_A[a]ᵀ [K, R] or lora_B[a] [N, R].

    Attributes:
        tensor: [L, features, R] of any strides. ranks: int64 [L] or None, of which adapter how many columns are to be
            read.
    """

    tensor: Tensor
    ranks: Tensor | None

    @property
    def rank(self) -> int:
        return self.tensor.shape[2]

    @property
    def has_vectors(self) -> bool:
        """Whether all matrices come in 16-byte pieces, along features or along the rank."""
        return self._has_pieces(1) or self._has_pieces(2)

    def _has_pieces(self, inner: int) -> bool:
        tensor = self.tensor
        apart = tensor.stride(0), tensor.stride(3 - inner), tensor.shape[inner]
        return tensor.stride(inner) == 1 and tensor.data_ptr() % 16 == 0 and not any(size % 16 for size in apart)
