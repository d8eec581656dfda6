"""Merging whole tensors, tied tensors and vocabularies of another size: what PEFT computes, or a clear refusal."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
from safetensors.torch import load_file, save_file
from toy_folders import MERGED, B, W, embedding_lora, lora, merge

from lora_fast.adapters import architecture

UNTIED = {"tie_word_embeddings": False}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 4,
    "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9, "tie_word_embeddings": True,
}  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj"


def llama(tie: bool = True) -> dict[str, Tensor]:
    """All tensors of the model of LLAMA, the embedding zero."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "tie_word_embeddings": tie}))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if tie is False or name != HEAD}
    return tensors | {EMBEDDING: torch.zeros(9, 4)}


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        architecture.importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name)
    )


def test_an_update_comes_on_top_of_the_saved_base_weight(tmp_path: Path) -> None:
    tensors, _ = merge(tmp_path, lora("head") | {"head.base_layer.weight": 2 * W}, {"head.weight": W.clone()})
    assert torch.equal(tensors["head.weight"], MERGED + W)


def test_an_embedding_s_saved_base_weight_and_the_bias_below_an_adapter(tmp_path: Path) -> None:
    adapter = embedding_lora("words") | {"words.base_layer.weight": torch.full((9, 4), 2.0)}
    adapter |= lora("q") | {"q.base_layer.bias": torch.ones(4)}
    base = {"words.weight": torch.zeros(9, 4), "q.weight": W.clone(), "q.bias": torch.zeros(4)}
    tensors, _ = merge(tmp_path, adapter, base, {"bias": "lora_only"}, UNTIED)
    assert torch.equal(tensors["words.weight"], torch.full((9, 4), 3.0))
    assert torch.equal(tensors["q.bias"], torch.ones(4))
    assert torch.equal(tensors["q.weight"], MERGED)


def test_what_is_saved_below_an_adapter_is_rounded_once(tmp_path: Path) -> None:
    base = torch.full((4, 4), 1 + 2**-9)  # half way between two numbers of bfloat16
    adapter = lora("q") | {"q.base_layer.weight": base, "q.lora_B.weight": B * 2**-12}
    tensors, _ = merge(tmp_path, adapter, {"q.weight": W.bfloat16()})
    assert torch.equal(tensors["q.weight"], (base + B * 2**-12).bfloat16().expand(4, 4))


@pytest.mark.parametrize("name", ["q.weight", "q.bias"])
def test_a_whole_tensor_beside_an_adapter_under_no_name_of_peft_s_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name} stands beside an adapter of q; expected q.base_layer"):
        merge(tmp_path, lora("q") | {name: W.clone()}, {"q.weight": W.clone(), "q.bias": torch.zeros(4)})


def test_both_sides_of_peft_s_wrapper_around_a_resized_embedding(tmp_path: Path) -> None:
    """PEFT writes the copy twice, and the module that it stands in for."""
    new = torch.ones(9, 4)
    adapter = lora("q") | {
        "words.weight": new,
        "words.modules_to_save.weight": new.clone(),
        "words.original_module.weight": torch.zeros(9, 4),
    }
    base = {"q.weight": W.clone(), "words.weight": torch.zeros(9, 4)}
    tensors, _ = merge(tmp_path, adapter, base, {"modules_to_save": ["words"]}, UNTIED)
    assert torch.equal(tensors["words.weight"], new)
    assert len(tensors) == 2


def test_two_different_copies_are_refused(tmp_path: Path) -> None:
    adapter = lora("q") | {"words.weight": torch.ones(9, 4), "words.modules_to_save.weight": torch.zeros(9, 4)}
    with pytest.raises(ValueError, match=r"words.weight and words.modules_to_save.weight differ"):
        merge(tmp_path, adapter, {"q.weight": W.clone(), "words.weight": torch.zeros(9, 4)}, base_config=UNTIED)


@pytest.mark.parametrize("what", ["copy", "update"])
@pytest.mark.parametrize("of", ["embedding", "head"])
def test_a_tied_embedding_and_its_head_part(what: str, of: str, tmp_path: Path) -> None:
    name = EMBEDDING if of == "embedding" else HEAD
    module = name.removesuffix(".weight")
    if what == "copy":
        adapter, config = {name: torch.ones(9, 4)}, {"modules_to_save": [module]}
    elif of == "embedding":
        adapter, config = embedding_lora(module), {}
    else:
        adapter = {f"{module}.lora_A.weight": torch.ones(1, 4), f"{module}.lora_B.weight": torch.ones(9, 1)}
        config = {}
    tensors, after = merge(tmp_path, lora(Q) | adapter, llama(), config, LLAMA)
    other = HEAD if of == "embedding" else EMBEDDING
    assert torch.equal(tensors[name], torch.ones(9, 4))
    assert torch.equal(tensors[other], torch.zeros(9, 4))
    assert after["tie_word_embeddings"] is False


