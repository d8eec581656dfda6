"""An Axolotl plugin that accelerates its model in every second block of steps (:mod:`.trainers_child`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from lora_fast.integrations.axolotl import LoraFastPlugin

from .alternation import Alternation
from .trainers_child import check_trainer, timing


class Alternating(LoraFastPlugin):
    """lora_fast's plugin, but for when the model is accelerated."""

    make: ClassVar[Callable[[nn.Module], Alternation]]
    made: ClassVar[Alternation | None] = None

    def get_input_args(self) -> str:
        return "lora_fast.integrations.axolotl.LoraFastArgs"

    def get_training_args(self, cfg: Any) -> dict[str, bool]:
        """bfloat16 on a CPU, which the configuration has no word for."""
        return {"use_cpu": True}

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        Alternating.made = Alternating.make(model)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        assert Alternating.made is not None
        check_trainer(trainer, Alternating.made)
        trainer.add_callback(timing(Alternating.made))
