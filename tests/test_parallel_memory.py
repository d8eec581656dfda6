"""Sharded weights in two processes: nothing of them stays gathered, no kept norm is stale, magnitudes are not lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from parallel_helpers import WAYS, adapted, batch, layers_of, linear_of, share, together
from test_parallel_fsdp2 import mesh, per_block, per_linear
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lora_fast
from lora_fast import functional
from lora_fast.parallel import fsdp2, whole

SIZE = 128  # of W, far more than the few tokens and ranks


class Large(nn.Module):
    """One linear of more elements than a kept norm's key samples."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(SIZE, SIZE, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def large(way: str) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(Large(), Large())
    if way == "frozen":
        return model.requires_grad_(False)
    if way.startswith("apply"):
        return lora_fast.apply(model, 4, 1.5, dora=way.endswith("DoRA"))
    import peft

    config = peft.LoraConfig(r=4, use_dora=way.endswith("DoRA"), target_modules=["up"])
    model = peft.get_peft_model(model, config).double()
    lora_fast.accelerate(model)
    return model


def parts(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Large)]


@contextmanager
def saved() -> Iterator[list[Tensor]]:
    """What autograd saves for backward within."""
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def gathered_bytes(model: nn.Module) -> int:
    """Of all that is as large as W and still has memory between a forward and its backward."""
    x = torch.randn(3, SIZE, dtype=torch.float64, requires_grad=True)
    with saved() as tensors:
        y = model(x)
        held = [tensor for tensor in tensors if tensor.numel() == SIZE * SIZE]
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
    y.sum().backward()
    return sum(storages.values())


def sharded(way: str, how: str) -> Any:
    model = large(way)
    for part in parts(model):
        if how == "linear":
            fully_shard(part.up if way == "frozen" else linear_of(part.up), mesh=mesh())
        if how in ("linear", "block"):
            fully_shard(part, mesh=mesh())
    fully_shard(model, mesh=mesh(), reshard_after_forward=how != "not resharded")
    return model


def check_nothing_stays_gathered() -> None:
    for how in ("linear", "block", "not resharded"):
        frozen = gathered_bytes(sharded("frozen", how))
        assert frozen == (2 * 8 * SIZE * SIZE if how == "not resharded" else 0)
        for way in WAYS:
            assert gathered_bytes(sharded(way, how)) == frozen, f"{way}, {how}"
    # what would be found of an op that keeps a copy of W
    dora_linear = functional.dora_linear

    def pinning(x: Tensor, weight: Tensor, *rest: Any, **more: Any) -> Tensor:
        return dora_linear(x, weight.clone(), *rest, **more)

    with mock.patch.object(functional, "dora_linear", pinning):
        for way in ("apply DoRA", "PEFT DoRA"):
            assert gathered_bytes(sharded(way, "linear")) == 2 * 8 * SIZE * SIZE


def stale_trials(model: Any, linears: list[Any], trials: int = 20) -> int:
    """How often the output is not that of the weights, after a write of one element into W's shard untold."""
    x = torch.randn(3, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    stale = 0
    model.eval()
    for trial in range(trials):
        with torch.no_grad():
            model(x)
            fsdp2.reshard(model)
            for linear in linears:
                local = linear.weight.to_local()
                local.data[trial % local.shape[0], (7 * trial + 1) % SIZE] += 40.0
            y = model(x)
            lora_fast.invalidate_norms(model)
            stale += not torch.equal(y, model(x))
    return stale


def check_no_norm_is_stale() -> None:
    for way in ("apply DoRA", "PEFT DoRA"):
        for how in ("linear", "block", "not resharded"):
            model = sharded(way, how)
            linears = [linear_of(part.up) for part in parts(model)]
            assert stale_trials(model, linears) == 0, f"{way}, {how}"
        # what would be found if norms were kept by what the gathered W looks like
        model = sharded(way, "block")
        with mock.patch.object(whole, "is_put_together", return_value=False):
            assert stale_trials(model, [linear_of(part.up) for part in parts(model)]) > 0


def gains(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What multiplies in each call of dora_linear within; and that norms are float32."""
    found = []
    dora_linear = functional.dora_linear

    def call(x: Tensor, weight: Tensor, *rest: Any, norm: Tensor | None = None, **more: Any) -> Tensor:
        magnitude = rest[3]
        assert weight.dtype == x.dtype == torch.bfloat16
        if norm is None:
            norm = functional.weight_norm(weight, rest[1], rest[2], rest[4])
        assert norm.dtype == torch.float32
        found.append(functional.dora_gain(magnitude, norm).detach())
        return dora_linear(x, weight, *rest, norm=norm, **{**more, "kept": None})

    with mock.patch.object(functional, "dora_linear", call):
        model(x)
    return found


def check_mixed_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    x = share(batch(0, torch.float32)[0])
    for way in ("apply DoRA", "PEFT DoRA"):
        for shard in (per_block, per_linear):
            model = adapted(way, torch.float32, fresh=True)
            shard(model, mp_policy=policy)
            if way.startswith("apply"):
                with pytest.warns(UserWarning, match="rounds DoRA's magnitudes to torch.bfloat16"):
                    found = gains(model, x)
            else:
                runs = lora_fast.accelerate(model).layers[0].runs
                assert "mixed precision rounds the magnitude to torch.bfloat16" in runs
                found = gains(model, x)
            assert len(found) == 4
            # W is rounded, which changes its norms by some 3e-4; a magnitude that is rounded beside n gives up to 4e-3
            torch.testing.assert_close(torch.cat(found), torch.ones(64), rtol=0, atol=1.5e-3)
            torch.testing.assert_close(torch.cat(found).std(), torch.tensor(0.0), rtol=0, atol=5e-4)
        check_magnitudes_that_the_policy_leaves(way, policy, x)


def check_magnitudes_that_the_policy_leaves(way: str, policy: MixedPrecisionPolicy, x: Tensor) -> None:
    """Frozen linears in bfloat16; what trains stays in float32, and gains remain that bfloat16 cannot tell from 1."""
    model = adapted(way, torch.float32, fresh=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 2**-10)
    for layer in layers_of(model):
        fully_shard(linear_of(layer), mesh=mesh(), mp_policy=policy)
    fully_shard(model, mesh=mesh())
    if way.startswith("PEFT"):
        report = lora_fast.accelerate(model)
        assert report.left_alone == []
        assert "rounds the magnitude" not in str(report)
    gain = torch.cat(gains(model, x))
    torch.testing.assert_close(gain.mean(), torch.tensor(1 + 2**-10), rtol=0, atol=2e-4)


def check() -> None:
    pytest.importorskip("peft", reason="the peft extra is not installed")
    check_nothing_stays_gathered()
    check_no_norm_is_stale()
    check_mixed_precision()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    together(2, tmp_path, check)
