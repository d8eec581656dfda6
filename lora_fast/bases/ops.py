"""The ops on a base's content: the norm from blocks of its rows, the norm's gradients, and dy W.

They are opaque to torch.compile, and take what a base is made of, since its rows are made inside: ``content`` are the
plain tensors and ``form`` says how (:mod:`lora_fast.bases.base`). Rows are made for a block at a time, at most 1/16 of
W where a block of the format is no larger, and go to the ops of :mod:`lora_fast.ops`; codes go to the kernels that
dequantise them as they are read. The norm comes from the direct sum. From lora_A Wᵀ, which the layer's own product
could make, a row that W and the update cancel in would be wrong by a fifth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_fast import calls, norm_cache, ops
from lora_fast.bases import key
from lora_fast.bases.base import Base, Form
from lora_fast.bases.registry import form_of
from lora_fast.calls import Axis
from lora_fast.dtypes import accumulate_dtype

BLOCK_ROWS = 256  # at most; fewer in a small W
SHARE = 16  # of W, at most one of which is dequantised at a time
_FACTORS = "Tensor[] content, str form, Tensor lora_A, Tensor lora_B, float scaling, str axis"

_library = torch.library.Library("lora_fast", "FRAGMENT")


class NormOf(NamedTuple):
    """‖W + s lora_B lora_A‖ of a W that is made of ``content`` as ``form`` says: what the ops on it have in common."""

    content: list[Tensor]
    form: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    axis: Axis

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, W[rows]), a block at a time."""
        form = form_of(self.form)
        for rows in _blocks(form):
            yield rows, form.rows(self.content, rows.start, rows.stop)


def _define(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Define ``schema``, whose ``fake`` is given; the decorated function is its kernel, below autograd and autocast.

    Its name is then that of what runs it: at once where nobody would see the op (:func:`lora_fast.ops.is_watched`).
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"lora_fast::{name}", fake)

    def register(kernel: Callable) -> Callable:
        operator = getattr(torch.ops.lora_fast, name).default
        at = [argument.name for argument in operator._schema.arguments].index("content")

        def run(*arguments: Any) -> object:
            if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
                with torch.no_grad(), ops.outside_autocast(arguments[at][0]):
                    return kernel(*arguments)
            return kernel(*arguments)

        def called(*arguments: Any) -> object:
            is_plain = all(type(tensor) is Tensor and not tensor.is_meta for tensor in arguments[at])
            return operator(*arguments) if ops.is_watched() or not is_plain else run(*arguments)

        _library.impl(name, run, "CompositeExplicitAutograd")
        return called

    return register


