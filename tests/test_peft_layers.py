"""PEFT's embeddings and convolutions run by lora_fast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft", reason="the peft extra is not installed")

from peft import LoraConfig
from peft_helpers import (
    EXACT,
    accelerated,
    adapted,
    assert_same,
    drawn,
    move,
    results,
    same_masks,
    tokens,
    uses_lora_fast,
)
from support import Draw, hold_to_budget

import lora_fast

__all__ = ["same_masks"]
FORMS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
WORDS = torch.tensor([[1, 4, 0, 4], [7, 2, 2, 10]])


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: the rows times a number."""

    embed_scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


def embedding(kind: type[nn.Embedding] = nn.Embedding, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    base = nn.Sequential(kind(11, 8, padding_idx=0), nn.Linear(8, 5))
    return adapted(base, dtype, target_modules=["0"], **config)


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(3, 6, 3, padding=1), (2, 3, 9)),
    "2d": (lambda: nn.Conv2d(3, 6, (3, 2), stride=2, padding=(1, 0), bias=False), (2, 3, 8, 7)),
    "2d-1x1": (lambda: nn.Conv2d(3, 6, 1), (2, 3, 4, 4)),
    "2d-circular": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
    "3d": (lambda: nn.Conv3d(3, 6, 2, padding="same"), (1, 3, 4, 4, 4)),
}


def convolution(name: str, dtype: torch.dtype = torch.float64, **config: Any) -> tuple[Any, Tensor]:
    make, shape = CONVOLUTIONS[name]
    return adapted(nn.Sequential(make()), dtype, target_modules=["0"], **config), tokens(*shape, dtype=dtype)


@FORMS
@pytest.mark.parametrize("kind", [nn.Embedding, ScaledEmbedding])
def test_embedding(dora: bool, kind: type[nn.Embedding]) -> None:
    peft = embedding(kind, use_dora=dora, lora_dropout=0.2)  # PEFT has no dropout on embeddings
    fast = accelerated(peft)
    assert_same(fast, peft, WORDS)
    used = {"lora_compose_fwd", "weight_norm_kept"} if dora else {"lora_compose_fwd"}
    assert uses_lora_fast(fast, WORDS) == used


@FORMS
def test_embedding_of_several_adapters_merged_and_mixed(dora: bool) -> None:
    peft = embedding(adapters=("p", "q"), use_dora=dora).eval()
    peft.base_model.set_adapter(["p", "q"])
    fast = accelerated(peft)
    assert_same(fast, peft, WORDS)
    merged = copy.deepcopy(fast).merge_and_unload(safe_merge=True, adapter_names=["p"])
    wanted = []
    for sample, name in zip(WORDS, "pq", strict=True):
        peft.base_model.set_adapter(name)
        wanted.append(peft(sample[None]))
    torch.testing.assert_close(fast(WORDS, adapter_names=["p", "q"]), torch.cat(wanted), **EXACT)
    torch.testing.assert_close(merged(WORDS[:1]), wanted[0], **EXACT)


@FORMS
@pytest.mark.parametrize("wide_adapters", [False, True])
def test_embedding_within_the_budget(dora: bool, wide_adapters: bool) -> None:
    base = nn.Sequential(nn.Embedding(300, 64))
    config = {"target_modules": ["0"], "use_dora": dora, "r": 8, "autocast_adapter_dtype": wide_adapters}

    def draw(seed: int) -> Draw:
        peft = adapted(copy.deepcopy(base), torch.bfloat16, seed=seed, **config)
        fast, wide = accelerated(peft), copy.deepcopy(peft).double()
        words = torch.randint(300, (16, 16), generator=torch.Generator().manual_seed(seed))
        return drawn(results(fast, words), results(peft.bfloat16(), words), results(wide, words))

    hold_to_budget(torch.bfloat16, draw)


def test_embedding_with_max_norm_is_left_to_peft() -> None:
    peft = adapted(nn.Sequential(nn.Embedding(11, 8, max_norm=1.0)), torch.float64, target_modules=["0"], use_dora=True)
    report = lora_fast.accelerate(peft)
    assert "max_norm" in report.layers[0].runs
    assert uses_lora_fast(peft, WORDS) == set()


@FORMS
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(dora: bool, name: str) -> None:
    peft, x = convolution(name, use_dora=dora)
    fast = accelerated(peft)
    assert_same(fast, peft, x)
    assert uses_lora_fast(fast, x) == ({"weight_norm_kept"} if dora else set())


@FORMS
@pytest.mark.parametrize("name", ["1d", "2d", "3d"])
def test_convolution_under_dropout(dora: bool, name: str, same_masks: Any) -> None:
    peft, x = convolution(name, use_dora=dora, lora_dropout=0.4)
    assert_same(accelerated(peft.train()), peft, x, around=same_masks)


@FORMS
def test_convolution_of_several_adapters_merged_and_mixed(dora: bool) -> None:
    peft, x = convolution("2d", adapters=("p", "q"), use_dora=dora)
    peft.add_adapter("s", LoraConfig(r=2, use_dora=not dora, target_modules=["0"]))
    move(peft.double().eval(), seed=4)
    peft.base_model.set_adapter(["p", "q", "s"])
    fast = accelerated(peft)
    assert_same(fast, peft, x)
    wanted = []
    for sample, name in zip(x, "ps", strict=True):
        peft.base_model.set_adapter(name)
        wanted.append(peft(sample[None]))
    torch.testing.assert_close(fast(x, adapter_names=["p", "s"]), torch.cat(wanted), **EXACT)
    merged = fast.merge_and_unload(adapter_names=["p"])
    torch.testing.assert_close(merged(x[:1]), wanted[0], **EXACT)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution_within_the_budget(dora: bool, dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1))

    def draw(seed: int) -> Draw:
        peft = adapted(copy.deepcopy(base), dtype, seed=seed, target_modules=["0"], use_dora=dora, r=8)
        fast, wide = accelerated(peft), copy.deepcopy(peft).double()
        x = tokens(2, 16, 10, 10, dtype=dtype, seed=seed)
        return drawn(results(fast, x), results(peft.to(dtype), x), results(wide, x.double()))

    hold_to_budget(dtype, draw)


