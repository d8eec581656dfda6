"""Which backend runs: the table behind ``backend="auto"``, the default, and what ``lora-fast info`` explains.

A backend is one row (or more) in :data:`TABLE` and one module of this package.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lora_fast.triton_kernels import constants

BACKENDS = ("cpu", "triton", "cuda", "torch")
ENVIRONMENT_VARIABLE = "LORA_FAST_BACKEND"


@dataclass(frozen=True)
class Row:
    """One line of the table of choice: the first whose device, ops and dtypes match, and that is there, is taken."""

    backend: str
    devices: tuple[str, ...]  # device types; () is any
    ops: tuple[str, ...]  # () is any
    dtypes: tuple[torch.dtype, ...]  # of the activation (of the weight for weight_norm, merge_weight); () is any
    reason: str

    def matches(self, op: str, device_type: str, dtype: torch.dtype) -> bool:
        return (
            (not self.devices or device_type in self.devices)
            and (not self.ops or op in self.ops)
            and (not self.dtypes or dtype in self.dtypes)
        )


# lora_linear with few tokens is an op of its own here: W's bytes and the host's time bound it, not products.
FEW_TOKENS = 16
FEW = f"lora_linear, up to {FEW_TOKENS} tokens"

_WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_UP_TO_FLOAT32 = _WIDE[1:]

# `lora-fast info` prints a reason on machines that nobody measured: it says what the backend does (bytes, passes,
# launches) and no time. benchmarks/results has times, each with its machine, one GPU among them (docs/gpu.md). What a
# reason counts and nobody has measured is called predicted (benchmarks/cost.py).
TABLE = (
    Row(
        backend="cpu",
        devices=("cpu",),
        ops=("weight_norm", "merge_weight"),
        dtypes=_WIDE,
        reason="one C++ pass over W, where torch makes several passes over each block of rows",
    ),
    Row(
        backend="cpu",
        devices=("cpu",),
        ops=(),
        dtypes=_WIDE,
        reason="update, gain and bias in one C++ pass after the product; on AMX, for whole tiles, in the product",
    ),
    Row(
        backend="triton",
        devices=("cuda",),
        ops=("weight_norm", "merge_weight"),
        dtypes=_UP_TO_FLOAT32,
        reason="one read of W, s BA on the tensor cores; dense B@A moves W's bytes seven times",
    ),
    Row(
        backend="cuda",
        devices=("cuda",),
        ops=(FEW,),
        dtypes=_UP_TO_FLOAT32,
        reason="W is read once by either; predicted to take less of the host's time: one C++ call makes the launches",
    ),
    Row(
        backend="triton",
        devices=("cuda",),
        ops=(),
        dtypes=_UP_TO_FLOAT32,
        reason="the rank step, gain and bias in the product's epilogue or one pass after it",
    ),
    Row(
        backend="cuda",
        devices=("cuda",),
        ops=(),
        dtypes=_UP_TO_FLOAT32,
        reason="native kernels, where Triton is not installed or takes longer",
    ),
    Row(
        backend="torch",
        devices=(),
        ops=(),
        dtypes=(),
        reason="PyTorch calls only: any device and dtype",
    ),
)

# Ops for which a measurement on the GPU at hand may put either of its backends first, and the constant that says so.
_MEASURED = {FEW: "few_tokens_backend", "weight_norm": "norm_backend"}

_modules: dict[str, ModuleType] = {}
_extension: tuple[bool, str, dict] | None = None
_warned = False


def module(name: str) -> ModuleType:
    """The module that implements a resolved backend."""
    found = _modules.get(name)
    if found is None:
        file = "torch_ops" if name == "torch" else name
        found = _modules[name] = importlib.import_module(f"{__name__}.{file}")
    return found


def extension_status() -> tuple[bool, str, dict]:
    """``(loaded, reason, build_info)`` of the compiled extension ``lora_fast._C``; never raises.

    ``reason`` says why it is missing, or how it was built; ``build_info`` is what the extension says of itself.
    """
    global _extension
    if _extension is None:
        try:
            from lora_fast.backends import cpu

            _extension = (True, "loaded", cpu.load())
        except Exception as error:  # a broken binary raises anything from ImportError to OSError; it is reported
            _extension = (False, _why_missing(error), {})
    return _extension


def _why_missing(error: Exception) -> str:
    try:
        from lora_fast import _build
    except ImportError:
        return f"lora_fast._C could not be imported: {error}"
    if _build.KIND == "none":
        return f"this installation is pure Python: {_build.REASON}"
    return f"lora_fast._C was built ({_build.KIND}) but could not be loaded: {error}"


@functools.cache
def triton_status() -> tuple[bool, str]:
    """``(usable, reason)`` of the kernels in ``lora_fast.triton_kernels``; the first call imports triton."""
    try:
        importlib.import_module("lora_fast.triton_kernels.target")
    except Exception as error:  # as for the extension
        return False, f"triton could not be imported: {error}"
    return True, "triton is installed"


def cuda_status() -> tuple[bool, str]:
    """``(present, reason)`` of the CUDA kernels in ``lora_fast._C``; a GPU is another matter."""
    loaded, reason, build = extension_status()
    if not loaded:
        return False, reason
    if build["kind"] != "cuda":
        return False, "lora_fast._C was built without CUDA kernels (LORA_FAST_BUILD=cuda demands them)"
    return True, "loaded"


def _missing(backend: str) -> str | None:
    """Why the backend is not there; None if it is."""
    if backend == "torch":
        return None
    if backend == "cpu":
        present, reason, _ = extension_status()
    else:
        present, reason = triton_status() if backend == "triton" else cuda_status()
    return None if present else reason


def _untried(backend: str) -> str | None:
    """Why ``auto`` does not take a backend that is there; None if it does."""
    if backend in ("triton", "cuda") and torch.version.hip is not None:
        return f"nobody has run {backend!r} on ROCm, where it has to be named"
    return None


def is_present(backend: str) -> bool:
    """Whether a named backend could be used, given tensors that it takes."""
    return _missing(backend) is None


def _unfit(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend that is there cannot take these tensors; None if it can."""
    if backend == "torch":
        return None
    if device_type != ("cpu" if backend == "cpu" else "cuda") and not (backend == "triton" and _interpreting()):
        return f"it was asked for, but the tensors are on {device_type!r}"
    if dtype not in (_WIDE if backend == "cpu" else _UP_TO_FLOAT32):
        return f"it does not compute in {dtype}"
    return None


