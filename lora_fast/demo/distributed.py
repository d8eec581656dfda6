"""``lora-fast demo --distributed``: all-MiniLM-L6-v2 with DoRA, in one process and in two with PyTorch's FSDP2.

Each of the two has half of every batch's rows and, between steps, half of every parameter. The whole batch's loss is
the mean of the halves', and FSDP averages the gradients, so that the two train what the one trains: losses and adapters
differ by rounding alone. Adam hides one fault, gradients that are all too large or too small by one factor.

All trainings run in processes of their own, so that their memory can be compared.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

import lora_fast
from lora_fast.testing import peak_bytes

from .docstrings import Example
from .finetune import adapt
from .resident import Resident
from .training import Classifier, Measured, Pair, Progress, Training, batches, encode, load, take_turns

PROCESSES = 2  # which share a batch evenly: the mean of their means is the batch's
THREADS = 2  # of all processes together
STEPS = 60
COMPARED_STEPS = 20
# With four seeds rounding (each batch's rows reversed) did 1e-7 to 3e-7 to the losses of the compared steps and 2e-5 to
# 6e-5 to an adapter's tensor after all of them; 1% on the magnitudes of a single layer 3e-4 to 6e-4, and 4e-2 to 9e-2.
LOSS_BAR = 2e-5
ADAPTER_BAR = 1e-3


@dataclass(frozen=True)
class Task:
    """One training."""

    train: list[Example]
    test: list[Example]
    steps: int
    seed: int
    adapter: Path  # the folder for the trained adapter
    processes: int = 1
    reversed: bool = False  # each batch's rows


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes."""

    parameters: int  # held between steps
    step: int  # allocated at once in a step, beyond what is held between steps
    resident: int | None  # the training's peak, over what was resident before the model was built

    def as_dict(self) -> dict[str, int | None]:
        return {f"{name}_bytes": value for name, value in asdict(self).items()}


@dataclass(kw_only=True)
class Run(Measured):
    """One training, in one process or in several."""

    threads: int  # in each process
    memory: list[Memory]  # of each process
    trained_parameters: int
    adapted_layers: int

    def as_dict(self) -> dict[str, Any]:
        memory = [memory.as_dict() for memory in self.memory]
        return super().as_dict() | {"threads_of_a_process": self.threads, "memory": memory}


@dataclass(frozen=True)
class Comparison(Pair[Run]):
    """One process is the reference, FSDP2 the other."""

    compared_steps: ClassVar[int] = COMPARED_STEPS
    loss_bar: ClassVar[float] = LOSS_BAR

    adapter_difference: float  # as :func:`adapter_difference`, of FSDP2's to the one process's
    adapter_noise: float  # the same of the one process with each batch's rows reversed

    @property
    def adapters_agree(self) -> bool:
        return self.adapter_difference <= ADAPTER_BAR


def compare(
    train: list[Example], test: list[Example], *, steps: int, seed: int, adapter: Path, on_progress: Progress
) -> Comparison:
    """Train in one process, in one with each batch's rows reversed, and in two, whose adapter goes into ``adapter``."""
    with tempfile.TemporaryDirectory() as name:
        task = Task(train, test, steps, seed, Path(name) / "one process")
        other = replace(task, adapter=Path(name) / "reversed", reversed=True)
        sharded = replace(task, adapter=adapter, processes=PROCESSES)
        reference = trained(task, "one process", on_progress)
        other_order = trained(other, "one process, rows reversed", on_progress)
        fast = trained(sharded, f"{PROCESSES} processes, FSDP2", on_progress)
        return Comparison(
            reference=reference,
            fast=fast,
            other_order=other_order,
            train_size=len(train),
            test_size=len(test),
            trained_parameters=fast.trained_parameters,
            adapted_layers=fast.adapted_layers,
            adapter_difference=adapter_difference(adapter, task.adapter),
            adapter_noise=adapter_difference(other.adapter, task.adapter),
        )


def trained(task: Task, stage: str, on_progress: Progress) -> Run:
    """Run ``task`` in new processes. An error in one ends them all, and is raised here."""
    with tempfile.TemporaryDirectory() as name:
        fraction = multiprocessing.get_context("spawn").Value("d", 0.0, lock=False)
        # of daemons none is left when this process ends
        context = spawn(process, (task, Path(name), fraction), nprocs=task.processes, join=False, daemon=True)
        while not context.join(timeout=0.2):
            on_progress(stage, fraction.value)
        on_progress(stage, 1.0)
        return joined([pickle.loads(file.read_bytes()) for file in sorted(Path(name).glob("*.pickle"))])


