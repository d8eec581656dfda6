"""acc + a b, float32 sums: the step of a product whose contraction a loop walks.

a [M, K] and b [K, N] of one dtype. 16-bit operands go to the tensor cores, which go on from acc. In float32, never in
TF32, a thread adds one product after another: those of a step are summed apart, so that rounding errors grow with the
number of steps and not with the contraction, as a library's do.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot_add(a, b, acc):
    if a.dtype == tl.float32:
        # without a bound on inexact sums the compiler would fold the addition into the product
        acc += tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=16)
    else:
        acc = tl.dot(a, b, acc)
    return acc
