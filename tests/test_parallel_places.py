"""Sharded models in which a weight, a dtype or a file is in an unusual place; two processes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_helpers import adapted, batch, layers_of, linear_of, together
from test_parallel_fsdp1 import CPU, each_apart, per_block as per_block_fsdp1, root_only
from test_parallel_fsdp2 import mesh, per_block, per_linear
from test_parallel_memory import gains
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard

import lora_fast
from lora_fast.parallel import fsdp2

pytest.importorskip("peft", reason="the peft extra is not installed")
pytest.importorskip("safetensors", reason="the adapters extra is not installed")

import peft
from safetensors.torch import load_file

SIZE = 128
BF16 = torch.bfloat16


class Tied(nn.Module):
    """A head that has the embedding's weight, and is adapted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(SIZE, SIZE, dtype=torch.float64)
        self.middle = nn.Linear(SIZE, SIZE, dtype=torch.float64)
        self.head = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(tokens)))


def tied(way: str) -> Any:
    dora = way.endswith("DoRA")
    if way.startswith("apply"):
        return lora_fast.apply(Tied(), 4, 1.5, dora=dora, targets=["middle", "head"])
    model = peft.get_peft_model(Tied(), peft.LoraConfig(r=4, use_dora=dora, target_modules=["middle", "head"])).double()
    lora_fast.accelerate(model)
    return model


def check_tied_weights_when_compiled() -> None:
    for way in ("apply DoRA", "PEFT DoRA"):
        model = tied(way).eval()
        name, layer = next((name, module) for name, module in model.named_modules() if name.endswith("head"))
        fully_shard(model, mesh=mesh())
        layer.compile(backend="aot_eager")
        for trial in range(20):
            with torch.no_grad():
                model(TOKENS)
                fsdp2.reshard(model)
                linear_of(layer).weight.to_local()[trial % 64, (7 * trial + 1) % SIZE] += 40.0
                y = model(TOKENS)
                lora_fast.invalidate_norms(model)
                assert torch.equal(y, model(TOKENS)), f"{way}, {name}, trial {trial}"


TOKENS = torch.tensor([[3, 1, 4], [1, 5, 9]])


def check_tied_weights() -> None:
    """FSDP keeps one record of a weight that two modules have, with the module that it met first."""
    for way in ("apply DoRA", "PEFT DoRA"):
        model = tied(way).eval()
        fully_shard(model, mesh=mesh())
        head = linear_of(next(module for name, module in model.named_modules() if name.endswith("head")))
        for trial in range(20):
            with torch.no_grad():
                model(TOKENS)
                fsdp2.reshard(model)
                head.weight.to_local()[trial % 64, (7 * trial + 1) % SIZE] += 40.0
                y = model(TOKENS)
                lora_fast.invalidate_norms(model)
                assert torch.equal(y, model(TOKENS)), f"{way}, trial {trial}"
        layer = next(module for name, module in model.named_modules() if name.endswith("head"))
        merge = layer.merge_ if way.startswith("apply") else layer.merge
        with pytest.raises(RuntimeError, match="is sharded over processes by FSDP2"):
            merge()
    for way in ("apply LoRA", "apply DoRA", "PEFT LoRA", "PEFT DoRA"):
        plain, model = tied(way), FullyShardedDataParallel(tied(way), use_orig_params=True, **CPU)
        wanted, found = plain(TOKENS), model(TOKENS)
        torch.testing.assert_close(found, wanted)
        found.square().sum().backward()


def check_frozen_norms(tmp: Path) -> None:
    """Norms that were frozen before sharding cannot be frozen anew by what is loaded: they follow the parameters."""
    if dist.get_rank() == 0:
        lora_fast.save_adapter(adapted("apply DoRA"), tmp / "trained")
    dist.barrier()
    wanted = adapted("apply DoRA").eval()(batch(0)[0])
    for shard in (per_block, per_linear, root_only, per_block_fsdp1):
        model = adapted("apply DoRA", fresh=True).eval()
        lora_fast.freeze_norms(model)
        sharded = shard(model) or model
        if shard in (per_block, per_linear):
            with pytest.warns(UserWarning, match="frozen before the model was sharded follow the parameters again"):
                lora_fast.load_adapter(sharded, tmp / "trained")
        else:
            lora_fast.load_adapter(sharded, tmp / "trained")
        with torch.no_grad():
            torch.testing.assert_close(sharded(batch(0)[0]), wanted)


