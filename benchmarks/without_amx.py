"""The same processor with AMX turned off: a kind of processor of its own, with results of its own.

One switch turns it off in the whole process: the environment variable of oneDNN, which makes PyTorch's products and
reads it once when the process starts. lora_fast's kernels follow it in the benchmarks. Results then name the device
"… without AMX", so that no figure is taken for the other's.
"""

from __future__ import annotations

import os
import sys

from lora_fast.backends import extension

VARIABLE, WITHOUT_AMX = "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"
WITHOUT_BF16 = frozenset(("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"))


def turn_off() -> None:
    """Start this process anew with the variable set, unless it is."""
    if os.environ.get(VARIABLE) != WITHOUT_AMX:
        os.environ[VARIABLE] = WITHOUT_AMX
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def follow() -> None:
    """lora_fast's kernels take AMX and AVX512-BF16 only where oneDNN may. Every benchmark calls this first."""
    if VARIABLE in os.environ and extension.missing() is None:
        extension.module().allow_amx(False)
        if os.environ[VARIABLE] in WITHOUT_BF16:
            extension.module().allow_avx512_bf16(False)


def used() -> bool:
    """Whether the kernels use AMX here, by which the targets of the benchmarks differ."""
    return extension.missing() is None and extension.amx_enabled()


def suffix() -> str:
    """For the device's name, what was turned off in it; PyTorch's half or ours alone is no kind of processor."""
    limit = os.environ.get(VARIABLE)
    if limit is None:
        allowed = extension.missing() is not None or extension.amx_enabled() or "amx_bf16" not in _features()
        return "" if allowed else " with AMX turned off in lora_fast alone"
    if used():
        return f" with {VARIABLE}={limit} and lora_fast's own AMX"
    return " without AMX" if limit == WITHOUT_AMX else f" with {VARIABLE}={limit}"


def _features() -> list[str]:
    return extension.module().cpu_features()
