"""Every kernel as its launcher launches it, compiled for a target that need not be here, and looked through.

:func:`recorded` lets the launchers themselves run on CPU tensors: the driver says that a target is there, and each
launch is written down, specialised as Triton specialises it, in the place of being compiled and run. So what is
compiled is what would be launched, and no configuration can be forgotten that a call leads to. Triton compiles a kernel
that spills, or that needs more shared memory than there is, without a word: :func:`look` tells.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from . import __path__ as _folders
from .target import Target, pretended

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # along each dimension of a grid


@dataclass(frozen=True)
class Launch:
    """A kernel with what its compiled form depends on; ``signature`` types every argument, "constexpr" among them."""

    kernel: JITFunction
    key: str  # Triton's own, of a compiled form
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]  # by the index of the argument
    attributes: dict[tuple[int, ...], Any]  # divisible by 16
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def flags(self) -> dict[str, bool]:
        return {name: value for name, value in self._settings() if isinstance(value, bool)}

    @property
    def tile(self) -> dict[str, Any]:
        return {name: value for name, value in self._settings() if not isinstance(value, bool)} | self.options

    @property
    def operands(self) -> dict[str, str]:
        """The types of pointers and descriptors."""
        return {name: type_ for name, type_ in self.signature.items() if type_.startswith(("*", "tensordesc"))}

    def __str__(self) -> str:
        settings = {**self.operands, **self.tile, **{name: on for name, on in self.flags.items() if on}}
        aligned = [self.kernel.arg_names[index] for index, *_ in self.attributes]
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in settings.items())}; aligned {', '.join(aligned)})"

    def _settings(self) -> Iterator[tuple[str, Any]]:
        """The constexprs of the kernel's text, without the arguments that a value made one."""
        for (index, *_), value in self.constants.items():
            if self.kernel.params[index].is_constexpr:
                yield self.kernel.arg_names[index], value


