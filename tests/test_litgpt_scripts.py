"""litgpt's own scripts: fine-tuning through its command line, and its sharding of a model over processes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_helpers import EXACT, together, whole_gradients
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lora_fast.integrations import litgpt as integration

pytestmark = [pytest.mark.litgpt, pytest.mark.slow]

# float32: of both losses and trained adapters
ROUNDED = {"rtol": 1e-4, "atol": 1e-6}


def finetune(program: str, tmp_path: Path, **more: Any) -> tuple[str, Path]:
    """What the command wrote to the terminal, and the folder with what it made."""
    out = tmp_path / program
    arguments = {
        "out_dir": out,
        "precision": "32-true",
        "lora_r": 4,
        "lora_dropout": 0,
        "lora_key": "true",
        "lora_projection": "true",
        "lora_mlp": "true",
        "data": "JSON",
        "data.json_path": tmp_path / "data.json",
        "data.val_split_fraction": 0.2,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.max_steps": 5,
        "train.epochs": 3,
        "train.lr_warmup_steps": 1,
        "train.save_interval": 3,
        "eval.max_new_tokens": 4,
        **more,
    }
    options = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", program, "finetune_lora", str(tmp_path / "checkpoint"), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, out


def losses(out: Path) -> list[float]:
    with (out / "logs" / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[column]) for row in rows for column in ("loss", "val_loss") if row.get(column)]


def test_fine_tuning_by_litgpt_s_command(tmp_path: Path) -> None:
    """Losses, checkpoints and the merged model are its own; the summary says what ran."""
    from litgpt_helpers import write_checkpoint, write_data

    write_checkpoint(tmp_path / "checkpoint")
    write_data(tmp_path / "data.json")
    (_, own), (text, fast) = (finetune(program, tmp_path) for program in ("litgpt", "lora_fast.integrations.litgpt"))
    assert "lora_fast: 10 of 10 adapter layers accelerated (litgpt" in text
    assert "as one  2 × LLaMAMLP" in text
    wanted = losses(own)
    assert len(wanted) == 11  # ten batches, and the final validation
    assert wanted[-1] < wanted[0]
    torch.testing.assert_close(torch.tensor(losses(fast)), torch.tensor(wanted), **ROUNDED)
    for file in ("step-000003/lit_model.pth.lora", "final/lit_model.pth.lora", "final/lit_model.pth"):
        found, its = (torch.load(out / file, weights_only=True) for out in (fast, own))
        torch.testing.assert_close(found.get("model", found), its.get("model", its), **ROUNDED)


def test_two_processes_by_litgpt_s_command(tmp_path: Path) -> None:
    """It shards the model; the first says what ran."""
    from litgpt_helpers import write_checkpoint, write_data

    write_checkpoint(tmp_path / "checkpoint")
    write_data(tmp_path / "data.json")
    text, out = finetune("lora_fast.integrations.litgpt", tmp_path, devices=2)
    assert text.count("lora_fast: 10 of 10 adapter layers accelerated (litgpt") == 1
    assert torch.load(out / "final" / "lit_model.pth.lora", weights_only=True)["model"]


def test_the_command_says_what_it_needs() -> None:
    """In a process that has no litgpt."""
    run = "runpy.run_module('lora_fast.integrations.litgpt', run_name='__main__')"
    code = f"import runpy, sys; sys.modules['litgpt'] = None; {run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("lora_fast.integrations.litgpt needs litgpt: pip install litgpt")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("when", ["before", "after"])
def test_sharded_as_litgpt_shards(when: str, tmp_path: Path) -> None:
    """FSDP2 and activation checkpointing on two processes: outputs and gradients of one process without either."""
    together(2, tmp_path, check_sharded, when)


def check_sharded(when: str) -> None:
    from litgpt.finetune.lora import parallelize_fn

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    y, gradients = step(model_of())
    assert len(gradients) == 22
    model = model_of()
    if when == "before":
        assert len(integration.accelerate(model).accelerated) == 11
    parallelize_fn(model, {"data_parallel": mesh})
    if when == "after":
        assert len(integration.accelerate(model).accelerated) == 11
    fast_y, fast_gradients = step(model)
    torch.testing.assert_close(fast_y, y, **EXACT)
    torch.testing.assert_close(fast_gradients, gradients, **EXACT)
    integration.restore(model)
    torch.testing.assert_close(step(model), (y, gradients), **EXACT)


def model_of() -> Any:
    from litgpt_helpers import gpt

    return gpt()


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The same batch in each process, so that the mean of their gradients is each's."""
    model.zero_grad()
    y = model(torch.arange(48).view(2, 24))
    y.square().mean().backward()
    return y.detach(), {
        name.replace("_checkpoint_wrapped_module.", ""): g for name, g in whole_gradients(model).items()
    }
