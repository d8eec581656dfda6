"""Inputs, cases and the error budget, shared by the tests and the benchmarks.

Budget (law 1), with truth the reference in float64 on the same input, and eager the worse of the reference's dense and
factored formulas, run in the input's own dtype:

    RMS error ≤ 1.1 × eager's (float32: 1.25 ×) + 0.1 ulp of the output's dtype at the output's RMS
    largest error ≤ 2 × eager's + 1 ulp at the output's largest

The ratio of two root mean squares of n errors is known to about 1/√n, so that errors are pooled over draws to POOL
numbers at least. Where a result has too few numbers a draw for that, three such deviations are allowed besides.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_fast.backends import extension
from lora_fast.backends.torch import ops as torch_ops


@dataclass(frozen=True)
class Case:
    """One input to every op: sizes, dtypes, layouts."""

    leading: tuple[int, ...]  # x's dimensions before the last
    N: int
    K: int
    R: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None  # the case's dtype if None
    bias: bool = True
    layout: str = "contiguous"  # of x and weight; or "transposed", "strided"
    scaling: float = 0.7

    def __str__(self) -> str:
        leading = "x".join(map(str, self.leading)) or "1d"
        text = f"{leading}-{self.N}x{self.K}-r{self.R}-{str(self.dtype).removeprefix('torch.')}"
        if self.adapter_dtype is not None:
            text += f"-adapter_{str(self.adapter_dtype).removeprefix('torch.')}"
        if not self.bias:
            text += "-nobias"
        return text if self.layout == "contiguous" else f"{text}-{self.layout}"


_f64, _f32, _bf16, _f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
_SIZES: tuple[tuple[tuple[int, ...], int, int, int], ...] = (
    # leading, N, K, R: plain, prime, ragged around vector and tile widths, rank 1 and above min(N, K), one row, column
    ((4, 8), 64, 96, 16),
    ((13,), 31, 37, 5),
    ((2, 3, 5), 33, 65, 17),
    ((17,), 129, 127, 1),
    ((1,), 48, 80, 33),
    ((), 40, 24, 8),
    ((0,), 16, 24, 4),
    ((7,), 1, 19, 1),
    ((6,), 23, 1, 16),
    ((40,), 257, 131, 64),
)
CASES: tuple[Case, ...] = (
    *(Case(*size, dtype) for size in _SIZES for dtype in (_f32, _bf16)),
    *(Case(*size, dtype) for size in _SIZES[:3] for dtype in (_f16, _f64)),
    *(Case((5, 4), 48, 56, rank, dtype) for rank in (3, 100, 200, 384, 768) for dtype in (_f32, _bf16)),
    *(Case((9,), 47, 61, 7, dtype, layout=layout) for layout in ("transposed", "strided") for dtype in (_f32, _bf16)),
    Case((12,), 50, 70, 8, _bf16, adapter_dtype=_f32),
    Case((12,), 50, 70, 8, _f16, adapter_dtype=_f32),
    Case((12,), 50, 70, 8, _f32, adapter_dtype=_bf16),
    Case((3, 25), 64, 96, 16, _bf16),  # whole tiles, more tokens than the kernels for few take
    Case((50,), 96, 64, 40, _bf16, adapter_dtype=_f32),
    Case((12,), 50, 70, 150, _bf16, adapter_dtype=_f32),
    Case((12,), 50, 70, 8, _f32, bias=False),
    Case((12,), 50, 70, 8, _bf16, bias=False),
)


@dataclass
class Inputs:
    """Random tensors for a case; ``magnitude`` and ``gain`` by axis. Scales are those of a trained layer."""

    case: Case
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    h: Tensor
    base: Tensor
    grad_y: Tensor
    magnitude: dict[str, Tensor] = field(default_factory=dict)
    gain: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        return self.case.scaling


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """x ~ N(0, 1), W ~ N(0, 1/K), lora_A ~ N(0, 1/K), lora_B ~ N(0, 1/R): the update is as large as W.

    On the default device, the same numbers on every device.
    """
    generator, device = torch.Generator().manual_seed(seed), torch.get_default_device()
    adapter_dtype = case.adapter_dtype or case.dtype
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        wide_values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return (wide_values * scale).to(dtype).to(device)

    N, K, R = case.N, case.K, case.R
    inputs = Inputs(
        case=case,
        x=normal(*case.leading, K),
        weight=normal(N, K, scale=K**-0.5),
        bias=normal(N) if case.bias else None,
        lora_A=normal(R, K, scale=K**-0.5, dtype=adapter_dtype),
        lora_B=normal(N, R, scale=R**-0.5, dtype=adapter_dtype),
        h=normal(*case.leading, R),
        base=normal(*case.leading, N),
        grad_y=normal(*case.leading, N),
    )
    for axis, size in (("output", N), ("input", K)):
        inputs.magnitude[axis] = normal(size, dtype=wide).abs() + 0.5
        inputs.gain[axis] = 1 + 0.2 * normal(size, dtype=wide)
    if case.layout != "contiguous":
        inputs.x, inputs.weight = _laid_out(inputs.x, case.layout), _laid_out(inputs.weight, case.layout)
    return inputs


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides: the last two dimensions swapped in memory, or every other element."""
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    spread = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] * 2), torch.nan)
    spread[..., ::2] = tensor
    return spread[..., ::2]


