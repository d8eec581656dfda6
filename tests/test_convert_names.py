"""lora-fast convert writes the names that the readers of each format look up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import torch
from file_helpers import kohya_file, make_update
from safetensors.torch import load_file, save_file
from toy_folders import A, B, W, adapter_folder, base_folder, embedding_lora, lora, small_llama

import lora_fast
from lora_fast.adapters import adapter, component_names, files
from lora_fast.adapters.formats import mlx
from lora_fast.adapters.formats.peft_config import lora_config
from lora_fast.merge_checkpoint import merge_checkpoint

FLUX = "transformer_blocks.0.attn.to_q"
QWEN = "transformer_blocks.0.img_mod.1"
# A module of a transformer in diffusers' names, another of the same model, and what kohya's files call the model.
TRANSFORMERS = [
    ("single_transformer_blocks.0.attn.to_q", FLUX, "lora_transformer"),
    (FLUX, "single_transformer_blocks.0.attn.to_q", "lora_transformer"),
    (FLUX, "transformer_blocks.0.ff.net.2", "lora_transformer"),
    (FLUX, QWEN, "lora_unet"),
    (QWEN, FLUX, "lora_unet"),
    ("double_blocks.0.img_attn.proj", "double_blocks.0.txt_attn.proj", "lora_unet"),
    ("blocks.0.self_attn.q", "blocks.0.ffn.0", "lora_unet"),
    ("layers.0.attention.to_q", "layers.0.feed_forward.w1", "lora_unet"),
]


def diffusers_file(path: Path, *names: str, component: str = "transformer") -> Path:
    tensors = {f"{component}.{key}": value for name in names for key, value in lora(name).items()}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(("name", "other", "component"), TRANSFORMERS)
def test_kohya_s_name_of_a_transformer_follows_from_its_modules(
    name: str, other: str, component: str, tmp_path: Path
) -> None:
    base = tmp_path / "transformer"
    base.mkdir()
    save_file({f"{each}.weight": W.clone() for each in (name, other)}, base / "diffusion_pytorch_model.safetensors")
    source = diffusers_file(tmp_path / "a.safetensors", name)
    lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "kohya", base=base)
    key = f"{component}_{name.replace('.', '_')}.lora_down.weight"
    assert torch.equal(load_file(tmp_path / "out.safetensors")[key], A)
    merge_checkpoint(base, tmp_path / "out.safetensors", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(merged[f"{name}.weight"], W + B @ A)


@pytest.mark.parametrize(("name", "other", "component"), TRANSFORMERS)
def test_without_the_base_the_file_s_modules_tell_or_the_user_does(
    name: str, other: str, component: str, tmp_path: Path
) -> None:
    both = diffusers_file(tmp_path / "both.safetensors", name, other)
    lora_fast.convert_adapter(both, tmp_path / "out.safetensors", "kohya")
    assert list(files.read_file(tmp_path / "out.safetensors").components) == [component]
    one = diffusers_file(tmp_path / "one.safetensors", name)
    if name == FLUX:
        with pytest.raises(
            ValueError, match=rf"{FLUX} is a module of lora_unet in kohya's files of Qwen-Image, of lora_tr"
        ):
            lora_fast.convert_adapter(one, tmp_path / "no.safetensors", "kohya")
    else:
        lora_fast.convert_adapter(one, tmp_path / "one_out.safetensors", "kohya")
        assert list(files.read_file(tmp_path / "one_out.safetensors").components) == [component]
    for said in ("lora_unet", "lora_transformer"):
        lora_fast.convert_adapter(one, tmp_path / f"{said}.safetensors", "kohya", component=said)
        assert list(files.read_file(tmp_path / f"{said}.safetensors").components) == [said]


@pytest.mark.parametrize("with_base", [True, False])
def test_diffusers_names_of_wan_are_not_written_for_kohya(with_base: bool, tmp_path: Path) -> None:
    name = "blocks.0.attn1.to_q"
    source = diffusers_file(tmp_path / "a.safetensors", name)
    base = base_folder(tmp_path / "transformer", {f"{name}.weight": W.clone()}) if with_base else None
    with pytest.raises(
        ValueError, match=f"{name} is diffusers' name of a module that kohya's files have another name for"
    ):
        lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "kohya", base=base)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("prefix", "said", "expected"),
    [
        ("lora_transformer_", None, "lora_transformer"), ("transformer_", None, "transformer"),
        ("lora_transformer_", "lora_unet", "lora_unet"), ("lora_unet_", "transformer", "lora_transformer"),
        ("lora_unet_", "unet", "lora_unet"), ("lycoris_", None, "lycoris"), ("lycoris_", "unet", "lora_unet"),
    ],
)  # fmt: skip
def test_flattened_names_stay_below_the_name_of_their_model(
    prefix: str, said: str | None, expected: str, tmp_path: Path
) -> None:
    source = kohya_file(
        tmp_path / "a.safetensors", {"single_transformer_blocks.0.proj": make_update(6, 4)}, prefix=prefix
    )
    lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "kohya", component=said)
    written = load_file(tmp_path / "out.safetensors")
    assert {key.partition(".")[0] for key in written} == {f"{expected}_single_transformer_blocks_0_proj"}
    assert list(files.read_file(tmp_path / "out.safetensors").components) == [expected]


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_the_names_are_the_model_s_for_peft_and_the_checkpoint_s_for_mlx(to: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    config = transformers.LlamaConfig(
        hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    weights = {key.removeprefix("model."): value.clone() for key, value in model.model.state_dict().items()}
    own = json.loads((tmp_path / "model" / "config.json").read_text())
    base = base_folder(tmp_path / "base", weights, **own)  # of the model without its head, as some are published
    name = "layers.0.self_attn.q_proj"
    update = make_update(4, 4)
    source = kohya_file(tmp_path / "a.safetensors", {name: update}, prefix="lycoris_")
    lora_fast.convert_adapter(source, tmp_path / "out", to, base=base)
    if to == "mlx":
        assert f"{name}.lora_a" in load_file(tmp_path / "out" / "adapters.safetensors")
        return
    assert f"base_model.model.model.{name}.lora_A.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    assert torch.equal(
        adapted.get_submodule(f"base_model.model.model.{name}").lora_A["default"].weight, update.down.float()
    )


def test_layers_of_experts_have_no_names_in_mlx_s_files(tmp_path: Path) -> None:
    source = adapter_folder(tmp_path / "a", lora("model.layers.0.mlp.experts.3.up_proj"))
    with pytest.raises(ValueError, match=r"experts\.3\.up_proj is a layer of one expert"):
        lora_fast.convert_adapter(source, tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["peft", "kohya", "mlx"])
@pytest.mark.parametrize("kept", ["base", "copy"])
def test_whole_tensors_that_are_the_base_s_are_left_out(kept: str, to: str, tmp_path: Path) -> None:
    """PEFT saves the embeddings beside an adapter when it does not know that they are as they were."""
    words = torch.arange(36.0).reshape(9, 4)
    tensors = {"words.weight": words.bfloat16().float(), "q.weight": W.clone()}
    base = base_folder(tmp_path / "base", tensors, tie_word_embeddings=False)
    config: dict[str, Any] = {"modules_to_save": ["words"]} if kept == "copy" else {}
    same = adapter_folder(tmp_path / "same", lora("q") | {"words.weight": words.bfloat16()}, **config)
    out = tmp_path / ("out.safetensors" if to == "kohya" else "out")
    options: dict[str, Any] = {"component": "unet"} if to == "kohya" else {}
    done = lora_fast.convert_adapter(same, out, to, base=base, **options)
    assert done.notes[0] == f"left out, the same in {base}: words.weight"
    assert not any("words" in key for key in load_file(out if to == "kohya" else next(out.glob("*.safetensors"))))
    other = adapter_folder(tmp_path / "other", lora("q") | {"words.weight": words + 1}, **config)
    for options["base"] in (base, None):
        with pytest.raises(ValueError, match="holds whole tensors beside the updates \\(words.weight"):
            lora_fast.convert_adapter(other, tmp_path / f"no{out.suffix}", to, **options)


NAMES = ["a.0.to_out.0", "a.0.to_out.1", "a.1.to_out.0", "a.1.to_q", "a.0.to_q", "b.to_q", "c.b.to_q", "head"]
TARGETS = [
    (["a.0.to_out.0", "a.1.to_out.0"], ["to_out.0"]),
    (["a.0.to_out.0"], ["0.to_out.0"]),
    (["a.0.to_q", "a.1.to_q"], ["0.to_q", "1.to_q"]),
    (["a.0.to_q", "a.1.to_q", "b.to_q", "c.b.to_q"], ["to_q"]),
    (["b.to_q", "c.b.to_q"], ["b.to_q"]),
    (["head", "a.0.to_out.1"], ["head", "to_out.1"]),
    (["c.b.to_q"], ["c.b.to_q"]),
    (["b.to_q", "head"], r"b\.to_q|head"),
]


@pytest.mark.parametrize(("targets", "expected"), TARGETS)
def test_target_modules_are_ends_that_no_other_module_has(targets: list[str], expected: Any) -> None:
    layers = {name: type("", (), {"rank": 2, "scaling": 1.0})() for name in targets}
    assert lora_config(layers, NAMES)["target_modules"] == expected
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(target_modules=expected)
    every = {name.rsplit(".", drop)[0] for name in NAMES for drop in range(4)}
    assert {name for name in every if check_target_module_exists(config, name)} == set(targets)


def test_the_components_of_transformers_are_read_back() -> None:
    for name in ("lora_transformer_single_transformer_blocks_0_proj", "transformer_joint_transformer_blocks_0_proj"):
        component, inside, is_flattened = component_names.split(name)
        assert (component, is_flattened) == (name.split("_single")[0].split("_joint")[0], True)
        assert inside.endswith("transformer_blocks_0_proj")
    assert component_names.split("transformer_decoder_0_proj") == ("", "transformer_decoder_0_proj", None)


def test_an_embedding_is_named_for_peft_as_its_model_does(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", {"words.weight": torch.ones(9, 4)}, tie_word_embeddings=False)
    source = adapter_folder(tmp_path / "a", embedding_lora("words"))
    lora_fast.convert_adapter(source, tmp_path / "out", "peft", base=base)
    assert "base_model.model.words.lora_embedding_A" in load_file(tmp_path / "out" / "adapter_model.safetensors")


@pytest.mark.parametrize("said", ["transformer", None, "lora_unet"])
def test_the_base_tells_also_of_a_transformer_that_is_named(said: str | None, tmp_path: Path) -> None:
    base = tmp_path / "transformer"
    base.mkdir()
    weights = {f"{name}.weight": W.clone() for name in (FLUX, "single_transformer_blocks.0.attn.to_q")}
    save_file(weights, base / "diffusion_pytorch_model.safetensors")
    source = diffusers_file(tmp_path / "a.safetensors", FLUX)
    lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "kohya", base=base, component=said)
    expected = said if said == "lora_unet" else "lora_transformer"
    assert list(files.read_file(tmp_path / "out.safetensors").components) == [expected]


@pytest.mark.parametrize(("several", "expected"), [(False, "lora_te"), (True, "lora_te1")])
@pytest.mark.parametrize("said", ["text_encoder", None])
@pytest.mark.parametrize("kind", ["diffusers", "lora_te_", "lora_te1_"])
def test_the_base_tells_also_of_a_text_encoder_that_is_named(
    kind: str, said: str | None, several: bool, expected: str, tmp_path: Path
) -> None:
    name = "text_model.encoder.layers.0.mlp.fc1"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text("{}")
    for folder in ("text_encoder", *(["text_encoder_2"] if several else [])):
        other = W.clone() if folder == "text_encoder" else torch.ones(5, 5)
        base_folder(tmp_path / "base" / folder, {f"{name}.weight": other})
    if kind == "diffusers":
        source = diffusers_file(tmp_path / "a.safetensors", name, component="text_encoder")
    else:
        source = kohya_file(tmp_path / "a.safetensors", {name: make_update(4, 4)}, prefix=kind)
        expected = kind.removesuffix("_") if said is None else expected  # the file's own name stays
    lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "kohya", base=tmp_path / "base", component=said)
    assert list(files.read_file(tmp_path / "out.safetensors").components) == [expected]


def test_two_models_do_not_become_one(tmp_path: Path) -> None:
    tensors = {
        f"{name}.{key}": value.clone()
        for name in ("diffusion_model.double_blocks.0.img_attn.proj", "unet.down_blocks.0.attentions.0.proj_in")
        for key, value in {"lora_A.weight": A, "lora_B.weight": B}.items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match="'diffusion_model' and 'unet' are both lora_unet in kohya's files: convert one"
    ):
        lora_fast.convert_adapter(tmp_path / "a.safetensors", tmp_path / "out.safetensors", "kohya")
    lora_fast.convert_adapter(tmp_path / "a.safetensors", tmp_path / "out.safetensors", "kohya", component="unet")


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_peft_s_names_become_those_of_a_single_file_s_model(to: str, tmp_path: Path) -> None:
    name = "input_blocks.1.1.proj_in"
    save_file({f"model.diffusion_model.{name}.weight": W.clone()}, tmp_path / "base.safetensors")
    source = adapter_folder(tmp_path / "a", lora(name))
    out = tmp_path / "out.safetensors"
    if to == "diffusers":
        with pytest.raises(ValueError, match="is a name of the original code base, which diffusers calls otherwise"):
            lora_fast.convert_adapter(source, out, to, base=tmp_path / "base.safetensors")
        return
    lora_fast.convert_adapter(source, out, to, base=tmp_path / "base.safetensors")
    assert f"lora_unet_{name.replace('.', '_')}.alpha" in load_file(out)


@pytest.mark.parametrize("magnitude", ["lora_magnitude_vector", "magnitude"])
def test_metadata_that_would_mean_another_norm_are_left_out(magnitude: str, tmp_path: Path) -> None:
    """From kohya's words to kohya's: a magnitude that was not LyCORIS's gets LyCORIS's name."""
    update = make_update(6, 4, axis="output", dtype=torch.bfloat16)
    tensors = {f"lora_unet_a_b.{key}": value for key, value in update.kohya().items()}
    tensors[f"lora_unet_a_b.{magnitude}"] = tensors.pop("lora_unet_a_b.dora_scale").flatten()
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"wd_on_output": "False"}'}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    before = files.read_file(tmp_path / "a.safetensors").component(None).layers["a_b"]
    lora_fast.convert_adapter(tmp_path / "a.safetensors", tmp_path / "out.safetensors", "kohya")
    after = files.read_file(tmp_path / "out.safetensors").component(None).layers["a_b"]
    assert (after.norm_eps, after.norm_axis) == (before.norm_eps, before.norm_axis) == (0.0, "output")
    assert torch.equal(after.magnitude, before.magnitude)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model.layers.3.mlp.blocks.0.w", "mlp.blocks.0.w"),
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj"),
        ("layers.3.q", "q"),
        ("transformer.h.0.attn.c_attn", "attn.c_attn"),
        ("lm_head", "lm_head"),
    ],
)
def test_mlx_s_keys_are_names_in_a_layer(name: str, key: str) -> None:
    assert mlx.key_of(name) == key


@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"])
@pytest.mark.parametrize("has_head", [True, False])
def test_peft_s_own_names_stay(has_head: bool, name: str, tmp_path: Path) -> None:
    """AutoModel makes the inner model of a checkpoint that names the outer, and adapters are trained on either."""
    model = small_llama(tmp_path / "base")
    if not has_head:
        model.model.save_pretrained(tmp_path / "base")
    source = adapter_folder(tmp_path / "a", lora(name), target_modules=["q_proj"], bias="none")
    done = lora_fast.convert_adapter(source, tmp_path / "out", "peft", base=tmp_path / "base")
    assert done.notes == []
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors.keys() == load_file(source / "adapter_model.safetensors").keys()
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    own = model if name.startswith("model.") else model.model
    adapted = peft.PeftModel.from_pretrained(own, tmp_path / "out")
    assert torch.equal(adapted.get_submodule(f"base_model.model.{name}").lora_B["default"].weight, B)
    before, after = (json.loads((each / "adapter_config.json").read_text()) for each in (source, tmp_path / "out"))
    assert after["target_modules"] == before["target_modules"]


@pytest.mark.parametrize("prefix", ["lycoris_", "mlx"])
def test_the_class_whose_names_are_written_is_said(prefix: str, tmp_path: Path) -> None:
    small_llama(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj"
    if prefix == "mlx":
        source = tmp_path / "mlx"
        lora_fast.convert_adapter(adapter_folder(tmp_path / "p", lora(name)), source, "mlx")
        done = lora_fast.convert_adapter(source, tmp_path / "without", "peft")
        assert done.notes == ["the names are the file's, which the model in PEFT may call otherwise: --base"]
    else:
        source = kohya_file(tmp_path / "a.safetensors", {name: make_update(4, 4)}, prefix=prefix)
    done = lora_fast.convert_adapter(source, tmp_path / "out", "peft", base=tmp_path / "base")
    assert "the names are those of LlamaForCausalLM, the base's class" in done.notes


@pytest.mark.parametrize("to", ["kohya", "diffusers", "mlx"])
def test_a_head_that_is_tied_has_no_name_in_other_files(to: str, tmp_path: Path) -> None:
    """By the embedding's name the update would be both's."""
    small_llama(tmp_path / "base", tie_word_embeddings=True)
    update = {"lm_head.lora_A.weight": torch.ones(1, 4), "lm_head.lora_B.weight": torch.ones(9, 1)}
    source = adapter_folder(tmp_path / "a", update)
    out = tmp_path / ("out.safetensors" if to == "kohya" else "out")
    with pytest.raises(ValueError, match=r"lm_head is tied to model\.embed_tokens in .*merge it"):
        lora_fast.convert_adapter(source, out, to, base=tmp_path / "base", component=None if to == "mlx" else "unet")
    if to == "kohya":
        with pytest.raises(ValueError, match=r"lm_head is tied to model\.embed_tokens"):
            lora_fast.convert_adapter(source, out, to, base=tmp_path / "base", component="unet", as_difference=True)
    assert not out.exists()


@pytest.mark.parametrize("to", ["kohya", "diffusers", "mlx", "difference"])
def test_names_of_a_release_become_those_of_the_checkpoint(to: str, tmp_path: Path) -> None:
    """So that the file is read with the base that it was written with."""
    model = small_llama(tmp_path / "model")
    weights = {key.removeprefix("model."): value.clone() for key, value in model.model.state_dict().items()}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    base = base_folder(tmp_path / "base", weights, **config)
    source = adapter_folder(tmp_path / "a", lora("model.layers.0.self_attn.q_proj"))
    out = tmp_path / ("out" if to == "mlx" else "out.safetensors")
    options = {} if to == "mlx" else {"component": "unet", "as_difference": to == "difference"}
    lora_fast.convert_adapter(source, out, "kohya" if to == "difference" else to, base=base, **options)
    merge_checkpoint(base, out, tmp_path / "merged")
    merge_checkpoint(base, source, tmp_path / "expected")
    merged, expected = (load_file(tmp_path / each / "model.safetensors") for each in ("merged", "expected"))
    assert all(torch.allclose(merged[key], expected[key], atol=1e-6) for key in expected)
    assert not torch.equal(merged["layers.0.self_attn.q_proj.weight"], weights["layers.0.self_attn.q_proj.weight"])


def test_what_peft_s_auto_classes_read_is_kept(tmp_path: Path) -> None:
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    source = adapter_folder(tmp_path / "a", lora("q"), auto_mapping=mapping, task_type="CAUSAL_LM")
    lora_fast.convert_adapter(source, tmp_path / "out", "peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["auto_mapping"], config["task_type"]) == (mapping, "CAUSAL_LM")


@pytest.mark.parametrize("to", ["peft", "kohya", "mlx", "difference"])
def test_two_names_of_one_weight_are_refused(to: str, tmp_path: Path) -> None:
    small_llama(tmp_path / "base")
    name = "layers.0.self_attn.q_proj"
    source = adapter_folder(tmp_path / "a", lora(name) | lora(f"model.{name}"))
    out = tmp_path / ("out.safetensors" if to in ("kohya", "difference") else "out")
    options = {"component": "unet", "as_difference": to == "difference"} if out.suffix else {}
    with pytest.raises(ValueError, match=rf"{name} and model.{name} are both model.{name} of"):
        lora_fast.convert_adapter(source, out, "kohya" if to == "difference" else to, base=tmp_path / "base", **options)
    assert not out.exists()


@pytest.mark.parametrize("with_base", [True, False])
def test_names_of_an_earlier_release_are_still_found_by_peft(with_base: bool, tmp_path: Path) -> None:
    """LLaVA as transformers 4 named it; PEFT renames what it loads."""
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    sizes = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(hidden_size=8, image_size=8, patch_size=4, projection_dim=8, **sizes)
    text = transformers.LlamaConfig(hidden_size=8, vocab_size=11, num_key_value_heads=1, **sizes)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=10)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    name = "language_model.model.layers.0.self_attn.q_proj"
    update = {f"{name}.lora_A.weight": torch.ones(1, 8), f"{name}.lora_B.weight": torch.arange(8.0)[:, None]}
    other = {key.replace("layers.0", "layers.1"): value.clone() for key, value in update.items()}
    targets = r".*language_model.*\.q_proj"
    source = adapter_folder(
        tmp_path / "a", update | other, target_modules=targets, alpha_pattern={"q_proj": 3}, bias="none"
    )
    base = tmp_path / "base" if with_base else None
    done = lora_fast.convert_adapter(source, tmp_path / "out", "peft", base=base)
    assert (done.notes == ["the names are those of LlavaForConditionalGeneration, the base's class"]) == with_base
    for folder in (source, tmp_path / "out"):
        own = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
        adapted = peft.PeftModel.from_pretrained(own, folder)
        layers = [module for _, module in adapted.named_modules() if hasattr(module, "lora_A")]
        assert len(layers) == 2
        for layer in layers:
            assert torch.equal(layer.lora_B["default"].weight.flatten(), torch.arange(8.0))
            assert layer.scaling["default"] == 3.0


@pytest.mark.parametrize(
    ("there", "own", "is_same"),
    [
        (torch.ones(3, 4), torch.ones(3, 4).to(torch.float8_e4m3fn), False),
        (torch.full((3, 4), 16777217, dtype=torch.int64), torch.full((3, 4), 16777216.0), False),
        (torch.ones(3, 4), torch.ones(3, 4, dtype=torch.int64), False),
        (torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64), True),
        (torch.ones(3, 4).half(), torch.ones(3, 4).double(), True),
    ],
)
def test_what_is_the_base_s_own(there: torch.Tensor, own: torch.Tensor, is_same: bool, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", {"words.weight": there, "q.weight": W.clone()}, tie_word_embeddings=False)
    source = adapter_folder(tmp_path / "a", lora("q") | {"words.weight": own})
    if is_same:
        lora_fast.convert_adapter(source, tmp_path / "out", "peft", base=base)
    else:
        with pytest.raises(ValueError, match=r"holds whole tensors beside the updates \(words.weight"):
            lora_fast.convert_adapter(source, tmp_path / "out", "peft", base=base)


@pytest.mark.parametrize("component", ["text_encoder_2", None])
def test_t5_is_kohya_s_third_text_encoder(component: str | None, tmp_path: Path) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q"
    source = diffusers_file(tmp_path / "a.safetensors", name, component="text_encoder_2")
    lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "kohya", component=component)
    assert list(files.read_file(tmp_path / "out.safetensors").components) == ["lora_te3"]
    clip = diffusers_file(tmp_path / "b.safetensors", "text_model.encoder.layers.0.mlp.fc1", component="text_encoder_2")
    lora_fast.convert_adapter(clip, tmp_path / "clip.safetensors", "kohya")
    assert list(files.read_file(tmp_path / "clip.safetensors").components) == ["lora_te2"]


def test_a_file_of_diffusers_says_whose_names_it_has(tmp_path: Path) -> None:
    source = diffusers_file(tmp_path / "a.safetensors", "q", component="unet")
    done = lora_fast.convert_adapter(source, tmp_path / "out", "peft")
    assert done.notes[-1] == "the names are the file's, which the model in PEFT may call otherwise: --base"


def test_ranks_of_an_honest_file_are_filled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "MAX_MADE", 16)
    wide = {"b.q.lora_A.weight": torch.ones(2, 4), "b.q.lora_B.weight": torch.ones(4, 2)}
    source = adapter_folder(tmp_path / "a", lora("a.q") | wide, rank_pattern={"b.q": 2})
    lora_fast.convert_adapter(source, tmp_path / "out", "mlx")
    assert load_file(tmp_path / "out" / "adapters.safetensors")["a.q.lora_a"].shape == (4, 2)


def test_peft_s_own_numbers_stay_together(tmp_path: Path) -> None:
    """An alpha that would be a round number of rsLoRA's, in a file that does not speak of that."""
    update = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(4, 2)}
    source = adapter_folder(tmp_path / "a", update, r=2, lora_alpha=3 * 2**0.5, target_modules=["q"])
    lora_fast.convert_adapter(source, tmp_path / "out", "peft")
    one, other = (files.read_file(folder).component(None).layers["q"].scaling for folder in (source, tmp_path / "out"))
    assert one == other == 3 * 2**0.5 / 2


@pytest.mark.parametrize("as_difference", [True, False])
def test_q_k_and_v_of_a_multihead_attention_have_no_name(as_difference: bool, tmp_path: Path) -> None:
    names = [f"text_model.encoder.layers.0.self_attn.{part}_proj" for part in "qkv"]
    updates = {name: make_update(8, 8, seed=index) for index, name in enumerate(names)}
    weight = torch.cat([update.weight for update in updates.values()])
    save_file({"transformer.resblocks.0.attn.in_proj_weight": weight}, tmp_path / "base.safetensors")
    source = kohya_file(tmp_path / "a.safetensors", updates, prefix="lora_te_")
    with pytest.raises(ValueError, match="has q, k and v in the in_proj_weight of a torch.nn.MultiheadAttention"):
        lora_fast.convert_adapter(
            source,
            tmp_path / "out.safetensors",
            "kohya",
            base=tmp_path / "base.safetensors",
            component="lora_te2",
            as_difference=as_difference,
        )