class _Driver:
    """Answers what a launch asks before it compiles."""

    def __init__(self, target: Target, device: Any = None) -> None:
        self.target = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
        self.device = self.target if device is None else device

    def get_current_device(self) -> Any:
        return self.device  # kernels keep what they know by device

    def get_current_stream(self, _device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def recorded(target: Target) -> Iterator[list[Launch]]:
    """Within it every launch goes into the list that it gives, and nothing is run: outputs stay as they are.

    ValueError for a grid that no GPU takes.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def take(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:  # noqa: A002 (Triton's name)
        options = json.loads(compile["specialization_data"])["options"]
        options = {name: options[name] for name in ("num_warps", "num_stages", "launch_pdl")}
        attributes = {index: value for index, value in compile["configs"][0].items() if value}
        launches.append(Launch(fn.jit_function, key, compile["signature"], compile["constants"], attributes, options))
        return True  # it needs no compiling

    def checked_run(self: JITFunction, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> Any:
        if any(not 0 < size <= most for size, most in zip(grid, MOST_PROGRAMS, strict=False)):
            raise ValueError(f"{self.__name__}: got a grid of {grid} programs, expected 1 to {MOST_PROGRAMS}")
        return run(self, *args, grid=grid, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(pretended(target))
        stack.enter_context(mock.patch.object(JITFunction, "run", checked_run))
        stack.enter_context(mock.patch.object(triton.knobs.runtime, "jit_cache_hook", take))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver(target)))
        yield launches


@contextmanager
def stubbed(target: Target, launcher: Callable[..., None]) -> Iterator[None]:
    """Within it nothing is compiled, and a launch comes as far as the launcher of a compiled kernel, which this one is.

    It takes the grid's three sizes, the stream, the function, its metadata, three that are for hooks, and the kernel's
    arguments.
    """

    def compiled(self: JITFunction, key: str, _: Any, device: Any, *__: Any, **___: Any) -> CompiledKernel:
        kernel = CompiledKernel.__new__(CompiledKernel)
        kernel.name, kernel.src, kernel.metadata = self.__name__, None, SimpleNamespace(target=driver.target)
        kernel.module = True  # as one that is loaded
        kernel.function, kernel.packed_metadata, kernel._run = self.__name__, (), launcher
        self.device_caches[device][0][key] = kernel
        kernels.append(kernel)
        return kernel

    kernels: list[CompiledKernel] = []
    driver = _Driver(target, object())  # a device of its own, so that no kernel is found compiled afterwards
    with ExitStack() as stack:
        stack.enter_context(pretended(target))
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", compiled))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        try:
            yield
        finally:
            for kernel in kernels:
                kernel.module = None  # nothing is to be unloaded


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Of launches that are compiled into the same, the first."""
    return list({(launch.name, launch.key): launch for launch in launches}.values())


def representatives(launches: Iterable[Launch]) -> list[Launch]:
    """Of each kernel, tile and operands' types, the launch with the most flags and the one with the fewest.

    The former is the least aligned of its kind, which takes the most registers, the latter the most aligned.
    """
    launches = list(launches)
    everywhere: dict[str, set[str]] = {}
    for launch in launches:
        everywhere.setdefault(launch.name, set(launch.operands)).intersection_update(launch.operands)
    alike: defaultdict[tuple, list[Launch]] = defaultdict(list)
    for launch in launches:
        types = tuple(launch.operands[name] for name in sorted(everywhere[launch.name]))
        alike[launch.name, repr(launch.tile), types].append(launch)

    def flags_then_misalignment(launch: Launch) -> tuple[int, int]:
        return sum(launch.flags.values()), -len(launch.attributes)

    extremes = ((pick(some, key=flags_then_misalignment) for pick in (max, min)) for some in alike.values())
    return [launch for pair in extremes for launch in {id(launch): launch for launch in pair}.values()]


def modules() -> list[ModuleType]:
    """The modules of this package that hold kernels."""
    names = sorted(module.name for module in pkgutil.iter_modules(_folders))
    found = [importlib.import_module(f"{__package__}.{name}") for name in names if name not in ("aot", "target")]
    return [module for module in found if any(jit_functions(module))]


def jit_functions(module: ModuleType) -> Iterator[tuple[str, JITFunction]]:
    """The @triton.jit functions that ``module`` defines itself."""
    for name, value in vars(module).items():
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
            yield name, value


def kernels_never_launched(holders: Iterable[ModuleType], launches: Iterable[Launch]) -> list[str]:
    """The jitted functions that no launch names and that no such function calls, directly or through others."""
    jitted = {name: function for module in holders for name, function in jit_functions(module)}
    reached = {launch.name for launch in launches}
    waiting = list(reached)
    while waiting:
        function = jitted.get(waiting.pop())
        called = set(re.findall(r"\w+", function.src)).intersection(jitted) - reached if function else set()
        reached |= called
        waiting.extend(called)
    return sorted(set(jitted) - reached)


def compiled(launch: Launch, target: Target) -> Any:
    """``triton.compile`` for ``target``."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=_Driver(target).target, options=launch.options)


@dataclass(frozen=True)
class Findings:
    faults: list[str]
    tensor_core_rows: int  # of the largest product of 16-bit tiles, 0 where none has 64


def look(launch: Launch, target: Target) -> Findings:
    """What is wrong with the compiled launch: spills, too much shared memory, tensor cores left unused."""
    binary = compiled(launch, target)
    rows = _tensor_core_rows(binary.asm["ttir"])
    faults = []
    if binary.metadata.shared > target.shared_memory:
        faults.append(f"needs {binary.metadata.shared} bytes of shared memory, there are {target.shared_memory}")
    if target.backend != "cuda":
        return Findings(faults, rows)
    resources = _resources(binary.asm["cubin"])
    # registers spill to the stack
    if "STACK:0 " not in resources or "LOCAL:0 " not in resources:
        faults.append(f"spills: {' '.join(resources.split('Function')[-1].split())}")
    instruction = _demanded_instruction(target, rows)
    if instruction is not None and instruction not in binary.asm["ptx"]:
        faults.append(f"has a dot of {rows} rows in 16 bits but no {instruction} instruction")
    stages = launch.tile.get("NUM_STAGES", launch.options["num_stages"])
    if _runs_over_its_operands(binary.asm["ttgir"], stages):
        faults.append("has a product that may still read a tile when the next is copied over it")
    return Findings(faults, rows)


def _resources(cubin: bytes) -> str:
    """Registers, stack and memory that the kernel takes, as cuobjdump, which comes with triton, tells them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _runs_over_its_operands(ttgir: str, stages: int) -> bool:
    """Whether a product goes on into the next step (wgmma) with an operand in fewer buffers than stages.

    Triton gives an operand of a product one more buffer only where nothing else reads what is loaded.
    """
    sources = dict(re.findall(r"(%[\w#]+) = ttg\.memdesc_\w+ (%\w+)", ttgir))
    buffers = dict(re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", ttgir))
    for operands in re.findall(r"warp_group_dot_wait ([^{]*)\{pendings = [1-9]", ttgir):
        for name in re.findall(r"%\w+", operands):
            while name in sources:
                name = sources[name]
            if int(buffers.get(name, stages)) < stages:
                return True
    return False


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
