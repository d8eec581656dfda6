"""LoraFastCallback in transformers' Trainer: PEFT's losses and files, in layers that lora_fast runs."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="the peft extra is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from trainer_helpers import EXACT, LAYERS, adapted, base, config, counted, losses, settings, trained, write_base
from transformers import Trainer, TrainingArguments

import lora_fast
from lora_fast.integrations import LoraFastCallback, peft as peft_integration

STEPS, SAVED = 6, 2
MOVED = {"rtol": 1e-3, "atol": 1e-5}  # of parameters, which each step moves by up to the learning rate, 1e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trainer") / "base"
    write_base(made)
    return made


def data(rows: int, seed: int) -> list[dict[str, Any]]:
    words = torch.randint(200, (rows, 24), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in words]


def trainer(tmp_path: Path, model: Any, *callbacks: Any, **options: Any) -> Trainer:
    given = {"model": model} if isinstance(model, nn.Module) else {"model_init": model}
    sets = {"train_dataset": data(8, 0), "eval_dataset": data(4, 1)}
    return Trainer(
        **given,
        args=TrainingArguments(**settings(tmp_path, max_steps=STEPS, **options)),
        callbacks=list(callbacks),
        **sets,
    )


@pytest.mark.parametrize(
    ("options", "use_dora"),
    [
        ({}, False),
        ({}, True),
        ({"gradient_checkpointing": True}, True),
        ({"gradient_accumulation_steps": 2}, True),
        ({"torch_compile_backend": "aot_eager"}, True),
    ],
    ids=["LoRA", "DoRA", "checkpointing", "accumulation", "compile"],
)
def test_losses_are_those_of_peft(folder: Path, tmp_path: Path, options: dict[str, Any], use_dora: bool) -> None:
    is_compiled = "torch_compile_backend" in options
    plain = trainer(tmp_path, adapted(folder, use_dora=use_dora), **({} if is_compiled else options))
    plain.train()
    # a backend that is named: "auto" leaves LoRA in layers as small as these to PEFT
    with counted() as counts, lora_fast.use_backend("torch"):
        callback = LoraFastCallback()
        fast = trainer(tmp_path, adapted(folder, use_dora=use_dora), callback, **options)
        fast.train()
    assert callback.report is not None
    assert len(callback.report.accelerated) == LAYERS
    batches = STEPS * options.get("gradient_accumulation_steps", 1)
    op = "dora_linear" if use_dora else "lora_linear"
    if not is_compiled:  # a graph is traced once
        forwards = 2 * batches if "gradient_checkpointing" in options else batches
        assert counts == {op: forwards * 8, "adapted_mlp": forwards * 2}
    else:
        assert counts[op] >= 8
    wanted = losses(plain)
    assert len(wanted) == STEPS
    assert wanted[-1] < wanted[0]
    torch.testing.assert_close(losses(fast), wanted, **EXACT)
    torch.testing.assert_close(trained(fast.model), trained(plain.model), **MOVED)
    torch.testing.assert_close(fast.evaluate()["eval_loss"], plain.evaluate()["eval_loss"], **EXACT)


def test_autocast(folder: Path, tmp_path: Path) -> None:
    plain = trainer(tmp_path, adapted(folder, use_dora=True), bf16=True)
    plain.train()
    fast = trainer(tmp_path, adapted(folder, use_dora=True), LoraFastCallback(), bf16=True)
    fast.train()
    torch.testing.assert_close(losses(fast), losses(plain), rtol=7e-3, atol=0)  # that of test_peft_trainer.py


def test_saving_resuming_and_the_best_model(folder: Path, tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": SAVED, "eval_strategy": "steps", "eval_steps": SAVED}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    runs = {}
    for name, callbacks in (("plain", ()), ("fast", (LoraFastCallback(),))):
        made = trainer(tmp_path / name, adapted(folder, use_dora=True), *callbacks, **saves, **best)
        made.train()
        runs[name] = made
    plain, fast = runs["plain"], runs["fast"]
    torch.testing.assert_close(losses(fast, "loss", "eval_loss"), losses(plain, "loss", "eval_loss"), **EXACT)
    # the largest loss is that of the first checkpoint, and so the model that was loaded is not the last one
    assert Path(fast.state.best_model_checkpoint).name == Path(plain.state.best_model_checkpoint).name == "checkpoint-2"
    saved = load_file(tmp_path / "fast" / "checkpoint-2" / "adapter_model.safetensors")
    own = load_file(tmp_path / "plain" / "checkpoint-2" / "adapter_model.safetensors")
    torch.testing.assert_close(saved, own, **MOVED)
    loaded = PeftModel.from_pretrained(base(folder), tmp_path / "fast" / "checkpoint-2")
    assert all(torch.equal(p, trained(fast.model)[name]) for name, p in loaded.named_parameters() if "lora_" in name)
    # the norms that are kept are those of what was loaded
    fast.model.eval()
    x = torch.arange(24)[None]
    torch.testing.assert_close(fast.model(x).logits, loaded.eval()(x).logits, rtol=1e-5, atol=1e-5)  # up to 4

    again = trainer(tmp_path / "again", adapted(folder, use_dora=True), LoraFastCallback())
    again.train(resume_from_checkpoint=str(tmp_path / "fast" / "checkpoint-4"))
    torch.testing.assert_close(losses(again)[-2:], losses(fast)[-2:], rtol=1e-6, atol=0)


def test_a_model_that_the_trainer_makes_later(folder: Path, tmp_path: Path) -> None:
    """By model_init, which is called once more when training begins."""
    callback = LoraFastCallback()
    fast = trainer(tmp_path, lambda: adapted(folder), callback)
    first, report = fast.model, callback.report
    with counted() as counts, lora_fast.use_backend("torch"):
        fast.train()
    assert fast.model is not first
    assert callback.report is not report
    assert counts["lora_linear"] == STEPS * 8


def test_an_adapter_that_comes_after_the_trainer(folder: Path, tmp_path: Path) -> None:
    callback = LoraFastCallback
    fast = trainer(tmp_path, base(folder), callback)  # the class itself, which the Trainer takes too
    fast.model = fast.model_wrapped = fast.callback_handler.model = get_peft_model(fast.model, config(use_dora=True))
    with counted() as counts:
        fast.train()
    assert counts["dora_linear"] == STEPS * 8


def test_a_model_without_adapters(folder: Path, tmp_path: Path) -> None:
    fast = trainer(tmp_path, base(folder), LoraFastCallback())
    with pytest.raises(ValueError, match="model: it has no PEFT layer; call get_peft_model"):
        fast.train()


def test_arguments(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="recompute: got 'some', expected 'outputs', 'all' or None"):
        LoraFastCallback(recompute="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compute_dtype: got 'float32'"):
        LoraFastCallback(compute_dtype="float32")
    callback = LoraFastCallback(recompute=None, norm_reuse=False, compute_dtype="adapter", stack_weights=False)
    fast = trainer(tmp_path, adapted(folder, use_dora=True), callback)
    assert callback.report is not None
    assert callback.report.mlps == ()
    state = fast.model.base_model.model.model.layers[0].mlp.gate_proj._lora_fast
    assert (state.norm_reuse, state.compute_dtype, state.stack_weights) == (False, "adapter", False)
    printed = capsys.readouterr().out
    assert printed.startswith(f"lora_fast: {LAYERS} of {LAYERS} adapter layers accelerated (peft ")
    assert "\n  fast  14 × Linear: default: DoRA, weight_norm, lora_linear\n" in printed
    fast.train()
    assert "lora_fast" not in capsys.readouterr().out  # once for a model


def test_only_the_first_process_prints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TrainerState

    callback, state = LoraFastCallback(), TrainerState()
    state.is_world_process_zero = False
    callback.on_init_end(None, state, None, model=adapted(folder))
    assert callback.report is not None
    assert capsys.readouterr().out == ""


def test_a_wrapper_of_the_model_is_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As FSDP1's, which the Trainer hands to on_train_begin; and a copy has no memory of the model."""
    from transformers import TrainerState

    callback, state, model = LoraFastCallback(), TrainerState(), adapted(folder)
    callback.on_init_end(None, state, None, model=model)
    callback.on_train_begin(None, state, None, model=nn.Sequential(model))
    assert capsys.readouterr().out.count("lora_fast: ") == 1
    for made in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert made.options == callback.options
        made.on_train_begin(None, state, None, model=model)
        assert capsys.readouterr().out.count("lora_fast: ") == 1


def test_prompt_tuning_is_refused(folder: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    model = get_peft_model(base(folder), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="model: PEFT has put no layers into it, as for prompt tuning"):
        trainer(tmp_path, model, LoraFastCallback()).train()


def test_restored_afterwards(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    before = [type(module) for module in model.modules()]
    trainer(tmp_path, model, LoraFastCallback()).train()
    assert [type(module) for module in model.modules()] != before
    lora_fast.restore(model)
    assert [type(module) for module in model.modules()] == before


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from lora_fast import integrations

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "lora_fast.integrations.trainer")
    with pytest.raises(ImportError, match="LoraFastCallback needs transformers: pip install transformers"):
        _ = integrations.LoraFastCallback
    with pytest.raises(AttributeError, match="has no attribute 'LoraFastCallbacks'"):
        _ = integrations.LoraFastCallbacks


def test_has_layers(folder: Path) -> None:
    assert not peft_integration.has_layers(base(folder))
    assert peft_integration.has_layers(adapted(folder))
    assert peft_integration.has_layers(nn.Sequential(adapted(folder)))
