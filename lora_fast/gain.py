"""DoRA's gain, made here and nowhere else: g = m / n, and 0 where n = 0."""

from __future__ import annotations

import torch
from torch import Tensor


def dora_gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``m / n`` in the norm's dtype, 0 where n = 0: dividing by infinity gives 0, and finite gradients to both."""
    return divided(magnitude, divisor(norm))


def unrounded(magnitude: Tensor, norm: Tensor) -> Tensor:
    """What ``magnitude``, rounded to 16 bits on its way here, may have been: of all that round to it the nearest to n.

    So a magnitude that is the norm gives gain 1 still. In the norm's dtype; the gradient is the magnitude's.
    """
    rounded, norm = magnitude.detach(), norm.detach()
    wide = rounded.to(norm.dtype)
    below, above = (torch.nextafter(rounded, torch.full_like(rounded, end)) for end in (-torch.inf, torch.inf))
    nearest = norm.clamp((wide + below) / 2, (wide + above) / 2)
    return magnitude.to(norm.dtype) + torch.where(wide.isfinite(), nearest - wide, 0.0)


def divided(magnitude: Tensor, divisor: Tensor) -> Tensor:
    """The gain, where the norm's :func:`divisor` is there already."""
    return magnitude.to(divisor.dtype) / divisor


def divisor(norm: Tensor) -> Tensor:
    """n, and infinity where n = 0."""
    # a norm is positive, zero or NaN, which a threshold leaves alone
    return torch.threshold(norm, 0.0, torch.inf)


def to_gain_dtype(gain: Tensor, dtype: torch.dtype) -> Tensor:
    """For an op whose activations are in ``dtype``: float64 for float64, else float32, however narrow the activation.

    bfloat16 cannot tell gains near 1 apart.
    """
    return gain.to(torch.float64 if dtype == torch.float64 else torch.float32)
