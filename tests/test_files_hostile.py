"""Broken, truncated and hostile files of every format: a clear error, and model and disk as they were."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
pytest.importorskip("yaml", reason="the adapters extra is not installed")
import torch
from file_helpers import SAMPLES, base_file, kohya_file, make_update
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fast
from lora_fast import cli
from lora_fast.merge_checkpoint import merge_checkpoint

UPDATES = {"0": make_update(6, 4, axis="output", dtype=torch.float32)}
DOWN, UP, ALPHA, SCALE = (f"lycoris_0.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale"))


def good(folder: Path) -> Path:
    return kohya_file(folder / "a.safetensors", UPDATES)


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return damage


def with_header(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Another header, of its own length, before the same tensors."""

    def damage(path: Path) -> None:
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = change(content[8 : 8 + size].decode()).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])

    return damage


def with_metadata(**metadata: str) -> Callable[[Path], None]:
    return lambda path: save_file(load_file(path), path, metadata)


def update(**tensors: Tensor) -> Callable[[Path], None]:
    return with_tensors(
        lambda old: old.update({f"lycoris_0.{key.replace('__', '.')}": value for key, value in tensors.items()})
    )


def twice(header: str) -> str:
    entry = header[header.index('"lycoris_0.alpha"') : header.index("}", header.index('"lycoris_0.alpha"')) + 1]
    return "{" + entry + "," + header.lstrip("{").rstrip()


