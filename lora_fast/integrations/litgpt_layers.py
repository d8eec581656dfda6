"""litgpt's LoRA layers with lora_fast's forward: one subclass per layer type, set as the instance's class.

    LoRALinear      y = x Wᵀ + b + s drop(x) Aᵀ Bᵀ
    LoRAQKVLinear   the same with q, k and v below one another in W, and a part of A and of B for each that has an
                    adapter. B is then a matrix of blocks, zero where a part of A meets another's rows.

Parameters, merging and whatever else a layer does are litgpt's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from litgpt.lora import LoRALinear, LoRAQKVLinear
from torch import Tensor, nn

from lora_fast import functional
from lora_fast.backends import ForwardDefault
from lora_fast.functional import Projection
from lora_fast.integrations.litgpt import STATE
from lora_fast.nn import hooks
from lora_fast.nn.mlp import Part
from lora_fast.parallel import fsdp1, whole, zero


@dataclass
class State:
    """What acceleration adds to a layer. Copies and pickles carry it."""

    forward_default: ForwardDefault = field(default_factory=ForwardDefault)


class FastLayer(nn.Module):
    """What the subclasses share."""

    litgpt_type: type[nn.Module]
    linear: Any  # frozen; wrapped where FSDP1 has it as a unit
    lora_A: nn.Parameter  # [R, in]; of q, k and v [parts·R, in]
    lora_B: nn.Parameter  # [out, R]; of q, k and v without the rows of those that have no adapter
    lora_dropout: Any
    scaling: Any
    merged: bool
    r: int

    def forward(self, x: Tensor) -> Tensor:
        state = vars(self).get(STATE)
        if state is None:  # called by what was kept of a layer that is litgpt's again
            kind: Any = type(self)
            return (self.litgpt_type if isinstance(self, FastLayer) else kind).forward(self, x)
        if self.obstacle() is not None or not self._takes(x):
            y: Tensor = super().forward(x)
            return y
        with state.forward_default.in_force():
            p = _dropout_p(self) or 0.0
            seed = functional.draw_seed(x.device) if p > 0.0 else None
            if linear_obstacle(self.linear) is None:
                weight, bias = self.linear.weight, self.linear.bias
                factors = weight, bias, self.lora_A, self._whole_lora_B(), self.scaling
                return functional.lora_linear(x, *factors, dropout_p=p, seed=seed)
            result = self.linear(x)
            dropped = x if seed is None else functional.dropout(x, p, seed)
            h = F.linear(dropped, self.lora_A)
            result = result.to(torch.promote_types(result.dtype, h.dtype))  # int8's may be another
            return functional.lora_compose(result, h, self._whole_lora_B(), self.scaling)

    @property
    def in_features(self) -> int:
        return int(fsdp1.owner(self.linear).in_features)

    @property
    def out_features(self) -> int:
        return int(fsdp1.owner(self.linear).out_features)

    def mlp_part(self, x: Tensor) -> Part | None:
        """Its part in a gated MLP that runs as one (:mod:`lora_fast.nn.mlp`); None where it has to be called itself."""
        if self.mlp_obstacle() is not None or _dropout_p(self) != 0.0 or not self._takes(x):
            return None
        return Part(self._projection, is_adapted=True)

    def mlp_obstacle(self) -> str | None:
        """What keeps :meth:`mlp_part` at None, whatever the call; None if nothing."""
        return self.obstacle() or linear_obstacle(self.linear)

    def obstacle(self) -> str | None:
        """Why litgpt's own forward has to run, whatever x is; None if it need not. As litgpt does, each call asks."""
        if self.merged:
            return "it is merged"
        if self.r <= 0 or not self._is_whole():
            return "its r or enable_lora says that it has another adapter than lora_A and lora_B, or none"
        # math.isfinite takes no number that torch.compile holds symbolic
        if type(self.scaling) not in (float, int) or not -math.inf < self.scaling < math.inf:
            return "its scaling is no finite number of Python's"
        if _dropout_p(self) is None:
            return f"its lora_dropout is a {type(self.lora_dropout).__name__}, or has hooks, and has to be called"
        return None

    def _projection(self) -> Projection:
        return Projection(self.linear.weight, self.linear.bias, self.lora_A, self._whole_lora_B(), self.scaling)

    def _takes(self, x: Any) -> bool:
        """Whether the adapter is there, whole, and of x's dtype and device, as litgpt demands it."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
            return False
        for name in ("lora_A", "lora_B"):
            tensor = whole.tensor_of(self, name)  # FSDP1's is a plain tensor, FSDP2's a DTensor where it is in parts
            if type(tensor) not in (nn.Parameter, Tensor) or tensor.dim() != 2 or tensor.device != x.device:
                return False
            if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                return False
        if linear_obstacle(self.linear) is not None:
            return True
        weight = self.linear.weight
        return weight.device == x.device and (weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type))

    def _is_whole(self) -> bool:
        """Whether lora_A and lora_B have the parts that the layer's attributes say."""
        return True

    def _whole_lora_B(self) -> Tensor:
        """lora_B with a row for each row of W, and a column for each row of lora_A."""
        return self.lora_B


