"""setup.py's decision, and what the sources may include."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"})
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
# What the stable ABI of torch is made of; every other header of torch ties a binary to one release.
STABLE = ("torch/csrc/stable/", "torch/headeronly/")
UNSTABLE = ("torch/", "ATen/", "c10/", "caffe2/")


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text(encoding="utf-8"))


def test_there_are_sources() -> None:
    assert {"module.cpp", "ops.cpp", "checks.h"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_stable_headers_of_torch_are_included(path: Path) -> None:
    torchs = [name for name in includes(path) if name.startswith(UNSTABLE)]
    assert [name for name in torchs if not name.startswith(STABLE)] == []


def test_headers_for_other_projects_include_no_torch() -> None:
    shared = [path for path in SOURCES if "include" in path.relative_to(ROOT / "csrc").parts]
    assert [(path, name) for path in shared for name in includes(path) if name.startswith(UNSTABLE)] == []


def test_the_module_includes_nothing_of_torch() -> None:
    names = includes(ROOT / "csrc" / "module.cpp")
    assert [name for name in names if name.startswith(UNSTABLE)] == []
    assert any(name.startswith("pybind11/") for name in names)


def test_tiles_come_from_the_header_that_may_emulate_them() -> None:
    """A source that took them from the compiler's header would have no AMX in .ci/portable."""
    users = [path for path in SOURCES if "_tile_dp" in path.read_text(encoding="utf-8") and path.name != "tiles.h"]
    assert users
    assert [path.name for path in users if "tiles.h" not in includes(path) or "immintrin.h" in includes(path)] == []


