"""CUDA kernels: the norm, the passes around cuBLAS's products, and few tokens in two launches.

The kernels are the extension's (csrc/cuda), for float32, bfloat16 and float16; they share the CPU's schemas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fast.backends import cpu, torch_ops
from lora_fast.backends.split import SplitLinear

_c = torch.ops.lora_fast_c

load = cpu.load
weight_norm_fwd = cpu.weight_norm_fwd
weight_norm_kept = cpu.weight_norm_kept
merge_weight = cpu.merge_weight
weight_norm_bwd = torch_ops.weight_norm_bwd


def _compose(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    product: Tensor | None,
) -> None:
    """In base's dtype, whose products the tensor cores sum in float32."""
    _c.lora_compose_fwd(base, h.to(base.dtype), lora_B.to(base.dtype), scaling, gain, bias, out, product)


class _CudaLinear(SplitLinear):
    """For few tokens two launches, the second of which reads W once; cuBLAS's products otherwise."""

    def lora_linear_fwd(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        gain: Tensor | None,
        axis: str,
        dropout_p: float,
        seed: Tensor | None,
        keep_product: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x2 = x.reshape(-1, x.shape[-1])
        # without a gain the product stays PyTorch's, so that lora_B = 0 gives nn.Linear's output to the bit
        if gain is None or axis == "input" or dropout_p > 0.0 or not _small_applies(x2, weight, lora_A, lora_B):
            return super().lora_linear_fwd(
                x, weight, bias, lora_A, lora_B, scaling, gain, axis, dropout_p, seed, keep_product
            )
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        product = y.new_empty(y.shape if keep_product else 0)
        h = _c.lora_linear_small_fwd(
            x2.contiguous(),
            weight,
            lora_A.contiguous(),
            lora_B.contiguous(),
            scaling,
            gain.contiguous(),
            None if bias is None else bias.contiguous(),
            y.view(x2.shape[0], -1),
            product.view(x2.shape[0], -1) if keep_product else None,
        )
        return y, product, h.view(*x.shape[:-1], -1)


SMALL_TOKENS = 16  # two tiles of the tensor cores
SMALL_RANK = 1024  # h lies in shared memory


def _small_applies(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether two launches take the linear: 1 to 16 tokens, 16-bit x and W, rows in whole 16-byte words."""
    return (
        0 < x.shape[0] <= SMALL_TOKENS
        and weight.numel() > 0
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and lora_A.dtype == lora_B.dtype
        and lora_A.dtype in (x.dtype, torch.float32)
        and lora_A.shape[0] <= SMALL_RANK
        and x.shape[1] % 8 == 0
        and weight.stride(1) == 1
        and weight.stride(0) % 8 == 0
        and all(tensor.data_ptr() % 16 == 0 for tensor in (x, weight, lora_A, lora_B))
    )


_linear = _CudaLinear(_compose, _c.lora_gain_bwd, _c.dropout)
lora_linear_fwd = _linear.lora_linear_fwd
lora_linear_bwd = _linear.lora_linear_bwd
lora_compose_fwd = _linear.lora_compose_fwd
lora_compose_bwd = _linear.lora_compose_bwd
dropout = _linear.dropout