class FastLoRALinear(FastLayer, LoRALinear):
    litgpt_type = LoRALinear


class FastLoRAQKVLinear(FastLayer, LoRAQKVLinear):
    litgpt_type = LoRAQKVLinear

    head_size: int
    n_head: int
    n_query_groups: int
    enable_lora: Any  # of q, k and v

    def _parts(self) -> list[tuple[int, bool]]:
        """How many rows of W are q's, k's and v's, and whether they are adapted."""
        sizes = self.head_size * self.n_head, *(self.head_size * self.n_query_groups,) * 2
        return list(zip(sizes, map(bool, self.enable_lora), strict=True))

    def _is_whole(self) -> bool:
        sizes = [size for size, enabled in self._parts() if enabled]
        lora_A, lora_B = (whole.tensor_of(self, name) for name in ("lora_A", "lora_B"))
        if not sizes or lora_A is None or lora_B is None:
            return False
        N, rank = lora_B.shape if lora_B.dim() == 2 else (0, 0)
        return sum(sizes) == N and lora_A.shape[0] == rank * len(sizes)

    def _whole_lora_B(self) -> Tensor:
        adapted = self._parts()
        given = iter(self.lora_B.split([size for size, enabled in adapted if enabled]))
        blocks = [next(given) if enabled else self.lora_B.new_empty(size, 0) for size, enabled in adapted]
        return torch.block_diag(*blocks)


FAST: dict[type[nn.Module], type[nn.Module]] = {fast.litgpt_type: fast for fast in (FastLoRALinear, FastLoRAQKVLinear)}


def linear_obstacle(linear: Any) -> str | None:
    """Why the linear has to be called; None where its parameters may be read instead, which is all that calls for."""
    if type(linear) is not nn.Linear or type(linear._parameters.get("weight")) is not nn.Parameter:
        return f"the linear is a {type(linear).__name__}"
    if not hooks.is_plain(linear):
        return "the linear has hooks, a parametrization or a forward of its own"
    if linear.weight.requires_grad:
        return "the linear's weight requires a gradient"
    return "the linear is sharded" if linear.weight.dim() != 2 or zero.is_partitioned(linear.weight) else None


def _dropout_p(layer: Any) -> float | None:
    """That of the next call; None where something else stands in the dropout's place, which has to be called."""
    dropout = layer.lora_dropout
    if type(dropout) is nn.Dropout:
        if hooks.has_hooks(dropout) or "forward" in vars(dropout):
            return None
        return float(dropout.p) if dropout.training else 0.0
    # litgpt's own function that returns x, for a dropout of 0
    return 0.0 if getattr(dropout, "__module__", None) == "litgpt.lora" and not isinstance(dropout, nn.Module) else None