TWO_KINDS = ("transformer_transformer_blocks_0_q.alpha", "transformer.a.alpha")
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not a safetensors file, or not whole"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a safetensors file, or not whole"),
    "huge header": (lambda path: path.write_bytes(struct.pack("<Q", 2**62) + b"{}"), "not a safetensors file"),
    "a pickle by that name": (lambda path: path.write_bytes(pickle.dumps({})), "not a safetensors file"),
    "a key twice": (with_header(twice), "not a safetensors file|stands twice"),
    "nothing": (with_tensors(lambda old: old.clear()), "holds no LoRA: it is empty"),
    "alpha NaN": (update(alpha=torch.tensor(float("nan"))), "the alpha of lycoris 0 is nan, expected a finite number"),
    "alpha infinite": (update(alpha=torch.tensor(float("inf"))), "expected a finite number"),
    "alpha 0": (update(alpha=torch.tensor(0.0)), "the alpha of lycoris 0 is 0"),
    "two alphas": (update(alpha=torch.ones(2)), r"the alpha of lycoris 0 has shape \[2\]"),
    "alpha is a truth value": (update(alpha=torch.tensor(True)), "alpha has dtype torch.bool"),
    "no up": (with_tensors(lambda old: old.pop(UP)), "lycoris 0 has .*, but no lora_B"),
    "only alpha": (
        with_tensors(lambda old: [old.pop(key) for key in (UP, DOWN, SCALE)]),
        "lycoris 0 has alpha, but no lora_A and no lora_B",
    ),
    "only a magnitude": (
        with_tensors(lambda old: [old.pop(key) for key in (UP, DOWN, ALPHA)]),
        "lycoris 0 has dora_scale, but no lora_A and no lora_B",
    ),
    "other rank": (update(lora_up__weight=torch.ones(6, 3)), r"lora_A \[2, 4\] and lora_B \[6, 3\]"),
    "rank 0": (update(lora_up__weight=torch.ones(6, 0), lora_down__weight=torch.ones(0, 4)), r"expected \[R, K\]"),
    "scalar factor": (update(lora_down__weight=torch.tensor(1.0)), r"expected \[R, K\]"),
    "integer factor": (update(lora_down__weight=torch.ones(2, 4, dtype=torch.int8)), "dtype torch.int8"),
    "eight bits": (update(lora_down__weight=torch.ones(2, 4).to(torch.float8_e4m3fn)), "dtype torch.float8_e4m3fn"),
    "misshapen core": (update(lora_mid__weight=torch.ones(3, 2, 3, 3)), r"lora_mid \[3, 2, 3, 3\]"),
    "empty magnitude": (update(dora_scale=torch.ones(0)), r"has shape \[0\]"),
    "factors of two conventions": (update(lora_A__weight=torch.ones(2, 4)), "lycoris_0 has two lora_A"),
    "a difference too": (update(diff=torch.ones(6, 4)), "lycoris 0 has LoRA and a difference of its weight too"),
    "two magnitudes": (update(magnitude=torch.ones(6)), "has two magnitudes"),
    "unknown key": (
        with_tensors(lambda old: old.update({"lycoris_0.lora_C": torch.ones(1)})),
        "no part of LoRA or DoRA",
    ),
    "key without a module": (with_tensors(lambda old: old.update({"alpha": torch.ones(1)})), "no part of LoRA or DoRA"),
    "names of two kinds": (
        with_tensors(lambda old: old.update({key: torch.ones(1) for key in TWO_KINDS})),
        "has names of transformer with dots and with _ for them",
    ),
    "a module under two names": (
        with_tensors(lambda old: old.update({f"lora_unet{mark}a_b.alpha": torch.ones(1) for mark in "._"})),
        "lora_unet_a_b under two names|lora_unet.a_b under two names",
    ),
    "arguments are not JSON": (
        with_metadata(ss_network_module="lycoris.kohya", ss_network_args="{"),
        "its network arguments: is not JSON",
    ),
    "arguments are a list": (
        with_metadata(ss_network_module="lycoris.kohya", ss_network_args="[]"),
        "its network arguments: holds a JSON list",
    ),
    "deep metadata": (with_metadata(lycoris_config="[" * 100_000), "its network arguments: is not JSON"),
    "config of OneTrainer is not JSON": (with_metadata(ot_config="no"), "its ot_config: is not JSON"),
    "header of diffusers is not JSON": (
        with_metadata(lora_adapter_metadata="no"),
        "lora_adapter_metadata: is not JSON",
    ),
    "rank in the header is text": (
        with_metadata(lora_adapter_metadata='{"r": "2", "lora_alpha": 1, "use_dora": false}'),
        "the rank of 0 is '2', expected a positive integer",
    ),
    "a dora_scale beside PEFT's header": (
        with_metadata(lora_adapter_metadata='{"r": 2, "lora_alpha": 3, "use_dora": true}'),
        "has a dora_scale, expected lora_magnitude_vector",
    ),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_file_changes_nothing(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGE[kind]
    path = good(tmp_path)
    base = base_file(tmp_path / "base.safetensors", UPDATES)
    if kind == "rank in the header is text":
        with_tensors(lambda old: [old.pop(key) for key in (ALPHA, SCALE)])(path)
    damage(path)
    plain = model()
    before, on_disk, seed = plain.state_dict(), everything(tmp_path), torch.get_rng_state()
    before = {key: tensor.clone() for key, tensor in before.items()}
    calls: list[Callable[[], object]] = [
        lambda: lora_fast.load_adapter(plain, path),
        lambda: merge_checkpoint(base, path, tmp_path / "out.safetensors"),
        lambda: lora_fast.convert_adapter(path, tmp_path / "out", "peft", base=base),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert str(path) in str(caught.value)
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(plain.state_dict()[key], tensor) for key, tensor in before.items())
    assert everything(tmp_path) == on_disk
    assert torch.equal(torch.get_rng_state(), seed)
    assert cli.main(["merge", str(base), str(path), str(tmp_path / "out.safetensors")]) == 2
    assert capsys.readouterr().err.strip().startswith("lora-fast: error: ")
    assert cli.main(["inspect", str(path)]) in (1, 2)  # it shows what can be shown


def test_flipped_bytes_are_an_error_or_another_file_but_never_a_crash(tmp_path: Path) -> None:
    content = good(tmp_path).read_bytes()
    generator = random.Random(0)
    path = tmp_path / "flipped.safetensors"
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            lora_fast.load_adapter(model(), path)
        except (ValueError, OSError):
            refused += 1
    assert refused > 200  # most bytes of so small a file are its header


def test_nan_is_not_written_into_a_checkpoint(tmp_path: Path) -> None:
    path = good(tmp_path)
    base = base_file(tmp_path / "base.safetensors", UPDATES)
    update(lora_up__weight=torch.full((6, 2), float("nan")))(path)
    with pytest.raises(ValueError, match=r"has NaN or infinity for 0\.weight"):
        merge_checkpoint(base, path, tmp_path / "out.safetensors")


class Bomb:
    """A pickle that leaves a file behind if it is ever loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def torchtune(folder: Path) -> Path:
    """torchtune's own file, and the configuration beside it."""
    for name in ("adapter_model.pt", "adapter_config.json"):
        (folder / name).write_bytes((SAMPLES / "torchtune" / "epoch_0" / name).read_bytes())
    return folder / "adapter_model.pt"


def compressed(path: Path) -> None:
    """The same archive, compressed, with a gigabyte of zeros for a tensor."""
    entries = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            entries[info.filename] = archive.read(info)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, bytes(2**26) if name.endswith("data/0") else content)