def _interpreting() -> bool:
    return importlib.import_module("lora_fast.triton_kernels.target").interpreting()


def _warn_once_missing(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"lora_fast runs without its compiled kernels (the extension's or Triton's), on backend 'torch': {reason}. "
            "`lora-fast info` gives the remedy.",
            RuntimeWarning,
            stacklevel=5,
        )


def check_name(backend: str, argument: str = "backend") -> None:
    """Raise ValueError unless ``backend`` is "auto" or one of :data:`BACKENDS`."""
    if backend != "auto" and backend not in BACKENDS:
        choices = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"{argument}: got {backend!r}, expected one of {choices}")


def linear_op(x: Tensor) -> str:
    """The name of lora_linear on x in the table; in a traced graph one for any number of tokens, so that it holds."""
    if torch.compiler.is_compiling():
        return "lora_linear"
    return FEW if x.numel() <= FEW_TOKENS * x.shape[-1] else "lora_linear"


def _preferred(op: str) -> str | None:
    """The backend that was measured to be faster at an op on the current GPU, or is predicted to."""
    if op not in _MEASURED:
        return None
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    return str(getattr(_constants(index), _MEASURED[op]))


@functools.cache
def _constants(index: int | None) -> constants.Constants:
    if index is None or torch.version.hip is not None:
        return constants.PREDICTED
    major, minor = torch.cuda.get_device_capability(index)
    return constants.of_capability(10 * major + minor)


@functools.cache
def _table(preferred: str | None) -> tuple[Row, ...]:
    return tuple(sorted(TABLE, key=lambda row: row.backend != preferred))


def choose(op: str, device_type: str, dtype: torch.dtype) -> Row:
    """The row of the table that ``auto`` takes for this op, device type and dtype."""
    passed_over = None
    preferred = _preferred(op) if device_type == "cuda" else None
    for row in _table(preferred):
        if row.matches(op, device_type, dtype):
            missing = _missing(row.backend) or _untried(row.backend)
            if missing is None:
                if row.backend == "torch" and passed_over is not None:
                    _warn_once_missing(passed_over)
                return row
            passed_over = passed_over or missing
    raise AssertionError("the last row of the table matches everything")