def check_magnitudes_that_are_kept_in_16_bits() -> None:
    """By the user's choice: nobody has rounded them for the forward, and one process computes with them as they are."""
    for way in ("apply DoRA", "PEFT DoRA"):
        plain = adapted(way, torch.float32).eval()
        for parameter in plain.parameters():
            parameter.data = parameter.data.bfloat16()
        x = batch(0, BF16)[0]
        wanted = plain(x)
        for shard in (per_block, per_linear, root_only):
            model = copy.deepcopy(plain)
            sharded = shard(model) or model
            with torch.no_grad():
                assert torch.equal(sharded(x), wanted), f"{way}, {shard.__name__}"


def check_gains_under_fsdp1() -> None:
    """As under FSDP2: a fresh DoRA has gain 1, but for the rounding of W; and the report says so."""
    policy = MixedPrecision(param_dtype=BF16)
    x = batch(0, torch.float32)[0]
    for way in ("apply DoRA", "PEFT DoRA"):
        for first in ("accelerate", "shard"):
            for wrap in (root_only, each_apart):
                model = wrap(
                    adapted(way, torch.float32, fresh=True, fast=first == "accelerate"), mixed_precision=policy
                )
                if way.startswith("PEFT"):
                    report = lora_fast.accelerate(model)
                    assert report.left_alone == []
                    assert str(report).count("mixed precision rounds the magnitude to torch.bfloat16") == 4
                with torch.no_grad():
                    found = torch.cat(gains(model, x))
                torch.testing.assert_close(found, torch.ones(64), rtol=0, atol=1.5e-3)
                torch.testing.assert_close(found.std(), torch.tensor(0.0), rtol=0, atol=5e-4)


def check_units_of_other_dtypes() -> None:
    """Adapters in units with a policy of their own change neither x for the frozen product nor the layer's result."""
    for way in ("PEFT LoRA", "PEFT DoRA"):
        for rows in (8, 4096):
            model = adapted(way, torch.float32)
            x = torch.randn(rows, 12, generator=torch.Generator().manual_seed(1))
            wanted = model(x)
            for layer in layers_of(model):
                for module in (layer.lora_A["default"], layer.lora_B["default"]):
                    fully_shard(module, mesh=mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=BF16))
            per_block(model)
            y = model(x)
            assert y.dtype == torch.float32
            torch.testing.assert_close(y, wanted, rtol=0.05, atol=0.05)
            y.sum().backward()
        policy, widening = (
            MixedPrecisionPolicy(param_dtype=BF16, output_dtype=dtype) for dtype in (None, torch.float32)
        )
        model = adapted(way, torch.float32)
        for layer in layers_of(model):
            fully_shard(layer.lora_A["default"], mesh=mesh(), mp_policy=widening)
        per_block(model, mp_policy=policy)
        assert model(x).dtype == BF16


def check_pefts_files_under_fsdp1(tmp: Path) -> None:
    model = adapted("PEFT DoRA")
    if dist.get_rank() == 0:
        model.save_pretrained(str(tmp / "whole"))
    dist.barrier()
    wanted = load_file(tmp / "whole" / "adapter_model.safetensors")
    for wrap in (root_only, per_block_fsdp1, each_apart):
        model = adapted("PEFT DoRA")
        sharded = wrap(model)
        if wrap is root_only:
            with pytest.raises(ValueError, match="FullyShardedDataParallel holds parameters of it in parts"):
                model.save_pretrained(str(tmp / "nothing"))
            assert not (tmp / "nothing").exists()
        folder = tmp / wrap.__name__
        with FullyShardedDataParallel.summon_full_params(sharded, writeback=False):
            if dist.get_rank() == 0:
                model.save_pretrained(str(folder))
        dist.barrier()
        saved = load_file(folder / "adapter_model.safetensors")
        assert saved.keys() == wanted.keys()
        assert all(torch.equal(saved[name], wanted[name]) for name in wanted)


def check_copies_save_whole_tensors(tmp: Path) -> None:
    model = adapted("PEFT DoRA")
    for number, copied in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        assert lora_fast.accelerate(copied).left_alone == []
        per_block(copied)
        copied.save_pretrained(str(tmp / f"copy {number}"))
        dist.barrier()
        saved = load_file(tmp / f"copy {number}" / "adapter_model.safetensors")
        assert all(value.numel() for value in saved.values())
        lora_fast.restore(copied)
        assert "save_pretrained" not in vars(copied)


def check(tmp: Path) -> None:
    check_tied_weights()
    check_tied_weights_when_compiled()
    check_frozen_norms(tmp)
    check_magnitudes_that_are_kept_in_16_bits()
    check_gains_under_fsdp1()
    check_units_of_other_dtypes()
    check_pefts_files_under_fsdp1(tmp)
    check_copies_save_whole_tensors(tmp)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    together(2, tmp_path, check, tmp_path)
