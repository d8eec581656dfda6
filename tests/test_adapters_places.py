"""Adapters of models that are wrapped, share modules and weights, or train more than PEFT's lists of names can say."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel
from toy_folders import MERGED, W, adapter_folder, lora

import lora_fast
from lora_fast.adapters.formats.peft import CONFIG_NAME, WEIGHTS_NAME


def scramble(model: nn.Module) -> nn.Module:
    """As if trained: whatever requires grad has values that no initialisation gives."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def blocks(double: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)), nn.Linear(4, 3))
    return model.double() if double else model


def compiled_block(model: nn.Module) -> nn.Module:
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[index, operator]
    return model


def checkpointed_block(model: nn.Module) -> nn.Module:
    model[0] = checkpoint_wrapper(model[0])  # type: ignore[index, operator]
    return model


def checkpointed_linear(model: nn.Module) -> nn.Module:
    model[1][0] = offload_wrapper(model[1][0])  # type: ignore[index, operator]
    return model


def compiled_and_checkpointed(model: nn.Module) -> nn.Module:
    model[0] = torch.compile(checkpoint_wrapper(model[0]), backend="eager")  # type: ignore[index, operator]
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a compiled block": compiled_block,
    "a checkpointed block": checkpointed_block,
    "a checkpointed linear": checkpointed_linear,
    "both, and compiled": compiled_and_checkpointed,
    "averaged": AveragedModel,
    "data parallel": nn.DataParallel,
}
NAMES = {
    f"base_model.model.{name}.{part}"
    for name in ("0.0", "1.0")
    for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
} | {"base_model.model.2.weight", "base_model.model.2.bias"}


def trained() -> nn.Module:
    model = lora_fast.apply(blocks(), 2, 4.0, targets=["0.0", "1.0"])
    model[2].requires_grad_(True)
    return scramble(model)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("when", ["adapted first", "wrapped first"])
def test_the_file_has_the_model_s_names(wrapper: str, when: str, tmp_path: Path) -> None:
    wrap = WRAPPERS[wrapper]
    if when == "adapted first":
        model = wrap(trained())
    else:
        model = lora_fast.apply(wrap(blocks()), 2, 4.0, targets=["0.0", "1.0"])
        list(model.modules())[-1].requires_grad_(True)
        scramble(model)
    lora_fast.save_adapter(model, tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / WEIGHTS_NAME).keys() == NAMES
    x = torch.randn(5, 4)
    plain = lora_fast.load_adapter(blocks(), tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(x), model.eval()(x))
    again = lora_fast.load_adapter(wrap(blocks()), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(x), model(x))