def resolve(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend's name for one call. Under ``torch.compile`` this is decided at trace time.

    A named backend is used or refused: RuntimeError with the reason when it is not there, ValueError when unknown.
    """
    if backend == "auto":
        backend = default_backend()
    if backend == "auto":
        return choose(op, device_type, dtype).backend
    check_name(backend)
    if missing := _missing(backend):
        raise RuntimeError(f"backend {backend!r} is not available: {missing}")
    if unfit := _unfit(backend, device_type, dtype):
        raise RuntimeError(f"backend {backend!r} cannot be used: {unfit}")
    return backend


def fuses_norm(name: str, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether a backend's ``dora_linear_fwd`` takes these: the product and DoRA's norm by rows in one read of W."""
    fuses = getattr(module(name), "fuses_norm", None)
    return fuses is not None and fuses(x, weight, lora_A, lora_B)


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, 1.3 s, with lora_fast.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Block:
    """The :func:`use_backend` that is open, and the backward that it was entered in."""

    backend: str
    graph_task: int


_NO_BACKWARD = -1  # what autograd's engine gives as the number of its task outside of a backward
_process_default: str | None = None
_block: ContextVar[_Block | None] = ContextVar("lora_fast_backend", default=None)


def default_backend() -> str:
    """What ``backend="auto"`` stands for: the first that is set of use_backend, set_backend, LORA_FAST_BACKEND."""
    return default_backend_source()[0]


def default_backend_source() -> tuple[str, str]:
    """The default backend and where it comes from."""
    if block := _block.get():
        return block.backend, "use_backend"
    if _process_default is not None:
        return _process_default, "set_backend"
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    if value:
        check_name(value, ENVIRONMENT_VARIABLE)
        return value, ENVIRONMENT_VARIABLE
    return "auto", "built-in"


def set_backend(backend: str) -> None:
    """Set what ``backend="auto"`` means in this process, in all of its threads, until it is set again.

    It comes before the environment variable ``LORA_FAST_BACKEND``, and :func:`use_backend` before both; "auto" leaves
    every call to the table. The backend must be there when an op runs, not yet here. Raises ValueError for an unknown
    name.
    """
    global _process_default
    check_name(backend)
    _process_default = backend


def use_backend(backend: str) -> contextlib.AbstractContextManager[None]:
    """A context manager: what ``backend="auto"`` means for the calls that its block makes.

    ::

        with lora_fast.use_backend("torch"):
            loss = model(x)

    It is kept in a ContextVar, so no other thread or asyncio task sees it. A task that is created in the block starts
    with it, and a thread with the default of the process (:func:`set_backend`). ``torch.compile`` reads it when it
    traces, and with ``fullgraph=True`` cannot trace the block itself: open it around the first compiled call.

    Backward runs on its forward's backend, wherever it is called. So does what activation checkpointing computes again,
    in lora_fast's layers (see :class:`ForwardDefault`); a checkpointed function that calls :mod:`lora_fast.functional`
    itself finds the default that holds where backward runs, so name its backend there.

    Raises ValueError for an unknown name, before the block is entered.
    """
    check_name(backend)
    return _open_block(backend)


@contextlib.contextmanager
def _open_block(backend: str) -> Iterator[None]:
    token = _block.set(_Block(backend, torch._C._current_graph_task_id()))
    try:
        yield
    finally:
        _block.reset(token)


class ForwardDefault:
    """The default backend of a layer's last forward, for the recomputation of that forward in backward.

    Activation checkpointing calls the layer a second time, inside autograd's engine: after the block of
    :func:`use_backend` was left and, on a GPU, in a thread that never saw it. That a call is a recomputation is
    certain, since a task of the engine runs in its thread. Which forward it repeats is told to nobody, and is taken to
    be the layer's last. So a layer that runs under two defaults before the backward of the first takes the second's
    there: its backend must be named.
    """

    def __init__(self) -> None:
        self._backend: str | None = None

    def in_force(self) -> contextlib.AbstractContextManager[None]:
        """The context for one call of the layer: remembers the default in a forward, brings it back in a backward."""
        if torch.compiler.is_compiling():  # a traced graph has its backends' names in it, in the recomputation too
            return contextlib.nullcontext()
        graph_task, block = torch._C._current_graph_task_id(), _block.get()
        if graph_task == _NO_BACKWARD:
            self._backend = default_backend()
        elif self._backend is not None and (block is None or block.graph_task != graph_task):
            return _open_block(self._backend)
        return contextlib.nullcontext()  # a block that the recomputation itself has entered again holds as it is


OPS = ("weight_norm", "lora_linear", FEW, "lora_compose", "merge_weight")


def explain(device_type: str = "cpu") -> list[dict[str, str]]:
    """What ``auto`` chooses for each op and dtype on ``device_type``, and why: rows for ``lora-fast info``."""
    rows = []
    for op in OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            row = choose(op, device_type, dtype)
            if op == FEW and row.backend == choose("lora_linear", device_type, dtype).backend:
                continue
            rows.append(
                {
                    "op": op,
                    "device": device_type,
                    "dtype": str(dtype).removeprefix("torch."),
                    "backend": row.backend,
                    "reason": row.reason,
                }
            )
    return rows
