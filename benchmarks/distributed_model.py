"""Training steps of a PEFT model in two processes, before and after `lora_fast.accelerate`, in each engine.

A Llama-like model of four layers, width 1024, feed-forward 2816, rank 16 on all linears, in bfloat16 with PEFT's
default adapters (float32), 1024 tokens a rank: one sequence of the length that TRL's trainers cut at by default. One
thread a rank, gloo between them. With a quarter of the tokens FSDP2 per block is measured too: DoRA's norm is made once
a forward however few they are. For each engine a pair of processes holds all contenders, with the same weights, and
alternates their steps: forward, backward, AdamW. The input requires grad for all of them, so that the frozen model has
a backward.

- FSDP2 takes such a model as it is: only what trains must be of one dtype in a unit.
- FSDP1 wants one dtype in all of a unit. So what is frozen is in units of its own, and the adapters are in their
  block's. Blocks as the only units are measured too, as FSDP1 is often used: the model is float32 and FSDP1's mixed
  precision gathers and computes in bfloat16, adapters too.
- ZeRO runs without its bf16 mode, which would make the adapters bfloat16. Its bounds on what stays gathered are
  for models of billions of parameters, and would keep this one whole: nothing is fetched ahead, or kept for backward.

Freed memory stays with the processes (KEPT_MEMORY), as it does on a GPU. A step begins at a barrier and takes as long
as on the slowest rank. The peak of a rank is what it holds between steps (the memory of all tensors that came with the
contender: shards, optimizer state, buffers; DDP's own buckets in C++ are not seen) and the most that one step takes
beyond that: PyTorch's allocations by the profiler's events, in which are gathered parameters and the buffers of
collectives, but not what gloo takes in threads of its own. In that step each collective is waited for (see
:func:`.collectives.waited_for`); it is the least of three, and the rank with most counts.

Before anything is measured, outputs and a gradient are compared with the same model in float64 in one process.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import os
import pickle
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

import lora_fast
from lora_fast.testing import peak_bytes

from . import collectives, report, without_amx
from .contenders import UnavailableError, accelerate, calls_of
from .distributed_engines import ENGINES, Engine, Placed, probed
from .peft_model import DORA, LORA, PEFT_DORA, PEFT_LORA, SLACK, move, output
from .registry import STEP, Bar
from .runner import Step, summarise

FROZEN, APPLIED = "frozen", "apply DoRA"
RANKS = 2
CHECKED_TOKENS = 16
COUNTED_FOR = (8, 64, 1024)  # GPUs
MOST_TIME, MOST_MEMORY = 1.0, 1.03  # times PEFT's LoRA
# For glibc's malloc, in the processes of all contenders: to keep what is freed, as the allocator of a GPU does. By
# default it gives large blocks back to the system, and the weights that are gathered in every step are zeroed again,
# page by page. One arena: those of gloo's threads, in which its buffers for collectives are, would give theirs back
# still, in some processes in every step and in others in few.
KEPT_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_ARENA_MAX": "1",
}
TIMEOUT = datetime.timedelta(minutes=2)  # of a collective to which another rank does not come


@dataclass(frozen=True)
class Size:
    width: int = 1024
    feed_forward: int = 2816
    depth: int = 4
    heads: int = 8
    tokens: int = 1024  # of a rank
    rank: int = 16


CASES = (*((engine, Size()) for engine in ENGINES), (ENGINES[0], Size(tokens=256)))


@dataclass(frozen=True)
class Contender:
    build: Callable[[Size], nn.Module]
    dora: bool | None = None  # None: nothing is trained
    ours: bool = False  # an error ends the benchmark; of the others it is why they are left out
    accelerated: bool = False


def base_model(size: Size) -> nn.Module:
    """The frozen model, the same at every call."""
    return copy.deepcopy(_base_model(size))


@functools.cache
def _base_model(size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=128,
        use_cache=False,
        initializer_range=size.width**-0.5,  # so that every layer changes what passes through it
    )
    model: nn.Module = LlamaModel(config)
    return model.to(torch.bfloat16).requires_grad_(False)


def peft_model(size: Size, dora: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    base = base_model(size)
    torch.manual_seed(1)  # not before: the base is drawn once
    lora = LoraConfig(r=size.rank, lora_alpha=size.rank, use_dora=dora, target_modules="all-linear")
    model = get_peft_model(base, lora)
    move(model)
    return model


@torch.no_grad()
def applied_model(size: Size) -> nn.Module:
    """`lora_fast.apply`, with the adapters of PEFT's model."""
    theirs = peft_model(size, dora=True).base_model.model
    model = lora_fast.apply(base_model(size), size.rank, 1.0, adapter_dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, lora_fast.LinearWithDoRA):
            other = theirs.get_submodule(name)
            layer.lora_A.copy_(other.lora_A["default"].weight)
            layer.lora_B.copy_(other.lora_B["default"].weight)
            layer.magnitude.copy_(other.lora_magnitude_vector["default"].weight)
    return model


