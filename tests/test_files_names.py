"""No name is guessed and no part of a file is lost: a base that lacks something, and places that only look right."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import torch
from file_helpers import LYCORIS, SAMPLES, Update, assert_close, base_file, kohya_file, make_update, merged_file, read
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fast
from lora_fast.adapters import files
from lora_fast.merge_checkpoint import merge_checkpoint

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16


def refused(message: str, base: Path, adapter: Path, **options: Any) -> None:
    out = base.parent / ("refused" if base.is_dir() else "refused.safetensors")
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(base, adapter, out, **options)
    assert not out.exists()


def peft_s(name: str) -> dict[str, Tensor]:
    prefix = f"base_model.model.{name}"
    return {f"{prefix}.lora_A.weight": torch.ones(1, 4), f"{prefix}.lora_B.weight": torch.ones(6, 1)}


def test_a_part_that_the_base_lacks_is_named(tmp_path: Path) -> None:
    fused = {"double_blocks.0.img_attn.qkv": make_update(24, 8)}
    adapter = kohya_file(tmp_path / "a.safetensors", fused, prefix="lora_unet_")
    parts = {f"transformer_blocks.0.attn.{part}": make_update(8, 8) for part in ("to_q", "to_v")}
    base = base_file(tmp_path / "base.safetensors", parts)
    message = r"double_blocks_0_img_attn_qkv is 3 modules, of which .* has only .*to_q, .*to_v"
    refused(message, base, adapter)
    with pytest.raises(ValueError, match=message):
        lora_fast.convert_adapter(adapter, tmp_path / "out.safetensors", "diffusers", base=base)


def test_two_names_of_one_module_are_an_error(tmp_path: Path) -> None:
    names = [f"output_blocks_2_{index}_conv" for index in (1, 2)]
    base = base_file(tmp_path / "base.safetensors", {"up_blocks.0.upsamplers.0.conv": make_update(4, 4, 3, 3)})
    tensors = {f"lora_unet_{name}.diff": torch.ones(4, 4, 3, 3) for name in names}
    save_file(tensors, tmp_path / "a.safetensors")
    refused(r"and another of its names are up_blocks\.0\.upsamplers\.0\.conv", base, tmp_path / "a.safetensors")
    update = {f"lora_unet_{names[0]}.{key}": value for key, value in make_update(4, 4, 3, 3).kohya().items()}
    del tensors[f"lora_unet_{names[0]}.diff"]
    save_file(tensors | update, tmp_path / "b.safetensors")
    refused(r"and another of its names are up_blocks\.0\.upsamplers\.0\.conv", base, tmp_path / "b.safetensors")


# The file's name, and the base's one module that it is not: a number in what is left out says which block is meant.
STRANGERS = [
    ("lora_unet_blocks_7_attn_q", "decoder.head.attn.q"),
    ("lora_unet_blocks_7_attn_q", "attn.q"),
    ("lora_te_text_model_encoder_layers_9_fc1", "encoder.layers.0.fc1"),
    ("lora_unet_attn_q", "blocks.3.attn.q"),
    ("lora_unet_text_model_proj", "vision.proj"),
    ("lora_unet_single_transformer_blocks_0_to_q", "transformer_blocks.0.to_q"),
    ("lora_unet_vace_blocks_0_self_attn_q", "blocks.0.self_attn.q"),
    ("lora_unet_cross_attn_to_q", "attn.to_q"),
    ("text_encoder_2.text_model.proj", "cond_stage_model.transformer.text_model.proj"),
    ("clip_g.text_model.proj", "conditioner.embedders.0.transformer.text_model.proj"),
    ("text_encoder.mid.proj", "model.diffusion_model.mid.proj"),
    ("lora_unet_text_model_proj", "cond_stage_model.transformer.text_model.proj"),
    ("lora_te2_text_model_proj", "conditioner.embedders.0.transformer.text_model.proj"),
    ("lora_te1_mid_proj", "model.diffusion_model.mid.proj"),
]


@pytest.mark.parametrize(("name", "module"), STRANGERS)
def test_what_only_looks_like_a_place_is_none(name: str, module: str, tmp_path: Path) -> None:
    update = make_update(6, 4)
    base = base_file(tmp_path / "base.safetensors", {module: update})
    save_file({f"{name}.{key}": value for key, value in update.kohya().items()}, tmp_path / "a.safetensors")
    refused("lacks the module of", base, tmp_path / "a.safetensors")


@pytest.mark.parametrize(("name", "module"), [("model.blocks.7.q", "q"), ("q", "model.blocks.7.q")])
def test_nor_is_it_for_peft_s_names(name: str, module: str, tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", {module: make_update(6, 4)})
    (tmp_path / "peft").mkdir()
    save_file(peft_s(name), tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    refused("adapter's tensors not in the checkpoint", base, tmp_path / "peft")


def test_names_in_two_places_are_an_error_also_between_a_pipeline_s_folders(tmp_path: Path) -> None:
    update = make_update(6, 4)
    base = tmp_path / "base"
    for folder, modules in (("unet", ("a.attn.q", "b.attn.q")), ("vae", ("attn.q",))):
        (base / folder).mkdir(parents=True)
        weights = {f"{module}.weight": update.weight.clone() for module in modules}
        save_file(weights, base / folder / "model.safetensors")
    (base / "model_index.json").write_text("{}")
    adapter = kohya_file(tmp_path / "a.safetensors", {"attn.q": update}, prefix="lora_unet_")
    refused(r"attn_q of the adapter could be a\.attn\.q, b\.attn\.q", base, adapter)


def test_torchtune_s_names_are_never_a_part_of_others(tmp_path: Path) -> None:
    sample = SAMPLES / "torchtune" / "epoch_0"
    shapes = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "output_proj": (16, 16)}
    own = {f"visual.layers.0.attn.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    mlp = {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}
    own |= {f"visual.layers.0.mlp.{name}.weight": torch.ones(shape) for name, shape in mlp.items()}
    base = tmp_path / "base"
    base.mkdir()
    save_file(own | {"visual.output.weight": torch.ones(20, 16)}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="lacks 8 of the 8 modules of"):
        lora_fast.convert_adapter(sample / "adapter_model.pt", tmp_path / "peft", "peft", base=base)
    refused("lacks 8 of the 8 modules of", base, sample / "adapter_model.pt")


@pytest.mark.parametrize("to", ["peft", "kohya", "diffusers", "mlx"])
def test_a_base_of_another_model_or_of_other_sizes_is_refused(to: str, tmp_path: Path) -> None:
    update = make_update(6, 4)
    tensors = {"lora_A.weight": update.down, "lora_B.weight": update.up, "alpha": torch.tensor(3.0)}
    save_file({f"unet.a.b.{key}": value for key, value in tensors.items()}, tmp_path / "a.safetensors")
    out = tmp_path / ("out" if to in ("peft", "mlx") else "out.safetensors")
    other = base_file(tmp_path / "other.safetensors", {"a.c": update})
    with pytest.raises(ValueError, match=r"lacks the module of .*: a\.b"):
        lora_fast.convert_adapter(tmp_path / "a.safetensors", out, to, base=other)
    sizes = base_file(tmp_path / "sizes.safetensors", {"a.b": make_update(16, 4)})
    with pytest.raises(ValueError, match=r"has an update \[N, K\] = \[6, 4\] for a\.b, which has \[16, 4\]"):
        lora_fast.convert_adapter(tmp_path / "a.safetensors", out, to, base=sizes)


@pytest.mark.parametrize(("stored", "asked"), [(BF16, F32), (F16, F32), (F32, BF16)])
def test_another_dtype_of_the_magnitudes_keeps_what_they_compute(
    stored: torch.dtype, asked: torch.dtype, tmp_path: Path
) -> None:
    update = make_update(6, 4, axis="output", dtype=stored)
    source = kohya_file(tmp_path / "a.safetensors", {"a": update}, LYCORIS)
    base = base_file(tmp_path / "base.safetensors", {"a": update})
    before = merged_file(base, source, tmp_path / "before.safetensors")["a.weight"]
    out = tmp_path / "out.safetensors"
    if stored != F32:
        with pytest.raises(ValueError, match="adds .* to each norm, which the target does not"):
            lora_fast.convert_adapter(source, out, "kohya", magnitude_dtype=asked)
    lora_fast.convert_adapter(source, out, "kohya", magnitude_dtype=asked, base=base)
    assert_close(merged_file(base, out, tmp_path / "after.safetensors")["a.weight"], before, 4 * torch.finfo(asked).eps)


def test_the_user_s_axis_is_still_decided_in_the_converted_file(tmp_path: Path) -> None:
    update = make_update(4, 4, 3, 3, axis="input")
    source = kohya_file(tmp_path / "a.safetensors", {"a": update})
    with pytest.raises(ValueError, match="may be of either axis"):
        read(source)
    lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "kohya", magnitude_axis="input")
    assert read(tmp_path / "out.safetensors").layers["a"].norm_axis == "input"


def test_an_alpha_that_two_places_say_differently_is_an_error(tmp_path: Path) -> None:
    update = make_update(6, 4)
    parts = {"lora_A.weight": update.down, "lora_B.weight": update.up, "alpha": torch.tensor(3.0)}
    tensors = {f"unet.a.{key}": value for key, value in parts.items()}

    def scaling(**header: Any) -> float:
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in header.items()})}
        save_file(tensors, tmp_path / "a.safetensors", metadata)
        return read(tmp_path / "a.safetensors").layers["a"].scaling

    assert scaling(r=2, lora_alpha=3) == 1.5
    with pytest.raises(ValueError, match=r"the alpha of unet a gives the factor 1\.5, its header 16"):
        scaling(r=2, lora_alpha=32)
    with pytest.raises(ValueError, match="the rank of a is None, expected a positive integer"):
        scaling(lora_alpha=32)


def test_peft_s_weights_without_their_configuration_are_refused(tmp_path: Path) -> None:
    tensors = peft_s("a")
    save_file(tensors, tmp_path / "renamed.safetensors")
    with pytest.raises(ValueError, match=r"has PEFT's names and no alpha, which PEFT has in an adapter_config\.json"):
        read(tmp_path / "renamed.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for path in (tmp_path / "adapter_model.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
            read(path)


def test_loading_says_what_it_takes_for_granted(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "a.safetensors", {"0": make_update(6, 4, axis="output", dtype=BF16)})
    model = nn.Sequential(nn.Linear(4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="does not say who wrote it"):
            lora_fast.load_adapter(model, source)
    assert type(model[0]) is nn.Linear
    with pytest.warns(UserWarning, match="does not say who wrote it: nothing is added to the norms"):
        lora_fast.load_adapter(model, source)


def test_what_becomes_infinite_is_not_written(tmp_path: Path) -> None:
    update = make_update(6, 4)
    update.up *= 1e6
    source = kohya_file(tmp_path / "a.safetensors", {"a": update})
    refused(
        r"a\.weight would become infinite or NaN in F16",
        base_file(tmp_path / "half.safetensors", {"a": update}, F16),
        source,
    )
    with pytest.raises(ValueError, match="has NaN or infinity, or values that float16 cannot hold"):
        lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "kohya", dtype=F16)
    save_file({"lora_unet_a.diff": torch.full((6, 4), torch.nan)}, tmp_path / "nan.safetensors")
    refused(
        "would become infinite or NaN",
        base_file(tmp_path / "base.safetensors", {"a": update}),
        tmp_path / "nan.safetensors",
    )


def gpt2(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_conv1d_has_no_words_in_kohya_s_files(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    base = gpt2(tmp_path)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=2, target_modules=["attn.c_proj"], fan_in_fan_out=True, init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "peft")
    for options in ({}, {"base": base}, {"base": base, "as_difference": True}):
        with pytest.raises(
            ValueError,
            match=r"Conv1D, .*the files of image models cannot mean",
        ):
            lora_fast.convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", "kohya", **options)
    for options in ({"component": "unet"}, {"base": base, "component": "unet"}):
        with pytest.raises(
            ValueError,
            match=r"Conv1D, .*the files of image models cannot mean",
        ):
            lora_fast.convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", "diffusers", **options)
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fan_in_fan_out": False}))
    with pytest.raises(ValueError, match=r"c_proj is transformers' Conv1D"):  # its class says so
        lora_fast.convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", "kohya", base=base)
    (base / "config.json").write_text('{"architectures": ["Unknown"]}')
    with pytest.raises(
        ValueError, match=r"c_proj is square, and may be transformers' Conv1D: .* \(transformers does not know"
    ):
        lora_fast.convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", "kohya", base=base)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fan_in_fan_out": True}))
    gpt2(tmp_path)
    name = "transformer.h.0.attn.c_proj"
    adapter = kohya_file(tmp_path / "a.safetensors", {name: make_update(8, 8)})
    refused("is stored .in, out., as transformers' Conv1D, which a.safetensors cannot mean", base, adapter)
    lora_fast.convert_adapter(tmp_path / "peft", tmp_path / "again", "peft", base=base)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_a_tied_embedding_of_mlx_is_the_head_too(tmp_path: Path) -> None:
    words, width = 9, 6
    embedding = make_update(words, width, alpha=4.0)
    (tmp_path / "mlx").mkdir()
    save_file(
        {
            "model.embed_tokens.lora_a": embedding.up.contiguous(),
            "model.embed_tokens.lora_b": embedding.down.contiguous(),
        },
        tmp_path / "mlx" / "adapters.safetensors",
    )
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0}}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.embed_tokens.weight": embedding.weight}, base / "model.safetensors")
    (base / "config.json").write_text('{"tie_word_embeddings": true}')
    done = merge_checkpoint(base, tmp_path / "mlx", tmp_path / "out")
    assert (done.merged, done.untied) == (1, [])
    assert_close(load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"], embedding.merged())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"tie_word_embeddings": True}
    for options in ({}, {"base": base}):
        with pytest.raises(ValueError, match="perhaps tied to the output head, which MLX-LM then adapts with it"):
            lora_fast.convert_adapter(tmp_path / "mlx", tmp_path / "peft", "peft", **options)
    (base / "config.json").write_text('{"tie_word_embeddings": false}')
    lora_fast.convert_adapter(tmp_path / "mlx", tmp_path / "peft", "peft", base=base)
    merge_checkpoint(base, tmp_path / "peft", tmp_path / "out2")
    assert_close(load_file(tmp_path / "out2" / "model.safetensors")["model.embed_tokens.weight"], embedding.merged())


def test_an_embedding_of_diffusers_is_read_back(tmp_path: Path) -> None:
    parts = {"lora_embedding_A": torch.randn(2, 9), "lora_embedding_B": torch.randn(6, 2), "alpha": torch.tensor(2.0)}
    save_file({f"text_encoder.emb.{key}": value for key, value in parts.items()}, tmp_path / "a.safetensors")
    lora_fast.convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    layer = read(tmp_path / "b.safetensors").layers["emb"]
    assert layer.is_embedding
    assert torch.equal(layer.lora_A, parts["lora_embedding_A"])
    assert torch.equal(layer.lora_B, parts["lora_embedding_B"])


def test_models_that_kohya_has_no_name_for_are_refused(tmp_path: Path) -> None:
    update = make_update(6, 4)
    tensors = {"lora_A.weight": update.down, "lora_B.weight": update.up, "alpha": torch.tensor(3.0)}
    for component in ("clip_l", "t5", "text_encoders.clip_l.transformer", "diffusion_model.transformer_1"):
        source, out = tmp_path / "a.safetensors", tmp_path / f"{component}.safetensors"
        save_file({f"{component}.a.b.{key}": value for key, value in tensors.items()}, source)
        with pytest.raises(ValueError, match=re.escape(f"no name for the model {component!r}; say which it is")):
            lora_fast.convert_adapter(source, out, "kohya")
        wrong, right = ("unet", "lora_te1") if component != "diffusion_model.transformer_1" else ("lora_te1", "unet")
        with pytest.raises(ValueError, match=f"component: got {wrong!r}, .* has {component!r}, another kind of model"):
            lora_fast.convert_adapter(source, out, "kohya", component=wrong)
        if right == "lora_te1":
            with pytest.raises(ValueError, match="say which: --component lora_te or lora_te1"):
                lora_fast.convert_adapter(source, out, "kohya", component="text_encoder")
        lora_fast.convert_adapter(source, out, "kohya", component=right)
        assert list(files.read_file(out).components) == ["lora_te1" if right == "lora_te1" else "lora_unet"]


def test_an_alpha_of_0_is_not_written(tmp_path: Path) -> None:
    tensors = peft_s("a")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 0}')
    with pytest.raises(ValueError, match="a has alpha 0, which LyCORIS takes for the rank"):
        lora_fast.convert_adapter(tmp_path, tmp_path / "out.safetensors", "kohya")


def test_parts_with_different_eps_are_not_fused(tmp_path: Path) -> None:
    names = [f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")]
    parts = {
        name: make_update(8, 8, axis="output", dtype=dtype) for name, dtype in zip(names, (BF16, F32, F16), strict=True)
    }
    source = kohya_file(tmp_path / "a.safetensors", parts, LYCORIS, prefix="lora_transformer_")
    weight = torch.cat([update.weight for update in parts.values()])
    save_file({"double_blocks.0.img_attn.qkv.weight": weight}, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="its tool adds different numbers to the norms of its rows; merge it"):
        lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "kohya", base=tmp_path / "base.safetensors")
    merged = merged_file(tmp_path / "base.safetensors", source, tmp_path / "merged.safetensors")
    expected = torch.cat([update.merged(torch.finfo(update.down.dtype).eps) for update in parts.values()])
    assert_close(merged["double_blocks.0.img_attn.qkv.weight"], expected)
    difference = tmp_path / "difference.safetensors"
    lora_fast.convert_adapter(source, difference, "kohya", base=tmp_path / "base.safetensors", as_difference=True)
    merged = merged_file(tmp_path / "base.safetensors", difference, tmp_path / "again.safetensors")
    assert_close(merged["double_blocks.0.img_attn.qkv.weight"], expected)


@pytest.mark.parametrize("level", ["text_model.", ""])
def test_clip_s_names_with_and_without_their_first_level(level: str, tmp_path: Path) -> None:
    layer = f"{level}encoder.layers.0."
    names = [f"{layer}self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")]
    updates: dict[str, Update] = {name: make_update(6, 6, seed=index) for index, name in enumerate(names)}
    block = "cond_stage_model.model.transformer.resblocks.0."
    weights: dict[str, Tensor] = {f"{block}attn.in_proj_weight": torch.cat([each.weight for each in updates.values()])}
    save_file(weights, tmp_path / "base.safetensors")
    tensors = {}
    for name, update in updates.items():
        parts = {"lora_A.weight": update.down, "lora_B.weight": update.up, "alpha": torch.tensor(update.alpha)}
        tensors |= {f"text_encoder.{name}.{key}": value for key, value in parts.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    merged = merged_file(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    assert_close(merged[f"{block}attn.in_proj_weight"], torch.cat([each.merged() for each in updates.values()]))
    flat = tmp_path / "flat.safetensors"
    lora_fast.convert_adapter(tmp_path / "a.safetensors", flat, "kohya", component="text_encoder_2")
    assert all(key.startswith("lora_te2_text_model_encoder_layers_0_self_attn_") for key in load_file(flat))


def test_openclip_s_names_over_transformers_4_s(tmp_path: Path) -> None:
    update = make_update(6, 6)
    name = "text_model.encoder.layers.0.self_attn.out_proj"
    base = base_file(tmp_path / "base.safetensors", {name: update})
    source = kohya_file(
        tmp_path / "a.safetensors", {"transformer.resblocks.0.attn.out_proj": update}, prefix="lora_te_"
    )
    assert_close(merged_file(base, source, tmp_path / "out.safetensors")[f"{name}.weight"], update.merged())


def clip(folder: Path, level: str, weights: dict[str, Tensor]) -> Path:
    (folder / "text_encoder").mkdir(parents=True)
    save_file({level + key: value for key, value in weights.items()}, folder / "text_encoder" / "model.safetensors")
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_text_encoder_s_names_all_have_their_level_or_none(tmp_path: Path) -> None:
    update = make_update(6, 6)
    weights = {"encoder.layers.0.mlp.fc1.weight": update.weight, "final_layer_norm.weight": torch.ones(6)}
    tensors = {f"lora_te_encoder_layers_0_mlp_fc1.{key}": value for key, value in update.kohya().items()}
    save_file(tensors | {"lora_te_final_layer_norm.w_norm": torch.ones(6)}, tmp_path / "a.safetensors")
    old, new = clip(tmp_path / "old", "text_model.", weights), clip(tmp_path / "new", "", weights)
    for base in (old, new):
        out = tmp_path / f"from_{base.name}.safetensors"
        lora_fast.convert_adapter(tmp_path / "a.safetensors", out, "kohya", base=base)
        assert all(key.startswith("lora_te_text_model_") for key in load_file(out))
        for other in (old, new):
            merge_checkpoint(other, out, tmp_path / f"{base.name}_{other.name}")
            merged = load_file(tmp_path / f"{base.name}_{other.name}" / "text_encoder" / "model.safetensors")
            level = "text_model." if other is old else ""
            assert_close(merged[f"{level}encoder.layers.0.mlp.fc1.weight"], update.merged())
            assert torch.equal(merged[f"{level}final_layer_norm.weight"], torch.full((6,), 2.0))


@pytest.mark.parametrize(
    ("prefix", "component", "expected"),
    [
        ("cond_stage_model.transformer", "text_encoder", "lora_te"),
        ("conditioner.embedders.0.transformer", "text_encoder", "lora_te1"),
        ("conditioner.embedders.0.transformer", "lora_te1", "lora_te1"),
        ("cond_stage_model.transformer", "lora_te", "lora_te"),
    ],
)
def test_kohya_s_number_of_a_text_encoder(prefix: str, component: str, expected: str, tmp_path: Path) -> None:
    update = make_update(6, 6)
    module = "text_model.encoder.layers.0.mlp.fc1"
    base = base_file(tmp_path / "base.safetensors", {f"{prefix}.{module}": update})
    if component.startswith("lora"):
        source = kohya_file(tmp_path / "a.safetensors", {module: update}, prefix=f"{component}_")
    else:
        parts = {"lora_A.weight": update.down, "lora_B.weight": update.up, "alpha": torch.tensor(update.alpha)}
        source = tmp_path / "a.safetensors"
        save_file({f"{component}.{module}.{key}": value for key, value in parts.items()}, source)
    lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "kohya", base=base)
    assert list(files.read_file(tmp_path / "out.safetensors").components) == [expected]


def test_original_names_are_not_diffusers(tmp_path: Path) -> None:
    update = make_update(24, 8)
    parts = {"lora_A.weight": update.down, "lora_B.weight": update.up, "alpha": torch.tensor(update.alpha)}
    source, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    for name in ("double_blocks.0.img_attn.qkv", "joint_blocks.0.x_block.attn.qkv", "blocks.0.self_attn.q"):
        save_file({f"diffusion_model.{name}.{key}": value for key, value in parts.items()}, source)
        with pytest.raises(ValueError, match="names below diffusion_model are those of the original code base"):
            lora_fast.convert_adapter(source, out, "diffusers", component="transformer")
        base = base_file(tmp_path / "base.safetensors", {name: update})
        with pytest.raises(ValueError, match="is a name of the original code base, which diffusers calls otherwise"):
            lora_fast.convert_adapter(source, out, "diffusers", component="transformer", base=base)


@pytest.mark.parametrize("to", ["peft", "diffusers", "kohya"])
@pytest.mark.parametrize("is_convolution", [True, False])
def test_one_by_one_convolutions_and_linears_are_written_as_the_base_has_them(
    is_convolution: bool, to: str, tmp_path: Path
) -> None:
    update = make_update(8, 6, axis="output")
    shaped = update.weight[..., None, None] if is_convolution else update.weight
    save_file({"a.weight": shaped}, tmp_path / "base.safetensors")
    source = kohya_file(tmp_path / "a.safetensors", {"a": update})
    if not is_convolution:
        ones = {key: value[..., None, None] for key, value in load_file(source).items() if "alpha" not in key}
        parts = load_file(source) | ones
        save_file(parts, source)
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    lora_fast.convert_adapter(source, out, to, base=tmp_path / "base.safetensors", component="unet")
    layer = read(out).layers["a"]
    assert layer.lora_A.dim() == shaped.dim()
    merged = merged_file(tmp_path / "base.safetensors", out, tmp_path / "merged.safetensors")
    assert_close(merged["a.weight"], update.merged().reshape(shaped.shape))
