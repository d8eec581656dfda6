"""lora_linear and lora_compose as products with W, x and the adapter, with a backend's passes around them.

    forward   base = x Wᵀ      h = drop(x) Aᵀ      y = gain ⊙ (base + s h Bᵀ) + bias
    backward  dv = gain ⊙ dy   dgain = Σ_t dy ⊙ v  dbias = Σ_t dy
              dh = s dv B      dB = dvᵀ (s h)      dA = dhᵀ drop(x)        dx = dv W + drop(dh A)

With axis "input", x ⊙ gain takes the place of x, and is made again in backward instead of being kept.
The products here are PyTorch's. The backend torch uses the class as it is; cpu and cuda subclass it, with kernels of
their own for the sizes and dtypes that they name, where a kernel makes one of the products or all of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class SplitLinear:
    """The linears of one backend, from its three passes over activations [T, N].

    compose(base, h, lora_B, scaling, gain, bias, out, product): out ← gain ⊙ v + bias, product ← v,
        v = base + s h lora_Bᵀ; all contiguous, out may be base.
    gain_bwd(grad, product, gain, need_scaled, need_gain, need_bias) → (gain ⊙ grad, Σ_t grad ⊙ product, Σ_t grad)
    dropout(x, seed, p) → drop(x)
    """

    def __init__(
        self,
        compose: Callable[..., None],
        gain_bwd: Callable[..., tuple[Tensor, Tensor, Tensor]],
        dropout: Callable[[Tensor, Tensor, float], Tensor],
    ) -> None:
        self.compose = compose
        self.gain_bwd = gain_bwd
        self.dropout = dropout

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
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        x = self._scaled_input(x, gain, axis)
        h = self._project(self._dropped(x, seed, dropout_p), lora_A)
        if gain is None or axis == "input":
            y = self._product(x, weight, bias, lora_B)
            self.compose(_rows(y), _rows(h), lora_B, scaling, None, None, _rows(y), None)
            return y, y.new_empty(0), h
        y = self._product(x, weight, None, lora_B)
        product = y.new_empty(y.shape if keep_product else 0)
        kept = _rows(product) if keep_product else None
        self.compose(_rows(y), _rows(h), lora_B, scaling, gain, bias, _rows(y), kept)
        return y, product, h

    def lora_linear_bwd(
        self,
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
        dtype = grad_y.dtype
        grad_y2 = _rows(grad_y)
        scale_input = axis == "input" and gain is not None
        need_input = need_x or (scale_input and need_gain)

        grad_v, grad_gain, grad_bias = self.gain_bwd(
            grad_y2,
            None if product is None else _rows(product),
            None if scale_input else gain,
            need_input or need_A or need_B,
            need_gain and not scale_input,
            need_bias,
        )
        if gain is None or scale_input:
            grad_v = grad_y2
        grad_x, grad_A, grad_B = (grad_y.new_empty(0) for _ in range(3))
        if need_B:
            assert h is not None
            grad_B = grad_v.new_empty(lora_B.shape).addmm_(grad_v.T, _rows(h), beta=0, alpha=scaling).to(lora_B.dtype)
        if need_input or need_A:
            grad_h = grad_v @ _scaled(lora_B, scaling, dtype)
        if need_A:
            assert x is not None
            dropped = self._dropped(self._scaled_input(x, gain, axis), seed, dropout_p)
            grad_A = (grad_h.T @ _rows(dropped)).to(lora_A.dtype)
        if need_input:
            grad_x = self._input_grad(grad_v, weight.to(dtype), grad_h, lora_A, dropout_p, seed)
            if scale_input:
                x2 = _rows(x) if x is not None else None
                grad_x, grad_gain, _ = self.gain_bwd(grad_x, x2, gain, need_x, need_gain, False)
            if need_x:
                grad_x = grad_x.view(*grad_y.shape[:-1], weight.shape[1])
        return grad_x, grad_A, grad_B, grad_gain, grad_bias

    def lora_compose_fwd(
        self,
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
        kept = _rows(product) if keep_product else None
        self.compose(_rows(base).contiguous(), _rows(h), lora_B, scaling, gain, bias, _rows(y), kept)
        return y, product

    def lora_compose_bwd(
        self,
        grad_y: Tensor,
        h: Tensor,
        lora_B: Tensor,
        scaling: float,
        gain: Tensor | None,
        product: Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        need_base, need_h, need_B, need_gain, need_bias = needs
        grad_y2 = _rows(grad_y)
        grad_base, grad_gain, grad_bias = self.gain_bwd(
            grad_y2,
            None if product is None else _rows(product),
            gain,
            need_base or need_h or need_B,
            need_gain,
            need_bias,
        )
        grad_v = grad_y2 if gain is None else grad_base
        grad_h, grad_B = (grad_y.new_empty(0) for _ in range(2))
        if need_h:
            grad_h = (grad_v @ _scaled(lora_B, scaling, grad_v.dtype)).to(h.dtype).view(h.shape)
        if need_B:
            grad_B = (grad_v.T @ (_rows(h).to(grad_v.dtype) * scaling)).to(lora_B.dtype)
        grad_base = grad_base.view(grad_y.shape) if need_base and gain is not None else grad_y.new_empty(0)
        return grad_base, grad_h, grad_B, grad_gain, grad_bias

    def _scaled_input(self, x: Tensor, gain: Tensor | None, axis: str) -> Tensor:
        if axis == "output" or gain is None:
            return x
        return self.gain_bwd(_rows(x), None, gain, True, False, False)[0].view(x.shape)

    def _dropped(self, x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
        if dropout_p == 0.0:
            return x
        assert seed is not None
        return self.dropout(_rows(x), seed, dropout_p).view(x.shape)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_B: Tensor) -> Tensor:
        """x Wᵀ + bias, contiguous; where lora_B = 0 to the bit what nn.Linear gives."""
        return F.linear(x, weight, bias).contiguous()

    def _product_grad(self, grad_v: Tensor, weight: Tensor) -> Tensor:
        """grad_v W, contiguous"""
        return (grad_v @ weight).contiguous()

    def _project(self, x: Tensor, lora_A: Tensor) -> Tensor:
        """x lora_Aᵀ"""
        return F.linear(x, lora_A.to(x.dtype))

    def _input_grad(
        self,
        grad_v: Tensor,
        weight: Tensor,
        grad_h: Tensor,
        lora_A: Tensor,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        """grad_v W + drop(grad_h lora_A), [T, K]; grad_h is scaled already"""
        if dropout_p > 0.0:
            assert seed is not None
            dropped = self.dropout(grad_h @ lora_A.to(grad_h.dtype), seed, dropout_p)
            return self._product_grad(grad_v, weight).add_(dropped)
        grad_x = self._product_grad(grad_v, weight)
        self.compose(grad_x, grad_h, lora_A.T, 1.0, None, None, grad_x, None)
        return grad_x


def _rows(tensor: Tensor) -> Tensor:
    """[..., C] as [T, C]"""
    return tensor.reshape(-1, tensor.shape[-1])


def _scaled(lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s lora_B in ``dtype``, so that dh = dv (s lora_B) is rounded once and not again by s."""
    return (lora_B.to(torch.promote_types(lora_B.dtype, dtype)) * scaling).to(dtype)
