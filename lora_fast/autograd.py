"""One torch.autograd.Function per op. First order only: jvp, vmap and double backward raise.

Kept for backward: x and, when the gain wants a gradient, the product before gain and bias or the base's part of it
[..., N] (law 2 of docs/design.md); h [..., R] and the parameters besides. The output is never kept: users write it in
place. A Function takes what its forward op takes, in that order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import unwrap_if_dead as _unwrap_if_dead
from torch.autograd.function import once_differentiable

from lora_fast import calls, ops


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """As ``function.apply``, which binds the inputs to forward's signature first: 11 to 50 µs."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    # a tensor of a transform that has ended is unwrapped, as unwrap_dead_wrappers does it
    inputs = tuple([_unwrap_if_dead(value) if isinstance(value, Tensor) else value for value in inputs])
    return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]


def _first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As ``once_differentiable``, but for the block without gradients where there are none to record."""
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        return once(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return wrapper


class WeightNormFunction(torch.autograd.Function):
    """norm = ‖W + s lora_B lora_A‖, with gradients to lora_A and lora_B; and the copy that backward reads."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        *fields, backend = inputs
        norm = ops.weight_norm(calls.WeightNorm(*fields), backend)
        return norm.clone(), norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *fields, ctx.backend = inputs
        call = calls.WeightNorm(*fields)
        _, norm = output
        ctx.mark_non_differentiable(norm)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.axis = call.scaling, call.axis
        ctx.save_for_backward(norm, call.weight, call.lora_A, call.lora_B)

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        if grad is None:
            return (None,) * 8
        _, need_A, need_B, *_ = ctx.needs_input_grad
        norm, weight, lora_A, lora_B = ctx.saved_tensors
        call = calls.WeightNormGrad(grad, norm, weight, lora_A, lora_B, ctx.scaling, ctx.axis, need_A, need_B)
        grad_A, grad_B = ops.weight_norm_bwd(call, ctx.backend)
        return None, _asked(grad_A, need_A), _asked(grad_B, need_B), *(None,) * 5


class LoraLinearFunction(torch.autograd.Function):
    """y = gain ⊙ (x Wᵀ + s (drop(x) lora_Aᵀ) lora_Bᵀ) + bias; axis "input" applies the gain to x instead."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.lora_linear_fwd(calls.LoraLinear(*inputs[:-1]), inputs[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *fields, ctx.backend = inputs
        call = calls.LoraLinear(*fields)
        _save_linear(ctx, call, call.gain, ctx.needs_input_grad[6], output)

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple:
        if grad_y is None:
            return (None,) * 12
        common = _linear_gradient_fields(ctx, grad_y)[0]
        gradients = ops.lora_linear_bwd(calls.LoraLinearGrad(*common), ctx.backend)
        return *_linear_gradients(ctx, gradients), *(None,) * 5


class DoraLinearFunction(torch.autograd.Function):
    """:class:`LoraLinearFunction` with gain = magnitude / ‖W + s lora_B lora_A‖."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return ops.dora_linear_fwd(calls.DoraLinear(*inputs[:-2]), inputs[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *fields, ctx.detach_norm, ctx.backend = inputs
        call = calls.DoraLinear(*fields)
        _, _, _, need_A, need_B, _, need_magnitude, *_ = ctx.needs_input_grad
        need_gain = need_magnitude or (not ctx.detach_norm and (need_A or need_B))
        _save_linear(ctx, call, call.magnitude, need_gain, output)

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple:
        if grad_y is None:
            return (None,) * 15
        common, norm = _linear_gradient_fields(ctx, grad_y)
        fields = *common, *norm, ctx.detach_norm
        gradients = ops.dora_linear_bwd(calls.DoraLinearGrad(*fields), ctx.backend)
        return *_linear_gradients(ctx, gradients), *(None,) * 8


