"""One trainer's steps before and after acceleration: a process of :mod:`lora_fast.benchmarks.trainers`.

    python -m lora_fast.benchmarks.trainers_child KIND ADAPTER SIZES

Two Llama-like layers of width 2048 and feed-forward width 5632, or a UNet of Stable Diffusion's first two levels, in
bfloat16, rank 16 on all linear layers (the UNet's: on those of attention), adapters as the trainer makes them. The last
line is the row as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fast
from lora_fast.testing import peak_bytes

from .alternation import Alternation

RANK = 16
VOCABULARY = 258  # every byte, and where a text begins and ends
SLACK = 2e-2  # of a loss in bfloat16, accelerated and not
KINDS = (
    ("Trainer", "LoRA"),
    ("Trainer", "DoRA"),
    ("SFTTrainer", "LoRA"),
    ("SFTTrainer", "DoRA"),
    ("DPOTrainer", "DoRA"),
    ("Axolotl", "LoRA"),
    ("Axolotl", "DoRA"),
    ("lit-gpt", "LoRA"),
    ("diffusers", "LoRA"),
    ("diffusers", "DoRA"),
)


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a step; and how many steps a block has, and how many blocks there are."""

    width: int = 2048
    inner: int = 5632
    depth: int = 2
    tokens: int = 256
    channels: int = 320  # the UNet's
    block: int = 4
    blocks: int = 10

    def text(self) -> str:
        return json.dumps(asdict(self))


