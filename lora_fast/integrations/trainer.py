"""A callback for transformers' Trainer, and for the trainers derived from it (TRL's, Axolotl's)."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from lora_fast.functional import Recompute
from lora_fast.integrations import peft
from lora_fast.integrations.report import Report

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(f"LoraFastCallback needs transformers: pip install transformers ({error})") from error


class LastModel:
    """Which model was accelerated last, without holding it. Copies and pickles do not carry it."""

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None

    def set(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def is_in(self, model: nn.Module) -> bool:
        """Whether it is ``model``, or within it, as in the wrapper that FSDP makes."""
        last = None if self._model is None else self._model()
        return last is not None and any(module is last for module in model.modules())

    def __reduce__(self) -> tuple[type[LastModel], tuple[()]]:
        return LastModel, ()


class LoraFastCallback(TrainerCallback):
    """:func:`lora_fast.accelerate` for the model that a trainer makes, where no line can be put in between::

        trainer = SFTTrainer(model, peft_config=LoraConfig(use_dora=True), callbacks=[LoraFastCallback()], ...)

    The model is accelerated when the trainer has been made, before it is sharded or compiled; a model that the trainer
    makes later, by ``model_init``, when its training begins. The first process prints the report's summary once for
    each. Losses, checkpoints, resuming and saved files are those of PEFT. It stays accelerated after training, until
    :func:`lora_fast.restore`.

    Args: those of :func:`lora_fast.accelerate`.

    Attributes:
        report: of the last model that was accelerated; None before that.

    Raises ImportError without transformers; TypeError or ValueError for wrong arguments; and when training begins,
    ValueError for a model that still has no layer of PEFT's, and ImportError without PEFT.
    """

    def __init__(
        self,
        *,
        compute_dtype: str = "activation",
        norm_reuse: bool = True,
        stack_weights: bool = True,
        recompute: Recompute | None = "outputs",
    ) -> None:
        peft.check_options(compute_dtype, recompute)
        self.options: dict[str, Any] = {
            "compute_dtype": compute_dtype,
            "norm_reuse": norm_reuse,
            "stack_weights": stack_weights,
            "recompute": recompute,
        }
        self.report: Report | None = None
        self._last = LastModel()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if peft.has_layers(model):
            self._accelerate(model, state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if not self._last.is_in(model):
            self._accelerate(model, state)

    def _accelerate(self, model: nn.Module, state: Any) -> None:
        self.report = peft.accelerate(model, **self.options)
        self._last.set(model)
        if state.is_world_process_zero:
            print(self.report.summary())
