"""Batches whose rows have adapters of their own, from the shared cases: ids, stacks of mixed ranks, gains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fast import functional, reference
from lora_fast.testing import CASES, Inputs

ADAPTERS = 3
SCALINGS = (0.7, -1.5, 0.25)
# every size, dtype and layout; a row of x is a token here
GROUPED_CASES = [case for case in CASES if case.leading]


@dataclass
class Batch:
    """The rows of ``inputs``, each with one of three adapters or none, whose ranks are R, about R/2 and 1."""

    inputs: Inputs
    adapter: Tensor  # [T]
    ranks: list[int]
    lora_A: Tensor  # [L, R, K], zero past an adapter's rank
    lora_B: Tensor  # [L, N, R]
    gain: Tensor  # [L, N]
    scaling: Tensor  # [L]

    def matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the stacks, of each adapter's own rank."""
        pairs = list(enumerate(self.ranks))
        return [lora_A[a, :rank] for a, rank in pairs], [lora_B[a, :, :rank] for a, rank in pairs]


def make_batch(inputs: Inputs, ids: Callable[[int], Tensor] | None = None) -> Batch:
    """``ids`` makes the adapter of each of T rows; unset, any of them or none."""
    case = inputs.case
    generator = torch.Generator().manual_seed(case.N + case.K)
    device = inputs.x.device
    T, R = inputs.x.numel() // case.K, case.R
    ranks = [R, (R + 1) // 2, 1]

    def factor(like: Tensor, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return (values * shape[-1] ** -0.5).to(like.dtype).to(device)

    lora_A, lora_B = factor(inputs.lora_A, ADAPTERS, R, case.K), factor(inputs.lora_B, ADAPTERS, case.N, R)
    for a, rank in enumerate(ranks):
        lora_A[a, rank:], lora_B[a, :, rank:] = 0, 0
    wide = inputs.gain["output"].dtype
    gain = 1 + 0.2 * torch.randn(ADAPTERS, case.N, generator=generator, dtype=torch.float64, device="cpu")
    make_ids = ids or (lambda rows: torch.randint(-1, ADAPTERS, (rows,), generator=generator, device="cpu"))
    scaling = torch.tensor(SCALINGS, dtype=wide, device=device)
    return Batch(inputs, make_ids(T).to(device), ranks, lora_A, lora_B, gain.to(wide).to(device), scaling)


def tensors_of(batch: Batch, form: str) -> dict[str, Tensor | None]:
    """What trains: of "lora", "gain" and, with a base product given, "compose"."""
    inputs = batch.inputs
    tensors: dict[str, Tensor | None] = {
        "x": inputs.x.reshape(-1, inputs.case.K),
        "bias": inputs.bias,
        "lora_A": batch.lora_A,
        "lora_B": batch.lora_B,
    }
    if form != "lora":
        tensors["gain"] = batch.gain
    if form == "compose":
        tensors["base"] = inputs.base.reshape(-1, inputs.case.N)
    return tensors


def fast(batch: Batch, backend: str, *, with_ranks: bool = False) -> Callable[..., Tensor]:
    """grouped_lora_linear, or grouped_lora_compose where a base is given."""
    ranks = torch.tensor(batch.ranks, device=batch.adapter.device) if with_ranks else None

    def function(x, bias, lora_A, lora_B, gain=None, base=None):
        given = lora_A, lora_B, batch.scaling, gain
        if base is not None:
            return functional.grouped_lora_compose(base, x, *given, bias, batch.adapter, ranks, backend=backend)
        weight = batch.inputs.weight
        return functional.grouped_lora_linear(x, weight, bias, *given, batch.adapter, ranks, backend=backend)

    return function


def specification(batch: Batch) -> Callable[..., Tensor]:
    def function(x, bias, lora_A, lora_B, gain=None, base=None, compute_dtype=None):
        given = *batch.matrices(lora_A, lora_B), SCALINGS, gain
        options = {"compute_dtype": compute_dtype}
        if base is not None:
            return reference.grouped_lora_compose(base, x, *given, bias, batch.adapter, **options)
        return reference.grouped_lora_linear(x, batch.inputs.weight, bias, *given, batch.adapter, **options)

    return function
