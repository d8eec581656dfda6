"""Every kernel as its launcher would launch it, compiled for a target that need not be here, and looked through.

Each module's ``aot_cases(target)`` calls the module's own configuration functions, so that what is compiled is what
would be launched. Triton compiles a kernel that spills, or that needs more shared memory than there is, without a
word: :func:`faults` tells.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import __path__ as _folders
from .target import AotCase, Target


def modules() -> list[ModuleType]:
    """The modules of this package that hold kernels."""
    names = sorted(module.name for module in pkgutil.iter_modules(_folders))
    found = [importlib.import_module(f"{__package__}.{name}") for name in names if name not in ("aot", "target")]
    return [module for module in found if any(_jit_functions(module))]


def cases(target: Target) -> list[AotCase]:
    """What all launchers would launch on ``target``, each once."""
    found: dict[tuple, AotCase] = {}
    for module in modules():
        for case in module.aot_cases(target) if hasattr(module, "aot_cases") else ():
            found.setdefault(_identity(case), case)
    return list(found.values())


def _identity(case: AotCase) -> tuple:
    parts = (case.signature, case.constexprs, case.options)
    dictionaries = (tuple(sorted((name, repr(value)) for name, value in part.items())) for part in parts)
    return id(case.kernel), *dictionaries, frozenset(case.aligned), case.num_warps, case.num_stages


def _unwrapped(kernel: Any) -> JITFunction:
    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    return kernel


def _jit_functions(module: ModuleType) -> Iterator[tuple[str, JITFunction]]:
    """The @triton.jit functions that ``module`` defines itself."""
    for name, value in vars(module).items():
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
            yield name, value


def kernels_without_a_case(holders: Iterable[ModuleType], named: Iterable[AotCase]) -> list[str]:
    """The jitted functions that no case names and that no such function calls, directly or through others."""
    jitted = {name: function for module in holders for name, function in _jit_functions(module)}
    reached = {_unwrapped(case.kernel).__name__ for case in named}
    waiting = list(reached)
    while waiting:
        function = jitted.get(waiting.pop())
        called = set(re.findall(r"\w+", function.src)).intersection(jitted) - reached if function else set()
        reached |= called
        waiting.extend(called)
    return sorted(set(jitted) - reached)


def compile_case(case: AotCase, target: Target) -> Any:
    """``triton.compile`` for ``target``; ValueError where the case and the kernel's arguments do not match."""
    kernel = _unwrapped(case.kernel)
    given = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    if sorted(given) != sorted(kernel.arg_names):
        missing, unknown = set(kernel.arg_names) - set(given), set(given) - set(kernel.arg_names)
        raise ValueError(
            f"{case.name}: arguments without a type: {sorted(missing)}; not the kernel's: {sorted(unknown)}"
        )
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(kernel, {name: given[name] for name in kernel.arg_names}, case.constexprs, aligned)
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    return triton.compile(source, target=gpu, options=options)


def faults(case: AotCase, target: Target) -> list[str]:
    """What is wrong with the compiled case: spills, too much shared memory, tensor cores left unused."""
    compiled = compile_case(case, target)
    found = []
    if compiled.metadata.shared > target.shared_memory:
        found.append(f"needs {compiled.metadata.shared} bytes of shared memory, there are {target.shared_memory}")
    if target.backend != "cuda":
        return found
    resources = _resources(compiled.asm["cubin"])
    # registers spill to the stack
    if "STACK:0 " not in resources or "LOCAL:0 " not in resources:
        found.append(f"spills: {' '.join(resources.split('Function')[-1].split())}")
    rows = _tensor_core_rows(compiled.asm["ttir"])
    if case.dots and rows == 0:
        found.append("has no dot of 64 rows in 16 bits, as its case says")
    instruction = _demanded_instruction(target, rows)
    if instruction is not None and instruction not in compiled.asm["ptx"]:
        found.append(f"has a dot of {rows} rows in 16 bits but no {instruction} instruction")
    return found


def _resources(cubin: bytes) -> str:
    """Registers, stack and memory that the kernel takes, as cuobjdump, which comes with triton, tells them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _tensor_core_rows(ttir: str) -> int:
    """Rows of the largest product of 16-bit tiles, 0 where none has 64."""
    products = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(?:bf16|f16)>", ttir)
    return max((int(rows) for rows in products if int(rows) >= 64), default=0)


def _demanded_instruction(target: Target, rows: int) -> str | None:
    if rows == 0:
        return None
    if target.arch == 90:
        return "wgmma.mma_async"
    if target.arch == 100:
        return "tcgen05.mma" if rows >= 128 else None  # 64 rows take either kind
    return "mma.sync"
