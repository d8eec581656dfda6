"""DeepSpeed's ZeRO-2 and ZeRO-3 in two and four processes: what adapted models learn is what they do in one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed_helpers import engine, optimizer, prepare, settings, trained_together, whole_gradient
from parallel_helpers import (
    STEPS,
    WAYS,
    Model,
    adapted,
    assert_equal,
    base,
    batch,
    counted,
    fill,
    layers_of,
    linear_of,
    move,
    no_gradients,
    orders,
    share,
    together,
    trained,
)
from torch import nn

import lora_fast
from lora_fast.parallel import zero

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]
# its optimizers keep float32 copies of float64 parameters
ROUNDED = {"rtol": 1e-5, "atol": 1e-6}


def at_hand(model: nn.Module) -> list[str]:
    """The parameters that are gathered now."""
    return [name for name, parameter in model.named_parameters() if parameter.numel()]


def check_training(stages: tuple[int, ...], ways: tuple[str, ...], dtype: torch.dtype) -> None:
    for way in ways:
        wanted = trained(adapted(way, dtype), dtype=dtype, gradients=no_gradients)
        for stage in stages:
            for first in orders(way):
                model = adapted(way, dtype, fast=first == "accelerate")
                running = engine(model, stage)
                if way.startswith("PEFT"):
                    report = lora_fast.accelerate(model)
                    assert report.left_alone == [], str(report)
                # by name: with few tokens in float32 an accelerated LoRA leaves the products to PEFT otherwise
                with counted() as counts, lora_fast.use_backend("torch"):
                    found = trained_together(running, dtype)
                assert counts["dora_linear" if way.endswith("DoRA") else "lora_linear"] == 4 * (STEPS + 2)
                assert_equal(found, wanted, **ROUNDED)
                assert (at_hand(model) == []) == (stage == 3)


def check_gradients(stage: int) -> None:
    for way in WAYS:
        plain, model = adapted(way), adapted(way)
        x, target = batch(0)
        F.mse_loss(plain(x), target).backward()
        running = engine(model, stage)
        running.backward(F.mse_loss(running(share(x)), share(target)))
        for (name, parameter), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
            if parameter.requires_grad:
                found = whole_gradient(parameter).double()
                torch.testing.assert_close(found, wanted.grad, **ROUNDED, msg=lambda text, name=name: f"{name}: {text}")


def check_nothing_is_pinned() -> None:
    """Between a forward and its backward, and after both; and that a copy of W would be seen."""
    for way in WAYS:
        model = adapted(way)
        running = engine(model, 3)
        for step in range(3):
            x, target = (share(tensor) for tensor in batch(step))
            loss = F.mse_loss(running(x), target)
            assert at_hand(model) == [], way
            running.backward(loss)
            running.step()
            assert at_hand(model) == [], way


def check_no_norm_is_stale() -> None:
    for way in ("apply DoRA", "PEFT DoRA"):
        model = adapted(way)
        running = engine(model, 3)
        running.eval()
        x = share(batch(0)[0])
        weight = linear_of(layers_of(model)[0]).weight
        with torch.no_grad():
            before = running(x)
            weight.ds_tensor[1] += 40.0
            after = running(x)
            lora_fast.invalidate_norms(model)
            assert not torch.equal(after, before)
            assert torch.equal(after, running(x))


def check_files(tmp: Path, stage: int) -> None:
    from safetensors.torch import load_file

    name = "adapter_model.safetensors"
    for way in WAYS:
        whole, folder = adapted(way), tmp / f"{way} {stage}"
        save = lora_fast.save_adapter if way.startswith("apply") else lambda model, where: model.save_pretrained(where)
        if dist.get_rank() == 0:
            save(whole, str(folder))
        dist.barrier()
        wanted = load_file(folder / name)
        model = adapted(way)
        running = engine(model, stage)
        if stage == 3 or dist.get_rank() == 0:  # ZeRO-2 has parameters whole in each process
            save(model, str(tmp / f"{way} {stage}, at rest"))
        running(share(batch(0)[0]))
        if stage == 3 or dist.get_rank() == 0:
            save(model, str(tmp / f"{way} {stage}, after a forward"))
        dist.barrier()
        for moment in ("at rest", "after a forward"):
            assert_equal(load_file(tmp / f"{way} {stage}, {moment}" / name), wanted, rtol=0, atol=0)
        if way.startswith("apply"):
            check_loading(way, stage, folder)


def check_loading(way: str, stage: int, folder: Path) -> None:
    """Into the engine and its optimizer's copies: the next steps start from what was loaded."""
    wanted = trained(adapted(way), gradients=no_gradients)
    model = adapted(way, fresh=True)
    running = engine(model, stage)
    lora_fast.load_adapter(running, folder)
    assert_equal(trained_together(running), wanted, **ROUNDED)


