"""The T0-3B case at a tiny size: processes, limits, predictions, the result file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="the T0-3B case needs peft, of the demo extra")
pytest.importorskip("rich", reason="the T0-3B case needs rich, of the demo extra")
pytest.importorskip("transformers", reason="the T0-3B case needs transformers, of the demo extra")

from lora_fast.benchmarks import t0_3b
from lora_fast.benchmarks.t0_3b_child import Task, build_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA")
GIB = 2**30


def completed(contender: str, depth: int, live: int, **changes: Any) -> dict[str, Any]:
    task = json.loads(Task(contender, depth, 16, "float32", 2, limit_bytes=20 * GIB).as_json())
    measured = {
        "outcome": "completed", "stage": "counting live storage", "error": None, "step_s": [1.0, 1.0],
        "losses": [5.0, 4.0], "live_bytes": live, "resident_bytes": live, "building_resident_bytes": 0,
        "between_steps_bytes": 0, "weight_bytes": 0, "trained_parameters": 0,
    }  # fmt: skip
    return task | measured | changes


def test_the_full_model_has_the_parameters_of_t0_3b() -> None:
    # a model of one layer and of two tell the size of 24, without gigabytes
    sizes = []
    for depth in (1, 2):
        with torch.device("meta"):
            sizes.append(
                sum(value.numel() for value in build_model(Task("apply", depth, 16, "bfloat16", 1)).parameters())
            )
    assert sizes[0] + 23 * (sizes[1] - sizes[0]) == 2_849_757_184


def test_prediction_is_the_line_through_the_two_smallest_depths() -> None:
    runs = [completed(t0_3b.ARTICLE, depth, 10 + 3 * depth) for depth in (1, 2)]
    runs += [completed(t0_3b.ARTICLE, 4, 20), completed(t0_3b.APPLY, 1, 999)]
    runs += [completed(t0_3b.ARTICLE, 3, 999, rank=64)]
    prediction = t0_3b.predict_live_bytes(runs, t0_3b.ARTICLE, 16, 24)
    assert prediction is not None
    assert prediction["predicted_bytes"] == 10 + 3 * 24
    assert (prediction["checked_at_depth"], prediction["error"]) == (4, pytest.approx(22 / 20 - 1))
    assert t0_3b.predict_live_bytes(runs, t0_3b.APPLY, 16, 24) is None
    assert t0_3b.predict_live_bytes(runs, t0_3b.ARTICLE, 64, 24) is None


def test_bars_hold_memory_to_lora_and_time_to_dora() -> None:
    runs = [
        completed(t0_3b.PEFT_LORA, 24, 100),
        completed(t0_3b.PEFT_DORA, 24, 200, step_s=[5.0, 4.0]),
        completed(t0_3b.APPLY, 24, 99, resident_bytes=106),
        completed(t0_3b.ARTICLE, 24, 0, outcome="out of memory"),
    ]
    (row,) = t0_3b.rows_of(runs, 24, {})
    met = {bar["what"]: bar["met"] for bar in row["bars"]}
    assert list(met.values()) == [True, True, False, True, True]
    assert row["records"]["lora_fast DoRA, apply"]["fault"] is None


def test_each_step_is_compared_with_pefts_of_the_same_number_also_if_it_died_afterwards() -> None:
    runs = [
        completed(t0_3b.PEFT_DORA, 24, 0, step_s=[60.0, 20.0], outcome="out of memory"),
        completed(t0_3b.APPLY, 24, 99, step_s=[10.0, 5.0, 4.0, 8.0], losses=[5.0, 4.0, 3.0, 2.0]),
    ]
    (row,) = t0_3b.rows_of(runs, 24, {})
    factor = next(bar for bar in row["bars"] if "each step" in bar["what"])
    assert (factor["measured"], factor["met"]) == (20 / 8, False)


@pytest.mark.parametrize("loss", [4.001, float("nan")])
def test_another_loss_than_pefts_is_a_fault_and_gets_no_ratio(loss: float) -> None:
    runs = [completed(t0_3b.PEFT_DORA, 24, 200), completed(t0_3b.APPLY, 24, 99, losses=[5.0, loss])]
    (row,) = t0_3b.rows_of(runs, 24, {})
    assert "at step 2" in row["records"]["lora_fast DoRA, apply"]["fault"]
    assert [bar["met"] for bar in row["bars"]] == [False]


def test_running_out_of_memory_is_a_result() -> None:
    task = Task(t0_3b.APPLY, 1, 4, "float32", 1, size="tiny", batch=8192, limit_bytes=GIB)
    result = t0_3b.run(task)
    assert result["outcome"] == "out of memory"
    assert result["stage"] == "step 1"
    assert "can't allocate memory" in result["error"]


def test_a_process_that_breaks_is_a_result() -> None:
    result = t0_3b.run(Task(t0_3b.APPLY, 1, 4, "no dtype", 1, size="tiny"))
    assert (result["outcome"], result["stage"]) == ("failed", "building the model")
    assert "no dtype" in result["error"]


HOLES = """
import sys, torch
from lora_fast.benchmarks.t0_3b_child import fix_mmap_threshold, status_bytes
if sys.argv[1] == "fixed":
    fix_mmap_threshold(4 << 20)
