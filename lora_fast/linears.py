"""The functions for one linear with one adapter: validate, resolve the backend, call.

The equations and shapes are those of :mod:`lora_fast.functional`, where they are public.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fast import calls, checks, ops
from lora_fast.autograd import (
    DoraLinearFunction,
    DropoutFunction,
    LoraComposeFunction,
    LoraLinearFunction,
    WeightNormFunction,
    apply,
)
from lora_fast.backends import BackendName, kept_by, operators, resolved
from lora_fast.calls import Axis, Kept
from lora_fast.dtypes import accumulate_dtype
from lora_fast.gain import dora_gain, to_gain_dtype
from lora_fast.norm_cache import NormCache
from lora_fast.recording import as_bias, cast, recorded, wants_grad


def draw_seed(device: torch.device | str) -> Tensor:
    """``torch.randint(0, 2**63 - 1, (), device=device)``: a dropout seed from the device's default generator.

    ``torch.manual_seed``, activation checkpointing, ``torch.compile`` and CUDA graphs govern it as any random number.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def weight_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    axis: Axis = "output",
    kept: NormCache | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """``(W + s * lora_B @ lora_A).norm(dim=1)``, or ``dim=0`` for ``axis="input"``, without building the sum.

    Args:
        weight: [N, K], frozen. lora_A: [R, K]. lora_B: [N, R]. scaling: Python float s.
        axis: "output" gives one norm per output row, as in the paper's code and PEFT; "input" one per input column.
        kept: a layer's :class:`~lora_fast.norm_cache.NormCache`; the norm is then computed only if the content of the
            arguments has changed since the last call with it.

    Returns:
        [N] or [K], float32 (float64 when an input is float64), differentiable in lora_A and lora_B.
        A zero row has norm 0 and a zero gradient; NaN and Inf are carried through.

    Source: DoRA, arXiv 2402.09353, eq. 5 (the denominator).
    """
    checks.check_adapter(weight, lora_A, lora_B, scaling)
    checks.check_frozen(weight)
    checks.check_axis(axis)
    name = resolved(backend)  # or it raises, before the kept norm of another weight is forgotten
    kept_tensors = _kept_tensors(kept, weight, lora_A, lora_B, axis)
    call = calls.WeightNorm(weight, lora_A, lora_B, float(scaling), axis, *kept_tensors)
    if recorded(lora_A, lora_B):
        return apply(WeightNormFunction, *call, name)[0]
    return ops.weight_norm(call, name)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """``gain * (F.linear(x, W) + s * F.linear(F.linear(drop(x), lora_A), lora_B)) + bias``.

    Args:
        x: [..., K], of the weight's dtype, or of any under autocast. weight: [N, K], frozen, any strides.
        bias: [N] or None. lora_A: [R, K]. lora_B: [N, R]. scaling: Python float s.
        gain: [N] or None: None is LoRA; ``gain = m / n`` is DoRA. float32 is kept float32 whatever x's dtype.
        dropout_p: in [0, 1]; acts on the adapter's branch only, with the mask that ``seed`` (int64 scalar tensor,
            :func:`draw_seed`) determines; the mask is made again in backward, not kept.

    Returns:
        [..., N] of x's dtype (autocast's under autocast). Kept for backward: x and, if gain wants a grad, one [..., N].

    Source: LoRA, arXiv 2106.09685, eq. 3; DoRA, arXiv 2402.09353, eq. 5.
    """
    if not checks.are_usual(x, weight, bias, lora_A, lora_B, scaling, gain, dropout_p):
        checks.check_adapter(weight, lora_A, lora_B, scaling)
        checks.check_frozen(weight)
        checks.check_activation("x", x, weight.shape[1], "[..., K]", weight)
        checks.check_optional_vector("bias", bias, weight.shape[0], "[N]", weight.device)
        checks.check_optional_vector("gain", gain, weight.shape[0], "[N]", weight.device)
        checks.check_dropout(dropout_p, seed)
        x = cast(x, weight)
    drop = _dropout(dropout_p, seed)
    call = calls.LoraLinear(x, weight, bias, lora_A, lora_B, float(scaling), gain, "output", *drop, "nothing")
    return _lora_linear(call, backend)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    *,
    axis: Axis = "output",
    norm: Tensor | None = None,
    detach_norm: bool = True,
    kept: NormCache | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """``F.linear(x, (m / n)[:, None] * V, bias)`` with ``V = W + s * lora_B @ lora_A`` and ``n = V.norm(dim=1)``.

    ``axis="input"`` is the other convention, ``F.linear(x, V * (m / n)[None, :], bias)`` with ``n = V.norm(dim=0)``.

    Args:
        x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed: as for :func:`lora_linear`.
        magnitude: m, [N] for axis "output", [K] for "input". The gain m / n is 0 where n is 0.
        norm: n, if it is known already; its gradient is followed unless ``detach_norm``.
        detach_norm: the norm is a constant in backward (the paper's section 4.3, and PEFT); False: the full gradient.
        kept: as for :func:`weight_norm`; used when ``norm`` is None, and not where making the norm costs less than to
            tell whether a kept one holds.

    Returns:
        [..., N] of x's dtype (autocast's under autocast).

    Source: DoRA, arXiv 2402.09353, eq. 5 and section 4.3.
    """
    is_default = axis == "output" and norm is None and magnitude is not None
    if not is_default or not checks.are_usual(x, weight, bias, lora_A, lora_B, scaling, magnitude, dropout_p):
        checks.check_adapter(weight, lora_A, lora_B, scaling)
        checks.check_frozen(weight)
        checks.check_axis(axis)
        checks.check_activation("x", x, weight.shape[1], "[..., K]", weight)
        checks.check_optional_vector("bias", bias, weight.shape[0], "[N]", weight.device)
        size, terms = (weight.shape[0], "[N]") if axis == "output" else (weight.shape[1], "[K]")
        checks.check_tensor("magnitude", magnitude)
        checks.check_optional_vector("magnitude", magnitude, size, terms, weight.device)
        checks.check_optional_vector("norm", norm, size, terms, weight.device)
        checks.check_dropout(dropout_p, seed)
        x = cast(x, weight)
    if norm is not None:
        gain = dora_gain(magnitude, norm.detach() if detach_norm else norm)
        given = (x, weight, bias, lora_A, lora_B, float(scaling), gain, axis)
        return _lora_linear(calls.LoraLinear(*given, *_dropout(dropout_p, seed), "nothing"), backend)
    given = (x, weight, as_bias(bias, x.dtype), lora_A, lora_B, float(scaling), magnitude, axis)
    name = resolved(backend)  # or it raises, before the kept norm of another weight is forgotten
    wants_gain = wants_grad(magnitude) or (not detach_norm and wants_grad(lora_A, lora_B))
    keep = _keep(name, x, axis, gain_wants_grad=wants_gain)
    kept_tensors = _kept_tensors(kept, weight, lora_A, lora_B, axis)
    call = calls.DoraLinear(*given, *_dropout(dropout_p, seed), keep, *kept_tensors)
    if recorded(x, lora_A, lora_B, magnitude, bias):
        return apply(DoraLinearFunction, *call, detach_norm, name)[0]
    return ops.dora_linear_fwd(call, name)[0]


