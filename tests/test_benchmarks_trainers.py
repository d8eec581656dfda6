"""The benchmark of trainers: what it counts, the row of a small model, and a model that computes wrongly."""

from __future__ import annotations

import functools
import itertools
from unittest import mock

import pytest
import torch

pytest.importorskip("peft", reason="the peft extra is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from lora_fast.benchmarks import alternation, trainers, trainers_child
from lora_fast.benchmarks.alternation import AFTER, BEFORE, Alternation

TINY = trainers_child.Sizes(width=128, inner=192, depth=1, tokens=40, channels=32, block=3, blocks=4)


def test_blocks_take_turns_and_warm_up_is_not_counted() -> None:
    switched = []
    blocks = Alternation(lambda: switched.append(AFTER), lambda: switched.append(BEFORE), block=3, blocks=6)
    assert blocks.steps == 18
    clock = (count**2 for count in itertools.count())
    with mock.patch.object(alternation.time, "perf_counter", side_effect=clock):
        for _ in range(blocks.steps):
            blocks.begin()
            blocks.end()
    assert switched == [BEFORE, AFTER] * 3
    # step n begins at (2n)² and ends at (2n + 1)²; the first two blocks and the first step of each are left out
    assert blocks.seconds == {BEFORE: [4 * n + 1 for n in (7, 8, 13, 14)], AFTER: [4 * n + 1 for n in (10, 11, 16, 17)]}
    records = blocks.records()
    assert records[BEFORE]["rounds"] == records[AFTER]["rounds"] == 4
    assert records[BEFORE]["median_ms"] == 43000.0


def test_a_loss_that_acceleration_changes() -> None:
    model, scale = torch.nn.Linear(1, 1, bias=False), [1.0]
    torch.nn.init.constant_(model.weight, 2.0)

    def check(factor: float) -> None:
        switches = [functools.partial(scale.__setitem__, 0, value) for value in (factor, 1.0)]
        trainers_child.check(Alternation(*switches, 2, 2), model, lambda: scale[0] * model.weight.sum())

    check(1.0)
    with pytest.raises(RuntimeError, match="the loss is 2 before, and 2.1 accelerated"):
        check(1.05)


@pytest.mark.slow
def test_a_row() -> None:
    row = trainers.row("Trainer", "DoRA", TINY)
    assert row["title"] == "Trainer, DoRA"
    assert row["records"].keys() == {BEFORE, AFTER}
    assert trainers.as_table([row]).splitlines()[2].startswith("| Trainer, DoRA | ")
    for record in row["records"].values():
        assert record["rounds"] == 2
        assert record["peak_bytes"] > 0
        assert 0 < record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]


@pytest.mark.slow
def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Nobody, DoRA: .*KeyError: 'Nobody'"):
        trainers.row("Nobody", "DoRA", TINY)