def _save_linear(
    ctx: Any, call: calls.LoraLinear | calls.DoraLinear, vector: Tensor | None, need_gain: bool, output: tuple
) -> None:
    """What the two linears keep. ``vector``: the gain or the magnitude; ``output``: (y, product, h) and DoRA's norm."""
    _, product, h, *norm = output
    ctx.mark_non_differentiable(product, h, *norm)
    ctx.set_materialize_grads(False)
    ctx.scaling, ctx.axis, ctx.dropout_p, ctx.kept = call.scaling, call.axis, call.dropout_p, call.keep
    ctx.bias_dtype = None if call.bias is None else call.bias.dtype
    ctx.vector_dtype = None if vector is None else vector.dtype
    _, _, _, need_A, need_B, *_ = ctx.needs_input_grad
    ctx.save_for_backward(
        call.x if need_A or (need_gain and call.axis == "input") else None,
        call.weight,
        call.lora_A,
        call.lora_B,
        vector,
        call.seed,
        product if call.keep != "nothing" else None,
        h if need_B or call.keep == "base" else None,
        *norm,
    )


def _linear_gradient_fields(ctx: Any, grad_y: Tensor) -> tuple[tuple, list[Tensor]]:
    """The arguments that lora_linear_bwd and dora_linear_bwd have in common, in their order; and DoRA's norm."""
    # read once: checkpointing does not unpack them twice
    x, weight, lora_A, lora_B, vector, seed, product, h, *norm = ctx.saved_tensors
    need_x, _, need_bias, need_A, need_B, _, need_vector, *_ = ctx.needs_input_grad
    factors = x, weight, lora_A, lora_B, ctx.scaling, vector, ctx.axis, ctx.dropout_p, seed
    return (grad_y, *factors, product, h, ctx.kept, need_x, need_A, need_B, need_vector, need_bias), norm


def _linear_gradients(ctx: Any, gradients: tuple) -> tuple:
    """For x, weight, bias, lora_A, lora_B, scaling and the gain or magnitude."""
    grad_x, grad_A, grad_B, grad_vector, grad_bias = gradients
    need_x, _, need_bias, need_A, need_B, _, need_vector, *_ = ctx.needs_input_grad
    return (
        _asked(grad_x, need_x),
        None,
        _asked(grad_bias, need_bias, ctx.bias_dtype),
        _asked(grad_A, need_A),
        _asked(grad_B, need_B),
        None,
        _asked(grad_vector, need_vector, ctx.vector_dtype),
    )