def test_a_module_of_the_user_s_own_called_module_is_no_wrapper(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = blocks()
            self._orig_mod = nn.Linear(4, 4)

    lora_fast.save_adapter(lora_fast.apply(Outer(), 2, 4.0, dora=False), tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    assert "base_model.model.module.0.0.lora_A.weight" in names
    assert "base_model.model._orig_mod.lora_A.weight" in names


def test_a_linear_that_is_compiled_by_itself_is_refused(tmp_path: Path) -> None:
    """Its compiled code would call the linear that it was made of."""
    model = blocks()
    model[2] = torch.compile(model[2], backend="eager")
    with pytest.raises(TypeError, match="2: it is compiled by itself"):
        lora_fast.apply(model, 2, 4.0)
    lora_fast.save_adapter(lora_fast.apply(blocks(), 2, 4.0), tmp_path / "adapter")
    with pytest.raises(TypeError, match="2: it is compiled by itself"):
        lora_fast.load_adapter(model, tmp_path / "adapter")
    assert type(model[0][0]) is nn.Linear
    assert model[0][0].weight.requires_grad


class Shared(nn.Module):
    """One linear in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.other(torch.tanh(self.first(x)))))


def test_a_file_that_names_one_of_two_places_adapts_that_one(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    theirs = peft.get_peft_model(Shared(), config).eval()
    theirs.save_pretrained(str(tmp_path))
    ours = lora_fast.load_adapter(Shared(), tmp_path).eval()
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    assert type(ours.second) is nn.Linear
    with pytest.raises(RuntimeError, match="the weight is that of 'second' too"):
        ours.first.merge_()
    adapted = lora_fast.apply(Shared(), 2, 4.0, dora=False, scaling="alpha", targets=["first"])
    with pytest.raises(ValueError, match="first, second are one layer in the model, of which .* not name second"):
        lora_fast.load_adapter(adapted, tmp_path)


def test_a_layer_in_two_places_is_saved_under_both_names(tmp_path: Path) -> None:
    model = scramble(lora_fast.apply(Shared(), 2, 4.0, targets=["first"]))
    with pytest.warns(UserWarning, match="first stands in several places"):
        lora_fast.save_adapter(model, tmp_path)
    x = torch.randn(3, 4)
    loaded = lora_fast.load_adapter(Shared(), tmp_path).eval()
    assert loaded.first is loaded.second
    torch.testing.assert_close(loaded(x), model(x))
    again = lora_fast.load_adapter(lora_fast.apply(Shared(), 2, 4.0, targets=["first"]), tmp_path).eval()
    torch.testing.assert_close(again(x), model(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.q, self.head = nn.Embedding(9, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 9, bias=False)
        self.q.weight.data.copy_(W)
        self.head.weight = self.emb.weight
        self.config = type("Config", (), {"tie_word_embeddings": True})()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.q(self.emb(tokens)))


@pytest.mark.parametrize("into", ["plain", "adapted"])
def test_a_whole_module_parts_from_what_it_is_tied_to(into: str, tmp_path: Path) -> None:
    new = torch.ones(9, 4)
    adapter_folder(tmp_path / "adapter", lora("q") | {"emb.weight": new}, modules_to_save=["emb"])
    model = Tied()
    before = model.head.weight.detach().clone()
    if into == "adapted":
        lora_fast.apply(model, 1, 1.0, dora=False, targets=["q"])
    lora_fast.load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model.emb.weight, new)
    assert torch.equal(model.head.weight, before)
    assert model.config.tie_word_embeddings is False
    assert model.emb.weight.requires_grad is (into == "plain")
    assert not model.head.weight.requires_grad


def test_both_ends_with_one_value_stay_tied(tmp_path: Path) -> None:
    new = torch.ones(9, 4)
    tensors = lora("q") | {"emb.weight": new, "head.weight": new.clone()}
    adapter_folder(tmp_path / "adapter", tensors, modules_to_save=["emb", "head"])
    model = lora_fast.load_adapter(Tied(), tmp_path / "adapter")
    assert model.head.weight is model.emb.weight
    assert torch.equal(model.emb.weight, new)
    assert model.config.tie_word_embeddings is True


def test_the_base_weight_below_an_adapter_is_loaded_and_stays_frozen(tmp_path: Path) -> None:
    adapter_folder(tmp_path / "adapter", lora("q") | {"q.base_layer.weight": 2 * W})
    model = lora_fast.load_adapter(Tied(), tmp_path / "adapter")
    assert torch.equal(model.q(torch.eye(4)).T, MERGED + W)
    assert not model.q.weight.requires_grad


def test_a_module_in_two_places_with_a_value_for_one_is_refused(tmp_path: Path) -> None:
    model = Tied()
    model.other = model.q
    adapter_folder(tmp_path / "adapter", lora("head_q") | {"q.weight": W.clone()}, modules_to_save=["q"])
    model.head_q = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"q.weight and other.weight are one module"):
        lora_fast.load_adapter(model, tmp_path / "adapter")
    assert type(model.head_q) is nn.Linear


def test_another_vocabulary_says_what_to_call(tmp_path: Path) -> None:
    adapter_folder(tmp_path / "adapter", lora("q") | {"emb.weight": torch.ones(11, 4)})
    with pytest.raises(ValueError, match=r"call model.resize_token_embeddings\(11\) before loading"):
        lora_fast.load_adapter(Tied(), tmp_path / "adapter")


def suffixes() -> nn.Sequential:
    """ "4" is the end of "14"."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(16)), nn.LayerNorm(4)).double()


class Named(nn.Module):
    """A head whose name ends another's, a norm that others are called as too, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pre_classifier, self.classifier = nn.Linear(4, 4), nn.Linear(4, 3)
        self.block = nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.block.gamma = nn.Parameter(torch.ones(4))
        self.norm = nn.BatchNorm1d(4)
        self.token = nn.Parameter(torch.zeros(4))
        self.out, self.base_layer, self.lora_head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.scales = nn.ParameterList([torch.ones(4), torch.zeros(4)])
        self.twice = nn.ModuleList([nn.LayerNorm(4)])
        self.again = self.twice[0]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.block["norm"](self.block["q"](x + self.token)) * self.block.gamma
        y = (
            self.lora_head(self.again(self.base_layer(self.twice[0](self.out(self.norm(y)))))) * self.scales[0]
            + self.scales[1]
        )
        return self.classifier(torch.tanh(self.pre_classifier(y)))


class Nested(nn.Module):
    """Names that end others, which hold trained modules themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(4, 4)
        self.pre_head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.x = nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))})
        self.head = nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.x["head"](self.pre_head(self.q(x))))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("make", "released"),
    [
        (suffixes, ["4"]),
        (suffixes, ["4", "16"]),
        (Named, ["classifier"]),
        (Named, ["norm"]),
        (Named, ["classifier", "norm", "token", "block.gamma", "block.norm"]),
        (Named, ["block.gamma"]),
        (Named, ["token"]),
        (Named, ["out", "base_layer"]),  # ends of names that PEFT gives to parts of its layers
        (Named, ["lora_head"]),
        (Named, ["scales"]),  # which PEFT cannot save as a module
        (Named, ["again"]),  # of which PEFT would make two
        (Nested, ["head", "x.head"]),
        (Nested, ["head", "pre_head.1"]),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else "-".join(value) if isinstance(value, list) else value.__name__
    ),
)
def test_what_was_trained_is_saved_and_loads_everywhere(
    make: Callable[[], nn.Module], released: list[str], dora: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    untouched = ["4", "classifier", "out", "base_layer", "lora_head", "head", "pre_head.0", "head.0"]
    model = lora_fast.apply(make(), 2, 4.0, dora=dora, exclude=untouched)
    for name in released:
        found: Any = model
        for part in name.split("."):
            found = found[part] if isinstance(found, nn.ModuleDict) and part in found else getattr(found, part)
        found.requires_grad_(True)
    scramble(model)
    lora_fast.save_adapter(model, tmp_path)
    x = torch.randn(3, 4, dtype=torch.float64)
    loaded = lora_fast.load_adapter(make(), tmp_path).eval()
    torch.testing.assert_close(loaded(x), model(x))
    if released != ["lora_head"] or tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 21):
        # before, PEFT took every name with "lora_" in it for an adapter's
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
        torch.testing.assert_close(theirs(x), model(x))
    again = {name.replace(".linear.", ".") for name, p in model.named_parameters() if p.requires_grad}
    assert again <= {name.replace(".linear.", ".") for name, p in loaded.named_parameters() if p.requires_grad}