torch.ones(16 << 20, dtype=torch.uint8)  # freed, it raises glibc's own threshold
kept, blocks, before = [], [], status_bytes("VmData")
for _ in range(16):
    blocks.append(torch.ones(4 << 20, dtype=torch.uint8))
    kept.append(torch.ones(60_000, dtype=torch.uint8))  # behind the block
blocks.clear()
print(status_bytes("VmData") - before)
"""


def test_a_fixed_mmap_threshold_leaves_no_holes() -> None:
    grown = {
        how: int(subprocess.run([sys.executable, "-c", HOLES, how], check=True, capture_output=True).stdout)
        for how in ("fixed", "as it is")
    }
    assert grown["fixed"] < grown["as it is"] / 4, grown


def test_the_mmap_threshold_goes_to_every_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tasks = []

    def run(task: Task, on_event: object) -> dict[str, Any]:
        tasks.append(task)
        return completed(task.contender, task.depth, 1) | json.loads(task.as_json())

    monkeypatch.setattr(t0_3b, "run", run)
    t0_3b.main(["--dtype", "float32", "--mmap-threshold", "16", "--out", str(tmp_path)])
    assert {task.contender for task in tasks} == set(t0_3b.NAMES)
    assert {task.mmap_threshold_bytes for task in tasks} == {16 << 20}
    rows = json.loads((tmp_path / "t0-3b.json").read_text())["rows"]
    assert {row["mmap_threshold_bytes"] for row in rows} == {16 << 20}


@pytest.mark.slow
def test_a_small_run_writes_its_results_and_resumes(tmp_path: Path) -> None:
    options = ["--size", "tiny", "--depth", "2", "--growth", "1", "--steps", "2", "--ranks", "4", "--limit", "4"]
    options += ["--targets", "8", "--dtype", "float32", "--out", str(tmp_path)]
    assert t0_3b.main([*options, "--contenders", t0_3b.PEFT_DORA]) == 0
    assert t0_3b.main([*options, "--contenders", t0_3b.PEFT_DORA, t0_3b.APPLY, "--resume"]) == 0
    written = json.loads((tmp_path / "t0-3b.json").read_text())
    (row,) = written["rows"]
    assert len(written["runs"]) == 4
    assert {one["outcome"] for one in row["records"].values()} == {"completed"}
    ours, peft = row["records"]["lora_fast DoRA, apply"], row["records"]["PEFT DoRA, fp32 adapters"]
    assert ours["losses"] == pytest.approx(peft["losses"], rel=1e-5)
    assert 0 < ours["between_steps_bytes"] < ours["peak_bytes"] < ours["resident_bytes"]
    assert (tmp_path / "t0-3b.svg").read_text().startswith("<?xml")
    assert [bar["what"] for bar in row["bars"]][1:] == ["lora_fast DoRA, apply: each step × faster than PEFT DoRA's"]


def test_a_contender_that_died_in_its_first_step_has_a_line_in_the_table() -> None:
    from rich.console import Console

    from lora_fast.benchmarks import t0_3b_report

    died = {"outcome": "out of memory", "stage": "step 1", "fault": None, "step_ms": [], "prediction": None}
    row = {
        "title": "T0-3B",
        "limit_bytes": 20 * GIB,
        "records": {"article's class": died},
        "baseline": "",
        "left_out": {},
    }
    console = Console(width=140, record=True)
    console.print(t0_3b_report.records_table(row))
    assert "out of memory, step 1" in console.export_text()
