"""Where the files go: never over another's, never half, with the rights that the user's other files have."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import torch
from file_helpers import base_file, kohya_file, make_update
from safetensors.torch import save_file
from torch import nn
from toy_folders import W, adapter_folder, base_folder, lora

import lora_fast
from lora_fast import cli
from lora_fast.merge_checkpoint import merge_checkpoint


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_what_is_written_has_the_rights_of_new_files(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        lora_fast.save_adapter(lora_fast.apply(nn.Sequential(nn.Linear(4, 4)), 2, 2), tmp_path / "saved")
        lora_fast.convert_adapter(tmp_path / "saved", tmp_path / "mlx", "mlx")
        lora_fast.convert_adapter(tmp_path / "saved", tmp_path / "a.safetensors", "kohya", component="unet")
        merge_checkpoint(base_folder(tmp_path / "base", {"0.weight": W}), tmp_path / "saved", tmp_path / "out")
        (tmp_path / "plain").write_text("")
    finally:
        os.umask(before)
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "base" not in path.parts[-2:]]
    assert len(written) == 8
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {expected}


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_file_that_appears_meanwhile_is_not_written_over(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = {"a": make_update(6, 4)}
    base, adapter = base_file(tmp_path / "base.safetensors", update), kohya_file(tmp_path / "a.safetensors", update)
    out = tmp_path / "out.safetensors"

    def appear(shard: str, fraction: float) -> None:
        if fraction < 1 or out.exists() or out.is_symlink():
            return
        if kind == "file":
            out.write_text("theirs")
        elif kind == "folder":
            out.mkdir()
        else:
            out.symlink_to(tmp_path / "nowhere")

    with pytest.raises(FileExistsError, match="was made by another while it was being written"):
        merge_checkpoint(base, adapter, out, appear)
    assert out.is_symlink() if kind == "link" else out.is_dir() if kind == "folder" else out.read_text() == "theirs"
    assert not list(tmp_path.glob(".out*"))


def test_a_loop_of_links_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    adapter = adapter_folder(tmp_path / "adapter", lora("q"))
    with pytest.raises(FileNotFoundError, match="is not a folder with a checkpoint"):
        merge_checkpoint(tmp_path / "loop", adapter, tmp_path / "out")
    base = base_folder(tmp_path / "base", {"q.weight": W})
    with pytest.raises(OSError, match="loop: is no folder"):
        merge_checkpoint(base, adapter, tmp_path / "loop" / "out")


def test_a_folder_in_the_place_of_a_file_leaves_the_other_as_it_was(tmp_path: Path) -> None:
    model = lora_fast.apply(nn.Sequential(nn.Linear(4, 4)), 2, 2)
    (tmp_path / "adapter_config.json").mkdir()
    (tmp_path / "adapter_model.safetensors").write_text("mine")
    with pytest.raises(IsADirectoryError, match=r"adapter_config\.json: is a folder, expected a file or none"):
        lora_fast.save_adapter(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["größe", "a b", "a/b", "x+y", "層"])
def test_names_of_any_letters_come_back(name: str, tmp_path: Path) -> None:
    """One layer's rank is another, so that a pattern has its name."""
    model = nn.ModuleDict({name: nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    adapted = lora_fast.apply(model, 2, 2)
    adapted[name] = lora_fast.LinearWithLoRA(nn.Linear(4, 4), 3, 1.0)
    nn.init.normal_(adapted[name].lora_B)
    adapted["b"] = lora_fast.LinearWithLoRA(nn.Linear(4, 4), 2, 1.0)
    adapted["c"] = lora_fast.LinearWithLoRA(nn.Linear(4, 4), 2, 1.0)
    lora_fast.save_adapter(adapted, tmp_path / "saved")
    again = nn.ModuleDict({each: nn.Linear(4, 4) for each in (name, "b", "c")})
    lora_fast.load_adapter(again, tmp_path / "saved")
    assert torch.equal(again[name].lora_B, adapted[name].lora_B)


def test_words_that_python_cannot_write_as_utf_8(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", {"q.weight": W.clone()})
    index = '{"metadata": {"by": "\\ud800"}, "weight_map": {"q.weight": "one.safetensors"}}'
    (base / "model.safetensors").rename(base / "one.safetensors")
    (base / "model.safetensors.index.json").write_text(index)
    merge_checkpoint(base, adapter_folder(tmp_path / "a", lora("q")), tmp_path / "out")
    assert "ud800" in (tmp_path / "out" / "model.safetensors.index.json").read_text()


@pytest.mark.parametrize("layers", ["all", "q", 5])
def test_fan_in_fan_out_is_a_list_of_names(layers: Any, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", {"q.weight": W.clone()})
    with pytest.raises(ValueError, match="fan_in_fan_out: got .*, expected True, False, None or names of layers"):
        merge_checkpoint(base, adapter_folder(tmp_path / "a", lora("q")), tmp_path / "out", fan_in_fan_out=layers)


def test_a_folder_is_not_written_under_the_name_of_a_file(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", {"q.weight": W})
    with pytest.raises(ValueError, match="expected the name of a folder, as .*base is one"):
        merge_checkpoint(base, adapter_folder(tmp_path / "a", lora("q")), tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapters.safetensors"])
def test_an_adapter_is_no_base(name: str, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", lora("q"))
    (tmp_path / "base").mkdir()
    save_file({"q.weight": W.clone()}, tmp_path / "base" / name)
    for base in (tmp_path / "base", tmp_path / "base" / name):
        with pytest.raises(
            ValueError, match="is an adapter's (file by its name|folder), expected a checkpoint of the base"
        ):
            merge_checkpoint(base, adapter, tmp_path / ("out.safetensors" if base.is_file() else "out"))


@pytest.mark.parametrize("name", ["adapter_config.json", "lit_config.yaml"])
def test_a_configuration_is_no_adapter(name: str, tmp_path: Path) -> None:
    adapter_folder(tmp_path / "adapter", lora("q"))
    (tmp_path / "adapter" / name).touch()
    with pytest.raises(ValueError, match=rf"{name}: is the configuration of an adapter, or none; give the folder"):
        lora_fast.inspect_adapter(tmp_path / "adapter" / name)


def test_a_model_without_a_name_needs_none(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", {"q.weight": W.clone()})
    adapter = adapter_folder(tmp_path / "adapter", lora("q"))
    with pytest.raises(ValueError, match="component: got 'unet', .* has one model, without a name; leave it out"):
        merge_checkpoint(base, adapter, tmp_path / "out", component="unet")


def test_diffusers_file_of_a_model_without_a_name(tmp_path: Path) -> None:
    source = adapter_folder(tmp_path / "adapter", lora("q"))
    with pytest.raises(ValueError, match="name the model of each update, which this file does not: say which it is"):
        lora_fast.convert_adapter(source, tmp_path / "out", "diffusers")


@pytest.mark.parametrize(("count", "said"), [(1, "1 update, as mlx"), (2, "2 updates, as mlx")])
def test_the_command_says_how_many(count: int, said: str, tmp_path: Path, capsys: Any) -> None:
    tensors = {key: value for index in range(count) for key, value in lora(f"layers.{index}.q").items()}
    source = adapter_folder(tmp_path / "adapter", tensors)
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--to", "mlx"]) == 0
    assert said in capsys.readouterr().out


def test_peft_s_names_without_a_configuration_say_what_to_do(tmp_path: Path) -> None:
    tensors = {f"base_model.model.{key}": value for key, value in lora("q").items()}
    save_file(tensors, tmp_path / "mine.safetensors")
    with pytest.raises(
        ValueError, match=r"put it beside the file, name that adapter_model\.safetensors, and give the fold"
    ):
        lora_fast.load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path / "mine.safetensors")


def test_diffusers_header_says_which_layers_have_an_adapter(tmp_path: Path) -> None:
    header = '{"unet.r": 1, "unet.lora_alpha": 1, "unet.target_modules": ["k"]}'
    tensors = {f"unet.{key}": torch.ones_like(value) for key, value in lora("a.q").items()}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": header})
    with pytest.raises(ValueError, match="target_modules does not name a.q, for which the file has an"):
        lora_fast.load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path / "a.safetensors")
    assert "does not name a.q" in lora_fast.inspect_adapter(tmp_path / "a.safetensors")["faults"][0]


def small_pipeline(folder: Path) -> Path:
    (folder / "base" / "scheduler").mkdir(parents=True)
    (folder / "base" / "model_index.json").write_text("{}")
    base_folder(folder / "base" / "unet", {"q.weight": W.clone()})
    return folder / "base"


def test_nothing_is_made_on_the_way_to_another_place(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", {"q.weight": W.clone()})
    merge_checkpoint(base, adapter_folder(tmp_path / "a", lora("q")), base / "new" / ".." / ".." / "out")
    assert sorted(path.name for path in base.iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_links_in_a_pipeline(tmp_path: Path) -> None:
    base = small_pipeline(tmp_path)
    adapter = adapter_folder(tmp_path / "a", lora("q"))
    (base / "unet").rename(tmp_path / "elsewhere")
    (base / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"lies in .*unet, which is copied; expected another place"):
        merge_checkpoint(base, adapter, tmp_path / "elsewhere" / "out")
    merge_checkpoint(base, adapter, tmp_path / "out")
    (base / "scheduler" / "loop").symlink_to(base)
    with pytest.raises(OSError, match=r"scheduler/loop: is a link to a folder that it lies in"):
        merge_checkpoint(base, adapter, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "elsewhere", "out"]


def test_a_link_that_another_run_left_is_not_deleted(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", {"q.weight": W.clone()})
    left = tmp_path / f".out.{os.getpid()}.part"
    left.symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError, match="is left from another run"):
        merge_checkpoint(base, adapter_folder(tmp_path / "a", lora("q")), tmp_path / "out")
    assert left.is_symlink()


def test_one_file_is_not_base_and_adapter(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "a.safetensors", {"q": make_update(4, 4)})
    with pytest.raises(ValueError, match=r"a\.safetensors: is given as the base and as the adapter"):
        merge_checkpoint(source, source, tmp_path / "out.safetensors")


def test_a_factor_that_no_layer_can_compute_with(tmp_path: Path) -> None:
    path = adapter_folder(tmp_path / "a", lora("0"), lora_alpha=1e39)
    with pytest.raises(ValueError, match="the alpha of 0 is 1e\\+39, expected a finite number that float32 holds"):
        lora_fast.load_adapter(nn.Sequential(nn.Linear(4, 4)), path)


@pytest.mark.parametrize("name", ["new/..", "..", "file/out", "dangling/out"])
def test_places_that_are_none(name: str, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", {"q.weight": W.clone()})
    adapter = adapter_folder(tmp_path / "a", lora("q"))
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    before = sorted(tmp_path.iterdir())
    for call in (
        lambda: merge_checkpoint(base, adapter, f"{tmp_path}/{name}"),
        lambda: lora_fast.convert_adapter(adapter, f"{tmp_path}/{name}", "mlx"),
    ):
        with pytest.raises((ValueError, OSError), match="expected a new name|(file|dangling): is no folder"):
            call()
    assert sorted(tmp_path.iterdir()) == before
