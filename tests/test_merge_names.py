"""Which tensor an adapter's name means, and which way round a layer's weight is stored: known, or asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
from toy_folders import MERGED, A, B, W, lora, merge

import lora_fast
from lora_fast import cli

TRANSPOSED = W + (B @ A).T


@pytest.mark.parametrize("first", ["text", "vision"])
def test_a_name_that_fits_two_towers_is_refused(first: str, tmp_path: Path) -> None:
    base = {f"{first}.enc.weight": W.clone(), "other.enc.weight": W.clone()}
    with pytest.raises(ValueError, match=rf"enc.weight of the adapter could be .*{first}.enc.weight"):
        merge(tmp_path, lora("enc"), base)


def test_a_prefix_taken_away_and_one_added_are_two_places(tmp_path: Path) -> None:
    base = {"enc.q.weight": W.clone(), "model.text.enc.q.weight": W.clone()}
    with pytest.raises(ValueError, match="could be"):
        merge(tmp_path, lora("text.enc.q"), base)


def test_towers_at_different_depths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could be text.model.enc.q.weight, vision.enc.q.weight"):
        merge(tmp_path, lora("enc.q"), {"vision.enc.q.weight": W.clone(), "text.model.enc.q.weight": W.clone()})


def test_a_prefix_of_several_parts(tmp_path: Path) -> None:
    tensors, _ = merge(
        tmp_path, lora("enc.q"), {"text.model.enc.q.weight": W.clone(), "text.model.q.weight": W.clone()}
    )
    assert torch.equal(tensors["text.model.enc.q.weight"], MERGED)


def test_the_checkpoint_s_own_name_is_no_guess(tmp_path: Path) -> None:
    tensors, _ = merge(tmp_path, lora("enc"), {"enc.weight": W.clone(), "text.enc.weight": W.clone()})
    assert torch.equal(tensors["enc.weight"], MERGED)
    assert torch.equal(tensors["text.enc.weight"], W)


def test_one_prefix_that_fits_all_names(tmp_path: Path) -> None:
    tensors, _ = merge(tmp_path, lora("a") | lora("b"), {f"model.{name}.weight": W.clone() for name in "abc"})
    assert torch.equal(tensors["model.b.weight"], MERGED)
    assert torch.equal(tensors["model.c.weight"], W)


LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {
        "model_type": "llama", "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 1, "vocab_size": 9,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 4, "patch_size": 4,
    },
}  # fmt: skip
OLD = ["language_model.model.layers.0.self_attn.q_proj", "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"]
NEW = ["model.language_model.layers.0.self_attn.q_proj", "model.vision_tower.encoder.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("stored", [OLD, NEW], ids=["old checkpoint", "new checkpoint"])
@pytest.mark.parametrize("trained", [OLD, NEW], ids=["old adapter", "new adapter"])
def test_the_renamings_of_transformers_are_followed(stored: list[str], trained: list[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    tensors, _ = merge(tmp_path, lora(trained[0]), {f"{name}.weight": W.clone() for name in stored}, {}, LLAVA)
    assert torch.equal(tensors[f"{stored[0]}.weight"], MERGED)
    assert torch.equal(tensors[f"{stored[1]}.weight"], W)


@pytest.mark.parametrize("trained", [OLD, NEW], ids=["old adapter", "new adapter"])
def test_the_renamings_of_transformers_are_followed_into_a_model(trained: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from toy_folders import adapter_folder

    config = transformers.LlavaConfig(**{key: LLAVA[key] for key in ("text_config", "vision_config")})
    model = transformers.LlavaForConditionalGeneration(config)
    lora_fast.load_adapter(model, adapter_folder(tmp_path / "adapter", lora(trained[0])))
    assert torch.equal(model.get_submodule(NEW[0]).lora_B, B)
    assert type(model.get_submodule(NEW[1])) is nn.Linear


@pytest.mark.parametrize("noted", [True, False])
def test_every_layer_is_turned_as_its_shape_says(noted: bool, tmp_path: Path) -> None:
    up = torch.arange(8.0).reshape(1, 8).T
    adapter: dict[str, Tensor] = {}
    for name in ("linear", "conv1d"):
        adapter |= {f"{name}.lora_A.weight": A.clone(), f"{name}.lora_B.weight": up.clone()}
    base = {"linear.weight": torch.zeros(8, 4), "conv1d.weight": torch.zeros(4, 8), "conv1d.bias": torch.zeros(8)}
    tensors, _ = merge(tmp_path, adapter, base, {"fan_in_fan_out": noted})
    assert torch.equal(tensors["linear.weight"], up @ A)
    assert torch.equal(tensors["conv1d.weight"], (up @ A).T)


def test_a_linear_of_the_other_sizes_is_refused(tmp_path: Path) -> None:
    """A Conv1D has a bias, or PEFT noted it; and transformers knows what is none."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    adapter = {"layer.lora_A.weight": torch.ones(1, 4), "layer.lora_B.weight": torch.ones(8, 1)}
    with pytest.raises(
        ValueError, match=r"has lora_A \[1, 4\] and lora_B \[8, 1\] for layer.weight, which has \[4, 8\]"
    ):
        merge(tmp_path, adapter, {"layer.weight": torch.zeros(4, 8)}, {"fan_in_fan_out": False})
    name = "model.layers.0.mlp.up_proj"
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 9, "mlp_bias": True,
    }  # fmt: skip
    base = {f"{name}.weight": torch.zeros(8, 4), f"{name}.bias": torch.zeros(8)}
    turned = {f"{name}.lora_A.weight": torch.ones(1, 8), f"{name}.lora_B.weight": torch.ones(4, 1)}
    with pytest.raises(ValueError, match=r"up_proj.weight, which has \[8, 4\]"):
        merge(tmp_path / "known", turned, base, {"fan_in_fan_out": False}, config)


