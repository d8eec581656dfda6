"""One contender of the T0-3B case in a process of its own, under a limit that the system enforces.

    python -m lora_fast.benchmarks.t0_3b_child '{"contender": "apply", "depth": 2, ...}'

Prints one JSON object a line: what it begins, each finished step, and at the end what was measured or how it failed.
A process that the system kills has said by then how far it came.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fast
from lora_fast.benchmarks import without_amx
from lora_fast.testing import peak_bytes

SCALING = 2.0
LEARNING_RATE = 1e-3
# T5 v1.1 XL, which T0-3B is: 2.85 billion parameters at 24 encoder and 24 decoder layers.
XL = {"d_model": 2048, "d_ff": 5120, "d_kv": 64, "num_heads": 32, "vocab_size": 32128}
TINY = {"d_model": 64, "d_ff": 160, "d_kv": 16, "num_heads": 4, "vocab_size": 256}
SIZES = {"xl": XL, "tiny": TINY}
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "Cannot allocate memory", "could not allocate", "out of memory")


@dataclass(frozen=True)
class Task:
    """What one process does: `depth` encoder and as many decoder layers, `batch` sequences of `length` tokens with
    `targets` tokens for the decoder.
    """

    contender: str
    depth: int
    rank: int
    dtype: str
    steps: int
    size: str = "xl"
    batch: int = 4
    length: int = 128
    targets: int = 32
    threads: int = 2
    limit_bytes: int | None = None
    mmap_threshold_bytes: int | None = None  # None: glibc's own, which it raises to 32 MiB

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def build_model(task: Task) -> nn.Module:
    """T5 with random weights, made in `task.dtype`: no copy in another dtype, no download."""
    from transformers import T5Config, T5ForConditionalGeneration

    options: dict[str, Any] = {
        **SIZES[task.size],
        "num_layers": task.depth,
        "num_decoder_layers": task.depth,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "use_cache": False,
        "decoder_start_token_id": 0,
    }
    config = T5Config(**options)
    dtype = getattr(torch, task.dtype)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
        # T0's head has a weight of its own; newer releases of transformers tie it to the embedding
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    real: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in real:
                empty = torch.empty(parameter.shape, dtype=dtype)
                _initialise(empty, f"{path}.{name}", config.d_kv)
                real[parameter] = nn.Parameter(empty)
            module._parameters[name] = real[parameter]
    return model.train()


def _initialise(values: Tensor, name: str, d_kv: int) -> None:
    """Activations and attention scores of order 1, as in T5's own initialisation: norms 1, embedding 1, W 1/√in."""
    if values.dim() == 1:
        values.fill_(1.0)
        return
    std = 1.0 if name == "shared.weight" else values.shape[1] ** -0.5
    if name.endswith(".q.weight"):  # T5 does not divide its scores by √d_kv
        std *= d_kv**-0.5
    values.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std)


class ArticleDoRA(nn.Module):
    """The from-scratch layer of the articles: y = x (m ⊙ V/‖V‖)ᵀ, V = W + s (A B)ᵀ, one norm per input column.

    A [K, R], B [R, N], m [1, K], all in W's dtype; autograd goes through the norm too.
    """

    def __init__(self, linear: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.linear = linear
        weight = linear.weight
        self.A = nn.Parameter(weight.new_empty(linear.in_features, rank).normal_(std=rank**-0.5))
        self.B = nn.Parameter(weight.new_zeros(rank, linear.out_features))
        self.m = nn.Parameter(weight.detach().norm(p=2, dim=0, keepdim=True))
        self.scaling = scaling

    @property
    def weight(self) -> Tensor:
        """T5's feed-forward layer asks for its dtype."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        merged = self.linear.weight + self.scaling * (self.A @ self.B).T
        direction = merged / merged.norm(p=2, dim=0, keepdim=True)
        return F.linear(x, self.m * direction, self.linear.bias)


def adapt_article(model: nn.Module, rank: int) -> nn.Module:
    model.requires_grad_(False)
    head = model.get_output_embeddings()  # type: ignore[operator]  # a method of transformers' models
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head:
                setattr(parent, name, ArticleDoRA(child, rank, SCALING))
    return model


def adapt_peft(model: nn.Module, rank: int, *, dora: bool) -> nn.Module:
    """As users get it: adapters in float32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), target_modules="all-linear", use_dora=dora)
    return get_peft_model(model, config)


def adapt_apply(model: nn.Module, rank: int) -> nn.Module:
    return lora_fast.apply(model, rank, SCALING)


def adapt_accelerate(model: nn.Module, rank: int) -> nn.Module:
    adapted = adapt_peft(model, rank, dora=True)
    report = lora_fast.accelerate(adapted)
    if report.left_alone:
        raise RuntimeError(f"lora_fast.accelerate left {len(report.left_alone)} layers alone:\n{report}")
    return adapted


