"""Which of a file's models is converted and what it is called; parts that do not fit; what a conversion leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import torch
from file_helpers import LYCORIS, Update, assert_close, base_file, kohya_file, make_update, merged_file, read
from safetensors.torch import load_file, save_file

import lora_fast
from lora_fast.adapters import files
from lora_fast.merge_checkpoint import merge_checkpoint

UNET = {"down_blocks.0.attentions.0.proj_in": (8, 8)}
TEXT = {"text_model.encoder.layers.0.mlp.fc1": (10, 6)}


def updates(shapes: dict[str, tuple[int, ...]]) -> dict[str, Update]:
    return {name: make_update(*shape, dtype=torch.float32) for name, shape in shapes.items()}


def stable_diffusion(folder: Path) -> tuple[Path, Path]:
    """A pipeline, and a file of kohya's for its two models."""
    base, tensors = folder / "base", {}
    for name, shapes, prefix in (("unet", UNET, "lora_unet_"), ("text_encoder", TEXT, "lora_te_")):
        (base / name).mkdir(parents=True)
        own = updates(shapes)
        save_file({f"{key}.weight": each.weight for key, each in own.items()}, base / name / "model.safetensors")
        for key, each in own.items():
            tensors |= {f"{prefix}{key.replace('.', '_')}.{part}": value for part, value in each.kohya().items()}
    (base / "model_index.json").write_text("{}")
    save_file(tensors, folder / "a.safetensors")
    return base, folder / "a.safetensors"


@pytest.mark.parametrize(
    ("to", "key"), [("diffusers", "unet."), ("peft", "base_model.model."), ("kohya", "lora_unet_")]
)
@pytest.mark.parametrize("component", ["lora_unet", "unet"])
def test_one_of_several_models_is_named_as_in_the_file_or_as_it_will_be(
    component: str, to: str, key: str, tmp_path: Path
) -> None:
    base, source = stable_diffusion(tmp_path)
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    assert lora_fast.convert_adapter(source, out, to, base=base, component=component).layers == 1
    file = out / "adapter_model.safetensors" if to == "peft" else out
    assert all(name.startswith(key) for name in load_file(file))


def test_all_of_several_models(tmp_path: Path) -> None:
    base, source = stable_diffusion(tmp_path)
    lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "diffusers", base=base)
    assert list(files.read_file(tmp_path / "out.safetensors").components) == ["text_encoder", "unet"]
    with pytest.raises(ValueError, match=r"is for one model, and the file has .*: say which, --component"):
        lora_fast.convert_adapter(source, tmp_path / "peft", "peft", base=base)
    with pytest.raises(ValueError, match=r"component: got 'transformer_2', expected one of"):
        lora_fast.convert_adapter(source, tmp_path / "x.safetensors", "kohya", component="transformer_2")
    with pytest.raises(ValueError, match=r"component: got 'prior', .* has 'lora_te', 'lora_unet': say which of these"):
        lora_fast.convert_adapter(source, tmp_path / "x.safetensors", "kohya", component="prior")


def test_diffusers_file_or_its_folder(tmp_path: Path) -> None:
    base, source = stable_diffusion(tmp_path)
    for out in (tmp_path / "out.safetensors", tmp_path / "out"):
        lora_fast.convert_adapter(source, out, "diffusers", base=base)
    inside = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [inside.name]
    one, other = load_file(inside), load_file(tmp_path / "out.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert list(files.read_file(tmp_path / "out").components) == ["text_encoder", "unet"]


def test_a_base_that_is_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, source = stable_diffusion(tmp_path)
    alone = tmp_path / "alone.safetensors"
    lora_fast.convert_adapter(source, alone, "diffusers", base=base, component="unet")
    monkeypatch.chdir(base / "unet")
    lora_fast.convert_adapter(alone, tmp_path / "out.safetensors", "kohya", base=".")
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "out.safetensors"))


def test_a_text_encoder_s_number_is_not_guessed(tmp_path: Path) -> None:
    base, source = stable_diffusion(tmp_path)
    alone = tmp_path / "alone.safetensors"
    lora_fast.convert_adapter(source, alone, "diffusers", base=base, component="lora_te")
    with pytest.raises(ValueError, match="lora_te where the model has one, lora_te1 where it has several; say which"):
        lora_fast.convert_adapter(alone, tmp_path / "out.safetensors", "kohya", base=base / "text_encoder")
    lora_fast.convert_adapter(alone, tmp_path / "out.safetensors", "kohya", base=base)
    assert list(files.read_file(tmp_path / "out.safetensors").components) == ["lora_te"]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((6, 8), "for rows 0 to 8"), ((1, 8), "for rows 0 to 8"), ((8, 5), r"has an update \[N, K\] = \[24, 5\]")],
)
def test_parts_of_other_sizes_are_refused(shape: tuple[int, int], message: str, tmp_path: Path) -> None:
    names = [f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")]
    parts = {names[0]: make_update(*shape), **{name: make_update(8, shape[1]) for name in names[1:]}}
    source = kohya_file(tmp_path / "a.safetensors", parts, prefix="lora_transformer_")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(24, 8)}, tmp_path / "base.safetensors")
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=message):
        lora_fast.convert_adapter(source, out, "kohya", base=base)
    with pytest.raises(ValueError, match=r"has lora_A .* and lora_B"):
        merge_checkpoint(base, source, out)


