"""The contract: each op's schema and its fake, one after the other.

Shapes: x [..., K]  weight [N, K]  lora_A [R, K]  lora_B [N, R]  bias [N]  gain, norm, magnitude [N] or, for axis
"input", [K]; product [T, N], of the kind that ``keep`` names, and h [T, R] are what a forward keeps for its backward, T
tokens of all leading dimensions.
``backend`` is a backend's name or "auto", which is resolved when the op runs. Outputs that were not asked for are empty
tensors. Everything here is below autograd (:mod:`lora_fast.autograd`) and below validation
(:mod:`lora_fast.functional`); below it an op's arguments travel as one object (:mod:`lora_fast.calls`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fast import calls
from lora_fast.backends import registry
from lora_fast.dtypes import accumulate_dtype

_library = torch.library.Library("lora_fast", "DEF")
_GLU = (
    "Tensor base_gate, Tensor base_up, Tensor? h_gate, Tensor? h_up, Tensor? lora_B_gate, Tensor? lora_B_up, "
    "float scaling_gate, float scaling_up, Tensor? gain_gate, Tensor? gain_up, Tensor? bias_gate, Tensor? bias_up, "
    "str activation"
)
_MLP = (
    "Tensor[] weight, Tensor?[] bias, Tensor?[] lora_A, Tensor?[] lora_B, float[] scaling, Tensor?[] gain, "
    "str activation, Tensor? mask, float dropout_p"
)
_PLAIN = {Tensor, torch.nn.Parameter, type(None), float, bool, int, str, torch.dtype, tuple}  # of a call's fields


def _define(
    call_type: Any, schema: str, rows: tuple[str, ...] = (), row_outputs: int = 0, op: str | None = None
) -> Callable:
    """Define ``schema``, whose kernel runs a call of ``call_type``, and register the decorated function as its fake.

    The function's name is then that of what runs a call: ``(call, backend) -> outputs``. ``op`` is the op's name in
    the backends, where that is another one. Of an op on activations the arguments ``rows``, and as many of the first
    outputs as ``row_outputs``, are [..., C] in the schema and [T, C] below it.
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def compute(call: Any, backend: str) -> Any:
        if torch.is_grad_enabled():  # an exported graph calls it so, with parameters that want gradients
            with torch.no_grad():
                return compute(call, backend)
        first = call[0]
        leading = None if not rows or first.dim() == 2 else first.shape[:-1]
        if leading is not None:
            call = call._replace(**{row: _as_rows(getattr(call, row)) for row in rows})
        if torch._C._is_any_autocast_enabled():
            with outside_autocast(first):
                outputs = registry.run(op or name, call, backend)
        else:
            outputs = registry.run(op or name, call, backend)
        if leading is not None:
            for output in outputs[:row_outputs] if isinstance(outputs, tuple) else (outputs,):
                _lead(output, leading)
        return outputs

    def kernel(*arguments: Any) -> Any:
        return compute(call_type(*arguments[:-1]), arguments[-1])

    _library.impl(name, kernel, "CompositeExplicitAutograd")

    def register(fake: Callable) -> Callable:
        torch.library.register_fake(f"lora_fast::{name}", lambda *arguments: fake(call_type(*arguments[:-1])))
        dispatched = getattr(torch.ops.lora_fast, name).default  # takes the host 1.5 µs less than the op's name
        fields = len(dispatched._schema.arguments) - 1  # weight_norm_fwd has none for what is kept

        def run(call: Any, backend: str) -> Any:
            return dispatched(*call[:fields], backend) if _is_seen(call) else compute(call, backend)

        return run

    return register


def _is_seen(call: calls.Call) -> bool:
    """Whether anybody but its kernel would see an op: else the kernel is called at once.

    To find a kernel that is written in Python takes PyTorch 5 µs. The op is seen by tracers and the like, and by
    tensors of other classes or without memory.
    """
    if is_watched():
        return True
    kinds = set(map(type, call))
    if not _PLAIN.issuperset(kinds) or call[0].is_meta:
        return True
    if tuple not in kinds:
        return False
    return any(type(field) is tuple and not _PLAIN.issuperset(map(type, field)) for field in call)


def is_watched() -> bool:
    """Whether :func:`is_traced` holds, a mode that sees functions or a profiler is about."""
    return is_traced() or torch._C._is_torch_function_mode_enabled() or torch._C._autograd._profiler_enabled()