# The formulas of the reference's linears, of which the worse is the yardstick.
EAGER: tuple[dict[str, bool], ...] = ({"dense": True}, {"dense": False})
POOL = 1024  # numbers: both sides of a comparison are then known to 2%


class ErrorBudget:
    """The errors of named results, pooled over draws, and whether they keep the budget; ``dtype`` is eager's."""

    def __init__(self, dtype: torch.dtype) -> None:
        # in float32 the order of a sum alone moves an honest result by more than a tenth
        self._rms_factor = 1.25 if dtype == torch.float32 else 1.1
        self._pools: dict[str, _Pool] = {}

    def add(
        self, actual: Mapping[str, Tensor], eagers: Sequence[Mapping[str, Tensor]], truth: Mapping[str, Tensor]
    ) -> None:
        """One draw: the results of the code under test, of plain PyTorch in the same dtype, and in float64."""
        for name, value in actual.items():
            pool = self._pools.setdefault(name, _Pool(len(eagers)))
            pool.add(value, [eager[name] for eager in eagers], truth[name])

    def is_full(self) -> bool:
        """Whether every result has POOL numbers, or none at all."""
        return bool(self._pools) and all(pool.count >= POOL or pool.count == 0 for pool in self._pools.values())

    def fault(self) -> str | None:
        """How a result misses the budget, or None. Shapes and dtypes must match, NaN is always a fault."""
        for name, pool in self._pools.items():
            if fault := pool.fault(self._rms_factor):
                return f"{name} has {fault}"
        return None

    def check(self) -> None:
        """Raise AssertionError with what is missed."""
        if fault := self.fault():
            raise AssertionError(fault)


class _Pool:
    """The errors of one result."""

    def __init__(self, eagers: int) -> None:
        self.count = 0
        self._mismatch: str | None = None
        self._eps = 0.0
        self._actual, self._truth, self._eagers = _Size(), _Size(), [_Size() for _ in range(eagers)]

    def add(self, actual: Tensor, eagers: Sequence[Tensor], truth: Tensor) -> None:
        if actual.shape != truth.shape:
            self._mismatch = f"shape {list(actual.shape)}, expected {list(truth.shape)}"
        elif actual.dtype != eagers[0].dtype:
            self._mismatch = f"dtype {actual.dtype}, expected {eagers[0].dtype}"
        if self._mismatch is not None or actual.numel() == 0:
            return
        self.count += actual.numel()
        self._eps = torch.finfo(actual.dtype).eps
        truth = truth.double()
        self._truth.add(truth)
        self._actual.add(actual.double() - truth)
        for size, eager in zip(self._eagers, eagers, strict=True):
            size.add(eager.double() - truth)

    def fault(self, rms_factor: float) -> str | None:
        if self._mismatch is not None or self.count == 0:
            return self._mismatch
        rms, largest = self._actual.rms(), self._actual.largest
        if self.count < POOL:
            rms_factor *= 1 + 3 / self.count**0.5
        rms_bound = rms_factor * max(size.rms() for size in self._eagers) + 0.1 * self._eps * self._truth.rms()
        if not rms <= rms_bound:
            return f"an RMS error of {rms:.3g}, more than {rms_bound:.3g}"
        bound = 2 * max(size.largest for size in self._eagers) + self._eps * self._truth.largest
        if not largest <= bound:
            return f"a largest error of {largest:.3g}, more than {bound:.3g}"
        return None


