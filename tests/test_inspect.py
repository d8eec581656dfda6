"""lora-fast inspect: what a file holds, why each axis was decided so, what is unknown, and why it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
pytest.importorskip("rich", reason="the adapters extra is not installed")
pytest.importorskip("yaml", reason="the adapters extra is not installed")
import torch
from file_helpers import LYCORIS, SAMPLES, kohya_file, make_update
from safetensors.torch import load_file, save_file

import lora_fast
from lora_fast import cli


def test_every_layer_of_a_file_of_lycoris(capsys: pytest.CaptureFixture[str]) -> None:
    path = SAMPLES / "lycoris" / "lycoris_in_tucker.safetensors"
    assert cli.main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: format kohya, written by LyCORIS"
    assert lines[2] == "lycoris: 7 layers, names with _ for their dots"
    assert lines[3].split() == ["layer", "kind", "in", "→", "out", "rank", "scale", "dtype", "norm", "because"]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[4:11]}
    assert rows["blocks_0_to_q"] == "linear 8 → 8 2 0.5 float64 per input + 2.22e-16, float64 its shape is [1, K]"
    assert rows["conv_square"] == (
        "convolution 3 × 3, Tucker 4 → 4 3 2 float64 per input + 2.22e-16, float64 its shape is [1, K, 1, …]"
    )
    assert "note: the file is LyCORIS's, which adds 2.22e-16 to each norm" in lines


def test_json_has_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    updates = {"a": make_update(6, 4, rank=3, alpha=6.0, axis="output", dtype=torch.bfloat16), "b": make_update(4, 6)}
    path = kohya_file(tmp_path / "a.safetensors", updates, LYCORIS)
    assert cli.main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == lora_fast.inspect_adapter(path)
    assert (found["format"], found["tool"], found["unknown"], found["faults"]) == ("kohya", "LyCORIS", [], [])
    (component,) = found["components"]
    assert component["name"] == "lycoris"
    assert component["layers"] == [
        {
            "name": "a", "kind": "linear", "in_features": 4, "out_features": 6, "rank": 3, "scaling": 2.0,
            "dtype": "bfloat16", "magnitude_dtype": "bfloat16", "norm_axis": "output",
            "axis_reason": "its shape is [N, 1]", "norm_eps": 2**-7,
        },
        {
            "name": "b", "kind": "linear", "in_features": 6, "out_features": 4, "rank": 2, "scaling": 1.5,
            "dtype": "float64",
        },
    ]  # fmt: skip


def test_what_is_refused_is_shown_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = kohya_file(tmp_path / "a.safetensors", {"a": make_update(6, 4), "b": make_update(4, 4)})
    tensors = load_file(path) | {
        "lycoris_b.dora_scale": torch.ones(4), "lycoris_c.lokr_w1": torch.ones(1), "lycoris_d.strange": torch.ones(1),
    }  # fmt: skip
    save_file(tensors, path)
    assert cli.main(["inspect", str(path)]) == 1
    text = capsys.readouterr().out
    assert "unknown keys:\n  lycoris_d.strange\n  lycoris_c.lokr_w1\n" in text
    refusals = text[text.index("refused, because:") :]
    assert "holds LoKr, which is not LoRA or DoRA: lycoris_c.lokr_w1" in refusals
    assert "lycoris_d.strange is no part of LoRA or DoRA that is known here" in refusals
    assert "may be of either axis; say which: magnitude_axis, --magnitude-axis output or input" in refusals
    assert cli.main(["inspect", str(path), "--magnitude-axis", "input", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [layer["axis_reason"] for layer in found["components"][0]["layers"][1:]] == ["magnitude_axis says so"]


@pytest.mark.parametrize(
    ("path", "kind", "tool", "layers"),
    [
        (SAMPLES / "torchtune" / "epoch_0" / "adapter_model.pt", "torchtune", "torchtune", 8),
        (SAMPLES / "litgpt", "litgpt", "litgpt", 6),
    ],
)
def test_other_formats(path: Path, kind: str, tool: str, layers: int) -> None:
    found = lora_fast.inspect_adapter(path)
    assert (found["format"], found["tool"], len(found["components"][0]["layers"])) == (kind, tool, layers)


def test_what_is_no_adapter_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == f"lora-fast: error: {tmp_path / 'nothing'}: no such file or folder\n"
    (tmp_path / "a.ckpt").write_bytes(b"x")
    assert cli.main(["inspect", str(tmp_path / "a.ckpt")]) == 2
    assert "is a pickle, which can run code and is never loaded" in capsys.readouterr().err
    assert cli.main(["inspect", str(SAMPLES / "torchtune" / "base" / "model.safetensors")]) == 1  # a whole model
    assert "is no part of LoRA or DoRA" in capsys.readouterr().out