def test_a_transformers_model_is_found_by_peft_s_auto_class(tmp_path: Path) -> None:
    peft, transformers = (
        pytest.importorskip(name, reason=f"{name} is not installed") for name in ("peft", "transformers")
    )
    config = transformers.DistilBertConfig(dim=8, hidden_dim=8, n_layers=1, n_heads=2, vocab_size=11)
    model = transformers.DistilBertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    model = transformers.DistilBertForSequenceClassification.from_pretrained(tmp_path / "base")
    lora_fast.apply(model, 2, 2.0)
    model.classifier.requires_grad_(True)
    scramble(model)
    lora_fast.save_adapter(model, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert type(loaded.get_base_model()) is transformers.DistilBertForSequenceClassification
    tokens = torch.arange(5)[None]
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_offloaded_weights_are_saved(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = trained()
    lora_fast.save_adapter(model, tmp_path / "before")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0][0].lora_A.is_meta
    lora_fast.save_adapter(model, tmp_path / "after")
    before, after = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match=r"remove_hook_from_submodules\(model\) first"):
        lora_fast.load_adapter(model, tmp_path / "before")


def test_a_parameter_on_meta_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = lora_fast.apply(blocks(), 2, 4.0)
    with pytest.raises(ValueError, match=r"0.0.lora_A.weight is on the meta device"):
        lora_fast.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("function", ["save_adapter", "load_adapter"])
def test_emptied_parameters_are_an_error_that_says_how(function: str, tmp_path: Path) -> None:
    """As FSDP2 leaves them between their uses, and FSDP1 where it is not in the model that was handed over."""
    lora_fast.save_adapter(trained(), tmp_path / "before")
    call = getattr(lora_fast, function)
    in_parts = trained()
    in_parts[0][0].lora_A.data = in_parts[0][0].lora_A.data.flatten()[:3]
    with pytest.raises(
        ValueError, match=rf"parameters of 0.0 in parts; call {function} on every process with the model"
    ):
        call(in_parts, tmp_path / "before")
    freed = trained()
    freed[0][0].lora_A.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no memory behind it"):
        call(freed, tmp_path / "before")
    lora_fast.load_adapter(blocks(), tmp_path / "before")


def test_another_magnitude_under_its_second_name_is_refused(tmp_path: Path) -> None:
    m = torch.ones(4)
    names = ("q.lora_magnitude_vector", "q.lora_magnitude_vector.weight")
    adapter_folder(tmp_path / "same", lora("q") | {name: m.clone() for name in names}, use_dora=True)
    lora_fast.load_adapter(copy.deepcopy(Tied()), tmp_path / "same")
    adapter_folder(tmp_path / "two", lora("q") | {names[0]: m, names[1]: 2 * m}, use_dora=True)
    with pytest.raises(ValueError, match="q has two different magnitude"):
        lora_fast.load_adapter(Tied(), tmp_path / "two")
