"""Gated MLPs of PEFT models that run as one: the same function, whatever is done to the model around it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("peft", reason="the peft extra is not installed")

from mlp_models import FORMS, MLPS, T5_SIZES, Block, Other, X, calls, model
from peft import LoraConfig
from peft.tuners import lora
from peft_helpers import EXACT, accelerated, adapted, assert_same, move, results, same_masks, tokens, uses_lora_fast
from transformers import T5Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

import lora_fast
from lora_fast.nn import mlp

__all__ = ["same_masks"]


@FORMS
@pytest.mark.parametrize("recompute", ["outputs", "all"])
@pytest.mark.parametrize("name", MLPS)
def test_it_is_pefts_function(name: str, recompute: str, dora: bool) -> None:
    peft = model(MLPS[name], use_dora=dora).train()
    fast = accelerated(peft, recompute=recompute)
    if name == "T5":
        peft.eval(), fast.eval()  # its dropout is tested below
    assert calls(fast, tokens(*X)) == 1
    assert_same(fast, peft, tokens(*X))


@pytest.mark.parametrize("make", [Other, lambda: Block(Other)], ids=["itself", "in a model"])
def test_any_module_of_the_form(make: Callable[[], nn.Module]) -> None:
    peft = model(make, use_dora=True)
    fast = accelerated(peft)
    assert calls(fast, tokens(*X)) == 1
    assert_same(fast, peft, tokens(*X))


def test_an_mlp_of_which_some_linears_are_adapted() -> None:
    for targets in (["gate_proj"], ["down_proj"], ["up_proj", "down_proj"]):
        peft = adapted(Block(), torch.float64, target_modules=targets, use_dora=True)
        fast = accelerated(peft)
        assert calls(fast, tokens(*X)) == 1
        assert_same(fast, peft, tokens(*X))
    peft = adapted(Block(), torch.float64, target_modules=["first"])
    report = lora_fast.accelerate(peft)
    assert not report.mlps
    assert calls(peft, tokens(*X)) == 0


def test_t5s_dropout_draws_what_pytorchs_does() -> None:
    """From the same state of the generator: the losses of a model with a dropout of its own stay the same."""
    peft = model(lambda: T5DenseGatedActDense(T5Config(**T5_SIZES, dropout_rate=0.4)), use_dora=True).train()
    fast = accelerated(peft)

    def seeded() -> Any:
        torch.manual_seed(5)
        return mock.MagicMock()

    assert_same(fast, peft, tokens(*X), around=seeded)
    assert not torch.equal(fast(tokens(*X)), fast(tokens(*X)))


@FORMS
def test_lora_dropout_runs_the_linears_apart(dora: bool, same_masks: Any) -> None:
    peft = model(use_dora=dora, lora_dropout=0.3).train()
    fast = accelerated(peft)
    assert calls(fast, tokens(*X)) == 0
    assert_same(fast, peft, tokens(*X), around=same_masks)
    fast.eval(), peft.eval()
    assert calls(fast, tokens(*X)) == 1
    assert_same(fast, peft, tokens(*X))


@pytest.mark.parametrize("config", [{"lora_bias": True}, {"use_rslora": True}, {"bias": "all"}], ids=str)
def test_adapters_of_other_kinds(config: dict[str, Any]) -> None:
    peft = model(MLPS["Llama with biases"], **config)
    fast = accelerated(peft)
    assert calls(fast, tokens(*X)) == 1
    assert_same(fast, peft, tokens(*X))


def test_parameters_stay_and_restore_is_exact() -> None:
    peft = model(lambda: Block(Other), use_dora=True)
    classes = [type(module) for module in peft.modules()]
    fast = copy.deepcopy(peft)
    report = lora_fast.accelerate(fast)
    (line,) = report.mlps
    assert (line.name, line.kind, line.as_one) == ("base_model.model.mlp", "Other", True)
    assert "adapted_mlp of w1, w3, w2 with silu" in str(report)
    assert isinstance(fast.base_model.model.mlp, Other)
    assert list(fast.state_dict()) == list(peft.state_dict())
    assert_same(fast, peft, tokens(*X))
    lora_fast.restore(fast)
    assert [type(module) for module in fast.modules()] == classes
    assert not any(mlp.STATE in vars(module) for module in fast.modules())
    assert_same(fast, peft, tokens(*X))


def test_recompute_may_change_and_none_takes_it_back() -> None:
    fast = model(Block, use_dora=True)
    for recompute, count in (("all", 1), ("outputs", 1), (None, 0)):
        report = lora_fast.accelerate(fast, recompute=recompute)
        assert len(report.mlps) == count
        assert calls(fast, tokens(*X)) == count
    with pytest.raises(ValueError, match="recompute: got 'some', expected 'outputs', 'all' or None"):
        lora_fast.accelerate(fast, recompute="some")  # type: ignore[arg-type]


def test_few_tokens_and_inference_run_the_linears_apart() -> None:
    fast = accelerated(model(Block, use_dora=True))
    assert calls(fast, tokens(2, 16)) == 0
    with torch.no_grad():
        assert calls(fast.train(), tokens(*X)) == 1  # reentrant checkpointing calls it so, and again with gradients
        assert calls(fast.eval(), tokens(*X)) == 0


def test_a_forward_on_the_instance_is_left_alone() -> None:
    fast = model(Block, use_dora=True)
    inner = fast.base_model.model.mlp
    inner.forward = lambda x: x
    (line,) = lora_fast.accelerate(fast).mlps
    assert not line.as_one
    assert "stored on the instance" in line.runs
    assert type(inner) is LlamaMLP


@pytest.mark.parametrize("part", ["gate_proj", "down_proj", "act_fn", "up_proj.lora_A.default", "up_proj.base_layer"])
def test_hooks_inside_are_called(part: str) -> None:
    peft = model(use_dora=True)
    fast = accelerated(peft)
    seen: list[str] = []
    handle = fast.base_model.model.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    (line,) = lora_fast.accelerate(fast).mlps
    assert not line.as_one
    assert "one after the other until this changes" in line.runs
    assert calls(fast, tokens(*X)) == 0
    assert seen
    assert_same(fast, peft, tokens(*X))
    handle.remove()
    assert calls(fast, tokens(*X)) == 1
    assert lora_fast.accelerate(fast).mlps[0].as_one


def test_a_linear_that_runs_pefts_forward_is_called() -> None:
    """And said, though its class is none of ours."""

    class Own(lora.Linear):
        pass

    peft = model(use_dora=True)
    peft.base_model.model.up_proj.__class__ = Own
    fast = copy.deepcopy(peft)
    (line,) = lora_fast.accelerate(fast).mlps
    assert not line.as_one
    assert "up_proj is" in line.runs
    assert calls(fast, tokens(*X)) == 0
    assert_same(fast, peft, tokens(*X))


def test_hooks_of_the_module_itself_are_called() -> None:
    fast = accelerated(model(Block, use_dora=True))
    seen: list[int] = []
    fast.base_model.model.mlp.register_forward_hook(lambda *_: seen.append(1))
    assert calls(fast, tokens(*X)) == 1
    assert seen == [1]


@FORMS
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recompute", ["outputs", "all"])
def test_checkpointing(dora: bool, use_reentrant: bool, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "use_reentrant", use_reentrant)
    peft = model(Block, use_dora=dora).train()
    fast = accelerated(peft, recompute=recompute)
    for _ in range(2):
        assert_same(fast, peft, tokens(*X))


@pytest.mark.parametrize("name", ["Llama", "Phi-3", "T5"])
@pytest.mark.parametrize("recompute", ["outputs", "all"])
def test_compiled_without_a_break(name: str, recompute: str) -> None:
    fast = accelerated(model(MLPS[name], use_dora=True), recompute=recompute).train(name != "T5")
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for shape in (X, (5, 40, 16)):
        actual = {key.removeprefix("_orig_mod."): value for key, value in results(compiled, tokens(*shape)).items()}
        torch.testing.assert_close(actual, results(fast, tokens(*shape)), **EXACT)
    assert "adapted_mlp_fwd" in uses_lora_fast(compiled, tokens(*X))


def test_autocast() -> None:
    """What comes out has autocast's dtype, as of the linears apart, and differs from it by roundings alone."""
    fast = accelerated(model(Block, use_dora=True).float())
    apart = accelerated(fast, recompute=None)
    x = tokens(*X, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(fast, x) == 1
    actual, wanted = (results(m, x, lambda: torch.autocast("cpu", torch.bfloat16)) for m in (fast, apart))
    for key, value in wanted.items():
        assert actual[key].dtype == value.dtype
        scale = value.float().abs().max()
        torch.testing.assert_close(actual[key] / scale, value / scale, rtol=0, atol=0.02)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(how: Callable[[nn.Module], nn.Module]) -> None:
    fast = accelerated(model(Block, use_dora=True), recompute="all")
    copied: Any = how(fast)
    assert calls(copied, tokens(*X)) == 1
    assert copied.base_model.model.mlp._lora_fast_mlp.recompute == "all"
    assert_same(copied, fast, tokens(*X))
    with torch.no_grad():
        copied.base_model.model.mlp.gate_proj.lora_B["default"].weight.zero_()
    assert fast.base_model.model.mlp.gate_proj.lora_B["default"].weight.any()


@FORMS
def test_several_adapters_switching_and_merging(dora: bool) -> None:
    peft = model(Block, use_dora=dora)
    peft.add_adapter("other", LoraConfig(r=2, use_dora=dora, target_modules="all-linear"))
    move(peft.double(), seed=4)
    fast = accelerated(peft)
    for names, count in ((["default"], 1), (["other"], 1), (["default", "other"], 0)):
        for each in (peft, fast):
            each.base_model.set_adapter(names)
        assert calls(fast, tokens(*X)) == count
        assert_same(fast, peft, tokens(*X))
    for each in (peft, fast):
        each.set_adapter("other")
    with peft.disable_adapter(), fast.disable_adapter():
        assert calls(fast, tokens(*X)) == 0
        torch.testing.assert_close(fast(tokens(*X)), peft(tokens(*X)), **EXACT)
    for each in (peft, fast):
        each.merge_adapter()
    assert calls(fast, tokens(*X)) == 0
    torch.testing.assert_close(fast(tokens(*X)), peft(tokens(*X)), **EXACT)
    for each in (peft, fast):
        each.unmerge_adapter()
    assert_same(fast, peft, tokens(*X))
    merged = fast.merge_and_unload()
    torch.testing.assert_close(merged(tokens(*X)), peft(tokens(*X)), **EXACT)


def test_samples_with_adapters_of_their_own() -> None:
    peft = model(Block)
    peft.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    move(peft.double(), seed=4)
    fast = accelerated(peft)
    names = ["default", "other", "__base__"]
    for each in (peft, fast):
        each.eval()
    torch.testing.assert_close(fast(tokens(*X), adapter_names=names), peft(tokens(*X), adapter_names=names), **EXACT)
    Block.use_reentrant = False
    try:
        fast.train()
        actual = results(fast, tokens(*X), adapter_names=names)
    finally:
        Block.use_reentrant = None
    torch.testing.assert_close(actual, results(fast, tokens(*X), adapter_names=names), **EXACT)


def test_q_k_and_v_keep_their_x_once() -> None:
    """Linears of their own, whose Functions keep the one tensor that all three were given."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))

    fast = accelerated(model(Attention, use_dora=True))
    x = tokens(*X).requires_grad_()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == x.shape and torch.equal(tensor, x):
            kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fast(x)
    assert len(kept) == 3
    assert set(kept) == {x.untyped_storage().data_ptr()}


def test_compute_in_the_adapters_dtype_runs_the_linears_apart() -> None:
    peft = adapted(MLPS["Llama"](), torch.bfloat16, target_modules="all-linear", use_dora=True)
    x = tokens(*X, dtype=torch.bfloat16)
    assert calls(accelerated(peft, compute_dtype="adapter"), x) == 0
    assert calls(accelerated(peft), x) == 1


def test_training_takes_the_same_course() -> None:
    peft = model(Block, use_dora=True)
    fast, all_again = accelerated(peft), accelerated(peft, recompute="all")

    def losses(trained: nn.Module) -> list[Tensor]:
        optimizer = torch.optim.AdamW((p for p in trained.parameters() if p.requires_grad), lr=0.02)
        found = []
        for step in range(4):
            loss = trained(tokens(*X, seed=step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return found

    wanted = losses(peft)
    torch.testing.assert_close(losses(fast), wanted, **EXACT)
    torch.testing.assert_close(losses(all_again), wanted, **EXACT)