def _blocks(form: Form) -> Iterator[slice]:
    """The rows of W, a block at a time."""
    rows, step = form.shape[0], form.row_step
    count = min(BLOCK_ROWS, rows // SHARE) // step * step
    count = max(count, step)
    for start in range(0, rows, count):
        yield slice(start, min(start + count, rows))


def _norm(of: NormOf, backend: str, kept: tuple[Tensor, Tensor] | tuple[()] = ()) -> Tensor:
    _, _, lora_A, lora_B, scaling, axis = of
    if axis == "output" and (codes := form_of(of.form).codes(of.content)) is not None:
        call = calls.QuantisedNorm(*codes, lora_A, lora_B, scaling, *kept)
        return ops.quantised_norm(call, backend)
    norms = [
        ops.weight_norm(calls.WeightNorm(weight, lora_A, lora_B[rows].contiguous(), scaling, axis), backend)
        for rows, weight in of.blocks()
    ]
    if axis == "output":
        return torch.cat(norms)
    while len(norms) > 1:  # by twos, whose rounding errors do not grow with the number of parts; without overflow
        norms = [
            torch.hypot(*pair) if len(pair) == 2 else pair[0]
            for pair in (norms[i : i + 2] for i in range(0, len(norms), 2))
        ]
    return norms[0]


def _norm_like(*arguments: Any) -> Tensor:
    of = NormOf(*arguments[:6])
    size = of.lora_B.shape[0] if of.axis == "output" else of.lora_A.shape[1]
    return of.lora_A.new_empty(size, dtype=accumulate_dtype(of.lora_A, of.lora_B))


@_define(f"base_norm_fwd({_FACTORS}, str backend) -> Tensor norm", _norm_like)
def base_norm_fwd(*arguments: Any) -> Tensor:
    *of, backend = arguments
    return _norm(NormOf(*of), backend)


@_define(
    f"base_norm_kept({_FACTORS}, Tensor(a!) kept_norm, Tensor(b!) kept_key, str backend) -> Tensor norm", _norm_like
)
def base_norm_kept(*arguments: Any) -> Tensor:
    *fields, kept_norm, kept_key, backend = arguments
    of = NormOf(*fields)
    if of.lora_A.device.type != "cpu":  # the kernel looks itself, so that the host need not wait
        return _norm(of, backend, (kept_norm, kept_key))
    now = key.content_key(*of)
    return _norm(of, backend) if now is None else norm_cache.reuse(kept_norm, kept_key, now, lambda: _norm(of, backend))


def _factors_like(grad: Tensor, norm: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *of, need_A, need_B, _ = arguments
    lora_A, lora_B = NormOf(*of).lora_A, NormOf(*of).lora_B
    return lora_A.new_empty(lora_A.shape if need_A else 0), lora_B.new_empty(lora_B.shape if need_B else 0)


@_define(
    f"base_norm_bwd(Tensor grad, Tensor norm, {_FACTORS}, bool need_A, bool need_B, str backend) "
    "-> (Tensor grad_A, Tensor grad_B)",
    _factors_like,
)
def base_norm_bwd(grad: Tensor, norm: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, need_A, need_B, backend = arguments
    of = NormOf(*fields)
    lora_A, lora_B, per_row = of.lora_A, of.lora_B, of.axis == "output"
    sums = accumulate_dtype(lora_A, lora_B)
    grad_A = torch.zeros(lora_A.shape if need_A else 0, dtype=sums, device=lora_A.device)
    grad_B = lora_B.new_empty(lora_B.shape if need_B else 0)
    wide_A = lora_A.to(sums)  # so that its gradients of the blocks are not rounded before they are added up
    for rows, weight in of.blocks():
        call = calls.WeightNormGrad(
            grad[rows] if per_row else grad,
            norm[rows] if per_row else norm,
            weight,
            wide_A,
            lora_B[rows].contiguous(),
            of.scaling,
            of.axis,
            need_A,
            need_B,
        )
        of_A, of_B = ops.weight_norm_bwd(call, backend)
        if need_A:
            grad_A += of_A
        if need_B:
            grad_B[rows] = of_B
    return grad_A.to(lora_A.dtype), grad_B


def _input_like(grad_y: Tensor, content: list[Tensor], form: str) -> Tensor:
    return grad_y.new_empty(*grad_y.shape[:-1], form_of(form).shape[1])


@_define("base_input_grad(Tensor grad_y, Tensor[] content, str form) -> Tensor grad_x", _input_like)
def base_input_grad(grad_y: Tensor, content: list[Tensor], form: str) -> Tensor:
    """dy W [..., K], its sum over blocks of rows in float32."""
    parsed = form_of(form)
    flat = grad_y.reshape(-1, grad_y.shape[-1])
    sums = torch.zeros(flat.shape[0], parsed.shape[1], dtype=accumulate_dtype(flat), device=flat.device)
    for rows in _blocks(parsed):
        sums.addmm_(flat[:, rows].to(sums.dtype), parsed.rows(content, rows.start, rows.stop).to(sums.dtype))
    return sums.to(grad_y.dtype).view(*grad_y.shape[:-1], parsed.shape[1])


class BaseNormFunction(torch.autograd.Function):
    """norm = ‖W + s lora_B lora_A‖ of a base, with gradients to lora_A and lora_B."""

    @staticmethod
    def forward(ctx, lora_A, lora_B, content, form, scaling, axis, kept, backend):  # type: ignore[no-untyped-def]
        norm = _forward(NormOf(content, form, lora_A, lora_B, scaling, axis), kept, backend)
        ctx.save_for_backward(norm.clone(), lora_A, lora_B, *content)
        ctx.form, ctx.scaling, ctx.axis, ctx.backend = form, scaling, axis, backend
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        norm, lora_A, lora_B, *content = ctx.saved_tensors
        need_A, need_B, *_ = ctx.needs_input_grad
        of = content, ctx.form, lora_A, lora_B, ctx.scaling, ctx.axis
        grad_A, grad_B = base_norm_bwd(grad, norm, *of, need_A, need_B, ctx.backend)
        return grad_A if need_A else None, grad_B if need_B else None, *(None,) * 6


def _forward(of: NormOf, kept: tuple[Tensor, Tensor] | None, backend: str) -> Tensor:
    return base_norm_fwd(*of, backend) if kept is None else base_norm_kept(*of, *kept, backend)


def base_norm(of: NormOf, kept: tuple[Tensor, Tensor] | None, backend: str) -> Tensor:
    """The norm, recorded by autograd where lora_A or lora_B wants a gradient."""
    if torch.is_grad_enabled() and (of.lora_A.requires_grad or of.lora_B.requires_grad):
        content, form, lora_A, lora_B, *others = of
        return BaseNormFunction.apply(lora_A, lora_B, content, form, *others, kept, backend)
    return _forward(of, kept, backend)


class StraightThroughFunction(torch.autograd.Function):
    """y is the layer's own, which passes no gradient to x; the gradient is that of x Wᵀ, dy W."""

    @staticmethod
    def forward(ctx, x, layer_product, form, *content):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*content)
        ctx.form = form
        return layer_product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        content = list(ctx.saved_tensors)  # read once: checkpointing does not unpack them twice
        return base_input_grad(grad_y, content, ctx.form), None, None, *(None,) * len(content)


def straight_through(x: Tensor, base: Base, layer_product: Callable[[Tensor], Tensor]) -> Tensor:
    """``layer_product(x)`` with the gradient of x Wᵀ."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return layer_product(x)
    return StraightThroughFunction.apply(x, layer_product, base.form, *base.content())
