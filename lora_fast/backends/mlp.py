"""A gated MLP of adapted linears, around a backend's passes: for backward it keeps the base products of gate and up.

    h = x [A_gate; A_up]ᵀ      z_p = gain_p ⊙ (x W_pᵀ + s_p h_p B_pᵀ) + bias_p      a = drop(act(z_gate) ⊙ z_up)
    y = gain ⊙ (a Wᵀ + s (a Aᵀ) Bᵀ) + bias, of down

Separate linears keep, for a token, the products of gate and up, their outputs, act(z_gate) and a, each of the
intermediate size I, and down's product. From the two base products and h, backward makes the rest again: a step along
the rank, the gains, the activation. It goes through the tokens in blocks, so that of da, dv_gate, dv_up and a there is
never more than a block; without base products it makes those again too, from x. What blocks add up is float32.
Activations are [T, features], the sequences of a call as in :class:`~lora_fast.calls.AdaptedMlp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lora_fast import calls
from lora_fast.backends.passes import GainBackward, contraction, linear_of_torch, scaled_product
from lora_fast.backends.plan import Plan
from lora_fast.dtypes import accumulate_dtype

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
MlpGradients = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
# Tokens of a block: at most BLOCKS blocks, and none so small that a product takes longer for each of its tokens. AMD
# EPYC (Zen 4), 2 threads, 2048 × 5632, a product of 1024 tokens in blocks of 128, 256 and 512: 1.09, 1.03 and 1.01
# times as long in bfloat16, 1.38, 1.13 and 0.99 in float32. Where the base products are made again, a block holds half
# as much more, and blocks of 256 tokens keep a step of four Llama-like layers in bfloat16 3 MiB lower. On a GPU
# (predicted) 2048 tokens by 4096 features are four tiles of 128 × 128 for each multiprocessor.
BLOCKS, BLOCK, SMALL_BLOCK, BLOCK_ON_GPU = 4, 512, 256, 2048
# Up to so many tokens a module calls its linears one after the other, which have kernels for few, and keep little. On
# that processor a step of four Llama-like layers in bfloat16 took 1.31, 1.23 and 1.16 times as long as one at 8, 16 and
# 32 tokens, and 0.97 times at 40.
TOKENS_APART = 32


def runs_apart(x: Tensor) -> bool:
    """Whether a module calls its linears one after the other, for this x [..., K]."""
    return x.numel() <= TOKENS_APART * x.shape[-1]


def blocks(x: Tensor, weight: Sequence[Tensor], bases: Sequence[Tensor]) -> Iterator[slice]:
    """Of the tokens of x [T, features]; one where products with ``weight`` cast it, which each block would do again.

    bases: the base products that are kept; none where each block makes its own.
    """
    least = BLOCK_ON_GPU if x.is_cuda else BLOCK if bases or x.dtype.itemsize > 2 else SMALL_BLOCK
    tokens = x.shape[0]
    size = max(-(-tokens // BLOCKS), least) if all(each.dtype == x.dtype for each in weight) else max(tokens, 1)
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


class Mlps:
    """The MLPs of one backend.

    glu_fwd, glu_bwd: what it runs for the ops lora_glu_fwd and lora_glu_bwd.
    compose, gain_bwd, products: as for :class:`lora_fast.backends.passes.Passes`.
    """

    def __init__(
        self,
        glu_fwd: Callable[[calls.LoraGlu, Plan], Tensor],
        glu_bwd: Callable[[calls.LoraGluGrad, Plan], tuple[Tensor, ...]],
        compose: Callable[..., None],
        gain_bwd: GainBackward,
        products: Mapping[str, Product] = MappingProxyType({}),
    ) -> None:
        self.glu_fwd = glu_fwd
        self.glu_bwd = glu_bwd
        self.compose = compose
        self.gain_bwd = gain_bwd
        self.products = products

    def adapted_mlp_fwd(self, call: calls.AdaptedMlp, plan: Plan) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
        """(y, the base products of gate and up, down's product, h of gate's and up's adapters and of down's)"""
        x, gated, linear = call.x, _Gated(call), self.product_of(plan)
        A, (*_, A_down) = gated.stacked_A(x.dtype), call.lora_A
        h = x.new_empty(0) if A is None else linear_of_torch(x, A, None)
        h_down = x.new_empty(0 if A_down is None else (x.shape[0], A_down.shape[0]))
        y = x.new_empty(x.shape[0], call.weight[-1].shape[0])
        product = torch.empty_like(y) if call.keep_product else y.new_empty(0)
        kept = [linear(x, weight, None) for weight in gated.weight] if call.keep_bases else []
        for some in blocks(x, call.weight, kept):
            bases = [base[some] for base in kept] or [linear(x[some], weight, None) for weight in gated.weight]
            a = self.glu_fwd(gated.glu(bases, None if A is None else h[some]), plan)
            _drop(a, call, some)
            if A_down is not None:
                h_down[some] = linear_of_torch(a, A_down, None)
            self._down(call, linear, a, h_down[some], y[some], product[some] if call.keep_product else None)
        return y, kept, product, [h, h_down]

    def adapted_mlp_bwd(self, call: calls.AdaptedMlpGrad, plan: Plan) -> MlpGradients:
        """The gradients of x, and of each linear's lora_A, lora_B, gain and bias; empty where not asked for."""
        return _Backward(self, call, plan).run()

    def product_of(self, plan: Plan) -> Product:
        return self.products.get(plan.kernel("base"), linear_of_torch)

    def _down(
        self, call: calls.AdaptedMlp, linear: Product, a: Tensor, h: Tensor, y: Tensor, product: Tensor | None
    ) -> None:
        """y of some tokens, and down's product."""
        weight, bias, lora_B, gain = call.weight[-1], call.bias[-1], call.lora_B[-1], call.gain[-1]
        if gain is None:
            base = linear(a, weight, None if bias is None else bias.to(a.dtype))
            bias = None
        else:
            base = linear(a, weight, None)
        if lora_B is None:
            y.copy_(base)
        else:
            self.compose(base, h, lora_B, call.scaling[-1], gain, bias, y, product)


