"""Copies, files, merging and training of accelerated PEFT layers over quantised linears."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft", reason="the peft extra is not installed")

from peft_helpers import results, uses_lora_fast
from peft_quantised_helpers import (
    fast_of,
    model_of,
    up,
    x_of,
)
from quantised_helpers import (
    BY_NAME,
    EXACT,
    USUAL,
    Format,
    formats,
    library_weight,
)
from torch.utils.checkpoint import checkpoint

import lora_fast

FORMS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
NF4 = BY_NAME["nf4"]


# ---- copies, files, merging


@formats(USUAL)
@FORMS
def test_state_and_files_are_pefts(form: Format, dora: bool, tmp_path: Any) -> None:
    peft, fast = model_of(form, use_dora=dora), fast_of(form, use_dora=dora)
    assert fast.state_dict().keys() == peft.state_dict().keys()
    for model in (peft, fast):
        model.save_pretrained(tmp_path / type(up(model)).__name__)
    fresh = model_of(form, use_dora=dora)
    with torch.no_grad():
        up(fresh).lora_B["default"].weight.zero_()
    fresh.load_adapter(tmp_path / type(up(fast)).__name__, "again")
    fresh.set_adapter("again")
    lora_fast.accelerate(fresh)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x_of(form)), fast.eval()(x_of(form)))


@formats(USUAL)
@FORMS
def test_copies(form: Format, dora: bool) -> None:
    assert_same_again(form, fast_of(form, use_dora=dora), copy.deepcopy)


@formats(tuple(form for form in USUAL if form.library == "bitsandbytes"))
@FORMS
def test_pickles(form: Format, dora: bool) -> None:
    """torchao's tensors and HQQ's layers cannot be. bitsandbytes' weights come back as plain parameters."""
    assert_same_again(form, fast_of(form, use_dora=dora), lambda model: pickle.loads(pickle.dumps(model)))


def assert_same_again(form: Format, model: Any, copied: Callable[[Any], Any]) -> None:
    wanted = results(model, x_of(form))
    again = copied(model)
    found = results(again, x_of(form))
    assert uses_lora_fast(again, x_of(form))
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@formats(tuple(form for form in BY_NAME.values() if form.name in ("nf4", "nf4-stored-as-bfloat16")))
@FORMS
def test_a_weight_that_lost_its_class(form: Format, dora: bool) -> None:
    """FSDP makes plain parameters of its shards; the layer has the quantisation still."""
    fast = fast_of(form, use_dora=dora)
    wanted = results(fast, x_of(form))
    for layer in (up(fast).base_layer, fast.base_model.model.down.base_layer):
        layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    found = results(fast, x_of(form))
    assert uses_lora_fast(fast, x_of(form))
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@formats(USUAL)
def test_restore_gives_pefts_layer_back(form: Format) -> None:
    peft, fast = model_of(form), fast_of(form)
    lora_fast.restore(fast)
    assert type(up(fast)) is type(up(peft))
    assert uses_lora_fast(fast, x_of(form)) == set()
    found, wanted = results(fast, x_of(form)), results(peft, x_of(form))
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.bitsandbytes
@FORMS
def test_merging_is_pefts(dora: bool) -> None:
    """And what it merges, lora_fast's layer goes on from."""
    peft, fast = model_of(NF4, use_dora=dora), fast_of(NF4, use_dora=dora)
    for model in (peft, fast):
        up(model).merge()
    with torch.no_grad():
        assert torch.equal(library_weight(up(fast).base_layer), library_weight(up(peft).base_layer))
        up(fast).unmerge()
        assert up(fast)(x_of(NF4)).isfinite().all()


@pytest.mark.torchao
def test_what_peft_merges_wrongly_is_refused() -> None:
    import torchao.quantization as library

    for form in (BY_NAME["int8-weight-only"], BY_NAME["int8-dynamic"]):
        fast = fast_of(form, use_dora=True)
        weight = library_weight(up(fast).base_layer)
        up(fast).get_apply_tensor_subclass = library.Int8WeightOnlyConfig
        with pytest.raises(RuntimeError, match=r"merge: PEFT .* without its magnitude.*load the base unquantised"):
            fast.merge_adapter()
        assert torch.equal(library_weight(up(fast).base_layer), weight)
    fast = fast_of(BY_NAME["int8-weight-only"])
    for layer in (up(fast), fast.base_model.model.down):
        layer.get_apply_tensor_subclass = library.Int8WeightOnlyConfig
    fast.merge_adapter()


