"""The CUDA kernels without a GPU: what nvcc says of them, the module with them, and their arithmetic on the CPU."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

pytestmark = [pytest.mark.build, pytest.mark.nvcc, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
HOST = Path(__file__).resolve().parent / "host"
ARCHS = ("sm_80", "sm_90a", "sm_100")
# The most registers of a thread. 128: two blocks of 256 threads share a multiprocessor's 65536; 85: three.
REGISTERS = {
    "weight_norm_tiles": 128,
    "weight_norm_finish": 128,
    "content_key_kernel": 128,
    "lora_compose_fwd_kernel": 128,
    "lora_gain_bwd_kernel": 85,
    "lora_gain_bwd_finish": 85,
    "round_factors_kernel": 64,
    "dropout_kernel": 64,
    "lora_project_small": 128,
    "lora_linear_small": 128,
}
COMPILED = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'\n"
    r"(?:.*\n)*?\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill "
    r"loads\n"
    r".*Used (?P<registers>\d+) registers"
)
SMOKE = """
import torch, lora_fast
from lora_fast import backends
from lora_fast.backends import extension
print(lora_fast.__file__)
assert backends.get("cuda").missing() is None, backends.get("cuda").missing()
_, _, info = extension.status()
assert (info["kind"], info["cuda_archs"]) == ("cuda", "8.0 9.0a 10.0+PTX"), info
from lora_fast.backends.cuda import ops, plan
x, W, A, B = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2, requires_grad=True)
y = lora_fast.functional.lora_linear(x, W, None, A, B, 2.0, backend="cpu")
torch.testing.assert_close(y, x @ (W + 2.0 * B @ A).T)
y.sum().backward()
torch.testing.assert_close(B.grad, 2.0 * (x @ A.T).sum(0).expand(5, 2))
kept = torch.zeros(5), torch.zeros(3, dtype=torch.int64)
norm = torch.ops.lora_fast_c.weight_norm_kept(W, A, B.detach(), 1.0, True, *kept, 0)
torch.testing.assert_close(norm, (W + B.detach() @ A).norm(dim=1))
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(a copy of the tree with the module in it, what the compilers said)."""
    tree = tmp_path_factory.mktemp("cuda")
    for folder in ("lora_fast", "csrc", "triton_kernels", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.py", "results")
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree)
    variables = {"LORA_FAST_BUILD": "cuda", "NVCC_APPEND_FLAGS": "-Xptxas=-v", "TORCH_CUDA_ARCH_LIST": ""}
    return tree, run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, **variables)


def test_every_header_is_compiled() -> None:
    included: set[str] = set()
    found = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    while found:
        included |= found
        paths = [*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc" / "include" / "lora_fast").iterdir()]
        text = "".join(path.read_text() for path in paths if path.name in found)
        found = set(re.findall(r'#include [<"](?:lora_fast/)?(\w+\.\w+)[>"]', text)) - included
    assert {path.name for path in (ROOT / "csrc" / "include").rglob("*.*")} <= included


def test_kernels_use_no_local_memory_and_few_registers(built: tuple[Path, str]) -> None:
    kernels = [match.groupdict() for match in COMPILED.finditer(built[1])]
    assert len(kernels) == built[1].count("Compiling entry function")
    for kernel in kernels:
        name, arch = kernel["name"], kernel["arch"]
        assert (kernel["stack"], kernel["stores"], kernel["loads"]) == ("0", "0", "0"), f"{name} spills on {arch}"
        (bound,) = {most for known, most in REGISTERS.items() if known in name}
        assert int(kernel["registers"]) <= bound, f"{name} on {arch}"
    for known in REGISTERS:
        assert {kernel["arch"] for kernel in kernels if known in kernel["name"]} == set(ARCHS), known


def test_the_program_of_gpu_tune_compiles_without_spills(tmp_path: Path) -> None:
    """Every shape of the kernel for few tokens that it has, and so could be built in."""
    source, include = ROOT / "benchmarks" / "few_tokens.cu", f"-I{ROOT / 'csrc' / 'include'}"
    code = "-gencode=arch=compute_90a,code=sm_90a"
    said = run("nvcc", "-std=c++20", "-O3", code, "-Xptxas=-v", include, source, "-o", "few_tokens", cwd=tmp_path)
    kernels = [match.groupdict() for match in COMPILED.finditer(said) if "lora_linear_small" in match["name"]]
    # six shapes, one token tile and two; with 32 rows at most, 16 too
    assert len(kernels) == 18
    assert {(kernel["stack"], kernel["stores"], kernel["loads"]) for kernel in kernels} == {("0", "0", "0")}


def test_a_measured_shape_reaches_the_kernel_for_few_tokens(tmp_path: Path) -> None:
    shutil.copy2(ROOT / "setup.py", tmp_path)
    (tmp_path / "triton_kernels").mkdir()
    value = {"rows": 16, "depth": 128, "blocks": 1}
    constants = {"constants": {"few_tokens_cuda": {"value": value}}}
    (tmp_path / "triton_kernels" / "constants.json").write_text(json.dumps(constants), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FAST_BUILD", "none")
        options = runpy.run_path(str(tmp_path / "setup.py"), run_name="setup")["measured_shape"]()
    source = tmp_path / "few.cu"
    text = "static_assert({}::most_rows == 16 && {}::depth == 128 && {}::blocks == 1);"
    shape = "lora_fast::cuda::BuiltSmallShape"
    source.write_text(f"#include <lora_fast/lora_linear_small_fwd.cuh>\n{text.format(shape, shape, shape)}\n")
    run("nvcc", "-std=c++20", *options, f"-I{ROOT / 'csrc' / 'include'}", "-c", source, "-o", "few.o", cwd=tmp_path)


def test_the_architectures_of_torch_are_respected() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    code = (
        "import runpy; setup = runpy.run_path('setup.py', run_name='decision'); "
        "archs = setup['cuda_archs'](setup['find_cuda']()[0]); print(archs, *setup['gencodes'](archs))"
    )
    for demanded, options in (
        ("", "sm_80 sm_90a sm_100 compute_100"),
        ("8.6", "sm_86"),
        ("8.0;9.0a+PTX", "sm_80 sm_90a compute_90a"),
        ("7.5 12.0", "sm_120"),
    ):
        said = run(sys.executable, "-c", code, cwd=ROOT, **{**environment, "TORCH_CUDA_ARCH_LIST": demanded})
        assert " ".join(re.findall(r",code=(\w+)", said)) == options


def test_the_module_with_cuda_kernels_works_on_the_cpu(built: tuple[Path, str]) -> None:
    tree, said = built
    assert "the kernels for the CPU and for CUDA: LORA_FAST_BUILD=cuda" in said
    where = run(sys.executable, "-c", SMOKE, cwd=tree, PYTHONPATH=str(tree)).splitlines()[-1]
    assert Path(where).is_relative_to(tree)
    needed = run("readelf", "-d", *(tree / "lora_fast").glob("_C*.so"), cwd=tree)
    assert "libtorch.so" in needed
    assert "libcuda" not in needed


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """What CUDA is asked for a launch, by the device's major, the kernel's PTX, bytes of shared memory, overlap."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="decision")
    folder = tmp_path_factory.mktemp("launch")
    nvcc = [setup["find_cuda"]()[0] / "bin" / "nvcc", "-std=c++20", "-ccbin", setup["find_compiler"]()]
    # the first definitions are taken: the sources', not those of CUDA's static runtime
    sources = [HOST / "launch.cu", HOST / "launch.cpp", "-Xlinker=-zmuldefs"]
    run(*nvcc, f"-I{ROOT / 'csrc' / 'include'}", *sources, "-o", folder / "launch", cwd=folder)
    return lambda *case: run(folder / "launch", *map(str, case), cwd=folder).strip()


