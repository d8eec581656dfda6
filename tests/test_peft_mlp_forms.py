"""Which modules are gated MLPs, told from the source of their forward, and what of them may change afterwards."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

pytest.importorskip("peft", reason="the peft extra is not installed")

from mlp_models import SIZES, Block, Other, X, calls, model
from peft_helpers import EXACT, accelerated, assert_same, tokens
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

import lora_fast


class Doubled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Reused(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x)) + gate.mean()


class Uneven(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(self.act_fn(x)))


class Conditional(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = -x
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Training(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act_fn(x) if self.training else x
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class InPlace(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        x.clamp_(-0.5, 0.5)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Observed(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        seen = self.act_fn(x)  # noqa: F841
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Counting(LlamaMLP):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Optional(LlamaMLP):
    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PartlyWithoutGradient(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.act_fn(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class WithoutGradient(LlamaMLP):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Relu(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.gate_proj(x)) * self.up_proj(x))


class Cast(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if hidden.dtype == self.down_proj.weight.dtype:
            hidden = hidden.to(torch.float32)
        return self.down_proj(hidden.to(torch.float64))


class Swapped(Phi3MLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class Interleaved(Phi3MLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        both = self.gate_up_proj(hidden_states)
        return self.down_proj(self.activation_fn(both[..., ::2]) * both[..., 1::2])


class Reducing(LlamaMLP):
    def __reduce__(self) -> Any:
        return super().__reduce__()


class Registered(LlamaMLP):
    def __init_subclass__(cls, **options: Any) -> None:
        raise TypeError("of this class nobody derives another")


def evaluated() -> type[nn.Module]:
    """A class whose source is nowhere."""
    names: dict[str, Any] = {"LlamaMLP": LlamaMLP}
    exec("class Hidden(LlamaMLP):\n    def forward(self, x): return self.down_proj(x * 2)", names)
    return names["Hidden"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Doubled, "is no part of one"),
        (Reused, "is no part of one"),
        (Uneven, "gate and up are not of x"),
        (Conditional, "it depends on 'x.mean() > 0'"),
        (Training, "is no part of one"),
        (InPlace, "is no assignment"),
        (Observed, "it computes something that it does not return"),
        (Counting, "is no assignment"),
        (Optional, "it has other arguments than x"),
        (PartlyWithoutGradient, "is no assignment"),
        (WithoutGradient, "it is no plain function"),
        (Relu, "is no call of a child, an activation or chunk"),
        (Cast, "it depends on"),
        (Swapped, "gate and up are not the first and the second half"),
        (Interleaved, "is no part of one"),
        (Reducing, "__reduce__ of its own"),
        (Registered, "an __init_subclass__"),
        (evaluated(), "its source cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_forward_is_left_alone(kind: type[nn.Module], reason: str) -> None:
    config = Phi3Config(**SIZES, pad_token_id=0) if issubclass(kind, Phi3MLP) else LlamaConfig(**SIZES)
    fast = model(lambda: kind(config), use_dora=True)
    before = dict(vars(fast.base_model.model))
    (line,) = lora_fast.accelerate(fast).mlps
    assert not line.as_one
    assert reason in line.runs
    assert type(fast.base_model.model) is kind
    assert vars(fast.base_model.model) == before  # nothing of it was run


def test_what_changes_later_runs_the_linears_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another activation, another forward of the class, and back; and none at all raises as it did."""
    fast = accelerated(model(lambda: Block(Other), use_dora=True))
    peft = model(use_dora=True)
    gated = accelerated(peft)
    inner = gated.base_model.model
    before = inner.act_fn
    for act in (nn.ReLU(), nn.GELU(), None):
        inner.act_fn = act
        if act is not None:
            assert calls(gated, tokens(*X)) == 0
            peft.base_model.model.act_fn = act
            assert_same(gated, peft, tokens(*X))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        gated(tokens(*X))
    inner.act_fn = before
    assert calls(gated, tokens(*X)) == 1
    assert calls(fast, tokens(*X)) == 1
    monkeypatch.setattr(Other, "forward", lambda self, x: x)
    assert calls(fast, tokens(*X)) == 0


def test_global_hooks_are_called() -> None:
    peft = model(use_dora=True)
    fast = accelerated(peft)
    handle = register_module_forward_hook(lambda module, x, y: 2 * y if isinstance(module, nn.SiLU) else None)
    try:
        for each in (fast, peft):
            each.base_model.model.act_fn = nn.SiLU()
        assert calls(fast, tokens(*X)) == 0
        assert_same(fast, peft, tokens(*X))
    finally:
        handle.remove()


def test_a_model_that_peft_has_left_is_restored() -> None:
    merged = accelerated(model(Block, use_dora=True)).merge_and_unload()
    y = merged(tokens(*X))
    assert type(copy.deepcopy(merged).mlp) is LlamaMLP  # files and copies need no class of ours
    lora_fast.restore(merged)
    assert type(merged.mlp) is LlamaMLP
    torch.testing.assert_close(merged(tokens(*X)), y, **EXACT)


def test_a_forward_that_was_kept_serves_the_module_after_it_was_restored() -> None:
    peft = model(use_dora=True)
    fast = accelerated(peft)
    kept = fast.base_model.model.forward
    fast.base_model.model.forward = lambda x: 2 * kept(x)
    lora_fast.accelerate(fast, recompute=None)
    torch.testing.assert_close(fast(tokens(*X)), 2 * peft(tokens(*X)), **EXACT)


def test_restore_refuses_a_class_that_was_changed_since() -> None:
    fast = accelerated(model(Block, use_dora=True))
    inner = fast.base_model.model.mlp
    inner.scale = nn.Parameter(torch.ones(()))
    nn.utils.parametrize.register_parametrization(inner, "scale", nn.Identity())
    with pytest.raises(RuntimeError, match="restore: the class of an MLP is .* another library changed it"):
        lora_fast.restore(fast)
    assert calls(fast, tokens(*X)) == 1


def test_exporting_and_tracing() -> None:
    """The signature is the module's own; torch.jit.trace, which takes no such op, has the linears apart."""
    fast = accelerated(model(use_dora=True)).eval()
    inner = fast.base_model.model
    assert list(inspect.signature(inner.forward).parameters) == ["x"]
    exported = torch.export.export(inner, (tokens(*X),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(exported.module()(tokens(5, 20, 16)), inner(tokens(5, 20, 16)), **EXACT)
    traced = torch.jit.trace(fast, (tokens(*X),), check_trace=False)
    torch.testing.assert_close(traced(tokens(*X)), fast(tokens(*X)), **EXACT)


def test_square_linears_of_another_kind_are_not_in_the_report() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))

    assert not lora_fast.accelerate(model(Attention)).mlps
