"""The command lora-fast, as a person and as a script use it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fast
from lora_fast import backends, cli, info
from lora_fast.backends import extension

OPS = {"weight_norm_fwd", "lora_linear_fwd", "lora_linear_bwd", "dora_linear_fwd", "dora_linear_bwd"}


def lora_fast_command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})


@pytest.fixture
def missing_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "status", lambda: (False, "this installation is pure Python: no compiler", {}))


def test_info_says_what_is_installed_and_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert lora_fast.__version__ in out
    assert torch.__version__ in out
    assert "extension" in out
    for op in OPS:
        assert op in out


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert set(state) == {"versions", "cpu", "gpu", "extension", "default_backend", "plans"}
    assert "512 tokens, 4096×4096, rank 16, bfloat16, cpu" in state["plans"]
    for rows in state["plans"].values():
        assert {row["op"] for row in rows} == OPS
        assert all(row["backend"] in backends.NAMES and row["kernel"] and row["because"] for row in rows)
    assert state["extension"]["loaded"] == backends.is_present("cpu")


def test_info_of_one_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json", "--size", "5", "7", "9", "3", "--dtype", "float64"]) == 0
    ((size, rows),) = json.loads(capsys.readouterr().out)["plans"].items()
    assert size == "5 tokens, 7×9, rank 3, float64, cpu"
    assert {row["op"] for row in rows} >= OPS | {"lora_compose_fwd", "lora_compose_bwd", "dropout", "merge_weight"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "5", "7", "9"], "expected 4 arguments"),
        (["--size", "5", "7", "9", "0"], "got '0', expected a positive integer"),
        (["--size", "5", "7", "9", "3", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--size", "5", "7", "9", "3", "--device", "abacus"], "--device: got 'abacus'"),
        (["--size", "5", str(1 << 40), str(1 << 40), "3"], "--size"),
    ],
)
def test_info_names_what_is_wrong_with_a_size(arguments: list[str], message: str) -> None:
    done = lora_fast_command("info", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.native
@pytest.mark.parametrize("wide", [True, False])
def test_info_says_that_the_extension_is_slower_than_it_could_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wide: bool
) -> None:
    monkeypatch.setattr(extension, "has_torchs_vectors", lambda: wide)
    assert cli.main(["info", "--size", "5", "7", "9", "3"]) == 0
    assert ("build it with GCC 12 or later" in capsys.readouterr().out) is not wide


def test_info_tells_the_reason_and_the_remedy(missing_extension: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "missing: this installation is pure Python: no compiler" in out
    assert "LORA_FAST_BUILD=cpu" in out
    assert f"{shlex.quote(sys.executable)} -m pip install --no-build-isolation" in out


def test_the_remedy_names_what_else_is_missing(missing_extension: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info.shutil, "which", lambda name: None)
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    compiler, requirements, *_, build = info.collect()["extension"]["remedy"]
    assert "compiler" in compiler
    for name in ("ninja", "pybind11", "setuptools"):
        assert name in requirements
    assert build.startswith("LORA_FAST_BUILD=cpu ")


def test_info_says_where_the_default_backend_comes_from() -> None:
    state = json.loads(lora_fast_command("info", "--json", LORA_FAST_BACKEND="torch").stdout)
    assert state["default_backend"] == {"name": "torch", "from": "LORA_FAST_BACKEND"}
    assert {row["backend"] for rows in state["plans"].values() for row in rows} == {"torch"}


def test_info_says_why_a_default_backend_refuses() -> None:
    done = lora_fast_command("info", "--size", "5", "7", "9", "3", LORA_FAST_BACKEND="cuda")
    assert done.returncode == 0
    assert "backend='cuda' for 5 tokens, 7×9, rank 3, bfloat16, cpu" in done.stdout
    assert re.search(r"dora_linear_fwd +cuda +none +backend 'cuda' (is not available|cannot be used): ", done.stdout)


def test_an_unknown_default_backend_is_one_clear_line() -> None:
    done = lora_fast_command("info", LORA_FAST_BACKEND="fpga")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("lora-fast: error: LORA_FAST_BACKEND: got 'fpga', expected one of")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ([], "run"),
        (["--models"], "run_models"),
        (["--qlora"], "run_qlora"),
        (["--distributed"], "run_distributed"),
    ],
)
def test_demo_passes_its_options_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: list[str], name: str
) -> None:
    import lora_fast.demo

    calls: list[tuple[Path, dict[str, Any]]] = []

    def run(output_dir: Path, **options: Any) -> int:
        calls.append((output_dir, options))
        return 3

    monkeypatch.setattr(lora_fast.demo, name, run)
    assert cli.main(["demo", *kind, "--output", str(tmp_path), "--quick", "--seed", "7"]) == 3
    assert calls == [(tmp_path, {"quick": True, "seed": 7})]


def test_demo_without_its_packages_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import lora_fast.demo

    def run(output_dir: Path, **options: Any) -> int:
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    monkeypatch.setattr(lora_fast.demo, "run", run)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "peft" in line
    assert "pip install" in line


def test_the_demo_of_qlora_names_the_extra_that_it_needs_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    assert cli.main(["demo", "--qlora", "--output", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    (line,) = error.splitlines()
    assert line.startswith(
        "lora-fast: the demo needs the package bitsandbytes: pip install 'lora_fast[demo,bitsandbytes]'"
    )
    assert not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["info", "--nonsense"],
        ["demo", "--seed", "-1"],
        ["demo", "--output", __file__],
        ["demo", "--models", "--qlora"],
        ["demo", "--qlora", "--distributed"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    done = lora_fast_command(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr


def test_the_console_script_is_the_same_command() -> None:
    script = Path(sys.executable).with_name("lora-fast")
    if not script.exists():
        pytest.skip("lora_fast is not installed in this environment, only importable")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"lora_fast {lora_fast.__version__}"