class _Gated:
    """Of a call what leads to down's input: the entries of gate and up, or the one of both."""

    def __init__(self, call: calls.AdaptedMlp | calls.AdaptedMlpGrad) -> None:
        self.weight, self.lora_A, self.lora_B = call.weight[:-1], call.lora_A[:-1], call.lora_B[:-1]
        self.scaling, self.gain, self.bias = call.scaling[:-1], call.gain[:-1], call.bias[:-1]
        self.activation = call.activation
        self.joined = len(self.weight) == 1
        self.ranks = [0 if lora_A is None else lora_A.shape[0] for lora_A in self.lora_A]

    def stacked_A(self, dtype: torch.dtype) -> Tensor | None:
        """[ΣR, K], so that x is read once."""
        present = [lora_A.to(dtype) for lora_A in self.lora_A if lora_A is not None]
        return torch.cat(present) if len(present) > 1 else present[0] if present else None

    def columns(self, h: Tensor) -> Sequence[Tensor]:
        """Of h or dh [T, ΣR] those of each adapter, none where there is none."""
        return h.split(self.ranks, dim=1)

    def glu(self, bases: Sequence[Tensor], h: Tensor | None) -> calls.LoraGlu:
        """Of some tokens, with their h [T, ΣR]."""
        each: list[Tensor | None] = [None] * len(self.ranks)
        if h is not None:
            each = [part if rank else None for part, rank in zip(self.columns(h), self.ranks, strict=True)]
        fields: tuple[Any, ...] = (
            *self._both(bases, dim=1),
            *(each * 2 if self.joined else each),
            *self._both(self.lora_B),
            *(tuple(self.scaling) * 2 if self.joined else self.scaling),
            *self._both(self.gain),
            *self._both(self.bias),
            self.activation,
        )
        return calls.LoraGlu(*fields)

    def _both(self, values: Sequence[Tensor | None], dim: int = 0) -> Sequence[Any]:
        """Gate's and up's."""
        if not self.joined:
            return values
        (joined,) = values
        return (None, None) if joined is None else joined.chunk(2, dim)