CONTENDERS = {
    FROZEN: Contender(base_model),
    PEFT_LORA: Contender(partial(peft_model, dora=False), False),
    PEFT_DORA: Contender(partial(peft_model, dora=True), True),
    LORA: Contender(partial(peft_model, dora=False), False, ours=True, accelerated=True),
    DORA: Contender(partial(peft_model, dora=True), True, ours=True, accelerated=True),
    APPLIED: Contender(applied_model, True, ours=True),
}


@dataclass(frozen=True)
class Expected:
    """Of all ranks' inputs together: the output and the gradient in float64, and the RMS errors of PEFT's own."""

    output: Tensor
    gradient: Tensor
    errors: tuple[float, float]


def expected(size: Size, dora: bool, x: Tensor) -> Expected:
    model = peft_model(size, dora)
    theirs = _output_and_gradient(model, x)
    model.zero_grad()
    truth = _output_and_gradient(model.double(), x.double())
    return Expected(*truth, (_rms_error(theirs[0], truth[0]), _rms_error(theirs[1], truth[1])))


def _output_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = output(model, x)
    _loss(y).backward()
    gradient = probed(model).grad
    assert gradient is not None
    return y.detach(), gradient


def _rms_error(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).square().mean().sqrt())


def _loss(y: Tensor) -> Tensor:
    return y.float().pow(4).mean()  # the last norm makes the mean square 1 whatever the weights are


def check(name: str, placed: Placed, x: Tensor, wanted: Expected) -> None:
    """One training step; RuntimeError if the output or the gradient errs by more than SLACK times what PEFT's does."""
    own = slice(dist.get_rank(), dist.get_rank() + 1)
    y = output(placed.model, x[own].requires_grad_())
    placed.backward(_loss(y))
    errors = _rms_error(y.detach(), wanted.output[own]), _rms_error(placed.gradient(), wanted.gradient)
    placed.update()
    for what, error, theirs in zip(("output", "gradient"), _largest(errors), wanted.errors, strict=True):
        if not error <= SLACK * theirs:
            raise RuntimeError(f"{name}: RMS error {error:.3g} of the {what} against float64, PEFT's is {theirs:.3g}")


def _largest(values: Iterable[float]) -> list[float]:
    """Of all ranks, each. NaN is infinite, as a maximum may lose it."""
    tensor = torch.tensor(list(values), dtype=torch.float64).nan_to_num(nan=torch.inf)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def build(name: str, engine: Engine, size: Size, x: Tensor, wanted: Mapping[bool, Expected]) -> Placed:
    """The contender in the engine, checked; UnavailableError if another library cannot."""
    contender = CONTENDERS[name]
    blamed = engine.library if contender.dora is None else "peft"
    with contextlib.nullcontext() if contender.ours else calls_of(blamed):
        model = contender.build(size)
        if contender.accelerated:
            accelerate(model)
        placed = engine.place(model)
        if contender.accelerated:
            accelerate(placed.model)  # again, for its report of the layers as the engine has them
        if contender.dora is not None:
            check(name, placed, x, wanted[contender.dora])
        step = training_step(placed, size)
        for _ in range(2):
            step()
    return placed


def training_step(placed: Placed, size: Size) -> Step:
    x = torch.randn(1, size.tokens, size.width, dtype=torch.bfloat16)

    def step() -> None:
        placed.backward(_loss(output(placed.model, x.detach().requires_grad_())))
        placed.update()

    return step


