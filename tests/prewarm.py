"""Fills Triton's cache with what the GPU commands launch, beside the tests: python tests/prewarm.py [SHARE OF].

Compiles for an H100 (sm_90), without one. ``SHARE`` of ``OF`` processes takes every OF-th call and sweep.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from launch_sweep import Call, make, skipped_products

from lora_fast import check
from lora_fast.benchmarks import gpu_sweeps
from lora_fast.triton_kernels import constants, prewarm
from lora_fast.triton_kernels.target import SM90


def calls() -> Iterator[Call]:
    """The sizes of :mod:`lora_fast.benchmarks.gpu`, of ``lora-fast check`` and of tests/test_gpu.py."""
    for T, N, K, R in (
        (8192, 4096, 4096, 16), (8192, 4096, 4096, 384), (8192, 8192, 8192, 384), (16, 4096, 4096, 16),
        (1, 4096, 4096, 16), (8192, 4096, 1024, 16), (512, 4096, 4096, 16), (8192, 8192, 8192, 16),
        (16, 8192, 28672, 384), (16, 4096, 4096, 64), (8192, 14336, 4096, 32),
    ):  # fmt: skip
        yield Call(T, N, K, R)
        yield Call(T, N, K, R, adapter=check.torch.float32)
    for T in (256, 16):  # a PEFT model: float32 adapters
        for N, K in ((2048, 2048), (5632, 2048), (2048, 5632)):
            yield Call(T, N, K, 16, adapter=check.torch.float32)
    for dtype in check.DTYPES["cuda"]:
        few = [replace(check.FEW["cuda"], leading=(T,)) for T in (1, 3, 16, 64)]
        for case in (check.SMALL, *check.REAL["cuda"], *few):
            for dropout_p in (0.0, 0.3):
                for axis in ("output", "input"):
                    yield Call(*case.leading, case.N, case.K, case.R, dtype, dtype, dtype, axis, dropout_p)
    for T in (1, 4, 16, 20, 60, 64, 1000):
        for dtype in check.DTYPES["cuda"][:2]:
            for axis in ("output", "input"):
                for dropout_p in (0.0, 0.5):
                    yield Call(T, 256, 192, 16, dtype, dtype, dtype, axis, dropout_p)
    for T in (16, 2048):
        for R in (16, 384):
            for axis in ("output", "input"):
                yield Call(T, 4096, 4096, R, axis=axis)


def main() -> None:
    share, of = (int(text) for text in sys.argv[1:3]) if len(sys.argv) > 2 else (0, 1)
    start, mine = time.perf_counter(), list(dict.fromkeys(calls()))[share::of]
    with prewarm.warmed(SM90) as done, skipped_products():

        def told(what: str) -> None:
            print(f"{what}, {len(done)} kernels, {time.perf_counter() - start:.0f} s", flush=True)

        for index, call in enumerate(mine, 1):
            make(call)
            told(f"{index}/{len(mine)} calls")
        for make_sweep in gpu_sweeps.sweeps()[share::of]:
            sweep = make_sweep()
            for value in () if sweep.wall else sweep.values:
                with constants.instead(replace(constants.of(SM90), **{sweep.constant: value})):
                    for call in sweep.calls.values():
                        call()
            told(sweep.constant)


if __name__ == "__main__":
    main()
