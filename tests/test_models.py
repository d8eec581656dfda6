"""The models people bring, at a small size: PEFT, PEFT + accelerate and lora_fast.apply compute the same."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the demo extra is not installed")
pytest.importorskip("transformers", reason="the demo extra is not installed")

import lora_fast.demo
from lora_fast import cli
from lora_fast.backends import mlp
from lora_fast.demo import compare_models, digits, models


@pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.name)
def test_all_ways_agree(case: models.ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "TOKENS_APART", 0)  # these batches are of few tokens
    missing = [name for name in case.requires if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    row = compare_models.compare(case, small=True, timed=False)
    ways = row.ways
    names = {compare_models.PEFT, compare_models.ACCELERATED, compare_models.APPLIED}
    if case.name.startswith(("T0-3B", "Llama", "Qwen3")):
        names.add(compare_models.RECOMPUTED)
    assert set(ways) == (names if case.only_linears else names - {compare_models.APPLIED})
    assert len({way.layers for way in ways.values()}) == 1
    assert ways[compare_models.PEFT].layers >= 4
    for name, way in ways.items():
        assert way.loss_difference <= 1e-5, name
        assert way.gradient_difference <= 1e-4, name


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def scores(one_thread: None) -> list[digits.Score]:
    pytest.importorskip("sklearn", reason="the demo extra is not installed")
    return digits.compare(epochs=1)


def test_the_perceptron_learns_the_same_through_every_code(scores: list[digits.Score]) -> None:
    assert len(scores) == 11
    for method, apart in digits.differences(scores).items():
        assert apart <= digits.LOSS_BAR, method
        assert len({score.accuracy for score in scores if score.method == method}) == 1, method
    assert all(score.losses[-1] < 0.8 * score.losses[0] for score in scores)


def test_the_rows_are_shown_and_written(
    scores: list[digits.Score], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lora_fast.demo, "MODELS_REQUIRED", ("peft", "rich", "sklearn", "transformers"))
    monkeypatch.setattr(models, "CASES", [case for case in models.CASES if "U-Net" in case.name or "ViT" in case.name])
    monkeypatch.setattr(digits, "compare", lambda **options: scores)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["demo", "--models", "--quick", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "models.json").read_text())
    assert [row["name"] for row in record["models"]] == [case.name for case in models.CASES]
    for row in record["models"]:
        assert row["name"] in out
        for way in row["ways"].values():
            assert way["record"]["median_ms"] > 0
            assert way["record"]["peak_bytes"] > 0
    assert record["missed"] == []

    monkeypatch.setitem(compare_models.BARS, torch.float32, (math.nan, math.nan))
    assert cli.main(["demo", "--models", "--quick", "--output", str(tmp_path)]) == 1
    assert "PEFT and lora_fast do not agree" in capsys.readouterr().out
