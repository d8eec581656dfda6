"""litgpt's LoRA models with lora_fast's forward: litgpt's function, files and merging, and restore."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fast
from lora_fast import functional, testing
from lora_fast.integrations import litgpt as integration

pytestmark = pytest.mark.litgpt

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# by name: what differs from an adapter everywhere, and how many layers of 11 then have one
FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "everywhere": ({}, 11),
    "q and v": ({"lora_key": False, "lora_projection": False, "lora_mlp": False, "lora_head": False}, 2),
    "k": ({"lora_query": False, "lora_value": False}, 11),
    "no qkv": ({"lora_query": False, "lora_key": False, "lora_value": False}, 9),
    "as many groups as heads": ({"n_query_groups": 4}, 11),
    "as many groups as heads, q and v": ({"n_query_groups": 4, "lora_key": False}, 11),
    "one group": ({"n_query_groups": 1, "lora_query": False}, 11),
    "biases": ({"bias": True}, 11),
    "rank 1": ({"lora_r": 1}, 11),
    "rank above the width": ({"lora_r": 40}, 11),
    "GptNeoxMLP": ({"mlp_class_name": "GptNeoxMLP"}, 9),
    "GemmaMLP": ({"mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh"}, 11),
    "experts": (
        {"mlp_class_name": "LLaMAMoE", "n_expert": 3, "n_expert_per_token": 2, "moe_intermediate_size": 20},
        25,
    ),
}


@pytest.fixture
def make() -> Callable[..., Any]:
    from litgpt_helpers import gpt

    return gpt


def tokens(rows: int = 2, columns: int = 40) -> Tensor:
    return torch.randint(200, (rows, columns), generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and each gradient by name."""
    model.zero_grad()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), found


def check_same(model: Any, other: Any, **tolerances: float) -> None:
    (y, gradients), (wanted, wanted_gradients) = trained(model, tokens()), trained(other, tokens())
    torch.testing.assert_close(y, wanted, **tolerances)
    torch.testing.assert_close(gradients, wanted_gradients, **tolerances)
    assert wanted_gradients


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("recompute", ["outputs", "all", None])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_litgpt_s(make: Any, form: str, recompute: Any) -> None:
    config, count = FORMS[form]
    model = make(**config)
    other = copy.deepcopy(model)
    report = integration.accelerate(model, recompute=recompute)
    assert len(report.accelerated) == len(report.layers) == count
    mlps = "lora_mlp" not in config and config.get("mlp_class_name", "LLaMAMLP") in ("LLaMAMLP", "LLaMAMoE")
    wanted = 0 if recompute is None or not mlps else 6 if "n_expert" in config else 2
    assert sum(mlp.as_one for mlp in report.mlps) == wanted
    with mock.patch.object(functional, "lora_linear", wraps=functional.lora_linear) as lora_linear:
        check_same(model, other, **EXACT)
    if "n_expert" not in config:  # of which some may have few tokens, or none
        assert lora_linear.call_count == count - 3 * wanted
    assert lora_linear.call_count > 0


@pytest.mark.parametrize("form", ["everywhere", "q and v"])
def test_float32_and_bfloat16_are_within_the_error_budget(make: Any, form: str) -> None:
    """Of outputs and of gradients, pooled: litgpt's own in the same dtype is what is allowed."""
    for dtype in (torch.float32, torch.bfloat16):
        own = make(dtype=dtype, **FORMS[form][0])
        exact = copy.deepcopy(own).double()
        fast = copy.deepcopy(own)
        integration.accelerate(fast)
        (y, gradients), (own_y, own_gradients), (exact_y, exact_gradients) = (
            trained(model, tokens(4)) for model in (fast, own, exact)
        )
        pairs = [(y, own_y, exact_y)]
        pairs += [(gradients[name], own_gradients[name], exact_gradients[name]) for name in exact_gradients]
        error, allowed = (
            torch.cat([(pair[place].double() - pair[2]).flatten() / pair[2].std() for pair in pairs])
            for place in (0, 1)
        )
        assert error.square().mean().sqrt() <= 1.25 * allowed.square().mean().sqrt()
        assert error.abs().max() <= 2 * allowed.abs().max()