def joined(runs: Sequence[Run]) -> Run:
    """What the processes of one training measured as one: their loss is the mean, and a step takes the slowest's time.

    Each has answered all held-out texts.
    """
    return replace(
        runs[0],
        losses=[fmean(losses) for losses in zip(*(run.losses for run in runs), strict=True)],
        seconds=[max(seconds) for seconds in zip(*(run.seconds for run in runs), strict=True)],
        memory=[memory for run in runs for memory in run.memory],
    )


def process(rank: int, task: Task, folder: Path, fraction: Any) -> None:
    """What each process does: train, and leave what it measured in ``folder``."""
    torch.set_num_threads(THREADS // task.processes)
    if task.processes > 1:
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=task.processes)

    def on_progress(stage: str, done: float) -> None:
        if rank == 0:
            fraction.value = done

    run = measure(rank, task, on_progress)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(run))
    if task.processes > 1:
        dist.destroy_process_group()
        # Gloo's threads outlive the group where anything refers to it, and where one lets go of a tensor in an
        # interpreter that is ending, the process aborts (PyTorch's pull request 179291).
        os._exit(0)


def measure(rank: int, task: Task, on_progress: Progress) -> Run:
    """Train this process's part, save the adapter, answer the held-out texts."""
    load()  # once before, since what it imports is not the model's memory
    resident = Resident()
    torch.manual_seed(task.seed)  # the same start in every process
    tokenizer, encoder = load()
    model = adapt(encoder)
    count = lora_fast.count_parameters(model)
    if task.processes > 1:
        shard(model, task.processes)
    at_rest = parameter_bytes(model)
    run = Training(model, task.steps)
    whole = [encode(tokenizer, examples) for examples in batches(task.train, task.steps, task.seed)]
    data = [(batch.reversed() if task.reversed else batch).part(rank, task.processes) for batch in whole]

    resident.begin()
    # for no limited time: one process may not stop without the other
    take_turns([run], data, stage="", on_progress=on_progress, seconds=math.inf)
    training_resident = resident.rise()
    lora_fast.save_adapter(model, task.adapter)
    # Not after the answers, which leave what FSDP2 gathered of the root in place, as no backward follows. The step
    # changes nothing: the schedule has ended, at a learning rate of 0.
    step = peak_bytes(partial(run.step, data[0]))
    run.answer(tokenizer, task.test)
    return Run(
        losses=run.losses,
        seconds=run.seconds,
        answers=run.answers,
        accuracy=run.accuracy,
        threads=torch.get_num_threads(),
        memory=[Memory(at_rest, step, training_resident)],
        trained_parameters=count.trainable,
        adapted_layers=sum(isinstance(module, lora_fast.LinearWithDoRA) for module in model.modules()),
    )


def shard(model: Classifier, processes: int) -> None:
    """FSDP2 on each block, and on the model for the embeddings and the head."""
    mesh = init_device_mesh("cpu", (processes,))  # else FSDP would take a GPU where there is one
    encoder: Any = model.encoder
    for block in encoder.encoder.layer:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parameter_bytes(model: nn.Module) -> int:
    """What this process holds of the parameters."""
    own = (value.to_local() if isinstance(value, DTensor) else value for value in model.parameters())
    return sum(value.nbytes for value in own)


def adapter_difference(folder: Path, expected: Path) -> float:
    """The largest ‖tensor - expected‖ / ‖expected‖ of two saved adapters; infinite if they differ by more than values.

    lora_B is zero at the start, so that of it this is relative to what training did.
    """
    from safetensors.torch import load_file

    configs = [json.loads((path / "adapter_config.json").read_text("utf-8")) for path in (folder, expected)]
    tensors, wanted = (load_file(path / "adapter_model.safetensors") for path in (folder, expected))
    shapes = [{name: tensor.shape for name, tensor in saved.items()} for saved in (tensors, wanted)]
    if configs[0] != configs[1] or shapes[0] != shapes[1]:
        return math.inf
    apart = [(tensors[name] - tensor).norm() / tensor.norm() for name, tensor in wanted.items()]
    return float(torch.stack(apart).max())  # NaN, if one is