class LoraComposeFunction(torch.autograd.Function):
    """y = gain ⊙ (base + s h lora_Bᵀ) + bias."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return ops.lora_compose_fwd(calls.LoraCompose(*inputs[:-1]), inputs[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *fields, ctx.backend = inputs
        call = calls.LoraCompose(*fields)
        product = output[1]
        ctx.mark_non_differentiable(product)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.kept = call.scaling, call.keep
        ctx.bias_dtype = None if call.bias is None else call.bias.dtype
        kept = {"nothing": None, "product": product, "base": call.base}[call.keep]
        ctx.save_for_backward(call.h, call.lora_B, call.gain, kept)

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple:
        if grad_y is None:
            return (None,) * 8
        h, lora_B, gain, product = ctx.saved_tensors
        product = None if product is None else product.reshape(-1, product.shape[-1])
        need_base, need_h, need_B, _, need_gain, need_bias, *_ = ctx.needs_input_grad
        needs = need_base, need_h, need_B, need_gain, need_bias
        call = calls.LoraComposeGrad(grad_y, h, lora_B, ctx.scaling, gain, product, ctx.kept, *needs)
        grad_base, grad_h, grad_B, grad_gain, grad_bias = ops.lora_compose_bwd(call, ctx.backend)
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


class GroupedLoraFunction(torch.autograd.Function):
    """y = gain[a] ⊙ (base + s[a] x lora_A[a]ᵀ lora_B[a]ᵀ) + bias, a being the row's adapter; base may be x Wᵀ.

    Takes the fields of :class:`~lora_fast.calls.GroupedLora` but for the factors, the backend, and after these lora_A's
    tensors and as many of lora_B's.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        call, backend = _grouped(inputs)
        return ops.grouped_lora_fwd(call, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        call, ctx.backend = _grouped(inputs)
        _, product, h = output
        ctx.mark_non_differentiable(product, h)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if call.bias is None else call.bias.dtype
        ctx.x_dtype, ctx.count = call.x.dtype, len(call.lora_A)
        needs = ctx.needs_input_grad[_GROUPED:]
        ctx.save_for_backward(
            call.x if any(needs[: ctx.count]) else None,
            call.weight,
            call.scaling,
            call.gain,
            call.order,
            call.starts,
            call.ranks,
            product if call.keep else None,
            h if any(needs[ctx.count :]) else None,
            *call.lora_A,
            *call.lora_B,
        )

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple:
        if grad_y is None:
            return (None,) * (_GROUPED + 2 * ctx.count)
        x, weight, scaling, gain, order, starts, ranks, product, h, *factors = ctx.saved_tensors
        lora_A, lora_B = _halves(factors)
        need_x, _, need_base, need_bias, _, need_gain, *_ = ctx.needs_input_grad
        need_A, need_B = _halves(ctx.needs_input_grad[_GROUPED:])
        needs = need_x, need_base, need_A, need_B, need_gain, need_bias
        call = calls.GroupedLoraGrad(
            grad_y, x, weight, lora_A, lora_B, scaling, gain, order, starts, ranks, product, h, *needs
        )
        grad_x, grad_base, grad_A, grad_B, grad_gain, grad_bias = ops.grouped_lora_bwd(call, ctx.backend)
        return (
            _asked(grad_x, need_x, ctx.x_dtype),
            None,
            _asked(grad_y if gain is None else grad_base, need_base),
            _asked(grad_bias, need_bias, ctx.bias_dtype),
            None,
            _asked(grad_gain, need_gain, gain.dtype if gain is not None else None),
            *(None,) * 5,
            *_each_asked(grad_A, need_A),
            *_each_asked(grad_B, need_B),
        )


class AdaptedMlpFunction(torch.autograd.Function):
    """y = down(drop(act(gate(x)) ⊙ up(x))) of adapted linears; kept are the base products of gate and up, or x alone.

    Takes x, what is no tensor in :class:`~lora_fast.calls.AdaptedMlp` and the backend, and then, each for gate, up and
    down or for the one of both and down: the weights, biases, lora_A, lora_B and gains.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        call, backend = mlp_call(inputs)
        y, bases, product, h = ops.adapted_mlp_fwd(call, backend)
        return y, product, *h, *bases

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        call, ctx.backend = mlp_call(inputs)
        _, product, *kept = output
        ctx.mark_non_differentiable(product, *kept)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.activation, ctx.dropout_p = call.scaling, call.activation, call.dropout_p
        ctx.count, ctx.bases = len(call.weight), len(kept) - 2
        ctx.vector_dtypes = [None if vector is None else vector.dtype for vector in (*call.gain, *call.bias)]
        _, needs_bias, needs_A, needs_B, needs_gain = _in_fives(ctx.needs_input_grad[_MLP:])
        wants_gated = any(any(needs[:-1]) for needs in (needs_bias, needs_A, needs_B, needs_gain))
        beyond_down = ctx.needs_input_grad[0] or wants_gated or needs_A[-1]
        reads_x = any(needs_A[:-1]) or (beyond_down and not ctx.bases)
        ctx.save_for_backward(
            call.x if reads_x else None,
            call.mask,
            product if call.keep_product else None,
            *(kept if beyond_down else kept[:2]),
            *inputs[_MLP:],
        )

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple:
        if grad_y is None:
            return (None,) * (_MLP + 5 * ctx.count)
        x, mask, product, *kept = ctx.saved_tensors
        tensors = kept[-5 * ctx.count :]
        h, bases = kept[:2], kept[2 : -5 * ctx.count]
        weight, bias, lora_A, lora_B, gain = _in_fives(tensors)
        _, needs_bias, needs_A, needs_B, needs_gain = _in_fives(ctx.needs_input_grad[_MLP:])
        call = calls.AdaptedMlpGrad(
            grad_y, x, weight, bias, lora_A, lora_B, ctx.scaling, gain, ctx.activation, mask, ctx.dropout_p,
            tuple(bases), product, tuple(h), ctx.needs_input_grad[0], needs_A, needs_B, needs_gain, needs_bias,
        )  # fmt: skip
        grad_x, grad_A, grad_B, grad_gain, grad_bias = ops.adapted_mlp_bwd(call, ctx.backend)
        of_gain, of_bias = ctx.vector_dtypes[: ctx.count], ctx.vector_dtypes[ctx.count :]
        return (
            _asked(grad_x, ctx.needs_input_grad[0]),
            *(None,) * (_MLP - 1 + ctx.count),
            *map(_asked, grad_bias, needs_bias, of_bias),
            *map(_asked, grad_A, needs_A),
            *map(_asked, grad_B, needs_B),
            *map(_asked, grad_gain, needs_gain, of_gain),
        )


_MLP = 8  # inputs before the weights


def mlp_call(inputs: tuple) -> tuple[calls.AdaptedMlp, str]:
    """The call and the backend of what :class:`AdaptedMlpFunction` takes."""
    x, scaling, activation, mask, dropout_p, keep_bases, keep_product, backend = inputs[:_MLP]
    weight, bias, lora_A, lora_B, gain = _in_fives(inputs[_MLP:])
    given = weight, bias, lora_A, lora_B, scaling, gain, activation, mask, dropout_p
    return calls.AdaptedMlp(x, *given, keep_bases, keep_product), backend


def _in_fives(values: Any) -> tuple[tuple, ...]:
    """As many sequences, one after the other."""
    count = len(values) // 5
    return tuple(tuple(values[i * count : (i + 1) * count]) for i in range(5))


class LoraGluFunction(torch.autograd.Function):
    """(a, a lora_Aᵀ) with a = act(gate) ⊙ up, gate and up from their base products, and down's lora_A or none.

    Takes the fields of :class:`~lora_fast.calls.LoraGlu`, lora_A and the backend. a is not kept but made again.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        *fields, lora_A, backend = inputs
        a = ops.lora_glu_fwd(calls.LoraGlu(*fields), backend)
        with ops.outside_autocast(a):
            return a, a.new_empty(0) if lora_A is None else F.linear(a, lora_A.to(a.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *fields, lora_A, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        if lora_A is None:
            ctx.mark_non_differentiable(output[1])
        is_kept = [isinstance(field, Tensor) or field is None for field in fields]
        ctx.others = [None if kept else field for field, kept in zip(fields, is_kept, strict=True)]
        ctx.dtypes = [field.dtype if isinstance(field, Tensor) else None for field in fields]
        tensors = [field if kept else None for field, kept in zip(fields, is_kept, strict=True)]
        ctx.save_for_backward(lora_A, *tensors)

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_a: Tensor | None, grad_h: Tensor | None) -> tuple:
        if grad_a is None and grad_h is None:
            return (None,) * 15
        lora_A, *tensors = ctx.saved_tensors
        glu = calls.LoraGlu(*(t if other is None else other for t, other in zip(tensors, ctx.others, strict=True)))
        needs: Any = calls.LoraGlu(*ctx.needs_input_grad[:13])  # of each field
        need_A = ctx.needs_input_grad[13] and grad_h is not None
        with ops.outside_autocast(glu.base_gate):
            if grad_h is not None:
                update = grad_h @ lora_A.to(grad_h.dtype)
                grad_a = update if grad_a is None else grad_a + update
            assert grad_a is not None
            vectors = needs.gain_gate, needs.gain_up, needs.bias_gate, needs.bias_up
            call = calls.LoraGluGrad(grad_a, *glu, need_A, *vectors, False)
            grad_bases, a, *sums = ops.lora_glu_bwd(call, ctx.backend)
            grad_gate, grad_up = grad_bases.unbind()
            of_gate = _along_rank(
                grad_gate, glu.h_gate, glu.lora_B_gate, glu.scaling_gate, needs.h_gate, needs.lora_B_gate
            )
            of_up = _along_rank(grad_up, glu.h_up, glu.lora_B_up, glu.scaling_up, needs.h_up, needs.lora_B_up)
            grad_A = (grad_h.T @ a).to(lora_A.dtype) if need_A and grad_h is not None else None
        grads = grad_gate, grad_up, of_gate[0], of_up[0], of_gate[1], of_up[1], None, None, *sums
        return *map(_asked, grads, needs[:12], ctx.dtypes), None, grad_A, None


def _along_rank(
    grad_v: Tensor, h: Tensor | None, lora_B: Tensor | None, scaling: float, need_h: bool, need_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of h and lora_B in v = base + s h lora_Bᵀ."""
    if h is None or lora_B is None:
        return None, None
    grad_h = (grad_v @ lora_B.to(grad_v.dtype)).mul_(scaling) if need_h else None
    return grad_h, (grad_v.T @ h.to(grad_v.dtype)).mul_(scaling) if need_B else None


_GROUPED = 11  # inputs before the factors


def _grouped(inputs: tuple) -> tuple[calls.GroupedLora, str]:
    x, weight, base, bias, scaling, gain, order, starts, ranks, keep, backend = inputs[:_GROUPED]
    factors = _halves(inputs[_GROUPED:])
    return calls.GroupedLora(x, weight, base, bias, *factors, scaling, gain, order, starts, ranks, keep), backend


def _halves(values: Any) -> tuple[tuple, tuple]:
    """lora_A's and lora_B's."""
    count = len(values) // 2
    return tuple(values[:count]), tuple(values[count:])


def _each_asked(gradients: list[Tensor], needs: tuple[bool, ...]) -> list[Tensor | None]:
    return [gradients[i] if need else None for i, need in enumerate(needs)]


class GroupedWeightNormFunction(torch.autograd.Function):
    """:class:`WeightNormFunction` of many adapters, which come last: lora_A's tensors, then lora_B's."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        weight, scaling, ranks, backend, *factors = inputs
        call = calls.GroupedWeightNorm(weight, *_halves(factors), scaling, ranks)
        norm = ops.grouped_weight_norm_fwd(call, backend)
        return norm.clone(), norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        weight, scaling, ranks, ctx.backend, *factors = inputs
        _, norm = output
        ctx.mark_non_differentiable(norm)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(norm, weight, scaling, ranks, *factors)

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        norm, weight, scaling, ranks, *factors = ctx.saved_tensors
        if grad is None:
            return (None,) * (4 + len(factors))
        need_A, need_B = _halves(ctx.needs_input_grad[4:])
        call = calls.GroupedWeightNormGrad(grad, norm, weight, *_halves(factors), scaling, ranks, need_A, need_B)
        grad_A, grad_B = ops.grouped_weight_norm_bwd(call, ctx.backend)
        return *(None,) * 4, *_each_asked(grad_A, need_A), *_each_asked(grad_B, need_B)


class DropoutFunction(torch.autograd.Function):
    """y = drop(x); the gradient is drop(grad_y), with the mask made again from the seed."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return ops.dropout(calls.Dropout(*inputs[:-1]), inputs[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, seed, ctx.p, ctx.backend = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        (seed,) = ctx.saved_tensors
        return ops.dropout(calls.Dropout(grad_y, seed, ctx.p), ctx.backend), None, None, None


def _asked(grad: Tensor | None, needed: bool, dtype: torch.dtype | None = None) -> Tensor | None:
    if not needed or grad is None:
        return None
    return grad if dtype is None else grad.to(dtype)
