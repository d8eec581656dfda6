"""Where an adapter's names belong: flattened names, single files, pipelines, other code bases, rows of a weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import torch
from file_helpers import Update, assert_close, base_file, kohya_file, make_update, merged_file
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fast
from lora_fast import cli
from lora_fast.merge_checkpoint import merge_checkpoint


def kohya_parts(updates: dict[str, Update], prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{name.replace('.', '_')}.{part}": tensor
        for name, update in updates.items()
        for part, tensor in update.kohya().items()
    }


def test_a_flattened_name_is_looked_up_never_taken_apart(tmp_path: Path) -> None:
    updates = {"down_blocks.0.to_q": make_update(6, 4), "mid.block_1.to_out.0": make_update(4, 6, seed=1)}
    adapter = kohya_file(tmp_path / "a.safetensors", updates, prefix="lora_unet_")
    merged = merged_file(base_file(tmp_path / "base.safetensors", updates), adapter, tmp_path / "out.safetensors")
    for name, update in updates.items():
        assert_close(merged[f"{name}.weight"], update.merged())


def test_two_modules_of_one_flattened_name_are_an_error_if_the_file_means_them(tmp_path: Path) -> None:
    updates = {"a.b_c": make_update(6, 4), "other": make_update(4, 6)}
    base = base_file(tmp_path / "base.safetensors", updates | {"a_b.c": make_update(6, 4)})
    adapter = kohya_file(tmp_path / "a.safetensors", updates)
    with pytest.raises(ValueError, match=r"a_b_c could be a\.b_c and a_b\.c"):
        merged_file(base, adapter, tmp_path / "out.safetensors")
    del updates["a.b_c"]
    adapter = kohya_file(tmp_path / "b.safetensors", updates)
    assert_close(merged_file(base, adapter, tmp_path / "out.safetensors")["other.weight"], updates["other"].merged())


def test_names_that_are_not_in_the_base_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    updates = {"a.b": make_update(6, 4), "c.d": make_update(4, 6)}
    base = base_file(tmp_path / "base.safetensors", {"a.b": updates["a.b"]})
    adapter = kohya_file(tmp_path / "a.safetensors", updates)
    with pytest.raises(ValueError, match=r"lacks 1 of the 2 modules of .*a\.safetensors: c_d"):
        merged_file(base, adapter, tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "base.safetensors"]


def test_a_file_of_other_sizes_is_refused(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", {"a.b": make_update(6, 4)})
    adapter = kohya_file(tmp_path / "a.safetensors", {"a.b": make_update(6, 5)})
    with pytest.raises(ValueError, match=r"lora_A \[2, 5\] and lora_B \[6, 2\] for a\.b\.weight, which has \[6, 4\]"):
        merged_file(base, adapter, tmp_path / "out.safetensors")


# A corner of each model of a single-file checkpoint of SDXL, in its own names, with sizes that tell the encoders apart.
UNET = {
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q": (8, 8),
    "input_blocks.4.0.in_layers.2": (8, 8, 3, 3),
    "input_blocks.3.0.op": (8, 8, 3, 3),
    "middle_block.1.proj_in": (8, 8),
    "output_blocks.2.2.conv": (8, 8, 3, 3),
    "output_blocks.5.1.transformer_blocks.1.ff.net.0.proj": (16, 8),
    "time_embed.0": (12, 8),
    "out.2": (4, 8, 3, 3),
}
DIFFUSERS_UNET = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.attentions.0.proj_in",
    "up_blocks.0.upsamplers.0.conv",
    "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj",
    "time_embedding.linear_1",
    "conv_out",
]
LAYER = "text_model.encoder.layers.0."
TEXT = {f"{LAYER}self_attn.{part}": (6, 6) for part in ("q_proj", "k_proj", "v_proj", "out_proj")} | {
    f"{LAYER}mlp.fc1": (10, 6)
}
TEXT_2 = {f"{LAYER}self_attn.{part}": (9, 9) for part in ("q_proj", "k_proj", "v_proj", "out_proj")} | {
    f"{LAYER}mlp.fc1": (12, 9)
}


def updates_of(shapes: dict[str, tuple[int, ...]], axis: str | None) -> dict[str, Update]:
    return {name: make_update(*shape, axis=axis, seed=index) for index, (name, shape) in enumerate(shapes.items())}


def sdxl(tmp_path: Path, axis: str | None) -> tuple[dict[str, Update], dict[str, Update], dict[str, Update], Path]:
    unet, text, text_2 = updates_of(UNET, axis), updates_of(TEXT, axis), updates_of(TEXT_2, axis)
    tensors = kohya_parts(unet, "lora_unet_") | kohya_parts(text, "lora_te1_") | kohya_parts(text_2, "lora_te2_")
    path = tmp_path / "sdxl.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return unet, text, text_2, path


@pytest.mark.parametrize("axis", ["output", "input", None])
def test_a_single_file_checkpoint_of_sdxl(axis: str | None, tmp_path: Path) -> None:
    unet, text, text_2, adapter = sdxl(tmp_path, axis)
    resblock = "conditioner.embedders.1.model.transformer.resblocks.0."
    one = "conditioner.embedders.0.transformer."
    attention = [text_2[f"{LAYER}self_attn.{part}"] for part in ("q_proj", "k_proj", "v_proj")]
    base = {f"model.diffusion_model.{name}.weight": update.weight for name, update in unet.items()}
    base |= {f"{one}{name}.weight": update.weight for name, update in text.items()}
    base |= {
        f"{resblock}attn.in_proj_weight": torch.cat([update.weight for update in attention]),
        f"{resblock}attn.out_proj.weight": text_2[f"{LAYER}self_attn.out_proj"].weight,
        f"{resblock}mlp.c_fc.weight": text_2[f"{LAYER}mlp.fc1"].weight,
        "first_stage_model.decoder.conv_in.weight": torch.ones(2, 2),
    }
    save_file(base, tmp_path / "base.safetensors")
    merged = merged_file(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors", magnitude_axis=axis)
    for name, update in unet.items():
        assert_close(merged[f"model.diffusion_model.{name}.weight"], update.merged())
    for name, update in text.items():
        assert_close(merged[f"{one}{name}.weight"], update.merged())
    # the rows of q, k and v in one weight, each with its own norms, on either axis
    expected = torch.cat([update.merged() for update in attention])
    assert_close(merged[f"{resblock}attn.in_proj_weight"], expected)
    assert_close(merged[f"{resblock}attn.out_proj.weight"], text_2[f"{LAYER}self_attn.out_proj"].merged())
    assert_close(merged[f"{resblock}mlp.c_fc.weight"], text_2[f"{LAYER}mlp.fc1"].merged())
    assert torch.equal(merged["first_stage_model.decoder.conv_in.weight"], torch.ones(2, 2))


def test_a_base_with_one_of_several_models_says_what_to_do(tmp_path: Path) -> None:
    unet, _, _, adapter = sdxl(tmp_path, None)
    base = base_file(tmp_path / "unet.safetensors", unet)
    with pytest.raises(
        ValueError, match=r"lacks 5 of the 5 modules .*several models .* say which it is: component=, --component"
    ):
        merged_file(base, adapter, tmp_path / "out.safetensors")
    merged = merged_file(base, adapter, tmp_path / "out.safetensors", component="unet")
    for name, update in unet.items():
        assert_close(merged[f"{name}.weight"], update.merged())


def write_pipeline(folder: Path, models: dict[str, dict[str, Tensor]]) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    for name, tensors in models.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        file = "model.safetensors" if name.startswith("text") else "diffusion_pytorch_model.safetensors"
        save_file(tensors, folder / name / file)
    return folder


def save_in_shards(folder: Path, tensors: dict[str, Tensor], variant: str) -> None:
    """As diffusers and transformers save a variant ("fp16") that is larger than a shard."""
    weight_map = {}
    for index, (key, tensor) in enumerate(tensors.items(), start=1):
        weight_map[key] = f"model.{variant}-{index:05d}-of-{len(tensors):05d}.safetensors"
        save_file({key: tensor}, folder / weight_map[key])
    (folder / f"model.safetensors.index.{variant}.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_variant_in_shards(tmp_path: Path) -> None:
    update, other = make_update(6, 4), torch.randn(3, 3)
    base = tmp_path / "base"
    base.mkdir()
    save_in_shards(base, {"a.weight": update.weight, "b.weight": other}, "fp16")
    done = merge_checkpoint(base, kohya_file(tmp_path / "a.safetensors", {"a": update}), tmp_path / "out")
    assert (done.merged, done.kept, done.not_copied) == (1, 1, [])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in base.iterdir()}
    first, second = sorted((tmp_path / "out").glob("*.safetensors"))
    assert_close(load_file(first)["a.weight"], update.merged())
    assert torch.equal(load_file(second)["b.weight"], other)


@pytest.mark.parametrize("kind", ["two files", "damaged", "dangling"])
def test_a_folder_that_cannot_be_read_could_be_the_model(kind: str, tmp_path: Path) -> None:
    update = make_update(6, 4)
    base = write_pipeline(
        tmp_path / "base", {"text_encoder": {"q.weight": update.weight}, "text_encoder_2": {"q.weight": update.weight}}
    )
    weights = base / "text_encoder_2" / "model.safetensors"
    if kind == "two files":
        save_file({"s.weight": torch.ones(1)}, weights.with_name("another.safetensors"))
        weights.rename(weights.with_name("one.safetensors"))
    elif kind == "damaged":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        weights.rename(tmp_path / "elsewhere.safetensors")
        weights.symlink_to(tmp_path / "gone.safetensors")
    why = r"text_encoder_2(/model\.safetensors)?: (has 2 \*\.safetensors and no|.*safetensors file|no such file)"
    for prefix, name in (("lora_te_", "q"), ("lora_te2_", "q"), ("lora_te1_", "x")):
        adapter = kohya_file(tmp_path / "a.safetensors", {name: update}, prefix=prefix)
        with pytest.raises(
            ValueError, match=rf"(could be text_encoder or text_encoder_2|is text_encoder_2|is no model) of .*{why}"
        ):
            merge_checkpoint(base, adapter, tmp_path / "refused")
    adapter = kohya_file(tmp_path / "a.safetensors", {"q": update}, prefix="lora_te1_")  # by its number
    if kind != "dangling":
        assert merge_checkpoint(base, adapter, tmp_path / "out").merged == 1


@pytest.mark.parametrize(
    ("component", "folder"), [("transformer_1", "transformer"), ("transformer_2", "transformer_2")]
)
def test_a_number_says_which_of_two_transformers_it_is(component: str, folder: str, tmp_path: Path) -> None:
    """Wan 2.2 has one for much noise and one for little."""
    update = make_update(4, 4)
    base = write_pipeline(
        tmp_path / "base", {name: {"q.r.weight": update.weight} for name in ("transformer", "transformer_2")}
    )
    tensors = {f"diffusion_model.{component}.q.r.{part}": value for part, value in update.kohya().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    done = merge_checkpoint(base, tmp_path / "a.safetensors", tmp_path / "out")
    assert f"is taken for {folder} of" in done.notes[-1]
    save_file(
        {f"diffusion_model.q.r.{part}": value for part, value in update.kohya().items()}, tmp_path / "b.safetensors"
    )
    with pytest.raises(
        ValueError, match="could be transformer or transformer_2 of .*: give that folder itself as the base"
    ):
        merge_checkpoint(base, tmp_path / "b.safetensors", tmp_path / "refused")


def test_square_layers_are_named_over_all_of_the_models(tmp_path: Path) -> None:
    update = make_update(4, 4)
    base = write_pipeline(tmp_path / "base", {name: {"q.weight": update.weight} for name in ("unet", "text_encoder")})
    tensors = kohya_parts({"q": update}, "lora_unet_") | kohya_parts({"q": make_update(4, 4)}, "lora_te_")
    save_file(tensors, tmp_path / "a.safetensors")
    assert merge_checkpoint(base, tmp_path / "a.safetensors", tmp_path / "out", fan_in_fan_out=["q"]).merged == 2
    with pytest.raises(ValueError, match=r"fan_in_fan_out: 'r' is no layer of .*a\.safetensors"):
        merge_checkpoint(base, tmp_path / "a.safetensors", tmp_path / "out2", fan_in_fan_out=["q", "r"])


@pytest.mark.parametrize("component", ["lora_te", "text_encoder", "text_encoder_2"])
def test_one_model_of_a_pipeline_is_merged_if_it_is_named(component: str, tmp_path: Path) -> None:
    update = make_update(4, 4)
    base = write_pipeline(tmp_path / "base", {name: {"q.weight": update.weight} for name in ("unet", "text_encoder")})
    tensors = kohya_parts({"q": update}, "lora_unet_") | kohya_parts({"q": make_update(4, 4)}, "lora_te_")
    save_file(tensors, tmp_path / "a.safetensors")
    arguments = [str(base), str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--component", component]
    assert cli.main(["merge", *arguments]) == (0 if component != "text_encoder_2" else 2)
    if component != "text_encoder_2":
        assert_close(load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")["q.weight"], update.merged())
        for path in (base / "unet").iterdir():
            assert (tmp_path / "out" / "unet" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("axis", ["output", "input", None])
def test_a_folder_of_diffusers_through_the_block_map(axis: str | None, tmp_path: Path) -> None:
    unet, text, text_2, adapter = sdxl(tmp_path, axis)
    by_diffusers = dict(zip(DIFFUSERS_UNET, unet.values(), strict=True))
    models = {
        "unet": {f"{name}.weight": update.weight for name, update in by_diffusers.items()},
        "text_encoder": {f"{name}.weight": update.weight for name, update in text.items()},
        # of transformers 5, which leaves one level out
        "text_encoder_2": {f"{name[11:]}.weight": update.weight for name, update in text_2.items()},
        "vae": {"decoder.weight": torch.ones(2, 2)},
    }
    base = write_pipeline(tmp_path / "base", models)
    save_file(models["unet"], base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    done = merge_checkpoint(base, adapter, tmp_path / "out", magnitude_axis=axis)
    out = tmp_path / "out"
    assert done.not_copied == ["unet/diffusion_pytorch_model.fp16.safetensors"]
    files = {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == files - set(done.not_copied)
    merged = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    for name, update in by_diffusers.items():
        assert_close(merged[f"{name}.weight"], update.merged())
    merged = load_file(out / "text_encoder" / "model.safetensors")
    for name, update in text.items():
        assert_close(merged[f"{name}.weight"], update.merged())
    merged = load_file(out / "text_encoder_2" / "model.safetensors")
    for name, update in text_2.items():
        assert_close(merged[f"{name[11:]}.weight"], update.merged())
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        base / "vae" / "diffusion_pytorch_model.safetensors"
    ).read_bytes()


def test_a_model_that_the_pipeline_lacks_is_named(tmp_path: Path) -> None:
    unet, _, _, adapter = sdxl(tmp_path, None)
    models = {
        "unet": {f"{name}.weight": update.weight for name, update in zip(DIFFUSERS_UNET, unet.values(), strict=True)}
    }
    base = write_pipeline(tmp_path / "base", models)
    with pytest.raises(ValueError, match=r"its 'lora_te1' .* is no model of .*base: tried none of its folders"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_encoders_of_one_size_are_told_apart_by_their_number_and_no_others(tmp_path: Path) -> None:
    text = updates_of(TEXT, None)
    models = {
        f"text_encoder{end}": {f"{name}.weight": update.weight for name, update in text.items()} for end in ("", "_2")
    }
    base = write_pipeline(tmp_path / "base", models)
    adapter = kohya_file(tmp_path / "two.safetensors", text, prefix="lora_te2_")
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_close(
        load_file(tmp_path / "out" / "text_encoder_2" / "model.safetensors")[f"{LAYER}mlp.fc1.weight"],
        text[f"{LAYER}mlp.fc1"].merged(),
    )
    adapter = kohya_file(tmp_path / "none.safetensors", text, prefix="lora_te_")
    with pytest.raises(ValueError, match="its 'lora_te' could be text_encoder or text_encoder_2"):
        merge_checkpoint(base, adapter, tmp_path / "out2")


FLUX = {
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")],
    "single_blocks.1.linear1": [
        f"single_transformer_blocks.1.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ],
}


def flux_parts(axis: str | None) -> dict[str, Update]:
    names = [name for parts in FLUX.values() for name in parts]
    return {
        name: make_update(20 if name.endswith("mlp") else 8, 8, axis=axis, seed=index)
        for index, name in enumerate(names)
    }


@pytest.mark.parametrize("axis", ["output", "input", None])
def test_parts_of_a_weight_are_merged_into_its_rows(axis: str | None, tmp_path: Path) -> None:
    parts = flux_parts(axis)
    del parts["transformer_blocks.0.attn.to_k"]
    whole = flux_parts(axis)
    base = {f"{name}.weight": torch.cat([whole[part].weight for part in own]) for name, own in FLUX.items()}
    save_file(base, tmp_path / "base.safetensors")
    adapter = kohya_file(tmp_path / "a.safetensors", parts, prefix="lora_transformer_")
    merged = merged_file(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    for name, own in FLUX.items():
        expected = torch.cat([parts[part].merged() if part in parts else whole[part].weight for part in own])
        assert_close(merged[f"{name}.weight"], expected)


@pytest.mark.parametrize("axis", ["output", None])
def test_a_weight_s_rows_are_merged_into_its_parts(axis: str | None, tmp_path: Path) -> None:
    fused = {
        "double_blocks.0.img_attn.qkv": make_update(24, 8, axis=axis),
        "single_blocks.1.linear1": make_update(44, 8, axis=axis, seed=1),
    }
    base: dict[str, Tensor] = {}
    for name, own in FLUX.items():
        sizes = [8, 8, 8, 20][: len(own)]
        for part, rows in zip(own, fused[name].weight.split(sizes), strict=True):
            base[f"{part}.weight"] = rows.contiguous()
    save_file(base, tmp_path / "base.safetensors")
    adapter = kohya_file(tmp_path / "a.safetensors", fused, prefix="lora_unet_")
    merged = merged_file(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    for name, own in FLUX.items():
        assert_close(torch.cat([merged[f"{part}.weight"] for part in own]), fused[name].merged())


def test_a_norm_over_all_rows_is_not_taken_apart(tmp_path: Path) -> None:
    fused = {"double_blocks.0.img_attn.qkv": make_update(24, 8, axis="input")}
    base = {f"{part}.weight": torch.ones(8, 8) for part in FLUX["double_blocks.0.img_attn.qkv"]}
    save_file(base, tmp_path / "base.safetensors")
    adapter = kohya_file(tmp_path / "a.safetensors", fused, prefix="lora_unet_")
    with pytest.raises(ValueError, match="one norm for each input, over all rows of the weight"):
        merged_file(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_attn = Fused()


class Flux(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.double_blocks = nn.ModuleList([Block()])


@pytest.mark.parametrize("axis", ["output", None])
def test_parts_are_loaded_into_one_layer(axis: str | None, tmp_path: Path) -> None:
    parts = {name: update for name, update in flux_parts(axis).items() if name.startswith("transformer")}
    adapter = kohya_file(tmp_path / "a.safetensors", parts, prefix="lora_transformer_")
    model = Flux().double()
    model.double_blocks[0].img_attn.qkv.weight.data = torch.cat([update.weight for update in parts.values()])
    lora_fast.load_adapter(model, adapter)
    layer = model.double_blocks[0].img_attn.qkv
    assert layer.rank == 6
    x = torch.randn(3, 8, dtype=torch.float64)
    assert_close(layer(x), x @ torch.cat([update.merged() for update in parts.values()]).T)


def test_dora_of_some_rows_is_merged_but_not_loaded(tmp_path: Path) -> None:
    parts = {name: update for name, update in flux_parts("output").items() if name.endswith("0.attn.to_q")}
    adapter = kohya_file(tmp_path / "a.safetensors", parts, prefix="lora_transformer_")
    model = Flux().double()
    with pytest.raises(ValueError, match=r"double_blocks\.0\.img_attn\.qkv: DoRA of some of its rows only"):
        lora_fast.load_adapter(model, adapter)
    assert type(model.double_blocks[0].img_attn.qkv) is nn.Linear


def test_a_linear_s_update_of_a_one_by_one_convolution(tmp_path: Path) -> None:
    update = make_update(6, 4, axis="output")
    save_file({"proj_in.weight": update.weight[..., None, None]}, tmp_path / "base.safetensors")
    adapter = kohya_file(tmp_path / "a.safetensors", {"proj_in": update})
    merged = merged_file(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    assert_close(merged["proj_in.weight"], update.merged()[..., None, None])


def test_the_command_says_what_it_took_for_granted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    updates = {"a": make_update(6, 6, axis="output")}
    base = base_file(tmp_path / "base.safetensors", updates)
    adapter = kohya_file(tmp_path / "a.safetensors", updates)
    out = tmp_path / "out.safetensors"
    assert cli.main(["merge", str(base), str(adapter), str(out)]) == 0
    text = capsys.readouterr().out
    assert f"{out}: 1 tensors merged, 0 replaced, 1 kept as they were" in text
    assert f"{adapter} does not say who wrote it: nothing is added to the norms" in text
    assert cli.main(["merge", str(base), str(adapter), str(out)]) == 2
    assert "exists already; expected a new name" in capsys.readouterr().err
    assert (
        cli.main(["merge", str(base), str(adapter), str(tmp_path / "b.safetensors"), "--magnitude-axis", "input"]) == 2
    )
    assert "magnitude_axis says 'input'" in capsys.readouterr().err
