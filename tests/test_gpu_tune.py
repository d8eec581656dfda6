"""The constants of the choices by size: what the sweeps try, who wins, and the file that is made of it."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton")
import torch
from launch_sweep import skipped_products
from triton.runtime.jit import JITFunction

from lora_fast import stacked
from lora_fast.benchmarks import gpu_constants, gpu_sweeps, gpu_tune
from lora_fast.triton_kernels import aot, constants
from lora_fast.triton_kernels.target import SM80, SM90, SM100, pretended

SWEEPS = {make.__name__: make for make in gpu_sweeps.sweeps()}


def test_every_constant_is_swept() -> None:
    assert sorted(gpu_tune.NAMES) == sorted(field.name for field in fields(constants.Constants))


def test_the_documentation_counts_them() -> None:
    count = sum(len(sweep.values) * len(sweep.calls) for sweep in (make() for make in SWEEPS.values()))
    page = (gpu_tune.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert f"{count:,} combinations of value and size" in page


@pytest.mark.parametrize("name", sorted(SWEEPS.keys() - {"host_bound", "operators_bound", "norm_backend"}))
def test_the_values_are_read_by_the_choices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other values launch other kernels, tiles, stages or grids."""
    monkeypatch.setattr(stacked, "DEVICES", ("cpu",))
    sweep = SWEEPS[name]()
    assert sweep.constant == name
    assert len(sweep.values) > 1
    seen = {repr(value): launched(sweep, replace(constants.of(SM90), **{name: value})) for value in sweep.values}
    assert any(seen.values())
    assert len(set(map(repr, seen.values()))) == len(sweep.values)


def launched(sweep: gpu_sweeps.Sweep, chosen: constants.Constants) -> list[tuple[str, Any]]:
    """(kernel, grid, settings) of each launch of the sweep's calls, on a GPU that need not be here."""
    found: list[tuple[str, Any]] = []

    def run(self: JITFunction, *args: Any, grid: Any, **kwargs: Any) -> None:
        settings = {key: value for key, value in kwargs.items() if isinstance(value, (int, str))}
        found.append((self.__name__, (grid, settings)))

    with aot.recorded(SM90), skipped_products(), constants.instead(chosen), mock.patch.object(JITFunction, "run", run):
        for call in sweep.calls.values():
            call()
    return found


