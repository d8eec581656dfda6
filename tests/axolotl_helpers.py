"""Configurations of Axolotl, with a small model and data, and a process that trains them one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PLUGIN = "lora_fast.integrations.axolotl.LoraFastPlugin"
STEPS = 4
WITHOUT_KERNELS = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False)
SETTINGS: dict[str, Any] = {
    "val_set_size": 0,
    "sequence_len": 128,
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0,
    "lora_target_linear": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "learning_rate": 0.01,
    "adam_epsilon": 0.01,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": STEPS,
    "seed": 42,
}
PAIRS = {  # of DPO's data
    **{f"field_{name}": name for name in ("prompt", "chosen", "rejected")},
    **{f"{name}_format": f"{{{name}}}" for name in ("prompt", "chosen", "rejected")},
}
# in one process
TRAIN = "import sys; from axolotl.cli.train import do_cli\nfor config in sys.argv[1:]: do_cli(config)"


def write_model(folder: Path) -> None:
    from trainer_helpers import write_base

    from lora_fast.benchmarks.trainers_child import tokenizer

    write_base(folder, 64, 128)  # which bitsandbytes computes right on a CPU
    made = tokenizer()
    made.model_max_length = 256
    made.save_pretrained(folder)


def write_config(tmp_path: Path, name: str, **options: Any) -> Path:
    import yaml

    is_dpo = options.get("rl") == "dpo"
    data = tmp_path / ("pairs.jsonl" if is_dpo else "texts.jsonl")
    counts = range(16)
    pairs = [
        {"prompt": f"the square of {n} is ", "chosen": f"{n * n}, no more", "rejected": f"{n + 1}, or so"}
        for n in counts
    ]
    texts = [{"text": f"number {n} is {n * n} squared"} for n in counts]
    data.write_text("\n".join(map(json.dumps, pairs if is_dpo else texts)))
    kind = {"split": "train", "type": PAIRS} if is_dpo else {"type": "completion", "field": "text"}
    config = {
        **SETTINGS,
        "base_model": str(tmp_path / "model"),
        "datasets": [{"path": str(data), "ds_type": "json", **kind}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / name),
        **options,
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Without a network, and with the log in stdout."""
    offline = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "500"}
    return subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | offline,
        check=False,
    )


def losses(tmp_path: Path, name: str) -> list[float]:
    state = json.loads((tmp_path / name / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]
