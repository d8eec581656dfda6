"""Decides what to build, cpu | cuda | none, says which and why, and builds it. Metadata lives in pyproject.toml.

``LORA_FAST_BUILD=cpu|cuda|none`` demands a kind and fails where it cannot be had. Unset, the best kind that this
machine can build is taken, and the pure Python package where none can: the kernels are for Linux. What was decided is
kept in ``lora_fast/_build.py``, so that the installed package can tell it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as setuptools_build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KINDS = ("cpu", "cuda", "none")
# The stable ABI of torch 2.10: one binary serves that release and every later one.
TARGET_VERSION = "0x020a000000000000"
MINIMUM_TORCH = (2, 10)
# Of TORCH_CUDA_ARCH_LIST, unset: what this CUDA toolkit knows of these. The PTX is for what comes after them.
CUDA_ARCHS = "8.0;9.0a;10.0+PTX"
MINIMUM_ARCH = 8  # the first with bfloat16 on its tensor cores
# What the sources want of a compiler beside C++20: vectors that GCC has since 12.
TRIAL = """\
#include <optional>
using Vector = int __attribute__((vector_size(16)));
Vector turned(Vector v) { return __builtin_shufflevector(v, v, 3, 2, 1, 0); }
"""
# Modules that no command of lora-fast runs, but pytest and make in the source tree. They are in no wheel.
SOURCE_TREE_ONLY = {
    "lora_fast.benchmarks": {
        *("against_bars", "bench_layer", "bench_peft", "bench_quantised", "grid", "test_ops", "readme"),
        *("bench_distributed", "bench_grouped", "bench_mlp", "collectives"),
        *("distributed_engines", "distributed_model", "readme_gpu", "tables"),
        *("alternation", "bench_trainers", "trainers", "trainers_axolotl", "trainers_child"),
        *("gpu_constants", "gpu_first", "gpu_sweeps", "gpu_tune", "gpu_verdict"),
    },
    "lora_fast.triton_kernels": {"aot", "prewarm"},
}


class BuildRefused(SystemExit):
    """A demanded kind cannot be had."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"lora_fast: LORA_FAST_BUILD={kind} was demanded, but {reason}")


def find_compiler() -> str | None:
    """The C++ compiler that a build would use, as a path; None if there is none."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX", "").split() else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def obstacle() -> str | None:
    """Why the CPU kernels cannot be built here; None if they can."""
    if not sys.platform.startswith("linux"):
        return f"the kernels are built on Linux only, and this is {sys.platform}"
    if importlib.util.find_spec("torch") is None:
        return "torch is not there at build time (install it first, then use pip install --no-build-isolation)"
    try:
        import torch
    except Exception as error:  # a broken torch fails in many ways
        return f"torch cannot be imported: {error}"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < MINIMUM_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, MINIMUM_TORCH))}, whose stable ABI is used"
    compiler = find_compiler()
    if compiler is None:
        named = f" (CXX={os.environ['CXX']})" if os.environ.get("CXX") else ""
        return f"no C++ compiler was found{named}"
    trial = subprocess.run(
        [compiler, "-x", "c++", "-std=c++20", "-fsyntax-only", "-"],
        input=TRIAL,
        capture_output=True,
        text=True,
        check=False,
    )
    if trial.returncode != 0:
        return (
            f"{compiler} does not compile C++20 with the vectors of GCC 12 and later, or of Clang: "
            f"{trial.stderr.strip().splitlines()[-1:]}"
        )
    return None


def find_cuda() -> tuple[Path | None, str]:
    """(CUDA's folder, where it was found), or (None, why there is none). Nothing is asked of a GPU or of torch.

    The environment's CUDA_HOME wins. Else nvcc is asked, since the one on PATH may be a wrapper that stands elsewhere.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found, where = Path(home), f"CUDA_HOME={home}"
    else:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            return None, "no nvcc was found (neither CUDA_HOME nor PATH has one)"
        said = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        ).stderr
        top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
        found, where = (Path(top[1]) if top else Path(nvcc).resolve().parent.parent).resolve(), f"{nvcc}"
    if not (found / "bin" / "nvcc").is_file():
        return None, f"{found} (by {where}) holds no bin/nvcc"
    if static_runtime(found) is None:
        return None, f"{found} (by {where}) holds no libcudart_static.a"
    return found, where


def static_runtime(cuda: Path) -> Path | None:
    """The folder of CUDA's static runtime, with which the module loads where there is no driver."""
    folders = [cuda / "lib64", cuda / "lib", *sorted(cuda.glob("targets/*/lib")), *sorted(cuda.glob("lib/*-linux-gnu"))]
    return next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)


