"""PEFT's adapter_names on accelerated models: one product with W for all, DoRA too, and training."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft_helpers import EXACT, PEFT_0_18, Perceptron, accelerated, adapted, move, perceptron, tokens, uses_lora_fast
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_fast
from lora_fast import functional
from lora_fast.integrations import peft_batches

NAMES = ["q", "__base__", "p", "q", "r", "p"]


def several(forms: str = "lll", base: nn.Module | None = None, targets: Any = ("up", "down"), **config: Any) -> Any:
    """A model with an adapter p, q, r for each letter of ``forms``: l for LoRA, d for DoRA; ranks 4, 3 and 2."""
    kinds = [{"r": 4 - i, "use_dora": form == "d", **config} for i, form in enumerate(forms)]
    model = adapted(base or Perceptron(), torch.float64, ("p",), target_modules=list(targets), **kinds[0])
    for name, kind in zip("qr", kinds[1:], strict=False):
        model.add_adapter(name, LoraConfig(target_modules=list(targets), lora_alpha=6, **kind))
    move(model)
    return model.double()


def alone(model: Any, x: Tensor, names: list[str], **kwargs: Any) -> Tensor:
    """Each sample as if it came alone, with its adapter set."""
    outputs = []
    for sample, name in zip(x, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                y = model(sample[None], **kwargs)
        else:
            model.base_model.set_adapter(name)
            y = model(sample[None], **kwargs)
        outputs.append(y if isinstance(y, Tensor) else y.logits)
    return torch.cat(outputs)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("shape", [(6, 12), (6, 5, 12), (6, 2, 3, 12)])
def test_lora_is_pefts_loop(shape: tuple[int, ...], hooked: bool) -> None:
    peft = several().eval()
    if hooked:
        peft.base_model.model.up.base_layer.register_forward_hook(lambda _module, _args, y: y * 2)
    fast = accelerated(peft)
    x = tokens(*shape)
    torch.testing.assert_close(fast(x, adapter_names=NAMES), peft(x, adapter_names=NAMES), **EXACT)
    used = uses_lora_fast(fast, x, adapter_names=NAMES)
    assert "grouped_lora_fwd" in used
    assert not used & {"lora_linear_fwd", "lora_compose_fwd"}


@pytest.mark.parametrize("forms", ["ddd", "ldl"])
@pytest.mark.parametrize("hooked", [False, True])
def test_dora_is_each_sample_alone(forms: str, hooked: bool) -> None:
    peft = several(forms).eval()
    fast = accelerated(peft)
    if hooked:
        for layer in (fast.base_model.model.up, fast.base_model.model.down):
            layer.base_layer.register_forward_hook(lambda *_: None)
    x = tokens(6, 5, 12)
    torch.testing.assert_close(fast(x, adapter_names=NAMES), alone(peft, x, NAMES), **EXACT)


def test_one_product_with_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of adapters; a loop over them, as for a lora_bias, is seen to make more."""
    calls = []
    kernel = functional.grouped_lora_linear
    monkeypatch.setattr(functional, "grouped_lora_linear", lambda *args, **kw: calls.append(1) or kernel(*args, **kw))
    x = tokens(6, 5, 12)
    accelerated(several().eval())(x, adapter_names=NAMES)
    assert len(calls) == 2  # up and down
    calls.clear()
    with_bias = accelerated(several(lora_bias=True).eval())
    used = uses_lora_fast(with_bias, x, adapter_names=NAMES)
    assert not calls
    assert "lora_linear_fwd" in used


def test_a_lora_bias_goes_by_the_loop() -> None:
    peft = several(lora_bias=True).eval()
    x = tokens(6, 5, 12)
    torch.testing.assert_close(accelerated(peft)(x, adapter_names=NAMES), peft(x, adapter_names=NAMES), **EXACT)


def test_an_adapter_that_a_layer_lacks_is_the_base_there() -> None:
    peft = adapted(Perceptron(), torch.float64, ("p",), target_modules=["up"], r=4)
    peft.add_adapter("q", LoraConfig(target_modules=["down"], r=3))
    peft.add_adapter("r", LoraConfig(target_modules=["up", "down"], r=2))
    move(peft)
    peft = peft.double().eval()
    x = tokens(6, 5, 12)
    torch.testing.assert_close(accelerated(peft)(x, adapter_names=NAMES), peft(x, adapter_names=NAMES), **EXACT)


