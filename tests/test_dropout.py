"""functional.dropout: the mask of lora_linear, forward and backward, on every CPU backend."""

from __future__ import annotations

import pytest
import torch

from lora_fast import functional
from lora_fast.testing import scaled_dropout_mask


@pytest.mark.parametrize("shape", [(5,), (3, 4, 7), (0, 4)], ids=str)
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradient(backend64: str, shape: tuple[int, ...], p: float, dtype: torch.dtype) -> None:
    x, seed = torch.randn(shape, dtype=dtype).requires_grad_(), torch.tensor(12345678901234)
    y = functional.dropout(x, p, seed, backend=backend64)
    mask = scaled_dropout_mask(seed, shape, p)
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 0.0}
    wanted = torch.zeros_like(x) if p == 1.0 else (x.double() * mask).to(dtype)
    torch.testing.assert_close(y, wanted, **tolerance)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, torch.zeros_like(x) if p == 1.0 else mask.to(dtype), **tolerance)


def test_nothing_is_dropped_at_0() -> None:
    x = torch.randn(3, 4)
    assert functional.dropout(x, 0.0, torch.tensor(1)) is x


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="x: got shape"):
        functional.dropout(torch.tensor(1.0), 0.5, torch.tensor(1))
    with pytest.raises(ValueError, match="dropout_p: got 1.5"):
        functional.dropout(torch.ones(2), 1.5, torch.tensor(1))


def test_opcheck() -> None:
    args = (torch.randn(3, 4), torch.tensor(7), 0.5, "torch")
    torch.library.opcheck(torch.ops.lora_fast.dropout.default, args)
