"""The headline on this machine: one layer's training step and inference, beside the frozen linear and PEFT's layers.

`lora-fast check` ends with it: a small size on a CPU and few rounds, which show an order of magnitude; `lora-fast
bench` measures. Every contender passes the correctness gate first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import contenders as c, layer
from .gate import WRONG, Gate
from .registry import INFERENCE, STEP, Case
from .report import digits
from .runner import Step, measure

CONTENDERS = (c.FROZEN, c.dora(), c.lora(), c.PEFT_LORA, c.PEFT_DORA)
BUDGET = {"cpu": 0.1, "cuda": 1.0}  # seconds of measuring: on a CPU of a contender, on a GPU of a row


@dataclass
class Timing:
    """One row. ``left_out``: why a contender has no record; ``faults``: the same of ours, by name."""

    title: str
    records: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def cases(device: str) -> list[Case]:
    size, tokens = ((1024, 1024), 128) if device == "cpu" else ((4096, 4096), 8192)
    return [
        Case(STEP, *size, tokens, torch.bfloat16, CONTENDERS),
        Case(INFERENCE, *size, 16, torch.bfloat16, CONTENDERS),
    ]


def timings(device: str) -> Iterator[Timing]:
    for case in cases(device):
        # no default device on the CPU: it would cost each of PyTorch's calls some of the host's time
        with torch.device(device) if device != "cpu" else contextlib.nullcontext():
            timing = _timing(case, BUDGET[device])
        yield timing


def _timing(case: Case, budget_s: float) -> Timing:
    timing = Timing(f"{case.title}, rank {case.rank}")
    try:
        inputs = layer.inputs_of(case)
        gate, steps = Gate(inputs), dict[str, Step]()
    except RuntimeError as error:  # no memory left, say
        timing.left_out = {contender.name: f"raised {error!r}" for contender in case.contenders}
        return timing
    for contender in case.contenders:
        try:
            made = _made(case, contender, inputs, gate)
        except Exception as error:  # a peer's too: of another version of its package, say
            made = f"raised {error!r}"
        if not isinstance(made, str):
            steps[contender.name] = made
            continue
        timing.left_out[contender.name] = made
        if contender.ours:
            timing.faults[contender.name] = made
    try:
        timing.records = _measured(steps, budget_s)
    except RuntimeError as error:
        timing.left_out |= dict.fromkeys(steps, f"raised {error!r}")
    return timing


def _made(case: Case, contender: c.Contender, inputs: c.LayerInputs, gate: Gate) -> Step | str:
    """What to time, or why the contender is left out."""
    layers, left_out = layer.build([contender], inputs, gate)
    if left_out:
        return left_out[contender.name]
    built = layers[contender.name]
    if case.mode == STEP:
        return layer.training_step(built, inputs)
    if fault := gate.inference_fault(contender, built):
        return f"{WRONG}: {fault}"
    return layer.inference(built, inputs)


def _measured(steps: Mapping[str, Step], budget_s: float) -> dict[str, dict[str, float]]:
    if torch.get_default_device().type == "cuda":
        from .gpu_timing import measure as measure_on_gpu

        return measure_on_gpu(steps, budget_s)
    records = measure(steps, budget_s=budget_s, min_rounds=3, max_rounds=30, warm_up=1)
    return {name: record.as_dict() for name, record in records.items()}


def as_dict(timing: Timing) -> dict[str, Any]:
    frozen = timing.records.get(c.FROZEN.name, {}).get("median_ms")
    records: dict[str, dict[str, float | None]] = {
        name: {**record, "times_frozen": record["median_ms"] / frozen if frozen else None}
        for name, record in timing.records.items()
    }
    return {"title": timing.title, "records": records, "left_out": timing.left_out}


def table(timing: Timing) -> str:
    """A line a contender: milliseconds, their spread, and the median in units of the frozen linear's."""
    width = max(len(contender.name) for contender in CONTENDERS)
    lines = [f"{timing.title}:", f"  {'':{width}}  {'ms':>8}  {'p20 to p80':>18}  {'× frozen':>8}"]
    for name, record in as_dict(timing)["records"].items():
        spread = f"{record['p20_ms']:.3f} to {record['p80_ms']:.3f}"
        ratio = digits(record["times_frozen"]) if record["times_frozen"] else ""
        host = f"  the host {record['host_ms']:.3f} ms" if "host_ms" in record else ""
        lines.append(f"  {name:{width}}  {record['median_ms']:8.3f}  {spread:>18}  {ratio:>8}{host}")
    lines.extend(f"  {name:{width}}  left out: {reason}" for name, reason in timing.left_out.items())
    return "\n".join(lines)