@pytest.mark.parametrize("forms", ["lll", "ddd"])
@pytest.mark.parametrize("name", ["__base__", "q"])
def test_all_the_same(name: str, forms: str) -> None:
    """As that adapter's layer, in one call."""
    peft = several(forms).eval()
    x, names = tokens(6, 5, 12), [name] * 6
    fast = accelerated(peft)
    torch.testing.assert_close(fast(x, adapter_names=names), alone(peft, x, names), **EXACT)
    used = uses_lora_fast(fast, x, adapter_names=names)
    assert not any(op.startswith("grouped") for op in used)
    assert bool(used) == (name == "q")


def test_embeddings_and_convolutions_keep_the_loop() -> None:
    base = nn.Sequential()
    base.add_module("embed", nn.Embedding(11, 12))
    base.add_module("up", nn.Linear(12, 7))
    peft = several(base=base, targets=("embed", "up")).eval()
    x = torch.randint(0, 11, (6, 5))
    fast = accelerated(peft)
    torch.testing.assert_close(fast(x, adapter_names=NAMES), peft(x, adapter_names=NAMES), **EXACT)
    report = lora_fast.accelerate(fast)
    embed, up = (next(layer.runs for layer in report.layers if layer.name.endswith(name)) for name in ("embed", "up"))
    assert "adapter_names: one adapter after the other" in embed
    assert "adapter_names: grouped_lora_linear" in up


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, pad_token_id=0, **sizes))


def test_transposed_weights() -> None:
    peft = several("lll", gpt2(), ("c_attn", "c_proj"), fan_in_fan_out=True).eval()
    x = torch.randint(0, 40, (6, 5))
    ours = accelerated(peft)(input_ids=x, adapter_names=NAMES).logits
    torch.testing.assert_close(ours, peft(input_ids=x, adapter_names=NAMES).logits, **EXACT)


def test_beams_and_generation() -> None:
    peft = several("lll", llama(), ("q_proj", "v_proj", "down_proj")).eval()
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "adapter_names": NAMES}
    x = torch.randint(1, 40, (6, 5))
    if PEFT_0_18:  # it does not repeat the names for the beams
        for model in (peft, accelerated(peft)):
            with pytest.raises(ValueError, match="got 6 and 18"):
                model.generate(input_ids=x, **options)
        return
    assert torch.equal(accelerated(peft).generate(input_ids=x, **options), peft.generate(input_ids=x, **options))


def test_the_hooks_are_gone_after_an_error() -> None:
    """PEFT's own stay, and fail every later forward; what is not PEFT's is left."""
    peft = several().eval()
    peft.base_model.model.up.register_forward_pre_hook(lambda module, args: None)
    fast = accelerated(peft)
    x = tokens(6, 12)
    for model, stays in ((peft, True), (fast, False)):
        before = len(model.base_model.model.up._forward_pre_hooks)
        with pytest.raises((RuntimeError, ValueError), match="shape"):
            model(x[:, :7], adapter_names=NAMES)
        assert (len(model.base_model.model.up._forward_pre_hooks) > before) == stays
    torch.testing.assert_close(fast(x), accelerated(several().eval())(x), **EXACT)


def test_a_forward_without_names_looks_for_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be a walk over all modules in each step."""
    fast, looked = accelerated(several()).train(), []
    found = peft_batches._hooks
    monkeypatch.setattr(peft_batches, "_hooks", lambda model: looked.append(model) or found(model))
    fast(tokens(6, 12))
    assert not looked
    fast(tokens(6, 12), adapter_names=NAMES)
    assert looked


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def train_all(model: Any) -> Any:
    """Every adapter's parameters want gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model.train()


