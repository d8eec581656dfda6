"""The GPU benchmark's own logic, and its rows at small sizes on the CPU, with a clock that is none; the cost model."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import lora_fast
from lora_fast import backends, functional
from lora_fast.benchmarks import (
    contenders as c,
    cost,
    gpu,
    gpu_first,
    gpu_mlp,
    gpu_rows,
    layer,
    peft_model,
    readme_gpu,
    step_cost,
)
from lora_fast.benchmarks.registry import INFERENCE, STEP, Case
from lora_fast.integrations import peft as integration


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(steps: Mapping, budget_s: float) -> dict[str, dict[str, float]]:
        keys = ("median_ms", "p20_ms", "p80_ms", "host_ms", "peak_bytes", "rounds")
        for step in steps.values():
            step()
        return {name: dict.fromkeys(keys, 1.0) for name in steps}

    for module in (gpu_rows, gpu_mlp):
        monkeypatch.setattr(module, "measure", measure)
        monkeypatch.setattr(module, "wall_ms", lambda step, calls=100: 1.0)
    monkeypatch.setattr(gpu_rows, "captured", lambda step: step)
    monkeypatch.setattr(gpu_rows, "names_of_ours", lambda: ["torch"])
    monkeypatch.setattr(backends.default, "_process_default", "torch")
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
        gpu_rows.norm_row(48, 64, 4, 0.03, 0.0),
        *(gpu_rows.quantised_norm_row(kind, 48, 64, 4, 0.0) for kind in ("nf4", "int8")),
        gpu_rows.compose_row("forward", 32, 48, 16, 0.0),
        gpu_rows.compose_row("backward", 32, 48, 16, 0.0),
        gpu_rows.layer_row(replace(case, contenders=(*contenders, c.lora())), 0.0, lora_at_most=1.18),
        gpu_rows.layer_row(
            Case(INFERENCE, 48, 64, 4, torch.bfloat16, contenders[:3], c.dora().name, at_most=1.25), 0.0
        ),
        gpu_rows.eager_inference_row(2, 0.0, features=48),
        gpu_rows.grouped_row(cost.Size(8, 48, 64, 4, L=3), 1.5, 0.0),
        gpu_rows.mlp_row(cost.Size(40, 48, 64, 4), 0.0),
        *(gpu_rows.peft_row(case, peft_model.models, 0.0) for case in peft_model.CASES),
    ]
    for result in results:
        assert result["bars"]
        assert not [name for name in result["left_out"] if "PEFT" not in name], result["left_out"]
        gpu.show(result)
    frozen, dense, memory, lora = results[5]["bars"]
    assert (memory["what"], memory["at_most"]) == ("peak memory beyond PEFT LoRA's, × [T, N]", 1.0)
    assert (lora["what"], lora["measured"], lora["met"]) == ("LoRA, × frozen linear", 1.0, True)
    assert (frozen["measured"], frozen["met"]) == (1.0, True)
    assert (dense["measured"], dense["met"]) == (1.0, False)
    gpu.write_csv(tmp_path / "gpu.csv", results)
    lines = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert len(lines) == sum(len(result["records"]) for result in results)
    assert {"contender", "median_ms", "host_ms", "peak_bytes", "least_bytes"} <= lines[0].keys()


def test_the_rows_and_their_budgets_are_those_that_the_docstring_counts() -> None:
    rows = gpu_rows.rows(1.0)
    assert len(rows) == 3 + 2 + 4 + 3 + 4 + 2 + 1 + 1 + 2 + 3 + 2
    models = [row for row in rows if row.func is gpu_rows.peft_row]
    assert sum(row.args[-1] for row in rows if row not in models) + len(peft_model.CONTENDERS) * 0.5 * len(models) == 38


def small(case: Case) -> Case:
    return replace(case, tokens=16, out_features=48, in_features=64, rank=4)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("case", gpu_rows.settings(), ids=lambda case: f"{case.dtype_name}, {case.setting}")
def test_the_step_as_users_train_it(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    result = gpu_rows.layer_row(small(case), 0.0)
    assert result["left_out"] == {}
    assert list(result["records"]) == [contender.name for contender in case.contenders]
    assert result["bars"] == []
    assert result["title"] == f"training step, 16 tokens, 48×64 {result['dtype']}, {result['setting']}, rank 4"
    assert all(record["frozen_ratio"] == record["peft_lora_ratio"] == 1.0 for record in result["records"].values())
    gpu.show(result)
    assert "1.00 × frozen  1.00 × PEFT LoRA" in capsys.readouterr().out


def test_the_peft_model_is_built_on_the_default_device() -> None:
    with torch.device("meta"):
        models = [peft_model.adapted(dora) for dora in (False, True)]
    assert {tensor.device.type for model in models for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_without_peft_its_rows_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = gpu_rows.peft_row(peft_model.CASES[0], peft_model.models, 0.0)
    gpu.show(result)
    assert capsys.readouterr().out.count("left out: not installed: peft, transformers") == len(peft_model.CONTENDERS)
    assert result["records"] == {}
    assert result["bars"] == []


@pytest.mark.interp
@pytest.mark.usefixtures("without_gpu")
def test_chunks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rows, "CHUNKS", (16, 32))
    seen: list[torch.Tensor] = []

    def measured(steps: dict, budget_s: float) -> dict:
        seen.extend(step().clone() for step in steps.values())
        return {name: {"median_ms": 1.0} for name in steps}

    monkeypatch.setattr(gpu_rows, "measure", measured)
    result = gpu_rows.chunk_row(cost.Size(40, 48, 64, 8), 0.0)
    assert list(result["records"]) == ["all tokens", "16 at a time", "32 at a time"]
    for y in seen[1:]:
        torch.testing.assert_close(y, seen[0], rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("without_gpu")
def test_a_wrong_result_of_ours_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.lora_compose
    monkeypatch.setattr(functional, "lora_compose", lambda *a, **options: 1.02 * right(*a, **options))
    result = gpu_rows.compose_row("forward", 32, 48, 16, 0.0)
    assert result["bars"] == []
    assert list(result["records"]) == ["copy"]
    (fault,) = gpu.faults([result])
    assert fault.startswith("composition forward, 32×48, rank 16: torch left out: wrong result: y has an RMS error")


def test_a_row_that_fails_is_a_fault_and_one_without_peft_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    failed = {"title": "failed: norm_row(1, 2)", "left_out": {"": "Traceback"}}
    without = gpu_rows.peft_row(peft_model.CASES[0], peft_model.models, 0.0)
    other = {"title": "one layer", "left_out": {"PEFT DoRA": "wrong result: y"}}
    assert gpu.faults([failed, without, other]) == ["failed: norm_row(1, 2)"]


PEFTS = (c.FROZEN, c.dora("torch"), c.ACCELERATED, c.ACCELERATED_LORA, c.PEFT_LORA)
LAYER = Case(STEP, 48, 64, 16, torch.bfloat16, PEFTS, rank=4)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.filterwarnings("ignore:lora_fast knows peft")
def test_a_peft_that_is_not_known_is_a_reason_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    monkeypatch.setattr(integration, "NEWEST", integration.OLDEST)
    results = [gpu_rows.layer_row(LAYER, 0.0), gpu_rows.peft_row(peft_model.CASES[0], peft_model.models, 0.0)]
    fast = [(c.ACCELERATED.name, c.ACCELERATED_LORA.name), (peft_model.LORA, peft_model.DORA)]
    for result, names in zip(results, fast, strict=True):
        assert set(result["left_out"]) == set(names)
        assert all(
            why.startswith("lora_fast knows peft 0.18 to 0.18, and this is") for why in result["left_out"].values()
        )
        assert result["bars"] == []
    assert c.PEFT_LORA.name in results[0]["records"]
    assert list(results[1]["records"]) == [peft_model.PEFT_LORA, peft_model.PEFT_DORA]
    assert gpu.faults(results) == []


@pytest.mark.usefixtures("without_gpu")
def test_a_peft_that_fails_is_a_reason_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    monkeypatch.delattr(peft, "get_peft_model")
    results = [gpu_rows.layer_row(LAYER, 0.0), gpu_rows.peft_row(peft_model.CASES[0], peft_model.models, 0.0)]
    assert list(results[0]["records"]) == [c.FROZEN.name, c.dora("torch").name]
    assert results[1]["records"] == {}
    for result in results:
        assert all(why.startswith(f"peft {peft.__version__} fails: ImportError") for why in result["left_out"].values())
    assert len(results[1]["left_out"]) == len(peft_model.CONTENDERS)
    assert gpu.faults(results) == []
    assert gpu_first.present(c.PEFT_LORA, layer.inputs_of(LAYER)) is None
    assert f"PEFT LoRA left out: peft {peft.__version__} fails" in capsys.readouterr().out


def test_a_layer_of_pefts_that_fails_in_forward_is_left_out() -> None:
    pytest.importorskip("peft")

    def build(inputs: c.LayerInputs) -> c.Layer:
        return c.Layer(torch.nn.Linear(3, 5))

    layers, left_out = layer.build([replace(c.PEFT_LORA, build=build)], layer.inputs_of(LAYER))
    assert layers == {}
    assert "fails: RuntimeError" in left_out[c.PEFT_LORA.name]


@pytest.mark.usefixtures("without_gpu")
def test_an_error_of_ours_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")

    def broken(model: torch.nn.Module) -> None:
        raise TypeError("ours")

    monkeypatch.setattr(lora_fast, "accelerate", broken)
    makers = [
        partial(gpu_rows.layer_row, LAYER, 0.0),
        partial(gpu_rows.peft_row, peft_model.CASES[0], peft_model.models, 0.0),
    ]
    results: list[dict] = []
    assert [fault.split("(")[0] for fault in gpu.run_rows(makers, results, lambda: None)] == [
        "failed: layer_row",
        "failed: peft_row",
    ]
    assert all("TypeError: ours" in result["left_out"][""] for result in results)


def test_rows_that_an_interrupt_cuts_off_are_told() -> None:
    def interrupted(title: str) -> dict:
        raise KeyboardInterrupt

    done = {"title": "done", "records": {}, "left_out": {}, "bars": []}
    results: list[dict] = []
    written: list[int] = []
    makers = [partial(lambda: done), partial(interrupted, "one"), partial(interrupted, LAYER)]
    wrong = gpu.run_rows(makers, results, lambda: written.append(len(results)))
    assert wrong == ["cut off: interrupted(one)", f"cut off: interrupted({LAYER.title})"]
    assert [result["title"] for result in results] == ["done", *wrong]
    assert written == [1, 3]


CI = Path(__file__).resolve().parent.parent / ".ci"


def test_tests_and_benchmark_end_within_300_seconds() -> None:
    tests, kill = (CI / "gpu").read_text(), (CI / "gpu-tests").read_text()
    limits = [
        re.search(r"gpu-tests .* (\d+) \|\|", tests),
        re.search(r"timeout -s INT -k (\d+)", kill),
        *re.finditer(r"timeout .*-s INT -k (\d+)", tests),
        *re.finditer(r"-k \d+ (\d+) ", tests),
    ]
    assert len(limits) == 4
    assert sum(int(match[1]) for match in limits if match) <= 300


@pytest.mark.parametrize("given", [(), ("",), ("a folder",)], ids=["unset", "empty", "set"])
def test_results_go_where_they_are_asked_for(given: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copytree(CI, tmp_path / ".ci")
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 1\necho "$@" >> "{calls}"\n')
    python.chmod(0o755)
    subprocess.run([tmp_path / ".ci" / "gpu", python, *given], check=True)
    tests, out = (given[0], f" --out {given[0]}") if any(given) else (".gpu", "")
    check, pytest_call, benchmark, *verdict = calls.read_text().splitlines()
    assert check == "benchmarks/commit.py"
    assert f"--failures {tests}/failures.txt" in pytest_call
    assert benchmark == f"-m lora_fast.benchmarks.gpu{out}"
    assert verdict == ([f"-m lora_fast.benchmarks.gpu_verdict --whole {tests}"] if out else [])
    assert (tmp_path / tests / "tests.log").exists()


@pytest.mark.parametrize("xdist", [True, False])
def test_tests_that_are_cut_off_are_counted(xdist: bool, tmp_path: Path) -> None:
    lines = {
        True: [
            "2 workers [40 items]",
            "tests/test_a.py::test[a b] ",
            "[gw1] [  2%] FAILED tests/test_a.py::test[a b] ",
        ],
        False: [
            "collecting ... collected 44 items / 4 deselected / 40 selected",
            "tests/test_a.py::test[a b] PASSED [ 2%]",
        ],
    }[xdist]
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(f"#!/bin/sh\n[ $1 = -m ] || exit 1\ncat <<'END'\n{chr(10).join(lines)}\nEND\nsleep 30\n")
    python.chmod(0o755)
    out.mkdir()
    (out / "failures.txt").write_text("of an earlier run\n")
    ran = subprocess.run([CI / "gpu-tests", python, out, "1"], capture_output=True, text=True, check=False)
    assert ran.returncode == 124
    assert ran.stdout == "cut off after 1 s: 1 of 40 tests ran\n"
    assert (out / "tests.log").read_text().endswith(ran.stdout)
    assert not (out / "failures.txt").exists()


@pytest.mark.usefixtures("without_gpu")
def test_the_pages_show_the_settings_beside_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    committed, page = readme_gpu._gpu_results(), readme_gpu.gpu()
    rows = [gpu_rows.layer_row(small(case), 0.0) for case in gpu_rows.settings()]
    monkeypatch.setattr(readme_gpu, "_gpu_results", lambda: committed | {"rows": committed["rows"] + rows})
    assert readme_gpu.gpu() == page
    settings = readme_gpu.gpu_settings()
    assert "|  | bfloat16 W, float32 adapters | bfloat16 W, float32 adapters, autocast to bfloat16 |" in settings
    assert "| **1.00** | **1.00** | **1.00** | **1.00** |" in settings


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
    """x, W, y, base, lora_A and lora_B once each."""
    tensors = [(128, 64), (96, 64), (128, 96), (128, 96), (8, 64), (96, 8)]
    assert cost.least("lora_linear forward", SIZE).bytes == sum(2 * rows * columns for rows, columns in tensors)
    assert cost.least("weight_norm", SIZE).flops == 2 * 96 * 64 * 8


def test_time_is_the_slower_of_memory_and_arithmetic() -> None:
    device = cost.Device("a device", bandwidth=1e12, peak=1e14)
    assert device.milliseconds(cost.Cost(1e9, 1e10)) == pytest.approx(1.0)
    assert device.milliseconds(cost.Cost(1e9, 1e12)) == pytest.approx(10.0)


def test_a_steps_kernels_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    """At the rates that an H200 reached the model gives what was measured there, for what has changed little since."""
    h200, _ = step_cost.REACHED
    size = cost.Size(8192, 4096, 4096, 16)
    dora = step_cost.step(size, h200, dora=True)
    assert dora["h"] == pytest.approx(23.6e-6, rel=0.01)
    assert dora["x Wᵀ"] == pytest.approx(345e-6, rel=0.03)
    for features, measured in ((4096, 1.47 * 695e-6), (8192, 1.20 * 2796e-6)):
        lora = step_cost.step(cost.Size(8192, features, features, 384), h200, dora=False)
        assert sum(lora.values()) == pytest.approx(measured, rel=0.03)
    step_cost.main()
    printed = capsys.readouterr().out
    assert "no step of these kernels was measured" in printed
    for rates in (step_cost.REACHED, step_cost.TARGETS):
        seconds = sum(step_cost.step(size, rates[0], dora=True).values())
        assert f"{1e6 * seconds:.1f}" in printed
        assert f"{seconds / step_cost.frozen(size, rates[0]):.2f}" in printed


def test_the_counted_steps_are_those_of_the_documentation() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    for line in (*step_cost.summary(step_cost.REACHED), *step_cost.summary(step_cost.TARGETS)):
        assert line in page


def test_the_step_is_counted_with_the_constants_of_the_plan() -> None:
    constants = pytest.importorskip("lora_fast.triton_kernels.constants")
    chosen = constants.PREDICTED
    assert (chosen.stacked_tokens, chosen.gemm_rank) == (step_cost.STACKED_TOKENS, step_cost.GEMM_RANK)
    assert chosen.gain_bwd_rank == step_cost.SUMS_RANK
    assert (chosen.gain_bwd_h.rank, chosen.gain_bwd_h.columns) == (cost.H_RANK, cost.H_COLUMNS)
    kernels = pytest.importorskip("lora_fast.triton_kernels.lora_gain_bwd")
    target = pytest.importorskip("lora_fast.triton_kernels.target").SM90
    for size in step_cost.SIZES:
        made = kernels.makes_h(size.T, size.N, size.R, torch.bfloat16, True, target)
        assert made == (cost.H_RANK >= size.R)


def test_the_table_is_printed_as_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    cost.main()
    out = capsys.readouterr().out
    assert "predicted for H200" in out
    assert "not measured" in out
    assert all(op in out for op in cost.PATHS)
