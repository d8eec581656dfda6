"""The GPU benchmark's own logic, and its rows at small sizes on the CPU, with a clock that is none; the cost model."""

from __future__ import annotations

import csv
from collections.abc import Mapping

import pytest
import torch

from lora_fast import functional
from lora_fast.benchmarks import contenders as c, cost, gpu, peft_model
from lora_fast.benchmarks.registry import INFERENCE, STEP, Case


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(steps: Mapping, budget_s: float) -> dict[str, dict[str, float]]:
        keys = ("median_ms", "p20_ms", "p80_ms", "host_ms", "peak_bytes", "rounds")
        for step in steps.values():
            step()
        return {name: dict.fromkeys(keys, 1.0) for name in steps}

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "names_of_ours", lambda: ["torch"])
    monkeypatch.setattr(gpu, "wall_ms", lambda step, calls=100: 1.0)
    monkeypatch.setattr(peft_model, "WIDTH", 64)
    monkeypatch.setattr(peft_model, "FEED_FORWARD", 96)


@pytest.mark.gpu
def test_a_step_of_the_peft_model_ends_when_the_device_has_finished() -> None:
    pytest.importorskip("peft")
    step = peft_model.step(peft_model.CASES[0], peft_model.adapted(dora=False))
    for _ in range(3):
        step()
        assert torch.cuda.current_stream().query()


@pytest.mark.usefixtures("without_gpu")
def test_rows_and_files(tmp_path) -> None:  # type: ignore[no-untyped-def]
    contenders = (c.FROZEN, c.dora(), c.dora("torch"), c.DENSE, c.PEFT_LORA)
    case = Case(
        STEP, 48, 64, 16, torch.bfloat16, contenders, c.dora().name, rank=4, at_most=1.3, faster={c.DENSE.name: 2.0}
    )
    results = [
        gpu.norm_row(48, 64, 4, 0.03, 0.0),
        gpu.compose_row("forward", 32, 48, 16, 0.0),
        gpu.compose_row("backward", 32, 48, 16, 0.0),
        gpu.layer_row(case, 0.0),
        gpu.layer_row(Case(INFERENCE, 48, 64, 4, torch.bfloat16, contenders[:3], c.dora().name, at_most=1.25), 0.0),
        gpu.eager_inference_row(2, 0.0, features=48),
        *(gpu.peft_row(case, peft_model.models, 0.0) for case in peft_model.CASES),
    ]
    for result in results:
        assert result["bars"]
        assert not [name for name in result["left_out"] if "PEFT" not in name], result["left_out"]
        gpu.show(result)
    frozen, dense = results[3]["bars"]
    assert (frozen["measured"], frozen["met"]) == (1.0, True)
    assert (dense["measured"], dense["met"]) == (1.0, False)
    gpu.write_csv(tmp_path / "gpu.csv", results)
    lines = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert len(lines) == sum(len(result["records"]) for result in results)
    assert {"contender", "median_ms", "host_ms", "peak_bytes", "least_bytes"} <= lines[0].keys()


def test_every_bar_of_the_issue_has_a_row() -> None:
    assert len(gpu.rows(0.0)) == 3 + 4 + 3 + 2 + 2 + 3 + 4


def test_the_peft_model_is_built_on_the_default_device() -> None:
    with torch.device("meta"):
        models = [peft_model.adapted(dora) for dora in (False, True)]
    assert {tensor.device.type for model in models for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_without_peft_its_rows_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = gpu.peft_row(peft_model.CASES[0], peft_model.models, 0.0)
    gpu.show(result)
    assert capsys.readouterr().out.count("left out: not installed: peft, transformers") == len(peft_model.CONTENDERS)
    assert result["records"] == {}
    assert result["bars"] == []


@pytest.mark.interp
@pytest.mark.usefixtures("without_gpu")
def test_both_paths_of_forward_are_right() -> None:
    result = gpu.path_row(cost.Size(20, 48, 64, 8), 0.0)
    assert list(result["records"]) == [c.FROZEN.name, "fused", "products"]
    assert result["left_out"] == {}


@pytest.mark.usefixtures("without_gpu")
def test_a_wrong_result_of_ours_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.lora_compose
    monkeypatch.setattr(functional, "lora_compose", lambda *a, **options: 1.02 * right(*a, **options))
    result = gpu.compose_row("forward", 32, 48, 16, 0.0)
    assert result["bars"] == []
    assert list(result["records"]) == ["copy"]
    (fault,) = gpu.faults([result])
    assert fault.startswith("composition forward, 32×48, rank 16: torch left out: wrong result: y has an RMS error")


def test_a_row_that_fails_is_a_fault_and_one_without_peft_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    failed = {"title": "failed: norm_row(1, 2)", "left_out": {"": "Traceback"}}
    without = gpu.peft_row(peft_model.CASES[0], peft_model.models, 0.0)
    other = {"title": "one layer", "left_out": {"PEFT DoRA": "wrong result: y"}}
    assert gpu.faults([failed, without, other]) == ["failed: norm_row(1, 2)"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert gpu.main() == 1
    assert "nothing was measured" in capsys.readouterr().out


SIZE = cost.Size(T=128, N=96, K=64, R=8)


@pytest.mark.parametrize("op", cost.PATHS)
def test_no_path_is_below_the_least(op: str) -> None:
    paths = cost.PATHS[op](SIZE)
    least = paths.pop("least")[""]
    paths.pop("frozen", None)  # does less: it has no adapter
    for name, path in paths.items():
        total = sum(path.values(), cost.Cost(0))
        assert total.bytes >= least.bytes, name
        assert total.flops >= 0.99 * least.flops, name


def test_the_counts_are_those_of_the_tensors() -> None:
    """x, W, y, product, lora_A and lora_B once each."""
    tensors = [(128, 64), (96, 64), (128, 96), (128, 96), (8, 64), (96, 8)]
    assert cost.least("lora_linear forward", SIZE).bytes == sum(2 * rows * columns for rows, columns in tensors)
    assert cost.least("weight_norm", SIZE).flops == 2 * 96 * 64 * 8


def test_time_is_the_slower_of_memory_and_arithmetic() -> None:
    device = cost.Device("a device", bandwidth=1e12, peak=1e14)
    assert device.milliseconds(cost.Cost(1e9, 1e10)) == pytest.approx(1.0)
    assert device.milliseconds(cost.Cost(1e9, 1e12)) == pytest.approx(10.0)


def test_the_table_is_printed_as_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    cost.main()
    out = capsys.readouterr().out
    assert "predicted for H200" in out
    assert "not measured" in out
    assert all(op in out for op in cost.PATHS)
