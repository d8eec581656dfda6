"""Times on a GPU: the device's by events, the host's and the wall's, and the step as a CUDA graph.

The device's times are CUDA events around one call, alternated over the steps, behind a short spin that lets the host
run ahead, with the L2 cache emptied before each.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from lora_fast.testing import peak_bytes

from .runner import Step

CYCLES_PER_MS = 2_000_000  # of a multiprocessor at its highest clock
FLUSH_BYTES = 256 << 20  # more than any L2


def measure(steps: Mapping[str, Step], budget_s: float) -> dict[str, dict[str, float]]:
    """Median, p20 and p80 of the device's milliseconds, the host's, and the peak of memory, of each step."""
    if not steps:
        return {}
    flush = torch.zeros(FLUSH_BYTES // 4)
    host: dict[str, list[float]] = {name: [] for name in steps}
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in steps}
    peaks, spin_cycles = {}, {}
    for name, step in steps.items():
        for _ in range(2):
            step()
        peaks[name] = peak_bytes(step)
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        host_ms = 1e3 * (time.perf_counter() - start)
        spin_cycles[name] = int(CYCLES_PER_MS * (0.2 + 1.5 * host_ms))  # longer than the host takes
    order, names, deadline = random.Random(0), list(steps), time.perf_counter() + budget_s
    while len(events[names[0]]) < 10 or (time.perf_counter() < deadline and len(events[names[0]]) < 200):
        order.shuffle(names)
        for name in names:
            begin, end, host_ms = launched(steps[name], flush, spin_cycles[name])
            host[name].append(host_ms)
            events[name].append((begin, end))
        torch.cuda.synchronize()
    records = {}
    for name, pairs in events.items():
        times = sorted(begin.elapsed_time(end) for begin, end in pairs)
        records[name] = {
            "median_ms": statistics.median(times),
            "p20_ms": times[len(times) // 5],
            "p80_ms": times[len(times) * 4 // 5],
            "host_ms": statistics.median(host[name]),
            "peak_bytes": float(peaks[name]),
            "rounds": float(len(times)),
        }
    return records


def launched(step: Step, flush: torch.Tensor, spin_cycles: int) -> tuple[Any, Any, float]:
    """The events before and after one call, with the L2 cache emptied by ``flush`` and behind a spin that lets the host
    run ahead; and the host's milliseconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.sum()  # by reading: what is written would still be on its way to memory
    torch.cuda._sleep(spin_cycles)
    begin.record()
    start = time.perf_counter()
    step()
    host_ms = 1e3 * (time.perf_counter() - start)
    end.record()
    return begin, end, host_ms


def wall_ms(step: Step, calls: int = 100) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def captured(step: Step) -> Step:
    """The step as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
