"""CUDA kernels (csrc/cuda): the norm, the passes around cuBLAS's products, and few tokens in two launches."""

from __future__ import annotations

import torch

from lora_fast.backends import extension
from lora_fast.backends.registry import Backend
from lora_fast.dtypes import UP_TO_FLOAT32

# What the runtime says of a kernel that this device or driver does not run.
_LAUNCH_FAILURES = (
    "no kernel image is available",
    "device kernel image is invalid",
    "provided PTX was compiled with an unsupported toolchain",
    "too many resources requested for launch",
    "invalid device function",
    "invalid configuration argument",
    "driver version is insufficient",
)


class _Cuda(Backend):
    keeps = "base"

    def missing(self) -> str | None:
        loaded, reason, build = extension.status()
        if not loaded:
            return reason
        if build["kind"] != "cuda":
            return "lora_fast._C was built without CUDA kernels (LORA_FAST_BUILD=cuda demands them)"
        return None

    def untried(self) -> str | None:
        return None if torch.version.hip is None else "nobody has run 'cuda' on ROCm, where it has to be named"

    def takes(self, device_type: str) -> bool:
        return device_type == "cuda"

    def is_launch_failure(self, error: Exception) -> bool:
        return isinstance(error, RuntimeError) and any(text in str(error) for text in _LAUNCH_FAILURES)


BACKEND = _Cuda(__name__, UP_TO_FLOAT32)
