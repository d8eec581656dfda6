"""Matrices of which every device must compute the hashes that lora_fast/content_key.py defines."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "strided", "narrow", "misaligned")
# N, K, R: one element; no whole word; whole words alone; as many elements of W as are sampled, and one column more;
# several blocks of factors; rows that are sampled more than once, and columns
SIZES = (
    (1, 1, 1),
    (5, 7, 3),
    (16, 24, 8),
    (32, 64, 5),
    (32, 65, 1),
    (300, 129, 17),
    (4096, 64, 16),
    (3, 5000, 2),
)


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    rows, columns = matrix.shape
    if layout == "transposed":
        return matrix.T.contiguous().T
    if layout == "strided":
        return matrix.new_zeros(2 * rows, 3 * columns)[::2, ::3].copy_(matrix)
    if layout == "narrow":  # rows do not touch, and start anywhere
        return matrix.new_zeros(rows, columns + 1)[:, 1:].copy_(matrix)
    if layout == "misaligned":
        return matrix.new_zeros(rows * columns + 1)[1:].view(rows, columns).copy_(matrix)
    return matrix


def key_cases(dtype: torch.dtype, layout: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """weight, lora_A, lora_B."""
    for N, K, R in SIZES:
        matrices = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
        weight, lora_A, lora_B = (laid_out(matrix.to(dtype), layout) for matrix in matrices)
        yield weight, lora_A, lora_B
