from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from isas import ISAS, limited_to
from packaging.version import Version

from lora_fast import backends
from lora_fast.backends import extension

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # kernels decorated from here on run on CPU tensors
# What the tests of Triton's kernels launch is compiled into Triton's cache for an H100, and not launched: outputs stay
# as they were, so that most of these tests fail (.ci/gpu-prewarm). A variable: workers do not get the command line.
PREWARMING = os.environ.get("PREWARM") == "1"
FAILURES: Path | None = None
if INTERPRETING:
    from interpreter import patch_bfloat16

    patch_bfloat16()


def _unavailable(backend: str) -> str | None:
    if backend == "torch":
        return None
    reason = extension.missing()
    return None if reason is None else f"lora_fast._C is not there: {reason}"


def _no_amx() -> str | None:
    if native := _unavailable("cpu"):
        return native
    from lora_fast import _C

    return None if _C.amx_enabled() else "lora_fast._C does not use AMX-bf16 on this processor"


def _no_avx512_bf16() -> str | None:
    if native := _unavailable("cpu"):
        return native
    from lora_fast import _C

    there = "avx512_bf16" in _C.build_info()["isa"] and "avx512_bf16" in _C.cpu_features()
    return None if there else "this processor, or this build of lora_fast._C, has no AVX512-BF16"


def _no_triton() -> str | None:
    """Triton runs on a GPU, or in its interpreter; the reason why it doesn't here."""
    if not (INTERPRETING or PREWARMING or torch.cuda.is_available()):
        return "needs TRITON_INTERPRET=1 (make interp) or a GPU"
    return backends.get("triton").missing()


def _no_cuda_kernels() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU"
    return backends.get("cuda").missing()


def _not_installed(library: str, target: str = "test-quantised") -> str | None:
    return None if importlib.util.find_spec(library) else f"{library} is not installed (make {target} has all)"


def _since_3_11(library: str) -> str | None:
    if sys.version_info < (3, 11) and not importlib.util.find_spec(library):
        return f"{library} needs Python 3.11 or newer"
    return _not_installed(library, f"test-{library}")


def _no_torchao() -> str | None:
    """An older one comes with the oldest PEFT, which cannot be imported beside a newer."""
    if missing := _not_installed("torchao"):
        return missing
    found = importlib.metadata.version("torchao")
    return None if Version(found) >= Version("0.18") else f"torchao is {found}, lora_fast takes 0.18 or later"


