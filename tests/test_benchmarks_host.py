"""The host's time of a layer: that the command shows every part, and that the parts are what a step calls."""

from __future__ import annotations

import importlib.util
import os

import pytest

pytest.importorskip("triton")
pytest.importorskip("rich", reason="the benchmarks' tables need rich, of the demo extra")

import torch

from lora_fast import backends
from lora_fast.benchmarks import contenders as c, host, host_cpu

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's launches are not a GPU's", allow_module_level=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SIZE", 96)
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # other tests' too


def test_the_command_shows_every_layer_and_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["host", "--rounds", "1"])
    assert host.main() == 0
    out = capsys.readouterr().out
    for subject in host.SUBJECTS:
        there = subject.contender.missing() is None
        assert out.count(f"{subject.name} ") == (2 if there else 0)
    for heading in ("forward", "ours", "backward", "dispatch", "launches", "operators", "products", "our Python"):
        assert heading in out
    assert "µs" in out


def test_a_step_is_split_into_what_it_calls() -> None:
    rows = {row.name: row for row in host.rows(16, 1)}
    kept, frozen, lora = (
        rows[name] for name in ("LinearWithDoRA, kept norm", "LinearWithDoRA, frozen norm", "LinearWithLoRA")
    )
    assert rows["nn.Linear"].counts == rows["nn.Linear"].parts == {}
    for row in (kept, frozen, lora):
        assert set(row.parts) == set(host.PARTS)
        assert row.parts["dispatch"] > 0 < row.parts["operators"]  # launches are a difference, with its noise
        assert row.python == row.step - sum(row.parts.values())
        assert row.forward_ours + row.backward_ours == pytest.approx(row.step - row.parts["dispatch"])
    # of which the norm and its finish are the norm's
    assert kept.counts["launches"] == frozen.counts["launches"] + 2
    assert kept.counts["operators"] > frozen.counts["operators"]
    # of few tokens with a gain, a kernel makes the forward's product
    assert lora.counts["products"] == frozen.counts["products"] + 1
    for name in ("LinearWithLoRA, cuda", "LinearWithDoRA, kept norm, cuda", "LinearWithDoRA, frozen norm, cuda"):
        assert rows[name].counts["launches"] == 2  # a call of the extension each way
        assert rows[name].counts["products"] == 0
        assert set(rows[name].parts) == {"dispatch", "operators"}


def test_what_stands_for_the_ops_has_the_arguments_and_results_of_a_step() -> None:
    inputs = c.layer_inputs(96, 96, 16, 8, torch.bfloat16)
    with host.stubbed():
        module = c.dora("triton").build(inputs).module.train()
        found = host.counted(host.passes(module, inputs.x, inputs.grad_y)[1])
    forward, backward = found.calls
    assert forward.op is torch.ops.lora_fast.dora_linear_fwd.default
    assert backward.op is torch.ops.lora_fast.dora_linear_bwd.default
    for one, other in zip(host._empty(forward)(*forward.args), forward.outputs, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    for alone in host.dispatch_alone(found.calls):
        alone()
    assert inputs.x.grad is None


def test_the_command_for_a_cpu_shows_every_layer_and_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["host_cpu", "--rounds", "1"])
    if backends.get("cpu").missing():
        assert host_cpu.main() == 1
        return
    assert host_cpu.main() == 0
    out = capsys.readouterr().out
    for subject in host_cpu.SUBJECTS:
        there = subject.contender.missing() is None
        assert out.count(f"{subject.name} ") == (len(host_cpu.SIZES) if there else 0)
    for heading in host_cpu.HEADINGS:
        assert heading in out


def test_the_parts_of_a_forward_on_a_cpu_are_all_of_it() -> None:
    if missing := backends.get("cpu").missing():
        pytest.skip(missing)
    times = {"inference": 9.0, "module": 9.0, "function": 7.0, "op": 4.0, "backend": 3.5, "kernels": 2.0, "step": 30.0}
    parts = host_cpu.apart(times)
    assert sum(parts[part] for part in host_cpu.PARTS) == times["inference"] == parts["inference"]
    assert (parts["module"], parts["kernels"], parts["step"]) == (2.0, 2.0, 30.0)
    with_kernels = {"LinearWithLoRA", "LinearWithDoRA, kept norm", "LinearWithDoRA, frozen norm"}
    for subject in host_cpu.SUBJECTS:
        if subject.name in with_kernels:
            steps = host_cpu.steps_of(subject, 64)
            assert set(steps) >= {"inference", *host_cpu.PARTS}
            assert ("step" in steps) is ("backward's op" in steps) is not subject.frozen_norm


def test_nothing_stays_stubbed() -> None:
    before = backends.get("triton").takes("cpu"), torch.Tensor.__matmul__, torch.Tensor.addmm_
    list(host.rows(16, 1, [host.SUBJECTS[0], host.SUBJECTS[-1]]))
    assert before == (backends.get("triton").takes("cpu"), torch.Tensor.__matmul__, torch.Tensor.addmm_)


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(backends.get("triton"), "missing", lambda: "triton could not be imported: no")
    monkeypatch.setattr("sys.argv", ["host"])
    assert host.main() == 1
    assert "could not be imported" in capsys.readouterr().out


def test_a_layer_of_a_package_that_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    assert [row.name for row in host.rows(16, 1, host.SUBJECTS[:3])] == ["nn.Linear"]