def is_traced() -> bool:
    """Whether torch.compile, export or another tracer, a transform of torch.func or a mode that sees ops is about."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


def _as_rows(tensor: Tensor | None) -> Tensor | None:
    """[..., C] as [T, C]"""
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])


def _lead(output: Tensor, leading: torch.Size) -> None:
    """[T, C] becomes [*leading, C], in place: a view could not be written in place by the user."""
    if output.dim() == 2:  # else it was not asked for
        assert output.is_contiguous()
        output.resize_(*leading, output.shape[1])


def outside_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """The ops choose their dtypes themselves: an ambient autocast must not recast the products inside."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


@_define(
    calls.WeightNorm,
    "weight_norm_fwd(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str axis, str backend) -> Tensor norm",
)
def weight_norm_fwd(call: calls.WeightNorm) -> Tensor:
    return _norm_like(call)


@_define(
    calls.WeightNorm,
    "weight_norm_kept(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str axis, "
    "Tensor(a!) kept_norm, Tensor(b!) kept_key, str backend) -> Tensor norm",
    op="weight_norm_fwd",
)
def weight_norm_kept(call: calls.WeightNorm) -> Tensor:
    return _norm_like(call)


def weight_norm(call: calls.WeightNorm, backend: str) -> Tensor:
    """One of the two: Inductor (torch 2.13) fails on an op of one output if the tensors that it may write are None."""
    return (weight_norm_fwd if call.kept_norm is None else weight_norm_kept)(call, backend)


@_define(
    calls.QuantisedNorm,
    "quantised_norm_fwd(Tensor codes, Tensor scale, Tensor? levels, ScalarType dtype, Tensor lora_A, Tensor lora_B, "
    "float scaling, str backend) -> Tensor norm",
)
def quantised_norm_fwd(call: calls.QuantisedNorm) -> Tensor:
    return _quantised_norm_like(call)


@_define(
    calls.QuantisedNorm,
    "quantised_norm_kept(Tensor codes, Tensor scale, Tensor? levels, ScalarType dtype, Tensor lora_A, Tensor lora_B, "
    "float scaling, Tensor(a!) kept_norm, Tensor(b!) kept_key, str backend) -> Tensor norm",
    op="quantised_norm_fwd",
)
def quantised_norm_kept(call: calls.QuantisedNorm) -> Tensor:
    return _quantised_norm_like(call)


def quantised_norm(call: calls.QuantisedNorm, backend: str) -> Tensor:
    """One of the two, as for :func:`weight_norm`. It has no backward: it takes detached adapters."""
    return (quantised_norm_fwd if call.kept_norm is None else quantised_norm_kept)(call, backend)


@_define(
    calls.WeightNormGrad,
    "weight_norm_bwd(Tensor grad, Tensor norm, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str axis, "
    "bool need_A, bool need_B, str backend) -> (Tensor grad_A, Tensor grad_B)",
)
def weight_norm_bwd(call: calls.WeightNormGrad) -> tuple[Tensor, Tensor]:
    return _like(call.lora_A, call.need_A), _like(call.lora_B, call.need_B)


@_define(
    calls.LoraLinear,
    "lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, Tensor? gain, "
    "str axis, float dropout_p, Tensor? seed, str keep, str backend) -> (Tensor y, Tensor product, Tensor h)",
    rows=("x",),
    row_outputs=1,
)
def lora_linear_fwd(call: calls.LoraLinear) -> tuple[Tensor, Tensor, Tensor]:
    return _linear_like(call)


@_define(
    calls.LoraLinearGrad,
    "lora_linear_bwd(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor? gain, str axis, float dropout_p, Tensor? seed, Tensor? product, Tensor? h, str kept, bool need_x, "
    "bool need_A, bool need_B, bool need_gain, bool need_bias, str backend) "
    "-> (Tensor grad_x, Tensor grad_A, Tensor grad_B, Tensor grad_gain, Tensor grad_bias)",
    rows=("grad_y", "x"),
    row_outputs=1,
)
def lora_linear_bwd(call: calls.LoraLinearGrad) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _linear_gradients_like(call, call.gain, call.need_gain)


