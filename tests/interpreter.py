"""bfloat16 and sums as a GPU computes them, in Triton's interpreter.

The interpreter holds bfloat16 as its bits, in uint16 arrays, and computes on those as on integers; its conversion from
float32 truncates. Here every floating-point operation widens bfloat16 operands to float32, which is exact, and rounds
the result to nearest even. Float32 has more than twice bfloat16's digits, so the second rounding of a sum, product,
quotient or root changes nothing. A sum over an axis is refused, since a GPU rounds it at every step, in an order of its
own. In wider types a GPU sums an axis in a tree, and so do we: numpy adds one row after another, with another error
than the kernel. For triton 3.6 to 3.9.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

_COMPARISONS = tuple(f"create_fcmp{kind}" for kind in ("OLT", "OGT", "OLE", "OGE", "OEQ", "ONE"))
_COMPARISONS += tuple(f"create_fcmp{kind}" for kind in ("ULT", "UGT", "ULE", "UGE", "UEQ", "UNE"))
_ARITHMETIC = tuple(
    f"create_{name}"
    for name in (
        *("fadd", "fsub", "fmul", "fdiv", "precise_divf", "approx_divf", "frem", "fneg", "fma", "clampf"),
        *("minimumf", "minnumf", "maximumf", "maxnumf", "floor", "ceil", "sqrt", "precise_sqrt", "rsqrt"),
        *("exp", "exp2", "log", "log2", "sin", "cos", "erf"),
    )
)
_CASTS = tuple(
    f"create_{name}"
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc", "int_cast", "fp_to_fp")
)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _is_bfloat16(argument: Any) -> bool:
    # what a comparison gives keeps the dtype of its operands, and holds booleans
    return (
        isinstance(argument, TensorHandle) and argument.dtype.scalar == tl.bfloat16 and argument.data.dtype == np.uint16
    )


def _widened(argument: Any) -> Any:
    return TensorHandle(widen(argument.data), tl.float32) if _is_bfloat16(argument) else argument


def _narrowed(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(narrow(handle.data), tl.bfloat16)


def _in_float32(method: Callable[..., TensorHandle], rounds: bool) -> Callable[..., TensorHandle]:
    @wraps(method)
    def wrapper(self: InterpreterBuilder, *arguments: Any, **named: Any) -> TensorHandle:
        result = method(self, *map(_widened, arguments), **{key: _widened(value) for key, value in named.items()})
        return _narrowed(result) if rounds and any(map(_is_bfloat16, arguments)) else result

    return wrapper


def _cast(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @wraps(method)
    def wrapper(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, *rest: Any) -> TensorHandle:
        if not _is_bfloat16(source) and target.scalar != tl.bfloat16:
            return method(self, source, target, *rest)
        wide = _widened(source).data.astype(np.float32)
        if target.scalar == tl.bfloat16:
            return TensorHandle(narrow(wide), tl.bfloat16)
        if target.scalar == tl.float32:
            return TensorHandle(wide, tl.float32)
        return method(self, TensorHandle(wide, tl.float32), target, *rest)

    return wrapper


def _get_bf16(self: InterpreterBuilder, value: float) -> TensorHandle:
    return TensorHandle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)


def _refused(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def wrapper(self: Any, tensor: Any) -> Any:
        if _is_bfloat16(tensor.handle):
            raise TypeError(f"tl.{method.__name__} of bfloat16 rounds at every step: convert to float32 first")
        return method(self, tensor)

    return wrapper


def _in_halves(self: ReduceOps, tensor: Any) -> Any:
    axis, data = (0, tensor.handle.data.reshape(-1)) if self.axis is None else (self.axis, tensor.handle.data)
    while (size := data.shape[axis]) > 1:  # a power of two, as all sizes of a block
        first, second = np.split(data, [size // 2], axis=axis)
        data = first + second
    if self.axis is None and self.keep_dims:
        data = data.reshape([1] * tensor.handle.data.ndim)
    elif not self.keep_dims:
        data = data.squeeze(axis)
    return self.to_tensor(data, tensor.dtype)


def patch_bfloat16() -> None:
    """Patch the interpreter of this process, once."""
    builder: Any = InterpreterBuilder
    if builder.create_dot.__module__ != InterpreterBuilder.__module__:
        raise RuntimeError("the interpreter is patched already")
    for name in (*_ARITHMETIC, *_COMPARISONS, "create_dot"):
        if hasattr(builder, name):  # triton 3.6 has no create_fneg, create_approx_divf
            setattr(builder, name, _in_float32(getattr(builder, name), rounds=name in _ARITHMETIC))
    for name in _CASTS:
        setattr(builder, name, _cast(getattr(builder, name)))
    builder.get_bf16 = _get_bf16
    ReduceOps.sum = wraps(ReduceOps.sum)(_in_halves)
    for operation, names in ((ReduceOps, ("sum",)), (ScanOps, ("cumsum", "cumprod"))):
        for name in names:
            setattr(operation, name, _refused(getattr(operation, name)))
