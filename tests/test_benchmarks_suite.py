"""`lora-fast bench` and `lora-fast report` on tiny sizes: what they keep, compare and show, not how fast it is."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("numpy", reason="the benchmarks need numpy, of the extras demo and test")
pytest.importorskip("rich", reason="the benchmarks' tables need rich, of the demo extra")

from lora_fast import cli
from lora_fast.benchmarks import bench, contenders as c, norms, records, roofline, suite
from lora_fast.benchmarks.memory import resident_growth
from lora_fast.benchmarks.registry import (
    ACCUMULATED,
    CHECKPOINTED,
    DECODE,
    FORWARD,
    GRADIENTS,
    INFERENCE,
    STEP,
    Workload,
)

TINY = [
    Workload("weight_norm", FORWARD, 48, 64, 0, rank=4),
    Workload("lora_compose", GRADIENTS, 48, 0, 8, rank=4),
    Workload("lora_linear", FORWARD, 48, 64, 8, rank=4),
    Workload("lora_linear", GRADIENTS, 48, 64, 8, rank=4),
]
LAYERS = [Workload("layer", mode, 48, 64, 8, rank=4) for mode in (CHECKPOINTED, ACCUMULATED, INFERENCE)]
MODELS = [
    Workload("Llama-like", STEP, 96, 64, 8, rank=4, depth=1),
    Workload("T5-like", CHECKPOINTED, 96, 64, 8, rank=4, depth=1),
    Workload("decoding", DECODE, 96, 64, 2, rank=4, depth=1),
]


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "quick_cases", lambda: TINY)
    rates = {"copy_bytes_per_second": 1e10, "flops_per_second": {"bfloat16": 1e11, "float32": 5e10}}
    monkeypatch.setattr(roofline, "machine", lambda budget_s: rates)


def bench_command(path: Path, *options: str) -> int:
    return cli.main(["bench", "--quick", "--budget", "0.001", "--json", str(path), *options])


@pytest.mark.parametrize("workload", [*TINY, *LAYERS], ids=lambda workload: workload.key)
def test_every_contender_of_an_op_or_a_layer_is_measured(workload: Workload) -> None:
    row = bench.run_row(workload, 0.001)
    assert all("not installed" in why or "quick" in why for why in row["left_out"].values()), row["left_out"]
    assert any(name.startswith("lora_fast") for name in row["records"])
    assert row["records"][row["baseline"]]["ratio"] == 1
    assert row["least_bytes"] > 0
    for name, record in row["records"].items():
        assert record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
        assert record["error"] is None or record["error"] < 0.02, name


@pytest.mark.slow
@pytest.mark.parametrize("workload", MODELS, ids=lambda workload: workload.key)
def test_every_contender_of_a_model_is_measured(workload: Workload) -> None:
    pytest.importorskip("transformers")
    row = bench.run_row(workload, 0.001)
    assert all("not installed" in why or "quick" in why for why in row["left_out"].values()), row["left_out"]
    assert {c.FROZEN.name, c.dora().name, c.DENSE.name, c.ARTICLE.name} <= row["records"].keys()


def test_the_factored_norm_is_the_norm() -> None:
    W, A, B = torch.randn(40, 30), torch.randn(4, 30), torch.randn(40, 4)
    torch.testing.assert_close(norms.factored_norm(W, A, B, 0.7), (W + 0.7 * B @ A).norm(dim=1), rtol=1e-4, atol=1e-4)


def test_the_suite_has_what_the_issue_asks_for() -> None:
    cases = suite.cases()
    assert len({case.key for case in cases}) == len(cases)
    assert {case.subject for case in cases} == set(suite.REGISTRY)
    assert {case.subject for case in suite.quick_cases()} == set(suite.REGISTRY)
    assert {case.rank for case in cases} >= {8, 16, 64, 384}
    assert {case.tokens for case in cases} >= {1, 16, 512, 8192}
    modes = {case.mode for case in cases if case.subject == "layer"}
    assert modes == {STEP, CHECKPOINTED, ACCUMULATED, INFERENCE}


def test_a_run_writes_json_and_csv(tiny_suite: None, tmp_path: Path) -> None:
    path, table = tmp_path / "bench.json", tmp_path / "bench.csv"
    assert bench_command(path, "--csv", str(table)) == 0
    content = json.loads(path.read_text())
    assert content["complete"]
    assert {"date", "device", "threads", "versions", "commit", "machine"} <= content.keys()
    assert [row["key"] for row in content["rows"]] == [workload.key for workload in TINY]
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(row["records"]) + len(row["left_out"]) for row in content["rows"])


def test_an_interrupted_run_goes_on(
    tiny_suite: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run_row, started = tmp_path / "bench.json", bench.run_row, []

    def interrupted(workload: Workload, *arguments: Any, **options: Any) -> dict[str, Any]:
        started.append(workload)
        if len(started) == 3:
            raise KeyboardInterrupt
        return run_row(workload, *arguments, **options)

    monkeypatch.setattr(bench, "run_row", interrupted)
    assert bench_command(path) == 130
    assert "interrupted; finished rows are in" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["rows"]) == 2
    assert bench_command(path) == 0
    assert started == [*TINY[:3], *TINY[2:]]
    assert len(json.loads(path.read_text())["rows"]) == len(TINY)


def test_results_of_other_conditions_are_moved_aside(tiny_suite: None, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert bench_command(path, "--only", "weight_norm") == 0
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"threads": 999}))
    assert bench_command(path, "--only", "weight_norm") == 0
    assert json.loads((tmp_path / "bench.previous.json").read_text())["threads"] == 999


def test_only_keeps_the_other_rows(tiny_suite: None, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert bench_command(path, "--only", "weight_norm") == 0
    assert bench_command(path, "--only", "compose") == 0
    assert len(json.loads(path.read_text())["rows"]) == 2


def row_with(milliseconds: float, peak: int = 1000) -> dict[str, Any]:
    def record(median: float) -> dict[str, Any]:
        return {"median_ms": median, "p20_ms": 0.99 * median, "p80_ms": 1.01 * median, "peak_bytes": peak}

    return {
        "key": "k",
        "title": "t",
        "baseline": "floor",
        "records": {"floor": record(1.0), "ours": record(milliseconds)},
    }


def test_changes_are_flagged_beyond_the_noise_only() -> None:
    (slower,) = [one for one in records.changes([row_with(2.0)], [row_with(2.4)]) if one.contender == "ours"]
    assert slower.moved
    assert slower.change == pytest.approx(0.2)
    assert not any(change.moved for change in records.changes([row_with(2.0)], [row_with(2.02)]))
    assert all(change.memory_moved for change in records.changes([row_with(2.0)], [row_with(2.0, 1100)]))


def test_against_a_file_and_a_git_ref(tiny_suite: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert bench_command(path, "--only", "weight_norm") == 0
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    for against in (str(path), "HEAD"):
        assert bench_command(path, "--only", "weight_norm", "--against", against) == 0
        assert "compared" in capsys.readouterr().out


def test_wrong_usage_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing.json")
    for arguments in (["bench", "--only", "no such row"], ["bench", "--against", missing], ["report", missing]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_the_report_is_one_file(tiny_suite: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, page, pictures = tmp_path / "bench.json", tmp_path / "report.html", tmp_path / "pictures"
    assert bench_command(path) == 0
    assert cli.main(["report", str(path), "--output", str(page), "--pictures", str(pictures)]) == 0
    text = page.read_text()
    assert "width=device-width" in text
    assert "predicted lower bound" in text
    assert "http" not in text.replace("data:", "").split("<body>")[0]
    assert 'src="data:image/svg+xml' in text
    assert all(workload.title in text for workload in TINY)


def test_resident_growth_sees_what_a_call_touches() -> None:
    growth = resident_growth(lambda: torch.ones(8 << 20))
    if growth is None:
        pytest.skip("the system does not tell the peak resident size")
    assert growth >= 30 << 20
