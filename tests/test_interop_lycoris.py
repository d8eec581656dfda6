"""LyCORIS itself writes the files here, and says what they compute; and it reads ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import torch
from file_helpers import LYCORIS, assert_close, make_update, merged_file
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fast

pytestmark = pytest.mark.interop


class Net(nn.Module):
    """Square and not, with every kind of layer that LyCORIS takes."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 12, bias=False)])
        self.conv_square = nn.Conv2d(6, 6, 3)
        self.conv = nn.Conv2d(6, 10, 3)
        self.conv_1x1 = nn.Conv2d(10, 10, 1)
        self.conv1d = nn.Conv1d(6, 9, 3)
        self.conv3d = nn.Conv3d(4, 4, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)


def net(dtype: torch.dtype, size: float = 1.0) -> Net:
    torch.manual_seed(0)
    model = Net()
    for parameter in model.parameters():
        parameter.data.uniform_(-size, size)
    return model.to(dtype)


def network(model: nn.Module, size: float = 1.0, **options: Any) -> Any:
    """LyCORIS's own around ``model``, with random values, of the model's dtype."""
    from lycoris import LycorisNetwork

    LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv1d", "Conv2d", "Conv3d"], "enable_conv": True})
    sizes = {"lora_dim": 4, "alpha": 2, "conv_lora_dim": 3, "conv_alpha": 6}
    found = LycorisNetwork(model, 1.0, network_module="locon", **sizes, **options)
    found.apply_to()
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    for name, parameter in found.named_parameters():
        noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
        is_scale = name.endswith("dora_scale")
        parameter.data = (parameter.double() * (1 + 0.4 * noise) if is_scale else size**0.5 * 0.5 * noise).to(dtype)
    return found.to(dtype).eval()


def effective(found: Any, model: nn.Module) -> dict[str, Tensor]:
    """What LyCORIS computes with, by the model's names."""
    names = {f"lycoris_{name}".replace(".", "_"): f"{name}.weight" for name, _ in model.named_modules()}
    with torch.no_grad():
        return {names[layer.lora_name]: layer.get_merged_weight(1.0)[0].clone() for layer in found.loras}


# How large the base's weights are, so that eps counts beside their norms; and the rounding of LyCORIS's own arithmetic.
SIZES = {torch.float64: 1.0, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("on_output", [True, False])
def test_dora_as_lycoris_computes_it(on_output: bool, tucker: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    size = SIZES[dtype]
    model = net(dtype, size)
    base = {key: tensor.double() for key, tensor in model.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    found = network(model, size, weight_decompose=True, wd_on_out=on_output, use_tucker=tucker)
    arguments = f'{{"algo": "lora", "dora_wd": "True", "wd_on_output": "{on_output}"}}'
    found.save_weights(tmp_path / "a.safetensors", dtype, LYCORIS | {"ss_network_args": arguments})
    merged = merged_file(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    without = merged_file(
        tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "without.safetensors", norm_eps=0.0
    )
    expected = effective(found, net(dtype))
    assert len(expected) == 8
    roundings = 8 * torch.finfo(dtype).eps
    missed = 0
    for key, tensor in expected.items():
        scale = tensor.abs().max().item()
        assert (merged[key] - tensor.double()).abs().max().item() <= max(roundings, 1e-15) * scale, key
        missed += (without[key] - tensor.double()).abs().max().item() > roundings * scale
        assert (base[key] - tensor.double()).abs().max().item() > 0.1 * scale
    assert missed == (0 if dtype == torch.float64 else 8)  # the tolerance sees an eps that is left out


def test_lora_and_its_own_merge(tmp_path: Path) -> None:
    model = net(torch.float64)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    untouched = copy.deepcopy(model)
    found = network(model, rs_lora=True, use_tucker=True)
    found.save_weights(tmp_path / "a.safetensors", torch.float64, {})
    merged = merged_file(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    for key, tensor in effective(found, untouched).items():
        assert_close(merged[key], tensor, 1e-7)  # alpha √r is a float32 in the file


@pytest.mark.parametrize("algo", ["loha", "lokr", "glora", "ia3", "diag-oft"])
def test_its_other_algorithms_are_refused(algo: str, tmp_path: Path) -> None:
    from lycoris import LycorisNetwork

    model = nn.Sequential(nn.Linear(8, 8))
    LycorisNetwork.apply_preset({"target_module": ["Linear"]})
    found = LycorisNetwork(model, 1.0, lora_dim=4, alpha=2, network_module=algo)
    found.apply_to()
    found.save_weights(tmp_path / "a.safetensors", torch.float32, {})
    with pytest.raises(ValueError, match=r"which is not LoRA or DoRA"):
        lora_fast.load_adapter(nn.Sequential(nn.Linear(8, 8)), tmp_path / "a.safetensors")


@pytest.mark.parametrize("axis", ["output", None])
def test_it_reads_what_convert_writes(axis: str | None, tmp_path: Path) -> None:
    from lycoris import create_lycoris_from_weights

    base = Net().double()
    updates = {"to_q": make_update(8, 8, axis=axis), "to_out.0": make_update(12, 8, axis=axis, seed=1)}
    updates["conv"] = make_update(10, 6, 3, 3, axis=axis, seed=2)
    tensors = {}
    for name, update in updates.items():
        base.get_submodule(name).weight.data = update.weight.clone()
        tensors |= {f"unet.{name}.lora_A.weight": update.down, f"unet.{name}.lora_B.weight": update.up}
        tensors[f"unet.{name}.alpha"] = torch.tensor(update.alpha)
        if update.magnitude is not None:
            shape = [1, -1, 1, 1] if update.weight.dim() == 4 else [-1]
            tensors[f"unet.{name}.lora_magnitude_vector"] = update.magnitude.reshape(shape)
    save_file(tensors, tmp_path / "a.safetensors")
    lora_fast.convert_adapter(tmp_path / "a.safetensors", tmp_path / "kohya.safetensors", "kohya", component=None)
    renamed = {
        key.replace("lora_unet_", "lycoris_"): value for key, value in load_file(tmp_path / "kohya.safetensors").items()
    }
    save_file(renamed, tmp_path / "lycoris.safetensors")
    found, _ = create_lycoris_from_weights(1.0, str(tmp_path / "lycoris.safetensors"), base)
    with torch.no_grad():
        found.to(torch.float64).merge_to(1.0)
    for name, update in updates.items():
        assert_close(base.get_submodule(name).weight, update.merged(), 1e-6)  # it copies into float32 parameters
