"""The public functions: validate, resolve the backend, call.

    lora = F.linear(x, W, bias) + s * F.linear(F.linear(x, lora_A), lora_B)
    V    = W + s * lora_B @ lora_A                               # never built
    n    = V.norm(dim=1)                                         # dim=0 for axis="input"
    dora = F.linear(x, (m / n)[:, None] * V, bias)               # V * (m / n)[None, :] for axis="input"

Shapes: x [..., K]  weight [N, K]  lora_A [R, K]  lora_B [N, R]  bias [N]; norm, gain and magnitude [N] for
axis="output", [K] for axis="input". Weights may have any strides. x and weight share a dtype (or run under autocast);
lora_A, lora_B, bias, gain and magnitude may each have their own. All tensors are on one device. Gradients go to
every tensor but the weight, which is frozen. Sources: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353.

All functions raise TypeError for wrong types and dtypes, ValueError for wrong shapes, devices and values, and
RuntimeError when a backend that was asked for is not there, before anything is computed or changed. Where the rows of
one batch have adapters of their own: :mod:`lora_fast.grouped`. A whole gated MLP: :mod:`lora_fast.mlp`.
"""

from __future__ import annotations

from lora_fast.gain import dora_gain
from lora_fast.grouped import group_rows, grouped_lora_compose, grouped_lora_linear, grouped_weight_norm
from lora_fast.linears import dora_linear, draw_seed, dropout, lora_compose, lora_linear, merge_weight, weight_norm
from lora_fast.mlp import RECOMPUTE, Product, Projection, Recompute, adapted_mlp, mlp_of_products

__all__ = [
    "RECOMPUTE",
    "Product",
    "Projection",
    "Recompute",
    "adapted_mlp",
    "dora_gain",
    "dora_linear",
    "draw_seed",
    "dropout",
    "group_rows",
    "grouped_lora_compose",
    "grouped_lora_linear",
    "grouped_weight_norm",
    "lora_compose",
    "lora_linear",
    "merge_weight",
    "mlp_of_products",
    "weight_norm",
]
