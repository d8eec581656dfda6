"""The figures of README.md and docs that were measured on a GPU."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tables import OURS, bars_lines, table

GPU_RESULTS = Path(__file__).resolve().parent / "results" / "nvidia-h200"


def gpu_status() -> str:
    """Two sentences for the README: one layer's step on the device, and a model called eagerly."""
    results = _gpu_results()
    step = next(row for row in results["rows"] if row["title"].startswith("training step"))
    frozen, ours, theirs = (
        step["records"][name]["median_ms"] for name in ("frozen linear", "lora_fast DoRA", "PEFT LoRA")
    )
    eager = [
        record["median_ms"] / row["records"]["PEFT LoRA"]["median_ms"]
        for row in results["rows"]
        if row["title"].startswith("PEFT model")
        for name, record in row["records"].items()
        if name.startswith("accelerated")
    ]
    text = (
        f"On the device, one DoRA layer ({step['title']}) took {ours / frozen:.2f} times as long as the frozen linear, "
        f"and PEFT's LoRA {theirs / frozen:.2f} times. Called eagerly, lora_fast is slower than PEFT there: Python "
        "launches its kernels one by one, and a PEFT model of four small layers took "
        f"{min(eager):.1f} to {max(eager):.1f} times as long as PEFT's LoRA."
    )
    return textwrap.fill(text, 128) + "\n"


def gpu() -> str:
    """One layer on a GPU: each contender in units of the frozen linear."""
    results = _gpu_results()
    rows = [row for row in _layer_rows(results) if not row.get("setting")]
    return f"{_gpu_origin(results)}\n{_frozen_units(rows, _size_column)}"


def gpu_settings() -> str:
    """The step as users train it, beside the bars' step, in the same units."""
    results = _gpu_results()
    rows = [row for row in _layer_rows(results) if row.get("setting")]
    if not rows:
        return "The committed results are from before these rows.\n"
    return f"{_gpu_origin(results)}\n{_frozen_units(rows, _setting_column)}"


def _layer_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in results["rows"] if row["title"].startswith(("training step", "inference"))]


def _size_column(row: dict[str, Any]) -> str:
    return row["title"].replace("4096×4096 bfloat16", "4096²").replace("8192×8192 bfloat16", "8192²")


def _setting_column(row: dict[str, Any]) -> str:
    """W's dtype, and what sets the row apart."""
    return f"{row['dtype']} W, {row['setting']}"


def _frozen_units(rows: list[dict[str, Any]], column: Callable[[dict[str, Any]], str]) -> str:
    """A line for each contender, a column for each row: times the frozen linear, whose own time is given."""
    names = dict.fromkeys(
        name for row in rows for name in row["records"] if not re.search(", (torch|cuda|triton)$", name)
    )

    def cell(name: str, row: dict[str, Any]) -> str:
        if name not in row["records"]:
            return ""
        record, frozen = row["records"][name], row["records"]["frozen linear"]
        if name == "frozen linear":
            return f"{1e3 * record['median_ms']:.0f} µs"
        text = f"{record['median_ms'] / frozen['median_ms']:.2f}"
        return f"**{text}**" if OURS.match(name) else text

    return table(["", *map(column, rows)], ([name, *(cell(name, row) for row in rows)] for name in names))


def gpu_bars() -> str:
    """Every bar of the GPU benchmark."""
    results = _gpu_results()
    return f"{_gpu_origin(results)}\n{bars_lines(results['rows'])}"


def gpu_kernels() -> str:
    """Where the device's time of a DoRA step goes, by the profiler."""
    results = _gpu_results()
    name = "lora_fast DoRA, training step, 8192 tokens, 4096×4096 bfloat16, rank 16"
    merged: dict[str, list[float]] = {}
    for entry in results["profiles"][name]:
        if "FillFunctor<float>" in entry["kernel"]:  # empties the cache between the steps
            continue
        total = merged.setdefault(_kernel(entry["kernel"]), [0.0, 0.0])
        total[0] += entry["calls"]
        total[1] += entry["us"]
    rows = [[kernel, f"{calls:g}", f"{us:.1f}"] for kernel, (calls, us) in merged.items()]
    return f"{_gpu_origin(results)}\n" + table(["kernel", "calls", "µs"], rows)


def _kernel(name: str) -> str:
    """The name without its types: cuBLAS's products and PyTorch's passes told from ours."""
    if name.startswith("nvjet"):
        return "cuBLAS, x Wᵀ" if name.endswith("TNT") else "cuBLAS, dv W"
    if "multi_tensor_apply" in name:
        return "PyTorch, AdamW"
    return "PyTorch, gain and copies" if "at::native" in name or name.startswith("Mem") else f"`{name}`"


def _gpu_results() -> dict[str, Any]:
    return json.loads((GPU_RESULTS / "first.json").read_text(encoding="utf-8"))


def _gpu_origin(results: dict[str, Any]) -> str:
    versions = results["versions"]
    packages = ", ".join(f"{package} {versions[package]}" for package in ("torch", "triton", "peft"))
    link = f"benchmarks/results/{GPU_RESULTS.name}/first.json"
    return f"{results['device']}, {packages}, {results['date'][:10]}: [{link}](../{link})\n"
