"""A PEFT model before and after `lora_fast.accelerate`: four Llama-like layers, rank 16 on all linear layers.

Width 2048, feed-forward 5632, bfloat16, PEFT's default adapters (float32). The contenders are whole PEFT models with
weights of their own, on the default device, alternated in one process. Times are the wall's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import report, without_amx
from .contenders import UnavailableError, accelerate, calls_of
from .registry import INFERENCE, STEP, Bar
from .runner import Record, Step, measure

PEFT_LORA, PEFT_DORA = "PEFT LoRA", "PEFT DoRA"
LORA, DORA = "accelerated LoRA", "accelerated DoRA"
CONTENDERS = {PEFT_LORA: (False, False), PEFT_DORA: (True, False), LORA: (False, True), DORA: (True, True)}
WIDTH, FEED_FORWARD, DEPTH, RANK = 2048, 5632, 4, 16
LEARNING_RATE = 1e-5
SLACK = 4.0  # of the RMS error of PEFT's own output: in a whole model rounding meets rounding


@dataclass(frozen=True)
class Case:
    """A row and its bars."""

    mode: str
    tokens: int
    renewed: bool = False  # with the optimizer's step, after which the norms are computed anew
    at_most: dict[str, float] = field(default_factory=dict)  # contender: times PEFT LoRA
    faster: float = 0.0  # accelerated DoRA than PEFT DoRA
    memory: float | None = None  # accelerated DoRA: times PEFT LoRA

    @property
    def title(self) -> str:
        return f"{self.mode}{' with the optimizer step' if self.renewed else ''}, {self.tokens} tokens"

    def bars(self, records: dict[str, Record]) -> list[Bar]:
        """None where a contender that they compare is left out."""
        needed = {PEFT_LORA, *self.at_most, *({PEFT_DORA} if self.faster else ())}
        if not needed <= records.keys():
            return []
        times = {name: record.median_ms for name, record in records.items()}
        bars = [
            Bar(f"{name}, × {PEFT_LORA}", times[name] / times[PEFT_LORA], bound, True)
            for name, bound in self.at_most.items()
        ]
        if self.faster:
            ratio = times[PEFT_DORA] / times[DORA]
            bars.append(Bar(f"{DORA}, × faster than {PEFT_DORA}", ratio, self.faster, False))
        if self.memory is not None:
            peaks = [records[name].peak_bytes for name in (DORA, PEFT_LORA)]
            bars.append(Bar(f"{DORA}, × {PEFT_LORA} in peak memory", peaks[0] / peaks[1], self.memory, True))
        return bars


CASES = (
    Case(STEP, 256, False, {DORA: 1.05, LORA: 0.95}, 4.0, 1.0),
    Case(STEP, 16, True, {DORA: 1.15}, 12.0, 1.0),
    Case(INFERENCE, 16, False, {DORA: 1.0}, 25.0),
)
# The same rows on a processor without AMX, where the products cost more and the passes beside them the same.
CASES_WITHOUT_AMX = tuple(
    replace(case, at_most={DORA: bound}, faster=0.0) for case, bound in zip(CASES, (1.0, 1.15, 1.0), strict=True)
)


def models() -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The contenders, with the same weights and adapters; and why one is left out: PEFT is unknown to us, or fails.

    RuntimeError if a layer is left alone, or ours computes something else than PEFT's.
    """
    built: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    for name, (dora, fast) in CONTENDERS.items():
        torch.manual_seed(0)
        try:
            with calls_of("peft"):
                model = adapted(dora)
                output(model, _sample())
            if fast:
                accelerate(model)
        except UnavailableError as reason:
            left_out[name] = str(reason)
        else:
            built[name] = model
    for fast_name, slow_name in ((LORA, PEFT_LORA), (DORA, PEFT_DORA)):
        if fast_name in built:
            _check(fast_name, built[fast_name], built[slow_name])
    return built, left_out


def base_model() -> nn.Module:
    """The frozen model, in bfloat16."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=DEPTH,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=128,
    )
    model: nn.Module = LlamaModel(config)
    return model.to(torch.bfloat16)


def adapted(dora: bool, base: nn.Module | None = None) -> nn.Module:
    """``base``, else a new one, with PEFT's adapters."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=RANK, lora_alpha=RANK, use_dora=dora, target_modules="all-linear")
    model: nn.Module = get_peft_model(base_model() if base is None else base, lora)
    move(model)
    return model


def with_shared_weights(model: nn.Module) -> nn.Module:
    """A copy with adapters and buffers of its own, and the same frozen parameters."""
    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, memo=dict(frozen))


def move(model: nn.Module) -> None:
    """Adapters that change something, as after some training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.01)


def _check(name: str, fast: nn.Module, slow: nn.Module) -> None:
    x = _sample()
    with torch.no_grad():
        truth = output(copy.deepcopy(slow).double(), x.double())
        ours, theirs = (float((output(model, x) - truth).square().mean().sqrt()) for model in (fast, slow))
    if not ours <= SLACK * theirs:
        raise RuntimeError(f"{name}: RMS error {ours:.3g} against float64, where PEFT's is {theirs:.3g}")


def _sample() -> Tensor:
    return torch.randn(1, 16, WIDTH, dtype=torch.bfloat16)


def output(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x).last_hidden_state


def step(case: Case, model: nn.Module) -> Step:
    """One call, which ends when the device has finished."""
    x = torch.randn(1, case.tokens, WIDTH, dtype=torch.bfloat16)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True)

    def train() -> None:
        model.train()
        output(model, x).float().square().mean().backward()
        if case.renewed:
            optimizer.step()
        optimizer.zero_grad()

    def infer() -> None:
        model.eval()
        with torch.inference_mode():
            output(model, x)

    once = infer if case.mode == INFERENCE else train

    def waited_for() -> None:
        once()
        torch.cuda.synchronize()

    return waited_for if x.is_cuda else once


def run(budget_s: float = 8.0) -> Iterator[dict[str, Any]]:
    """The rows, as a result file holds them."""
    built, left_out = models()
    for case in CASES if without_amx.used() else CASES_WITHOUT_AMX:
        yield row(case, built, budget_s) | {"left_out": left_out}


def row(case: Case, built: dict[str, nn.Module], budget_s: float) -> dict[str, Any]:
    records = measure({name: step(case, model) for name, model in built.items()}, budget_s=budget_s)
    return {
        "title": case.title,
        "mode": case.mode,
        "tokens": case.tokens,
        "rank": RANK,
        "dtype": "bfloat16",
        "baseline": PEFT_LORA,
        "records": {name: record.as_dict() for name, record in records.items()},
        "bars": [report.bar_as_dict(bar) for bar in case.bars(records)],
    }