def lora_compose(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    backend: BackendName = "auto",
) -> Tensor:
    """``gain * (base + s * F.linear(h, lora_B)) + bias``: the second half of :func:`lora_linear`.

    For a base product x Wᵀ (without bias) that someone else computed: a quantised layer, a sharded layer.

    Args:
        base: [..., N]. h: x lora_Aᵀ, [..., R], leading dimensions as base's. lora_B: [N, R]. scaling: Python float s.
        gain: [N] or None. bias: [N] or None.

    Returns:
        [..., N] of base's dtype; base is not changed. Kept for backward: h and, if gain requires grad, one [..., N]: on
        a GPU base itself, which may then not be written in place before backward, as PyTorch checks.
    """
    checks.check_tensor("base", base)
    if base.dim() == 0 or base.shape[-1] == 0:
        raise ValueError(f"base: got shape {list(base.shape)}, expected [..., N] with N of at least 1")
    checks.check_tensor("h", h)
    if h.dim() == 0 or h.shape[-1] == 0:
        raise ValueError(f"h: got shape {list(h.shape)}, expected [..., R] with a rank R of at least 1")
    N, R = base.shape[-1], h.shape[-1]
    checks.check_shape("h", h, (*base.shape[:-1], R), "[..., R] with base's leading sizes")
    checks.check_device("h", h, base.device, "base")
    checks.check_lora_B(lora_B, N, R)
    checks.check_device("lora_B", lora_B, base.device, "base")
    checks.check_number("scaling", scaling)
    checks.check_optional_vector("gain", gain, N, "[N]", base.device)
    checks.check_optional_vector("bias", bias, N, "[N]", base.device)
    gain, bias = _as_gain(gain, base.dtype), as_bias(bias, base.dtype)
    name = resolved(backend)
    keep = _keep(name, base, "output", gain_wants_grad=wants_grad(gain))
    call = calls.LoraCompose(base, h, lora_B, float(scaling), gain, bias, keep)
    if recorded(base, h, lora_B, gain, bias):
        return apply(LoraComposeFunction, *call, name)[0]
    return ops.lora_compose_fwd(call, name)[0]


