"""What a benchmark case is: inputs, contenders, bars, and the bytes and FLOPs that bound it from below."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .contenders import Contender
from .cost import Cost
from .runner import Record, Step

STEP = "training step"  # forward, backward to x and to the adapter, optimizer step; a DoRA norm is renewed each time
INFERENCE = "inference"  # forward in evaluation; nothing changed since the last call
NORM = "weight_norm"  # the norm alone, renewed, beside the frozen forward
FORWARD = "forward"  # an op alone, without gradients
GRADIENTS = "forward and backward"  # an op alone, with all its gradients
CHECKPOINTED = "checkpointed step"  # the training step under activation checkpointing
ACCUMULATED = "accumulation of 8"  # eight forwards and backwards, one optimizer step
DECODE = "decode"  # inference of one token behind a filled cache
MICRO_BATCHES = 8


@dataclass(frozen=True)
class Case:
    """One row of a table: one mode at one size. `subject` is the contender that the bars hold."""

    mode: str
    out_features: int
    in_features: int
    tokens: int
    dtype: torch.dtype
    contenders: tuple[Contender, ...]
    subject: str = ""
    rank: int = 16
    at_most: float | None = None  # times the frozen linear's median
    aim: float | None = None  # wished for, not required
    faster: dict[str, float] = field(default_factory=dict)  # contender: at least so many times faster than it
    memory_fraction: float | None = None  # peak at most this fraction of the weight's bytes
    adapter_dtype: torch.dtype | None = None  # of lora_A and lora_B; `dtype` if unset
    dropout: float = 0.0  # of the adapters, in training
    autocast: torch.dtype | None = None  # that forward runs under

    @property
    def setting(self) -> str:
        """How users run the layer, in words, where it is not plainly in one dtype."""
        parts = [f"{_name(self.adapter_dtype)} adapters"] if self.adapter_dtype else []
        parts += [f"autocast to {_name(self.autocast)}"] if self.autocast else []
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        return ", ".join(parts)

    @property
    def title(self) -> str:
        if self.mode == NORM:
            return f"{NORM}, rank {self.rank}, {self.size}, beside the frozen forward of {self.tokens} tokens"
        title = f"{self.mode}, {self.tokens} token{'s'[: self.tokens > 1]}, {self.size}"
        return f"{title}, {self.setting}" if self.setting else title

    @property
    def dtype_name(self) -> str:
        return _name(self.dtype)

    @property
    def size(self) -> str:
        return f"{self.out_features}×{self.in_features} {self.dtype_name}"

    @property
    def weight_bytes(self) -> int:
        return self.out_features * self.in_features * self.dtype.itemsize

    @property
    def frozen_flops(self) -> int:
        """Multiply-adds of the frozen layer's products, counted as two each: one product forward, one for dx."""
        return 2 * self.tokens * self.out_features * self.in_features * (2 if self.mode == STEP else 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Bar:
    """One bound and what was measured. `at_most` tells the direction."""

    text: str
    measured: float
    bound: float
    at_most: bool
    aim: float | None = None

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


@dataclass(frozen=True)
class Row:
    """A measured case. `left_out` gives the reason for each contender without a record."""

    case: Case
    records: dict[str, Record]
    left_out: dict[str, str]

    def ratio(self, name: str, baseline: str) -> float:
        """Median time of `name` in units of `baseline`'s."""
        return self.records[name].median_ms / self.records[baseline].median_ms

    def bars(self) -> list[Bar]:
        case, subject = self.case, self.case.subject
        if subject not in self.records:
            return []
        bars = []
        if case.at_most is not None:
            bars.append(Bar("× frozen linear", self.ratio(subject, FROZEN), case.at_most, True, case.aim))
        for other, factor in case.faster.items():
            if other in self.records:
                bars.append(Bar(f"× faster than {other}", self.ratio(other, subject), factor, False))
        if case.memory_fraction is not None:
            fraction = self.records[subject].peak_bytes / case.weight_bytes
            bars.append(Bar("× W in extra memory", fraction, case.memory_fraction, True))
        return bars


FROZEN = "frozen linear"


@dataclass(frozen=True)
class Workload:
    """One row of the suite: an op, a layer or a model (`subject`), a mode, a size. `key` names it in result files.

    Of a model, `in_features` is the width and `out_features` that inside its feed-forward layers. 0: the op has none.
    """

    subject: str
    mode: str
    out_features: int
    in_features: int
    tokens: int
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    depth: int = 0  # layers of a model

    @property
    def dtype_name(self) -> str:
        return _name(self.dtype)

    @property
    def size(self) -> str:
        return "×".join(str(number) for number in (self.depth, self.out_features, self.in_features) if number)

    @property
    def key(self) -> str:
        return f"{self.subject}/{self.mode}/{self.size}/t{self.tokens}/r{self.rank}/{self.dtype_name}"

    @property
    def title(self) -> str:
        tokens = f", {self.tokens} token{'s'[: self.tokens > 1]}" if self.tokens else ""
        return f"{self.subject}, {self.mode}{tokens}, {self.size} {self.dtype_name}, rank {self.rank}"


@dataclass(frozen=True)
class Prepared:
    """A workload made ready: the steps to time, each through the gate, and why the others are left out.

    `errors`: of the output against float64, relative to its size. `least`: bytes and FLOPs below which no way gets.
    """

    steps: dict[str, Step]
    left_out: dict[str, str]
    errors: dict[str, float]
    baseline: str
    least: Cost
