"""What the first minutes on a GPU should tell: is everything right, where a step's time goes, which bars hold.

    python -m lora_fast.benchmarks.gpu_first [--out DIR] [--budget SECONDS]

In this order: the device's own ceilings, :mod:`lora_fast.check`, the kernels of each step by the profiler, the rows of
:mod:`~lora_fast.benchmarks.gpu` with a short budget. Writes first.json after each item, so that a run that is cut off
still tells. Fails where something is wrong, not where a bar is missed.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import lora_fast
from lora_fast import check

from . import contenders as c, gpu, gpu_rows, layer, report
from .gpu_timing import FLUSH_BYTES, measure, wall_ms
from .registry import INFERENCE, STEP, Case
from .runner import Step

ROUNDS = 5
PARTS = ("ceilings", "check", "profiles", "host", "rows")


def ceilings() -> dict[str, float]:
    """What the device itself does: a copy in TB/s (read and written), products of random bfloat16 in TFLOPS."""
    source = torch.randn(1 << 30, dtype=torch.bfloat16)
    copied = torch.empty_like(source)
    steps: dict[str, Step] = {"copy": lambda: copied.copy_(source)}
    flops: dict[str, int] = {}
    for T, N, K in ((8192, 4096, 4096), (8192, 8192, 8192), (8192, 4112, 4096)):
        x, W = torch.randn(T, K).bfloat16(), torch.randn(N, K).bfloat16()
        g = torch.randn(T, N).bfloat16()
        flops |= {f"x Wᵀ {T}×{N}×{K}": 2 * T * N * K, f"g W {T}×{N}×{K}": 2 * T * N * K}
        steps[f"x Wᵀ {T}×{N}×{K}"] = lambda x=x, W=W: F.linear(x, W)  # type: ignore[misc]
        steps[f"g W {T}×{N}×{K}"] = lambda g=g, W=W: g @ W  # type: ignore[misc]
    records = measure(steps, 1.0)
    found = {name: flops[name] / records[name]["median_ms"] / 1e9 for name in flops}
    return {"copy": 2 * source.nbytes / records["copy"]["median_ms"] / 1e9} | found


def checked(results: list[dict[str, Any]], write: Callable[[], None]) -> Iterator[str]:
    """Runs the check, prints what fails, and gives a line for each fault."""
    for result in check.run("cuda"):
        results.append(asdict(result))
        write()
        for fault in result.faults:
            line = f"{result.title}: {fault}"
            print(f"WRONG: {line}", flush=True)
            yield line


def profiles() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The kernels of each step and inference of one layer, in microseconds a call, as the profiler sees them."""
    bf16 = torch.bfloat16
    few = (c.FROZEN, *(c.dora(name) for name in gpu_rows.fast_backends()), c.lora())
    cases = [
        Case(STEP, 4096, 4096, 8192, bf16, (c.FROZEN, c.dora(), c.lora(), c.PEFT_LORA)),
        Case(STEP, 4096, 4096, 8192, bf16, (c.dora(),), rank=384),
        Case(STEP, 8192, 8192, 8192, bf16, (c.dora(),), rank=384),
        Case(STEP, 4096, 4096, 512, bf16, (c.dora(),)),
        Case(INFERENCE, 4096, 4096, 16, bf16, few),
        Case(INFERENCE, 4096, 4096, 1, bf16, few),
    ]
    for case in cases:
        inputs = layer.inputs_of(case)
        for contender in case.contenders:
            if (built := present(contender, inputs)) is None:
                continue
            title = f"{contender.name}, {case.title}, rank {case.rank}"
            if case.mode == STEP:
                yield title, kernels(layer.training_step(built, inputs))
                continue
            yield f"{title}, kept norm", kernels(layer.inference(built, inputs))
            if contender.formula == "dora":
                lora_fast.freeze_norms(built.module.eval())
                yield f"{title}, frozen norm", kernels(layer.inference(built, inputs))


