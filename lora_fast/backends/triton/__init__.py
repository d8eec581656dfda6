"""Triton kernels for GPUs (triton_kernels), and for CPU tensors in Triton's interpreter."""

from __future__ import annotations

import functools
import importlib
import os
import sys

import torch

from lora_fast.backends.registry import Backend
from lora_fast.dtypes import UP_TO_FLOAT32

_NOT_OF_THE_LAUNCH = (
    "out of memory",
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "assert",
)


class _Triton(Backend):
    keeps = "base"

    @functools.cache  # noqa: B019 (there is one such object, for as long as the process)
    def missing(self) -> str | None:
        try:
            importlib.import_module("lora_fast.triton_kernels.target")
        except Exception as error:  # a broken installation raises anything
            return f"triton could not be imported: {error}"
        return None

    def untried(self) -> str | None:
        return None if torch.version.hip is None else "nobody has run 'triton' on ROCm, where it has to be named"

    def takes(self, device_type: str) -> bool:
        return device_type == "cuda" or (_interpreting() and self.missing() is None)

    def is_launch_failure(self, error: Exception) -> bool:
        """Whether Triton could not compile, load or launch: whatever its own code raises, but what a kernel that ran
        has left behind."""
        return _raised_in_triton(error) and not any(text in str(error) for text in _NOT_OF_THE_LAUNCH)


def _raised_in_triton(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return "triton" in (raised_in.split(".")[0], type(error).__module__.split(".")[0])


def _interpreting() -> bool:
    # these two ways lead to the interpreter; who takes neither, on a CPU, does not wait for Triton's import
    if "triton" not in sys.modules and "TRITON_INTERPRET" not in os.environ:
        return False
    return importlib.import_module("lora_fast.triton_kernels.target").interpreting()


BACKEND = _Triton(__name__, UP_TO_FLOAT32)