@_define(
    calls.DoraLinear,
    "dora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor magnitude, str axis, float dropout_p, Tensor? seed, str keep, Tensor(a!)? kept_norm, "
    "Tensor(b!)? kept_key, str backend) -> (Tensor y, Tensor product, Tensor h, Tensor norm)",
    rows=("x",),
    row_outputs=1,
)
def dora_linear_fwd(call: calls.DoraLinear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_linear_like(call), _norm_like(call)


@_define(
    calls.DoraLinearGrad,
    "dora_linear_bwd(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor magnitude, str axis, float dropout_p, Tensor? seed, Tensor? product, Tensor? h, str kept, bool need_x, "
    "bool need_A, bool need_B, bool need_magnitude, bool need_bias, Tensor norm, bool detach_norm, str backend) "
    "-> (Tensor grad_x, Tensor grad_A, Tensor grad_B, Tensor grad_magnitude, Tensor grad_bias)",
    rows=("grad_y", "x"),
    row_outputs=1,
)
def dora_linear_bwd(call: calls.DoraLinearGrad) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _linear_gradients_like(call, call.magnitude, call.need_magnitude)


@_define(
    calls.LoraCompose,
    "lora_compose_fwd(Tensor base, Tensor h, Tensor lora_B, float scaling, Tensor? gain, Tensor? bias, "
    "str keep, str backend) -> (Tensor y, Tensor product)",
    rows=("base", "h"),
    row_outputs=1,
)
def lora_compose_fwd(call: calls.LoraCompose) -> tuple[Tensor, Tensor]:
    # a kept base is the call's own, which an op may not return
    base, tokens = call.base, math.prod(call.base.shape[:-1])
    return base.new_empty(base.shape), base.new_empty((tokens, base.shape[-1]) if call.keep == "product" else 0)


@_define(
    calls.LoraComposeGrad,
    "lora_compose_bwd(Tensor grad_y, Tensor h, Tensor lora_B, float scaling, Tensor? gain, Tensor? product, str kept, "
    "bool need_base, bool need_h, bool need_B, bool need_gain, bool need_bias, str backend) "
    "-> (Tensor grad_base, Tensor grad_h, Tensor grad_B, Tensor grad_gain, Tensor grad_bias)",
    rows=("grad_y", "h"),
    row_outputs=2,
)
def lora_compose_bwd(call: calls.LoraComposeGrad) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_y, sums = call.grad_y, accumulate_dtype(call.grad_y)
    # without a gain the base's gradient is grad_y itself, which an op may not return
    grad_base = _like(grad_y, call.need_base and call.gain is not None)
    grad_gain = grad_y.new_empty(call.gain.shape if call.gain is not None and call.need_gain else 0, dtype=sums)
    grad_bias = grad_y.new_empty(grad_y.shape[-1] if call.need_bias else 0, dtype=sums)
    return grad_base, _like(call.h, call.need_h), _like(call.lora_B, call.need_B), grad_gain, grad_bias


@_define(calls.Dropout, "dropout(Tensor x, Tensor seed, float p, str backend) -> Tensor", rows=("x",), row_outputs=1)
def dropout(call: calls.Dropout) -> Tensor:
    return call.x.new_empty(call.x.shape)


@_define(
    calls.MergeWeight,
    "merge_weight(Tensor(a!) weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? gain, str axis, str backend) "
    "-> ()",
)
def merge_weight(call: calls.MergeWeight) -> None:
    return None


@_define(calls.GroupRows, "group_rows(Tensor adapter, SymInt adapters, str backend) -> (Tensor order, Tensor starts)")
def group_rows(call: calls.GroupRows) -> tuple[Tensor, Tensor]:
    order = call.adapter.new_empty(call.adapter.shape[0], dtype=torch.int64)
    return order, order.new_empty(call.adapters + 3)


@_define(
    calls.GroupedLora,
    "grouped_lora_fwd(Tensor x, Tensor? weight, Tensor? base, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, "
    "Tensor scaling, Tensor? gain, Tensor order, Tensor starts, Tensor? ranks, bool keep, str backend) "
    "-> (Tensor y, Tensor product, Tensor h)",
    rows=("x", "base"),
    row_outputs=1,
)
def grouped_lora_fwd(call: calls.GroupedLora) -> tuple[Tensor, Tensor, Tensor]:
    x, leading = call.x, call.x.shape[:-1]
    like, tokens = x if call.base is None else call.base, math.prod(leading)
    N, R = call.lora_B[0].shape[-2], max(lora_A.shape[-2] for lora_A in call.lora_A)
    product = like.new_empty((tokens, N) if call.keep else 0)
    return like.new_empty((*leading, N)), product, x.new_empty(tokens, R)


@_define(
    calls.GroupedLoraGrad,
    "grouped_lora_bwd(Tensor grad_y, Tensor? x, Tensor? weight, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, "
    "Tensor? gain, Tensor order, Tensor starts, Tensor? ranks, Tensor? product, Tensor? h, bool need_x, "
    "bool need_base, bool[] need_A, bool[] need_B, bool need_gain, bool need_bias, str backend) "
    "-> (Tensor grad_x, Tensor grad_base, Tensor[] grad_A, Tensor[] grad_B, Tensor grad_gain, Tensor grad_bias)",
    rows=("grad_y", "x"),
    row_outputs=2,
)
def grouped_lora_bwd(call: calls.GroupedLoraGrad) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    grad_y, gain, sums = call.grad_y, call.gain, accumulate_dtype(call.grad_y)
    K = call.lora_A[0].shape[-1]
    grad_x = grad_y.new_empty((*grad_y.shape[:-1], K) if call.need_x else 0)
    grad_base = _like(grad_y, call.need_base and gain is not None)  # else grad_y itself, which an op may not return
    grad_gain = grad_y.new_empty(gain.shape if gain is not None and call.need_gain else 0, dtype=sums)
    grad_bias = grad_y.new_empty(grad_y.shape[-1] if call.need_bias else 0, dtype=sums)
    grad_A, grad_B = _likes(call.lora_A, call.need_A), _likes(call.lora_B, call.need_B)
    return grad_x, grad_base, grad_A, grad_B, grad_gain, grad_bias


@_define(
    calls.GroupedWeightNorm,
    "grouped_weight_norm_fwd(Tensor weight, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, Tensor? ranks, "
    "str backend) -> Tensor norm",
)
def grouped_weight_norm_fwd(call: calls.GroupedWeightNorm) -> Tensor:
    weight = call.weight
    dtype = accumulate_dtype(weight, *call.lora_A, *call.lora_B)
    return weight.new_empty(call.scaling.shape[0], weight.shape[0], dtype=dtype)


@_define(
    calls.GroupedWeightNormGrad,
    "grouped_weight_norm_bwd(Tensor grad, Tensor norm, Tensor weight, Tensor[] lora_A, Tensor[] lora_B, "
    "Tensor scaling, Tensor? ranks, bool[] need_A, bool[] need_B, str backend) -> (Tensor[] grad_A, Tensor[] grad_B)",
)
def grouped_weight_norm_bwd(call: calls.GroupedWeightNormGrad) -> tuple[list[Tensor], list[Tensor]]:
    return _likes(call.lora_A, call.need_A), _likes(call.lora_B, call.need_B)


@_define(
    calls.LoraGlu,
    f"lora_glu_fwd({_GLU}, str backend) -> Tensor output",
)
def lora_glu_fwd(call: calls.LoraGlu) -> Tensor:
    return call.base_gate.new_empty(call.base_gate.shape)


@_define(
    calls.LoraGluGrad,
    f"lora_glu_bwd(Tensor grad, {_GLU}, bool need_output, bool need_gain_gate, bool need_gain_up, "
    "bool need_bias_gate, bool need_bias_up, bool joined, str backend) -> (Tensor grad_bases, Tensor output, "
    "Tensor grad_gain_gate, Tensor grad_gain_up, Tensor grad_bias_gate, Tensor grad_bias_up)",
)
def lora_glu_bwd(call: calls.LoraGluGrad) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, sums = call.grad, accumulate_dtype(call.grad)
    T, N = grad.shape
    needs = call.need_gain_gate, call.need_gain_up, call.need_bias_gate, call.need_bias_up
    gain_gate, gain_up, bias_gate, bias_up = (grad.new_empty(N if need else 0, dtype=sums) for need in needs)
    grad_bases = grad.new_empty((T, 2 * N) if call.joined else (2, T, N))
    return grad_bases, _like(grad, call.need_output), gain_gate, gain_up, bias_gate, bias_up


@_define(
    calls.AdaptedMlp,
    f"adapted_mlp_fwd(Tensor x, {_MLP}, bool keep_bases, bool keep_product, str backend) "
    "-> (Tensor y, Tensor[] bases, Tensor product, Tensor[] h)",
    rows=("x",),
    row_outputs=1,
)
def adapted_mlp_fwd(call: calls.AdaptedMlp) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    x, *_, A_down = call.x, *call.lora_A
    leading, *_, N = call.x.shape[:-1], call.weight[-1].shape[0]
    tokens = math.prod(leading)
    bases = [x.new_empty(tokens, weight.shape[0]) for weight in call.weight[:-1]] if call.keep_bases else []
    product = x.new_empty((tokens, N) if call.keep_product else 0)
    ranks = [lora_A.shape[0] for lora_A in call.lora_A[:-1] if lora_A is not None]
    h = x.new_empty((tokens, sum(ranks)) if ranks else 0)
    h_down = x.new_empty(0 if A_down is None else (tokens, A_down.shape[0]))
    return x.new_empty((*leading, N)), bases, product, [h, h_down]


@_define(
    calls.AdaptedMlpGrad,
    f"adapted_mlp_bwd(Tensor grad_y, Tensor? x, {_MLP}, Tensor[] bases, Tensor? product, Tensor[] h, bool need_x, "
    "bool[] need_A, bool[] need_B, bool[] need_gain, bool[] need_bias, str backend) "
    "-> (Tensor grad_x, Tensor[] grad_A, Tensor[] grad_B, Tensor[] grad_gain, Tensor[] grad_bias)",
    rows=("grad_y", "x"),
    row_outputs=1,
)
def adapted_mlp_bwd(
    call: calls.AdaptedMlpGrad,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    grad_y, sums = call.grad_y, accumulate_dtype(call.grad_y)

    def gradients(tensors: Sequence[Tensor | None], needs: Sequence[bool], dtype: torch.dtype | None) -> list[Tensor]:
        return [
            grad_y.new_empty(0, dtype=sums)
            if tensor is None
            else tensor.new_empty(tensor.shape if need else 0, dtype=dtype)
            for tensor, need in zip(tensors, needs, strict=True)
        ]

    grad_x = grad_y.new_empty((*grad_y.shape[:-1], call.weight[0].shape[1]) if call.need_x else 0)
    factors = gradients(call.lora_A, call.need_A, None), gradients(call.lora_B, call.need_B, None)
    return grad_x, *factors, gradients(call.gain, call.need_gain, sums), gradients(call.bias, call.need_bias, sums)


def _likes(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return list(map(_like, tensors, needed))


def _norm_like(call: calls.WeightNorm | calls.DoraLinear) -> Tensor:
    size = call.weight.shape[0] if call.axis == "output" else call.weight.shape[1]
    return call.weight.new_empty(size, dtype=accumulate_dtype(call.weight, call.lora_A, call.lora_B))


def _quantised_norm_like(call: calls.QuantisedNorm) -> Tensor:
    return call.codes.new_empty(call.codes.shape[0], dtype=accumulate_dtype(call.lora_A, call.lora_B))


def _linear_like(call: calls.LoraLinear | calls.DoraLinear) -> tuple[Tensor, Tensor, Tensor]:
    leading = call.x.shape[:-1]
    tokens, N = math.prod(leading), call.weight.shape[0]
    product = call.x.new_empty((tokens, N) if call.keep != "nothing" else 0)
    return call.x.new_empty((*leading, N)), product, call.x.new_empty(tokens, call.lora_A.shape[0])


def _linear_gradients_like(
    call: calls.LoraLinearGrad | calls.DoraLinearGrad, vector: Tensor | None, need_vector: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``vector``: the gain or the magnitude."""
    grad_y, weight, sums = call.grad_y, call.weight, accumulate_dtype(call.grad_y)
    grad_x = grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1]) if call.need_x else 0)
    grad_vector = grad_y.new_empty(vector.shape if vector is not None and need_vector else 0, dtype=sums)
    grad_bias = grad_y.new_empty(weight.shape[0] if call.need_bias else 0, dtype=sums)
    return grad_x, _like(call.lora_A, call.need_A), _like(call.lora_B, call.need_B), grad_vector, grad_bias


def _like(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if needed else 0)
