"""What ``lora-fast demo --distributed`` says: a table on the terminal, and distributed.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from lora_fast.benchmarks import report as benchmark_report

from . import sheets
from .distributed import ADAPTER_BAR, PROCESSES, Comparison
from .sheets import Check, Sheet
from .training import MODEL, RANK

MIB = 2**20
NAMES = ("one process", f"{PROCESSES} processes, FSDP2")
NOTE = (
    "Times need a machine that does nothing else. Resident memory is its rise over what it was before the model was "
    "built; it includes freed blocks that malloc keeps for later."
)


class Result(sheets.Result[Comparison]):
    def checks(self) -> list[Check]:
        c = self.comparison
        return [
            *super().checks(),
            Check(
                "Both save the same adapter: largest relative difference of a tensor",
                f"{c.adapter_difference:.1e}",
                f"at most {ADAPTER_BAR:.0e}",
                c.adapters_agree,
            ),
        ]


def show(console: Console, result: Result) -> None:
    """Print what was done, the table and the checks."""
    c = result.comparison
    console.print(
        f"DoRA of rank {RANK} by lora_fast.apply on all {c.adapted_layers} linears of {MODEL}'s encoder, float32, on "
        f"the CPU: one process with {c.reference.threads} threads, and {PROCESSES} with {c.fast.threads} each, over "
        "gloo, with fully_shard on each block and on the model. Each of these has its share of every batch's rows and, "
        "between steps, of every parameter."
    )
    console.print()
    sheets.show(console, [sheet(c)], result.checks())


def sheet(c: Comparison) -> Sheet:
    """The two trainings side by side."""
    runs = (c.reference, c.fast)
    last = min(10, len(c.fast.losses))
    steps = [run.step_ms() for run in runs]
    compared = min(c.compared_steps, len(c.fast.losses))
    noise = max(c.order_noise()[:compared])
    memory = [run.memory for run in runs]
    rows = [
        ["loss, first step", *(f"{run.losses[0]:.4f}" for run in runs)],
        [f"loss, mean of last {last} steps", *(f"{fmean(run.losses[-last:]):.4f}" for run in runs)],
        ["accuracy on held-out texts", *(f"{100 * run.accuracy:.1f}%" for run in runs)],
        ["time of a step, median, ms", *(f"{median:.0f}" for _, median, _ in steps)],
        ["time of a step, p20 to p80, ms", *(f"{p20:.0f} to {p80:.0f}" for p20, _, p80 in steps)],
        ["memory of a process, MiB:", "", ""],
        ["  parameters between steps", *(mebibytes([of.parameters for of in each]) for each in memory)],
        ["  allocated in a step, peak", *(mebibytes([of.step for of in each]) for each in memory)],
        ["  resident, peak of the training", *(mebibytes([of.resident for of in each]) for each in memory)],
        [f"losses' largest relative difference, {compared} steps", "", f"{c.worst_difference:.1e}"],
        ["the same, each batch's rows reversed", f"{noise:.1e}", ""],
        ["saved adapters' largest relative difference", "", f"{c.adapter_difference:.1e}"],
        ["the same, each batch's rows reversed", f"{c.adapter_noise:.1e}", ""],
    ]
    return Sheet(f"{len(c.fast.losses)} steps, one training after the other", ["", *NAMES], rows, NOTE)


def mebibytes(sizes: Sequence[int | None]) -> str:
    """The largest of the processes'."""
    known = [size for size in sizes if size is not None]
    return f"{max(known) / MIB:.0f}" if known else "unknown"


def write(folder: Path, result: Result) -> Path:
    """Write distributed.json into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "distributed.json"
    benchmark_report.write_json(path, as_dict(result))
    return path


def as_dict(result: Result) -> dict[str, Any]:
    """Every number of the run."""
    c = result.comparison
    return benchmark_report.provenance("safetensors") | {
        "seed": result.seed,
        "quick": result.quick,
        "seconds": result.seconds,
        "checks": [asdict(check) for check in result.checks()],
        "training": c.setting()
        | {"processes": PROCESSES, "process_group": "gloo"}
        | {name: run.as_dict() for name, run in zip(NAMES, (c.reference, c.fast), strict=True)}
        | {
            "relative_difference": c.difference(),
            "adapter_difference": c.adapter_difference,
            "noise_other_order": {
                "relative_difference": c.order_noise(),
                "adapter_difference": c.adapter_noise,
            },
        },
    }
