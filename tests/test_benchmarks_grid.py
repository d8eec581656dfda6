"""The grid of sizes and tokens, and the same processor with AMX turned off: what is asked for, kept, held and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("numpy", reason="the benchmarks need numpy, of the extras demo and test")
pytest.importorskip("rich", reason="the benchmarks' tables need rich, of the demo extra")

from lora_fast import cli
from lora_fast.benchmarks import contenders as c, grid, peft_model, report, without_amx
from lora_fast.benchmarks.registry import INFERENCE, STEP
from lora_fast.benchmarks.runner import Record


@pytest.fixture
def tiny_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "SIZES", ((64, 96),))
    monkeypatch.setattr(grid, "TOKENS", (1, 256))


def test_the_grid_has_the_rules_sizes() -> None:
    keys = [key for point in grid.points() for key in point.keys]
    assert len(keys) == len(set(keys)) == 3 * 2 * 7 * 2
    assert {point.tokens for point in grid.points()} == {1, 4, 16, 64, 256, 512, 2048}
    assert {point.size for point in grid.points()} == {"2048×2048", "4096×4096", "4096×11008"}


def test_the_rule_of_a_row() -> None:
    def bars(mode: str, tokens: int, users: float | None = 10.0) -> list[tuple[str, float, bool]]:
        times = {c.lora().name: 10.3, c.dora().name: 10.2, c.PEFT_LORA.name: 10.0, c.PEFT_LORA_FP32.name: users}
        records = {name: Record(ms, ms, ms, 25, 0) for name, ms in times.items() if ms is not None}
        return [(bar.text, round(bar.measured, 3), bar.met) for bar in grid.bars(mode, tokens, records)]

    lora = ("lora_fast LoRA, × PEFT LoRA", 1.03, False)
    assert bars(STEP, 255) == [lora]
    assert bars(STEP, 256) == [lora, ("lora_fast DoRA, × PEFT LoRA, fp32 adapters", 1.02, True)]
    assert bars(INFERENCE, 1, 8.0) == [lora, ("lora_fast DoRA, × PEFT LoRA, fp32 adapters", 1.275, False)]
    assert bars(INFERENCE, 1, None) == [lora, ("lora_fast DoRA, × PEFT LoRA", 1.02, True)]  # float32: they are one


@pytest.mark.usefixtures("tiny_grid")
def test_the_grid_goes_on_and_is_chosen_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    path, measured = tmp_path / "grid.json", []
    rows = grid.rows

    def interrupted(point: grid.Point, *rest: Any) -> Any:
        measured.append(point)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return rows(point, *rest)

    monkeypatch.setattr(grid, "rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grid.run(path, budget_s=0.0, rounds=2)
    grid.run(path, budget_s=0.0, rounds=2)
    assert [(point.dtype, point.tokens) for point in measured[2:]] == [
        (torch.float32, 1),
        (torch.float32, 1),
        (torch.float32, 256),
    ]
    content = json.loads(path.read_text())
    assert content["complete"]
    assert [row["key"] for row in content["rows"]] == [key for point in grid.points() for key in point.keys]
    assert content["device"] == report.device_name()
    for row in content["rows"]:
        assert not row["left_out"]
        assert (c.PEFT_LORA_FP32.name in row["records"]) == (row["dtype"] == "bfloat16")
        assert len(row["bars"]) == 1 + (row["mode"] == INFERENCE or row["tokens"] == 256)
    grid.run(path, ["inference/64x96/t1/float32"], budget_s=0.0, rounds=2)
    again = json.loads(path.read_text())["rows"]
    assert [old["key"] for old, new in zip(content["rows"], again, strict=True) if old != new] == [
        "inference/64x96/t1/float32"
    ]
    with pytest.raises(ValueError, match="no row matches; rows are named like"):
        grid.run(path, ["nothing"])


@pytest.mark.native
@pytest.mark.parametrize(
    ("limit", "has_amx", "enabled", "said"),
    [
        (None, True, True, ""),
        (None, True, False, " with AMX turned off in lora_fast alone"),
        (None, False, False, ""),
        ("AVX512_CORE_BF16", True, False, " without AMX"),
        ("AVX512_CORE_BF16", True, True, " with ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 and lora_fast's own AMX"),
        ("AVX2", True, False, " with ONEDNN_MAX_CPU_ISA=AVX2"),
    ],
)
def test_a_device_is_named_by_what_was_turned_off(
    monkeypatch: pytest.MonkeyPatch, limit: str | None, has_amx: bool, enabled: bool, said: str
) -> None:
    monkeypatch.delenv(without_amx.VARIABLE, raising=False)
    if limit is not None:
        monkeypatch.setenv(without_amx.VARIABLE, limit)
    monkeypatch.setattr(without_amx.extension, "amx_enabled", lambda: enabled)
    monkeypatch.setattr(without_amx, "_features", lambda: ["amx_bf16"] if has_amx else [])
    monkeypatch.setattr(report, "cpu_model", lambda: "Some(R) CPU 1234 @ 2.00GHz")
    assert report.device_name() == f"Some(R) CPU 1234 @ 2.00GHz{said}"
    assert report.provenance()["device"] == report.device_name()
    named = {"": "", " without AMX": "without-amx-"}
    if said in named:
        assert report.device_slug() == f"some-1234-{named[said]}{torch.get_num_threads()}-threads"
    else:
        assert len(report.device_slug()) > len("some-1234-without-amx-2-threads")


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n", "AMD EPYC, family 26 model 2"),
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9354\n", "AMD EPYC 9354"),
        ("model name\t: Some CPU\n", "Some CPU"),
        ("processor\t: 0\n", None),
    ],
)
def test_a_processor_whose_name_has_no_number_is_named_by_its_family(cpuinfo: str, name: str | None) -> None:
    assert report.cpu_in(cpuinfo) == name


@pytest.mark.native
def test_turning_amx_off_starts_anew_with_both_turned_off() -> None:
    code = (
        "import os, sys; from lora_fast.benchmarks import report, without_amx; print(os.getpid(), flush=True); "
        "without_amx.turn_off(); without_amx.follow(); print(without_amx.used(), report.device_name(), sys.argv[1:])"
    )
    environment = {name: value for name, value in os.environ.items() if name != without_amx.VARIABLE}
    command = [sys.executable, "-c", code, "an argument"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    first, second, said = done.stdout.splitlines()
    assert first == second  # one process, which began anew
    assert said == f"False {report.cpu_model()} without AMX ['an argument']"


@pytest.mark.avx512_bf16
@pytest.mark.parametrize(
    ("limit", "pairs"), [("AVX512_CORE_BF16", "True"), ("AVX512_CORE", "False"), ("AVX2", "False")]
)
def test_kernels_follow_a_limit_below_avx512_bf16(limit: str, pairs: str) -> None:
    code = (
        "from lora_fast import _C; from lora_fast.benchmarks import without_amx; _C.allow_avx512_bf16(True); "
        "without_amx.follow(); print(_C.avx512_bf16_enabled())"
    )
    environment = os.environ | {without_amx.VARIABLE: limit}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == pairs


@pytest.mark.parametrize("command", [["bench", "--without-amx"], ["bench", "--without-amx", "t0-3b"]])
def test_the_option_turns_amx_off_before_anything_else(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class StartedAnewError(Exception):
        pass

    def turn_off() -> None:
        raise StartedAnewError

    monkeypatch.setattr(without_amx, "turn_off", turn_off)
    with pytest.raises(StartedAnewError):
        cli.main(command)
    with pytest.raises(StartedAnewError):
        grid.main(["--without-amx"])


def test_a_peft_models_bars_without_amx() -> None:
    records = {name: Record(10.0, 10.0, 10.0, 5, 1024) for name in peft_model.CONTENDERS}
    found = [
        (case.title, [(bar.text, bar.bound) for bar in case.bars(records)]) for case in peft_model.CASES_WITHOUT_AMX
    ]
    memory = ("accelerated DoRA, × PEFT LoRA in peak memory", 1.0)
    assert found == [
        ("training step, 256 tokens", [("accelerated DoRA, × PEFT LoRA", 1.0), memory]),
        ("training step with the optimizer step, 16 tokens", [("accelerated DoRA, × PEFT LoRA", 1.15), memory]),
        ("inference, 16 tokens", [("accelerated DoRA, × PEFT LoRA", 1.0)]),
    ]
