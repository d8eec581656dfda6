"""The process's own memory, as the system counts it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

from .runner import Step

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def available_bytes() -> int:
    """What can be had without swapping, on the default device; effectively unlimited where the system does not tell."""
    if torch.get_default_device().type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable") or 1 << 62


def resident_growth(step: Step) -> int | None:
    """By how much one call raises the peak of the resident size over the size before it; None where Linux is not.

    The allocator gives back its free memory first, so that what the call touches shows.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR.write_text("5")  # sets the peak to the present size
    except OSError:
        return None
    before = _kibibytes(STATUS, "VmRSS")
    step()
    after = _kibibytes(STATUS, "VmHWM")
    return None if before is None or after is None else max(0, after - before)


def _kibibytes(path: Path, name: str) -> int | None:
    """The field of a file of lines like `VmRSS:  1234 kB`, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