SQUARES = {
    "lin.weight": W.clone(),
    "lin.bias": torch.zeros(4),
    "c_attn.weight": W.clone(),
    "c_attn.bias": torch.zeros(4),
}


@pytest.mark.parametrize("noted", [True, False])
def test_square_layers_of_which_nothing_tells_are_refused(noted: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is square.* --fan-in-fan-out all, none, or NAME,NAME"):
        merge(tmp_path, lora("lin") | lora("c_attn"), SQUARES, {"fan_in_fan_out": noted})


@pytest.mark.parametrize(
    ("word", "transposed"), [(True, {"lin", "c_attn"}), (False, set()), (["c_attn"], {"c_attn"}), (["lin"], {"lin"})]
)
def test_the_user_s_word_decides_for_square_layers(word: Any, transposed: set[str], tmp_path: Path) -> None:
    adapter = lora("lin") | lora("c_attn")
    tensors, _ = merge(tmp_path, adapter, SQUARES, {"fan_in_fan_out": True}, fan_in_fan_out=word)
    for name in ("lin", "c_attn"):
        assert torch.equal(tensors[f"{name}.weight"], TRANSPOSED if name in transposed else MERGED)


def test_the_command_takes_the_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file
    from toy_folders import adapter_folder, base_folder

    pytest.importorskip("rich", reason="the adapters extra is not installed")
    adapter_folder(tmp_path / "adapter", lora("lin") | lora("c_attn"), fan_in_fan_out=True)
    base_folder(tmp_path / "base", SQUARES)
    command = ["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]
    assert cli.main(command) == 2
    assert cli.main([*command, "--fan-in-fan-out", "nowhere"]) == 2
    assert "'nowhere' is no layer" in capsys.readouterr().err
    assert cli.main([*command, "--fan-in-fan-out", "c_attn"]) == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["c_attn.weight"], TRANSPOSED)


def test_a_word_that_names_no_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fan_in_fan_out: 'attn' is no layer"):
        merge(tmp_path, lora("lin") | lora("c_attn"), SQUARES, fan_in_fan_out=["attn"])


def test_a_square_layer_without_bias_is_a_linear(tmp_path: Path) -> None:
    tensors, _ = merge(tmp_path, lora("q") | lora("v"), {"q.weight": W.clone(), "v.weight": W.clone()})
    assert torch.equal(tensors["q.weight"], MERGED)


@pytest.mark.parametrize("noted", [True, False])
def test_the_only_layer_is_what_peft_noted(noted: bool, tmp_path: Path) -> None:
    base = {"q.weight": W.clone(), "q.bias": torch.zeros(4)}
    tensors, _ = merge(tmp_path, lora("q"), base, {"fan_in_fan_out": noted})
    assert torch.equal(tensors["q.weight"], TRANSPOSED if noted else MERGED)


def test_layers_saved_here_are_linears(tmp_path: Path) -> None:
    """Square, with biases, and several of them: what would be asked for in a file of PEFT's."""
    from safetensors.torch import load_file, save_file

    from lora_fast.merge_checkpoint import merge_checkpoint

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    lora_fast.apply(model, 1, 1.0, dora=False)
    nn.init.normal_(model[0].lora_B)
    lora_fast.save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["0.weight"]
    torch.testing.assert_close(merged, model[0].merged().weight)


def test_transformers_knows_its_square_layers(tmp_path: Path) -> None:
    """GPT-2's attn.c_proj is a square Conv1D, lm_head, made last, a Linear, so that PEFT notes False."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    gpt2 = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 4, "n_layer": 1, "n_head": 1,
        "vocab_size": 9, "n_positions": 4,
    }  # fmt: skip
    names = ["h.0.attn.c_proj", "h.0.mlp.c_fc"]  # as published, without the head's prefix
    base = {
        f"{names[0]}.weight": W.clone(),
        f"{names[0]}.bias": torch.zeros(4),
        f"{names[1]}.weight": torch.zeros(4, 16),
    }
    adapter = lora(f"transformer.{names[0]}")
    adapter |= {
        f"transformer.{names[1]}.lora_A.weight": A.clone(),
        f"transformer.{names[1]}.lora_B.weight": torch.ones(16, 1),
    }
    tensors, _ = merge(tmp_path, adapter, base, {"fan_in_fan_out": False}, gpt2)
    assert torch.equal(tensors[f"{names[0]}.weight"], TRANSPOSED)
    assert torch.equal(tensors[f"{names[1]}.weight"], torch.ones(4, 16))


def test_a_magnitude_across_the_inputs_of_a_square_layer_is_refused(tmp_path: Path) -> None:
    adapter = lora("q") | {"q.lora_magnitude_vector": torch.ones(1, 4)}
    with pytest.raises(ValueError, match=r"magnitude of shape \[1, 4\], expected \[N\] = \[4\] or \[4, 1\]"):
        merge(tmp_path, adapter, {"q.weight": W.clone()}, {"use_dora": True})


def test_kernels_that_a_configuration_names_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would download and run them; and where it cannot, the model would count as unknown."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    asked: list[Any] = []
    monkeypatch.setattr(
        transformers.modeling_utils,
        "load_and_register_attn_kernel",
        lambda *args, **_: asked.append(args),
        raising=False,
    )
    for part in (LLAVA, LLAVA["text_config"]):
        monkeypatch.setitem(part, "attn_implementation", "somebody/kernel")
        monkeypatch.setitem(part, "_attn_implementation", "flash_attention_2")
    tensors, _ = merge(tmp_path, lora(NEW[0]), {f"{name}.weight": W.clone() for name in OLD}, {}, LLAVA)
    assert torch.equal(tensors[f"{OLD[0]}.weight"], MERGED)
    assert asked == []
