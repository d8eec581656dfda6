"""apply: which linears are taken, which are left out, and that nothing changes when something is refused."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nn_helpers import assert_unchanged, make_layer, snapshot
from torch import Tensor, nn

import lora_fast
from lora_fast import LinearWithDoRA, LinearWithLoRA, count_parameters, trainable_parameters
from lora_fast.nn.adapted import AdaptedLinear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(self.q_proj(x) + self.v_proj(x)))


class Model(nn.Module):
    """A language model with its head tied to its embedding, as transformers' are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]


@pytest.mark.parametrize("dora", [True, False])
def test_all_linear(dora: bool) -> None:
    model = Model().eval()
    model.blocks[1].train()
    before = model(TOKENS)
    assert lora_fast.apply(model, 4, 8.0, dora=dora) is model
    assert adapted(model) == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("q_proj", "v_proj", "mlp.0", "mlp.2")]
    layer = model.blocks[0].q_proj
    assert type(layer) is (LinearWithDoRA if dora else LinearWithLoRA)
    assert not layer.training
    assert model.blocks[1].q_proj.training
    torch.testing.assert_close(model(TOKENS), before)


def test_only_the_adapters_train() -> None:
    model = lora_fast.apply(Model(), 4, 8.0)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.rsplit(".", 1)[1] for name in names} == {"lora_A", "lora_B", "magnitude"}
    assert len(names) == 3 * 8
    parameters = list(trainable_parameters(model))
    assert {id(p) for p in parameters} == {id(model.get_parameter(name)) for name in names}
    assert len(parameters) == len(names)
    count = count_parameters(model)
    assert count == (sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters()))
    assert count.trainable == 2 * (4 * 16 * 2 + 8 * 2 + 4 * 24 * 2 + 16 + 8)
    model(TOKENS).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())

    model.head.requires_grad_(True)
    assert count_parameters(model).trainable == count.trainable + 88
    model.blocks[0].q_proj.lora_A.requires_grad_(False)
    assert len(list(trainable_parameters(model))) == len(names) - 1


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["q_proj"], (), ["blocks.0.q_proj", "blocks.1.q_proj"]),
        ({"q_proj", "mlp.2"}, ["blocks.1.q_proj"], ["blocks.0.q_proj", "blocks.0.mlp.2", "blocks.1.mlp.2"]),
        (["blocks.0.q_proj"], (), ["blocks.0.q_proj"]),
        (["head"], (), ["head"]),
        (["proj", "q_proj", "norm"], (), ["blocks.0.q_proj", "blocks.1.q_proj"]),
        (r"blocks\.\d\.[qv]_proj", (), [f"blocks.{i}.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")]),
        (r".*_proj", r".*\.0\..*", ["blocks.1.q_proj", "blocks.1.v_proj"]),
        ("head", (), ["head"]),
        ("All-Linear", ["mlp.0", "mlp.2", "v_proj"], ["blocks.0.q_proj", "blocks.1.q_proj"]),
    ],
)
def test_targets(targets: Any, exclude: Any, expected: list[str]) -> None:
    model = lora_fast.apply(Model(), 2, 1.0, targets=targets, exclude=exclude)
    assert adapted(model) == expected


@pytest.mark.parametrize(("scaling", "factor"), [("alpha", 6.0), ("alpha/r", 1.5), ("alpha/sqrt(r)", 3.0)])
def test_scaling(scaling: str, factor: float) -> None:
    model = lora_fast.apply(Model(), 4, 6.0, scaling=scaling)
    assert model.blocks[0].q_proj.alpha == factor


def test_options_reach_the_layers() -> None:
    options: dict[str, Any] = {"dropout": 0.25, "backend": "torch"}
    dora_options = {"norm_axis": "input", "detach_norm": False, "norm_reuse": False}
    layer = lora_fast.apply(Model(), 4, 6.0, **options, **dora_options, adapter_dtype=torch.bfloat16).blocks[0].q_proj
    assert {name: getattr(layer, name) for name in {**options, **dora_options}} == {**options, **dora_options}
    assert layer.lora_A.dtype == torch.bfloat16
    layer = lora_fast.apply(Model(), 4, 6.0, dora=False, **options).blocks[0].q_proj
    assert (layer.dropout, layer.backend) == (0.25, "torch")