def dropout(x: Tensor, p: float, seed: Tensor, *, backend: BackendName = "auto") -> Tensor:
    """``x * mask / (1 - p)`` with the mask that :func:`lora_linear` draws from ``seed``; the mask is not kept.

    Args:
        x: [..., K], K at least 1. p: in [0, 1]. seed: int64 scalar tensor (:func:`draw_seed`).
    """
    checks.check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: got shape [], expected [..., K]")
    checks.check_dropout(p, seed)
    if p == 0.0:
        return x
    call, name = calls.Dropout(x, seed, float(p)), resolved(backend)
    return apply(DropoutFunction, *call, name) if recorded(x) else ops.dropout(call, name)


def merge_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None = None,
    *,
    axis: Axis = "output",
    backend: BackendName = "auto",
) -> None:
    """``weight.copy_(gain * (W + s * lora_B @ lora_A))``, in place and in tiles, rounded once to the weight's dtype.

    Args:
        weight: [N, K], any strides, overwritten. lora_A: [R, K]. lora_B: [N, R]. scaling: Python float s.
        gain: [N] (axis "output") or [K] (axis "input"), or None.
    """
    checks.check_adapter(weight, lora_A, lora_B, scaling)
    checks.check_axis(axis)
    size, terms = (weight.shape[0], "[N]") if axis == "output" else (weight.shape[1], "[K]")
    checks.check_optional_vector("gain", gain, size, terms, weight.device)
    gain = _as_gain(gain, accumulate_dtype(weight, lora_A, lora_B))
    call = calls.MergeWeight(weight, lora_A, lora_B, float(scaling), gain, axis)
    with torch.no_grad():
        ops.merge_weight(call, resolved(backend))


def _lora_linear(call: calls.LoraLinear, backend: BackendName) -> Tensor:
    """Of checked arguments, with a gain on either side."""
    name = resolved(backend)
    if operators.take(call, name):
        return operators.lora_linear(call)
    x, gain, bias = call.x, call.gain, call.bias
    if gain is not None or bias is not None:
        gain, bias = _as_gain(gain, x.dtype), as_bias(bias, x.dtype)
        keep = _keep(name, x, call.axis, gain_wants_grad=wants_grad(gain))
        call = call._replace(gain=gain, bias=bias, keep=keep)
    if recorded(x, call.lora_A, call.lora_B, gain, bias):
        return apply(LoraLinearFunction, *call, name)[0]
    return ops.lora_linear_fwd(call, name)[0]


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[float, Tensor | None]:
    return float(dropout_p), seed if dropout_p > 0.0 else None


def _kept_tensors(
    kept: NormCache | None, weight: Tensor, lora_A: Tensor, lora_B: Tensor, axis: Axis
) -> tuple[Tensor | None, Tensor | None]:
    """The kept norm and its key, or nothing."""
    if kept is None:
        return None, None
    size = weight.shape[0] if axis == "output" else weight.shape[1]
    dtype = accumulate_dtype(weight, lora_A, lora_B)
    return kept.of(weight).tensors(size, dtype, weight.device) or (None, None)


def _keep(backend: str, activation: Tensor, axis: Axis, *, gain_wants_grad: bool) -> Kept:
    """What backward needs for the gain's gradient; an input's gain has it from x."""
    if not gain_wants_grad or axis == "input":
        return "nothing"
    return kept_by(backend, activation.device.type, activation.dtype.itemsize > 2)


def _as_gain(gain: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As every backend takes it: contiguous, in float64 for an op in float64 alone, else in float32."""
    return None if gain is None else to_gain_dtype(gain, dtype).contiguous()