def test_both_ends_with_one_content_stay_tied(tmp_path: Path) -> None:
    """As PEFT's ensure_weight_tying writes them: the head's update is the embedding's, seen from its other side."""
    adapter = embedding_lora("model.embed_tokens")
    adapter |= {"lm_head.lora_A.weight": torch.ones(1, 4), "lm_head.lora_B.weight": torch.ones(9, 1)}
    tensors, after = merge(tmp_path, adapter, llama(), base_config=LLAMA)
    assert torch.equal(tensors[EMBEDDING], torch.ones(9, 4))
    assert HEAD not in tensors
    assert after == LLAMA


def test_what_is_written_into_the_base_model_changes_both_ends(tmp_path: Path) -> None:
    adapter = lora(Q) | {EMBEDDING: torch.ones(9, 4)}
    tensors, after = merge(tmp_path, adapter, llama(), base_config=LLAMA)
    assert torch.equal(tensors[EMBEDDING], torch.ones(9, 4))
    assert after == LLAMA
    assert HEAD not in tensors


def test_two_values_for_one_tied_tensor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ, but are one tensor in the checkpoint"):
        merge(tmp_path, lora(Q) | {EMBEDDING: torch.ones(9, 4), HEAD: torch.zeros(9, 4)}, llama(), {}, LLAMA)


def test_of_two_stored_ends_that_are_said_to_be_tied_the_other_is_kept(tmp_path: Path) -> None:
    base = llama(tie=False) | {HEAD: torch.zeros(9, 4)}
    adapter, config = lora(Q) | {HEAD: torch.ones(9, 4)}, {"modules_to_save": ["lm_head"]}
    tensors, after = merge(tmp_path, adapter, base, config, LLAMA)
    assert torch.equal(tensors[HEAD], torch.ones(9, 4))
    assert torch.equal(tensors[EMBEDDING], torch.zeros(9, 4))
    assert after["tie_word_embeddings"] is False


def test_what_is_written_into_the_base_model_changes_both_stored_ends(tmp_path: Path) -> None:
    base = llama(tie=False) | {HEAD: torch.zeros(9, 4)}
    tensors, after = merge(tmp_path, lora(Q) | {EMBEDDING: torch.ones(9, 4)}, base, base_config=LLAMA)
    assert torch.equal(tensors[HEAD], torch.ones(9, 4))
    assert torch.equal(tensors[EMBEDDING], torch.ones(9, 4))
    assert after == LLAMA


def test_two_stored_ends_of_different_content_are_not_tied(tmp_path: Path) -> None:
    """Whatever config.json says: transformers does not tie them either."""
    base = llama(tie=False) | {HEAD: torch.full((9, 4), 3.0)}
    tensors, after = merge(tmp_path, lora(Q) | {EMBEDDING: torch.ones(9, 4)}, base, base_config=LLAMA)
    assert torch.equal(tensors[HEAD], torch.full((9, 4), 3.0))
    assert after == LLAMA


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    adapter = lora("layers.0.self_attn.q_proj") | lora(Q)
    with pytest.raises(ValueError, match=rf"are both the checkpoint's {Q}.weight"):
        merge(tmp_path, adapter, llama(), base_config=LLAMA)


