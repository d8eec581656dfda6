"""A plain linear, quantised as a library's users do it: for tests, benchmarks and the demo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def nf4(linear: nn.Linear, **options: Any) -> nn.Module:
    """bitsandbytes' Linear4bit; ``options``: compute_dtype, and those of its Params4bit."""
    import bitsandbytes as bnb

    compute_dtype = options.pop("compute_dtype", linear.weight.dtype)
    options = {"quant_type": "nf4", "compress_statistics": False, **options}
    device = linear.weight.device
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype,
        options["compress_statistics"],
        options["quant_type"],
        options.get("quant_storage", torch.uint8),
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=layer, **options)
    layer.bias = linear.bias
    return layer.to(device)  # which quantises


def int8(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' Linear8bitLt."""
    import bitsandbytes as bnb

    bias = linear.bias is not None
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias, has_fp16_weights=False, device="meta")
    layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to(linear.weight.device)


def torchao(linear: nn.Linear, config: Any = None) -> nn.Module:
    """A linear with torchao's weight, by default Int8WeightOnlyConfig's."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(linear)
    quantize_(holder, config or Int8WeightOnlyConfig())
    return holder[0]


def hqq(linear: nn.Linear, **options: Any) -> nn.Module:
    """HQQ's HQQLinear; ``options``: nbits, group_size, axis."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(**{"nbits": 4, "group_size": 64, "axis": 1, **options})
    layer: nn.Module = HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device=str(linear.weight.device))
    return layer


def replace_linears(model: nn.Module, quantise: Callable[[nn.Linear], nn.Module]) -> None:
    """Quantise every linear of ``model``, in place; PEFT then sees what its loading by transformers would leave."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is nn.Linear:
                setattr(module, name, quantise(child.requires_grad_(False)))
    kinds = {type(module).__name__ for module in model.modules()}
    for mark, kind in (("is_loaded_in_4bit", "Linear4bit"), ("is_loaded_in_8bit", "Linear8bitLt")):
        if kind in kinds:
            setattr(model, mark, True)
