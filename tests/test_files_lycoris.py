"""Files of LyCORIS and kohya's scripts, merged and loaded: LyCORIS's own merged weights, both axes, every layer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import torch
from file_helpers import LYCORIS, SAMPLES, Update, assert_close, base_file, kohya_file, make_update, merged_file, read
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fast
from lora_fast.adapters import files

KINDS = ("lycoris_out", "lycoris_out_tucker", "lycoris_in", "lycoris_in_tucker")
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_s_own_merged_weights(kind: str, tmp_path: Path) -> None:
    base = SAMPLES / "lycoris" / "base.safetensors"
    merged = merged_file(base, SAMPLES / "lycoris" / f"{kind}.safetensors", tmp_path / "out.safetensors")
    expected = load_file(SAMPLES / "lycoris" / f"{kind}.merged.safetensors")
    old = load_file(base)
    assert merged.keys() == old.keys()
    for key, tensor in merged.items():
        if key in expected:
            assert_close(tensor, expected[key])
            assert (tensor - old[key]).abs().max() > 0.1
        else:
            assert torch.equal(tensor, old[key])


SHAPES = {
    "linear": (12, 8),
    "square": (8, 8),
    "conv1d": (9, 6, 3),
    "conv2d": (6, 4, 3, 3),
    "square conv2d": (4, 4, 3, 3),
    "1x1": (7, 5, 1, 1),
    "conv3d": (4, 3, 2, 3, 2),
    "grouped": (12, 4, 3, 3),
}


@pytest.mark.parametrize("axis", ["output", "input", None])
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("tucker", [False, True])
def test_every_layer_is_the_formula_with_lycoris_s_eps(
    tucker: bool, dtype: torch.dtype, axis: str | None, tmp_path: Path
) -> None:
    updates = {
        f"block.{index}": make_update(*shape, axis=axis, dtype=dtype, tucker=tucker and len(shape) > 2, seed=index)
        for index, shape in enumerate(SHAPES.values())
    }
    for update in updates.values():
        update.weight *= 0.1
        if update.magnitude is not None:
            update.magnitude *= 0.1
        update.up *= 0.1
    adapter = kohya_file(tmp_path / "adapter.safetensors", updates, LYCORIS)
    base = base_file(tmp_path / "base.safetensors", updates)
    merged = merged_file(base, adapter, tmp_path / "out.safetensors", magnitude_axis=axis)
    without = merged_file(base, adapter, tmp_path / "without.safetensors", magnitude_axis=axis, norm_eps=0.0)
    for name, update in updates.items():
        assert_close(merged[f"{name}.weight"], update.merged(EPS[dtype]))
        assert_close(without[f"{name}.weight"], update.merged(0.0))
        if axis is not None and dtype != torch.float64:
            with pytest.raises(AssertionError):  # the tolerance sees an eps that is left out
                assert_close(without[f"{name}.weight"], update.merged(EPS[dtype]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_result_is_rounded_once_to_the_base_s_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    updates = {"a": make_update(24, 16, axis="output"), "b": make_update(6, 4, 3, 3, axis="input", tucker=True)}
    for update in updates.values():
        update.weight = update.weight.to(dtype)
    adapter = kohya_file(tmp_path / "adapter.safetensors", updates)
    base = base_file(tmp_path / "base.safetensors", updates, dtype)
    merged = merged_file(base, adapter, tmp_path / "out.safetensors")
    for name, update in updates.items():
        tensor = merged[f"{name}.weight"]
        assert tensor.dtype == dtype
        exact = update.merged()
        ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
        assert ((tensor.double() - exact).abs() <= 0.501 * ulp + 4e-7 * exact.abs().max()).all()


def test_differences_and_norms_are_added(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    base = {
        "proj.weight": torch.randn(4, 6, generator=generator),
        "proj.bias": torch.randn(4, generator=generator),
        "norm.weight": torch.randn(4, generator=generator),
        "norm.bias": torch.randn(4, generator=generator),
    }
    added = {
        "lora_unet_proj.diff": torch.randn(4, 6, generator=generator),
        "lora_unet_proj.diff_b": torch.randn(4, generator=generator),
        "lora_unet_norm.w_norm": torch.randn(4, generator=generator),
        "lora_unet_norm.b_norm": torch.randn(4, generator=generator),
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(added, tmp_path / "adapter.safetensors")
    merged = merged_file(tmp_path / "base.safetensors", tmp_path / "adapter.safetensors", tmp_path / "out.safetensors")
    for key, difference in zip(base, added.values(), strict=True):
        assert torch.equal(merged[key], base[key] + difference)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 10, bias=False), nn.Linear(10, 4)).double()


def updates_of(model: nn.Module, axis: str | None, dtype: torch.dtype = torch.float64) -> dict[str, Update]:
    updates = {}
    for index, linear in enumerate(model):
        updates[f"{index}"] = update = make_update(*linear.weight.shape, axis=axis, dtype=dtype, seed=index)
        update.weight = linear.weight.detach().clone()
    return updates


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("axis", ["output", "input", None])
@pytest.mark.parametrize("into", ["plain", "adapted"])
def test_a_loaded_layer_computes_what_the_merged_one_does(
    into: str, axis: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    plain = model()
    updates = updates_of(plain, axis, dtype)
    path = kohya_file(tmp_path / "adapter.safetensors", updates, LYCORIS)
    loaded = model()
    if into == "adapted":
        options = {} if axis is None else {"norm_axis": axis}
        lora_fast.apply(loaded, 2, 3.0, scaling="alpha/r", dora=axis is not None, **options)
    lora_fast.load_adapter(loaded, path)
    lora_fast.load_adapter(loaded, path)  # again: nothing is folded in twice
    for index, linear in enumerate(plain):
        layer = loaded[index]
        assert layer.norm_axis == (axis or "output")
        linear.weight.data = updates[f"{index}"].merged(EPS[dtype])
    x = torch.randn(5, 6, dtype=torch.float64)
    # a layer's magnitude is float64 where its weights are; in a plain model it has the precision of the file's factors
    exact = into == "adapted" or dtype == torch.float64 or axis is None
    assert_close(loaded(x), plain(x), 1e-12 if exact else 1e-6)


def test_a_loaded_magnitude_without_eps_is_the_file_s_to_the_bit(tmp_path: Path) -> None:
    plain = model().float()
    updates = updates_of(plain, "output", torch.float32)
    lora_fast.load_adapter(plain, kohya_file(tmp_path / "adapter.safetensors", updates))
    for index, layer in enumerate(plain):
        update = updates[f"{index}"]
        assert update.magnitude is not None
        assert torch.equal(layer.magnitude, update.magnitude)
        assert torch.equal(layer.lora_A, update.down)
        assert torch.equal(layer.lora_B, update.up)


def test_the_tool_decides_the_eps(tmp_path: Path) -> None:
    updates = {"a": make_update(6, 4, axis="output", dtype=torch.float16)}

    def eps(metadata: dict[str, str] | None) -> float:
        path = kohya_file(tmp_path / "adapter.safetensors", updates, metadata)
        return read(path).layers["a"].norm_eps

    half, single = EPS[torch.float16], EPS[torch.float32]
    assert eps(None) == 0.0
    assert eps(LYCORIS) == half
    assert eps(LYCORIS | {"ss_full_fp16": "True"}) == half
    assert eps(LYCORIS | {"ss_full_fp16": "False"}) == single  # trained in float32, saved in float16
    assert eps({"lycoris_config": "{}"}) == half
    assert eps({"ot_branch": "master"}) == 0.0
    config = '{"lora_decompose_output_axis": true, "lora_decompose_norm_epsilon": %s}'
    assert eps({"ot_config": config % "true"}) == single
    assert eps({"ot_config": config % "false"}) == 0.0
    path = kohya_file(tmp_path / "adapter.safetensors", updates, LYCORIS)
    assert read(path, norm_eps=0.25).layers["a"].norm_eps == 0.25
    note = files.read_file(path).notes[0]
    assert "LyCORIS" in note
    assert "0.000977" in note


def test_layers_without_an_alpha_among_others_are_named(tmp_path: Path) -> None:
    updates = {"a": make_update(6, 4, alpha=None), "b": make_update(6, 4, alpha=8.0)}
    path = kohya_file(tmp_path / "a.safetensors", updates)
    file = files.read_file(path)
    assert [layer.scaling for layer in file.component(None).layers.values()] == [1.0, 4.0]
    assert file.notes == [
        "has no alpha for lycoris a: the factor is taken for 1 there, as kohya's scripts and ComfyUI take it"
    ]
    base = base_file(tmp_path / "base.safetensors", updates)
    merged = merged_file(base, path, tmp_path / "out.safetensors")
    for name, update in updates.items():
        assert_close(merged[f"{name}.weight"], update.merged())


def test_diffusers_magnitude_keeps_a_dot_in_a_flattened_name(tmp_path: Path) -> None:
    """Of convert_state_dict_to_kohya."""
    update = make_update(6, 4, axis="output")
    parts = update.kohya()
    del parts["dora_scale"]
    tensors = {f"lora_unet_a_to_q.{key}": value for key, value in parts.items()}
    tensors["lora_unet_a.to_q.lora_magnitude_vector"] = update.magnitude
    save_file(tensors, tmp_path / "a.safetensors")
    base = base_file(tmp_path / "base.safetensors", {"a.to_q": update})
    merged = merged_file(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    assert_close(merged["a.to_q.weight"], update.merged())


# Which axis: the weight's shape, the shape of dora_scale, the word of the file, that of the user.
DECIDED = [
    ((6, 4), [6, 1], {}, None, "output"),
    ((6, 4), [1, 4], {}, None, "input"),
    ((4, 4), [4, 1], {}, None, "output"),
    ((4, 4), [1, 4], {}, None, "input"),
    ((6, 4), [6], {}, None, "output"),
    ((6, 4), [4], {}, None, "input"),
    ((4, 4), [4], {"wd_on_output": "True"}, None, "output"),
    ((4, 4), [4], {"wd_on_output": "False"}, None, "input"),
    ((4, 4), [4], {}, "output", "output"),
    ((4, 4), [4], {"wd_on_output": "True"}, "input", "input"),
    ((6, 4, 3, 3), [6, 1, 1, 1], {}, None, "output"),
    ((6, 4, 3, 3), [1, 4, 1, 1], {}, None, "input"),
    ((6, 4, 3, 3), [1, 6, 1, 1], {}, None, "output"),
    ((4, 4, 3, 3), [4, 1, 1, 1], {}, None, "output"),
    ((4, 4, 3, 3), [1, 4, 1, 1], {"wd_on_output": "False"}, None, "input"),
    ((4, 4, 3, 3), [1, 4, 1, 1], {"ot_branch": "master"}, None, "input"),
    ((4, 4, 3, 3), [1, 4, 1, 1], {}, "input", "input"),
    ((4, 4, 3, 3), [1, 4, 1, 1], {}, "output", "output"),
]
UNDECIDED = [
    ((4, 4), [4], {}, None, "may be of either axis; say which: magnitude_axis, --magnitude-axis"),
    ((4, 4, 3, 3), [1, 4, 1, 1], {}, None, "may be of either axis; say which: magnitude_axis, --magnitude-axis"),
    ((6, 4), [6, 1], {"wd_on_output": "False"}, None, "but the file notes wd_on_output=false"),
    ((4, 4), [1, 4], {"wd_on_output": "True"}, None, "but the file notes wd_on_output=true"),
    ((6, 4), [6, 1], {}, "input", "magnitude_axis says 'input'"),
    ((6, 4), [5, 1], {}, None, r"expected [N, 1] or [1, K] with N = 6 and K = 4"),
    ((6, 4), [1, 6], {}, None, r"expected [N, 1] or [1, K] with N = 6 and K = 4"),
    ((6, 4, 3, 3), [6, 1], {}, None, r"expected [N, 1, 1, …] or [1, K, 1, …] with N = 6 and K = 4"),
]


def file_with_scale(tmp_path: Path, shape: tuple[int, ...], scale: list[int], arguments: dict[str, str]) -> Path:
    import json

    update = make_update(*shape)
    parts = update.kohya() | {"dora_scale": torch.rand(scale)}
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)} if arguments else None
    metadata = arguments if "ot_branch" in arguments else metadata
    save_file({f"lora_unet_a.{part}": tensor for part, tensor in parts.items()}, tmp_path / "a.safetensors", metadata)
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize(("shape", "scale", "arguments", "user", "axis"), DECIDED)
def test_the_axis_is_decided_by_the_shape_then_by_the_file_then_by_the_user(
    shape: tuple[int, ...], scale: list[int], arguments: dict[str, str], user: str | None, axis: str, tmp_path: Path
) -> None:
    path = file_with_scale(tmp_path, shape, scale, arguments)
    layer = read(path, magnitude_axis=user).layers["a"]
    assert layer.norm_axis == axis
    assert layer.magnitude is not None
    assert layer.magnitude.shape == (shape[0] if axis == "output" else shape[1],)
    assert layer.axis_reason


@pytest.mark.parametrize(("shape", "scale", "arguments", "user", "message"), UNDECIDED)
def test_an_axis_that_is_open_is_refused_and_the_option_named(
    shape: tuple[int, ...], scale: list[int], arguments: dict[str, str], user: str | None, message: str, tmp_path: Path
) -> None:
    path = file_with_scale(tmp_path, shape, scale, arguments)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(path, magnitude_axis=user)
    assert "dora_scale of lora_unet a" in str(caught.value)
    found = lora_fast.inspect_adapter(path, magnitude_axis=user)
    assert any(message in fault for fault in found["faults"])
    assert found["components"][0]["layers"][0]["axis_reason"] == "undecided"


@pytest.mark.parametrize("name", ["magnitude", "lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_a_magnitude_is_of_the_output_and_never_of_the_input(name: str, tmp_path: Path) -> None:
    update = make_update(8, 8, axis="output")
    parts = {"lora_A.weight": update.down, "lora_B.weight": update.up, "alpha": torch.tensor(3.0)}

    def path(shape: list[int]) -> Path:
        assert update.magnitude is not None
        tensors = parts | {name: update.magnitude.reshape(shape)}
        save_file({f"transformer.a.{part}": tensor for part, tensor in tensors.items()}, tmp_path / "a.safetensors")
        return tmp_path / "a.safetensors"

    assert read(path([8])).layers["a"].norm_axis == "output"
    with pytest.raises(ValueError, match=r"a has a magnitude of shape \[1, 8\], expected \[N\] = \[8\]"):
        read(path([1, 8]))
    with pytest.raises(ValueError, match="magnitude_axis says 'input'"):
        read(path([8]), magnitude_axis="input")


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("axis", ["output", "input"])
def test_an_eps_is_folded_in_over_a_quantised_weight_too(axis: str, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from quantised_helpers import BY_NAME

    linear = BY_NAME["nf4-float32"].linear()
    update = make_update(linear.out_features, linear.in_features, axis=axis, dtype=torch.float16)
    update.up *= 0.1
    update.weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    model = nn.Sequential(linear)
    lora_fast.load_adapter(model, kohya_file(tmp_path / "a.safetensors", {"0": update}, LYCORIS))
    x = torch.randn(3, linear.in_features)
    bias = 0.0 if linear.bias is None else linear.bias.double()
    expected = x.double() @ update.merged(EPS[torch.float16]).T + bias
    assert_close(model.eval()(x).double(), expected, 1e-6)
    with pytest.raises(AssertionError):  # the tolerance sees an eps that is left out
        assert_close(x.double() @ update.merged(0.0).T + bias, expected, 1e-6)