def test_convolution_with_groups_is_left_to_peft() -> None:
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    peft = adapted(base, torch.float64, target_modules=["0"])
    fast = copy.deepcopy(peft)
    assert "groups" in lora_fast.accelerate(fast).layers[0].runs
    assert_same(fast, peft, tokens(2, 4, 5, 5))


def own(layer: nn.Module, part: str, **arguments: Any) -> None:
    """Give the adapter a convolution with arguments of its own in the place of lora_A or lora_B."""
    old = getattr(layer, part)["default"]
    torch.manual_seed(2)
    arguments = {"kernel_size": old.kernel_size, "padding": old.padding, "bias": False, **arguments}
    getattr(layer, part)["default"] = type(old)(old.in_channels, old.out_channels, dtype=torch.float64, **arguments)


def reflect(layer: Any) -> None:
    own(layer, "lora_A", padding_mode="reflect")


def dilate(layer: Any) -> None:
    own(layer, "lora_A", dilation=2, padding="same")


def stride_in_lora_B(layer: Any) -> None:
    layer.base_layer.stride = (2,) * (layer.base_layer.weight.dim() - 2)
    own(layer, "lora_B", stride=2)


def shift(layer: Any) -> None:
    """Asymmetric: what lora_A leaves out before, lora_B gives back behind."""
    dimensions = layer.base_layer.weight.dim() - 2
    own(layer, "lora_A", padding=(0,) + (1,) * (dimensions - 1))
    own(layer, "lora_B", padding=(1,) + (0,) * (dimensions - 1))


def add_biases(layer: Any) -> None:
    own(layer, "lora_A", bias=True)
    own(layer, "lora_B", bias=True)


def wrap_the_base_around(layer: Any) -> None:
    base = layer.base_layer
    base.padding_mode = "circular"
    base._reversed_padding_repeated_twice = [1] * 2 * (base.weight.dim() - 2)


def group(layer: Any) -> None:
    """PEFT's DoRA reads the matrices of these two otherwise than their rows stand, and takes the norm of that."""
    dimensions = layer.base_layer.weight.dim() - 2
    own(layer, "lora_A", groups=3)
    own(
        layer,
        "lora_B",
        kernel_size=(3,) + (1,) * (dimensions - 1),
        padding=(1,) + (0,) * (dimensions - 1),
        padding_mode="circular",
    )


def group_lora_B(layer: Any) -> None:
    own(layer, "lora_B", groups=3)


CHANGES = [reflect, dilate, stride_in_lora_B, shift, add_biases, wrap_the_base_around, group]
DIMENSIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def layer_of(model: Any) -> Any:
    return model.base_model.model[0]


def changed(dimensions: int, change: Callable[[Any], None], first: str, **config: Any) -> tuple[Any, Any, Tensor]:
    """PEFT's model and the accelerated one, both changed, "before" or "after" the acceleration, and an input."""
    base = nn.Sequential(DIMENSIONS[dimensions](3, 6, 3, padding=1))
    peft = adapted(base, torch.float64, target_modules=["0"], r=3, **config)
    if first == "change":
        change(layer_of(peft))
    fast = accelerated(peft)
    if first == "accelerate":
        change(layer_of(peft))
        change(layer_of(fast))
    return peft, fast, tokens(2, 3, *(6, 5, 4)[:dimensions])


@FORMS
@pytest.mark.parametrize("first", ["change", "accelerate"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_convolutions_with_arguments_of_their_own(
    dora: bool, first: str, dropout: float, change: Callable[[Any], None], dimensions: int, same_masks: Any
) -> None:
    peft, fast, x = changed(dimensions, change, first, use_dora=dora, lora_dropout=dropout)
    assert_same(fast.train(), peft.train(), x, around=same_masks)
    assert_same(fast.eval(), peft.eval(), x)
    ours = dora and change is not group
    assert uses_lora_fast(fast, x) == ({"weight_norm_kept"} if ours else set())


@FORMS
def test_a_lora_B_in_groups(dora: bool) -> None:
    """PEFT's DoRA cannot take it, and neither do we."""
    peft, fast, x = changed(2, group_lora_B, "change", use_dora=dora)
    if not dora:
        assert_same(fast, peft, x)
        return
    for model in (peft, fast):
        with pytest.raises(RuntimeError, match="shape"):
            model(x)
    assert "lora_B @ lora_A is not of the base weight's shape" in lora_fast.accelerate(fast).layers[0].runs


@FORMS
def test_a_convolution_without_a_batch(dora: bool) -> None:
    peft, x = convolution("2d", use_dora=dora)
    assert_same(accelerated(peft), peft, x[0])


def test_a_dropout_that_alone_is_in_evaluation() -> None:
    """Nothing is dropped, and PEFT's DoRA still convolves anew, without the base layer's padding_mode."""
    peft, x = convolution("2d-circular", use_dora=True, lora_dropout=0.4)
    fast = accelerated(peft.train())
    for model in (peft, fast):
        layer_of(model).lora_dropout["default"].eval()
    assert_same(fast, peft, x)
