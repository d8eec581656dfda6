"""The benchmarks' own logic: what the clock and the memory count see, the correctness gate, the table."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("numpy", reason="the benchmarks need numpy, of the extras demo and test")
pytest.importorskip("rich", reason="the benchmarks' tables need rich, of the demo extra")

from lora_fast.benchmarks import commit, contenders as c, layer, report, without_amx
from lora_fast.benchmarks.gate import Gate, error_fault
from lora_fast.benchmarks.registry import FROZEN, INFERENCE, NORM, STEP, Bar, Case, Row
from lora_fast.benchmarks.runner import Record, alternate, measure
from lora_fast.testing import peak_bytes, scratch_peak_bytes

N, K, R = 96, 64, 4


def small_case(mode: str = STEP, **changes: object) -> Case:
    contenders = (c.FROZEN, c.dora(), c.DENSE)
    case = Case(
        mode, N, K, 8, torch.bfloat16, contenders, c.dora().name, rank=R, at_most=1.2, faster={c.DENSE.name: 2.0}
    )
    return dataclasses.replace(case, **changes)  # type: ignore[arg-type]


def test_peak_memory_catches_a_dense_temporary() -> None:
    weight = torch.randn(512, 512)

    def dense() -> torch.Tensor:
        return (weight * 2).sum(dim=1)

    def in_place() -> torch.Tensor:
        return weight.mul_(1.0).sum(dim=1)

    for step in (dense, in_place):
        step()
    assert weight.nbytes <= peak_bytes(dense) <= 1.1 * weight.nbytes
    assert peak_bytes(in_place) <= 0.1 * weight.nbytes


def test_peak_memory_is_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            torch.ones(1000, 1000)

    def together() -> list[torch.Tensor]:
        return [torch.ones(1000, 1000) for _ in range(5)]

    assert peak_bytes(one_after_the_other) < 1.5 * 4e6
    assert peak_bytes(together) >= 5 * 4e6


@pytest.mark.native
def test_peak_memory_adds_native_scratch_to_what_is_live_with_it(ops) -> None:
    weight, lora_A, lora_B = torch.randn(1536, 1280), torch.randn(8, 1280), torch.randn(1536, 8)

    def kernel() -> None:
        ops.weight_norm_fwd(weight, lora_A, lora_B, 1.0, True)

    def beside(scratch: int) -> None:
        held = torch.empty(scratch, dtype=torch.uint8)
        kernel()
        del held

    def after(scratch: int) -> None:
        kernel()
        torch.empty(scratch, dtype=torch.uint8)

    kernel()
    scratch, norm = scratch_peak_bytes(kernel), 1536 * 4
    assert scratch > 4 * norm
    assert scratch <= peak_bytes(kernel) <= scratch + 2 * norm
    assert 2 * scratch <= peak_bytes(lambda: beside(scratch)) <= 2 * scratch + 2 * norm
    assert scratch <= peak_bytes(lambda: after(scratch)) <= scratch + 2 * norm


def test_peak_memory_tells_the_dense_norm_from_ours() -> None:
    inputs = c.layer_inputs(512, 512, 4, 1, torch.float32)
    steps, left_out = layer.norm_steps(inputs)
    assert not left_out
    for step in steps.values():
        step()
    assert peak_bytes(steps["dense B@A"]) >= inputs.weight.nbytes
    assert peak_bytes(steps["weight_norm"]) < inputs.weight.nbytes


def test_calls_alternate_and_slow_ones_are_spread() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in ("fast", "slow")}
    fractions: list[float] = []
    samples = alternate(steps, {"fast": 12, "slow": 3}, on_progress=fractions.append)
    assert [len(samples["fast"]), len(samples["slow"])] == [12, 3]
    assert fractions == pytest.approx([turn / 12 for turn in range(1, 13)])
    places = [index for index, name in enumerate(calls) if name == "slow"]
    assert all(3 <= later - earlier <= 7 for earlier, later in itertools.pairwise(places))


def test_order_changes_from_round_to_round() -> None:
    calls: list[str] = []
    alternate({name: lambda name=name: calls.append(name) for name in "abc"}, dict.fromkeys("abc", 20))
    rounds = ["".join(calls[start : start + 3]) for start in range(0, 60, 3)]
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) == 6


def test_measure_gives_time_and_memory_in_one_record() -> None:
    def step() -> torch.Tensor:
        time.sleep(0.002)
        return torch.ones(1000)

    record = measure({"step": step}, budget_s=0.01, min_rounds=3, max_rounds=4)["step"]
    assert 2 <= record.p20_ms <= record.median_ms <= record.p80_ms
    assert record.rounds in (3, 4)
    assert record.peak_bytes >= 4000


@pytest.mark.parametrize(
    "contender",
    [c.FROZEN, c.ARTICLE, c.DENSE, c.lora("torch"), c.dora("torch"), c.PEFT_LORA, c.PEFT_LORA_FP32, c.PEFT_DORA,
     c.PEFT_DORA_FP32],
    ids=lambda contender: contender.name,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_contender_passes_the_gate(contender: c.Contender, dtype: torch.dtype) -> None:
    if missing := contender.missing():
        pytest.skip(f"{missing}, which {contender.name} needs, is not installed")
    inputs = c.layer_inputs(N, K, R, 8, dtype)
    assert Gate(inputs).fault(contender, contender.build(inputs)) is None


@pytest.mark.parametrize("contender", [c.dora("torch"), c.lora("torch"), c.ACCELERATED, c.PEFT_LORA, c.PEFT_DORA_FP32],
                         ids=lambda contender: contender.name)  # fmt: skip
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_the_gate_knows_dropout(contender: c.Contender, autocast: torch.dtype | None) -> None:
    """The contender's own mask passes; no mask, another mask, and the other form of DoRA don't."""
    if missing := contender.missing():
        pytest.skip(f"{missing}, which {contender.name} needs, is not installed")
    inputs = c.layer_inputs(N, K, R, 8, torch.float32, dropout=0.05, autocast=autocast)
    gate, built = Gate(inputs), contender.build(inputs)
    assert built.keeps is not None
    assert gate.fault(contender, built) is None
    without = contender.build(dataclasses.replace(inputs, dropout=0.0))
    another = dataclasses.replace(built, keeps=lambda: built.keeps().roll(1, 0))
    for wrong in (dataclasses.replace(without, keeps=built.keeps), another):
        assert "has an RMS error" in str(gate.fault(contender, wrong)) or "largest" in str(gate.fault(contender, wrong))
    if contender.formula == "dora":
        other_form = dataclasses.replace(contender, drops_base=not contender.drops_base)
        assert gate.fault(other_form, built) is not None
    with pytest.raises(ValueError, match="contender: dense B@A has no dropout"):
        gate.fault(c.DENSE, c.DENSE.build(inputs))


@pytest.mark.parametrize("wrong", ["scaling", "axis", "detach_norm", "magnitude"])
def test_the_gate_catches_another_function(wrong: str) -> None:
    inputs = c.layer_inputs(N, K, R, 8, torch.float32)
    contender, built = c.DENSE, c.DENSE.build(inputs)
    if wrong == "scaling":
        built.module.scaling = 1.0  # type: ignore[assignment]
    elif wrong == "magnitude":
        with torch.no_grad():
            built.trained["magnitude"][0].mul_(1.001)
    elif wrong == "axis":
        contender, built = dataclasses.replace(c.ARTICLE, detach_norm=True, axis="output"), c.ARTICLE.build(inputs)
    else:
        contender = dataclasses.replace(c.DENSE, detach_norm=False)
    assert Gate(inputs).fault(contender, built) is not None


def test_the_gate_holds_ours_to_the_budget_and_sees_nan() -> None:
    truth = torch.ones(1000, dtype=torch.float64)
    eager = truth.float() + 1e-3
    off = truth.float() + 1.5e-3
    assert error_fault("y", off, eager, truth, ours=True) is not None
    assert error_fault("y", off, eager, truth, ours=False) is None
    off[0] = float("nan")
    assert error_fault("y", off, eager, truth, ours=False) is not None


def test_a_contender_that_is_wrong_or_missing_gets_no_time() -> None:
    def build_wrong(inputs: c.LayerInputs) -> c.Layer:
        return c.Layer(c.frozen_linear(2 * inputs.weight))

    wrong = c.Contender("wrong", build_wrong, "frozen")
    absent = dataclasses.replace(c.FROZEN, name="absent", requires="no_such_package")
    row = layer.run(small_case(INFERENCE, contenders=(c.FROZEN, wrong, absent)), budget_s=0.001)
    assert list(row.records) == [FROZEN]
    assert "wrong result" in row.left_out["wrong"]
    assert row.left_out["absent"] == "no_such_package is not installed"


def test_a_step_that_changes_nothing_is_refused() -> None:
    inputs = c.layer_inputs(N, K, R, 8, torch.float32)
    built = c.dora().build(inputs)
    layer.training_step(built, inputs)
    for parameter in built.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RuntimeError, match="left lora_A or lora_B as it was"):
        layer.training_step(built, inputs)


@pytest.mark.parametrize("mode", [STEP, INFERENCE, NORM])
def test_a_row_and_its_file(mode: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    case = small_case(mode)
    if mode == NORM:
        case = dataclasses.replace(case, contenders=(), subject="weight_norm", faster={}, memory_fraction=1 / 16)
    row = layer.run(case, budget_s=0.001)
    assert {FROZEN, case.subject} <= row.records.keys()
    assert not row.left_out
    assert len(row.bars()) == 2
    path = tmp_path / "results" / "layer.json"
    report.write_json(path, report.provenance() | {"rows": [report.row_as_dict(row)]})
    written = json.loads(path.read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert written["threads"] == torch.get_num_threads()
    assert written["rows"][0]["records"][case.subject].keys() == {
        "median_ms", "p20_ms", "p80_ms", "rounds", "peak_bytes"
    }  # fmt: skip


def test_bars_are_ratios_of_medians() -> None:
    def record(milliseconds: float) -> Record:
        return Record(milliseconds, milliseconds, milliseconds, 5, 1024)

    case = small_case()
    row = Row(case, {FROZEN: record(10), case.subject: record(13), c.DENSE.name: record(39)}, {})
    frozen, dense = row.bars()
    assert (frozen.measured, frozen.met) == (pytest.approx(1.3), False)
    assert (dense.measured, dense.met) == (pytest.approx(3.0), True)
    assert Bar("", 1.2, 1.2, at_most=True).met
    assert report.bars_table([row], "title").row_count == 2
    assert Row(case, {FROZEN: record(10)}, {case.subject: "wrong"}).bars() == []


@pytest.mark.parametrize(
    ("amx", "dora", "lora", "norms", "float32"),
    [
        (True, [1.20, 1.45, None, 1.10, None], [1.10, None, None], [1.0, 2.5], [1.15, None, None, None, None]),
        (False, [1.15, 1.40, 1.50, 1.10, 1.15], [None, None, None], [0.9, 2.9], [1.10, 1.35, 2.7, 1.12, 1.4]),
    ],
    ids=["with AMX", "without"],
)
def test_the_speed_table_has_the_promised_rows(
    monkeypatch: pytest.MonkeyPatch, amx: bool, dora: list, lora: list, norms: list, float32: list
) -> None:
    monkeypatch.setattr(without_amx, "used", lambda: amx)
    cases, steps = layer.speed_cases(), [(STEP, 512), (STEP, 16), (STEP, 1)]
    rows = [*steps, (INFERENCE, 16), (INFERENCE, 1), *steps, *steps, (INFERENCE, 16), (INFERENCE, 1)]
    assert [(case.mode, case.tokens) for case in cases] == [*rows, (NORM, 16), (NORM, 16)]
    assert [case.at_most for case in cases] == [*dora, *lora, *float32, *norms]
    assert {(case.dtype, case.out_features) for case in cases} == {(torch.bfloat16, 4096), (torch.float32, 2048)}
    assert all(case.subject in {contender.name for contender in case.contenders} for case in cases[:-2])
    beside_peft = [case.faster.get(c.PEFT_LORA.name) for case in cases[5:8]]
    assert beside_peft == ([1.0, None, None] if amx else [1.0, 1.0, 1.0])


def test_contenders_share_the_frozen_weight() -> None:
    inputs = c.layer_inputs(N, K, R, 2, torch.float32)
    for contender in (c.FROZEN, c.ARTICLE, c.DENSE, c.dora("torch")):
        linear = contender.build(inputs).module
        linear = linear if isinstance(linear, nn.Linear) else linear.get_submodule("linear")
        assert linear.weight.data_ptr() == inputs.weight.data_ptr()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_tells_changes_to_the_sources_and_not_to_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.delenv(commit.VARIABLE, raising=False)
    assert commit.commit_of(tmp_path) is None
    source, result = tmp_path / "kernel.py", tmp_path / "benchmarks" / "results" / "cpu" / "layer.json"
    result.parent.mkdir(parents=True)
    for path in (source, result):
        path.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "Begin")
    head = commit.commit_of(tmp_path)
    assert head is not None
    assert re.fullmatch("[0-9a-f]{12}", head)
    result.write_text("2")
    assert commit.commit_of(tmp_path) == head
    source.write_text("2")
    assert commit.commit_of(tmp_path) == f"{head}+"
    monkeypatch.setenv(commit.VARIABLE, head[:7])
    assert commit.commit_of(tmp_path) == f"{head}+"
    monkeypatch.setenv(commit.VARIABLE, "0123456789+")
    with pytest.raises(ValueError, match=rf"^LORA_FAST_COMMIT: got '0123456789\+', expected '{head}\+', the commit of"):
        commit.commit_of(tmp_path)


def test_without_git_the_variable_tells_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("6fb3823", "6fb3823+", 40 * "a"):
        monkeypatch.setenv(commit.VARIABLE, given)
        assert commit.commit_of(tmp_path) == given
    for wrong in ("", "main", "6fb382", 41 * "a", "6fb3823++", "6FB3823"):
        monkeypatch.setenv(commit.VARIABLE, wrong)
        with pytest.raises(ValueError, match=f"^LORA_FAST_COMMIT: got {re.escape(repr(wrong))}, expected a commit"):
            commit.commit_of(tmp_path)