def measured(engine: Engine, size: Size, budget_s: float) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """In each of the processes: the contenders' records, and why some are left out."""
    torch.manual_seed(2)
    x = torch.randn(dist.get_world_size(), CHECKED_TOKENS, size.width, dtype=torch.bfloat16)
    wanted = {dora: expected(size, dora, x) for dora in (False, True)}
    gc.collect()
    gc.freeze()  # or every later collection takes long, for all that was imported
    steps: dict[str, Step] = {}
    at_rest: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name in CONTENDERS:
        before = tensor_bytes()
        try:
            placed = build(name, engine, size, x, wanted)
        except UnavailableError as reason:
            left_out[name] = str(reason)
        else:
            steps[name] = training_step(placed, size)
            at_rest[name] = tensor_bytes() - before
    peaks = _largest(at_rest[name] + _peak(step) for name, step in steps.items())
    times = timed(steps, budget_s)
    counts = {name: _counts(step) for name, step in steps.items()}
    records = {
        name: summarise(times[name], int(peak)).as_dict()
        | {
            "at_rest_bytes": int(at_rest[name]),
            "collectives": counts[name],
            "ring": {str(ranks): collectives.ring(counts[name], ranks) for ranks in COUNTED_FOR},
        }
        for name, peak in zip(steps, peaks, strict=True)
    }
    return records, left_out


def tensor_bytes() -> int:
    """Memory of all tensors that Python knows of, but for those from before gc.freeze."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        # not isinstance, which asks proxies for their __class__; a DTensor's memory is that of another tensor
        if issubclass(type(found), Tensor) and type(found) is not DTensor and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _counts(step: Step) -> collectives.Counts:
    with collectives.counted() as counts:
        step()
    return counts


def _peak(step: Step) -> int:
    def waited_for() -> None:
        with collectives.waited_for():
            step()

    peaks = []
    for _ in range(3):
        gc.collect()
        peaks.append(peak_bytes(waited_for))
    return min(peaks)


def timed(steps: Mapping[str, Step], budget_s: float) -> dict[str, list[float]]:
    """Seconds of each step in each round, on the rank that was slowest. All take part in as many rounds."""
    (a_round,) = _largest([sum(_seconds(step) for step in steps.values())])
    rounds = int(min(max(budget_s / a_round, 8), 50))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names, order = list(steps), random.Random(0)  # the same order on all ranks
    for _ in range(rounds):
        gc.collect()
        gc.disable()
        order.shuffle(names)
        for name in names:
            samples[name].append(_seconds(steps[name]))
        gc.enable()
    return {name: _largest(values) for name, values in samples.items()}


def _seconds(step: Step) -> float:
    dist.barrier()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def bars(records: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    """None where PEFT's LoRA is left out."""
    if PEFT_LORA not in records:
        return []
    found = []
    for name in (DORA, APPLIED):
        for what, field, bound in (("", "median_ms", MOST_TIME), (" in peak memory", "peak_bytes", MOST_MEMORY)):
            ratio = records[name][field] / records[PEFT_LORA][field]
            found.append(Bar(f"{name}, × {PEFT_LORA}{what}", ratio, bound, True))
    return found


def run(cases: Iterable[tuple[Engine, Size]] = CASES, budget_s: float = 60.0) -> Iterator[dict[str, Any]]:
    """The rows, as a result file holds them; ``budget_s`` is the time of all contenders in a case."""
    for engine, size in cases:
        installed = importlib.util.find_spec(engine.library) is not None
        missing = dict.fromkeys(CONTENDERS, f"{engine.library} is not installed")
        records, left_out = in_processes(engine, size, budget_s) if installed else ({}, missing)
        yield {
            "title": f"{engine.name}, training step, {size.tokens} tokens a rank",
            "engine": engine.name,
            "library": f"{engine.library} {importlib.metadata.version(engine.library)}" if installed else "",
            "mode": STEP,
            "ranks": RANKS,
            **asdict(size),
            "dtype": "bfloat16",
            "baseline": PEFT_LORA,
            "records": records,
            "left_out": left_out,
            "bars": [report.bar_as_dict(bar) for bar in bars(records)],
        }


def in_processes(engine: Engine, size: Size, budget_s: float) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """:func:`measured` in new processes, of which an error is raised here."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, KEPT_MEMORY):
        spawn(_process, (engine, size, budget_s, Path(folder)), nprocs=RANKS, daemon=True)
        return pickle.loads((Path(folder) / "measured").read_bytes())


def _process(rank: int, engine: Engine, size: Size, budget_s: float, folder: Path) -> None:
    torch.set_num_threads(1)
    without_amx.follow()
    warnings.filterwarnings("ignore")  # of FSDP1's rounded magnitudes; from the libraries
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
    found = measured(engine, size, budget_s)
    if rank == 0:
        (folder / "measured").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as the processes of lora_fast.demo.distributed