@pytest.mark.parametrize(
    ("constant", "of_triton", "of_cuda", "ops"),
    [
        ("host_bound", (1 << 16) - 1, 1 << 16, ["lora_linear_fwd", "lora_linear_bwd", "dora_linear_fwd"]),
        ("norm_backend", "triton", "cuda", ["weight_norm_fwd"]),
    ],
)
def test_the_choice_of_a_backend_is_read_by_the_plans(
    constant: str, of_triton: Any, of_cuda: Any, ops: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_fast import backends
    from lora_fast.backends import explain, registry

    calls = explain.example_calls(explain.Size(16, 64, 64, 4, torch.bfloat16), "base")
    on_a_gpu = (backends.get("cuda"), backends.get("triton"), backends.get("torch"))
    monkeypatch.setattr(registry, "_candidates", lambda device_type: on_a_gpu)
    for value, backend in ((of_triton, "triton"), (of_cuda, "cuda")):
        with constants.instead(replace(constants.PREDICTED, **{constant: value})), pretended(SM90):
            assert {registry.plan_of(op, calls[op])[0] for op in ops} == {backend}
            assert registry.plan_of("lora_compose_fwd", calls["lora_compose_fwd"])[0] == "triton"


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_the_plans_ask_the_constants_of_the_gpu_at_hand(capability: tuple[int, int], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from lora_fast.backends import device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = constants.of_capability(device._capability.__wrapped__(torch.device("cuda")))
    assert found == (constants.MEASURED if capability == (9, 0) else constants.PREDICTED)


def test_what_was_measured_holds_for_its_compute_capability() -> None:
    document = json.loads(constants.FILE.read_text(encoding="utf-8"))
    assert constants.of(SM90) == constants.MEASURED
    assert constants.of(SM80) == constants.of(SM100) == constants.PREDICTED
    for name, found in document["constants"].items():
        plain = found["value"]
        assert {"device", "source"} < found.keys()
        assert gpu_constants.plain(getattr(constants.MEASURED, name)) == plain
        assert constants.value(name, plain) == getattr(constants.MEASURED, name)


def test_constants_in_the_place_of_others_end_with_the_block() -> None:
    from lora_fast.triton_kernels.lora_compose_fwd import lora_compose_fwd_config

    def rows() -> int:
        return lora_compose_fwd_config(512, 512, 16, 2, True, SM90).BLOCK_M

    before = rows()
    other = replace(constants.PREDICTED, compose_low=constants.Block(2 * before, 64, 64, 4, 2))
    with constants.instead(other):
        assert rows() == 2 * before
        assert constants.of(SM80) == other
    assert rows() == before


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("no_such_constant", 3),
        ("gemm_rank", "128"),
        ("gemm_rank", None),
        ("gemm_rank", True),
        ("norm_backend", 1),
        ("host_bound", "2048"),
        ("compose_low", {"rows": "64", "columns": 2, "rank": 3, "num_warps": 4, "num_stages": 5}),
        ("compose_low", {"rows": 64}),
        ("compose_low", 64),
        ("few_tokens", {"rows": 1, "columns": 2, "rank": 3, "num_warps": 4, "num_stages": 5}),
    ],
)
def test_a_constant_that_is_none_is_refused(name: str, plain: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.*expected"):
        constants.value(name, plain)


def records(**us: float) -> list[dict[str, Any]]:
    return [{"value": int(name[1:]), "us": {"a": time, "b": time}, "difference": 0.001} for name, time in us.items()]


TODAY = {"a": 100.0, "b": 100.0}


def test_the_fastest_that_is_right_wins() -> None:
    tried = records(v1=90.0, v2=60.0, v3=70.0, v4=50.0)
    tried[1]["difference"] = 0.5
    tried[3]["failed"] = "out of shared memory"
    assert gpu_constants.winner(tried, TODAY, 0) == 3
    assert [record["value"] for record in gpu_constants.best(tried, TODAY, 5)] == [3, 1]


def test_noise_and_nothing_right_leave_todays_value() -> None:
    assert gpu_constants.winner(records(v1=99.0), TODAY, 0) == 0
    wrong = records(v1=10.0)
    wrong[0]["difference"] = float("nan")
    assert gpu_constants.winner(wrong, TODAY, 0) == 0
    assert gpu_constants.winner([], TODAY, 0) == 0


def test_all_sizes_count_alike() -> None:
    faster_at_one = [{"value": 1, "us": {"a": 50.0, "b": 300.0}, "difference": 0.0}]
    assert gpu_constants.winner(faster_at_one, TODAY, 0) == 0


def test_what_a_value_leaves_unwritten_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in memory that still holds today's result, and in an output that is kept."""
    kept = torch.zeros(4)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        written = 4 if constants.of(SM90).gemm_rank == 128 else 3
        fresh = torch.empty(4)
        fresh[:written], kept[:written] = 1.0, 1.0
        return fresh, kept

    monkeypatch.setattr(gpu_tune, "times", lambda sweep, call, flush, rounds: [1.0] * rounds)
    before = {"a size": lambda: kept.fill_(torch.nan)}
    for without in ({}, before):
        sweep = gpu_sweeps.Sweep("gemm_rank", [16], {"a size": call}, before=without)
        result = gpu_tune.measured(sweep, constants.PREDICTED, torch.zeros(1))
        assert not gpu_constants.is_right(result["tried"][0])
        assert result["winner"] == 128


def fake_sweep(outputs: Mapping[int, float]) -> gpu_sweeps.Sweep:
    """Values of gemm_rank that give ``outputs``, on the CPU."""

    def call() -> torch.Tensor:
        return torch.full((4,), outputs[constants.of(SM90).gemm_rank])

    return gpu_sweeps.Sweep("gemm_rank", list(outputs), {"a size": call})


def test_a_sweep_finds_the_winner_and_says_what_failed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    us = {128: 10.0, 16: 5.0, 32: 3.0, 64: 1.0}

    def times(sweep: Any, call: Any, flush: Any, rounds: int) -> list[float]:
        chosen = constants.of(SM90).gemm_rank
        if chosen == 64:
            raise RuntimeError("out of resource")
        return [us[chosen]] * rounds

    monkeypatch.setattr(gpu_tune, "times", times)
    sweep = fake_sweep({128: 1.0, 16: 1.001, 32: 1.5, 64: 1.0})
    result = gpu_tune.measured(sweep, constants.PREDICTED, torch.zeros(1))
    assert result["winner"] == 16
    assert result["today"] == {"value": 128, "us": {"a size": 10.0}}
    assert [record["value"] for record in result["tried"] if not gpu_constants.is_right(record)] == [32, 64]
    gpu_tune.show(result)
    said = capsys.readouterr().out
    assert "2 of 4 failed or differ" in said
    assert "winner: 16" in said


SHAPES = [
    {"value": {"rows": 32, "depth": 64, "blocks": 1}, "us": {"1 tokens": 20.0, "16 tokens": 24.0}, "difference": 0.0},
    {"value": {"rows": 16, "depth": 128, "blocks": 1}, "us": {"1 tokens": 15.0, "16 tokens": 20.0}, "difference": 0.0},
    {"value": {"rows": 16, "depth": 64, "blocks": 1}, "us": {"1 tokens": 5.0, "16 tokens": 5.0}, "difference": 1e9},
]


def test_the_shapes_that_are_compiled_in_come_from_their_program(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    program = tmp_path / ".gpu" / "few_tokens"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat << 'END'\n{json.dumps(SHAPES)}\nEND\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(gpu_tune, "ROOT", tmp_path)
    result = gpu_tune.few_tokens_cuda(constants.PREDICTED, tmp_path)
    assert result["winner"] == SHAPES[1]["value"]
    assert constants.value("few_tokens_cuda", result["winner"]) == constants.FewTokensCuda(16, 128, 1)
    gpu_tune.show(result)


def test_the_program_has_the_shape_that_is_built_by_default() -> None:
    source = (Path(gpu_tune.__file__).parent / "few_tokens.cu").read_text(encoding="utf-8")
    header = (gpu_tune.ROOT / "csrc/include/lora_fast/lora_linear_small_fwd.cuh").read_text(encoding="utf-8")
    built = constants.PREDICTED.few_tokens_cuda
    assert f"entrant<{built.rows}, {built.depth}, {built.blocks}>()" in source
    for name, value in (("ROWS", built.rows), ("DEPTH", built.depth), ("BLOCKS", built.blocks)):
        assert f"#define LORA_FAST_SMALL_{name} {value}\n" in header


def test_a_measured_shape_is_built_in(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml"):
        (tmp_path / name).write_text((gpu_tune.ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    file = tmp_path / "triton_kernels" / "constants.json"
    file.parent.mkdir()
    defined = [f"-DLORA_FAST_SMALL_{name}" for name in ("ROWS=16", "DEPTH=128", "BLOCKS=1")]
    for measured, expected in (({}, []), ({"few_tokens_cuda": {"value": SHAPES[1]["value"]}}, defined)):
        file.write_text(json.dumps({"constants": measured}), encoding="utf-8")
        with mock.patch.dict("os.environ", LORA_FAST_BUILD="none"):
            assert runpy.run_path(str(tmp_path / "setup.py"), run_name="setup")["measured_shape"]() == expected


def tune_file(path: Path, **changes: Any) -> Path:
    content = {"device": "NVIDIA B200", "compute_capability": 100, "commit": "abc", "constants": {"gemm_rank": 64}}
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


BEFORE = {
    "compute_capability": 90,
    "constants": {"gain_bwd_rank": {"value": 16, "device": "NVIDIA H200", "source": "an earlier tune.json"}},
}


def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    file = tmp_path / "constants.json"
    file.write_text(json.dumps(BEFORE), encoding="utf-8")
    tune = tune_file(tmp_path / "tune.json", **changes)
    monkeypatch.setattr("sys.argv", ["gpu_constants", str(tune), "--file", str(file)])
    assert gpu_constants.main() == 0
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_file_names_the_device_and_has_what_it_measured(tmp_path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    document = written(tmp_path, monkeypatch)
    assert document == {
        "compute_capability": 100,
        "constants": {"gemm_rank": {"value": 64, "device": "NVIDIA B200", "source": "tune.json, commit abc"}},
    }
    assert "gemm_rank: 128 -> 64" in capsys.readouterr().out


def test_what_was_measured_before_on_the_same_kind_of_gpu_stays(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    document = written(tmp_path, monkeypatch, compute_capability=90)
    values = {name: (found["value"], found["device"]) for name, found in document["constants"].items()}
    assert values == {"gain_bwd_rank": (16, "NVIDIA H200"), "gemm_rank": (64, "NVIDIA B200")}


@pytest.mark.parametrize("change", [{"constants": {"gemm_rank": "much"}}, {"constants": {"warp": 1}}])
def test_what_gpu_tune_does_not_write_changes_nothing(tmp_path, monkeypatch, capsys, change) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit):
        written(tmp_path, monkeypatch, **change)
    assert "expected" in capsys.readouterr().err
    assert json.loads((tmp_path / "constants.json").read_text()) == BEFORE


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_tune", "--out", str(tmp_path)])
    assert gpu_tune.main() == 1
    assert "nothing was measured" in capsys.readouterr().out
