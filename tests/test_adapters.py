"""Adapters as PEFT's files: both ways with PEFT, bit for bit; damaged and hostile files change nothing."""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from file_helpers import read
from support import few_roundings
from torch import Tensor, nn

import lora_fast
from lora_fast.adapters import loading
from lora_fast.adapters.formats.peft import CONFIG_NAME, WEIGHTS_NAME

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
from safetensors.torch import load_file, save_file


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 20)
        self.v = nn.Linear(20, 12, bias=False)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.v(torch.tanh(self.q(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def base(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(1)
    return Model().to(dtype)


def adapted(dora: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    arguments = {"rank": 4, "alpha": 8, "scaling": "alpha/r", "targets": ["q", "v"], **options}
    model = lora_fast.apply(base(dtype), dora=dora, **arguments)
    torch.manual_seed(2)
    scramble(lora_fast.trainable_parameters(model))
    return model


def scramble(parameters: Any) -> None:
    """As if trained: no value is what an initialisation would give."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))


def snapshot(model: nn.Module) -> dict[str, tuple[Tensor, bool, type]]:
    """All that must be as it was: values, requires_grad, the modules' types."""
    state: dict[str, Any] = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    return state | {f"type of {name}": type(module) for name, module in model.named_modules()}


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    assert now.keys() == before.keys()
    for name, value in now.items():
        if isinstance(value, tuple):
            assert torch.equal(value[0], before[name][0]), name
            assert value[1] == before[name][1], name
        else:
            assert value is before[name], name


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """By the file's names, whichever library made the model."""
    names = {".lora_A.default.weight": ".lora_A", ".lora_B.default.weight": ".lora_B"}
    found = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.")
        if "lora_" in name or name.endswith(".magnitude"):
            for theirs, ours in {**names, ".lora_magnitude_vector.default.weight": ".magnitude"}.items():
                name = name.replace(theirs, ours)
            found[name] = parameter.detach()
    return found


def assert_same_adapters(a: nn.Module, b: nn.Module) -> None:
    first, second = adapters(a), adapters(b)
    assert first.keys() == second.keys()
    assert first
    for name, value in first.items():
        assert torch.equal(value.double(), second[name].double()), name


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ours_load_in_peft(dora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(dora, dtype).eval()
    lora_fast.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(dtype), tmp_path).eval()
    assert_same_adapters(model, theirs)
    x = torch.randn(5, 12, dtype=dtype)
    torch.testing.assert_close(theirs(x), model(x), **few_roundings(dtype))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("into", ["an adapted model", "a plain model"])
def test_peft_s_load_here(dora: bool, dtype: torch.dtype, into: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=dora, target_modules=["q", "v"], lora_dropout=0.25)
    theirs = peft.get_peft_model(base(dtype), config)
    scramble(p for name, p in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(str(tmp_path))
    model = base(dtype) if into == "a plain model" else adapted(dora, dtype, adapter_dtype=torch.float32)
    assert lora_fast.load_adapter(model, tmp_path) is model
    assert_same_adapters(theirs, model)
    assert isinstance(model.blocks[0].q, lora_fast.LinearWithDoRA) == dora
    if into == "a plain model":
        assert model.blocks[0].q.dropout == 0.25
        assert not model.head.weight.requires_grad
    x = torch.randn(5, 12, dtype=dtype)
    torch.testing.assert_close(model.eval()(x), theirs.eval()(x), **few_roundings(dtype))


def test_patterns_rslora_and_whole_modules_of_peft_load_here(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        use_dora=True,
        target_modules=r"blocks\.\d\.(q|v)",
        rank_pattern={r"blocks\.1\.q": 2},
        alpha_pattern={"v": 3.5},
        modules_to_save=["head"],
        bias="lora_only",
    )
    theirs = peft.get_peft_model(base(), config)
    scramble(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path))
    model = lora_fast.load_adapter(base(), tmp_path)
    assert_same_adapters(theirs, model)
    assert model.blocks[1].q.rank == 2
    assert model.blocks[0].v.scaling == 3.5 / 2
    assert model.head.weight.requires_grad
    x = torch.randn(5, 12)
    torch.testing.assert_close(model.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_patterns_rslora_heads_and_biases_go_to_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = lora_fast.apply(base(), 8, 16, scaling="alpha/sqrt(r)", targets=["blocks.0.q", "blocks.1.v"])
    lora_fast.apply(model, 3, 5, scaling="alpha/sqrt(r)", targets=["blocks.1.q"])
    model.head.requires_grad_(True)
    model.blocks[0].q.linear.bias.requires_grad_(True)
    scramble(p for p in model.parameters() if p.requires_grad)
    lora_fast.save_adapter(model, tmp_path)

    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 16, True)
    assert list(config["rank_pattern"].values()) == [3]
    assert config["modules_to_save"] == ["head"]
    x = torch.randn(5, 12)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert_same_adapters(model, theirs)
    torch.testing.assert_close(theirs(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    again = lora_fast.load_adapter(base(), tmp_path).eval()
    assert torch.equal(again(x), model(x))
    assert again.blocks[0].q.linear.bias.requires_grad


def test_saved_by_peft_again_the_tensors_are_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora_fast.save_adapter(adapted(), tmp_path / "ours")
    peft.PeftModel.from_pretrained(base(), tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("rank", "alpha", "lora_alpha"), [(4, 2.0, 8), (8, 0.5, 4), (3, 5 / 3, 5), (7, 0.1, None)])
def test_alpha_is_kept_to_the_bit(rank: int, alpha: float, lora_alpha: int | None, tmp_path: Path) -> None:
    lora_fast.save_adapter(adapted(rank=rank, alpha=alpha, scaling="alpha"), tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    if lora_alpha is not None:
        assert config["lora_alpha"] == lora_alpha
        assert isinstance(config["lora_alpha"], int)
    divisor = math.sqrt(rank) if config["use_rslora"] else rank
    assert config["lora_alpha"] / divisor == alpha
    assert read(tmp_path).layers["blocks.0.q"].scaling == alpha


def test_the_layers_that_peft_would_take_are_exactly_ours(tmp_path: Path) -> None:
    """`q` alone would also match blocks.1.q, which is not adapted."""
    peft = pytest.importorskip("peft")
    model = adapted(targets=["blocks.0.q", "blocks.0.v", "blocks.1.v"])
    lora_fast.save_adapter(model, tmp_path)
    assert_same_adapters(model, peft.PeftModel.from_pretrained(base(), tmp_path))


def test_values_are_those_saved_and_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    model = adapted()
    lora_fast.save_adapter(model, tmp_path / "new" / "folder")
    other = adapted()
    scramble(lora_fast.trainable_parameters(other))
    objects = list(map(id, other.parameters()))
    x = torch.randn(3, 12)
    other(x)  # keeps a norm, which must be forgotten
    lora_fast.load_adapter(other, tmp_path / "new" / "folder")
    assert list(map(id, other.parameters())) == objects
    assert torch.equal(other(x), model(x))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]


def test_a_compiled_model_has_the_names_of_its_module(tmp_path: Path) -> None:
    lora_fast.save_adapter(torch.compile(adapted(), backend="eager"), tmp_path)
    assert "base_model.model.blocks.0.q.lora_A.weight" in load_file(tmp_path / WEIGHTS_NAME)


def test_what_peft_cannot_say_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no LinearWithLoRA or LinearWithDoRA"):
        lora_fast.save_adapter(base(), tmp_path)
    with pytest.raises(ValueError, match="norm_axis='input'"):
        lora_fast.save_adapter(adapted(norm_axis="input"), tmp_path)
    with pytest.raises(ValueError, match="LoRA and with DoRA"):
        lora_fast.save_adapter(lora_fast.apply(adapted(targets=["q"]), 4, 8, dora=False, targets=["v"]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora_fast.save_adapter(adapted(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora_fast.save_adapter(adapted(rank=2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_values_that_the_layer_cannot_hold_are_refused(tmp_path: Path) -> None:
    lora_fast.save_adapter(adapted(), tmp_path)
    model = adapted(dtype=torch.bfloat16)
    before = snapshot(model)
    with pytest.raises(ValueError, match="torch.float32 that the model's torch.bfloat16 cannot hold"):
        lora_fast.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "alpha": 4}, "has shape"),
        ({"alpha": 9}, "scaling"),
        ({"dora": False}, "DoRA"),
        ({"targets": ["q"]}, "which is not adapted"),
        ({"targets": ["q", "v", "head"]}, "head of the model is not in the file"),
        ({"norm_axis": "input"}, "norm_axis='input'"),
    ],
    ids=["rank", "alpha", "kind", "fewer", "more", "axis"],
)
def test_another_model_is_refused_and_unchanged(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    lora_fast.save_adapter(adapted(), tmp_path)
    model = adapted(**options)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lora_fast.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_merged_layer_is_refused(tmp_path: Path) -> None:
    model = adapted()
    lora_fast.save_adapter(model, tmp_path)
    model.blocks[0].q.merge_()
    with pytest.raises(RuntimeError, match=r"blocks.0.q is merged"):
        lora_fast.load_adapter(model, tmp_path)


def test_a_plain_model_is_as_before_when_the_last_layer_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_fast.apply(base(), 4, 8, targets=["q"])
    lora_fast.save_adapter(lora_fast.apply(model, 2, 8, targets=["v"]), tmp_path)
    plain = base()
    before = snapshot(plain)
    real, calls = loading.LinearWithDoRA, []

    class Failing(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise MemoryError
            super().__init__(*args, **options)

    monkeypatch.setattr(loading, "LinearWithDoRA", Failing)
    with pytest.raises(MemoryError):
        lora_fast.load_adapter(plain, tmp_path)
    assert_unchanged(plain, before)


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG_NAME).read_text())
        (folder / CONFIG_NAME).write_text(json.dumps(config | values))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS_NAME).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS_NAME)

    return edit


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


class Bomb:
    """A pickle that leaves a file behind if it is ever loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(folder / "exploded")))


def pickle_by_name(folder: Path) -> None:
    (folder / WEIGHTS_NAME).write_bytes(pickle.dumps(Bomb(folder / "exploded")))


A = "base_model.model.blocks.0.q.lora_A.weight"
M = "base_model.model.blocks.0.q.lora_magnitude_vector"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated weights": (truncate(WEIGHTS_NAME, 0.9), "not a safetensors file, or not whole"),
    "truncated header": (truncate(WEIGHTS_NAME, 0.05), "not a safetensors file, or not whole"),
    "empty weights": (truncate(WEIGHTS_NAME, 0), "not a safetensors file, or not whole"),
    "huge header": (write(WEIGHTS_NAME, struct.pack("<Q", 2**60) + b"{}"), "not a safetensors file"),
    "random bytes": (write(WEIGHTS_NAME, bytes(range(256)) * 9), "not a safetensors file"),
    "pickle by that name": (pickle_by_name, "not a safetensors file"),
    "only a pickle": (only_a_pickle, "is a pickle, which can run code and is never loaded"),
    "truncated config": (truncate(CONFIG_NAME, 0.5), "is not JSON, or not whole"),
    "deep config": (write(CONFIG_NAME, b"[" * 200_000), "is not JSON"),
    "config is a list": (write(CONFIG_NAME, b"[]"), "expected an object"),
    "config is not text": (write(CONFIG_NAME, b"\xff\xfe\x00"), "is not text in UTF-8"),
    "another method": (edit_config(peft_type="LOHA"), "peft_type is 'LOHA'"),
    "another variant": (edit_config(use_qalora=True), "use_qalora is set"),
    "changed base": (edit_config(init_lora_weights="pissa"), "changes the base weight"),
    "no rank": (edit_config(r=None), "expected a positive integer"),
    "other rank": (edit_config(r=5), "is 5, but its lora_A"),
    "alpha is text": (edit_config(lora_alpha="8"), "expected a number"),
    "alpha is infinite": (edit_config(lora_alpha=10**400), "expected a finite number"),
    "alpha is NaN": (edit_config(lora_alpha=math.nan), "expected a finite number"),
    "endless pattern": (edit_config(alpha_pattern={"(?=(a+)+b)": 1}), "which is not supported"),
    "broken pattern": (edit_config(alpha_pattern={"(": 1}), "no regular expression"),
    "pattern is a list": (edit_config(rank_pattern=[1]), "expected an object"),
    "use_dora is text": (edit_config(use_dora="yes"), "expected true or false"),
    "no target": (edit_config(target_modules=["v"]), "target_modules does not name blocks.0.q"),
    "excluded": (edit_config(exclude_modules=["v"]), "exclude_modules names blocks.0.v"),
    "modules_to_save is text": (edit_config(modules_to_save="head"), "expected a list of names"),
    "no DoRA": (edit_config(use_dora=False), "has a magnitude, but use_dora is not set"),
    "no magnitude": (edit_tensors(lambda tensors: tensors.pop(M)), "has no magnitude"),
    "no lora_A": (edit_tensors(lambda tensors: tensors.pop(A)), "has no lora_A"),
    "no tensor": (edit_tensors(lambda tensors: tensors.clear()), "holds no lora_A"),
    "misshapen lora_A": (edit_tensors(lambda t: t.update({A: torch.ones(4, 13)})), r"\[4, 13\]"),
    "one-dimensional": (edit_tensors(lambda t: t.update({A: torch.ones(48)})), r"expected \[R, K\]"),
    "empty tensor": (edit_tensors(lambda t: t.update({A: torch.ones(4, 0)})), r"expected \[R, K\]"),
    "misshapen magnitude": (edit_tensors(lambda t: t.update({M: torch.ones(21)})), r"expected \[N\] = \[20\]"),
    "a row for a magnitude": (edit_tensors(lambda t: t.update({M: torch.ones(1, 20)})), r"expected \[N\] = \[20\]"),
    "integers": (edit_tensors(lambda t: t.update({A: torch.ones(4, 12, dtype=torch.int8)})), "torch.int8"),
    "another module": (
        edit_tensors(
            lambda t: t.update({key.replace("blocks.0.q", "blocks.7.q"): t.pop(key) for key in list(t) if "0.q" in key})
        ),
        "blocks.7.q is not in the model",
    ),
    "unknown part": (
        edit_tensors(lambda t: t.update({A.replace("lora_A", "lora_C"): torch.ones(1)})),
        "no part of LoRA or DoRA",
    ),
    "a base without an adapter": (
        edit_tensors(lambda t: t.update({"base_model.model.head.base_layer.weight": torch.ones(1)})),
        "has head.base_layer.weight, but no lora_A and lora_B of head",
    ),
    "unknown parameter": (
        edit_tensors(lambda t: t.update({"base_model.model.tail.weight": torch.ones(1)})),
        "tail.weight is not in the model",
    ),
    "misshapen parameter": (
        edit_tensors(lambda t: t.update({"base_model.model.head.weight": torch.ones(3, 13)})),
        "head.weight has shape",
    ),
}


@pytest.mark.parametrize("into", ["adapted", "plain"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_file_is_a_clear_error_and_changes_nothing(kind: str, into: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    lora_fast.save_adapter(adapted(), tmp_path)
    damage(tmp_path)
    model = base() if into == "plain" else adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        lora_fast.load_adapter(model, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert_unchanged(model, before)
    assert not (tmp_path / "exploded").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        lora_fast.load_adapter(base(), tmp_path)
    lora_fast.save_adapter(adapted(), tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS_NAME):
        lora_fast.load_adapter(base(), tmp_path)


def test_a_model_on_meta_is_refused(tmp_path: Path) -> None:
    lora_fast.save_adapter(adapted(), tmp_path)
    with torch.device("meta"):
        model = lora_fast.apply(Model(), 4, 2.0, targets=["q", "v"])
    with pytest.raises(ValueError, match="meta"):
        lora_fast.load_adapter(model, tmp_path)


def test_what_cannot_be_adapted_is_refused_with_its_name(tmp_path: Path) -> None:
    lora_fast.save_adapter(adapted(), tmp_path)
    model = base()
    model.blocks[1].v = nn.Conv1d(20, 12, 1)
    with pytest.raises(ValueError, match=r"blocks.1.v is a Conv1d"):
        lora_fast.load_adapter(model, tmp_path)
    model.blocks[1].v = nn.Bilinear(20, 20, 12)
    assert type(model.blocks[0].q) is nn.Linear
