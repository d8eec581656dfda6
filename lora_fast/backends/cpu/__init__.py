"""C++ kernels for the CPU: the norm, the passes around products and, on AMX, products themselves (csrc/cpu)."""

from __future__ import annotations

from lora_fast.backends import extension
from lora_fast.backends.registry import Backend
from lora_fast.dtypes import FLOATS


class _Cpu(Backend):
    def missing(self) -> str | None:
        return extension.missing()

    def takes(self, device_type: str) -> bool:
        return device_type == "cpu"


BACKEND = _Cpu(__name__, FLOATS)
