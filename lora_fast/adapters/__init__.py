"""Adapters as files: saved in PEFT's format, and read, merged and converted in those of every tool."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_fast.adapters.converting import convert_adapter
    from lora_fast.adapters.inspecting import inspect_adapter
    from lora_fast.adapters.loading import load_adapter
    from lora_fast.adapters.saving import save_adapter

__all__ = ["convert_adapter", "inspect_adapter", "load_adapter", "save_adapter"]

_MODULES = {
    "convert_adapter": "converting",
    "inspect_adapter": "inspecting",
    "load_adapter": "loading",
    "save_adapter": "saving",
}


def __getattr__(name: str) -> Any:
    """One of the functions, imported when it is asked for: the modules of all the formats take time."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
