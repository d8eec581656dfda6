"""Small models that several processes over gloo train together, and what the same training gives in one process."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lora_fast
from lora_fast import functional

WIDTH, INNER, ROWS, STEPS = 12, 20, 8, 3
EXACT = {"rtol": 1e-10, "atol": 1e-10}
OPS = ("lora_linear", "dora_linear", "lora_compose", "weight_norm")
WAYS = ("apply LoRA", "apply DoRA", "PEFT LoRA", "PEFT DoRA")  # into a model, "PEFT" with lora_fast.accelerate


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def base(dtype: torch.dtype = torch.float64) -> Model:
    """The same in every process and at every call."""
    generator = torch.Generator().manual_seed(0)
    model = Model().to(dtype)
    fill(model, generator)
    return model


@torch.no_grad()
def fill(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(values / max(1, parameter[0].numel()) ** 0.5)


def adapted(
    way: str, dtype: torch.dtype = torch.float64, *, fresh: bool = False, fast: bool = True, **options: Any
) -> Any:
    """The model with adapters that have been trained a while, as it were; ``fast``: PEFT's are accelerated."""
    dora = way.endswith("DoRA")
    torch.manual_seed(3)
    model: Any = base(dtype)
    if way.startswith("apply"):
        lora_fast.apply(model, 4, 1.5, dora=dora, targets=["up", "down"], **options)
    else:
        import peft

        config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=dora, target_modules=["up", "down"], **options)
        model = peft.get_peft_model(model, config)
        if dtype == torch.float64:
            model.double()
    if not fresh:
        move(model)
    if fast and way.startswith("PEFT"):
        lora_fast.accelerate(model)
    return model


@torch.no_grad()
def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.mul_(0.6 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
        elif "lora_" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def blocks_of(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def layers_of(model: nn.Module) -> list[Any]:
    """The adapted layers, ours or PEFT's."""
    return [module for block in blocks_of(model) for module in (block.up, block.down)]


def linear_of(layer: Any) -> Any:
    """The frozen linear in an adapted layer."""
    return layer.linear if hasattr(layer, "linear") else layer.base_layer


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x [ROWS, WIDTH] and targets [ROWS, 3], for all processes together."""
    generator = torch.Generator().manual_seed(100 + step)
    x, y = (torch.randn(ROWS, size, generator=generator, dtype=torch.float64) for size in (WIDTH, 3))
    return x.to(dtype), y.to(dtype)


def share(tensor: Tensor) -> Tensor:
    """This process's rows."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_name(name: str) -> str:
    for part in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module."):
        name = name.replace(part, "")
    return name


def orders(way: str) -> tuple[str, ...]:
    """What comes first: a PEFT model is accelerated before it is sharded, or after."""
    return ("accelerate", "shard") if way.startswith("PEFT") else ("apply",)


def in_every_order(check: Callable[[str, str], None], ways: tuple[str, ...]) -> None:
    """``check(way, first)`` of all :func:`orders`."""
    for way in ways:
        for first in orders(way):
            check(way, first)


def trained(model: nn.Module, **how: Any) -> dict[str, Tensor]:
    """What three optimizer steps on the whole batches give in one process: see :func:`trained_together`."""
    return _train(model, lambda tensor: tensor, lambda tensor: tensor, **how)


def trained_together(model: nn.Module, **how: Any) -> dict[str, Tensor]:
    """The same on several processes, each with its rows: all outputs, whole gradients of each step, an evaluation."""
    return _train(model, share, gathered_rows, **how)


def gathered_rows(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _train(
    model: nn.Module,
    own: Callable[[Tensor], Tensor],
    together: Callable[[Tensor], Tensor],
    *,
    dtype: torch.dtype = torch.float64,
    gradients: Callable[[nn.Module], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    found = {}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.02)
    model.train()
    for step in range(STEPS):
        x, target = (own(tensor) for tensor in batch(step, dtype))
        y = model(x)
        F.mse_loss(y, target).backward()
        found[f"y {step}"] = together(y.detach())
        of_step = (gradients or whole_gradients)(model)
        found.update({f"{name} {step}": gradient for name, gradient in of_step.items()})
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        for again in range(2):
            found[f"evaluation {again}"] = together(model(own(batch(STEPS, dtype)[0])))
    return found


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of all that trains; and nothing else has one."""
    found = {}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            found[plain_name(name)] = full(parameter.grad).clone()
    return found


def no_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Where they cannot be had; the steps of the optimizer show them."""
    return {}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerances: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, **(tolerances or EXACT), msg=lambda text, name=name: f"{name}: {text}"
        )


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often each public function is called within."""
    counts = dict.fromkeys(OPS, 0)

    def counting(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    with mock.patch.multiple(functional, **{name: counting(name, getattr(functional, name)) for name in OPS}):
        yield counts


def together(world: int, tmp_path: Path, check: Callable[..., None], *arguments: Any) -> None:
    """``check(*arguments)`` in ``world`` processes over gloo."""
    given = world, str(tmp_path / f"store {world}"), check, arguments
    spawn(_process, given, world)


def spawn(function: Callable[..., None], arguments: tuple, processes: int) -> None:
    """``function(rank, *arguments)`` in each, forked from a server that has imported what takes long, once."""
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "lora_fast", "peft"])
    mp.start_processes(function, args=arguments, nprocs=processes, start_method="forkserver")


def _process(rank: int, world: int, store: str, check: Callable[..., None], arguments: tuple) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        check(*arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
