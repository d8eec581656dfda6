"""Decides what to build, cpu | cuda | none, says which and why, and builds it. Metadata lives in pyproject.toml.

``LORA_FAST_BUILD=cpu|cuda|none`` demands a kind and fails where it cannot be had. Unset, the best kind that this
machine can build is taken, and the pure Python package where none can: the kernels are for Linux. What was decided is
kept in ``lora_fast/_build.py``, so that the installed package can tell it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as setuptools_build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KINDS = ("cpu", "cuda", "none")
# The stable ABI of torch 2.10: one binary serves that release and every later one.
TARGET_VERSION = "0x020a000000000000"
MINIMUM_TORCH = (2, 10)


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
        input="#include <optional>\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if trial.returncode != 0:
        return f"{compiler} does not compile C++20: {trial.stderr.strip().splitlines()[-1:]}"
    return None


def decide() -> tuple[str, str, bool]:
    """(kind, reason, demanded)."""
    kind = os.environ.get("LORA_FAST_BUILD", "")
    if kind and kind not in KINDS:
        raise SystemExit(f"lora_fast: LORA_FAST_BUILD must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "none":
        return "none", "LORA_FAST_BUILD=none", True
    if kind == "cuda":
        raise BuildRefused(kind, "this version has no CUDA sources")
    why_not = obstacle()
    if why_not is None:
        return "cpu", "LORA_FAST_BUILD=cpu" if kind else f"torch and {find_compiler()} were found", bool(kind)
    if kind:
        raise BuildRefused(kind, why_not)
    return "none", why_not, False


KIND, REASON, DEMANDED = decide()


def announce(kind: str, reason: str) -> None:
    what = "the pure Python package, without compiled kernels" if kind == "none" else f"the {kind} kernels"
    print(f"lora_fast: building {what}: {reason}", file=sys.stderr, flush=True)


def record(package: Path, kind: str, reason: str) -> None:
    """Writes lora_fast/_build.py, which the package reads if it is there."""
    package.mkdir(parents=True, exist_ok=True)
    package.joinpath("_build.py").write_text(
        f'"""Written by setup.py: what was built, and why."""\n\nKIND = {kind!r}\nREASON = {reason!r}\n'
    )


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        editable = getattr(self, "editable_mode", False)
        record(ROOT / "lora_fast" if editable else Path(self.build_lib, "lora_fast"), KIND, REASON)


def extension() -> Extension:
    import torch
    from torch.utils.cpp_extension import CppExtension

    include_dirs = []
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        include_dirs.append(pybind11.get_include())
    return CppExtension(
        "lora_fast._C",
        sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]),
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
        ],
        # The library is named, since the linker would drop it for want of an undefined symbol at that moment.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
    )


def build_ext_command() -> type:
    from torch.utils.cpp_extension import BuildExtension, is_ninja_available

    class BuildExt(BuildExtension):
        """torch's, falling back to the pure Python package where the kernels were not demanded and do not compile."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "use_ninja": is_ninja_available()})

        def run(self) -> None:
            package = ROOT / "lora_fast" if self.inplace else Path(self.build_lib, "lora_fast")
            try:
                super().run()
            except Exception as error:
                if DEMANDED:
                    raise
                reason = f"the kernels did not compile: {str(error).strip().splitlines()[0]}"
                self.extensions = []
                announce("none", reason)
                record(package, "none", reason)
            else:
                record(package, KIND, REASON)

    return BuildExt


if __name__ == "__main__":
    announce(KIND, REASON)
    commands: dict[str, type] = {"build_py": BuildPy, "build_ext": setuptools_build_ext}
    extensions = []
    if KIND == "cpu":
        # The machine of a first-time user is small, and each file takes a gigabyte at most.
        os.environ.setdefault("MAX_JOBS", str(min(2, os.cpu_count() or 1)))
        extensions = [extension()]
        commands["build_ext"] = build_ext_command()
    setup(ext_modules=extensions, cmdclass=commands)