@pytest.mark.hqq
def test_hqqs_bias_is_not_lost_in_merging() -> None:
    form = BY_NAME["hqq-4-bits"]
    fast = fast_of(form)
    with pytest.raises(RuntimeError, match="without its bias; keep the adapter unmerged"):
        fast.merge_adapter()
    assert up(fast).base_layer.bias is not None
    fast_of(form, bias=False).merge_adapter()


# ---- training


def steps(model: nn.Module, form: Format, count: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    losses = []
    for step in range(count):
        loss = model(x_of(form, 8, seed=step)).float().square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            with torch.no_grad():
                model.eval()(x_of(form))
            model.train()
    return losses


@formats(tuple(form for form in EXACT if not form.name.startswith("int8-f")))
@FORMS
def test_training_takes_the_same_course(form: Format, dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peft, fast = model_of(form, use_dora=dora), fast_of(form, use_dora=dora)
    if form.library == "bitsandbytes":
        for layer in (up(peft).base_layer, peft.base_model.model.down.base_layer):
            layer.support_avx512bf16_for_cpu = False  # else PEFT's evaluation would end its training
    torch.testing.assert_close(steps(fast, form), steps(peft, form), rtol=1e-4, atol=1e-5)


@formats(USUAL)
@FORMS
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing(form: Format, dora: bool, use_reentrant: bool, dropout: float) -> None:
    fast = fast_of(form, use_dora=dora, lora_dropout=dropout).train()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = fast

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=use_reentrant)

    torch.manual_seed(0)
    wanted = results(fast, x_of(form))
    torch.manual_seed(0)
    found = results(Checkpointed(), x_of(form))
    for name, value in wanted.items():
        assert torch.equal(found[name if name in "xy" else f"model.{name}"], value), name


@formats(USUAL)
@FORMS
def test_compiled_without_a_break(form: Format, dora: bool) -> None:
    assert_compiles(form, fast_of(form, use_dora=dora))


@formats(USUAL)
@FORMS
def test_compiled_under_a_default_device(form: Format, dora: bool) -> None:
    with torch.device("cpu"):  # a mode, under which dynamo asks each tensor's __torch_function__
        assert_compiles(form, fast_of(form, use_dora=dora))


def assert_compiles(form: Format, fast: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    wanted = results(fast, x_of(form))
    for _ in range(2):
        found = {name.removeprefix("_orig_mod."): value for name, value in results(compiled, x_of(form)).items()}
        for name, value in wanted.items():
            assert (found[name] - value).norm() <= 0.01 * value.norm(), name
    with torch.no_grad():
        up(fast).lora_B["default"].weight.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x_of(form)), fast(x_of(form)), rtol=0.02, atol=0.02)


@pytest.mark.bitsandbytes
@FORMS
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_of_transformers_trains_as_in_qlora(dora: bool, bits: int, tmp_path: Any) -> None:
    """Loaded quantised, prepared as PEFT advises, with checkpointing, by its Trainer; the adapter saved and loaded."""
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantisation = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))

    def loaded() -> Any:
        options = {"quantization_config": quantisation, "device_map": "cpu"}
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", **options)

    model = prepare_model_for_kbit_training(loaded(), gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=4, use_dora=dora, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    report = lora_fast.accelerate(model)
    assert len(report.accelerated) == 14
    assert report.left_alone == []
    tokens = torch.arange(24).view(2, 12) % 7
    rows = [{"input_ids": row, "labels": row} for row in tokens] * 8
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded(), tmp_path / "adapter").eval()
    lora_fast.accelerate(again)
    with torch.no_grad():
        wanted, found = (m(input_ids=tokens).logits.float() for m in (model, again))
    assert (found - wanted).norm() < 0.02 * wanted.norm()
