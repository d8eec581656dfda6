"""What ``backend="auto"`` stands for: a process's default, a block's, a forward's for its recomputation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from lora_fast.backends.registry import BackendName, check_name, get

ENVIRONMENT_VARIABLE = "LORA_FAST_BACKEND"


def resolved(backend: BackendName) -> str:
    """What an op is called with: a backend's name, or "auto", which the op resolves when it runs.

    The default is looked up here, under ``torch.compile`` when it traces. Raises ValueError for an unknown name and
    RuntimeError, with the reason, for a backend that is not there.
    """
    name = default_backend() if backend == "auto" else backend
    if name != "auto":
        check_name(name)
        if missing := get(name).missing():
            raise RuntimeError(f"backend {name!r} is not available: {missing}")
    return name


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, 1.3 s, with lora_fast.
resolved._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Block:
    """The :func:`use_backend` that is open, and the backward that it was entered in."""

    backend: str
    graph_task: int


_AS_IT_IS = contextlib.nullcontext()  # one for all: it holds nothing
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


def set_backend(backend: BackendName) -> None:
    """Set what ``backend="auto"`` means in this process, in all of its threads, until it is set again.

    It comes before the environment variable ``LORA_FAST_BACKEND``, and :func:`use_backend` before both; "auto" leaves
    the choice to the op when it runs. The backend must be there when an op is called, not yet here. Raises ValueError
    for an unknown name.
    """
    global _process_default
    check_name(backend)
    _process_default = backend


def use_backend(backend: BackendName) -> contextlib.AbstractContextManager[None]:
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
            return _AS_IT_IS
        graph_task, block = torch._C._current_graph_task_id(), _block.get()
        if graph_task == _NO_BACKWARD:
            self._backend = default_backend()
        elif self._backend is not None and (block is None or block.graph_task != graph_task):
            return _open_block(self._backend)
        return _AS_IT_IS  # a block that the recomputation itself has entered again holds as it is
