"""Drop-in: the articles' from-scratch classes, written here from their equations, and their state dicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import ALPHA, IN, OUT, RANK, assert_unchanged, make_layer, snapshot
from torch import Tensor, nn

from lora_fast import LinearWithDoRA, LinearWithLoRA


class Update(nn.Module):
    """alpha x A B with A [in, r], B [r, out]: the article's LoRALayer."""

    def __init__(self, n_in: int, n_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(n_in, rank) / rank**0.5)
        self.B = nn.Parameter(torch.zeros(rank, n_out))
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (x @ self.A @ self.B)


class Article(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = Update(linear.in_features, linear.out_features, rank, alpha)

    def updated_weight(self) -> Tensor:
        return self.linear.weight + self.lora.alpha * (self.lora.A @ self.lora.B).T


class ArticleLoRA(Article):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


class ArticleLoRAMerged(Article):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.updated_weight(), self.linear.bias)


class ArticleDoRAMerged(Article):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear, rank, alpha)
        self.m = nn.Parameter(linear.weight.detach().norm(p=2, dim=0, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        updated = self.updated_weight()
        direction = updated / updated.norm(p=2, dim=0, keepdim=True)
        return F.linear(x, self.m * direction, self.linear.bias)


class ArticleDoRA(ArticleDoRAMerged):
    """The one that normalises the weight, as a sum of two products."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.m / self.updated_weight().norm(p=2, dim=0, keepdim=True)
        return self.linear(x * scale) + self.lora(x * scale)


class OutputNormalised(Article):
    """The widely copied variant, another function: its m is [1, out]."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear, rank, alpha)
        self.m = nn.Parameter(torch.ones(1, linear.out_features))


LORA, DORA = (ArticleLoRA, ArticleLoRAMerged), (ArticleDoRA, ArticleDoRAMerged)


def article(kind: type[Article], n_in: int = IN, n_out: int = OUT, bias: bool = True) -> Article:
    layer = kind(nn.Linear(n_in, n_out, bias=bias), RANK, ALPHA)
    with torch.no_grad():
        layer.lora.B.normal_()
        if hasattr(layer, "m"):
            layer.m.mul_(0.5 + torch.rand_like(layer.m))
    return layer


def ours(kind: type[Article], n_in: int = IN, n_out: int = OUT, bias: bool = True, **options: Any) -> Any:
    linear = nn.Linear(n_in, n_out, bias=bias)
    if issubclass(kind, DORA):
        return LinearWithDoRA(linear, RANK, ALPHA, norm_axis="input", detach_norm=False, **options)
    return LinearWithLoRA(linear, RANK, ALPHA, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LORA + DORA)
def test_same_outputs_and_gradients(kind: type[Article], bias: bool, backend: str) -> None:
    theirs, layer = article(kind, bias=bias), ours(kind, bias=bias, backend=backend)
    layer.load_state_dict(theirs.state_dict())
    x, x_ours = torch.randn(2, 5, IN, requires_grad=True), torch.empty(0)
    x_ours = x.detach().clone().requires_grad_()
    y, y_ours = theirs(x), layer(x_ours)
    torch.testing.assert_close(y_ours, y)
    for output in (y, y_ours):
        output.square().sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(x_ours.grad, x.grad, **close)
    torch.testing.assert_close(layer.lora_A.grad, theirs.lora.A.grad.T, **close)
    torch.testing.assert_close(layer.lora_B.grad, theirs.lora.B.grad.T, **close)
    if hasattr(theirs, "m"):
        torch.testing.assert_close(layer.magnitude.grad, theirs.m.grad[0], **close)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", LORA + DORA)
def test_inside_a_bigger_model(kind: type[Article], strict: bool, assign: bool) -> None:
    def model(layer: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(3, IN), nn.ReLU(), nn.ModuleDict({"m": layer, "lora": nn.Linear(2, 2)}))

    theirs, layer = article(kind), ours(kind)
    result = model(layer).load_state_dict(model(theirs).state_dict(), strict=strict, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer(x), theirs(x))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        name for name, _ in layer.named_parameters() if not name.startswith("linear.")
    ]
    assert layer.lora_A.is_contiguous()
    assert layer.lora_B.is_contiguous()


@pytest.mark.parametrize("kind", LORA)
def test_a_lora_file_loads_into_dora_without_strict(kind: type[Article]) -> None:
    theirs = article(kind)
    layer = LinearWithDoRA(nn.Linear(IN, OUT), RANK, ALPHA)
    result = layer.load_state_dict(theirs.state_dict(), strict=False)
    assert result.missing_keys == ["magnitude"]
    assert torch.equal(layer.lora_A, theirs.lora.A.T)
    with pytest.raises(RuntimeError, match=r'Missing key.*"magnitude"'):
        layer.load_state_dict(theirs.state_dict())


def test_a_dora_file_is_not_a_loras() -> None:
    layer = LinearWithLoRA(nn.Linear(IN, OUT), RANK, ALPHA)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"m"'):
        layer.load_state_dict(article(ArticleDoRAMerged).state_dict())


@pytest.mark.parametrize("n_out", [OUT, IN])
@pytest.mark.parametrize("strict", [True, False])
def test_m_needs_norm_axis_input(n_out: int, strict: bool) -> None:
    layer = LinearWithDoRA(nn.Linear(IN, n_out), RANK, ALPHA)
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"m: .*\[1, 12\], loads into norm_axis='input' only.*norm_axis='output'"):
        layer.load_state_dict(article(ArticleDoRA, n_out=n_out).state_dict(), strict=strict)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("strict", [True, False])
