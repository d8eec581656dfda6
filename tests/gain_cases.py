"""The gain's pass of backward in plain PyTorch, and the configurations that its kernels are tested with."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fast.triton_kernels import lora_gain_bwd as gain_bwd

S = 0.7


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def of_gain(grad_y: Tensor, product: Tensor, gain: Tensor, h: Tensor, lora_B: Tensor) -> list[Tensor]:
    grad_v = grad_y * gain.to(grad_y.dtype)
    return [grad_v, (grad_y * product).sum(0), grad_y.sum(0), grad_v.T @ (S * h)]


def of_gain_from_base(grad_y: Tensor, base: Tensor, gain: Tensor, h: Tensor, lora_B: Tensor) -> list[Tensor]:
    return of_gain(grad_y, base + S * h @ lora_B.to(h.dtype).T, gain, h, lora_B)


def of_gain_in_two_sums(grad_y: Tensor, base: Tensor, gain: Tensor, h: Tensor, lora_B: Tensor) -> list[Tensor]:
    """The same in the kernel's order."""
    grad_v, _, grad_bias, grad_B = of_gain(grad_y, base, gain, h, lora_B)
    grad_gain = (grad_y * base).sum(0) + S * ((grad_y.T @ h) * lora_B.to(h.dtype)).sum(1)
    return [grad_v, grad_gain, grad_bias, grad_B]


GAIN_CONFIGS = {
    "own": None,
    "many chunks": gain_bwd.Config(32, 32, 32, 8, 3, 4, 1, 16),
    "more chunks than are added at once": gain_bwd.Config(16, 64, 32, 16, 20, 4, 1, 32),
    "one chunk": gain_bwd.Config(64, 64, 32, 1, 1, 4, 1, 64),
}
# sizes on both sides of what the launch configurations ask
SIZES = [
    (M, N, R)
    for M in (1, 16, 300, 2048, 8192, 131072)
    for N in (64, 1024, 4096, 28672)
    for R in (1, 8, 16, 32, 64, 384, 768)
]
