"""lora_fast.check and the command lora-fast check: what is right passes, and whatever is broken is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fast import backends, calls, check, cli, info, norm_cache
from lora_fast.backends import extension
from lora_fast.backends.plan import Plan
from lora_fast.backends.torch import ops as torch_ops
from lora_fast.benchmarks import check_command, contenders as c, headline
from lora_fast.benchmarks.registry import INFERENCE, STEP, Case

NORMS = {"weight_norm, axis output", "weight_norm, axis input"}
LINEARS = {
    *("lora_linear", "dora_linear, axis output", "dora_linear, axis output, full gradient", "dora_linear, axis input"),
    *("lora_linear, dropout", "dora_linear, axis output, dropout", "dora_linear, axis input, dropout"),
}
QUANTISED = {"quantised_norm, 4 bits", "quantised_norm, 8 bits"}
GROUPED = {"grouped_lora_linear", "grouped_weight_norm"}
NAMES = {*NORMS, *LINEARS, *QUANTISED, *GROUPED, "adapted_mlp"} | {
    *("weight_norm, kept", "dora_linear, kept norm", "dropout", "lora_compose", "merge_weight", "few tokens")
}


def test_everything_here_is_right() -> None:
    threads, results = torch.get_num_threads(), list(check.run("cpu", real=False))
    assert [(result.title, result.faults) for result in results if result.faults] == []
    assert {result.name for result in results} == NAMES
    found = {(result.backend, result.dtype) for result in results}
    assert found == {
        (name, str(dtype).removeprefix("torch.")) for name in check.present("cpu") for dtype in check.DTYPES["cpu"]
    }
    assert torch.get_num_threads() == threads


def test_a_gpu_has_the_same_items_and_graphs() -> None:
    items = {device: [name for name, _, _ in check._items(device, real=True)] for device in ("cpu", "cuda")}
    assert {*items["cuda"]} == {*NAMES, "CUDA graph"}
    assert {*items["cpu"]} == NAMES
    each = len(items["cpu"]) - len(list(check._items("cpu", real=False)))  # of a size
    assert len(items["cuda"]) == len(items["cpu"]) + 3 * each + len(check.GRAPH_TOKENS)


@pytest.fixture
def only_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """One backend and one dtype, for what is broken."""
    monkeypatch.setattr(check, "present", lambda device: ["torch"])
    monkeypatch.setitem(check.DTYPES, "cpu", (torch.float32,))


@pytest.mark.parametrize("name", ["dora_linear, axis output", "lora_compose"])
def test_a_case_without_a_bias_has_the_other_gradients(name: str) -> None:
    case = replace(check.SMALL, bias=False)
    result = check.result_of(name, "cpu", "torch", case, check.items()[name])
    assert result.faults == []
    assert "lora_B" in result.errors
    assert "bias" not in result.errors


def faults() -> dict[str, str]:
    """What is wrong, by the names of the items."""
    found: dict[str, str] = {}
    for result in check.run("cpu", real=False):
        if result.faults:
            found[result.name] = "\n".join([found.get(result.name, ""), *result.faults]).strip()
    return found


def later(results: Any, change: Callable[[Tensor], object], place: int = 0) -> Any:
    """``results`` of an op, the one at ``place`` changed in place."""
    change(results[place] if isinstance(results, tuple) else results)
    return results


def broken(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Tensor], object], place: int = 0) -> None:
    """``change`` is made to a result of a function of the backend."""
    original = getattr(torch_ops, name)
    monkeypatch.setattr(torch_ops, name, lambda *arguments: later(original(*arguments), change, place))


@pytest.mark.usefixtures("only_float32")
class TestFound:
    def test_nothing_in_what_is_right(self) -> None:
        assert faults() == {}

    def test_a_wrong_norm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken(monkeypatch, "weight_norm_fwd", lambda norm: norm[-1].mul_(1 + 1e-5))
        found = faults()
        assert found.keys() >= NORMS
        assert "norm has an RMS error of" in found["weight_norm, axis output"]
        assert not found.keys() & {"lora_linear", "merge_weight", "lora_compose", "few tokens", "dropout"}

    @pytest.mark.parametrize(("name", "items"), [
        ("lora_linear_fwd", {*LINEARS, "few tokens", "dora_linear, kept norm"}),
        ("lora_compose_fwd", {"lora_compose"}),
        ("grouped_lora_fwd", {"grouped_lora_linear"}),
        ("grouped_weight_norm_fwd", {"grouped_weight_norm"}),
        ("adapted_mlp_fwd", {"adapted_mlp"}),
    ])  # fmt: skip
    def test_a_wrong_output(self, monkeypatch: pytest.MonkeyPatch, name: str, items: set[str]) -> None:
        broken(monkeypatch, name, lambda y: y[0, 0].add_(1e-3))
        found = faults()
        assert found.keys() == items
        assert all("y has an RMS error of" in fault for name, fault in found.items() if name in LINEARS)

    @pytest.mark.parametrize("place", range(3), ids=("x", "lora_A", "lora_B"))
    def test_a_wrong_gradient_of_the_linear(self, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
        broken(monkeypatch, "lora_linear_bwd", lambda gradient: gradient.mul_(1 + 1e-5), place)
        assert faults().keys() == LINEARS

    @pytest.mark.parametrize("place", [0, 4, 5], ids=("x", "gain", "bias"))
    def test_a_wrong_gradient_of_many_adapters(self, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
        broken(monkeypatch, "grouped_lora_bwd", lambda gradient: gradient.mul_(1 + 1e-5), place)
        assert faults().keys() == {"grouped_lora_linear"}

    @pytest.mark.parametrize("place", [2, 3], ids=("lora_A", "lora_B"))
    def test_a_wrong_gradient_of_an_adapter(self, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
        broken(monkeypatch, "grouped_lora_bwd", lambda gradients: gradients[0][1].mul_(1 + 1e-5), place)
        assert faults().keys() == {"grouped_lora_linear"}

    @pytest.mark.parametrize("place", range(5), ids=("x", "lora_A", "lora_B", "gain", "bias"))
    def test_a_wrong_gradient_of_an_mlp(self, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
        """Of the list of a parameter's, down's."""
        broken(monkeypatch, "adapted_mlp_bwd", lambda given: (given if place == 0 else given[-1]).mul_(1 + 1e-5), place)
        assert faults().keys() == {"adapted_mlp"}

    @pytest.mark.parametrize("place", range(5), ids=("base", "h", "lora_B", "gain", "bias"))
    def test_a_wrong_gradient_of_the_composition(self, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
        broken(monkeypatch, "lora_compose_bwd", lambda gradient: gradient.mul_(1 + 1e-5), place)
        assert faults().keys() == {"lora_compose"}

    def test_a_wrong_gradient_of_the_norm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken(monkeypatch, "weight_norm_bwd", lambda gradient: gradient.mul_(1.001))
        assert faults().keys() == {"dora_linear, axis output, full gradient"}

    def test_a_wrong_merged_weight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = torch_ops.merge_weight

        def merge_weight(call: calls.MergeWeight, plan: Plan) -> None:
            original(call, plan)
            call.weight[-1, -1] += 1e-3

        monkeypatch.setattr(torch_ops, "merge_weight", merge_weight)
        assert faults().keys() == {"merge_weight"}

    @pytest.mark.parametrize("stale", ["lora_A", "lora_B", "weight"])
    def test_a_stale_kept_norm(self, monkeypatch: pytest.MonkeyPatch, stale: str) -> None:
        """The key doesn't see one of the operands."""
        original = torch_ops.content_key
        blind: dict[tuple, Tensor] = {}  # each at one place, for that is part of the key

        def content_key(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *arguments: Any) -> Tensor:
            seen = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B}
            zeros = torch.zeros_like(seen[stale])
            seen[stale] = blind.setdefault((zeros.shape, zeros.stride(), zeros.dtype), zeros)
            return original(*seen.values(), *arguments)

        monkeypatch.setattr(torch_ops, "content_key", content_key)
        found = faults()
        assert found.keys() == {"weight_norm, kept", "dora_linear, kept norm"}
        assert all(f"{stale} changed has a" in fault for fault in found.values())

    def test_a_kept_norm_that_comes_back_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = norm_cache.reuse

        def reuse(kept_norm: Tensor, kept_key: Tensor, key: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            hit = torch.equal(kept_key, key)
            return original(kept_norm, kept_key, key, compute) * (1.001 if hit else 1)

        monkeypatch.setattr(norm_cache, "reuse", reuse)
        found = faults()
        assert found.keys() == {"weight_norm, kept", "dora_linear, kept norm"}
        assert all("hit has a" in fault for fault in found.values())

    @pytest.mark.parametrize(("name", "items"), [
        ("weight_norm_fwd", {*NORMS}),
        ("lora_linear_fwd", {*LINEARS}),
        ("lora_linear_bwd", {*LINEARS}),
        ("lora_compose_fwd", {"lora_compose"}),
    ])  # fmt: skip
    def test_what_differs_from_run_to_run(self, monkeypatch: pytest.MonkeyPatch, name: str, items: set[str]) -> None:
        """By one ulp in every other run, which the budget allows."""
        calls: list[None] = []

        def change(result: Tensor) -> None:
            calls.append(None)
            if len(calls) % 2:
                result.copy_(result.nextafter(torch.tensor(torch.inf)))

        broken(monkeypatch, name, change)
        found = faults()
        assert items <= found.keys()
        assert all(" differs between two runs, by up to " in found[item] for item in items)

    def test_another_merge_in_each_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original, calls = torch_ops.merge_weight, []

        def merge_weight(call: calls.MergeWeight, plan: Plan) -> None:
            original(call, plan)
            calls.append(None)
            if len(calls) % 2:
                call.weight.copy_(call.weight.nextafter(torch.tensor(torch.inf)))

        monkeypatch.setattr(torch_ops, "merge_weight", merge_weight)
        assert "differs between two runs" in faults()["merge_weight"]

    def test_another_mask_on_every_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The mask that backends are compared with is the torch backend's own."""
        original = torch_ops.dropout_mask
        monkeypatch.setattr(torch_ops, "dropout_mask", lambda seed, shape, p: original(seed + 1, shape, p))
        assert faults() == {"dropout": f"the mask of seed {check.MASK_SEED} is another than on other machines"}

    def test_another_mask_on_one_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = torch_ops.dropout
        monkeypatch.setattr(torch_ops, "dropout", lambda call, plan: original(call._replace(seed=call.seed + 1), plan))
        assert "the mask is another than that of" in faults()["dropout"]

    def test_a_mask_in_the_linear_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_ops._linear, "drop", lambda x, seed, p: torch_ops.drop(x, seed + 1, p))
        monkeypatch.setattr(torch_ops, "dropout", lambda call, plan: torch_ops.drop(call.x, call.seed, call.p))
        assert faults().keys() == {name for name in LINEARS if name.endswith("dropout")}

    @pytest.mark.parametrize(("name", "items"), [
        ("weight_norm_fwd", {*NORMS, "weight_norm, kept"}),
        ("lora_linear_fwd", {*LINEARS}),
        ("lora_linear_bwd", {*LINEARS}),
        ("lora_compose_bwd", {"lora_compose"}),
    ])  # fmt: skip
    def test_memory_that_nobody_wrote(self, monkeypatch: pytest.MonkeyPatch, name: str, items: set[str]) -> None:
        """Of a result's first column, left to what ``empty_like`` gives."""
        broken(monkeypatch, name, lambda result: result[..., 0].copy_(torch.empty_like(result[..., 0])))
        found = faults()
        assert items <= found.keys()
        assert all("error of nan" in found[item] for item in items)

    def test_one_wrong_result_of_many_with_few_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[None] = []

        def change(y: Tensor) -> None:
            few = y.shape == (3, check.FEW["cpu"].N)
            calls.extend([None] * few)
            if few and len(calls) == 7:
                y[1, 5] += 1e-3

        broken(monkeypatch, "lora_linear_fwd", change)
        ((name, fault),) = faults().items()
        assert name == "few tokens"
        assert fault.startswith("the worst y of 10 has an RMS error of")

    def test_what_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def merge_weight(*arguments: Any) -> None:
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(torch_ops, "merge_weight", merge_weight)
        ((name, fault),) = faults().items()
        assert name == "merge_weight"
        assert "RuntimeError: no such kernel" in fault

    def test_float32_where_float64_was_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(check.DTYPES, "cpu", (torch.float64,))
        broken(monkeypatch, "weight_norm_fwd", lambda norm: norm.copy_(norm.float()))
        assert "relative error" in faults()["weight_norm, axis input"]


