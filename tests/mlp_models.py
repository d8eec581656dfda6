"""PEFT models of gated MLPs, and how often a forward runs one as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from peft_helpers import adapted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.glm.modeling_glm import GlmMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from lora_fast import functional

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 4}
T5_SIZES: dict[str, Any] = {"d_model": 16, "d_ff": 28, "feed_forward_proj": "gated-gelu"}
MLPS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: LlamaMLP(LlamaConfig(**SIZES)),
    "Llama with biases": lambda: LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True)),
    "Mistral": lambda: MistralMLP(MistralConfig(**SIZES)),
    "Qwen2": lambda: Qwen2MLP(Qwen2Config(**SIZES)),
    "Qwen3": lambda: Qwen3MLP(Qwen3Config(**SIZES)),
    "Gemma": lambda: GemmaMLP(GemmaConfig(**SIZES)),
    "Gemma 2": lambda: Gemma2MLP(Gemma2Config(**SIZES)),
    "Gemma with the exact GELU": lambda: GemmaMLP(GemmaConfig(**SIZES, hidden_act="gelu")),
    "Phi-3": lambda: Phi3MLP(Phi3Config(**SIZES, pad_token_id=0)),
    "GLM": lambda: GlmMLP(GlmConfig(**SIZES)),
    "T5": lambda: T5DenseGatedActDense(T5Config(**T5_SIZES)),
}
FORMS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
X = (3, 20, 16)  # more tokens than those for which the linears run apart


class Other(nn.Module):
    """The same linears in another module, around a block of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(16, 28), nn.Linear(28, 16), nn.Linear(16, 28, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """An MLP in a model, checkpointed where that is asked for."""

    use_reentrant: bool | None = None

    def __init__(self, make: Callable[[], nn.Module] = MLPS["Llama"]) -> None:
        super().__init__()
        self.first, self.mlp = nn.Linear(16, 16), make()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.use_reentrant is None:
            return x + self.mlp(x)
        return x + checkpoint(self.mlp, x, use_reentrant=self.use_reentrant)


def model(make: Callable[[], nn.Module] = MLPS["Llama"], **config: Any) -> Any:
    return adapted(make(), torch.float64, target_modules="all-linear", **config)


def calls(fast: nn.Module, x: Tensor) -> int:
    """How often one forward runs an MLP as one, or would on the way of products."""
    with (
        mock.patch.object(functional, "adapted_mlp", wraps=functional.adapted_mlp) as adapted_mlp,
        mock.patch.object(functional, "mlp_of_products", wraps=functional.mlp_of_products) as of_products,
    ):
        fast(x)
    return adapted_mlp.call_count + of_products.call_count
