"""The files of diffusers, ai-toolkit, OneTrainer, torchtune, MLX-LM and litgpt; other methods, refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
pytest.importorskip("yaml", reason="the adapters extra is not installed")
import torch
from file_helpers import SAMPLES, Update, assert_close, base_file, make_update, merged_file, read
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fast
from lora_fast.adapters import files
from lora_fast.merge_checkpoint import merge_checkpoint


def merged_folder(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    merge_checkpoint(base, adapter, out, **options)
    return {key: tensor for path in out.glob("*.safetensors") for key, tensor in load_file(path).items()}


def in_float64(folder: Path, to: Path) -> Path:
    """A copy of a checkpoint's folder."""
    shutil.copytree(folder, to)
    for path in to.glob("*.safetensors"):
        save_file({key: tensor.double() for key, tensor in load_file(path).items()}, path)
    return to


def assert_merged(merged: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert merged.keys() == expected.keys()
    for key, tensor in merged.items():
        assert_close(tensor, expected[key], tolerance)


def test_torchtune_s_own_merged_weights_in_transformers_names(tmp_path: Path) -> None:
    sample = SAMPLES / "torchtune"
    base = in_float64(sample / "base", tmp_path / "base")
    adapter = sample / "epoch_0" / "adapter_model.pt"
    assert_merged(merged_folder(base, adapter, tmp_path / "out"), load_file(sample / "merged.safetensors"))


def test_torchtune_s_folder_for_peft_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = SAMPLES / "torchtune" / "epoch_0"
    with pytest.raises(ValueError, match=r"use_dora is not set .*torchtune.*adapter_model\.pt is right"):
        merge_checkpoint(SAMPLES / "torchtune" / "base", folder, tmp_path / "out")


def test_a_folder_of_torchtune_with_its_own_file_alone_says_what_to_name(tmp_path: Path) -> None:
    for name in ("adapter_model.pt", "adapter_config.json"):
        shutil.copyfile(SAMPLES / "torchtune" / "epoch_0" / name, tmp_path / name)
    with pytest.raises(ValueError, match=r"is missing; adapter_model\.pt beside it is torchtune's: give that file"):
        read(tmp_path)


def test_torchtune_s_rows_are_reordered_for_the_models_that_it_reorders(tmp_path: Path) -> None:
    sample = SAMPLES / "torchtune"
    base = in_float64(sample / "base", tmp_path / "base")
    adapter = sample / "epoch_0" / "adapter_model.pt"
    config = json.loads((base / "config.json").read_text())
    before = merged_folder(base, adapter, tmp_path / "llama")
    (base / "config.json").write_text(json.dumps(config | {"model_type": "qwen2", "architectures": []}))
    after = merged_folder(base, adapter, tmp_path / "qwen2")
    differing = {key.split(".")[-2] for key in before if not torch.equal(before[key], after[key])}
    assert differing == {"q_proj", "k_proj"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    with pytest.raises(ValueError, match="model_type 'phi3'; the order of torchtune's rows is known for llama"):
        merged_folder(base, adapter, tmp_path / "phi3")
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors") | {"model.layers.0.mlp.up_proj.bias": torch.ones(24)}
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match="up_proj has a bias .*which torchtune's DoRA scales"):
        merged_folder(base, adapter, tmp_path / "bias")


@pytest.mark.parametrize("names", ["transformers", "litgpt"])
def test_litgpt_s_own_merged_weights(names: str, tmp_path: Path) -> None:
    sample = SAMPLES / "litgpt"
    if names == "transformers":
        base = in_float64(sample / "base", tmp_path / "base")
        merged = merged_folder(base, sample, tmp_path / "out")
        assert_merged(merged, load_file(sample / "merged" / "model.safetensors"))
    else:
        base = tmp_path / "base.safetensors"
        save_file({key: tensor.double() for key, tensor in load_file(sample / "base.safetensors").items()}, base)
        merged = merged_file(base, sample / "lit_model.pth.lora", tmp_path / "out.safetensors")
        assert_merged(merged, load_file(sample / "merged.safetensors"))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 32, bias=False)
        self.proj = nn.Linear(16, 16, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()


class Litgpt(nn.Module):
    """As much of litgpt's model as the test needs."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"h": nn.ModuleList([Block()])})


def test_litgpt_s_qkv_becomes_one_layer(tmp_path: Path) -> None:
    sample = SAMPLES / "litgpt"
    base, merged = (load_file(sample / f"{name}.safetensors") for name in ("base", "merged"))
    prefix = "transformer.h.0.attn."
    model = Litgpt().double()
    model.load_state_dict({key: value for key, value in base.items() if key.startswith(prefix)})
    part = tmp_path / "part"
    shutil.copytree(sample, part)
    content = torch.load(part / "lit_model.pth.lora", weights_only=True)["model"]
    own = {key: value for key, value in content.items() if key.startswith(prefix)}
    torch.save({"model": own}, part / "lit_model.pth.lora")
    lora_fast.load_adapter(model, part)
    attention = model.transformer.h[0].attn
    assert attention.qkv.rank == 6  # of two parts, 3 each
    x = torch.randn(3, 16, dtype=torch.float64)
    assert_close(attention.qkv(x), x @ merged[f"{prefix}qkv.weight"].T)
    assert_close(attention.proj(x), x @ merged[f"{prefix}proj.weight"].T)


def mlx_folder(folder: Path, updates: dict[str, Update], scale: float, kind: str) -> Path:
    """As MLX-LM's trainer writes it: transposed factors, and the factor itself in the configuration."""
    folder.mkdir()
    tensors = {}
    for name, update in updates.items():
        tensors[f"{name}.lora_a"] = update.down.T.contiguous()
        tensors[f"{name}.lora_b"] = update.up.T.contiguous()
        if update.magnitude is not None:
            tensors[f"{name}.m"] = update.magnitude
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": 2, "dropout": 0.0, "scale": scale}
    config = {"fine_tune_type": kind, "num_layers": 16, "lora_parameters": parameters, "model": "toy"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_s_factor_and_its_norm_of_an_embedding(kind: str, tmp_path: Path) -> None:
    axis = "output" if kind == "dora" else None
    updates = {
        "model.layers.0.mlp.up_proj": make_update(10, 6, alpha=2 * 20.0, axis=axis),
        # ΔW [words, dim] = s · lora_a lora_b, with one norm for each word
        "model.embed_tokens": make_update(9, 6, alpha=2 * 20.0, axis=axis, seed=1),
    }
    base = tmp_path / "base"
    base.mkdir()
    base_file(base / "model.safetensors", updates)
    (base / "config.json").write_text('{"tie_word_embeddings": false}')
    embedding = updates["model.embed_tokens"]
    written = Update(embedding.weight, embedding.up.T, embedding.down.T, None, embedding.alpha, embedding.magnitude)
    adapter = mlx_folder(tmp_path / "adapter", updates | {"model.embed_tokens": written}, 20.0, kind)
    merged = merged_folder(base, adapter, tmp_path / "out")
    for name, update in updates.items():
        assert_close(merged[f"{name}.weight"], update.merged())
    layers = read(adapter).layers
    assert layers["model.embed_tokens"].is_embedding
    assert layers["model.embed_tokens"].scaling == 20.0


def single(path: Path, prefix: str, update: Update, words: str, **more: Tensor) -> Path:
    parts = {"lora_A.weight": update.down, "lora_B.weight": update.up}
    if words == "lora":
        parts = {"lora.down.weight": update.down, "lora.up.weight": update.up}
    save_file({f"{prefix}blocks.0.q.{part}": tensor for part, tensor in (parts | more).items()}, path)
    return path


def ai_toolkit(path: Path, update: Update) -> Path:
    assert update.magnitude is not None
    return single(path, "diffusion_model.", update, "lora_A", magnitude=update.magnitude)


def one_trainer_comfy(path: Path, update: Update) -> Path:
    parts = update.kohya()
    own = {"alpha": parts["alpha"], "dora_scale": parts["dora_scale"]}
    return single(path, "diffusion_model.", update, "lora_A", **own)


def one_trainer_diffusers(path: Path, update: Update) -> Path:
    """With the factor in lora_B, and the input axis under LyCORIS's name."""
    folded = Update(update.weight, update.down, update.up * update.scaling, None, None, update.magnitude, update.axis)
    return single(path, "transformer.", folded, "lora_A", dora_scale=folded.kohya()["dora_scale"])


def old_diffusers(path: Path, update: Update) -> Path:
    assert update.magnitude is not None
    return single(path, "unet.", update, "lora", lora_magnitude_vector=update.magnitude)


@pytest.mark.parametrize(
    ("write", "axis", "alpha"),
    [
        (ai_toolkit, "output", None),
        (one_trainer_comfy, "output", 3.0),
        (one_trainer_comfy, "input", 3.0),
        (one_trainer_diffusers, "input", 3.0),
        (old_diffusers, "output", None),
    ],
)
def test_one_file_of_other_tools(write: Any, axis: str, alpha: float | None, tmp_path: Path) -> None:
    update = make_update(10, 6, axis=axis, alpha=alpha)
    adapter = write(tmp_path / "adapter.safetensors", update)
    base = base_file(tmp_path / "base.safetensors", {"blocks.0.q": update})
    assert_close(merged_file(base, adapter, tmp_path / "out.safetensors")["blocks.0.q.weight"], update.merged(), 1e-12)
    if alpha is None:
        assert any(
            "has no alpha: its updates are taken with the factor 1" in note for note in files.read_file(adapter).notes
        )


def diffusers_file(path: Path, update: Update, config: dict[str, Any], prefix: str = "unet.") -> Path:
    parts = {"lora_A.weight": update.down, "lora_B.weight": update.up}
    if update.magnitude is not None:
        parts["lora_magnitude_vector"] = update.magnitude
    tensors = {f"{prefix}blocks.0.q.{part}": tensor for part, tensor in parts.items()}
    header = {f"{prefix}{key}": value for key, value in config.items()}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    return path


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_diffusers_header_has_alpha_patterns_and_rslora(prefix: str, tmp_path: Path) -> None:
    path, update = tmp_path / "a.safetensors", make_update(10, 6)

    def scaling(**config: Any) -> float:
        return (
            read(diffusers_file(path, update, {"r": 2, "lora_alpha": 6, **config}, prefix)).layers["blocks.0.q"].scaling
        )

    assert scaling() == 3.0
    assert scaling(use_rslora=True) == 6 / 2**0.5
    assert scaling(alpha_pattern={"blocks.0.q": 5}) == 2.5
    assert scaling(rank_pattern={"q": 2}, r=4) == 3.0
    with pytest.raises(ValueError, match=r"rank of blocks\.0\.q is 4, but its lora_A"):
        scaling(r=4)
    with pytest.raises(ValueError, match=r"has no magnitude, but use_dora is True in the header"):
        scaling(use_dora=True)
    with pytest.raises(ValueError, match="init_lora_weights is 'pissa'"):
        scaling(init_lora_weights="pissa")


OTHERS = {
    "LoHa": ["hada_w1_a", "hada_w2_b"],
    "LoKr": ["lokr_w1", "lokr_w2_a"],
    "GLoRA": ["a1.weight", "b2.weight"],
    "IA3": ["on_input"],
    "OFT or BOFT": ["oft_blocks"],
    "OFTv2": ["oft_R.weight"],
    "T-LoRA": ["lambda_layer", "q_layer.weight"],
    "set_weight": ["set_weight"],
    "reshape_weight": ["reshape_weight"],
    "a bias of its own": ["lora_B.bias"],
    "a sparse bias": ["bias_values"],
    "a raw split of q, k and v": ["lora_up.2.weight"],
    "XLabs' attention processors": ["processor.qkv_lora1.down.weight"],
    "diffusers' attention processors": ["processor.to_q_lora.up.weight"],
    "a Control-LoRA": ["lora_controlnet"],
    "embeddings of new words": ["bundle_emb.new.clip_l"],
    "a raw state dict of PEFT": ["lora_A.default.weight"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_are_refused_by_name(name: str, tmp_path: Path) -> None:
    update = make_update(10, 6)
    tensors = {f"lora_unet_a.{part}": tensor for part, tensor in update.kohya().items()}
    tensors |= {f"lora_unet_b.{part}": torch.ones(2) for part in OTHERS[name]}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=name):
        read(tmp_path / "a.safetensors")
    found = lora_fast.inspect_adapter(tmp_path / "a.safetensors")
    assert any(name in fault for fault in found["faults"])
    assert found["unknown"] == [f"lora_unet_b.{part}" for part in OTHERS[name]]


def test_mlx_s_weights_of_a_step(tmp_path: Path) -> None:
    tensors = {"a.lora_a": torch.ones(4, 2), "a.lora_b": torch.ones(2, 6)}
    path = tmp_path / "0000100_adapters.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match="is MLX-LM's by its name, which needs its adapter_config.json beside it"):
        read(path)
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 3.0, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert read(path).layers["a"].scaling == 3.0


def test_a_model_with_several_parts_takes_the_one_that_is_named(tmp_path: Path) -> None:
    unet, text = make_update(10, 6, seed=1), make_update(6, 6, seed=2)
    tensors = {f"lora_unet_0.{part}": tensor for part, tensor in unet.kohya().items()}
    tensors |= {f"lora_te1_0.{part}": tensor for part, tensor in text.kohya().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    model = nn.Sequential(nn.Linear(6, 10, bias=False)).double()
    with pytest.raises(ValueError, match="several models, 'lora_te1', 'lora_unet': say which with component="):
        lora_fast.load_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="component: got 'text_encoder_2', .* has 'lora_te1', 'lora_unet'"):
        lora_fast.load_adapter(model, tmp_path / "a.safetensors", component="text_encoder_2")
    x = torch.randn(2, 6, dtype=torch.float64)
    for name in ("lora_unet", "unet"):  # as in the file, or as in diffusers
        model = nn.Sequential(nn.Linear(6, 10, bias=False)).double()
        model[0].weight.data = unet.weight
        lora_fast.load_adapter(model, tmp_path / "a.safetensors", component=name)
        assert_close(model(x), x @ unet.merged().T)


def test_layers_that_a_model_has_no_layer_for_are_named(tmp_path: Path) -> None:
    updates = {"0": make_update(6, 4), "1": make_update(6, 6, 3, 3, tucker=True), "2": make_update(6, 6, 1, 1)}
    from file_helpers import kohya_file

    path = kohya_file(tmp_path / "a.safetensors", updates)
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 1)).double()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 is a Conv2d, 2 is a Conv2d.*torch\.nn\.Linear.*lora-fast merge"):
        lora_fast.load_adapter(model, path)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()


def test_differences_are_not_loaded_but_named(tmp_path: Path) -> None:
    save_file({"lora_unet_0.diff": torch.ones(6, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"differences .*\(0\.weight\).*lora-fast merge"):
        lora_fast.load_adapter(nn.Sequential(nn.Linear(4, 6)), tmp_path / "a.safetensors")
