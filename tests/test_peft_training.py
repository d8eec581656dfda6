"""Accelerated PEFT models in training loops, under torch.compile and in transformers' and accelerate's hands."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft", reason="the peft extra is not installed")

from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from peft_helpers import (
    EXACT,
    Perceptron,
    accelerated,
    adapted,
    assert_same,
    move,
    perceptron,
    results,
    same_masks,
    tokens,
    uses_lora_fast,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lora_fast

__all__ = ["same_masks"]
FORMS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def steps(model: nn.Module, count: int = 4) -> list[Tensor]:
    """The losses of some optimizer steps, each of two micro-batches."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for step in range(count):
        for part in range(2):
            x = tokens(6, 12) * (1 + step + part)
            loss = model(x).square().mean()
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@FORMS
def test_training_takes_the_same_course(dora: bool) -> None:
    peft = perceptron(use_dora=dora, modules_to_save=["head"], bias="lora_only")
    fast = accelerated(peft)
    torch.testing.assert_close(steps(fast), steps(peft), **EXACT)
    torch.testing.assert_close(fast.state_dict(), peft.state_dict(), **EXACT)
    torch.testing.assert_close(fast.eval()(tokens(3, 12)), peft.eval()(tokens(3, 12)), **EXACT)


class Checkpointed(Perceptron):
    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda x: self.down(torch.tanh(self.up(x))), x, use_reentrant=self.use_reentrant))


@FORMS
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing(
    dora: bool, use_reentrant: bool, dropout: float, same_masks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpointed, "use_reentrant", use_reentrant)
    config = {"target_modules": ["up", "down"], "use_dora": dora, "lora_dropout": dropout}
    peft = adapted(Checkpointed(), torch.float64, **config).train()
    fast = accelerated(peft)
    for _ in range(2):  # the norm is computed in the first, kept in the second
        assert_same(fast, peft, tokens(6, 12), around=same_masks)
    if not dropout and not use_reentrant:  # which needs an x that requires grad
        torch.testing.assert_close(steps(fast), steps(peft), **EXACT)


@FORMS
def test_compiled_without_a_break(dora: bool) -> None:
    fast = accelerated(perceptron(use_dora=dora))
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_same_results(compiled, fast, tokens(5, 12))
    assert ("dora_linear_fwd" in uses_lora_fast(compiled, tokens(5, 12))) == dora
    assert all(kept.key.ne(-2).all() for kept in fast.base_model.model.up._lora_fast.kept.values())
    with torch.no_grad():
        fast.base_model.model.up.lora_B["default"].weight.mul_(2)
    assert_same_results(compiled, fast, tokens(5, 12))
    fast.eval()
    torch.testing.assert_close(compiled(tokens(5, 12)), fast(tokens(5, 12)), **EXACT)


def assert_same_results(compiled: nn.Module, eager: nn.Module, x: Tensor) -> None:
    actual = {name.removeprefix("_orig_mod."): value for name, value in results(compiled, x).items()}
    torch.testing.assert_close(actual, results(eager, x), **EXACT)


def test_compiled_with_dropout_and_several_adapters() -> None:
    fast = accelerated(perceptron(use_dora=True, adapters=("p", "q"), lora_dropout=0.3)).train()
    fast.base_model.set_adapter(["p", "q"])
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert compiled(tokens(5, 12)).isfinite().all()
    fast.eval()
    torch.testing.assert_close(compiled(tokens(5, 12)), fast(tokens(5, 12)), **EXACT)


def test_compiled_for_an_adapter_that_was_added_since() -> None:
    fast = accelerated(perceptron(use_dora=True))
    fast.add_adapter("other", LoraConfig(r=2, use_dora=True, target_modules=["up", "down"]))
    move(fast.double())
    fast.set_adapter("other")
    compiled = torch.compile(copy.deepcopy(fast), fullgraph=True, backend="aot_eager")
    assert "dora_linear_fwd" in uses_lora_fast(compiled, tokens(5, 12))
    torch.testing.assert_close(compiled(tokens(5, 12)), fast(tokens(5, 12)), **EXACT)


