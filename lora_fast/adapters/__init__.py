"""Adapters as files: saved in PEFT's format, and read, merged and converted in those of every tool."""

from lora_fast.adapters.converting import convert_adapter
from lora_fast.adapters.inspecting import inspect_adapter
from lora_fast.adapters.loading import load_adapter
from lora_fast.adapters.saving import save_adapter

__all__ = ["convert_adapter", "inspect_adapter", "load_adapter", "save_adapter"]
