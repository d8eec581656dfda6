"""Layer steps and whole models: Llama-like and T5-like ones from their configurations, and decoding behind a cache.

Every linear of a model is replaced by the contender's layer, around the one frozen weight that all contenders share, so
that a contender is built in one way for a layer and for a model. The model's input is what its embedding gives, with a
gradient, so that backward goes through every layer in every contender, the frozen model too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_fast.backends import BackendName
from lora_fast.calls import Axis

from . import contenders as c, cost, layer
from .gate import WRONG, Gate, Results
from .ops import NOT_COMPILED
from .registry import (
    ACCUMULATED,
    CHECKPOINTED,
    DECODE,
    FROZEN,
    INFERENCE,
    MICRO_BATCHES,
    Prepared,
    Workload,
)

CACHED_TOKENS = 256
HEAD = 64  # width of an attention head
EVALUATION = (INFERENCE, DECODE)


def contenders(workload: Workload, backends: list[BackendName]) -> list[c.Contender]:
    """All that run in the workload's mode. In float32 PEFT's adapters are float32 either way, and stand once."""
    half = workload.dtype != torch.float32
    found = [c.FROZEN, c.lora(), c.PEFT_LORA_FP32, c.dora(), *(c.dora(name) for name in backends), c.ACCELERATED]
    found += [c.FROZEN_NORMS, c.PEFT_DORA_CACHED] if workload.mode in EVALUATION else []
    found += [c.PEFT_LORA, c.PEFT_DORA] if half else []
    return [*found, c.PEFT_DORA_FP32, c.DENSE, c.COMPILED, c.FACTORED, c.EAGER, c.ARTICLE]


def prepare(workload: Workload, backends: list[BackendName], compiled: bool) -> Prepared:
    """A layer, or a model, in one of the modes."""
    model = None if workload.subject == "layer" else MODELS[workload.subject](workload)
    N, K = (workload.out_features, workload.in_features) if model is None else (workload.in_features,) * 2
    inputs = c.layer_inputs(N, K, workload.rank, workload.tokens, workload.dtype)
    adapters = {} if model is None else _adapters(model, inputs)
    gate = Gate(inputs) if model is None else ModelGate(inputs, model, adapters)
    steps, left_out = {}, {}
    for contender in contenders(workload, backends):
        name = contender.name
        if contender.compiles and not compiled:
            left_out[name] = NOT_COMPILED
            continue
        try:
            variant = contender if model is None else in_model(contender, model, adapters)
            layers, why_not = layer.build([variant], inputs, gate)
            left_out |= why_not
            if name not in layers:
                continue
            if workload.mode in EVALUATION and (fault := gate.inference_fault(contender, layers[name])):
                left_out[name] = f"{WRONG}: {fault}"
                continue
            steps[name] = _step(layers[name], inputs, workload.mode)
        except Exception as error:  # another's code, on this machine: told, and no reason to lose the other rows
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return Prepared(steps, left_out, gate.errors, FROZEN, least(workload, model))


def _step(built: c.Layer, inputs: c.LayerInputs, mode: str) -> Any:
    if mode in EVALUATION:
        return layer.inference(built, inputs)
    if mode == CHECKPOINTED:
        built = c.Layer(Checkpointed(built.module), built.trained)
    return layer.training_step(built, inputs, MICRO_BATCHES if mode == ACCUMULATED else 1)


class Checkpointed(nn.Module):
    """The module, or each block of a model, under activation checkpointing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.blocks = isinstance(module, OnEmbeddings)
        if self.blocks:
            module.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator, union-attr]

    def forward(self, x: Tensor) -> Any:
        return self.module(x) if self.blocks else checkpoint(self.module, x, use_reentrant=False)


