"""PEFT's layers over bitsandbytes' linears, with lora_fast's forward. Merging is PEFT's."""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from lora_fast.integrations.peft_layers import OverLinear


class FastLinear4bit(OverLinear, Linear4bit):
    """lora.Linear4bit"""

    peft_type = Linear4bit


class FastLinear8bitLt(OverLinear, Linear8bitLt):
    """lora.Linear8bitLt"""

    peft_type = Linear8bitLt
