"""The contract: each op's schema, its kernel (which calls the backend's module) and its fake, one after the other.

Shapes: x [..., K]  weight [N, K]  lora_A [R, K]  lora_B [N, R]  bias [N]  gain, norm [N] or, for axis "input", [K].
``backend`` is a resolved name ("torch", "cpu", …), never "auto". Outputs that were not asked for are empty tensors.
Everything here is below autograd (:mod:`lora_fast.autograd`) and below validation (:mod:`lora_fast.functional`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_fast import backends
from lora_fast.dtypes import accumulate_dtype

_library = torch.library.Library("lora_fast", "DEF")


def _define(schema: str) -> Callable[[Callable], Callable]:
    """Define ``schema`` and register the decorated function as its only kernel."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def register(kernel: Callable) -> Callable:
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        return kernel

    return register


def _outside_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """The ops choose their dtypes themselves: an ambient autocast must not recast the products inside."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _norm_like(weight: Tensor, lora_A: Tensor, lora_B: Tensor, axis: str) -> Tensor:
    size = weight.shape[0] if axis == "output" else weight.shape[1]
    return weight.new_empty(size, dtype=accumulate_dtype(weight, lora_A, lora_B))


@_define(
    "weight_norm_fwd(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str axis, str backend) -> Tensor norm"
)
def _weight_norm_fwd(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, axis: str, backend: str) -> Tensor:
    with _outside_autocast(weight):
        return backends.module(backend).weight_norm_fwd(weight, lora_A, lora_B, scaling, axis)


@torch.library.register_fake("lora_fast::weight_norm_fwd")
def _(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, axis: str, backend: str) -> Tensor:
    return _norm_like(weight, lora_A, lora_B, axis)


@_define(
    "weight_norm_kept(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str axis, "
    "Tensor(a!) kept_norm, Tensor(b!) kept_key, str backend) -> Tensor norm"
)
def _weight_norm_kept(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    axis: str,
    kept_norm: Tensor,
    kept_key: Tensor,
    backend: str,
) -> Tensor:
    with _outside_autocast(weight):
        return backends.module(backend).weight_norm_kept(weight, lora_A, lora_B, scaling, axis, kept_norm, kept_key)


@torch.library.register_fake("lora_fast::weight_norm_kept")
def _(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    axis: str,
    kept_norm: Tensor,
    kept_key: Tensor,
    backend: str,
) -> Tensor:
    return _norm_like(weight, lora_A, lora_B, axis)


@_define(
    "weight_norm_bwd(Tensor grad, Tensor norm, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str axis, "
    "bool need_A, bool need_B, str backend) -> (Tensor grad_A, Tensor grad_B)"
)
def _weight_norm_bwd(
    grad: Tensor,
    norm: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    axis: str,
    need_A: bool,
    need_B: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with _outside_autocast(weight):
        return backends.module(backend).weight_norm_bwd(
            grad, norm, weight, lora_A, lora_B, scaling, axis, need_A, need_B
        )


@torch.library.register_fake("lora_fast::weight_norm_bwd")
def _(
    grad: Tensor,
    norm: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    axis: str,
    need_A: bool,
    need_B: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _grad_like(lora_A, need_A), _grad_like(lora_B, need_B)


@_define(
    "lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, Tensor? gain, "
    "str axis, float dropout_p, Tensor? seed, bool keep_product, str backend) -> (Tensor y, Tensor product, Tensor h)"
)
def _lora_linear_fwd(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with _outside_autocast(x):
        return backends.module(backend).lora_linear_fwd(
            x, weight, bias, lora_A, lora_B, scaling, gain, axis, dropout_p, seed, keep_product
        )


@torch.library.register_fake("lora_fast::lora_linear_fwd")
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    product = torch.empty_like(y) if keep_product else x.new_empty(0)
    h = x.new_empty((*x.shape[:-1], lora_A.shape[0]))
    return y, product, h


@_define(
    "dora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor magnitude, Tensor(a!)? kept_norm, Tensor(b!)? kept_key, bool keep_product, str backend) "
    "-> (Tensor y, Tensor product, Tensor h, Tensor norm)"
)
def _dora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    kept_norm: Tensor | None,
    kept_key: Tensor | None,
    keep_product: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For the arguments that :func:`lora_fast.backends.fuses_norm` names; its backward is lora_linear_bwd."""
    with _outside_autocast(x):
        return backends.module(backend).dora_linear_fwd(
            x, weight, bias, lora_A, lora_B, scaling, magnitude, kept_norm, kept_key, keep_product
        )