def test_dropout_is_kept_where_the_file_can_have_it(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    tensors = {
        "base_model.model.a.lora_A.weight": torch.ones(1, 4),
        "base_model.model.a.lora_B.weight": torch.ones(6, 1),
    }
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "lora_dropout": 0.1}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    done = lora_fast.convert_adapter(tmp_path / "peft", tmp_path / "d.safetensors", "diffusers", component="unet")
    assert done.notes == []
    lora_fast.convert_adapter(tmp_path / "d.safetensors", tmp_path / "back", "peft")
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    done = lora_fast.convert_adapter(tmp_path / "peft", tmp_path / "k.safetensors", "kohya")
    assert done.notes == ["the dropout of 0.1 is left out, which kohya's files do not have"]


def test_mlx_s_embedding_and_head_in_one_tied_tensor(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    (tmp_path / "mlx").mkdir()
    tensors = {
        "model.embed_tokens.lora_a": torch.ones(9, 2), "model.embed_tokens.lora_b": torch.ones(2, 6),
        "lm_head.lora_a": torch.ones(6, 2), "lm_head.lora_b": torch.ones(2, 9),
    }  # fmt: skip
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"\.weight and .*\.weight are both the checkpoint's"):
        merge_checkpoint(tmp_path / "base", tmp_path / "mlx", tmp_path / "out")


@pytest.mark.parametrize(
    ("stored", "flags", "trained"),
    [
        (torch.float16, {"ss_full_fp16": "False", "ss_full_bf16": "True"}, torch.bfloat16),
        (torch.float32, {"ss_full_fp16": "True"}, torch.float16),
        (torch.bfloat16, {"ss_full_fp16": "False"}, torch.bfloat16),
        (torch.bfloat16, {"ss_full_bf16": "False"}, torch.float32),
    ],
)
def test_the_eps_is_that_of_training(
    stored: torch.dtype, flags: dict[str, str], trained: torch.dtype, tmp_path: Path
) -> None:
    source = kohya_file(
        tmp_path / "a.safetensors", {"a": make_update(6, 4, axis="output", dtype=stored)}, LYCORIS | flags
    )
    assert read(source).layers["a"].norm_eps == torch.finfo(trained).eps


def test_what_is_folded_or_narrowed_is_said(tmp_path: Path) -> None:
    update = make_update(6, 4, axis="output", dtype=torch.bfloat16)
    source = kohya_file(tmp_path / "a.safetensors", {"a": update}, LYCORIS)
    base = base_file(tmp_path / "base.safetensors", {"a": update})
    done = lora_fast.convert_adapter(source, tmp_path / "b.safetensors", "kohya", base=base, dtype=torch.float16)
    assert "0.00781 beside the norms is a part of the magnitudes now, each rounded once" in done.notes
    assert "lora_A and lora_B are float16, as asked for" in done.notes
    merged = merged_file(base, tmp_path / "b.safetensors", tmp_path / "merged.safetensors")["a.weight"]
    assert_close(merged, update.merged(2**-7), 1e-3)
    options: list[dict[str, Any]] = [
        {"dtype": torch.int8}, {"as_difference": True, "dtype": torch.float16},
        {"as_difference": True, "magnitude_dtype": torch.float16},
    ]  # fmt: skip
    for each in options:
        with pytest.raises(ValueError, match=r"dtype: got torch\.\w+, expected"):
            lora_fast.convert_adapter(source, tmp_path / "c.safetensors", "kohya", base=base, **each)


def test_folders_with_more_than_one_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        kohya_file(tmp_path / f"{name}.safetensors", {"a": make_update(6, 4)})
    with pytest.raises(ValueError, match=r"has 2 \*\.safetensors and no adapter_config\.json: name one of them"):
        read(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: is a pickle, .* torchtune's \.pt with its adapter_config"):
        read(tmp_path / "other.pt")


def test_nan_is_not_loaded(tmp_path: Path) -> None:
    update = make_update(6, 4)
    update.down[0, 0] = torch.nan
    model = torch.nn.Sequential(torch.nn.Linear(4, 6)).double()
    with pytest.raises(ValueError, match="lora_A of 0 has NaN or infinity"):
        lora_fast.load_adapter(model, kohya_file(tmp_path / "a.safetensors", {"0": update}))
    assert type(model[0]) is torch.nn.Linear
