"""lora_fast inside other libraries' models. Each library is imported when its function is called, not before."""

from lora_fast.integrations.peft import LayerReport, Report, accelerate, restore

__all__ = ["LayerReport", "Report", "accelerate", "restore"]
