"""The C++ kernels as processors with other instruction sets run them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

ISAS = [
    pytest.param("amx", marks=pytest.mark.amx),
    pytest.param("avx512_bf16", marks=pytest.mark.avx512_bf16),
    pytest.param("vectors", marks=pytest.mark.native),
]


@contextmanager
def limited_to(isa: str) -> Iterator[None]:
    """The C++ kernels of a processor with AMX ("amx"), with AVX512-BF16 and no AMX, or with neither ("vectors")."""
    from lora_fast import _C

    before = _C.amx_enabled(), _C.avx512_bf16_enabled()
    _C.allow_amx(isa == "amx")
    _C.allow_avx512_bf16(isa == "avx512_bf16")
    yield
    _C.allow_amx(before[0])
    _C.allow_avx512_bf16(before[1])
