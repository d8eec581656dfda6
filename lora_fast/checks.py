"""Validation of the public functions' arguments: each message names the argument, what came and what was expected."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from lora_fast.calls import Axis
from lora_fast.dtypes import FLOATS

_AXES = get_args(Axis)
_CLASSES, _FLOATS = {Tensor, torch.nn.Parameter}, set(FLOATS)


def are_usual(
    x: Any, weight: Any, bias: Any, lora_A: Any, lora_B: Any, scaling: Any, vector: Any, dropout_p: Any
) -> bool:
    """Whether a linear's arguments pass the checks below, and x has W's dtype outside of autocast.

    It takes the host a third of the checks' time. Where it is False they say what is wrong, or that it is only unusual.
    ``vector`` is the gain or the magnitude [N]; it and ``bias`` may be None.
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return False
    tensors = [x, weight, lora_A, lora_B]
    if bias is not None:
        tensors.append(bias)
    if vector is not None:
        tensors.append(vector)
    if not _CLASSES.issuperset(map(type, tensors)):
        return False
    device, strided = weight.device, torch.strided
    for tensor in tensors:
        if tensor.dtype not in _FLOATS or tensor.layout is not strided or tensor.device != device:
            return False
    shape, shape_A = weight.shape, lora_A.shape
    if len(shape) != 2 or len(shape_A) != 2 or 0 in shape or shape_A[0] == 0:
        return False
    N, K = shape
    return (
        shape_A[1] == K
        and lora_B.shape == (N, shape_A[0])
        and x.shape[-1:] == (K,)
        and (bias is None or bias.shape == (N,))
        and (vector is None or vector.shape == (N,))
        and x.dtype == weight.dtype
        and not weight.requires_grad
        and type(scaling) is float
        and -math.inf < scaling < math.inf
        and type(dropout_p) is float
        and dropout_p == 0.0
    )


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating-point dtype")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected a dense (strided) tensor")


def check_shape(name: str, value: Tensor, expected: tuple[int | None, ...], terms: str) -> None:
    """``None`` in ``expected`` is any size; ``terms`` names the sizes, as in "[N, K]"."""
    shape = value.shape
    if shape == expected:
        return
    fits = len(shape) == len(expected)
    if fits:
        for size, wanted in zip(shape, expected):  # noqa: B905 - they are of one length
            if wanted is not None and size != wanted:
                fits = False
    if not fits:
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected {terms} = [{sizes}]")


def check_optional_vector(name: str, value: Any, size: int, terms: str, device: torch.device) -> None:
    if value is not None:
        check_tensor(name, value)
        check_shape(name, value, (size,), terms)
        check_device(name, value, device, "the activation" if name != "gain" else "the other tensors")


def check_device(name: str, value: Tensor, device: torch.device, of: str) -> None:
    if value.device != device:
        raise ValueError(f"{name}: got device {value.device}, expected {device}, that of {of}")


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a Python float")
    if not -math.inf < value < math.inf:  # math.isfinite takes no number that torch.compile holds symbolic
        raise ValueError(f"{name}: got {value}, expected a finite number")


def check_axis(axis: Any, name: str = "axis") -> None:
    if axis not in _AXES:
        raise ValueError(f"{name}: got {axis!r}, expected 'output' or 'input'")


def check_adapter(weight: Any, lora_A: Any, lora_B: Any, scaling: Any) -> None:
    """weight [N, K], lora_A [R, K], lora_B [N, R] on one device, a finite scaling; R, N, K at least 1."""
    check_tensor("weight", weight)
    check_shape("weight", weight, (None, None), "[N, K]")
    N, K = weight.shape
    if N == 0 or K == 0:
        raise ValueError(f"weight: got shape {[N, K]}, expected at least one row and one column")
    check_tensor("lora_A", lora_A)
    check_shape("lora_A", lora_A, (None, K), "[R, K]")
    R = lora_A.shape[0]
    if R == 0:
        raise ValueError("lora_A: got shape [0, K], expected a rank R of at least 1")
    check_lora_B(lora_B, N, R)
    check_device("lora_A", lora_A, weight.device, "weight")
    check_device("lora_B", lora_B, weight.device, "weight")
    check_number("scaling", scaling)


def check_lora_B(lora_B: Any, N: int, R: int) -> None:
    check_tensor("lora_B", lora_B)
    check_shape("lora_B", lora_B, (N, R), "[N, R]")


def check_frozen(weight: Tensor) -> None:
    if weight.requires_grad:
        raise ValueError(
            "weight: got requires_grad=True, expected a frozen weight (weight.requires_grad_(False)): "
            "lora_fast computes no gradient for it"
        )


def check_activation(name: str, value: Any, width: int, terms: str, weight: Tensor) -> None:
    """``value`` [..., width] of the weight's device; its dtype is left to :func:`check_dtype`."""
    check_tensor(name, value)
    if value.dim() == 0 or value.shape[-1] != width:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected {terms} = [..., {width}]")
    check_device(name, value, weight.device, "weight")


def check_dtype(name: str, value: Tensor, expected: torch.dtype, of: str) -> None:
    if value.dtype != expected:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {expected}, that of {of} (or use torch.autocast)")


def check_dropout(dropout_p: Any, seed: Any) -> None:
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability in [0, 1]")
    if dropout_p == 0.0:
        return
    if seed is None:
        raise ValueError("seed: got None, expected an int64 tensor (functional.draw_seed) when dropout_p > 0")
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed: got {seed!r}, expected an int64 tensor of one element (functional.draw_seed)")