def test_another_end_of_a_tie_that_the_new_configuration_ends_is_written_too(tmp_path: Path) -> None:
    """BERT's head has a bias that is tied by the same word in config.json as its weight."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        )
    )
    model.save_pretrained(tmp_path / "bert")
    base = load_file(tmp_path / "bert" / "model.safetensors")
    base_config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "model.safetensors").unlink()
    (tmp_path / "bert" / "config.json").unlink()
    (tmp_path / "bert").rmdir()
    adapter = embedding_lora("bert.embeddings.word_embeddings")
    tensors, _ = merge(tmp_path, adapter, base, base_config=base_config)
    bias = base["cls.predictions.bias"]
    assert torch.equal(tensors["cls.predictions.decoder.bias"], bias)
    assert torch.equal(tensors["cls.predictions.decoder.weight"], base["bert.embeddings.word_embeddings.weight"])


T5 = {
    "model_type": "t5", "d_model": 4, "d_kv": 4, "d_ff": 4, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 1,
    "vocab_size": 9, "decoder_start_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("tie", [True, False, None])
@pytest.mark.parametrize("name", ["T5EncoderModel", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("what", ["shared", "encoder.embed_tokens"])
def test_t5_s_embeddings_cannot_part(name: str, tie: bool | None, what: str, tmp_path: Path) -> None:
    """transformers ties them always; the head of later checkpoints is stored, with a content of its own."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = getattr(transformers, name)(transformers.T5Config(**T5))
    base = {key: tensor.clone() for key, tensor in model.state_dict().items() if "embed_tokens" not in key}
    if "lm_head.weight" in base:
        base["lm_head.weight"] += 1
    base_config = {"architectures": [name], **T5, **({} if tie is None else {"tie_word_embeddings": tie})}
    with pytest.raises(ValueError, match="is tied to another tensor whatever config.json says"):
        merge(tmp_path, embedding_lora(what), base, base_config=base_config)


