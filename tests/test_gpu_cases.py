"""That tests/test_gpu.py meets every configuration that the choices by size take at the sizes of the GPU benchmark."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
import gpu_cases
from launch_sweep import Call, make

from lora_fast.triton_kernels.lora_gain_bwd import lora_gain_bwd_config
from lora_fast.triton_kernels.target import SM80, SM89, SM90, SM100, Target

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels decorated for the interpreter have no specialisation to record", allow_module_level=True)


@pytest.mark.parametrize("target", [SM80, SM89, SM90, SM100], ids=lambda target: f"sm_{target.arch}")
def test_every_configuration_of_the_benchmark_is_tested(target: Target) -> None:
    calls = [call for case in gpu_cases.CONFIGURED for call in gpu_cases.of_case(case)]
    calls += [call for case in gpu_cases.AUTOCAST for call in gpu_cases.of_autocast(case)]
    calls += [gpu_cases.of_grouped(*case) for case in gpu_cases.GROUPED]
    calls += [gpu_cases.of_glu(case) for case in gpu_cases.GLU]
    calls += [gpu_cases.of_mlp(case) for case in gpu_cases.MLPS]
    tested = gpu_cases.configurations(calls, target)
    measured = gpu_cases.configurations(gpu_cases.of_benchmark(), target)
    assert len(measured) > 50
    assert measured - tested == set()


def test_a_configuration_that_no_test_has_is_found() -> None:
    tested = gpu_cases.configurations(gpu_cases.of_case(gpu_cases.CONFIGURED[0]), SM90)
    other = gpu_cases.configurations([lambda: make(Call(16, 4096, 4096, 16))], SM90)
    assert any("lora_linear_small_fwd_kernel" in name for name in other - tested)


@pytest.mark.parametrize("target", [SM80, SM90], ids=lambda target: f"sm_{target.arch}")
@pytest.mark.parametrize("case", gpu_cases.CHUNKED, ids=str)
def test_the_chunks_are_among_them(case: gpu_cases.Case, target: Target) -> None:
    (T,) = case.leading
    config = lora_gain_bwd_config(T, case.N, case.R, case.dtype, True, target)
    assert config.BLOCK_R > 0
    assert config.row_chunks > 1
