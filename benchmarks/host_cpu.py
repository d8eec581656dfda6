"""What a layer's forward and backward take of a CPU besides computing: one token, and sizes that compute in no time.

    python -m lora_fast.benchmarks.host_cpu [--rounds N]

A forward of lora_fast's layers in inference is split into the parts that it comes through (docs/design.md): the module,
the public function, the op, the backend (its choice, its plan, its Python and PyTorch's operators) and the C++ kernels.
Each is called alone with the same arguments, and the time of what is called in it is taken off. A step is forward and
backward, of which the backward's op below autograd is shown, and the kernels in it. Beside these layers stand nn.Linear
and PEFT's. All are microseconds of this processor, the least of many calls in turns: what else it does only adds.
"""

from __future__ import annotations

import argparse
import itertools
import platform
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fast
from lora_fast import backends, calls, functional, ops
from lora_fast.backends import registry

from . import contenders as c
from .host import Subject, passes
from .report import cpu_model, digits
from .runner import Step, alternate

if TYPE_CHECKING:
    from rich.table import Table

SIZES, RANK = (64, 256), 16
CALLS, ROUNDS = 5, 1000
SUBJECTS = (
    Subject("nn.Linear", c.FROZEN),
    Subject("PEFT LoRA, bf16 adapters", c.PEFT_LORA),
    Subject("PEFT DoRA, bf16 adapters", c.PEFT_DORA),
    Subject("LinearWithLoRA", c.lora()),
    Subject("LinearWithDoRA, kept norm", c.dora()),
    Subject("LinearWithDoRA, frozen norm", c.dora(), frozen_norm=True),
    Subject("accelerate(PEFT LoRA), bf16 adapters", c.ACCELERATED_LORA_BF16),
    Subject("accelerate(PEFT DoRA), bf16 adapters", c.ACCELERATED_BF16),
)
PARTS = ("module", "function", "op", "backend", "kernels")  # of a forward, from the outside to the inside
BACKWARD = ("backward's op", "its kernels")
HEADINGS = ("inference", *PARTS, "training", "step", *BACKWARD)
Key = tuple[str, str]  # a subject and what is timed


class Kernels(TorchDispatchMode):
    """Notes the calls of the extension's operators, to be made again."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(function, *args, **(kwargs or {}))
        if function.namespace == "lora_fast_c":
            self.steps.append(call)
        return call()


def calls_of(step: Step) -> list[tuple[str, Any]]:
    """The ops of lora_fast's that a step calls, by their names in the backends, and with what."""
    found: list[tuple[str, Any]] = []
    run = registry.run

    def noted(op: str, call: Any, backend: str) -> Any:
        found.append((op, call))
        return run(op, call, backend)

    with mock.patch.object(registry, "run", noted):
        step()
    return found


def below(op: str, call: Any) -> tuple[Step, Step]:
    """What comes below the op for a call, and the kernels in it."""
    with Kernels() as noted, torch.no_grad():
        registry.run(op, call, "auto")

    def kernels() -> None:
        for step in noted.steps:
            step()

    return partial(registry.run, op, call, "auto"), kernels


def function_of(call: Any) -> Step:
    """The public function that makes the call."""
    x, weight, bias, lora_A, lora_B, scaling, vector, *_ = call
    if isinstance(call, calls.LoraLinear):
        return partial(functional.lora_linear, x, weight, bias, lora_A, lora_B, scaling, vector)
    kept = lora_fast.NormCache()
    return partial(functional.dora_linear, x, weight, bias, lora_A, lora_B, vector, scaling, kept=kept)


def steps_of(subject: Subject, size: int) -> dict[str, Step]:
    """All that is timed of a layer, under its heading."""
    inputs = c.layer_inputs(size, size, RANK, 1, torch.bfloat16)
    x, evaluated = inputs.x.detach(), subject.contender.build(inputs).module.eval()
    if subject.frozen_norm:
        lora_fast.freeze_norms(evaluated)
    steps: dict[str, Step] = {"inference": partial(evaluated, x)}
    with torch.inference_mode():
        for op, call in calls_of(steps["inference"]):
            parts = steps["inference"], function_of(call), partial(getattr(ops, op), call, "auto"), *below(op, call)
            steps |= dict(zip(PARTS, parts, strict=True))
    if not subject.frozen_norm:
        trained = subject.contender.build(inputs).module.train()
        steps["training"], steps["step"] = passes(trained, inputs.x, inputs.grad_y)
        for op, call in calls_of(steps["step"])[1:]:
            steps |= dict(zip(BACKWARD, below(op, call), strict=True))
    return steps


def rows(size: int, rounds: int, subjects: Iterable[Subject] = SUBJECTS) -> Iterator[tuple[str, dict[str, float]]]:
    """Of all subjects, in turns, the microseconds under each heading; without those whose package is missing."""
    present = [subject for subject in subjects if subject.contender.missing() is None]
    steps = {subject.name: steps_of(subject, size) for subject in present}
    together = {str((name, what)): _repeated(what, step) for name, of in steps.items() for what, step in of.items()}
    for step in together.values():
        step()  # what is done once is not counted
    samples = alternate(together, dict.fromkeys(together, rounds))
    for name, of in steps.items():
        yield name, apart({what: 1e6 / CALLS * min(samples[str((name, what))]) for what in of})


def apart(times: dict[str, float]) -> dict[str, float]:
    """The time of each part alone: without that of what is called in it."""
    inner = dict(itertools.pairwise(PARTS))
    return {what: time - times[inner[what]] if what in inner else time for what, time in times.items()}


def table(size: int, found: Iterable[tuple[str, dict[str, float]]]) -> Table:
    from rich.table import Table

    title = f"{size} × {size}: µs of a forward in inference and its parts, of a forward in training and of a step"
    shown = Table(title=title, title_justify="left")
    shown.add_column("", no_wrap=True)
    for heading in HEADINGS:
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, times in found:
        shown.add_row(name, *(digits(times[heading]) if heading in times else "" for heading in HEADINGS))
    return shown


def _repeated(what: str, step: Step) -> Step:
    inference, is_recorded = what in ("inference", *PARTS), what in ("training", "step")

    def repeated() -> None:
        with torch.inference_mode() if inference else torch.set_grad_enabled(is_recorded):
            for _ in range(CALLS):
                step()

    return repeated


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_fast.benchmarks.host_cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of {CALLS} calls each, default {ROUNDS}")
    arguments = parser.parse_args()
    if missing := backends.get("cpu").missing():
        print(missing)
        return 1
    from rich.console import Console

    torch.set_num_threads(1)  # threads that wait for each other take more time than what is computed
    print(f"{cpu_model()}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"1 token, bfloat16, rank {RANK}")
    for size in SIZES:
        Console(width=170).print(table(size, rows(size, arguments.rounds)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
