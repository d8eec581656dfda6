"""transformers' Trainer over accelerate's FSDP2, two processes: PEFT's losses, ours in all layers, saved, resumed."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

pytest.importorskip("peft", reason="the peft extra is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate.state import DistributedType, PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from peft_helpers import move
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

import lora_fast
from lora_fast import functional
from lora_fast.integrations.peft import Report

WORLD, STEPS, SAVED = 2, 6, 3
LAYERS = 14  # two blocks of seven linears
CONFIG = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": "all-linear"}
MAGNITUDE = 5  # its place among the arguments of functional.dora_linear
EVERY = (LAYERS, LAYERS)  # of one step: the calls of functional.dora_linear, and of how many layers they are
# float32: over the six steps ours were off PEFT's by up to 2.3e-7 (four draws of the data).
EXACT = {"rel": 1e-5}
# A resumed run repeats the uninterrupted one: checkpoints have everything in float32.
RESUMED = {"rel": 1e-6}
# bfloat16, in which the loss itself lies 2⁻⁵ from the next: plain PEFT's losses were off its own in float32 by up to
# 0.31 % (the same four draws), and ours may be as far to the other side. Over the six steps the loss falls by 11 %.
ROUNDED = {"rel": 7e-3}


class Run(NamedTuple):
    model: Any  # as the Trainer leaves it, in shards
    losses: list[float]
    calls: list[tuple[int, int]]  # of each step, as EVERY


class Calls(TrainerCallback):
    """After each step, how often functional.dora_linear was called, and for how many different magnitudes."""

    def __init__(self, dora_linear: mock.Mock) -> None:
        self.dora_linear = dora_linear
        self.steps: list[tuple[int, int]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        calls = self.dora_linear.call_args_list
        self.steps.append((len(calls), len({id(call.args[MAGNITUDE]) for call in calls})))
        self.dora_linear.reset_mock()


class AccelerateLate(TrainerCallback):
    """lora_fast.accelerate once the Trainer has sharded the model."""

    report: Report

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.report = lora_fast.accelerate(model)


def force_fsdp(rank: int) -> None:
    """Make accelerate take FSDP on a CPU, where it silently takes DistributedDataParallel instead."""
    # AcceleratorState takes FSDP for processes that have a GPU or the like each, and so these are said to have one. The
    # process group, which is there already, stays gloo's.
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    # accelerate's own variable, without which it would look for that GPU
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    # what torchrun and `accelerate launch` tell a process; accelerate and transformers' loading ask for it
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["ACCELERATE_USE_FSDP"] = "true"


def train(
    model: nn.Module,
    folder: Path,
    *,
    resume: Path | None = None,
    callback: TrainerCallback | None = None,
    fsdp: dict[str, Any] | None = None,
    **arguments: Any,
) -> Run:
    words = torch.randint(64, (8, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in words]
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **(fsdp or {})}
    options = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        # With Adam's own epsilon a gradient near zero moves its parameter by the learning rate, in the direction of its
        # rounding error
        learning_rate=3e-2,
        adam_epsilon=1e-2,
        logging_steps=1,
        save_steps=SAVED,
        report_to=[],
        use_cpu=True,  # without it bf16=True wants a GPU
        disable_tqdm=True,
        seed=0,
        fsdp=True,
        fsdp_config=config,
        **arguments,
    )
    with mock.patch.object(functional, "dora_linear", wraps=functional.dora_linear) as dora_linear:
        calls = Calls(dora_linear)
        callbacks = [calls] if callback is None else [calls, callback]
        trainer = Trainer(model=model, args=options, train_dataset=data, callbacks=callbacks)
        assert trainer.accelerator.is_fsdp2
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    return Run(trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], calls.steps)


# ---- models; with ``start`` they have the adapter that all trainings begin with, else a new one


def base(tmp: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tmp / "base")


def plain(tmp: Path, start: bool = True) -> Any:
    if start:
        return PeftModel.from_pretrained(base(tmp), tmp / "adapter", is_trainable=True)
    return get_peft_model(base(tmp), LoraConfig(**CONFIG))


def accelerated(tmp: Path, start: bool = True) -> Any:
    model = plain(tmp, start)
    assert len(lora_fast.accelerate(model).accelerated) == LAYERS
    return model


def applied(tmp: Path, start: bool = True) -> Any:
    model = lora_fast.apply(base(tmp), CONFIG["r"], CONFIG["lora_alpha"], scaling="alpha/r")
    return lora_fast.load_adapter(model, tmp / "adapter") if start else model


def write_models(tmp: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,  # enough for adapters to change the losses
    )
    LlamaForCausalLM(config).save_pretrained(tmp / "base")
    model = get_peft_model(base(tmp), LoraConfig(**CONFIG))
    move(model)
    model.save_pretrained(tmp / "adapter")


# ---- what the Trainer saves


def whole(tensors: Any) -> dict[str, Tensor]:
    """By name, gathered from the processes, each of which must make this call."""
    return {name: value.detach().full_tensor() for name, value in tensors}


def check_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert not isinstance(found[name], DTensor)
        torch.testing.assert_close(found[name].detach(), value, rtol=0, atol=0)


def check_adapter_saved(run: Run, checkpoint: Path, tmp: Path) -> None:
    """PEFT's file and the Trainer's own have what was trained, and PEFT loads it."""
    wanted = whole((name, p) for name, p in run.model.named_parameters() if p.requires_grad)
    dist.barrier()  # the first process writes
    check_equal(torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True), wanted)
    loaded = PeftModel.from_pretrained(base(tmp), checkpoint)
    check_equal({name: p for name, p in loaded.named_parameters() if name in wanted}, wanted)
    of_peft = checkpoint.parents[1] / "plain" / checkpoint.name
    assert sorted(os.listdir(checkpoint)) == sorted(os.listdir(of_peft))
    name = "adapter_model.safetensors"
    assert load_file(checkpoint / name).keys() == load_file(of_peft / name).keys()


def check_adapter_of_wrapped_blocks(run: Run, checkpoint: Path, tmp: Path) -> None:
    """PEFT 0.21 alone writes an empty file then: it looks for names that have the checkpointing's wrappers in them."""
    trained = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
    wanted = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in whole(trained).items()}
    assert wanted.keys() != {name for name, _ in trained}
    dist.barrier()  # the first process writes
    loaded = PeftModel.from_pretrained(base(tmp), checkpoint)
    check_equal({name: p for name, p in loaded.named_parameters() if name in wanted}, wanted)
    assert len(load_file(checkpoint / "adapter_model.safetensors")) == len(wanted)


