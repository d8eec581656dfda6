"""What the integrations return: which layers lora_fast runs, and what runs in the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lora_fast.nn.mlp import MlpReport


@dataclass(frozen=True)
class LayerReport:
    """What runs in one adapter layer; ``library`` is the one that the layer is of."""

    name: str
    kind: str
    accelerated: bool
    runs: str
    library: str = "PEFT"

    def __str__(self) -> str:
        return f"{self.by}  {self.name} ({self.kind}): {self.runs}"

    @property
    def by(self) -> str:
        """Whose code runs: "fast" or the library's name."""
        return "fast" if self.accelerated else self.library


@dataclass(frozen=True)
class Report:
    """What an ``accelerate`` did, layer by layer; ``print`` it, or its :meth:`summary`."""

    layers: tuple[LayerReport, ...]
    library: str  # with its version
    compute_dtype: str
    note: str | None = None
    mlps: tuple[MlpReport, ...] = ()

    @property
    def accelerated(self) -> list[str]:
        """The names of the layers that lora_fast runs."""
        return [layer.name for layer in self.layers if layer.accelerated]

    @property
    def left_alone(self) -> list[str]:
        """The names of the layers that the library's own code runs; why is in their ``runs``."""
        return [layer.name for layer in self.layers if not layer.accelerated]

    def __str__(self) -> str:
        return self._text([*map(str, self.layers), *map(str, self.mlps)])

    def summary(self) -> str:
        """The report with one line for all layers of a kind in which the same runs, and their number."""
        layers = Counter(f"{layer.by}  {{}} {layer.kind}: {layer.runs}" for layer in self.layers)
        mlps = Counter(f"{'as one' if mlp.as_one else 'apart '}  {{}} {mlp.kind}: {mlp.runs}" for mlp in self.mlps)
        return self._text([line.replace("{}", f"{count} ×", 1) for line, count in (*layers.items(), *mlps.items())])

    def _text(self, lines: list[str]) -> str:
        head = (
            f"lora_fast: {len(self.accelerated)} of {len(self.layers)} adapter layers accelerated "
            f"({self.library}, products in the {self.compute_dtype}'s dtype)"
        )
        return "\n".join((head, *([self.note] if self.note else []), *(f"  {line}" for line in lines)))
