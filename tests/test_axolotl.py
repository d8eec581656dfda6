"""Axolotl's own commands with the plugin in the configuration: its losses and adapters, from lora_fast's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl_helpers import PLUGIN, STEPS, TRAIN, WITHOUT_KERNELS, losses, run, write_config, write_model

pytestmark = [pytest.mark.axolotl, pytest.mark.slow]

EXACT = {"rtol": 1e-5, "atol": 1e-6}
NF4 = {"adapter": "qlora", "load_in_4bit": True}
# by name: what differs from LoRA, what the report says, and how many layers of 14 it says it of
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "LoRA": ({}, "fast  14 × Linear: default: LoRA, lora_linear"),
    "DoRA": ({"peft_use_dora": True}, "fast  14 × Linear: default: DoRA, weight_norm, lora_linear"),
    "DPO": ({"rl": "dpo", "peft_use_dora": True}, "fast  14 × Linear: default: DoRA, weight_norm, lora_linear"),
    "QLoRA": ({**NF4}, "fast  14 × Linear4bit: default: LoRA, the product of"),
    "QDoRA": ({**NF4, "peft_use_dora": True}, "fast  14 × Linear4bit: default: DoRA, weight_norm, the product of"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize(
    "case",
    ["LoRA", "DoRA", "DPO", *(pytest.param(case, marks=pytest.mark.bitsandbytes) for case in ("QLoRA", "QDoRA"))],
)
def test_trained_as_by_axolotl_itself(folder: Path, case: str) -> None:
    """In the second configuration nothing is said of the kernels, which Axolotl would turn on; they need a GPU."""
    from safetensors.torch import load_file

    options, runs = CASES[case]
    plain = write_config(folder, "plain", **options, **WITHOUT_KERNELS)
    fast = write_config(folder, "fast", **options, plugins=[PLUGIN])
    done = run("-c", TRAIN, str(plain), str(fast))
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.count("lora_fast: 14 of 14 adapter layers accelerated (peft ") == 1
    assert runs in done.stdout
    assert "as one  2 × LlamaMLP" in done.stdout
    assert "Auto-enabling LoRA kernel" not in done.stdout
    wanted = losses(folder, "plain")
    assert len(set(wanted)) == STEPS
    rounded = {"rtol": 1e-4, "atol": 1e-4} if case in ("QLoRA", "QDoRA") else EXACT
    torch.testing.assert_close(torch.tensor(losses(folder, "fast")), torch.tensor(wanted), **rounded)
    files = [load_file(folder / name / "adapter_model.safetensors") for name in ("fast", "plain")]
    # each step moves a parameter by up to the learning rate, 1e-2
    torch.testing.assert_close(*files, rtol=1e-3, atol=1e-3 if case in ("QLoRA", "QDoRA") else 1e-5)


def test_its_command_line_and_merging(folder: Path) -> None:
    """Kernels that the configuration has on are turned off, and options are taken."""
    from safetensors.torch import load_file

    on = dict.fromkeys(("lora_mlp_kernel", "lora_o_kernel"), True)
    options = {"compute_dtype": "adapter", "recompute": "none", "norm_reuse": False}
    config = write_config(folder, "fast", **on, peft_use_dora=True, plugins=[PLUGIN], lora_fast=options)
    done = run("-m", "axolotl.cli.main", "train", str(config), "--launcher", "python")
    assert done.returncode == 0, done.stdout[-5000:]
    assert "lora_fast runs the adapters' layers: lora_mlp_kernel, lora_o_kernel turned off" in done.stdout
    assert "products in the adapter's dtype" in done.stdout
    assert "as one" not in done.stdout

    adapter = str(folder / "fast")
    merged = []
    for method in ("memory_efficient", "legacy"):  # of which only the second loads the model
        made = run("-m", "axolotl.cli.merge_lora", str(config), "--lora_model_dir", adapter, "--merge_method", method)
        assert made.returncode == 0, made.stdout[-5000:]
        (file,) = (folder / "fast" / "merged").glob("*.safetensors")
        merged.append(load_file(file))
    torch.testing.assert_close(*merged, **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adapter": None},
            "adapter: the configuration has none, and lora_fast.integrations.axolotl.LoraFastPlugin is",
        ),
        ({"lora_fast": {"recompute": "some"}}, "Input should be 'outputs', 'all' or 'none'"),
        ({"lora_fast": {"recomputes": "all"}}, "Extra inputs are not permitted"),
    ],
    ids=["no adapter", "another value", "another name"],
)
def test_configurations_that_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    config = write_config(folder, "fast", plugins=[PLUGIN], **options)
    done = run("-c", TRAIN, str(config))
    assert done.returncode != 0
    assert message in done.stdout
    assert not (folder / "fast").exists()


def test_a_later_run_without_the_plugin_is_axolotl_s_own(folder: Path) -> None:
    """Axolotl keeps plugins for the runs that a process does after the one that named them: here a full fine-tuning."""
    fast = write_config(folder, "fast", plugins=[PLUGIN.replace(".LoraFast", ":LoraFast")])
    others = [
        write_config(folder, "plain", **WITHOUT_KERNELS),
        write_config(folder, "full", adapter=None, lora_r=None, lora_alpha=None, lora_target_linear=None),
    ]
    done = run("-c", TRAIN, str(fast), *map(str, others))
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.count("adapter layers accelerated") == 1
    torch.testing.assert_close(losses(folder, "fast"), losses(folder, "plain"), **EXACT)
    assert losses(folder, "full")


def test_the_hooks() -> None:
    """What no configuration of Axolotl's comes to."""
    from axolotl.utils.dict import DictDefault
    from torch import nn

    from lora_fast.integrations.axolotl import LoraFastPlugin

    plugin = LoraFastPlugin()
    with pytest.raises(ValueError, match="lora_o_kernel: it is on, and lora_fast's layers would not be called"):
        plugin.pre_model_load(DictDefault({"lora_o_kernel": True, "plugins": [PLUGIN]}))
    plugin.pre_model_load(DictDefault({"lora_o_kernel": True}))
    plugin.post_model_load(DictDefault({"plugins": [PLUGIN]}), nn.Linear(2, 2))  # to which the trainer may add it
    trainer = type("Trainer", (), {"model": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="model: it has no PEFT layer"):
        plugin.post_trainer_create(DictDefault({"plugins": [PLUGIN]}), trainer)