def test_a_shared_linear_gets_one_wrapper() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU(), shared), "b": shared, "c": nn.Linear(8, 8)})
    lora_fast.apply(model, 2, 1.0, targets=["b"])
    assert isinstance(model["b"], LinearWithDoRA)
    assert model["a"][0] is model["a"][2] is model["b"]
    assert model["b"].linear is shared
    assert isinstance(model["c"], nn.Linear)
    assert len(list(trainable_parameters(model))) == 3
    # none of its names may be excluded
    other = nn.ModuleDict({"a": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    other["b"] = other["a"]
    lora_fast.apply(other, 2, 1.0, exclude=["b"])
    assert adapted(other) == ["c"]


def test_tied_weights_stay_tied() -> None:
    model = lora_fast.apply(Model(), 2, 1.0, targets=["head"])
    assert model.head.weight is model.embedding.weight
    assert not model.embedding.weight.requires_grad
    model(TOKENS).sum().backward()


def test_linears_tied_to_each_other() -> None:
    """Each has an adapter of its own; an update merged into the one would be in the other too."""
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    model[1].weight = model[0].weight
    lora_fast.apply(model.eval(), 2, 1.0)
    assert model[0].weight is model[1].weight
    for layer in model:
        nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 8)
    before = model(x)
    for layer, other in ((model[0], "1"), (model[1], "0")):
        with pytest.raises(RuntimeError, match=rf"^merge_: the weight is that of '{other}' too"):
            layer.merge_()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double().float()):
        with pytest.raises(RuntimeError, match="^merge_: the weight is that of '1' too"):
            twin[0].merge_()
    model[0] = model[0].merged()
    model[1] = model[1].merged()
    model[2].merge_()
    torch.testing.assert_close(model(x), before)


def test_a_weight_that_is_tied_no_longer_can_be_merged() -> None:
    model = lora_fast.apply(Model().eval(), 2, 1.0, targets=["head"])
    model.embedding.weight = nn.Parameter(model.embedding.weight.detach().clone())
    before = model(TOKENS)
    model.head.merge_()
    torch.testing.assert_close(model(TOKENS), before)


def test_data_parallel_comes_after(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.parallel.DistributedDataParallel(Block()))
        before = snapshot(model)
        with pytest.raises(ValueError, match="^model: it holds a DistributedDataParallel.*put the adapters in first"):
            lora_fast.apply(model, 2, 1.0)
        assert_unchanged(model, before)
    finally:
        dist.destroy_process_group()


def test_a_compiled_model() -> None:
    model = torch.compile(Block(), backend="aot_eager")
    x = torch.randn(3, 8)
    model(x)
    lora_fast.apply(model, 2, 1.0)
    for parameter in trainable_parameters(model):
        nn.init.normal_(parameter)
    torch.testing.assert_close(model(x), model._orig_mod(x))


def test_pefts_layers_are_adapted_already() -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    model = peft.get_peft_model(Block(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="^targets: base_model.model.q_proj adapted already; exclude them"):
        lora_fast.apply(model, 2, 1.0)
    assert_unchanged(model, before)
    lora_fast.apply(model, 2, 1.0, exclude=["q_proj"])
    assert adapted(model) == [f"base_model.model.{name}" for name in ("v_proj", "mlp.0", "mlp.2")]


def test_more_layers_can_be_adapted_later() -> None:
    model = lora_fast.apply(Model(), 2, 1.0, targets=["q_proj"])
    lora_fast.apply(model, 3, 1.0, targets=["v_proj"], dora=False)
    assert len(adapted(model)) == 4
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name or "magnitude" in name)
    lora_fast.apply(model, 3, 1.0, exclude=["q_proj", "v_proj"])
    assert len(adapted(model)) == 8


# linears whose owner reads the weight without calling them


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **{"batch_first": True, **options})
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.layer(x))


