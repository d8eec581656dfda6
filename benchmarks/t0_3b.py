"""The out-of-memory case that started this project: DoRA on T0-3B (T5 v1.1 XL at full size, random weights).

    lora-fast bench t0-3b [--dtype bfloat16] [--depth 24] [--steps 5] [--contenders apply peft-lora] [--limit GIB]

A training step at 4 × 128 tokens for the encoder and 4 × 32 (--targets) for the decoder, in the ratio of T0's training,
which cut inputs at 1024 tokens and targets at 256. One process per contender under RLIMIT_DATA, so that running out of
memory is a result. Memory is measured at small depths first; the line through the first two predicts the peak of the
full model before it runs. Live storage is the bytes of all distinct storages between two steps plus the most that one
step adds; the peak resident size is VmHWM over the steps. Writes t0-3b.json, after every process, and a picture of
memory against depth. With --mmap-threshold 16 what PEFT frees while it adds DoRA adapters, blocks of a weight's size,
leaves no holes in the heap.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import report, without_amx
from .registry import Bar
from .t0_3b_child import SIZES, Task

GIB = 2**30
Result = dict[str, Any]  # the task, and what its process said
Key = tuple[Any, ...]
ARTICLE, PEFT_LORA, PEFT_DORA, APPLY, ACCELERATE = "article", "peft-lora", "peft-dora", "apply", "accelerate"
NAMES = {
    ARTICLE: "article's class",
    PEFT_LORA: "PEFT LoRA, fp32 adapters",
    PEFT_DORA: "PEFT DoRA, fp32 adapters",
    APPLY: "lora_fast DoRA, apply",
    ACCELERATE: "lora_fast DoRA, accelerate",
}
OURS = (APPLY, ACCELERATE)
REQUIRES = {PEFT_LORA: "peft", PEFT_DORA: "peft", ACCELERATE: "peft"}
PEER_STEPS = 2  # a step of PEFT's DoRA takes minutes
GROWTH = (1, 2, 4)
# Of the loss relative to PEFT DoRA's after the same steps. In float32 DoRA and LoRA are ten times further apart after
# two steps; in bfloat16 the rounding of 48 layers hides all but gross faults.
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; 0, or 1 where a contender of ours did not complete or computed something else."""
    arguments = _parser().parse_args(argv)
    if sys.platform != "linux":
        print("t0-3b needs Linux: RLIMIT_DATA and /proc/self/status", file=sys.stderr)
        return 2
    if importlib.util.find_spec("transformers") is None:
        print("t0-3b needs the package transformers: pip install 'lora_fast[demo]'", file=sys.stderr)
        return 1
    without_amx.follow()
    folder = arguments.out or Path(__file__).resolve().parent / "results" / report.device_slug()
    path = folder / "t0-3b.json"
    runs = _read_runs(path)
    for dtype in arguments.dtype:
        for task in _plan(arguments, dtype):
            if arguments.resume and _key(asdict(task)) in runs:
                continue
            if task.contender == ARTICLE and task.depth == arguments.depth:
                _announce_prediction(runs.values(), task)
            done = run(task, _progress(task))
            print(f"  {_summary(done)}", flush=True)
            runs[_key(done)] = done
            _write(path, runs, arguments)
    rows = _write(path, runs, arguments)
    _print_tables(rows)
    _draw(rows, folder / "t0-3b.svg")
    print(f"written to {path}")
    ours = [record for row in rows for name, record in row["records"].items() if name in {NAMES[key] for key in OURS}]
    return int(any(record["outcome"] != "completed" or record["fault"] for record in ours))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-fast bench t0-3b", description="DoRA on T0-3B under a memory limit.")
    parser.add_argument(
        "--depth", type=int, default=24, help="encoder layers, and as many decoder layers (default: 24)"
    )
    parser.add_argument("--growth", type=int, nargs="*", default=GROWTH, help="depths measured first (default: 1 2 4)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of ours (default: 5; peers take at most 2)")
    parser.add_argument("--contenders", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument(
        "--targets", type=int, default=32, metavar="N", help="decoder tokens of each of the 4 sequences (default: 32)"
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=(16, 64, 128), help="peers take the first (default: 16 64 128)"
    )
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16", "float32"))
    parser.add_argument("--limit", type=float, default=20.0, metavar="GIB", help="RLIMIT_DATA (default: 20)")
    parser.add_argument(
        "--mmap-threshold", type=float, metavar="MIB", help="fix glibc's in every process (default: left to glibc)"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what the result file has")
    parser.add_argument("--size", choices=list(SIZES), default="xl", help="tiny: a check, not a measurement")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    return parser


def _plan(arguments: argparse.Namespace, dtype: str) -> Iterator[Task]:
    """The small depths of every contender, then the full depth; ours at every rank."""

    def task(contender: str, depth: int, rank: int, steps: int) -> Task:
        threshold = arguments.mmap_threshold
        return Task(
            contender, depth, rank, dtype, steps, arguments.size,
            targets=arguments.targets,
            threads=torch.get_num_threads(),
            limit_bytes=int(arguments.limit * GIB),
            mmap_threshold_bytes=None if threshold is None else int(threshold * 2**20),
        )  # fmt: skip

    present = [key for key in arguments.contenders if key not in _left_out(arguments)]
    first = arguments.ranks[0]
    for contender in present:
        for depth in sorted(set(arguments.growth) - {arguments.depth}):
            yield task(contender, depth, first, 1)
    for contender in present:
        for rank in arguments.ranks if contender in OURS else (first,):
            steps = arguments.steps if contender in OURS else min(arguments.steps, PEER_STEPS)
            yield task(contender, arguments.depth, rank, steps)


def _left_out(arguments: argparse.Namespace) -> dict[str, str]:
    """The contenders asked for whose package is missing, and why."""
    needed = {key: REQUIRES[key] for key in arguments.contenders if key in REQUIRES}
    return {
        key: f"{package} is not installed"
        for key, package in needed.items()
        if importlib.util.find_spec(package) is None
    }


def run(task: Task, on_event: Callable[[Result], None] = lambda event: None) -> Result:
    """Run one task in a process of its own and return what it said. Its death is a result, with the last stage."""
    stamp = {key: value for key, value in report.provenance().items() if key in ("date", "commit", "load_average")}
    said: Result = {"step_s": [], "losses": [], "stage": "starting", "outcome": None, "error": None}
    result = asdict(task) | stamp | said
    command = [sys.executable, "-m", f"{__package__}.t0_3b_child", task.as_json()]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if line.startswith("{"):
                        event = json.loads(line)
                        on_event(event)
                        _take(event, result)
            except BaseException:
                process.kill()
                raise
        errors.seek(0)
        last_words = errors.read().strip().splitlines()[-1:]
    if result["outcome"] is None:
        killed = process.returncode < 0
        result["outcome"] = f"killed by signal {-process.returncode}" if killed else "failed"
        result["error"] = "".join(last_words) or None
    return result


def _take(event: Result, result: Result) -> None:
    if "seconds" in event:
        result["step_s"].append(event["seconds"])
        result["losses"].append(event["loss"])
    else:
        result.update(event)


def predict_live_bytes(runs: Iterable[Result], contender: str, rank: int, depth: int) -> dict[str, float] | None:
    """The line through the live storage of the two smallest depths at this rank, carried on to `depth`.

    `error` is how far off, relatively, it lies at the largest depth that was measured below `depth`.
    """
    measured = sorted(
        {
            one["depth"]: one["live_bytes"]
            for one in runs
            if (one["contender"], one["rank"], one["outcome"]) == (contender, rank, "completed")
            and one["depth"] < depth
        }.items()
    )
    if len(measured) < 2:
        return None
    (first, low), (second, high) = measured[:2]
    per_layer = (high - low) / (second - first)
    deepest, value = measured[-1]
    return {
        "bytes_per_layer": per_layer,
        "predicted_bytes": low + per_layer * (depth - first),
        "checked_at_depth": deepest,
        "error": (low + per_layer * (deepest - first)) / value - 1,
    }


def rows_of(runs: Sequence[Result], depth: int, left_out: dict[str, str]) -> list[dict[str, Any]]:
    """One row for each rank that ran at full depth, with its records, the growth with depth and the bars.

    `runs` are of one size and dtype.
    """
    rows: list[dict[str, Any]] = []
    full = [one for one in runs if one["depth"] == depth]
    for rank in dict.fromkeys(one["rank"] for one in full):
        found = {one["contender"]: one for one in full if one["rank"] == rank}
        records = {NAMES[key]: record(one, runs, found.get(PEFT_DORA)) for key, one in found.items()}
        one = next(iter(found.values()))
        tokens = f"{one['batch']}×{one['length']} tokens and {one['batch']}×{one['targets']} targets"
        rows.append(
            {
                "title": f"T0-3B, training step, {tokens}, {one['dtype']}, rank {rank}, depth {depth}",
                "mode": "model step",
                "dtype": one["dtype"],
                "rank": rank,
                "depth": depth,
                "batch": one["batch"],
                "tokens": one["batch"] * one["length"],
                "target_tokens": one["batch"] * one["targets"],
                "baseline": NAMES[PEFT_LORA],
                "limit_bytes": one["limit_bytes"],
                "mmap_threshold_bytes": one.get("mmap_threshold_bytes"),
                "records": records,
                "growth": _growth(runs, rank),
                "left_out": {NAMES[key]: reason for key, reason in left_out.items()},
                "bars": [report.bar_as_dict(bar) for bar in bars(records, rank)],
            }
        )
    return rows


def record(result: Result, runs: Sequence[Result], yardstick: Result | None) -> dict[str, Any]:
    """The runner's fields where the contender completed, and what only this case has."""
    fields: dict[str, Any] = {
        "outcome": result["outcome"], "stage": result["stage"], "error": result["error"], "fault": None,
        "step_ms": [1e3 * seconds for seconds in result["step_s"]], "losses": result["losses"],
        "resident_bytes": result.get("resident_bytes"),
        "prediction": predict_live_bytes(runs, result["contender"], result["rank"], result["depth"]),
    }  # fmt: skip
    times = fields["step_ms"]
    if times:
        deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
        fields |= {"median_ms": deciles[4], "p20_ms": deciles[1], "p80_ms": deciles[7], "rounds": len(times)}
    if result["outcome"] == "completed":
        fields["peak_bytes"] = result["live_bytes"]
        for name in ("weight_bytes", "trained_parameters", "between_steps_bytes", "building_resident_bytes"):
            fields[name] = result[name]
    if result["contender"] in OURS and yardstick:
        fields["fault"] = _loss_fault(result["losses"], yardstick["losses"], LOSS_TOLERANCE[result["dtype"]])
    return fields


def _loss_fault(losses: Sequence[float], expected: Sequence[float], tolerance: float) -> str | None:
    for step, (loss, other) in enumerate(zip(losses, expected, strict=False), start=1):
        if not abs(loss - other) <= tolerance * abs(other):  # a NaN is a fault
            return f"loss {loss:.6g} at step {step}, PEFT DoRA's is {other:.6g}"
    return None


def _growth(runs: Sequence[Result], rank: int) -> dict[str, list[dict[str, Any]]]:
    """Live storage and resident size of each contender at each depth that it completed."""
    points: dict[str, list[dict[str, Any]]] = {}
    for one in sorted(runs, key=lambda one: one["depth"]):
        if one["outcome"] == "completed" and one["rank"] == rank:
            point = {"depth": one["depth"], "peak_bytes": one["live_bytes"], "resident_bytes": one["resident_bytes"]}
            points.setdefault(NAMES[one["contender"]], []).append(point)
    return points


def bars(records: dict[str, dict[str, Any]], rank: int) -> list[Bar]:
    """Ours against PEFT LoRA's memory, and against PEFT DoRA's time where its steps ended, whatever came after them.

    Each of our steps is compared with PEFT DoRA's of the same number, later ones with its last: the first touches the
    memory for the first time.
    """
    found = []
    completed = {name: one for name, one in records.items() if one["outcome"] == "completed" and not one["fault"]}
    lora, dora = completed.get(NAMES[PEFT_LORA]), records.get(NAMES[PEFT_DORA])
    for key in OURS:
        name = NAMES[key]
        if name in records:
            found.append(Bar(f"{name}: completed", float(name in completed), 1.0, False))
        if name not in completed:
            continue
        ours = completed[name]
        if lora:
            live = ours["peak_bytes"] / lora["peak_bytes"]
            resident = ours["resident_bytes"] / lora["resident_bytes"]
            found.append(Bar(f"{name}: × PEFT LoRA's live storage", live, 1.00, True))
            found.append(Bar(f"{name}: × PEFT LoRA's peak resident size", resident, 1.05, True))
        if dora and dora["step_ms"]:
            theirs = dora["step_ms"]
            factor = min(theirs[min(step, len(theirs) - 1)] / time_ms for step, time_ms in enumerate(ours["step_ms"]))
            found.append(Bar(f"{name}: each step × faster than PEFT DoRA's", factor, 3.0, False))
    article = records.get(NAMES[ARTICLE])
    if article:
        found.append(Bar(f"{NAMES[ARTICLE]}: out of memory", float(article["outcome"] != "completed"), 1.0, False))
    return found


def _announce_prediction(runs: Iterable[Result], task: Task) -> None:
    prediction = predict_live_bytes(runs, task.contender, task.rank, task.depth)
    if prediction is None or task.limit_bytes is None:
        return
    predicted, per_layer = prediction["predicted_bytes"] / GIB, prediction["bytes_per_layer"] / GIB
    print(
        f"  predicted: {predicted:.1f} GiB of live storage at depth {task.depth}, {per_layer:.2f} GiB a layer "
        f"(the line is {100 * prediction['error']:+.1f}% off at depth {prediction['checked_at_depth']}); "
        f"the limit is {task.limit_bytes / GIB:.1f} GiB",
        flush=True,
    )


def _progress(task: Task) -> Callable[[Result], None]:
    begin = time.monotonic()
    print(f"{NAMES[task.contender]}, {task.dtype}, rank {task.rank}, depth {task.depth}", flush=True)

    def on_event(event: Result) -> None:
        if "stage" in event and sys.stdout.isatty():
            print(f"  {time.monotonic() - begin:6.0f} s  {event['stage']}", flush=True)

    return on_event


def _summary(result: Result) -> str:
    if result["outcome"] != "completed":
        return f"{result['outcome']} at {result['stage']}: {(result['error'] or '')[:160]}"
    live, resident = result["live_bytes"] / GIB, result["resident_bytes"] / GIB
    return f"{live:.2f} GiB live, {resident:.2f} GiB resident, {statistics.median(result['step_s']):.1f} s a step"


def _key(values: Mapping[str, Any]) -> Key:
    """What tells one run from another; a later run of the same key takes its place."""
    return tuple(values[name] for name in ("size", "targets", "dtype", "rank", "depth", "contender"))


def _read_runs(path: Path) -> dict[Key, Result]:
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    return {_key(one): one for one in runs}


def _write(path: Path, runs: dict[Key, Result], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Write all runs and their rows, after every run: an interrupted command loses only the run it was in."""
    rows = [
        row
        for dtype in LOSS_TOLERANCE
        for row in rows_of(
            [
                one
                for one in runs.values()
                if (one["size"], one["targets"], one["dtype"]) == (arguments.size, arguments.targets, dtype)
            ],
            arguments.depth,
            _left_out(arguments),
        )
    ]
    report.write_json(path, report.provenance() | {"rows": rows, "runs": list(runs.values())})
    return rows


def _print_tables(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console

    from .t0_3b_report import bars_table, records_table

    console = Console(width=None if sys.stdout.isatty() else 140)
    for row in rows:
        console.print(records_table(row))
    console.print(bars_table(rows))


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
        return
    from .t0_3b_report import memory_against_depth

    memory_against_depth(rows, path)
    print(f"drawn in {path}")


if __name__ == "__main__":
    sys.exit(main())
