"""lora_linear and lora_compose as products with W, x and the adapter, with a backend's passes around them.

    forward   base = x Wᵀ      h = drop(x) Aᵀ      v = base + s h Bᵀ       y = gain ⊙ v + bias
    backward  dv = gain ⊙ dy   dgain = Σ_t dy ⊙ v  dbias = Σ_t dy
              dh = s dv B      dB = dvᵀ (s h)      dA = dhᵀ drop(x)        dx = dv W + drop(dh A)

Where forward kept base instead of v, dgain = Σ_t dy ⊙ base + s rowsum((dyᵀ h) ⊙ B).

With axis "input", x ⊙ gain takes the place of x, and is made again in backward instead of being kept.
Activations are [T, features]. The products are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import calls
from lora_fast.backends.plan import Plan
from lora_fast.dtypes import accumulate_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
LINEAR, MATMUL = "F.linear", "torch.matmul"  # PyTorch's products, as steps name them
STACKED = "torch.matmul, stacked"  # of both, dx and its update: [dv | dh] [W; lora_A]
CHUNK = 1 << 18  # elements: 1 MiB of float32, which a core's cache holds
SMALLEST_CHUNK = 1 << 14  # below this the cost of the calls dominates


class GainBackward(Protocol):
    """(gain ⊙ grad, Σ_t grad ⊙ product, Σ_t grad), each only if asked for; without a gain the first is empty."""

    def __call__(
        self,
        grad: Tensor,
        product: Tensor | None,
        gain: Tensor | None,
        *,
        need_scaled: bool,
        need_gain: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def token_chunks(tokens: int, width: int) -> Iterator[slice]:
    """A quarter of the tokens, within [SMALLEST_CHUNK, 4 CHUNK] elements: in float32 half of what all are in 16 bits"""
    elements = min(max(tokens * width // 4, SMALLEST_CHUNK), 4 * CHUNK)
    step = max(1, elements // max(width, 1))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def results_beside(base: Tensor, keep: calls.Kept) -> tuple[Tensor, Tensor | None, Tensor]:
    """Where composition writes y, which may be base, and the product; and what is kept, empty for nothing."""
    if keep == "base":
        return torch.empty_like(base), None, base
    if keep == "nothing":
        return base, None, base.new_empty(0)
    product = torch.empty_like(base)
    return base, product, product


class Passes:
    """The linears of one backend, from its three passes over activations [T, N].

    compose(base, h, lora_B, scaling, gain, bias, out, product): out ← gain ⊙ v + bias, product ← v,
        v = base + s h lora_Bᵀ; all contiguous, out may be base.
    dropout(x, seed, p) → drop(x)
    products: x Wᵀ + bias by the kernels for "base" and "grad_x" that its plans name beside PyTorch's own
    """

    def __init__(
        self,
        compose: Callable[..., None],
        gain_bwd: GainBackward,
        dropout: Callable[[Tensor, Tensor, float], Tensor],
        products: Mapping[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = MappingProxyType({}),
    ) -> None:
        self.compose = compose
        self.gain_bwd = gain_bwd
        self.drop = dropout
        self.products = products

    def lora_linear_fwd(self, call: calls.LoraLinear, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, gain = call.x, call.weight, call.bias, call.gain
        if call.axis == "input" and gain is not None:
            x, gain = self._scaled_input(x, gain), None
        h = linear_of_torch(self._dropped(x, call), call.lora_A, None)
        linear = self.products.get(plan.kernel("base"), linear_of_torch)
        if gain is None:
            y = linear(x, weight, None if bias is None else bias.to(x.dtype))
            self.compose(y, h, call.lora_B, call.scaling, None, None, y, None)
            return y, y.new_empty(0), h
        base = linear(x, weight, None)
        y, product, kept = results_beside(base, call.keep)
        self.compose(base, h, call.lora_B, call.scaling, gain, bias, y, product)
        return y, kept, h

    def lora_linear_bwd(self, call: calls.LoraLinearGrad, plan: Plan) -> Gradients:
        grad_y, dtype = call.grad_y, call.grad_y.dtype
        gain_in, gain = (call.gain, None) if call.axis == "input" else (None, call.gain)
        need_input = call.need_x or (gain_in is not None and call.need_gain)

        grad_v = grad_y
        grad_x, grad_A, grad_B, grad_gain, grad_bias = (grad_y.new_empty(0) for _ in range(5))
        if "grad_v" in plan.steps:  # there is a gain, or a bias that wants its gradient
            scaled, grad_gain, grad_bias = self.gain_bwd(
                grad_y,
                call.product,
                gain,
                need_scaled=need_input or call.need_A or call.need_B,
                need_gain=call.need_gain and gain_in is None,
                need_bias=call.need_bias,
            )
            grad_v = grad_y if gain is None else scaled
        if call.kept == "base" and call.need_gain:
            grad_gain += _update_of_gain(call)
        if call.need_B:
            assert call.h is not None
            grad_B = scaled_product(grad_v.T, call.h, call.scaling).to(call.lora_B.dtype)
        if need_input or call.need_A:
            grad_h = scaled_product(grad_v, call.lora_B.to(dtype), call.scaling)
        if call.need_A:
            assert call.x is not None
            x = call.x if gain_in is None else self._scaled_input(call.x, gain_in)
            grad_A = (grad_h.T @ self._dropped(x, call)).to(call.lora_A.dtype)
        if need_input:
            linear = self.products.get(plan.kernel("grad_x"), linear_of_torch)
            grad_x = self._input_grad(call, linear(grad_v, call.weight.T, None), grad_h)
            if gain_in is not None:
                grad_x, grad_gain, _ = self.gain_bwd(
                    grad_x, call.x, gain_in, need_scaled=call.need_x, need_gain=call.need_gain, need_bias=False
                )
        return grad_x, grad_A, grad_B, grad_gain, grad_bias

    def lora_compose_fwd(self, call: calls.LoraCompose, plan: Plan) -> tuple[Tensor, Tensor]:
        base, h, lora_B, scaling, gain, bias, keep = call  # a base that is kept is in the caller's hands already
        y = torch.empty_like(base, memory_format=torch.contiguous_format)
        product = torch.empty_like(y) if keep == "product" else None
        self.compose(base.contiguous(), h, lora_B, scaling, gain, bias, y, product)
        return y, y.new_empty(0) if product is None else product

    def lora_compose_bwd(self, call: calls.LoraComposeGrad, plan: Plan) -> Gradients:
        grad_y, gain = call.grad_y, call.gain
        grad_base, grad_gain, grad_bias = self.gain_bwd(
            grad_y,
            None if call.product is None else call.product.contiguous(),
            gain,
            need_scaled=call.need_base or call.need_h or call.need_B,
            need_gain=call.need_gain,
            need_bias=call.need_bias,
        )
        grad_v = grad_y if gain is None else grad_base
        grad_h, grad_B = (grad_y.new_empty(0) for _ in range(2))
        if call.need_h:
            grad_h = scaled_product(grad_v, call.lora_B.to(grad_v.dtype), call.scaling).to(call.h.dtype)
        if call.kept == "base" and call.need_gain:
            grad_gain += _update_of_gain(call)
        if call.need_B:
            grad_B = scaled_product(grad_v.T, call.h.to(grad_v.dtype), call.scaling).to(call.lora_B.dtype)
        if not call.need_base:
            grad_base = grad_y.new_empty(0)
        return grad_base, grad_h, grad_B, grad_gain, grad_bias

    def dropout(self, call: calls.Dropout, plan: Plan) -> Tensor:
        return self.drop(call.x, call.seed, call.p)

    def _scaled_input(self, x: Tensor, gain: Tensor) -> Tensor:
        scaled, _, _ = self.gain_bwd(x, None, gain, need_scaled=True, need_gain=False, need_bias=False)
        return scaled

    def _dropped(self, x: Tensor, call: calls.LoraLinear | calls.LoraLinearGrad) -> Tensor:
        if call.dropout_p == 0.0:
            return x
        assert call.seed is not None
        return self.drop(x, call.seed, call.dropout_p)

    def _input_grad(self, call: calls.LoraLinearGrad, grad_x: Tensor, grad_h: Tensor) -> Tensor:
        """grad_x + drop(grad_h lora_A), [T, K], in grad_x; grad_h is scaled already"""
        if call.dropout_p > 0.0:
            return grad_x.add_(self._dropped(grad_h @ call.lora_A.to(grad_h.dtype), call))
        self.compose(grad_x, grad_h, call.lora_A.T, 1.0, None, None, grad_x, None)
        return grad_x


def _update_of_gain(call: calls.LoraLinearGrad | calls.LoraComposeGrad) -> Tensor:
    """s rowsum((dyᵀ h) ⊙ B): what the sum over base lacks of the gain's gradient"""
    assert call.h is not None
    sums = contraction(call.grad_y, call.h)
    return (sums * call.lora_B).sum(1).mul_(call.scaling).to(accumulate_dtype(call.grad_y))


def contraction(grad_y: Tensor, h: Tensor) -> Tensor:
    """grad_yᵀ h [N, R], not rounded to 16 bits: its columns are summed further."""
    if grad_y.dtype.itemsize > 2:
        return grad_y.T @ h.to(grad_y.dtype)
    if grad_y.is_cuda:
        return torch.mm(grad_y.T, h.to(grad_y.dtype), out_dtype=torch.float32)
    sums = torch.zeros(grad_y.shape[1], h.shape[1], dtype=torch.float32, device=grad_y.device)
    for tokens in token_chunks(*grad_y.shape):
        sums.addmm_(grad_y[tokens].float().T, h[tokens].float())
    return sums


def linear_of_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias).contiguous()


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """s (left right), rounded once."""
    product = left.new_empty(left.shape[0], right.shape[1])
    return product.addmm_(left, right, beta=0, alpha=scaling)