def check_model_saved(run: Run, checkpoint: Path, tmp: Path) -> None:
    """transformers' file and the Trainer's own have the whole model, and save_adapter what was trained."""
    wanted = whole(run.model.state_dict().items())
    lora_fast.save_adapter(run.model, checkpoint / "adapter")
    dist.barrier()  # the first process writes
    check_equal(torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True), wanted)
    check_equal(load_file(checkpoint / "model.safetensors"), wanted)
    again = applied(tmp, start=False)
    again.load_state_dict(load_file(checkpoint / "model.safetensors"))
    check_equal(again.state_dict(), wanted)
    check_equal(lora_fast.load_adapter(base(tmp), checkpoint / "adapter").state_dict(), wanted)


# ---- what is trained


def check_course(tmp: Path, efficient: bool, made: Callable[..., Any]) -> None:
    """Losses, calls, files, and the rest of the way from the checkpoint in its middle."""
    folder, fsdp = tmp / ("efficient" if efficient else "everywhere"), {"cpu_ram_efficient_loading": efficient}
    peft = train(made(plain, tmp), folder / "plain", fsdp=fsdp)
    assert peft.calls == [(0, 0)] * STEPS
    assert peft.losses[-1] < 0.95 * peft.losses[0]
    for name, make, check_saved in (
        ("accelerated", accelerated, check_adapter_saved),
        ("applied", applied, check_model_saved),
    ):
        run = train(made(make, tmp), folder / name, fsdp=fsdp)
        assert run.losses == pytest.approx(peft.losses, **EXACT)
        assert run.calls == [EVERY] * STEPS
        check_saved(run, folder / name / f"checkpoint-{STEPS}", tmp)
        check_resuming(run, made(make, tmp, start=False), folder / name, fsdp)


