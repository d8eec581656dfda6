"""Small files that would take much time or memory, or make another library fail: an error, at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
pytest.importorskip("yaml", reason="the adapters extra is not installed")
import torch
from file_helpers import SAMPLES, kohya_file, make_update, read, refused
from safetensors.torch import load_file, save_file

import lora_fast
from lora_fast import cli
from lora_fast.adapters import adapter
from lora_fast.merge_checkpoint import merge_checkpoint

LORA = "layers.0.attn.q_proj.lora_a.weight"


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    """Each of these took minutes, or gigabytes, before it was refused."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 30


def torchtune(folder: Path, content: Any = None) -> Path:
    for name in ("adapter_model.pt", "adapter_config.json"):
        shutil.copyfile(SAMPLES / "torchtune" / "epoch_0" / name, folder / name)
    if content is not None:
        torch.save(content, folder / "adapter_model.pt")
    return folder / "adapter_model.pt"


def litgpt(folder: Path, **settings: str) -> Path:
    """litgpt's folder with other lines in its settings, by file and key."""
    for name in ("lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"):
        lines = (SAMPLES / "litgpt" / name).read_bytes()
        if name.endswith(".yaml"):
            kept = [line for line in lines.decode().splitlines() if line.partition(":")[0] not in settings]
            lines = "\n".join(
                [*kept, *(f"{key}: {value}" for key, value in settings.items() if f"{key}:" in lines.decode())]
            ).encode()
        (folder / name).write_bytes(lines)
    return folder


def test_entries_of_an_archive_that_lie_on_one_another(tmp_path: Path) -> None:
    path = torchtune(tmp_path, {LORA: torch.zeros(2**16)})
    with zipfile.ZipFile(path) as archive:
        data = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
        entries = archive.infolist()
        content = path.read_bytes()
        start = archive.start_dir
    directory, count = b"", 0
    for info in [*entries, *[data] * 200]:
        name = info.filename if info is not data or count == 0 else info.filename.replace("data/0", f"data/{count}")
        count += info is data
        sizes = info.CRC, info.file_size, info.file_size, len(name)
        directory += struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, *[0] * 5, *sizes, *[0] * 5, info.header_offset)
        directory += name.encode()
    total = len(entries) + 200
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, total, total, len(directory), start, 0)
    path.write_bytes(content[:start] + directory + end)
    refused("bytes, and says that they are|not a file of torch.save", path)


@pytest.mark.parametrize("groups", ["1000000000", "1" + "0" * 30, "0x" + "f" * 300])
def test_sizes_that_no_model_has(groups: str, tmp_path: Path) -> None:
    refused(
        "lora_B of .* elements, expected at most|expected a positive integer", litgpt(tmp_path, n_query_groups=groups)
    )


