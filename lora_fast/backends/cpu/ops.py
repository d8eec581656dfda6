"""The contract met by the C++ kernels, which :mod:`lora_fast.backends.cpu.plan` chooses among."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_fast import calls, norm_cache
from lora_fast.backends import dora, extension, grouped
from lora_fast.backends.cpu import glu, grouped as passes_of_groups, onednn
from lora_fast.backends.mlp import Mlps
from lora_fast.backends.passes import Gradients, Passes
from lora_fast.backends.plan import Plan, may_keep_norm
from lora_fast.content_key import host_key

_c = extension.operators()


def weight_norm_fwd(call: calls.WeightNorm, plan: Plan) -> Tensor:
    factors = call.weight, call.lora_A, call.lora_B, call.scaling, call.axis == "output"
    if plan.kernel("norm") == "weight_norm_kept":
        return _c.weight_norm_kept(*factors, call.kept_norm, call.kept_key, call.weight._version)
    return _c.weight_norm_fwd(*factors)


def quantised_norm_fwd(call: calls.QuantisedNorm, plan: Plan) -> Tensor:
    codes, *_, lora_A, lora_B, scaling, kept_norm, kept_key = call
    if kept_norm is None or kept_key is None or not may_keep_norm(call):
        return _c.quantised_norm_fwd(*call[:7])
    host = host_key(codes, lora_A, lora_B, scaling, call.dtype, codes._version, *call.others)
    key = _c.content_key_of(lora_A, lora_B, [codes, *call.others], host)
    return norm_cache.reuse(kept_norm, kept_key, key, lambda: _c.quantised_norm_fwd(*call[:7]))


def weight_norm_bwd(call: calls.WeightNormGrad, plan: Plan) -> tuple[Tensor, Tensor]:
    factors = call.weight, call.lora_A, call.lora_B, call.scaling, call.axis == "output"
    return _c.weight_norm_bwd(call.grad, call.norm, *factors, call.need_A, call.need_B)


def merge_weight(call: calls.MergeWeight, plan: Plan) -> None:
    _c.merge_weight(call.weight, call.lora_A, call.lora_B, call.scaling, call.gain, call.axis == "output")


def lora_linear_fwd(call: calls.LoraLinear, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    if plan.where_B_is_zero is not None and _c.is_zero(call.lora_B.contiguous()):
        plan = plan.where_B_is_zero
    native = _FORWARDS.get(plan.kernel("y"))
    if native is None:
        return _passes.lora_linear_fwd(call, plan)
    gain = call.gain
    if gain is None and native is _c.lora_linear_fwd:
        gain = call.weight.new_ones(call.weight.shape[0], dtype=torch.float32)
    return native_fwd(native, call, gain, _wide(call.bias))


def lora_linear_bwd(call: calls.LoraLinearGrad, plan: Plan) -> Gradients:
    if "gradients" not in plan.steps:
        return _passes.lora_linear_bwd(call, plan)
    native = _c.lora_linear_small_bwd if plan.kernel("gradients") == "lora_linear_small_bwd" else _c.lora_linear_bwd
    return native(
        call.grad_y.contiguous(),
        None if call.x is None else call.x.contiguous(),
        call.weight,
        call.lora_A.contiguous(),
        call.lora_B.contiguous(),
        call.scaling,
        None if call.gain is None else call.gain.contiguous(),
        call.product,
        call.h,
        call.need_x,
        call.need_A,
        call.need_B,
        call.need_gain,
        call.need_bias,
    )


def dora_linear_fwd(call: calls.DoraLinear, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if "y, norm" not in plan.steps:
        return dora.dora_linear_fwd(call, plan, weight_norm_fwd, lora_linear_fwd)
    norm = call.weight.new_empty(call.weight.shape[0], dtype=torch.float32)
    vectors, kept_norm, kept_key = (call.magnitude.float(), _wide(call.bias), norm), call.kept_norm, call.kept_key
    # made in the product's pass, the norm costs less in training than to tell whether a kept one holds
    if call.keep == "product" or not may_keep_norm(call):
        kept_norm = kept_key = None
    if plan.kernel("y, norm") == "dora_linear_small_fwd":
        version = -1 if kept_key is None else call.weight._version
        return *native_fwd(_c.dora_linear_small_fwd, call, *vectors, kept_norm, kept_key, version), norm
    if kept_norm is None:
        return *native_fwd(_c.dora_linear_fwd, call, *vectors, False), norm
    key = _c.content_key(call.weight, call.lora_A, call.lora_B, call.scaling, True, call.weight._version)
    known = _c.load_kept_norm(kept_norm, kept_key, key, norm)
    forward = native_fwd(_c.dora_linear_fwd, call, *vectors, known)
    if not known:
        _c.keep_norm(kept_norm, kept_key, key, norm)
    return *forward, norm


def dora_linear_bwd(call: calls.DoraLinearGrad, plan: Plan) -> Gradients:
    return dora.dora_linear_bwd(call, plan, weight_norm_bwd, lora_linear_bwd)


def native_fwd(
    native: Callable[..., Tensor],
    call: calls.LoraLinear | calls.DoraLinear,
    gain: Tensor | None,
    bias: Tensor | None,
    *norm: Tensor | bool | int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, product, h) by a native forward, which takes ``gain`` (or the magnitude), ``bias`` and ``norm`` so."""
    y = call.x.new_empty(call.x.shape[0], call.weight.shape[0])
    product = torch.empty_like(y) if call.keep == "product" else None
    factors = call.lora_A.contiguous(), call.lora_B.contiguous(), call.scaling
    gain = None if gain is None else gain.contiguous()
    h = native(call.x.contiguous(), call.weight, *factors, gain, bias, y, product, *norm)
    return y, y.new_empty(0) if product is None else product, h


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


_FORWARDS = {"lora_linear_small_fwd": _c.lora_linear_small_fwd, "lora_linear_fwd": _c.lora_linear_fwd}
_passes = Passes(_c.lora_compose_fwd, _c.lora_gain_bwd, _c.dropout, {onednn.KERNEL: onednn.linear})
lora_compose_fwd = _passes.lora_compose_fwd
lora_compose_bwd = _passes.lora_compose_bwd
dropout = _passes.dropout

lora_glu_fwd = glu.lora_glu_fwd
lora_glu_bwd = glu.lora_glu_bwd
_mlps = Mlps(lora_glu_fwd, lora_glu_bwd, _c.lora_compose_fwd, _c.lora_gain_bwd, {onednn.KERNEL: onednn.linear})
adapted_mlp_fwd = _mlps.adapted_mlp_fwd
adapted_mlp_bwd = _mlps.adapted_mlp_bwd

_grouped = grouped.Linears(
    passes_of_groups.Passes(), {onednn.KERNEL: onednn.linear, "lora_linear_small_fwd": passes_of_groups.in_parts}
)
group_rows = passes_of_groups.group_rows
grouped_lora_bwd = _grouped.grouped_lora_bwd
grouped_weight_norm_fwd = passes_of_groups.grouped_weight_norm_fwd


def grouped_lora_fwd(call: calls.GroupedLora, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    if plan.kernel("y") == "grouped_linear_small_fwd":
        return passes_of_groups.few_tokens_fwd(call)
    return _grouped.grouped_lora_fwd(call, plan)


def grouped_weight_norm_bwd(call: calls.GroupedWeightNormGrad, plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
    return grouped.norm_gradients(call, plan, weight_norm_bwd)
