"""LoRA and DoRA on a base: its own product, the adapter's after it, and the norm from its rows.

    LoRA   y = x Wᵀ + b + s drop(x) Aᵀ Bᵀ
    DoRA   y = g ⊙ (x Wᵀ + s drop(x) Aᵀ Bᵀ) + b        g = m / ‖W + s B A‖; with axis "input" x ⊙ g takes the place of x

The bias comes last and is never taken off a finished product, which would lose the digits that it covers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lora_fast import checks, functional
from lora_fast.backends import BackendName, quantised, resolved
from lora_fast.bases import ops
from lora_fast.bases.base import Base
from lora_fast.bases.registry import form_of
from lora_fast.calls import Axis
from lora_fast.dtypes import accumulate_dtype
from lora_fast.norm_cache import NormCache
from lora_fast.ops import is_traced


def weight_norm(
    base: Base,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    axis: Axis = "output",
    kept: NormCache | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """As :func:`lora_fast.functional.weight_norm`, of a base's W: [N] or, for axis "input", [K].

    At most 1/16 of W is dequantised at a time, or one block of the format where that is larger.
    """
    N, K = base.shape
    checks.check_number("scaling", scaling)
    checks.check_axis(axis)
    checks.check_lora_B(lora_B, N, lora_A.shape[0])
    checks.check_shape("lora_A", lora_A, (lora_A.shape[0], K), "[R, K]")
    name, content, tensors = resolved(backend), base.content(), None
    if kept is not None:
        size, dtype = (N if axis == "output" else K), accumulate_dtype(lora_A, lora_B)
        tensors = kept.of(*content).tensors(size, dtype, lora_A.device)
    return ops.base_norm(ops.NormOf(content, base.form, lora_A, lora_B, float(scaling), axis), tensors, name)


def dequantised(base: Base) -> Tensor:
    """W [N, K], whole, in the dtype of its rows: for a layer that is to be quantised no longer."""
    return form_of(base.form).rows(base.content(), 0, base.shape[0])


def lora_linear(
    x: Tensor,
    base: Base,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None = None,
    *,
    axis: Axis = "output",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    evaluation: bool = False,
    backend: BackendName = "auto",
) -> Tensor:
    """As :func:`lora_fast.functional.lora_linear`, on a base: [..., N] of x's dtype, autocast's under autocast.

    ``evaluation``: for few tokens a kernel may make the base's product too, where no gradient is wanted. It rounds
    otherwise than the base's own does, and reentrant checkpointing runs a forward in training both ways.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if gain is not None and axis == "input":
        x, gain = (x * gain).to(x.dtype), None
    if evaluation and seed is None:
        y = _few_tokens(x, base, bias, lora_A, lora_B, scaling, gain, backend)
        if y is not None:
            return y
    dropped = x if seed is None else functional.dropout(x, dropout_p, seed, backend=backend)
    product = base.product(x)
    h = F.linear(dropped.to(product.dtype), lora_A.to(product.dtype))
    return functional.lora_compose(product, h, lora_B, scaling, gain, bias, backend=backend)


def _few_tokens(
    x: Tensor,
    base: Base,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
    backend: BackendName,
) -> Tensor | None:
    """y by the kernel for few tokens, if there is one for this call; it has no derivative and is not traced."""
    if is_traced() or forward_ad._current_level >= 0:
        return None
    trained = x, bias, lora_A, lora_B, gain
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in trained):
        return None
    if not quantised.takes(x, lora_A, lora_B, resolved(backend)) or not base.multiplies_rows(x):
        return None
    codes = form_of(base.form).codes(base.content())
    if codes is None:
        return None
    return quantised.lora_linear(x, codes.codes, codes.scale, codes.levels, bias, lora_A, lora_B, scaling, gain)


def dora_linear(
    x: Tensor,
    base: Base,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    *,
    axis: Axis = "output",
    detach_norm: bool = True,
    kept: NormCache | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    evaluation: bool = False,
    backend: BackendName = "auto",
) -> Tensor:
    """As :func:`lora_fast.functional.dora_linear`, on a base; ``evaluation`` as for :func:`lora_linear`."""
    factors = (lora_A.detach(), lora_B.detach()) if detach_norm else (lora_A, lora_B)
    norm = weight_norm(base, *factors, scaling, axis=axis, kept=kept, backend=backend)
    gain = functional.dora_gain(magnitude, norm)
    return lora_linear(
        x,
        base,
        bias,
        lora_A,
        lora_B,
        scaling,
        gain,
        axis=axis,
        dropout_p=dropout_p,
        seed=seed,
        evaluation=evaluation,
        backend=backend,
    )