def test_t5_s_stored_head_merges(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    base = {key: tensor.clone() for key, tensor in model.state_dict().items() if "embed_tokens" not in key}
    base["lm_head.weight"] += 1
    adapter = {"lm_head.lora_A.weight": torch.ones(1, 4), "lm_head.lora_B.weight": torch.ones(9, 1)}
    base_config = {"architectures": ["T5ForConditionalGeneration"], **T5, "tie_word_embeddings": False}
    tensors, after = merge(tmp_path, adapter, base, base_config=base_config)
    assert torch.equal(tensors["lm_head.weight"], base["lm_head.weight"] + 1)
    assert torch.equal(tensors["shared.weight"], base["shared.weight"])
    assert after == base_config


def test_a_model_that_computes_otherwise_when_untied_is_refused(tmp_path: Path) -> None:
    """Switch Transformers scales what goes into a tied head."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    switch = {**T5, "model_type": "switch_transformers", "num_experts": 2, "tie_word_embeddings": True}
    model = transformers.SwitchTransformersForConditionalGeneration(transformers.SwitchTransformersConfig(**switch))
    base = {key: tensor.clone() for key, tensor in model.state_dict().items() if "embed_tokens" not in key}
    del base["lm_head.weight"]
    adapter = {"lm_head.lora_A.weight": torch.ones(1, 4), "lm_head.lora_B.weight": torch.ones(9, 1)}
    base_config = {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        **switch,
        "tie_word_embeddings": True,
    }
    with pytest.raises(ValueError, match=r"computes something else too when tie_word_embeddings .* is false"):
        merge(tmp_path, adapter, base, base_config=base_config)


@pytest.mark.parametrize("tie", [True, False])
def test_an_embedding_whose_head_the_checkpoint_lacks(tie: bool, tmp_path: Path) -> None:
    """The adapter's "model." is the name of this checkpoint's model inside one with a head."""
    base = {name.removeprefix("model."): tensor for name, tensor in llama().items()}
    base_config = {**LLAMA, "architectures": ["LlamaModel"], "tie_word_embeddings": tie}
    if tie:
        with pytest.raises(
            ValueError, match="embed_tokens.weight may be tied to the head of the model that the adapter"
        ):
            merge(tmp_path, embedding_lora("model.embed_tokens"), base, base_config=base_config)
    else:
        tensors, _ = merge(tmp_path, embedding_lora("model.embed_tokens"), base, base_config=base_config)
        assert torch.equal(tensors["embed_tokens.weight"], torch.ones(9, 4))


@pytest.mark.parametrize("head", ["BertModel", "LlamaForSequenceClassification", "DistilBertForTokenClassification"])
@pytest.mark.parametrize("known", [True, False], ids=["transformers", "without"])
def test_without_a_head_nothing_is_tied(head: str, known: bool, tmp_path: Path, request: Any) -> None:
    if not known:
        request.getfixturevalue("without_transformers")
    base_config = {"tie_word_embeddings": True, "vocab_size": 9, "architectures": [head]}
    base = {"embeddings.words.weight": torch.zeros(9, 4), "encoder.q.weight": W.clone()}
    tensors, after = merge(tmp_path, embedding_lora("embeddings.words"), base, base_config=base_config)
    assert torch.equal(tensors["embeddings.words.weight"], torch.ones(9, 4))
    assert after == base_config


@pytest.mark.parametrize(
    "base_config",
    [
        {"tie_word_embeddings": True, "vocab_size": 9},
        {"text_config": {"tie_word_embeddings": True, "vocab_size": 9}},
        {"vocab_size": 9},
        {"tie_word_embeddings": True, "vocab_size": 9, "architectures": ["SomeOfItsOwnForCausalLM"]},
        {"tie_word_embeddings": False, "vocab_size": 9, "is_encoder_decoder": True},
    ],
)
@pytest.mark.parametrize("what", ["copy", "update"])
def test_a_perhaps_tied_tensor_whose_head_nobody_knows_is_refused(
    base_config: dict[str, Any], what: str, tmp_path: Path
) -> None:
    adapter = {"words.weight": torch.ones(9, 4)} if what == "copy" else embedding_lora("words")
    config = {"modules_to_save": ["words"]} if what == "copy" else {}
    base = {"q.weight": W.clone(), "words.weight": torch.zeros(9, 4)}
    with pytest.raises(ValueError, match=r"words.weight may be tied .* the head's name is not known"):
        merge(tmp_path, lora("q") | adapter, base, config, base_config)


@pytest.mark.parametrize("name", ["model.embed_tokens", "transformer.wte", "shared", "tok_embeddings"])
@pytest.mark.parametrize("config", [{}, {"vocab_size": 7}, {"n_words": 9}], ids=["none", "padded", "another word"])
def test_a_copy_of_a_perhaps_tied_embedding_is_refused_too(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    """``modules_to_save`` parts the embedding from a head that nobody knows of."""
    adapter = lora("q") | {f"{name}.weight": torch.ones(9, 4)}
    base = {"q.weight": W.clone(), f"{name}.weight": torch.zeros(9, 4)}
    own = {"modules_to_save": [name.rpartition(".")[2]]}
    with pytest.raises(ValueError, match=rf"{name}\.weight may be tied to the output head"):
        merge(tmp_path, adapter, base, own, config)
    for index, said in enumerate((UNTIED, {"architectures": ["SomeModel"]})):
        tensors, _ = merge(tmp_path / str(index), adapter, base, own, config | said)
        assert torch.equal(tensors[f"{name}.weight"], torch.ones(9, 4))


@pytest.mark.parametrize("name", ["model.score", "transformer.wpe", "model.embed_positions", "classifier"])
def test_a_copy_of_another_module_is_merged(name: str, tmp_path: Path) -> None:
    adapter = lora("q") | {f"{name}.weight": torch.ones(3, 4)}
    base = {"q.weight": W.clone(), f"{name}.weight": torch.zeros(3, 4)}
    tensors, _ = merge(tmp_path, adapter, base, {"modules_to_save": [name.rpartition(".")[2]]})
    assert torch.equal(tensors[f"{name}.weight"], torch.ones(3, 4))


def test_a_trained_head_that_the_base_lacks_is_named_with_the_way_out(tmp_path: Path) -> None:
    adapter = lora("q") | {"score.weight": torch.ones(3, 4)}
    own = {"modules_to_save": ["score"]}
    told = "the adapter was trained on a model with another head: save the base"
    with pytest.raises(
        ValueError, match=rf"not in the checkpoint: score.weight; no config.json is there .*\. Or {told}"
    ):
        merge(tmp_path / "unknown", adapter, {"q.weight": W.clone()}, own)
    pytest.importorskip("transformers", reason="the demo extra is not installed")
    with pytest.raises(ValueError, match=rf"not in the checkpoint: score.weight\. {told.capitalize()}"):
        merge(tmp_path / "known", lora(Q) | {"score.weight": torch.ones(3, 4)}, llama(), own, LLAMA)


def test_a_tied_head_that_was_saved_is_found_by_transformers_which_is_said(
    tmp_path: Path, without_transformers: None
) -> None:
    """A copy of the head, which a tied model's file lacks: the way out may be either."""
    adapter = lora(Q) | {HEAD: torch.ones(9, 4)}
    with pytest.raises(ValueError, match=r"install transformers to follow .*\. Or the adapter .* another head"):
        merge(tmp_path, adapter, llama(True), {"modules_to_save": ["lm_head"]}, LLAMA)


def test_without_transformers_the_error_says_that_it_would_help(tmp_path: Path, without_transformers: None) -> None:
    with pytest.raises(ValueError, match="install transformers to follow the names and ties"):
        merge(tmp_path, lora(Q) | embedding_lora("model.embed_tokens"), llama(), base_config=LLAMA)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_resized_vocabulary(tie: bool, tmp_path: Path) -> None:
    new = torch.ones(11, 4)
    base_config = {**LLAMA, "tie_word_embeddings": tie}
    adapter = lora(Q) | {EMBEDDING: new, HEAD: new.clone() if tie else 2 * new}
    tensors, after = merge(tmp_path, adapter, llama(tie), base_config=base_config)
    assert after == {**base_config, "vocab_size": 11}
    assert torch.equal(tensors[EMBEDDING], new)
    assert (HEAD in tensors) is not tie
    transformers = pytest.importorskip("transformers")
    model, loading = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["mismatched_keys"]
    assert not loading["missing_keys"]
    assert torch.equal(model.lm_head.weight, new if tie else 2 * new)


def test_half_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another vocabulary .* but not for lm_head.weight"):
        merge(tmp_path, lora(Q) | {EMBEDDING: torch.ones(11, 4)}, llama(tie=False), {}, {**LLAMA, **UNTIED})


@pytest.mark.parametrize(
    ("shape", "base_config", "message"),
    [
        ((4, 11), UNTIED, r"has shape \[4, 11\] for words.weight, which has \[9, 4\]"),
        ((11, 4), UNTIED, "only a vocabulary, whose size config.json has, can become another"),
        ((11, 4), {**UNTIED, "vocab_size": 8}, "only a vocabulary"),
        ((11, 4), {**UNTIED, "vocab_size": 9}, "another vocabulary .* but not for head.weight"),
    ],
)
def test_another_shape_is_refused(
    shape: tuple[int, int], base_config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = {"q.weight": W.clone(), "words.weight": torch.zeros(9, 4), "head.weight": torch.zeros(9, 4)}
    with pytest.raises(ValueError, match=message):
        merge(tmp_path, lora("q") | {"words.weight": torch.ones(shape)}, base, {}, base_config)


def test_a_new_index_has_the_tensors_and_bytes_of_out(tmp_path: Path) -> None:
    from lora_fast.merge_checkpoint import merge_checkpoint

    merge(tmp_path, lora(Q) | {EMBEDDING: torch.ones(9, 4)}, llama(), {"modules_to_save": ["embed_tokens"]}, LLAMA)
    base = tmp_path / "base"
    names = sorted(load_file(base / "model.safetensors"))
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    weight_map = {name: f"model-{1 + index % 2}.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, base / shard)
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1, "other": 2}, "weight_map": weight_map})
    )
    done = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "sharded")
    assert done.untied == [HEAD]
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    whole = {name: load_file(tmp_path / "sharded" / shard)[name] for name, shard in index["weight_map"].items()}
    single = load_file(tmp_path / "out" / "model.safetensors")
    assert whole.keys() == single.keys()
    assert all(torch.equal(whole[name], single[name]) for name in whole)
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in whole.values()), "other": 2}


