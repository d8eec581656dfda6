"""Writes torchtune/ and litgpt/: adapters as the tools themselves write them, and what the tools merge them to.

Run in an environment with torchtune 0.6.1 (and torchao 0.15) or litgpt 0.5.13, whose requirements exclude one
another's and ours: python make_samples.py torchtune | litgpt. The files of lycoris/ were written by LyCORIS 4.1.3 in
the same way: a base, adapters of both norm axes with and without Tucker, and LyCORIS's own merged weights, in float64.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
WIDTH, INNER, WORDS, HEADS, GROUPS, RANK, ALPHA = 16, 24, 20, 4, 2, 3, 7


def scramble(module: torch.nn.Module, only: str = "") -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if only in name:
            parameter.data.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * 0.5)


def torchtune(folder: Path) -> None:
    from torchtune import training
    from torchtune.models import convert_weights
    from torchtune.models.llama3._component_builders import lora_llama3
    from torchtune.modules.peft import get_adapter_state_dict, get_merged_lora_ckpt
    from torchtune.modules.peft._utils import get_lora_module_names
    from torchtune.training import FullModelHFCheckpointer
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, max_position_embeddings=32, tie_word_embeddings=False, attention_bias=False,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    scramble(llama)
    llama.save_pretrained(folder / "base")
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=folder / "base", checkpoint_files=["model.safetensors"], model_type="LLAMA3", output_dir=folder
    )
    attention = ["q_proj", "k_proj", "v_proj", "output_proj"]
    model = lora_llama3(
        lora_attn_modules=attention, apply_lora_to_mlp=True, apply_lora_to_output=True, vocab_size=WORDS, num_layers=1,
        num_heads=HEADS, num_kv_heads=GROUPS, embed_dim=WIDTH, max_seq_len=32, intermediate_dim=INNER, lora_rank=RANK,
        lora_alpha=ALPHA, use_dora=True,
    )  # fmt: skip
    model.load_state_dict(checkpointer.load_checkpoint()["model"], strict=False)
    scramble(model, "lora_")
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
            module.magnitude.data *= torch.linspace(0.5, 1.5, len(module.magnitude))
    content: dict[str, Any] = {
        training.ADAPTER_KEY: get_adapter_state_dict(model.state_dict()),
        training.ADAPTER_CONFIG: {
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": get_lora_module_names(attention, True, True),
            "peft_type": "LORA",
        },
    }
    checkpointer.save_checkpoint(content, epoch=0, intermediate_checkpoint=False, adapter_only=True)
    wide = {key: tensor.double() for key, tensor in model.state_dict().items()}
    merged = convert_weights.tune_to_hf(get_merged_lora_ckpt(wide, rank=RANK, alpha=ALPHA), HEADS, GROUPS, WIDTH)
    save_file({key: tensor.contiguous() for key, tensor in merged.items()}, folder / "merged.safetensors")


def litgpt(folder: Path) -> None:
    import lightning
    from litgpt import model as base_model
    from litgpt.config import Config as BaseConfig
    from litgpt.finetune import lora as script
    from litgpt.lora import GPT, Config, lora_filter, mark_only_lora_as_trainable, merge_lora_weights
    from litgpt.parser_config import save_hyperparameters
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
    from litgpt.utils import save_config

    folder.mkdir(exist_ok=True)
    config = BaseConfig(
        name="toy", block_size=16, vocab_size=WORDS, padded_vocab_size=WORDS, n_layer=1, n_head=HEADS, n_embd=WIDTH,
        n_query_groups=GROUPS, head_size=WIDTH // HEADS, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=INNER,
    )  # fmt: skip
    base = base_model.GPT(config)
    scramble(base)
    save_config(config, folder)
    options = {
        "lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "lora_query": True, "lora_key": False,
        "lora_value": True, "lora_projection": True, "lora_mlp": True, "lora_head": True,
    }  # fmt: skip
    with_lora = Config.from_file(folder / "model_config.yaml", **options)
    fabric = lightning.Fabric(devices=1, accelerator="cpu", precision="32-true")
    model = GPT(with_lora)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    model.load_state_dict(base.state_dict(), strict=False)
    scramble(model, "lora_")
    script.save_lora_checkpoint(fabric, model, folder / "lit_model.pth.lora")
    sys.argv = ["litgpt", "finetune_lora", "base", "--out_dir", "out", "--precision", "32-true"]
    sys.argv += [part for key, value in options.items() for part in (f"--{key}", str(value).lower())]
    with contextlib.redirect_stdout(io.StringIO()):
        save_hyperparameters(script.setup, folder)
    wide = GPT(with_lora).double()
    adapter = torch.load(folder / "lit_model.pth.lora", weights_only=True)["model"]
    wide.load_state_dict(base.state_dict() | adapter)
    merge_lora_weights(wide)
    own = {key.replace("linear.", ""): value for key, value in wide.state_dict().items() if not lora_filter(key, value)}
    for name, tensors in (("base", base.state_dict()), ("merged", own)):
        renamed: dict[str, Any] = {}
        copy_weights_llama(config, renamed, dict(tensors))
        (folder / name).mkdir(exist_ok=True)
        for file, kept in ((f"{name}.safetensors", tensors), (f"{name}/model.safetensors", renamed)):
            save_file({key: tensor.contiguous().clone() for key, tensor in kept.items()}, folder / file)


if __name__ == "__main__":
    tool = sys.argv[1]
    {"torchtune": torchtune, "litgpt": litgpt}[tool](HERE / tool)
