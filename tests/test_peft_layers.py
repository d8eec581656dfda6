"""PEFT's embeddings and convolutions run by lora_fast."""

from __future__ import annotations

import copy
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
