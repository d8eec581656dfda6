"""Times of one training whose model is accelerated in every second block of steps, and restored in the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .runner import summarise

BEFORE, AFTER = "before", "accelerated"


class Alternation:
    """``begin`` and ``end`` stand around each step. The first of a block is not counted: norms are made anew in it."""

    def __init__(self, accelerate: Callable[[], Any], restore: Callable[[], Any], block: int, blocks: int) -> None:
        self.switches = {BEFORE: restore, AFTER: accelerate}
        self.block, self.steps = block, block * blocks
        self.seconds: dict[str, list[float]] = {BEFORE: [], AFTER: []}
        self.peaks = {BEFORE: 0, AFTER: 0}  # bytes, which whoever has the model measures
        self._step = 0
        self._began = 0.0

    @property
    def kind(self) -> str:
        return (BEFORE, AFTER)[self._step // self.block % 2]

    def begin(self) -> None:
        if self._step % self.block == 0:
            self.switches[self.kind]()
        self._began = time.perf_counter()

    def end(self) -> None:
        took = time.perf_counter() - self._began
        if self._step >= 2 * self.block and self._step % self.block:  # the first two blocks warm up
            self.seconds[self.kind].append(took)
        self._step += 1

    def records(self) -> dict[str, dict[str, float | int]]:
        return {kind: summarise(seconds, self.peaks[kind]).as_dict() for kind, seconds in self.seconds.items()}
