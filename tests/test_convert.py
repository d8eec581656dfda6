"""lora-fast convert: round trips bit for bit, equal merged weights, PEFT's own merge, and refusals with a way out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import torch
from file_helpers import LYCORIS, SAMPLES, Update, assert_close, base_file, kohya_file, make_update, merged_file, read
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fast
from lora_fast import cli
from lora_fast.adapters.formats.peft import CONFIG_NAME, WEIGHTS_NAME
from lora_fast.merge_checkpoint import merge_checkpoint

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


class Net(nn.Module):
    """What an image model has: linears, square and not, and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 12, bias=False)])
        self.conv = nn.Conv2d(12, 6, 3, padding=1)
        self.conv_1x1 = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_out[0](torch.tanh(self.to_q(x)))
        return self.conv_1x1(torch.tanh(self.conv(x.transpose(1, 2).unflatten(2, (2, 2)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def base_of(folder: Path, model: nn.Module) -> Path:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def peft_adapter(folder: Path, dtype: torch.dtype = F64, **config: Any) -> Path:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["to_q", "0", "conv", "conv_1x1"], **config}
    model = peft.get_peft_model(net(), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=F64)
                scale = parameter.double() if "magnitude" in name else 0.5
                parameter.copy_(scale * (1 + 0.3 * noise) if "magnitude" in name else scale * noise)
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    merge_checkpoint(base, adapter, out, **options)
    return {
        f"{path.parent.name}/{key}": value
        for path in out.rglob("*.safetensors")
        for key, value in load_file(path).items()
    }


def assert_equal_files(one: Path, two: Path) -> None:
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype, key
        assert torch.equal(tensor, b[key]), key


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dora with rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"conv": 2, "to_q": 5}, "alpha_pattern": {"conv": 0.3, "to_q": 16}},
    "odd alpha": {"lora_alpha": 0.1},
}


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("through", ["kohya", "diffusers"])
def test_a_round_trip_is_bit_for_bit(through: str, variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = peft_adapter(tmp_path / "peft", dtype, **VARIANTS[variant])
    base = base_of(tmp_path / "base", net())
    between, back = tmp_path / "between.safetensors", tmp_path / "back"
    options: dict[str, Any] = {"base": base, "component": "unet"}
    done = lora_fast.convert_adapter(source, between, through, **options)
    assert (done.layers, done.notes) == (4, [])
    assert lora_fast.convert_adapter(between, back, "peft", base=base).notes == []
    assert_equal_files(source / WEIGHTS_NAME, back / WEIGHTS_NAME)
    before, after = read(source).layers, read(back).layers
    assert {name: layer.scaling for name, layer in before.items()} == {
        name: layer.scaling for name, layer in after.items()
    }
    results = [
        merged(base, path, tmp_path / f"out{i}", fan_in_fan_out=False) for i, path in enumerate((source, between, back))
    ]
    for other in results[1:]:
        for (_, one), two in zip(sorted(results[0].items()), (other[key] for key in sorted(other)), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_s_own_merge_of_a_converted_folder(variant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    dora = "output" if "dora" in variant else None
    shapes = {"to_q": (8, 8), "to_out.0": (12, 8), "conv": (6, 12, 3, 3), "conv_1x1": (6, 6, 1, 1)}
    model = net()
    updates = {}
    for index, (name, shape) in enumerate(shapes.items()):
        updates[name] = make_update(*shape, rank=2 + index % 2, alpha=3.0 + index, axis=dora, seed=index)
        updates[name].weight = model.get_submodule(name).weight.detach().clone()
    base = base_of(tmp_path / "base", model)
    source = kohya_file(tmp_path / "a.safetensors", updates)
    lora_fast.convert_adapter(source, tmp_path / "peft", "peft", base=base)
    adapted = peft.PeftModel.from_pretrained(net(), tmp_path / "peft").merge_and_unload()
    for name, update in updates.items():
        assert_close(adapted.get_submodule(name).weight, update.merged())


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_an_eps_becomes_a_part_of_the_magnitudes(dtype: torch.dtype, tmp_path: Path) -> None:
    updates = {
        "a.b": make_update(6, 4, axis="output", dtype=dtype),
        "c": make_update(5, 4, 3, 3, axis="output", dtype=dtype),
    }
    for update in updates.values():
        update.weight, update.magnitude = update.weight * 0.1, update.magnitude * 0.1
    base = base_file(tmp_path / "base.safetensors", updates)
    source = kohya_file(tmp_path / "a.safetensors", updates, LYCORIS)
    told = r"adds 0\.01 to each norm, which the target does not\. Give the base.*--norm-eps 0"
    with pytest.raises(ValueError, match=told):
        lora_fast.convert_adapter(source, tmp_path / "no.safetensors", "kohya", norm_eps=0.01)
    lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "diffusers", component="unet", base=base)
    result = merged_file(base, tmp_path / "out.safetensors", tmp_path / "merged.safetensors")
    for name, update in updates.items():
        assert_close(result[f"{name}.weight"], update.merged(torch.finfo(dtype).eps), 2e-7)  # magnitudes are float32
    # to kohya's words nothing is folded in: the file still says who wrote it
    lora_fast.convert_adapter(source, tmp_path / "kohya.safetensors", "kohya")
    content, own = load_file(source), load_file(tmp_path / "kohya.safetensors")
    assert all(torch.equal(own[key], tensor) for key, tensor in content.items())
    assert read(tmp_path / "kohya.safetensors").layers["c"].norm_eps == torch.finfo(dtype).eps


def test_what_input_norms_can_become(tmp_path: Path) -> None:
    updates = {"a.b": make_update(6, 4, axis="input"), "c": make_update(5, 4, 3, 3, axis="input", tucker=True)}
    base = base_file(tmp_path / "base.safetensors", updates)
    source = kohya_file(tmp_path / "a.safetensors", updates)
    for to, name in (("peft", "peft"), ("mlx", "mlx"), ("diffusers", "d.safetensors")):
        with pytest.raises(ValueError, match=r"one norm for each input.*[Mm]erge it"):
            lora_fast.convert_adapter(source, tmp_path / name, to, base=base, component="unet")
        assert not (tmp_path / name).exists()
    difference = tmp_path / "difference.safetensors"
    lora_fast.convert_adapter(source, difference, "kohya", base=base, as_difference=True)
    assert {key.rpartition(".")[2] for key in load_file(difference)} == {"diff"}
    result = merged_file(base, difference, tmp_path / "merged.safetensors")
    for name, update in updates.items():
        assert_close(result[f"{name}.weight"], update.merged())
    with pytest.raises(ValueError, match="as_difference: needs to='kohya' and the base"):
        lora_fast.convert_adapter(source, tmp_path / "x.safetensors", "kohya", as_difference=True)


def pipeline(folder: Path, updates: dict[str, Update]) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "transformer").mkdir()
    tensors = {f"{name}.weight": update.weight for name, update in updates.items()}
    save_file(tensors, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.mark.parametrize("axis", ["output", None])
@pytest.mark.parametrize("same_alpha", [True, False])
def test_q_k_and_v_are_fused_and_taken_apart(same_alpha: bool, axis: str | None, tmp_path: Path) -> None:
    names = [f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")]
    parts = {
        name: make_update(8, 8, axis=axis, alpha=3.0 if same_alpha else 3.0 + index, seed=index, dtype=F32)
        for index, name in enumerate(names)
    }
    apart = pipeline(tmp_path / "apart", parts)
    weight = torch.cat([update.weight for update in parts.values()])
    save_file({"double_blocks.0.img_attn.qkv.weight": weight}, tmp_path / "whole.safetensors")
    whole = tmp_path / "whole.safetensors"
    source = kohya_file(tmp_path / "a.safetensors", parts, prefix="lora_transformer_")
    fused, back = tmp_path / "fused.safetensors", tmp_path / "back.safetensors"
    lora_fast.convert_adapter(source, fused, "kohya", base=whole)
    content = load_file(fused)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert content[f"{name}.lora_down.weight"].shape == (6, 8)
    up = content[f"{name}.lora_up.weight"]
    assert torch.count_nonzero(up) == 3 * 8 * 2  # a block diagonal
    assert content[f"{name}.alpha"].item() == (9.0 if same_alpha else 6.0)  # of three times the rank; or s = 1
    expected = torch.cat([update.merged() for update in parts.values()])
    result = merged_file(whole, fused, tmp_path / "merged.safetensors")
    assert_close(result["double_blocks.0.img_attn.qkv.weight"], expected, 1e-12 if same_alpha else 1e-6)
    lora_fast.convert_adapter(fused, back, "diffusers", base=apart)
    if same_alpha:
        tensors = load_file(back)
        for part, update in parts.items():
            assert torch.equal(tensors[f"transformer.{part}.lora_A.weight"], update.down)
            assert torch.equal(tensors[f"transformer.{part}.lora_B.weight"], update.up)
            if update.magnitude is not None:
                assert torch.equal(tensors[f"transformer.{part}.lora_magnitude_vector"], update.magnitude)
        with safe_open(back, "pt") as file:
            header = json.loads(file.metadata()["lora_adapter_metadata"])
        assert header["transformer.lora_alpha"] == 3
        assert header["transformer.use_dora"] is (axis is not None)


@pytest.mark.parametrize("kind", ["torchtune", "litgpt"])
@pytest.mark.parametrize("to", ["peft", "kohya", "mlx"])
def test_a_decoder_s_adapter_in_other_words(to: str, kind: str, tmp_path: Path) -> None:
    sample = SAMPLES / kind
    source = sample / "epoch_0" / "adapter_model.pt" if kind == "torchtune" else sample
    base = tmp_path / "base"
    base.mkdir()
    tensors = load_file(sample / "base" / "model.safetensors")
    save_file({key: tensor.double() for key, tensor in tensors.items()}, base / "model.safetensors")
    if kind == "torchtune":
        (base / "config.json").write_bytes((sample / "base" / "config.json").read_bytes())
    out = tmp_path / ("out.safetensors" if to == "kohya" else "out")
    lora_fast.convert_adapter(source, out, to, base=base)
    expected = load_file(sample / ("merged.safetensors" if kind == "torchtune" else "merged/model.safetensors"))
    result = merged(base, out, tmp_path / "merged", fan_in_fan_out=False)
    for key, tensor in expected.items():
        assert_close(result[f"merged/{key}"], tensor)


def test_mlx_has_one_rank_and_one_scale(tmp_path: Path) -> None:
    updates = {
        "model.layers.0.self_attn.q_proj": make_update(8, 6, rank=2, alpha=3.0, dtype=F32),
        "model.layers.0.mlp.up_proj": make_update(10, 6, rank=4, alpha=10.0, dtype=F32),
        "lm_head": make_update(9, 6, rank=1, alpha=1.5, dtype=F32),
    }
    base = base_file(tmp_path / "base.safetensors", updates)
    source = kohya_file(tmp_path / "a.safetensors", updates)
    done = lora_fast.convert_adapter(source, tmp_path / "mlx", "mlx", base=base)
    assert done.notes == ["2 different scalings are multiplied into lora_b, rounded once, and scale is 1"]
    config = json.loads((tmp_path / "mlx" / CONFIG_NAME).read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == -1
    assert config["lora_parameters"] == {
        "rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["lm_head", "mlp.up_proj", "self_attn.q_proj"],
    }  # fmt: skip
    result = merged_file(base, tmp_path / "mlx", tmp_path / "merged.safetensors", fan_in_fan_out=False)
    for name, update in updates.items():
        assert_close(result[f"{name}.weight"], update.merged(), 1e-6)
    for update in updates.values():
        update.alpha = 2.0 * update.down.shape[0]
    source = kohya_file(tmp_path / "b.safetensors", updates)
    assert lora_fast.convert_adapter(source, tmp_path / "even", "mlx", base=base).notes == []
    assert json.loads((tmp_path / "even" / CONFIG_NAME).read_text())["lora_parameters"]["scale"] == 2.0
    result = merged_file(base, tmp_path / "even", tmp_path / "even.safetensors", fan_in_fan_out=False)
    for name, update in updates.items():
        assert_close(result[f"{name}.weight"], update.merged())


def test_magnitudes_keep_their_dtype_unless_asked(tmp_path: Path) -> None:
    updates = {"a": make_update(6, 4, axis="output", dtype=F32)}
    source = kohya_file(tmp_path / "a.safetensors", updates)

    def dtypes(**options: Any) -> set[tuple[str, torch.dtype]]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        lora_fast.convert_adapter(source, out, "kohya", **options)
        return {(key.partition(".")[2], tensor.dtype) for key, tensor in load_file(out).items()}

    factors = {"lora_down.weight", "lora_up.weight"}
    assert dtypes() == {*((part, F32) for part in factors), ("dora_scale", F32), ("alpha", F32)}
    assert dtypes(dtype=BF16) == {*((part, BF16) for part in factors), ("dora_scale", F32), ("alpha", F32)}
    assert dtypes(dtype=BF16, magnitude_dtype=BF16) == {
        *((part, BF16) for part in factors), ("dora_scale", BF16), ("alpha", F32),
    }  # fmt: skip


def test_refusals_name_the_way_out_and_write_nothing(tmp_path: Path) -> None:
    def refused(message: str, source: Path, to: str, **options: Any) -> None:
        out = tmp_path / ("out" if to in ("peft", "mlx") else "out.safetensors")
        with pytest.raises(ValueError, match=message):
            lora_fast.convert_adapter(source, out, to, **options)
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))

    lora, dora = make_update(6, 4), make_update(6, 4, axis="output")
    flat = kohya_file(tmp_path / "flat.safetensors", {"a.b": lora})
    refused("has _ for the dots of its names; say what the model's own names are: --base", flat, "peft")
    mixed = kohya_file(tmp_path / "mixed.safetensors", {"a.b": lora, "c": dora})
    base = base_file(tmp_path / "base.safetensors", {"a.b": lora, "c": dora})
    refused("c has DoRA and a.b LoRA, which one adapter of PEFT's cannot have", mixed, "peft", base=base)
    refused("has LoRA and DoRA, of which MLX-LM's file has one", mixed, "mlx", base=base)
    refused("say which it is, --component unet", flat, "diffusers", base=base)
    refused("component: got 'nothing', expected one of", flat, "kohya", component="nothing")
    save_file({"lora_unet_a_b.diff": torch.ones(6, 4)}, tmp_path / "diff.safetensors")
    refused(
        r"differences .* which PEFT's and diffusers' files cannot have; merge it",
        tmp_path / "diff.safetensors",
        "peft",
        base=base,
    )
    saved = peft_adapter(tmp_path / "saved", modules_to_save=["conv_1x1"], target_modules=["to_q"])
    refused(r"holds whole tensors beside the updates \(conv_1x1", saved, "kohya")
    torchtune = SAMPLES / "torchtune" / "epoch_0" / "adapter_model.pt"
    refused("has the names of torchtune, which no other tool has", torchtune, "peft")
    twins = {"a.b_c": make_update(6, 4), "other": make_update(4, 6)}
    ambiguous = base_file(tmp_path / "twins.safetensors", twins | {"a_b.c": make_update(6, 4)})
    tensors = {"lora_A.weight": lora.down, "lora_B.weight": lora.up}
    save_file({f"a.b_c.{part}": value for part, value in tensors.items()}, tmp_path / "dotted.safetensors")
    refused("are one name where dots are written as _", tmp_path / "dotted.safetensors", "kohya", base=ambiguous)
    with pytest.raises(ValueError, match=r"out: got 'x\.safetensors', expected the name of a folder"):
        lora_fast.convert_adapter(flat, tmp_path / "x.safetensors", "peft")
    with pytest.raises(ValueError, match=r"out: got 'x', expected the name of a \*\.safetensors"):
        lora_fast.convert_adapter(flat, tmp_path / "x", "kohya")
    with pytest.raises(ValueError, match="to: got 'comfy', expected one of 'peft'"):
        lora_fast.convert_adapter(flat, tmp_path / "x", "comfy")
    with pytest.raises(FileExistsError, match="exists already"):
        lora_fast.convert_adapter(flat, base, "kohya")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = kohya_file(tmp_path / "a.safetensors", {"a": make_update(6, 4)})

    def interrupted(*args: Any, **options: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lora_fast.convert_adapter(source, tmp_path / "out.safetensors", "kohya")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    updates = {"a.b": make_update(6, 4, axis="output", dtype=F32)}
    base = base_file(tmp_path / "base.safetensors", updates)
    source = kohya_file(tmp_path / "a.safetensors", updates, LYCORIS)
    out = tmp_path / "out"
    assert cli.main(["convert", str(source), str(out), "--to", "peft", "--base", str(base)]) == 0
    text = capsys.readouterr().out
    assert f"{out}: 1 update, as peft" in text
    assert f"{source} is LyCORIS's, which adds 1.19e-07 to each norm" in text
    magnitude = load_file(out / WEIGHTS_NAME)["base_model.model.a.b.lora_magnitude_vector"]
    assert math.isclose(magnitude[0].item(), updates["a.b"].magnitude[0].item(), rel_tol=1e-6)
    assert cli.main(["convert", str(source), str(tmp_path / "x"), "--to", "peft"]) == 2
    assert capsys.readouterr().err.startswith(f"lora-fast: error: {source}: has _ for the dots of its names")
