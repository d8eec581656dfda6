"""diffusers' own conversion of single-file checkpoints agrees with our block maps, and it loads what we write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import torch
from file_helpers import assert_close, kohya_file, make_update
from safetensors.torch import save_file
from torch import Tensor

import lora_fast
from lora_fast.adapters import naming
from lora_fast.adapters.block_maps import FLUX, OPEN_CLIP, OPEN_CLIP_5, UNET, BlockMap

pytestmark = pytest.mark.interop

UNETS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.5": {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "SDXL": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def originals(block_map: BlockMap, module: str) -> list[str]:
    return [original for before, original, _, _ in block_map.originals_of(module) if not before]


@pytest.mark.parametrize("kind", UNETS)
def test_the_unet_s_names_are_those_of_diffusers_conversion(kind: str) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, **UNETS[kind])
    weights = naming.weight_shapes({key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()})
    # each of the original names that a module can have goes in as its own value, and comes out under diffusers' name
    candidates = {original for module in weights for original in originals(UNET, module)}
    # of the upsampler's two names, the one that this model has: it stands after the transformer, where there is one
    has_transformer = {block for block in range(4) if f"up_blocks.{block}.attentions.0.norm" in weights}
    for block in range(4):
        index = 1 if block in has_transformer else 2
        candidates.discard(f"output_blocks.{3 * block + 2}.{index}.conv")
    keys = [f"{name}.{end}" for name in candidates for end in ("weight", "bias")]
    checkpoint = {f"model.diffusion_model.{key}": key for key in keys}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    theirs = {key[:-7]: original[:-7] for key, original in converted.items() if key.endswith(".weight")}
    assert theirs.keys() == weights.keys()
    for module, original in theirs.items():
        assert original in originals(UNET, module), module
        assert [part for before, (part,) in UNET.parts_of(original) if not before] == [module]


def test_flux_s_names_and_rows_are_those_of_diffusers_conversion() -> None:
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    width, inner = 3072, 12288
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    weights = naming.weight_shapes({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})
    parts = [part for _, own in FLUX.pairs for part in own]
    modules = [module for module in weights if originals(FLUX, module)]
    assert len(modules) == len(parts)  # everything in the map is in a model with one block of each kind
    # tensors of row numbers, so that what comes out shows where it was
    checkpoint: dict[str, Tensor] = {}
    for original, own in FLUX.pairs:
        rows = sum(weights[part.replace("{}", "0")][0] for part in own)
        checkpoint[f"{original.replace('{}', '0')}.weight"] = torch.arange(rows)[:, None].float()
        checkpoint[f"{original.replace('{}', '0')}.bias"] = torch.zeros(rows)
    for name in ("img_attn", "txt_attn"):
        for norm in ("query_norm", "key_norm"):
            checkpoint[f"double_blocks.0.{name}.norm.{norm}.scale"] = torch.zeros(128)
    for norm in ("query_norm", "key_norm"):
        checkpoint[f"single_blocks.0.norm.{norm}.scale"] = torch.zeros(128)
    checkpoint["final_layer.adaLN_modulation.1.weight"] = torch.zeros(2 * width, 1)
    checkpoint["final_layer.adaLN_modulation.1.bias"] = torch.zeros(2 * width)
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(checkpoint))
    for original, own in FLUX.pairs:
        start = 0
        for part in own:
            name = part.replace("{}", "0")
            rows = weights[name][0]
            expected = torch.arange(start, start + rows)[:, None].float()
            assert torch.equal(converted[f"{name}.weight"], expected), (original, part)
            start += rows
    assert weights["single_transformer_blocks.0.proj_mlp"][0] == inner


def test_openclip_s_names_are_those_of_diffusers_conversion() -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = 8
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=width
    )
    model = CLIPTextModelWithProjection(config)
    prefix = "conditioner.embedders.1.model."
    block = f"{prefix}transformer.resblocks.0."
    checkpoint = {
        f"{prefix}text_projection": torch.eye(width),
        f"{block}attn.in_proj_weight": torch.arange(3 * width)[:, None].expand(-1, width).float().clone(),
        f"{block}attn.in_proj_bias": torch.zeros(3 * width),
        f"{block}attn.out_proj.weight": torch.full((width, width), 100.0),
        f"{block}mlp.c_fc.weight": torch.full((16, width), 101.0),
        f"{block}mlp.c_proj.weight": torch.full((width, 16), 102.0),
    }
    converted = convert_open_clip_checkpoint(model, checkpoint, prefix=prefix)
    layer = "text_model.encoder.layers.0."
    for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
        expected = torch.arange(index * width, (index + 1) * width)[:, None].expand(-1, width).float()
        assert torch.equal(converted[f"{layer}self_attn.{part}.weight"], expected)
        ours = list(OPEN_CLIP.originals_of(f"{layer}self_attn.{part}"))
        assert ours == [("", "transformer.resblocks.0.attn.in_proj", index, 3)]
    alone = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for (name, original), value in zip(alone.items(), (100.0, 101.0, 102.0), strict=True):
        assert converted[f"{layer}{name}.weight"][0, 0] == value
        assert originals(OPEN_CLIP, f"{layer}{name}") == [f"transformer.resblocks.0.{original}"]
        assert originals(OPEN_CLIP_5, f"{layer.removeprefix('text_model.')}{name}") == [
            f"transformer.resblocks.0.{original}"
        ]


def small_unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    ).double().eval()  # fmt: skip


ADAPTED = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (8, 16),
    "down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
    "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj": (64, 8),
}


@pytest.mark.parametrize("axis", ["output", None])
@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_diffusers_loads_what_convert_writes(eps: float, axis: str | None, tmp_path: Path) -> None:
    unet = small_unet()
    updates = {}
    for index, (name, shape) in enumerate(ADAPTED.items()):
        alpha = 3.0 + index  # which diffusers would lose without the header
        updates[name] = make_update(*shape, rank=2 + index % 2, alpha=alpha, axis=axis, seed=index)
        updates[name].weight = unet.get_submodule(name).weight.detach().clone()
    base = tmp_path / "unet"
    base.mkdir()
    save_file(unet.state_dict(), base / "diffusion_pytorch_model.safetensors")
    source = kohya_file(tmp_path / "a.safetensors", updates, prefix="lora_unet_")
    written = tmp_path / "pytorch_lora_weights.safetensors"
    lora_fast.convert_adapter(source, written, "diffusers", base=base, norm_eps=eps)
    unet.load_lora_adapter(str(tmp_path), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    merged = small_unet()
    for name, update in updates.items():
        merged.get_submodule(name).weight.data = update.merged(eps)
    x, text = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.randn(1, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        unadapted = small_unet()(x, 1, text).sample
        expected = merged(x, 1, text).sample
        assert_close(unet.double()(x, 1, text).sample, expected, 1e-12)
    assert (expected - unadapted).abs().max() > 1e-2


def test_diffusers_finds_the_names_of_flux_in_kohya_s_words(tmp_path: Path) -> None:
    """Of attention only: of a file with the names that it has itself, below lora_transformer, it takes no others."""
    from diffusers.loaders import FluxLoraLoaderMixin

    modules = [
        *(f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj")),
        *(f"single_transformer_blocks.1.attn.{part}" for part in ("to_q", "to_k", "to_v")),
    ]
    base = tmp_path / "transformer"
    base.mkdir()
    updates = {name: make_update(8, 8, alpha=2.0, seed=index) for index, name in enumerate(modules)}
    save_file({f"{name}.weight": update.weight for name, update in updates.items()}, base / "model.safetensors")
    source = tmp_path / "a.safetensors"
    parts = {"lora_A.weight": "down", "lora_B.weight": "up"}
    save_file(
        {
            f"transformer.{name}.{key}": getattr(update, part)
            for name, update in updates.items()
            for key, part in parts.items()
        },
        source,
    )
    for options in ({"base": base}, {}):
        written = tmp_path / f"kohya{len(options)}.safetensors"
        lora_fast.convert_adapter(source, written, "kohya", **options)
        found = FluxLoraLoaderMixin.lora_state_dict(str(written))
        assert found.keys() == {f"transformer.{name}.{key}" for name in updates for key in parts}
        for name, update in updates.items():
            product = found[f"transformer.{name}.lora_B.weight"] @ found[f"transformer.{name}.lora_A.weight"]
            assert_close(product, update.up @ update.down, 1e-12)
