"""Triton's cache filled ahead, for a GPU that need not be here: kernels and launchers are compiled, and not run.

On the GPU a kernel that is in the cache costs nothing, one that is not about a second. The cache serves a machine with
the same Python and the same release of Triton, in a folder of the same absolute path; elsewhere it only goes unused.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.runtime import build
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from .aot import _Driver
from .target import Target, pretended

# what Triton's key of a compiled module says of the platform: where there is no command `file`, the last word is empty
PLATFORMS = ("x86_64,Linux,64bit,ELF", "x86_64,Linux,64bit,")


@contextmanager
def warmed(target: Target) -> Iterator[set[str]]:
    """Within it launches on CPU tensors compile for ``target`` into TRITON_CACHE_DIR, and outputs stay as they are.

    Gives the hashes of the kernels compiled so far.
    """
    from triton.backends.nvidia import driver

    done: set[str] = set()
    run = JITFunction.run
    has_launchers = hasattr(driver, "compile_module_from_src")  # of each kernel its own; Triton 3.9 has one for all

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in done and has_launchers:
            driver.CudaLauncher(kernel.src, kernel.metadata)
        done.add(kernel.hash)

    with ExitStack() as stack:
        stack.enter_context(pretended(target))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver(target)))
        if has_launchers:
            stack.enter_context(mock.patch.object(driver, "library_dirs", return_value=[]))
            stack.enter_context(mock.patch.object(driver, "compile_module_from_src", _compile_module))
            source = Path(driver.dirname, "driver.c").read_text()
            _compile_module(source, "cuda_utils", [], driver.include_dirs, driver.libraries)
        yield done


def _compile_module(
    src: str, name: str, library_dirs: list[str], include_dirs: list[str], libraries: list[str]
) -> SimpleNamespace:
    """Triton's ``compile_module_from_src`` without loading, which would take the library of a GPU's driver."""
    file = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    caches = [get_cache_manager(hashlib.sha256((src + platform).encode()).hexdigest()) for platform in PLATFORMS]
    if any(cache.get_file(file) is None for cache in caches):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, f"{name}.c")
            source.write_text(src)
            directories = [_stub_of_driver(src, folder), *library_dirs]
            binary = Path(build._build(name, str(source), folder, directories, include_dirs, libraries, []))
            content = binary.read_bytes()
        for cache in caches:
            cache.put(content, file, binary=True)
    return SimpleNamespace(launch=None)


def _stub_of_driver(src: str, folder: str) -> str:
    """``folder`` with a library of the driver's name that has what ``src`` may call, so that the linker asks for it."""
    functions = "".join(f"void {function}(void) {{}}\n" for function in sorted(set(re.findall(r"\bcu[A-Z]\w*", src))))
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1"]
    subprocess.run(command, input=functions, text=True, check=True)
    return folder
