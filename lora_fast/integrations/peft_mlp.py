"""What PEFT's linears give to a gated MLP that runs as one (:mod:`lora_fast.nn.mlp`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_fast.functional import Product, Projection
from lora_fast.gain import unrounded
from lora_fast.integrations import peft_names
from lora_fast.integrations.peft_names import Adapter
from lora_fast.nn.mlp import Part


def part(layer: Any, x: Tensor) -> Part | None:
    """Of a layer of lora_fast's with one active adapter; None for a call that is unusual in any way."""
    if peft_names.has_hooks(layer):  # names of samples come by a hook
        return None
    if layer._lora_fast.forward_names.of_call(None, training=layer.training) is not None:
        return None
    names = [] if peft_names.is_plain(layer) else peft_names.active(layer)
    if len(names) != 1 or peft_names.obstacle(layer, names) is not None or peft_names.gathering(layer, names):
        return None
    if peft_names.calls_base(layer) or layer._is_left_to_peft(x) or not (layer._fits(x) and layer._takes(x)):
        return None
    adapter = peft_names.adapter(layer, names[0])
    if peft_names.dropout_p(layer, adapter) > 0.0:
        return None
    if layer._product_dtype(x, adapter) != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    return Part(lambda: _made(layer, adapter), is_adapted=True)


def obstacle(layer: Any) -> str | None:
    """What keeps ``layer`` out, whatever the call; what FSDP has not gathered yet does not."""
    names = [name for name in peft_names.active(layer) if name in peft_names.available(layer)]
    reasons = [
        peft_names.layer_obstacle(layer, gathers=True),
        *(peft_names.adapter_obstacle(layer, name, gathers=True) for name in names),
        "its own call gathers its weights" if peft_names.gathering(layer, names) else None,
        "its base layer has to be called" if peft_names.calls_base(layer) else None,
    ]
    return next((reason for reason in reasons if reason is not None), None)


def _made(layer: Any, adapter: Adapter) -> Projection | Product:
    _, lora_A, lora_B, scaling, *_, magnitude, _, _ = adapter
    if (base := peft_names.quantised_base(layer)) is not None:
        bias = peft_names.bias_with(base.bias, adapter)
        return Product(base.product, bias, lora_A, lora_B, scaling, layer._gain(adapter))
    weight, bias = peft_names.base_weight(layer), peft_names.bias_with(peft_names.base_bias(layer), adapter)
    factors = weight, bias, lora_A, lora_B, scaling
    if magnitude is not None and layer._rounds(adapter):
        norm = layer._norm(adapter)
        return Projection(*factors, unrounded(magnitude, norm), norm)
    return Projection(*factors, magnitude, kept=None if magnitude is None else layer._kept(adapter.name))
