"""The contract of ops.py met by the Triton kernels of lora_fast.triton_kernels.

This module flattens activations to [T, features], moves a gain to the side that its axis says, and chooses per size
between kernels, with the reason beside each choice: measured on an H200, or counted in bytes and FLOPs, and then called
predicted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast.content_key import host_key
from lora_fast.triton_kernels import (
    constants,
    dropout as drop,
    lora_A_grad,
    lora_compose_fwd as compose,
    lora_gain_bwd,
    lora_input_grad,
    lora_linear_fwd as linear,
    lora_linear_small as small,
    lora_project,
    merge_weight as merge,
    weight_norm,
    weight_norm_bwd as norm_bwd,
)
from lora_fast.triton_kernels.target import Target, current


def forward_path(tokens: int, K: int, dtype: torch.dtype, has_gain: bool, limit: int) -> tuple[str, str]:
    """("products" | "small" | "fused", why) for y = gain ⊙ (x Wᵀ + s h lora_Bᵀ) + bias; ``limit``: the most columns of
    x for which the kernel keeps up, see :func:`~lora_fast.triton_kernels.lora_linear_fwd.fused_contraction`."""
    if not has_gain:
        return "products", "without a gain the product is PyTorch's: lora_B = 0 gives nn.Linear's output to the bit"
    if tokens <= small.TOKENS:
        return "small", "W's bytes bound it, not FLOPs: W is read once, by at most two launches"
    return _product_path(K, dtype, limit)


def input_grad_path(N: int, dtype: torch.dtype, dropout_p: float, target: Target) -> tuple[str, str]:
    """("products" | "fused", why) for dx = dv W + drop(dh lora_A)."""
    if dropout_p > 0.0:
        return "fused", "dropout in the epilogue; apart it takes six passes over [T, K]"
    return _product_path(N, dtype, constants.of(target).input_grad_contraction)


def _product_path(contraction: int, dtype: torch.dtype, limit: int) -> tuple[str, str]:
    """Whether a kernel of ours takes the product, or cuBLAS and a pass over the output after it.

    Where tensor descriptors bring the operands, ours: DoRA's forward on an H200 takes 408 µs with it and 420 with
    cuBLAS at 8192 × 4096 × 4096, rank 16, 1642 and 1748 at 8192³, rank 384, 41 and 41 at 512 × 4096 × 4096.
    Elsewhere (predicted) the pass reads and writes 4 bytes an element in 16 bits: 1.0 ps at 4 TB/s. The product is 2 K
    FLOPs an element: at 990 TFLOPS, of which cuBLAS reaches 70% and a plain Triton kernel 55%, ours costs K · 0.79 fs
    more. They meet at K = 1270. Float32 products are outside the tensor cores, or TF32's where PyTorch allows it.
    """
    if dtype == torch.float32:
        return "products", "float32 products follow PyTorch's TF32 setting, in cuBLAS"
    if contraction <= limit:
        return "fused", "the pass over the output that is saved outweighs cuBLAS's lead in the product"
    return "products", f"above {limit} columns cuBLAS's lead in the product outweighs one pass over the output"


def _takes_gemm(R: int, device: torch.device) -> bool:
    """Whether products along the rank that nothing is fused with (h, d lora_A, an update without a gain) are cuBLAS's.

    They are 2 R FLOPs an element of what they read, 2 or 4 bytes: above rank 200 the tensor cores decide, which cuBLAS
    keeps 70% busy, plain Triton kernels 55%, and less at 8192 × 4096, rank 384: 192 tiles of 128 × 128 are 1.5 turns
    of 132 multiprocessors. Three such products of a step at that size: 45 µs each against 65 to 85 (predicted).
    """
    return constants.of(current(device)).gemm_rank <= R


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever the tensors'."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def _rows(tensor: Tensor) -> Tensor:
    """[..., C] as [T, C]"""
    return tensor.reshape(-1, tensor.shape[-1])


def _leading(tensor: Tensor, like: Tensor) -> Tensor:
    """[T, C] as [..., C] with the leading dimensions of ``like``; no view, since users write outputs in place."""
    return torch.ops.aten._unsafe_view(tensor, (*like.shape[:-1], tensor.shape[1]))


def weight_norm_fwd(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, axis: str) -> Tensor:
    with _on_device_of(weight):
        return weight_norm.weight_norm_fwd(weight, lora_A, lora_B, scaling, axis)


def weight_norm_kept(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    axis: str,
    kept_norm: Tensor,
    kept_key: Tensor,
) -> Tensor:
    if weight.is_inference():  # no version to trust
        return weight_norm_fwd(weight, lora_A, lora_B, scaling, axis)
    with _on_device_of(weight):
        host = host_key(weight, lora_A, lora_B, scaling, axis, weight._version)
        return weight_norm.weight_norm_kept(weight, lora_A, lora_B, scaling, axis, kept_norm, kept_key, host)


def weight_norm_bwd(
    grad: Tensor,
    norm: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    axis: str,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor]:
    with _on_device_of(weight):
        return norm_bwd.weight_norm_bwd(grad, norm, weight, lora_A, lora_B, scaling, axis, need_A, need_B)


def merge_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, gain: Tensor | None, axis: str
) -> None:
    with _on_device_of(weight):
        merge.merge_weight(weight, lora_A, lora_B, scaling, gain, axis)


def lora_linear_fwd(
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
    x2 = _rows(x)
    gain_out, gain_in = (gain, None) if axis == "output" else (None, gain)
    with _on_device_of(x):
        limit = 0  # few tokens have a kernel of their own, and no host time to spare
        if x2.shape[0] > small.TOKENS and gain is not None:
            limit = linear.fused_contraction(x2, weight, lora_B, gain_in is not None)
        path, _ = forward_path(x2.shape[0], x2.shape[1], x.dtype, gain is not None, limit)
        if path == "small":
            y, product, h = small.lora_linear_small_fwd(
                x2, weight, bias, lora_A, lora_B, scaling, gain_out, gain_in, dropout_p, seed, keep_product
            )
        else:
            h = _project(x2, lora_A, gain_in, dropout_p, seed)
            forward = linear.lora_linear_fwd if path == "fused" else _products_fwd
            y, product = forward(x2, weight, bias, h, lora_B, scaling, gain_out, gain_in, keep_product)
    return _leading(y, x), _leading(product, x) if keep_product else product, _leading(h, x)


def _project(x: Tensor, lora_A: Tensor, gain_in: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    """h = drop(x ⊙ gain_in) lora_Aᵀ"""
    if gain_in is None and dropout_p == 0.0 and _takes_gemm(lora_A.shape[0], x.device):
        return F.linear(x, lora_A.to(x.dtype))
    return lora_project.lora_project(x, lora_A, gain_in, dropout_p, seed)


def _A_grad(
    grad_h: Tensor, x: Tensor, gain_in: Tensor | None, dropout_p: float, seed: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """dhᵀ drop(x ⊙ gain_in), rounded once to ``dtype``"""
    if gain_in is None and dropout_p == 0.0 and dtype == x.dtype and _takes_gemm(grad_h.shape[1], x.device):
        return grad_h.T @ x
    return lora_A_grad.lora_A_grad(grad_h, x, gain_in, dropout_p, seed, dtype)


def _add_update(base: Tensor, h: Tensor, lora_B: Tensor, scaling: float) -> None:
    """base += s h lora_Bᵀ, in place"""
    if _takes_gemm(lora_B.shape[1], base.device):
        base.addmm_(h, lora_B.T.to(base.dtype), alpha=scaling)
    else:
        compose.lora_compose_fwd(base, h, lora_B, scaling, None, None, base, None)


def _products_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    gain_in: Tensor | None,
    keep_product: bool,
) -> tuple[Tensor, Tensor]:
    """The base product is cuBLAS's, composed in place. Under autocast W is cast as nn.Linear's is."""
    weight = weight.to(x.dtype)
    if gain_in is not None:
        x = lora_gain_bwd.lora_gain_bwd(x, None, gain_in, None, None, 1.0, True, False, False, False, False)[0]
    if gain is None:
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        _add_update(y, h, lora_B, scaling)
        return y, y.new_empty(0)
    y = F.linear(x, weight)
    product = torch.empty_like(y) if keep_product else None
    compose.lora_compose_fwd(y, h, lora_B, scaling, gain, bias, y, product)
    return y, y.new_empty(0) if product is None else product


def lora_linear_bwd(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    axis: str,
    product: Tensor | None,
    h: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_x, need_A, need_B, need_gain, need_bias = needs
    grad_y2, x2 = _rows(grad_y), None if x is None else _rows(x)
    gain_out, gain_in = (gain, None) if axis == "output" else (None, gain)
    need_gain_in = gain_in is not None and need_gain
    need_input = need_x or need_gain_in
    with _on_device_of(grad_y):
        grad_v, grad_gain, grad_bias, grad_h, grad_B = lora_gain_bwd.lora_gain_bwd(
            grad_y2,
            None if product is None else _rows(product),
            gain_out,
            None if h is None else _rows(h),
            lora_B,
            scaling,
            need_input,
            gain_out is not None and need_gain,
            need_bias,
            need_input or need_A,
            need_B,
        )
        if gain_out is None:
            grad_v = grad_y2
        grad_x, grad_A = grad_y.new_empty(0), grad_y.new_empty(0)
        if need_A:
            assert x2 is not None
            grad_A = _A_grad(grad_h, x2, gain_in, dropout_p, seed, lora_A.dtype)
        if need_input:
            path, _ = input_grad_path(weight.shape[0], grad_y.dtype, dropout_p, current(grad_y.device))
            backward = INPUT_GRADS[path]
            grad_x, grad_gain_in = backward(grad_v, weight, grad_h, lora_A, dropout_p, seed, gain_in, x2, need_gain_in)
            grad_gain = grad_gain_in if need_gain_in else grad_gain
            grad_x = _leading(grad_x, grad_y) if need_x else grad_y.new_empty(0)
    return grad_x, grad_A, grad_B, grad_gain, grad_bias


def _products_input_grad(
    grad_v: Tensor,
    weight: Tensor,
    grad_h: Tensor,
    lora_A: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    gain_in: Tensor | None,
    x: Tensor | None,
    need_gain_in: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, d gain_in) without dropout: cuBLAS's product, the rank step composed in place, then the gain's pass."""
    grad_x = grad_v @ weight.to(grad_v.dtype)
    _add_update(grad_x, grad_h, lora_A.T, 1.0)
    if gain_in is None:
        return grad_x, grad_x.new_empty(0)
    grad_x, grad_gain, *_ = lora_gain_bwd.lora_gain_bwd(
        grad_x, None if x is None else x.contiguous(), gain_in, None, None, 1.0, True, need_gain_in, False, False, False
    )
    return grad_x, grad_gain


