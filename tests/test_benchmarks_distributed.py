"""The benchmark of distributed training steps: what it counts, checks and leaves out, on a tiny model."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parallel_helpers import together
from torch import Tensor

pytest.importorskip("rich", reason="the benchmarks' tables need rich, of the demo extra")
pytest.importorskip("peft", reason="the peft extra is not installed")
pytest.importorskip("transformers", reason="the demo extra is not installed")

from lora_fast import functional
from lora_fast.benchmarks import bench_distributed, collectives, distributed_engines, distributed_model as d
from lora_fast.benchmarks.peft_model import DORA, LORA, PEFT_DORA, PEFT_LORA

TINY = d.Size(width=64, feed_forward=192, depth=2, heads=2, tokens=8, rank=4)
MAGNITUDES = 4 * TINY.depth * (5 * TINY.width + 2 * TINY.feed_forward)  # bytes: float32, of seven linears a layer
ENGINES = {engine.name: engine for engine in distributed_engines.ENGINES}
OF_TORCH = [engine for engine in ENGINES.values() if engine.library == "torch"]


def test_a_ring() -> None:
    counts = {
        "all-gather": {"messages": 3, "bytes": 1600},
        "reduce-scatter": {"messages": 1, "bytes": 800},
        "all-reduce": {"messages": 2, "bytes": 160},
    }
    assert collectives.ring(counts, 1) == {"messages": 0, "bytes": 0}
    assert collectives.ring(counts, 2) == {"messages": 3 + 1 + 4, "bytes": 800 + 400 + 160}
    assert collectives.ring(counts, 8) == {"messages": 7 * (3 + 1 + 4), "bytes": 7 * (200 + 100 + 2 * 20)}
    with pytest.raises(KeyError):
        collectives.ring({"all-to-all": {"messages": 1, "bytes": 1}}, 8)


def check_counting() -> None:
    own, whole = torch.ones(3), torch.ones(6)
    with collectives.counted() as counts:
        dist.all_gather_into_tensor(whole, own)
        dist.reduce_scatter_tensor(own, whole)
        dist.all_reduce(whole)
        dist.all_gather([own.clone(), own.clone()], own)
    assert counts == {
        "all-gather": {"messages": 2, "bytes": 48},
        "reduce-scatter": {"messages": 1, "bytes": 24},
        "all-reduce": {"messages": 1, "bytes": 24},
    }
    with pytest.raises(RuntimeError, match="nobody has said how to count it"), collectives.counted():
        dist.barrier()


def added(record: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """By how much ``record``'s messages and bytes are more than ``other``'s, by collective, where they are."""
    pairs = {kind: (record["collectives"][kind], count) for kind, count in other["collectives"].items()}
    assert record["collectives"].keys() == pairs.keys()
    found = {
        kind: (more["messages"] - less["messages"], more["bytes"] - less["bytes"])
        for kind, (more, less) in pairs.items()
    }
    return {kind: change for kind, change in found.items() if change != (0, 0)}


def check_engine(engine: distributed_engines.Engine) -> None:
    records, left_out = d.measured(engine, TINY, budget_s=0.1)
    assert records.keys() | left_out.keys() == d.CONTENDERS.keys()
    if engine.name.endswith("per linear"):
        assert left_out.keys() == {PEFT_DORA}
        assert {"FSDP2": "DTensor", "FSDP1": "must match"}[engine.name[:5]] in left_out[PEFT_DORA]
    else:
        assert left_out == {}
        assert added(records[DORA], records[PEFT_DORA]) == {}
    assert added(records[LORA], records[PEFT_LORA]) == {}
    assert added(records[d.APPLIED], records[DORA]) == {}
    # a unit that is gathered in forward and in backward
    gathered = MAGNITUDES // 2 if engine.name.endswith("bfloat16") else MAGNITUDES
    magnitudes = {"all-gather": (0, 2 * gathered), "reduce-scatter": (0, gathered)}
    wanted = {"all-reduce": (0, MAGNITUDES)} if engine.name == "DDP" else magnitudes
    assert added(records[DORA], records[PEFT_LORA]) == wanted
    for record in records.values():
        assert 0 < record["at_rest_bytes"] < record["peak_bytes"]
        assert record["rounds"] >= 8
        assert record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]


def check_that_a_wrong_model_fails() -> None:
    dora_linear = functional.dora_linear

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        return 1.2 * dora_linear(*arguments, **options)

    with (
        mock.patch.object(functional, "dora_linear", wrong),
        pytest.raises(RuntimeError, match=f"{DORA}: RMS error .* of the output against float64"),
    ):
        d.measured(ENGINES["DDP"], TINY, budget_s=0.1)


def check_that_a_wrong_gradient_fails() -> None:
    """Of which the output knows nothing."""
    gradient = distributed_engines.Placed.gradient
    with (
        mock.patch.object(distributed_engines.Placed, "gradient", lambda placed: 1.5 * gradient(placed)),
        pytest.raises(RuntimeError, match=f"{LORA}: RMS error .* of the gradient against float64"),
    ):
        d.measured(ENGINES["DDP"], TINY, budget_s=0.1)


def check_all() -> None:
    check_counting()
    check_that_a_wrong_model_fails()
    check_that_a_wrong_gradient_fails()
    for engine in OF_TORCH:
        check_engine(engine)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    together(2, tmp_path, check_all)


@pytest.mark.slow
def test_rows() -> None:
    missing = dataclasses.replace(ENGINES["ZeRO-3"], library="nobody_has_this")
    measured, left_out = d.run([(ENGINES["DDP"], TINY), (missing, TINY)], budget_s=0.1)
    assert measured["title"] == "DDP, training step, 8 tokens a rank"
    assert measured["records"].keys() == d.CONTENDERS.keys()
    assert len(measured["bars"]) == 4
    assert left_out["left_out"] == dict.fromkeys(d.CONTENDERS, "nobody_has_this is not installed")
    assert left_out["records"] == {}
    assert left_out["bars"] == []
    assert bench_distributed.records_table([measured, left_out]).row_count == 2 * len(d.CONTENDERS)
    assert bench_distributed.sent_table([measured, left_out]).row_count == len(d.CONTENDERS)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("name", ["ZeRO-2", "ZeRO-3"])
def test_zero(name: str) -> None:
    (row,) = d.run([(ENGINES[name], TINY)], budget_s=0.1)
    assert row["records"].keys() >= {PEFT_LORA, PEFT_DORA, LORA, DORA, d.APPLIED}
    assert added(row["records"][LORA], row["records"][PEFT_LORA]) == {}
    assert added(row["records"][d.APPLIED], row["records"][DORA]) == {}


def test_bars() -> None:
    records = {
        name: {"median_ms": ms, "peak_bytes": size}
        for name, ms, size in ((PEFT_LORA, 10.0, 100), (DORA, 9.0, 103), (d.APPLIED, 11.0, 104))
    }
    assert [(round(bar.measured, 2), bar.met) for bar in d.bars(records)] == [
        (0.9, True),
        (1.03, True),
        (1.1, False),
        (1.04, False),
    ]
    del records[PEFT_LORA]
    assert d.bars(records) == []