def saved(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


LORA = "layers.0.attn.q_proj.lora_a.weight"
PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-300]), "is not a file of torch.save, or not whole"),
    "compressed": (compressed, "is compressed, which torch.save never does"),
    "not a zip": (lambda path: path.write_bytes(pickle.dumps({})), "is not a file of torch.save"),
    "of long ago": (
        lambda path: torch.save({LORA: torch.ones(1)}, path, _use_new_zipfile_serialization=False),
        "is not a file of torch.save",
    ),
    "an array": (saved(torch.ones(3)), "holds a Tensor, expected a dict of tensors by name"),
    "a list": (saved([torch.ones(3)]), "holds a list, expected a dict"),
    "numbers": (saved({LORA: 3}), "is 3, expected a dense tensor"),
    "nested": (saved({LORA: {"a": torch.ones(1)}}), "is a dict, expected a dense tensor"),
    "sparse": (saved({LORA: torch.eye(3).to_sparse()}), "holds more than tensors"),
    "without values": (saved({LORA: torch.ones(3, device="meta")}), "holds more than tensors"),
    "larger than what is stored": (saved({LORA: torch.ones(1).expand(2**40, 2**20)}), "is larger than what is stored"),
    "an optimizer's": (saved({"state": torch.ones(3)}), "state is no part of LoRA or DoRA as torchtune names it"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_bad_pickle_is_an_error(kind: str, tmp_path: Path) -> None:
    path = torchtune(tmp_path)
    damage, message = PICKLES[kind]
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        lora_fast.load_adapter(model(), path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("inside", [True, False])
def test_code_in_a_pickle_never_runs(inside: bool, tmp_path: Path) -> None:
    path = torchtune(tmp_path)
    bomb = Bomb(tmp_path / "exploded")
    if inside:
        torch.save({LORA: torch.ones(1), "bomb": bomb}, path)
    else:
        path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match="holds more than tensors, and is not loaded|is not a file of torch.save"):
        lora_fast.load_adapter(model(), path)
    for name in ("adapter.bin", "adapter.ckpt", "adapter.pth"):
        (tmp_path / name).write_bytes(path.read_bytes())
        with pytest.raises(ValueError, match="is a pickle, which can run code and is never loaded"):
            lora_fast.load_adapter(model(), tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = torchtune(tmp_path)
    monkeypatch.setattr("lora_fast.adapters.reading.MAX_PICKLE_BYTES", 1000)
    with pytest.raises(ValueError, match="bytes, expected at most 1000"):
        lora_fast.load_adapter(model(), path)


SETTINGS = [
    "no",
    "[1]",
    "lora_r: -1",
    "lora_r: x",
    "lora_alpha: .nan",
    "lora_query: 1",
    "{",
    "!!python/object:os.system {}",
]


@pytest.mark.parametrize("text", SETTINGS)
def test_bad_settings_of_litgpt_are_an_error(text: str, tmp_path: Path) -> None:
    for name in ("lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"):
        (tmp_path / name).write_bytes((SAMPLES / "litgpt" / name).read_bytes())
    settings = (tmp_path / "hyperparameters.yaml").read_text()
    key = text.partition(":")[0]
    kept = "".join(line for line in io.StringIO(settings) if not line.startswith(key)) if ": " in text[:13] else ""
    (tmp_path / "hyperparameters.yaml").write_text(kept + text)
    with pytest.raises(ValueError, match="hyperparameters.yaml"):
        lora_fast.load_adapter(model(), tmp_path)


@pytest.mark.parametrize("kind", ["mlx", "torchtune"])
@pytest.mark.parametrize("value", ["x", None, True, [1], {}, float("nan"), 10**400, -1])
def test_bad_numbers_in_a_configuration_are_an_error(value: Any, kind: str, tmp_path: Path) -> None:
    if kind == "mlx":
        save_file({"a.lora_a": torch.ones(4, 2), "a.lora_b": torch.ones(2, 6)}, tmp_path / "adapters.safetensors")
        config: dict[str, Any] = {"fine_tune_type": "lora", "lora_parameters": {"scale": value, "dropout": 0.0}}
        path, message = tmp_path, "scale|rank"
        if value == -1:
            config["lora_parameters"] = {"scale": 1.0, "dropout": float("inf")}
            message = "dropout"
    else:
        path, message = torchtune(tmp_path), r"r is|has rank"
        config = {"peft_type": "LORA", "r": value, "lora_alpha": 7}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        lora_fast.load_adapter(model(), path)
