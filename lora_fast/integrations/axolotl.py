"""A plugin for Axolotl: its LoRA and DoRA runs, with lora_fast's layers. In the configuration::

    plugins:
      - lora_fast.integrations.axolotl.LoraFastPlugin

and, where they are to differ, the arguments of :func:`lora_fast.accelerate`::

    lora_fast:
      recompute: all
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lora_fast.integrations import peft
from lora_fast.integrations.trainer import LastModel

try:
    from axolotl.integrations.base import BasePlugin, normalize_plugin_name
    from axolotl.utils.logging import get_logger
    from pydantic import BaseModel, ConfigDict
except ImportError as error:
    raise ImportError(f"lora_fast.integrations.axolotl needs Axolotl: pip install axolotl ({error})") from error

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
LOG = get_logger("axolotl.integrations.lora_fast")  # of what is below its own name Axolotl shows more than warnings


class LoraFastOptions(BaseModel):
    """``lora_fast:`` in the configuration; what :func:`lora_fast.accelerate` says of each.

    ``recompute: none`` is its None: what is null Axolotl drops from a configuration.
    """

    model_config = ConfigDict(extra="forbid")

    compute_dtype: Literal["activation", "adapter"] = "activation"
    norm_reuse: bool = True
    stack_weights: bool = True
    recompute: Literal["outputs", "all", "none"] = "outputs"


class LoraFastArgs(BaseModel):
    """What the plugin adds to the configuration."""

    lora_fast: LoraFastOptions | None = None


class LoraFastPlugin(BasePlugin):
    """:func:`lora_fast.accelerate` for the model that Axolotl trains; with the report's summary in its log.

    Axolotl's own LoRA kernels, which would run in the place of these layers' forwards, are turned off, and said to be
    where the configuration has them on. The model is accelerated when it has been loaded with its adapter, which is
    drawn anew after ``post_lora_load``; where TRL adds the adapter (``rl: dpo``, ``ipo``, ``kto``), when the trainer
    has been made.

    Raises ValueError for a configuration without an ``adapter``, and when the trainer has been made, for a model that
    still has no layer of PEFT's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last = LastModel()

    def register(self, cfg: Any) -> None:
        """Before the configuration is validated, which would turn the kernels on where nothing is said of them.

        In ``pre_model_load`` it would be too late: a forward of attention that calls them is in place by then.
        """
        if not self._is_of(cfg):
            return
        if not cfg.get("adapter"):
            raise ValueError(
                "adapter: the configuration has none, and lora_fast.integrations.axolotl.LoraFastPlugin is for LoRA "
                "and DoRA; set adapter: lora or qlora, or take it out of plugins"
            )
        if found := [kernel for kernel in KERNELS if cfg.get(kernel)]:
            LOG.warning(f"lora_fast runs the adapters' layers: {', '.join(found)} turned off")
        for kernel in KERNELS:
            cfg[kernel] = False

    def get_input_args(self) -> str:
        return f"{__name__}.{LoraFastArgs.__name__}"

    def pre_model_load(self, cfg: Any) -> None:
        """Raises ValueError for kernels that something has turned on after all."""
        found = [kernel for kernel in KERNELS if cfg.get(kernel)]
        if found and self._is_of(cfg):
            raise ValueError(f"{found[0]}: it is on, and lora_fast's layers would not be called; set it to false")

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        if self._is_of(cfg) and peft.has_layers(model):
            self._accelerate(cfg, model)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if self._is_of(cfg) and not self._last.is_in(trainer.model):
            self._accelerate(cfg, trainer.model)

    def _is_of(self, cfg: Any) -> bool:
        """Whether the configuration names the plugin: Axolotl keeps plugins for all further runs of a process."""
        own = f"{type(self).__module__}.{type(self).__qualname__}"
        return own in map(normalize_plugin_name, cfg.get("plugins") or [])

    def _accelerate(self, cfg: Any, model: nn.Module) -> None:
        options = dict(cfg.get("lora_fast") or {})
        if options.get("recompute") == "none":
            options["recompute"] = None
        report = peft.accelerate(model, **options)
        self._last.set(model)
        LOG.info(report.summary())