def test_integers_of_a_saved_module(tmp_path: Path) -> None:
    count = torch.tensor(7)
    base = {"q.weight": W.clone(), "norm.weight": torch.ones(4), "norm.count": torch.tensor(0)}
    adapter = lora("q") | {"norm.weight": torch.zeros(4), "norm.count": count}
    tensors, _ = merge(tmp_path, adapter, base, {"modules_to_save": ["norm"]})
    assert tensors["norm.count"].item() == 7


@pytest.mark.parametrize("unit", [1, 2])
def test_a_dilation_that_peft_s_lora_A_does_not_have_is_refused(unit: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    dac = {
        "architectures": ["DacModel"], "model_type": "dac", "encoder_hidden_size": 4, "decoder_hidden_size": 4,
        "downsampling_ratios": [2], "n_codebooks": 1, "codebook_size": 4, "codebook_dim": 2,
    }  # fmt: skip
    name = f"encoder.block.0.res_unit{unit}.conv1"  # dilation 1, and 3
    adapter = {f"{name}.lora_A.weight": torch.ones(1, 4, 7), f"{name}.lora_B.weight": torch.ones(4, 1, 1)}
    base = {f"{name}.weight": torch.zeros(4, 4, 7)}
    if unit == 1:
        assert torch.equal(merge(tmp_path, adapter, base, base_config=dac)[0][f"{name}.weight"], torch.ones(4, 4, 7))
    else:
        with pytest.raises(ValueError, match="a convolution with a dilation or a padding_mode"):
            merge(tmp_path, adapter, base, base_config=dac)
