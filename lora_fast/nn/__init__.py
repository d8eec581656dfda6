"""Adapted linears as modules, and the functions that put them into a model."""

from lora_fast.nn.apply import ParameterCount, apply, count_parameters, trainable_parameters
from lora_fast.nn.linear import LinearWithDoRA, LinearWithLoRA
from lora_fast.nn.norms import freeze_norms, invalidate_norms, unfreeze_norms

__all__ = [
    "LinearWithDoRA",
    "LinearWithLoRA",
    "ParameterCount",
    "apply",
    "count_parameters",
    "freeze_norms",
    "invalidate_norms",
    "trainable_parameters",
    "unfreeze_norms",
]
