"""The specification: dense, plain PyTorch, differentiable by autograd.

    V    = W + s * lora_B @ lora_A
    n    = V.norm(dim=1)                                      # axis="output", [N];  dim=0 for axis="input", [K]
    lora = F.linear(x, W, bias) + s * F.linear(F.linear(drop(x), lora_A), lora_B)
    dora = F.linear(x, (m / n)[:, None] * V, bias)            # axis="input": V * (m / n)[None, :]

Every function computes in float32, or float64 when an input is float64, and returns the activation's dtype.
``compute_dtype`` runs the same formula in another dtype: ``compute_dtype=x.dtype`` is what a user's eager code does,
and its error is the yardstick of the error budget (:mod:`lora_fast.testing`). ``dense`` says whether V is built: the
same function, whose sums are rounded in another order. Fast code never imports this module.

Source: LoRA, arXiv 2106.09685, eq. 3; DoRA, arXiv 2402.09353, eq. 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Axis = Literal["output", "input"]


def _upcast(compute_dtype: torch.dtype | None, *tensors: Tensor | None) -> list[Any]:
    if compute_dtype is None:
        double = any(t is not None and t.dtype == torch.float64 for t in tensors)
        compute_dtype = torch.float64 if double else torch.float32
    return [None if t is None else t.to(compute_dtype) for t in tensors]


def adapted_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``W + s * lora_B @ lora_A``, dense [N, K]."""
    return weight + scaling * (lora_B @ lora_A)


def weight_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    axis: Axis = "output",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``(W + s * lora_B @ lora_A).norm(dim)``: [N] for ``axis="output"``, [K] for ``axis="input"``."""
    weight, lora_A, lora_B = _upcast(compute_dtype, weight, lora_A, lora_B)
    return torch.linalg.vector_norm(adapted_weight(weight, lora_A, lora_B, scaling), dim=1 if axis == "output" else 0)


def dequantised_weight(codes: Tensor, scale: Tensor, levels: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W [N, K] of ``dtype``: value(codes) · scale in float32, rounded once, as lora_fast/calls.py says."""
    if levels is None:
        values = codes.float()
    else:
        values = levels[torch.stack((codes >> 4, codes & 15), dim=2).flatten(1).long()]
    return (values * scale.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)).to(dtype)


def gain_of(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``m / n``, 0 where ``n = 0``."""
    zero = norm == 0
    return torch.where(zero, 0.0, magnitude / torch.where(zero, 1.0, norm))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None = None,
    *,
    dropout_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    dense: bool = False,
) -> Tensor:
    """``gain * (x Wᵀ + s (drop(x) lora_Aᵀ) lora_Bᵀ) + bias``; ``dropout_mask`` [..., K] holds 0 or 1/(1-p)."""
    dtype = x.dtype
    x, weight, bias, lora_A, lora_B, gain = _upcast(compute_dtype, x, weight, bias, lora_A, lora_B, gain)
    if dense:
        scale = None if gain is None else gain[:, None]
        y = _dense_product(x, weight, lora_A, lora_B, scaling, scale, dropout_mask)
    else:
        dropped = x if dropout_mask is None else x * dropout_mask
        y = F.linear(x, weight) + scaling * F.linear(F.linear(dropped, lora_A), lora_B)
        if gain is not None:
            y = y * gain
    return (y if bias is None else y + bias).to(dtype)


def _dense_product(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    scale: Tensor | None,
    dropout_mask: Tensor | None,
) -> Tensor:
    """``x (scale ⊙ V)ᵀ``; with a mask the adapter's part of V sees the masked input."""
    if dropout_mask is None:
        V = adapted_weight(weight, lora_A, lora_B, scaling)
        return F.linear(x, V if scale is None else scale * V)
    delta = scaling * (lora_B @ lora_A)
    if scale is not None:
        weight, delta = scale * weight, scale * delta
    return F.linear(x, weight) + F.linear(x * dropout_mask, delta)


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
    dropout_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    dense: bool = True,
) -> Tensor:
    """``x ((m / n) V)ᵀ + bias`` with ``V = W + s * lora_B @ lora_A`` built densely.

    With a ``dropout_mask`` the adapter's branch sees the masked input, as in :func:`lora_linear`. Without ``dense`` the
    gain scales the output (axis "input": the input) of :func:`lora_linear`, and only the norm builds V.
    """
    dtype = x.dtype
    x, weight, bias, lora_A, lora_B, magnitude, norm = _upcast(
        compute_dtype, x, weight, bias, lora_A, lora_B, magnitude, norm
    )
    if norm is None:
        norm = weight_norm(weight, lora_A, lora_B, scaling, axis=axis, compute_dtype=weight.dtype)
        norm = norm.detach() if detach_norm else norm
    gain = gain_of(magnitude, norm)
    if dense:
        scale = gain[:, None] if axis == "output" else gain[None, :]
        y = _dense_product(x, weight, lora_A, lora_B, scaling, scale, dropout_mask)
        return (y if bias is None else y + bias).to(dtype)
    if axis == "output":
        given, scale_output = x, gain
    else:
        given, scale_output = x * gain, None
    options: dict[str, Any] = {"dropout_mask": dropout_mask, "compute_dtype": weight.dtype}
    return lora_linear(given, weight, bias, lora_A, lora_B, scaling, scale_output, **options).to(dtype)