@pytest.mark.amx
def test_a_stale_norm_is_found_where_the_product_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = backends.get("cpu").ops
    monkeypatch.setattr(check, "present", lambda device: ["cpu"])
    monkeypatch.setitem(check.DTYPES, "cpu", (torch.bfloat16,))
    original, first = cpu.dora_linear_fwd, dict[int, Tensor]()

    def dora_linear_fwd(call: calls.DoraLinear, plan: Plan) -> tuple[Tensor, ...]:
        y, *others = original(call, plan)
        if call.kept_norm is not None:
            y = first.setdefault(call.kept_norm.data_ptr(), y).clone()
        return y, *others

    monkeypatch.setattr(cpu, "dora_linear_fwd", dora_linear_fwd)
    assert faults().keys() == {"dora_linear, kept norm"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, only_float32: None) -> None:
    """The command with a few items and tiny layers."""
    run = check.run
    monkeypatch.setattr(check, "run", lambda device: run(device, real=False))
    own = (c.FROZEN, c.dora(), c.lora())
    cases = [Case(mode, 64, 48, 8, torch.float32, own, rank=4) for mode in (STEP, INFERENCE)]
    monkeypatch.setattr(headline, "cases", lambda device: cases)


@pytest.mark.usefixtures("quick")
class TestCommand:
    def test_passes(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["check", "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert lines[0] == info.render(info.collect()).splitlines()[0]
        assert any(line.startswith("checking cpu: ") for line in lines)
        assert sum(line.startswith("torch   float32    ") and "  0 wrong" in line for line in lines) == 1
        for name in ("training step, 8 tokens", "inference, 8 tokens", "frozen linear", "lora_fast DoRA"):
            assert name in out
        assert lines[-1] == "PASS"
        assert err == ""

    def test_fails_with_the_name(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        broken(monkeypatch, "lora_compose_fwd", lambda y: y.mul_(1.01))
        assert cli.main(["check", "--device", "cpu"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("WRONG: lora_compose, torch, float32, 13 tokens, 264×280, ") for line in lines)
        assert lines[-1] == "FAIL: lora_compose (torch float32, 13 tokens, 264×280, rank 5)"

    def test_json_and_nothing_else(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["check", "--device", "cpu", "--json"]) == 0
        out, err = capsys.readouterr()
        document = json.loads(out)
        assert document["verdict"] == "PASS"
        assert document["device"] == "cpu"
        assert document["info"]["versions"]["torch"] == torch.__version__
        assert document["provenance"]["versions"]["torch"] == torch.__version__
        assert {item["name"] for item in document["items"]} == NAMES
        assert [timing["title"].split(",")[0] for timing in document["timings"]] == [STEP, INFERENCE]
        assert document["timings"][0]["records"]["frozen linear"]["times_frozen"] == 1
        assert document["wrong"] == []
        assert err.splitlines()[-1] == "PASS"

    def test_json_of_what_is_not_finite(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        broken(monkeypatch, "lora_compose_fwd", lambda y: y.fill_(torch.nan))
        assert cli.main(["check", "--device", "cpu", "--json"]) == 1
        document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert document["verdict"] == "FAIL"
        (wrong,) = [item for item in document["items"] if item["faults"]]
        assert wrong["errors"]["y"] is None
        assert {found["name"] for found in document["wrong"]} == {"lora_compose"}

    def test_a_wrong_layer_of_ours_is_a_fault_and_a_peer_that_is_missing_is_none(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def doubled(inputs: c.LayerInputs) -> c.Layer:
            layer = c.lora().build(inputs)
            layer.module.scaling *= 2
            return layer

        def unimportable(inputs: c.LayerInputs) -> c.Layer:
            raise ImportError("its version does not fit")

        ours = c.Contender("lora_fast LoRA", doubled, "lora", ours=True)
        missing = c.Contender("PEFT LoRA", doubled, "lora", requires="no_such_package")
        other = c.Contender("PEFT DoRA", unimportable, "dora")
        case = Case(INFERENCE, 64, 48, 8, torch.float32, (c.FROZEN, ours, missing, other), rank=4)
        monkeypatch.setattr(headline, "cases", lambda device: [case])
        assert cli.main(["check", "--device", "cpu"]) == 1
        out = capsys.readouterr().out
        assert "left out: no_such_package is not installed" in out
        assert "left out: raised ImportError('its version does not fit')" in out
        assert out.splitlines()[-1] == f"FAIL: lora_fast LoRA ({case.title}, rank 4)"

    def test_interrupted(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        run = check.run

        def interrupted(device: str) -> Iterator[check.Result]:
            yield next(iter(run(device)))
            raise KeyboardInterrupt

        monkeypatch.setattr(check, "run", interrupted)
        for arguments in ([], ["--json"]):
            assert cli.main(["check", "--device", "cpu", *arguments]) == 130
            out, err = capsys.readouterr()
            text = err if arguments else out
            assert "1 items, 0 timings, 0 wrong" in text
            assert text.splitlines()[-1] == "INTERRUPTED; so far PASS"
        assert json.loads(out)["verdict"] == "INTERRUPTED"

    def test_without_the_extension(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(extension, "status", lambda: (False, "this installation is pure Python", {}))
        assert cli.main(["check", "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert "cpu     not checked: this installation is pure Python" in out
        assert out.splitlines()[-1] == "PASS"

    def test_the_default_is_what_is_there(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked: list[str] = []

        def run(device: str, *arguments: Any, **options: Any) -> int:
            asked.append(device)
            return 0

        monkeypatch.setattr(check_command, "run", run)
        for there in (True, False):
            monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
            monkeypatch.setattr(info, "collect", lambda sizes=None: {})
            monkeypatch.setattr(info, "render", str)
            assert cli.main(["check"]) == 0
        assert asked == ["cuda", "cpu"]


def test_a_gpu_that_is_not_there_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["check", "--device", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"lora-fast: error: --device: got 'cuda', but torch {torch.__version__} sees no GPU here; expected 'cpu'\n"
    )


def test_an_unknown_device_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(["check", "--device", "tpu"])
    assert exited.value.code == 2
    assert "argument --device: invalid choice: 'tpu'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_command() -> None:
    command = [sys.executable, "-m", "lora_fast", "check", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["verdict"] == "PASS"
    assert {item["size"] for item in document["items"]} >= {
        "64 tokens, 1024×512, rank 16",
        "13 tokens, 264×280, rank 5",
    }
    assert {"frozen linear", "lora_fast DoRA", "lora_fast LoRA"} <= document["timings"][0]["records"].keys()