def test_the_output_normalising_variant_is_refused_by_its_shape(axis: str, strict: bool) -> None:
    layer = LinearWithDoRA(nn.Linear(IN, OUT), RANK, ALPHA, norm_axis=axis)
    before = snapshot(layer)
    message = "normalises the adapter's output: another function" if axis == "input" else "norm_axis='input' only"
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(article(OutputNormalised).state_dict(), strict=strict)
    assert_unchanged(layer, before)


MISFITS: dict[str, tuple[str, Any, str]] = {
    "lora.A misshapen": ("lora.A", torch.ones(IN, RANK + 1), r"size mismatch for lora_A: got \[5, 12\]"),
    "lora.A not transposed": ("lora.A", torch.ones(RANK, IN), "size mismatch for lora_A"),
    "lora.A no tensor": ("lora.A", "A", r'"lora.A": got str, expected a Tensor'),
    "lora.B one dimension": ("lora.B", torch.ones(RANK), r"size mismatch for lora.B: got \[4\], expected two"),
    "m one dimension": ("m", torch.ones(IN), r"size mismatch for m: got \[12\], expected \[1, 12\]"),
    "m column": ("m", torch.ones(IN, 1), r"size mismatch for m: got \[12, 1\]"),
    "weight misshapen": ("linear.weight", torch.ones(IN, OUT), "size mismatch for linear.weight"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", MISFITS)
def test_an_article_value_that_does_not_fit_leaves_the_layer_unchanged(name: str, strict: bool) -> None:
    key, value, message = MISFITS[name]
    layer = make_layer("dora-input")
    before = snapshot(layer)
    state: dict[str, Any] = {**article(ArticleDoRA).state_dict(), key: value}
    given = dict(state)
    with pytest.raises(RuntimeError, match=message) as caught:
        layer.load_state_dict(state, strict=strict)
    assert len(str(caught.value).splitlines()) == 2  # and no word of missing or unexpected keys
    assert_unchanged(layer, before)
    assert state.keys() == given.keys()


@pytest.mark.parametrize(
    ("without", "more", "message"),
    [
        ("lora.A", {}, 'Missing key.*"lora_A"'),
        ("m", {}, 'Missing key.*"magnitude"'),
        ("linear.weight", {}, 'Missing key.*"linear.weight"'),
        (None, {"lora.C": torch.ones(1)}, 'Unexpected key.*"lora.C"'),
        (None, {"lora_A": torch.ones(RANK, IN)}, 'Unexpected key.*"lora.A"'),
    ],
)
def test_missing_and_unexpected_article_keys(without: str | None, more: dict[str, Tensor], message: str) -> None:
    state = {**article(ArticleDoRA).state_dict(), **more}
    state.pop(without, None)
    with pytest.raises(RuntimeError, match=message):
        make_layer("dora-input").load_state_dict(state)


def test_the_callers_state_dict_is_left_alone() -> None:
    theirs = article(ArticleDoRA)
    state = theirs.state_dict()
    keys = list(state)
    layer = make_layer("dora-input")
    layer.load_state_dict(state)
    assert list(state) == keys
    with torch.no_grad():
        layer.magnitude.zero_()
        layer.lora_A.zero_()
    assert theirs.m.all()
    assert theirs.lora.A.any()