@torch.library.register_fake("lora_fast::dora_linear_fwd")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    kept_norm: Tensor | None,
    kept_key: Tensor | None,
    keep_product: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    product = torch.empty_like(y) if keep_product else x.new_empty(0)
    h = x.new_empty((*x.shape[:-1], lora_A.shape[0]))
    return y, product, h, _norm_like(weight, lora_A, lora_B, "output")


@_define(
    "lora_linear_bwd(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor? gain, str axis, Tensor? product, Tensor? h, float dropout_p, Tensor? seed, bool[] needs, str backend) "
    "-> (Tensor grad_x, Tensor grad_A, Tensor grad_B, Tensor grad_gain, Tensor grad_bias)"
)
def _lora_linear_bwd(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _outside_autocast(grad_y):
        return backends.module(backend).lora_linear_bwd(
            grad_y, x, weight, lora_A, lora_B, scaling, gain, axis, product, h, dropout_p, seed, needs
        )


@torch.library.register_fake("lora_fast::lora_linear_bwd")
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_x, need_A, need_B, need_gain, need_bias = needs
    grad_x = grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1]) if need_x else 0)
    sums = accumulate_dtype(grad_y)
    grad_gain = grad_y.new_empty(gain.shape if gain is not None and need_gain else 0, dtype=sums)
    grad_bias = grad_y.new_empty(weight.shape[0] if need_bias else 0, dtype=sums)
    return grad_x, _grad_like(lora_A, need_A), _grad_like(lora_B, need_B), grad_gain, grad_bias


@_define(
    "lora_compose_fwd(Tensor base, Tensor h, Tensor lora_B, float scaling, Tensor? gain, Tensor? bias, "
    "bool keep_product, str backend) -> (Tensor y, Tensor product)"
)
def _lora_compose_fwd(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    bias: Tensor | None,
    keep_product: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with _outside_autocast(base):
        return backends.module(backend).lora_compose_fwd(base, h, lora_B, scaling, gain, bias, keep_product)


@torch.library.register_fake("lora_fast::lora_compose_fwd")
def _(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    bias: Tensor | None,
    keep_product: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    y = base.new_empty(base.shape)
    return y, torch.empty_like(y) if keep_product else base.new_empty(0)


@_define(
    "lora_compose_bwd(Tensor grad_y, Tensor h, Tensor lora_B, float scaling, Tensor? gain, Tensor? product, "
    "bool[] needs, str backend) "
    "-> (Tensor grad_base, Tensor grad_h, Tensor grad_B, Tensor grad_gain, Tensor grad_bias)"
)
def _lora_compose_bwd(
    grad_y: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    product: Tensor | None,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _outside_autocast(grad_y):
        return backends.module(backend).lora_compose_bwd(grad_y, h, lora_B, scaling, gain, product, needs)


@torch.library.register_fake("lora_fast::lora_compose_bwd")
def _(
    grad_y: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    product: Tensor | None,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_base, need_h, need_B, need_gain, need_bias = needs
    sums = accumulate_dtype(grad_y)
    # without a gain the base's gradient is grad_y itself, which an op may not return
    grad_base = grad_y.new_empty(grad_y.shape if need_base and gain is not None else 0)
    grad_gain = grad_y.new_empty(gain.shape if gain is not None and need_gain else 0, dtype=sums)
    grad_bias = grad_y.new_empty(grad_y.shape[-1] if need_bias else 0, dtype=sums)
    return grad_base, _grad_like(h, need_h), _grad_like(lora_B, need_B), grad_gain, grad_bias


@_define("dropout(Tensor x, Tensor seed, float p, str backend) -> Tensor")
def _dropout(x: Tensor, seed: Tensor, p: float, backend: str) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return backends.module(backend).dropout(rows, seed, p).view(x.shape)


@torch.library.register_fake("lora_fast::dropout")
def _(x: Tensor, seed: Tensor, p: float, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@_define(
    "merge_weight(Tensor(a!) weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? gain, str axis, str backend) "
    "-> ()"
)
def _merge_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, gain: Tensor | None, axis: str, backend: str
) -> None:
    with _outside_autocast(weight):
        backends.module(backend).merge_weight(weight, lora_A, lora_B, scaling, gain, axis)


@torch.library.register_fake("lora_fast::merge_weight")
def _(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, gain: Tensor | None, axis: str, backend: str
) -> None:
    return None


def _grad_like(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if needed else 0)
