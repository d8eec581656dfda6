"""Adapters as files: saved, loaded and merged in PEFT's format, without PEFT."""

from lora_fast.adapters.loading import load_adapter
from lora_fast.adapters.saving import save_adapter

__all__ = ["load_adapter", "save_adapter"]