class _Size:
    """Root mean square and largest magnitude of the values added."""

    def __init__(self) -> None:
        self._count, self._squares, self.largest = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        self._count += values.numel()
        self._squares += float(values.square().sum())
        largest = float(values.abs().max())
        self.largest = largest if largest != largest else max(self.largest, largest)  # NaN stays

    def rms(self) -> float:
        return (self._squares / self._count) ** 0.5


def budget_fault(
    name: str, actual: Tensor, eager: Tensor | Sequence[Tensor], truth: Tensor, dtype: torch.dtype | None = None
) -> str | None:
    """How one result of one draw misses the budget, or None; ``eager``, by one formula or more, is in ``dtype``.

    Unset, that is the dtype of ``actual``.
    """
    budget = ErrorBudget(dtype or actual.dtype)
    eagers = [eager] if isinstance(eager, Tensor) else eager
    budget.add({name: actual}, [{name: tensor} for tensor in eagers], {name: truth})
    return budget.fault()


def dropout_mask(seed: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """The mask that every backend draws from ``seed`` for an input of ``shape`` [..., K]: bool, True where kept."""
    if p == 1.0:
        return torch.zeros(shape, dtype=torch.bool, device=seed.device)
    width = shape[-1]
    tokens = 1
    for size in shape[:-1]:
        tokens *= size
    return torch_ops.dropout_mask(seed, (tokens, width), p).view(shape)


def scaled_dropout_mask(seed: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """:func:`dropout_mask` as the reference wants it: float64, 1/(1-p) where kept and 0 elsewhere."""
    return dropout_mask(seed, shape, p).double() / max(1.0 - p, torch.finfo(torch.float64).tiny)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is filled with NaN, so that an element which nobody wrote shows."""
    memory: Any = torch.utils.deterministic  # its attribute is a property, which type checkers do not see
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """PyTorch has so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes that one call of ``step`` holds at once on the default device, beyond what was allocated before it.

    Call the step once before, or what it allocates only once counts as transient.
    """
    return _peak_bytes_gpu(step) if torch.get_default_device().type == "cuda" else _highest(memory_events(step))


def _peak_bytes_gpu(step: Callable[[], object]) -> int:
    """What the caching allocator handed out, which sees all of PyTorch's and Triton's memory, rounded up to 512."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def memory_events(step: Callable[[], object]) -> list[tuple[int, int]]:
    """Memory that one call of ``step`` takes (+) and gives back (-) on a CPU: nanoseconds since 1970, bytes.

    From the profiler's memory events, which see every allocation of PyTorch's, those inside a custom operator too (a
    dispatch mode does not), and from those of native scratch, taken past PyTorch's allocator.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler writes to stderr when it starts
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        recorded_scratch() as scratch,
        torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profiler,
    ):
        step()
    recorded = profiler.profiler.kineto_results.events()
    return [(event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]"] + scratch


def scratch_peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes of native scratch that one call of ``step`` holds at once."""
    with recorded_scratch() as events:
        step()
    return _highest(events)


@contextmanager
def recorded_scratch() -> Iterator[list[tuple[int, int]]]:
    """The native scratch taken (+) and given back (-) inside, complete at the end: nanoseconds since 1970, bytes.

    Empty where nothing is compiled.
    """
    events: list[tuple[int, int]] = []
    loaded, _, _ = extension.status()
    if not loaded:
        yield events
        return
    scratch_events = torch.ops.lora_fast_c.scratch_events
    scratch_events(True)
    try:
        yield events
    finally:
        events += [(time, size) for time, size in scratch_events(False).tolist()]


def _highest(events: list[tuple[int, int]]) -> int:
    """The highest sum of bytes, in the order of their times."""
    in_order = sorted(events, key=lambda event: event[0])
    return max(itertools.accumulate((size for _, size in in_order), initial=0))


__all__ = [
    "CASES",
    "EAGER",
    "POOL",
    "Case",
    "ErrorBudget",
    "Inputs",
    "budget_fault",
    "dropout_mask",
    "make_inputs",
    "memory_events",
    "peak_bytes",
    "poisoned_memory",
    "recorded_scratch",
    "scaled_dropout_mask",
    "scratch_peak_bytes",
    "thread_count",
]