class OnEmbeddings(nn.Module):
    """A model of transformers as a function of x [T, K], what its embedding would give; the result is [T, K] too."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        super().__init__()
        self.model, self.batch = model, batch
        self.cache: list[Tensor] = []  # keys and values of each layer

    def forward(self, x: Tensor) -> Tensor:
        embeddings = x.view(self.batch, -1, x.shape[-1])
        options: dict[str, Any] = {"use_cache": False}
        if self.model.config.is_encoder_decoder:  # type: ignore[union-attr]
            options["decoder_inputs_embeds"] = embeddings
        elif self.cache:
            from transformers import DynamicCache

            filled = DynamicCache()
            for index, (keys, values) in enumerate(self.cache):
                filled.update(keys.to(x.dtype), values.to(x.dtype), index)
            options = {"use_cache": True, "past_key_values": filled}
        return self.model(inputs_embeds=embeddings, **options).last_hidden_state.reshape(x.shape)


def _llama(workload: Workload) -> OnEmbeddings:
    from transformers import LlamaConfig, LlamaModel

    heads = workload.in_features // HEAD
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=workload.in_features,
        intermediate_size=workload.out_features,
        num_hidden_layers=workload.depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    return OnEmbeddings(_frozen(LlamaModel(config), workload.dtype), _batch(workload))


def _t5(workload: Workload) -> OnEmbeddings:
    from transformers import T5Config, T5Model

    config = T5Config(
        vocab_size=32,
        d_model=workload.in_features,
        d_ff=workload.out_features,
        d_kv=HEAD,
        num_heads=workload.in_features // HEAD,
        num_layers=workload.depth,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return OnEmbeddings(_frozen(T5Model(config), workload.dtype), _batch(workload))


def _decoder(workload: Workload) -> OnEmbeddings:
    """Every token is a sequence of its own, behind CACHED_TOKENS others."""
    model = _llama(workload)
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    shape = (2, workload.tokens, workload.in_features // HEAD, CACHED_TOKENS, HEAD)
    model.batch = workload.tokens
    model.cache = [torch.randn(shape, generator=generator).to(workload.dtype) for _ in range(workload.depth)]
    return model


def _batch(workload: Workload) -> int:
    """Sequences of 128 tokens, as in the case of T0-3B; one sequence where there are fewer."""
    return max(1, workload.tokens // 128)


def _frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model.to(dtype).requires_grad_(False)


MODELS = {"Llama-like": _llama, "T5-like": _t5, "decoding": _decoder}


def _adapters(model: nn.Module, inputs: c.LayerInputs) -> dict[str, c.LayerInputs]:
    """Of each linear its frozen weight and the adapter that all contenders start from."""
    rank, dtype = inputs.lora_A.shape[0], inputs.x.dtype
    found = {}
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for seed, (name, linear) in enumerate(linears):
        drawn = c.layer_inputs(linear.out_features, linear.in_features, rank, 1, dtype, seed)
        # an update of a tenth of W's size: a deep model of random weights must not amplify it
        found[name] = replace(drawn, weight=linear.weight.detach(), lora_B=0.02 * drawn.lora_B)
    return found


def in_model(contender: c.Contender, model: nn.Module, adapters: dict[str, c.LayerInputs]) -> c.Contender:
    """The contender whose "layer" is the whole model with each linear replaced."""

    def build(inputs: c.LayerInputs) -> c.Layer:
        contender_in_layers = replace(contender, build=c._dense) if contender.compiles else contender
        built = _installed(model, adapters, contender_in_layers.build)
        if contender.compiles:
            built.module.compile()
        return built

    return replace(contender, build=build)


def _installed(model: nn.Module, adapters: dict[str, c.LayerInputs], build: Any) -> c.Layer:
    """A copy of the model that shares its frozen tensors, with what `build` makes of each linear."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    trained: dict[str, tuple[nn.Parameter, bool]] = {}
    for name, inputs in adapters.items():
        built = build(inputs)
        parent, _, last = name.rpartition(".")
        setattr(copied.get_submodule(parent), last, built.module)
        trained |= {f"{name}.{key}": value for key, value in built.trained.items()}
    return c.Layer(copied, trained)


class ModelGate(Gate):
    """The gate for a model: the truth has the reference's layers in it and is float64 throughout.

    Rounding meets other rounding on its way through a model, so that ours is held to the bound of the others here; its
    layers are held to the budget one by one.
    """

    def __init__(self, inputs: c.LayerInputs, model: nn.Module, adapters: dict[str, c.LayerInputs]) -> None:
        super().__init__(inputs)
        self.model, self.adapters = model, adapters

    def _error_fault(
        self, name: str, actual: Tensor, eagers: Sequence[Tensor], truth: Tensor, contender: c.Contender
    ) -> str | None:
        return super()._error_fault(name, actual, eagers, truth, replace(contender, ours=False))

    def _eager(self, formula: str, axis: Axis, detach_norm: bool) -> list[Results]:
        return [self._reference(formula, axis, detach_norm, None)]

    def _reference(self, formula: str, axis: Axis, detach_norm: bool, dtype: torch.dtype | None) -> Results:
        model, adapters, inputs = self.model, self.adapters, self.inputs
        if dtype is not None:
            model = copy.deepcopy(model).to(dtype)
            adapters = {name: _converted(one, dtype) for name, one in adapters.items()}
            inputs = _converted(inputs, dtype)
        built = _installed(model, adapters, lambda one: c.reference_layer(one, formula, axis, detach_norm))
        x = inputs.x.detach().clone().requires_grad_()
        y = built.module.train()(x)
        y.backward(inputs.grad_y)
        results = {"y": y.detach(), "x": x.grad} | built.gradients()
        return {name: value for name, value in results.items() if value is not None}


def _converted(inputs: c.LayerInputs, dtype: torch.dtype) -> c.LayerInputs:
    names = ("x", "weight", "lora_A", "lora_B", "grad_y")
    return replace(inputs, **{name: getattr(inputs, name).detach().to(dtype) for name in names})


def least(workload: Workload, model: nn.Module | None = None) -> cost.Cost:
    """Of all linears; attention and what else a model does are not in it. Accumulation repeats all but the norm."""
    if model is None:
        shapes = [(workload.out_features, workload.in_features)]
    else:
        shapes = [(one.out_features, one.in_features) for one in model.modules() if isinstance(one, nn.Linear)]
    passes = ["lora_linear forward"] if workload.mode in EVALUATION else ["lora_linear forward", "lora_linear backward"]
    passes *= MICRO_BATCHES if workload.mode == ACCUMULATED else 1
    passes += [] if workload.mode in EVALUATION else ["weight_norm"]
    total = cost.Cost(0)
    for N, K in shapes:
        size = cost.Size(workload.tokens, N, K, workload.rank, workload.dtype.itemsize)
        total = sum((cost.least(name, size) for name in passes), total)
    return total