class _Backward:
    """The gradients of one call: down's own, then of one block of tokens after the other."""

    def __init__(self, mlps: Mlps, call: calls.AdaptedMlpGrad, plan: Plan) -> None:
        self.mlps, self.call, self.plan, self.gated = mlps, call, plan, _Gated(call)
        self.linear = mlps.product_of(plan)
        self.A = self.gated.stacked_A(call.grad_y.dtype)
        tokens, sums = call.grad_y.shape[0], accumulate_dtype(call.grad_y)

        def zeros(tensor: Tensor | None, need: bool) -> Tensor:
            return call.grad_y.new_zeros(tensor.shape if tensor is not None and need else 0, dtype=sums)

        self.grad_A = list(map(zeros, call.lora_A, call.need_A))
        self.grad_B = list(map(zeros, call.lora_B, call.need_B))
        self.grad_gain = list(map(zeros, call.gain, call.need_gain))
        self.grad_bias = list(map(zeros, call.bias, call.need_bias))
        self.grad_x = call.grad_y.new_empty((tokens, call.weight[0].shape[1]) if call.need_x else 0)
        self.grad_h = call.grad_y.new_empty(0 if self.A is None else (tokens, self.A.shape[0]))

    def run(self) -> MlpGradients:
        call = self.call
        needs = call.need_A[:-1], call.need_B[:-1], call.need_gain[:-1], call.need_bias[:-1]
        beyond_down = call.need_x or any(map(any, needs))
        grad_v, grad_h = self._down(beyond_down)
        if beyond_down or call.need_A[-1]:
            for some in blocks(call.grad_y, call.weight, call.bases):
                self._block(some, grad_v, grad_h)
        if any(call.need_A[:-1]):
            assert call.x is not None
            products = (self.grad_h.T @ call.x).split(self.gated.ranks)
            self.grad_A[:-1] = [
                product.clone() if need else grad  # what an op gives is no view of another of its results
                for product, need, grad in zip(products, call.need_A, self.grad_A, strict=False)
            ]
        return (
            self.grad_x,
            _as(call.lora_A, self.grad_A),
            _as(call.lora_B, self.grad_B),
            self.grad_gain,
            self.grad_bias,
        )

    def _down(self, beyond: bool) -> tuple[Tensor, Tensor | None]:
        """(dv, dh) of down, for all tokens: an intermediate size is not among their sizes."""
        call = self.call
        lora_B, scaling, gain, h = call.lora_B[-1], call.scaling[-1], call.gain[-1], call.h[-1]
        need_A, need_B, need_gain, need_bias = (
            needs[-1] for needs in (call.need_A, call.need_B, call.need_gain, call.need_bias)
        )
        grad_v, grad_gain, grad_bias = self.mlps.gain_bwd(
            call.grad_y,
            call.product if need_gain else None,
            gain,
            need_scaled=beyond or need_A or need_B,
            need_gain=need_gain,
            need_bias=need_bias,
        )
        if need_gain:
            self.grad_gain[-1] = grad_gain
        if need_bias:
            self.grad_bias[-1] = grad_bias
        if gain is None:
            grad_v = call.grad_y
        if lora_B is None:
            return grad_v, None
        if need_B:
            self.grad_B[-1] = scaled_product(grad_v.T, h, scaling)
        return grad_v, scaled_product(grad_v, lora_B.to(grad_v.dtype), scaling) if beyond or need_A else None

    def _block(self, some: slice, grad_v: Tensor, grad_h: Tensor | None) -> None:
        """What the tokens ``some`` add, from down's dv and dh."""
        call, gated, A_down = self.call, self.gated, self.call.lora_A[-1]
        grad = self.linear(grad_v[some], call.weight[-1].T, None)
        if A_down is not None and grad_h is not None:
            self.mlps.compose(grad, grad_h[some], A_down.T, 1.0, None, None, grad, None)
        _drop(grad, call, some)
        bases = [base[some] for base in call.bases] or [self._base(weight, some) for weight in gated.weight]
        h = None if self.A is None else call.h[0][some]
        glu = gated.glu(bases, h)
        grad_bases, a, *sums = self.mlps.glu_bwd(calls.LoraGluGrad(grad, *glu, *self._needs_of_glu()), self.plan)
        self._add_vectors(*sums)
        if call.need_A[-1] and grad_h is not None:
            _drop(a, call, some)
            self.grad_A[-1] += contraction(a, grad_h[some]).T
        parts = [grad_bases] if gated.joined else list(grad_bases)
        if h is not None:
            each = zip(parts, gated.columns(h), gated.columns(self.grad_h[some]), strict=True)
            for i, (part, h_part, grad_h_part) in enumerate(each):
                self._along_rank(i, part, h_part, grad_h_part)
        if call.need_x:
            self._input_grad(some, parts)

    def _base(self, weight: Tensor, some: slice) -> Tensor:
        assert self.call.x is not None
        return self.linear(self.call.x[some], weight, None)

    def _needs_of_glu(self) -> tuple[bool, ...]:
        """As of LoraGluGrad: of the output, gate's and up's gain, gate's and up's bias; and whether they are joined."""
        call, joined = self.call, self.gated.joined
        gains, biases = (tuple(needs[:-1]) * (2 if joined else 1) for needs in (call.need_gain, call.need_bias))
        return call.need_A[-1], *gains, *biases, joined

    def _add_vectors(self, gain_gate: Tensor, gain_up: Tensor, bias_gate: Tensor, bias_up: Tensor) -> None:
        for sums, gate, up in ((self.grad_gain, gain_gate, gain_up), (self.grad_bias, bias_gate, bias_up)):
            if self.gated.joined:
                sums[0] += torch.cat((gate, up))
            else:
                sums[0] += gate
                sums[1] += up

    def _along_rank(self, i: int, grad_v: Tensor, h: Tensor, grad_h: Tensor) -> None:
        """lora_B's gradient of gate's or up's adapter, and dh, which is written into ``grad_h``."""
        lora_B, scaling = self.gated.lora_B[i], self.gated.scaling[i]
        if lora_B is None:
            return
        if self.call.need_B[i]:
            self.grad_B[i].add_(contraction(grad_v, h), alpha=scaling)
        grad_h.copy_(scaled_product(grad_v, lora_B.to(grad_v.dtype), scaling))

    def _input_grad(self, some: slice, parts: Sequence[Tensor]) -> None:
        """dx = Σ dv_p W_p + [dh_gate | dh_up] [A_gate; A_up]"""
        grad_x = self.grad_x[some]
        first, *others = (
            self.linear(part, weight.T, None) for part, weight in zip(parts, self.gated.weight, strict=True)
        )
        for other in others:
            first += other
        if self.A is None:
            grad_x.copy_(first)
        else:
            self.mlps.compose(first, self.grad_h[some], self.A.T, 1.0, None, None, grad_x, None)


def _as(parameters: Sequence[Tensor | None], gradients: list[Tensor]) -> list[Tensor]:
    """In the parameters' dtypes."""
    return [
        gradient if parameter is None else gradient.to(parameter.dtype)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]


def _drop(values: Tensor, call: calls.AdaptedMlp | calls.AdaptedMlpGrad, some: slice) -> None:
    """values [some, I] as the dropout between the linears leaves them, in place."""
    if call.mask is not None:
        values.mul_(call.mask[some]).div_(1.0 - call.dropout_p) if call.dropout_p < 1.0 else values.zero_()