def llama(sizes: Sizes) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.depth,
        num_attention_heads=max(sizes.width // 128, 1),
        num_key_value_heads=max(sizes.width // 128, 1),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


def tokenizer() -> Any:
    """Of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(vocabulary)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def lora(adapter: str) -> Any:
    from peft import LoraConfig

    options: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(use_dora=adapter == "DoRA", **options)


def settings(folder: Path, alternation: Alternation) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "max_steps": alternation.steps,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-5,
    }


def alternation_of(model: nn.Module, sizes: Sizes) -> Alternation:
    return Alternation(lambda: lora_fast.accelerate(model), lambda: lora_fast.restore(model), sizes.block, sizes.blocks)


def timing(alternation: Alternation) -> Any:
    """The callback that tells the alternation of each step."""
    from transformers import TrainerCallback

    class Timing(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            alternation.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            alternation.end()

    return Timing()


def check(alternation: Alternation, model: nn.Module, loss: Callable[[], Any]) -> None:
    """Measure the peaks of forward and backward; RuntimeError where acceleration changes the loss beyond rounding."""
    found = []
    model.train()
    for kind, switch in alternation.switches.items():
        switch()
        alternation.peaks[kind] = peak_bytes(lambda: loss().backward())
        model.zero_grad()
        with torch.no_grad():
            found.append(float(loss()))
    if not abs(found[1] - found[0]) <= SLACK * abs(found[0]):
        raise RuntimeError(f"the loss is {found[0]:.5g} before, and {found[1]:.5g} accelerated")


def check_trainer(trainer: Any, alternation: Alternation) -> None:
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    check(alternation, trainer.model, lambda: trainer.compute_loss(trainer.model, dict(batch)))


def train(trainer: Any, alternation: Alternation) -> None:
    check_trainer(trainer, alternation)
    trainer.add_callback(timing(alternation))
    trainer.train()


def transformers_trainer(adapter: str, sizes: Sizes, folder: Path) -> Alternation:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(llama(sizes), lora(adapter))
    alternation = alternation_of(model, sizes)
    words = torch.randint(VOCABULARY, (8, sizes.tokens))
    arguments = TrainingArguments(**settings(folder, alternation))
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in words])
    train(trainer, alternation)
    return alternation


def texts(sizes: Sizes) -> list[str]:
    """Longer than what is taken of each."""
    return [f"{count} is not {count + 1}; " * sizes.tokens for count in range(8)]


def sft_trainer(adapter: str, sizes: Sizes, folder: Path) -> Alternation:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    base = llama(sizes)
    alternation = alternation_of(base, sizes)
    given = settings(folder, alternation) | {"max_length": sizes.tokens, "bf16": False, "gradient_checkpointing": False}
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(**given),
        train_dataset=Dataset.from_dict({"text": texts(sizes)}),
        processing_class=tokenizer(),
        peft_config=lora(adapter),
    )
    train(trainer, alternation)
    return alternation


def dpo_trainer(adapter: str, sizes: Sizes, folder: Path) -> Alternation:
    """Half of the tokens are chosen, half rejected; the reference is the model without its adapters."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    base = llama(sizes)
    alternation = alternation_of(base, sizes)
    halves = sizes.tokens // 2
    given = settings(folder, alternation) | {"max_length": halves, "bf16": False, "gradient_checkpointing": False}
    chosen = texts(sizes)
    pairs = {"prompt": ["which? "] * 8, "chosen": chosen, "rejected": chosen[::-1]}
    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(**given),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(),
        peft_config=lora(adapter),
    )
    train(trainer, alternation)
    return alternation


def axolotl(adapter: str, sizes: Sizes, folder: Path) -> Alternation:
    """With Axolotl's own kernels off: they need a GPU."""
    import yaml
    from axolotl.cli.train import do_cli

    from . import trainers_axolotl

    llama(sizes).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(sizes)))
    data = {"path": str(folder / "texts.jsonl"), "ds_type": "json", "type": "completion", "field": "text"}
    config = {
        "base_model": str(folder / "model"),
        "plugins": [f"{trainers_axolotl.__name__}.{trainers_axolotl.Alternating.__name__}"],
        "datasets": [data],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "val_set_size": 0,
        "sequence_len": sizes.tokens,
        "adapter": "lora",
        "peft_use_dora": adapter == "DoRA",
        "lora_r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0,
        "lora_target_linear": True,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": sizes.block * sizes.blocks,
        "learning_rate": 1e-5,
        "optimizer": "adamw_torch",
        "bf16": True,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    trainers_axolotl.Alternating.make = lambda model: alternation_of(model, sizes)
    do_cli(str(folder / "config.yaml"))
    assert trainers_axolotl.Alternating.made is not None
    return trainers_axolotl.Alternating.made


def lit_gpt(adapter: str, sizes: Sizes, folder: Path) -> Alternation:
    """The step of litgpt's finetune/lora.py, whose loop has no place for a callback."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    from lora_fast.integrations import litgpt

    everywhere = {f"lora_{name}": True for name in ("query", "key", "value", "projection", "mlp")}
    config = Config(
        name="Llama",
        block_size=sizes.tokens,
        padded_vocab_size=VOCABULARY,
        n_layer=sizes.depth,
        n_embd=sizes.width,
        n_head=max(sizes.width // 128, 1),
        intermediate_size=sizes.inner,
        mlp_class_name="LLaMAMLP",
        norm_class_name="RMSNorm",
        bias=False,
        rotary_percentage=1.0,
        parallel_residual=False,
        lora_r=RANK,
        lora_alpha=RANK,
        **everywhere,
    )
    model = GPT(config).to(torch.bfloat16)
    mark_only_lora_as_trainable(model)
    words = torch.randint(VOCABULARY, (1, sizes.tokens))

    def loss() -> Any:
        logits = model(words, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, words[..., 1:])

    alternation = Alternation(
        lambda: litgpt.accelerate(model), lambda: litgpt.restore(model), sizes.block, sizes.blocks
    )
    _steps(model, loss, alternation)
    return alternation


def diffusers(adapter: str, sizes: Sizes, folder: Path) -> Alternation:
    """The step of diffusers' script for LoRA: a frozen UNet in bfloat16, adapters in float32, under autocast."""
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    channels = sizes.channels, 2 * sizes.channels
    model = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
    )
    model.requires_grad_(False)
    model.to(torch.bfloat16)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, use_dora=adapter == "DoRA"))
    cast_training_params(model, dtype=torch.float32)
    x, noise = torch.randn(2, 1, 4, 32, 32, dtype=torch.bfloat16).unbind()
    text = torch.randn(1, 77, 768, dtype=torch.bfloat16)

    def loss() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return (model(x, 7, text).sample.float() - noise.float()).square().mean()

    alternation = alternation_of(model, sizes)
    _steps(model, loss, alternation)
    return alternation


def _steps(model: nn.Module, loss: Callable[[], Any], alternation: Alternation) -> None:
    check(alternation, model, loss)
    optimizer = torch.optim.AdamW(_trained(model), lr=1e-5)
    for _ in range(alternation.steps):
        alternation.begin()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        alternation.end()


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


RUNS: dict[str, Callable[[str, Sizes, Path], Alternation]] = {
    "Trainer": transformers_trainer,
    "SFTTrainer": sft_trainer,
    "DPOTrainer": dpo_trainer,
    "Axolotl": axolotl,
    "lit-gpt": lit_gpt,
    "diffusers": diffusers,
}


def main() -> None:
    kind, adapter, text = sys.argv[1:]
    sizes = Sizes(**json.loads(text))
    torch.manual_seed(0)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        alternation = RUNS[kind](adapter, sizes, Path(folder))
    title = f"{kind}, {adapter}"
    row = {
        "title": title,
        "trainer": kind,
        "adapter": adapter,
        "load": load,
        "records": alternation.records(),
        "bars": [],
    }
    print(f"\n{json.dumps(row)}")


if __name__ == "__main__":
    main()
