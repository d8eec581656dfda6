"""What a gated linear unit's gate passes through, and its derivative, in float32.

    silu       z σ(z)                                         σ(z) + z σ(z) σ(-z)
    gelu       z Φ(z),  Φ(z) = (1 + erf(z/√2)) / 2            Φ(z) + z exp(-z²/2) / √(2π)
    gelu_tanh  z σ(2u),  u = √(2/π) (z + 0.044715 z³)         σ(2u) + 2 z σ(2u) σ(-2u) √(2/π) (1 + 0.134145 z²)

The last is z (1 + tanh u) / 2. No form overflows, and none takes a difference of numbers near 1 but Φ, as PyTorch has
it: of a finite z both results are finite. Of ±inf they are PyTorch's: +inf passes, and whatever is inf · 0 is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoids(x):
    """(σ(x), σ(-x))"""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def _share(z, ACTIVATION: tl.constexpr):
    """(the share of z that passes, the derivative of the share times z)"""
    if ACTIVATION == "silu":
        share, rest = _sigmoids(z)
        rise = z * (share * rest)
    elif ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        rise = z * (tl.exp(-0.5 * (z * z)) * 0.3989422804014327)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        share, rest = _sigmoids(z * (1.5957691216057308 + 0.07135481627260025 * (z * z)))
        # a square that overflowed would meet a 0 here
        square = tl.minimum(z * z, 1e30)
        rise = z * (share * rest * (1.5957691216057308 + 0.21406444881780076 * square))
    return share, rise


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    share, _ = _share(z, ACTIVATION)
    return z * share


@triton.jit
def activated_with_slope(z, ACTIVATION: tl.constexpr):
    """(the activation, its derivative)"""
    share, rise = _share(z, ACTIVATION)
    return z * share, share + rise