@pytest.fixture
def fast_path_off() -> Any:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def trained_apply(model: nn.Module) -> nn.Module:
    lora_fast.apply(model, 2, 1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_()
    return model


def test_the_encoder_layers_fast_path() -> None:
    model = Encoder()
    left_out = r"left out.*layer\.self_attn\.out_proj, layer\.linear1, layer\.linear2\..*set_fastpath_enabled\(False\)"
    with pytest.warns(UserWarning, match=left_out) as caught:
        trained_apply(model)
    assert caught[0].filename == __file__
    assert adapted(model) == ["project"]
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x), rtol=1e-4, atol=1e-5)


def test_without_the_fast_path_the_encoder_layers_linears_are_taken(fast_path_off: None) -> None:
    model = Encoder()
    with pytest.warns(UserWarning, match=r"left out.*: layer\.self_attn\.out_proj\. "):
        trained_apply(model)
    assert adapted(model) == ["layer.linear1", "layer.linear2", "project"]
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x), rtol=1e-4, atol=1e-5)


def test_an_encoder_layer_that_never_takes_the_fast_path() -> None:
    model = Encoder(batch_first=False)
    with pytest.warns(UserWarning, match=r"left out.*: layer\.self_attn\.out_proj\. "):
        trained_apply(model)
    assert len(adapted(model)) == 3
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x), rtol=1e-4, atol=1e-5)


# refusals


def refused(model: nn.Module, error: type[Exception], message: str, **options: Any) -> None:
    """``apply`` raises, and every module, parameter and requires_grad is as before."""
    modules, before = dict(model.named_modules()), snapshot(model)
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.random.get_rng_state()
    with pytest.raises(error, match=message):
        lora_fast.apply(model, **{"rank": 2, "alpha": 1.0, **options})
    assert dict(model.named_modules()) == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == requires_grad
    assert_unchanged(model, before)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank: got 0"),
        ({"rank": 1.5}, TypeError, "rank: got 1.5"),
        ({"alpha": float("nan")}, ValueError, "alpha: got nan"),
        ({"dropout": 1}, ValueError, "dropout: got 1"),
        ({"scaling": "alpha/2"}, ValueError, "scaling: got 'alpha/2', expected one of 'alpha', 'alpha/r', 'alpha/sqrt"),
        ({"norm_axis": 1}, ValueError, "norm_axis: got 1"),
        ({"adapter_dtype": torch.int32}, TypeError, "adapter_dtype: got torch.int32"),
        ({"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
        (
            {"targets": ["k_proj"]},
            ValueError,
            r"match no linear.*linears are blocks\.0\.q_proj, blocks\.0\.v_proj, .* and 1 more",
        ),
        ({"targets": "q_proj"}, ValueError, "targets: 'q_proj' .*match no linear"),
        ({"targets": ()}, ValueError, "match no linear"),
        ({"targets": ["norm"]}, ValueError, "match no linear"),
        ({"exclude": ".*"}, ValueError, r"exclude='\.\*' match no linear"),
        ({"targets": "("}, ValueError, "targets: got '\\('.*regular expression"),
        ({"exclude": "("}, ValueError, "exclude: got '\\('.*regular expression"),
        ({"targets": [nn.Linear]}, TypeError, "targets: got"),
    ],
)
def test_bad_arguments_change_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    refused(Model(), error, message, **options)


def test_a_model_without_linears() -> None:
    refused(nn.Sequential(nn.ReLU()), ValueError, r"the model has no torch\.nn\.Linear")


