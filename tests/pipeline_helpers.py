"""Small pipelines of diffusers, made offline, and adapters' files in diffusers' own format.

Their prompts are given as embeddings, so that they need no tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

DTYPE = torch.float64
# linears, convolutions of 1 × 1 and others, in the blocks of attention, between them, and at both ends
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1"]
UNET_TARGETS += ["conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in"]
FLUX_TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.to_add_out"]
FLUX_TARGETS += ["ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out", "norm.linear", "x_embedder", "context_embedder"]


def unet() -> Any:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    return model.to(DTYPE).eval()


def transformer() -> Any:
    torch.manual_seed(1)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=False,
    )
    return model.to(DTYPE).eval()


def text_encoder() -> Any:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=2,
    )
    return CLIPTextModel(config).to(DTYPE).eval()


def vae() -> Any:
    torch.manual_seed(3)
    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    return model.to(DTYPE).eval()


def stable_diffusion() -> Any:
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    parts = vae(), text_encoder(), None, unet(), scheduler, None, None
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def flux() -> Any:
    parts = FlowMatchEulerDiscreteScheduler(), vae(), text_encoder(), None, None, None, transformer()
    return FluxPipeline(*parts)


def run_stable_diffusion(pipe: Any, scale: float | None = None) -> Tensor:
    text = embedded(pipe)
    return pipe(
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        latents=randn(1, 4, 8, 8),
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="latent",
        cross_attention_kwargs=None if scale is None else {"scale": scale},
    ).images


def run_flux(pipe: Any, scale: float | None = None) -> Tensor:
    text = embedded(pipe)
    return pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=text[:, 0],
        generator=torch.Generator().manual_seed(5),
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
        joint_attention_kwargs=None if scale is None else {"scale": scale},
    ).images


class Kind(NamedTuple):
    """A kind of pipeline: how to make one, which of its parts draws, with what adapters, and how to run it."""

    make: Any
    run: Any
    pipeline: Any
    part: str
    model: Any
    targets: list[str]
    weights: dict[str, Any]  # a weight for each block, where there are some


KINDS = {
    "stable diffusion": Kind(
        stable_diffusion,
        run_stable_diffusion,
        StableDiffusionPipeline,
        "unet",
        unet,
        UNET_TARGETS[:-1],  # diffusers has no block for conv_in when it looks for its weight
        {"down": 0.3, "mid": -0.5, "up": {"block_0": 0.5, "block_1": [1.0, 0.2]}},
    ),
    "flux": Kind(flux, run_flux, FluxPipeline, "transformer", transformer, FLUX_TARGETS, {}),
}


def write_adapter(kind: Kind, folder: Path, *, seed: int, targets: list[str] | None = None, **config: Any) -> Path:
    """A file as diffusers' training scripts write it, of an adapter that changes what the model draws."""
    model = kind.model()
    settings = {"r": 2, "lora_alpha": 3.0, "target_modules": targets or kind.targets, **config}
    model.add_adapter(LoraConfig(**settings), adapter_name="default")
    randomise(model, seed)
    layers = {f"{kind.part}_lora_layers": get_peft_model_state_dict(model, adapter_name="default")}
    kind.pipeline.save_lora_weights(folder, **layers, **_collate_lora_metadata({kind.part: model}))
    return folder / "pytorch_lora_weights.safetensors"


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.named_parameters()):
        draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if "lora_magnitude_vector." in name:
            tensor.mul_(1 + 0.3 * torch.tanh(draw))
        elif "lora_A." in name or "lora_B." in name:
            tensor.copy_(0.3 * draw)


def embedded(pipe: Any) -> Tensor:
    with torch.no_grad():
        text: Tensor = pipe.text_encoder(torch.tensor([[0, 5, 7, 11, 3, 2]])).last_hidden_state
    return text


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=DTYPE)