INPUT_GRADS = {"fused": lora_input_grad.lora_input_grad, "products": _products_input_grad}  # by input_grad_path


def lora_compose_fwd(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    bias: Tensor | None,
    keep_product: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    product = y.new_empty(y.shape if keep_product else 0)
    with _on_device_of(base):
        compose.lora_compose_fwd(
            _rows(base),
            _rows(h),
            lora_B,
            scaling,
            gain,
            bias,
            _rows(y),
            _rows(product) if keep_product else None,
        )
    return y, product


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    with _on_device_of(x):
        return drop.dropout(x, seed, p)


def lora_compose_bwd(
    grad_y: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    product: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_base, need_h, need_B, need_gain, need_bias = needs
    with _on_device_of(grad_y):
        grad_base, grad_gain, grad_bias, grad_h, grad_B = lora_gain_bwd.lora_gain_bwd(
            _rows(grad_y),
            None if product is None else _rows(product),
            gain,
            _rows(h),
            lora_B,
            scaling,
            need_base,
            gain is not None and need_gain,
            need_bias,
            need_h,
            need_B,
        )
    grad_base = _leading(grad_base, grad_y) if need_base and gain is not None else grad_y.new_empty(0)
    grad_h = _leading(grad_h.to(h.dtype), grad_y) if need_h else h.new_empty(0)
    return grad_base, grad_h, grad_B, grad_gain, grad_bias
