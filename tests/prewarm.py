"""Fills Triton's cache with what the GPU commands launch, beside the tests: python tests/prewarm.py [SHARE OF].

Compiles for an H100 (sm_90), without one. ``SHARE`` of ``OF`` processes takes every OF-th call and sweep.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import gpu_cases
import torch
from launch_sweep import Call, make, skipped_products

from lora_fast import backends, check
from lora_fast.benchmarks import gpu_sweeps
from lora_fast.testing import Case
from lora_fast.triton_kernels import constants, prewarm
from lora_fast.triton_kernels.target import SM90


def cases() -> Iterator[Case]:
    """The sizes of ``lora-fast check`` and of tests/test_gpu.py."""
    yield from gpu_cases.CONFIGURED
    few = [replace(check.FEW["cuda"], leading=(T,)) for T in (1, 3, 16, 64)]
    for dtype, case in product(check.DTYPES["cuda"], (check.SMALL, *check.REAL["cuda"], *few)):
        yield replace(case, dtype=dtype)
    for dtype, T in product(check.DTYPES["cuda"][:2], (1, 4, 16, 20, 60, 64, 1000)):
        yield Case((T,), 256, 192, 16, dtype)
    for T in (1, 16):
        yield Case((T,), 1024, 1024, 16, torch.bfloat16)


def calls() -> list[Callable[[], Any]]:
    """What they and :mod:`lora_fast.benchmarks.gpu` call, each once."""
    found = [call for case in cases() for call in gpu_cases.of_case(case)]
    found += [call for case in gpu_cases.AUTOCAST for call in gpu_cases.of_autocast(case)]
    found += [
        partial(make, Call(64, 256, 192, 16, dtype, torch.float32, torch.float32)) for dtype in check.DTYPES["cuda"]
    ]
    found += gpu_cases.of_benchmark()
    return list({(call.func, call.args): call for call in found}.values())


def main() -> None:
    share, of = (int(text) for text in sys.argv[1:3]) if len(sys.argv) > 2 else (0, 1)
    start, mine = time.perf_counter(), calls()[share::of]
    backends.get("triton").takes = lambda device_type: True
    with prewarm.warmed(SM90) as done, skipped_products():

        def told(what: str) -> None:
            print(f"{what}, {len(done)} kernels, {time.perf_counter() - start:.0f} s", flush=True)

        for index, call in enumerate(mine, 1):
            call()
            told(f"{index}/{len(mine)} calls")
        for make_sweep in gpu_sweeps.sweeps()[share::of]:
            sweep = make_sweep()
            # backend "cuda" has nothing to compile, and would not take the CPU's tensors
            beside = [call for others in sweep.others.values() for name, call in others.items() if name != "cuda"]
            for value in ["triton"] if sweep.wall else sweep.values:
                with constants.instead(replace(constants.of(SM90), **{sweep.constant: value})):
                    for call in [*sweep.calls.values(), *beside]:
                        call()
            told(sweep.constant)


if __name__ == "__main__":
    main()
