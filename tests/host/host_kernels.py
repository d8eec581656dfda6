"""A pytest plugin: the CUDA kernels, compiled for the CPU (device.cuh beside this file), become backend "cpu".

So the tests of that backend hold them to the reference: their bindings, their Python and their arithmetic.
"""

from __future__ import annotations

import ctypes
import sys
import types

import pytest
import torch

from lora_fast import backends
from lora_fast.backends import cuda

LARGEST = 130  # rank, and both sides of the weight: a simulated tile takes 10 ms

# in place of the extension, whose kernels would take the names
_C = types.ModuleType("lora_fast._C")
_C.build_info = lambda: {"kind": "cuda", "isa": []}
_C.amx_enabled = lambda: False
sys.modules[_C.__name__] = _C

# the kernels for CUDA take no scratch from the host's heap
library = torch.library.Library("lora_fast_c", "IMPL")
library.impl("scratch_events", lambda record: torch.empty(0, 2, dtype=torch.int64), "CompositeExplicitAutograd")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--host-library", required=True, help="the kernels compiled for the CPU")
    parser.addoption("--backwards", action="store_true", help="the threads of a block take turns in reverse")


def pytest_configure(config: pytest.Config) -> None:
    library = config.getoption("--host-library")
    torch.ops.load_library(library)
    backwards = config.getoption("--backwards")
    # another number of multiprocessors splits the work otherwise
    ctypes.CDLL(library).lora_fast_host_configure(backwards, 1 if backwards else 3)
    kernels = cuda.BACKEND
    backends.get("cpu").__dict__.update(plan=kernels.plan, ops=kernels.ops, keeps=kernels.keeps)


@pytest.fixture(scope="session")
def host(pytestconfig: pytest.Config) -> ctypes.CDLL:
    """The library itself: what ops.cpp beside this file lets a test change."""
    return ctypes.CDLL(pytestconfig.getoption("--host-library"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if not _is_for_the_kernels(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _is_for_the_kernels(item: pytest.Item) -> bool:
    """Backend "cpu", not float64, of a size that a simulation takes."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    case, dtype = parameters.get("case"), parameters.get("dtype")
    return (
        parameters.get("backend", "cpu") == "cpu"
        and not {"backend64", "isa"} & set(getattr(item, "fixturenames", ()))
        and torch.float64 not in (dtype, getattr(case, "dtype", None))
        and (case is None or max(case.N, case.K, case.R) <= LARGEST)
    )
