"""A training step of each trainer that lora_fast is used in, before and after it accelerates the model.

One process a row (:mod:`lora_fast.benchmarks.trainers_child`), beside the packages of that trainer, which the make
targets of its tests install. In it one training alternates between PEFT's, or litgpt's, layers and lora_fast's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .alternation import AFTER, BEFORE
from .report import digits
from .tables import table
from .trainers_child import KINDS, Sizes

VENV = Path(sys.prefix)
# by the kind of trainer: the folder of its packages
PACKAGES = {"SFTTrainer": "trl", "DPOTrainer": "trl", "Axolotl": "axolotl", "lit-gpt": "litgpt", "diffusers": "interop"}


def run(sizes: Sizes | None = None, kinds: tuple[tuple[str, str], ...] = KINDS) -> Iterator[dict[str, Any]]:
    """The rows, as a result file holds them. RuntimeError where a process fails, with what it wrote."""
    for kind, adapter in kinds:
        yield row(kind, adapter, sizes or Sizes())


def as_table(rows: Iterable[dict[str, Any]]) -> str:
    """The times, with the peaks in brackets."""

    def line(row: dict[str, Any]) -> list[str]:
        before, after = (row["records"][name] for name in (BEFORE, AFTER))
        cells = [f"{digits(r['median_ms'])} ms ({digits(r['peak_bytes'] / 2**20)} MiB)" for r in (before, after)]
        return [row["title"], *cells, f"{before['median_ms'] / after['median_ms']:.2f} ×"]

    return table(["training step", "before", "accelerated", "faster"], map(line, rows))


def row(kind: str, adapter: str, sizes: Sizes) -> dict[str, Any]:
    folders = [str(VENV / PACKAGES[kind])] if kind in PACKAGES else []
    found = os.environ.get("PYTHONPATH")
    env = {
        "PYTHONPATH": os.pathsep.join([*folders, *([found] if found else [])]),
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "lora_fast.benchmarks.trainers_child", kind, adapter, sizes.text()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind}, {adapter}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made
