"""freeze_norms: the gain as a constant, until train(), unfreeze_norms, or what computes it anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn_helpers import DORA_KINDS, IN, assert_same_function, expected, make_layer
from support import few_roundings
from torch import nn

import lora_fast
from lora_fast import backends


@pytest.fixture
def frozen(request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    layer = make_layer(request.param, backend=backend, dropout=0.5).eval()
    lora_fast.freeze_norms(layer)
    return layer


frozen_kinds = pytest.mark.parametrize("frozen", DORA_KINDS, indirect=True)


@frozen_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_output_without_a_norm(
    frozen: Any, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen.to(dtype)
    x = torch.randn(2, 3, IN).to(dtype)
    wanted = expected(frozen, x)
    monkeypatch.setattr(backends.get(backend).ops, "weight_norm_fwd", None)
    y = frozen(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, wanted, **few_roundings(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16


@frozen_kinds
def test_frozen_means_frozen_until_it_is_told(frozen: Any) -> None:
    x = torch.randn(3, IN)
    before = frozen(x)
    with torch.no_grad():
        frozen.magnitude.mul_(2)
    frozen.eval()
    assert torch.equal(frozen(x), before)
    assert "frozen norm" in repr(frozen)
    lora_fast.invalidate_norms(frozen)
    torch.testing.assert_close(frozen(x), expected(frozen, x))
    assert frozen._frozen_gain is not None
    with torch.no_grad():
        frozen.magnitude.mul_(2)
    lora_fast.unfreeze_norms(frozen)
    torch.testing.assert_close(frozen(x), expected(frozen, x))


@frozen_kinds
def test_train_unfreezes(frozen: Any) -> None:
    frozen.dropout = 0.0
    nn.Sequential(frozen).train()
    assert frozen._frozen_gain is None
    assert_same_function(frozen, torch.randn(3, IN))


@frozen_kinds
def test_moves_load_state_dict_and_unmerge_compute_it_anew(frozen: Any) -> None:
    x = torch.randn(3, IN)
    other = make_layer(f"dora-{frozen.norm_axis}", seed=9).state_dict()
    model = nn.Sequential(frozen)
    for change in (
        lambda: model.load_state_dict({f"0.{key}": value for key, value in other.items()}),
        lambda: frozen.load_state_dict({"linear.weight": torch.randn_like(frozen.weight)}, strict=False),
        lambda: frozen.load_state_dict({key: value * 2 for key, value in other.items()}, assign=True),
        lambda: model.bfloat16(),
        lambda: model.float(),
        lambda: (frozen.merge_(), frozen.unmerge_()),
        lambda: (frozen.merge_(), model.double(), frozen.unmerge_()),
    ):
        change()
        assert frozen._frozen_gain is not None
        x = x.to(frozen.weight.dtype)
        y = expected(frozen, x)
        unit = y.abs().max()  # up to 6 here, and the bound is for outputs of order 1
        # two more: unmerging rounds W
        torch.testing.assert_close(frozen(x) / unit, y / unit, **few_roundings(x.dtype, 6))


@frozen_kinds
def test_gradients_while_frozen(frozen: Any) -> None:
    x = torch.randn(3, IN, requires_grad=True)
    frozen(x).sum().backward()
    assert frozen.magnitude.grad is None
    wanted = torch.autograd.grad(expected(frozen, x).sum(), [frozen.lora_A, frozen.lora_B, x])
    # the gain is a constant, as the norm is for detach_norm=True
    torch.testing.assert_close([frozen.lora_A.grad, frozen.lora_B.grad, x.grad], list(wanted))


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_freezing_in_inference_mode_leaves_a_layer_that_trains(kind: str, backend: str) -> None:
    layer = make_layer(kind, backend=backend).eval()
    with torch.inference_mode():
        lora_fast.freeze_norms(layer)
        layer(torch.randn(3, IN))
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_refusals_freeze_nothing() -> None:
    layers = [make_layer("dora-output").eval(), make_layer("dora-input"), make_layer("lora")]
    model = nn.Sequential(*layers)
    with pytest.raises(RuntimeError, match=r"training mode; call model\.eval\(\) first"):
        lora_fast.freeze_norms(model)
    model.eval()
    layers[1].merge_()
    with pytest.raises(RuntimeError, match=r"merged.*unmerge_\(\)"):
        lora_fast.freeze_norms(model)
    assert layers[0]._frozen_gain is None
    layers[1].unmerge_()
    lora_fast.freeze_norms(model)
    assert layers[0]._frozen_gain is not None


@frozen_kinds
def test_export_and_compile_see_a_constant(frozen: Any) -> None:
    x = torch.randn(3, IN)
    exported = torch.export.export(frozen, (x,))
    assert "weight_norm" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), expected(frozen, x))
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected(frozen, x))