def check_resuming(run: Run, model: nn.Module, folder: Path, fsdp: dict[str, Any]) -> None:
    again = train(model, folder / "resumed", resume=folder / f"checkpoint-{SAVED}", fsdp=fsdp)
    assert again.losses == pytest.approx(run.losses, **RESUMED)  # the first of them come with the checkpoint
    assert again.calls == run.calls[SAVED:]


def check_loading_everywhere(rank: int, tmp: Path) -> None:
    check_course(tmp, False, lambda make, *args, **kwargs: make(*args, **kwargs))


def check_efficient_loading(rank: int, tmp: Path) -> None:
    """Only the first process has the values, which FSDP distributes."""

    def made(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        model = make(*args, **kwargs)
        if rank > 0:  # what the others load depends on transformers' release: nothing of it may matter
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(torch.nan)
        return model

    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"  # as of `accelerate launch`; from_pretrained asks for it
    check_course(tmp, True, made)


def check_options(rank: int, tmp: Path) -> None:
    """Checkpoints in shards, activations computed again, and models accelerated after they were sharded."""
    wanted = pytest.approx(train(plain(tmp), tmp / "plain").losses, **EXACT)
    in_shards = {"state_dict_type": "SHARDED_STATE_DICT"}
    recomputed = {"activation_checkpointing": True}
    for option, fsdp, calls in (("shards", in_shards, EVERY), ("recomputed", recomputed, (2 * LAYERS, LAYERS))):
        for name, make in (("accelerated", accelerated), ("applied", applied)):
            run = train(make(tmp), tmp / option / name, fsdp=fsdp)
            assert run.losses == wanted
            assert run.calls == [calls] * STEPS
            check_resuming(run, make(tmp, start=False), tmp / option / name, fsdp)
            if option == "recomputed" and make is accelerated:
                check_adapter_of_wrapped_blocks(run, tmp / option / name / f"checkpoint-{STEPS}", tmp)
    late = AccelerateLate()
    run = train(plain(tmp), tmp / "late", callback=late)
    assert late.report.left_alone == []
    assert run.losses == wanted
    assert run.calls == [EVERY] * STEPS


def check_bf16(rank: int, tmp: Path) -> None:
    """Parameters that FSDP gathers in bfloat16, and keeps in float32."""
    folder = tmp / "bf16"
    exact = train(plain(tmp), folder / "float32").losses
    peft = train(plain(tmp), folder / "plain", bf16=True).losses
    assert peft != pytest.approx(exact, **EXACT)
    assert peft == pytest.approx(exact, **ROUNDED)
    for make in (accelerated, applied):
        run = train(make(tmp), folder / make.__name__, bf16=True)
        assert run.losses == pytest.approx(peft, **ROUNDED)
        assert run.calls == [EVERY] * STEPS
        assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


def process(rank: int, folder: str, checks: tuple[Callable[..., None], ...]) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    tmp = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{tmp / 'store'}", rank=rank, world_size=WORLD)
    try:
        force_fsdp(rank)
        for check in checks:
            check(rank, tmp)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # As processes end that are forked from a server (parallel_helpers.spawn). Gloo's threads outlive the group where
    # anything refers to it, and where one lets go of a tensor in an interpreter that is ending, the process aborts
    # (PyTorch's pull request 179291).
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "checks",
    [(check_loading_everywhere, check_efficient_loading), (check_options, check_bf16)],
    ids=["course", "options"],
)
def test_trainer(checks: tuple[Callable[..., None], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # For the processes: fully_shard would take a GPU, which the imports of a process may already have looked for.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_models(tmp_path)
    mp.spawn(process, args=(str(tmp_path), checks), nprocs=WORLD)
