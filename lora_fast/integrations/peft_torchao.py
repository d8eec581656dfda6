"""PEFT's layer over a linear with one of torchao's weights, with lora_fast's forward."""

from __future__ import annotations

from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge

from lora_fast.integrations import peft_names
from lora_fast.integrations.peft_layers import OverLinear


class FastTorchaoLoraLinear(OverLinear, TorchaoLoraLinear):
    """TorchaoLoraLinear"""

    peft_type = TorchaoLoraLinear

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, which merges LoRA; RuntimeError for DoRA, whose magnitude it would leave out."""
        names = check_adapters_to_merge(self, adapter_names)
        left_out = [name for name in names if name in self.lora_A and peft_names.is_dora(self, name)]
        if left_out:
            raise RuntimeError(
                f"merge: PEFT merges the DoRA adapter {left_out[0]!r} into torchao's weight without its magnitude, "
                "as if it were LoRA; keep it unmerged, or load the base unquantised and merge the adapter into that"
            )
        super().merge(safe_merge, adapter_names)