def _no_nvcc() -> str | None:
    there = os.path.isfile(os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc")) or shutil.which("nvcc")
    return None if there else "no nvcc was found (neither CUDA_HOME nor PATH has one)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The one place that skips (what this process lacks, by marker) and deselects (what has no meaning)."""
    reasons = {
        "native": _unavailable("cpu"),
        "amx": _no_amx(),
        "avx512_bf16": _no_avx512_bf16(),
        "interp": _no_triton(),
        "interpreter": None if INTERPRETING else "tests Triton's interpreter itself (make interp)",
        "gpu": None if torch.cuda.is_available() else "no GPU",
        **{library: _not_installed(library) for library in ("bitsandbytes", "hqq")},
        "torchao": _no_torchao(),
        "deepspeed": _not_installed("deepspeed", "test-deepspeed"),
        "litgpt": _not_installed("litgpt", "test-litgpt"),
        **{library: _since_3_11(library) for library in ("trl", "axolotl")},
        "interop": _not_installed("lycoris", "test-interop"),
        "nvcc": _no_nvcc(),
        "clang": None if shutil.which("clang++") else "no clang++ (clang)",
        "objdump": None if shutil.which("objdump") else "no objdump (binutils)",
        "qemu": None if shutil.which("qemu-x86_64") else "no qemu-x86_64 (qemu-user)",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    left_out = [item for item in items if _has_no_meaning(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


# of the ops of which cuda's plan refuses every call
WITHOUT_CUDA = ("test_adapted_mlp", "test_grouped", "test_mlp_memory", "test_mlp_products", "test_quantised_norm")


def _has_no_meaning(item: pytest.Item) -> bool:
    """A backend refuses the dtypes that it does not compute in, and the interpreter takes only what is quick."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    name, case = parameters.get("backend"), parameters.get("case")
    if name not in backends.NAMES:
        return False
    if name == "cuda" and item.module.__name__ in WITHOUT_CUDA:
        return True
    dtypes = backends.get(name).dtypes
    if case is not None and dtypes is not None and case.dtype not in dtypes:
        return True
    return INTERPRETING and name in ("triton", "cuda") and not _is_quick_to_interpret(parameters, item.originalname)


def _is_quick_to_interpret(parameters: dict, test: str) -> bool:
    """The interpreter takes some 100 µs for each operation of each program: few launches of small cases.

    What is left out differs from what is not by a flag or a dtype that another test has.
    """
    case = parameters.get("case")
    if case is not None and max(case.N, case.K, case.R) > 300:
        return False
    if parameters.get("form") in ("gain", "output", "input"):  # "-full" runs the same kernels and those of the norm
        return False
    if parameters.get("activation", "silu") != "silu" or parameters.get("tokens") in (300, 1025):  # test_triton_glu.py
        return False
    if parameters.get("form") in ("gate-frozen", "down-frozen", "joined-lora") or "linears" in parameters:
        return False
    if test.endswith("a_block_of_tokens") and parameters.get("form") != "dora":
        return False
    if parameters.get("recompute") == "all" and parameters.get("form") != "dora-full":  # forward's kernels once more
        return False
    alone = test == "test_each_gradient_alone" or parameters.get("needs", (True, True)) != (True, True)
    if alone and (case is None or case.dtype != torch.float32 or case.N * case.K > 5000):
        return False
    return parameters.get("p") != 0.1 and not (case is None and parameters.get("layout") == "transposed")


# The backends of the list for which nothing below says where and when they are tested.
OTHERS = [name for name in backends.NAMES if name not in ("torch", "cpu", "triton", "cuda")]


def _others(device_type: str) -> list[str]:
    return [name for name in OTHERS if backends.is_present(name) and backends.get(name).takes(device_type)]


HOST = ("torch", pytest.param("cpu", marks=pytest.mark.native), *_others("cpu"))
# name, what it lacks here, marks
DEVICE = (
    ("triton", _no_triton(), pytest.mark.interp),
    ("cuda", _no_cuda_kernels(), pytest.mark.gpu),
    *((f"{name} on a GPU", None, pytest.mark.gpu) for name in _others("cuda") if torch.cuda.is_available()),
    ("torch on a GPU", None if torch.cuda.is_available() else "no GPU", pytest.mark.gpu),
)
# The tests of the ops; those of the modules, which are written with the ops, stay on the CPU.
ON_EVERY_DEVICE = (
    "test_adapted_mlp",
    "test_grouped",
    "test_kept",
    "test_lora_compose",
    "test_lora_linear",
    "test_merge_weight",
    "test_mlp_memory",
    "test_mlp_products",
    "test_quantised_norm",
    "test_weight_norm",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-amx", action="store_true", help="run the kernels of a processor without AMX")
    parser.addoption(
        "--built-for", metavar="ISA", help="demand the extension from a folder of this name (.ci/portable)"
    )
    parser.addoption("--emulated-amx", action="store_true", help="demand an extension that emulates AMX")
    parser.addoption("--failures", metavar="FILE", help="append each failure to FILE as it happens")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With --failures FILE each failure is written when it happens: a run that is cut off tells what it found."""
    if FAILURES is not None and report.failed:
        with FAILURES.open("a", encoding="utf-8") as file:
            file.write(f"{report.nodeid}\n{report.longreprtext}\n\n")


def pytest_configure(config: pytest.Config) -> None:
    global FAILURES
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # as many workers as cores: their threads would wait for each other
    if built_for := config.getoption("--built-for"):
        from lora_fast import _C

        if built_for not in Path(_C.__file__).parts:  # in each worker too
            raise pytest.UsageError(f"--built-for {built_for}: the extension that is loaded is {_C.__file__}")
    if config.getoption("emulated_amx"):
        from lora_fast import _C

        if "amx_bf16 (emulated)" not in _C.build_info()["isa"]:  # else its tests would be skipped, or try the processor
            raise pytest.UsageError(f"--emulated-amx: the extension is built for {_C.build_info()['isa']}")
    if config.getoption("no_amx"):
        from lora_fast import _C

        _C.allow_amx(False)
    if config.getoption("--failures") and not hasattr(config, "workerinput"):  # the reports of all workers come here
        FAILURES = Path(config.getoption("--failures"))


@pytest.fixture(autouse=True, scope="session")
def _prewarmed() -> Iterator[None]:
    if not PREWARMING:
        yield
        return
    from lora_fast.triton_kernels import prewarm
    from lora_fast.triton_kernels.target import SM90

    with pytest.MonkeyPatch.context() as patch, prewarm.warmed(SM90):
        patch.setattr(backends.get("triton"), "takes", lambda device_type: True)
        yield


def pytest_report_header() -> list[str]:
    others = [(name, backends.get(name).missing()) for name in OTHERS]
    lacking = [*((name, lacks) for name, lacks, _ in DEVICE), *others]
    return [f"not tested: {name}: {lacks}" for name, lacks in lacking if lacks is not None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` is every backend present, `backend64` every one of those that computes in float64."""
    present = [pytest.param(name.split()[0], marks=mark, id=name) for name, lacks, mark in DEVICE if lacks is None]
    if metafunc.module.__name__ not in ON_EVERY_DEVICE:
        present = []
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [*HOST, *present])
    if "backend64" in metafunc.fixturenames:
        metafunc.parametrize("backend64", [param for param in (*HOST, *present) if _computes_in_float64(param)])


def _computes_in_float64(param: Any) -> bool:
    dtypes = backends.get(param if isinstance(param, str) else param.values[0]).dtypes
    return dtypes is None or torch.float64 in dtypes


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where tensors lie that name no device: on the GPU where there is one, for what runs there."""
    of_a_gpu = any(request.node.get_closest_marker(marker) for marker in ("gpu", "interp"))
    if INTERPRETING or not of_a_gpu or not torch.cuda.is_available():
        yield torch.device("cpu")
        return
    torch.set_default_device("cuda")
    yield torch.device("cuda", torch.cuda.current_device())
    torch.set_default_device(None)
    if torch.cuda.memory_reserved() > 1 << 30:  # a dozen workers share the GPU
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _no_mode_stays(device: torch.device) -> Iterator[None]:
    """What every later test of the process would run under: a default device, or another mode of functions."""
    before = torch._C._len_torch_function_stack()
    yield
    assert torch._C._len_torch_function_stack() == before, "the test leaves a TorchFunctionMode, or a default device"


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate has one state a process, which the first Accelerator, or Trainer, decides."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to make a product of bfloat16."""
    with limited_to(request.param):
        yield request.param


@pytest.fixture(params=[*ISAS, torch.float16, torch.float32], ids=str)
def few_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """What the C++ kernels for few tokens read: bfloat16 on each instruction set; the others' products have one way."""
    if isinstance(request.param, torch.dtype):
        yield request.param
        return
    with limited_to(request.param):
        yield torch.bfloat16


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def ops() -> object:
    """The kernels by their names; loads them."""
    extension.status()
    return torch.ops.lora_fast_c


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()  # else tests of one function add up to dynamo's limit of recompilations


@pytest.fixture
def operators_here(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device at hand is taken for one for which "auto" may leave calls to PyTorch's operators."""
    monkeypatch.setattr(backends.operators, "DEVICES", (device.type,))
    monkeypatch.delenv("LORA_FAST_BACKEND", raising=False)