def test_autocast(make: Any) -> None:
    model = make(dtype=torch.float32)
    exact, other = copy.deepcopy(model).double(), copy.deepcopy(model)
    integration.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = model(tokens()), other(tokens())
    truth = exact(tokens())
    assert y.dtype == wanted.dtype == torch.bfloat16
    assert (y - truth).std() <= 1.1 * (wanted - truth).std()
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_dropout_is_litgpt_s_with_the_same_mask(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(lora_dropout=0.3)
    other = copy.deepcopy(model)
    report = integration.accelerate(model)
    assert len(report.accelerated) == 11
    seed = torch.tensor(7)
    monkeypatch.setattr(functional, "draw_seed", lambda device: seed)
    torch.testing.assert_close(model.eval()(tokens()), other.eval()(tokens()), **EXACT)
    model.train()
    for module in other.modules():
        if isinstance(module, nn.Dropout):
            vars(module)["forward"] = lambda x: x * testing.dropout_mask(seed, x.shape, 0.3) / 0.7
    check_same(model, other, **EXACT)


def test_the_state_dict_and_what_is_trained_stay(make: Any) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    integration.accelerate(model)
    model(tokens())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    changed = {name: tensor + 1 for name, tensor in before.items()}
    model.load_state_dict(changed)
    other = make()
    other.load_state_dict(changed)
    torch.testing.assert_close(model(tokens()), other(tokens()), **EXACT)


@pytest.mark.parametrize("form", ["everywhere", "q and v", "one group"])
def test_merging_is_litgpt_s(make: Any, form: str) -> None:
    from litgpt.lora import merge_lora_weights

    model = make(**FORMS[form][0])
    other = copy.deepcopy(model)
    integration.accelerate(model)
    before = model(tokens())
    merge_lora_weights(model)
    merge_lora_weights(other)
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
    assert torch.equal(model(tokens()), other(tokens()))
    torch.testing.assert_close(model(tokens()), before, **EXACT)


def test_restore(make: Any) -> None:
    model = make()
    before, y = classes(model), model(tokens())
    integration.accelerate(model)
    integration.accelerate(model, recompute="all")  # a second time
    assert classes(model) != before
    assert all(integration.STATE in vars(module) for module in model.modules() if hasattr(module, "lora_A"))
    integration.restore(model)
    assert classes(model) == before
    assert not any(integration.STATE in vars(module) for module in model.modules())
    assert torch.equal(model(tokens()), y)
    integration.restore(model)  # which does nothing


def test_a_forward_that_was_kept_outlives_restore(make: Any) -> None:
    model, x = make(), torch.randn(3, 32, dtype=torch.float64)
    layer = model.lm_head
    wanted = layer(x)
    integration.accelerate(model)
    kept = layer.forward
    integration.restore(model)
    assert torch.equal(kept(x), wanted)


def test_restore_refuses_a_class_that_was_changed_since(make: Any) -> None:
    model = make()
    integration.accelerate(model)
    torch.nn.utils.parametrize.register_parametrization(model.lm_head, "lora_A", nn.Identity())
    before = classes(model)
    with pytest.raises(RuntimeError, match="the class of 'lm_head' is .*Parametrized.*Undo that first"):
        integration.restore(model)
    assert classes(model) == before


def test_copies_and_pickles(make: Any) -> None:
    model = make(lora_dropout=0.1)  # for a dropout of 0 litgpt has a lambda, which cannot be pickled
    integration.accelerate(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(made) == classes(model)
        torch.testing.assert_close(made.eval()(tokens()), model.eval()(tokens()), **EXACT)


def test_what_stands_on_a_linear_is_called(make: Any) -> None:
    model = make()
    other = copy.deepcopy(model)
    integration.accelerate(model)
    seen: list[int] = []
    for one in (model, other):
        linear = one.transformer.h[0].attn.qkv.linear
        linear.register_forward_hook(lambda module, args, y: seen.append(1) or y * 2)
        one.transformer.h[1].mlp.fc_1.linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        torch.nn.utils.parametrizations.weight_norm(one.transformer.h[1].mlp.proj.linear)
    check_same(model, other, **EXACT)
    assert len(seen) == 2
    report = integration.accelerate(model)
    runs = {layer.name: layer.runs for layer in report.layers}
    assert "lora_compose: the linear has hooks" in runs["transformer.h.0.attn.qkv"]
    assert "lora_compose: the linear is a Parametrized" in runs["transformer.h.1.mlp.proj"]
    assert [mlp.as_one for mlp in report.mlps] == [True, False]


def test_what_stands_in_the_dropout_s_place_is_called(make: Any) -> None:
    model = make()
    other = copy.deepcopy(model)
    for one in (model, other):
        one.lm_head.lora_dropout = nn.Tanh()
        one.transformer.h[0].attn.proj.lora_dropout = lambda x: 2 * x
    report = integration.accelerate(model)
    assert report.left_alone == ["lm_head", "transformer.h.0.attn.proj"]
    assert "litgpt  lm_head (LoRALinear): litgpt's own forward until this changes: its lora_dropout is a Tanh" in str(
        report
    )
    check_same(model, other, **EXACT)


def test_a_weight_that_is_trained_too(make: Any) -> None:
    model = make(bias=True).requires_grad_(True)
    other = copy.deepcopy(model)
    report = integration.accelerate(model)
    assert "the linear's weight requires a gradient" in str(report)
    check_same(model, other, **EXACT)


def test_an_adapter_of_another_dtype_is_litgpt_s_error(make: Any) -> None:
    model = make()
    integration.accelerate(model)
    model.lm_head.lora_A.data = model.lm_head.lora_A.data.float()
    with pytest.raises(RuntimeError, match="dtype"):
        model(tokens())


def test_attributes_are_read_in_each_call(make: Any) -> None:
    """As litgpt's own forward reads them."""
    changes: dict[str, Callable[[Any], None]] = {
        "r": lambda model: vars(model.lm_head).update(r=0),
        "enable_lora": lambda model: vars(model.transformer.h[0].attn.qkv).update(enable_lora=[False] * 3),
        "scaling": lambda model: vars(model.lm_head).update(scaling=0.25),
        "scaling, a tensor": lambda model: vars(model.lm_head).update(scaling=torch.tensor(0.25, dtype=torch.float64)),
        "mlp": lambda model: vars(model.transformer.h[1].mlp.proj).update(r=0),
    }
    for name, change in changes.items():
        model, other = make(), make()
        integration.accelerate(model)
        before = model(tokens())
        change(model)
        change(other)
        check_same(model, other, **EXACT)
        assert not torch.allclose(model(tokens()), before)
        report = integration.accelerate(model)
        assert len(report.left_alone) == (0 if name == "scaling" else 1)
        if report.left_alone:
            assert "litgpt's own forward until this changes: its " in str(report)


def test_beside_peft_s_layers(make: Any) -> None:
    """Each restore does its own, in one model too."""
    from peft import LoraConfig, get_peft_model

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt, self.head = make(), nn.Linear(258, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gpt(x))

    model = get_peft_model(Both(), LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
    before, y = classes(model), model(tokens())
    assert len(integration.accelerate(model).accelerated) == 11
    assert lora_fast.accelerate(model).accelerated == ["base_model.model.head"]
    torch.testing.assert_close(model(tokens()), y, **EXACT)
    lora_fast.restore(model)
    assert sum(integration.STATE in vars(module) for module in model.modules()) == 11
    integration.restore(model)
    assert classes(model) == before
    torch.testing.assert_close(model(tokens()), y, rtol=0, atol=0)


def test_subclasses_and_stored_forwards_are_left_alone(make: Any) -> None:
    from litgpt.lora import LoRALinear

    class Other(LoRALinear):
        pass

    model = make()
    other = copy.deepcopy(model)
    model.lm_head.__class__ = Other
    proj = model.transformer.h[0].attn.proj
    proj.forward = lambda x: LoRALinear.forward(proj, x)
    report = integration.accelerate(model)
    assert report.left_alone == ["lm_head", "transformer.h.0.attn.proj"]
    assert type(model.lm_head) is Other
    check_same(model, other, **EXACT)


def test_checkpointing_and_compile(make: Any) -> None:
    model, other = make(), make()
    integration.accelerate(model)
    block, its = model.transformer.h[0], other.transformer.h[0]
    x, cos, sin = (
        torch.randn(2, 40, 32, dtype=torch.float64),
        other.cos[None, :40].double(),
        other.sin[None, :40].double(),
    )

    def run(function: Any, reentrant: bool | None = None) -> list[Tensor]:
        given = x.clone().requires_grad_()
        arguments = given, cos, sin
        y = function(*arguments) if reentrant is None else checkpoint(function, *arguments, use_reentrant=reentrant)
        y.square().sum().backward()
        parameters = list((function if isinstance(function, nn.Module) else block).parameters())
        found = [p.grad.clone() for p in parameters if p.grad is not None]
        for p in parameters:
            p.grad = None
        return [y.detach(), given.grad, *found]

    wanted = run(its)
    for found in (run(block, False), run(block, True), run(torch.compile(block, backend="aot_eager", fullgraph=True))):
        torch.testing.assert_close(found, wanted, **EXACT)


def test_generation_is_litgpt_s(make: Any) -> None:
    from litgpt.generate.base import generate

    model = make(dtype=torch.float32).eval()
    other = copy.deepcopy(model)
    integration.accelerate(model)
    texts = []
    for one in (model, other):
        one.set_kv_cache(batch_size=1)
        texts.append(generate(one, tokens(1, 12)[0], max_returned_tokens=40, top_k=1))
    assert torch.equal(*texts)


def test_errors_come_before_anything_is_changed(make: Any) -> None:
    model = make()
    before = classes(model)
    with pytest.raises(ValueError, match="recompute: got 'some', expected 'outputs', 'all' or None"):
        integration.accelerate(model, recompute="some")
    assert classes(model) == before
    with pytest.raises(ValueError, match="model: it has no LoRA layer of litgpt's with an adapter"):
        integration.accelerate(make(lora_r=0))
    with pytest.raises(TypeError, match="model: got str"):
        integration.accelerate("model")
    with pytest.raises(ValueError, match="model: it has no PEFT layer.*lora_fast.integrations.litgpt"):
        lora_fast.accelerate(model)


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_linears_are_called(make: Any, kind: str) -> None:
    """bitsandbytes' own: those that Fabric derives from them are quantised on a GPU alone."""
    from lora_fast.bases import quantise

    model = make(dtype=torch.float32, head_size=16, n_embd=64, intermediate_size=64)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.linear = getattr(quantise, kind)(module.linear)
    other = copy.deepcopy(model)
    report = integration.accelerate(model)
    assert len(report.accelerated) == 11
    assert "LoRA, linear(x), lora_compose: the linear is a Linear" in str(report)
    (y, gradients), (wanted, wanted_gradients) = trained(model, tokens()), trained(other, tokens())
    assert gradients.keys() == wanted_gradients.keys()
    bound = (
        1e-2 if kind == "int8" else 1e-5
    )  # int8 rounds each x to 1/127 of its largest: a bit decides of a whole step
    for found, its in ((y, wanted), *((gradients[name], its) for name, its in wanted_gradients.items())):
        assert (found - its).norm() <= bound * its.norm()