def check_refusals() -> None:
    model = adapted("apply DoRA")
    engine(model, 3).eval()
    layer = layers_of(model)[0]
    for action, call in {
        "merge_": layer.merge_,
        "merged": layer.merged,
        "reset_parameters": layer.reset_parameters,
        "freeze_norms": lambda: lora_fast.freeze_norms(model),
    }.items():
        with pytest.raises(RuntimeError, match=f"{action}.*: \\w+ is sharded over processes by DeepSpeed's ZeRO-3"):
            call()
    with zero.gathered(model.parameters()):  # by the user, who can have the whole
        torch.testing.assert_close(layer.merged().weight, layers_of(adapted("apply DoRA"))[0].merged().weight)
    peft_model = adapted("PEFT DoRA")
    engine(peft_model, 3)
    with pytest.raises(RuntimeError, match="merge: weight is sharded over processes by DeepSpeed's ZeRO-3"):
        peft_model.merge_adapter()
    with pytest.raises(ValueError, match="holds a DeepSpeedEngine, which would not synchronise"):
        lora_fast.apply(engine(base(), 2), 4, 1.5)


def check_models_made_in_parts() -> None:
    """``deepspeed.zero.Init``: parameters are in parts as soon as they are made, and adapters come after."""
    deepspeed = prepare()

    def with_adapters(model: Any) -> Any:
        torch.manual_seed(3)
        lora_fast.apply(model, 4, 1.5, targets=["up", "down"])
        move(model)
        return model

    wanted = trained(with_adapters(base(torch.float32)), dtype=torch.float32, gradients=no_gradients)
    for way in ("apply DoRA", "PEFT DoRA"):
        with deepspeed.zero.Init(config_dict_or_path=settings(3)):
            model: Any = Model()
        assert at_hand(model) == []
        with zero.gathered(model.parameters(), writes=True):
            fill(model, torch.Generator().manual_seed(0))
        if way.startswith("apply"):
            with_adapters(model)
        else:
            import peft

            with zero.gathered(model.parameters()):  # for the magnitudes that PEFT makes
                model = peft.get_peft_model(model, peft.LoraConfig(r=4, use_dora=True, target_modules=["up", "down"]))
            assert lora_fast.accelerate(model).left_alone == []
        running = engine(model, 3)
        with counted() as counts:
            found = trained_together(running, torch.float32)
        assert counts["dora_linear"] == 4 * (STEPS + 2)
        if way.startswith("apply"):
            assert_equal(found, wanted, **ROUNDED)


def check_adapters_in_float32_over_bfloat16(stage: int) -> None:
    """What docs/distributed.md recommends: no bf16 in the engine's settings, so that what trains stays in float32."""
    for way in ("apply DoRA", "PEFT DoRA"):
        plain, model = adapted(way, torch.float32), adapted(way, torch.float32)
        for each in (plain, model):
            for parameter in each.parameters():
                parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
        running = engine(model, stage)
        for step in range(STEPS):
            x, target = batch(step, torch.bfloat16)
            y = running(share(x))
            assert y.dtype == torch.bfloat16
            running.backward(F.mse_loss(y, share(target)))
            running.step()
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        assert dtypes == {torch.float32}


def check_accelerate(stage: int) -> None:
    """Through Hugging Face's accelerate."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    prepare()
    for way in WAYS:
        wanted = trained(adapted(way, torch.float32), dtype=torch.float32, gradients=no_gradients)
        model = adapted(way, torch.float32)
        plugin = accelerate.DeepSpeedPlugin(hf_ds_config=settings(stage))
        accelerate.state.AcceleratorState._reset_state(True)
        # which it takes a CPU for without being asked
        environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
        backend = "gloo", accelerate.utils.DistributedType.MULTI_GPU
        with (
            mock.patch.dict(os.environ, environment),
            mock.patch.object(accelerate.PartialState, "_prepare_backend", return_value=backend),
        ):
            accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
        running, _ = accelerator.prepare(model, optimizer(model))
        assert type(running).__name__ == "DeepSpeedEngine"
        with counted() as counts, lora_fast.use_backend("torch"):
            found = trained_together(running, torch.float32)
        assert counts["dora_linear" if way.endswith("DoRA") else "lora_linear"] == 4 * (STEPS + 2)
        assert_equal(found, wanted, **ROUNDED)


def check(tmp: Path) -> None:
    check_training((2, 3), WAYS, torch.float32)
    check_training((2, 3), WAYS[1::2], torch.float64)
    for stage in (2, 3):
        check_gradients(stage)
        check_files(tmp, stage)
        check_adapters_in_float32_over_bfloat16(stage)
    check_nothing_is_pinned()
    check_no_norm_is_stale()
    check_refusals()
    check_models_made_in_parts()


def check_four() -> None:
    check_training((2, 3), WAYS[1::2], torch.float32)


def test_two_processes(tmp_path: Path) -> None:
    together(2, tmp_path, check, tmp_path)


def test_four_processes(tmp_path: Path) -> None:
    together(4, tmp_path, check_four)


@pytest.mark.parametrize("stage", [2, 3])
def test_through_accelerate(tmp_path: Path, stage: int) -> None:
    together(2, tmp_path, check_accelerate, stage)
