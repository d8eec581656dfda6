"""The GPU's commands without a GPU: rehearsed up to the first launch (tests/rehearsal), and their last lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_fast.benchmarks import gpu_verdict

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "gpu_first, check": ["-m", "lora_fast.benchmarks.gpu_first", "--out", "OUT", "--parts", "check"],
    "gpu_first, profiles": ["-m", "lora_fast.benchmarks.gpu_first", "--out", "OUT", "--parts", "profiles"],
    "gpu_tune": ["-m", "lora_fast.benchmarks.gpu_tune", "--out", "OUT"],
    "gpu": ["-m", "lora_fast.benchmarks.gpu", "--out", "OUT"],
    "lora-fast check": ["-m", "lora_fast", "check", "--device", "cuda"],
    "tests": ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", "follows and triton"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_as_far_as_its_first_launch(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    launches = tmp_path / "launches"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"REHEARSAL": str(launches), "PYTHONPATH": str(ROOT / "tests" / "rehearsal")}
    command = [sys.executable, *(str(tmp_path) if word == "OUT" else word for word in COMMANDS[name])]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert launches.is_file(), said.stdout[-3000:] + said.stderr[-3000:]
    assert launches.read_text().strip().endswith("_kernel")


def test_the_rehearsal_says_what_a_python_lacks(tmp_path: Path) -> None:
    def rehearsed(python: str) -> str:
        said = subprocess.run([ROOT / ".ci" / "gpu-rehearse", python], capture_output=True, text=True, check=False)
        assert said.returncode == 1
        return said.stdout

    assert rehearsed("no-such-python") == "no rehearsal: no-such-python lacks\neverything: it does not run\n"
    bare = tmp_path / "bare"  # this Python without its packages
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    lacking = rehearsed(str(bare)).splitlines()
    assert {"torch 2.11", "triton 3.6", "pytest"} <= set(lacking)


BAR = {"what": "ms", "measured": 0.12345, "at_most": 0.1, "aim": None, "met": False}
ROW = {"title": "norm", "records": {}, "left_out": {}, "bars": [BAR, BAR | {"at_most": 0.2, "met": True}]}
ITEM = {"name": "dropout", "backend": "triton", "dtype": "float16", "size": "13 tokens", "faults": []}
SUMMARY = "===== 12 passed, 3 skipped in 4.00s ====="


def folder(path: Path, log: str = SUMMARY, **changes: Any) -> Path:
    content = {"device": "NVIDIA H100", "commit": "abc", "check": [ITEM], "rows": [ROW]} | changes
    (path / "first.json").write_text(json.dumps(content), encoding="utf-8")
    (path / "tests.log").write_text(f"...\n{log}\n", encoding="utf-8")
    return path


def test_the_last_lines_are_a_table_and_the_verdict(tmp_path: Path) -> None:
    text, right = gpu_verdict.verdict(folder(tmp_path))
    lines = text.splitlines()
    assert right
    assert lines[0].startswith("NVIDIA H100, commit abc")
    assert lines[3].split() == ["norm", "ms", "0.123", "≤", "0.1", "MISSED"]
    assert lines[4].split() == ["norm", "ms", "0.123", "≤", "0.2", "met"]
    assert lines[-3:] == ["check: 1 items, 0 wrong", "tests: 12 passed, 3 skipped in 4.00s", "PASS"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"check": [ITEM | {"faults": ["y differs"]}]}, "WRONG: dropout, triton, float16, 13 tokens"),
        ({"rows": [ROW, {"title": "failed: norm_row(1)", "records": {}, "left_out": {}, "bars": []}]}, "norm_row(1)"),
        ({"log": "== 1 failed, 2 passed in 3s =="}, "WRONG: tests: 1 failed"),
        ({"log": "== 2 passed, 3 errors in 3s =="}, "WRONG: tests: 3 errors"),
        ({"log": "Traceback"}, "WRONG: tests: none passed"),
        ({"log": "== 900 skipped in 3s =="}, "WRONG: tests: none passed"),
        ({"log": "[gw1] [ 2%] FAILED tests/a.py::b \n[gw0] [ 3%] PASSED tests/a.py::c "}, "WRONG: tests: 1 failed"),
        ({"log": "tests/a.py::b[x y] PASSED [1%]\ntests/a.py::c FAILED [2%]\ncut off after 1 s"}, "tests: 1 failed"),
    ],
)
def test_what_is_wrong_is_told_and_fails(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    text, right = gpu_verdict.verdict(folder(tmp_path, **changes))
    assert not right
    assert told in text
    assert text.endswith("FAIL")


def test_tests_that_were_cut_off_are_told(tmp_path: Path) -> None:
    log = "! KeyboardInterrupt !\n== 7 passed in 9s ==\ncut off after 9 s: 7 of 12 tests ran"
    text, right = gpu_verdict.verdict(folder(tmp_path, log=log))
    assert right
    assert "tests: 7 passed in 9s, cut off after 9 s: 7 of 12 tests ran" in text
    text, right = gpu_verdict.verdict(tmp_path, whole=True)
    assert not right
    assert "WRONG: tests: cut off after 9 s: 7 of 12 tests ran" in text


def test_nothing_written_is_a_failure(tmp_path: Path) -> None:
    text, right = gpu_verdict.verdict(tmp_path)
    assert not right
    assert "neither first.json nor gpu.json was written" in text


def test_the_committed_run_on_a_gpu_reads_as_it_was(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first = ROOT / "benchmarks" / "results" / "nvidia-h200" / "first.json"
    monkeypatch.setattr("sys.argv", ["gpu_verdict", str(first.parent)])
    assert gpu_verdict.main() == 1
    assert "check: 594 items, 9 wrong" in capsys.readouterr().out
