"""A linear whose rows have adapters of their own: lora_fast beside PEFT's adapter_names and beside torch's grouped_mm.

Inference of one linear. The adapters' ids come with each call, as a batch does, unless a contender says otherwise.
Distributions of ids as Punica's (arXiv 2310.18547): distinct, uniform over √T adapters, skewed (Zipf, exponent 1.5),
identical; and eight prompts of 128 tokens, each with an adapter of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fast import functional, reference
from lora_fast.testing import budget_fault

from . import report
from .contenders import accelerate
from .registry import INFERENCE, Bar
from .runner import Record, Step, measure

FROZEN, LORA, DORA = "frozen linear", "lora_fast LoRA", "lora_fast DoRA"
SORTED_BEFORE, ONE_ADAPTER = "lora_fast LoRA, rows sorted before", "lora_fast LoRA, one adapter"
PEFT, ACCELERATED, GROUPED_MM = "PEFT LoRA, adapter_names", "accelerated LoRA, adapter_names", "sort and F.grouped_mm"
MIXED = (8, 16, 64)  # ranks, by turns
_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class Case:
    """A row and its bars; ``ids`` are the adapters of its tokens."""

    name: str
    size: tuple[int, int]  # N, K
    dtype: torch.dtype
    ids: tuple[int, ...]
    ranks: tuple[int, ...] = MIXED
    factor_dtype: torch.dtype | None = None  # the case's if None
    at_most: dict[str, tuple[str, float]] = field(default_factory=dict)  # contender: (beside which, times that)

    @property
    def adapters(self) -> int:
        return max(self.ids) + 1

    @property
    def title(self) -> str:
        tokens, ranks = len(self.ids), "mixed ranks" if len(self.ranks) > 1 else f"rank {self.ranks[0]}"
        N, K = self.size
        text = f"{self.name}, {tokens} token{'s'[: tokens > 1]}, {N}×{K} {_DTYPES[self.dtype]}, {ranks}"
        return f"{text}, {_DTYPES[self.factor_dtype]} factors" if self.factor_dtype else text

    def bars(self, records: dict[str, Record]) -> list[Bar]:
        bounds = {LORA: [(PEFT, 1.0), (GROUPED_MM, 1.0)]}
        for name, bound in self.at_most.items():
            bounds.setdefault(name, []).append(bound)
        times = {name: record.median_ms for name, record in records.items()}
        return [
            Bar(f"{name}, × {beside}", times[name] / times[beside], bound, True)
            for name, given in bounds.items()
            for beside, bound in given
            if beside in times and name in times
        ]


def distributions(tokens: int) -> dict[str, tuple[int, ...]]:
    """The ids of so many tokens, by name."""
    generator = torch.Generator().manual_seed(tokens)
    few = max(1, math.isqrt(tokens))
    weights = torch.arange(1, tokens + 1, dtype=torch.float64) ** -1.5
    skewed = torch.multinomial(weights, tokens, replacement=True, generator=generator)
    return {
        "distinct": tuple(range(tokens)),
        "uniform": tuple(torch.randint(0, few, (tokens,), generator=generator).tolist()),
        "skewed": tuple(skewed.tolist()),
        "identical": (0,) * tokens,
    }


def cases() -> Iterator[Case]:
    """First the bars of one size, then the grid, in which nothing may be slower than PEFT's loop or grouped_mm."""
    size = (2048, 2048)
    each = tuple(range(32))
    for factors, bound in ((torch.bfloat16, 1.6), (torch.float32, 2.1)):
        given = {LORA: (FROZEN, bound)}
        yield Case("32 adapters, one token each", size, torch.bfloat16, each, (16,), factors, given)
    many = tuple(i for i in each for _ in range(32))
    yield Case("32 adapters, 32 tokens each", size, torch.bfloat16, many, (16,), None, {LORA: (FROZEN, 1.12)})
    for tokens in (32, 1024):
        given = {SORTED_BEFORE: (ONE_ADAPTER, 1.05)}
        yield Case("identical", size, torch.bfloat16, (0,) * tokens, (16,), None, given)
    prompts = tuple(i for i in range(8) for _ in range(128))
    for shape in (size, (11008, 4096)):
        for dtype in (torch.bfloat16, torch.float32):
            yield Case("1 adapter", shape, dtype, (0,))
            for tokens in (8, 32, 64):
                for name, ids in distributions(tokens).items():
                    yield Case(name, shape, dtype, ids)
            yield Case("8 prompts of 128", shape, dtype, prompts)


@dataclass
class Inputs:
    x: Tensor
    weight: Tensor
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    stack_A: Tensor  # [L, R, K], zero past an adapter's rank
    stack_B: Tensor
    scaling: Tensor
    gain: Tensor
    ranks: Tensor | None  # where they differ
    ids: Tensor


def inputs_of(case: Case) -> Inputs:
    torch.manual_seed(0)
    (N, K), L = case.size, case.adapters
    dtype = case.factor_dtype or case.dtype
    ranks = [case.ranks[a % len(case.ranks)] for a in range(L)]
    lora_A = [(torch.randn(rank, K) / K**0.5).to(dtype) for rank in ranks]
    lora_B = [(torch.randn(N, rank) / rank**0.5).to(dtype) for rank in ranks]
    stack_A, stack_B = torch.zeros(L, max(ranks), K, dtype=dtype), torch.zeros(L, N, max(ranks), dtype=dtype)
    for a, rank in enumerate(ranks):
        stack_A[a, :rank], stack_B[a, :, :rank] = lora_A[a], lora_B[a]
    weight = (torch.randn(N, K) / K**0.5).to(case.dtype)
    x = torch.randn(len(case.ids), K).to(case.dtype)
    gain = 1 + 0.1 * torch.randn(L, N)
    scaling, ids = torch.ones(L), torch.tensor(case.ids)
    own = torch.tensor(ranks) if len(set(ranks)) > 1 else None
    return Inputs(x, weight, lora_A, lora_B, stack_A, stack_B, scaling, gain, own, ids)


