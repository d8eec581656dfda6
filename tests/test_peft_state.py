"""What acceleration leaves as it was, what it leaves alone, and what the report says of it."""

from __future__ import annotations

import copy
import io
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

pytest.importorskip("peft", reason="the peft extra is not installed")

import peft
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft_helpers import EXACT, Perceptron, accelerated, adapted, assert_same, perceptron, tokens, uses_lora_fast

import lora_fast
from lora_fast.integrations import peft as integration

X = tokens(4, 12)


def structure(model: nn.Module) -> dict[str, Any]:
    """Every module's class and attributes, by identity where they are modules and tensors."""
    return {
        name: (type(module), {key: id(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }


def up(model: Any) -> Any:
    return model.base_model.model.up


@pytest.mark.parametrize("dora", [False, True])
def test_parameters_and_state_dict_stay_and_restore_is_exact(dora: bool) -> None:
    model = perceptron(use_dora=dora, adapters=("default", "other"))
    before, objects = structure(model), dict(model.named_parameters())
    keys = list(model.state_dict())
    lora_fast.accelerate(model)
    assert uses_lora_fast(model, X)
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == keys
    lora_fast.restore(model)
    assert structure(model) == before
    assert uses_lora_fast(model, X) == set()
    lora_fast.restore(model)


def test_a_forward_that_was_kept_outlives_restore() -> None:
    """As diffusers' hooks keep it."""
    model = perceptron(use_dora=True)
    layer, wanted = up(model), up(model)(X)
    lora_fast.accelerate(model)
    kept = layer.forward
    lora_fast.restore(model)
    assert torch.equal(kept(X), wanted)


def test_the_summary_counts_layers_that_run_the_same() -> None:
    model = perceptron(use_dora=True)
    report = lora_fast.accelerate(model)
    head, *lines = report.summary().splitlines()
    assert head == str(report).splitlines()[0]
    assert sum(int(line.split()[1]) for line in lines if " × Linear: " in line) == len(report.layers) > len(lines)
    assert all(line.startswith("  fast  ") for line in lines)


def test_only_the_given_model_is_touched() -> None:
    ours, other = perceptron(use_dora=True), perceptron(use_dora=True)
    forward = type(up(other)).forward
    lora_fast.accelerate(ours)
    assert type(up(other)).forward is forward
    assert uses_lora_fast(other, X) == set()
    assert_same(ours, other, X)


def test_accelerate_is_idempotent_and_takes_new_arguments() -> None:
    model = perceptron(use_dora=True)
    first = lora_fast.accelerate(model)
    before = structure(model)
    assert lora_fast.accelerate(model) == first
    assert structure(model) == before
    assert lora_fast.accelerate(model, compute_dtype="adapter", norm_reuse=False).compute_dtype == "adapter"
    assert uses_lora_fast(model, X) == {"dora_linear_fwd"}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_independent(how: str) -> None:
    model = perceptron(use_dora=True)
    lora_fast.accelerate(model)
    model(X)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert_same(copied, model, X)
    assert "dora_linear_fwd" in uses_lora_fast(copied, X)
    with torch.no_grad():
        up(copied).lora_B["default"].weight.mul_(2)
    assert not torch.equal(copied(X), model(X))
    lora_fast.restore(copied)
    assert uses_lora_fast(model, X) != set() == uses_lora_fast(copied, X)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("late", [False, True], ids=["load, accelerate", "accelerate, load"])
def test_saving_and_loading(tmp_path: Path, low_cpu_mem_usage: bool, late: bool) -> None:
    model = perceptron(use_dora=True, modules_to_save=["head"])
    fast = accelerated(model)
    model.save_pretrained(tmp_path / "peft")
    fast.save_pretrained(tmp_path / "fast")
    config, *files = sorted(path.name for path in (tmp_path / "peft").iterdir() if path.name != "README.md")
    for name in files:
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    ours, theirs = (json.loads((tmp_path / folder / config).read_text()) for folder in ("fast", "peft"))
    for found in (ours, theirs):  # PEFT writes a set
        found["target_modules"].sort()
    assert ours == theirs

    base = copy.deepcopy(model).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "fast", low_cpu_mem_usage=low_cpu_mem_usage)
    lora_fast.accelerate(loaded)
    if late:
        loaded.load_adapter(tmp_path / "fast", "again", low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.set_adapter("again")
    torch.testing.assert_close(loaded.double()(X), model(X), rtol=1e-6, atol=1e-6)
    assert "dora_linear_fwd" in uses_lora_fast(loaded, X)


def test_every_change_renews_the_norm() -> None:
    model = perceptron(use_dora=True)
    fast = accelerated(model)
    assert_same(fast, model, X)
    for each in (fast, model):
        with torch.no_grad():
            up(each).lora_A["default"].weight.data.mul_(1.5)
    assert_same(fast, model, X)
    for each in (fast, model):
        up(each).scale_layer(0.5)
    assert_same(fast, model, X)
    for each in (fast, model):
        each.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    assert_same(fast, model, X)
    lora_fast.invalidate_norms(fast)
    assert_same(fast.float().double(), model.float().double(), X)


def test_the_report() -> None:
    model = perceptron(use_dora=True)
    up(model).base_layer.register_forward_hook(lambda *_: None)
    report = lora_fast.accelerate(model)
    text = str(report)
    assert report.accelerated == ["base_model.model.up", "base_model.model.down"]
    assert "2 of 2 adapter layers" in text
    assert peft.__version__ in text
    assert "up (Linear): default: DoRA, weight_norm, base_layer(x), lora_compose: Linear has hooks" in text
    assert "down (Linear): default: DoRA, weight_norm, lora_linear" in text


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="no PEFT layer"):
        lora_fast.accelerate(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="model: got int"):
        lora_fast.accelerate(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compute_dtype: got 'bfloat16'"):
        lora_fast.accelerate(perceptron(), compute_dtype="bfloat16")


# ---- forwards and hooks of others


def test_hooks_of_the_base_layer_see_every_call() -> None:
    model = perceptron(use_dora=True)
    fast = accelerated(model)
    for each in (fast, model):
        up(each).base_layer.register_forward_hook(lambda module, args, y: y * 2)
    assert_same(fast, model, X)
    assert {"lora_compose_fwd", "dora_linear_fwd"} <= uses_lora_fast(fast, X)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout"])
def test_a_hook_inside_the_adapter_is_called(part: str) -> None:
    fast = accelerated(perceptron(use_dora=True))
    called = []
    getattr(up(fast), part)["default"].register_forward_pre_hook(lambda *_: called.append(part))
    fast.base_model.model.up(X)
    assert called or part == "lora_dropout"  # which PEFT's DoRA does not call when it drops nothing
    assert "hooks" in lora_fast.accelerate(fast).layers[0].runs


class Doubling(ModelHook):
    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output * 2


@pytest.mark.parametrize("first", ["hook", "accelerate"])
def test_hooks_of_accelerate_around_a_layer(first: str) -> None:
    model = perceptron(use_dora=True)
    plain = copy.deepcopy(model)
    before = structure(model)
    if first == "hook":
        add_hook_to_module(up(model), Doubling())
        before = structure(model)
    report = lora_fast.accelerate(model)
    if first == "accelerate":
        add_hook_to_module(up(model), Doubling())
        assert lora_fast.accelerate(model) == report
    assert report.left_alone == []
    torch.testing.assert_close(up(model)(X), 2 * up(plain)(X), **EXACT)
    assert "dora_linear_fwd" in uses_lora_fast(up(model), X)
    copied = copy.deepcopy(model)
    assert "dora_linear_fwd" in uses_lora_fast(up(copied), X)
    lora_fast.restore(model)
    torch.testing.assert_close(up(model)(X), 2 * up(plain)(X), **EXACT)
    assert uses_lora_fast(model, X) == set()
    remove_hook_from_module(up(model))
    torch.testing.assert_close(up(model)(X), up(plain)(X), **EXACT)
    assert structure(model).keys() == before.keys()


def test_accelerate_hooks_on_every_module() -> None:
    model = perceptron(use_dora=False)
    fast = accelerated(model)
    for module in fast.modules():
        if not list(module.children()):
            add_hook_to_module(module, ModelHook())
    assert_same(fast, model, X)


def test_a_foreign_forward_on_the_instance_is_reported() -> None:
    model = perceptron()
    up(model).forward = types.MethodType(lambda self, x: self.base_layer(x), up(model))
    report = lora_fast.accelerate(model)
    assert report.left_alone == ["base_model.model.up"]
    assert "stored on the instance" in report.layers[0].runs
    assert type(up(model)) is peft.tuners.lora.Linear
    torch.testing.assert_close(up(model)(X), up(model).base_layer(X), rtol=0, atol=0)


def test_a_class_changed_since_is_not_restored() -> None:
    model = perceptron()
    lora_fast.accelerate(model)
    up(model).register_parameter("extra", nn.Parameter(torch.ones(3)))
    parametrize.register_parametrization(up(model), "extra", nn.Identity())
    with pytest.raises(RuntimeError, match=r"restore: the class of 'base_model.model.up' is .*Parametrized"):
        lora_fast.restore(model)
    assert uses_lora_fast(model, X)
    parametrize.remove_parametrizations(up(model), "extra")
    lora_fast.restore(model)
    assert uses_lora_fast(model, X) == set()


# ---- what PEFT's own code runs


def left_alone(model: Any, reason: str, x: torch.Tensor = X) -> None:
    """The report gives the reason, and PEFT's code runs with PEFT's results."""
    fast = copy.deepcopy(model)
    report = lora_fast.accelerate(fast)
    assert any(reason in layer.runs for layer in report.layers), str(report)
    assert report.accelerated == []
    torch.manual_seed(0)
    wanted = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(fast(x), wanted, rtol=0, atol=0)
    assert uses_lora_fast(fast, x) == set()


def test_a_trained_base_weight() -> None:
    model = perceptron(use_dora=True)
    for layer in (up(model), model.base_model.model.down):
        layer.base_layer.weight.requires_grad_()
    left_alone(model, "the base weight is trained")
    fast = accelerated(perceptron(use_dora=True))
    up(fast).base_layer.weight.requires_grad_()
    fast(X).sum().backward()
    assert up(fast).base_layer.weight.grad is not None


@pytest.mark.parametrize("dora", [False, True])
def test_a_base_weight_that_is_trained_for_a_while(dora: bool) -> None:
    """Before, after and between calls of accelerate, which need not know."""
    model = perceptron(use_dora=dora)
    fast = copy.deepcopy(model)
    weights = [up(each).base_layer.weight for each in (model, fast)]
    weights[1].requires_grad_()
    report = lora_fast.accelerate(fast)
    assert report.left_alone == ["base_model.model.up"]
    assert "PEFT's own forward until this changes: the base weight is trained" in report.layers[0].runs
    for trained in (True, False, True, False):
        for weight in weights:
            weight.requires_grad_(trained)
        assert_same(fast, model, X)
        assert (uses_lora_fast(up(fast), X) == set()) == trained
        assert len(lora_fast.accelerate(fast).accelerated) == 2 - trained
    lora_fast.restore(fast)
    assert type(up(fast)) is peft.tuners.lora.Linear


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_are_loaded_later(dora: bool, assign: bool) -> None:
    model = perceptron(use_dora=dora)
    fast = copy.deepcopy(model).to("meta")
    report = lora_fast.accelerate(fast)
    assert report.accelerated == []
    assert "PEFT's own forward until this changes: the base weight is on the meta device" in report.layers[0].runs
    assert fast(X.to("meta")).is_meta
    if not assign:
        fast.to_empty(device="cpu")
    fast.load_state_dict(model.state_dict(), assign=assign)
    assert_same(fast, copy.deepcopy(model), X)
    assert ("dora_linear_fwd" if dora else "lora_linear_fwd") in uses_lora_fast(fast, X)
    assert lora_fast.accelerate(fast).left_alone == []


def test_a_quantised_weight_that_is_no_tensor() -> None:
    """As torch's own quantised linears have it: a method in the place of the weight."""

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Parameter(torch.ones(9, 12), requires_grad=False)

        def weight(self) -> torch.Tensor:
            return self.values

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight())

    model = adapted(nn.Sequential(nn.Linear(12, 9)), torch.float64, target_modules=["0"])
    model.base_model.model[0].base_layer = Quantised().double()
    left_alone(model, "no plain parameter but method")


def test_a_computed_base_weight() -> None:
    model = perceptron(use_dora=True)
    for layer in (up(model), model.base_model.model.down):
        parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity())
        layer.base_layer.requires_grad_(False)
    left_alone(model, "no plain parameter")


def test_variants_that_are_not_ours() -> None:
    model = adapted(Perceptron(), torch.float64, target_modules=["up", "down"], alora_invocation_tokens=[1])
    left_alone(model, "its variant is ALoraLinearVariant")


def test_other_methods_and_layers() -> None:
    ia3 = get_peft_model(Perceptron().double(), IA3Config(target_modules=["up"], feedforward_modules=[]))
    left_alone(ia3, "it is no LoRA layer")


def test_multihead_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    model = adapted(Attention(), torch.float64, target_modules=["attention"])
    left_alone(model, "without calling it", tokens(2, 3, 12))


def test_parameters_adapted_without_a_layer() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    left_alone(get_peft_model(nn.Sequential(Experts()), config).double(), "no such layer")


# ---- other releases of PEFT


@pytest.mark.parametrize("version", ["0.17.1", "0.99.1", "1.0.0.dev0", "main"])
def test_an_unknown_peft_is_left_alone(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    model = perceptron(use_dora=True)
    before = structure(model)
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.warns(UserWarning, match=f"this is {version}: every layer runs PEFT's own forward"):
        report = lora_fast.accelerate(model)
    assert report.accelerated == []
    assert version in str(report)
    assert structure(model) == before
    lora_fast.restore(model)


def test_a_peft_without_a_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("peft_layers", "peft_names"):
        monkeypatch.delitem(sys.modules, f"lora_fast.integrations.{module}", raising=False)
    monkeypatch.delattr("peft.tuners.lora.variants.DoraConv3dVariant")
    with pytest.warns(UserWarning, match="lacks what lora_fast relies on .*DoraConv3dVariant"):
        assert lora_fast.accelerate(perceptron()).layers == ()


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install \"lora_fast\[peft\]\""):
        lora_fast.accelerate(nn.Linear(3, 3))


def test_the_range_of_releases_is_that_of_the_extra() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    oldest, newest = (".".join(map(str, bound)) for bound in (integration.OLDEST, integration.NEWEST))
    assert f'peft = ["peft>={oldest},<0.{int(newest.split(".")[1]) + 1}"]' in text
