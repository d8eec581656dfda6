"""Each constant of the kernels' choices by size, its values against each other, at the sizes of the GPU's bars.

    python -m lora_fast.benchmarks.gpu_tune --out DIR [--only NAME ...]

A value takes the place of today's, its calls are run, compared with what they give today, and timed with the L2 cache
emptied before each; the fastest few then run in turns with today's. The winner is what the constants after it meet.
Writes tune.json after each constant: every time, and the winners, from which
:mod:`~lora_fast.benchmarks.gpu_constants` makes constants.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fast.testing import poisoned_memory
from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.target import current

from . import gpu, report
from .gpu_constants import best, is_right, plain, ratio, winner
from .gpu_sweeps import Call, Sweep, sweeps
from .gpu_timing import FLUSH_BYTES, launched, wall_ms

ROOT = Path(__file__).resolve().parents[1]
ROUNDS, LAST_ROUNDS, FINALISTS = 5, 15, 3
WALL_CALLS = 50
SPIN_CYCLES = 400_000  # 0.2 ms, longer than the host takes for a call
COMPILED_IN = "few_tokens_cuda"
NAMES = [*(make.__name__ for make in sweeps()), COMPILED_IN]


def device_us(call: Call, flush: Tensor, rounds: int) -> list[float]:
    """Of the device, the host running ahead behind a short spin."""
    events = [launched(call, flush, SPIN_CYCLES) for _ in range(rounds)]
    torch.cuda.synchronize()
    return [1e3 * begin.elapsed_time(end) for begin, end, _ in events]


def wall_us(call: Call, rounds: int) -> list[float]:
    return [1e3 * wall_ms(call, WALL_CALLS) for _ in range(rounds)]


def times(sweep: Sweep, call: Call, flush: Tensor, rounds: int) -> list[float]:
    return wall_us(call, rounds) if sweep.wall else device_us(call, flush, rounds)


def measured(sweep: Sweep, start: constants.Constants, flush: Tensor) -> dict[str, Any]:
    """The record of a sweep; ``start``: the constants today, with the winners so far."""
    with constants.instead(start):
        expected = {size: [tensor.clone() for tensor in _results(sweep, size)] for size in sweep.calls}
        today = {size: statistics.median(times(sweep, call, flush, ROUNDS)) for size, call in sweep.calls.items()}
    records = [_tried(sweep, start, value, expected, flush) for value in sweep.values]
    finalists = [record["value"] for record in best(records, today, FINALISTS)]
    last_today, last = _in_turns(sweep, start, finalists, flush)
    chosen = winner(last, last_today, plain(getattr(start, sweep.constant)))
    others = {
        size: {name: _beside(call, flush) for name, call in calls.items()} for size, calls in sweep.others.items()
    }
    return {
        "constant": sweep.constant,
        "today": {"value": plain(getattr(start, sweep.constant)), "us": last_today},
        "winner": chosen,
        "last": last,
        "others": others,
        "tried": records,
    }


def _tried(
    sweep: Sweep, start: constants.Constants, value: Any, expected: Mapping[str, list[Tensor]], flush: Tensor
) -> dict[str, Any]:
    record: dict[str, Any] = {"value": plain(value), "us": {}, "difference": 0.0}
    try:
        with constants.instead(replace(start, **{sweep.constant: value})):
            for size, call in sweep.calls.items():
                found = _results(sweep, size)
                difference = max(_difference(*pair) for pair in zip(found, expected[size], strict=True))
                record["difference"] = max(record["difference"], difference)
                record["us"][size] = statistics.median(times(sweep, call, flush, ROUNDS))
    except Exception as error:  # too much shared memory, a backend that is not there: told in the file
        record["failed"] = repr(error)[:300]
    return record


def _in_turns(
    sweep: Sweep, start: constants.Constants, values: list[Any], flush: Tensor
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Today's times and those of ``values``, round by round one after another."""
    entrants = [start] + [replace(start, **{sweep.constant: constants.value(sweep.constant, one)}) for one in values]
    found: list[dict[str, list[float]]] = [{size: [] for size in sweep.calls} for _ in entrants]
    for _ in range(LAST_ROUNDS // ROUNDS):
        for entrant, of_entrant in zip(entrants, found, strict=True):
            with constants.instead(entrant):
                for size, call in sweep.calls.items():
                    call()
                    of_entrant[size] += times(sweep, call, flush, ROUNDS)
    medians = [{size: statistics.median(us) for size, us in of_entrant.items()} for of_entrant in found]
    records = [{"value": one, "us": us, "difference": 0.0} for one, us in zip(values, medians[1:], strict=True)]
    return medians[0], records


def few_tokens_cuda(start: constants.Constants, folder: Path) -> dict[str, Any]:
    """The record of the CUDA kernel's shapes, which are compiled in: by the program few_tokens.cu, which has them all.

    It is taken from .gpu, where .ci/gpu-prewarm leaves it, or compiled into ``folder``. OSError or
    subprocess.CalledProcessError where that fails.
    """
    program = ROOT / ".gpu" / "few_tokens"
    if not program.exists():
        program = folder / "few_tokens"
        source, include = ROOT / "benchmarks" / "few_tokens.cu", f"-I{ROOT / 'csrc' / 'include'}"
        subprocess.run(["nvcc", "-std=c++20", "-O3", "-arch=native", include, source, "-o", program], check=True)
    tried = json.loads(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
    built = plain(start.few_tokens_cuda)
    (today,) = (record["us"] for record in tried if record["value"] == built)
    last = best(tried, today, FINALISTS)
    return {
        "constant": COMPILED_IN,
        "today": {"value": built, "us": today},
        "winner": winner(tried, today, built),
        "last": last,
        "others": {},
        "tried": tried,
    }


def _results(sweep: Sweep, size: str) -> list[Tensor]:
    """Of one call, where an element that nobody writes is NaN."""
    if size in sweep.before:
        sweep.before[size]()
    with poisoned_memory():
        result = sweep.calls[size]()
    return [tensor for tensor in (result if isinstance(result, tuple) else (result,)) if tensor.numel()]


def _beside(call: Call, flush: Tensor) -> float | None:
    """Microseconds of another way; None where it fails, which is no loss for the constant."""
    try:
        call()
        return statistics.median(device_us(call, flush, ROUNDS))
    except Exception as error:
        print(f"left out: {error!r}", flush=True)
        return None


def _difference(actual: Tensor, expected: Tensor) -> float:
    """RMS difference in units of the expected's RMS: of another order of sums, or of a kernel that is wrong."""
    difference = (actual.float() - expected.float()).square().mean().sqrt()
    return float((difference / expected.float().square().mean().sqrt()).nan_to_num(nan=torch.inf))


def show(result: dict[str, Any]) -> None:
    today = result["today"]
    print(f"\n{result['constant']}, today {today['value']}: {_listed(today['us'])}", flush=True)
    for record in result["last"]:
        print(f"  {ratio(record['us'], today['us']):.3f} × today  {record['value']}: {_listed(record['us'])}")
    for size, us in result["others"].items():
        print(f"  beside it, {size}: {_listed(us)}")
    wrong = [record for record in result["tried"] if not is_right(record)]
    if wrong:
        print(f"  {len(wrong)} of {len(result['tried'])} failed or differ, the first: {wrong[0]}"[:300])
    kept = "today's" if result["winner"] == today["value"] else result["winner"]
    print(f"  winner: {kept}", flush=True)


def _listed(us: Mapping[str, float | None]) -> str:
    return ", ".join(f"{size} {'failed' if time is None else f'{time:.1f} µs'}" for size, time in us.items())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_fast.benchmarks.gpu_tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured")
        return 1
    torch.set_default_device("cuda")
    begin, target = time.perf_counter(), current(torch.device("cuda"))
    start, flush = constants.of(target), torch.zeros(FLUSH_BYTES // 4)
    results: list[dict[str, Any]] = []
    state = gpu.provenance() | {"compute_capability": target.arch, "constants": {}, "sweeps": results}

    def keep(result: dict[str, Any]) -> None:
        results.append(result)
        show(result)
        state["constants"][result["constant"]] = result["winner"]
        report.write_json(arguments.out / "tune.json", state)
        print(f"[{time.perf_counter() - begin:5.1f} s]", flush=True)

    wanted = set(arguments.only or NAMES)
    try:
        for make in sweeps():
            if make.__name__ in wanted:
                keep(measured(make(), start, flush))
                start = replace(start, **{make.__name__: constants.value(make.__name__, results[-1]["winner"])})
                torch.cuda.empty_cache()
        if COMPILED_IN in wanted:
            keep(few_tokens_cuda(start, arguments.out))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{COMPILED_IN} failed: {error}", flush=True)
    except KeyboardInterrupt:  # a limit of time comes so
        print("cut off", flush=True)
    missing = sorted(wanted - state["constants"].keys())
    print(f"not measured: {', '.join(missing)}" if missing else "all of them measured")
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
