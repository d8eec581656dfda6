"""Triton's cache filled ahead (make gpu-prewarm): what is in it is not compiled again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CODE = """
import torch
from lora_fast.triton_kernels import prewarm, sum_partials
from lora_fast.triton_kernels.target import SM90

with prewarm.warmed(SM90) as done:
    out = sum_partials.sum_partials(torch.ones(3, 64), torch.bfloat16)
    sum_partials.sum_partials(torch.ones(3, 64), torch.bfloat16)
assert out.shape == (64,)
print(len(done))
"""


@pytest.mark.slow
def test_the_workers_of_pytest_compile_what_the_tests_launch(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PREWARM": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    tests = ["tests/test_triton_forward.py", "-k", "nothing_to_do or in_tiles and float32 and False"]
    run = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-m", "interp", "-n", "2", "-p", "no:cacheprovider", *tests]
    root = Path(__file__).resolve().parent.parent
    said = subprocess.run(run, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert "failed" in said.stdout, said.stdout  # their results are not computed
    assert list(tmp_path.rglob("*.cubin"))


def test_launches_are_compiled_and_not_run(tmp_path: Path) -> None:
    """Once: the second process finds all that the first has compiled, and a GPU's machine would."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    files = []
    for _ in range(2):
        run = [sys.executable, "-c", CODE]
        said = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stderr
        assert said.stdout.split() == ["1"]
        files.append(sorted(path for path in tmp_path.rglob("*") if path.is_file()))
    assert sum(path.suffix == ".cubin" for path in files[0]) == 1
    assert files[0] == files[1]