def listed_archs() -> list[str]:
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()


def is_old(arch: str) -> bool:
    return int(arch.split(".")[0]) < MINIMUM_ARCH


def arch_obstacle() -> str | None:
    """Why TORCH_CUDA_ARCH_LIST leaves nothing to compile for; None if it leaves something."""
    archs = listed_archs()
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            return f"TORCH_CUDA_ARCH_LIST: got {arch!r}, expected numbers such as {CUDA_ARCHS!r}"
    if archs and all(map(is_old, archs)):
        return f"TORCH_CUDA_ARCH_LIST: got {' '.join(archs)!r}, expected at least one of {MINIMUM_ARCH}.0 or later"
    return None


def cuda_archs(cuda: Path) -> list[str]:
    """["8.0", "9.0a", "10.0+PTX"]: TORCH_CUDA_ARCH_LIST without old ones, or what nvcc knows of CUDA_ARCHS."""
    listed = [arch for arch in listed_archs() if not is_old(arch)]
    if listed:
        return listed
    known = subprocess.run(
        [cuda / "bin" / "nvcc", "--list-gpu-code"], capture_output=True, text=True, check=False
    ).stdout.split()
    archs = [arch.removesuffix("+PTX") for arch in CUDA_ARCHS.split(";")]
    archs = [arch for arch in archs if f"sm_{arch.rstrip('af').replace('.', '')}" in known]
    plain = [arch for arch in archs if arch[-1].isdigit()]
    return [f"{arch}+PTX" if arch in plain[-1:] else arch for arch in archs]


def gencodes(archs: list[str]) -> list[str]:
    """nvcc's options for these architectures."""
    options = []
    for arch in archs:
        name = arch.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{name}", f"compute_{name}"] if arch.endswith("+PTX") else [f"sm_{name}"]
        options += [f"-gencode=arch=compute_{name},code={code}" for code in codes]
    return options