@pytest.mark.parametrize("forms", ["lll", "ddd", "ldl"])
@pytest.mark.parametrize("hooked", [False, True])
def test_training_together_gives_the_gradients_of_separate_runs(forms: str, hooked: bool) -> None:
    peft = train_all(several(forms))
    fast = train_all(accelerated(peft))
    if hooked:
        fast.base_model.model.up.base_layer.register_forward_hook(lambda *_: None)
    x, target = tokens(6, 5, 12), tokens(6, 5, 5, seed=8)
    (fast(x, adapter_names=NAMES) - target).square().sum().backward()
    together = gradients(fast)
    for sample, name in enumerate(NAMES):
        if name != "__base__":
            peft.base_model.set_adapter(name)
            train_all(peft)
            (peft(x[sample, None]) - target[sample]).square().sum().backward()
    separate = gradients(peft)
    assert {name for name in together if together[name].any()} == set(separate)
    for name, gradient in separate.items():
        torch.testing.assert_close(together[name], gradient, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_computes_with_the_same_adapters_again(use_reentrant: bool) -> None:
    fast = train_all(accelerated(several("ldl", llama(), ("q_proj", "v_proj", "down_proj"))))
    x = torch.randint(1, 40, (6, 5))

    def run() -> dict[str, Tensor]:
        fast(input_ids=x, labels=x, adapter_names=NAMES).loss.backward()
        return gradients(fast)

    wanted = run()
    fast.enable_input_require_grads()
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = run()
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, **EXACT)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_around_modules_that_are_saved(use_reentrant: bool) -> None:
    """PEFT's wrappers of modules_to_save know the names again as well; and an evaluation between changes nothing."""
    config = {"modules_to_save": ["up_proj"]}
    fast = accelerated(several("ldl", llama(), ("q_proj", "down_proj"), **config))
    for name, parameter in fast.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    fast.train()
    x = torch.randint(1, 40, (6, 5))

    def run() -> dict[str, Tensor]:
        loss = fast(input_ids=x, labels=x, adapter_names=NAMES).loss
        fast.eval()
        with torch.no_grad():
            fast(input_ids=x, adapter_names=NAMES[::-1])
        fast.train()
        loss.backward()
        return gradients(fast)

    wanted = run()
    fast.enable_input_require_grads()
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = run()
    assert found.keys() == wanted.keys()
    assert any("modules_to_save" in name for name in found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in fast.modules())
    lora_fast.restore(fast)
    kept = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in fast.modules())
    assert kept < hooks


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("batches", [(NAMES, NAMES[::-1]), (NAMES, None), (None, NAMES)])
def test_forwards_that_a_recomputation_cannot_tell_apart(batches: Any, use_reentrant: bool) -> None:
    """Both wait for their backward, which raises; one after the other is right, and so is a list changed meanwhile."""
    fast = train_all(accelerated(several("ldl", llama(), ("q_proj", "v_proj", "down_proj"))))
    x = torch.randint(1, 40, (6, 5))

    def loss(names: list[str] | None) -> Tensor:
        return fast(input_ids=x, labels=x, **({} if names is None else {"adapter_names": names})).loss

    wanted = []
    for names in batches:
        loss(names).backward()
        wanted.append(gradients(fast))
    fast.enable_input_require_grads()
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with pytest.raises(RuntimeError, match="call backward after each"):
        sum(loss(names) for names in batches).backward()
    fast.zero_grad(set_to_none=True)
    fast.eval()
    with torch.no_grad():
        loss(batches[0])  # none that is computed again
    fast.train()
    for names, expected in zip(batches, wanted, strict=True):
        given = None if names is None else list(names)
        result = loss(given)
        if given is not None:
            given.reverse()
        result.backward()
        for name, gradient in gradients(fast).items():
            torch.testing.assert_close(gradient, expected[name], **EXACT)


def test_what_a_tracer_saw_is_not_kept() -> None:
    fast = accelerated(several().eval())
    x = tokens(6, 12)
    wanted = fast(x, adapter_names=NAMES)
    peft_batches._kept_groups.cache_clear()
    peft_batches._kept_scaling.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fast(mode.from_tensor(x), adapter_names=NAMES)
    torch.testing.assert_close(fast(x, adapter_names=NAMES), wanted, **EXACT)