def test_every_launch_raises_shared_memory_alike(launch: Callable[..., str]) -> None:
    """Two threads that launch one kernel with different sizes: the smaller must not lower what the larger asked."""
    assert launch(8, 80, 48 << 10, 0) == f"launch {48 << 10}"
    assert launch(8, 80, 60_000, 0) == "up to 101376, launch 60000"
    assert launch(8, 80, 90_000, 0) == "up to 101376, launch 90000"


def test_a_kernel_starts_early_only_where_its_code_waits(launch: Callable[..., str]) -> None:
    """Code that the driver makes of PTX for 8.0 has no griddepcontrol.wait, whichever device it runs on."""
    assert launch(9, 90, 1024, 1) == launch(10, 100, 1024, 1) == "launch 1024 early"
    for major, ptx, overlap in ((9, 80, 1), (12, 86, 1), (8, 80, 1), (9, 90, 0)):
        assert launch(major, ptx, 1024, overlap) == "launch 1024"


@pytest.fixture(scope="module")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA sources compiled for the CPU."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="decision")
    compiler, cuda = setup["find_compiler"](), setup["find_cuda"]()[0]
    folder = tmp_path_factory.mktemp("host")
    options = [
        *("-std=c++20", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-w"),
        *(f"-DTORCH_TARGET_VERSION={setup['TARGET_VERSION']}", f"-I{HOST}", f"-I{ROOT / 'csrc' / 'include'}"),
        *(f"-isystem{path}" for path in (cuda / "include", *include_paths())),
    ]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        run(compiler, *options, "-x", "c++", "-c", source, "-o", target, cwd=folder)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*(ROOT / "csrc" / "cuda").glob("*.cu"), HOST / "ops.cpp"]))
    library = folder / "host.so"
    link = [f"-L{path}" for path in library_paths()]
    # its own functions in the place of torch's: what would ask CUDA for something
    options = ["-Wl,-Bsymbolic", "-Wl,--no-as-needed"]
    run(compiler, "-shared", *objects, *link, *options, "-ltorch", "-o", library, cwd=folder)
    return library


# Threads that take turns in the other order find what a barrier would have ordered.
@pytest.mark.parametrize(
    "tests",
    [
        ["tests/host/kernel_cases.py", "tests/host/linear_cases.py"],
        ["tests/host/kernel_cases.py", "tests/host/linear_cases.py", "--backwards"],
        ["tests/test_weight_norm.py", "tests/test_merge_weight.py", "tests/test_lora_compose.py"],
        ["tests/test_lora_linear.py", "-k", "test_dropout or 5x4-48x56 or 12-50x70 or 17-129x127 or 1-48x80-r33"],
    ],
    ids=["kernels", "kernels backwards", "norm, merging and composition", "linear"],
)
def test_arithmetic_on_the_cpu(host_library: Path, tests: list[str]) -> None:
    plugin = ["-p", "host_kernels", "--host-library", host_library]
    said = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *tests),
        cwd=ROOT,
        PYTHONPATH=str(HOST),
        LORA_FAST_BACKEND="",
    )
    assert re.search(r"\d+ passed", said), said[-2000:]
