"""What `lora-fast check` does: :mod:`lora_fast.check`, the headline timings and the verdict, for a bug report."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, TextIO

from lora_fast import check

from . import headline, report

PASS, FAIL, INTERRUPTED = "PASS", "FAIL", "INTERRUPTED"


@dataclass
class Findings:
    """What was done so far."""

    items: list[check.Result] = field(default_factory=list)
    timings: list[headline.Timing] = field(default_factory=list)

    def wrong(self) -> Iterator[tuple[str, str, str]]:
        """(name, what of it, fault) of everything that is wrong."""
        for item in self.items:
            for fault in item.faults:
                yield item.name, f"{item.backend} {item.dtype}, {item.size}", fault
        for timing in self.timings:
            for name, fault in timing.faults.items():
                yield name, timing.title, fault

    def verdict(self) -> str:
        """PASS, or FAIL with the names of what is wrong."""
        places: dict[str, dict[str, None]] = {}
        for name, where, _ in self.wrong():
            places.setdefault(name, {})[where] = None
        names = "; ".join(f"{name} ({'; '.join(where)})" for name, where in places.items())
        return f"{FAIL}: {names}" if names else PASS


def run(device: str, info: dict[str, Any], heading: str, *, as_json: bool) -> int:
    """Check and time ``device``; the exit status: 0 PASS, 1 FAIL, 130 interrupted.

    ``info`` is what `lora-fast info` knows, ``heading`` the same as text. With ``as_json`` standard output gets one
    JSON document, and standard error the text.
    """
    start, findings, out = time.perf_counter(), Findings(), sys.stdout
    conditions = {"device": device, "info": info, "provenance": _provenance(device), "absent": check.absent(device)}
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        print(_introduction(conditions, heading), flush=True)
        try:
            _check(device, findings)
            _time(device, findings)
            verdict = findings.verdict()
        except KeyboardInterrupt:
            verdict = INTERRUPTED
        seconds = time.perf_counter() - start
        wrong = sum(1 for _ in findings.wrong())
        print(f"\n{len(findings.items)} items, {len(findings.timings)} timings, {wrong} wrong, {seconds:.1f} s")
        print(f"{verdict}; so far {findings.verdict()}" if verdict == INTERRUPTED else verdict, flush=True)
    if as_json:
        _write_json(out, conditions, findings, verdict.partition(":")[0], seconds)
    return {PASS: 0, INTERRUPTED: 130}.get(verdict, 1)


def _provenance(device: str) -> dict[str, Any]:
    if device == "cpu":
        return report.provenance()
    from . import gpu

    return gpu.provenance()


def _introduction(conditions: dict[str, Any], heading: str) -> str:
    provenance = conditions["provenance"]
    load, cores = provenance["load_average"], provenance["cores"]
    loads = " ".join(f"{value:.1f}" for value in load) or "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    lines = [
        heading,
        "",
        f"checking {conditions['device']}: {provenance['device']}, {cores} cores, load average {loads}",
    ]
    lines.append(f"with {versions}, commit {provenance['commit'] or 'unknown'}")
    if load and cores and load[0] > cores / 2:
        lines.append("other processes have their share of the cores: times and their ratios say little")
    lines.extend(f"{name:7} not checked: {reason}" for name, reason in conditions["absent"].items())
    return "\n".join(lines)


def _check(device: str, findings: Findings) -> None:
    """A line for each backend and dtype, before it one for each fault."""
    for (backend, dtype), results in groupby(check.run(device), key=lambda result: (result.backend, result.dtype)):
        seconds, count, wrong = 0.0, 0, 0
        for result in results:
            findings.items.append(result)
            seconds, count, wrong = seconds + result.seconds, count + 1, wrong + bool(result.faults)
            for fault in result.faults:
                print(f"WRONG: {result.title}: {fault}", flush=True)
        print(f"{backend:7} {dtype:9} {count:3} items  {wrong:3} wrong  {seconds:5.1f} s", flush=True)


def _time(device: str, findings: Findings) -> None:
    for timing in headline.timings(device):
        findings.timings.append(timing)
        print(f"\n{headline.table(timing)}", flush=True)


def _write_json(out: TextIO, conditions: dict[str, Any], findings: Findings, verdict: str, seconds: float) -> None:
    document = conditions | {
        "items": [_as_dict(item) for item in findings.items],
        "timings": [headline.as_dict(timing) for timing in findings.timings],
        "wrong": [dict(zip(("name", "where", "fault"), found, strict=True)) for found in findings.wrong()],
        "verdict": verdict,
        "seconds": seconds,
    }
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False), file=out)


def _as_dict(item: check.Result) -> dict[str, Any]:
    """JSON has neither NaN nor infinity; the item's fault tells of them."""
    errors = {name: error if math.isfinite(error) else None for name, error in item.errors.items()}
    return asdict(item) | {"errors": errors}
