"""What the functions for rows of many adapters say of wrong arguments, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fast import functional
from lora_fast.calls import RowGroups

L, N, K, R, T = 3, 6, 5, 2, 4


def arguments(**changed: Any) -> dict[str, Any]:
    given = {
        "x": torch.randn(T, K),
        "weight": torch.randn(N, K),
        "bias": torch.randn(N),
        "lora_A": torch.randn(L, R, K),
        "lora_B": torch.randn(L, N, R),
        "scaling": torch.ones(L),
        "gain": torch.ones(L, N),
        "adapter": torch.tensor([0, -1, 2, 1]),
    }
    return {**given, **changed}


def matrices(*ranks: int) -> dict[str, Any]:
    return {"lora_A": [torch.randn(r, K) for r in ranks], "lora_B": [torch.randn(N, r) for r in ranks]}


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"adapter": torch.tensor([0, 1, 2, 3])}, ValueError, r"adapter: got ids from 0 to 3, expected them in \[-1, 2\]"),
    ({"adapter": torch.tensor([0, 1, -2, 2])}, ValueError, r"adapter: got ids from -2 to 2"),
    ({"adapter": torch.zeros(4)}, TypeError, "adapter: got dtype torch.float32, expected an integer dtype"),
    ({"adapter": torch.zeros(4, dtype=torch.bool)}, TypeError, "adapter: got dtype torch.bool"),
    ({"adapter": [0, 1, 2, 0]}, TypeError, "adapter: got list, expected a torch.Tensor of ints"),
    (
        {"adapter": torch.zeros(5, dtype=torch.int64)},
        ValueError,
        r"adapter: got shape \[5\], expected x's leading sizes \[4\]",
    ),
    ({"adapter": torch.tensor(1)}, ValueError, r"adapter: got shape \[\]"),
    ({"x": torch.randn(2, T, K)}, ValueError, r"adapter: got shape \[4\], expected x's leading sizes \[2, 4\]"),
    (
        {"adapter": functional.group_rows(torch.zeros(3, dtype=torch.int64), L)},
        ValueError,
        "adapter: got groups of 3 rows",
    ),
    (
        {"adapter": functional.group_rows(torch.zeros(4, dtype=torch.int64), 2)},
        ValueError,
        "and 2 adapters, expected those",
    ),
    ({"lora_A": torch.randn(R, K)}, ValueError, r"lora_A: got shape \[2, 5\], expected \[L, R, K\]"),
    (
        {"lora_B": torch.randn(L, R, N)},
        ValueError,
        r"lora_B: got shape \[3, 2, 6\], expected \[L, N, R\] = \[3, 6, 2\]",
    ),
    ({"lora_A": torch.randn(0, R, K), "lora_B": torch.randn(0, N, R)}, ValueError, "lora_A: got shape"),
    ({"lora_B": list(torch.randn(L, N, R))}, TypeError, "got one stack and one sequence"),
    ({"lora_A": [], "lora_B": []}, ValueError, "got 0 and 0 matrices, expected one of each adapter"),
    ({**matrices(2, 3, 1), "lora_A": matrices(2, 3)["lora_A"]}, ValueError, "got 2 and 3 matrices"),
    (
        {**matrices(2, 3, 1), "lora_B": matrices(2, 2, 1)["lora_B"]},
        ValueError,
        r"lora_B\[1\]: got shape \[6, 2\], expected \[N, R\]",
    ),
    ({**matrices(2, 3, 1), "ranks": torch.ones(L, dtype=torch.int64)}, ValueError, "ranks: got a tensor beside"),
    ({**matrices(2, 3)}, ValueError, r"scaling: got shape \[3\], expected \[L\] = \[2\]"),
    ({"scaling": [1.0, 2.0, 3.0]}, TypeError, "scaling: got list"),
    (
        {"scaling": torch.ones(L, requires_grad=True)},
        ValueError,
        "scaling: got requires_grad=True, expected a constant",
    ),
    ({"gain": torch.ones(N)}, ValueError, r"gain: got shape \[6\], expected \[L, N\]"),
    ({"bias": torch.ones(N - 1)}, ValueError, "bias: got shape"),
    (
        {"ranks": torch.tensor([1, 2, 3])},
        ValueError,
        r"ranks: got values from 1 to 3, expected them in \[0, R\] = \[0, 2\]",
    ),
    ({"ranks": torch.tensor([1.0, 2.0, 2.0])}, TypeError, "ranks: got dtype torch.float32"),
    ({"ranks": torch.tensor([1, 2])}, ValueError, r"ranks: got shape \[2\]"),
    ({"weight": torch.randn(N, K, requires_grad=True)}, ValueError, "weight: got requires_grad=True"),
    ({"weight": torch.randn(N, K).double()}, TypeError, "x: got dtype torch.float32, expected torch.float64"),
    ({"x": torch.randn(T, K + 1)}, ValueError, "x: got shape"),
    ({"lora_A": torch.randn(L, R, K, device="meta")}, ValueError, "lora_A: got device meta"),
]


@pytest.mark.parametrize(("changed", "error", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_grouped_lora_linear(changed: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.grouped_lora_linear(**arguments(**changed))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, r"lora_A\[1\]: got NoneType, expected a torch.Tensor"),
        (torch.eye(3, K).to_sparse(), r"lora_A\[1\]: got layout torch.sparse_coo"),
        (torch.ones(3, K, dtype=torch.int32), r"lora_A\[1\]: got dtype torch.int32"),
    ],
)
def test_a_matrix_of_another_kind(wrong: Any, message: str) -> None:
    given = matrices(2, 3, 1)
    given["lora_A"][1] = wrong
    with pytest.raises(TypeError, match=message):
        functional.grouped_lora_linear(**arguments(**given))


def test_sequences_of_any_kind() -> None:
    given = matrices(2, 3, 1)
    y = functional.grouped_lora_linear(**arguments(**given))
    assert y.shape == (T, N)
    functional.grouped_lora_linear(**arguments(**{name: iter(factors) for name, factors in given.items()}))
    with pytest.raises(TypeError, match="lora_A: got float, expected a torch.Tensor or a sequence of them"):
        functional.grouped_lora_linear(**arguments(**{**given, "lora_A": 1.0}))


def test_matrices_of_several_dtypes() -> None:
    mixed = matrices(2, 3, 1)
    mixed["lora_A"][2] = mixed["lora_A"][2].double()
    with pytest.raises(TypeError, match="lora_A: got dtypes .*float32.*float64.*, expected one dtype for all adapters"):
        functional.grouped_lora_linear(**arguments(**mixed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base": torch.randn(T + 1, N)}, r"x: got shape \[4, 5\], expected \[..., K\] with base's leading sizes"),
        ({"base": torch.tensor(1.0)}, r"base: got shape \[\]"),
        ({"x": torch.randn(T, 0)}, r"x: got shape \[4, 0\]"),
    ],
)
def test_grouped_lora_compose(changed: dict, message: str) -> None:
    given = arguments(base=torch.randn(T, N), **changed) if "base" not in changed else arguments(**changed)
    del given["weight"]
    with pytest.raises(ValueError, match=message):
        functional.grouped_lora_compose(**given)


def test_group_rows(backend: Any) -> None:
    ids = torch.tensor([2, -1, 0, 2, -1], dtype=torch.int32)
    order, starts = functional.group_rows(ids, 3, backend=backend)
    assert order.tolist() == [1, 4, 2, 0, 3]
    assert starts.tolist() == [0, 2, 3, 3, 5, 5]
    for wrong, error in (
        ((ids, 0), ValueError),
        ((ids, "3"), TypeError),
        ((ids, 2), ValueError),
        ((ids.float(), 3), TypeError),
    ):
        with pytest.raises(error):
            functional.group_rows(*wrong, backend=backend)


@pytest.mark.native
def test_groups_that_nobody_sorted_do_not_crash_the_process() -> None:
    good = functional.group_rows(torch.tensor([0, -1, 2, 1]), L)
    for order, starts in (
        (good.order + 1, good.starts),
        (good.order - 5, good.starts),
        (good.order, good.starts * 1000),
        (good.order, good.starts.flip(0)),
    ):
        with pytest.raises(RuntimeError, match="order and starts must be what group_rows makes"):
            functional.grouped_lora_linear(**arguments(adapter=RowGroups(order, starts)), backend="cpu")
