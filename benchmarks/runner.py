"""Time and peak memory of several functions, alternated in one process.

Timing one function after the other lets the clock, the caches and other jobs favour one of them. Here every round calls
each function once, so that a ratio of two medians compares calls made side by side.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from lora_fast.testing import peak_bytes

Step = Callable[[], object]


@dataclass(frozen=True)
class Record:
    """One function's time and memory, measured in one run. Times in milliseconds, memory in bytes."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    peak_bytes: int  # most memory that one call holds at once, beyond what was there before it

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def measure(
    steps: Mapping[str, Step],
    *,
    budget_s: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 100,
    warm_up: int = 2,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Record]:
    """Return a `Record` for each step.

    `budget_s` is the time per step, shortened to `max_rounds` calls and stretched to `min_rounds`; the last of
    `warm_up` calls tells how many fit. `on_progress` gets the finished fraction, from 0 to 1.
    """
    rounds = {}
    for name, step in steps.items():
        for _ in range(warm_up):
            once = _timed(step)
        rounds[name] = int(min(max(budget_s / max(once, 1e-9), min_rounds), max_rounds))
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    samples = alternate(steps, rounds, on_progress=on_progress)
    return {name: summarise(samples[name], peaks[name]) for name in steps}


def summarise(seconds: list[float], peak: int) -> Record:
    deciles = statistics.quantiles([1e3 * value for value in seconds], n=10, method="inclusive")
    return Record(deciles[4], deciles[1], deciles[7], len(seconds), peak)


def alternate(
    steps: Mapping[str, Step],
    rounds: Mapping[str, int],
    *,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, list[float]]:
    """Return `rounds[name]` times of each step, in seconds, from calls in turn.

    A slow step takes part in fewer rounds, spread evenly over all of them, so that it meets the same weather. Every
    round shuffles the order (the same way in every run): no step always runs behind the one that empties the cache.
    """
    names = list(steps)
    order = random.Random(0)
    total = max(rounds.values(), default=0)
    samples: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(total):
            order.shuffle(names)
            for name in names:
                if (turn + 1) * rounds[name] // total > turn * rounds[name] // total:
                    samples[name].append(_timed(steps[name]))
            if on_progress is not None:
                on_progress((turn + 1) / total)
    finally:
        if enabled:
            gc.enable()
    return samples


def _timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