@pytest.mark.parametrize("model", [nn.Linear(4, 4), make_layer("lora")])
def test_a_bare_linear_cannot_be_replaced_in_place(model: nn.Module) -> None:
    refused(model, ValueError, "model: got a Linear.*cannot be replaced in place")


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*_proj"])
def test_already_adapted_layers_are_refused(targets: Any) -> None:
    model = lora_fast.apply(Model(), 2, 1.0, targets=["q_proj"])
    refused(model, ValueError, r"targets: blocks\.0\.q_proj, blocks\.1\.q_proj adapted already", targets=targets)


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_an_unsuitable_target_is_named_and_can_be_excluded() -> None:
    model = Model()
    model.blocks[1].mlp[2] = OwnForward(16, 8)
    message = re.escape("blocks.1.mlp.2: ") + ".*OwnForward has a forward of its own"
    refused(model, TypeError, message)
    refused(model, TypeError, message, targets=["mlp.2"])
    lora_fast.apply(model, 2, 1.0, exclude=["blocks.1.mlp.2"])
    assert len(adapted(model)) == 7


def test_nothing_left_after_what_is_left_out() -> None:
    refused(nn.Sequential(nn.MultiheadAttention(8, 2)), ValueError, "match no linear that can be adapted")


def test_a_large_rank_warns_once_and_names_the_layers() -> None:
    with pytest.warns(UserWarning, match=r"rank 9 is above min.* of blocks\.0\.q_proj, .*mlp\.2") as caught:
        lora_fast.apply(Model(), 9, 1.0)
    assert len(caught) == 1
    assert caught[0].filename == __file__


# the same choice as PEFT's


def transformers_models() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
    }
    llama = transformers.LlamaConfig(**small, num_key_value_heads=2)
    bert = transformers.BertConfig(**small)
    return {
        "llama": (transformers.LlamaForCausalLM, llama, None),
        "llama base": (transformers.LlamaModel, llama, None),
        "llama classifier": (transformers.LlamaForSequenceClassification, llama, "SEQ_CLS"),
        "bert": (transformers.BertModel, bert, None),
        "bert masked": (transformers.BertForMaskedLM, bert, None),
        "bert classifier": (transformers.BertForSequenceClassification, bert, "SEQ_CLS"),
        "roberta classifier": (
            transformers.RobertaForSequenceClassification,
            transformers.RobertaConfig(**small),
            "SEQ_CLS",
        ),
        "bert tokens": (transformers.BertForTokenClassification, bert, None),
        "t5": (
            transformers.T5ForConditionalGeneration,
            transformers.T5Config(d_model=8, d_ff=16, d_kv=4, num_layers=1, num_heads=2, vocab_size=32),
            None,
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama base",
        "llama classifier",
        "bert",
        "bert masked",
        "bert classifier",
        "roberta classifier",
        "bert tokens",
        "t5",
    ],
)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "query", "q", "dense"], r".*(query|v_proj|wo)"])
def test_targets_are_pefts(name: str, targets: Any) -> None:
    peft = pytest.importorskip("peft")
    model_class, config, task = transformers_models()[name]
    # with a task PEFT trains the head whole, and so leaves it out also where it is named
    lora_config = peft.LoraConfig(r=2, target_modules=targets, task_type=task if targets == "all-linear" else None)
    theirs = peft.get_peft_model(model_class(config), lora_config).base_model.model
    wanted = {n for n, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    model = lora_fast.apply(model_class(config), 2, 1.0, targets=targets)
    assert wanted
    assert set(adapted(model)) == wanted


def test_a_failure_midway_leaves_every_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["lora_fast.nn.apply"]
    real, made = LinearWithDoRA, []

    def failing(*args: Any, **options: Any) -> nn.Module:
        made.append(args)
        if len(made) == 2:
            raise MemoryError
        return real(*args, **options)

    model = Block()
    before = snapshot(model)
    monkeypatch.setattr(module, "LinearWithDoRA", failing)
    with pytest.raises(MemoryError):
        lora_fast.apply(model, 2, 1.0)
    assert_unchanged(model, before)


def test_what_mamba_s_kernels_read_is_left_out() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.MambaModel(
        transformers.MambaConfig(hidden_size=8, state_size=2, num_hidden_layers=1, vocab_size=11, time_step_rank=2)
    )
    with pytest.warns(UserWarning, match=r"left out.*dt_proj"):
        lora_fast.apply(model, 2, 1.0)
    model(torch.arange(5)[None]).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in lora_fast.trainable_parameters(model))
