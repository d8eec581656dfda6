"""TRL's trainers with LoraFastCallback: PEFT's losses, also of the reference model, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.trl

STEPS, SAVED = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trainer_helpers import write_base

    made = tmp_path_factory.mktemp("trl") / "base"
    write_base(made)
    return made


def sft(folder: Path, tmp_path: Path, peft_config: Any, *callbacks: Any, model: Any = None, **options: Any) -> Any:
    from datasets import Dataset
    from trainer_helpers import base, settings
    from trl import SFTConfig, SFTTrainer

    from lora_fast.benchmarks.trainers_child import tokenizer

    texts = Dataset.from_dict({"text": [f"number {count} is {count * count} squared" for count in range(12)]})
    torch.manual_seed(1)
    return SFTTrainer(
        model=model or base(folder),
        args=SFTConfig(**settings(tmp_path, max_steps=STEPS, bf16=False, **options)),
        train_dataset=texts,
        eval_dataset=texts.select(range(4)),
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


def dpo(folder: Path, tmp_path: Path, peft_config: Any, *callbacks: Any, model: Any = None, **options: Any) -> Any:
    from datasets import Dataset
    from trainer_helpers import base, settings
    from trl import DPOConfig, DPOTrainer

    from lora_fast.benchmarks.trainers_child import tokenizer

    counts = range(12)
    pairs = {
        "prompt": [f"the square of {count} is " for count in counts],
        "chosen": [f"{count * count}, and not more" for count in counts],
        "rejected": [f"{count + 1}, or so" for count in counts],
    }
    torch.manual_seed(1)
    return DPOTrainer(
        model=model or base(folder),
        args=DPOConfig(**settings(tmp_path, max_steps=STEPS, bf16=False, **options)),
        train_dataset=Dataset.from_dict(pairs),
        eval_dataset=Dataset.from_dict(pairs).select(range(4)),
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


TRAINERS = {"SFT": sft, "DPO": dpo}
LOGGED = {"SFT": ("loss", "eval_loss"), "DPO": ("loss", "eval_loss", "rewards/chosen", "rewards/rejected")}


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("SFT", {}),
        ("SFT", {"packing": True, "max_length": 64}),
        ("SFT", {"gradient_checkpointing": False}),
        ("DPO", {}),
        ("DPO", {"precompute_ref_log_probs": True}),
        ("DPO", {"gradient_checkpointing": False, "loss_type": ["sigmoid", "sft"]}),
    ],
    ids=["SFT", "SFT packed", "SFT without checkpointing", "DPO", "DPO precomputed", "DPO and SFT"],
)
def test_losses_are_those_of_peft(
    folder: Path, tmp_path: Path, kind: str, options: dict[str, Any], use_dora: bool
) -> None:
    """With ``peft_config=``: the trainer makes the adapters, and DPO's reference model is the model without them."""
    from trainer_helpers import EXACT, LAYERS, config, counted, losses

    import lora_fast
    from lora_fast.integrations import LoraFastCallback

    make = TRAINERS[kind]
    plain = make(folder, tmp_path, config(use_dora=use_dora), **options)
    plain.train()
    plain.evaluate()
    callback = LoraFastCallback()
    with counted() as counts, lora_fast.use_backend("torch"):
        fast = make(folder, tmp_path, config(use_dora=use_dora), callback, **options)
        fast.train()
        fast.evaluate()
    assert callback.report is not None
    assert len(callback.report.accelerated) == LAYERS
    assert counts["dora_linear" if use_dora else "lora_linear"] >= STEPS * 8
    wanted = losses(plain, *LOGGED[kind])
    assert len(wanted) > STEPS
    assert len(set(wanted)) > STEPS // 2  # an adapter that does nothing would leave DPO's loss at log 2
    torch.testing.assert_close(losses(fast, *LOGGED[kind]), wanted, **EXACT)


def test_a_reference_adapter(folder: Path, tmp_path: Path) -> None:
    """For a PEFT model that is trained on, DPO keeps a copy of its adapter for the reference."""
    from trainer_helpers import EXACT, LAYERS, adapted, counted, losses

    from lora_fast.integrations import LoraFastCallback

    plain = dpo(folder, tmp_path, None, model=adapted(folder, use_dora=True))
    plain.train()
    callback = LoraFastCallback()
    fast = dpo(folder, tmp_path, None, callback, model=adapted(folder, use_dora=True))
    with counted() as counts:
        fast.train()
    assert list(fast.model.peft_config) == ["default", "ref"]
    assert callback.report is not None
    assert len(callback.report.accelerated) == LAYERS
    assert counts["dora_linear"] >= 2 * STEPS * 8  # the reference's too
    wanted = losses(plain, *LOGGED["DPO"])
    assert len(set(wanted)) > STEPS
    torch.testing.assert_close(losses(fast, *LOGGED["DPO"]), wanted, **EXACT)


@pytest.mark.parametrize("kind", TRAINERS)
def test_saving_resuming_and_the_best_model(folder: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from trainer_helpers import EXACT, base, config, losses, trained

    from lora_fast.integrations import LoraFastCallback

    saves = {"save_strategy": "steps", "save_steps": SAVED, "eval_strategy": "steps", "eval_steps": SAVED}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    runs = {}
    for name, callbacks in (("plain", ()), ("fast", (LoraFastCallback(),))):
        runs[name] = TRAINERS[kind](folder, tmp_path / name, config(use_dora=True), *callbacks, **saves, **best)
        runs[name].train()
    torch.testing.assert_close(losses(runs["fast"], *LOGGED[kind]), losses(runs["plain"], *LOGGED[kind]), **EXACT)
    # the largest loss is that of the first checkpoint, and so the model that was loaded is not the last one
    assert {Path(run.state.best_model_checkpoint).name for run in runs.values()} == {"checkpoint-2"}
    files = [load_file(tmp_path / name / "checkpoint-2" / "adapter_model.safetensors") for name in runs]
    torch.testing.assert_close(*files, **EXACT)
    loaded = PeftModel.from_pretrained(base(folder), tmp_path / "fast" / "checkpoint-2")
    now = trained(runs["fast"].model)
    assert all(torch.equal(p, now[name]) for name, p in loaded.named_parameters() if name in now)

    again = TRAINERS[kind](folder, tmp_path / "again", config(use_dora=True), LoraFastCallback(), **saves)
    again.train(resume_from_checkpoint=str(tmp_path / "fast" / "checkpoint-2"))
    torch.testing.assert_close(losses(again), losses(runs["fast"]), rtol=1e-6, atol=0)