def test_the_loss_curves_of_four_adapters_together_are_those_of_four_runs() -> None:
    names = ["a", "b", "c", "d"]
    start = adapted(Perceptron(), torch.float64, tuple(names), target_modules=["up", "down"], use_dora=True, r=3)
    x, target = tokens(4, 7, 12), tokens(4, 7, 5, seed=8)

    def curve(model: Any, samples: Tensor, step: Any) -> list[list[float]]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        curves = []
        for _ in range(25):
            losses = (step(model) - target[samples]).square().mean((1, 2))
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            curves.append(losses.tolist())
        return curves

    fast = train_all(accelerated(start))
    together = curve(fast, torch.arange(4), lambda model: model(x, adapter_names=names))
    for sample, name in enumerate(names):
        model = copy.deepcopy(start)
        model.base_model.set_adapter(name)
        model.train()
        single = curve(model, torch.tensor([sample]), lambda model, sample=sample: model(x[sample, None]))
        torch.testing.assert_close([row[sample] for row in together], [row[0] for row in single], rtol=1e-9, atol=0)
        assert single[-1][0] < 0.7 * single[0][0]


def test_training_with_dropout_goes_by_the_loop() -> None:
    fast = train_all(accelerated(several(lora_dropout=0.5)))
    x = tokens(6, 5, 12)
    torch.manual_seed(0)
    one = fast(x, adapter_names=NAMES)
    other = fast(x, adapter_names=NAMES)
    changed = (one != other).flatten(1).any(1)
    assert changed.tolist() == [name != "__base__" for name in NAMES]
    torch.testing.assert_close(fast.eval()(x, adapter_names=NAMES), alone(fast, x, NAMES), **EXACT)


def test_what_lora_fast_does_not_run_is_not_trained_together() -> None:
    fast = accelerated(several()).train()
    fast.base_model.model.up = copy.deepcopy(fast.base_model.model.up)
    lora_fast.restore(fast.base_model.model.up)
    with pytest.raises(ValueError, match="training mode"):
        fast(tokens(6, 12), adapter_names=NAMES)
    lora_fast.restore(fast)
    with pytest.raises(ValueError, match="training mode"):
        fast(tokens(6, 12), adapter_names=NAMES)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_hand_out_names_of_their_own(copied: Any) -> None:
    fast = accelerated(several()).train()
    x = tokens(6, 12)
    wanted = fast(x, adapter_names=NAMES)
    other = copied(fast)
    for parameter in fast.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(other(x, adapter_names=NAMES), wanted, **EXACT)
    assert not fast(x, adapter_names=NAMES).any()


def test_inference_mode_before_training() -> None:
    """What is kept of a batch's names serves both."""
    fast = train_all(accelerated(several()))
    peft_batches._kept_groups.cache_clear()
    x = tokens(6, 12)
    with torch.inference_mode():
        fast(x, adapter_names=NAMES)
    fast(x, adapter_names=NAMES).sum().backward()


@pytest.mark.parametrize("forms", ["lll", "ldl"])
def test_a_layer_compiles_without_a_break(forms: str) -> None:
    layer = accelerated(several(forms).eval()).base_model.model.up
    x = tokens(6, 5, 12)
    compiled = torch.compile(lambda x: layer(x, adapter_names=NAMES), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x, adapter_names=NAMES), **EXACT)


@pytest.mark.parametrize("compute_dtype", ["activation", "adapter"])
def test_adapters_in_float32_on_a_base_in_16_bits(compute_dtype: str) -> None:
    peft = perceptron(dtype=torch.bfloat16, adapters=("p", "q", "r")).eval()
    for name, parameter in peft.named_parameters():  # PEFT 0.18 leaves those of add_adapter in 16 bits
        if "lora_" in name:
            parameter.data = parameter.data.float()
    fast = accelerated(peft, compute_dtype=compute_dtype)
    x = tokens(6, 5, 12, dtype=torch.bfloat16)
    ours, theirs = fast(x, adapter_names=NAMES), peft(x, adapter_names=NAMES)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    assert ("grouped_lora_fwd" in uses_lora_fast(fast, x, adapter_names=NAMES)) == (compute_dtype == "activation")


def test_autocast() -> None:
    peft = perceptron(dtype=torch.float32, adapters=("p", "q", "r")).eval()
    fast = accelerated(peft)
    x = tokens(6, 5, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fast(x, adapter_names=NAMES), peft(x, adapter_names=NAMES)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