def test_aliases_of_aliases(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    for key in ("lora_r", "n_head"):
        folder = tmp_path / key
        folder.mkdir()
        litgpt(folder, **{key: "*a11"})
        name = "hyperparameters.yaml" if key == "lora_r" else "model_config.yaml"
        text = (folder / name).read_text()
        (folder / name).write_text("\n".join([*lines, text]))
        refused(f"{key} is a list, expected", folder)


@pytest.mark.parametrize("value", ["!!int ''", "!!float ''", "!!bool foo", "!!timestamp x", "!!python/name:os.system"])
def test_tags_that_its_library_fails_on(value: str, tmp_path: Path) -> None:
    refused("is not YAML of plain values", litgpt(tmp_path, lora_r=value))


def test_a_factor_that_is_large_only_when_it_is_multiplied(tmp_path: Path) -> None:
    size = 40_000
    tensors = {
        "lora_down.weight": torch.ones(1, size, 1, 1), "lora_up.weight": torch.ones(4, 1, 1, 1),
        "lora_mid.weight": torch.ones(1, 1, 200, 200), "alpha": torch.tensor(1.0),
    }  # fmt: skip
    save_file({f"unet.a.{key}": value for key, value in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="lora_A of unet a with lora_mid has 1600000000 elements, expected at most"):
        lora_fast.convert_adapter(tmp_path / "a.safetensors", tmp_path / "out", "peft")
    tensors["lora_mid.weight"] = torch.ones(size, 1, 1, 1)
    save_file({f"unet.a.{key}": value for key, value in tensors.items()}, tmp_path / "b.safetensors")
    refused(
        r"with lora_mid \[40000, 1, 1, 1\], expected \[R, K, 1, …\] with \[R, R, \*kernel\]", tmp_path / "b.safetensors"
    )


@pytest.mark.parametrize("key", ["." * 40_000 + "x", "a\n\x1b[31mb.alpha", "x" * 200_000])
def test_names_that_are_none(key: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(1)}, tmp_path / "a.safetensors")
    refused("is no name of a tensor: it is too long, or has control characters", tmp_path / "a.safetensors")


def raw_file(path: Path, dtype: str, shape: list[int], size: int, key: str = "lora_unet_a.alpha") -> Path:
    header = json.dumps({key: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    return path


@pytest.mark.parametrize(
    ("dtype", "shape", "size"), [("F6_E2M3", [4], 3), ("F4", [3], 2), ("F4", [2], 1), ("C64", [1], 8)]
)
def test_dtypes_that_pytorch_lacks(dtype: str, shape: list[int], size: int, tmp_path: Path) -> None:
    refused("safetensors file|cannot be read|has dtype|shape", raw_file(tmp_path / "a.safetensors", dtype, shape, size))


@pytest.mark.parametrize("dtype", ["I32", "BOOL", "U8"])
def test_a_magnitude_of_integers(dtype: str, tmp_path: Path) -> None:
    update = make_update(6, 4, axis="output")
    tensors = {f"lora_unet_a.{key}": value for key, value in update.kohya().items()}
    kinds = {"I32": torch.int32, "BOOL": torch.bool, "U8": torch.uint8}
    tensors["lora_unet_a.dora_scale"] = torch.ones(6, 1, dtype=kinds[dtype])
    save_file(tensors, tmp_path / "a.safetensors")
    refused("dora_scale has dtype", tmp_path / "a.safetensors")


CONTENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "nested": (lambda: {LORA: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])}, "holds more than tensors"),
    "a number for a name": (lambda: {1: torch.ones(1)}, "1 is no name of a tensor"),
    "a parameter": (lambda: {LORA: torch.nn.Parameter(torch.ones(1))}, "holds more than tensors"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_tensors_that_are_none(kind: str, tmp_path: Path) -> None:
    content, message = CONTENTS[kind]
    refused(message, torchtune(tmp_path, content()))


def test_a_pickle_that_asks_for_memory(tmp_path: Path) -> None:
    """PyTorch's unpickler of plain tensors knows bytearray, of any number of zeros."""
    path = torchtune(tmp_path, {LORA: torch.ones(1)})
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            zeros = b"\x80\x02cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR."
            archive.writestr(name, zeros if name.endswith("data.pkl") else content)
    refused("holds more than tensors, and is not loaded: 'builtins bytearray'", path)


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", b"\x80\x02\x93."])
def test_a_damaged_pickle(content: bytes, tmp_path: Path) -> None:
    path = torchtune(tmp_path, {LORA: torch.ones(1)})
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, own in entries.items():
            archive.writestr(name, content if name.endswith("data.pkl") else own)
    refused("is not a file of torch.save, or not whole|holds more than tensors", path)


def test_a_block_diagonal_that_is_large_only_in_memory(tmp_path: Path) -> None:
    settings = {"n_head": "4194304", "head_size": "1", "n_query_groups": "1", "lora_r": "4096", "lora_query": "false"}
    folder = litgpt(tmp_path, **settings)
    factors = {"lora_A": torch.ones(4096, 1), "lora_B": torch.ones(1, 4096)}
    content = {f"transformer.h.0.attn.qkv.{key}": value for key, value in factors.items()}
    torch.save({"model": content}, folder / "lit_model.pth.lora")
    refused("lora_B of .* would have .* elements, expected at most", folder)


def test_many_block_diagonals_that_are_large_only_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "MAX_MADE", 2**22)
    settings = {"n_head": "262144", "head_size": "1", "n_query_groups": "1", "lora_r": "4", "lora_query": "false"}
    folder = litgpt(tmp_path, **settings)
    factors = {"lora_A": torch.ones(4, 1), "lora_B": torch.ones(1, 4)}
    for count in (3, 5):
        content = {
            f"transformer.h.{i}.attn.qkv.{key}": value.clone() for i in range(count) for key, value in factors.items()
        }
        torch.save({"model": content}, folder / "lit_model.pth.lora")
        if count == 3:
            assert len(read(folder).layers) == 3
    refused("its lora_B of qkv, each as one, have 4194336 elements, expected at most", folder)


def test_many_cores_that_are_large_only_together(tmp_path: Path) -> None:
    parts = {
        "lora_down.weight": torch.ones(1, 2**13, 1, 1), "lora_up.weight": torch.ones(4, 1, 1, 1),
        "lora_mid.weight": torch.ones(1, 1, 181, 181), "alpha": torch.tensor(1.0),
    }  # fmt: skip
    tensors = {f"unet.a.{i}.{key}": value.clone() for i in range(5) for key, value in parts.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    refused("its lora_A with their lora_mid have 1341890560 elements, expected at most", tmp_path / "a.safetensors")


def test_ranks_that_are_filled_up_to_one_that_is_large(tmp_path: Path) -> None:
    factors = {"a.b": (torch.ones(1, 2**20), torch.ones(2**20, 1)), "a.c": (torch.ones(1024, 1), torch.ones(1, 1024))}
    tensors = {
        f"unet.{name}.lora_{letter}.weight": factor
        for name, own in factors.items()
        for letter, factor in zip("AB", own, strict=True)
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match="filled with zeros up to the rank 1024 of the largest, have 2147483648 elements"
    ):
        lora_fast.convert_adapter(tmp_path / "a.safetensors", tmp_path / "out", "mlx")


def test_views_of_one_storage(tmp_path: Path) -> None:
    content = torch.load(SAMPLES / "torchtune" / "epoch_0" / "adapter_model.pt", weights_only=True)
    names = [name for name in content if name.endswith("lora_a.weight")]
    one = content[names[0]].clone()
    path = torchtune(tmp_path, content | dict.fromkeys(names[:8], one))
    refused("is larger than what is stored of it", path)


def test_a_name_that_stands_twice_among_many(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text("{" + ", ".join(f'"{index}": 0' for index in [*range(200_000), 199_999]) + "}")
    (tmp_path / "adapter_model.safetensors").touch()
    refused("the name '199999' stands twice", tmp_path)


def test_a_number_of_many_digits_in_litgpt_s_settings(tmp_path: Path) -> None:
    refused("has more than the 131072 bytes", litgpt(tmp_path, lora_alpha="1" + ":0" * 500_000))


def test_many_tensors_that_were_trained_outside(tmp_path: Path) -> None:
    names = [f"a.{index}" for index in range(40_000)]
    tensors = {f"base_model.model.{name}.weight": torch.ones(1) for name in names}
    tensors |= {
        "base_model.model.b.lora_A.weight": torch.ones(1, 4),
        "base_model.model.b.lora_B.weight": torch.ones(4, 1),
    }
    noted = json.dumps([f"{name}.weight" for name in names])
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"lora_fast.trained": noted})
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    before = time.monotonic()
    assert len(read(tmp_path).trained) == 40_000
    assert time.monotonic() - before < 5


def test_keys_beside_litgpt_s_model(tmp_path: Path) -> None:
    folder = litgpt(tmp_path)
    content = torch.load(folder / "lit_model.pth.lora", weights_only=True)
    torch.save(content | {"extra": torch.ones(1)}, folder / "lit_model.pth.lora")
    refused("alone or as its only entry, 'model'", folder)


def test_two_adapters_in_one_folder(tmp_path: Path) -> None:
    folder = litgpt(tmp_path)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused("say which of the two to read", folder)


def test_notes_and_configurations_of_other_kinds(tmp_path: Path) -> None:
    name = "base_model.model.a"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 4), f"{name}.lora_B.weight": torch.ones(6, 1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"lora_fast.trained": "[" * 100_000})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refused("its note lora_fast.trained is", tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for dropout in ([], {"a": 1}, 10**400, -1, "x"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": dropout or [1]}))
        with pytest.raises(ValueError, match="lora_dropout is"):
            lora_fast.convert_adapter(tmp_path, tmp_path / "out", "mlx")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "x" * 10**6}))
    refused("peft_type is 'x+', expected 'LORA'", tmp_path)