@FORMS
def test_compiled_without_any_gradient(dora: bool) -> None:
    fast = accelerated(perceptron(use_dora=dora, adapters=("p", "q"))).eval()
    fast.base_model.set_adapter(["p", "q"])
    fast.requires_grad_(False)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens(5, 12)), fast(tokens(5, 12)), **EXACT)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    fast = accelerated(perceptron(use_dora=True))
    assert_same_results(torch.compile(fast, fullgraph=True), fast, tokens(5, 12))


def test_accelerator(tmp_path: Path) -> None:
    """prepare, backward, clipping and unwrapping, with bfloat16 autocast."""
    peft = perceptron(use_dora=True, dtype=torch.float32)
    fast = accelerated(peft)
    losses = []
    for model in (fast, peft):
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(3):
            loss = prepared(tokens(6, 12, dtype=torch.float32)).float().square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        assert bool(uses_lora_fast(prepared, tokens(6, 12, dtype=torch.float32))) == (model is fast)
        accelerator.unwrap_model(prepared).save_pretrained(tmp_path)
    # a mean of squares of numbers that either side rounds: two ulp of bfloat16 for one that is all of one sign
    torch.testing.assert_close(*losses, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0.0)


def language_model(kind: str, **config: Any) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        base: Any = GPT2LMHeadModel(
            GPT2Config(
                n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
            )
        )
        config = {"target_modules": ["c_attn", "c_proj", "c_fc", "wte", "wpe"], "fan_in_fan_out": True, **config}
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=32))
        config = {"target_modules": "all-linear", **config}
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **config))
    move(model)
    return model


def trained(model: Any, folder: Path, **arguments: Any) -> tuple[Any, list[float]]:
    words = torch.randint(32, (8, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in words]
    options = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=arguments.pop("max_steps", 4),
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **{name: value for name, value in arguments.items() if name != "resume"},
    )
    trainer = Trainer(model=model, args=options, train_dataset=data)
    trainer.train(resume_from_checkpoint=arguments.get("resume"))
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@FORMS
def test_trainer_with_checkpointing_saves_and_resumes(kind: str, dora: bool, tmp_path: Path) -> None:
    peft = language_model(kind, use_dora=dora)
    fast = accelerated(peft)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    _, wanted = trained(peft, tmp_path / "peft", **options)
    _, losses = trained(fast, tmp_path / "fast", **options)
    assert losses == pytest.approx(wanted, rel=1e-5)  # float32 over four steps; the log has six digits
    assert losses[-1] < losses[0]
    assert sorted(os.listdir(tmp_path / "fast" / "checkpoint-4")) == sorted(
        os.listdir(tmp_path / "peft" / "checkpoint-4")
    )

    again = accelerated(language_model(kind, use_dora=dora))
    _, resumed = trained(again, tmp_path / "fast", resume=str(tmp_path / "fast" / "checkpoint-2"), **options)
    assert resumed[-1] == pytest.approx(losses[-1], rel=1e-4)

    base = copy.deepcopy(peft).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "fast" / "checkpoint-4")
    lora_fast.accelerate(loaded)
    words = torch.arange(8)[None]
    torch.testing.assert_close(loaded.eval()(words).logits, fast.eval()(words).logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@FORMS
def test_language_models(kind: str, dora: bool) -> None:
    peft = language_model(kind, use_dora=dora).double().eval()
    fast = accelerated(peft)
    report = lora_fast.accelerate(fast)
    assert report.left_alone == []
    words = torch.arange(12).view(2, 6)
    assert_same(fast, peft, words, labels=words)
    made = [
        model.generate(input_ids=words, max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (fast, peft)
    ]
    assert torch.equal(*made)
