"""Peaks of this process's resident memory, as Linux counts it."""

from __future__ import annotations

import contextlib
import ctypes
import gc

from lora_fast.benchmarks.memory import CLEAR, STATUS


class Resident:
    """How far resident memory rises over what it was when this was made; nothing is known where Linux is not."""

    def __init__(self) -> None:
        self.begin()
        self._before = _bytes("VmRSS")

    def begin(self) -> None:
        """The peak begins anew, after malloc has given back its free memory."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")

    def rise(self) -> int | None:
        """Bytes of the peak since the last :meth:`begin`, over the size when this was made."""
        peak = _bytes("VmHWM")
        return None if peak is None or self._before is None else peak - self._before


def _bytes(name: str) -> int | None:
    """The field of /proc/self/status, which has lines like `VmRSS:  1234 kB`."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
