"""x Wᵀ in float32 by oneDNN, PyTorch's other library for products, on processors of which MKL leaves half unused.

MKL takes vectors of 512 bits on Intel's processors alone, oneDNN wherever they are. The operator is the one that
torch.compile puts in the place of F.linear.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lora_fast.backends import extension

KERNEL = "mkldnn._linear_pointwise"
# Elements of a row that oneDNN sums one after another. The RMS error of such a sum grows with the root of its length:
# of rows of 2048 and more it is 2.2 times MKL's, in stretches of 512 1.6 times and of 256 1.15 times.
STRETCH = 256
# Tokens of a product. The sums of more are memory that the system gives anew for each stretch: 2048 tokens of 4096²
# took 1.01 of MKL's time at once, and 0.63 so.
TOKENS = 512
ZEN_5 = 26  # AMD's family of processors


def is_faster() -> bool:
    """Whether oneDNN is faster on this processor, is there and was not turned off (``torch.backends.mkldnn``)."""
    return _has_wider_vectors() and bool(torch.backends.mkldnn.enabled)


@functools.cache
def _has_wider_vectors() -> bool:
    """Whether this processor has full vectors of 512 bits that MKL does not take, and this PyTorch has oneDNN."""
    maker, family = extension.cpu_family()
    return (
        maker == "AuthenticAMD"
        and family >= ZEN_5
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def takes(weight: Tensor) -> bool:
    """Whether its elements are adjacent, in either order; a copy of others would be a weight of its own."""
    return weight.is_contiguous() or weight.T.is_contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, [T, N], of x [T, K] and a W [N, K] that it :func:`takes`, all float32."""
    if x.shape[0] <= TOKENS:
        return _linear(x, weight, bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows, tokens in zip(y.split(TOKENS), x.split(TOKENS), strict=True):
        rows.copy_(_linear(tokens, weight, bias))
    return y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    op = torch.ops.mkldnn._linear_pointwise
    # what is not contiguous takes oneDNN a thousand times as long, but for a transposed matrix
    is_transposed = weight.T.is_contiguous()
    copy = None if is_transposed else weight.new_empty(weight.shape[0], STRETCH)  # one, whose memory is soon at hand
    y: Tensor | None = None
    for x_part, part in zip(x.split(STRETCH, 1), weight.split(STRETCH, 1), strict=True):
        x_part = x_part.contiguous()
        if copy is not None:
            part = copy.copy_(part) if part.shape[1] == STRETCH else part.contiguous()
        y = op(x_part, part, bias, "none", [], "") if y is None else op.binary(x_part, y, part, None, "add")
    assert y is not None
    return y
