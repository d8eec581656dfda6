"""Frozen layers that are no plain torch.nn.Linear: what an adapter needs of them, one module per library.

Norm and merging need W, the product does not. A base (:class:`Base`) gives rows of W, dequantised a block at a time,
and the layer's own product without the bias. A plain torch.nn.Linear is none of them: its weight is a tensor that the
kernels of :mod:`lora_fast.functional` read.

To add a format: a module with a Base and a Form, and its class in :mod:`lora_fast.bases.registry` (docs/quantised.md).
"""

from lora_fast.bases.base import Base, Form
from lora_fast.bases.linear import dequantised, dora_linear, lora_linear, weight_norm
from lora_fast.bases.registry import find, is_quantised, of, refusal

__all__ = [
    "Base",
    "Form",
    "dequantised",
    "dora_linear",
    "find",
    "is_quantised",
    "lora_linear",
    "of",
    "refusal",
    "weight_norm",
]
