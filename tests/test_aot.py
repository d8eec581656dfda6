"""Every Triton kernel compiled ahead of time for GPUs that are not here: `make aot`.

Held: each configuration that a launcher would choose compiles, spills nothing, fits into shared memory and uses the
tensor cores. Not held, since nothing runs: that it computes the right thing (`make interp`) and how fast (`make gpu`).
"""

from __future__ import annotations

import os
import re
from types import ModuleType

import pytest

pytest.importorskip("triton")
import triton
import triton.language as tl

from lora_fast.triton_kernels import aot
from lora_fast.triton_kernels.target import SM80, SM90, SM100, AotCase, Target

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels decorated for the interpreter cannot be compiled", allow_module_level=True)

TARGETS = {"sm_80": SM80, "sm_90": SM90, "sm_100": SM100}
CASES = [
    pytest.param(target, case, id=f"{name}-{case.name}")
    for name, target in TARGETS.items()
    for case in aot.cases(target)
]


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize(("target", "case"), CASES)
def test_compiles(target: Target, case: AotCase) -> None:
    assert aot.faults(case, target) == []


def test_every_kernel_is_named_by_a_case() -> None:
    """Of some target: a kernel may be for the newer ones only."""
    cases = [case for target in TARGETS.values() for case in aot.cases(target)]
    assert aot.kernels_without_a_case(aot.modules(), cases) == []


@triton.jit
def doubled(x):
    return 2 * x


@triton.jit
def spilling_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs[:, None] * SIZE + offs[None, :])
    tl.store(y_ptr + offs, tl.sum(doubled(x) / tl.sum(x, 0)[None, :], 1))


@triton.jit
def dot_kernel(x_ptr, y_ptr, STEPS: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    square = offs[:, None] * SIZE + offs[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(STEPS):
        x = tl.load(x_ptr + step * SIZE * SIZE + square)
        total = tl.dot(x, tl.load(y_ptr + step * SIZE * SIZE + square), total)
    tl.store(y_ptr + square, total.to(y_ptr.dtype.element_ty))


@triton.jit
def forgotten_kernel(x_ptr):
    tl.store(x_ptr, doubled(tl.load(x_ptr)))


def case_of(kernel: object, dtype: str = "*bf16", **options) -> AotCase:
    constexprs = {"SIZE": 128, **({"STEPS": 8} if kernel is dot_kernel else {}), **options.pop("constexprs", {})}
    return AotCase(kernel, "under test", {"x_ptr": dtype, "y_ptr": dtype}, constexprs, ("x_ptr", "y_ptr"), **options)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_sound_kernel_passes(target: Target) -> None:
    assert aot.faults(case_of(dot_kernel, dots=True, num_stages=2), target) == []


def test_a_spilling_kernel_is_caught() -> None:
    case = case_of(spilling_kernel, "*fp32", num_warps=1)
    (fault,) = aot.faults(case, SM90)
    assert re.search(r"spills: .*STACK:[1-9]", fault)
    assert "STL" in aot.compile_case(case, SM90).asm["sass"]  # stores to local memory, in its machine code


def test_an_oversized_kernel_is_caught() -> None:
    (fault,) = aot.faults(case_of(dot_kernel, num_stages=6, num_warps=8), SM90)
    assert "bytes of shared memory, there are 232448" in fault


def test_a_dot_without_tensor_cores_is_caught() -> None:
    (fault,) = aot.faults(
        case_of(dot_kernel, "*fp32", num_warps=8, num_stages=2, constexprs={"SIZE": 64}, dots=True), SM90
    )
    assert "no dot of 64 rows in 16 bits" in fault


def test_a_case_that_does_not_match_its_kernel_is_refused() -> None:
    case = AotCase(dot_kernel, "wrong", {"x_ptr": "*bf16", "z_ptr": "*bf16"}, {"SIZE": 64, "STEPS": 1})
    with pytest.raises(ValueError, match=r"without a type: \['y_ptr'\]; not the kernel's: \['z_ptr'\]"):
        aot.compile_case(case, SM90)


def test_a_forgotten_kernel_is_found() -> None:
    module = ModuleType(__name__)
    vars(module).update({f.__name__: f for f in (doubled, spilling_kernel, forgotten_kernel)})
    assert aot.kernels_without_a_case([module], [case_of(spilling_kernel)]) == ["forgotten_kernel"]
    assert aot.kernels_without_a_case([module], []) == ["doubled", "forgotten_kernel", "spilling_kernel"]