def lora_compose(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``gain * (base + s h lora_Bᵀ) + bias`` for a base product that someone else computed."""
    dtype = base.dtype
    base, h, lora_B, gain, bias = _upcast(compute_dtype, base, h, lora_B, gain, bias)
    y = base + scaling * F.linear(h, lora_B)
    if gain is not None:
        y = y * gain
    return (y if bias is None else y + bias).to(dtype)


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    gain: Tensor | None,
    adapter: Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`lora_linear` of each row x[t] with adapter a = ``adapter[t]``, −1 being none.

    x [T, K]; of L adapters lora_A: [R_a, K] each, lora_B: [N, R_a] each, scaling: a number each, gain [L, N] or None.
    """
    wide_x, wide_weight = _upcast(compute_dtype, x, weight)
    base = F.linear(wide_x, wide_weight)
    options = {"compute_dtype": compute_dtype}
    return grouped_lora_compose(base, x, lora_A, lora_B, scaling, gain, bias, adapter, **options).to(x.dtype)


def grouped_lora_compose(
    base: Tensor,
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    gain: Tensor | None,
    bias: Tensor | None,
    adapter: Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The same of a base product [T, N] that someone else computed."""
    dtype, count = base.dtype, len(lora_A)
    base, x, gain, bias, *factors = _upcast(compute_dtype, base, x, gain, bias, *lora_A, *lora_B)
    y = base
    for a, (A, B, s) in enumerate(zip(factors[:count], factors[count:], scaling, strict=True)):
        v = base + s * F.linear(F.linear(x, A), B)
        y = torch.where((adapter == a)[:, None], v if gain is None else v * gain[a], y)
    return (y if bias is None else y + bias).to(dtype)


def grouped_weight_norm(
    weight: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """[L, N]: :func:`weight_norm` of each adapter."""
    each = zip(lora_A, lora_B, scaling, strict=True)
    return torch.stack([weight_norm(weight, A, B, s, compute_dtype=compute_dtype) for A, B, s in each])


def adapted_mlp(
    x: Tensor,
    gate: Mapping[str, Any],
    up: Mapping[str, Any] | None,
    down: Mapping[str, Any],
    activation: str = "silu",
    *,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    dense: bool = True,
) -> Tensor:
    """``down(act(gate(x)) * up(x))``; a ``mask``, bool [..., I], times 1 / (1 - dropout_p), scales down's input.

    Each linear has the arguments of :func:`dora_linear` by name; without a magnitude it is :func:`lora_linear`, without
    lora_A ``F.linear``. With ``up=None`` gate's output has up's behind its own. ``activation`` is
    "silu", "gelu" or "gelu_tanh".
    """
    dtype, linears = x.dtype, [gate, down] if up is None else [gate, up, down]
    tensors = [value for linear in linears for value in linear.values() if isinstance(value, Tensor)]
    x = _upcast(compute_dtype, x, *tensors)[0]
    outputs = [_adapted_linear(x, linear, dense) for linear in linears[:-1]]
    z_gate, z_up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
    if activation == "silu":
        a = F.silu(z_gate) * z_up
    else:
        a = F.gelu(z_gate, approximate="none" if activation == "gelu" else "tanh") * z_up
    if mask is not None:
        a = a * mask / (1.0 - dropout_p) if dropout_p < 1.0 else a * 0.0
    return _adapted_linear(a, down, dense).to(dtype)


def _adapted_linear(x: Tensor, linear: Mapping[str, Any], dense: bool) -> Tensor:
    """Computed in x's dtype."""
    given = {name: value for name, value in linear.items() if value is not None}
    if "lora_A" not in given:
        weight, bias = _upcast(x.dtype, given["weight"], given.get("bias"))
        return F.linear(x, weight, bias)
    options: dict[str, Any] = {"bias": None, "dense": dense, "compute_dtype": x.dtype} | given
    if "magnitude" in given:
        return dora_linear(x, **options)
    options.pop("detach_norm", None)
    return lora_linear(x, **options)


def merge_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None = None,
    *,
    axis: Axis = "output",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """``gain * (W + s * lora_B @ lora_A)``, returned as a new tensor of the weight's dtype."""
    dtype = weight.dtype
    weight, lora_A, lora_B, gain = _upcast(compute_dtype, weight, lora_A, lora_B, gain)
    merged = adapted_weight(weight, lora_A, lora_B, scaling)
    if gain is not None:
        merged = merged * (gain[:, None] if axis == "output" else gain[None, :])
    return merged.to(dtype)