def test_a_configuration_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: no such file"):
        read(tmp_path)


@pytest.mark.parametrize("shape", [[0], [0, 4], [6, 0], [], [6]])
def test_weights_without_elements(shape: list[int], tmp_path: Path) -> None:
    adapter = kohya_file(tmp_path / "a.safetensors", {"a": make_update(6, 4)})
    save_file({"a.weight": torch.zeros(shape)}, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=r"a\.weight has shape .*, expected a weight \[N, K\]"):
        merge_checkpoint(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match=r"has an update \[N, K\] = \[6, 4\] for a, which has \["):
        lora_fast.convert_adapter(
            adapter, tmp_path / "out.safetensors", "kohya", base=tmp_path / "base.safetensors", as_difference=True
        )


def test_a_fused_weight_with_too_few_rows(tmp_path: Path) -> None:
    parts = {
        f"transformer_blocks.0.attn.{part}": make_update(8, 8, seed=i)
        for i, part in enumerate(("to_q", "to_k", "to_v"))
    }
    adapter = kohya_file(tmp_path / "a.safetensors", parts, prefix="lora_transformer_")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(8, 8)}, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=re.escape("a weight [8, 8] does not hold the rows of 3 others")):
        merge_checkpoint(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")


def pipeline(folder: Path) -> tuple[Path, Path]:
    update = make_update(6, 4)
    (folder / "base" / "unet").mkdir(parents=True)
    (folder / "base" / "vae").mkdir()
    (folder / "base" / "model_index.json").write_text("{}")
    save_file({"a.weight": update.weight}, folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({"b.weight": torch.ones(1)}, folder / "base" / "vae" / "diffusion_pytorch_model.safetensors")
    return folder / "base", kohya_file(folder / "a.safetensors", {"a": update}, prefix="lora_unet_")


@pytest.mark.parametrize("inside", ["out", "vae/out", "unet/out"])
def test_out_in_base(inside: str, tmp_path: Path) -> None:
    base, adapter = pipeline(tmp_path)
    before = sorted(base.rglob("*"))
    with pytest.raises(ValueError, match="lies in .*base, which is copied"):
        merge_checkpoint(base, adapter, base / inside)
    assert sorted(base.rglob("*")) == before


def test_other_weights_of_a_pipeline_are_not_copied(tmp_path: Path) -> None:
    base, adapter = pipeline(tmp_path)
    for name in ("sd_xl_base_1.0.safetensors", "v1-5.ckpt", "unet/model.safetensors.index.fp16.json"):
        (base / name).write_bytes(b"{}")
    done = merge_checkpoint(base, adapter, tmp_path / "out")
    assert done.not_copied == ["sd_xl_base_1.0.safetensors", "unet/model.safetensors.index.fp16.json", "v1-5.ckpt"]
    assert not any((tmp_path / "out" / name).exists() for name in done.not_copied)
    assert "has 'lora_unet', which is taken for unet of" in done.notes[0]


def test_what_another_run_left_is_not_deleted(tmp_path: Path) -> None:
    base, adapter = pipeline(tmp_path)
    left = tmp_path / f".out.{os.getpid()}.part"
    left.mkdir()
    (left / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="is left from another run"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert (left / "mine").read_text() == "x"


def test_folders_made_for_out_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = pipeline(tmp_path)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_fast.merge_checkpoint.checkpoints.write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(base, adapter, tmp_path / "new" / "folders" / "out")
    assert not (tmp_path / "new").exists()


def test_a_link_to_nothing_in_base(tmp_path: Path) -> None:
    base, adapter = pipeline(tmp_path)
    (base / "vae" / "gone.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"gone\.json: .*No such file") as caught:
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert len(str(caught.value)) < 300
    assert not (tmp_path / "out").exists()


def test_a_failing_load_draws_no_random_numbers(tmp_path: Path) -> None:
    updates = {"0": make_update(6, 4), "1": make_update(6, 5)}
    adapter = kohya_file(tmp_path / "a.safetensors", updates)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 6)).double()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="the model's weight"):
        lora_fast.load_adapter(model, adapter)
    assert torch.equal(torch.get_rng_state(), state)
    tensors = {key: value for key, value in load_file(adapter).items() if "_0." in key}
    save_file(tensors, adapter)
    lora_fast.load_adapter(model, adapter)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupted_conversion_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_fast.adapters.convert_adapter", interrupted)
    out = tmp_path / "out.safetensors"
    assert cli.main(["convert", "a", str(out), "--to", "kohya"]) == 130
    assert capsys.readouterr().err == f"lora-fast: interrupted; {out} was not made\n"
