"""Which constants hold for the GPU at hand. No part of what `import lora_fast` loads: the constants take 5 ms."""

from __future__ import annotations

import functools

import torch

from lora_fast.triton_kernels import constants


def constants_of(device: torch.device) -> constants.Constants:
    """The constants of a GPU, which the kernels of all of its backends take."""
    return constants.of_capability(_capability(device))


@functools.cache
def _capability(device: torch.device) -> int | None:
    """Ten times the compute capability; None for a GPU that is not NVIDIA's, and where there is none."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
