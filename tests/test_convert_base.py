"""lora-fast convert --base: every update and difference has to fit the base, and nothing is lost on the way."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import torch
from file_helpers import LYCORIS, assert_close, base_file, kohya_file, make_update, merged_file
from safetensors.torch import load_file, save_file
from torch import nn
from toy_folders import adapter_folder, base_folder, embedding_lora, lora, small_llama

import lora_fast
from lora_fast.merge_checkpoint import merge_checkpoint


def out_of(folder: Path, to: str) -> Path:
    return folder / ("out" if to in ("peft", "mlx") else "out.safetensors")


@pytest.mark.parametrize("to", ["peft", "mlx", "kohya", "diffusers"])
def test_a_linear_s_update_of_the_other_sizes_is_refused(to: str, tmp_path: Path) -> None:
    save_file({"a.b.weight": torch.ones(6, 4), "a.b.bias": torch.ones(6)}, tmp_path / "base.safetensors")
    source = kohya_file(tmp_path / "a.safetensors", {"a.b": make_update(4, 6)})
    with pytest.raises(ValueError, match=r"an update \[N, K\] = \[4, 6\] for a.b, which has \[6, 4\]"):
        lora_fast.convert_adapter(
            source, out_of(tmp_path, to), to, base=tmp_path / "base.safetensors", component="unet"
        )


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"x.a.diff": torch.ones(4, 4)}, "x.a.weight"),
        ({"lycoris_q_r.diff": torch.ones(2, 2)}, r"a difference of shape \[2, 2\] for q.r.weight, which has \[6, 4\]"),
        ({"lycoris_q_r.diff_b": torch.ones(6)}, "q.r.bias"),
        ({"lycoris_c.diff_b": torch.ones(2)}, r"a difference of shape \[2\] for c.bias, which has \[3\]"),
    ],
)
@pytest.mark.parametrize("as_difference", [True, False])
def test_differences_fit_the_base(
    as_difference: bool, added: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    base = {"q.r.weight": torch.ones(6, 4), "c.weight": torch.ones(3, 3), "c.bias": torch.ones(3)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(added, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        lora_fast.convert_adapter(
            tmp_path / "a.safetensors", tmp_path / "out.safetensors", "kohya", base=tmp_path / "base.safetensors",
            as_difference=as_difference,
        )  # fmt: skip
    assert not (tmp_path / "out.safetensors").exists()


def test_lora_beside_a_difference_of_the_bias_is_merged_and_converted(tmp_path: Path) -> None:
    """As the LoRAs that are extracted from video models have it."""
    update = make_update(6, 4, axis="output")
    parts = update.kohya() | {"diff_b": torch.randn(6, dtype=torch.float64)}
    save_file({f"diffusion_model.blocks.0.q.{key}": value for key, value in parts.items()}, tmp_path / "a.safetensors")
    weights = {"blocks.0.q.weight": update.weight, "blocks.0.q.bias": torch.randn(6, dtype=torch.float64)}
    save_file(weights, tmp_path / "base.safetensors")
    base, source, again = (tmp_path / f"{name}.safetensors" for name in ("base", "a", "again"))
    done = lora_fast.convert_adapter(source, again, "kohya", base=base)
    assert (done.layers, done.differences) == (1, 1)
    assert "lora_unet_blocks_0_q.diff_b" in load_file(again)
    for index, each in enumerate((source, again)):
        merged = merged_file(base, each, tmp_path / f"{index}.safetensors")
        assert_close(merged["blocks.0.q.weight"], update.merged())
        assert torch.equal(merged["blocks.0.q.bias"], weights["blocks.0.q.bias"] + parts["diff_b"])
    for to in ("peft", "mlx"):
        with pytest.raises(ValueError, match=r"differences .*blocks\.0\.q\.bias.* merge it"):
            lora_fast.convert_adapter(source, tmp_path / to, to, base=base)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(4, 6)})])
    with pytest.raises(ValueError, match="differences .* which no adapted layer has; merge it"):
        lora_fast.load_adapter(model, source)


@pytest.mark.parametrize("square", [True, False])
def test_an_eps_is_not_folded_over_a_conv1d(square: bool, tmp_path: Path) -> None:
    N, K = (4, 4) if square else (6, 4)
    tensors = {
        "c.lora_A.weight": torch.ones(1, K), "c.lora_B.weight": torch.ones(N, 1),
        "c.lora_magnitude_vector": torch.ones(N),
    }  # fmt: skip
    source = adapter_folder(tmp_path / "peft", tensors, use_dora=True, fan_in_fan_out=True)
    base = base_folder(tmp_path / "base", {"c.weight": torch.ones(K, N), "c.bias": torch.ones(N)})
    lora_fast.convert_adapter(source, tmp_path / "without", "peft", base=base)
    with pytest.raises(ValueError, match=r"c is transformers' Conv1D, .*: an eps .* leave it out \(--norm-eps 0\)"):
        lora_fast.convert_adapter(source, tmp_path / "out", "peft", base=base, norm_eps=0.1)


@pytest.mark.parametrize("eps", [0.0, 0.25])
def test_an_eps_that_the_user_names_is_that_of_every_magnitude(eps: float, tmp_path: Path) -> None:
    update = make_update(6, 4, axis="output")
    parts = {"lora_A.weight": update.down, "lora_B.weight": update.up, "magnitude": update.magnitude}
    update.alpha = None
    save_file({f"transformer.a.{key}": value for key, value in parts.items()}, tmp_path / "a.safetensors")
    base = base_file(tmp_path / "base.safetensors", {"a": update})
    merged = merged_file(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors", norm_eps=eps)
    assert_close(merged["a.weight"], update.merged(eps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mlx_s_factors_have_the_dtype_that_is_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    updates = {
        "model.layers.0.mlp.up_proj": make_update(6, 4, alpha=3.0, dtype=torch.float32),
        "model.layers.0.mlp.down_proj": make_update(4, 6, alpha=5.0, dtype=torch.float32),
    }
    base = base_file(tmp_path / "base.safetensors", updates)
    source = kohya_file(tmp_path / "a.safetensors", updates)
    done = lora_fast.convert_adapter(source, tmp_path / "mlx", "mlx", base=base, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "mlx" / "adapters.safetensors").values()} == {dtype}
    assert done.notes == [
        "2 different scalings are multiplied into lora_b, rounded once, and scale is 1",
        f"lora_A and lora_B are {str(dtype)[6:]}, as asked for",
    ]


def test_what_is_asked_for_is_said_only_of_what_there_is(tmp_path: Path) -> None:
    save_file({"lycoris_a.diff": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    done = lora_fast.convert_adapter(
        tmp_path / "a.safetensors", tmp_path / "out.safetensors", "kohya", dtype=torch.bfloat16
    )
    assert done.notes == []
    with pytest.raises(ValueError, match="dtype: got torch.float8_e4m3fn, expected float64, float32, bfloat16 or"):
        lora_fast.convert_adapter(
            tmp_path / "a.safetensors", tmp_path / "out2.safetensors", "kohya", dtype=torch.float8_e4m3fn
        )


def test_a_conv1d_is_still_one_after_mlx(tmp_path: Path) -> None:
    source = adapter_folder(tmp_path / "peft", lora("h.0.c"), fan_in_fan_out=True)
    base = base_folder(tmp_path / "base", {"h.0.c.weight": torch.zeros(4, 4), "h.0.c.bias": torch.zeros(4)})
    merge_checkpoint(base, source, tmp_path / "expected")
    lora_fast.convert_adapter(source, tmp_path / "mlx", "mlx")
    lora_fast.convert_adapter(tmp_path / "mlx", tmp_path / "back", "peft")
    for name in ("mlx", "back"):
        merge_checkpoint(base, tmp_path / name, tmp_path / f"{name} merged")
        merged = load_file(tmp_path / f"{name} merged" / "model.safetensors")
        assert torch.equal(
            merged["h.0.c.weight"], load_file(tmp_path / "expected" / "model.safetensors")["h.0.c.weight"]
        )
    with pytest.raises(ValueError, match="adapts transformers' Conv1D, which the files of image models cannot mean"):
        lora_fast.convert_adapter(tmp_path / "mlx", tmp_path / "out.safetensors", "kohya")
    # of MLX-LM's own files nothing tells it, and nothing is invented
    save_file(load_file(tmp_path / "mlx" / "adapters.safetensors"), tmp_path / "mlx" / "adapters.safetensors")
    lora_fast.convert_adapter(tmp_path / "mlx", tmp_path / "open", "peft")
    assert "fan_in_fan_out" not in json.loads((tmp_path / "open" / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match="is square, and nothing tells how it is stored"):
        merge_checkpoint(base, tmp_path / "open", tmp_path / "refused")


def test_names_that_transformers_follows_are_in_the_base(tmp_path: Path) -> None:
    """The hub's GPT-2 has no ``transformer.`` before its names, which the model has that an adapter is trained on."""
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=4)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "model")
    weights = {key.removeprefix("transformer."): value for key, value in model.transformer.state_dict().items()}
    base = base_folder(tmp_path / "base", weights, **json.loads((tmp_path / "model" / "config.json").read_text()))
    name = "transformer.h.0.attn.c_attn"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 8), f"{name}.lora_B.weight": torch.ones(24, 1)}
    source = adapter_folder(tmp_path / "peft", tensors, fan_in_fan_out=True)
    merge_checkpoint(base, source, tmp_path / "expected")
    lora_fast.convert_adapter(source, tmp_path / "again", "peft", base=base)
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == {
        f"base_model.model.{key}" for key in tensors
    }
    merge_checkpoint(base, tmp_path / "again", tmp_path / "merged")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("expected", "merged"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (one["h.0.attn.c_attn.weight"] - weights["h.0.attn.c_attn.weight"]).abs().max() > 0.5


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    source = kohya_file(tmp_path / "a.safetensors", {"a": make_update(6, 4)}, LYCORIS)

    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="could not be written: I/O error: No space left on device"):
        lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "kohya")
    model = lora_fast.apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), 2, 3.0)
    with pytest.raises(OSError, match="could not be written: I/O error: No space left on device"):
        lora_fast.save_adapter(model, tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_embedding_s_update_of_the_other_sizes_is_refused(tmp_path: Path) -> None:
    """[dim, vocabulary] in the file, [vocabulary, dim] in the base: with dim words and vocabulary dimensions."""
    adapter = adapter_folder(tmp_path / "adapter", embedding_lora("model.embed", words=4))
    base = base_folder(tmp_path / "base", {"model.embed.weight": torch.ones(4, 9)}, tie_word_embeddings=False)
    other = base_folder(tmp_path / "other", {"model.embed.weight": torch.ones(9, 4)}, tie_word_embeddings=False)
    for each in (base, other):
        with pytest.raises(ValueError, match=r"has an update \[N, K\] = \[4, 4\] for model.embed, which has"):
            lora_fast.convert_adapter(adapter, tmp_path / "out", "peft", base=each)
    right = adapter_folder(tmp_path / "right", embedding_lora("model.embed", words=9))
    lora_fast.convert_adapter(right, tmp_path / "out", "peft", base=other)
    with pytest.raises(ValueError, match=r"has an update \[N, K\] = \[4, 9\] for model.embed, which has \[4, 9\]"):
        lora_fast.convert_adapter(right, tmp_path / "no", "peft", base=base)


def test_peft_s_update_of_a_convolution_is_none_of_a_linear(tmp_path: Path) -> None:
    """Other tools write 1 × 1 for linears; PEFT refuses it."""
    update = {"0.lora_A.weight": torch.ones(1, 4, 1, 1), "0.lora_B.weight": torch.ones(4, 1, 1, 1)}
    path = adapter_folder(tmp_path / "adapter", update)
    with pytest.raises(ValueError, match=r"0 has lora_A \[1, 4, 1, 1\] and lora_B \[4, 1, 1, 1\]"):
        lora_fast.load_adapter(nn.Sequential(nn.Linear(4, 4)), path)
    base = base_folder(tmp_path / "base", {"0.weight": torch.ones(4, 4)})
    with pytest.raises(ValueError, match=r"has lora_A \[1, 4, 1, 1\]"):
        merge_checkpoint(base, path, tmp_path / "out")


CLASSIFIER: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 40, "pad_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
@pytest.mark.parametrize("targets", [["query", "dense"], ["query", "classifier"], "all-linear"])
def test_a_head_that_is_the_base_s_is_not_asked_for_nor_adapted(targets: Any, task: str | None, tmp_path: Path) -> None:
    """PEFT leaves modules to save out of its targets, and has some by the task."""
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    torch.manual_seed(0)
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**CLASSIFIER)).eval()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, modules_to_save=["classifier"], target_modules=targets, task_type=task, use_dora=True
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "source")
    done = lora_fast.convert_adapter(tmp_path / "source", tmp_path / "out", "peft", base=tmp_path / "base")
    assert done.notes[0].startswith("left out, the same in")
    assert (
        done.notes[1:] == ["task_type is left out with them, as PEFT would ask for the head that belongs to it"]
    ) == (task is not None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")

    def layers(of: Any) -> set[str]:
        found = {name for name, module in of.named_modules() if hasattr(module, "lora_A")}
        return {name.partition("base_model.model.")[2] for name in found if "original_module" not in name}

    assert layers(again) == {name for name in layers(adapted) if "modules_to_save" not in name}
    x = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(again.eval()(input_ids=x).logits, adapted.eval()(input_ids=x).logits)


def test_names_of_a_model_around_the_base_s_stay(tmp_path: Path) -> None:
    small_llama(tmp_path / "base")
    source = adapter_folder(tmp_path / "a", lora("net.model.layers.0.self_attn.q_proj"))
    lora_fast.convert_adapter(source, tmp_path / "out", "peft", base=tmp_path / "base")
    name = "base_model.model.net.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert name in load_file(tmp_path / "out" / "adapter_model.safetensors")
