"""lora-fast merge: right to one rounding, everything else to the byte, little memory, and never half a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast
from lora_fast import cli, reference
from lora_fast.adapters.formats.peft import CONFIG_NAME, WEIGHTS_NAME
from lora_fast.merge_checkpoint import merge_checkpoint

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
pytest.importorskip("rich", reason="the adapters extra is not installed")
from safetensors.torch import load_file, save_file


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 40, bias=False), nn.Linear(40, 5)).to(dtype)


def checkpoint(folder: Path, dtype: torch.dtype = torch.float32, shards: int = 2) -> Path:
    """A folder as transformers leaves it, with what must be copied and what must not."""
    folder.mkdir(parents=True)
    tensors = model(dtype).state_dict()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {key: f"model-{1 + index % shards:05}.safetensors" for index, key in enumerate(tensors)}
        for name in set(weight_map.values()):
            part = {key: tensors[key] for key in tensors if weight_map[key] == name}
            save_file(part, folder / name, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "original").mkdir()
    return folder


def adapter(folder: Path, dora: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    adapted = lora_fast.apply(model(dtype), 4, 8, dora=dora, scaling="alpha/r", targets=["0", "1"], **options)
    with torch.no_grad():
        for parameter in lora_fast.trainable_parameters(adapted):
            parameter.add_(0.1 * torch.randn_like(parameter))
    lora_fast.save_adapter(adapted, folder)
    return adapted


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layer_is_that_of_merged(shards: int, dora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base, out = checkpoint(tmp_path / "base", dtype, shards), tmp_path / "new" / "out"
    adapted = adapter(tmp_path / "adapter", dora, dtype, adapter_dtype=torch.float32)
    seen: list[tuple[str, float]] = []
    done = merge_checkpoint(base, tmp_path / "adapter", out, lambda *progress: seen.append(progress))
    assert (done.merged, done.replaced, done.kept, done.left_out) == (2, 0, 3, [])
    assert done.not_copied == ["original", "pytorch_model.bin"]
    before, after = tensors_of(base), tensors_of(out)
    assert after.keys() == before.keys()
    for name in ("0", "1"):
        assert torch.equal(after[f"{name}.weight"], getattr(adapted, name).merged().weight)
    for key in ("0.bias", "2.weight", "2.bias"):
        assert torch.equal(after[key], before[key])
    weights = [path.name for path in base.iterdir() if path.suffix == ".safetensors"]
    kept = [path.name for path in base.iterdir() if path.suffix == ".json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(weights + kept)
    assert [name for name, fraction in seen if fraction == 1.0][-1] == max(weights)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_an_adapter_s_configuration_is_not_copied(base: Path, tmp_path: Path) -> None:
    """transformers would take OUT for an adapter of BASE."""
    adapter(base)
    done = merge_checkpoint(base, base, tmp_path / "out")
    assert CONFIG_NAME in done.not_copied
    assert not (tmp_path / "out" / CONFIG_NAME).exists()


def test_out_can_be_the_working_directory_but_no_link(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tmp_path / "adapter")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="is a symbolic link"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "link")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    merge_checkpoint(base, tmp_path / "adapter", ".")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_whole_modules_and_biases_are_replaced(base: Path, tmp_path: Path) -> None:
    adapted = lora_fast.apply(model(), 4, 8, targets=["0", "1"])
    adapted[2].requires_grad_(True)
    adapted[0].linear.bias.requires_grad_(True)
    with torch.no_grad():
        adapted[2].weight.add_(1)
        adapted[0].linear.bias.add_(1)
    lora_fast.save_adapter(adapted, tmp_path / "adapter")
    assert merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out").replaced == 3
    after = tensors_of(tmp_path / "out")
    assert torch.equal(after["2.weight"], adapted[2].weight)
    assert torch.equal(after["0.bias"], adapted[0].linear.bias)


@pytest.mark.parametrize("added", ["transformer.", ""])
def test_a_base_model_s_own_prefix(added: str, tmp_path: Path) -> None:
    """The checkpoint says 0.weight or bert.0.weight where the adapter says transformer.0 or 0."""
    base = checkpoint(tmp_path / "base", shards=1)
    if not added:
        save_file(
            {f"bert.{key}": value for key, value in tensors_of(base).items()},
            base / "model.safetensors",
        )
    wrapped = nn.ModuleDict({"transformer": model()}) if added else model()
    lora_fast.apply(wrapped, 4, 8, targets=["transformer.0" if added else "0"])
    lora_fast.save_adapter(wrapped, tmp_path / "adapter")
    assert merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out").merged == 1


def peft_layers() -> tuple[nn.Module, dict[str, bool]]:
    """Layers of every layout that PEFT knows, and whether their weight is stored [in, out]."""
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.square, self.wide = conv1d(8, 8), conv1d(12, 8)
            self.words = nn.Embedding(11, 8)
            self.line, self.plane = nn.Conv1d(6, 8, 3), nn.Conv2d(6, 8, 3)

        def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
            y = self.wide(self.square(self.words(tokens)))
            return y.sum() + self.line(image[:, :, 0]).sum() + self.plane(image).sum()

    return Layers(), {"square": True, "wide": True, "words": True, "line": False, "plane": False}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_conv1d_embeddings_and_convolutions_of_peft(dora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    layers, transposed = peft_layers()
    (tmp_path / "base").mkdir()
    save_file(layers.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": false}')
    config = peft.LoraConfig(
        r=3, lora_alpha=6, use_dora=dora, target_modules=list(transposed), fan_in_fan_out=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(layers, config)
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", fan_in_fan_out=["square"])
    after = tensors_of(tmp_path / "out")
    expected = theirs.merge_and_unload()
    for name in transposed:
        torch.testing.assert_close(after[f"{name}.weight"], expected.get_submodule(name).weight, rtol=1e-5, atol=1e-6)


def test_the_gain_is_not_rounded_to_bfloat16(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", torch.bfloat16)
    adapted = adapter(tmp_path / "adapter", True, torch.bfloat16, adapter_dtype=torch.float32)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    layer = adapted[0]
    V = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    norm = reference.weight_norm(layer.weight.double(), layer.lora_A.double(), layer.lora_B.double(), layer.scaling)
    truth = (layer.magnitude.double() / norm)[:, None] * V
    error = (tensors_of(tmp_path / "out")["0.weight"].double() - truth).abs()
    assert bool((error <= 2**-8 * truth.abs() + 1e-9).all())


def test_memory_is_a_tensor_and_not_the_checkpoint(tmp_path: Path) -> None:
    """Eight layers of 16 MiB in one file: the peak must stay far under the 128 MiB of the shard."""
    (tmp_path / "base").mkdir()
    layers = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))
    save_file(layers.state_dict(), tmp_path / "base" / "model.safetensors")
    lora_fast.save_adapter(lora_fast.apply(layers, 2, 4), tmp_path / "adapter")
    code = (
        "import sys, lora_fast, safetensors.torch\n"
        "from lora_fast.merge_checkpoint import merge_checkpoint\n"
        "import torch; a = torch.randn(64, 64)\n"
        "lora_fast.functional.weight_norm(a, a[:2].clone(), a[:, :2].clone(), 1.0)\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "kib = lambda name: int(next(l for l in open('/proc/self/status') if l.startswith(name)).split()[1])\n"
        "before = kib('VmRSS')\n"
        "merge_checkpoint(*sys.argv[1:])\n"
        "print(kib('VmHWM') - before)\n"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("base", "adapter", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 * 1024  # less than a tensor beside the one that is written, with room


@pytest.mark.parametrize("how", ["raise", "interrupt"])
def test_what_fails_midway_leaves_nothing(how: str, base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    before = sorted(path.name for path in tmp_path.iterdir())

    def stop(shard: str, fraction: float) -> None:
        if shard.startswith("model-00002") and fraction > 0:
            raise KeyboardInterrupt if how == "interrupt" else OSError("disk full")

    with pytest.raises(KeyboardInterrupt if how == "interrupt" else OSError):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_killed_midway_it_leaves_no_out(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    code = (
        "import sys, time\n"
        "from lora_fast.merge_checkpoint import merge_checkpoint\n"
        "def wait(shard, fraction):\n"
        "    if fraction > 0.5: print('half', flush=True); time.sleep(60)\n"
        "merge_checkpoint(*sys.argv[1:], wait)\n"
    )
    command = [sys.executable, "-c", code, *(str(path) for path in (base, tmp_path / "adapter", tmp_path / "out"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out").merged == 2


def edit_json(name: str, **values: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "base" / name).read_text())
        (folder / "base" / name).write_text(json.dumps(content | values))

    return edit


def edit_shards(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        for path in (folder / "base").glob("*.safetensors"):
            tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
            change(tensors)
            save_file(tensors, path)

    return edit


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5])


INDEX = "model.safetensors.index.json"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (cut("base/model-00002.safetensors"), "not a safetensors file, or not whole"),
    "truncated adapter": (cut(f"adapter/{WEIGHTS_NAME}"), "not a safetensors file, or not whole"),
    "truncated config": (cut(f"adapter/{CONFIG_NAME}"), "is not JSON"),
    "truncated index": (cut(f"base/{INDEX}"), "is not JSON"),
    "a shard is missing": (lambda folder: (folder / "base/model-00002.safetensors").unlink(), "no such file"),
    "no checkpoint": (lambda folder: [path.unlink() for path in (folder / "base").glob("model*")], "pickles above all"),
    "a path in the index": (edit_json(INDEX, weight_map={"0.weight": "../model.safetensors"}), "in the same folder"),
    "an index of lists": (edit_json(INDEX, weight_map=["0.weight"]), "not an object of file names"),
    "a key in the wrong shard": (
        edit_json(INDEX, weight_map={"9.weight": "model-00001.safetensors"}),
        "9.weight is not in model-00001",
    ),
    "quantised": (edit_json("config.json", quantization_config={"bits": 4}), "is quantised"),
    "integers": (
        edit_shards(lambda t: t.update({k: t[k].to(torch.int8) for k in t if k == "0.weight"})),
        "0.weight has dtype I8",
    ),
    "other shape": (
        edit_shards(lambda t: t.update({k: torch.ones(24, 41) for k in t if k == "0.weight"})),
        r"for 0.weight, which has \[24, 41\]",
    ),
    "transposed": (
        edit_shards(lambda t: t.update({k: torch.ones(40, 24) for k in t if k == "0.weight"})),
        r"for 0.weight, which has \[40, 24\]",
    ),
    "another model": (
        lambda folder: [
            edit_shards(lambda t: t.update({f"z.{k}.y": t.pop(k) for k in list(t)}))(folder),
            (folder / "base" / INDEX).unlink(),
            (folder / "base" / "model-00002.safetensors").unlink(),
        ],
        "2 of the adapter's tensors not in the checkpoint",
    ),
    "tied": (
        edit_json("config.json", tie_word_embeddings=True, vocab_size=24),
        "0.weight may be tied to the output head",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_file_is_a_clear_error_and_nothing_is_written(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGE[kind]
    adapter(tmp_path / "adapter")
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert cli.main(["merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("lora-fast: error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path / "adapter")
    arguments = ["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert "2 tensors merged, 0 replaced, 3 kept as they were" in said.out
    assert "not copied" in said.out
    assert "pytorch_model.bin" in said.out
    assert "model-00002.safetensors" in said.err
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_interrupted_command_says_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lora_fast.merge_checkpoint as module

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    adapter(tmp_path / "adapter")
    monkeypatch.setattr(module.checkpoints, "write_shard", interrupted)
    assert cli.main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]) == 130
    assert "was not made" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