def present(contender: c.Contender, inputs: c.LayerInputs) -> c.Layer | None:
    """The layer; None, and told, where the package that the contender is of is missing or fails."""
    try:
        with contender.in_use():
            built = contender.build(inputs)
            inputs.forward(built.module, inputs.x)
            return built
    except c.UnavailableError as reason:
        print(f"{contender.name} left out: {reason}", flush=True)
        return None


def profiled(results: dict[str, Any], write: Callable[[], None]) -> None:
    try:
        for title, found in profiles():
            results[title] = found
            write()
            print(f"\n{title}: {sum(kernel['us'] for kernel in found):.1f} µs", flush=True)
            for kernel in found[:16]:
                print(f"  {kernel['us']:8.1f}  {kernel['calls']:4.1f} ×  {kernel['kernel'][:100]}", flush=True)
    except Exception as error:  # the profiler is no proof: what follows is worth more than its absence
        print(f"profiles ended early: {error!r}", flush=True)


def kernels(step: Step) -> list[dict[str, Any]]:
    flush = torch.zeros(FLUSH_BYTES // 4)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(ROUNDS):
            flush.fill_(1.0)
            step()
        torch.cuda.synchronize()
    found = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    return [
        {"kernel": event.key, "calls": event.count / ROUNDS, "us": event.self_device_time_total / ROUNDS}
        for event in sorted(found, key=lambda event: -event.self_device_time_total)
    ]


def host_times() -> dict[str, dict[str, float]]:
    """Microseconds of a call, one behind the other, of which the host's functions take most, by their own time."""
    bf16, found = torch.bfloat16, {}
    inference = (c.FROZEN, *(c.dora(name) for name in gpu_rows.fast_backends()), c.lora(), c.PEFT_LORA)
    step = (*inference, c.PEFT_DORA)
    for case in (Case(INFERENCE, 1024, 1024, 16, bf16, inference), Case(STEP, 1024, 1024, 64, bf16, step)):
        inputs = layer.inputs_of(case)
        for contender in case.contenders:
            if (built := present(contender, inputs)) is None:
                continue
            if case.mode == INFERENCE and contender.formula == "dora":
                lora_fast.freeze_norms(built.module.eval())
            call = (layer.training_step if case.mode == STEP else layer.inference)(built, inputs)
            for _ in range(10):
                call()
            wall = 1e3 * min(wall_ms(call, 50) for _ in range(4))
            profile = cProfile.Profile()
            profile.runcall(_repeated, call)
            stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
            own = sorted(((value[2] / 50 * 1e6, value[0] / 50, key) for key, value in stats.items()), reverse=True)[:25]
            found[f"{contender.name}, {case.mode}"] = {"wall": wall} | {
                f"{Path(file).name}:{line}({name})": round(us, 1) for us, _, (file, line, name) in own
            }
    return found


def _repeated(call: Step) -> None:
    for _ in range(50):
        call()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_fast.benchmarks.gpu_first", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of measuring a row")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all, in this order")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured")
        return 1
    start = time.perf_counter()
    torch.set_default_device("cuda")
    state: dict[str, Any] = gpu.provenance() | {"check": [], "profiles": {}, "rows": []}
    path = arguments.out / "first.json"

    def write() -> None:
        report.write_json(path, state)

    def elapsed() -> str:
        return f"[{time.perf_counter() - start:5.1f} s]"

    wrong: list[str] = []
    if "ceilings" in arguments.parts:
        state["ceilings"] = ceilings()
        write()
        print(elapsed(), state["ceilings"], flush=True)
    if "check" in arguments.parts:
        wrong += checked(state["check"], write)
        print(elapsed(), f"checked {len(state['check'])} items, {len(wrong)} faults", flush=True)
    if "profiles" in arguments.parts:
        profiled(state["profiles"], write)
        print(elapsed(), "profiled", flush=True)
    if "host" in arguments.parts:
        state["host"] = host_times()
        for name, found in state["host"].items():
            print(f"{name}: {found['wall']:.0f} µs a call", flush=True)
        write()
    if "rows" in arguments.parts:
        wrong += gpu.run_rows(gpu_rows.rows(arguments.budget, compiled=False), state["rows"], write)
    print("\n".join(["", elapsed(), *(wrong or ["everything is right"])]))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
