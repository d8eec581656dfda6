"""What the GPU bars hold: the norm, composition, one layer's step and inference, a PEFT model, beside the contenders.

    python -m lora_fast.benchmarks.gpu [--out DIR] [--budget SECONDS]

Times are the device's (:mod:`~lora_fast.benchmarks.gpu_timing`), and the host's time per call is a column of its own. A
PEFT model's are the wall's. Every contender passes the correctness gate first. The rows, and how long they take, are in
:mod:`~lora_fast.benchmarks.gpu_rows`. Writes gpu.json after each, and gpu.csv at the end. Fails where a row fails or is
cut off by an interrupt, and where one of ours computes something wrong; a bar that is missed is told, and no failure.
"""

from __future__ import annotations

import argparse
import csv
import re
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_fast import backends

from . import peft_model, report
from .gate import WRONG
from .gpu_rows import RATIOS, rows
from .registry import Case

FAILED, CUT_OFF = "failed", "cut off"
BUDGET_S = 0.8  # gpu_rows.rows says how many there are


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['title']}", flush=True)
    for name, record in result["records"].items():
        others = "".join(f"  {key} {record[f'{key}_ms']:.4f}" for key in ("host", "wall") if f"{key}_ms" in record)
        print(
            f"  {name:32} {record['median_ms']:9.4f} ms ({record['p20_ms']:.4f} to {record['p80_ms']:.4f})"
            f"{others}  {record['peak_bytes'] / 1e6:9.1f} MB{_ratios(record)}"
        )
    for name, reason in result["left_out"].items():
        print(f"  {name:32} left out: {reason}")
    for bar in result["bars"]:
        met = "met" if bar["met"] else "MISSED"
        print(f"  {met}: {bar['measured']:.3f} {bar['what']}, bar {report.bound(bar)}", flush=True)


def _ratios(record: dict[str, float]) -> str:
    words = {"frozen_ratio": "frozen", "peft_lora_ratio": "PEFT LoRA"}
    return "".join(f"  {record[key]:.2f} × {word}" for key, word in words.items() if key in record)


def provenance() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return report.provenance() | {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "triton": backends.get("triton").missing() or "present",
        "cuda_kernels": backends.get("cuda").missing() or "present",
    }


def write_csv(path: Path, results: list[dict[str, Any]]) -> None:
    keys = ("title", "ops", "tokens", "out_features", "in_features", "rank", "least_bytes", "least_flops")
    times = ("median_ms", "p20_ms", "p80_ms", "host_ms", "wall_ms", "peak_bytes", "rounds", *RATIOS)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, "contender", *times])
        for result in results:
            for name, record in result["records"].items():
                writer.writerow([*(result.get(key, "") for key in keys), name, *(record.get(key, "") for key in times)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_fast.benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of measuring a row")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured; `python -m lora_fast.benchmarks.cost` prints what is predicted")
        return 1
    torch.set_default_device("cuda")
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = arguments.out or Path(__file__).resolve().parent / "results" / slug
    results: list[dict[str, Any]] = []
    state = provenance() | {"budget_s": arguments.budget, "rows": results}
    wrong = run_rows(rows(arguments.budget), results, lambda: report.write_json(out / "gpu.json", state))
    write_csv(out / "gpu.csv", [result for result in results if result["records"]])
    missed = sum(not bar["met"] for result in results for bar in result["bars"])
    print("\n".join(["", f"{missed} bars missed; written to {out}", *wrong]))
    return int(bool(wrong))


def run_rows(
    makers: list[partial[dict[str, Any]]], results: list[dict[str, Any]], write: Callable[[], None]
) -> list[str]:
    """Runs each row into ``results``, which is empty, shows it and writes; what is wrong, see :func:`faults`.

    An interrupt, which is how a time limit comes, ends it: the rows that are not made then stand as cut off.
    """
    try:
        for make in makers:
            results.append(_made(make))
            show(results[-1])
            torch.cuda.empty_cache()
            write()
    except KeyboardInterrupt:
        results += [_without_records(CUT_OFF, make, "the run was interrupted") for make in makers[len(results) :]]
        write()
    return faults(results)


def _made(make: partial[dict[str, Any]]) -> dict[str, Any]:
    try:
        return make()
    except Exception:  # one row that fails must not lose the others; it is told, and fails the run
        return _without_records(FAILED, make, traceback.format_exc())


def _without_records(what: str, make: partial[dict[str, Any]], why: str) -> dict[str, Any]:
    cases = (Case, peft_model.Case)
    arguments = ", ".join(
        value.title if isinstance(value, cases) else str(value) for value in make.args if not callable(value)
    )
    return {"title": f"{what}: {make.func.__name__}({arguments})", "records": {}, "left_out": {"": why}, "bars": []}


def faults(results: list[dict[str, Any]]) -> list[str]:
    """Rows that failed or were cut off, and contenders of ours that compute something wrong."""
    ours = (*backends.NAMES, "fused", "products")
    found = [result["title"] for result in results if result["title"].startswith((FAILED, CUT_OFF))]
    for result in results:
        for name, reason in result["left_out"].items():
            if reason.startswith(WRONG) and (
                name in ours or name.startswith(("lora_fast", "weight_norm", "quantised_norm"))
            ):
                found.append(f"{result['title']}: {name} left out: {reason}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