def decide(platform: str = sys.platform, **variables: str) -> subprocess.CompletedProcess[str]:
    """What setup.py decides in this environment with these variables, told that it runs on this platform."""
    environment = {name: value for name, value in os.environ.items() if name != "LORA_FAST_BUILD"} | variables
    code = (
        # setuptools asks on its import; what it finds there is this machine's
        f"import runpy, sys, setuptools.command.build_ext; sys.platform = {platform!r}; "
        "decision = runpy.run_path('setup.py', run_name='decision'); "
        "print(decision['KIND'], decision['DEMANDED'], decision['REASON'])"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"LORA_FAST_BUILD": "cuda", "CUDA_HOME": "/nonexistent/cuda"},
            "/nonexistent/cuda) holds no bin/nvcc",
        ),
        ({"LORA_FAST_BUILD": "cpu", "CXX": "/nonexistent/c++"}, "no C++ compiler was found (CXX=/nonexistent/c++)"),
        ({"LORA_FAST_BUILD": "cpu", "CXX": "false"}, "does not compile C++20"),
        ({"LORA_FAST_BUILD": "gpu"}, "must be one of cpu, cuda, none, got 'gpu'"),
    ],
    ids=["no cuda", "no compiler", "broken compiler", "unknown"],
)
def test_a_demand_that_cannot_be_met_fails_with_the_reason(variables: dict[str, str], said: str) -> None:
    done = decide(**variables)
    assert done.returncode != 0
    assert "LORA_FAST_BUILD" in done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("variables", "decision"),
    [
        ({"LORA_FAST_BUILD": "none"}, "none True LORA_FAST_BUILD=none"),
        ({"CXX": "/nonexistent/c++"}, "none False no C++ compiler was found (CXX=/nonexistent/c++)"),
        ({"CXX": "false"}, "none False"),
        ({"LORA_FAST_BUILD": "cpu"}, "cpu True LORA_FAST_BUILD=cpu"),
        ({"CUDA_HOME": "/nonexistent/cuda"}, "cpu False torch and"),
    ],
    ids=["none", "no compiler", "broken compiler", "cpu", "no cuda"],
)
def test_a_kind_is_decided_with_a_reason(variables: dict[str, str], decision: str) -> None:
    done = decide(**variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(decision)


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA toolkit whose nvcc writes an empty object."""
    script = '#!/bin/sh\nwhile [ $# -gt 0 ] && [ "$1" != -o ]; do shift; done\n[ $# -eq 0 ] || : > "$2"\n'
    for name, text in (("bin/nvcc", script), ("lib64/libcudart_static.a", "!<arch>\n")):
        path = tmp_path / "toolkit" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path / "toolkit"


@pytest.mark.parametrize(
    ("archs", "said"),
    [
        ("Hopper", "got 'Hopper', expected numbers such as '8.0;9.0a;10.0+PTX'"),
        ("8.0;native", "got 'native', expected numbers such as '8.0;9.0a;10.0+PTX'"),
        ("6.1;7.5+PTX", "got '6.1 7.5+PTX', expected at least one of 8.0 or later"),
    ],
)
def test_architectures_that_cannot_be_had_leave_the_cpu(toolkit: Path, archs: str, said: str) -> None:
    variables = {"CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": archs}
    done = decide(**variables)
    assert done.stdout.startswith("cpu False torch and"), done.stderr
    assert f"but TORCH_CUDA_ARCH_LIST: {said}" in done.stdout
    demanded = decide(**variables, LORA_FAST_BUILD="cuda")
    assert demanded.returncode != 0
    assert f"LORA_FAST_BUILD=cuda was demanded, but TORCH_CUDA_ARCH_LIST: {said}" in demanded.stderr


def test_old_architectures_are_left_out_with_a_notice(toolkit: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LORA_FAST_BUILD"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**environment, "CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": "7.0 7.5+PTX 12.0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the kernels for the CPU and for CUDA" in done.stderr
    assert "lora_fast: TORCH_CUDA_ARCH_LIST: left out 7.0 and 7.5+PTX, the kernels need 8.0 or later" in done.stderr


NVCC = "nvcc failed on csrc/cuda/kernels.cu"
COMPILER = "[^;]+"  # ninja and setuptools say it differently


@pytest.mark.parametrize(
    ("broken", "kind", "reason"),
    [
        (["nvcc"], "cpu", f"the kernels for CUDA did not compile: {NVCC}"),
        (["cuda"], "cpu", f"the kernels for CUDA did not compile: {COMPILER}"),
        (
            ["nvcc", "cpu"],
            "none",
            f"the kernels for CUDA did not compile: {NVCC}; the kernels for CPU did not compile: {COMPILER}",
        ),
    ],
    ids=["nvcc", "the C++ of CUDA", "everything"],
)
@pytest.mark.parametrize("demanded", [False, True], ids=["", "demanded"])
def test_what_does_not_compile_leaves_the_best_that_does(
    toolkit: Path, tmp_path: Path, broken: list[str], kind: str, reason: str, demanded: bool
) -> None:
    """In a tree with one source of each sort; those in ``broken`` do not compile."""
    tree = tmp_path / "tree"
    names = (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "lora_fast/__init__.py",
        "triton_kernels/constants.json",
    )
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    for folder in ("cpu", "cuda"):
        (tree / "csrc" / folder).mkdir(parents=True)
        (tree / "csrc" / folder / "ops.cpp").write_text("#error" if folder in broken else "")
    (tree / "csrc" / "cuda" / "kernels.cu").touch()
    if "nvcc" in broken:
        (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    environment = {name: value for name, value in os.environ.items() if name != "LORA_FAST_BUILD"}
    environment |= {"CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": "8.0"}
    if demanded:
        environment["LORA_FAST_BUILD"] = "cuda"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    built = [path.name for path in (tree / "lora_fast").iterdir() if path.name != "__init__.py"]
    if demanded:
        assert done.returncode != 0
        assert built == []
        return
    assert done.returncode == 0, done.stderr
    recorded = runpy.run_path(str(tree / "lora_fast" / "_build.py"))
    assert recorded["KIND"] == kind
    assert re.fullmatch(reason, recorded["REASON"])
    assert f": {recorded['REASON']}\n" in done.stderr
    assert any(name.startswith("_C.") for name in built) == (kind == "cpu")


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_the_kernels_are_for_linux(platform: str) -> None:
    said = f"the kernels are built on Linux only, and this is {platform}"
    done = decide(platform)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"none False {said}"
    demanded = decide(platform, LORA_FAST_BUILD="cpu")
    assert demanded.returncode != 0
    assert f"LORA_FAST_BUILD=cpu was demanded, but {said}" in demanded.stderr


# of the extension that Clang compiled, beside the reference in float64
TRY_IT = """
import torch
from lora_fast import _C, functional, reference
print(_C.build_info()["compiler"].split()[0], *_C.build_info()["isa"])
for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
    for tokens in (1, 16, 40):
        shapes = (tokens, 64), (96, 64), (96,), (8, 64), (96, 8), (96,)
        tensors = [torch.randn(shape, generator=torch.manual_seed(0)).to(dtype).requires_grad_() for shape in shapes]
        tensors[1].requires_grad_(False)
        results = []
        for module, options in ((functional, {"backend": "cpu"}), (reference, {})):
            wide = [tensor.double() if module is reference else tensor for tensor in tensors]
            y = module.dora_linear(*wide, 2.0, **options)
            wanted = [tensor for tensor in tensors if tensor.requires_grad]
            results.append([y, *torch.autograd.grad(y.sum(), wanted)])
        for actual, expected in zip(*results, strict=True):
            error = (actual.double() - expected.double()).norm() / expected.double().norm()
            assert error < bound, (dtype, tokens, float(error))
"""


@pytest.mark.build
@pytest.mark.clang
@pytest.mark.slow
def test_clang_compiles_it_for_one_instruction_set(tmp_path: Path) -> None:
    folders = ["--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path / "lib")]
    environment = os.environ | {"CXX": "clang++", "CC": "clang", "LORA_FAST_BUILD": "cpu"}
    command = [sys.executable, "setup.py", "-q", "build", *folders]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    command = [sys.executable, "-c", TRY_IT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["clang", "generic"]


@pytest.mark.native
def test_the_processors_family_is_the_systems() -> None:
    from lora_fast import _C

    said = dict(re.findall(r"^(vendor_id|cpu family)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    assert _C.cpu_family() == (said.get("vendor_id", ""), int(said.get("cpu family", 0)))


@pytest.mark.native
def test_the_module_says_how_it_was_built() -> None:
    from lora_fast import _C

    info = _C.build_info()
    assert info["torch_target"] == "2.10"
    assert set(info) - {"cuda_archs"} == {"kind", "compiler", "torch", "torch_target", "isa"}
    assert info["kind"] == ("cuda" if "cuda_archs" in info else "cpu")
    assert info["isa"][0] == "generic"
    assert set(_C.cpu_features()) <= {"avx2", "avx512", "avx512_bf16", "amx_bf16"}
    # where AMX is emulated, kernels use it, and it is still none of the processor's
    assert not {"amx_bf16", "amx_bf16 (emulated)"} <= set(info["isa"])
    assert "amx_bf16" in info["isa"] or "amx_bf16" not in _C.cpu_features()


def test_no_vector_of_shorts_stands_for_bfloat16() -> None:
    """Intrinsics and builtins took one until GCC 13, which has a type for it."""
    for source in (ROOT / "csrc").rglob("*.*"):
        assert "__v32hi" not in source.read_text(encoding="utf-8"), source
