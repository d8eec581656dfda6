"""What adapted_mlp keeps for backward, and what a backward takes besides, measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mlp_cases import FORMS, RECOMPUTE, Mlp, composed, fast, kept_bytes, make_mlp
from torch import Tensor

from lora_fast.backends import mlp as blocked
from lora_fast.testing import Case, peak_bytes

# an intermediate size beside which the others are small
CASE, WIDTH = Case((512,), 32, 48, 4), 256


def columns_kept(mlp: Mlp, recompute: str) -> int:
    """Numbers for a token beside x: the base products, down's where its gain trains, and h."""
    of_down = mlp.case.N if FORMS[mlp.form]["down"].startswith("dora") else 0
    ranks = sum(inputs.lora_A.shape[0] for inputs in mlp.linears.values())
    return (2 * mlp.width if recompute == "outputs" else 0) + of_down + ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_kept_for_backward(form: str, dtype: torch.dtype, backend: str) -> None:
    """Of a mask nothing but itself. The same measure catches single linears, which keep more."""
    mlp = make_mlp(Case(CASE.leading, CASE.N, CASE.K, CASE.R, dtype), form, width=WIDTH)
    mask = mlp.mask(0.5)
    token = CASE.leading[0] * mlp.x.element_size()
    gains = 24 * (2 * WIDTH + CASE.N)  # a few vectors in float32
    bounds = {recompute: columns_kept(mlp, recompute) * token + gains for recompute in RECOMPUTE}
    for recompute, bound in bounds.items():
        assert kept_bytes(mlp, fast(mlp, backend, recompute=recompute)) <= bound, recompute
        dropping = fast(mlp, backend, recompute=recompute, mask=mask, dropout_p=0.5)
        assert kept_bytes(mlp, dropping) <= bound + mask.nbytes, recompute
    assert kept_bytes(mlp, fast(mlp, backend)) > bounds["all"]
    assert kept_bytes(mlp, composed(mlp, backend)) > bounds["outputs"]


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_nothing_is_kept_where_nothing_trains(recompute: str, backend: str) -> None:
    mlp = make_mlp(CASE, "dora", width=WIDTH)
    with torch.no_grad():
        y = fast(mlp, backend, recompute=recompute)(**mlp.tensors())
    assert not y.requires_grad
    frozen = fast(mlp, backend, recompute=recompute)(**mlp.tensors())
    assert not frozen.requires_grad
    assert torch.equal(y, frozen)


LONG, WIDER = Case((4096,), 16, 24, 4), 512


def backward_bytes(mlp: Mlp, function: Callable[..., Tensor]) -> int:
    """Most that a backward holds beside what is kept; the gradients are there already."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in mlp.tensors().items()}

    def backward() -> None:
        torch.autograd.grad(y, list(leaves.values()), mlp.grad_y, retain_graph=True)

    y = function(**leaves)
    backward()
    return peak_bytes(backward)


@pytest.mark.parametrize("form", ["dora", "lora", "joined"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_backward_holds_a_block_of_tokens(recompute: str, form: str, backend: str, monkeypatch) -> None:
    """Of what is as wide as the intermediate size: the gradients of three tensors, the output and, made again, the two
    products, and the passes' temporaries in float32. Single linears hold such tensors for all tokens, and are caught.
    """
    mlp = make_mlp(LONG, form, width=WIDER)
    tokens, element = LONG.leading[0], mlp.x.element_size()
    for least in ("BLOCK_ON_GPU", "BLOCK"):
        monkeypatch.setattr(blocked, least, blocked.SMALL_BLOCK)
    monkeypatch.setattr(blocked, "BLOCKS", 16)
    block = next(blocked.blocks(mlp.x, [], []))
    assert block.stop == tokens // 16
    narrow = 2 * tokens * (LONG.N + LONG.K + 3 * LONG.R) * element
    bound = 9 * block.stop * WIDER * element + narrow
    assert backward_bytes(mlp, fast(mlp, backend, recompute=recompute)) < bound
    assert bound < tokens * WIDER * element < backward_bytes(mlp, composed(mlp, backend))


@pytest.mark.parametrize("form", ["dora", "lora", "joined"])
def test_a_forward_without_gradients_holds_a_block_of_tokens(form: str, backend: str, monkeypatch) -> None:
    mlp = make_mlp(LONG, form, width=WIDER)
    tokens, element, tensors = LONG.leading[0], mlp.x.element_size(), mlp.tensors()
    for least in ("BLOCK_ON_GPU", "BLOCK"):
        monkeypatch.setattr(blocked, least, blocked.SMALL_BLOCK)
    monkeypatch.setattr(blocked, "BLOCKS", 16)

    def peak(function: Callable[..., Tensor]) -> int:
        def step() -> None:
            with torch.no_grad():
                function(**tensors)

        step()
        return peak_bytes(step)

    assert peak(fast(mlp, backend)) < tokens * WIDER * element < peak(composed(mlp, backend))
