"""Adapters' files written as other tools write them, and what they have to compute: independent of what is tested."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SAMPLES = Path(__file__).resolve().parent / "samples"
LYCORIS = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lora", "dora_wd": "True"}'}


@dataclass
class Update:
    """One layer's update with everything that a format may have; shapes as LyCORIS has them."""

    weight: Tensor  # [N, K, *kernel]
    down: Tensor  # [R, K, *kernel], with mid [R, K, 1, …]
    up: Tensor  # [N, R, 1, …]
    mid: Tensor | None
    alpha: float | None
    magnitude: Tensor | None  # [N] or [K]
    axis: str = "output"

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.down.shape[0]

    def merged(self, eps: float = 0.0) -> Tensor:
        """By the definition, in float64: m ⊙ V / (‖V‖ + eps), V = W + s up mid down."""
        weight, down, up = self.weight.double(), self.down.double().flatten(1), self.up.double().flatten(1)
        if self.mid is None:
            update = up @ down
        else:
            update = torch.einsum("nr,rq...,qk->nk...", up, self.mid.double().flatten(2), down)
        value = weight + self.scaling * update.reshape(weight.shape)
        if self.magnitude is None:
            return value
        dim = 0 if self.axis == "output" else 1
        others = [each for each in range(weight.dim()) if each != dim]
        norm = value.pow(2).sum(others, keepdim=True).sqrt()
        shape = [1] * weight.dim()
        shape[dim] = -1
        return self.magnitude.double().reshape(shape) * value / (norm + eps)

    def kohya(self) -> dict[str, Tensor]:
        parts = {"lora_down.weight": self.down, "lora_up.weight": self.up}
        if self.alpha is not None:
            parts["alpha"] = torch.tensor(self.alpha, dtype=torch.float64)
        if self.mid is not None:
            parts["lora_mid.weight"] = self.mid
        if self.magnitude is not None:
            ones = [1] * (self.weight.dim() - 2)
            parts["dora_scale"] = self.magnitude.reshape([-1, 1, *ones] if self.axis == "output" else [1, -1, *ones])
        return parts


def make_update(
    *shape: int,
    rank: int = 2,
    alpha: float | None = 3.0,
    axis: str | None = None,
    tucker: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Update:
    """An update of a linear or a convolution of ``shape``, about as large as the weight; with an axis it is DoRA."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    N, K, *kernel = shape
    ones = [1] * len(kernel)
    weight = draw(N, K, *kernel).double()
    down = draw(rank, K, *(ones if tucker else kernel))
    mid = draw(rank, rank, *kernel) if tucker else None
    magnitude = None
    if axis is not None:
        dim = 0 if axis == "output" else 1
        magnitude = weight.transpose(0, dim).flatten(1).norm(dim=1) * (1 + 0.3 * draw(shape[dim]).double())
        magnitude = magnitude.to(dtype)
    return Update(weight, down, draw(N, rank, *ones), mid, alpha, magnitude, axis or "output")


def kohya_file(
    path: Path, updates: dict[str, Update], metadata: dict[str, str] | None = None, prefix: str = "lycoris_"
) -> Path:
    """A file in kohya's words for updates by the base's names."""
    tensors = {
        f"{prefix}{name.replace('.', '_')}.{part}": tensor.contiguous()
        for name, update in updates.items()
        for part, tensor in update.kohya().items()
    }
    save_file(tensors, path, metadata)
    return path


def base_file(path: Path, updates: dict[str, Update], dtype: torch.dtype = torch.float64) -> Path:
    """A checkpoint of the updates' weights, and of one tensor that nothing changes."""
    tensors = {f"{name}.weight": update.weight.to(dtype) for name, update in updates.items()}
    save_file(tensors | {"kept.weight": torch.ones(3)}, path)
    return path


def merged_file(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    """What merging ``adapter`` into the one file ``base`` gives."""
    from lora_fast.merge_checkpoint import merge_checkpoint

    merge_checkpoint(base, adapter, out, **options)
    return load_file(out)


def read(path: Path, component: str | None = None, **options: Any) -> Any:
    """The adapter of one model in a file."""
    from lora_fast.adapters import files

    return files.read_file(path, **options).component(component)


def refused(message: str, path: Path) -> None:
    """Assert that reading ``path`` is a ValueError that a terminal can show, and that ``inspect`` fails too."""
    from lora_fast import cli

    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    text = str(caught.value)
    assert len(text) < 1000
    assert text.isprintable()
    assert cli.main(["inspect", str(path)]) in (1, 2)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Equal to ``tolerance``, of the largest element."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance * max(1.0, expected.double().abs().max().item())
    )
