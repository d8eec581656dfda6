"""Any shape, axis, rank, alpha and dtype, in any of the formats: merged, loaded and converted, it is the definition."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
pytest.importorskip("hypothesis", reason="the test extra is not installed")
import torch
from file_helpers import LYCORIS, Update, assert_close, base_file, make_update, merged_file, read
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fast
from lora_fast.merge_checkpoint import merge_checkpoint

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ["blocks.0.to_q", "blocks.1.ff.net_2", "x_embedder"]
# fixed examples: a failure here is one on every machine
THOROUGH = settings(
    derandomize=True,
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def updates(
    draw: st.DrawFn, linear_only: bool = False, axes: tuple[str | None, ...] = ("output", "input", None)
) -> Update:
    kernel = [] if linear_only else draw(st.lists(st.integers(1, 3), max_size=3))
    rank = draw(st.integers(1, 9))
    alpha = draw(st.none() | st.sampled_from([1.0, 16.0, 0.1, -2.5, rank * 3.0, math.sqrt(rank) * 8.0]))
    update = make_update(
        draw(st.integers(1, 12)),
        draw(st.integers(1, 12)),
        *kernel,
        rank=rank,
        alpha=alpha,
        axis=draw(st.sampled_from(axes)),
        tucker=bool(kernel) and draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
    )
    if draw(st.booleans()):
        update.weight[0] = 0.0
        update.up[0] = 0.0  # a row of zeros: its norm, and its result, are 0
    return update


def written(form: str, path: Path, by_name: dict[str, Update]) -> Path:
    """A file of one of the formats that have every norm axis."""
    tensors: dict[str, Tensor] = {}
    for name, update in by_name.items():
        parts = update.kohya()
        if form == "comfy":
            words = {"lora_down": "lora_A", "lora_up": "lora_B"}
            for part, tensor in parts.items():
                head, _, end = part.partition(".")
                tensors[f"diffusion_model.{name}.{words.get(head, head)}{'.' if end else ''}{end}"] = tensor
        else:
            tensors |= {f"lora_unet_{name.replace('.', '_')}.{part}": tensor for part, tensor in parts.items()}
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, path, LYCORIS if form == "lycoris" else None
    )
    return path


@THOROUGH
@given(st.lists(updates(), min_size=1, max_size=3), st.sampled_from(["kohya", "comfy", "lycoris"]))
def test_merged_and_converted(drawn: list[Update], form: str) -> None:
    by_name = dict(zip(NAMES, drawn, strict=False))
    axes = {update.axis for update in drawn if update.magnitude is not None}
    open_axis = axes.pop() if len(axes) == 1 else None  # for what a shape leaves open
    with tempfile.TemporaryDirectory() as folder:
        path, base = (
            written(form, Path(folder) / "a.safetensors", by_name),
            base_file(Path(folder) / "base.safetensors", by_name),
        )
        if axes:  # two axes in one file: of a square layer's the shape has to decide
            for update in drawn:
                N, K = update.weight.shape[:2]
                is_open = update.weight.dim() > 2 and N == K and update.magnitude is not None
                assume(not (is_open and update.axis == "input"))
        merged = merged_file(base, path, Path(folder) / "out.safetensors", magnitude_axis=open_axis)
        for name, update in by_name.items():
            eps = torch.finfo(update.down.dtype).eps if form == "lycoris" else 0.0
            expected = update.merged(eps)
            if update.magnitude is not None:
                expected = expected.nan_to_num(0.0)  # 0 / 0, where a whole row is 0
            assert_close(merged[f"{name}.weight"], expected)
        layers = read(path, magnitude_axis=open_axis).layers
        assert {layer.rank for layer in layers.values()} == {update.down.shape[0] for update in drawn}
        again = Path(folder) / "again.safetensors"
        # of LyCORIS's own files no shape is open, and they stay its own
        lora_fast.convert_adapter(path, again, "kohya", magnitude_axis=None if form == "lycoris" else open_axis)
        same = merged_file(base, again, Path(folder) / "same.safetensors", magnitude_axis=open_axis)
        assert all(torch.equal(same[key], tensor) for key, tensor in merged.items())


@THOROUGH
@given(updates(linear_only=True), st.sampled_from(["kohya", "comfy", "lycoris"]), st.booleans())
def test_loaded(update: Update, form: str, has_bias: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(form, Path(folder) / "a.safetensors", {"0": update})
        N, K = update.weight.shape
        model = nn.Sequential(nn.Linear(K, N, bias=has_bias)).double()
        model[0].weight.data = update.weight.clone()
        bias = model[0].bias.detach() if has_bias else 0.0
        lora_fast.load_adapter(model, path, magnitude_axis=update.axis if update.magnitude is not None else None)
        eps = torch.finfo(update.down.dtype).eps if form == "lycoris" else 0.0
        expected = update.merged(eps).nan_to_num(0.0)
        x = torch.randn(4, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        # an eps is a part of the magnitude, which is float32 where the file's factors are no wider
        tolerance = 1e-6 if eps and update.down.dtype != torch.float64 else 1e-12
        assert_close(model(x).detach(), x @ expected.T + bias, tolerance)


@THOROUGH
@given(st.lists(updates(axes=("output",)), min_size=1, max_size=3), st.sampled_from(["peft", "diffusers"]))
def test_converted_to_one_norm_for_each_output(drawn: list[Update], to: str) -> None:
    by_name = dict(zip(NAMES, drawn, strict=False))
    with tempfile.TemporaryDirectory() as folder:
        path = written("comfy", Path(folder) / "a.safetensors", by_name)
        base = Path(folder) / "base"
        base.mkdir()
        base_file(base / "model.safetensors", by_name)
        out = Path(folder) / ("out" if to == "peft" else "out.safetensors")
        # names below diffusion_model need a base to be diffusers'
        options = {} if to == "peft" else {"base": base, "component": "transformer"}
        done = lora_fast.convert_adapter(path, out, to, magnitude_axis="output", **options)
        folded = ", ".join(name for name, update in by_name.items() if update.mid is not None)
        assert ([f"lora_mid of {folded} is multiplied into lora_A, rounded once"] if folded else []) == [
            note for note in done.notes if "lora_mid" in note
        ]
        before, after = (read(each, magnitude_axis="output").layers for each in (path, out))
        for name, update in by_name.items():
            assert after[name].scaling == before[name].scaling
            assert torch.equal(after[name].lora_B, update.up)
            assert torch.equal(after[name].magnitude, update.magnitude)
            if update.mid is None:
                assert torch.equal(after[name].lora_A, update.down)
        merge_checkpoint(base, out, Path(folder) / "merged")
        merged = load_file(Path(folder) / "merged" / "model.safetensors")
        for name, update in by_name.items():
            is_exact = update.mid is None or update.down.dtype == torch.float64
            assert_close(merged[f"{name}.weight"], update.merged().nan_to_num(0.0), 1e-12 if is_exact else 1e-5)
        if to == "peft":
            config = json.loads((out / "adapter_config.json").read_text())
            assert config["use_dora"] is True
            assert config["target_modules"] == sorted(by_name)