ADAPT: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "article": adapt_article,
    "peft-lora": lambda model, rank: adapt_peft(model, rank, dora=False),
    "peft-dora": lambda model, rank: adapt_peft(model, rank, dora=True),
    "apply": adapt_apply,
    "accelerate": adapt_accelerate,
}


def synchronise_adapters(model: nn.Module) -> None:
    """The same lora_A in every contender, so that the losses can be compared step by step; lora_B starts at 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        factor_a = ".lora_A" in name or name.endswith(".A")
        if factor_a and parameter.requires_grad:
            rank, in_features = sorted(parameter.shape)
            values = torch.empty(rank, in_features).uniform_(-1, 1, generator=generator) * in_features**-0.5
            parameter.data.copy_(values if parameter.shape == values.shape else values.T)


def training_step(model: nn.Module, task: Task) -> Callable[[], float]:
    """forward, backward and AdamW's step, on the same batch each time; returns every eighth token's loss in float32.

    By that the contenders are compared: the loss of the whole batch has only the few digits of the logits' dtype.
    """
    generator = torch.Generator().manual_seed(2)
    vocabulary = SIZES[task.size]["vocab_size"]
    input_ids = torch.randint(2, vocabulary, (task.batch, task.length), generator=generator)
    labels = torch.randint(2, vocabulary, (task.batch, task.targets), generator=generator)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0, fused=True)

    def step() -> float:
        output = model(input_ids=input_ids, labels=labels)
        sampled = F.cross_entropy(output.logits[:, ::8].detach().float().flatten(0, 1), labels[:, ::8].flatten())
        loss = output.loss
        del output  # holds the logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(sampled)

    return step


def live_bytes() -> int:
    """Bytes of the distinct storages of all tensors that Python holds."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if issubclass(type(value), Tensor) and value.device.type == "cpu":
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def status_bytes(field: str) -> int:
    """A line of /proc/self/status: "VmHWM" is the peak resident size, "VmData" what RLIMIT_DATA limits."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def reset_peak_resident() -> None:
    """Set VmHWM to what is resident now, with freed memory given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def measure(task: Task) -> dict[str, Any]:
    """Build, adapt, train `task.steps` steps against the clock, and one more while storages are counted."""
    torch.manual_seed(0)
    say(stage="building the model")
    model = build_model(task)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    say(stage="adding adapters")
    model = ADAPT[task.contender](model, task.rank)
    synchronise_adapters(model)
    step = training_step(model, task)
    building = status_bytes("VmHWM")
    reset_peak_resident()

    torch.manual_seed(3)  # the model's dropout draws the same masks in every contender
    for number in range(1, task.steps + 1):
        say(stage=f"step {number}")
        start = time.perf_counter()
        loss = step()
        say(step=number, seconds=time.perf_counter() - start, loss=loss)
    resident = status_bytes("VmHWM")
    say(stage="counting live storage")
    between = live_bytes()
    return {
        "weight_bytes": weight_bytes,
        "trained_parameters": sum(value.numel() for value in model.parameters() if value.requires_grad),
        "building_resident_bytes": building,
        "resident_bytes": resident,
        "between_steps_bytes": between,
        "live_bytes": between + peak_bytes(step),
    }


def fix_mmap_threshold(size: int) -> None:
    """Blocks of this size and more go back to the system when they are freed, and leave no hole in the heap."""
    mallopt, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = ctypes.CDLL(None).mallopt, -3, -1
    # the trim threshold would fall to 128 KiB and give back every activation: twice is glibc's own proportion
    if not (mallopt(M_MMAP_THRESHOLD, size) and mallopt(M_TRIM_THRESHOLD, 2 * size)):
        raise OSError(f"mmap_threshold_bytes: this system's malloc does not take {size}")


def main(argument: str) -> int:
    task = Task(**json.loads(argument))
    if task.mmap_threshold_bytes is not None:
        fix_mmap_threshold(task.mmap_threshold_bytes)
    if task.limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (task.limit_bytes, task.limit_bytes))
    without_amx.follow()
    torch.set_num_threads(task.threads)
    fault = None
    try:
        say(outcome="completed", **measure(task))
    except (RuntimeError, MemoryError) as error:
        fault = f"{type(error).__name__}: {error}"  # the traceback, and with it the memory, goes when the handler ends
    if fault is None:
        return 0
    outcome = "out of memory" if fault.startswith("MemoryError") or _is_out_of_memory(fault) else "failed"
    say(outcome=outcome, error=fault, resident_bytes=status_bytes("VmHWM"), data_bytes=status_bytes("VmData"))
    return 1


def _is_out_of_memory(fault: str) -> bool:
    return any(sign in fault for sign in OUT_OF_MEMORY)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
