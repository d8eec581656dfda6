"""One torch.autograd.Function per op. First order only: jvp, vmap and double backward raise.

Kept for backward: x and, when the gain wants a gradient, the product before gain and bias [..., N] (law 2 of
docs/design.md); h [..., R] and the parameters besides. The output is never kept: users write it in place.
A Function takes what its forward op takes, in that order. ``forward(*inputs)``, because Function.apply binds the
arguments to forward's signature at every call, which costs 50 µs for twelve named ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_fast import ops  # noqa: F401  (defines torch.ops.lora_fast)
from lora_fast.gain import divisor, dora_gain

_ops = torch.ops.lora_fast


class WeightNormFunction(torch.autograd.Function):
    """norm = ‖W + s lora_B lora_A‖, from a norm that was already computed, with gradients to lora_A and lora_B."""

    @staticmethod
    def forward(norm: Tensor, *_: Any) -> Tensor:
        return norm.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        norm, weight, lora_A, lora_B, ctx.scaling, ctx.axis, ctx.backend = inputs
        ctx.save_for_backward(norm, weight, lora_A, lora_B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        norm, weight, lora_A, lora_B = ctx.saved_tensors
        need_A, need_B = ctx.needs_input_grad[2:4]
        grad_A, grad_B = _ops.weight_norm_bwd(
            grad, norm, weight, lora_A, lora_B, ctx.scaling, ctx.axis, need_A, need_B, ctx.backend
        )
        return None, None, _asked(grad_A, need_A), _asked(grad_B, need_B), None, None, None


class LoraLinearFunction(torch.autograd.Function):
    """y = gain ⊙ (x Wᵀ + s (drop(x) lora_Aᵀ) lora_Bᵀ) + bias; axis "input" applies the gain to x instead."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.lora_linear_fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, bias, lora_A, lora_B, ctx.scaling, gain, ctx.axis, ctx.dropout_p, seed, keep_product, ctx.backend = (
            inputs
        )
        _, product, h = output
        ctx.mark_non_differentiable(product, h)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        _, _, _, need_A, need_B, _, need_gain, *_ = ctx.needs_input_grad
        keep_x = need_A or (need_gain and ctx.axis == "input")
        ctx.save_for_backward(
            x if keep_x else None,
            weight,
            lora_A,
            lora_B,
            gain,
            product if keep_product else None,
            h if need_B else None,
            seed,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple:
        if grad_y is None:
            return (None,) * 12
        x, weight, lora_A, lora_B, gain, product, h, seed = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B, _, need_gain, *_ = ctx.needs_input_grad
        needs = (need_x, need_A, need_B, need_gain, need_bias)
        grad_x, grad_A, grad_B, grad_gain, grad_bias = _ops.lora_linear_bwd(
            grad_y,
            x,
            weight,
            lora_A,
            lora_B,
            ctx.scaling,
            gain,
            ctx.axis,
            product,
            h,
            ctx.dropout_p,
            seed,
            needs,
            ctx.backend,
        )
        return (
            _asked(grad_x, need_x),
            None,
            _asked(grad_bias, need_bias, ctx.bias_dtype),
            _asked(grad_A, need_A),
            _asked(grad_B, need_B),
            None,
            _asked(grad_gain, need_gain, gain.dtype if gain is not None else None),
            *(None,) * 5,
        )


class DoraLinearFunction(torch.autograd.Function):
    """y = m / n ⊙ (x Wᵀ + s (x lora_Aᵀ) lora_Bᵀ) + bias, n = ‖W + s lora_B lora_A‖ by rows, a constant in backward."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _ops.dora_linear_fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, bias, lora_A, lora_B, ctx.scaling, magnitude, _, _, keep_product, ctx.backend = inputs
        _, product, h, norm = output
        ctx.mark_non_differentiable(product, h, norm)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        _, _, _, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_A else None,
            weight,
            lora_A,
            lora_B,
            magnitude,
            product if keep_product else None,
            h if need_B else None,
            norm,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple:
        if grad_y is None:
            return (None,) * 11
        x, weight, lora_A, lora_B, magnitude, product, h, norm = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B, _, need_gain, *_ = ctx.needs_input_grad
        gain = dora_gain(magnitude, norm)
        grad_x, grad_A, grad_B, grad_gain, grad_bias = _ops.lora_linear_bwd(
            grad_y,
            x,
            weight,
            lora_A,
            lora_B,
            ctx.scaling,
            gain,
            "output",
            product,
            h,
            0.0,
            None,
            (need_x, need_A, need_B, need_gain, need_bias),
            ctx.backend,
        )
        return (
            _asked(grad_x, need_x),
            None,
            _asked(grad_bias, need_bias, ctx.bias_dtype),
            _asked(grad_A, need_A),
            _asked(grad_B, need_B),
            None,
            _asked(grad_gain / divisor(norm), need_gain, magnitude.dtype) if need_gain else None,
            *(None,) * 4,
        )


class LoraComposeFunction(torch.autograd.Function):
    """y = gain ⊙ (base + s h lora_Bᵀ) + bias."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _ops.lora_compose_fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, h, lora_B, ctx.scaling, gain, bias, keep_product, ctx.backend = inputs
        product = output[1]
        ctx.mark_non_differentiable(product)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(h, lora_B, gain, product if keep_product else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple:
        if grad_y is None:
            return (None,) * 8
        h, lora_B, gain, product = ctx.saved_tensors
        need_base, need_h, need_B, _, need_gain, need_bias, *_ = ctx.needs_input_grad
        needs = (need_base, need_h, need_B, need_gain, need_bias)
        grad_base, grad_h, grad_B, grad_gain, grad_bias = _ops.lora_compose_bwd(
            grad_y, h, lora_B, ctx.scaling, gain, product, needs, ctx.backend
        )
        return (
            _asked(grad_y if gain is None else grad_base, need_base),
            _asked(grad_h, need_h),
            _asked(grad_B, need_B),
            None,
            _asked(grad_gain, need_gain, gain.dtype if gain is not None else None),
            _asked(grad_bias, need_bias, ctx.bias_dtype),
            None,
            None,
        )


class DropoutFunction(torch.autograd.Function):
    """y = drop(x); the gradient is drop(grad_y), with the mask made again from the seed."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _ops.dropout(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, seed, ctx.p, ctx.backend = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        (seed,) = ctx.saved_tensors
        return _ops.dropout(grad_y, seed, ctx.p, ctx.backend), None, None, None


def _asked(grad: Tensor, needed: bool, dtype: torch.dtype | None = None) -> Tensor | None:
    if not needed:
        return None
    return grad if dtype is None else grad.to(dtype)
