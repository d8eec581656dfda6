"""What ``lora-fast demo --qlora`` says: a table on the terminal, and qlora.json."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from lora_fast.benchmarks import report as benchmark_report

from . import sheets
from .qlora import Comparison
from .sheets import Sheet
from .training import MODEL, RANK

MIB = 2**20
NAMES = ("PEFT DoRA", "accelerated DoRA", "PEFT LoRA")


Result = sheets.Result[Comparison]


def show(console: Console, result: Result) -> None:
    """Print what was done, the table and the checks."""
    c = result.comparison
    console.print(
        f"All {c.adapted_layers} linears of {MODEL}'s encoder are bitsandbytes' Linear4bit (nf4, double quantisation), "
        f"activations are float32, adapters have rank {RANK}. In PEFT's own models support_avx512bf16_for_cpu is False "
        "on each of these linears, as lora_fast.accelerate makes it: a CPU with AVX512-BF16 would otherwise pack the "
        "weights anew in evaluation, after which PEFT's DoRA evaluates and trains wrongly."
    )
    console.print()
    sheets.show(console, [sheet(c)], result.checks())


def sheet(c: Comparison) -> Sheet:
    """The three trainings side by side."""
    losses = [run.losses for run in c.runs]
    steps = [run.step_ms() for run in c.runs]
    medians = [median for _, median, _ in steps]
    peaks = [run.peak_bytes / MIB for run in c.runs]
    last = min(10, len(c.fast.losses))
    compared = min(c.compared_steps, len(c.fast.losses))
    noise = c.order_noise()
    rows = [
        ["loss, first step", *(f"{run[0]:.4f}" for run in losses)],
        [f"loss, mean of last {last} steps", *(f"{fmean(run[-last:]):.4f}" for run in losses)],
        ["accuracy on held-out texts", *(f"{100 * run.accuracy:.1f}%" for run in c.runs)],
        ["time of a step, median, ms", *(f"{median:.0f}" for median in medians)],
        ["time of a step, p20 to p80, ms", *(f"{p20:.0f} to {p80:.0f}" for p20, _, p80 in steps)],
        ["median, × PEFT LoRA", *(f"{median / medians[2]:.2f}" for median in medians)],
        ["median, × PEFT DoRA", *(f"{median / medians[0]:.2f}" for median in medians)],
        ["peak memory of a step, MiB", *(f"{peak:.0f}" for peak in peaks)],
        ["peak, × PEFT LoRA", *(f"{peak / peaks[2]:.2f}" for peak in peaks)],
        ["allocations of a weight's size in a step", *map(str, c.weights_made)],
        [f"losses' largest relative difference, {compared} steps", "", f"{c.worst_difference:.1e}", ""],
        [f"the same, each batch's rows reversed, {len(noise)} steps", f"{max(noise):.1e}", "", ""],
    ]
    title = f"{len(c.fast.losses)} steps, one of each model in turn"
    return Sheet(title, ["", *NAMES], rows, "Times, and their ratios too, need a machine that does nothing else.")


def write(folder: Path, result: Result) -> Path:
    """Write qlora.json into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "qlora.json"
    benchmark_report.write_json(path, as_dict(result))
    return path


def as_dict(result: Result) -> dict[str, Any]:
    """Every number of the run."""
    c = result.comparison
    return benchmark_report.provenance("bitsandbytes") | {
        "seed": result.seed,
        "quick": result.quick,
        "seconds": result.seconds,
        "checks": [asdict(check) for check in result.checks()],
        "training": c.setting()
        | {"quantisation": "nf4", "double_quantisation": True, "compute_dtype": "float32"}
        | {
            name: run.as_dict() | {"allocations_of_a_weight": made}
            for name, run, made in zip(NAMES, c.runs, c.weights_made, strict=True)
        }
        | {
            "relative_difference": c.difference(),
            "noise_other_order": {"relative_difference": c.order_noise()},
        },
    }
