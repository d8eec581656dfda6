"""lora_fast inside other libraries' models and trainers. Each library is imported when it is asked for, not before.

:func:`accelerate` and :func:`restore` are for models with PEFT's layers, :class:`LoraFastCallback` for transformers'
Trainer and TRL's, :mod:`lora_fast.integrations.axolotl` and :mod:`lora_fast.integrations.litgpt` for these two.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_fast.integrations.peft import accelerate, restore
from lora_fast.integrations.report import LayerReport, Report

if TYPE_CHECKING:
    from lora_fast.integrations.trainer import LoraFastCallback

__all__ = ["LayerReport", "LoraFastCallback", "Report", "accelerate", "restore"]


def __getattr__(name: str) -> Any:
    """The callback, which is a class of transformers'."""
    if name != "LoraFastCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("lora_fast.integrations.trainer").LoraFastCallback