def decide() -> tuple[str, str, bool]:
    """(kind, reason, demanded)."""
    kind = os.environ.get("LORA_FAST_BUILD", "")
    if kind and kind not in KINDS:
        raise SystemExit(f"lora_fast: LORA_FAST_BUILD must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "none":
        return "none", "LORA_FAST_BUILD=none", True
    why_not = obstacle()
    if why_not is None and kind != "cpu":
        home, where = find_cuda()
        why_not = where if home is None else arch_obstacle()
        if why_not is None:
            found = f"torch, {find_compiler()} and CUDA in {home} (by {where}) were found"
            return "cuda", "LORA_FAST_BUILD=cuda" if kind else found, bool(kind)
        if not kind:
            return "cpu", f"torch and {find_compiler()} were found, but {why_not}", False
    if why_not is None:
        return "cpu", "LORA_FAST_BUILD=cpu", True
    if kind:
        raise BuildRefused(kind, why_not)
    return "none", why_not, False


KIND, REASON, DEMANDED = decide()


def announce(kind: str, reason: str) -> None:
    what = {
        "none": "the pure Python package, without compiled kernels",
        "cpu": "the kernels for the CPU",
        "cuda": "the kernels for the CPU and for CUDA",
    }[kind]
    print(f"lora_fast: building {what}: {reason}", file=sys.stderr, flush=True)


def record(package: Path, kind: str, reason: str) -> None:
    """Writes lora_fast/_build.py, which the package reads if it is there."""
    package.mkdir(parents=True, exist_ok=True)
    package.joinpath("_build.py").write_text(
        f'"""Written by setup.py: what was built, and why."""\n\nKIND = {kind!r}\nREASON = {reason!r}\n'
    )


class BuildPy(build_py):
    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """(package, module, file) of each module of a package; an editable install has all of them."""
        left_out = set() if getattr(self, "editable_mode", False) else SOURCE_TREE_ONLY.get(package, set())
        return [found for found in super().find_package_modules(package, package_dir) if found[1] not in left_out]

    def run(self) -> None:
        super().run()
        editable = getattr(self, "editable_mode", False)
        record(ROOT / "lora_fast" if editable else Path(self.build_lib, "lora_fast"), KIND, REASON)


def extension(kind: str) -> Extension:
    import torch
    from torch.utils.cpp_extension import CppExtension

    include_dirs = []
    globs, defines, link = ["csrc/*.cpp", "csrc/cpu/*.cpp"], [], []
    if kind == "cuda":
        home = find_cuda()[0]
        assert home is not None
        globs.append("csrc/cuda/*.cpp")
        defines.append(f'-DLORA_FAST_CUDA_ARCHS="{" ".join(cuda_archs(home))}"')
        link = [f"-L{static_runtime(home)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        include_dirs.append(pybind11.get_include())
    return CppExtension(
        "lora_fast._C",
        sorted(str(path.relative_to(ROOT)) for glob in globs for path in ROOT.glob(glob)),
        # Where there is no pybind11, the one that torch carries is found.
        include_dirs=include_dirs,
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-g0",
            "-fvisibility=hidden",
            "-Wno-psabi",
            f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
            f'-DLORA_FAST_TORCH_VERSION="{torch.__version__}"',
            *defines,
        ],
        # The library is named, since the linker would drop it for want of an undefined symbol at that moment.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", *link],
    )


def measured_shape() -> list[str]:
    """The definitions of what the kernel for few tokens is made for, where it was measured; else its header's stand."""
    constants = json.loads((ROOT / "triton_kernels" / "constants.json").read_text(encoding="utf-8"))["constants"]
    shape = constants["few_tokens_cuda"]["value"] if "few_tokens_cuda" in constants else {}
    return [f"-DLORA_FAST_SMALL_{name.upper()}={value}" for name, value in shape.items()]


def compile_cuda(folder: Path) -> list[str]:
    """The objects of csrc/cuda/*.cu, compiled into ``folder`` by nvcc itself: torch's way needs a torch with CUDA."""
    from torch.utils.cpp_extension import include_paths

    home, compiler = find_cuda()[0], find_compiler()
    assert home is not None
    assert compiler is not None
    options = [
        *("-std=c++20", "-O3", "-ccbin", compiler, "-Xcompiler=-fPIC,-fvisibility=hidden,-g0"),
        *(f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", f"-I{ROOT / 'csrc' / 'include'}"),
        *(f"-isystem={path}" for path in include_paths()),
        *gencodes(cuda_archs(home)),
        *measured_shape(),
    ]
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        command = [str(home / "bin" / "nvcc"), *options, "-c", str(source), "-o", str(target)]
        print(" ".join(command), flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout + done.stderr, end="", flush=True)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {source.relative_to(ROOT)}")
        return str(target)

    with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as pool:
        return list(pool.map(compile_one, sorted(ROOT.glob("csrc/cuda/*.cu"))))


def build_ext_command() -> type:
    from torch.utils.cpp_extension import BuildExtension, is_ninja_available

    class BuildExt(BuildExtension):
        """torch's. What was not demanded and does not compile is left out: CUDA's kernels, then the CPU's."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "use_ninja": is_ninja_available()})

        def run(self) -> None:
            package = ROOT / "lora_fast" if self.inplace else Path(self.build_lib, "lora_fast")
            before, kind, failed = dict(vars(self)), KIND, []
            while kind != "none":
                try:
                    if kind == "cuda":
                        self.extensions[0].extra_objects = compile_cuda(Path(self.build_temp, "cuda"))
                    super().run()
                    break
                except Exception as error:
                    if DEMANDED:
                        raise
                    said = (str(error).strip() or repr(error)).splitlines()[0]
                    failed.append(f"the kernels for {kind.upper()} did not compile: {said}")
                vars(self).update(before)  # a run that failed leaves its compiler, and does not give inplace back
                if kind == "cuda":
                    kind = "cpu"
                    vars(self.extensions[0]).update(vars(extension(kind)))
                else:
                    kind, self.extensions = "none", []
                announce(kind, "; ".join(failed))
            record(package, kind, "; ".join(failed) or REASON)

    return BuildExt


if __name__ == "__main__":
    announce(KIND, REASON)
    if KIND == "cuda" and (old := list(filter(is_old, listed_archs()))):
        left_out = f"left out {' and '.join(old)}, the kernels need {MINIMUM_ARCH}.0 or later"
        print(f"lora_fast: TORCH_CUDA_ARCH_LIST: {left_out}", file=sys.stderr, flush=True)
    commands: dict[str, type] = {"build_py": BuildPy, "build_ext": setuptools_build_ext}
    extensions = []
    if KIND != "none":
        # The machine of a first-time user is small, and each file takes a gigabyte at most.
        os.environ.setdefault("MAX_JOBS", str(min(2, os.cpu_count() or 1)))
        extensions = [extension(KIND)]
        commands["build_ext"] = build_ext_command()
    setup(ext_modules=extensions, cmdclass=commands)
