"""Lets the GPU commands run without a GPU, up to the first launch of a kernel: with this folder on PYTHONPATH.

The driver only answers: torch.cuda tells of an H100, tensors for it lie on the CPU, PyTorch's large products are left
out. A launch is compiled for the H100, written into the file REHEARSAL, and ends the process as an interruption would.
Python imports this module at the start of every process, those of pytest's workers too.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# what the processes are started with that see a GPU, pytest's workers last; not pip and the build
STARTS = ("torch", "lora_fast", "lora-fast", "pytest", "exec(eval(")
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
)


class Reached(KeyboardInterrupt):
    """A kernel would run now."""


class Answer:
    """A stream, an event, a graph, a profile: whatever is asked of it, nothing happens."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def elapsed_time(self, _: Answer) -> float:
        return 1.0

    def key_averages(self) -> list[Any]:
        return []


def answer() -> None:
    """Everything that torch.cuda is asked, as for one H100."""
    import torch

    cuda: Any = torch.cuda
    values = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": PROPERTIES.name,
        "get_device_capability": (9, 0), "get_device_properties": PROPERTIES, "memory_allocated": 0,
        "memory_reserved": 0, "max_memory_allocated": 0, "mem_get_info": (79 << 30, 80 << 30),
    }  # fmt: skip
    for name, value in values.items():
        setattr(cuda, name, lambda *_, value=value, **__: value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep", "set_sync_debug_mode"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("Event", "Stream", "CUDAGraph", "graph", "stream", "device", "current_stream"):
        setattr(cuda, name, Answer)
    torch.profiler.profile = Answer
    torch.set_default_device = lambda _: None
    gpu = torch.device("cuda")
    torch.get_default_device = lambda: gpu

    class Generator(torch.Generator):
        def __new__(cls, *_: Any) -> Generator:
            return super().__new__(cls)

    torch.Generator = Generator  # type: ignore[misc]
    torch.version.cuda = torch.version.cuda or "none: a rehearsal"


def stop_at_launches() -> None:
    import torch
    import torch.nn.functional as F
    from triton.runtime.jit import JITFunction

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from launch_sweep import skipped_products

    from lora_fast import backends
    from lora_fast.triton_kernels import prewarm
    from lora_fast.triton_kernels.target import SM90

    class OnTheCpu(skipped_products):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            args, kwargs = tuple(map(on_the_cpu, args)), {key: on_the_cpu(one) for key, one in (kwargs or {}).items()}
            if function is F.linear:  # something of its shape, through which gradients pass
                return args[0][..., :1] * args[0].new_ones(args[1].shape[0])
            return super().__torch_function__(function, types, args, kwargs)

    def on_the_cpu(argument: Any) -> Any:
        is_device = isinstance(argument, (str, torch.device)) and str(argument).startswith("cuda")
        return type(argument)("cpu") if is_device else argument

    def reach(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        compiled(kernel, *args, **kwargs)
        line = f"{' '.join(sys.orig_argv[1:])}: {kernel.__name__}\n"
        with open(os.environ["REHEARSAL"], "a", encoding="utf-8") as file:
            file.write(line)
        raise Reached(f"a rehearsal: here {kernel.__name__} would be launched")

    stack = contextlib.ExitStack()
    stack.enter_context(OnTheCpu())
    stack.enter_context(prewarm.warmed(SM90))
    compiled = JITFunction.run
    JITFunction.run = reach
    backends.get("triton").takes = lambda device_type: True
    backends.get("cpu").takes = lambda device_type: False
    backends.get("cuda").missing = lambda: "not in a rehearsal"
    sys.modules["rehearsal_until_exit"] = stack  # type: ignore[assignment]  # open as long as the process lives


if os.environ.get("REHEARSAL") and any(word in " ".join(sys.orig_argv[1:]) for word in STARTS):
    answer()
    with contextlib.suppress(ModuleNotFoundError):  # before lora_fast is installed
        stop_at_launches()
