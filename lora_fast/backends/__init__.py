"""Which backend runs: the table behind ``backend="auto"``, the default, and what ``lora-fast info`` explains.

A backend is one row (or more) in :data:`TABLE` and one module of this package.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

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

# What was measured, in the reasons of "cpu": 4096², bfloat16, rank 16, 2 threads,
# benchmarks/results/intel-xeon-processor-2-threads/layer.json. No GPU has run these kernels yet: what their reasons
# count in bytes and FLOPs is predicted (benchmarks/cost.py).
TABLE = (
    Row(
        backend="cpu",
        devices=("cpu",),
        ops=("weight_norm", "merge_weight"),
        dtypes=_WIDE,
        reason="one C++ pass over W: weight_norm takes 1.6 ms where torch takes 38",
    ),
    Row(
        backend="cpu",
        devices=("cpu",),
        ops=(),
        dtypes=_WIDE,
        reason="products and passes in C++: a DoRA step of 512 tokens takes 19 ms where torch takes 69",
    ),
    Row(
        backend="triton",
        devices=("cuda",),
        ops=("weight_norm", "merge_weight"),
        dtypes=_UP_TO_FLOAT32,
        reason="predicted: one read of W, s BA on the tensor cores; dense B@A moves W's bytes seven times",
    ),
    Row(
        backend="cuda",
        devices=("cuda",),
        ops=(FEW,),
        dtypes=_UP_TO_FLOAT32,
        reason="predicted: W is read once by either; one C++ call launches what takes Triton's Python 30 µs",
    ),
    Row(
        backend="triton",
        devices=("cuda",),
        ops=(),
        dtypes=_UP_TO_FLOAT32,
        reason="predicted: the rank step, gain and bias in the product's epilogue or one pass after it",
    ),
    Row(
        backend="cuda",
        devices=("cuda",),
        ops=(),
        dtypes=_UP_TO_FLOAT32,
        reason="predicted: native kernels where Triton is not installed",
    ),
    Row(
        backend="torch",
        devices=(),
        ops=(),
        dtypes=(),
        reason="PyTorch calls only: any device and dtype",
    ),
)

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


def choose(op: str, device_type: str, dtype: torch.dtype) -> Row:
    """The row of the table that ``auto`` takes for this op, device type and dtype."""
    passed_over = None
    for row in TABLE:
        if row.matches(op, device_type, dtype):
            missing = _missing(row.backend)
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


_default: str | None = None


def default_backend() -> str:
    """What ``backend="auto"`` stands for: :class:`use_backend`'s, else ``LORA_FAST_BACKEND``, else "auto"."""
    return default_backend_source()[0]


def default_backend_source() -> tuple[str, str]:
    """The default backend and where it comes from."""
    if _default is not None:
        return _default, "use_backend"
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    if value:
        check_name(value, ENVIRONMENT_VARIABLE)
        return value, ENVIRONMENT_VARIABLE
    return "auto", "built-in"


class use_backend:
    """Set the backend that ``backend="auto"`` means, for the whole process.

    As a function it stays set; as a context manager the former one returns at the end::

        lora_fast.use_backend("torch")
        with lora_fast.use_backend("cpu"):
            ...

    Raises ValueError for an unknown name. The backend must be there when an op runs, not yet here.
    """

    def __init__(self, backend: str) -> None:
        global _default
        check_name(backend)
        self._former = _default
        _default = backend

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _default
        _default = self._former


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
