"""PEFT's layer over HQQ's linear, with lora_fast's forward."""

from __future__ import annotations

from peft.tuners.lora.hqq import HqqLoraLinear

from lora_fast.integrations.peft_layers import OverLinear


class FastHqqLoraLinear(OverLinear, HqqLoraLinear):
    """HqqLoraLinear"""

    peft_type = HqqLoraLinear

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's; RuntimeError for a base with a bias, which it would lose."""
        if self.base_layer.bias is not None:
            raise RuntimeError(
                "merge: PEFT would make HQQ's layer anew without its bias; keep the adapter unmerged, or load the base "
                "unquantised and merge the adapter into that"
            )
        super().merge(safe_merge, adapter_names)
