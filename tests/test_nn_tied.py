"""apply on weights that stand in several modules: transformers' records of them, saving, the Trainer, and merging."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast
from lora_fast.nn.adapted import AdaptedLinear

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

VOCABULARY = 13
TOKENS = torch.randint(0, VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(0))


def llama(tie: bool = True) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=tie, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    """Its head's bias is tied too, to one of the head's own."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return transformers.BertForMaskedLM(config)


class Heads(transformers.PreTrainedModel):
    """Heads tied to the first by a pattern and a module's name, as DETR's descendants have them."""

    config_class = transformers.PretrainedConfig
    _tied_weights_keys = {r"heads\.[1-9]": "heads.0"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(transformers.PretrainedConfig(tie_word_embeddings=True))
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.heads = nn.ModuleList([nn.Linear(8, VOCABULARY) for _ in range(3)])
        self.post_init()
        self.tie_weights()

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embedding(input_ids)
        return transformers.modeling_outputs.MaskedLMOutput(logits=sum(head(x) for head in self.heads))


# the model, the targets, (target, source) of what is tied, as the adapted model names it
HEAD = "lm_head.linear.weight"
MODELS: dict[str, tuple[Callable[[], Any], list[str], list[tuple[str, str]]]] = {
    "llama": (llama, ["q_proj", "lm_head"], [(HEAD, "model.embed_tokens.weight")]),
    "gpt2": (gpt2, ["lm_head"], [(HEAD, "transformer.wte.weight")]),
    "bert": (
        bert,
        ["query", "decoder"],
        [
            ("cls.predictions.decoder.linear.weight", "bert.embeddings.word_embeddings.weight"),
            ("cls.predictions.decoder.linear.bias", "cls.predictions.bias"),
        ],
    ),
    "pattern": (
        Heads,
        ["heads.0", "heads.1", "heads.2"],
        [(f"heads.{i}.linear.{name}", f"heads.0.linear.{name}") for i in (1, 2) for name in ("weight", "bias")],
    ),
    "pattern, target": (
        Heads,
        ["heads.1"],
        [(f"heads.1.linear.{name}", f"heads.0.{name}") for name in ("weight", "bias")],
    ),
    "pattern, source": (
        Heads,
        ["heads.0"],
        [(f"heads.2.{name}", f"heads.0.linear.{name}") for name in ("weight", "bias")],
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def adapted(name: str, *, seed: int = 0) -> Any:
    """A model with adapters that have moved, each otherwise."""
    make, targets, _ = MODELS[name]
    torch.manual_seed(0)
    model = lora_fast.apply(make(), 2, 1.0, targets=targets)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, AdaptedLinear):
            nn.init.normal_(layer.lora_B, generator=generator)
    return model.eval()


def assert_tied(model: Any, name: str) -> None:
    for target, source in MODELS[name][2]:
        assert model.get_parameter(target) is model.get_parameter(source), target


def assert_same(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name
    assert torch.equal(other.eval()(input_ids=TOKENS).logits, model.eval()(input_ids=TOKENS).logits)


@every_model
def test_save_pretrained_and_back(name: str, tmp_path: Path) -> None:
    model, other = adapted(name), adapted(name, seed=1)
    with torch.no_grad():
        model.get_parameter(MODELS[name][2][0][1]).mul_(2)
    model.save_pretrained(tmp_path)
    saved = safetensors_torch.load_file(tmp_path / "model.safetensors")
    unsaved = {target for target, _ in MODELS[name][2]}
    assert unsaved.isdisjoint(saved)
    result = other.load_state_dict(saved, strict=False)
    assert unsaved <= set(result.missing_keys)
    assert not result.unexpected_keys
    assert_same(model, other)
    assert_tied(other, name)


@every_model
def test_state_dict_and_save_model(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = adapted(name, seed=1)
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert_same(model, other)
    safetensors_torch.save_model(model, tmp_path / "model.safetensors")
    other = adapted(name, seed=1)
    safetensors_torch.load_model(other, tmp_path / "model.safetensors")
    assert_same(model, other)


@every_model
def test_tie_weights_ties_the_weights_and_leaves_the_adapters(name: str) -> None:
    model, other = adapted(name), adapted(name)
    model.tie_weights()
    assert_same(model, other)
    for recompute in (True, False):
        target, source = MODELS[name][2][0]
        owner, _, key = target.rpartition(".")
        setattr(model.get_submodule(owner), key, nn.Parameter(torch.zeros(VOCABULARY, 8), requires_grad=False))
        assert model.get_parameter(target) is not model.get_parameter(source)
        model.tie_weights(recompute_mapping=recompute)
        assert_tied(model, name)
        assert_same(model, other)


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_inside_another(inside: bool, tmp_path: Path) -> None:
    """Each keeps a record, with names of its own."""

    class Outer(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig
        _supports_sdpa = True

        def __init__(self, inner: Any) -> None:
            super().__init__(inner.config)
            self.inner = inner
            self.post_init()

        def forward(self, input_ids: Tensor) -> Any:
            return self.inner(input_ids)

    model = Outer(llama())
    lora_fast.apply(model.inner if inside else model, 2, 1.0, targets=["lm_head"])
    assert model.inner.all_tied_weights_keys == {HEAD: "model.embed_tokens.weight"}
    model.inner.tie_weights()
    model.tie_weights()
    assert model.inner.lm_head.weight is model.inner.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    if not inside:  # the outer's record is out of sight otherwise; tie_weights and saving go by the inner's
        assert model.all_tied_weights_keys == {"inner." + HEAD: "inner.model.embed_tokens.weight"}


def test_only_the_record_of_an_adapted_head_is_rewritten() -> None:
    heads = Heads()
    for model, targets in ((llama(), ["q_proj"]), (llama(False), ["q_proj"])):
        before = dict(model.all_tied_weights_keys)
        lora_fast.apply(model, 2, 1.0, targets=targets)
        assert "_tied_weights_keys" not in vars(model)
        assert model.all_tied_weights_keys == before
    with pytest.raises(ValueError, match="match no linear"):
        lora_fast.apply(heads, 2, 1.0, targets=["embedding"])
    assert heads._tied_weights_keys is Heads._tied_weights_keys
    untied = lora_fast.apply(llama(False), 2, 1.0, targets=["lm_head"])
    assert untied.all_tied_weights_keys == {}
    assert transformers.LlamaForCausalLM._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert Heads._tied_weights_keys == {r"heads\.[1-9]": "heads.0"}


def test_the_patterns_of_transformers_4() -> None:
    class Old(nn.Module):
        _tied_weights_keys = [r"lm_head\.weight", "unused"]  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.lm_head, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    model = lora_fast.apply(Old(), 2, 1.0, targets=["lm_head", "other"])
    assert Old._tied_weights_keys == [r"lm_head\.weight", "unused"]
    assert model._tied_weights_keys[:2] == Old._tied_weights_keys
    matching = {key for key in model.state_dict() if any(re.search(p, key) for p in model._tied_weights_keys)}
    assert matching == {HEAD}


# the Trainer


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[i], "labels": TOKENS[i]}


def train(model: Any, folder: Path, steps: int, resume: bool = False, **options: Any) -> Any:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        learning_rate=0.05, lr_scheduler_type="constant", disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Data(), eval_dataset=Data())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_trainer_resumes(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    embedding = model.get_input_embeddings().weight.detach().clone()
    train(model, tmp_path / "at once", 3)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    train(adapted(name), tmp_path / "in two", 2)
    other = adapted(name, seed=1)
    train(other, tmp_path / "in two", 3, resume=True)
    assert_same(model, other)
    assert_tied(other, name)
    assert not torch.equal(model.lm_head.lora_B, adapted(name).lm_head.lora_B)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_trainer_loads_the_best(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    # the "best" has the largest loss: it's the first, so that the last would be wrong
    trainer = train(
        model, tmp_path, 3, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, greater_is_better=True
    )
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] == max(losses) > losses[-1]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    first = adapted(name)
    train(first, tmp_path / "first", 1)
    assert_same(first, model)
    assert_tied(model, name)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
@every_model
def test_an_offloaded_model(name: str, how: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = adapted(name)
    wanted = model(input_ids=TOKENS).logits
    arguments = [str(tmp_path)] if how == "disk_offload" else []
    getattr(accelerate, how)(model, *arguments, execution_device="cpu")
    assert torch.equal(model(input_ids=TOKENS).logits, wanted)


# merging


@every_model
def test_merging_a_tied_weight_is_refused(name: str) -> None:
    model = adapted(name)
    wanted = model(input_ids=TOKENS).logits
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layer = model.get_submodule(MODELS[name][1][-1] if name != "bert" else "cls.predictions.decoder")
    with pytest.raises(RuntimeError, match=r"^merge_: the weight is that of '.*' too, .*merged\(\)"):
        layer.merge_()
    assert not layer.is_merged
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    layer.linear.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    layer.merge_()
    torch.testing.assert_close(model(input_ids=TOKENS).logits, wanted)
