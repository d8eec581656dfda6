"""What a kernel is compiled for, and the cases that are compiled ahead of time in tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Target:
    """A device as the launch configurations see it; ``shared_memory`` is the most bytes that one program may use."""

    backend: str  # "cuda", "hip" or "interpreter"
    arch: int | str
    shared_memory: int
    sms: int


SM80 = Target("cuda", 80, 163 * 1024, 108)
SM90 = Target("cuda", 90, 227 * 1024, 132)
SM100 = Target("cuda", 100, 227 * 1024, 148)
GFX942 = Target("hip", "gfx942", 64 * 1024, 304)
# Programs run one after another, at a cost per operation whatever the tile.
INTERPRETER = Target("interpreter", 0, 1 << 30, 1)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors (TRITON_INTERPRET=1 at import)."""
    return bool(triton.knobs.runtime.interpret)


def current(device: torch.device) -> Target:
    """The target of ``device``; RuntimeError for a device that Triton does not run on."""
    if interpreting():
        return INTERPRETER
    if device.type != "cuda":
        raise RuntimeError(f"Triton kernels run on a GPU, got tensors on {device}")
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _of_gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    shared_memory = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    sms = properties.multi_processor_count
    if torch.version.hip is not None:
        return Target("hip", properties.gcnArchName.split(":")[0], shared_memory, sms)
    return Target("cuda", 10 * properties.major + properties.minor, shared_memory, sms)


@dataclass(frozen=True)
class AotCase:
    """One kernel as a launcher would launch it: what is compiled ahead of time.

    ``signature`` types each argument that is not a constexpr ("*bf16", "i32", "fp32"); ``aligned`` names the
    arguments that are multiples of 16; ``dots`` says that there is a product of 16-bit tiles of at least 64 rows.
    """

    kernel: Any
    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    dots: bool = False
    options: dict[str, Any] = field(default_factory=dict)