def steps_of(case: Case, given: Inputs) -> dict[str, Step]:
    """The contenders; RuntimeError where ours computes something else than the reference."""
    x, weight, ids = given.x, given.weight, given.ids
    stacks = given.stack_A, given.stack_B, given.scaling
    groups = functional.group_rows(ids, case.adapters)

    def ours(gain: Tensor | None, adapter: Any) -> Callable[[], Tensor]:
        return lambda: functional.grouped_lora_linear(x, weight, None, *stacks, gain, adapter, given.ranks)

    steps: dict[str, Callable[[], Tensor]] = {
        FROZEN: lambda: F.linear(x, weight),
        LORA: ours(None, ids),
        DORA: ours(given.gain, ids),
        SORTED_BEFORE: ours(None, groups),
        GROUPED_MM: lambda: _grouped_mm(given, case.adapters),
        **_peft(case, given),
    }
    if case.adapters == 1:
        A, B = given.lora_A[0], given.lora_B[0]
        steps[ONE_ADAPTER] = lambda: functional.lora_linear(x, weight, None, A, B, 1.0)
    _check(given, steps)
    return {name: torch.inference_mode()(step) for name, step in steps.items()}


def _grouped_mm(given: Inputs, adapters: int) -> Tensor:
    """The rows sorted, two grouped products of torch's over the padded stacks, and the update added to its rows."""
    y = F.linear(given.x, given.weight)
    order = given.ids.argsort(stable=True)
    ends = torch.bincount(given.ids, minlength=adapters).cumsum(0).to(torch.int32)
    rows = given.x[order].to(given.stack_A.dtype)
    h = F.grouped_mm(rows, given.stack_A.transpose(1, 2), offs=ends)
    update = F.grouped_mm(h, given.stack_B.transpose(1, 2), offs=ends)
    return y.index_add_(0, order, update.to(y.dtype))


def _peft(case: Case, given: Inputs) -> dict[str, Callable[[], Tensor]]:
    """PEFT's layer with an adapter for each id, before and after acceleration."""
    from peft import LoraConfig, get_peft_model

    names = [f"a{a}" for a in case.ids]
    layers: dict[str, Any] = {}
    for name in (PEFT, ACCELERATED):
        linear = nn.Linear(case.size[1], case.size[0], bias=False, dtype=case.dtype)
        linear.weight.data = given.weight
        base = nn.Sequential(linear)
        model: Any = None
        for a, A in enumerate(given.lora_A):
            lora = LoraConfig(r=A.shape[0], lora_alpha=A.shape[0], target_modules=["0"])
            if model is None:
                model = get_peft_model(base, lora, "a0", autocast_adapter_dtype=False)
            else:
                model.add_adapter(f"a{a}", lora, autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
        for a, (A, B) in enumerate(zip(given.lora_A, given.lora_B, strict=True)):
            layer.lora_A[f"a{a}"].weight.data, layer.lora_B[f"a{a}"].weight.data = A, B
        if name == ACCELERATED:
            accelerate(model)
        layers[name] = layer.eval()

    def call(layer: Any) -> Callable[[], Tensor]:
        return lambda: layer(given.x, adapter_names=names)

    return {name: call(layer) for name, layer in layers.items()}


def _check(given: Inputs, steps: dict[str, Callable[[], Tensor]]) -> None:
    """Ours within the error budget of eager's, the loop's formula in the input's dtype."""
    rows, scaling = slice(0, 64), given.scaling.tolist()
    x, ids = given.x[rows], given.ids[rows]
    wide_A, wide_B = ([factor.double() for factor in side] for side in (given.lora_A, given.lora_B))
    for name, gain in ((LORA, None), (DORA, given.gain), (SORTED_BEFORE, None), (ACCELERATED, None)):
        truth = reference.grouped_lora_linear(
            x.double(), given.weight.double(), None, wide_A, wide_B, scaling, gain, ids
        )
        eager = reference.grouped_lora_linear(
            x, given.weight, None, given.lora_A, given.lora_B, scaling, gain, ids, compute_dtype=x.dtype
        )
        with torch.no_grad():
            if fault := budget_fault(name, steps[name]()[rows], eager, truth):
                raise RuntimeError(f"{name}: {fault}")


def run(budget_s: float = 1.0) -> Iterator[dict[str, Any]]:
    """The rows, as a result file holds them."""
    for case in cases():
        records = measure(steps_of(case, inputs_of(case)), budget_s=budget_s)
        yield {
            "title": case.title,
            "mode": INFERENCE,
            "tokens": len(case.ids),
            "adapters": case.adapters,
            "dtype": _DTYPES[case.dtype],
            "baseline": FROZEN,
            "records": {name: record.as_dict() for name, record in records.items()},
            "bars": [report.bar_as_dict(bar) for bar in case.bars(records)],
        }
