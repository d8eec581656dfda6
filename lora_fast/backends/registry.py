"""The list of backends, and the one that runs a call.

A backend is a package ``lora_fast.backends.<name>`` with a :class:`Backend` named ``BACKEND``, a module ``plan``
(:mod:`lora_fast.backends.plan`) and a module ``ops``, both with a function for every op of :mod:`lora_fast.ops`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lora_fast.backends.plan import Plan, Refusal
from lora_fast.calls import Call, Kept, compute_dtype

# The names, in the order in which "auto" asks them: a new backend is a package and its name here.
BackendName = Literal["auto", "cpu", "cuda", "triton", "torch"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)[1:]


class Backend:
    """What the registry asks of a backend before it loads ``plan`` and ``ops``."""

    reads: tuple[Kept, ...] = get_args(Kept)  # that a forward may have kept: another kind would give wrong gradients
    # for the gain's gradient, where the choice is its own: of 16-bit activations, and of wider ones, whose base would
    # make the gradient of two sums, with a rounding error of half as much again as eager's in float32
    keeps: Kept = "product"
    keeps_wide: Kept = "product"

    def __init__(self, package: str, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
        self.name = package.rpartition(".")[2]
        self.dtypes = dtypes  # that it computes in; None: any
        self._package = package

    @functools.cached_property
    def plan(self) -> ModuleType:
        return importlib.import_module(f"{self._package}.plan")

    @functools.cached_property
    def ops(self) -> ModuleType:
        return importlib.import_module(f"{self._package}.ops")

    def missing(self) -> str | None:
        """Why the backend is not there; None if it is."""
        return None

    def untried(self) -> str | None:
        """Why "auto" does not take the backend, though it is there; None if it does."""
        return None

    def takes(self, device_type: str) -> bool:
        """Whether tensors on such a device can be taken."""
        return True

    def is_launch_failure(self, error: Exception) -> bool:
        """Whether ``error`` says that a kernel does not run on this device, so that nothing was computed or changed."""
        return False


@functools.cache
def get(name: str) -> Backend:
    """The backend of that name, there or not."""
    return importlib.import_module(f"lora_fast.backends.{name}").BACKEND


def check_name(backend: str, argument: str = "backend") -> None:
    """Raise ValueError unless ``backend`` is "auto" or one of :data:`NAMES`."""
    if backend != "auto" and backend not in NAMES:
        choices = ", ".join(repr(name) for name in ("auto", *NAMES))
        raise ValueError(f"{argument}: got {backend!r}, expected one of {choices}")


def is_present(name: str) -> bool:
    """Whether a named backend could be used, given tensors that it takes."""
    return get(name).missing() is None


def run(op: str, call: Call, name: str) -> Any:
    """The op's outputs by the named backend, or by the first that does not refuse.

    A named backend is used or refused: RuntimeError with the reason, ValueError for an unknown name.
    """
    if name != "auto":
        backend, plan = _named(op, call, name)
        return getattr(backend.ops, op)(call, plan)
    while True:
        backend, plan = _chosen(op, call)
        try:
            return getattr(backend.ops, op)(call, plan)
        except Exception as error:
            if not backend.is_launch_failure(error):
                raise
            _set_aside(op, backend, plan, error)


def plan_of(op: str, call: Call, name: str = "auto") -> tuple[str, Plan]:
    """(backend, its plan) as :func:`run` would take them; RuntimeError where a named backend refuses."""
    backend, plan = _chosen(op, call) if name == "auto" else _named(op, call, name)
    return backend.name, plan


def _named(op: str, call: Call, name: str) -> tuple[Backend, Plan]:
    check_name(name)
    backend = get(name)
    if missing := backend.missing():
        raise RuntimeError(f"backend {name!r} is not available: {missing}")
    device_type = _device_type(call)
    if not backend.takes(device_type):
        reason = f"it was asked for, but the tensors are on {device_type!r}"
        raise RuntimeError(f"backend {name!r} cannot be used: {reason}")
    plan = planned(backend, op, call)
    if isinstance(plan, Refusal):
        raise RuntimeError(f"backend {name!r} cannot be used: {plan.reason}")
    return backend, plan


def _chosen(op: str, call: Call) -> tuple[Backend, Plan]:
    """The first backend that neither refuses nor yields; else the first that does not refuse."""
    yielding = None
    for backend in _candidates(_device_type(call)):
        if _failed and (op, backend.name) in _failed:
            continue
        plan = planned(backend, op, call)
        if isinstance(plan, Refusal):
            continue
        if not plan.yields:
            return backend, plan
        yielding = yielding or (backend, plan)
    assert yielding is not None  # torch takes everything
    return yielding


def planned(backend: Backend, op: str, call: Call) -> Plan | Refusal:
    """The backend's answer, whether or not it is there and takes the device."""
    if backend.dtypes is not None and (dtype := compute_dtype(call)) is not None and dtype not in backend.dtypes:
        return Refusal(f"it does not compute in {dtype}")
    if (kept := getattr(call, "kept", None)) is not None and kept not in backend.reads:
        return Refusal(f"its backward does not read {kept!r}, which the forward kept")
    answer = getattr(backend.plan, op)
    return answer if isinstance(answer, (Plan, Refusal)) else answer(call)


def kept_by(name: str, device_type: str, is_wide: bool) -> Kept:
    """What forwards keep for the gain's gradient, where the named backend or "auto" takes tensors on such a device.

    ``is_wide``: of activations of more than 16 bits.

    It is told before the op runs, because the graphs that torch.compile and export make have it in them; another
    backend that runs them there keeps and reads it too, in the way that it has.
    """
    backend = _candidates(device_type)[0] if name == "auto" else get(name)
    return backend.keeps_wide if is_wide else backend.keeps


# as on `resolved` in default.py
kept_by._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _device_type(call: Call) -> str:
    tensor: Tensor = call[0]
    return tensor.device.type


_told: set[str] = set()  # of which device types the warning was given


@functools.cache
def _candidates(device_type: str) -> tuple[Backend, ...]:
    """What "auto" asks for tensors on such a device; warns where kernels of ours are made for it and none is there."""
    backends = [backend for backend in map(get, NAMES) if backend.takes(device_type)]
    absent = {backend.name: backend.missing() or backend.untried() for backend in backends}
    found = tuple(backend for backend in backends if absent[backend.name] is None)
    reasons = [reason for reason in absent.values() if reason is not None]
    if reasons and len(found) == 1 and device_type not in _told:
        _told.add(device_type)  # first: a warning that is raised as an error is raised once too
        warnings.warn(
            f"lora_fast runs without its compiled kernels (the extension's or Triton's), on backend {found[0].name!r}: "
            f"{reasons[0]}. `lora-fast info` gives the remedy.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


# (op, backend) whose kernel did not launch on this machine
_failed: set[tuple[str, str]] = set()


def _set_aside(op: str, backend: Backend, plan: Plan, error: Exception) -> None:
    """From now on "auto" takes another backend for the op."""
    _failed.add((op, backend.name))
    kernels = ", ".join(dict.fromkeys(step.kernel for step in plan.steps.values()))
    warnings.warn(
        f"lora_fast: {op} does not launch on backend {backend.name!r} ({kernels}), which is left out for this op from "
        f"now on: {type(error).__name__}: {error}",
        RuntimeWarning,
        stacklevel=2,
    )
